//! Layouts that another user, or a mishap, has made a trap: nothing waits for ever, and nothing is written elsewhere.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, chown, symlink};
use std::path::Path;

use rustix::fs::{CWD, FileType, FlockOperation, Mode, flock, mknodat};
use upperdeck::store::layout::{Directory, Error};

use crate::support::{Need, ignored};
use crate::*;

fn fifo_in_place_of(path: &Path) {
    fs::remove_file(path).unwrap();
    mknodat(CWD, path, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
}

#[test]
fn a_fifo_in_place_of_a_document_is_refused() {
    for document in ["index.json", "oci-layout"] {
        let dir = tempfile::tempdir().unwrap();
        let layout = Directory::new(dir.path());
        save(&layout, &[b"base"], "v1").unwrap();
        fifo_in_place_of(&dir.path().join(document));
        let refused = |error: Error| {
            assert!(
                error.to_string().contains("not a regular file")
                    || error.to_string().contains("no oci-layout"),
                "{document}: {error}"
            );
        };
        refused(save(&layout, &[b"other"], "v2").unwrap_err());
        refused(prune(dir.path(), Duration::ZERO).unwrap_err());
        let at = format!("oci:{}", dir.path().display());
        for words in [
            &["rm", &format!("{at}:v1")][..],
            &["tag", &format!("{at}:v1"), "v3"],
            &["ls", &at],
        ] {
            assert!(!image(words).status.success(), "{document}: {words:?}");
        }
    }
}

/// Whoever can read a layout can lock its directory.
#[test]
fn a_pruning_that_waits_for_the_lock_can_be_ended() {
    let dir = tempfile::tempdir().unwrap();
    save(&Directory::new(dir.path()), &[b"base"], "v1").unwrap();
    let unneeded = plant(dir.path(), b"unneeded");
    let held = fs::File::open(dir.path()).unwrap();
    flock(&held, FlockOperation::LockExclusive).unwrap();
    let options = PruneOptions {
        older_than: Duration::ZERO,
        dry_run: false,
    };
    let mut looks = 0;
    let pruned = Directory::new(dir.path()).prune(options, &mut |_| {
        looks += 1;
        looks < 5
    });
    assert_eq!((pruned.unwrap().deleted.len(), looks), (0, 5));
    drop(held);
    assert_eq!(prune(dir.path(), Duration::ZERO).unwrap().deleted.len(), 1);
    assert!(!blobs(dir.path()).contains(&unneeded));
}

#[test]
fn nothing_is_written_through_a_link_to_another_place() {
    let elsewhere = tempfile::tempdir().unwrap();
    for link in ["blobs", "blobs/sha256"] {
        let dir = tempfile::tempdir().unwrap();
        let layout = Directory::new(dir.path());
        save(&layout, &[b"base"], "v1").unwrap();
        fs::rename(dir.path().join(link), dir.path().join("moved")).unwrap();
        symlink(elsewhere.path(), dir.path().join(link)).unwrap();
        let error = save(&Directory::new(dir.path()), &[b"other"], "v2").unwrap_err();
        assert!(error.to_string().contains("symbolic link"), "{error}");
        let error = layout.put_blob(&Bytes::from_static(b"x"), &Digest::of("x"));
        assert!(error.is_err(), "{link}");
        assert_eq!(fs::read_dir(elsewhere.path()).unwrap().count(), 0, "{link}");
    }
    // A link in place of a blob is no blob: its content can become another one.
    let dir = tempfile::tempdir().unwrap();
    let layout = Directory::new(dir.path());
    save(&layout, &[b"base"], "v1").unwrap();
    let blob = dir
        .path()
        .join("blobs/sha256")
        .join(Digest::of("base").hex());
    fs::rename(&blob, elsewhere.path().join("base")).unwrap();
    symlink(elsewhere.path().join("base"), &blob).unwrap();
    assert_eq!(layout.has_blob(&Digest::of("base"), Some(4)).unwrap(), None);
    save(&layout, &[b"base"], "v1").unwrap();
    assert!(fs::symlink_metadata(&blob).unwrap().is_file());
}

#[test]
fn what_root_writes_into_the_layout_of_another_user_is_theirs() {
    if ignored(&[Need::Root]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    chown(dir.path(), Some(1234), Some(1235)).unwrap();
    let layout = Directory::new(dir.path());
    save(&layout, &[b"base"], "v1").unwrap();
    // While a save goes on, there is a list of what it writes.
    layout.check().unwrap();
    layout
        .put_blob(&Bytes::from_static(b"more"), &Digest::of("more"))
        .unwrap();
    let mut seen = 0;
    for entry in walkdir::WalkDir::new(dir.path()) {
        let entry = entry.unwrap();
        let meta = entry.metadata().unwrap();
        assert_eq!((meta.uid(), meta.gid()), (1234, 1235), "{entry:?}");
        seen += 1;
    }
    assert!(seen >= 9, "{seen}");
}
