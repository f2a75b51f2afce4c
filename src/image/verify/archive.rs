//! Reads layer archives, including malicious ones, entry by entry, for comparison with an expectation or a
//! [`super::tree::Tree`].
//!
//! Format: POSIX.1-2017 `pax` (ustar and extended headers), GNU tar's long names and base-256 numbers. GNU's sparse
//! formats are refused, because the image-spec forbids them in layers.

mod pax;

use std::collections::BTreeMap;
use std::io::{self, BufReader, Cursor, Read};

use flate2::read::MultiGzDecoder;
use structured_zstd::decoding::{FrameDecoder, StreamingDecoder};

use super::tree::Time;
use super::vis;
use crate::common::digest::{Digest, HashingWriter};
use pax::{PaxHeader, pax};

/// Maximum length of a path or link target, in bytes: far above `PATH_MAX`, but harmless.
pub(crate) const PATH_BYTES: usize = 64 * 1024;
/// Maximum size of an extended header, in bytes. Linux limits one extended attribute to 64 KiB, and a file has few.
const EXTENSION_BYTES: u64 = 1024 * 1024;
/// Maximum zstd window size, in bytes: that of `zstd -22 --ultra`.
const WINDOW_BYTES: u64 = 128 * 1024 * 1024;

/// An error while reading an archive.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    /// Reading or decompressing failed, or the archive is truncated.
    #[error("cannot read the archive at byte {offset} of the tar: {source}")]
    Io {
        /// Offset in the uncompressed tar.
        offset: u64,
        /// The cause.
        source: io::Error,
    },
    /// The data is not a valid tar.
    #[error("the archive is damaged at byte {offset} of the tar: {reason}")]
    Malformed {
        /// Offset in the uncompressed tar.
        offset: u64,
        /// What was expected and found.
        reason: String,
    },
    /// The entry cannot be applied.
    #[error("archive entry {path}: {reason}")]
    Entry {
        /// Name of the entry, escaped.
        path: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A limit on memory is exceeded.
    #[error("the archive exceeds the limit of {limit} {what}")]
    Limit {
        /// The limited quantity.
        what: &'static str,
        /// The limit.
        limit: u64,
    },
}

impl ArchiveError {
    /// Creates an error about the entry named `path`.
    pub(crate) fn entry(path: &[u8], reason: impl Into<String>) -> Self {
        Self::Entry {
            path: vis::encode(path),
            reason: reason.into(),
        }
    }
}

/// Type of an entry according to its header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EntryKind {
    /// `0`: regular file.
    File,
    /// `1`: hard link to an earlier entry.
    Hardlink,
    /// `2`: symbolic link.
    Symlink,
    /// `3`: character device.
    Char,
    /// `4`: block device.
    Block,
    /// `5`: directory.
    Directory,
    /// `6`: named pipe.
    Fifo,
}

impl EntryKind {
    /// Returns the word for it in an expectation.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::File => "file",
            Self::Hardlink => "hardlink",
            Self::Symlink => "link",
            Self::Char => "char",
            Self::Block => "block",
            Self::Directory => "dir",
            Self::Fifo => "fifo",
        }
    }
}

/// An entry, with extended headers applied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The name exactly as stored, including a trailing slash.
    pub name: Vec<u8>,
    /// Type of the entry.
    pub kind: EntryKind,
    /// Mode as stored; usually the low 12 bits.
    pub mode: u32,
    /// User ID.
    pub uid: u32,
    /// Group ID.
    pub gid: u32,
    /// User name as stored.
    pub uname: Vec<u8>,
    /// Group name as stored.
    pub gname: Vec<u8>,
    /// Size of the content in bytes.
    pub size: u64,
    /// Time of last modification.
    pub mtime: Time,
    /// Target of a hard or symbolic link, as stored.
    pub link: Vec<u8>,
    /// Major and minor number as stored (0:0 for everything but devices).
    pub rdev: (u32, u32),
    /// Extended attributes from `SCHILY.xattr.*` records.
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// Keywords of the other extended header records, in order.
    pub records: Vec<String>,
    /// Offset in the tar of the entry's first header block, which is that of its extended header if it has one.
    pub offset: u64,
}

/// Compression of an archive.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Codec {
    /// Plain tar.
    None,
    /// One or more gzip members.
    Gzip,
    /// One or more zstd frames.
    Zstd,
}

