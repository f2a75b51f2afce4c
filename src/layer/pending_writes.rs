//! Waits for writes that are under way when a file is about to be read.
//!
//! The kernel updates the change time of a file when a write begins, not when it ends. A file may therefore have its
//! final time stamps while its last bytes are still the old ones: a read at that moment is torn, and no time stamp ever
//! shows it. Between taking an entry's stamps and reading the first byte of it (of each block of it: each is read
//! separately), this module makes sure that every write which had updated the stamps is complete. A write that begins
//! later has a later stamp and is detected.
//!
//! | kind of writer | how its completion is determined |
//! | --- | --- |
//! | any | a read lease can be had: no process has the file open for writing. The kernel counts that in the inode, and counts descriptors, mappings (also of descriptors that were closed), and requests under way of `libaio` and `io_uring` alike; `truncate` by path counts for as long as it lasts |
//! | `write`, `fallocate` (all modes), `truncate`, `copy_file_range`, `FICLONE` and `FIDEDUPERANGE` into it, also by a worker of `io_uring` | they hold the inode's lock exclusively from before their stamp to their last byte: `lseek(SEEK_HOLE)` takes it shared on ext4, Btrfs, F2FS and tmpfs. On XFS reading takes it. Operations done in pieces (`splice`, a copy between file systems, a write that `io_uring` begins inline and ends in a worker) take the lock again for each piece, and update the stamp again. (All but `write` also block readers of the pages for as long as they last: with slow disks no torn reads were seen from them without any wait) |
//! | direct writes, which hold that lock shared (ext4, XFS), or not to their end (Btrfs, asynchronous ones everywhere) | a call that takes the lock exclusively, and waits until the inode counts no direct I/O. The count covers the time from before the lock is released to the last byte, for any issuer, whether or not the file is still open. On XFS and Btrfs that call is `FICLONERANGE` of one block, on ext4 `EXT4_IOC_MOVE_EXT` of a block that no file can have ([`wait_by_moving_extent`]) |
//! | a mapping | `save::mapped` |
//! | another client of a server | cannot be determined. A server writes request by request, a megabyte or so, and updates the stamp for each; files with a stamp from the minute before a scan are saved again (`save::trees`) |
//!
//! Under the freeze, every `write` of the container is complete, direct ones included, as a process is not frozen in
//! the middle of a call. Only asynchronous requests continue (and writers of a volume outside the container). On cgroup
//! v2, a request that is linked to another (`IOSQE_IO_LINK`) even begins when that one completes while the process is
//! frozen (seen on Linux 6.18, through task work; not on v1). It updates the stamp of its file after the scan, so the
//! file is detected and reported as changed.
//!
//! Where neither call is available, a file that is open for writing and whose stamp is from the last minute is
//! *unsettled*: it is saved again under the freeze, and by the next save. This applies to F2FS and other file systems
//! that support direct writes but not clones, and on ext4 to files without extents (made by ext3), encrypted files,
//! files with journaled data, `bigalloc`, a mount that is read-only for this program, files that this program may not
//! write to, and, while the container runs, executable files.
//!
//! None of this can hang: a hostile process may hold a lock for as long as it likes (a write from a buffer whose pages
//! come from its own FUSE mount), so a separate thread waits for it, up to a time limit; after that the file is
//! unsettled.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use rustix::fs::SeekFrom;

use crate::common::waits::{WaitReason, Waits};
use crate::layer::scan::{Clock, Entry};
use crate::node::overlay::root::Root;
use crate::node::overlay::xattr::proc_path;

/// Age from which on a stamp is not checked: one call writes two gigabytes at most.
const MAX_WRITE_TIME: Duration = Duration::from_secs(60 * 60);
/// Longest time that an undetectable direct write may be under way: the kernel gives a disk half a minute per request.
const MAX_DIRECT_WRITE_TIME: Duration = Duration::from_secs(60);
/// Longest wait for one file.
const MAX_WAIT_PER_FILE: Duration = Duration::from_secs(10);

/// Type in `statfs` of ext4, and of ext2 and ext3, which do not have the call or are served by ext4.
const EXT4: i64 = 0xef53;

/// Operation of `fcntl`: the same number on every machine that Rust supports, and missing from `libc` for them.
const F_SETSIG: libc::c_int = 10;

/// The writers that may modify a plan's files during the read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Writers {
    /// Direct or asynchronous writes are possible.
    pub direct: bool,
    /// A server sets the time stamps of the files.
    pub remote: bool,
    /// The container is frozen: none of its processes executes a program during the read.
    pub frozen: bool,
    /// Total time to wait for writes under way, over all files.
    pub max_wait: Duration,
}

impl Default for Writers {
    fn default() -> Self {
        Self {
            direct: true,
            remote: false,
            frozen: false,
            max_wait: Duration::from_secs(60),
        }
    }
}

/// The writers, and the remaining time to wait for them.
#[derive(Debug)]
pub(super) struct PendingWrites {
    writers: Writers,
    left_ms: AtomicU64,
    waits: Arc<Waits>,
}

