//! Writes tokens as blocks, each of the type (stored, fixed or dynamic) that takes the fewest bits.

use super::bits::{Bits, Pending, SLACK};
use super::code::{DynamicHeader, Lengths};
use super::symbols::{
    DIST_INDICES, DIST_SYMBOL, END, LENGTH_BASE, LENGTH_EXTRA, LENGTH_SYMBOL, dist_extra,
    dist_index,
};
use super::tokens::{Frequencies, NO_MATCH, Token, Tokens, literals_of, matched_by};

/// Maximum number of bytes of a stored block.
const MAX_STORED: usize = 0xffff;
/// Bits and their number.
#[derive(Clone, Copy, Default)]
struct CodeWord {
    bits: u32,
    count: u32,
}

impl CodeWord {
    fn new(code: u16, length: u8) -> Self {
        Self {
            bits: u32::from(code),
            count: u32::from(length),
        }
    }
}

/// Code of a distance, its length, and the number of extra bits that follow.
#[derive(Clone, Copy, Default)]
struct DistanceCodeWord {
    bits: u16,
    count: u8,
    extra: u8,
}

/// Index of an entry that stands for no literal and takes no bits.
const NONE: usize = 256;

/// Tokens between two places where a block may end.
const CHUNK: usize = 512;

/// The compressed bytes so far, and the bits that do not fill a byte yet.
pub(crate) struct Output<'a> {
    /// Destination of the bytes.
    pub(crate) bytes: &'a mut Vec<u8>,
    pending: Pending,
}

/// Lookup tables for writing a block's tokens.
struct Tables {
    /// By literal.
    literals: [CodeWord; NONE + 1],
    /// By length less 3, including the extra bits.
    lengths: [CodeWord; 256],
    /// By [`dist_index`].
    dists: [DistanceCodeWord; DIST_INDICES],
    end: CodeWord,
}

impl Tables {
    fn new(lengths: &Lengths) -> Self {
        let (litlen, dists) = lengths.codes();
        let mut tables = Self {
            literals: [CodeWord::default(); NONE + 1],
            lengths: [CodeWord::default(); 256],
            dists: [DistanceCodeWord::default(); DIST_INDICES],
            end: CodeWord::new(litlen[END], lengths.litlen[END]),
        };
        for (literal, word) in tables.literals[..NONE].iter_mut().enumerate() {
            *word = CodeWord::new(litlen[literal], lengths.litlen[literal]);
        }
        for (length, word) in tables.lengths.iter_mut().enumerate() {
            let symbol = usize::from(LENGTH_SYMBOL[length]);
            let extra = length as u32 - u32::from(LENGTH_BASE[symbol]);
            let code = END + 1 + symbol;
            *word = CodeWord::new(litlen[code], lengths.litlen[code]);
            word.bits |= extra << word.count;
            word.count += u32::from(LENGTH_EXTRA[symbol]);
        }
        for (&symbol, word) in DIST_SYMBOL.iter().zip(&mut tables.dists) {
            let symbol = usize::from(symbol);
            *word = DistanceCodeWord {
                bits: dists[symbol],
                count: lengths.dists[symbol],
                extra: dist_extra(symbol) as u8,
            };
        }
        tables
    }
}

static FIXED: Lengths = Lengths::fixed();

impl<'a> Output<'a> {
    /// Creates an output that appends to `bytes`.
    pub(crate) fn new(bytes: &'a mut Vec<u8>) -> Self {
        Self {
            bytes,
            pending: Pending::default(),
        }
    }

    /// Writes `data`, which `tokens` encode, cutting it into blocks of about `block_bytes` bytes of input.
    pub(crate) fn tokens(&mut self, mut data: &[u8], tokens: &Tokens, block_bytes: usize) {
        let mut literals = tokens.literals();
        let mut list = tokens.list();
        while !list.is_empty() {
            let (mut count, mut bytes, mut literal_count) = (0, 0, 0);
            for chunk in list.chunks(CHUNK) {
                let literals = literals_of(chunk);
                count += chunk.len();
                literal_count += literals;
                bytes += literals + matched_by(chunk);
                if bytes >= block_bytes {
                    break;
                }
            }
            let now = &list[..count];
            self.block(&data[..bytes], now, literals, literal_count);
            list = &list[count..];
            data = &data[bytes..];
            literals = &literals[literal_count..];
        }
    }

