//! The matcher of the fastest level: at most one candidate per position.

use super::interleave::{Found, GROUP, MatchTable};
use super::symbols::MAX_DISTANCE;
use super::window::{LAST, STRIDE, Window, length_of_match, load32, load64};

/// Bits of a hash.
const BITS: u32 = 13;

/// The last position of each hash.
pub(crate) struct OneSlotTable {
    slots: Box<[u16; 1 << BITS]>,
}

#[inline(always)]
fn hash(four: u32) -> usize {
    (four.wrapping_mul(0x9E37_79B1) >> (32 - BITS)) as usize
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
        self.slots[hash(load32(window, at))] = at;
    }

    /// Looks up all four positions and uses the first match, without a branch on its position: a mispredicted branch
    /// costs more than a few unnecessary lookups.
    #[inline(always)]
    fn find(&mut self, window: &Window, at: u16) -> Found {
        let eight = load64(window, at, 0);
        let mut found = 1u32 << GROUP;
        let mut candidates = [0u16; GROUP];
        for (index, kept) in candidates.iter_mut().enumerate() {
            let four = (eight >> (8 * index)) as u32;
            let slot = &mut self.slots[hash(four)];
            let candidate = *slot;
            *slot = at.wrapping_add(index as u16);
            found |= u32::from(load32(window, candidate) == four) << index;
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
                // Inserts one more position, so that a run continues at the cheapest distance.
                let last = (usize::from(here) + length - 1).min(LAST);
                self.enter(window, last as u16);
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
