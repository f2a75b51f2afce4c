//! The node's page cache while a layer is read: what is not in it is asked for ahead of need, many files at once, and let
//! go of afterwards; what was in it stays. A tree that is in memory costs nothing of this.
//!
//! Files that are not in memory come in stretches (a directory that nobody used since the session began). A few of them in
//! a row make everybody look ahead, and a stretch that was in memory ends it: opening every file twice for one in a
//! hundred that is on the disk costs more than it saves.

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::num::NonZeroU64;
use std::os::fd::AsFd;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use rustix::fs::Advice;
use rustix::io::{Errno, ReadWriteFlags};

use super::plan::Plan;

/// What a file that was not in memory counts; one that was takes one off again.
const COLD: u32 = 16;
/// From how much on it is worth looking ahead, and how much is remembered at most.
const WORTH: u32 = 2 * COLD;
const MOST: u32 = 4 * COLD;

/// A plan, and what is known of its files' places in the page cache.
pub struct Ahead<'a> {
    plan: &'a Plan,
    /// How many files were met lately that had to be waited for, or were asked for.
    cold: AtomicU32,
    /// Bytes of the tar that workers have in hand or are done with: asking for those would come too late, and leave in
    /// memory what nobody lets go of.
    given: AtomicU64,
    /// One bit an item: it was asked for ahead, so it was not in memory before.
    fetched: OnceLock<Box<[AtomicU64]>>,
}

impl<'a> Ahead<'a> {
    /// Everything is taken to be in memory until one file is not.
    pub fn new(plan: &'a Plan) -> Self {
        Self {
            plan,
            cold: AtomicU32::new(0),
            given: AtomicU64::new(0),
            fetched: OnceLock::new(),
        }
    }

    /// What is read.
    pub fn plan(&self) -> &'a Plan {
        self.plan
    }

    /// Whether looking ahead is worth it.
    pub(super) fn is_cold(&self) -> bool {
        self.cold.load(Ordering::Relaxed) >= WORTH
    }

    /// A file was read that was, or was not, in memory before.
    fn met(&self, cold: bool) {
        let count = |count: u32| {
            let next = if cold {
                (count + COLD).min(MOST)
            } else {
                count.saturating_sub(1)
            };
            (next != count).then_some(next)
        };
        // Unchanged, most of the time.
        let _ = self
            .cold
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, count);
    }

    /// Workers have all before `end` in hand.
    pub(super) fn give(&self, end: u64) {
        self.given.store(end, Ordering::Relaxed);
    }

    /// Asks the kernel for the files that the bytes `start..end` of the tar need. Errors are left to who reads them.
    pub(super) fn fetch(&self, start: u64, end: u64, path: &mut Vec<u8>) {
        for (index, item, from, to) in self.plan.contents(start, end) {
            if self.given.load(Ordering::Relaxed) > start {
                return;
            }
            if self.plan.held(item).is_some() {
                continue;
            }
            let Ok(Some(file)) = self.plan.open(item, path) else {
                continue;
            };
            if is_in_memory(&file, from) {
                continue;
            }
            self.mark(index);
            let _ = rustix::fs::fadvise(&file, from, NonZeroU64::new(to - from), Advice::WillNeed);
        }
    }

    /// Reads until `part` is full or the file ends, and gives back to the kernel what was not in memory before.
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
                read_from_memory(file, piece, at)
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
        self.met(cold);
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

/// [`Errno::AGAIN`] when it would have to wait for the disk. File systems that cannot tell are read as they are.
fn read_from_memory(file: impl AsFd, piece: &mut [u8], at: u64) -> rustix::io::Result<usize> {
    let mut into = [IoSliceMut::new(piece)];
    match rustix::io::preadv2(&file, &mut into, at, ReadWriteFlags::NOWAIT) {
        Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => rustix::io::pread(&file, piece, at),
        other => other,
    }
}

/// Whether the page at `at` is in memory; yes where the file system cannot tell.
fn is_in_memory(file: impl AsFd, at: u64) -> bool {
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
        let ahead = Ahead::new(&plan);
        for n in 0..1000 {
            ahead.met(n % 50 == 0);
            assert!(!ahead.is_cold(), "{n}");
        }
        ahead.met(true);
        ahead.met(true);
        assert!(ahead.is_cold());
        for _ in 0..100 {
            ahead.met(true);
        }
        let ends = (0..100).position(|_| {
            ahead.met(false);
            !ahead.is_cold()
        });
        assert_eq!(ends, Some((MOST - WORTH) as usize));
    }
}
