//! Captures the contents of a layer's files while the container is frozen, for use after it resumes.
//!
//! Small files are read into memory. Where the file system supports cloning (`FICLONE`: XFS with reflinks, Btrfs),
//! large files are cloned into unnamed files, which share the data until the original is written to and which vanish
//! with this process however it ends.
//!
//! Cloning takes time proportional to the number of extents: 10 microseconds each, and a database file that was cloned
//! before and then written to at random has hundreds of thousands. The container need not stay frozen for that: during
//! a clone the kernel blocks all writes to the original, by any path (it holds the lock of the inode and that of its
//! mappings), so a clone that has begun shows the file at this instant. Only writers to that very file wait; on XFS
//! before Linux 6.8, readers as well.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::fs::SeekFrom;
use tokio_util::sync::CancellationToken;

use super::content::{
    CapturedContents, Content, Instability, ReadError, Unstable, read_full, same_file,
};
use super::plan::{Item, Plan};
use crate::common::escape;
use crate::layer::scan::{Entry, Scan};
use crate::node::overlay::flush::flush;

/// Files up to this size are read into memory if they fit: a clone costs as much as reading this many bytes.
const MAX_FILE_IN_MEMORY: u64 = 128 << 10;
/// Cost of opening a file, in bytes that could be read in the same time.
const OPEN_COST: u64 = 16 << 10;
/// File descriptors left to the rest of this process.
const SPARE_DESCRIPTORS: u64 = 256;
/// Maximum number of flushes of a file before it is cloned, and the duration of a flush from which on no other is
/// needed.
const MAX_FLUSHES: u32 = 8;
const SHORT_FLUSH: Duration = Duration::from_millis(15);
/// Items that a thread takes at a time.
const CHUNK: usize = 8;
/// Files up to this size are cloned synchronously, as they cannot have many extents.
const MAX_SYNCHRONOUS_CLONE: u64 = 4 << 20;
/// Poll interval for a clone that was begun.
const CLONE_POLL_INTERVAL: Duration = Duration::from_micros(100);
/// Poll interval where only this save waits for the clone.
const SLOW_POLL_INTERVAL: Duration = Duration::from_millis(20);
/// File system types (`statfs`) that are known to block writes to a file during a clone, and to update the block count
/// of the clone as extents are shared (`fs/xfs/xfs_reflink.c`, `fs/btrfs/reflink.c`).
const XFS: i64 = 0x5846_5342;
const BTRFS: i64 = 0x9123_683e;

/// Captured contents, some of which may still be being cloned. The container may resume.
#[derive(Debug, Default)]
pub struct Capture {
    captured: CapturedContents,
    cloning: Vec<PendingClone>,
}

/// A clone under way; its original cannot be written to until it is complete.
#[derive(Debug)]
struct PendingClone {
    entry: u32,
    path: String,
    clone: File,
    ended: mpsc::Receiver<io::Result<()>>,
}

/// A file whose writers may have been blocked by a clone.
#[derive(Debug)]
pub struct BlockedWriters {
    /// Path, escaped for messages.
    pub path: String,
    /// Longest time for which they were blocked after the container resumed.
    pub time: Duration,
}

/// How the contents of a plan can be captured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CaptureMethod {
    /// All of them in memory.
    Memory,
    /// Small files in memory, clones of the others.
    Clones,
    /// They cannot be captured: there is too much data.
    Impossible,
}

impl Capture {
    /// Returns the number of clones that are not complete.
    pub fn pending_clones(&self) -> usize {
        self.cloning.len()
    }

    /// Waits until every clone is complete, and returns the contents and the files whose writers may have waited.
    ///
    /// Fails if a clone fails, since the instant is over by then. Returns what there is once `cancel` is set.
    pub fn complete(
        mut self,
        cancel: &CancellationToken,
    ) -> Result<(CapturedContents, Vec<BlockedWriters>), ReadError> {
        let begun = Instant::now();
        let mut waited = Vec::new();
        for cloning in self.cloning {
            let fail = |source: io::Error| ReadError {
                path: cloning.path.clone(),
                source: io::Error::new(source.kind(), format!("cloning it: {source}")),
            };
            loop {
                match cloning.ended.recv_timeout(SLOW_POLL_INTERVAL) {
                    Ok(result) => break result.map_err(fail)?,
                    Err(RecvTimeoutError::Timeout) if cancel.is_cancelled() => {
                        return Ok((self.captured, waited));
                    }
                    Err(RecvTimeoutError::Timeout) => {}
                    Err(RecvTimeoutError::Disconnected) => return Err(fail(ended_early())),
                }
            }
            waited.push(BlockedWriters {
                path: cloning.path,
                time: begun.elapsed(),
            });
            let whole = Content::Clone(cloning.clone);
            self.captured.contents.insert(cloning.entry, whole);
        }
        Ok((self.captured, waited))
    }
}

fn ended_early() -> io::Error {
    io::Error::other("what clones it ended early")
}

