//! Makes the index while a layer is made.

use super::{
    Entry, GZIP_HEAD, GZIP_TAIL, Kind, MAGIC, MAX_BLOCKS, MAX_ENTRIES, MAX_NAMES, MAX_PATH,
    MAX_STORED, MAX_SUBFIELD, Place, SKIPPABLE, SUBFIELD, max_names,
};
use crate::common::digest::Digest;
use crate::layer::codec::Compression;
use crate::layer::deflate::{self, Encoder};

/// Compressed size in bytes below which a layer is read whole as fast as with an index.
const MIN_LAYER: u64 = 4 << 20;
/// An index is at most this part of its layer; a larger one is left out.
const MAX_SHARE: u64 = 32;
/// Level of deflate for the list of entries.
const LEVEL: u32 = 2;
/// Bytes that are compressed at once.
const PIECE: usize = 1 << 20;

/// The list of entries, compressed.
pub(crate) struct Listing {
    encoder: Encoder,
    pending: Vec<u8>,
    packed: Vec<u8>,
    last: Vec<u8>,
    count: u64,
    length: u64,
    names: u64,
    fits: bool,
}

/// Returns whether a layer with a tar of `tar_size` bytes may get an index.
pub(crate) fn is_worth(compression: Compression, tar_size: u64) -> bool {
    compression != Compression::None && tar_size >= MIN_LAYER
}

impl Default for Listing {
    fn default() -> Self {
        Self {
            encoder: Encoder::new(LEVEL),
            pending: Vec::with_capacity(PIECE),
            packed: Vec::new(),
            last: Vec::new(),
            count: 0,
            length: 0,
            names: 0,
            fits: true,
        }
    }
}

impl Listing {
    /// Appends the next entry of the tar.
    pub(crate) fn push(&mut self, entry: Entry<'_>) {
        self.count += 1;
        self.names += (entry.path.len() + entry.link.len()) as u64;
        self.fits &= entry.path.len().max(entry.link.len()) <= MAX_PATH;
        if !self.fits || self.count > MAX_ENTRIES || self.names > MAX_NAMES {
            self.fits = false;
            return;
        }
        let out = &mut self.pending;
        let before = out.len();
        shared(out, entry.path, &self.last);
        out.push(entry.kind as u8);
        varint(out, entry.header / 512);
        match entry.kind {
            Kind::File => varint(out, entry.size),
            Kind::Hardlink => shared(out, entry.link, entry.path),
            Kind::Other | Kind::Directory => {}
        }
        self.length += (out.len() - before) as u64;
        self.last.clear();
        self.last.extend(entry.path);
        if self.pending.len() >= PIECE {
            self.pack();
        }
    }

    fn pack(&mut self) {
        self.encoder.encode(&self.pending, &mut self.packed);
        self.pending.clear();
    }
}

/// The stored blocks so far.
#[derive(Default)]
pub(crate) struct Blocks {
    bytes: Vec<u8>,
    count: u64,
}

impl Blocks {
    /// Appends the next block, of `length` stored bytes.
    pub(crate) fn push(&mut self, length: u64, digest: &Digest) {
        self.count += 1;
        if self.count <= MAX_BLOCKS {
            varint(&mut self.bytes, length);
            self.bytes.extend(digest.as_bytes());
        }
    }
}

/// Returns the bytes to append to a layer whose tar has `tar_size` bytes and which is complete after `stored` bytes, and
/// where they are. `None` if the layer gets no index: it is too small, or has too many entries, or the index would be more
/// than a 32nd of it.
pub(crate) fn append(
    listing: Listing,
    blocks: &Blocks,
    tar_size: u64,
    compression: Compression,
    stored: u64,
) -> Option<(Vec<u8>, Place)> {
    if stored < MIN_LAYER || !listing.fits || blocks.count > MAX_BLOCKS {
        return None;
    }
    let names = listing.names.max(listing.length);
    let (bytes, place) = make(listing, blocks, tar_size, compression, stored);
    let fits = place.length <= MAX_STORED
        && place.length * MAX_SHARE <= stored
        && names <= max_names(place.length);
    fits.then_some((bytes, place))
}

/// Like [`append`], whatever the sizes.
pub(crate) fn make(
    mut listing: Listing,
    blocks: &Blocks,
    tar_size: u64,
    compression: Compression,
    stored: u64,
) -> (Vec<u8>, Place) {
    listing.pack();
    let mut out = MAGIC.to_vec();
    varint(&mut out, tar_size);
    varint(&mut out, compression.head().len() as u64);
    out.extend(&blocks.bytes);
    varint(&mut out, listing.count);
    varint(&mut out, listing.length);
    out.extend(&listing.packed);
    out.extend(deflate::END);
    let bytes = wrap(&out, compression);
    let place = Place {
        offset: stored,
        length: bytes.len() as u64,
        digest: Digest::of(&bytes),
    };
    (bytes, place)
}

/// Puts the index where readers of the compressed tar pass over it.
fn wrap(index: &[u8], compression: Compression) -> Vec<u8> {
    let mut out = Vec::with_capacity(index.len() + index.len() / 1024 + 64);
    if compression == Compression::Zstd {
        out.extend(SKIPPABLE);
        out.extend((index.len() as u32).to_le_bytes());
        out.extend(index);
        return out;
    }
    for piece in index.chunks(MAX_SUBFIELD) {
        out.extend(GZIP_HEAD);
        out.extend((piece.len() as u16 + 4).to_le_bytes());
        out.extend(SUBFIELD);
        out.extend((piece.len() as u16).to_le_bytes());
        out.extend(piece);
        out.extend(GZIP_TAIL);
    }
    out
}

fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// Appends `bytes` as the number of bytes in common with `before`, and the rest.
fn shared(out: &mut Vec<u8>, bytes: &[u8], before: &[u8]) {
    let common = bytes.iter().zip(before).take_while(|(a, b)| a == b).count();
    let rest = &bytes[common..];
    varint(out, common as u64);
    varint(out, rest.len() as u64);
    out.extend(rest);
}
