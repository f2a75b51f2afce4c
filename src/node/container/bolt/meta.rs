//! Meta pages, which name the root of the newest transaction.

use std::fs::File;
use std::hash::Hasher;
use std::io;
use std::os::unix::fs::FileExt as _;

use super::page::{PAGE_HEADER, u16_at, u32_at, u64_at};

pub(super) const MAGIC: u32 = 0xED0C_DAED;

pub(super) const VERSION: u32 = 2;

pub(super) const META: usize = 64;

pub(super) const FLAG_META: u16 = 0x04;

/// Possible page sizes, which are those of memory pages.
pub(super) const PAGE_SIZES: [u64; 5] = [4096, 8192, 16384, 32768, 65536];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Meta {
    pub(super) page_size: u64,
    pub(super) root: u64,
    /// Pages from here on are not part of the database.
    pub(super) high_water: u64,
    pub(super) txid: u64,
}

/// Returns the valid meta page with the higher transaction number. The inner error describes why both are invalid.
pub(super) fn newest_meta(file: &File) -> io::Result<Result<Meta, String>> {
    let first = meta_at(file, 0)?;
    // The second meta page is at the offset of one page, and without a valid first one the page size is unknown.
    let sizes: Vec<u64> = match &first {
        Ok(meta) => vec![meta.page_size],
        Err(_) => PAGE_SIZES.to_vec(),
    };
    let mut newest = first;
    for size in sizes {
        let second = meta_at(file, size)?;
        newest = match (newest, second) {
            (Ok(a), Ok(b)) => Ok(if b.txid > a.txid { b } else { a }),
            (Ok(a), Err(_)) => Ok(a),
            (Err(_), Ok(b)) if b.page_size == size => Ok(b),
            (Err(a), _) => Err(a),
        };
    }
    Ok(newest)
}

pub(super) fn meta_at(file: &File, offset: u64) -> io::Result<Result<Meta, String>> {
    let mut bytes = [0; PAGE_HEADER + META];
    match file.read_exact_at(&mut bytes, offset) {
        Ok(()) => Ok(parse_meta(&bytes)),
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => {
            Ok(Err("it ends before its meta page".to_owned()))
        }
        Err(e) => Err(e),
    }
}

pub(super) fn parse_meta(page: &[u8; PAGE_HEADER + META]) -> Result<Meta, String> {
    let meta = &page[PAGE_HEADER..];
    let (magic, version) = (u32_at(meta, 0), u32_at(meta, 4));
    if magic != MAGIC {
        return Err(format!("magic number {magic:#x}, expected {MAGIC:#x}"));
    }
    if version != VERSION {
        return Err(format!("version {version}, expected {VERSION}"));
    }
    if u16_at(page, 8) & FLAG_META == 0 {
        return Err("its first pages are not marked as meta pages".to_owned());
    }
    let mut hasher = Fnv64a::default();
    hasher.write(&meta[..56]);
    let (sum, expected) = (u64_at(meta, 56), hasher.finish());
    if sum != expected {
        return Err(format!("meta checksum {sum:#x}, expected {expected:#x}"));
    }
    let page_size = u64::from(u32_at(meta, 8));
    if !PAGE_SIZES.contains(&page_size) {
        return Err(format!("page size {page_size}"));
    }
    Ok(Meta {
        page_size,
        root: u64_at(meta, 16),
        high_water: u64_at(meta, 40),
        txid: u64_at(meta, 48),
    })
}

/// FNV-1a with 64 bits, as in Go's `hash/fnv`.
pub(super) struct Fnv64a(u64);

impl Default for Fnv64a {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Hasher for Fnv64a {
    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.0 = (self.0 ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
    }

    fn finish(&self) -> u64 {
        self.0
    }
}
