//! Reads a bbolt file while its owner is writing to it: containerd's metadata, without containerd and without its lock.
//!
//! Format: go.etcd.io/bbolt, version 2 (`internal/common/{page,meta,bucket}.go`). Integers are in native byte order,
//! which is little-endian on all platforms of this program.
//!
//! No lock is needed, because a writer never changes a page that the newest committed transaction uses; it writes to
//! free pages and then switches one of two meta pages. Transaction N+1 may only use pages that N does not hold, while
//! N+2 may use pages that N held. So a read is consistent if N is still the newest transaction afterwards; otherwise it
//! is repeated. (N+1 being the newest is not sufficient: N+2 may have written pages but not yet its meta page.)

mod error;
mod meta;
mod page;

use std::cell::{Cell, RefCell};
use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

pub use error::Error;
use meta::{Meta, newest_meta};
use page::{Kind, PAGE_HEADER, Page, u32_at, u64_at};

const BUCKET_HEADER: usize = 16;
const LEAF_IS_BUCKET: u32 = 0x01;

/// Maximum depth of a tree; a deeper one is damaged. Four levels hold more than any node has.
const MAX_DEPTH: usize = 32;
/// Maximum number of pages visited in one read, which bounds the time spent on a malicious file.
const MAX_VISITS: u64 = 1_000_000;
/// Maximum number of entries that one listing returns.
const MAX_ENTRIES: usize = 1_000_000;
/// Maximum size in bytes of a page with its overflow pages.
const MAX_PAGE_BYTES: u64 = 64 << 20;
/// Maximum number of reads that are repeated because of concurrent writes.
const ATTEMPTS: u32 = 64;

/// Opens `path` and runs `query` on a snapshot, repeatedly until the file did not change meanwhile. `query` may
/// therefore run several times, and its errors are returned only if the snapshot was consistent.
pub fn read<T, E: From<Error>>(
    path: &Path,
    query: impl Fn(&Snapshot<'_>) -> Result<T, E>,
) -> Result<T, E> {
    let io_error = |source| Error::Io {
        path: path.to_path_buf(),
        source,
    };
    let file = super::records::open_file(path).map_err(io_error)?;
    let mut invalid = None;
    for attempt in 0..ATTEMPTS {
        if attempt > 0 {
            std::thread::sleep(Duration::from_millis(u64::from(attempt.min(20))));
        }
        let len = file.metadata().map_err(io_error)?.len();
        let meta = match newest_meta(&file).map_err(io_error)? {
            Ok(meta) => meta,
            // Both meta pages are invalid only if the file is not a database or is just being created.
            Err(detail) if attempt < 3 => {
                invalid = Some(detail);
                continue;
            }
            Err(detail) => {
                return Err(Error::Damaged {
                    path: path.to_path_buf(),
                    detail,
                }
                .into());
            }
        };
        let snapshot = Snapshot {
            path,
            file: &file,
            meta,
            len,
            pages: RefCell::default(),
            loaded: Cell::new(0),
            visits: Cell::new(0),
        };
        let result = query(&snapshot);
        if matches!(newest_meta(&file).map_err(io_error)?, Ok(after) if after.txid == meta.txid) {
            return result;
        }
    }
    Err(match invalid {
        Some(detail) => Error::Damaged {
            path: path.to_path_buf(),
            detail,
        },
        None => Error::Busy {
            path: path.to_path_buf(),
            attempts: ATTEMPTS,
        },
    }
    .into())
}

/// A consistent view of the file, valid for the duration of a query.
pub struct Snapshot<'f> {
    path: &'f Path,
    file: &'f File,
    meta: Meta,
    len: u64,
    pages: RefCell<HashMap<u64, Rc<[u8]>>>,
    loaded: Cell<u64>,
    visits: Cell<u64>,
}

/// A bucket: sorted keys, each with bytes or a nested bucket as its value.
#[derive(Clone)]
pub struct Bucket<'s> {
    snapshot: &'s Snapshot<'s>,
    root: Node,
}

/// The value of a key.
#[derive(Clone)]
pub enum Value<'s> {
    /// Bytes.
    Bytes(Vec<u8>),
    /// A nested bucket.
    Bucket(Bucket<'s>),
}

