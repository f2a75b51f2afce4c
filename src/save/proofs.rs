//! Keeps which bases were proven by content (`pid:N` with `--base`), so that the layers of a base in a registry are not
//! downloaded again for each save of the same container.
//!
//! A proof is a file in the state directory. Its name is the digest of the base's manifest and of all that was read of
//! the mounted lower directories, contents included; the directories are read at every save. The file contains the
//! sentence on what was proven.

use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use sha2::{Digest as _, Sha256};

use super::state_store::prepare_dir;
use crate::common::digest::Digest;
use crate::common::regular_file;
use crate::image::verify::tree::Tree;

/// The first bytes that are hashed. Changed together with the rules of the comparison.
const VERSION: &[u8] = b"upperdeck base proof 1\n";
/// Maximum number of proofs kept. The oldest are removed first.
const MAX_PROOFS: usize = 256;
/// Maximum size of a proof, in bytes.
const MAX_TEXT: u64 = 1024;
pub(super) const SUFFIX: &str = "proof";

/// The proofs in a state directory.
#[derive(Clone, Debug)]
pub(super) struct Proofs {
    dir: PathBuf,
}

impl Proofs {
    /// Returns the proofs in `dir`, which is created when it is needed.
    pub(super) fn new(dir: &Path) -> Self {
        Self {
            dir: dir.to_owned(),
        }
    }

    fn path(&self, manifest: &Digest, mounted: &Tree) -> PathBuf {
        let mut hash = Sha256::new();
        hash.update(VERSION);
        hash.update(manifest.as_bytes());
        mounted.hash(&mut hash);
        self.dir
            .join(format!("{}.{SUFFIX}", Digest::finish(hash).hex()))
    }

    /// Returns what was proven of the base with this manifest and these mounted directories, or `None` if nothing was.
    pub(super) fn find(&self, manifest: &Digest, mounted: &Tree) -> Option<String> {
        // A directory to which others have access proves nothing.
        prepare_dir(&self.dir).ok()?;
        let path = self.path(manifest, mounted);
        let text = regular_file::read_open(regular_file::open_own(&path).ok()?, MAX_TEXT);
        String::from_utf8(text.ok()?)
            .ok()
            .filter(|text| !text.is_empty())
    }

    /// Keeps a proof, atomically. Fails with the error of the file system.
    pub(super) fn keep(&self, manifest: &Digest, mounted: &Tree, proof: &str) -> io::Result<()> {
        prepare_dir(&self.dir)?;
        let mut file = tempfile::Builder::new()
            .prefix(".new-")
            .tempfile_in(&self.dir)?;
        file.write_all(proof.as_bytes())?;
        file.persist(self.path(manifest, mounted))
            .map_err(|error| error.error)?;
        self.prune();
        Ok(())
    }

    fn prune(&self) {
        let Ok(entries) = fs::read_dir(&self.dir) else {
            return;
        };
        let mut proofs: Vec<(SystemTime, PathBuf)> = entries
            .flatten()
            .map(|entry| entry.path())
            .filter(|path| path.extension().is_some_and(|end| end == SUFFIX))
            .filter_map(|path| Some((fs::symlink_metadata(&path).ok()?.modified().ok()?, path)))
            .collect();
        proofs.sort();
        let more = proofs.len().saturating_sub(MAX_PROOFS);
        for (_, path) in proofs.into_iter().take(more) {
            fs::remove_file(path).ok();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn tree(content: &str) -> Tree {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("file"), content).unwrap();
        let file = fs::File::options()
            .write(true)
            .open(dir.path().join("file"));
        file.unwrap().set_modified(SystemTime::UNIX_EPOCH).unwrap();
        Tree::from_directory(dir.path(), false).unwrap()
    }

    #[test]
    fn a_proof_is_of_one_manifest_and_one_content() {
        let dir = tempfile::tempdir().unwrap();
        let proofs = Proofs::new(&dir.path().join("state"));
        let (one, two) = (Digest::of("one"), Digest::of("two"));
        assert_eq!(proofs.find(&one, &tree("a")), None);
        proofs.keep(&one, &tree("a"), "by content").unwrap();
        assert_eq!(proofs.find(&one, &tree("a")).as_deref(), Some("by content"));
        assert_eq!(proofs.find(&two, &tree("a")), None);
        assert_eq!(proofs.find(&one, &tree("b")), None);
    }

    #[test]
    fn proofs_are_bounded_and_of_a_private_directory() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("state");
        let proofs = Proofs::new(&state);
        for number in 0..MAX_PROOFS + 5 {
            let manifest = Digest::of(number.to_string());
            proofs.keep(&manifest, &tree("a"), "p").unwrap();
        }
        assert_eq!(fs::read_dir(&state).unwrap().count(), MAX_PROOFS);

        // Of a directory that others can write to, nothing that it did not make is believed.
        fs::write(state.join("of-another-program"), "").unwrap();
        fs::set_permissions(&state, fs::Permissions::from_mode(0o777)).unwrap();
        let last = Digest::of((MAX_PROOFS + 4).to_string());
        assert_eq!(proofs.find(&last, &tree("a")), None);
    }
}
