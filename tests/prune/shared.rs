//! Layouts below one directory keep equal blobs once.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use serde_json::json;
use upperdeck::store::layout::Directory;

use crate::*;

fn blob(layout: &Path, content: &[u8]) -> PathBuf {
    layout.join("blobs/sha256").join(Digest::of(content).hex())
}

fn inode(layout: &Path, content: &[u8]) -> u64 {
    fs::metadata(blob(layout, content)).unwrap().ino()
}

/// The bytes of all files, each once, as `du` counts.
fn disk_usage(dir: &Path) -> u64 {
    let mut files = std::collections::BTreeMap::new();
    for entry in walkdir::WalkDir::new(dir) {
        let meta = entry.unwrap().metadata().unwrap();
        if meta.is_file() {
            files.insert(meta.ino(), meta.len());
        }
    }
    files.values().sum()
}

#[test]
fn a_base_is_kept_once_and_each_layout_is_complete() {
    let dir = tempfile::tempdir().unwrap();
    let base = vec![b'b'; 100_000];
    let layouts = ["alice/torch", "alice/scipy", "bob/torch"].map(|name| dir.path().join(name));
    let directory =
        |layout: &PathBuf| Directory::new(layout).sharing(Some(dir.path().to_path_buf()));
    for (layout, own) in layouts.iter().zip(["1", "2", "3"]) {
        save(&directory(layout), &[&base, own.as_bytes()], "v1").unwrap();
    }
    assert!(
        disk_usage(dir.path()) < 110_000,
        "{}",
        disk_usage(dir.path())
    );
    for (layout, own) in layouts.iter().zip(["1", "2", "3"]) {
        assert_eq!(inode(layout, &base), inode(&layouts[0], &base));
        assert_eq!(blobs(layout), of_images(&[&[&base, own.as_bytes()]]));
    }
    // A layer whose digest is known only once it is written, too.
    let remade = directory(&layouts[1]);
    let mut written = remade.begin_blob().unwrap();
    written.write(b"1").unwrap();
    written.finish(&Digest::of("1"), 1).unwrap();
    assert_eq!(inode(&layouts[1], b"1"), inode(&layouts[0], b"1"));
    drop(remade);
    // The last layout that needs it frees it.
    for (n, layout) in layouts.iter().enumerate() {
        let removed = &image_json(&["rm", &format!("oci:{}:v1", layout.display())])[0];
        let freed = removed["freed"].as_u64().unwrap();
        assert_eq!(freed > 100_000, n == 2, "{removed}");
    }
    // A save that fails takes its links away again.
    save(&directory(&layouts[0]), &[&base], "v1").unwrap();
    let failing = directory(&layouts[1]);
    assert!(
        failing
            .has_blob(&Digest::of(&base), Some(100_000))
            .unwrap()
            .is_some()
    );
    assert_eq!(inode(&layouts[1], &base), inode(&layouts[0], &base));
    drop(failing);
    assert!(!blob(&layouts[1], &base).exists());
    assert_eq!(fs::metadata(blob(&layouts[0], &base)).unwrap().nlink(), 1);
}

#[test]
fn blobs_with_other_modes_or_sizes_are_not_shared() {
    let dir = tempfile::tempdir().unwrap();
    let (one, two) = (dir.path().join("one"), dir.path().join("two"));
    let directory =
        |layout: &PathBuf| Directory::new(layout).sharing(Some(dir.path().to_path_buf()));
    save(&directory(&one), &[b"open", b"short", b"link"], "v1").unwrap();
    fs::set_permissions(blob(&one, b"open"), fs::Permissions::from_mode(0o644)).unwrap();
    fs::write(blob(&one, b"short"), "s").unwrap();
    fs::rename(blob(&one, b"link"), dir.path().join("elsewhere")).unwrap();
    std::os::unix::fs::symlink(dir.path().join("elsewhere"), blob(&one, b"link")).unwrap();
    save(&directory(&two), &[b"open", b"short", b"link"], "v1").unwrap();
    for content in [&b"open"[..], b"short", b"link"] {
        assert_ne!(inode(&two, content), inode(&one, content));
        assert_eq!(fs::read(blob(&two, content)).unwrap(), content);
    }
    // A neighbour's blob that is damaged, with its size as it was, damages no other image.
    fs::write(blob(&two, b"short"), "SHORT").unwrap();
    fs::remove_file(blob(&one, b"short")).unwrap();
    let four = dir.path().join("four");
    save(&directory(&four), &[b"short"], "v1").unwrap();
    assert_eq!(fs::read(blob(&four, b"short")).unwrap(), b"short");
    // Layouts without a common directory have nothing in common.
    let three = Directory::new(dir.path().join("three"));
    assert_eq!(three.has_blob(&Digest::of("open"), None).unwrap(), None);
}

#[test]
fn equal_blobs_of_earlier_versions_become_one() {
    let dir = tempfile::tempdir().unwrap();
    let base = vec![b'b'; 100_000];
    let layouts = ["alice/torch", "alice/scipy", "bob/torch"].map(|name| dir.path().join(name));
    for layout in &layouts {
        save(&Directory::new(layout), &[&base, b"damaged"], "v1").unwrap();
    }
    // A damaged copy is not what the others become, but becomes sound.
    fs::write(blob(&layouts[0], b"damaged"), "DAMAGED").unwrap();
    let place = format!("oci:{}", dir.path().display());
    let dry = image_json(&["prune", "--dry-run", &place]);
    assert_eq!(dry["merged"]["links"], json!(8), "{dry}");
    assert_ne!(inode(&layouts[0], &base), inode(&layouts[1], &base));
    let done = image_json(&["prune", &place]);
    let own = documents(&[&base, b"damaged"]);
    assert_eq!(
        done["merged"],
        json!({"links": 8, "freed": 2 * (100_007 + own)})
    );
    assert_eq!(done["freed"], done["merged"]["freed"]);
    for layout in &layouts {
        assert_eq!(inode(layout, &base), inode(&layouts[0], &base));
        assert_eq!(fs::read(blob(layout, b"damaged")).unwrap(), b"damaged");
        assert_eq!(blobs(layout), of_images(&[&[&base, b"damaged"]]));
    }
    assert_eq!(image_json(&["prune", &place])["merged"]["links"], json!(0));
}

#[test]
fn a_layout_that_cannot_be_read_does_not_keep_others_from_being_pruned() {
    let dir = tempfile::tempdir().unwrap();
    let (one, two) = (dir.path().join("a/one"), dir.path().join("b/two"));
    for layout in [&one, &two] {
        save(&Directory::new(layout), &[b"base"], "v1").unwrap();
        plant(layout, b"unneeded");
    }
    fs::write(blob(&one, &manifest(&[b"base"])), "{").unwrap();
    let place = format!("oci:{}", dir.path().display());
    let output = image(&["prune", "--older-than", "0", "--format", "json", &place]);
    assert_eq!(output.status.code(), Some(1));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["failed"][0]["layout"], json!(one));
    assert_eq!(report["freed"], json!(8));
    assert!(blob(&one, b"unneeded").exists() && !blob(&two, b"unneeded").exists());
}
