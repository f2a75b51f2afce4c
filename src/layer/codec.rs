//! Compresses each block independently, so that any thread can compress any block and the concatenation is one valid
//! stream.
//!
//! gzip (RFC 1952): one member. Every block is deflated without history and ends on a byte boundary, so that blocks can
//! be concatenated; their checksums are combined. With the preceding 32 KiB as history, a session's layer would be 0.3
//! % smaller, but a worker would have to read them again from files that may change between the two reads. zstd (RFC
//! 8878): one frame per block; frames may be concatenated. In both formats, a block that would not become smaller is
//! stored.

use super::deflate::{self, Encoder};
use oci_client::manifest::{IMAGE_LAYER_GZIP_MEDIA_TYPE, IMAGE_LAYER_MEDIA_TYPE};
use structured_zstd::encoding::{CompressionLevel, CompressionParameters, FrameCompressor};

/// Tar bytes of a block. Part of the format and independent of `--jobs`: the same plan gives the same bytes.
pub(crate) const BLOCK: u64 = 1 << 20;

/// The compression of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    /// `application/vnd.oci.image.layer.v1.tar+gzip`; supported by all consumers.
    Gzip,
    /// `application/vnd.oci.image.layer.v1.tar+zstd`.
    Zstd,
    /// `application/vnd.oci.image.layer.v1.tar`.
    None,
}

impl Compression {
    /// Returns the media type of a layer compressed this way (image-spec `layer.md`).
    pub(crate) fn media_type(self) -> &'static str {
        match self {
            Self::Gzip => IMAGE_LAYER_GZIP_MEDIA_TYPE,
            Self::Zstd => "application/vnd.oci.image.layer.v1.tar+zstd",
            Self::None => IMAGE_LAYER_MEDIA_TYPE,
        }
    }

    /// Returns the levels of the codec.
    pub(crate) fn levels(self) -> std::ops::RangeInclusive<u32> {
        match self {
            Self::Gzip => 1..=9,
            Self::Zstd => 1..=19,
            Self::None => 0..=0,
        }
    }

    /// Returns the level that is used by default.
    pub fn default_level(self) -> u32 {
        match self {
            Self::Gzip => 2,
            Self::Zstd => 1,
            Self::None => 0,
        }
    }

    /// Returns the bytes that precede the first block.
    pub(crate) fn head(self) -> &'static [u8] {
        match self {
            // Deflate, no flags, no time, no level, unknown operating system: the same bytes on every machine.
            Self::Gzip => &[0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 255],
            Self::Zstd | Self::None => &[],
        }
    }

    /// Returns the bytes that follow the last block, given the checksum of the tar.
    pub(crate) fn tail(self, crc: &crc32fast::Hasher, tar_size: u64) -> Vec<u8> {
        match self {
            Self::Gzip => {
                // An empty final block, then the CRC-32 and the size modulo 2^32.
                let mut tail = deflate::END.to_vec();
                tail.extend(crc.clone().finalize().to_le_bytes());
                tail.extend((tar_size as u32).to_le_bytes());
                tail
            }
            Self::Zstd | Self::None => Vec::new(),
        }
    }
}

/// The compressor of one worker, reused for every block.
pub(crate) enum Codec {
    /// Deflate; the stream writes the header and trailer of the gzip member.
    Gzip(Box<Encoder>),
    /// One zstd frame per block.
    Zstd(Box<FrameCompressor>),
    /// Blocks are not compressed.
    None,
}

impl Codec {
    /// Creates a compressor; `level` must be within [`Compression::levels`].
    pub(crate) fn new(compression: Compression, level: u32) -> Self {
        match compression {
            Compression::Gzip => Self::Gzip(Box::new(Encoder::new(level))),
            Compression::Zstd => Self::Zstd(Box::new(zstd(level))),
            Compression::None => Self::None,
        }
    }

    /// Compresses one block. Returns `None` if the block is to be written as it is.
    pub(crate) fn compress(&mut self, block: &[u8]) -> Option<Vec<u8>> {
        if !matches!(self, Self::None) && is_incompressible(block) {
            return Some(match self {
                Self::Gzip(_) => stored_deflate(block),
                Self::Zstd(_) | Self::None => stored_zstd(block),
            });
        }
        let packed = || Vec::with_capacity(block.len() / 2 + 1024);
        match self {
            Self::Gzip(encoder) => {
                let mut out = packed();
                encoder.encode(block, &mut out);
                Some(out)
            }
            Self::Zstd(compressor) => {
                let mut out = packed();
                compressor.compress_independent_frame_into(block, &mut out);
                Some(out)
            }
            Self::None => None,
        }
    }
}

