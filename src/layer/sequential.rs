//! A layer whose tar comes in order from one thread, in the same blocks and the same compression as a save's.

use std::io::{self, Write};

use sha2::{Digest as _, Sha256};

use super::codec::{BLOCK, Codec, Compression};
use super::index::{self, Blocks, Listing, Place};
use crate::common::digest::{DiffId, Digest, HashingWriter};

/// Compresses what is written to it.
pub(crate) struct SequentialLayer<W> {
    compression: Compression,
    codec: Codec,
    block: Vec<u8>,
    crc: crc32fast::Hasher,
    tar: Sha256,
    tar_size: u64,
    stored: u64,
    listing: Option<Listing>,
    blocks: Blocks,
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
    /// Where the index is, if there is one.
    pub(crate) index: Option<Place>,
}

impl<W: Write> SequentialLayer<W> {
    /// Begins a layer at the default level. It gets an index if [`Self::list`] is called for each of its entries.
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
            stored: compression.head().len() as u64,
            listing: index::is_worth(compression, u64::MAX).then(Listing::default),
            blocks: Blocks::default(),
            out,
        })
    }

    /// Lists the entry that is written next.
    pub(crate) fn list(&mut self, entry: index::Entry<'_>) {
        if let Some(listing) = &mut self.listing {
            listing.push(entry);
        }
    }

    fn end_block(&mut self) -> io::Result<()> {
        if self.block.is_empty() {
            return Ok(());
        }
        self.tar.update(&self.block);
        self.crc.update(&self.block);
        self.tar_size += self.block.len() as u64;
        let compressed = self.codec.compress(&self.block);
        let stored = compressed.as_ref().unwrap_or(&self.block);
        self.out.write_all(stored)?;
        self.stored += stored.len() as u64;
        if self.listing.is_some() {
            self.blocks.push(stored.len() as u64, &Digest::of(stored));
        }
        self.block.clear();
        Ok(())
    }

    /// Ends the layer, whose tar has to be complete.
    pub(crate) fn finish(mut self) -> io::Result<SequentialDigests> {
        self.end_block()?;
        let tail = self.compression.tail(&self.crc, self.tar_size);
        self.out.write_all(&tail)?;
        let stored = self.stored + tail.len() as u64;
        let index = self.listing.take().and_then(|listing| {
            index::append(
                listing,
                &self.blocks,
                self.tar_size,
                self.compression,
                stored,
            )
        });
        if let Some((bytes, _)) = &index {
            self.out.write_all(bytes)?;
        }
        self.out.flush()?;
        let (_, digest, size) = self.out.complete();
        Ok(SequentialDigests {
            digest,
            size,
            diff_id: DiffId(Digest::finish(self.tar)),
            index: index.map(|(_, place)| place),
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
