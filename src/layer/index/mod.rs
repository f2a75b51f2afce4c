//! The block index of a layer: which entry of the tar begins where, and where the block with it is in the stored layer.
//! With it, one file is read without the rest of the layer.
//!
//! The index lies behind the last byte of the compressed tar, where every reader passes over it: in gzip (RFC 1952) as
//! empty members with the index in the extra field of their headers, cut into pieces because such a field has at most
//! 65,535 bytes; in zstd (RFC 8878) as a skippable frame. The tar, and with it the diff ID, is the same as without an
//! index. An uncompressed layer has no such place and no index.
//!
//! The annotation [`ANNOTATION`] of the layer's descriptor says where the index is ([`Place`]) and has its digest, so
//! that each byte that is read is verified: manifest, annotation, index, block.
//!
//! The format, version 1. Integers are little-endian base-128 (LEB128) but for the magic and the digests:
//!
//! ```text
//! magic "udindex1"
//! size of the tar; offset of the first block in the stored layer
//! for each block of 1 MiB of the tar: stored length; SHA-256 of the stored bytes (32 bytes)
//! number of entries; length of what follows, uncompressed
//! raw deflate: for each entry, in the order of the tar:
//!     bytes that its path has in common with the one before; length of the rest; the rest
//!     kind (one byte: 0 other, 1 file, 2 hard link, 3 directory)
//!     length of its headers in 512 bytes; file: size of the content
//!     hard link: bytes that the target has in common with the path; length of the rest; the rest
//! ```
//!
//! A path has no slash at its end; that of the root is empty. Headers include extended ones. What is in the tar follows
//! without gaps, so the offsets are the sums of the lengths.

mod read;
mod write;

use std::fmt;
use std::str::FromStr;

use crate::common::digest::Digest;

pub(crate) use read::Row;
pub use read::{Index, Unusable};
#[cfg(test)]
pub(crate) use write::make;
pub(crate) use write::{Blocks, Listing, append, is_worth};

/// Annotation of a layer's descriptor: where its index is. The value is that of [`Place`].
pub const ANNOTATION: &str = "upperdeck.index";

const MAGIC: &[u8; 8] = b"udindex1";
/// Maximum length of the stored index in bytes.
pub(crate) const MAX_STORED: u64 = 64 << 20;
/// Maximum number of blocks: a tar of 1 TiB.
const MAX_BLOCKS: u64 = 1 << 20;
/// Maximum number of entries.
const MAX_ENTRIES: u64 = 1 << 21;
/// Maximum length of all paths and targets of hard links together, and of the list of entries, in bytes; see
/// [`max_names`].
const MAX_NAMES: u64 = 128 << 20;
/// Maximum length of a path in bytes.
const MAX_PATH: usize = 64 << 10;
/// Maximum length of the headers of one entry in bytes: two extended headers of 1 MiB.
const MAX_HEADER: u64 = 4 << 20;

/// Bytes in a gzip header before the length of the extra field: deflate, an extra field, no time, no level, unknown
/// operating system.
const GZIP_HEAD: [u8; 10] = [0x1f, 0x8b, 8, 4, 0, 0, 0, 0, 0, 255];
/// Name of the subfield of the extra field.
const SUBFIELD: [u8; 2] = *b"UD";
/// Maximum length of the subfield's data.
const MAX_SUBFIELD: usize = 0xffff - 4;
/// An empty deflate stream, then CRC-32 and size of nothing.
const GZIP_TAIL: [u8; 10] = [3, 0, 0, 0, 0, 0, 0, 0, 0, 0];
/// Magic number of the skippable frame.
const SKIPPABLE: [u8; 4] = 0x184D_2A5B_u32.to_le_bytes();

/// Returns the maximum length of all paths and targets of hard links together, and of the list of entries, in an index of
/// `length` bytes.
fn max_names(length: u64) -> u64 {
    MAX_NAMES.min((1 << 20) + 64 * length)
}