/// A page, or the part of a leaf that holds an inline bucket.
#[derive(Clone)]
enum Node {
    Page(u64),
    Inline(Rc<[u8]>),
}

impl Snapshot<'_> {
    /// Returns the root bucket, which contains all others.
    pub fn root(&self) -> Bucket<'_> {
        Bucket {
            snapshot: self,
            root: Node::Page(self.meta.root),
        }
    }

    /// Returns the bucket at a path of keys, or `None` if one of them is not a bucket.
    pub fn bucket(&self, path: &[&[u8]]) -> Result<Option<Bucket<'_>>, Error> {
        let mut bucket = self.root();
        for key in path {
            match bucket.bucket(key)? {
                Some(next) => bucket = next,
                None => return Ok(None),
            }
        }
        Ok(Some(bucket))
    }

    fn damaged(&self, detail: impl Into<String>) -> Error {
        Error::Damaged {
            path: self.path.to_path_buf(),
            detail: detail.into(),
        }
    }

    fn page(&self, id: u64) -> Result<Rc<[u8]>, Error> {
        self.visits.set(self.visits.get() + 1);
        if self.visits.get() > MAX_VISITS {
            return Err(self.damaged(format!("more than {MAX_VISITS} page visits")));
        }
        if let Some(page) = self.pages.borrow().get(&id) {
            return Ok(Rc::clone(page));
        }
        if id < 2 || id >= self.meta.high_water {
            return Err(self.damaged(format!("page {id}, expected 2 to {}", self.meta.high_water)));
        }
        let mut header = [0; PAGE_HEADER];
        self.read(id, &mut header)?;
        let found = u64_at(&header, 0);
        if found != id {
            return Err(self.damaged(format!("page {id} says it is page {found}")));
        }
        let overflow = u64::from(u32_at(&header, 12));
        let bytes = (overflow + 1).saturating_mul(self.meta.page_size);
        if bytes > MAX_PAGE_BYTES || overflow >= self.meta.high_water - id {
            return Err(self.damaged(format!("page {id} goes on for {overflow} pages")));
        }
        // Pages do not overlap in a valid file, so the total read is bounded by the file size.
        self.loaded.set(self.loaded.get() + bytes);
        if self.loaded.get() > self.len.saturating_add(MAX_PAGE_BYTES) {
            return Err(self.damaged("its pages overlap"));
        }
        let mut page = vec![0; usize::try_from(bytes).map_err(|_| self.damaged("page too long"))?];
        self.read(id, &mut page)?;
        let page: Rc<[u8]> = page.into();
        self.pages.borrow_mut().insert(id, Rc::clone(&page));
        Ok(page)
    }

    fn read(&self, id: u64, buffer: &mut [u8]) -> Result<(), Error> {
        let offset = id
            .checked_mul(self.meta.page_size)
            .ok_or_else(|| self.damaged(format!("page {id}")))?;
        // Checked before the read, so that a short file cannot cause a large allocation.
        if offset.saturating_add(buffer.len() as u64) > self.len {
            return Err(self.damaged(format!("it ends before page {id}")));
        }
        self.file
            .read_exact_at(buffer, offset)
            .map_err(|source| match source.kind() {
                io::ErrorKind::UnexpectedEof => self.damaged(format!("it ends before page {id}")),
                _ => Error::Io {
                    path: self.path.to_path_buf(),
                    source,
                },
            })
    }

    fn load(&self, node: &Node) -> Result<Rc<[u8]>, Error> {
        match node {
            Node::Page(id) => self.page(*id),
            Node::Inline(bytes) => Ok(Rc::clone(bytes)),
        }
    }

    fn parse<'p>(&self, node: &Node, page: &'p [u8]) -> Result<Page<'p>, Error> {
        Page::parse(page).map_err(|detail| match node {
            Node::Page(id) => self.damaged(format!("page {id}: {detail}")),
            Node::Inline(_) => self.damaged(format!("inline bucket: {detail}")),
        })
    }

    fn value(&self, flags: u32, value: &[u8]) -> Result<Value<'_>, Error> {
        if flags & LEAF_IS_BUCKET == 0 {
            return Ok(Value::Bytes(value.to_vec()));
        }
        if value.len() < BUCKET_HEADER {
            return Err(self.damaged(format!("a bucket of {} bytes", value.len())));
        }
        let root = match u64_at(value, 0) {
            0 => Node::Inline(value[BUCKET_HEADER..].into()),
            page => Node::Page(page),
        };
        Ok(Value::Bucket(Bucket {
            snapshot: self,
            root,
        }))
    }
}

