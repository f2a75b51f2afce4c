//! A deletion, a tag that moves, and a save that fails free at once what they alone needed.

use std::fs;

use serde_json::json;
use upperdeck::store::layout::{Directory, Error};

use crate::*;

#[test]
fn an_image_frees_its_own_blobs_and_not_those_that_it_shares() {
    let dir = tempfile::tempdir().unwrap();
    let at = |tag: &str| format!("oci:{}:{tag}", dir.path().display());
    let (base, one, two) = (vec![b'b'; 9000], vec![b'1'; 500], vec![b'2'; 700]);
    let layout = Directory::new(dir.path());
    save(&layout, &[&base, &one], "one").unwrap();
    save(&layout, &[&base, &one], "again").unwrap();
    save(&layout, &[&base, &two], "two").unwrap();
    let removed = &image_json(&["rm", &at("one")])[0];
    assert_eq!(
        (&removed["image_deleted"], &removed["freed"]),
        (&json!(false), &json!(0))
    );
    let removed = &image_json(&["rm", &at("again")])[0];
    let own = 500 + documents(&[&base, &one]);
    assert_eq!(
        (&removed["image_deleted"], &removed["freed"]),
        (&json!(true), &json!(own))
    );
    assert!(removed["space"].as_str().unwrap().contains("free again"));
    assert_eq!(blobs(dir.path()), of_images(&[&[&base, &two]]));
    let removed = &image_json(&["rm", &at("two")])[0];
    assert_eq!(removed["freed"], json!(9700 + documents(&[&base, &two])));
    assert_eq!(blobs(dir.path()).len(), 0);
    assert_eq!(remains(dir.path()), [""; 0]);
    // The layout is still one.
    save(&layout, &[&base], "three").unwrap();
    assert_eq!(blobs(dir.path()), of_images(&[&[&base]]));
}

#[test]
fn a_tag_that_moves_frees_the_image_that_it_leaves() {
    let dir = tempfile::tempdir().unwrap();
    let layout = Directory::new(dir.path());
    save(&layout, &[b"base", b"one"], "latest").unwrap();
    save(&layout, &[b"base", b"one", b"two"], "latest").unwrap();
    let kept = of_images(&[&[b"base", b"one", b"two"]]);
    assert_eq!(blobs(dir.path()), kept);
    save(&layout, &[b"base", b"one", b"two"], "latest").unwrap();
    assert_eq!(blobs(dir.path()), kept);
    // One that has another tag stays.
    save(&layout, &[b"base", b"one", b"two"], "kept").unwrap();
    save(&layout, &[b"base"], "latest").unwrap();
    assert_eq!(
        blobs(dir.path()),
        of_images(&[&[b"base", b"one", b"two"], &[b"base"]])
    );
}

#[test]
fn what_is_attached_to_an_image_goes_with_it() {
    let dir = tempfile::tempdir().unwrap();
    let layout = Directory::new(dir.path());
    let digest = save(&layout, &[b"base"], "v1").unwrap();
    plant(dir.path(), b"{}");
    plant(dir.path(), b"signature");
    let attached = |subject: &str, note: &str| {
        json!({"schemaVersion": 2, "mediaType": MANIFEST, "artifactType": "application/x.signature",
            "config": descriptor("application/vnd.oci.empty.v1+json", b"{}"),
            "layers": [descriptor("application/x.signature", b"signature")],
            "subject": {"mediaType": MANIFEST, "digest": subject, "size": manifest(&[b"base"]).len()},
            "annotations": {"note": note}})
        .to_string()
    };
    let signature = attached(&digest.to_string(), "of the image");
    let of_it = attached(&Digest::of(&signature).to_string(), "of the signature");
    for text in [&signature, &of_it] {
        plant(dir.path(), text.as_bytes());
        list(dir.path(), descriptor(MANIFEST, text.as_bytes()));
    }
    let removed = &image_json(&["rm", &format!("oci:{}:v1", dir.path().display())])[0];
    assert_eq!(
        removed["accessories"],
        json!(["application/x.signature", "application/x.signature"])
    );
    assert_eq!(blobs(dir.path()).len(), 0);
}

#[test]
fn an_image_is_deleted_even_if_another_cannot_be_read_and_then_nothing_is_freed() {
    let dir = tempfile::tempdir().unwrap();
    let layout = Directory::new(dir.path());
    let other = save(&layout, &[b"base", b"one"], "one").unwrap();
    save(&layout, &[b"base", b"two"], "two").unwrap();
    fs::write(dir.path().join("blobs/sha256").join(other.hex()), "{").unwrap();
    let removed = &image_json(&["rm", &format!("oci:{}:two", dir.path().display())])[0];
    assert_eq!(
        (&removed["image_deleted"], &removed["freed"]),
        (&json!(true), &json!(null))
    );
    let space = removed["space"].as_str().unwrap();
    assert!(
        space.contains("nothing is freed") && space.contains("damaged"),
        "{space}"
    );
    assert_eq!(
        blobs(dir.path()),
        of_images(&[&[b"base", b"one"], &[b"base", b"two"]])
    );
    // Once that is gone, the next command frees what was kept for it.
    image_json(&["rm", &format!("oci:{}:one", dir.path().display())]);
    save(&layout, &[b"base"], "three").unwrap();
    let left = of_images(&[&[b"base"], &[b"base", b"one"]]);
    assert_eq!(
        blobs(dir.path()),
        left,
        "what the damaged one needed is unknown"
    );
    prune(dir.path(), Duration::ZERO).unwrap();
    assert_eq!(blobs(dir.path()), of_images(&[&[b"base"]]));
    assert_eq!(remains(dir.path()), [""; 0]);
}

