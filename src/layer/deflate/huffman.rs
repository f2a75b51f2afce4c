//! Computes code lengths from frequencies, and canonical codes from code lengths.

/// Maximum code length of literals, lengths and distances (RFC 1951, 3.2.7).
pub(crate) const MAX_CODE_BITS: usize = 15;

/// Frequency and number of a symbol are packed into one word, so that sorting compares words.
const SYMBOL_BITS: u32 = 9;
const SYMBOL: u32 = (1 << SYMBOL_BITS) - 1;
/// Maximum frequency; larger ones are clamped to it.
const MAX_FREQUENCY: u32 = (1 << (32 - SYMBOL_BITS)) - 1;
/// Size of the largest alphabet.
const SYMBOLS: usize = 288;

/// Sets `lengths` to the code lengths of a prefix code for the symbols that occur, each at most `limit`. The code is
/// complete: if fewer than two symbols occur, others get a code too.
pub(crate) fn code_lengths(freqs: &[u32], limit: usize, lengths: &mut [u8]) {
    debug_assert!(freqs.len() == lengths.len() && freqs.len() <= SYMBOLS);
    debug_assert!(limit <= MAX_CODE_BITS && freqs.len() <= 1 << limit);
    lengths.fill(0);
    let mut keys = [0u32; SYMBOLS];
    let mut used = 0;
    for (symbol, &freq) in freqs.iter().enumerate() {
        keys[used] = freq.min(MAX_FREQUENCY) << SYMBOL_BITS | symbol as u32;
        used += usize::from(freq > 0);
    }
    if used < 2 {
        let symbol = keys[0] & SYMBOL;
        let symbol = if used == 0 { 0 } else { symbol as usize };
        lengths[symbol] = 1;
        lengths[usize::from(symbol == 0)] = 1;
        return;
    }
    let keys = &mut keys[..used];
    keys.sort_unstable();
    let mut counts = lengths_of_sorted(keys);
    limit_counts(&mut counts, limit);
    // The rarest symbols get the longest codes.
    let mut sorted = keys.iter();
    for length in (1..=limit).rev() {
        for key in sorted.by_ref().take(counts[length] as usize) {
            lengths[(key & SYMBOL) as usize] = length as u8;
        }
    }
    debug_assert!(is_complete(lengths));
}

/// Returns whether the lengths are those of a complete prefix code (the Kraft sum is one).
pub(crate) fn is_complete(lengths: &[u8]) -> bool {
    let sum: u32 = lengths
        .iter()
        .filter(|&&length| length > 0)
        .map(|&length| 1 << (MAX_CODE_BITS - usize::from(length)))
        .sum();
    sum == 1 << MAX_CODE_BITS
}

/// Returns the number of codes of each length in the Huffman code for the frequencies in `keys`, which are ascending.
/// Lengths above [`MAX_CODE_BITS`] are counted as that length; the counts then exceed those of a prefix code.
fn lengths_of_sorted(keys: &[u32]) -> [u32; MAX_CODE_BITS + 1] {
    let leaves = keys.len();
    // Inner nodes in order of creation, so their weights ascend.
    let mut weights = [0u32; SYMBOLS];
    let mut parents = [0u16; SYMBOLS];
    // Number of leaves among each inner node's children.
    let mut leaf_children = [0u8; SYMBOLS];
    let (mut leaf, mut inner) = (0, 0);
    for made in 0..leaves - 1 {
        let mut weight = 0;
        for _ in 0..2 {
            let of_leaf = keys.get(leaf).map_or(u32::MAX, |key| key >> SYMBOL_BITS);
            if inner == made || of_leaf <= weights[inner] {
                weight += of_leaf;
                leaf_children[made] += 1;
                leaf += 1;
            } else {
                weight += weights[inner];
                parents[inner] = made as u16;
                inner += 1;
            }
        }
        weights[made] = weight;
    }
    let mut counts = [0; MAX_CODE_BITS + 1];
    // From the root down: a parent is created after its children.
    let mut depths = [0u16; SYMBOLS];
    for node in (0..leaves - 1).rev() {
        if node < leaves - 2 {
            depths[node] = depths[usize::from(parents[node])] + 1;
        }
        let length = usize::from(depths[node] + 1).min(MAX_CODE_BITS);
        counts[length] += u32::from(leaf_children[node]);
    }
    counts
}

