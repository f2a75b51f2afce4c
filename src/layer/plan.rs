//! The layout of a layer: where in the tar each entry begins, known before one content byte is read. A large one can be
//! cut into several, which are then hashed, compressed, uploaded and later pulled side by side.

use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::io;
use std::sync::Arc;

use super::content::{Content, Held};
use super::settle::{Settling, Writers};
use super::tar::{END, Header, RECORD};
use crate::layer::scan::{Entry, Kind, Scan};
use crate::node::overlay::lower::join;

/// No link target: the entry stands for itself.
const ITSELF: u32 = u32::MAX;

/// Most layers that one scan is cut into: every image has 127 to spend, and a registry takes four at a time.
const MOST_PARTS: u64 = 16;

/// One entry's place.
#[derive(Clone, Copy, Debug)]
pub(super) struct Item {
    /// Where its header begins.
    pub(super) offset: u64,
    /// Index of the scan's entry.
    pub(super) entry: u32,
    /// Index of the scan's entry that this is a hard link to, or [`ITSELF`].
    link_to: u32,
    /// Length of its header, PAX records included.
    pub(super) header_len: u32,
}

/// A layer's layout. The bytes of the tar depend on it, and on the files, alone.
#[derive(Clone, Debug)]
pub struct Plan {
    scan: Arc<Scan>,
    items: Vec<Item>,
    tar_size: u64,
    timestamp: Option<i64>,
    held: Arc<Held>,
    settling: Arc<Settling>,
}

impl Plan {
    /// Lays out everything that the scan emits. Times later than `timestamp` (seconds since the epoch) become it.
    pub fn new(scan: Arc<Scan>, timestamp: Option<i64>) -> Self {
        let emitting = Arc::clone(&scan);
        Self::of(scan, emitting.emitted(), timestamp)
    }

    /// Lays out `entries`, which stand in the order of the scan, with all the parents that are to be in the layer.
    fn of(
        scan: Arc<Scan>,
        entries: impl Iterator<Item = u32> + Clone,
        timestamp: Option<i64>,
    ) -> Self {
        let mut plan = Self {
            items: Vec::new(),
            tar_size: 0,
            timestamp,
            held: Arc::default(),
            settling: Arc::new(Settling::new(Writers::default())),
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
                link_to: ITSELF,
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

    /// The same with contents that are read from `held` where it has them, and not from the tree.
    #[must_use]
    pub fn with(mut self, held: Held) -> Self {
        self.held = Arc::new(held);
        self
    }

    /// The same, told who may be writing to the files.
    #[must_use]
    pub fn beside(mut self, writers: Writers) -> Self {
        self.settling = Arc::new(Settling::new(writers));
        self
    }

    /// Whether `file`, of which something is about to be read, has no write under way that its stamps stand for already.
    pub(super) fn settled(&self, item: &Item, file: &File) -> bool {
        let entry = &self.entry(item);
        // A lower does not change.
        self.scan.elsewhere(entry).is_some()
            || self.settling.settled(file, entry, self.scan.root(0))
    }

    pub(super) fn held(&self, item: &Item) -> Option<&Content> {
        self.held.get(item.entry)
    }

    /// Cuts the layer where a directory begins or ends into parts of about `size` bytes of tar each (sixteen at most: then
    /// they are larger), to be applied in this order. A file is never cut, so a part with a large one is larger; a
    /// directory that is larger by itself is cut between its files. The cuts depend on the plan alone.
    pub fn cut(self, size: u64) -> Vec<Self> {
        let size = size.max(self.tar_size.div_ceil(MOST_PARTS)).max(1);
        if self.tar_size <= size {
            return vec![self];
        }
        let part_of = self.parts(size);
        let count = part_of.iter().max().map_or(0, |last| last + 1);
        let scan = &self.scan;
        let part = |number: u16| {
            let mut entries = BTreeSet::new();
            for (item, _) in self.items.iter().zip(&part_of).filter(|of| *of.1 == number) {
                // With every directory on the way to it. The root directory stands for itself.
                let mut at = item.entry;
                while entries.insert(at) && scan.parent(at) != 0 {
                    at = scan.parent(at);
                }
            }
            let mut part = Self::of(Arc::clone(scan), entries.iter().copied(), self.timestamp);
            part.held = Arc::clone(&self.held);
            part.settling = Arc::clone(&self.settling);
            part
        };
        (0..count).map(part).collect()
    }

    /// Which part each item falls into.
    fn parts(&self, size: u64) -> Vec<u16> {
        let mut part_of = Vec::with_capacity(self.items.len());
        // Hard links need their file in the same layer. A group goes where its last name is: later never hurts, while
        // earlier could put a name below an opaque mark that hides it.
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

    /// Length of the tar in bytes, its end included.
    pub fn tar_size(&self) -> u64 {
        self.tar_size
    }

    /// Number of entries.
    pub fn len(&self) -> usize {
        self.items.len()
    }

    /// Whether there is nothing to save.
    pub fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    /// What is laid out.
    pub fn scan(&self) -> &Scan {
        &self.scan
    }

    /// The items of which something lies in the bytes `start..end` of the tar.
    pub(super) fn items(&self) -> &[Item] {
        &self.items
    }

    pub(super) fn items_in(&self, start: u64, end: u64) -> &[Item] {
        let from = self.items.partition_point(|item| item.offset <= start);
        let to = self.items.partition_point(|item| item.offset < end);
        &self.items[from.saturating_sub(1)..to]
    }

    /// Files of which content lies in the bytes `start..end` of the tar: the item's index, the item, and from where to where
    /// in the file.
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

    /// Opens the file that holds an item's content; none when something else, or nothing, is there now. `path` is a buffer.
    pub(super) fn open(&self, item: &Item, path: &mut Vec<u8>) -> io::Result<Option<File>> {
        let scan = self.scan();
        let entry = &self.entry(item);
        let opened = match scan.elsewhere(entry) {
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

    /// Bytes of content that follow an item's header, without padding.
    pub(super) fn content_size(&self, item: &Item) -> u64 {
        if item.link_to == ITSELF {
            self.entry(item).size
        } else {
            0
        }
    }

    /// Hands an item's header to `use_it`; `path` and `link` are buffers.
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
                mode: 0,
                uid: 0,
                gid: 0,
                size: 0,
                mtime: 0,
                link: b"",
                device: (0, 0),
                xattrs: &[],
            });
        }
        let is_link = item.link_to != ITSELF;
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
            link,
            device: (rustix::fs::major(entry.rdev), rustix::fs::minor(entry.rdev)),
            // The first name of a link group carries them: they belong to the inode.
            xattrs: if is_link { &[] } else { scan.xattrs(entry) },
        });
    }
}

/// What an entry shares with the other names of its file, if it may have others.
fn link_group(entry: &Entry) -> Option<(u16, u64)> {
    let linkable = !matches!(entry.kind, Kind::Dir | Kind::Whiteout | Kind::Opaque);
    (linkable && entry.nlink > 1).then_some((entry.root, entry.ino))
}

/// Turns the path of a mark into the name that says it; `None` for everything that is no mark.
fn mark_name(kind: Kind, path: &mut Vec<u8>) -> Option<u8> {
    let cut = path.iter().rposition(|&b| b == b'/');
    match kind {
        Kind::Opaque => {
            // The mark's own name is empty: the path is its directory's, with a slash.
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
