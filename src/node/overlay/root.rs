//! Opens one directory of an overlay in such a way that no path in it can lead outside.
//!
//! The upper is untrusted and changes while it is read. The kernel resolves every path relative to the root's
//! descriptor with `openat2`: no symlink is followed, no mount is crossed, nothing above the root is reached
//! (CVE-2018-15664 and similar).

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags, Stat};
use rustix::path::{Arg, DecInt};

use super::identity::{self, Identity, IdentityGuard};
use super::xattr::proc_path;

/// Longest path handed to the kernel in one piece; PATH_MAX is 4096 with the terminator.
const PATH_PIECE: usize = 4000;
/// Longest attribute value, and longest list of names (`XATTR_SIZE_MAX`, `XATTR_LIST_MAX`).
const XATTR_MAX: usize = 65_536;

/// The root of one upper or lower directory, or of a volume.
#[derive(Clone, Debug)]
pub(crate) struct Root {
    fd: Arc<OwnedFd>,
    path: PathBuf,
    /// Prefix of all paths that lead into this root; empty except for volumes.
    at: Vec<u8>,
    /// The rights with which it is read; `None` means this program's own.
    who: Option<Arc<Identity>>,
}

impl Root {
    /// Opens the directory at `path`, which must not contain symbolic links. The path comes from the runtime, not from
    /// the tenant, but a store in a user's home may have been changed by that user since it was checked.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
        let resolve = ResolveFlags::NO_SYMLINKS;
        let open = || rustix::fs::openat2(rustix::fs::CWD, path, flags, Mode::empty(), resolve);
        let fd = retry_interrupted(open)?;
        Ok(Self {
            fd: Arc::new(fd),
            path: path.to_owned(),
            at: Vec::new(),
            who: None,
        })
    }

    /// Wraps an opened directory that is mounted at `at` below `path`. Its paths are those of the tree that it is
    /// mounted in, and everything in it is read with the rights of `who`.
    pub(super) fn mounted(fd: OwnedFd, path: &Path, at: &[u8], who: Option<Arc<Identity>>) -> Self {
        Self {
            fd: Arc::new(fd),
            path: path.to_owned(),
            at: at.to_vec(),
            who,
        }
    }

    /// Returns the identity with which the root is read, if it is not this program's own.
    pub(crate) fn identity(&self) -> Option<&Identity> {
        self.who.as_deref()
    }

    /// Gives this thread the rights with which this root is read, until the returned guard is dropped. Every method
    /// here does so itself; a caller that makes many calls, or works with descriptors, does it once for all of them.
    pub(crate) fn enter(&self) -> io::Result<IdentityGuard> {
        identity::enter(self.who.as_ref())
    }

    /// Returns a path relative to the opened directory, or `None` if it does not lead into it.
    fn inside<'p>(&self, path: &'p [u8]) -> Option<&'p [u8]> {
        if self.at.is_empty() {
            return Some(path);
        }
        match path.strip_prefix(self.at.as_slice())? {
            [] => Some(b""),
            [b'/', rest @ ..] => Some(rest),
            _ => None,
        }
    }

    /// Returns the path of the directory, for messages.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Opens `path` below the root without following any link. An empty path is the root itself.
    pub(crate) fn open_beneath(&self, path: &[u8], flags: OFlags) -> io::Result<OwnedFd> {
        let _rights = self.enter()?;
        let resolve = ResolveFlags::BENEATH
            | ResolveFlags::NO_SYMLINKS
            | ResolveFlags::NO_MAGICLINKS
            | ResolveFlags::NO_XDEV;
        let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let flags = if flags.contains(OFlags::PATH) {
            flags - OFlags::NONBLOCK
        } else {
            flags
        };
        let path = self
            .inside(path)
            .ok_or(io::Error::from(rustix::io::Errno::NOENT))?;
        let mut at: Option<OwnedFd> = None;
        let mut rest = if path.is_empty() {
            b".".as_slice()
        } else {
            path
        };
        loop {
            let dir = at.as_ref().map_or(self.fd.as_fd(), AsFd::as_fd);
            let cut = match self.checked_identity() {
                Some(who) => {
                    if rest != b"." && !who.may_search(dir)? {
                        return Err(io::ErrorKind::PermissionDenied.into());
                    }
                    rest.iter().position(|&b| b == b'/')
                }
                None if rest.len() <= PATH_PIECE => None,
                None => rest[..PATH_PIECE].iter().rposition(|&b| b == b'/'),
            };
            let (piece, flags) = match cut {
                Some(cut) => (
                    &rest[..cut],
                    OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
                ),
                None => (rest, flags),
            };
            let fd = retry_interrupted(|| {
                rustix::fs::openat2(dir, OsStr::from_bytes(piece), flags, Mode::empty(), resolve)
            })?;
            match cut {
                Some(cut) => {
                    rest = &rest[cut + 1..];
                    at = Some(fd);
                }
                None => return Ok(fd),
            }
        }
    }

    /// Returns the identity if the kernel alone cannot decide what may be read here.
    fn checked_identity(&self) -> Option<&Identity> {
        self.who.as_deref().filter(|who| who.is_mapped())
    }

    /// Opens a directory for listing.
    pub(crate) fn open_dir(&self, path: &[u8]) -> io::Result<OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        let Some(who) = self.checked_identity() else {
            return self.open_beneath(path, flags);
        };
        let _rights = self.enter()?;
        let handle = self.open_beneath(path, OFlags::PATH | OFlags::DIRECTORY)?;
        if !who.may_read(&handle, true)? {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        let flags = flags | OFlags::CLOEXEC | OFlags::NONBLOCK;
        Ok(rustix::fs::openat(&handle, ".", flags, Mode::empty())?)
    }

    /// Returns the status of `path` itself, never of a link's target, or `None` if it does not exist.
    pub(crate) fn stat(&self, path: &[u8]) -> io::Result<Option<Stat>> {
        let fd = match self.open_beneath(path, OFlags::PATH) {
            Ok(fd) => fd,
            Err(error) if is_absent(&error) => return Ok(None),
            Err(error) => return Err(error),
        };
        Ok(Some(rustix::fs::fstat(&fd)?))
    }

    /// Returns the target of the symlink at `path`.
    pub(crate) fn read_link(&self, path: &[u8]) -> io::Result<Vec<u8>> {
        let _rights = self.enter()?;
        let fd = self.open_beneath(path, OFlags::PATH)?;
        Ok(rustix::fs::readlinkat(&fd, "", Vec::new())?.into_bytes())
    }

    /// Opens `path` for reading if, and only if, it is a regular file with the inode number `ino`.
    ///
    /// A device or FIFO is never opened: the entry is examined through an `O_PATH` descriptor first, and that very
    /// inode is then reopened. Returns `Ok(None)` if the path is gone or is a different file now, or if it is read with
    /// another identity that may no longer read it.
    pub(crate) fn open_file(&self, path: &[u8], ino: u64) -> io::Result<Option<OwnedFd>> {
        let _rights = self.enter()?;
        match self.open_same_inode(path, ino) {
            Err(error) if is_absent(&error) || self.is_denied(&error) => Ok(None),
            other => other,
        }
    }

    /// Returns whether a call failed because the identity with which this root is read lacks the permission.
    pub(crate) fn is_denied(&self, error: &io::Error) -> bool {
        self.who.is_some() && error.kind() == io::ErrorKind::PermissionDenied
    }

    fn open_same_inode(&self, path: &[u8], ino: u64) -> io::Result<Option<OwnedFd>> {
        let handle = self.open_beneath(path, OFlags::PATH)?;
        let stat = rustix::fs::fstat(&handle)?;
        let regular = rustix::fs::FileType::from_raw_mode(stat.st_mode).is_file();
        if !regular || stat.st_ino != ino {
            return Ok(None);
        }
        if let Some(who) = self.checked_identity()
            && !who.may_read(&handle, false)?
        {
            return Ok(None);
        }
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK;
        // O_NOATIME needs the file's owner or CAP_FOWNER. A save should not change access times where it can avoid it.
        match reopen(handle.as_fd(), flags | OFlags::NOATIME) {
            Err(rustix::io::Errno::PERM) => Ok(Some(reopen(handle.as_fd(), flags)?)),
            other => Ok(Some(other?)),
        }
    }

    /// Creates a file without a name on the same file system, owned by this program. It vanishes with its descriptor.
    pub(crate) fn create_unnamed_file(&self) -> io::Result<OwnedFd> {
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        Ok(rustix::fs::openat(
            self.fd.as_fd(),
            ".",
            flags,
            Mode::RUSR | Mode::WUSR,
        )?)
    }

    /// Returns an extended attribute of `path` itself, or `None` if the attribute or the path does not exist.
    pub(crate) fn xattr(&self, path: &[u8], name: &str) -> io::Result<Option<Vec<u8>>> {
        let _rights = self.enter()?;
        let handle = match self.open_beneath(path, OFlags::PATH) {
            Ok(handle) => handle,
            Err(error) if is_absent(&error) => return Ok(None),
            Err(error) => return Err(error),
        };
        // fgetxattr fails on an O_PATH descriptor. The path through /proc reaches the same inode, also for a symlink,
        // because the magic link leads to the inode and not to the link's target.
        xattr_at(proc_path(handle.as_fd()).as_str(), name, Follow::Yes)
    }
}