/// Detects the compression (none, gzip or zstd) from the first bytes and returns a reader of the uncompressed data.
pub fn decompress<'a>(mut reader: impl Read + 'a) -> io::Result<(Codec, Box<dyn Read + 'a>)> {
    let mut magic = Vec::with_capacity(4);
    reader.by_ref().take(4).read_to_end(&mut magic)?;
    let codec = match magic.as_slice() {
        [0x1f, 0x8b, ..] => Codec::Gzip,
        // A frame, or a skippable frame (zstd:chunked begins with one).
        [0x28, 0xb5, 0x2f, 0xfd] | [0x50..=0x5f, 0x2a, 0x4d, 0x18] => Codec::Zstd,
        _ => Codec::None,
    };
    let whole = BufReader::with_capacity(128 * 1024, Cursor::new(magic).chain(reader));
    let reader: Box<dyn Read + 'a> = match codec {
        Codec::None => Box::new(whole),
        Codec::Gzip => Box::new(MultiGzDecoder::new(whole)),
        Codec::Zstd => {
            let mut decoder = FrameDecoder::new();
            decoder
                .set_max_window_size(WINDOW_BYTES)
                .map_err(io::Error::other)?;
            Box::new(StreamingDecoder::new_with_decoder(whole, decoder))
        }
    };
    Ok((codec, reader))
}

/// Properties of an archive that has been read to its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ArchiveSummary {
    /// Digest of the uncompressed tar.
    pub diff_id: Digest,
    /// Length of the uncompressed tar in bytes.
    pub tar_size: u64,
    /// Number of bytes after the two zero blocks that end a tar.
    pub trailing: u64,
    /// Whether the two zero blocks exist.
    pub terminated: bool,
}

/// Iterates over the entries of an uncompressed tar in bounded memory.
pub struct Archive<R> {
    reader: R,
    hash: HashingWriter<io::Sink>,
    offset: u64,
    /// Bytes of the current entry's content and padding that have not been read yet.
    content: u64,
    padding: u64,
    ended: bool,
    terminated: bool,
}

impl<R: Read> Archive<R> {
    /// Creates an archive from a reader of the uncompressed tar.
    pub fn new(reader: R) -> Self {
        let hash = HashingWriter::new(io::sink());
        Self {
            reader,
            hash,
            offset: 0,
            content: 0,
            padding: 0,
            ended: false,
            terminated: false,
        }
    }

    /// Returns the next entry, or `None` after the last. Its content can then be read with [`Archive::read_content`].
    ///
    /// A tar without the two zero blocks is accepted if it ends between entries, or in the padding of the last one, as in
    /// the unpackers of container engines.
    pub fn next_entry(&mut self) -> Result<Option<Entry>, ArchiveError> {
        let mut extension = PaxHeader::default();
        loop {
            self.skip(self.content)?;
            self.content = 0;
            self.skip_padding()?;
            if self.ended {
                return self.end(&extension);
            }
            let start = self.offset;
            let Some(block) = self.block()? else {
                self.ended = true;
                return self.end(&extension);
            };
            if block.iter().all(|&byte| byte == 0) {
                self.ended = true;
                self.terminated = match self.block()? {
                    Some(second) => second.iter().all(|&byte| byte == 0),
                    None => false,
                };
                return self.end(&extension);
            }
            self.checksum(&block, start)?;
            let raw_size = self.number(&block[124..136], "size")?;
            let raw_size = u64::try_from(raw_size)
                .map_err(|_| self.malformed(format!("a negative size ({raw_size})")))?;
            match block[156] {
                b'x' => {
                    extension.offset.get_or_insert(start);
                    let bytes = self.extension(raw_size)?;
                    pax(&bytes, &mut extension).map_err(|reason| ArchiveError::Malformed {
                        offset: start,
                        reason,
                    })?;
                }
                b'L' | b'K' => {
                    extension.offset.get_or_insert(start);
                    let mut bytes = self.extension(raw_size)?;
                    bytes.truncate(bytes.iter().position(|&b| b == 0).unwrap_or(bytes.len()));
                    if block[156] == b'L' {
                        extension.path = Some(bytes);
                    } else {
                        extension.link = Some(bytes);
                    }
                }
                // A global header (git archive stores the commit in it) does not describe a file.
                b'g' => self.begin(raw_size)?,
                _ => return self.entry(&block, raw_size, extension, start).map(Some),
            }
        }
    }

