//! The two Huffman codes of a block, and their description in the header of a dynamic block (RFC 1951, 3.2.7).

use super::bits::Bits;
use super::huffman::{code_lengths, codes};
use super::symbols::{DISTS, END, LENGTH_EXTRA, LITLEN, dist_extra, fixed_lengths};
use super::tokens::Frequencies;

/// Maximum code length of literals and lengths: four literals and seven pending bits fit into 64 bits.
const LITLEN_BITS: usize = 14;
/// Maximum code length of distances.
const DIST_BITS: usize = 15;
/// Number of symbols of the code length alphabet.
const PRECODE_SYMBOLS: usize = 19;
/// Maximum code length of that alphabet.
const PRECODE_MAX_BITS: usize = 7;
/// Order in which its code lengths are written.
const PRECODE_ORDER: [usize; PRECODE_SYMBOLS] = [
    16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15,
];
/// Symbol that repeats the previous length 3 to 6 times.
const REPEAT: u8 = 16;
/// Symbol for 3 to 10 zeros.
const ZEROS: u8 = 17;
/// Symbol for 11 to 138 zeros.
const MANY_ZEROS: u8 = 18;

/// The code lengths of a block.
pub(crate) struct Lengths {
    /// Code lengths of literals, the end of the block and match lengths.
    pub(crate) litlen: [u8; LITLEN],
    /// Code lengths of distances.
    pub(crate) dists: [u8; DISTS],
}

impl Lengths {
    /// Returns the best code lengths for these frequencies.
    pub(crate) fn best(freqs: &Frequencies) -> Self {
        let mut lengths = Self {
            litlen: [0; LITLEN],
            dists: [0; DISTS],
        };
        // The last two symbols of either alphabet do not occur in a dynamic block.
        code_lengths(
            &freqs.litlen[..LITLEN - 2],
            LITLEN_BITS,
            &mut lengths.litlen[..LITLEN - 2],
        );
        code_lengths(
            &freqs.dists[..DISTS - 2],
            DIST_BITS,
            &mut lengths.dists[..DISTS - 2],
        );
        lengths
    }

    /// Returns the code lengths of a fixed block.
    pub(crate) const fn fixed() -> Self {
        Self {
            litlen: fixed_lengths(),
            dists: [5; DISTS],
        }
    }

    /// Returns the size of the block's symbols in bits, extra bits included.
    pub(crate) fn cost(&self, freqs: &Frequencies) -> u64 {
        let mut bits = 0;
        for (&freq, &length) in freqs.litlen.iter().zip(&self.litlen) {
            bits += u64::from(freq) * u64::from(length);
        }
        for (&freq, &extra) in freqs.litlen[END + 1..].iter().zip(&LENGTH_EXTRA) {
            bits += u64::from(freq) * u64::from(extra);
        }
        for (symbol, (&freq, &length)) in freqs.dists.iter().zip(&self.dists).enumerate() {
            bits += u64::from(freq) * u64::from(u32::from(length) + dist_extra(symbol));
        }
        bits
    }

    /// Returns the codes, bit-reversed for writing.
    pub(crate) fn codes(&self) -> ([u16; LITLEN], [u16; DISTS]) {
        let (mut litlen, mut dists) = ([0; LITLEN], [0; DISTS]);
        codes(&self.litlen, &mut litlen);
        codes(&self.dists, &mut dists);
        (litlen, dists)
    }
}

/// The description of a block's codes.
pub(crate) struct DynamicHeader {
    /// Symbols of the code length alphabet, each with the value of its extra bits.
    items: [(u8, u8); LITLEN + DISTS],
    len: usize,
    litlen: usize,
    dists: usize,
    precode: usize,
    lengths: [u8; PRECODE_SYMBOLS],
    /// Size in bits, without the three bits of the block header.
    pub(crate) cost: u64,
}

/// Returns the number of extra bits of a symbol of the code length alphabet.
fn precode_extra_bits(symbol: u8) -> u32 {
    match symbol {
        REPEAT => 2,
        ZEROS => 3,
        MANY_ZEROS => 7,
        _ => 0,
    }
}

impl DynamicHeader {
    /// Creates the description of these code lengths.
    pub(crate) fn of(lengths: &Lengths) -> Self {
        let used = |all: &[u8], least: usize| {
            let last = all.iter().rposition(|&length| length > 0);
            last.map_or(least, |last| (last + 1).max(least))
        };
        let litlen = used(&lengths.litlen[..LITLEN - 2], END + 1);
        let dists = used(&lengths.dists[..DISTS - 2], 1);
        let mut all = [0; LITLEN + DISTS];
        all[..litlen].copy_from_slice(&lengths.litlen[..litlen]);
        all[litlen..litlen + dists].copy_from_slice(&lengths.dists[..dists]);
        let mut description = Self {
            items: [(0, 0); LITLEN + DISTS],
            len: 0,
            litlen,
            dists,
            precode: 0,
            lengths: [0; PRECODE_SYMBOLS],
            cost: 0,
        };
        let mut freqs = [0u32; PRECODE_SYMBOLS];
        for run in all[..litlen + dists].chunk_by(|a, b| a == b) {
            description.add_run(run[0], run.len());
        }
        for &(symbol, _) in &description.items[..description.len] {
            freqs[usize::from(symbol)] += 1;
        }
        code_lengths(&freqs, PRECODE_MAX_BITS, &mut description.lengths);
        let last = PRECODE_ORDER
            .iter()
            .rposition(|&symbol| description.lengths[symbol] > 0);
        description.precode = last.map_or(4, |last| (last + 1).max(4));
        let symbols = (0u8..).zip(freqs).zip(&description.lengths);
        let cost = symbols.map(|((symbol, freq), &length)| {
            u64::from(freq) * u64::from(u32::from(length) + precode_extra_bits(symbol))
        });
        description.cost = 14 + 3 * description.precode as u64 + cost.sum::<u64>();
        description
    }

    fn add(&mut self, symbol: u8, extra: usize) {
        self.items[self.len] = (symbol, extra as u8);
        self.len += 1;
    }

    /// Adds `count` equal lengths.
    fn add_run(&mut self, length: u8, mut count: usize) {
        if length == 0 {
            while count >= 11 {
                let now = count.min(138);
                self.add(MANY_ZEROS, now - 11);
                count -= now;
            }
            if count >= 3 {
                self.add(ZEROS, count - 3);
                count = 0;
            }
        } else if count > 3 {
            self.add(length, 0);
            count -= 1;
            while count >= 3 {
                let now = count.min(6);
                self.add(REPEAT, now - 3);
                count -= now;
            }
        }
        for _ in 0..count {
            self.add(length, 0);
        }
    }

    /// Writes the description.
    pub(crate) fn write(&self, bits: &mut Bits<'_>) {
        let mut pre_codes = [0; PRECODE_SYMBOLS];
        codes(&self.lengths, &mut pre_codes);
        bits.put((self.litlen - END - 1) as u64, 5);
        bits.put((self.dists - 1) as u64, 5);
        bits.put((self.precode - 4) as u64, 4);
        bits.flush();
        for symbol in &PRECODE_ORDER[..self.precode] {
            bits.put(u64::from(self.lengths[*symbol]), 3);
            bits.flush();
        }
        for &(symbol, extra) in &self.items[..self.len] {
            let length = u32::from(self.lengths[usize::from(symbol)]);
            let code = u64::from(pre_codes[usize::from(symbol)]);
            bits.put(
                code | u64::from(extra) << length,
                length + precode_extra_bits(symbol),
            );
            bits.flush();
        }
    }
}
