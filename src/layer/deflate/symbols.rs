//! The alphabets of RFC 1951, 3.2.5: how lengths and distances become symbols and extra bits.

/// Symbols for literals, the end of the block and lengths; the last two occur only in the fixed code.
pub const LITLEN: usize = 288;
/// Symbols for distances; the last two occur only in the fixed code.
pub const DISTS: usize = 32;
/// What [`dist_index`] is less than.
pub const DIST_INDICES: usize = 768;
/// The symbol that ends a block.
pub const END: usize = 256;
/// The longest match.
pub const LONGEST: u32 = 258;
/// The largest distance.
pub const FARTHEST: u32 = 32768;

/// For each length less 3 its symbol less 257.
pub static LENGTH_SYMBOL: [u8; 256] = length_symbols();
/// For each symbol less 257 the number of extra bits.
pub static LENGTH_EXTRA: [u8; 29] = [
    0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 0,
];
/// For each symbol less 257 the smallest length less 3.
pub static LENGTH_BASE: [u8; 29] = length_bases();
/// The symbols of distances less one: below 256 directly, above by the distance in steps of 128. Those in one step have
/// the same symbol.
pub static DIST_SYMBOL: [u8; DIST_INDICES] = dist_symbols();

const fn length_bases() -> [u8; 29] {
    let mut bases = [0; 29];
    let mut base = 0u32;
    let mut symbol = 0;
    while symbol < 28 {
        bases[symbol] = base as u8;
        base += 1 << extra_of_length(symbol);
        symbol += 1;
    }
    // 258 has a symbol of its own.
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

/// The number of extra bits of a distance's symbol.
pub const fn dist_extra(symbol: usize) -> u32 {
    if symbol < 4 { 0 } else { symbol as u32 / 2 - 1 }
}

const fn dist_symbols() -> [u8; DIST_INDICES] {
    // A symbol of no meaning for what is no distance.
    let mut symbols = [DISTS as u8 - 1; DIST_INDICES];
    let mut base = 0usize;
    let mut symbol = 0;
    while symbol < 30 {
        let next = base + (1 << dist_extra(symbol));
        // Symbols below 16 end at 256.
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

/// Where in [`DIST_SYMBOL`] a distance's symbol stands, given less one.
#[inline(always)]
pub fn dist_index(less_one: u16) -> usize {
    if less_one < 256 {
        usize::from(less_one)
    } else {
        256 + usize::from(less_one >> 7)
    }
}

/// The symbol of a distance, given less one; the last one of all for what is no distance.
#[inline(always)]
pub fn dist_symbol(less_one: u16) -> u8 {
    DIST_SYMBOL[dist_index(less_one)]
}

/// The lengths of the fixed code for literals and lengths (RFC 1951, 3.2.6).
pub const fn fixed_lengths() -> [u8; LITLEN] {
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
            // 258 could also be written with symbol 284.
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
        assert_eq!(base, FARTHEST);
    }
}
