//! The layout of a layer: the offset of every entry in the tar, fixed before any content is read. A large layout can be
//! cut into several layers, which are then hashed, compressed, uploaded and later pulled in parallel.

use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::io;
use std::sync::Arc;

use super::content::{CapturedContents, Content};
use super::index::{self, Listing};
use super::pending_writes::{PendingWrites, Writers};
use super::tar::{END, Header, RECORD};
use crate::common::waits::Waits;
use crate::layer::scan::{Entry, Kind, Scan};
use crate::node::overlay::lower::join;

/// No link target: the entry is not a hard link.
const NOT_A_LINK: u32 = u32::MAX;

/// Maximum number of layers that one scan is cut into: an image can have 127 in total, and a registry accepts four at a
/// time.
const MAX_PARTS: u64 = 16;

/// The place of one entry.
#[derive(Clone, Copy, Debug)]
pub(super) struct Item {
    /// Offset of its header in the tar, in bytes.
    pub(super) offset: u64,
    /// Index of the entry in the scan.
    pub(super) entry: u32,
    /// Index in the scan of the entry that this one is a hard link to, or [`NOT_A_LINK`].
    link_to: u32,
    /// Length of its header in bytes, PAX records included.
    pub(super) header_len: u32,
}

/// The layout of a layer. The bytes of the tar depend only on it and on the files.
#[derive(Clone, Debug)]
pub struct Plan {
    scan: Arc<Scan>,
    items: Vec<Item>,
    tar_size: u64,
    timestamp: Option<i64>,
    captured: Arc<CapturedContents>,
    pending_writes: Arc<PendingWrites>,
}

impl Plan {
    /// Lays out all entries that the scan emits. Times later than `timestamp` (seconds since the epoch) are clamped to
    /// it.
    pub fn new(scan: Arc<Scan>, timestamp: Option<i64>) -> Self {
        let emitting = Arc::clone(&scan);
        Self::from_entries(scan, emitting.emitted(), timestamp)
    }

    /// Lays out `entries`, given in the order of the scan and including every parent directory that belongs in the
    /// layer.
    fn from_entries(
        scan: Arc<Scan>,
        entries: impl Iterator<Item = u32> + Clone,
        timestamp: Option<i64>,
    ) -> Self {
        let mut plan = Self {
            items: Vec::new(),
            tar_size: 0,
            timestamp,
            captured: Arc::default(),
            pending_writes: Arc::new(PendingWrites::new(Writers::default(), Arc::default())),
            scan,
        };
        let scan = Arc::clone(&plan.scan);
        plan.items.reserve_exact(entries.clone().count());
        let mut first_names: HashMap<(u16, u64), u32> = HashMap::new();
        let (mut path, mut link) = (Vec::new(), Vec::new());
        let mut offset = 0;
        for index in entries {
            let entry = &scan.entry(index);
            let mut item = Item {
                offset,
                entry: index,
                link_to: NOT_A_LINK,
                header_len: 0,
            };
            if let Some(group) = link_group(entry) {
                let first = *first_names.entry(group).or_insert(index);
                if first != index {
                    item.link_to = first;
                }
            }
            let mut header_len = 0;
            plan.header(&item, &mut path, &mut link, |header| {
                header_len = header.encoded_len() as u32;
            });
            item.header_len = header_len;
            offset +=
                u64::from(item.header_len) + plan.content_size(&item).next_multiple_of(RECORD);
            plan.items.push(item);
        }
        plan.tar_size = offset + END;
        plan
    }

    /// Takes contents from `captured` where it has them, and from the tree otherwise.
    #[must_use]
    pub fn with_captured(mut self, captured: CapturedContents) -> Self {
        self.captured = Arc::new(captured);
        self
    }

    /// Sets which writers may be modifying the files during the read.
    #[must_use]
    pub fn with_writers(self, writers: Writers) -> Self {
        self.with_counted_writers(writers, Arc::default())
    }

    /// Like [`Plan::with_writers`]; waits for them are counted in `waits`.
    #[must_use]
    pub(crate) fn with_counted_writers(mut self, writers: Writers, waits: Arc<Waits>) -> Self {
        self.pending_writes = Arc::new(PendingWrites::new(writers, waits));
        self
    }

    /// Returns whether every write that the entry's time stamps account for is complete. `file` is about to be read.
    pub(super) fn writes_are_complete(&self, item: &Item, file: &File) -> bool {
        let entry = &self.entry(item);
        // A lower does not change.
        self.scan.content_location(entry).is_some()
            || self
                .pending_writes
                .writes_are_complete(file, entry, self.scan.root(0))
    }