impl<'s> Bucket<'s> {
    /// Returns the value of `key`.
    pub(crate) fn value(&self, key: &[u8]) -> Result<Option<Value<'s>>, Error> {
        let snapshot = self.snapshot;
        let mut node = self.root.clone();
        for _ in 0..MAX_DEPTH {
            let bytes = snapshot.load(&node)?;
            let page = snapshot.parse(&node, &bytes)?;
            let damaged = |detail: String| snapshot.damaged(detail);
            match page.kind {
                Kind::Leaf => {
                    let at = page.lower_bound(key).map_err(damaged)?;
                    if at == page.count {
                        return Ok(None);
                    }
                    let (flags, found, value) = page.leaf(at).map_err(damaged)?;
                    return if found == key {
                        snapshot.value(flags, value).map(Some)
                    } else {
                        Ok(None)
                    };
                }
                Kind::Branch => {
                    let at = page.lower_bound(key).map_err(damaged)?;
                    let exact = at < page.count && page.key(at).map_err(damaged)? == key;
                    let at = if exact { at } else { at.saturating_sub(1) };
                    node = Node::Page(page.child(at).map_err(damaged)?);
                }
            }
        }
        Err(snapshot.damaged(format!("a tree deeper than {MAX_DEPTH}")))
    }

    /// Returns the bytes of `key`, or `None` if it is missing or a bucket.
    pub fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>, Error> {
        Ok(self.value(key)?.and_then(|value| match value {
            Value::Bytes(bytes) => Some(bytes),
            Value::Bucket(_) => None,
        }))
    }

    /// Returns the bucket of `key`, or `None` if it is missing or not a bucket.
    pub(crate) fn bucket(&self, key: &[u8]) -> Result<Option<Bucket<'s>>, Error> {
        Ok(self.value(key)?.and_then(|value| match value {
            Value::Bucket(bucket) => Some(bucket),
            Value::Bytes(_) => None,
        }))
    }

    /// Returns all keys and values in order.
    pub fn entries(&self) -> Result<Vec<(Vec<u8>, Value<'s>)>, Error> {
        let snapshot = self.snapshot;
        let mut entries = Vec::new();
        let mut seen = HashSet::new();
        let mut stack = vec![(self.root.clone(), 0)];
        while let Some((node, depth)) = stack.pop() {
            if depth == MAX_DEPTH {
                return Err(snapshot.damaged(format!("a tree deeper than {MAX_DEPTH}")));
            }
            if let Node::Page(id) = &node
                && !seen.insert(*id)
            {
                return Err(snapshot.damaged(format!("page {id} is in a tree twice")));
            }
            let bytes = snapshot.load(&node)?;
            let page = snapshot.parse(&node, &bytes)?;
            let damaged = |detail: String| snapshot.damaged(detail);
            match page.kind {
                Kind::Leaf => {
                    if entries.len() + page.count > MAX_ENTRIES {
                        return Err(snapshot
                            .damaged(format!("more than {MAX_ENTRIES} entries in a bucket")));
                    }
                    for at in 0..page.count {
                        let (flags, key, value) = page.leaf(at).map_err(damaged)?;
                        entries.push((key.to_vec(), snapshot.value(flags, value)?));
                    }
                }
                Kind::Branch => {
                    for at in (0..page.count).rev() {
                        stack.push((Node::Page(page.child(at).map_err(damaged)?), depth + 1));
                    }
                }
            }
        }
        Ok(entries)
    }
}

#[cfg(test)]
mod tests {
    use super::meta::{FLAG_META, Fnv64a, MAGIC, META, VERSION};
    use super::page::{ELEMENT, FLAG_BRANCH, FLAG_LEAF};
    use super::*;
    use std::hash::Hasher as _;
    use std::io::{Seek, SeekFrom, Write};
    use std::path::PathBuf;