/// Adjusts the counts to a code with at most `limit` bits.
fn limit_counts(counts: &mut [u32; MAX_CODE_BITS + 1], limit: usize) {
    for length in limit + 1..=MAX_CODE_BITS {
        counts[limit] += std::mem::take(&mut counts[length]);
    }
    // Kraft sum in units of the longest code.
    let mut sum: u32 = (1..=limit)
        .map(|length| counts[length] << (limit - length))
        .sum();
    while sum > 1 << limit {
        // Moves a leaf of maximum length up beside the deepest shorter leaf, which moves down by one.
        let mut length = limit - 1;
        while counts[length] == 0 {
            length -= 1;
        }
        counts[limit] -= 1;
        counts[length] -= 1;
        counts[length + 1] += 2;
        sum -= 1;
    }
}

/// Sets each symbol's code, bit-reversed for writing.
pub(crate) fn codes(lengths: &[u8], codes: &mut [u16]) {
    let mut counts = [0u16; MAX_CODE_BITS + 1];
    for &length in lengths {
        counts[usize::from(length)] += 1;
    }
    counts[0] = 0;
    let mut next = [0u16; MAX_CODE_BITS + 2];
    for length in 1..=MAX_CODE_BITS {
        next[length + 1] = (next[length] + counts[length]) << 1;
    }
    for (&length, code) in lengths.iter().zip(codes) {
        let of_length = &mut next[usize::from(length)];
        *code = if length == 0 {
            0
        } else {
            of_length.reverse_bits() >> (16 - u16::from(length))
        };
        *of_length = of_length.wrapping_add(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Fibonacci numbers as frequencies give the deepest possible code: one more bit for each symbol.
    #[test]
    fn limits_hold_and_codes_are_complete() {
        for (limit, symbols) in [(7, 19), (14, 30), (15, 30), (15, 286), (14, 286)] {
            let (mut a, mut b) = (1u32, 1u32);
            let freqs: Vec<u32> = (0..symbols)
                .map(|_| {
                    let next = a;
                    (a, b) = (b, a.saturating_add(b).min(1 << 22));
                    next
                })
                .collect();
            let mut lengths = vec![0; symbols];
            code_lengths(&freqs, limit, &mut lengths);
            assert!(is_complete(&lengths));
            assert!(lengths.iter().all(|&l| l > 0 && usize::from(l) <= limit));
            // Rarer symbols have longer codes.
            assert!(lengths.windows(2).all(|pair| pair[0] >= pair[1]));
        }
    }

    #[test]
    fn few_symbols_get_a_complete_code_too() {
        for used in [&[][..], &[0], &[5], &[0, 1], &[3, 29]] {
            let mut freqs = [0; 30];
            for &symbol in used {
                freqs[symbol] = 9;
            }
            let mut lengths = [7; 30];
            code_lengths(&freqs, 15, &mut lengths);
            assert!(is_complete(&lengths));
            assert!(used.iter().all(|&symbol| lengths[symbol] == 1));
            assert_eq!(lengths.iter().filter(|&&l| l > 0).count(), 2);
        }
    }

    /// The example of RFC 1951, 3.2.2.
    #[test]
    fn codes_are_those_of_the_format() {
        let lengths = [3, 3, 3, 3, 3, 2, 4, 4];
        let mut reversed = [0; 8];
        codes(&lengths, &mut reversed);
        let expected = [0b010, 0b011, 0b100, 0b101, 0b110, 0b00, 0b1110, 0b1111u16];
        for ((code, expected), length) in reversed.iter().zip(expected).zip(lengths) {
            assert_eq!(code.reverse_bits() >> (16 - length), expected);
        }
    }
}