/// The type of an entry, as far as the index needs it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Anything else: no content follows.
    Other,
    /// A regular file, or a whiteout or opaque marker.
    File,
    /// A hard link.
    Hardlink,
    /// A directory.
    Directory,
}

/// An entry of the tar.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry<'a> {
    /// Its name, without a slash at its end.
    pub(crate) path: &'a [u8],
    /// Its type.
    pub(crate) kind: Kind,
    /// Length of its headers in bytes, extended ones included.
    pub(crate) header: u64,
    /// Size of its content in bytes.
    pub(crate) size: u64,
    /// Target of a hard link.
    pub(crate) link: &'a [u8],
}

/// Where an index is in its layer, as text `OFFSET+LENGTH DIGEST`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Place {
    /// Offset in the stored layer, in bytes.
    pub offset: u64,
    /// Length in bytes, with the gzip members or the frame around it.
    pub length: u64,
    /// Digest of these bytes.
    pub digest: Digest,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}+{} {}", self.offset, self.length, self.digest)
    }
}

impl FromStr for Place {
    type Err = Unusable;

    fn from_str(text: &str) -> Result<Self, Unusable> {
        let bad = || Unusable("its annotation is not OFFSET+LENGTH DIGEST");
        let (at, digest) = text.split_once(' ').ok_or_else(bad)?;
        let (offset, length) = at.split_once('+').ok_or_else(bad)?;
        Ok(Self {
            offset: offset.parse().map_err(|_| bad())?,
            length: length.parse().map_err(|_| bad())?,
            digest: digest.parse().map_err(|_| bad())?,
        })
    }
}

impl TryFrom<String> for Place {
    type Error = Unusable;

    fn try_from(text: String) -> Result<Self, Unusable> {
        text.parse()
    }
}

impl From<Place> for String {
    fn from(place: Place) -> Self {
        place.to_string()
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Read as _;

    use proptest::prelude::*;
    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::layer::block::tests::plan_of;
    use crate::layer::codec::tests::noise;
    use crate::layer::codec::{BLOCK, Codec, Compression};
    use crate::layer::stream;

    /// Makes a layer of a plan. Returns its bytes, and the place of its index.
    fn write(
        plan: &crate::layer::Plan,
        compression: Compression,
        jobs: usize,
    ) -> (Vec<u8>, Option<Place>) {
        let mut bytes = Vec::new();
        let options = stream::Options {
            compression,
            level: compression.default_level(),
            jobs,
            cancel: &CancellationToken::new(),
        };
        let sink = |piece: bytes::Bytes| {
            bytes.extend(piece);
            Ok::<_, std::io::Error>(())
        };
        let made = stream::write(plan, options, sink, &|_| {}).unwrap();
        assert_eq!(
            (made.size, made.digest),
            (bytes.len() as u64, Digest::of(&bytes))
        );
        (bytes, made.index)
    }

    fn parsed(layer: &[u8], place: &Place) -> Index {
        assert_eq!(place.offset + place.length, layer.len() as u64);
        Index::parse(&layer[place.offset as usize..], place).unwrap()
    }

    #[test]
    fn each_entry_is_where_the_index_says() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let long = format!("d/{}", "n".repeat(200));
        fs::create_dir_all(at("d/e")).unwrap();
        for n in 0..40u64 {
            let name = if n % 7 == 0 {
                format!("{long}{n}")
            } else {
                format!("d/e/{n}")
            };
            fs::write(at(&name), noise(1 << (n % 20), n)).unwrap();
        }
        fs::write(at("large"), noise(5 << 20, 1)).unwrap();
        fs::hard_link(at("large"), at("z")).unwrap();
        std::os::unix::fs::symlink("large", at("link")).unwrap();
        let plan = plan_of(dir.path());
        for compression in [Compression::Gzip, Compression::Zstd] {
            let (layer, place) = write(&plan, compression, 1);
            let place = place.unwrap();
            assert!(write(&plan, compression, 3) == (layer.clone(), Some(place)));
            assert!(place.length * 32 <= place.offset);
            let index = parsed(&layer, &place);
            // Each block alone gives its part of the tar.
            let mut tar = Vec::new();
            for number in 0..plan.tar_size().div_ceil(BLOCK) as usize {
                let (offset, length) = index.stored(number..number + 1).unwrap();
                let mut stored = &layer[offset as usize..(offset + length) as usize];
                tar.extend(index.unpack(number, &mut stored).unwrap());
                let mut damaged = layer[offset as usize..(offset + length) as usize].to_vec();
                damaged[length as usize / 2] ^= 1;
                assert!(index.unpack(number, &mut &damaged[..]).is_err());
            }
            let mut whole = Vec::new();
            let mut readable: Box<dyn std::io::Read> = match compression {
                Compression::Gzip => Box::new(flate2::read::MultiGzDecoder::new(&layer[..])),
                _ => Box::new(
                    structured_zstd::decoding::StreamingDecoder::new_with_decoder(
                        &layer[..],
                        structured_zstd::decoding::FrameDecoder::new(),
                    ),
                ),
            };
            readable.read_to_end(&mut whole).unwrap();
            assert!(whole == tar, "{compression:?}");
            let mut archive = tar::Archive::new(&tar[..]);
            let mut rows = index.rows();
            for entry in archive.entries().unwrap() {
                let (entry, row) = (entry.unwrap(), rows.next().unwrap());
                let path = entry.path_bytes();
                assert_eq!(path.strip_suffix(b"/").unwrap_or(&path), row.entry.path);
                assert_eq!(entry.raw_file_position(), row.offset + row.entry.header);
                assert_eq!(entry.size(), row.entry.size);
                let kind = match entry.header().entry_type().as_byte() {
                    b'0' => Kind::File,
                    b'1' => Kind::Hardlink,
                    b'5' => Kind::Directory,
                    _ => Kind::Other,
                };
                assert_eq!(kind, row.entry.kind);
                if kind == Kind::Hardlink {
                    assert_eq!(entry.link_name_bytes().unwrap(), row.entry.link);
                }
            }
            assert_eq!(rows.next(), None);
        }
    }

