//! A directory that is mounted into a container, opened so that nothing in it leads out of it, and nothing on the way
//! waits for a file system of the tenant's.
//!
//! It is reached through the container's own root, so it is what the container sees there, the ids of an id-mapped mount
//! included. The way goes name by name. A descriptor that was only looked up (`O_PATH`) makes no file system answer
//! anything; it keeps its mount from being taken away, so that the mount's id means that mount and no other when the
//! container's mount table is read *after* it. Nothing is looked up in a mount before the table said of what kind it is. From
//! the volume on everything goes through its descriptor, beneath it, and never into another mount.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags, Stat, StatxFlags};

use super::identity::Identity;
use super::mount::MountInfo;
use super::root::{Root, is_absent};

/// The opened directory, and those above it as the container sees them.
#[derive(Clone, Debug)]
pub struct Volume {
    at: Vec<u8>,
    root: Root,
    above: Vec<Arc<OwnedFd>>,
    /// Id of the mount.
    mount: u64,
    /// Status of the directory, for what a status has besides what is asked for.
    stat: Stat,
    /// Whether a status is this kernel's to tell, so that nothing is waited for.
    local: bool,
}

/// Why it is not opened.
#[derive(Debug)]
pub enum Refusal {
    /// The kernel's answer.
    Io(io::Error),
    /// Something else is mounted there than was meant.
    Elsewhere,
    /// It is no directory.
    NoDirectory,
    /// The way leads through a mount that might never answer.
    Through {
        /// Where that is mounted.
        at: PathBuf,
        /// Type of its file system.
        fs_type: String,
    },
    /// Those with whose rights it is read may not read it.
    Denied,
}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<rustix::io::Errno> for Refusal {
    fn from(error: rustix::io::Errno) -> Self {
        Self::Io(error.into())
    }
}

/// What is known of a name in a volume.
pub enum Look {
    /// It is not there any more.
    Gone,
    /// Something is mounted on it.
    Mounted,
    /// Its directory may not be searched.
    Denied,
    /// Its status.
    There(Box<Stat>),
}

/// How a volume is found and read.
pub struct Way<'a> {
    /// Path to the container's root: `/proc/PID/root`.
    pub container: &'a Path,
    /// Device number of the file system that this root is to be: a process can make anything its root at any time.
    pub device: (u32, u32),
    /// Where the volume is mounted, without a leading slash.
    pub at: &'a [u8],
    /// The mount that is meant.
    pub mount: u64,
    /// Reads the container's mount table.
    pub table: &'a dyn Fn() -> io::Result<Vec<MountInfo>>,
    /// Whether names may be looked up in such a file system.
    pub passable: &'a dyn Fn(&MountInfo) -> bool,
}

/// A mount that was come to: it stays for as long as this is there.
pub struct Reached {
    handle: OwnedFd,
    above: Vec<OwnedFd>,
    /// Its line in the mount table.
    pub line: MountInfo,
}

impl Way<'_> {
    /// Goes there.
    pub fn go(&self) -> Result<Reached, Refusal> {
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let base = rustix::fs::open(self.container, flags | OFlags::DIRECTORY, Mode::empty())?;
        let mut mount = mount_id(base.as_fd())?;
        if self.line(mount)?.device != self.device {
            return Err(Refusal::Elsewhere);
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
                    Ok(Reached {
                        handle: found,
                        above,
                        line,
                    })
                } else {
                    Err(Refusal::Elsewhere)
                };
            }
            if crossed {
                let line = self.line(there)?;
                if !(self.passable)(&line) {
                    return Err(Refusal::Through {
                        at: line.mount_point,
                        fs_type: line.fs_type,
                    });
                }
                mount = there;
            }
            above.push(found);
        }
        Err(Refusal::Elsewhere)
    }

    fn line(&self, mount: u64) -> Result<MountInfo, Refusal> {
        let lines = (self.table)()?;
        let line = lines.into_iter().find(|line| line.id == mount);
        // One that was taken out of the tree meanwhile is in no table.
        line.ok_or(Refusal::Elsewhere)
    }
}

