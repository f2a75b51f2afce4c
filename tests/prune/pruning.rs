//! `image prune`: what is kept, deleted, and left alone.

use std::fs;
use std::os::unix::fs::symlink;

use serde_json::json;
use upperdeck::store::layout::{Directory, Error};

use crate::*;

#[test]
fn unneeded_blobs_are_deleted_once_they_are_old_enough() {
    let dir = tempfile::tempdir().unwrap();
    save(&Directory::new(dir.path()), &[b"base"], "v1").unwrap();
    let planted = plant(dir.path(), b"of another tool");
    let place = format!("oci:{}", dir.path().display());
    let young = image_json(&["prune", &place]);
    let layout = &young["layouts"][0];
    assert_eq!(
        (&layout["young"]["blobs"], &layout["deleted"]),
        (&json!(1), &json!([]))
    );
    let dry = image_json(&["prune", "--dry-run", "--older-than", "0", &place]);
    assert_eq!((&dry["freed"], &dry["dry_run"]), (&json!(15), &json!(true)));
    assert_eq!(
        dry["layouts"][0]["deleted"][0]["digest"],
        json!(format!("sha256:{planted}"))
    );
    assert!(blobs(dir.path()).contains(&planted));
    let output = image(&["prune", "--older-than", "0", &place]);
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(
        said.contains(&format!("deleted sha256:{planted} 15 B\n"))
            && said.ends_with("freed: 15 B\n"),
        "{said}"
    );
    assert_eq!(blobs(dir.path()), of_images(&[&[b"base"]]));
    let nothing = image_json(&["prune", "--older-than", "0", &place]);
    assert_eq!(nothing["freed"], json!(0));
}

#[test]
fn everything_that_an_image_may_need_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path();
    save(&Directory::new(at), &[b"base"], "v1").unwrap();
    // An index in an index, of which one platform was not copied.
    let [one, two] = [manifest(&[b"base", b"one"]), manifest(&[b"two"])];
    let inner = json!({"schemaVersion": 2, "manifests": [descriptor(MANIFEST, &one), descriptor(MANIFEST, &two)]}).to_string();
    let outer =
        json!({"schemaVersion": 2, "manifests": [descriptor(INDEX, inner.as_bytes())]}).to_string();
    for content in [
        &one[..],
        &config(&[b"base", b"one"]),
        b"one",
        inner.as_bytes(),
        outer.as_bytes(),
    ] {
        plant(at, content);
    }
    list(at, descriptor(INDEX, outer.as_bytes()));
    // Docker's types, and a foreign layer that lies elsewhere.
    let docker = json!({"schemaVersion": 2, "config": descriptor("application/vnd.docker.container.image.v1+json", b"dc"),
        "layers": [descriptor("application/vnd.docker.image.rootfs.diff.tar.gzip", b"dl"),
            {"mediaType": "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip", "digest": Digest::of("away"),
             "size": 9, "urls": ["https://example.org"]}]}).to_string();
    for content in [docker.as_bytes(), b"dc", b"dl"] {
        plant(at, content);
    }
    list(
        at,
        descriptor(
            "application/vnd.docker.distribution.manifest.v2+json",
            docker.as_bytes(),
        ),
    );
    // A type that is not known, with references at a place of its own; and one that is no JSON.
    let unknown = json!({"parts": {"of": [descriptor("x/y", b"part")]}}).to_string();
    for content in [unknown.as_bytes(), b"part", b"<xml/>"] {
        plant(at, content);
    }
    list(
        at,
        descriptor("application/x.unknown+json", unknown.as_bytes()),
    );
    list(at, descriptor("application/xml", b"<xml/>"));
    // A document about an image that is listed nowhere, and one about that.
    let about = |text: &[u8], layer: &[u8]| {
        json!({"schemaVersion": 2, "mediaType": MANIFEST,
        "config": descriptor("application/vnd.oci.empty.v1+json", b"{}"), "layers": [descriptor("x/z", layer)],
        "subject": descriptor(MANIFEST, text)}).to_string()
    };
    let signature = about(&manifest(&[b"base"]), b"sig");
    let of_it = about(signature.as_bytes(), b"sig2");
    for content in [
        signature.as_bytes(),
        of_it.as_bytes(),
        b"{}",
        b"sig",
        b"sig2",
    ] {
        plant(at, content);
    }
    let before = blobs(at);
    plant(at, b"unneeded");
    // A document about nothing that is there keeps nothing.
    let stray = about(b"gone", b"stray");
    plant(at, stray.as_bytes());
    plant(at, b"stray");
    let pruned = prune(at, Duration::ZERO).unwrap();
    assert_eq!(pruned.deleted.len(), 3);
    assert_eq!(blobs(at), before);
}

/// Prunes a layout, which has to fail without a change.
fn refused(layout: &std::path::Path, with: &str) {
    let before = blobs(layout);
    let error = prune(layout, Duration::ZERO).unwrap_err();
    assert!(matches!(error, Error::NotFreed { .. }), "{error}");
    let text = error.to_string();
    assert!(
        text.contains(with) && text.contains("no blob was deleted"),
        "{text}"
    );
    assert_eq!(blobs(layout), before);
    let output = image(&["prune", &format!("oci:{}", layout.display())]);
    assert_eq!(output.status.code(), Some(1));
}

