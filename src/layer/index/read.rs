//! Reads an index, which anyone may have written, and the blocks that it describes.

use std::collections::HashMap;
use std::io::Read as _;
use std::ops::Range;

use flate2::{Decompress, FlushDecompress};
use structured_zstd::decoding::{FrameDecoder, StreamingDecoder};

use super::{
    GZIP_HEAD, GZIP_TAIL, Kind, MAGIC, MAX_BLOCKS, MAX_ENTRIES, MAX_HEADER, MAX_PATH, Place,
    SKIPPABLE, SUBFIELD, max_names,
};
use crate::common::digest::Digest;
use crate::layer::codec::{BLOCK, Compression};
use crate::layer::tar::{END, RECORD};

/// Maximum length of a stored block in bytes; one that does not become smaller is a little larger.
const MAX_BLOCK: u64 = 2 * BLOCK;

/// Why an index, or a block that it describes, is not used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Unusable(pub(crate) &'static str);

/// A stored block.
#[derive(Clone, Copy, Debug)]
struct StoredBlock {
    offset: u64,
    length: u32,
    digest: Digest,
}

/// An entry of the tar.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Row<'a> {
    /// As in [`super::Entry`].
    pub(crate) entry: super::Entry<'a>,
    /// Offset of its first header in the tar, in bytes.
    pub(crate) offset: u64,
}

#[derive(Clone, Debug)]
struct StoredRow {
    path: Range<u32>,
    link: Range<u32>,
    kind: Kind,
    header: u32,
    size: u64,
}

/// An index that is consistent in itself: the blocks and the entries follow each other without gaps, each entry comes
/// after its directories, and no path is there twice.
pub struct Index {
    compression: Compression,
    tar_size: u64,
    blocks: Vec<StoredBlock>,
    max_names: u64,
    names: Vec<u8>,
    rows: Vec<StoredRow>,
}

impl Index {
    /// Parses the bytes of an index at `place` of its layer. It takes at most half a GiB of memory, and for an
    /// ordinary index twenty times its length.
    pub fn parse(bytes: &[u8], place: &Place) -> Result<Self, Unusable> {
        if bytes.len() as u64 != place.length || Digest::of(bytes) != place.digest {
            return Err(Unusable("its digest is not that of the annotation"));
        }
        let (compression, index) = unwrap(bytes)?;
        let mut input = Input(&index);
        if input.take(MAGIC.len())? != MAGIC {
            return Err(Unusable("its version is unknown"));
        }
        let tar_size = input.varint()?;
        let blocks = blocks(&mut input, tar_size, place.offset)?;
        let (count, length) = (input.varint()?, input.varint()?);
        if count > MAX_ENTRIES || length > max_names(place.length) {
            return Err(Unusable("it exceeds a limit"));
        }
        let listing = inflate(input.0, length as usize)?;
        let mut made = Self {
            compression,
            tar_size,
            blocks,
            max_names: max_names(place.length),
            names: Vec::new(),
            rows: Vec::new(),
        };
        made.list(&listing, count)?;
        drop(listing);
        made.check()?;
        Ok(made)
    }

    fn list(&mut self, listing: &[u8], count: u64) -> Result<(), Unusable> {
        let mut input = Input(listing);
        let mut last = 0..0;
        for _ in 0..count {
            let path = self.shared(&mut input, &last)?;
            let kind = match input.take(1)? {
                [0] => Kind::Other,
                [1] => Kind::File,
                [2] => Kind::Hardlink,
                [3] => Kind::Directory,
                _ => return Err(Unusable("an entry has an unknown type")),
            };
            let header = input.varint()?.saturating_mul(RECORD);
            if header == 0 || header > MAX_HEADER {
                return Err(Unusable("a header exceeds a limit"));
            }
            let (mut size, mut link) = (0, 0..0);
            match kind {
                Kind::File => size = input.varint()?,
                Kind::Hardlink => link = self.shared(&mut input, &path)?,
                Kind::Other | Kind::Directory => {}
            }
            last = path.clone();
            self.rows.push(StoredRow {
                path,
                link,
                kind,
                header: header as u32,
                size,
            });
        }
        if input.0.is_empty() {
            Ok(())
        } else {
            Err(Unusable("something follows the last entry"))
        }
    }

