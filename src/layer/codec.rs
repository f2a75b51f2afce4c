//! Compression of blocks, each on its own, so that any thread can do any of them and the sum is one valid stream.
//!
//! gzip (RFC 1952): one member; every block is deflated without history and ended by a sync flush (an empty
//! stored block), so that blocks simply follow one another; the checksums are combined. zstd (RFC 8878): one
//! frame a block; frames may follow one another.

use flate2::{Compress, FlushCompress, Status};
use structured_zstd::encoding::{CompressionLevel, FrameCompressor};

/// How a layer is compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    /// `application/vnd.oci.image.layer.v1.tar+gzip`: everything reads it.
    Gzip,
    /// `application/vnd.oci.image.layer.v1.tar+zstd`.
    Zstd,
    /// `application/vnd.oci.image.layer.v1.tar`.
    None,
}

impl Compression {
    /// Media type of a layer compressed so (image-spec `layer.md`).
    pub fn media_type(self) -> &'static str {
        match self {
            Self::Gzip => "application/vnd.oci.image.layer.v1.tar+gzip",
            Self::Zstd => "application/vnd.oci.image.layer.v1.tar+zstd",
            Self::None => "application/vnd.oci.image.layer.v1.tar",
        }
    }

    /// Levels that the codec has.
    pub fn levels(self) -> std::ops::RangeInclusive<u32> {
        match self {
            Self::Gzip => 1..=9,
            Self::Zstd => 1..=19,
            Self::None => 0..=0,
        }
    }

    /// The level used when none is asked for.
    pub fn default_level(self) -> u32 {
        match self {
            Self::Gzip => 4,
            Self::Zstd => 2,
            Self::None => 0,
        }
    }

    /// What stands before the first block.
    pub(super) fn head(self) -> &'static [u8] {
        match self {
            // Deflate, no flags, no time, no level, unknown system: the same bytes everywhere.
            Self::Gzip => &[0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 255],
            Self::Zstd | Self::None => &[],
        }
    }

    /// What stands after the last block, given the checksum over the tar.
    pub(super) fn tail(self, crc: &crc32fast::Hasher, tar_size: u64) -> Vec<u8> {
        match self {
            Self::Gzip => {
                // An empty final block, then CRC-32 and the size modulo 2^32.
                let mut tail = vec![3, 0];
                tail.extend(crc.clone().finalize().to_le_bytes());
                tail.extend((tar_size as u32).to_le_bytes());
                tail
            }
            Self::Zstd | Self::None => Vec::new(),
        }
    }
}

/// A block that could not be compressed.
#[derive(Debug, thiserror::Error)]
#[error("the compressor failed: {0}")]
pub struct CodecError(String);

/// The state of one worker's compressor, reused from block to block.
pub enum Codec {
    /// Deflate; head and tail of the member are the stream's.
    Gzip(Compress),
    /// A frame a block.
    Zstd(Box<FrameCompressor>),
    /// Blocks go out as they are.
    None,
}

impl Codec {
    /// `level` within [`Compression::levels`].
    pub fn new(compression: Compression, level: u32) -> Self {
        match compression {
            Compression::Gzip => Self::Gzip(Compress::new(flate2::Compression::new(level), false)),
            Compression::Zstd => {
                let level = CompressionLevel::from_level(i32::try_from(level).unwrap_or(1));
                Self::Zstd(Box::new(FrameCompressor::new(level)))
            }
            Compression::None => Self::None,
        }
    }

    /// Compresses one block. `None` means that the block goes out as it is.
    pub fn compress(&mut self, block: &[u8]) -> Result<Option<Vec<u8>>, CodecError> {
        match self {
            Self::Gzip(compress) => {
                compress.reset();
                let mut out = Vec::with_capacity(block.len() / 2 + 1024);
                loop {
                    let taken = compress.total_in() as usize;
                    let room = out.capacity() - out.len();
                    let status = compress
                        .compress_vec(&block[taken..], &mut out, FlushCompress::Sync)
                        .map_err(|e| CodecError(e.to_string()))?;
                    // A flush is complete only when the compressor left room in the output, or had nothing to add.
                    let room_left = out.len() < out.capacity() || status == Status::BufError;
                    if compress.total_in() as usize == block.len() && room_left {
                        break;
                    }
                    if status == Status::BufError && room > 64 {
                        return Err(CodecError("deflate makes no progress".to_owned()));
                    }
                    out.reserve(block.len() / 4 + 1024);
                }
                Ok(Some(out))
            }
            Self::Zstd(compressor) => {
                let mut out = Vec::with_capacity(block.len() / 2 + 1024);
                compressor.compress_independent_frame_into(block, &mut out);
                Ok(Some(out))
            }
            Self::None => Ok(None),
        }
    }
}