#[test]
fn nothing_is_deleted_if_something_cannot_be_read() {
    let fresh = || {
        let dir = tempfile::tempdir().unwrap();
        save(&Directory::new(dir.path()), &[b"base"], "v1").unwrap();
        plant(dir.path(), b"unneeded");
        dir
    };
    let of = |dir: &tempfile::TempDir| {
        dir.path()
            .join("blobs/sha256")
            .join(Digest::of(manifest(&[b"base"])).hex())
    };
    let dir = fresh();
    fs::write(of(&dir), "{}").unwrap();
    refused(dir.path(), "damaged");
    let dir = fresh();
    fs::remove_file(of(&dir)).unwrap();
    refused(dir.path(), "is not there");
    let dir = fresh();
    fs::rename(of(&dir), dir.path().join("elsewhere")).unwrap();
    symlink(dir.path().join("elsewhere"), of(&dir)).unwrap();
    refused(dir.path(), "cannot read");
    let dir = fresh();
    plant(dir.path(), b"no json");
    list(dir.path(), descriptor(MANIFEST, b"no json"));
    refused(dir.path(), "expected a manifest");
    let dir = fresh();
    list(dir.path(), json!({"mediaType": MANIFEST}));
    refused(dir.path(), "no digest");
    let dir = fresh();
    fs::remove_file(dir.path().join("index.json")).unwrap();
    refused(dir.path(), "no index.json");
    for link in ["blobs", "blobs/sha256"] {
        let dir = fresh();
        let moved = dir.path().join("moved");
        fs::rename(dir.path().join(link), &moved).unwrap();
        symlink(&moved, dir.path().join(link)).unwrap();
        refused(dir.path(), "symbolic link");
    }
}

#[test]
fn what_is_no_blob_is_reported_and_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let outside = tempfile::tempdir().unwrap();
    save(&Directory::new(dir.path()), &[b"base"], "v1").unwrap();
    let at = dir.path().join("blobs/sha256");
    fs::write(outside.path().join("precious"), "x").unwrap();
    symlink(
        outside.path().join("precious"),
        at.join(Digest::of("link").hex()),
    )
    .unwrap();
    symlink(outside.path(), dir.path().join("blobs/mine")).unwrap();
    fs::create_dir(at.join(Digest::of("dir").hex())).unwrap();
    fs::write(at.join("README"), "").unwrap();
    fs::write(at.join(Digest::of("x").hex().to_uppercase()), "").unwrap();
    nix::unistd::mkfifo(
        &at.join(Digest::of("fifo").hex()),
        nix::sys::stat::Mode::S_IRWXU,
    )
    .unwrap();
    fs::create_dir(dir.path().join("blobs/md5")).unwrap();
    fs::write(
        dir.path()
            .join("blobs/md5/d41d8cd98f00b204e9800998ecf8427e"),
        "",
    )
    .unwrap();
    fs::write(dir.path().join("notes"), "").unwrap();
    fs::create_dir(dir.path().join("blobs/sha512")).unwrap();
    let sha512 = dir.path().join("blobs/sha512").join("0".repeat(128));
    fs::write(&sha512, "unneeded").unwrap();
    let pruned = prune(dir.path(), Duration::ZERO).unwrap();
    assert_eq!(pruned.deleted.len(), 1);
    assert!(!sha512.exists());
    assert_eq!(
        (pruned.left_count, pruned.left.len()),
        (8, 8),
        "{:?}",
        pruned.left
    );
    assert!(outside.path().join("precious").exists());
    assert!(dir.path().join("notes").exists() && at.join("README").exists());
    let output = image(&["prune", &format!("oci:{}", dir.path().display())]);
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(
        said.contains("left alone, not part of a layout: notes\n"),
        "{said}"
    );
}

#[test]
fn a_hard_link_elsewhere_frees_nothing() {
    let dir = tempfile::tempdir().unwrap();
    save(&Directory::new(dir.path()), &[b"base"], "v1").unwrap();
    let planted = plant(dir.path(), b"linked");
    fs::hard_link(
        dir.path().join("blobs/sha256").join(planted),
        dir.path().join("copy"),
    )
    .unwrap();
    let pruned = prune(dir.path(), Duration::ZERO).unwrap();
    assert_eq!((pruned.deleted.len(), pruned.freed), (1, 0));
    assert_eq!(fs::read(dir.path().join("copy")).unwrap(), b"linked");
}

#[test]
fn places_that_are_not_pruned_say_why() {
    let dir = tempfile::tempdir().unwrap();
    save(&Directory::new(dir.path().join("x")), &[b"base"], "v1").unwrap();
    fs::create_dir(dir.path().join("empty")).unwrap();
    let at = |name: &str| format!("oci:{}/{name}", dir.path().display());
    for (place, code, with) in [
        ("harbor.example.org/alice", 2, "garbage collection"),
        (at("x:v1").as_str(), 2, "image rm"),
        (at("empty").as_str(), 1, "no oci-layout"),
        (at("missing").as_str(), 1, "No such file"),
    ] {
        let output = image(&["prune", place]);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{place}: {said}");
        assert!(said.contains(with), "{place}: {said}");
    }
}

#[test]
fn a_read_only_layout_is_not_permitted() {
    let disk = tempfile::tempdir().unwrap();
    let flags = nix::mount::MsFlags::empty();
    let mounted = nix::mount::mount(
        Some("tmpfs"),
        disk.path(),
        Some("tmpfs"),
        flags,
        None::<&str>,
    );
    if mounted.is_err() {
        support::ignore("tmpfs cannot be mounted");
        return;
    }
    save(&Directory::new(disk.path()), &[b"base"], "v1").unwrap();
    plant(disk.path(), b"unneeded");
    let flags = nix::mount::MsFlags::MS_REMOUNT | nix::mount::MsFlags::MS_RDONLY;
    nix::mount::mount(None::<&str>, disk.path(), None::<&str>, flags, None::<&str>).unwrap();
    let output = image(&[
        "prune",
        "--older-than",
        "0",
        &format!("oci:{}", disk.path().display()),
    ]);
    nix::mount::umount(disk.path()).unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(77), "{said}");
}
