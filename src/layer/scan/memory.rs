//! Accounting for the memory of a scan: the author of the tree determines number and length of names, attributes and
//! directories being walked, so every allocation counts against a limit.

use std::collections::HashSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::{Entry, Error, Extra, Xattr};

/// A [`Reservation`] takes memory in multiples of this size, so that threads do not contend for every name.
const RESERVATION_UNIT: u64 = 4 << 10;
/// Bytes kept per entry besides its name: its facts and its row.
const ENTRY_BYTES: u64 = 49;

/// The attributes of an entry, shared by all entries with the same set.
pub(super) type Xattrs = Arc<[Xattr]>;

/// Memory used by a scan, and its limit, in bytes.
#[derive(Debug)]
pub(super) struct MemoryBudget {
    limit: u64,
    used: AtomicU64,
    /// The distinct attribute sets of this scan.
    sets: Mutex<HashSet<Xattrs>>,
}

impl MemoryBudget {
    pub(super) fn new(limit: u64) -> Arc<Self> {
        Arc::new(Self {
            limit,
            used: AtomicU64::new(0),
            sets: Mutex::default(),
        })
    }

    /// Releases memory that was kept.
    pub(super) fn release(&self, bytes: u64) {
        self.used.fetch_sub(bytes, Ordering::Relaxed);
    }

    pub(super) fn reservation(self: &Arc<Self>) -> Reservation {
        Reservation {
            of: Arc::clone(self),
            taken: 0,
            used: 0,
            kept: 0,
        }
    }
}

/// Memory taken by one thread for one directory. On drop, memory that was held is released, memory that was kept is
/// not.
#[derive(Debug)]
pub(super) struct Reservation {
    of: Arc<MemoryBudget>,
    taken: u64,
    used: u64,
    kept: u64,
}

impl Reservation {
    /// Takes `bytes` until this reservation is dropped. Fails if the limit is exceeded.
    pub(super) fn reserve(&mut self, bytes: u64) -> Result<(), Error> {
        self.used = self.used.saturating_add(bytes);
        if self.used <= self.taken {
            return Ok(());
        }
        let more = (self.used - self.taken).next_multiple_of(RESERVATION_UNIT);
        let before = self.of.used.fetch_add(more, Ordering::Relaxed);
        self.taken += more;
        if before.saturating_add(more) <= self.of.limit {
            return Ok(());
        }
        Err(Error::Cap {
            what: "the memory for names, attributes and directory listings in bytes".to_owned(),
            limit: self.of.limit,
            flag: "--max-memory",
        })
    }

    /// Takes `bytes` for the lifetime of the scan.
    pub(super) fn reserve_for_scan(&mut self, bytes: u64) -> Result<(), Error> {
        self.kept += bytes;
        self.reserve(bytes)
    }

    /// Takes the memory of an entry in the scan, including its rarer parts except attributes.
    pub(super) fn reserve_entry_for_scan(
        &mut self,
        name: &[u8],
        extra: Option<&Extra>,
    ) -> Result<(), Error> {
        self.reserve_for_scan(ENTRY_BYTES + name.len() as u64 + extra.map_or(0, weight))
    }

    /// Takes the additional memory of an entry in a directory being walked.
    pub(super) fn reserve_entry(&mut self, name: &[u8]) -> Result<(), Error> {
        self.reserve((size_of::<Entry>() + name.len()) as u64)
    }

    /// Returns this scan's copy of an attribute set, adding it if there is none; `None` for the empty set.
    pub(super) fn intern_xattrs(&mut self, xattrs: Vec<Xattr>) -> Result<Option<Xattrs>, Error> {
        if xattrs.is_empty() {
            return Ok(None);
        }
        let known = self.sets().get(xattrs.as_slice()).cloned();
        if known.is_some() {
            return Ok(known);
        }
        self.reserve_set_for_scan(&xattrs)?;
        let set = Xattrs::from(xattrs);
        self.sets().insert(Arc::clone(&set));
        Ok(Some(set))
    }

    /// Takes the memory of an attribute set.
    pub(super) fn reserve_set_for_scan(&mut self, xattrs: &[Xattr]) -> Result<(), Error> {
        let bytes: usize = xattrs
            .iter()
            .map(|(name, value)| size_of::<Xattr>() + name.len() + value.len())
            .sum();
        self.reserve_for_scan((bytes + size_of::<Xattrs>()) as u64)
    }

    fn sets(&self) -> std::sync::MutexGuard<'_, HashSet<Xattrs>> {
        self.of.sets.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        let held = self.taken.saturating_sub(self.kept);
        self.of.used.fetch_sub(held, Ordering::Relaxed);
    }
}

fn weight(extra: &Extra) -> u64 {
    let link = extra.link.as_ref().map_or(0, Vec::len);
    let content = extra
        .content
        .as_ref()
        .map_or(0, |content| content.path.len());
    (size_of::<Extra>() + link + content) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn used(memory: &MemoryBudget) -> u64 {
        memory.used.load(Ordering::Relaxed)
    }

    #[test]
    fn what_is_held_is_given_back_and_what_is_kept_is_not() -> Result<(), Error> {
        let memory = MemoryBudget::new(10 * RESERVATION_UNIT);
        let mut reservation = memory.reservation();
        reservation.reserve(3 * RESERVATION_UNIT)?;
        reservation.reserve_for_scan(100)?;
        assert_eq!(used(&memory), 4 * RESERVATION_UNIT);
        drop(reservation);
        assert_eq!(used(&memory), 100);
        let mut reservation = memory.reservation();
        assert!(reservation.reserve(9 * RESERVATION_UNIT).is_ok());
        let refused = reservation
            .reserve(RESERVATION_UNIT)
            .map_err(|error| error.to_string());
        let told = "refused: the memory for names, attributes and directory listings in bytes is over the limit of 40960; \
                    raise it with --max-memory if intended";
        assert_eq!(refused, Err(told.to_owned()));
        drop(reservation);
        assert_eq!(used(&memory), 100);
        Ok(())
    }

    #[test]
    fn the_same_attributes_are_kept_once() -> Result<(), Error> {
        let memory = MemoryBudget::new(1 << 20);
        let mut reservation = memory.reservation();
        let set = |value: u8| vec![(b"user.a".to_vec(), vec![value; 4000])];
        let first = reservation.intern_xattrs(set(1))?;
        for _ in 0..1000 {
            assert_eq!(
                reservation.intern_xattrs(set(1))?.map(|set| set.as_ptr()),
                first.as_ref().map(|set| set.as_ptr())
            );
        }
        assert!(reservation.intern_xattrs(Vec::new())?.is_none());
        drop(reservation);
        assert!((4000..5000).contains(&used(&memory)), "{}", used(&memory));
        let other = memory.reservation().intern_xattrs(set(2))?;
        assert_ne!(other, first);
        Ok(())
    }
}