    const SIZE: usize = 4096;
    type Item<'a> = (&'a [u8], u32, Vec<u8>);

    /// Builds a page of one kind with its elements; if they exceed a page, it has overflow pages.
    fn page(id: u64, flags: u16, items: &[Item<'_>]) -> Vec<u8> {
        let mut page = vec![0; PAGE_HEADER + items.len() * ELEMENT];
        page[..8].copy_from_slice(&id.to_le_bytes());
        page[8..10].copy_from_slice(&flags.to_le_bytes());
        page[10..12].copy_from_slice(&(items.len() as u16).to_le_bytes());
        for (at, (key, element_flags, value)) in items.iter().enumerate() {
            let element = PAGE_HEADER + at * ELEMENT;
            let pos = (page.len() - element) as u32;
            let words = if flags == FLAG_LEAF {
                [*element_flags, pos, key.len() as u32, value.len() as u32]
            } else {
                let child = u64_at(value, 0);
                [pos, key.len() as u32, child as u32, (child >> 32) as u32]
            };
            for (n, word) in words.into_iter().enumerate() {
                page[element + 4 * n..element + 4 * n + 4].copy_from_slice(&word.to_le_bytes());
            }
            page.extend_from_slice(key);
            if flags == FLAG_LEAF {
                page.extend_from_slice(value);
            }
        }
        page
    }

    fn padded(mut page: Vec<u8>) -> Vec<u8> {
        let overflow = page.len().div_ceil(SIZE) - 1;
        page[12..16].copy_from_slice(&(overflow as u32).to_le_bytes());
        page.resize((overflow + 1) * SIZE, 0);
        page
    }

    fn meta(id: u64, root: u64, high_water: u64, txid: u64) -> Vec<u8> {
        let mut page = vec![0; SIZE];
        page[..8].copy_from_slice(&id.to_le_bytes());
        page[8..10].copy_from_slice(&FLAG_META.to_le_bytes());
        let mut fields = Vec::new();
        fields.extend(
            [MAGIC, VERSION, SIZE as u32, 0]
                .map(u32::to_le_bytes)
                .concat(),
        );
        fields.extend(
            [root, 0, u64::MAX, high_water, txid]
                .map(u64::to_le_bytes)
                .concat(),
        );
        let mut hasher = Fnv64a::default();
        hasher.write(&fields);
        fields.extend(hasher.finish().to_le_bytes());
        page[PAGE_HEADER..PAGE_HEADER + META].copy_from_slice(&fields);
        page
    }

    fn bucket_at(root: u64) -> Vec<u8> {
        [root, 0].map(u64::to_le_bytes).concat()
    }

    fn inline(items: &[Item<'_>]) -> Vec<u8> {
        [bucket_at(0), page(0, FLAG_LEAF, items)].concat()
    }

    fn child(id: u64) -> Vec<u8> {
        id.to_le_bytes().to_vec()
    }

    /// Root leaf 2 -> bucket `tree` at branch 3 -> leaves 4 and 5 (with one page of overflow); inline bucket `small`.
    fn sample() -> Vec<u8> {
        let long = vec![b'x'; 5000];
        [
            meta(0, 2, 7, 8),
            meta(1, 9, 7, 7),
            padded(page(
                2,
                FLAG_LEAF,
                &[
                    (
                        b"small",
                        LEAF_IS_BUCKET,
                        inline(&[(b"k", 0, b"v".to_vec())]),
                    ),
                    (b"tree", LEAF_IS_BUCKET, bucket_at(3)),
                ],
            )),
            padded(page(
                3,
                FLAG_BRANCH,
                &[(b"a", 0, child(4)), (b"m", 0, child(5))],
            )),
            padded(page(
                4,
                FLAG_LEAF,
                &[(b"a", 0, b"1".to_vec()), (b"c", 0, b"".to_vec())],
            )),
            padded(page(
                5,
                FLAG_LEAF,
                &[(b"m", 0, b"3".to_vec()), (b"z", 0, long)],
            )),
        ]
        .concat()
    }

    fn file(bytes: &[u8]) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    /// Lists all keys with their depth, following nested buckets to a limited depth.
    fn walk(
        bucket: &Bucket<'_>,
        depth: usize,
        out: &mut Vec<(Vec<u8>, usize)>,
    ) -> Result<(), Error> {
        for (key, value) in bucket.entries()? {
            match value {
                Value::Bytes(bytes) => out.push((key, bytes.len())),
                Value::Bucket(inner) if depth < 6 => walk(&inner, depth + 1, out)?,
                Value::Bucket(_) => {}
            }
        }
        Ok(())
    }

    fn walked(bytes: &[u8]) -> Result<Vec<(Vec<u8>, usize)>, Error> {
        let file = file(bytes);
        read(file.path(), |db| {
            let mut out = Vec::new();
            walk(&db.root(), 0, &mut out)?;
            Ok(out)
        })
    }

    #[test]
    fn branches_overflow_and_inline_buckets_are_read() {
        let file = file(&sample());
        let got = read(file.path(), |db| {
            let tree = db.bucket(&[b"tree"])?.expect("bucket");
            let keys: [&[u8]; 7] = [b"a", b"b", b"c", b"m", b"z", b"zz", b""];
            let values = keys
                .iter()
                .map(|key| tree.get(key))
                .collect::<Result<Vec<_>, Error>>()?;
            assert!(db.bucket(&[b"tree", b"a"])?.is_none());
            assert!(db.bucket(&[b"nothing"])?.is_none());
            assert_eq!(
                db.bucket(&[b"small"])?.expect("bucket").get(b"k")?,
                Some(b"v".to_vec())
            );
            assert_eq!(db.root().get(b"tree")?, None);
            Ok::<_, Error>(
                values
                    .into_iter()
                    .map(|v| v.map(|v| v.len()))
                    .collect::<Vec<_>>(),
            )
        });
        assert_eq!(
            got.unwrap(),
            [Some(1), None, Some(0), Some(1), Some(5000), None, None]
        );
        let keys: Vec<_> = walked(&sample())
            .unwrap()
            .into_iter()
            .map(|(key, _)| String::from_utf8(key).unwrap())
            .collect();
        assert_eq!(keys, ["k", "a", "c", "m", "z"]);
    }

    #[test]
    fn the_newer_meta_wins_and_a_torn_one_does_not_count() {
        // Meta page 1 of the sample is older and invalid. A newer one has to be used,
        let mut bytes = sample();
        bytes[SIZE..2 * SIZE].copy_from_slice(&meta(1, 4, 7, 9));
        assert_eq!(walked(&bytes).unwrap().len(), 2);
        // but not if it is torn.
        bytes[SIZE + PAGE_HEADER + 16] ^= 1;
        assert_eq!(walked(&bytes).unwrap().len(), 5);
        // Without the first meta page, the second is found although the page size is unknown.
        let mut bytes = sample();
        bytes[SIZE..2 * SIZE].copy_from_slice(&meta(1, 2, 7, 7));
        bytes[..SIZE].fill(0);
        assert_eq!(walked(&bytes).unwrap().len(), 5);
        bytes[SIZE..2 * SIZE].fill(0);
        let error = walked(&bytes).unwrap_err();
        assert!(
            matches!(&error, Error::Damaged { detail, .. } if detail.contains("magic")),
            "{error}"
        );
    }

    #[test]
    fn a_read_that_was_overtaken_is_done_again() {
        let file = file(&sample());
        let runs = Cell::new(0);
        let result = read(file.path(), |_| {
            runs.set(runs.get() + 1);
            if runs.get() == 1 {
                let mut writer = std::fs::OpenOptions::new()
                    .write(true)
                    .open(file.path())
                    .unwrap();
                writer.seek(SeekFrom::Start(SIZE as u64)).unwrap();
                writer.write_all(&meta(1, 2, 7, 9)).unwrap();
                // The content of pages from a torn read must not be trusted either.
                return Err(Error::Damaged {
                    path: PathBuf::new(),
                    detail: String::new(),
                });
            }
            Ok(())
        });
        assert!(result.is_ok(), "{result:?}");
        assert_eq!(runs.get(), 2);
    }

    #[test]
    fn a_writer_that_is_always_faster_ends_in_busy() {
        let file = file(&sample());
        let txid = Cell::new(9);
        let result = read(file.path(), |_| {
            let mut writer = std::fs::OpenOptions::new()
                .write(true)
                .open(file.path())
                .unwrap();
            writer
                .seek(SeekFrom::Start(SIZE as u64 * (txid.get() % 2)))
                .unwrap();
            writer
                .write_all(&meta(txid.get() % 2, 2, 7, txid.get()))
                .unwrap();
            txid.set(txid.get() + 1);
            Ok::<_, Error>(())
        });
        assert!(
            matches!(
                result,
                Err(Error::Busy {
                    attempts: ATTEMPTS,
                    ..
                })
            ),
            "{result:?}"
        );
    }

    #[test]
    fn trees_made_to_trap_the_reader_are_damaged() {
        let root = |pages: &[Vec<u8>]| {
            [vec![meta(0, 2, 40, 8), meta(1, 2, 40, 7)], pages.to_vec()]
                .concat()
                .concat()
        };
        let branch = |id, children: &[u64]| {
            let keys: Vec<[u8; 1]> = (0..children.len()).map(|n| [n as u8]).collect();
            let items: Vec<Item<'_>> = keys
                .iter()
                .zip(children)
                .map(|(key, &c)| (key.as_slice(), 0, child(c)))
                .collect();
            padded(page(id, FLAG_BRANCH, &items))
        };
        let mut long_overflow = branch(2, &[3]);
        long_overflow[12..16].copy_from_slice(&u32::MAX.to_le_bytes());
        let mut many_elements = branch(2, &[3]);
        many_elements[10..12].copy_from_slice(&u16::MAX.to_le_bytes());
        let mut far_key = padded(page(2, FLAG_LEAF, &[(b"a", 0, b"b".to_vec())]));
        far_key[PAGE_HEADER + 4..PAGE_HEADER + 8].copy_from_slice(&u32::MAX.to_le_bytes());
        let mut long_value = padded(page(2, FLAG_LEAF, &[(b"a", 0, b"b".to_vec())]));
        long_value[PAGE_HEADER + 12..PAGE_HEADER + 16].copy_from_slice(&u32::MAX.to_le_bytes());
        let cases = [
            ("its own child", root(&[branch(2, &[2])])),
            (
                "a child twice",
                root(&[branch(2, &[3, 3]), padded(page(3, FLAG_LEAF, &[]))]),
            ),
            ("a circle of two", root(&[branch(2, &[3]), branch(3, &[2])])),
            ("a meta page as child", root(&[branch(2, &[0])])),
            ("beyond the high water", root(&[branch(2, &[41])])),
            ("beyond the end", root(&[branch(2, &[39])])),
            (
                "another page's number",
                root(&[branch(2, &[3]), padded(page(7, FLAG_LEAF, &[]))]),
            ),
            ("no children", root(&[branch(2, &[])])),
            ("endless overflow", root(&[long_overflow])),
            ("more elements than bytes", root(&[many_elements])),
            ("a key outside", root(&[far_key])),
            ("a value outside", root(&[long_value])),
            (
                "a bucket without header",
                root(&[padded(page(
                    2,
                    FLAG_LEAF,
                    &[(b"a", LEAF_IS_BUCKET, vec![0; 15])],
                ))]),
            ),
            (
                "an inline page cut short",
                root(&[padded(page(
                    2,
                    FLAG_LEAF,
                    &[(b"a", LEAF_IS_BUCKET, bucket_at(0))],
                ))]),
            ),
        ];
        for (what, bytes) in cases {
            let error = walked(&bytes).expect_err(what);
            assert!(matches!(error, Error::Damaged { .. }), "{what}: {error}");
            // A search takes other paths through the pages and has to terminate, too.
            let file = file(&bytes);
            let _ = read(file.path(), |db| db.root().get(b"b"));
        }
    }

    #[test]
    fn no_truncation_and_no_flipped_bit_does_harm() {
        let whole = sample();
        for len in (0..whole.len()).step_by(61) {
            let _ = walked(&whole[..len]);
        }
        for at in (2 * SIZE..whole.len()).filter(|at| whole[*at] != 0) {
            for bit in [0, 3, 7] {
                let mut bytes = whole.clone();
                bytes[at] ^= 1 << bit;
                let _ = walked(&bytes);
            }
        }
    }
}