    /// Reads from the current entry's content. Returns the number of bytes, 0 at the end.
    pub(crate) fn read_content(&mut self, buffer: &mut [u8]) -> Result<usize, ArchiveError> {
        let want = buffer
            .len()
            .min(usize::try_from(self.content).unwrap_or(usize::MAX));
        if want == 0 {
            return Ok(0);
        }
        let n = self.read(&mut buffer[..want])?;
        if n == 0 {
            return Err(self.truncated());
        }
        self.content -= n as u64;
        Ok(n)
    }

    /// Returns the digest of the unread part of the current entry's content.
    pub fn content_digest(&mut self) -> Result<Digest, ArchiveError> {
        let mut hash = HashingWriter::new(io::sink());
        // Sized by the content, because most files are small and there may be millions of them.
        let mut buffer = vec![0; self.content.clamp(1, 64 * 1024) as usize];
        loop {
            match self.read_content(&mut buffer)? {
                0 => return Ok(hash.complete().1),
                n => io::Write::write_all(&mut hash, &buffer[..n]).map_err(|source| {
                    ArchiveError::Io {
                        offset: self.offset,
                        source,
                    }
                })?,
            }
        }
    }

    /// Reads the rest, including data after the end of the tar, and returns the properties of the whole archive.
    pub fn finish(mut self) -> Result<ArchiveSummary, ArchiveError> {
        while self.next_entry()?.is_some() {}
        let end = self.offset;
        let mut buffer = vec![0; 64 * 1024];
        while self.read(&mut buffer)? != 0 {}
        let (_, diff_id, tar_size) = self.hash.complete();
        Ok(ArchiveSummary {
            diff_id,
            tar_size,
            trailing: tar_size - end,
            terminated: self.terminated,
        })
    }

    fn end(&self, extension: &PaxHeader) -> Result<Option<Entry>, ArchiveError> {
        match extension.offset {
            Some(_) => {
                Err(self.malformed("an extended header without the entry that it belongs to"))
            }
            None => Ok(None),
        }
    }

    fn entry(
        &mut self,
        block: &[u8; 512],
        raw_size: u64,
        extension: PaxHeader,
        start: u64,
    ) -> Result<Entry, ArchiveError> {
        let header = |range: std::ops::Range<usize>| {
            let field = &block[range];
            field[..field.iter().position(|&b| b == 0).unwrap_or(field.len())].to_vec()
        };
        let posix = &block[257..263] == b"ustar\0";
        let name = extension.path.unwrap_or_else(|| {
            let (name, prefix) = (header(0..100), header(345..500));
            if posix && !prefix.is_empty() {
                [&prefix[..], b"/", &name[..]].concat()
            } else {
                name
            }
        });
        let link = extension.link.unwrap_or_else(|| header(157..257));
        for (what, bytes) in [("name", &name), ("link target", &link)] {
            if bytes.len() > PATH_BYTES {
                return Err(self.malformed(format!(
                    "a {what} of {} bytes, at most {PATH_BYTES} are read",
                    bytes.len()
                )));
            }
            if bytes.contains(&0) {
                return Err(self.malformed(format!("a {what} with a zero byte in it")));
            }
        }
        let kind = match block[156] {
            // Before POSIX, a directory was a file whose name ends in a slash.
            0 | b'0' | b'7' if name.ends_with(b"/") => EntryKind::Directory,
            0 | b'0' | b'7' => EntryKind::File,
            b'1' => EntryKind::Hardlink,
            b'2' => EntryKind::Symlink,
            b'3' => EntryKind::Char,
            b'4' => EntryKind::Block,
            b'5' => EntryKind::Directory,
            b'6' => EntryKind::Fifo,
            other => {
                return Err(ArchiveError::entry(
                    &name,
                    format!("entries of type {:?} are not supported", char::from(other)),
                ));
            }
        };
        let size = match kind {
            EntryKind::File => extension.size.unwrap_or(raw_size),
            // Some archivers write the size of the linked file, but no content follows, as for all other types.
            _ => 0,
        };
        let id = |value: i64, what: &str| {
            u32::try_from(value)
                .map_err(|_| ArchiveError::entry(&name, format!("{what} {value} is out of range")))
        };
        let uid = match extension.uid {
            Some(uid) => uid,
            None => id(self.number(&block[108..116], "uid")?, "uid")?,
        };
        let gid = match extension.gid {
            Some(gid) => gid,
            None => id(self.number(&block[116..124], "gid")?, "gid")?,
        };
        let mtime = match extension.mtime {
            Some(mtime) => mtime,
            None => Time {
                seconds: self.number(&block[136..148], "mtime")?,
                nanos: 0,
            },
        };
        let mode = id(self.number(&block[100..108], "mode")?, "mode")?;
        let rdev = if matches!(kind, EntryKind::Char | EntryKind::Block) {
            let major = id(
                self.number(&block[329..337], "major number")?,
                "major number",
            )?;
            (
                major,
                id(
                    self.number(&block[337..345], "minor number")?,
                    "minor number",
                )?,
            )
        } else {
            (0, 0)
        };
        self.begin(size)?;
        Ok(Entry {
            kind,
            mode,
            uid,
            gid,
            uname: extension.uname.unwrap_or_else(|| header(265..297)),
            gname: extension.gname.unwrap_or_else(|| header(297..329)),
            size,
            mtime,
            link: if matches!(kind, EntryKind::Hardlink | EntryKind::Symlink) {
                link
            } else {
                Vec::new()
            },
            rdev,
            xattrs: extension.xattrs,
            records: extension.records,
            offset: extension.offset.unwrap_or(start),
            name,
        })
    }

