//! Opens a directory that is mounted into a container, such that nothing in it leads outside and no lookup on the way
//! waits for a file system that the tenant serves.
//!
//! It is reached through the container's own root, so it is what the container sees there, including the IDs of an
//! ID-mapped mount. The path is resolved name by name. A descriptor that was only looked up (`O_PATH`) makes no file
//! system respond to anything. It keeps its mount from being removed, so the mount's ID refers to that mount and no
//! other when the container's mount table is read *afterwards*. No name is looked up in a mount before the table has
//! shown its type. From the volume on, everything goes through its descriptor, beneath it, and never into another
//! mount.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags, Stat, StatxFlags};

use super::identity::Identity;
use super::root::{Root, is_absent};
use crate::node::procfs::{MountInfo, mount_id};

/// The opened directory, and the directories above it as the container sees them.
#[derive(Clone, Debug)]
pub struct Volume {
    at: Vec<u8>,
    root: Root,
    above: Vec<Arc<OwnedFd>>,
    /// ID of the mount.
    mount: u64,
    /// Status of the directory, as the template for status fields that `statx` is not asked for.
    stat: Stat,
    /// Whether this kernel can determine a status by itself, without waiting for a server.
    local: bool,
}

/// The reason why a volume is not opened.
#[derive(Debug)]
pub enum OpenError {
    /// The error of the kernel.
    Io(io::Error),
    /// A different mount is at this path.
    WrongMount,
    /// It is not a directory.
    NotADirectory,
    /// The path leads through a mount that may never respond.
    UntrustedMount {
        /// Its mount point.
        at: PathBuf,
        /// Type of its file system.
        fs_type: String,
    },
    /// The identity with which it is read has no permission.
    Denied,
}

impl From<io::Error> for OpenError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<rustix::io::Errno> for OpenError {
    fn from(error: rustix::io::Errno) -> Self {
        Self::Io(error.into())
    }
}

/// The result of looking at a name in a volume.
pub(crate) enum NameStatus {
    /// It no longer exists.
    Gone,
    /// It is a mount point.
    Mounted,
    /// Its directory may not be searched by the identity.
    Denied,
    /// Its status.
    Present(Box<Stat>),
}

/// How a volume is found and read.
pub struct VolumeLookup<'a> {
    /// Path of the container's root: `/proc/PID/root`.
    pub container: &'a Path,
    /// Device number that the file system of this root must have: a process can change its root at any time.
    pub device: (u32, u32),
    /// Mount point of the volume, without a leading slash.
    pub at: &'a [u8],
    /// ID of the expected mount.
    pub mount: u64,
    /// Reads the container's mount table.
    pub table: &'a dyn Fn() -> io::Result<Vec<MountInfo>>,
    /// Whether names may be looked up in a file system of this type.
    pub is_traversable: &'a dyn Fn(&MountInfo) -> bool,
}

/// A mount that was reached. It cannot be removed while this exists.
pub struct ResolvedVolume {
    handle: OwnedFd,
    above: Vec<OwnedFd>,
    /// Its line in the mount table.
    pub line: MountInfo,
}

impl VolumeLookup<'_> {
    /// Walks to the volume.
    pub fn resolve(&self) -> Result<ResolvedVolume, OpenError> {
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let base = rustix::fs::open(self.container, flags | OFlags::DIRECTORY, Mode::empty())?;
        let mut mount = mount_id(base.as_fd())?;
        if self.line(mount)?.device != self.device {
            return Err(OpenError::WrongMount);
        }
        let mut above = vec![base];
        let mut names = self.at.split(|&b| b == b'/').peekable();
        while let (Some(name), Some(dir)) = (names.next(), above.last()) {
            let last = names.peek().is_none();
            let flags = if last {
                flags
            } else {
                flags | OFlags::DIRECTORY
            };
            let found = look_up(dir.as_fd(), name, flags)?;
            let there = mount_id(found.as_fd())?;
            let crossed = there != mount;
            if last {
                return if crossed && there == self.mount {
                    let line = self.line(there)?;
                    Ok(ResolvedVolume {
                        handle: found,
                        above,
                        line,
                    })
                } else {
                    Err(OpenError::WrongMount)
                };
            }
            if crossed {
                let line = self.line(there)?;
                if !(self.is_traversable)(&line) {
                    return Err(OpenError::UntrustedMount {
                        at: line.mount_point,
                        fs_type: line.fs_type,
                    });
                }
                mount = there;
            }
            above.push(found);
        }
        Err(OpenError::WrongMount)
    }

    fn line(&self, mount: u64) -> Result<MountInfo, OpenError> {
        let lines = (self.table)()?;
        let line = lines.into_iter().find(|line| line.id == mount);
        // A mount that was removed from the tree meanwhile is in no table.
        line.ok_or(OpenError::WrongMount)
    }
}

