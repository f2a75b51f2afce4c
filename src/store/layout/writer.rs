//! The state of a save to a layout directory, shared by the clones of its [`super::Directory`].

use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::blobs::BlobName;
use super::lease::{Before, Lease};
use super::sweep::{self, Lock};
use super::{Error, io_error};
use crate::common::private_files::{self, FileMode};

/// Attempts at a list of blobs in a directory that another process, whose save failed, is removing.
const MAX_ATTEMPTS: u32 = 5;

/// A save to a layout directory. When the last clone is dropped, what was written and no image needs is deleted.
#[derive(Debug, Default)]
pub(super) struct Writer {
    state: Mutex<State>,
    /// Whether the save is given up. Set before the state is changed, for a thread that has the state and waits for the
    /// lock on the layout.
    stop: AtomicBool,
}

#[derive(Debug, Default)]
enum State {
    /// Nothing was written yet, or everything that was written belongs to an image.
    #[default]
    Idle,
    /// This was written, or is relied on.
    Writing(Lease),
    /// The save was given up. Threads that still write find out by this.
    GivenUp,
}

/// Access to the state. Lock order: this, then the layout's directory.
pub(super) struct Writing<'w> {
    state: MutexGuard<'w, State>,
    stop: &'w AtomicBool,
}

impl Writer {
    /// Begins a save, unless it has begun: creates the directory and the list of what is written.
    ///
    /// `check` has to fail if an existing directory is no layout.
    pub(super) fn begin(
        &self,
        root: &Path,
        mode: FileMode,
        check: impl Fn() -> Result<(), Error>,
    ) -> Result<Writing<'_>, Error> {
        let mut state = self.lock();
        match *state {
            State::Writing(_) => {}
            State::GivenUp => return Err(given_up(root)),
            State::Idle => *state = State::Writing(create(root, mode, &check, &self.stop)?),
        }
        Ok(self.writing(state))
    }

    /// Returns the save, if it has begun.
    pub(super) fn begun(&self) -> Option<Writing<'_>> {
        let state = self.lock();
        matches!(*state, State::Writing(_)).then(|| self.writing(state))
    }

    fn writing<'w>(&'w self, state: MutexGuard<'w, State>) -> Writing<'w> {
        Writing {
            state,
            stop: &self.stop,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives the save up: deletes what no image needs. Later writes fail.
    pub(super) fn give_up(&self) {
        self.stop.store(true, Ordering::Relaxed);
        let mut state = self.lock();
        if let State::Writing(lease) = std::mem::replace(&mut *state, State::GivenUp)
            && let Err(error) = sweep::give_up(&lease)
        {
            tracing::warn!(
                layout = %lease.root().display(), %error,
                "what the save wrote stays until the next command on this layout"
            );
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.give_up();
    }
}

impl Writing<'_> {
    /// Locks the layout at `root` exclusively.
    pub(super) fn lock_exclusively(&self, root: &Path) -> Result<File, Error> {
        lock(root, Lock::Exclusive, self.stop)
    }

    /// Lists a blob that is about to get its name while no other process compares.
    pub(super) fn add(&mut self, name: BlobName) -> Result<(), Error> {
        let State::Writing(lease) = &mut *self.state else {
            return Ok(());
        };
        let _lock = lock(lease.root(), Lock::Shared, self.stop)?;
        lease.add_durably([name])
    }

    /// Calls `find` while no other process deletes, and lists the blob if it is there.
    pub(super) fn add_found<T>(
        &mut self,
        name: BlobName,
        find: impl FnOnce() -> Result<Option<T>, Error>,
    ) -> Result<Option<T>, Error> {
        let State::Writing(lease) = &mut *self.state else {
            return find();
        };
        let _lock = lock(lease.root(), Lock::Shared, self.stop)?;
        let found = find()?;
        if found.is_some() {
            lease.add([name])?;
        }
        Ok(found)
    }

    /// Lists blobs under the exclusive lock, which the caller holds.
    pub(super) fn add_locked(
        &mut self,
        names: impl IntoIterator<Item = BlobName>,
    ) -> Result<(), Error> {
        match &mut *self.state {
            State::Writing(lease) => lease.add_durably(names),
            State::Idle | State::GivenUp => Ok(()),
        }
    }

    /// Ends the save under the exclusive lock, which the caller holds: what was listed and neither is in `known` nor is
    /// needed by an image is deleted. The image is saved whether this succeeds or not.
    pub(super) fn end(mut self, known: &HashSet<BlobName>, lock: &File) {
        let State::Writing(lease) = std::mem::take(&mut *self.state) else {
            return;
        };
        if let Err(error) = sweep::end_locked(&lease, known, lock) {
            tracing::warn!(
                layout = %lease.root().display(), %error,
                "what the replaced image needed stays until it can be deleted"
            );
        }
    }
}

fn lock(root: &Path, how: Lock, stop: &AtomicBool) -> Result<File, Error> {
    let mut go_on = || !stop.load(Ordering::Relaxed);
    sweep::lock(root, how, sweep::LOCK_LIMIT, &mut go_on)
}

fn given_up(root: &Path) -> Error {
    Error::GivenUp {
        path: root.to_path_buf(),
    }
}

fn create(
    root: &Path,
    mode: FileMode,
    check: &dyn Fn() -> Result<(), Error>,
    stop: &AtomicBool,
) -> Result<Lease, Error> {
    let mut go_on = || !stop.load(Ordering::Relaxed);
    let mut attempt = 1;
    loop {
        let before = if !root.exists() {
            private_files::make_dir(root, mode).map_err(io_error(root, "create"))?;
            Before::Nothing
        } else if root.join("index.json").exists() {
            Before::Layout
        } else {
            Before::Directory
        };
        check()?;
        match Lease::create(root, mode, before) {
            Err(Error::Io { source, .. })
                if source.kind() == io::ErrorKind::NotFound && attempt < MAX_ATTEMPTS =>
            {
                attempt += 1;
            }
            created => {
                // The save does not depend on what another one left.
                let recovered = sweep::recover_while(root, &mut go_on);
                if let (Ok(_), Err(error)) = (&created, recovered) {
                    tracing::warn!(layout = %root.display(), %error, "what a killed save left stays");
                }
                return created;
            }
        }
    }
}
