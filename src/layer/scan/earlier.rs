//! An earlier scan of the same tree, with the directories that have to be walked again.

use super::{Entry, Flags, Kind, Scan};

/// The earlier scan and what has been found out about its entries since.
pub(super) struct EarlierScan<'a> {
    pub(super) scan: &'a Scan,
    /// By entry: the index after its last descendant.
    pub(super) ends: Vec<u32>,
    /// By entry: whether it is a directory that has to be walked.
    pub(super) dirty: Vec<bool>,
}

impl<'a> EarlierScan<'a> {
    pub(super) fn new(scan: &'a Scan) -> Self {
        Self {
            scan,
            ends: scan.rows.ends(),
            dirty: vec![false; scan.len()],
        }
    }

    /// Iterates over the names in a directory and the indices of their entries.
    pub(super) fn children(&self, dir: u32) -> impl Iterator<Item = (&'a [u8], u32)> + '_ {
        let end = self.ends[dir as usize];
        let mut at = dir + 1;
        std::iter::from_fn(move || {
            (at < end).then(|| {
                let index = at;
                at = self.ends[index as usize];
                (self.scan.rows.name_at(index), index)
            })
        })
    }

    pub(super) fn is_dirty(&self, index: u32) -> bool {
        self.dirty[index as usize]
    }

    /// Returns `index` if the earlier scan's directory is the same as `entry` and its content relates to the base as
    /// before.
    pub(super) fn same_directory(&self, index: u32, entry: &Entry) -> Option<u32> {
        let before = &self.scan.entry(index);
        let same = before.kind == Kind::Dir
            && before.ino == entry.ino
            && before.root == 0
            && before.flags.has(Flags::OPAQUE) == entry.flags.has(Flags::OPAQUE)
            && before.flags.has(Flags::IN_BASE) == entry.flags.has(Flags::IN_BASE)
            && !self.scan.extra(before).is_some_and(|extra| extra.moved);
        same.then_some(index)
    }
}
