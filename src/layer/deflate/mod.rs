//! An encoder for raw deflate (RFC 1951) whose input blocks can be compressed by any thread, in any order: each block's
//! output ends on a byte boundary, so that the outputs can be concatenated. The same input gives the same bytes on
//! every machine.
//!
//! Matches are found first and written later: a table (`one_slot`, `two_slots`, `chain`: one candidate, two, all) finds them in
//! two interleaved halves of the input (`interleave`, over a `window`) and produces `tokens`; `emit` cuts these into blocks
//! and writes each with the best `code` (`huffman`), through `bits`. `symbols` holds the alphabets of the format.

#![allow(
    clippy::inline_always,
    reason = "in the inner loops a call costs as much as what is called"
)]

mod bits;
mod chain;
mod code;
mod emit;
mod huffman;
mod interleave;
mod one_slot;
mod symbols;
mod tokens;
mod two_slots;
mod window;

use chain::{Effort, HashChains};
use emit::Output;
use interleave::{Interleaved, MatchTable};
use one_slot::OneSlotTable;
use tokens::Tokens;
use two_slots::TwoSlotTable;

/// An empty final block, which ends the stream.
pub const END: [u8; 2] = [3, 0];

/// Bytes of input whose tokens are held at once.
const SEGMENT: usize = 1 << 20;

/// The encoder of one thread, reused for every block.
pub struct Encoder {
    matcher: Matcher,
    tokens: [Tokens; 2],
    /// Bytes of input after which a deflate block ends.
    block: usize,
}

enum Matcher {
    OneSlot(Interleaved<OneSlotTable>),
    TwoSlots(Interleaved<TwoSlotTable<{ 1 << 14 }, 3, 5>>),
    LargeTwoSlots(Interleaved<TwoSlotTable<{ 1 << 15 }, 1, 4>>),
    Chains(Interleaved<HashChains>),
}

impl Encoder {
    /// Creates an encoder for a level from 1 (fastest) to 9 (smallest); other levels are clamped.
    pub fn new(level: u32) -> Self {
        let matcher = match level {
            0 | 1 => Matcher::OneSlot(Interleaved::new(())),
            2 => Matcher::TwoSlots(Interleaved::new(())),
            3 => Matcher::LargeTwoSlots(Interleaved::new(())),
            _ => Matcher::Chains(Interleaved::new(effort(level))),
        };
        let block = match level {
            0 | 1 => 160 << 10,
            2 | 3 => 72 << 10,
            _ => 36 << 10,
        };
        Self {
            matcher,
            tokens: [Tokens::default(), Tokens::default()],
            block,
        }
    }

    /// Appends the compressed `data` to `out`. The output refers to no earlier data, ends on a byte boundary, and does
    /// not end the stream; [`END`] does.
    pub fn encode(&mut self, data: &[u8], out: &mut Vec<u8>) {
        let (tokens, block) = (&mut self.tokens, self.block);
        match &mut self.matcher {
            Matcher::OneSlot(halves) => encode(halves, tokens, block, data, out),
            Matcher::TwoSlots(halves) => encode(halves, tokens, block, data, out),
            Matcher::LargeTwoSlots(halves) => encode(halves, tokens, block, data, out),
            Matcher::Chains(halves) => encode(halves, tokens, block, data, out),
        }
    }
}

fn encode<T: MatchTable>(
    halves: &mut Interleaved<T>,
    tokens: &mut [Tokens; 2],
    block: usize,
    data: &[u8],
    out: &mut Vec<u8>,
) {
    let mut output = Output::new(out);
    let mut at = 0;
    while at < data.len() {
        let end = data.len().min(at + SEGMENT);
        let middle = halves.run(&data[..end], at, tokens);
        for (part, tokens) in [at..middle, middle..end].into_iter().zip(&*tokens) {
            output.tokens(&data[part], tokens, block);
        }
        at = end;
    }
    output.align();
}

/// Appends `data` to `out` as stored blocks.
pub fn store(data: &[u8], out: &mut Vec<u8>) {
    Output::new(out).stored(data);
}

fn effort(level: u32) -> Effort {
    let (depth, nice) = match level {
        ..=4 => (5, 16),
        5 => (8, 20),
        6 => (12, 24),
        7 => (24, 48),
        8 => (64, 128),
        _ => (300, 258),
    };
    Effort { depth, nice }
}