#[test]
fn a_save_that_fails_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("new/layout");
    let layout = Directory::new(&path);
    layout
        .put_blob(&Bytes::from_static(b"layer"), &Digest::of("layer"))
        .unwrap();
    let mut unfinished = layout.begin_blob().unwrap();
    unfinished.write(b"half").unwrap();
    assert_eq!(blobs(&path), names(&[b"layer"]));
    drop((unfinished, layout));
    assert!(!path.exists(), "the save had created it");
    // An empty directory of the user's stays one.
    fs::create_dir(&path).unwrap();
    let layout = Directory::new(&path);
    layout
        .put_blob(&Bytes::from_static(b"layer"), &Digest::of("layer"))
        .unwrap();
    drop(layout);
    assert_eq!(fs::read_dir(&path).unwrap().count(), 0);
    // In a layout with images, its own blobs go, and those that it found stay.
    save(&Directory::new(&path), &[b"base"], "v1").unwrap();
    let layout = Directory::new(&path);
    layout.check().unwrap();
    assert_eq!(layout.has_blob(&Digest::of("base"), None).unwrap(), Some(4));
    layout
        .put_blob(&Bytes::from_static(b"layer"), &Digest::of("layer"))
        .unwrap();
    drop(layout);
    assert_eq!(blobs(&path), of_images(&[&[b"base"]]));
    assert_eq!(remains(&path), [""; 0]);
}

#[test]
fn what_another_save_relies_on_stays() {
    let dir = tempfile::tempdir().unwrap();
    let [failing, running] = [(); 2].map(|()| Directory::new(dir.path()));
    save(&failing, &[b"base"], "v1").unwrap();
    let layer = Bytes::from_static(b"layer");
    failing.put_blob(&layer, &Digest::of(&layer)).unwrap();
    running.check().unwrap();
    assert_eq!(
        running.has_blob(&Digest::of(&layer), None).unwrap(),
        Some(5)
    );
    assert_eq!(
        running.has_blob(&Digest::of("base"), None).unwrap(),
        Some(4)
    );
    drop(failing);
    image_json(&["rm", &format!("oci:{}:v1", dir.path().display())]);
    let pruned = prune(dir.path(), Duration::ZERO).unwrap();
    assert_eq!((pruned.in_use.blobs, pruned.deleted.len()), (2, 0));
    assert_eq!(blobs(dir.path()), names(&[b"layer", b"base"]));
    save(&running, &[b"base", b"layer"], "v2").unwrap();
    assert_eq!(blobs(dir.path()), of_images(&[&[b"base", b"layer"]]));
    assert_eq!(remains(dir.path()), [""; 0]);
}

#[test]
fn an_image_never_names_a_blob_that_another_program_has_deleted() {
    let dir = tempfile::tempdir().unwrap();
    let layout = Directory::new(dir.path());
    save(&layout, &[b"base"], "v1").unwrap();
    layout.check().unwrap();
    assert_eq!(layout.has_blob(&Digest::of("base"), None).unwrap(), Some(4));
    fs::remove_file(
        dir.path()
            .join("blobs/sha256")
            .join(Digest::of("base").hex()),
    )
    .unwrap();
    let config = config(&[b"base"]);
    layout.put_blob(&config, &Digest::of(&config)).unwrap();
    let error = layout
        .put_manifest(&manifest(&[b"base"]), MANIFEST, "v2")
        .unwrap_err();
    assert!(
        matches!(error, Error::Incomplete { digest, .. } if digest == Digest::of("base")),
        "{error}"
    );
    assert!(
        !image_json(&["ls", &format!("oci:{}", dir.path().display())])
            .to_string()
            .contains("v2")
    );
    // A save looks again, and sends what is missing.
    save(&layout, &[b"base"], "v2").unwrap();
}

#[test]
fn a_full_disk_leaves_nothing_of_the_save() {
    let disk = tempfile::tempdir().unwrap();
    let mounted = nix::mount::mount(
        Some("tmpfs"),
        disk.path(),
        Some("tmpfs"),
        nix::mount::MsFlags::empty(),
        Some("size=400k"),
    );
    if mounted.is_err() {
        support::ignore("tmpfs cannot be mounted");
        return;
    }
    let path = disk.path().join("layout");
    let layout = Directory::new(&path);
    save(&layout, &[b"base"], "v1").unwrap();
    let fill = || {
        let half = Bytes::from(vec![1; 200 << 10]);
        layout.put_blob(&half, &Digest::of(&half))?;
        let much = Bytes::from(vec![2; 300 << 10]);
        layout.put_blob(&much, &Digest::of(&much))
    };
    let error = fill().unwrap_err();
    assert!(error.to_string().contains("free some space"), "{error}");
    drop(layout);
    let (left, remains) = (blobs(&path), remains(&path));
    nix::mount::umount(disk.path()).unwrap();
    assert_eq!(left, of_images(&[&[b"base"]]));
    assert_eq!(remains, [""; 0]);
}
