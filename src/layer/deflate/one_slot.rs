//! The matcher of the fastest level: at most one candidate per position.

use super::interleave::{Found, GROUP, MatchTable};
use super::symbols::MAX_DISTANCE;
use super::window::{STRIDE, Window, hash_of, length_of_match, load64};

/// Bits of a hash.
const BITS: u32 = 14;
/// Minimum length of a match in bytes. Most matches of four bytes hardly gain more than they cost in time.
const BYTES: u32 = 5;

/// The last position of each hash.
pub(crate) struct OneSlotTable {
    slots: Box<[u16; 1 << BITS]>,
}

#[inline(always)]
fn hash(eight: u64) -> usize {
    hash_of(eight, BYTES, BITS)
}

impl MatchTable for OneSlotTable {
    type Effort = ();

    fn new((): ()) -> Self {
        let slots = vec![0u16; 1 << BITS].into_boxed_slice();
        Self {
            slots: slots.try_into().unwrap_or_else(|_| unreachable!()),
        }
    }

    fn clear(&mut self) {
        self.slots.fill(0);
    }

    fn slide(&mut self) {
        for slot in self.slots.iter_mut() {
            *slot = slot.saturating_sub(STRIDE as u16);
        }
    }

    #[inline(always)]
    fn enter(&mut self, window: &Window, at: u16) {
        self.slots[hash(load64(window, at, 0))] = at;
    }

    /// Looks up all four positions and uses the first match, without a branch on its position: a mispredicted branch
    /// costs more than a few unnecessary lookups.
    #[inline(always)]
    fn find(&mut self, window: &Window, at: u16) -> Found {
        let eight = load64(window, at, 0);
        let mut found = 1u32 << GROUP;
        let mut candidates = [0u16; GROUP];
        for (index, kept) in candidates.iter_mut().enumerate() {
            let bytes = eight >> (8 * index);
            let slot = &mut self.slots[hash(bytes)];
            let candidate = *slot;
            *slot = at.wrapping_add(index as u16);
            let differing = load64(window, candidate, 0) ^ bytes;
            found |= u32::from(differing << (64 - 8 * BYTES) == 0) << index;
            *kept = candidate;
        }
        loop {
            let skipped = found.trailing_zeros();
            let here = at.wrapping_add(skipped as u16);
            let candidate = candidates[skipped as usize & (GROUP - 1)];
            let dist = usize::from(here.wrapping_sub(candidate));
            if skipped as usize == GROUP {
                return Found::NONE;
            }
            if dist <= MAX_DISTANCE as usize {
                let length = length_of_match(window, candidate, here);
                return Found {
                    skipped: skipped as usize,
                    length,
                    dist,
                };
            }
            found &= found - 1;
        }
    }
}