    #[test]
    fn small_layers_and_plain_ones_have_no_index() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("a"), noise(4 << 20, 1)).unwrap();
        let plan = plan_of(dir.path());
        assert!(write(&plan, Compression::Gzip, 1).1.is_some());
        assert_eq!(write(&plan, Compression::None, 1).1, None);
        // Less is left of it than a layer with an index has at least.
        fs::write(dir.path().join("a"), vec![b'x'; 8 << 20]).unwrap();
        let plan = plan_of(dir.path());
        assert_eq!(write(&plan, Compression::Gzip, 1).1, None);
        fs::write(dir.path().join("a"), noise(1 << 20, 1)).unwrap();
        let plan = plan_of(dir.path());
        let (layer, place) = write(&plan, Compression::Gzip, 1);
        assert_eq!(place, None);
        let mut out = Vec::new();
        flate2::read::GzDecoder::new(&layer[..])
            .read_to_end(&mut out)
            .unwrap();
        assert_eq!(out.len() as u64, plan.tar_size());
    }

    /// An index of entries that follow each other; one block holds all of it.
    fn index_of(entries: &[Entry<'_>], compression: Compression) -> (Vec<u8>, Place) {
        let mut listing = Listing::default();
        let mut size = 1024;
        for entry in entries {
            listing.push(*entry);
            size += entry.header + entry.size.next_multiple_of(512);
        }
        let mut codec = Codec::new(compression, 1);
        let block = codec.compress(&vec![0; size as usize]).unwrap();
        let mut blocks = Blocks::default();
        blocks.push(block.len() as u64, &Digest::of(&block));
        make(listing, &blocks, size, compression, 10 + block.len() as u64)
    }

    fn file(path: &'static str) -> Entry<'static> {
        Entry {
            path: path.as_bytes(),
            kind: Kind::File,
            header: 512,
            size: 3,
            link: b"",
        }
    }

    fn directory(path: &'static str) -> Entry<'static> {
        Entry {
            kind: Kind::Directory,
            size: 0,
            ..file(path)
        }
    }

    #[test]
    fn entries_in_no_order_are_refused() {
        let reason = |entries: &[Entry<'_>]| {
            let (bytes, place) = index_of(entries, Compression::Gzip);
            Index::parse(&bytes, &place).err().map(|error| error.0)
        };
        let (a, x) = (directory("a"), file("a/x"));
        assert_eq!(reason(&[a, x, file("b")]), None);
        assert_eq!(reason(&[directory(""), a, x]), None);
        let early = Some("an entry comes before its directory");
        assert_eq!(reason(&[x, a]), early);
        assert_eq!(reason(&[file("a"), x]), early);
        assert_eq!(reason(&[a, x, a]), Some("a path is there twice"));
        for path in ["/a", "a/", "a//b", "..", "a/../b", "./a", "a\0"] {
            let found = reason(&[a, file(path)]);
            assert_eq!(found, Some("a path is not in its plain form"), "{path:?}");
        }
        let link = |path, link: &'static [u8]| Entry {
            kind: Kind::Hardlink,
            size: 0,
            link,
            ..file(path)
        };
        let (y, z) = (link("a/y", b"a/x"), link("a/z", b"a/y"));
        assert_eq!(reason(&[a, x, y, link("a/z", b"a/x")]), None);
        let chain = Some("a hard link leads to a hard link");
        assert_eq!(reason(&[a, x, y, z]), chain);
        assert_eq!(reason(&[a, link("a/x", b"a/x")]), chain);
        let headless = Entry { header: 0, ..x };
        assert_eq!(reason(&[a, headless]), Some("a header exceeds a limit"));
    }

    #[test]
    fn what_is_not_this_index_is_refused() {
        let (bytes, place) = index_of(&[directory("a"), file("a/x")], Compression::Gzip);
        assert!(Index::parse(&bytes, &place).is_ok());
        let other = Place {
            digest: Digest::of("other"),
            ..place
        };
        assert!(Index::parse(&bytes, &other).is_err());
        assert!(Index::parse(&bytes[1..], &place).is_err());
        // The blocks would overlap the index.
        let early = Place { offset: 9, ..place };
        assert!(Index::parse(&bytes, &early).is_err());
        assert_eq!(place.to_string().parse(), Ok(place));
        let digest = place.digest;
        for bad in [
            "",
            "1",
            "1+2",
            "1+2 x",
            "-1+2 sha256:",
            &format!("1 2 {digest}"),
            &format!("99999999999999999999+1 {digest}"),
        ] {
            assert!(bad.parse::<Place>().is_err(), "{bad:?}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn a_damaged_index_is_refused_or_consistent(
            zstd in any::<bool>(),
            cut in 0usize..400,
            changes in prop::collection::vec((0usize..400, any::<u8>()), 0..4),
        ) {
            let compression = if zstd { Compression::Zstd } else { Compression::Gzip };
            let link = Entry { kind: Kind::Hardlink, size: 0, link: b"a/x", ..file("a/y") };
            let entries = [directory("a"), file("a/x"), link, file("b")];
            let (mut bytes, place) = index_of(&entries, compression);
            for (at, value) in changes {
                if let Some(byte) = bytes.get_mut(at) {
                    *byte = value;
                }
            }
            bytes.truncate(cut.max(40));
            let place = Place { length: bytes.len() as u64, digest: Digest::of(&bytes), ..place };
            if let Ok(index) = Index::parse(&bytes, &place) {
                let end = index.rows().last().map_or(0, |row| {
                    row.offset + row.entry.header + row.entry.size.next_multiple_of(512)
                });
                let blocks = (end + 1024).div_ceil(BLOCK) as usize;
                prop_assert!(blocks == 0 || index.stored(0..blocks).is_some());
                prop_assert!(index.stored(0..blocks + 1).is_none());
            }
        }
    }
}