    /// Takes a name that has bytes in common with `before`.
    fn shared(
        &mut self,
        input: &mut Input<'_>,
        before: &Range<u32>,
    ) -> Result<Range<u32>, Unusable> {
        let common = input.length(before.len())?;
        let rest = input.length(MAX_PATH)?;
        let rest = input.take(rest)?;
        let begin = self.names.len();
        let end = begin + common + rest.len();
        if common + rest.len() > MAX_PATH || end as u64 > self.max_names {
            return Err(Unusable("its names exceed a limit"));
        }
        let from = before.start as usize;
        self.names.extend_from_within(from..from + common);
        self.names.extend_from_slice(rest);
        Ok(begin as u32..end as u32)
    }

    fn check(&self) -> Result<(), Unusable> {
        let mut seen: HashMap<&[u8], Kind> = HashMap::with_capacity(self.rows.len());
        let mut end = 0u64;
        for row in &self.rows {
            let path = self.name(&row.path);
            let plain = |part: &[u8]| !matches!(part, b"" | b"." | b"..") && !part.contains(&0);
            if !path.is_empty() && !path.split(|&b| b == b'/').all(plain) {
                return Err(Unusable("a path is not in its plain form"));
            }
            let parent = path.iter().rposition(|&b| b == b'/').map(|at| &path[..at]);
            if parent.is_some_and(|parent| seen.get(parent) != Some(&Kind::Directory)) {
                return Err(Unusable("an entry comes before its directory"));
            }
            if seen.insert(path, row.kind).is_some() {
                return Err(Unusable("a path is there twice"));
            }
            // What such a link leads to is not read with it.
            if row.kind == Kind::Hardlink && seen.get(self.name(&row.link)) == Some(&Kind::Hardlink)
            {
                return Err(Unusable("a hard link leads to a hard link"));
            }
            let next = row.size.checked_next_multiple_of(RECORD);
            end = next
                .and_then(|size| end.checked_add(size)?.checked_add(row.header.into()))
                .ok_or(Unusable("its sizes exceed a limit"))?;
        }
        if end.checked_add(END) == Some(self.tar_size) {
            Ok(())
        } else {
            Err(Unusable("its entries do not fill the tar"))
        }
    }

    fn name(&self, range: &Range<u32>) -> &[u8] {
        let range = range.start as usize..range.end as usize;
        self.names.get(range).unwrap_or_default()
    }

    /// Iterates over the entries in the order of the tar.
    pub(crate) fn rows(&self) -> impl Iterator<Item = Row<'_>> {
        let mut end = 0;
        self.rows.iter().map(move |row| {
            let offset = end;
            end += u64::from(row.header) + row.size.next_multiple_of(RECORD);
            Row {
                entry: super::Entry {
                    path: self.name(&row.path),
                    kind: row.kind,
                    header: row.header.into(),
                    size: row.size,
                    link: self.name(&row.link),
                },
                offset,
            }
        })
    }

    /// Returns offset and length in the stored layer of the blocks `numbers`, which must exist.
    pub(crate) fn stored(&self, numbers: Range<usize>) -> Option<(u64, u64)> {
        let blocks = self.blocks.get(numbers)?;
        let length = blocks.iter().map(|block| u64::from(block.length)).sum();
        Some((blocks.first()?.offset, length))
    }

    /// Takes a block's bytes from the front of `stored` and returns the bytes of the tar in it.
    ///
    /// Fails if the bytes do not have the digest that the index says, or are not a block.
    pub(crate) fn unpack(&self, number: usize, stored: &mut &[u8]) -> Result<Vec<u8>, Unusable> {
        let block = self.blocks.get(number);
        let cut = block.and_then(|block| stored.split_at_checked(block.length as usize));
        let Some((block, (bytes, rest))) = block.zip(cut) else {
            return Err(Unusable("a block is not there"));
        };
        *stored = rest;
        if Digest::of(bytes) != block.digest {
            return Err(Unusable("a block does not have its digest"));
        }
        let size = (self.tar_size - number as u64 * BLOCK).min(BLOCK) as usize;
        match self.compression {
            Compression::Zstd => unpack_zstd(bytes, size),
            Compression::Gzip | Compression::None => inflate(bytes, size),
        }
    }
}

