//! Fuzzes the reader of the stored state of an earlier save: a file that this program wrote, and that may be damaged or
//! edited.

use std::path::PathBuf;

use tempfile::TempDir;
use upperdeck::common::digest::Digest;
use upperdeck::layer::scan::{Scan, Stored};
use upperdeck::save::state_store::{Description, Store, StoredSave, TreeState, Unusable, VERSION};

use crate::errors;
use crate::files;

const CONTAINER: &str = "c0ffee";

struct Place {
    _dir: TempDir,
    store: Store,
    file: PathBuf,
}

thread_local! {
    static PLACE: Place = place();
}

/// Creates a store, and determines its file for the container by writing to it.
fn place() -> Place {
    let dir = files::directory();
    let store = Store::new(&dir.path().join("state"));
    let description = Description {
        fingerprint: Digest::of("x"),
        upper: "/u".into(),
        upper_inode: (1, 2),
        destination: "oci:/x".to_owned(),
        layers: Vec::new(),
    };
    store
        .keep(CONTAINER, &description, &[])
        .expect("a place for files");
    let mut entries = std::fs::read_dir(dir.path().join("state")).expect("the store");
    let file = entries.next().expect("a file").expect("a file").path();
    Place {
        _dir: dir,
        store,
        file,
    }
}

/// Two bytes give the length of the description; the rest is one tree.
pub fn run(input: &[u8]) {
    let [low, high, rest @ ..] = input else {
        return;
    };
    let length = (usize::from(*low) + usize::from(*high) * 256).min(rest.len());
    let (description, tree) = rest.split_at(length);
    PLACE.with(|place| {
        std::fs::write(&place.file, file(description, tree)).expect("a place for files");
        if let Some(kept) = load(&place.store) {
            again(&place.store, &kept);
        }
        std::fs::write(&place.file, input).expect("a place for files");
        assert!(load(&place.store).is_none(), "a file without a checksum");
    });
    restored(tree);
}

/// Adds a valid header, lengths and checksum.
fn file(description: &[u8], tree: &[u8]) -> Vec<u8> {
    let mut bytes = b"updeckst".to_vec();
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend((description.len() as u32).to_le_bytes());
    bytes.extend(description);
    bytes.extend((tree.len() as u64).to_le_bytes());
    bytes.extend(tree);
    let sum = *Digest::of(&bytes).as_bytes();
    bytes.extend(sum);
    bytes
}

fn load(store: &Store) -> Option<StoredSave> {
    let loaded = store.load(CONTAINER);
    assert_ne!(loaded.as_ref().err(), Some(&Unusable::Absent));
    errors::checked(loaded)
}

/// Checks that a state read from a file is the same after writing and reading it again.
fn again(store: &Store, kept: &StoredSave) {
    let shown: Vec<TreeState<'_>> = kept
        .stored
        .iter()
        .map(|stored| TreeState {
            scan: &stored.scan,
            unsure: &stored.unsure,
        })
        .collect();
    store
        .keep(CONTAINER, &kept.description, &shown)
        .expect("a place for files");
    let again = load(store).expect("what was just written");
    assert_eq!(again.description, kept.description);
    for (one, other) in again.stored.iter().zip(&kept.stored) {
        assert_eq!(written(one), written(other));
    }
}

fn written(stored: &Stored) -> Vec<u8> {
    let mut bytes = Vec::new();
    let unsure = |index: u32| stored.unsure[index as usize];
    stored.scan.store(&unsure, &mut bytes).expect("memory");
    bytes
}

fn restored(tree: &[u8]) {
    let Some(stored) = Scan::restore(&mut &tree[..], tree.len() as u64) else {
        return;
    };
    assert_eq!(stored.unsure.len(), stored.scan.len());
    for index in 0..stored.scan.len() as u32 {
        let path = stored.scan.path(index);
        let mut parts = path.split(|&byte| byte == b'/');
        let proper = |part: &[u8]| !part.is_empty() && part != b"." && part != b"..";
        assert!(path.is_empty() || parts.all(proper), "{path:?}");
        stored.scan.xattrs(&stored.scan.entry(index));
    }
    let bytes = written(&stored);
    let again = Scan::restore(&mut &bytes[..], bytes.len() as u64).expect("what was written");
    assert_eq!(written(&again), bytes);
}
