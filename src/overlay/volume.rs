//! A directory that is mounted into a container, opened so that nothing in it leads out of it.
//!
//! It is reached through the container's own root, so it is what the container sees there, the ids of an id-mapped mount
//! included. What the kernel found on the way is held against the mount that was meant: a path that leads elsewhere by
//! then is refused. From then on everything goes through the descriptor, beneath it, and never into another mount.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags, StatxAttributes, StatxFlags};

use super::root::Root;

/// The opened directory, and those above it as the container sees them.
#[derive(Clone, Debug)]
pub struct Volume {
    at: Vec<u8>,
    root: Root,
    above: Vec<Arc<OwnedFd>>,
}

impl Volume {
    /// Opens what is mounted at `at` (without a leading slash) below `container`, a path to the container's root, if it
    /// is the mount with the id `mount`; `None` when something else is there.
    pub fn open(container: &Path, at: &[u8], mount: u64) -> io::Result<Option<Self>> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let base = rustix::fs::open(container, flags, Mode::empty())?;
        let mut above = Vec::new();
        for (end, _) in at.iter().enumerate().filter(|(_, b)| **b == b'/') {
            above.push(Arc::new(open_below(base.as_fd(), &at[..end], flags)?));
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NONBLOCK;
        // Looked at before it is opened for reading: opening may wait for whoever serves a file system.
        let handle = open_below(base.as_fd(), at, OFlags::PATH | OFlags::CLOEXEC)?;
        if mounted(handle.as_fd())? != Some(mount) {
            return Ok(None);
        }
        let fd = open_below(base.as_fd(), at, flags)?;
        if mounted(fd.as_fd())? != Some(mount) {
            return Ok(None);
        }
        Ok(Some(Self {
            at: at.to_vec(),
            root: Root::mounted(fd, container, at),
            above,
        }))
    }

    /// Where it is mounted, without a leading slash.
    pub fn at(&self) -> &[u8] {
        &self.at
    }

    /// The directory. Paths below it begin with where it is mounted.
    pub fn root(&self) -> &Root {
        &self.root
    }

    /// The directories on the way to it, the outermost first, with their names.
    pub fn above(&self) -> impl Iterator<Item = (&[u8], BorrowedFd<'_>)> {
        self.at
            .split(|&b| b == b'/')
            .zip(self.above.iter().map(|fd| fd.as_fd()))
    }

    /// Its own name, in the last of the directories above.
    pub fn name(&self) -> &[u8] {
        super::lower::basename(&self.at)
    }
}

/// In the container's view: other mounts on the way are crossed, links are not followed, nothing leads above its root.
fn open_below(base: BorrowedFd<'_>, path: &[u8], flags: OFlags) -> io::Result<OwnedFd> {
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let path = OsStr::from_bytes(path);
    super::root::retry_again(|| {
        rustix::fs::openat2(base, path, flags | OFlags::NOFOLLOW, Mode::empty(), resolve)
    })
}

/// The id of the mount whose root a descriptor is; none for what lies deeper in a mount.
fn mounted(fd: BorrowedFd<'_>) -> io::Result<Option<u64>> {
    let stat = rustix::fs::statx(fd, "", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID)?;
    let root = stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT);
    Ok(root.then_some(stat.stx_mnt_id))
}