/// Returns the bytes of memory that a file's content is expected to take.
fn weight(entry: &Entry) -> u64 {
    // With delayed allocation, a file may have no blocks allocated yet.
    if entry.allocated == 0 {
        entry.size
    } else {
        entry.size.min(entry.allocated)
    }
}

/// Returns how the contents of `plans` can be captured in at most `limit` bytes of memory in total.
///
/// Support for clones is determined by trying one on an unnamed file.
pub(crate) fn method(plans: &[Plan], limit: u64) -> CaptureMethod {
    let weights_of = |plan: &Plan| -> Vec<u64> {
        let items = plan.items().iter();
        let files = items.filter(|item| plan.content_size(item) > 0);
        files.map(|item| weight(&plan.entry(item))).collect()
    };
    let by_plan: Vec<Vec<u64>> = plans.iter().map(weights_of).collect();
    let weights = || by_plan.iter().flatten().copied();
    let opening = |count: usize| count as u64 * OPEN_COST;
    if weights().sum::<u64>() + opening(weights().count()) <= limit {
        return CaptureMethod::Memory;
    }
    let small: u64 = weights().filter(|&size| size <= MAX_FILE_IN_MEMORY).sum();
    let large = weights().filter(|&size| size > MAX_FILE_IN_MEMORY).count() as u64;
    if small + opening(weights().count()) <= limit
        && large <= available_descriptors()
        && plans
            .iter()
            .zip(&by_plan)
            .filter(|(_, weights)| weights.iter().any(|&size| size > MAX_FILE_IN_MEMORY))
            .all(|(plan, _)| can_clone(plan.scan()))
    {
        CaptureMethod::Clones
    } else {
        CaptureMethod::Impossible
    }
}

/// Returns whether files of the upper can be cloned.
pub fn can_clone(scan: &Scan) -> bool {
    let try_it = || -> io::Result<()> {
        let (from, to) = (
            scan.root(0).create_unnamed_file()?,
            scan.root(0).create_unnamed_file()?,
        );
        rustix::io::pwrite(&from, &[0; 4096], 0)?;
        Ok(rustix::fs::ioctl_ficlone(&to, &from)?)
    };
    try_it().is_ok()
}

/// Raises the soft limit of open files as far as possible, and returns how many files can be held open.
fn available_descriptors() -> u64 {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let now = getrlimit(Resource::Nofile);
    let most = now.maximum.unwrap_or(1 << 20).min(1 << 16);
    let wanted = Rlimit {
        current: Some(most.max(now.current.unwrap_or(0))),
        ..now
    };
    let have = match setrlimit(Resource::Nofile, wanted) {
        Ok(()) => most,
        Err(_) => now.current.unwrap_or(most),
    };
    have.saturating_sub(SPARE_DESCRIPTORS)
}

/// Writes the dirty pages of the plan's large files to disk, so that cloning them later is fast: the kernel writes them
/// before it shares the data.
pub(crate) fn prepare_clones(plan: &Plan) {
    for item in plan.items() {
        let entry = &plan.entry(item);
        if plan.content_size(item) > MAX_FILE_IN_MEMORY
            && plan.scan().content_location(entry).is_none()
        {
            let path = plan.scan().path(item.entry);
            // The file may be gone; and the clone flushes whatever remains.
            if let Ok(Some(file)) = plan.scan().root(0).open_file(&path, entry.ino) {
                flush_repeatedly(file.as_fd());
            }
        }
    }
}

/// Flushes a file repeatedly: pages written during a flush are dirty again, but each time there are fewer, as long as
/// the disk is faster than the writer.
fn flush_repeatedly(file: BorrowedFd<'_>) {
    let mut before = None;
    for _ in 0..MAX_FLUSHES {
        let begun = Instant::now();
        if flush(file).is_err() {
            return;
        }
        let took = begun.elapsed();
        // The next flush, under the freeze, will take about as long.
        if took < SHORT_FLUSH || before.is_some_and(|before| took > before * 3 / 4) {
            return;
        }
        before = Some(took);
    }
}

/// Captures the contents of a plan in the way that [`method`] returned. The originals may change afterwards.
///
/// Fails if a file cannot be read or cloned.
pub fn capture(
    plan: &Plan,
    way: CaptureMethod,
    jobs: usize,
    cancel: &CancellationToken,
) -> Result<Capture, ReadError> {
    let items: Vec<&Item> = plan
        .items()
        .iter()
        .filter(|item| plan.content_size(item) > 0)
        .collect();
    let all: Mutex<Capture> = Mutex::default();
    let failed: Mutex<Option<ReadError>> = Mutex::default();
    let next = AtomicUsize::new(0);
    let work = || {
        let mut mine = Capture::default();
        loop {
            let from = next.fetch_add(CHUNK, Ordering::Relaxed).min(items.len());
            let chunk = &items[from..items.len().min(from + CHUNK)];
            if chunk.is_empty() || cancel.is_cancelled() {
                break;
            }
            for item in chunk {
                if let Err(error) = capture_item(plan, item, way, &mut mine) {
                    *failed.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                    return;
                }
            }
        }
        let mut all = all.lock().unwrap_or_else(PoisonError::into_inner);
        all.captured.contents.extend(mine.captured.contents);
        all.captured.unstable.append(&mut mine.captured.unstable);
        all.cloning.append(&mut mine.cloning);
    };
    let threads = jobs.clamp(1, items.len().div_ceil(CHUNK).max(1));
    std::thread::scope(|scope| {
        for _ in 1..threads {
            // The current thread does the work of threads that cannot be started.
            let _ = std::thread::Builder::new().spawn_scoped(scope, work);
        }
        work();
    });
    match failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(error) => Err(error),
        None => Ok(all.into_inner().unwrap_or_else(PoisonError::into_inner)),
    }
}