    fn begin(&mut self, size: u64) -> Result<(), ArchiveError> {
        self.content = size;
        self.padding = size.wrapping_neg() % 512;
        if size > i64::MAX as u64 {
            return Err(self.malformed(format!("an entry of {size} bytes")));
        }
        Ok(())
    }

    fn extension(&mut self, size: u64) -> Result<Vec<u8>, ArchiveError> {
        if size > EXTENSION_BYTES {
            return Err(ArchiveError::Limit {
                what: "bytes in one extended header",
                limit: EXTENSION_BYTES,
            });
        }
        self.begin(size)?;
        let mut bytes = vec![0; size as usize];
        let mut filled = 0;
        while filled < bytes.len() {
            filled += self.read_content(&mut bytes[filled..])?;
        }
        Ok(bytes)
    }

    fn checksum(&self, block: &[u8; 512], offset: u64) -> Result<(), ArchiveError> {
        let stored = self.number(&block[148..156], "checksum")?;
        let sum = |signed: bool| -> i64 {
            let bytes = block.iter().enumerate();
            bytes
                .map(|(at, &byte)| match at {
                    148..156 => i64::from(b' '),
                    _ if signed => i64::from(byte as i8),
                    _ => i64::from(byte),
                })
                .sum()
        };
        if stored == sum(false) || stored == sum(true) {
            return Ok(());
        }
        let reason = format!("header checksum: expected {}, found {stored}", sum(false));
        Err(ArchiveError::Malformed { offset, reason })
    }

    fn number(&self, field: &[u8], what: &str) -> Result<i64, ArchiveError> {
        number(field)
            .ok_or_else(|| self.malformed(format!("{what} {:?} is no number", vis::encode(field))))
    }

    fn block(&mut self) -> Result<Option<[u8; 512]>, ArchiveError> {
        let mut block = [0; 512];
        let mut filled = 0;
        while filled < 512 {
            match self.read(&mut block[filled..])? {
                0 if filled == 0 => return Ok(None),
                0 => return Err(self.truncated()),
                n => filled += n,
            }
        }
        Ok(Some(block))
    }

    /// Skips the padding of the last content. An archive that ends within it (`umoci insert` writes such ones) has no
    /// further entry, as for the unpackers of container engines, which are written in Go.
    fn skip_padding(&mut self) -> Result<(), ArchiveError> {
        let mut padding = [0; 512];
        while self.padding > 0 {
            match self.read(&mut padding[..self.padding as usize])? {
                0 => (self.padding, self.ended) = (0, true),
                n => self.padding -= n as u64,
            }
        }
        Ok(())
    }

    fn skip(&mut self, mut left: u64) -> Result<(), ArchiveError> {
        let mut buffer = [0; 16 * 1024];
        while left > 0 {
            let want = buffer
                .len()
                .min(usize::try_from(left).unwrap_or(usize::MAX));
            match self.read(&mut buffer[..want])? {
                0 => return Err(self.truncated()),
                n => left -= n as u64,
            }
        }
        Ok(())
    }

