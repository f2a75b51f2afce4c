//! A matcher with two candidates per position.

use super::interleave::{Found, GROUP, MatchTable};
use super::symbols::MAX_DISTANCE;
use super::window::{LAST, STRIDE, Window, hash_of, length_of_match, load32, load64};

/// Length from which a match is used without looking at the next position.
const NICE: usize = 16;

/// The last two positions for each of `SLOTS` (a power of two) hashes of `BYTES` (4 or 5) bytes, the later one first. Of
/// the positions within a match, every `STEP`th is inserted. With five bytes it is faster, as it finds fewer of the
/// shortest matches, which gain least.
pub(crate) struct TwoSlotTable<const SLOTS: usize, const STEP: usize, const BYTES: u32> {
    slots: Box<[[u16; 2]; SLOTS]>,
}

#[inline(always)]
fn hash<const SLOTS: usize, const BYTES: u32>(eight: u64) -> usize {
    hash_of(eight, BYTES, SLOTS.ilog2())
}

impl<const SLOTS: usize, const STEP: usize, const BYTES: u32> MatchTable
    for TwoSlotTable<SLOTS, STEP, BYTES>
{
    type Effort = ();

    fn new((): ()) -> Self {
        let slots = vec![[0u16; 2]; SLOTS].into_boxed_slice();
        Self {
            slots: slots.try_into().unwrap_or_else(|_| unreachable!()),
        }
    }

    fn clear(&mut self) {
        self.slots.fill([0; 2]);
    }

    fn slide(&mut self) {
        for slot in self.slots.as_flattened_mut() {
            *slot = slot.saturating_sub(STRIDE as u16);
        }
    }

    #[inline(always)]
    fn enter(&mut self, window: &Window, at: u16) {
        let slot = &mut self.slots[hash::<SLOTS, BYTES>(load64(window, at, 0))];
        *slot = [at, slot[0]];
    }

    #[inline(always)]
    fn find(&mut self, window: &Window, at: u16) -> Found {
        let eight = load64(window, at, 0);
        let mut found = 1u32 << GROUP;
        let mut candidates = [[0u16; 2]; GROUP];
        for (index, kept) in candidates.iter_mut().enumerate() {
            let bytes = eight >> (8 * index);
            let four = bytes as u32;
            let slot = &mut self.slots[hash::<SLOTS, BYTES>(bytes)];
            let [a, b] = *slot;
            *slot = [at.wrapping_add(index as u16), a];
            let same = (load32(window, a) == four) | (load32(window, b) == four);
            found |= u32::from(same) << index;
            *kept = [a, b];
        }
        loop {
            let mut skipped = found.trailing_zeros() as usize;
            if skipped == GROUP {
                return Found::NONE;
            }
            let mut here = at.wrapping_add(skipped as u16);
            let [a, b] = candidates[skipped & (GROUP - 1)];
            let (mut length, mut candidate) = longer_match(window, a, b, here);
            if length >= 4 {
                // The position one byte later has been looked up already, unless it is in the next group.
                let has_later = skipped + 1 < GROUP && found >> (skipped + 1) & 1 == 1;
                if has_later && length < NICE {
                    let [a, b] = candidates[(skipped + 1) & (GROUP - 1)];
                    let (later, its) = longer_match(window, a, b, here + 1);
                    if later > length {
                        (length, candidate) = (later, its);
                        here += 1;
                        skipped += 1;
                    }
                }
                let end = (usize::from(here) + length).min(LAST);
                for next in (usize::from(at) + GROUP..end).step_by(STEP) {
                    self.enter(window, next as u16);
                }
                return Found {
                    skipped,
                    length,
                    dist: usize::from(here.wrapping_sub(candidate)),
                };
            }
            found &= found - 1;
        }
    }
}

/// Returns the length of the longer of two candidates' matches, and its candidate; the length is less than 4 if there
/// is no match.
#[inline(always)]
fn longer_match(window: &Window, a: u16, b: u16, here: u16) -> (usize, u16) {
    let (low, high) = (load64(window, here, 0), load64(window, here, 8));
    let length = |candidate: u16| {
        let first = load64(window, candidate, 0) ^ low;
        let second = load64(window, candidate, 8) ^ high;
        let (low, high) = (first.trailing_zeros(), 64 + second.trailing_zeros());
        let same = if first == 0 { high } else { low };
        let near = here.wrapping_sub(candidate) <= MAX_DISTANCE as u16;
        if near { same >> 3 } else { 0 }
    };
    let (of_a, of_b) = (length(a), length(b));
    if of_a.max(of_b) >= 16 {
        return longer_far_match(window, (of_a, a), (of_b, b), here);
    }
    if of_b > of_a {
        (of_b as usize, b)
    } else {
        (of_a as usize, a)
    }
}

#[inline(always)]
fn longer_far_match(window: &Window, a: (u32, u16), b: (u32, u16), here: u16) -> (usize, u16) {
    let length = |(same, candidate): (u32, u16)| {
        if same < 16 {
            same as usize
        } else {
            length_of_match(window, candidate, here)
        }
    };
    let (of_a, of_b) = (length(a), length(b));
    if of_b > of_a {
        (of_b, b.1)
    } else {
        (of_a, a.1)
    }
}
