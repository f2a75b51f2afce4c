//! The hash-chain matcher with lazy matching: chains link all earlier positions with the same hash, and a match is
//! compared with later ones before it is used.

use super::interleave::{Found, GROUP, MatchTable};
use super::symbols::{MAX_DISTANCE, MAX_MATCH};
use super::window::{LAST, POSITIONS, STRIDE, Window, length_of_match, load32};

/// Bits of the hash of four bytes.
const BITS: u32 = 15;
/// Bits of the hash of three bytes.
const BITS_OF_THREE: u32 = 13;
/// Maximum distance of a three-byte match; a farther one costs more than three literals.
const MAX_DISTANCE_OF_THREE: u16 = 4096;
/// Number of positions after the start of a step up to which lazy matching goes on.
const MAX_LAZY_STEPS: usize = 8;

/// How much effort to spend on finding matches.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Effort {
    /// Maximum number of candidates per position.
    pub(crate) depth: u32,
    /// Length in bytes from which a match is used without looking further.
    pub(crate) nice: usize,
}

/// The last position of each hash, and for each position the previous one with the same hash.
pub(crate) struct HashChains {
    heads: Box<[u16; 1 << BITS]>,
    heads_of_three: Box<[u16; 1 << BITS_OF_THREE]>,
    before: Box<[u16; POSITIONS]>,
    effort: Effort,
}

/// A match; its length is less than 3 if there is none.
#[derive(Clone, Copy)]
struct Match {
    length: usize,
    dist: u16,
}

impl Match {
    /// Returns whether to prefer `later`, which begins one byte later: weighs the additional length against the cost of
    /// its distance.
    fn is_worse_than(self, later: Match) -> bool {
        let bits = |dist: u16| 16 - dist.leading_zeros() as i32;
        let gain = 4 * (later.length as i32 - self.length as i32);
        later.length >= self.length && gain + bits(self.dist) - bits(later.dist) > 2
    }
}

#[inline(always)]
fn hash(four: u32) -> usize {
    (four.wrapping_mul(0x9E37_79B1) >> (32 - BITS)) as usize
}

#[inline(always)]
fn hash_of_three(four: u32) -> usize {
    ((four << 8).wrapping_mul(0x9E37_79B1) >> (32 - BITS_OF_THREE)) as usize
}

fn boxed<const N: usize>() -> Box<[u16; N]> {
    let slots = vec![0u16; N].into_boxed_slice();
    slots.try_into().unwrap_or_else(|_| unreachable!())
}

fn slide(slots: &mut [u16]) {
    for slot in slots {
        *slot = slot.saturating_sub(STRIDE as u16);
    }
}

impl HashChains {
    /// Inserts a position; returns the previous positions with the same hash of four and of three bytes.
    #[inline(always)]
    fn candidates(&mut self, four: u32, at: u16) -> (u16, u16) {
        let head = &mut self.heads[hash(four)];
        let candidate = std::mem::replace(head, at);
        self.before[usize::from(at)] = candidate;
        let head = &mut self.heads_of_three[hash_of_three(four)];
        (candidate, std::mem::replace(head, at))
    }

    /// Returns the longest match at `here` that is longer than `least` bytes, among the next `depth` candidates.
    #[inline(always)]
    fn search(&mut self, window: &Window, here: u16, least: usize, mut depth: u32) -> Match {
        let four = load32(window, here);
        let (mut candidate, of_three) = self.candidates(four, here);
        let mut best = Match {
            length: least,
            dist: 0,
        };
        let oldest = here.saturating_sub(MAX_DISTANCE as u16).max(1);
        if least < 3 {
            let near = of_three != 0 && here - of_three <= MAX_DISTANCE_OF_THREE;
            if near && (load32(window, of_three) ^ four) << 8 == 0 {
                best.length = 3;
                best.dist = here - of_three;
            }
        }
        // The last four bytes that a match longer than the best must have.
        let mut tail_at = best.length.max(3) - 3;
        let mut tail = load(window, here, tail_at);
        while candidate >= oldest {
            if load(window, candidate, tail_at) == tail && load32(window, candidate) == four {
                let length = length_of_match(window, candidate, here);
                if length > best.length {
                    best.length = length;
                    best.dist = here - candidate;
                    if length >= self.effort.nice {
                        break;
                    }
                    tail_at = length - 3;
                    tail = load(window, here, tail_at);
                }
            }
            depth -= 1;
            if depth == 0 {
                break;
            }
            candidate = self.before[usize::from(candidate)];
        }
        if best.dist == 0 {
            best.length = 0;
        }
        best
    }
}

/// Loads the four bytes at `at + offset`.
#[inline(always)]
fn load(window: &Window, at: u16, offset: usize) -> u32 {
    debug_assert!(offset < MAX_MATCH as usize);
    let at = usize::from(at) + (offset & 255);
    let mut bytes = [0; 4];
    bytes.copy_from_slice(&window[at..at + 4]);
    u32::from_le_bytes(bytes)
}

impl MatchTable for HashChains {
    type Effort = Effort;

    fn new(effort: Effort) -> Self {
        Self {
            heads: boxed(),
            heads_of_three: boxed(),
            before: boxed(),
            effort,
        }
    }

    fn clear(&mut self) {
        self.heads.fill(0);
        self.heads_of_three.fill(0);
    }

    fn slide(&mut self) {
        slide(self.heads.as_mut_slice());
        slide(self.heads_of_three.as_mut_slice());
        self.before.copy_within(STRIDE.., 0);
        slide(&mut self.before[..STRIDE]);
    }

    fn enter(&mut self, window: &Window, at: u16) {
        self.candidates(load32(window, at), at);
    }

    fn find(&mut self, window: &Window, at: u16) -> Found {
        let depth = self.effort.depth;
        let start = usize::from(at);
        let mut here = start;
        let mut best = self.search(window, at, 2, depth);
        while best.length == 0 {
            here += 1;
            if here == start + GROUP {
                return Found::NONE;
            }
            best = self.search(window, here as u16, 2, depth);
        }
        let mut entered = here + 1;
        while best.length < self.effort.nice && here < start + MAX_LAZY_STEPS {
            let later = self.search(window, entered as u16, best.length - 1, depth / 2 + 1);
            entered += 1;
            if later.length == 0 || !best.is_worse_than(later) {
                break;
            }
            here += 1;
            best = later;
        }
        for at in entered..(here + best.length).min(LAST) {
            self.enter(window, at as u16);
        }
        Found {
            skipped: here - start,
            length: best.length,
            dist: usize::from(best.dist),
        }
    }
}