    fn read(&mut self, buffer: &mut [u8]) -> Result<usize, ArchiveError> {
        let offset = self.offset;
        let failed = |source| ArchiveError::Io { offset, source };
        loop {
            match self.reader.read(buffer) {
                Ok(n) => {
                    io::Write::write_all(&mut self.hash, &buffer[..n]).map_err(failed)?;
                    self.offset += n as u64;
                    return Ok(n);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(failed(error)),
            }
        }
    }

    fn truncated(&self) -> ArchiveError {
        ArchiveError::Io {
            offset: self.offset,
            source: io::ErrorKind::UnexpectedEof.into(),
        }
    }

    fn malformed(&self, reason: impl Into<String>) -> ArchiveError {
        ArchiveError::Malformed {
            offset: self.offset,
            reason: reason.into(),
        }
    }
}

/// Parses a numeric header field: octal digits between spaces and zero bytes, or GNU's big-endian two's complement.
fn number(field: &[u8]) -> Option<i64> {
    if field.first()? & 0x80 != 0 {
        // The top bit is the marker, the next one the sign.
        let mut value = if field[0] & 0x40 == 0 { 0i128 } else { -1 };
        value = (value << 6) | i128::from(field[0] & 0x3f);
        for &byte in &field[1..] {
            value = (value << 8) | i128::from(byte);
        }
        return i64::try_from(value).ok();
    }
    let digits: &[u8] = field.trim_ascii_start();
    let end = digits
        .iter()
        .position(|&b| b == 0 || b == b' ')
        .unwrap_or(digits.len());
    let mut value = 0i64;
    for &digit in &digits[..end] {
        if !(b'0'..=b'7').contains(&digit) {
            return None;
        }
        value = value.checked_mul(8)?.checked_add(i64::from(digit - b'0'))?;
    }
    Some(value)
}

#[cfg(test)]
mod tests {
    use super::pax::time;
    use super::*;

    #[test]
    fn numbers_are_octal_or_two_s_complement() {
        for (field, value) in [
            (b"0000644\0".as_slice(), Some(0o644)),
            (b"    17 \0", Some(0o17)),
            (b"\0\0\0\0\0\0\0\0", Some(0)),
            (b"\x80\0\0\0\0\0\x20\0", Some(0x2000)),
            (
                b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff",
                Some(-1),
            ),
            (
                b"\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff\xff",
                Some(-0x1_0000_0001),
            ),
            (b"\x80\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", None),
            (b"00009\0\0\0", None),
            (b"-000001\0", None),
        ] {
            assert_eq!(number(field), value, "{field:?}");
        }
    }

    #[test]
    fn an_archive_may_end_where_the_content_of_its_last_entry_ends() -> Result<(), ArchiveError> {
        let mut header = tar::Header::new_ustar();
        header.as_old_mut().name[0] = b'a';
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_size(5);
        header.set_cksum();
        let whole = [header.as_bytes().as_slice(), b"hello", &[0; 507]].concat();
        for length in 517..=whole.len() {
            let mut archive = Archive::new(&whole[..length]);
            assert!(archive.next_entry()?.is_some());
            assert!(archive.next_entry()?.is_none());
            let facts = archive.finish()?;
            assert_eq!(
                (facts.tar_size, facts.terminated, facts.trailing),
                (length as u64, false, 0)
            );
        }
        // An end within the content, or within an extended header, is damage.
        let mut archive = Archive::new(&whole[..516]);
        archive.next_entry()?;
        assert!(archive.next_entry().is_err());
        Ok(())
    }

    #[test]
    fn pax_times_round_down() {
        for (text, expected) in [
            ("0", Some((0, 0))),
            ("1.5", Some((1, 500_000_000))),
            ("-1", Some((-1, 0))),
            ("-1.25", Some((-2, 750_000_000))),
            ("8589934592.0000000019", Some((8_589_934_592, 1))),
            ("99999999999999999999", None),
            ("1e3", None),
            ("", None),
            ("-", None),
            ("+1", None),
        ] {
            let expected = expected.map(|(seconds, nanos)| Time { seconds, nanos });
            assert_eq!(time(text.as_bytes()), expected, "{text}");
        }
    }

    #[test]
    fn pax_records_that_lie_about_their_length_are_refused() {
        for bad in [
            "5 a=b",
            "99 path=x\n",
            "0 path=x\n",
            "2 \n",
            " path=x\n",
            "6 path\n",
            "99999999999999999999999 a=b\n",
        ] {
            assert!(
                pax(bad.as_bytes(), &mut PaxHeader::default()).is_err(),
                "{bad:?}"
            );
        }
        let mut extension = PaxHeader::default();
        assert_eq!(
            pax(
                b"28 SCHILY.xattr.user.k=a\nb=\n12 path=a=b\n",
                &mut extension
            ),
            Ok(())
        );
        assert_eq!(extension.xattrs[b"user.k".as_slice()], b"a\nb=");
        assert_eq!(extension.path.as_deref(), Some(b"a=b".as_slice()));
    }
}
