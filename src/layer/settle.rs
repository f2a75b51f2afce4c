//! Writes that are under way when a file is about to be read.
//!
//! The kernel moves a file's change time when a write begins, not when it ends. So a file may bear its final stamps
//! while its last bytes are still the old ones: what is read then is torn, and no stamp will ever tell. Between the
//! stamps of an entry and the first byte that is read of it (of each block of it: each is read by itself) this finds
//! out that every write which had stamped it by then is over. Whatever begins later is stamped later, and shows.
//!
//! | who writes | what tells that it is over |
//! | --- | --- |
//! | anybody, by any way | a read lease is to be had: nobody has the file open for writing. The kernel counts that in the inode, and counts descriptors, mappings (also of descriptors that were closed), and requests under way of `libaio` and `io_uring` alike; `truncate` by path counts for as long as it lasts |
//! | `write`, `fallocate` (all modes), `truncate`, `copy_file_range`, `FICLONE` and `FIDEDUPERANGE` into it, also by a worker of `io_uring` | they hold the inode's lock, exclusively, from before their stamp to their last byte: `lseek(SEEK_HOLE)` takes it shared on ext4, Btrfs, F2FS and tmpfs. On XFS reading takes it. What is done in pieces (`splice`, a copy between file systems, a write that `io_uring` begins inline and ends in a worker) takes the lock anew for each, and stamps anew. (All but `write` keep readers of the pages away for as long as they last, too: with slow disks nothing torn was seen of them without any wait) |
//! | direct writes, which hold that lock shared (ext4, XFS), or not to their end (Btrfs, asynchronous ones everywhere) | a call that takes the lock exclusively, and waits until the inode counts no direct I/O. It counts them from before the lock is given back to their last byte, whoever asked for them, and whether or not somebody still has the file open. On XFS and Btrfs that call is `FICLONERANGE` of one block, on ext4 `EXT4_IOC_MOVE_EXT` of what no file can have ([`wait_as_ext4_does`]) |
//! | a mapping | `save::mapped` |
//! | another client of a server | nothing here can tell. A server writes request by request, a megabyte or so, and stamps each; what it stamped in the minute before a scan is taken again (`save::trees`) |
//!
//! Under the freeze every `write` of the container's, direct ones too, has come to its end, as a process in mid-call is
//! not frozen. Only asynchronous requests go on (and writers of a volume outside the container). On cgroup v2 one that is
//! linked to another (`IOSQE_IO_LINK`) even begins when that one is over, the process being frozen (seen on Linux 6.18, by
//! way of task work; not on v1). It stamps its file after the scan that is read by: what is read of it has changed, and is
//! said to have.
//!
//! Where neither call is to be had, a file that is open for writing and was stamped in the last minute is *unsettled*: it
//! is taken again under the freeze, and by the next save. So it is on F2FS and other file systems that write directly and
//! do not clone, and on ext4 for files without extents (made by ext3), encrypted, or with their data in the journal, with
//! `bigalloc`, on a mount that is read-only for this program, where this program may not write to the file, and, beside
//! the running container, for files that can be executed.
//!
//! None of this can be made to hang: a lock may be held for as long as a stranger likes (a write from a buffer whose
//! pages come from a FUSE mount of his), so it is waited for in a thread of its own, for a while; then the file is
//! unsettled.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use rustix::fs::SeekFrom;

use crate::layer::scan::{Clock, Entry};
use crate::node::overlay::root::Root;
use crate::node::overlay::xattr::proc_path;

/// What was stamped longer ago is not asked about: one call writes two gigabytes at most.
const LONG_AGO: Duration = Duration::from_secs(60 * 60);
/// For how long a direct write may be under way where nothing tells: the kernel gives a disk half a minute a request.
const DIRECT: Duration = Duration::from_secs(60);
/// The longest that one file is waited for.
const ONE_FILE: Duration = Duration::from_secs(10);

/// What `statfs` says of ext4, and of ext2 and ext3, which have no such call or are served by ext4.
const EXT4: i64 = 0xef53;

/// `fcntl`'s: the same number on every machine that Rust builds for, and not in `libc` for them.
const F_SETSIG: libc::c_int = 10;

/// Who may be writing to a plan's files while they are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Writers {
    /// Direct or asynchronous writes are to be reckoned with.
    pub direct: bool,
    /// A server stamps the files.
    pub remote: bool,
    /// The container stands still: none of its processes starts a program meanwhile.
    pub still: bool,
    /// For how long writes under way are waited for, all files together.
    pub patience: Duration,
}

impl Default for Writers {
    fn default() -> Self {
        Self {
            direct: true,
            remote: false,
            still: false,
            patience: Duration::from_secs(60),
        }
    }
}

/// The writers, and how much longer they are waited for.
#[derive(Debug)]
pub(super) struct Settling {
    writers: Writers,
    left_ms: AtomicU64,
}

impl Settling {
    pub(super) fn new(writers: Writers) -> Self {
        let left = u64::try_from(writers.patience.as_millis()).unwrap_or(u64::MAX);
        Self {
            writers,
            left_ms: AtomicU64::new(left),
        }
    }

    /// Whether all writes that had stamped `file`, which is open for reading only, when `entry` was made are over.
    pub(super) fn settled(&self, file: &File, entry: &Entry, root: &Root) -> bool {
        if self.writers.remote || older(entry, LONG_AGO) || nobody_writes(file) {
            return true;
        }
        let direct = self.writers.direct && !older(entry, DIRECT);
        let may_be_started = !self.writers.still && entry.mode & 0o111 != 0;
        let (Ok(file), root, size) = (file.try_clone(), root.clone(), entry.size) else {
            return false;
        };
        self.wait_for(move || {
            wait_for_lock(&file, size);
            !direct || wait_for_direct(&file, &root, may_be_started).is_ok()
        })
    }