/// Whether the last component of a path may be a link that is followed.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Follow {
    /// Only for `/proc/self/fd` links, which lead to one inode.
    Yes,
    /// For names in a directory.
    No,
}

/// Returns the value of the attribute `name`, or `None` if there is none.
pub(crate) fn xattr_at(
    path: impl Arg + Copy,
    name: impl Arg + Copy,
    follow: Follow,
) -> io::Result<Option<Vec<u8>>> {
    use rustix::io::Errno;
    let get = |buffer: &mut [u8]| match follow {
        Follow::Yes => rustix::fs::getxattr(path, name, buffer),
        Follow::No => rustix::fs::lgetxattr(path, name, buffer),
    };
    let mut small = [0u8; 256];
    match get(&mut small) {
        Ok(n) => return Ok(Some(small[..n].to_vec())),
        Err(Errno::NODATA | Errno::OPNOTSUPP | Errno::NOENT) => return Ok(None),
        Err(Errno::RANGE) => {}
        Err(error) => return Err(error.into()),
    }
    let mut large = vec![0u8; XATTR_MAX];
    match get(&mut large) {
        Ok(n) => {
            large.truncate(n);
            Ok(Some(large))
        }
        Err(Errno::NODATA | Errno::NOENT) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Returns the names of all attributes, each terminated by NUL.
pub(crate) fn xattr_names_at(path: impl Arg + Copy, follow: Follow) -> io::Result<Vec<u8>> {
    use rustix::io::Errno;
    let list = |buffer: &mut [u8]| match follow {
        Follow::Yes => rustix::fs::listxattr(path, buffer),
        Follow::No => rustix::fs::llistxattr(path, buffer),
    };
    let mut small = [0u8; 512];
    match list(&mut small) {
        Ok(n) => return Ok(small[..n].to_vec()),
        Err(Errno::OPNOTSUPP) => return Ok(Vec::new()),
        Err(Errno::RANGE) => {}
        Err(error) => return Err(error.into()),
    }
    let mut large = vec![0u8; XATTR_MAX];
    let n = list(&mut large)?;
    large.truncate(n);
    Ok(large)
}

/// Opens the inode behind an `O_PATH` descriptor.
///
/// Uses its number in the directory of this process's descriptors, which is opened once, because the path through
/// `/proc` takes longer than the rest. (The directory belongs to the process that opened it; this program never forks
/// without executing another program.)
fn reopen(handle: BorrowedFd<'_>, flags: OFlags) -> rustix::io::Result<OwnedFd> {
    static DESCRIPTORS: OnceLock<Option<OwnedFd>> = OnceLock::new();
    let directory = DESCRIPTORS.get_or_init(|| {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        rustix::fs::open("/proc/self/fd", flags, Mode::empty()).ok()
    });
    match directory {
        Some(directory) => {
            let number = DecInt::from_fd(handle);
            rustix::fs::openat(directory, number, flags, Mode::empty())
        }
        None => rustix::fs::open(proc_path(handle), flags, Mode::empty()),
    }
}

/// Returns the target of the symlink `name` in `dir`, or `None` if it is no longer a symlink.
pub(crate) fn read_link_at(dir: BorrowedFd<'_>, name: &[u8]) -> io::Result<Option<Vec<u8>>> {
    use rustix::io::Errno;
    match rustix::fs::readlinkat(dir, OsStr::from_bytes(name), Vec::new()) {
        Ok(target) => Ok(Some(target.into_bytes())),
        Err(Errno::NOENT | Errno::INVAL) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Bytes of a directory that are read per call.
const PIECE: usize = 32 * 1024;

/// The names in a directory, unsorted, without `.` and `..`. They are read in pieces because a directory may be larger
/// than memory.
///
/// A name that is removed and created again meanwhile may be returned twice, but never twice in one piece.
pub(crate) struct Names<'fd> {
    fd: BorrowedFd<'fd>,
    buffer: Vec<u8>,
    piece: std::vec::IntoIter<Vec<u8>>,
    pieces: u32,
    ended: bool,
}

/// Returns an iterator over the names in the directory `fd`.
pub(crate) fn names(fd: BorrowedFd<'_>) -> Names<'_> {
    Names {
        fd,
        buffer: Vec::with_capacity(PIECE),
        piece: Vec::new().into_iter(),
        pieces: 0,
        ended: false,
    }
}

impl Names<'_> {
    /// Returns whether the names came in more than one piece so far.
    pub(crate) fn in_pieces(&self) -> bool {
        self.pieces > 1
    }

    fn read(&mut self) -> io::Result<()> {
        let mut dir = rustix::fs::RawDir::new(self.fd, self.buffer.spare_capacity_mut());
        let mut names = Vec::new();
        loop {
            let Some(entry) = dir.next() else {
                self.ended = true;
                break;
            };
            let entry = entry?;
            let name = entry.file_name().to_bytes();
            if name != b"." && name != b".." {
                names.push(name.to_vec());
            }
            if dir.is_buffer_empty() {
                break;
            }
        }
        self.pieces += u32::from(!names.is_empty());
        self.piece = names.into_iter();
        Ok(())
    }
}

impl Iterator for Names<'_> {
    type Item = io::Result<Vec<u8>>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(name) = self.piece.next() {
                return Some(Ok(name));
            }
            if self.ended {
                return None;
            }
            if let Err(error) = self.read() {
                self.ended = true;
                return Some(Err(error));
            }
        }
    }
}

/// Returns the status of `name` in the directory `dir` without following links, or `None` if it vanished.
pub(crate) fn stat_at(dir: BorrowedFd<'_>, name: &[u8]) -> io::Result<Option<Stat>> {
    match rustix::fs::statat(dir, OsStr::from_bytes(name), AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(Some(stat)),
        Err(rustix::io::Errno::NOENT) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Returns whether an error means that the path no longer exists or is something else now: a component vanished or
/// became a link, or was exchanged while the kernel walked over it (EXDEV).
pub(crate) fn is_absent(error: &io::Error) -> bool {
    use rustix::io::Errno;
    matches!(
        error.raw_os_error().map(Errno::from_raw_os_error),
        Some(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::STALE | Errno::XDEV)
    )
}

/// Repeats `call` on EAGAIN, which `openat2` returns if a rename anywhere raced with the resolution, and on EINTR.
pub(super) fn retry_interrupted<T>(
    mut call: impl FnMut() -> rustix::io::Result<T>,
) -> io::Result<T> {
    for _ in 0..10_000 {
        match call() {
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => std::thread::yield_now(),
            other => return Ok(other?),
        }
    }
    Ok(call()?)
}
