//! The alphabets of RFC 1951, 3.2.5: maps lengths and distances to symbols and extra bits.

/// Symbols for literals, the end of the block and lengths; the last two occur only in the fixed code.
pub(crate) const LITLEN: usize = 288;
/// Symbols for distances; the last two occur only in the fixed code.
pub(crate) const DISTS: usize = 32;
/// Upper bound (exclusive) of [`dist_index`].
pub(crate) const DIST_INDICES: usize = 768;
/// The end-of-block symbol.
pub(crate) const END: usize = 256;
/// Maximum length of a match.
pub(crate) const MAX_MATCH: u32 = 258;
/// Maximum distance of a match.
pub(crate) const MAX_DISTANCE: u32 = 32768;

/// Symbol less 257, by length less 3.
pub(crate) static LENGTH_SYMBOL: [u8; 256] = length_symbols();
/// Number of extra bits, by symbol less 257.
pub(crate) static LENGTH_EXTRA: [u8; 29] = [
    0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 0,
];
/// Smallest length less 3, by symbol less 257.
pub(crate) static LENGTH_BASE: [u8; 29] = length_bases();
/// Symbols of distances less one: the first 256 entries are indexed directly, the others by the distance in steps of
/// 128. All distances within one step have the same symbol.
pub(crate) static DIST_SYMBOL: [u8; DIST_INDICES] = dist_symbols();

const fn length_bases() -> [u8; 29] {
    let mut bases = [0; 29];
    let mut base = 0u32;
    let mut symbol = 0;
    while symbol < 28 {
        bases[symbol] = base as u8;
        base += 1 << extra_of_length(symbol);
        symbol += 1;
    }
    // Length 258 has a symbol of its own.
    bases[28] = 255;
    bases
}

const fn extra_of_length(symbol: usize) -> u32 {
    if symbol < 8 {
        0
    } else {
        (symbol as u32 - 4) / 4
    }
}

const fn length_symbols() -> [u8; 256] {
    let bases = length_bases();
    let mut symbols = [0; 256];
    let mut length = 0;
    let mut symbol = 0;
    while length < 256 {
        if symbol < 28 && length as u8 >= bases[symbol + 1] {
            symbol += 1;
        }
        symbols[length] = symbol as u8;
        length += 1;
    }
    symbols
}

/// Returns the number of extra bits of a distance symbol.
pub(crate) const fn dist_extra(symbol: usize) -> u32 {
    if symbol < 4 { 0 } else { symbol as u32 / 2 - 1 }
}

const fn dist_symbols() -> [u8; DIST_INDICES] {
    // Entries that are no distance keep an unused symbol.
    let mut symbols = [DISTS as u8 - 1; DIST_INDICES];
    let mut base = 0usize;
    let mut symbol = 0;
    while symbol < 30 {
        let next = base + (1 << dist_extra(symbol));
        // The distances of the symbols below 16 end at 256.
        let (mut from, to) = if symbol < 16 {
            (base, next)
        } else {
            (256 + (base >> 7), 256 + (next >> 7))
        };
        while from < to {
            symbols[from] = symbol as u8;
            from += 1;
        }
        base = next;
        symbol += 1;
    }
    symbols
}

/// Returns the index in [`DIST_SYMBOL`] of a distance, given less one.
#[inline(always)]
pub(crate) fn dist_index(less_one: u16) -> usize {
    if less_one < 256 {
        usize::from(less_one)
    } else {
        256 + usize::from(less_one >> 7)
    }
}

/// Returns the symbol of a distance, given less one; the last symbol of the alphabet for a value that is no distance.
#[inline(always)]
pub(crate) fn dist_symbol(less_one: u16) -> u8 {
    DIST_SYMBOL[dist_index(less_one)]
}

/// Returns the code lengths of the fixed code for literals and lengths (RFC 1951, 3.2.6).
pub(crate) const fn fixed_lengths() -> [u8; LITLEN] {
    let mut lengths = [8; LITLEN];
    let mut symbol = 144;
    while symbol < 280 {
        lengths[symbol] = if symbol < 256 { 9 } else { 7 };
        symbol += 1;
    }
    lengths
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_length_and_distance_lies_in_its_symbols_range() {
        for length in 0..256u32 {
            let symbol = usize::from(LENGTH_SYMBOL[length as usize]);
            let extra = length - u32::from(LENGTH_BASE[symbol]);
            // Length 258 could also be written with symbol 284.
            assert!(extra < 1 << LENGTH_EXTRA[symbol], "{length}");
            assert!(symbol == 28 || u32::from(LENGTH_EXTRA[symbol]) == extra_of_length(symbol));
        }
        assert_eq!(LENGTH_SYMBOL[255], 28);
        assert_eq!(LENGTH_SYMBOL[254], 27);
        let mut base = 0;
        for symbol in 0..30 {
            for extra in 0..1u32 << dist_extra(symbol) {
                assert_eq!(usize::from(dist_symbol((base + extra) as u16)), symbol);
            }
            base += 1 << dist_extra(symbol);
        }
        assert_eq!(base, MAX_DISTANCE);
    }
}