    pub(super) fn captured(&self, item: &Item) -> Option<&Content> {
        self.captured.get(item.entry)
    }

    /// Cuts the layer at the beginning or end of directories into parts of about `size` bytes of tar each, to be
    /// applied in this order. There are sixteen parts at most; they are larger if needed. A file is never cut, so a
    /// part with a large file is larger; a directory that exceeds the size by itself is cut between its files. The cuts
    /// depend on the plan alone.
    pub fn split(self, size: u64) -> Vec<Self> {
        let size = size.max(self.tar_size.div_ceil(MAX_PARTS)).max(1);
        if self.tar_size <= size {
            return vec![self];
        }
        let part_of = self.parts(size);
        let count = part_of.iter().max().map_or(0, |last| last + 1);
        let scan = &self.scan;
        let part = |number: u16| {
            let mut entries = BTreeSet::new();
            for (item, _) in self.items.iter().zip(&part_of).filter(|of| *of.1 == number) {
                // Include every ancestor directory. The root directory is not added for its descendants.
                let mut at = item.entry;
                while entries.insert(at) && scan.parent(at) != 0 {
                    at = scan.parent(at);
                }
            }
            let mut part =
                Self::from_entries(Arc::clone(scan), entries.iter().copied(), self.timestamp);
            part.captured = Arc::clone(&self.captured);
            part.pending_writes = Arc::clone(&self.pending_writes);
            part
        };
        (0..count).map(part).collect()
    }

    /// Returns the number of the part for each item.
    fn parts(&self, size: u64) -> Vec<u16> {
        let mut part_of = Vec::with_capacity(self.items.len());
        // Hard links need their target in the same layer. A group goes into the part of its last name: a later part is
        // always safe, while an earlier one could put a name below an opaque marker that hides it.
        let mut groups: HashMap<(u16, u64), u16> = HashMap::new();
        let (mut part, mut begins_at, mut before) = (0, 0, 0);
        for item in &self.items {
            let entry = &self.entry(item);
            let filled = item.offset - begins_at;
            let boundary = entry.kind == Kind::Dir || entry.parent != before;
            if filled >= 2 * size || filled >= size && boundary {
                part += 1;
                begins_at = item.offset;
            }
            before = if entry.kind == Kind::Dir {
                item.entry
            } else {
                entry.parent
            };
            part_of.push(part);
            if let Some(group) = link_group(entry) {
                groups.insert(group, part);
            }
        }
        if !groups.is_empty() {
            for (item, part) in self.items.iter().zip(&mut part_of) {
                if let Some(last) = link_group(&self.entry(item)).and_then(|g| groups.get(&g)) {
                    *part = *last;
                }
            }
        }
        part_of
    }

    /// Lists all entries for the index.
    pub(super) fn list(&self) -> Listing {
        let mut listing = Listing::default();
        let (mut path, mut link) = (Vec::new(), Vec::new());
        for item in &self.items {
            self.header(item, &mut path, &mut link, |header| {
                let kind = match header.typeflag {
                    b'0' => index::Kind::File,
                    b'1' => index::Kind::Hardlink,
                    b'5' => index::Kind::Directory,
                    _ => index::Kind::Other,
                };
                let is_link = kind == index::Kind::Hardlink;
                let path = match header.path {
                    b"./" => b"",
                    path => path.strip_suffix(b"/").unwrap_or(path),
                };
                listing.push(index::Entry {
                    path,
                    kind,
                    header: item.header_len.into(),
                    size: header.size,
                    link: if is_link { header.link } else { b"" },
                });
            });
        }
        listing
    }

    /// Returns the length of the tar in bytes, including the end of the archive.
    pub fn tar_size(&self) -> u64 {
        self.tar_size
    }

    /// Returns the number of entries.
    pub fn len(&self) -> usize {
        self.items.len()
    }

    /// Returns whether the layer has no entries.
    pub fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    /// Returns the scan that is laid out.
    pub(crate) fn scan(&self) -> &Scan {
        &self.scan
    }

    /// Returns all items in the order of the tar.
    pub(super) fn items(&self) -> &[Item] {
        &self.items
    }

    /// Returns the items that overlap bytes `start..end` of the tar.
    pub(super) fn items_in(&self, start: u64, end: u64) -> &[Item] {
        let from = self.items.partition_point(|item| item.offset <= start);
        let to = self.items.partition_point(|item| item.offset < end);
        &self.items[from.saturating_sub(1)..to]
    }

