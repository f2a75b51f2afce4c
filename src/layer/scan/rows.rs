//! Compact storage of a scan's entries; entries that a later scan finds unchanged are shared with the earlier one.
//!
//! During a live save, the state in the image and the current state are in memory together, with a million entries
//! each. An entry is therefore stored in two parts. Its facts describe the name and the inode: they are immutable once
//! collected, and any number of scans can share them. Its row is the position in one scan's tree, with the flags
//! assigned by that scan: 9 bytes, against some 40 bytes and the name for the facts.

use std::collections::HashMap;
use std::sync::Arc;

use super::{Entry, Extra, Flags, Kind};

/// `Entry::extra` of entries without an `Extra`.
pub(super) const NO_EXTRA: u32 = u32::MAX;
/// Number of places in a block; all places of a block belong to one store.
const BLOCK: u32 = 1 << 12;
/// Value of [`Fact::size`] if the sizes do not fit and are in [`Facts::large`].
const SIZE_IN_LARGE: u32 = u32::MAX;
/// Size at which a buffer is full: offsets have 32 bits, and the names of a directory are added all at once.
const MAX_BUFFER_BYTES: usize = 1 << 30;

/// Attributes that many entries have in common, stored once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct SharedAttributes {
    kind: Kind,
    root: u16,
    mode: u16,
    uid: u32,
    gid: u32,
    nlink: u32,
    rdev: u64,
    /// Upper halves of the values in [`Fact`].
    ino: u32,
    mtime: u32,
    ctime: u32,
}

/// Attributes of a single entry. Its name ends where the name of the next begins.
#[derive(Clone, Copy, Debug)]
struct Fact {
    attributes: u32,
    extra: u32,
    name_at: u32,
    ino: u32,
    size: u32,
    /// Allocated size in units of 512 bytes.
    blocks: u32,
    mtime: u32,
    mtime_nsec: u32,
    ctime: u32,
    ctime_nsec: u32,
}

/// Facts of many entries.
#[derive(Debug, Default)]
pub(super) struct Facts {
    list: Vec<Fact>,
    names: Vec<u8>,
    extras: Vec<Extra>,
    shared: Vec<SharedAttributes>,
    /// Apparent and allocated size in bytes, where they do not fit into a fact.
    large: HashMap<u32, (u64, u64)>,
}

impl Facts {
    pub(super) fn name(&self, fact: u32) -> &[u8] {
        let begin = self.list[fact as usize].name_at as usize;
        let next = self.list.get(fact as usize + 1);
        let end = next.map_or(self.names.len(), |next| next.name_at as usize);
        &self.names[begin..end]
    }

    pub(super) fn kind(&self, fact: u32) -> Kind {
        self.shared[self.list[fact as usize].attributes as usize].kind
    }

    fn entry(&self, at: u32, store: u32, parent: u32, flags: Flags) -> Entry {
        let fact = self.list[at as usize];
        let attributes = self.shared[fact.attributes as usize];
        let (size, allocated) = if fact.size == SIZE_IN_LARGE {
            self.large.get(&at).copied().unwrap_or_default()
        } else {
            (u64::from(fact.size), u64::from(fact.blocks) * 512)
        };
        let whole = |high: u32, low: u32| u64::from(high) << 32 | u64::from(low);
        Entry {
            parent,
            store,
            name_at: fact.name_at,
            name_len: self.name(at).len() as u16,
            root: attributes.root,
            kind: attributes.kind,
            flags,
            mode: attributes.mode,
            extra: fact.extra,
            uid: attributes.uid,
            gid: attributes.gid,
            nlink: attributes.nlink,
            ino: whole(attributes.ino, fact.ino),
            size,
            allocated,
            rdev: attributes.rdev,
            mtime: whole(attributes.mtime, fact.mtime) as i64,
            mtime_nsec: fact.mtime_nsec,
            ctime_nsec: fact.ctime_nsec,
            ctime: whole(attributes.ctime, fact.ctime) as i64,
        }
    }
}

/// Facts being collected.
#[derive(Debug, Default)]
pub(super) struct FactBuffer {
    facts: Facts,
    shared: HashMap<SharedAttributes, u32>,
    /// The attributes of the previous entry, which is most often that of the next.
    last: Option<(SharedAttributes, u32)>,
}

