//! A bit writer, least significant bit first (RFC 1951, 3.1.1).

/// Bytes after the last bit that [`Bits::flush`] may overwrite.
pub(crate) const SLACK: usize = 8;

/// Writes bits into a slice, which must be large enough including [`SLACK`].
pub(crate) struct Bits<'a> {
    out: &'a mut [u8],
    at: usize,
    word: u64,
    count: u32,
}

impl<'a> Bits<'a> {
    /// Starts after the `count` (less than 8) bits of `pending`.
    pub(crate) fn new(out: &'a mut [u8], pending: Pending) -> Self {
        Self {
            out,
            at: 0,
            word: u64::from(pending.bits),
            count: u32::from(pending.count),
        }
    }

    /// Appends the lowest `count` bits of `bits`; the bits above must be zero. At most 56 bits may be appended between
    /// two flushes.
    #[inline(always)]
    pub(crate) fn put(&mut self, bits: u64, count: u32) {
        debug_assert!(self.count + count <= 63 && bits >> count == 0);
        self.word |= bits << (self.count & 63);
        self.count += count;
    }

    /// Writes all complete bytes.
    #[inline(always)]
    pub(crate) fn flush(&mut self) {
        self.out[self.at..self.at + 8].copy_from_slice(&self.word.to_le_bytes());
        self.at += (self.count >> 3) as usize;
        self.word >>= self.count & !7;
        self.count &= 7;
    }

    /// Returns the number of bytes written, and the remaining bits.
    pub(crate) fn end(mut self) -> (usize, Pending) {
        self.flush();
        let pending = Pending {
            bits: self.word as u8,
            count: self.count as u8,
        };
        (self.at, pending)
    }
}

/// Bits that do not fill a byte yet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Pending {
    /// The bits; those above `count` are zero.
    pub(crate) bits: u8,
    /// Number of bits, less than 8.
    pub(crate) count: u8,
}
