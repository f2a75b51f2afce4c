//! A window of the input in which positions have 16 bits, so that array accesses need no bounds checks.

use super::symbols::{MAX_DISTANCE, MAX_MATCH};

/// Number of positions that matches can begin at or point to.
pub(crate) const POSITIONS: usize = 1 << 16;
/// Position from which on positions within a match are not inserted into a table: they are in the next window as well.
pub(crate) const LAST: usize = POSITIONS - 8;
/// A range of the input: one byte per position, and those that may be read after the last position.
pub(crate) type Window = [u8; POSITIONS + 320];

/// Loads the four bytes at `at`.
#[inline(always)]
pub(crate) fn load32(window: &Window, at: u16) -> u32 {
    let at = usize::from(at);
    let mut bytes = [0; 4];
    bytes.copy_from_slice(&window[at..at + 4]);
    u32::from_le_bytes(bytes)
}

/// Loads the eight bytes at `at + offset`; `offset` is at most 300.
#[inline(always)]
pub(crate) fn load64(window: &Window, at: u16, offset: usize) -> u64 {
    let at = usize::from(at) + offset;
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&window[at..at + 8]);
    u64::from_le_bytes(bytes)
}

/// Returns a hash of `bits` bits of the first `count` (at most 8) of these bytes.
#[inline(always)]
pub(crate) fn hash_of(bytes: u64, count: u32, bits: u32) -> usize {
    ((bytes << (64 - 8 * count)).wrapping_mul(0x9E37_79B1_85EB_CA87) >> (64 - bits)) as usize
}

/// Returns the number of equal bytes at `a` and `b`, at most [`MAX_MATCH`]; the first four must be equal.
#[inline(always)]
pub(crate) fn length_of_match(window: &Window, a: u16, b: u16) -> usize {
    let first = load64(window, a, 4) ^ load64(window, b, 4);
    let second = load64(window, a, 12) ^ load64(window, b, 12);
    // Computes typical lengths without a branch.
    let low = first.trailing_zeros();
    let high = 64 + second.trailing_zeros();
    let same = if first == 0 { high } else { low };
    if same < 128 {
        return 4 + (same >> 3) as usize;
    }
    let mut length = 20;
    while length < MAX_MATCH as usize {
        let differing = load64(window, a, length) ^ load64(window, b, length);
        if differing != 0 {
            length += (differing.trailing_zeros() >> 3) as usize;
            break;
        }
        length += 8;
    }
    length.min(MAX_MATCH as usize)
}

/// The windows of an input, each half a window after the previous one.
pub(crate) struct Windows<'a> {
    data: &'a [u8],
    /// Start of the window in the data.
    base: usize,
    /// The last bytes of the data, padded with zeros, where they do not fill a window.
    last: &'a mut Window,
    is_last: bool,
}

/// Distance between the starts of two consecutive windows in bytes.
pub(crate) const STRIDE: usize = MAX_DISTANCE as usize;

impl<'a> Windows<'a> {
    /// Creates the first window, which begins at `base`.
    pub(crate) fn new(data: &'a [u8], base: usize, last: &'a mut Window) -> Self {
        let mut windows = Self {
            data,
            base,
            last,
            is_last: false,
        };
        windows.prepare();
        windows
    }

    /// Moves to the next window.
    pub(crate) fn slide(&mut self) {
        self.base += STRIDE;
        self.prepare();
    }

    fn prepare(&mut self) {
        let rest = &self.data[self.base..];
        self.is_last = rest.len() < self.last.len();
        if self.is_last {
            let (start, end) = self.last.split_at_mut(rest.len());
            start.copy_from_slice(rest);
            end.fill(0);
        }
    }

    /// Returns the current window.
    pub(crate) fn get(&self) -> &Window {
        match self.data[self.base..].first_chunk() {
            Some(window) => window,
            None => self.last,
        }
    }

    /// Returns the number of bytes from the window's start to the end of the data.
    pub(crate) fn rest(&self) -> usize {
        self.data.len() - self.base
    }
}