impl FactBuffer {
    /// Adds an entry's facts and returns their number. Position in the tree and flags belong to the row.
    pub(super) fn push(&mut self, entry: &Entry, name: &[u8], extra: Option<Extra>) -> u32 {
        let at = self.facts.list.len() as u32;
        let high = |whole: u64| (whole >> 32) as u32;
        let attributes = SharedAttributes {
            kind: entry.kind,
            root: entry.root,
            mode: entry.mode,
            uid: entry.uid,
            gid: entry.gid,
            nlink: entry.nlink,
            rdev: entry.rdev,
            ino: high(entry.ino),
            mtime: high(entry.mtime as u64),
            ctime: high(entry.ctime as u64),
        };
        let blocks = u32::try_from(entry.allocated / 512)
            .ok()
            .filter(|_| entry.allocated.is_multiple_of(512));
        let size = u32::try_from(entry.size)
            .ok()
            .filter(|&size| size != SIZE_IN_LARGE);
        let (size, blocks) = match size.zip(blocks) {
            Some(fit) => fit,
            None => {
                self.facts.large.insert(at, (entry.size, entry.allocated));
                (SIZE_IN_LARGE, 0)
            }
        };
        let fact = Fact {
            attributes: self.attributes(attributes),
            extra: extra.map_or(NO_EXTRA, |extra| {
                self.facts.extras.push(extra);
                self.facts.extras.len() as u32 - 1
            }),
            name_at: self.facts.names.len() as u32,
            ino: entry.ino as u32,
            size,
            blocks,
            mtime: entry.mtime as u32,
            mtime_nsec: entry.mtime_nsec,
            ctime: entry.ctime as u32,
            ctime_nsec: entry.ctime_nsec,
        };
        self.facts.names.extend(name);
        self.facts.list.push(fact);
        at
    }

    fn attributes(&mut self, attributes: SharedAttributes) -> u32 {
        if let Some((last, number)) = self.last
            && last == attributes
        {
            return number;
        }
        let next = self.facts.shared.len() as u32;
        let number = *self.shared.entry(attributes).or_insert(next);
        if number == next {
            self.facts.shared.push(attributes);
        }
        self.last = Some((attributes, number));
        number
    }

    /// Returns the number of facts collected.
    pub(super) fn len(&self) -> u32 {
        self.facts.list.len() as u32
    }

    /// Returns the facts collected so far.
    pub(super) fn facts(&self) -> &Facts {
        &self.facts
    }

    pub(super) fn reserve(&mut self, entries: usize) {
        self.facts.list.reserve_exact(entries);
    }

    /// Returns whether further facts have to go to another buffer.
    pub(super) fn is_full(&self) -> bool {
        self.facts.names.len().max(self.facts.list.len()) >= MAX_BUFFER_BYTES
    }

    fn finish(self) -> Facts {
        let mut facts = self.facts;
        facts.list.shrink_to_fit();
        facts.names.shrink_to_fit();
        facts.extras.shrink_to_fit();
        facts.shared.shrink_to_fit();
        facts
    }
}

/// The entries of one scan, in the order of the layer.
#[derive(Debug, Default)]
pub(super) struct Rows {
    parents: Vec<u32>,
    flags: Vec<Flags>,
    /// Place of the facts: block number times `BLOCK` plus the index in the block.
    places: Vec<u32>,
    stores: Vec<Arc<Facts>>,
    /// The store of each block, and the index of its first fact there.
    blocks: Vec<(u32, u32)>,
}

impl Rows {
    /// Creates an empty list that shares the stores of another scan, so that its places can be used.
    pub(super) fn sharing(earlier: &Self) -> Self {
        Self {
            stores: earlier.stores.clone(),
            blocks: earlier.blocks.clone(),
            ..Self::default()
        }
    }

    /// Returns whether at least half of the facts in the stores are used here: sharing the stores keeps all of them in
    /// memory.
    pub(super) fn is_worth_sharing(&self) -> bool {
        let facts: usize = self.stores.iter().map(|store| store.list.len()).sum();
        facts <= 2 * self.len()
    }

    /// Adds collected facts. Returns the place of the first; the others follow it.
    pub(super) fn add(&mut self, buffer: FactBuffer) -> u32 {
        let first = self.next_place();
        let facts = buffer.finish();
        if facts.list.is_empty() {
            return first;
        }
        let store = self.stores.len() as u32;
        let begins = (0..facts.list.len() as u32).step_by(BLOCK as usize);
        self.blocks.extend(begins.map(|begin| (store, begin)));
        self.stores.push(Arc::new(facts));
        first
    }

    fn next_place(&self) -> u32 {
        self.blocks.len() as u32 * BLOCK
    }