fn blocks(input: &mut Input<'_>, tar_size: u64, end: u64) -> Result<Vec<StoredBlock>, Unusable> {
    let mut offset = input.varint()?;
    let count = tar_size.div_ceil(BLOCK);
    if count > MAX_BLOCKS || offset > end {
        return Err(Unusable("its blocks exceed a limit"));
    }
    let mut blocks = Vec::new();
    for _ in 0..count {
        let length = input.varint()?;
        let digest = Digest::from_raw(input.take(32)?).ok_or(Unusable("a digest is missing"))?;
        if length == 0 || length > MAX_BLOCK {
            return Err(Unusable("a block exceeds a limit"));
        }
        blocks.push(StoredBlock {
            offset,
            length: length as u32,
            digest,
        });
        offset += length;
    }
    if offset <= end {
        Ok(blocks)
    } else {
        Err(Unusable("its blocks are longer than the layer"))
    }
}

/// Takes the index out of the gzip members or the frame.
fn unwrap(bytes: &[u8]) -> Result<(Compression, Vec<u8>), Unusable> {
    let mut input = Input(bytes);
    let mut index = Vec::with_capacity(bytes.len());
    if bytes.starts_with(&SKIPPABLE) {
        input.take(SKIPPABLE.len())?;
        let length = input.little_endian(4)?;
        if length != input.0.len() {
            return Err(Unusable("its frame has another length"));
        }
        index.extend(input.0);
        return Ok((Compression::Zstd, index));
    }
    while !input.0.is_empty() {
        let head = input.take(GZIP_HEAD.len())?;
        let extra = input.little_endian(2)?;
        let name = input.take(SUBFIELD.len())?;
        let length = input.little_endian(2)?;
        if head != GZIP_HEAD || name != SUBFIELD || extra != length + 4 {
            return Err(Unusable("it is not in gzip members or a frame of its own"));
        }
        index.extend(input.take(length)?);
        if input.take(GZIP_TAIL.len())? != GZIP_TAIL {
            return Err(Unusable("a gzip member of it is not empty"));
        }
    }
    Ok((Compression::Gzip, index))
}

/// Inflates to exactly `size` bytes.
fn inflate(packed: &[u8], size: usize) -> Result<Vec<u8>, Unusable> {
    // One more byte shows that there would be more. Memory grows with what is there, not with what was announced.
    let (mut out, mut inflater) = (Vec::new(), Decompress::new(false));
    while out.len() <= size {
        let begin = out.len();
        out.resize((begin + (1 << 20)).min(size + 1), 0);
        let (taken, made) = (inflater.total_in() as usize, inflater.total_out());
        let status = inflater.decompress(
            packed.get(taken..).unwrap_or_default(),
            out.get_mut(begin..).unwrap_or_default(),
            FlushDecompress::None,
        );
        status.map_err(|_| Unusable("what is compressed is damaged"))?;
        let made = (inflater.total_out() - made) as usize;
        out.truncate(begin + made);
        if made == 0 {
            break;
        }
    }
    if out.len() == size {
        Ok(out)
    } else {
        Err(Unusable("what is compressed has another size"))
    }
}

fn unpack_zstd(frame: &[u8], size: usize) -> Result<Vec<u8>, Unusable> {
    let damaged = || Unusable("what is compressed is damaged");
    let mut decoder = FrameDecoder::new();
    decoder
        .set_max_window_size(MAX_BLOCK)
        .map_err(|_| damaged())?;
    let mut out = Vec::new();
    StreamingDecoder::new_with_decoder(frame, decoder)
        .take(size as u64 + 1)
        .read_to_end(&mut out)
        .map_err(|_| damaged())?;
    if out.len() == size {
        Ok(out)
    } else {
        Err(Unusable("what is compressed has another size"))
    }
}

/// What has not been parsed yet.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn take(&mut self, length: usize) -> Result<&'a [u8], Unusable> {
        let cut = self.0.split_at_checked(length);
        let (taken, rest) = cut.ok_or(Unusable("it is truncated"))?;
        self.0 = rest;
        Ok(taken)
    }

    fn little_endian(&mut self, length: usize) -> Result<usize, Unusable> {
        let bytes = self.take(length)?.iter().rev();
        Ok(bytes.fold(0, |value, &byte| value << 8 | usize::from(byte)))
    }

    fn varint(&mut self) -> Result<u64, Unusable> {
        let mut value = 0;
        for shift in (0..63).step_by(7) {
            let byte = self.take(1)?.first().copied().unwrap_or_default();
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err(Unusable("a number exceeds a limit"))
    }

    /// Returns a number that is at most `limit`.
    fn length(&mut self, limit: usize) -> Result<usize, Unusable> {
        match usize::try_from(self.varint()?) {
            Ok(length) if length <= limit => Ok(length),
            _ => Err(Unusable("a name exceeds a limit")),
        }
    }
}
