//! Small mutations of an input, determined by a seed, which run everywhere and need no coverage.

/// The xorshift64* generator.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Returns a number below `end`; 0 if `end` is 0.
    fn below(&mut self, end: usize) -> usize {
        (self.next() >> 11) as usize % end.max(1)
    }
}

/// Typical breakers of parsers: limits of ranges, signs, separators.
const TOKENS: [&[u8]; 20] = [
    b"0",
    b"-1",
    b"18446744073709551615",
    b"9223372036854775808",
    b"4294967296",
    b"1e999",
    b"\0",
    b"\xff",
    b"\xff\xff\xff\xff",
    b"\x7f\xff\xff\xff\xff\xff\xff\xff",
    b"\\",
    b"\"",
    b"/",
    b"../",
    b":",
    b"=",
    b"\n",
    b"null",
    b"[[[[",
    b"{}",
];

/// Returns `input` after a few mutations, with parts of `others`.
pub fn mutated(input: &[u8], others: &[Vec<u8>], seed: u64, longest: usize) -> Vec<u8> {
    let mut chance = Rng(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
    chance.next();
    let mut bytes = input.to_vec();
    for _ in 0..=chance.below(4) {
        let at = chance.below(bytes.len() + 1);
        let end = at + chance.below((bytes.len() - at).min(64) + 1);
        match chance.below(6) {
            0 if at < bytes.len() => bytes[at] ^= 1 << chance.below(8),
            1 if at < bytes.len() => bytes[at] = chance.next() as u8,
            2 => drop(bytes.drain(at..end)),
            3 => {
                let again = bytes[at..end].to_vec();
                bytes.splice(at..at, again);
            }
            4 => {
                let token = TOKENS[chance.below(TOKENS.len())];
                bytes.splice(at..end, token.iter().copied());
            }
            _ => {
                let other = &others[chance.below(others.len())];
                let from = chance.below(other.len() + 1);
                let to = from + chance.below((other.len() - from).min(256) + 1);
                bytes.splice(at..end, other[from..to].iter().copied());
            }
        }
    }
    bytes.truncate(longest);
    bytes
}