    pub(super) fn reserve(&mut self, rows: usize) {
        self.parents.reserve_exact(rows);
        self.flags.reserve_exact(rows);
        self.places.reserve_exact(rows);
    }

    /// Adds a row and returns its index.
    pub(super) fn push(&mut self, parent: u32, flags: Flags, place: u32) -> u32 {
        self.parents.push(parent);
        self.flags.push(flags);
        self.places.push(place);
        self.parents.len() as u32 - 1
    }

    pub(super) fn len(&self) -> usize {
        self.parents.len()
    }

    /// Returns the number of a row's store, and the index of its fact there.
    fn find(&self, index: u32) -> (u32, u32) {
        let place = self.places[index as usize];
        let (store, begin) = self.blocks[(place / BLOCK) as usize];
        (store, begin + place % BLOCK)
    }

    pub(super) fn entry(&self, index: u32) -> Entry {
        let (store, fact) = self.find(index);
        let facts = &self.stores[store as usize];
        facts.entry(fact, store, self.parent(index), self.flags(index))
    }

    /// Returns the same as [`Rows::name`] for the entry at `index`, at a lower cost.
    pub(super) fn name_at(&self, index: u32) -> &[u8] {
        let (store, fact) = self.find(index);
        self.stores[store as usize].name(fact)
    }

    pub(super) fn kind(&self, index: u32) -> Kind {
        let (store, fact) = self.find(index);
        self.stores[store as usize].kind(fact)
    }

    pub(super) fn iter(
        &self,
    ) -> impl ExactSizeIterator<Item = Entry> + DoubleEndedIterator + Clone + '_ {
        (0..self.len() as u32).map(|index| self.entry(index))
    }

    pub(super) fn place(&self, index: u32) -> u32 {
        self.places[index as usize]
    }

    pub(super) fn parent(&self, index: u32) -> u32 {
        self.parents[index as usize]
    }

    pub(super) fn flags(&self, index: u32) -> Flags {
        self.flags[index as usize]
    }

    pub(super) fn flags_mut(&mut self, index: u32) -> &mut Flags {
        &mut self.flags[index as usize]
    }

    pub(super) fn name(&self, entry: &Entry) -> &[u8] {
        let at = entry.name_at as usize;
        &self.stores[entry.store as usize].names[at..at + usize::from(entry.name_len)]
    }

    pub(super) fn extra(&self, entry: &Entry) -> Option<&Extra> {
        let store = self.stores.get(entry.store as usize)?;
        store.extras.get(entry.extra as usize)
    }

    /// Iterates over the roots of all entries, possibly with some that only another scan has.
    pub(super) fn roots(&self) -> impl Iterator<Item = u16> {
        let shared = self.stores.iter().flat_map(|store| &store.shared);
        shared.map(|attributes| attributes.root)
    }

    /// Iterates over all extras, possibly with some that only another scan has.
    pub(super) fn extras(&self) -> impl Iterator<Item = &Extra> {
        self.stores.iter().flat_map(|store| &store.extras)
    }

    /// Writes the path of an entry without a leading slash. It is built backwards and then reversed, without any other
    /// allocation than the buffer.
    pub(super) fn path_into(&self, index: u32, path: &mut Vec<u8>) {
        path.clear();
        let mut at = index;
        while at != 0 {
            if !path.is_empty() {
                path.push(b'/');
            }
            path.extend(self.name_at(at).iter().rev());
            at = self.parent(at);
        }
        path.reverse();
    }

    /// Returns, for each entry, the index after its last descendant.
    pub(super) fn ends(&self) -> Vec<u32> {
        let mut ends: Vec<u32> = (1..=self.len() as u32).collect();
        for index in (1..self.len()).rev() {
            let parent = self.parents[index] as usize;
            ends[parent] = ends[parent].max(ends[index]);
        }
        ends
    }

    /// Removes the rows marked in `dropped`; no remaining row may have a dropped parent.
    pub(super) fn drop_rows(&mut self, dropped: &[bool]) {
        if !dropped.contains(&true) {
            return;
        }
        let mut moved = vec![0; self.len()];
        let mut to = 0;
        for from in 0..self.len() {
            if dropped[from] {
                continue;
            }
            moved[from] = to as u32;
            self.parents[to] = moved[self.parents[from] as usize];
            self.flags[to] = self.flags[from];
            self.places[to] = self.places[from];
            to += 1;
        }
        self.parents.truncate(to);
        self.flags.truncate(to);
        self.places.truncate(to);
    }
}

