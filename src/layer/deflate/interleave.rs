//! Finds matches in two halves of the input, interleaved on one thread.
//!
//! The end of a match determines where the search for the next one begins, so the search is one chain of dependent
//! loads. Two independent chains take little longer than one.

use super::symbols::MAX_DISTANCE;
use super::tokens::Tokens;
use super::window::{POSITIONS, STRIDE, Window, Windows};

/// Minimum size of input in bytes for two halves.
const MIN_INTERLEAVED: usize = 128 << 10;
/// Bytes before the end of a window or the input in which no step begins.
pub(crate) const MARGIN: usize = 16;
/// Maximum number of bytes that a step passes without a match.
pub(crate) const GROUP: usize = 4;
/// Where no match was found for a while, positions between two steps are not looked at: one for every
/// `1 << PATIENCE` bytes since the last match, at most [`LEAP`].
const PATIENCE: u32 = 7;
/// Maximum number of bytes between two steps, less than what a [`Window`] has after its last position.
const LEAP: usize = 64;

/// A table of earlier positions by hash.
pub(crate) trait MatchTable {
    /// How much effort to spend on finding matches.
    type Effort: Copy;
    /// Creates an empty table.
    fn new(effort: Self::Effort) -> Self;
    /// Removes all positions.
    fn clear(&mut self);
    /// Rebases all positions to the next window.
    fn slide(&mut self);
    /// Inserts a position.
    fn enter(&mut self, window: &Window, at: u16);
    /// Inserts the positions from `at`, either at least [`GROUP`] of them or up to the end of a match, and returns the
    /// first match, or a better one shortly after it.
    fn find(&mut self, window: &Window, at: u16) -> Found;
}

/// Result of [`MatchTable::find`].
pub(crate) struct Found {
    /// Number of bytes before the match; [`GROUP`] if there is none.
    pub(crate) skipped: usize,
    /// Length of the match in bytes, which may extend beyond the end of the input; 0 if there is none.
    pub(crate) length: usize,
    /// Distance of the match in bytes.
    pub(crate) dist: usize,
}

impl Found {
    /// No match.
    pub(crate) const NONE: Self = Self {
        skipped: GROUP,
        length: 0,
        dist: 0,
    };
}

/// The state of one half.
struct Half<'a, T> {
    table: &'a mut T,
    tokens: &'a mut Tokens,
    /// Position in the window.
    at: usize,
    /// Start of the literals that precede the next match.
    anchor: usize,
    /// Position in the window before which steps may begin.
    limit: usize,
    /// End of the input.
    end: usize,
}

impl<'a, T: MatchTable> Half<'a, T> {
    fn new(windows: &Windows<'_>, start: usize, table: &'a mut T, tokens: &'a mut Tokens) -> Self {
        table.clear();
        let window = windows.get();
        // Position 0 stands for an empty slot.
        for at in 1..start.min(windows.rest().saturating_sub(MARGIN)) {
            table.enter(window, at as u16);
        }
        tokens.reset(windows.rest() - start);
        let mut half = Self {
            table,
            tokens,
            at: start.max(1),
            anchor: start,
            limit: 0,
            end: 0,
        };
        half.set_limit(windows);
        half
    }

    fn set_limit(&mut self, windows: &Windows<'_>) {
        self.end = windows.rest();
        self.limit = self.end.min(POSITIONS).saturating_sub(MARGIN);
    }

    #[inline(always)]
    fn has_input(&self) -> bool {
        self.at < self.limit
    }

    fn is_done(&self) -> bool {
        self.at >= self.end.saturating_sub(MARGIN)
    }

    /// Advances past one match, or past a group without a match.
    #[inline(always)]
    fn step(&mut self, window: &Window) {
        let found = self.table.find(window, self.at as u16);
        self.at += found.skipped;
        if found.length == 0 {
            let run = self.at - self.anchor;
            self.at += (run >> PATIENCE).min(LEAP);
            return;
        }
        let length = found.length.min(self.end - self.at);
        let literals = &window[usize::from(self.anchor as u16)..];
        let count = self.at - self.anchor;
        self.tokens.push(literals, count, length, found.dist);
        self.at += length;
        self.anchor = self.at;
    }

    /// Moves to the next window at the end of this one, or finishes at the end of the input.
    fn next_window(&mut self, windows: &mut Windows<'_>) {
        let done = self.is_done();
        let literals_end = if done { self.end } else { self.at };
        self.tokens
            .push_literals(&windows.get()[self.anchor..literals_end]);
        self.anchor = literals_end;
        if done {
            self.at = self.end;
            return;
        }
        self.at -= STRIDE;
        self.anchor -= STRIDE;
        self.table.slide();
        windows.slide();
        self.set_limit(windows);
    }
}

/// Finds matches in two halves with tables of type `T`.
pub(crate) struct Interleaved<T> {
    tables: [T; 2],
    last: [Box<Window>; 2],
}

impl<T: MatchTable> Interleaved<T> {
    /// Creates the state with empty tables.
    pub(crate) fn new(effort: T::Effort) -> Self {
        let last = || {
            let window = vec![0; size_of::<Window>()].into_boxed_slice();
            window.try_into().unwrap_or_else(|_| unreachable!())
        };
        Self {
            tables: [T::new(effort), T::new(effort)],
            last: [last(), last()],
        }
    }

    /// Finds the tokens of `data[start..]` in two parts; returns the start of the second.
    #[inline(never)]
    pub(crate) fn run(&mut self, data: &[u8], start: usize, tokens: &mut [Tokens; 2]) -> usize {
        let middle = if data.len() - start < MIN_INTERLEAVED {
            data.len()
        } else {
            start + (data.len() - start) / 2
        };
        let [table_a, table_b] = &mut self.tables;
        let [last_a, last_b] = &mut self.last;
        let [tokens_a, tokens_b] = tokens;
        let base = |start: usize| start.saturating_sub(MAX_DISTANCE as usize);
        let mut windows_a = Windows::new(&data[..middle], base(start), last_a);
        let mut a = Half::new(&windows_a, start - base(start), table_a, tokens_a);
        if middle < data.len() {
            let mut windows_b = Windows::new(data, base(middle), last_b);
            let mut b = Half::new(&windows_b, middle - base(middle), table_b, tokens_b);
            while !a.is_done() && !b.is_done() {
                let (window_a, window_b) = (windows_a.get(), windows_b.get());
                while a.has_input() && b.has_input() {
                    a.step(window_a);
                    b.step(window_b);
                }
                if !a.has_input() {
                    a.next_window(&mut windows_a);
                }
                if !b.has_input() {
                    b.next_window(&mut windows_b);
                }
            }
            finish(&mut b, &mut windows_b);
        } else {
            tokens_b.reset(0);
        }
        finish(&mut a, &mut windows_a);
        middle
    }
}

/// Processes the rest of one half.
#[inline(never)]
fn finish<T: MatchTable>(half: &mut Half<'_, T>, windows: &mut Windows<'_>) {
    while half.anchor < half.end {
        let window = windows.get();
        while half.has_input() {
            half.step(window);
        }
        half.next_window(windows);
    }
}
