//! The output of a matcher: literals and matches in order.

use super::symbols::{DISTS, END, LENGTH_SYMBOL, LITLEN, dist_symbol};

/// Literals with the match that follows them, or literals alone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Token {
    /// Number of literals.
    pub(crate) literals: u8,
    /// Length of the match less 3.
    pub(crate) length: u8,
    /// Distance of the match less one, or [`NO_MATCH`].
    pub(crate) dist: u16,
}

/// Value of the distance if no match follows the literals.
pub(crate) const NO_MATCH: u16 = 0xffff;
/// Bytes copied at once, even if there are fewer literals.
const COPY: usize = 16;
/// Maximum number of literals in a token.
const MAX_LITERALS: usize = 255;

/// Returns the total number of literals.
pub(crate) fn literals_of(tokens: &[Token]) -> usize {
    let count = |token: &Token| u32::from(token.literals);
    tokens.iter().map(count).sum::<u32>() as usize
}

/// Returns the total number of bytes in matches.
pub(crate) fn matched_by(tokens: &[Token]) -> usize {
    let count = |token: &Token| {
        let matched = u32::from(token.length) + 3;
        if token.dist == NO_MATCH { 0 } else { matched }
    };
    tokens.iter().map(count).sum::<u32>() as usize
}

/// The tokens of a range of input.
#[derive(Default)]
pub(crate) struct Tokens {
    list: Vec<Token>,
    len: usize,
    /// All literals in order, and room for excess bytes of a copy.
    literals: Vec<u8>,
    literals_len: usize,
}

impl Tokens {
    /// Prepares for `bytes` of input.
    pub(crate) fn reset(&mut self, bytes: usize) {
        // A match has at least 3 bytes, and only 255 literals need a token of their own.
        let tokens = bytes / 3 + 2;
        if self.list.len() < tokens {
            self.list.resize(tokens, Token::default());
        }
        if self.literals.len() < bytes + COPY {
            self.literals.resize(bytes + COPY, 0);
        }
        self.len = 0;
        self.literals_len = 0;
    }

    /// Returns the tokens.
    pub(crate) fn list(&self) -> &[Token] {
        &self.list[..self.len]
    }

    /// Returns the literals, followed by at least 4 unspecified bytes.
    pub(crate) fn literals(&self) -> &[u8] {
        &self.literals[..self.literals_len + COPY]
    }

    #[inline(always)]
    fn add(&mut self, token: Token) {
        self.list[self.len] = token;
        self.len += 1;
    }

    /// Adds a match preceded by `literals` literals, the first bytes of `data`.
    #[inline(always)]
    pub(crate) fn push(&mut self, data: &[u8], literals: usize, length: usize, dist: usize) {
        debug_assert!((3..=258).contains(&length) && (1..=32768).contains(&dist));
        let to = self.literals[self.literals_len..].first_chunk_mut::<COPY>();
        if let (Some(from), Some(to)) = (data.first_chunk::<COPY>(), to) {
            *to = *from;
        }
        let mut left = literals;
        if literals > COPY {
            left = self.push_many(data, literals);
        }
        self.literals_len += literals;
        self.add(Token {
            literals: left as u8,
            length: (length - 3) as u8,
            dist: (dist - 1) as u16,
        });
    }

    /// Copies `count` literals, and adds tokens for them until the rest fits into one token. Returns the length of the
    /// rest.
    #[inline(never)]
    fn push_many(&mut self, data: &[u8], count: usize) -> usize {
        self.literals[self.literals_len..][..count].copy_from_slice(&data[..count]);
        let mut left = count;
        while left > MAX_LITERALS {
            self.add(Token {
                literals: MAX_LITERALS as u8,
                length: 0,
                dist: NO_MATCH,
            });
            left -= MAX_LITERALS;
        }
        left
    }

    /// Adds literals, all of `data`, without a match.
    pub(crate) fn push_literals(&mut self, data: &[u8]) {
        if data.is_empty() {
            return;
        }
        let left = self.push_many(data, data.len());
        self.literals_len += data.len();
        self.add(Token {
            literals: left as u8,
            length: 0,
            dist: NO_MATCH,
        });
    }
}

/// Frequencies of the symbols of a block.
pub(crate) struct Frequencies {
    /// Of literals, the end of the block and lengths.
    pub(crate) litlen: [u32; LITLEN],
    /// Of distances.
    pub(crate) dists: [u32; DISTS],
}

impl Frequencies {
    /// Counts the symbols of a block with these tokens and literals, and its end.
    #[inline(never)]
    pub(crate) fn of(tokens: &[Token], literals: &[u8]) -> Self {
        // Several rows of counters, so that increments of the same counter seldom depend on each other.
        let mut rows = [[0u32; 256]; 4];
        let (fours, rest) = literals.as_chunks::<4>();
        for four in fours {
            for (row, &literal) in rows.iter_mut().zip(four) {
                row[usize::from(literal)] += 1;
            }
        }
        for &literal in rest {
            rows[0][usize::from(literal)] += 1;
        }
        let mut litlen = [0; LITLEN];
        for row in &rows {
            for (sum, count) in litlen.iter_mut().zip(row) {
                *sum += count;
            }
        }
        let mut lengths = [[0u32; 256]; 2];
        // Includes a counter for tokens without a match.
        let mut dists = [[0u32; DISTS]; 2];
        for (index, token) in tokens.iter().enumerate() {
            lengths[index & 1][usize::from(token.length)] += u32::from(token.dist != NO_MATCH);
            let symbol = dist_symbol(token.dist);
            dists[index & 1][usize::from(symbol) & (DISTS - 1)] += 1;
        }
        litlen[END] = 1;
        for row in &lengths {
            for (&symbol, count) in LENGTH_SYMBOL.iter().zip(row) {
                litlen[END + 1 + usize::from(symbol)] += count;
            }
        }
        let [mut sums, row] = dists;
        for (sum, count) in sums.iter_mut().zip(row) {
            *sum += count;
        }
        sums[DISTS - 1] = 0;
        Self {
            litlen,
            dists: sums,
        }
    }
}
