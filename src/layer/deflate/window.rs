//! A stretch of input in which positions have 16 bits, so that none needs a check.

use super::symbols::{FARTHEST, LONGEST};

/// Positions that matches begin at or point to.
pub const POSITIONS: usize = 1 << 16;
/// Positions from here on are not entered in a table within a match: the next window has them too.
pub const LAST: usize = POSITIONS - 8;
/// The input from some place on: as many bytes as have positions, and what may be read behind them.
pub type Window = [u8; POSITIONS + 320];

/// The four bytes from `at` on.
#[inline(always)]
pub fn load32(window: &Window, at: u16) -> u32 {
    let at = usize::from(at);
    let mut bytes = [0; 4];
    bytes.copy_from_slice(&window[at..at + 4]);
    u32::from_le_bytes(bytes)
}

/// The eight bytes from `at + offset` on; `offset` at most 300.
#[inline(always)]
pub fn load64(window: &Window, at: u16, offset: usize) -> u64 {
    let at = usize::from(at) + offset;
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&window[at..at + 8]);
    u64::from_le_bytes(bytes)
}

/// How many bytes from `a` and from `b` on are the same, at most [`LONGEST`]; the first four are known to be.
#[inline(always)]
pub fn length_of_match(window: &Window, a: u16, b: u16) -> usize {
    let first = load64(window, a, 4) ^ load64(window, b, 4);
    let second = load64(window, a, 12) ^ load64(window, b, 12);
    // The usual length without a branch.
    let low = first.trailing_zeros();
    let high = 64 + second.trailing_zeros();
    let same = if first == 0 { high } else { low };
    if same < 128 {
        return 4 + (same >> 3) as usize;
    }
    let mut length = 20;
    while length < LONGEST as usize {
        let differing = load64(window, a, length) ^ load64(window, b, length);
        if differing != 0 {
            length += (differing.trailing_zeros() >> 3) as usize;
            break;
        }
        length += 8;
    }
    length.min(LONGEST as usize)
}

/// The windows of a stretch of input, each half a window further than the one before.
pub struct Windows<'a> {
    data: &'a [u8],
    /// Where the window begins in the data.
    base: usize,
    /// The last bytes of the data, and zeros, where they do not fill a window.
    last: &'a mut Window,
    is_last: bool,
}

/// How far a window is behind the one before.
pub const STRIDE: usize = FARTHEST as usize;

impl<'a> Windows<'a> {
    /// The first window, which begins at `base`.
    pub fn new(data: &'a [u8], base: usize, last: &'a mut Window) -> Self {
        let mut windows = Self {
            data,
            base,
            last,
            is_last: false,
        };
        windows.prepare();
        windows
    }

    /// The next one.
    pub fn slide(&mut self) {
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

    /// The window.
    pub fn get(&self) -> &Window {
        match self.data[self.base..].first_chunk() {
            Some(window) => window,
            None => self.last,
        }
    }

    /// Bytes from the window's start to the end of the data.
    pub fn rest(&self) -> usize {
        self.data.len() - self.base
    }
}