    fn wait_for(&self, work: impl FnOnce() -> bool + Send + 'static) -> bool {
        let left = Duration::from_millis(self.left_ms.load(Ordering::Relaxed));
        if left.is_zero() {
            return false;
        }
        let (say, answer) = mpsc::channel();
        let thread = std::thread::Builder::new().name("settle".to_owned());
        let begun = Instant::now();
        // Nobody may be left to hear it.
        let Ok(_) = thread.spawn(move || say.send(work()).ok()) else {
            return false;
        };
        let settled = answer.recv_timeout(left.min(ONE_FILE)).unwrap_or(false);
        let waited = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        let less = |left: u64| Some(left.saturating_sub(waited));
        let order = Ordering::Relaxed;
        // It always gives a value.
        let _ = self.left_ms.fetch_update(order, order, less);
        settled
    }
}

fn older(entry: &Entry, age: Duration) -> bool {
    Clock::now()
        .before(age)
        .settles(entry.ctime, entry.ctime_nsec)
}

/// Waits until nobody holds the inode's lock exclusively. What the file system answers is of no interest.
fn wait_for_lock(file: &File, size: u64) {
    // From the last byte on: what lies before would have to be searched.
    let _ = rustix::fs::seek(file, SeekFrom::Hole(size.saturating_sub(1)));
}

/// Whether nobody has the file open for writing. No also where that is not to be found out.
///
/// The lease is given back at once. Should somebody want to open the file for writing in between, the kernel makes that
/// call wait for it, and sends this process a signal: one that is ignored, as the usual one would end it.
#[allow(unsafe_code, reason = "neither rustix nor nix has these calls")]
fn nobody_writes(file: &File) -> bool {
    let call = |what: libc::c_int, argument: libc::c_int| {
        // SAFETY: the descriptor is open for as long as it is borrowed, and the calls touch no memory of ours.
        unsafe { libc::fcntl(file.as_raw_fd(), what, argument) == 0 }
    };
    let leased = call(F_SETSIG, libc::SIGURG) && call(libc::F_SETLEASE, libc::F_RDLCK);
    if leased {
        call(libc::F_SETLEASE, libc::F_UNLCK);
    }
    leased
}

/// Waits until no direct I/O on the file is under way, where the file system has a call that does.
fn wait_for_direct(file: &File, root: &Root, may_be_started: bool) -> io::Result<()> {
    let other = File::from(root.nameless_file()?);
    if rustix::fs::fstatfs(file)?.f_type as i64 != EXT4 {
        return wait_as_cloning_does(file, &other);
    }
    if may_be_started {
        // For as long as it is open for writing, nobody can execute it: a program that was just written would not start.
        return Err(io::ErrorKind::ExecutableFileBusy.into());
    }
    wait_as_ext4_does(file, &other)
}

#[allow(unsafe_code, reason = "neither rustix nor nix has this call")]
fn wait_as_cloning_does(file: &File, clone: &File) -> io::Result<()> {
    let block = rustix::fs::fstatvfs(file)?.f_bsize;
    let size = file.metadata()?.len();
    let range = libc::file_clone_range {
        src_fd: file.as_raw_fd().into(),
        src_offset: 0,
        // To the end where that comes first.
        src_length: if size > block { block } else { 0 },
        dest_offset: 0,
    };
    // SAFETY: both descriptors are open, and the range lives until the call is over, which only reads it.
    let result = unsafe { libc::ioctl(clone.as_raw_fd(), libc::FICLONERANGE, &raw const range) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// The kernel's `struct move_extent`.
#[repr(C)]
struct MoveExtent {
    reserved: u32,
    donor: u32,
    from: u64,
    to: u64,
    blocks: u64,
    moved: u64,
}

const EXT4_IOC_MOVE_EXT: libc::Ioctl = 0xc028_660f_u32 as libc::Ioctl;
/// Beyond the last block that a file can have (`EXT_MAX_BLOCKS`).
const NO_BLOCK: u64 = 0xffff_ffff;

/// Asks for a block to be exchanged that no file can have: `ext4_move_extents` takes the locks of both files, waits for
/// the direct I/O on each, looks at the range then, and refuses it with `EINVAL`. Nothing has changed, no time stamp
/// either. The only other reasons for `EINVAL`, which come before the wait, are files that cannot be: the same one twice,
/// none that is regular, of two file systems, or empty ones (since Linux 6.19; so the other file has a byte. An empty
/// `file` has nothing to be read).
///
/// The call needs the file open for writing: the very inode that is open for reading, a regular file, is opened again by
/// its descriptor. No byte of it is written. In a volume, who watches the file (`inotify`) is told of it as of any opening.
/// Somebody had the file open for writing a moment ago, so nobody has a lease on it that this would break.
#[allow(unsafe_code, reason = "neither rustix nor nix has this call")]
fn wait_as_ext4_does(file: &File, other: &File) -> io::Result<()> {
    use rustix::fs::{Mode, OFlags};
    other.set_len(1)?;
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let path = proc_path(file.as_fd());
    let file = rustix::fs::open(path, flags, Mode::empty())?;
    let mut range = MoveExtent {
        reserved: 0,
        donor: other.as_raw_fd() as u32,
        from: NO_BLOCK,
        to: NO_BLOCK,
        blocks: 1,
        moved: 0,
    };
    // SAFETY: both descriptors are open, and the range, of the size that the number tells, lives until the call is over.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), EXT4_IOC_MOVE_EXT, &raw mut range) };
    if result == 0 {
        return Err(io::ErrorKind::Unsupported.into());
    }
    match io::Error::last_os_error() {
        refused if refused.kind() == io::ErrorKind::InvalidInput => Ok(()),
        error => Err(error),
    }
}