impl Reached {
    /// Opens it to be read with the rights of `who`; none: this program's own. `local`: a status is this
    /// kernel's to tell, so that nothing is waited for.
    pub fn open(
        self,
        way: &Way<'_>,
        who: Option<Arc<Identity>>,
        local: bool,
    ) -> Result<Volume, Refusal> {
        let Self {
            handle,
            mut above,
            line,
        } = self;
        // Of a kind that the caller agreed to: it may be asked.
        let stat = rustix::fs::fstat(&handle)?;
        if !rustix::fs::FileType::from_raw_mode(stat.st_mode).is_dir() {
            return Err(Refusal::NoDirectory);
        }
        if let Some(who) = &who {
            let _rights = super::identity::enter(Some(who))?;
            for dir in &above {
                if !who.may_search(dir)? {
                    return Err(Refusal::Denied);
                }
            }
            if !who.may_read(&handle, true)? {
                return Err(Refusal::Denied);
            }
        }
        // The container's root is not above: it is the root of all.
        above.remove(0);
        Ok(Volume {
            at: way.at.to_vec(),
            root: Root::mounted(handle, way.container, way.at, who),
            above: above.into_iter().map(Arc::new).collect(),
            mount: line.id,
            stat,
            local,
        })
    }
}

impl Volume {
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

    /// What is under `name` in the volume's directory `dir`. A mount that was put there is not asked for anything.
    pub fn look(&self, dir: BorrowedFd<'_>, name: &[u8]) -> io::Result<Look> {
        if !self.local {
            return match self.handle(dir, name) {
                Ok(handle) => Ok(Look::There(Box::new(rustix::fs::fstat(handle)?))),
                Err(error) => self.not_there(error),
            };
        }
        // One call instead of three. What serves a mount in there is not asked where only what is known is wanted, and a
        // disk of this node's always knows.
        let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::STATX_DONT_SYNC | AtFlags::NO_AUTOMOUNT;
        let wanted = StatxFlags::BASIC_STATS | StatxFlags::MNT_ID;
        match rustix::fs::statx(dir, OsStr::from_bytes(name), flags, wanted) {
            Ok(found) if found.stx_mnt_id != self.mount => Ok(Look::Mounted),
            Ok(found) => Ok(Look::There(Box::new(self.as_stat(&found)))),
            Err(error) => self.not_there(error.into()),
        }
    }

    /// A descriptor of what is under `name` in the volume's directory `dir`, for looking at only; EXDEV where something is
    /// mounted on it.
    pub fn handle(&self, dir: BorrowedFd<'_>, name: &[u8]) -> io::Result<OwnedFd> {
        let resolve = ResolveFlags::BENEATH
            | ResolveFlags::NO_SYMLINKS
            | ResolveFlags::NO_MAGICLINKS
            | ResolveFlags::NO_XDEV;
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        super::root::retry_again(|| {
            rustix::fs::openat2(dir, OsStr::from_bytes(name), flags, Mode::empty(), resolve)
        })
    }

    /// What an error of a look means.
    pub fn not_there(&self, error: io::Error) -> io::Result<Look> {
        let crosses = rustix::io::Errno::XDEV.raw_os_error();
        match error {
            error if error.raw_os_error() == Some(crosses) => Ok(Look::Mounted),
            error if is_absent(&error) => Ok(Look::Gone),
            error if self.root.is_denied(&error) => Ok(Look::Denied),
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

/// Other mounts are crossed, links are not followed, nothing leads above.
fn look_up(dir: BorrowedFd<'_>, name: &[u8], flags: OFlags) -> io::Result<OwnedFd> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    super::root::retry_again(|| {
        let name = OsStr::from_bytes(name);
        rustix::fs::openat2(dir, name, flags | OFlags::NOFOLLOW, Mode::empty(), resolve)
    })
}

/// The id of the mount that a descriptor is in. `statx` would ask the file system.
fn mount_id(fd: BorrowedFd<'_>) -> io::Result<u64> {
    let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd()))?;
    let line = text.lines().find_map(|line| line.strip_prefix("mnt_id:"));
    line.and_then(|id| id.trim().parse().ok())
        .ok_or_else(|| io::Error::other("the kernel does not say in which mount a descriptor is"))
}
