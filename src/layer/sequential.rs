//! A layer whose tar comes in order from one thread, in the same blocks and the same compression as a save's.

use std::io::{self, Write};

use sha2::{Digest as _, Sha256};

use super::codec::{Codec, Compression};
use super::stream::BLOCK;
use crate::common::digest::{DiffId, Digest, HashingWriter};

/// Compresses what is written to it.
pub(crate) struct SequentialLayer<W> {
    compression: Compression,
    codec: Codec,
    block: Vec<u8>,
    crc: crc32fast::Hasher,
    tar: Sha256,
    tar_size: u64,
    out: HashingWriter<W>,
}

/// A layer that is complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SequentialDigests {
    /// Digest of the compressed bytes.
    pub(crate) digest: Digest,
    /// Compressed size in bytes.
    pub(crate) size: u64,
    /// Digest of the tar.
    pub(crate) diff_id: DiffId,
}

impl<W: Write> SequentialLayer<W> {
    /// Begins a layer at the default level.
    pub(crate) fn new(out: W, compression: Compression) -> io::Result<Self> {
        let mut out = HashingWriter::new(out);
        out.write_all(compression.head())?;
        Ok(Self {
            compression,
            codec: Codec::new(compression, compression.default_level()),
            block: Vec::with_capacity(BLOCK as usize),
            crc: crc32fast::Hasher::new(),
            tar: Sha256::new(),
            tar_size: 0,
            out,
        })
    }

    fn end_block(&mut self) -> io::Result<()> {
        if self.block.is_empty() {
            return Ok(());
        }
        self.tar.update(&self.block);
        self.crc.update(&self.block);
        self.tar_size += self.block.len() as u64;
        match self.codec.compress(&self.block) {
            Some(compressed) => self.out.write_all(&compressed)?,
            None => self.out.write_all(&self.block)?,
        }
        self.block.clear();
        Ok(())
    }

    /// Ends the layer, whose tar has to be complete.
    pub(crate) fn finish(mut self) -> io::Result<SequentialDigests> {
        self.end_block()?;
        let tail = self.compression.tail(&self.crc, self.tar_size);
        self.out.write_all(&tail)?;
        self.out.flush()?;
        let (_, digest, size) = self.out.complete();
        Ok(SequentialDigests {
            digest,
            size,
            diff_id: DiffId(Digest::finish(self.tar)),
        })
    }
}

impl<W: Write> Write for SequentialLayer<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let taken = bytes.len().min(BLOCK as usize - self.block.len());
        self.block.extend_from_slice(&bytes[..taken]);
        if self.block.len() as u64 == BLOCK {
            self.end_block()?;
        }
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