/// Returns a compressor of zstd frames. Level 1 has a larger table than elsewhere (2^15 instead of 2^14 positions): a
/// session's layer becomes 3 % smaller, in 4 % more time. The window is a block.
fn zstd(level: u32) -> FrameCompressor {
    let base = CompressionLevel::from_level(i32::try_from(level).unwrap_or(1));
    let mut compressor = FrameCompressor::new(base);
    if level == 1 {
        let larger = CompressionParameters::builder(base)
            .hash_log(15)
            .window_log(20);
        // Both are within their bounds.
        if let Ok(parameters) = larger.build() {
            compressor.set_parameters(&parameters);
        }
    }
    compressor
}

/// Bytes of a sample, and the number of samples taken from a block.
const SAMPLE: usize = 4 << 10;
const SAMPLES: usize = 16;
/// Entropy in bits per byte from which a block is tested by compressing a sample. Random data has 7.997 in a sample of
/// this size; text 4 to 5, programs 6, numeric data up to 7.5.
const HIGH_ENTROPY: f64 = 7.9;
/// Percentage that a compressed high-entropy sample must not exceed for the whole block to be compressed.
const MAX_SAMPLE_PERCENT: usize = 99;

/// Returns whether a block is already compressed or encrypted (archives, images): compressing it would take the longest
/// and gain nothing. The entropy of the byte frequencies is tested first, which costs next to nothing; a block with
/// high entropy is then tested by compressing a sample, since random-looking data may repeat.
fn is_incompressible(block: &[u8]) -> bool {
    if block.len() < SAMPLE * SAMPLES {
        return false;
    }
    let stride = block.len() / SAMPLES;
    let samples = || block.chunks_exact(stride).map(|chunk| &chunk[..SAMPLE]);
    let mut counts = [0u32; 256];
    for byte in samples().flatten() {
        counts[usize::from(*byte)] += 1;
    }
    if entropy(&counts) < HIGH_ENTROPY {
        return false;
    }
    let mut sample = Vec::with_capacity(SAMPLE * SAMPLES);
    sample.extend(samples().flatten());
    let mut packed = Vec::with_capacity(sample.len() + sample.len() / 8);
    Encoder::new(1).encode(&sample, &mut packed);
    packed.len() * 100 > sample.len() * MAX_SAMPLE_PERCENT
}

/// Returns the entropy in bits per byte, given how often each value occurs.
fn entropy(counts: &[u32; 256]) -> f64 {
    let total = f64::from(counts.iter().sum::<u32>().max(1));
    let of = |&count: &u32| {
        let share = f64::from(count) / total;
        -share * share.log2()
    };
    counts.iter().filter(|&&count| count > 0).map(of).sum()
}

fn stored_deflate(block: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(block.len() + block.len() / 1024 + 16);
    deflate::store(block, &mut out);
    out
}

/// Returns one frame of raw blocks (RFC 8878, 3.1.1): a single segment with a four-byte size and no checksum.
fn stored_zstd(block: &[u8]) -> Vec<u8> {
    const MAX_RAW_BLOCK: usize = 128 << 10;
    let mut out = Vec::with_capacity(block.len() + 9 + 3 * block.len().div_ceil(MAX_RAW_BLOCK));
    out.extend(0xFD2F_B528_u32.to_le_bytes());
    out.push(0b1010_0000);
    out.extend((block.len() as u32).to_le_bytes());
    let mut pieces = block.chunks(MAX_RAW_BLOCK).peekable();
    while let Some(piece) = pieces.next() {
        let header = (piece.len() as u32) << 3 | u32::from(pieces.peek().is_none());
        out.extend(&header.to_le_bytes()[..3]);
        out.extend(piece);
    }
    out
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Returns bytes that do not become smaller, the same for a seed (xorshift64).
    pub(crate) fn noise(len: usize, seed: u64) -> Vec<u8> {
        let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        let next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 32) as u8
        };
        std::iter::repeat_with(next).take(len).collect()
    }

    #[test]
    fn what_is_packed_already_is_stored_and_nothing_else() {
        let packed = noise(1 << 20, 1);
        assert!(is_incompressible(&packed));
        let text = "def upperdeck(): return None\n".repeat(40_000);
        assert!(!is_incompressible(text.as_bytes()));
        // All byte values are equally frequent, but the data repeat.
        let repeats = noise(1 << 12, 1).repeat(256);
        assert!(!is_incompressible(&repeats));
        // Half of the block is compressible.
        let half = [&packed[..1 << 19], &vec![b'x'; 1 << 19]].concat();
        assert!(!is_incompressible(&half));
        // Numeric data: the exponents of floats are similar.
        let floats: Vec<u8> = noise(1 << 20, 1)
            .chunks_exact(4)
            .flat_map(|b| (f32::from(b[0]) + f32::from(b[1]) / 256.0).to_le_bytes())
            .collect();
        assert!(!is_incompressible(&floats));
        assert!(!is_incompressible(&[]));
        for compression in [Compression::Gzip, Compression::Zstd] {
            let mut codec = Codec::new(compression, compression.default_level());
            let stored = codec.compress(&packed).unwrap_or_default();
            assert!(stored.len() > packed.len(), "stored, not tried");
            assert!(stored.len() < packed.len() + 100);
        }
    }
}