    /// Writes `block`, which consists of `tokens` with the first `count` of `literals`.
    fn block(&mut self, block: &[u8], tokens: &[Token], literals: &[u8], count: usize) {
        let freqs = Frequencies::of(tokens, &literals[..count]);
        let lengths = Lengths::best(&freqs);
        let description = DynamicHeader::of(&lengths);
        let dynamic = 3 + description.cost + lengths.cost(&freqs);
        let fixed = 3 + FIXED.cost(&freqs);
        // At most 10 bits for the block header and the padding to a byte, and 32 for the lengths.
        let stored = 42 * block.len().div_ceil(MAX_STORED) as u64 + 8 * block.len() as u64;
        if stored <= dynamic.min(fixed) {
            self.stored(block);
        } else if fixed <= dynamic {
            self.write(fixed, tokens, literals, &FIXED, None);
        } else {
            self.write(dynamic, tokens, literals, &lengths, Some(&description));
        }
    }

    /// Writes `block` as stored blocks.
    pub(crate) fn stored(&mut self, block: &[u8]) {
        for piece in block.chunks(MAX_STORED) {
            self.stored_piece(piece);
        }
    }

    fn stored_piece(&mut self, piece: &[u8]) {
        self.bytes.push(self.pending.bits);
        if self.pending.count > 5 {
            self.bytes.push(0);
        }
        self.pending = Pending::default();
        let length = piece.len() as u16;
        self.bytes.extend(length.to_le_bytes());
        self.bytes.extend((!length).to_le_bytes());
        self.bytes.extend(piece);
    }

    /// Pads the output to a byte boundary, with an empty stored block if necessary.
    pub(crate) fn align(&mut self) {
        if self.pending.count > 0 {
            self.stored_piece(&[]);
        }
    }

    fn write(
        &mut self,
        cost: u64,
        tokens: &[Token],
        literals: &[u8],
        lengths: &Lengths,
        description: Option<&DynamicHeader>,
    ) {
        let start = self.bytes.len();
        let room = (cost / 8) as usize + 2 + SLACK;
        self.bytes.resize(start + room, 0);
        let mut bits = Bits::new(&mut self.bytes[start..], self.pending);
        match description {
            Some(description) => {
                bits.put(0b100, 3);
                description.write(&mut bits);
            }
            None => bits.put(0b010, 3),
        }
        write_tokens(&mut bits, tokens, literals, &Tables::new(lengths));
        let (written, pending) = bits.end();
        debug_assert_eq!(
            8 * written as u64 + u64::from(pending.count),
            cost + u64::from(self.pending.count)
        );
        self.bytes.truncate(start + written);
        self.pending = pending;
    }
}

#[inline(never)]
fn write_tokens(bits: &mut Bits<'_>, tokens: &[Token], literals: &[u8], tables: &Tables) {
    bits.flush();
    let mut at = 0;
    for token in tokens {
        let end = at + usize::from(token.literals);
        while end - at > 4 {
            write_literals(bits, literals, at, 4, tables);
            at += 4;
        }
        write_literals(bits, literals, at, end - at, tables);
        at = end;
        if token.dist == NO_MATCH {
            continue;
        }
        write_match(bits, *token, tables);
    }
    bits.put(u64::from(tables.end.bits), tables.end.count);
}

#[inline(always)]
fn write_match(bits: &mut Bits<'_>, token: Token, tables: &Tables) {
    let length = tables.lengths[usize::from(token.length)];
    let dist = tables.dists[dist_index(token.dist)];
    let dist_count = u32::from(dist.count);
    let extra_count = u32::from(dist.extra);
    let extra = u64::from(token.dist) & ((1 << extra_count) - 1);
    // Only the last shift depends on what was written before.
    let dist_bits = u64::from(dist.bits) | extra << dist_count;
    let all = u64::from(length.bits) | dist_bits << length.count;
    bits.put(all, length.count + dist_count + extra_count);
    bits.flush();
}

/// Writes `count` (at most 4) literals from `at`, without a branch on the number. At least four bytes must be
/// available.
#[inline(always)]
fn write_literals(bits: &mut Bits<'_>, literals: &[u8], at: usize, count: usize, tables: &Tables) {
    let mut bytes = [0; 4];
    bytes.copy_from_slice(&literals[at..at + 4]);
    let word = |index: usize| {
        let literal = usize::from(bytes[index]);
        tables.literals[if index < count { literal } else { NONE }]
    };
    let (a, b, c, d) = (word(0), word(1), word(2), word(3));
    let ab = u64::from(a.bits) | u64::from(b.bits) << a.count;
    let cd = u64::from(c.bits) | u64::from(d.bits) << c.count;
    let count = a.count + b.count;
    bits.put(ab | cd << count, count + c.count + d.count);
    bits.flush();
}