fn capture_item(
    plan: &Plan,
    item: &Item,
    way: CaptureMethod,
    kept: &mut Capture,
) -> Result<(), ReadError> {
    let (scan, entry) = (plan.scan(), &plan.entry(item));
    let path = scan.path(item.entry);
    let fail = |source: io::Error| ReadError {
        path: format!("/{}", escape::path(&path)),
        source,
    };
    let elsewhere = scan.content_location(entry);
    let mut note = |what| {
        kept.captured.unstable.push(Unstable {
            path: escape::path(&path),
            what,
        });
    };
    let Some(file) = plan.open(item, &mut Vec::new()).map_err(fail)? else {
        note(Instability::Vanished);
        let nothing = Content::Memory(Vec::new());
        kept.captured.contents.insert(item.entry, nothing);
        return Ok(());
    };
    if !plan.writes_are_complete(item, &file) {
        note(Instability::Unsettled);
    }
    if way == CaptureMethod::Clones
        && weight(entry) > MAX_FILE_IN_MEMORY
        && elsewhere.is_none_or(|place| place.root == 0)
    {
        let clone = scan.root(0).create_unnamed_file().map_err(fail)?.into();
        match begin_clone(&file, &clone, entry.size).map_err(fail)? {
            None => {
                let whole = Content::Clone(clone);
                kept.captured.contents.insert(item.entry, whole);
            }
            Some(ended) => kept.cloning.push(PendingClone {
                entry: item.entry,
                path: format!("/{}", escape::path(&path)),
                clone,
                ended,
            }),
        }
    } else {
        let bytes = Content::Memory(pieces(&file, entry.size).map_err(fail)?);
        kept.captured.contents.insert(item.entry, bytes);
    }
    if elsewhere.is_none() {
        let stat = rustix::fs::fstat(&file).map_err(|e| fail(e.into()))?;
        if !same_file(&stat, entry) {
            note(Instability::Changed);
        }
    }
    Ok(())
}

/// Starts a clone of `file`. Returns once the clone is complete, or, with the receiver of its result, once the kernel
/// blocks writes to `file` until it is.
fn begin_clone(
    file: &File,
    clone: &File,
    size: u64,
) -> io::Result<Option<mpsc::Receiver<io::Result<()>>>> {
    if size <= MAX_SYNCHRONOUS_CLONE || !clone_locks_original(clone)? {
        rustix::fs::ioctl_ficlone(clone, file)?;
        return Ok(None);
    }
    let (say, ended) = mpsc::channel();
    let (from, to) = (file.try_clone()?, clone.try_clone()?);
    std::thread::Builder::new()
        .name("clone".to_owned())
        .spawn(move || {
            let result = rustix::fs::ioctl_ficlone(&to, &from);
            // The receiver is gone if the save was cancelled.
            let _ = say.send(result.map_err(io::Error::from));
        })?;
    loop {
        match ended.recv_timeout(CLONE_POLL_INTERVAL) {
            Ok(result) => return result.map(|()| None),
            // The first extent is shared: the locks are held, and dirty pages were written.
            Err(RecvTimeoutError::Timeout) if rustix::fs::fstat(clone)?.st_blocks > 0 => {
                return Ok(Some(ended));
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return Err(ended_early()),
        }
    }
}

fn clone_locks_original(clone: &File) -> io::Result<bool> {
    let kind = rustix::fs::fstatfs(clone)?.f_type as i64;
    Ok(matches!(kind, XFS | BTRFS))
}

/// Returns the data extents of a file with their offsets.
fn pieces(file: &File, size: u64) -> io::Result<Vec<(u64, Vec<u8>)>> {
    let mut pieces = Vec::new();
    let mut at = 0;
    while at < size {
        let data = match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(data) => data,
            Err(rustix::io::Errno::NXIO) => break,
            Err(rustix::io::Errno::INVAL | rustix::io::Errno::OPNOTSUPP) => at,
            Err(error) => return Err(error.into()),
        };
        if data >= size {
            break;
        }
        let hole = rustix::fs::seek(file, SeekFrom::Hole(data))
            .unwrap_or(size)
            .min(size);
        let end = if hole > data { hole } else { size };
        let mut bytes = vec![0; (end - data) as usize];
        let n = read_full(file, data, &mut bytes)?;
        bytes.truncate(n);
        let short = (n as u64) < end - data;
        pieces.push((data, bytes));
        if short {
            break;
        }
        at = end;
    }
    Ok(pieces)
}