impl PendingWrites {
    pub(super) fn new(writers: Writers, waits: Arc<Waits>) -> Self {
        let left = u64::try_from(writers.max_wait.as_millis()).unwrap_or(u64::MAX);
        Self {
            writers,
            left_ms: AtomicU64::new(left),
            waits,
        }
    }

    /// Returns whether all writes are complete that had updated the stamps of `file` when `entry` was made. `file` must
    /// be open for reading only.
    pub(super) fn writes_are_complete(&self, file: &File, entry: &Entry, root: &Root) -> bool {
        if self.writers.remote
            || is_older_than(entry, MAX_WRITE_TIME)
            || is_not_open_for_writing(file)
        {
            return true;
        }
        let direct = self.writers.direct && !is_older_than(entry, MAX_DIRECT_WRITE_TIME);
        let may_be_started = !self.writers.frozen && entry.mode & 0o111 != 0;
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
        // The receiver is gone after the timeout.
        let Ok(_) = thread.spawn(move || say.send(work()).ok()) else {
            return false;
        };
        let waiting = self.waits.begin(WaitReason::Writers);
        let settled = answer
            .recv_timeout(left.min(MAX_WAIT_PER_FILE))
            .unwrap_or(false);
        drop(waiting);
        let waited = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        let less = |left: u64| Some(left.saturating_sub(waited));
        let order = Ordering::Relaxed;
        // The closure always returns a value.
        let _ = self.left_ms.fetch_update(order, order, less);
        settled
    }
}

fn is_older_than(entry: &Entry, age: Duration) -> bool {
    Clock::now()
        .before(age)
        .can_trust(entry.ctime, entry.ctime_nsec)
}

/// Waits until no process holds the inode's lock exclusively. The result of the call is irrelevant.
fn wait_for_lock(file: &File, size: u64) {
    // Start at the last byte: a search from an earlier offset would take time.
    let _ = rustix::fs::seek(file, SeekFrom::Hole(size.saturating_sub(1)));
}

/// Returns whether no process has the file open for writing; false if that cannot be determined.
///
/// The lease is released at once. If another process opens the file for writing in between, the kernel makes that call
/// wait, and sends this process a signal: one that is ignored, as the default one would terminate it.
#[allow(unsafe_code, reason = "neither rustix nor nix has these calls")]
fn is_not_open_for_writing(file: &File) -> bool {
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

/// Waits until no direct I/O on the file is under way. Fails if the file system has no call for that.
fn wait_for_direct(file: &File, root: &Root, may_be_started: bool) -> io::Result<()> {
    let other = File::from(root.create_unnamed_file()?);
    if rustix::fs::fstatfs(file)?.f_type as i64 != EXT4 {
        return wait_by_cloning(file, &other);
    }
    if may_be_started {
        // A file that is open for writing cannot be executed: starting a program that was just written would fail.
        return Err(io::ErrorKind::ExecutableFileBusy.into());
    }
    wait_by_moving_extent(file, &other)
}

#[allow(unsafe_code, reason = "neither rustix nor nix has this call")]
fn wait_by_cloning(file: &File, clone: &File) -> io::Result<()> {
    let block = rustix::fs::fstatvfs(file)?.f_bsize;
    let size = file.metadata()?.len();
    let range = libc::file_clone_range {
        src_fd: file.as_raw_fd().into(),
        src_offset: 0,
        // 0 means up to the end of the file.
        src_length: if size > block { block } else { 0 },
        dest_offset: 0,
    };
    // SAFETY: both descriptors are open, and the range outlives the call, which only reads it.
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

/// Requests the exchange of a block that no file can have: `ext4_move_extents` takes the locks of both files, waits for
/// the direct I/O on each, only then checks the range, and fails with `EINVAL`. Nothing has changed by then, no time
/// stamp either. The only other reasons for `EINVAL`, which are checked before the wait, cannot apply here: the same
/// file twice, a file that is not regular, two file systems, or an empty file (since Linux 6.19; so the other file has
/// a byte. An empty `file` has nothing to be read).
///
/// The call needs the file open for writing: the inode that is open for reading, a regular file, is opened again
/// through its descriptor. No byte of it is written. In a volume, watchers of the file (`inotify`) see the open as any
/// other. A moment ago another process had the file open for writing, so there is no lease that this could break.
#[allow(unsafe_code, reason = "neither rustix nor nix has this call")]
fn wait_by_moving_extent(file: &File, other: &File) -> io::Result<()> {
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
    // SAFETY: both descriptors are open, and the range, of the size encoded in the number, outlives the call.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), EXT4_IOC_MOVE_EXT, &raw mut range) };
    if result == 0 {
        return Err(io::ErrorKind::Unsupported.into());
    }
    match io::Error::last_os_error() {
        refused if refused.kind() == io::ErrorKind::InvalidInput => Ok(()),
        error => Err(error),
    }
}
