//! Deletes blobs of a layout directory that no image needs: those that a writer lists ([`super::lease`]) at its end, those
//! of dead writers, and on request all ([`super::prune`]). Everything happens under the exclusive lock on the directory,
//! and `index.json` is on disk before the first blob is deleted.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::FlockOperation;
use rustix::io::Errno;

use super::blobs::{BlobName, Blobs};
use super::lease::{self, Before, Lease, Others};
use super::references::{self, Reference};
use super::staged::{self, sync_directory};
use super::{Error, io_error, read_document};
use crate::common::regular_file;

/// How long a save or a pruning waits for the lock on a layout. The commands of this program hold it for moments, or
/// while they delete blobs.
pub(super) const LOCK_LIMIT: Duration = Duration::from_secs(60);
/// The same of the removal of an image, which a user waits for.
pub(super) const REMOVE_LOCK_LIMIT: Duration = Duration::from_secs(20);
/// The same of the end of a save that is given up: what it leaves is deleted by the next command.
const GIVE_UP_LOCK_LIMIT: Duration = Duration::from_secs(2);
/// Longest pause between two attempts to lock a layout.
const MAX_LOCK_PAUSE: Duration = Duration::from_millis(50);

/// How a layout is locked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lock {
    /// Others may lock it so, too.
    Shared,
    /// No other process may.
    Exclusive,
}

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
///
/// Every user who can read the directory can lock it, too. So the lock is waited for no longer than `limit`, and only as
/// long as `go_on` returns true.
pub(super) fn lock(
    root: &Path,
    how: Lock,
    limit: Duration,
    go_on: &mut dyn FnMut() -> bool,
) -> Result<File, Error> {
    let lock = regular_file::open_directory(root).map_err(io_error(root, "open"))?;
    let (begun, mut pause) = (Instant::now(), Duration::from_millis(1));
    let how = match how {
        Lock::Shared => FlockOperation::NonBlockingLockShared,
        Lock::Exclusive => FlockOperation::NonBlockingLockExclusive,
    };
    loop {
        match rustix::io::retry_on_intr(|| rustix::fs::flock(&lock, how)) {
            Ok(()) => return Ok(lock),
            Err(Errno::WOULDBLOCK) => {}
            Err(error) => return Err(io_error(root, "lock")(error.into())),
        }
        if !go_on() {
            return Err(Error::GivenUp {
                path: root.to_path_buf(),
            });
        }
        if begun.elapsed() >= limit {
            let why = format!(
                "another process has held its lock for more than {} s; 'lslocks' shows which (each user who can read the \
                 directory can hold it)",
                limit.as_secs()
            );
            return Err(io_error(root, "lock")(io::Error::new(
                io::ErrorKind::TimedOut,
                why,
            )));
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(MAX_LOCK_PAUSE);
    }
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

/// Ends a writer that is given up: deletes what it lists and no image needs, then the list itself.
///
/// A failure keeps the list, for the next command.
pub(super) fn give_up(lease: &Lease) -> Result<Freed, Error> {
    let lock = lock(
        lease.root(),
        Lock::Exclusive,
        GIVE_UP_LOCK_LIMIT,
        &mut || true,
    )?;
    end_locked(lease, &HashSet::new(), &lock)
}

/// Ends a writer under the exclusive lock, which the caller holds. `known` is needed for certain, so that images are not
/// read if there is nothing else.
///
/// A failure keeps the list, for the next command.
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
    recover_while(root, &mut || true)
}

/// Like [`recover`], as long as `go_on` returns true.
pub(super) fn recover_while(root: &Path, go_on: &mut dyn FnMut() -> bool) -> Result<Freed, Error> {
    if !lease::any_abandoned(root)? {
        return Ok(Freed::default());
    }
    let lock = lock(root, Lock::Exclusive, LOCK_LIMIT, go_on)?;
    recover_locked(root, &lock)
}

/// Like [`recover`], under a lock that the caller holds.
pub(super) fn recover_locked(root: &Path, _: &File) -> Result<Freed, Error> {
    let others = Others::read(root, None)?;
    if others.abandoned.is_empty() {
        return Ok(Freed::default());
    }
    let before = others.before_abandoned();
    let names = others.abandoned.iter().flat_map(|dead| &dead.names);
    let freed = delete_unneeded(root, names, &others, before != Before::Layout)?;
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
pub(super) fn remove_empty_layout(root: &Path, before: Before) {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_that_is_held_is_waited_for_only_so_long() -> io::Result<()> {
        let dir = tempfile::tempdir()?;
        let held = File::open(dir.path())?;
        rustix::fs::flock(&held, FlockOperation::LockShared)?;
        let wait = |how, limit, go_on: &mut dyn FnMut() -> bool| {
            lock(dir.path(), how, Duration::from_millis(limit), go_on)
        };
        assert!(wait(Lock::Shared, 0, &mut || true).is_ok());
        let error = wait(Lock::Exclusive, 30, &mut || true).err();
        let told = error.as_ref().map(ToString::to_string).unwrap_or_default();
        assert!(told.contains("another process has held"), "{told}");
        assert!(error.is_some_and(|error| error.retryable()));
        let ended = wait(Lock::Exclusive, 60_000, &mut || false);
        assert!(matches!(ended, Err(Error::GivenUp { .. })), "{ended:?}");
        drop(held);
        assert!(wait(Lock::Exclusive, 0, &mut || true).is_ok());
        Ok(())
    }
}