impl ResolvedVolume {
    /// Opens the directory to be read with the rights of `who`, or with this program's own. `local` means that this
    /// kernel can determine a status by itself, without waiting for a server.
    pub fn open(
        self,
        lookup: &VolumeLookup<'_>,
        who: Option<Arc<Identity>>,
        local: bool,
    ) -> Result<Volume, OpenError> {
        let Self {
            handle,
            mut above,
            line,
        } = self;
        // The caller has accepted this type of file system, so it may be queried.
        let stat = rustix::fs::fstat(&handle)?;
        if !rustix::fs::FileType::from_raw_mode(stat.st_mode).is_dir() {
            return Err(OpenError::NotADirectory);
        }
        if let Some(who) = &who {
            let _rights = super::identity::enter(Some(who))?;
            for dir in &above {
                if !who.may_search(dir)? {
                    return Err(OpenError::Denied);
                }
            }
            if !who.may_read(&handle, true)? {
                return Err(OpenError::Denied);
            }
        }
        // The container's root is not one of the directories above: it is the root of the tree.
        above.remove(0);
        Ok(Volume {
            at: lookup.at.to_vec(),
            root: Root::mounted(handle, lookup.container, lookup.at, who),
            above: above.into_iter().map(Arc::new).collect(),
            mount: line.id,
            stat,
            local,
        })
    }
}

impl Volume {
    /// Returns the mount point, without a leading slash.
    pub(crate) fn at(&self) -> &[u8] {
        &self.at
    }

    /// Returns the directory. Paths below it begin with its mount point.
    pub(crate) fn root(&self) -> &Root {
        &self.root
    }

    /// Returns the directories on the path to it, outermost first, with their names.
    pub(crate) fn above(&self) -> impl Iterator<Item = (&[u8], BorrowedFd<'_>)> {
        self.at
            .split(|&b| b == b'/')
            .zip(self.above.iter().map(|fd| fd.as_fd()))
    }

    /// Returns its own name, in the last of the directories above.
    pub(crate) fn name(&self) -> &[u8] {
        super::lower::basename(&self.at)
    }

    /// Looks at `name` in the volume's directory `dir`. A mount on top of it is not queried.
    pub(crate) fn name_status(&self, dir: BorrowedFd<'_>, name: &[u8]) -> io::Result<NameStatus> {
        if !self.local {
            return match Self::handle(dir, name) {
                Ok(handle) => Ok(NameStatus::Present(Box::new(rustix::fs::fstat(handle)?))),
                Err(error) => self.not_there(error),
            };
        }
        // One call instead of three. With AT_STATX_DONT_SYNC the server of a mount in there is not asked, only cached
        // data is returned, and a local disk always has it.
        let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::STATX_DONT_SYNC | AtFlags::NO_AUTOMOUNT;
        let wanted = StatxFlags::BASIC_STATS | StatxFlags::MNT_ID;
        match rustix::fs::statx(dir, OsStr::from_bytes(name), flags, wanted) {
            Ok(found) if found.stx_mnt_id != self.mount => Ok(NameStatus::Mounted),
            Ok(found) => Ok(NameStatus::Present(Box::new(self.as_stat(&found)))),
            Err(error) => self.not_there(error.into()),
        }
    }

    /// Returns a descriptor of `name` in the volume's directory `dir` that serves only for looking at it. Fails with
    /// EXDEV if something is mounted on it.
    pub(crate) fn handle(dir: BorrowedFd<'_>, name: &[u8]) -> io::Result<OwnedFd> {
        let resolve = ResolveFlags::BENEATH
            | ResolveFlags::NO_SYMLINKS
            | ResolveFlags::NO_MAGICLINKS
            | ResolveFlags::NO_XDEV;
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        super::root::retry_interrupted(|| {
            rustix::fs::openat2(dir, OsStr::from_bytes(name), flags, Mode::empty(), resolve)
        })
    }

    /// Classifies an error of a look.
    pub(crate) fn not_there(&self, error: io::Error) -> io::Result<NameStatus> {
        let crosses = rustix::io::Errno::XDEV.raw_os_error();
        match error {
            error if error.raw_os_error() == Some(crosses) => Ok(NameStatus::Mounted),
            error if is_absent(&error) => Ok(NameStatus::Gone),
            error if self.root.is_denied(&error) => Ok(NameStatus::Denied),
            error => Err(error),
        }
    }

    #[allow(
        clippy::unnecessary_cast,
        clippy::cast_lossless,
        reason = "the fields' types differ between architectures"
    )]
    fn as_stat(&self, found: &rustix::fs::Statx) -> Stat {
        let mut stat = self.stat;
        stat.st_ino = found.stx_ino as _;
        stat.st_mode = found.stx_mode as _;
        stat.st_nlink = found.stx_nlink as _;
        stat.st_uid = found.stx_uid as _;
        stat.st_gid = found.stx_gid as _;
        stat.st_rdev = rustix::fs::makedev(found.stx_rdev_major, found.stx_rdev_minor) as _;
        stat.st_size = found.stx_size as _;
        stat.st_blocks = found.stx_blocks as _;
        stat.st_mtime = found.stx_mtime.tv_sec as _;
        stat.st_mtime_nsec = found.stx_mtime.tv_nsec as _;
        stat.st_ctime = found.stx_ctime.tv_sec as _;
        stat.st_ctime_nsec = found.stx_ctime.tv_nsec as _;
        stat
    }
}

/// Looks up one name. Mounts are crossed; links are not followed and nothing above is reached.
fn look_up(dir: BorrowedFd<'_>, name: &[u8], flags: OFlags) -> io::Result<OwnedFd> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    super::root::retry_interrupted(|| {
        let name = OsStr::from_bytes(name);
        rustix::fs::openat2(dir, name, flags | OFlags::NOFOLLOW, Mode::empty(), resolve)
    })
}
