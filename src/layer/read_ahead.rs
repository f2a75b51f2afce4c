//! Manages the node's page cache while a layer is read: files that are not cached are read ahead, many at once, and
//! dropped from the cache afterwards. Pages that were cached before stay. A tree that is fully cached costs none of
//! this.
//!
//! Uncached files come in runs (a directory that has not been used since the session began). A few in a row turn
//! read-ahead on for all workers, and a run of cached files turns it off again: opening every file twice for one in a
//! hundred that is on disk costs more than it saves.

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::num::NonZeroU64;
use std::os::fd::AsFd;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use rustix::fs::Advice;
use rustix::io::{Errno, ReadWriteFlags};

use super::plan::Plan;

/// Weight of a file that was not cached; a cached one subtracts 1.
const UNCACHED_WEIGHT: u32 = 16;
/// Count from which read-ahead is on, and the maximum of the count.
const ENABLE_THRESHOLD: u32 = 2 * UNCACHED_WEIGHT;
const MAX_COUNT: u32 = 4 * UNCACHED_WEIGHT;

/// A plan with what is known about its files in the page cache.
pub(crate) struct ReadAhead<'a> {
    plan: &'a Plan,
    /// Weighted count of recent files that had to be waited for or were read ahead.
    cold: AtomicU32,
    /// End, in bytes of the tar, of the blocks that workers have taken. Reading ahead before it would come too late,
    /// and would leave pages in the cache that no worker drops.
    taken_end: AtomicU64,
    /// One bit per item: set if it was read ahead, and therefore was not cached before.
    fetched: OnceLock<Box<[AtomicU64]>>,
}

impl<'a> ReadAhead<'a> {
    /// Creates the state. All files are assumed to be cached until one is not.
    pub(crate) fn new(plan: &'a Plan) -> Self {
        Self {
            plan,
            cold: AtomicU32::new(0),
            taken_end: AtomicU64::new(0),
            fetched: OnceLock::new(),
        }
    }

    /// Returns the plan.
    pub(crate) fn plan(&self) -> &'a Plan {
        self.plan
    }

    /// Returns whether read-ahead is worthwhile at present.
    pub(super) fn is_enabled(&self) -> bool {
        self.cold.load(Ordering::Relaxed) >= ENABLE_THRESHOLD
    }

    /// Records that a file was read which was (`cold`) or was not absent from the page cache.
    fn record_read(&self, cold: bool) {
        let count = |count: u32| {
            let next = if cold {
                (count + UNCACHED_WEIGHT).min(MAX_COUNT)
            } else {
                count.saturating_sub(1)
            };
            (next != count).then_some(next)
        };
        // The closure returns `None`, and nothing is stored, in most cases.
        let _ = self
            .cold
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, count);
    }

    /// Records that workers have taken all blocks before `end`.
    pub(super) fn set_taken_end(&self, end: u64) {
        self.taken_end.store(end, Ordering::Relaxed);
    }

    /// Asks the kernel to read ahead the files that bytes `start..end` of the tar need. Errors are ignored here; the
    /// reader of the file reports them.
    pub(super) fn fetch(&self, start: u64, end: u64, path: &mut Vec<u8>) {
        for (index, item, from, to) in self.plan.contents(start, end) {
            if self.taken_end.load(Ordering::Relaxed) > start {
                return;
            }
            if self.plan.captured(item).is_some() {
                continue;
            }
            let Ok(Some(file)) = self.plan.open(item, path) else {
                continue;
            };
            if is_cached(&file, from) {
                continue;
            }
            self.mark(index);
            let _ = rustix::fs::fadvise(&file, from, NonZeroU64::new(to - from), Advice::WillNeed);
        }
    }

    /// Reads until `part` is full or the file ends, and drops from the page cache what was not in it before. Returns
    /// the number of bytes read.
    pub(super) fn read(
        &self,
        index: usize,
        file: &File,
        offset: u64,
        part: &mut [u8],
    ) -> io::Result<usize> {
        let mut waited = false;
        let mut done = 0;
        while done < part.len() {
            let at = offset + done as u64;
            let piece = &mut part[done..];
            let read = if waited {
                rustix::io::pread(file, piece, at)
            } else {
                read_cached(file, piece, at)
            };
            match read {
                Ok(0) => break,
                Ok(n) => done += n,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) if !waited => waited = true,
                Err(error) => return Err(error.into()),
            }
        }
        let cold = waited || self.was_fetched(index);
        self.record_read(cold);
        if cold {
            let length = NonZeroU64::new(done as u64);
            let _ = rustix::fs::fadvise(file, offset, length, Advice::DontNeed);
        }
        Ok(done)
    }

    fn mark(&self, index: usize) {
        let words = self.plan.len().div_ceil(64);
        let fetched = self.fetched.get_or_init(|| {
            std::iter::repeat_with(AtomicU64::default)
                .take(words)
                .collect()
        });
        fetched[index / 64].fetch_or(1 << (index % 64), Ordering::Relaxed);
    }

    fn was_fetched(&self, index: usize) -> bool {
        self.fetched.get().is_some_and(|fetched| {
            fetched[index / 64].load(Ordering::Relaxed) & (1 << (index % 64)) != 0
        })
    }
}

/// Reads cached pages only; fails with [`Errno::AGAIN`] if the read would have to wait for the disk. File systems
/// without `RWF_NOWAIT` are read normally.
fn read_cached(file: impl AsFd, piece: &mut [u8], at: u64) -> rustix::io::Result<usize> {
    let mut into = [IoSliceMut::new(piece)];
    match rustix::io::preadv2(&file, &mut into, at, ReadWriteFlags::NOWAIT) {
        Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => rustix::io::pread(&file, piece, at),
        other => other,
    }
}

/// Returns whether the page at `at` is cached; true if the file system cannot tell.
fn is_cached(file: impl AsFd, at: u64) -> bool {
    let mut byte = [0];
    let mut into = [IoSliceMut::new(&mut byte)];
    rustix::io::preadv2(&file, &mut into, at, ReadWriteFlags::NOWAIT) != Err(Errno::AGAIN)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layer::block::tests::plan_of;

    #[test]
    fn one_cold_file_among_many_is_not_worth_looking_ahead_for_and_a_stretch_is() {
        let dir = tempfile::tempdir().unwrap();
        let plan = plan_of(dir.path());
        let ahead = ReadAhead::new(&plan);
        for n in 0..1000 {
            ahead.record_read(n % 50 == 0);
            assert!(!ahead.is_enabled(), "{n}");
        }
        ahead.record_read(true);
        ahead.record_read(true);
        assert!(ahead.is_enabled());
        for _ in 0..100 {
            ahead.record_read(true);
        }
        let ends = (0..100).position(|_| {
            ahead.record_read(false);
            !ahead.is_enabled()
        });
        assert_eq!(ends, Some((MAX_COUNT - ENABLE_THRESHOLD) as usize));
    }
}
