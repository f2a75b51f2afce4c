//! Deletes blobs of a layout directory that no image needs: those that a writer lists ([`super::lease`]) at its end, those
//! of dead writers, and on request all ([`super::prune`]). Everything happens under the exclusive lock on the directory,
//! and `index.json` is on disk before the first blob is deleted.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io;
use std::path::Path;

use rustix::fs::FlockOperation;

use super::blobs::{BlobName, Blobs};
use super::lease::{self, Before, Lease, Others};
use super::references::{self, Reference};
use super::staged::{self, sync_directory};
use super::{Error, io_error, read_document};

/// What was deleted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Freed {
    /// Number of blobs.
    pub blobs: u64,
    /// Bytes that are free again. A blob that has another hard link, in another layout, frees none.
    pub bytes: u64,
}

impl Freed {
    pub(super) fn add(&mut self, bytes: u64) {
        self.blobs += 1;
        self.bytes += bytes;
    }
}

/// Locks the layout's directory until the returned file is closed. Shared: while a list gets another name. Exclusive:
/// while `index.json` changes or blobs are deleted. The directory itself is locked, so that no lock file remains.
pub(super) fn lock(root: &Path, how: FlockOperation) -> Result<File, Error> {
    let lock = File::open(root).map_err(io_error(root, "open"))?;
    rustix::io::retry_on_intr(|| rustix::fs::flock(&lock, how))
        .map_err(|e| io_error(root, "lock")(e.into()))?;
    Ok(lock)
}

/// Returns the blobs that images need.
///
/// Fails if there is no `index.json`, unless `without_index` says that there was none before; if it cannot be read; or if
/// a document that it names cannot.
pub(super) fn needed(
    root: &Path,
    blobs: &Blobs,
    without_index: bool,
) -> Result<HashSet<BlobName>, Error> {
    match read_document(&root.join("index.json"))? {
        Some(index) => {
            let listed = references::of_index(&index).map_err(|why| blobs.unreadable(why))?;
            references::reachable(blobs, listed)
        }
        None if without_index => Ok(HashSet::new()),
        None => Err(blobs.unreadable("it has no index.json, which says what is needed".to_owned())),
    }
}

/// Returns the blobs that a manifest or index needs, including itself.
pub(super) fn needed_by(root: &Path, document: BlobName) -> Result<HashSet<BlobName>, Error> {
    let blobs = Blobs::open(root)?;
    references::reachable(&blobs, [Reference::to_document(document)])
}

/// Ends a writer: deletes what it lists and no image needs, then the list itself. `known` is needed for certain, so that
/// images are not read if there is nothing else.
///
/// A failure keeps the list, for the next command.
pub(super) fn end(lease: &Lease, known: &HashSet<BlobName>) -> Result<Freed, Error> {
    let lock = lock(lease.root(), FlockOperation::LockExclusive)?;
    end_locked(lease, known, &lock)
}

/// Like [`end`], under a lock that the caller holds.
pub(super) fn end_locked(
    lease: &Lease,
    known: &HashSet<BlobName>,
    _: &File,
) -> Result<Freed, Error> {
    let root = lease.root();
    let others = Others::read(root, Some(lease))?;
    let own = lease.names().iter().filter(|name| !known.contains(name));
    let freed = delete_unneeded(root, own, &others, lease.before() != Before::Layout)?;
    lease.remove()?;
    if others.writers == 0 && others.abandoned.is_empty() {
        remove_empty_layout(root, lease.before());
    }
    Ok(freed)
}

/// Deletes what saves that were killed left in a layout: blobs that no image needs, and files that have no name of a blob
/// yet.
///
/// Fails without having deleted anything if what images need cannot be determined.
pub fn recover(root: &Path) -> Result<Freed, Error> {
    if !lease::any_abandoned(root)? {
        return Ok(Freed::default());
    }
    let lock = lock(root, FlockOperation::LockExclusive)?;
    recover_locked(root, &lock)
}

/// Like [`recover`], under a lock that the caller holds.
pub(super) fn recover_locked(root: &Path, _: &File) -> Result<Freed, Error> {
    let others = Others::read(root, None)?;
    if others.abandoned.is_empty() {
        return Ok(Freed::default());
    }
    let new = others
        .abandoned
        .iter()
        .all(|dead| dead.before != Before::Layout);
    let names = others.abandoned.iter().flat_map(|dead| &dead.names);
    let freed = delete_unneeded(root, names, &others, new)?;
    staged::delete_all_abandoned(root).map_err(io_error(root, "read"))?;
    let blobs = root.join("blobs/sha256");
    match staged::delete_all_abandoned(&blobs) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(io_error(&blobs, "read")(error));
        }
        _ => {}
    }
    for dead in &others.abandoned {
        dead.remove()?;
    }
    if others.writers == 0 {
        let created = others
            .abandoned
            .iter()
            .any(|dead| dead.before == Before::Nothing);
        let before = match (new, created) {
            (false, _) => Before::Layout,
            (true, false) => Before::Directory,
            (true, true) => Before::Nothing,
        };
        remove_empty_layout(root, before);
    }
    tracing::info!(
        layout = %root.display(), freed.blobs, freed.bytes,
        "what a save that was killed had left is deleted"
    );
    Ok(freed)
}

/// Deletes those of `names` that no image and no writer but the one of `own` needs. The caller holds the exclusive lock.
pub(super) fn delete(
    root: &Path,
    names: &HashSet<BlobName>,
    own: Option<&Lease>,
    _: &File,
) -> Result<Freed, Error> {
    let others = Others::read(root, own)?;
    delete_unneeded(root, names.iter(), &others, false)
}

/// Deletes those of `names` that neither an image nor a running writer needs.
fn delete_unneeded<'n>(
    root: &Path,
    names: impl Iterator<Item = &'n BlobName>,
    others: &Others,
    without_index: bool,
) -> Result<Freed, Error> {
    let mut freed = Freed::default();
    let names: HashSet<_> = names.filter(|name| !others.in_use.contains(name)).collect();
    if names.is_empty() {
        return Ok(freed);
    }
    let blobs = Blobs::open(root)?;
    let needed = needed(root, &blobs, without_index)?;
    for name in names.into_iter().filter(|name| !needed.contains(name)) {
        if let Some(bytes) = blobs.delete(name)? {
            freed.add(bytes);
        }
    }
    Ok(freed)
}

/// Removes what a writer created of a layout that has no image. Directories that have other contents stay, and so does
/// what cannot be removed.
fn remove_empty_layout(root: &Path, before: Before) {
    if before == Before::Layout || root.join("index.json").exists() {
        return;
    }
    let removed = fs::remove_dir(root.join("blobs/sha256"))
        .and_then(|()| fs::remove_dir(root.join("blobs")))
        .and_then(|()| match fs::remove_file(root.join("oci-layout")) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        })
        .and_then(|()| match before {
            Before::Nothing => fs::remove_dir(root),
            _ => sync_directory(root),
        });
    if let Err(error) = removed {
        tracing::debug!(layout = %root.display(), %error, "an empty layout stays");
    }
}