    /// Iterates over the files with content in bytes `start..end` of the tar: index of the item, the item, and the
    /// start and end of the range in the file.
    pub(super) fn contents(
        &self,
        start: u64,
        end: u64,
    ) -> impl Iterator<Item = (usize, &Item, u64, u64)> {
        let first = self.items.partition_point(|item| item.offset <= start);
        let first = first.saturating_sub(1);
        let items = self.items_in(start, end).iter().enumerate();
        items.filter_map(move |(at, item)| {
            let begin = item.offset + u64::from(item.header_len);
            let from = start.saturating_sub(begin);
            let to = end.saturating_sub(begin).min(self.content_size(item));
            (from < to).then_some((first + at, item, from, to))
        })
    }

    /// Opens the file that holds an item's content; returns `None` if another file, or none, is there now. `path` is a
    /// buffer.
    pub(super) fn open(&self, item: &Item, path: &mut Vec<u8>) -> io::Result<Option<File>> {
        let scan = self.scan();
        let entry = &self.entry(item);
        let opened = match scan.content_location(entry) {
            Some(place) => scan.root(place.root).open_file(&place.path, place.ino),
            None => {
                scan.path_into(item.entry, path);
                scan.root(0).open_file(path, entry.ino)
            }
        };
        Ok(opened?.map(File::from))
    }

    pub(super) fn entry(&self, item: &Item) -> Entry {
        self.scan.entry(item.entry)
    }

    /// Returns the bytes of content that follow an item's header, without padding.
    pub(super) fn content_size(&self, item: &Item) -> u64 {
        if item.link_to == NOT_A_LINK {
            self.entry(item).size
        } else {
            0
        }
    }

    /// Passes an item's header to `use_it`; `path` and `link` are buffers.
    pub(super) fn header<'b>(
        &'b self,
        item: &Item,
        path: &'b mut Vec<u8>,
        link: &'b mut Vec<u8>,
        use_it: impl FnOnce(Header<'_>),
    ) {
        let scan = &*self.scan;
        let entry = &self.entry(item);
        scan.path_into(item.entry, path);
        if let Some(typeflag) = mark_name(entry.kind, path) {
            return use_it(Header {
                path,
                typeflag,
                ..Header::EMPTY
            });
        }
        let is_link = item.link_to != NOT_A_LINK;
        let typeflag = match entry.kind {
            _ if is_link => b'1',
            Kind::Symlink => b'2',
            Kind::Char => b'3',
            Kind::Block => b'4',
            Kind::Dir => b'5',
            Kind::Fifo => b'6',
            Kind::File | Kind::Whiteout | Kind::Opaque => b'0',
        };
        if entry.kind == Kind::Dir {
            path.extend(if path.is_empty() {
                b"./".as_slice()
            } else {
                b"/"
            });
        }
        let link: &[u8] = if is_link {
            scan.path_into(item.link_to, link);
            link
        } else {
            scan.link(entry).unwrap_or_default()
        };
        use_it(Header {
            path,
            typeflag,
            mode: entry.mode,
            uid: entry.uid,
            gid: entry.gid,
            size: self.content_size(item),
            mtime: self
                .timestamp
                .map_or(entry.mtime, |most| entry.mtime.min(most)),
            mtime_nanos: 0,
            link,
            device: (rustix::fs::major(entry.rdev), rustix::fs::minor(entry.rdev)),
            // Attributes belong to the inode, so only the first name of a link group carries them.
            xattrs: if is_link { &[] } else { scan.xattrs(entry) },
        });
    }
}

/// Returns the key that an entry shares with the other names of its inode, if it may have other names.
fn link_group(entry: &Entry) -> Option<(u16, u64)> {
    let linkable = !matches!(entry.kind, Kind::Dir | Kind::Whiteout | Kind::Opaque);
    (linkable && entry.nlink > 1).then_some((entry.root, entry.ino))
}

/// Turns the path of a whiteout or opaque marker into its name in the archive; returns `None` for all other entries.
fn mark_name(kind: Kind, path: &mut Vec<u8>) -> Option<u8> {
    let cut = path.iter().rposition(|&b| b == b'/');
    match kind {
        Kind::Opaque => {
            // A marker's own name is empty: the path is its directory's, with a slash.
            let dir = path.strip_suffix(b"/").unwrap_or(path).to_vec();
            *path = join(&dir, b".wh..wh..opq");
        }
        Kind::Whiteout => {
            let at = cut.map_or(0, |cut| cut + 1);
            path.splice(at..at, *b".wh.");
        }
        _ => return None,
    }
    Some(b'0')
}