/// Builds rows from those of an earlier scan and from new entries.
#[derive(Debug, Default)]
pub(super) struct Builder {
    pub(super) rows: Rows,
    /// Facts of new entries, added at the end.
    own: FactBuffer,
}

impl Builder {
    /// Starts from rows to which no facts may be added until `Builder::finish`.
    pub(super) fn new(rows: Rows) -> Self {
        Self {
            rows,
            own: FactBuffer::default(),
        }
    }

    pub(super) fn reserve(&mut self, entries: usize) {
        self.rows.reserve(entries);
        self.own.reserve(entries);
    }

    /// Adds a new entry and returns its index.
    pub(super) fn push(
        &mut self,
        entry: &Entry,
        parent: u32,
        name: &[u8],
        extra: Option<Extra>,
    ) -> u32 {
        let place = self.rows.next_place() + self.own.push(entry, name, extra);
        self.rows.push(parent, entry.flags, place)
    }

    /// Returns the facts of the new entries.
    pub(super) fn own(&self) -> &Facts {
        self.own.facts()
    }

    pub(super) fn finish(mut self) -> Rows {
        self.rows.add(self.own);
        self.rows
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(ino: u64) -> Entry {
        Entry {
            kind: Kind::File,
            mode: 0o644,
            ino,
            extra: NO_EXTRA,
            ..Entry::default()
        }
    }

    #[test]
    fn every_value_comes_back() {
        let all = [
            entry(1),
            Entry {
                root: 7,
                uid: u32::MAX,
                gid: 5,
                nlink: u32::MAX,
                rdev: u64::MAX,
                ino: u64::MAX - 3,
                mtime: i64::MIN,
                ctime: i64::MAX,
                mtime_nsec: 999_999_999,
                ctime_nsec: 1,
                ..entry(2)
            },
            Entry {
                size: u64::from(u32::MAX),
                allocated: 512,
                mtime: -1,
                ..entry(3)
            },
            Entry {
                size: u64::MAX,
                allocated: u64::from(u32::MAX) * 512,
                ..entry(4)
            },
            Entry {
                size: 7,
                allocated: 513,
                ..entry(5)
            },
            Entry {
                size: u64::from(u32::MAX) - 1,
                allocated: (u64::from(u32::MAX) + 1) * 512,
                ..entry(6)
            },
        ];
        let mut builder = Builder::default();
        for (at, entry) in (0..).zip(&all) {
            let extra = (at == 1).then(|| Extra {
                moved: true,
                ..Extra::default()
            });
            let name = "n".repeat(at as usize);
            assert_eq!(builder.push(entry, 0, name.as_bytes(), extra), at);
        }
        let rows = builder.finish();
        for (at, (was, is)) in all.iter().zip(rows.iter()).enumerate() {
            let plain = |e: &Entry| Entry {
                store: 0,
                name_at: 0,
                name_len: 0,
                extra: 0,
                ..*e
            };
            assert_eq!(
                format!("{:?}", plain(was)),
                format!("{:?}", plain(&is)),
                "entry {at}"
            );
            assert_eq!(rows.name(&is).len(), at);
            assert_eq!(rows.extra(&is).is_some_and(|extra| extra.moved), at == 1);
        }
    }

    #[test]
    fn what_is_taken_over_is_there_once_and_goes_with_the_last_who_has_it() {
        let mut first = Builder::default();
        for ino in 0..3 * u64::from(BLOCK) {
            first.push(&entry(ino), 0, b"same", None);
        }
        let first = first.finish();
        let facts = Arc::clone(&first.stores[0]);
        assert!(first.is_worth_sharing());
        let mut second = Builder::new(Rows::sharing(&first));
        second.push(&entry(1 << 40), 0, b"new", None);
        for index in (0..first.len() as u32).rev() {
            second.rows.push(0, first.flags(index), first.place(index));
        }
        let second = second.finish();
        assert!(Arc::ptr_eq(&facts, &second.stores[0]));
        assert_eq!(second.stores[1].list.len(), 1);
        drop(first);
        let inodes: Vec<u64> = second.iter().map(|entry| entry.ino).collect();
        let expected = (0..3 * u64::from(BLOCK)).rev();
        assert!(inodes[1..].iter().copied().eq(expected));
        let new = second.entry(0);
        assert_eq!((new.ino, second.name(&new)), (1 << 40, b"new".as_slice()));
        // Few of the facts are of use to the next scan.
        assert!(second.is_worth_sharing());
        let mut little = Rows::sharing(&second);
        little.push(0, Flags::default(), second.place(0));
        assert!(!little.is_worth_sharing());
    }
}
