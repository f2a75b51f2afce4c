//! Computes the changes of a tree since an earlier scan, as a scan of its own from which a layer can be made.
//!
//! An image with the earlier scan's layer on top of the base shows the earlier tree; with the layer of the changes on
//! top of both, it shows the current tree. For each path there are four states: as in the base (no entry, or a silent
//! one), an entry of the upper, deleted, or (in the current scan only) gone without a whiteout.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use super::rows::{Builder, NO_EXTRA, Rows};
use super::{Entry, Flags, Kind, Report, Scan};

/// No entry.
const NONE: u32 = u32::MAX;

/// The names of one directory in two runs, in the order of the layer: whiteouts and opaque markers, then all others.
#[derive(Clone, Copy)]
struct Names {
    mark: u32,
    mark_end: u32,
    other: u32,
    end: u32,
}

/// A directory that exists in both scans, and how far it has been compared.
struct Pair {
    earlier: Names,
    now: Names,
    /// Index of the directory in the current scan.
    dir: u32,
}

/// How to add a subtree that the image does not have yet.
#[derive(Clone, Copy, PartialEq, Eq)]
enum SubtreeBase {
    /// The image shows the base's content there.
    Base,
    /// The image shows nothing there.
    Empty,
}

struct Comparison<'a> {
    earlier: &'a Scan,
    now: &'a Scan,
    earlier_ends: Vec<u32>,
    now_ends: Vec<u32>,
    /// By index in the current scan: the entry is part of the changes.
    included: Vec<bool>,
    /// By index of a directory in the current scan: entries of the earlier scan that are in the image and are gone now.
    gone: HashMap<u32, Vec<u32>>,
    /// Something else differs than the times of directories.
    differs: bool,
}

/// The changes cannot be expressed on top of the earlier layer: the base's content would have to reappear where that
/// layer has an entry.
#[derive(Debug)]
struct NotExpressible;

impl Scan {
    /// Returns the entries that a layer on top of the earlier scan's layer needs to show this scan's tree.
    ///
    /// `unsure` returns whether the content that was read of an entry of the earlier scan may differ from what its time
    /// stamps stand for; such entries are always included. So are entries of the earlier scan whose stamps were too
    /// close to its clock.
    ///
    /// Returns `None` if no such layer exists, because the base's content would have to reappear where the earlier
    /// layer has an entry; everything has to be saved again then.
    pub fn changes_since(&self, earlier: &Scan, unsure: &dyn Fn(u32) -> bool) -> Option<Scan> {
        let mut comparison = Comparison::of(self, earlier, unsure)?;
        comparison.link_groups();
        comparison.parents();
        Some(comparison.scan())
    }

    /// Returns whether the tree is that of the earlier scan but for the times of directories: names, contents and all other
    /// metadata are the same. So it is where a temporary file came and went. `unsure` is as for [`Self::changes_since`].
    pub fn differs_only_in_times(&self, earlier: &Scan, unsure: &dyn Fn(u32) -> bool) -> bool {
        Comparison::of(self, earlier, unsure).is_some_and(|comparison| !comparison.differs)
    }

    /// Empties the changes of a volume if they consist only of directories above it that the changes of the containing
    /// `tree` include as well.
    pub fn clear_if_covered_by(&mut self, tree: &Scan) {
        let mut directories = None;
        let told = |index: u32| {
            let directories = directories.get_or_insert_with(|| {
                let emitted = tree.emitted();
                let there = emitted.filter(|&at| tree.entry(at).kind == Kind::Dir);
                there.map(|at| tree.path(at)).collect::<HashSet<_>>()
            });
            index < self.above && directories.contains(&self.path(index))
        };
        if self.emitted().all(told) {
            for index in 0..self.len() as u32 {
                self.rows.flags_mut(index).set(Flags::OMITTED);
            }
        }
    }

    /// Returns whether an entry's stamps show every change made after this scan.
    pub(crate) fn has_reliable_stamps(&self, entry: &Entry) -> bool {
        entry.root != 0 || self.clock.can_trust(entry.ctime, entry.ctime_nsec)
    }

    /// Returns whether two entries refer to the same state of an inode, by everything that the kernel updates on a
    /// change.
    fn same(&self, entry: &Entry, earlier: &Scan, before: &Entry) -> bool {
        same_stamps(entry, before) && {
            match (self.extra(entry), earlier.extra(before)) {
                (None, None) => true,
                (Some(a), Some(b)) => {
                    a.link == b.link && a.xattrs == b.xattrs && a.content == b.content
                }
                (Some(a), None) | (None, Some(a)) => {
                    a.link.is_none() && a.xattrs.is_none() && a.content.is_none()
                }
            }
        }
    }
}

/// Returns whether all time stamps and metadata are equal. The allocated size is not compared: it changes when data
/// reach the disk, without a change of content.
pub(super) fn same_stamps(a: &Entry, b: &Entry) -> bool {
    let times = |e: &Entry| (e.ctime, e.ctime_nsec, e.mtime, e.mtime_nsec);
    let inode = |e: &Entry| (e.kind, e.root, e.ino, e.rdev, e.size);
    let meta = |e: &Entry| (e.mode, e.uid, e.gid);
    times(a) == times(b)
        && inode(a) == inode(b)
        && meta(a) == meta(b)
        && (a.kind == Kind::Dir || a.nlink == b.nlink)
}

fn is_omitted(entry: &Entry) -> bool {
    entry.flags.has(Flags::OMITTED)
}

fn is_mark(kind: Kind) -> bool {
    matches!(kind, Kind::Whiteout | Kind::Opaque)
}

impl Names {
    fn of(scan: &Scan, ends: &[u32], dir: u32) -> Self {
        let end = ends[dir as usize];
        let mut other = dir + 1;
        while other < end && is_mark(scan.rows.kind(other)) {
            other += 1;
        }
        Self {
            mark: dir + 1,
            mark_end: other,
            other,
            end,
        }
    }

    fn next_mark(&self) -> u32 {
        if self.mark < self.mark_end {
            self.mark
        } else {
            NONE
        }
    }

    fn next_other(&self) -> u32 {
        if self.other < self.end {
            self.other
        } else {
            NONE
        }
    }
}

impl<'a> Comparison<'a> {
    /// Compares two scans; `None` if the changes cannot be expressed.
    fn of(now: &'a Scan, earlier: &'a Scan, unsure: &dyn Fn(u32) -> bool) -> Option<Self> {
        if !now.lowers_known || !earlier.lowers_known || now.above != earlier.above {
            return None;
        }
        let mut comparison = Self {
            earlier,
            now,
            earlier_ends: earlier.rows.ends(),
            now_ends: now.rows.ends(),
            included: vec![false; now.len()],
            gone: HashMap::new(),
            differs: false,
        };
        comparison.root(unsure).ok()?;
        comparison.tree(unsure).ok()?;
        Some(comparison)
    }

    /// Returns whether two directories are the same but for their times and what is in them. What was read of them is
    /// compared, so that this does not depend on their change times.
    fn only_times(&self, was: &Entry, is: &Entry) -> bool {
        let inode = |e: &Entry| (e.kind, e.root, e.ino);
        let looks = |e: &Entry| (e.mode, e.uid, e.gid, e.flags.has(Flags::OPAQUE));
        is.kind == Kind::Dir
            && inode(was) == inode(is)
            && looks(was) == looks(is)
            && self.now.xattrs(is) == self.earlier.xattrs(was)
    }

    fn root(&mut self, unsure: &dyn Fn(u32) -> bool) -> Result<(), NotExpressible> {
        let (Some(now), Some(before)) = (self.now.entries().next(), self.earlier.entries().next())
        else {
            return Err(NotExpressible);
        };
        match (is_omitted(&before), is_omitted(&now)) {
            (true, true) => {}
            (true, false) => {
                self.included[0] = true;
                self.differs |= unsure(0) || !self.only_times(&before, &now);
            }
            // The base's root may differ from the upper's, where the runtime sets a mode of its own.
            (false, true) => return Err(NotExpressible),
            (false, false) => {
                let looks = |e: &Entry| (e.mode, e.uid, e.gid, e.mtime);
                self.included[0] = looks(&now) != looks(&before)
                    || self.now.xattrs(&now) != self.earlier.xattrs(&before)
                    || unsure(0);
                self.differs |= unsure(0) || !self.only_times(&before, &now);
            }
        }
        Ok(())
    }

    fn tree(&mut self, unsure: &dyn Fn(u32) -> bool) -> Result<(), NotExpressible> {
        let mut open = vec![self.pair(0, 0)];
        while let Some(pair) = open.last_mut() {
            let heads = [
                pair.earlier.next_mark(),
                pair.earlier.next_other(),
                pair.now.next_mark(),
                pair.now.next_other(),
            ];
            let name = |which: usize, at: u32| {
                let scan = if which < 2 { self.earlier } else { self.now };
                scan.rows.name_at(at)
            };
            let Some(least) = (0..4)
                .filter(|&i| heads[i] != NONE)
                .map(|i| name(i, heads[i]))
                .min()
            else {
                open.pop();
                continue;
            };
            let mut at = [NONE; 4];
            for i in 0..4 {
                if heads[i] != NONE && name(i, heads[i]) == least {
                    at[i] = heads[i];
                }
            }
            let step = |ends: &[u32], at: u32, cursor: &mut u32| {
                if at != NONE {
                    *cursor = ends[at as usize];
                }
            };
            step(&self.earlier_ends, at[0], &mut pair.earlier.mark);
            step(&self.earlier_ends, at[1], &mut pair.earlier.other);
            step(&self.now_ends, at[2], &mut pair.now.mark);
            step(&self.now_ends, at[3], &mut pair.now.other);
            let dir = pair.dir;
            if let Some(both) = self.path(dir, at, unsure)? {
                open.push(both);
            }
        }
        Ok(())
    }

    fn pair(&self, earlier: u32, now: u32) -> Pair {
        Pair {
            earlier: Names::of(self.earlier, &self.earlier_ends, earlier),
            now: Names::of(self.now, &self.now_ends, now),
            dir: now,
        }
    }

    /// Compares one path: whiteout and entry of the earlier scan with those of the current one. Returns the directory
    /// to descend into, if both scans have one.
    fn path(
        &mut self,
        dir: u32,
        [mark_before, before, mark_now, now]: [u32; 4],
        unsure: &dyn Fn(u32) -> bool,
    ) -> Result<Option<Pair>, NotExpressible> {
        let entry_of = |scan: &Scan, at: u32| (at != NONE).then(|| scan.entry(at));
        let opaque = |mark: Option<Entry>| mark.is_some_and(|mark| mark.kind == Kind::Opaque);
        let (was_mark, is_mark) = (
            entry_of(self.earlier, mark_before),
            entry_of(self.now, mark_now),
        );
        if opaque(was_mark) || opaque(is_mark) {
            return Err(NotExpressible);
        }
        match (
            was_mark.is_some(),
            entry_of(self.earlier, before),
            is_mark.is_some(),
            entry_of(self.now, now),
        ) {
            // A directory above the scanned tree belongs to another layer: only its own metadata are compared here.
            (false, Some(was), false, Some(is)) if now < self.now.above => {
                let looks = |e: &Entry| (e.mode, e.uid, e.gid, e.mtime);
                self.included[now as usize] |=
                    looks(&was) != looks(&is) || self.now.xattrs(&is) != self.earlier.xattrs(&was);
                self.differs |= !self.only_times(&was, &is);
                return Ok(Some(self.pair(before, now)));
            }
            // Deleted in both.
            (true, _, true, _) | (false, None, false, None) => {}
            (false, _, true, _) => {
                self.included[mark_now as usize] = true;
                self.differs = true;
            }
            (true, _, false, Some(entry)) => self.subtree(now, &entry, SubtreeBase::Empty)?,
            // The base's content has to reappear where the image has a whiteout.
            (true, _, false, None) => return Err(NotExpressible),
            (false, None, false, Some(entry)) => self.subtree(now, &entry, SubtreeBase::Base)?,
            (false, Some(was), false, Some(is))
                if was.kind == Kind::Dir || is.kind != Kind::Dir =>
            {
                let same = self.now.same(&is, self.earlier, &was)
                    && self.earlier.has_reliable_stamps(&was)
                    && !unsure(before);
                let shown = match (is_omitted(&was), is_omitted(&is)) {
                    (true, true) => true,
                    // An entry equal to the base is in the image already; a directory that differs only in its time is
                    // not.
                    (true, false) => same && was.flags.has(Flags::UNCHANGED),
                    (false, _) => same,
                };
                self.included[now as usize] |= !shown;
                self.differs |= !shown && (unsure(before) || !self.only_times(&was, &is));
                if (was.kind, is.kind) == (Kind::Dir, Kind::Dir) {
                    return Ok(Some(self.pair(before, now)));
                }
            }
            // A directory that replaces another kind of entry.
            (false, Some(_), false, Some(is)) => self.subtree(now, &is, SubtreeBase::Empty)?,
            (false, Some(was), false, None) => {
                if is_omitted(&was) || was.flags.has(Flags::IN_BASE) {
                    let mut range = before..self.earlier_ends[before as usize];
                    if !range.all(|at| self.earlier.rows.flags(at).has(Flags::OMITTED)) {
                        return Err(NotExpressible);
                    }
                } else {
                    self.gone.entry(dir).or_default().push(before);
                    self.differs = true;
                }
            }
        }
        Ok(None)
    }

    fn subtree(&mut self, at: u32, entry: &Entry, how: SubtreeBase) -> Result<(), NotExpressible> {
        let range = at..self.now_ends[at as usize];
        if how == SubtreeBase::Empty {
            // The base's content of the directory, which is not in the upper, would be missing.
            let shows_base = |e: &Entry| {
                e.kind == Kind::Dir
                    && e.root == 0
                    && e.flags.has(Flags::IN_BASE)
                    && !e.flags.has(Flags::OPAQUE)
                    && !self.now.extra(e).is_some_and(|extra| extra.moved)
            };
            if shows_base(entry) {
                return Err(NotExpressible);
            }
        }
        for index in range {
            let entry = self.now.entry(index);
            let taken = match how {
                SubtreeBase::Base => !is_omitted(&entry),
                SubtreeBase::Empty => !is_mark(entry.kind),
            };
            self.included[index as usize] |= taken;
            // A directory of the base that was copied up.
            let of_base = how == SubtreeBase::Base && entry.flags.has(Flags::TIME_ONLY);
            self.differs |= taken && !(of_base && entry.kind == Kind::Dir);
        }
        Ok(())
    }

    /// Includes every name of a changed hard link group: a partial group would be a separate file.
    fn link_groups(&mut self) {
        let linked = |e: &Entry| e.nlink > 1 && e.kind != Kind::Dir && !is_mark(e.kind);
        let mut changed = HashSet::new();
        for (index, _) in (0..).zip(&self.included).filter(|(_, taken)| **taken) {
            let entry = self.now.entry(index);
            if linked(&entry) {
                changed.insert((entry.root, entry.ino));
            }
        }
        if changed.is_empty() {
            return;
        }
        for (entry, taken) in self.now.entries().zip(&mut self.included) {
            *taken |= linked(&entry) && changed.contains(&(entry.root, entry.ino));
        }
    }

    /// Includes every parent directory of a change, with its current metadata.
    fn parents(&mut self) {
        for &dir in self.gone.keys() {
            self.included[dir as usize] |= dir != 0;
        }
        for index in (1..self.included.len()).rev() {
            let parent = self.now.parent(index as u32) as usize;
            self.included[parent] |= self.included[index] && parent != 0;
        }
    }

    fn scan(mut self) -> Scan {
        let now = self.now;
        let mut changes = Builder::new(Rows::sharing(&now.rows));
        let mut moved: HashMap<u32, u32> = HashMap::new();
        for index in 0..now.len() as u32 {
            let taken = self.included[index as usize];
            if index != 0 && !taken {
                continue;
            }
            let entry = now.entry(index);
            if index != 0 && is_mark(entry.kind) {
                continue;
            }
            let parent = moved.get(&entry.parent).copied().unwrap_or(0);
            let mut flags = entry.flags;
            if index == 0 && !taken {
                flags.set(Flags::OMITTED);
            } else {
                flags.clear(Flags::OMITTED);
            }
            let to = changes.rows.push(parent, flags, now.rows.place(index));
            if entry.kind == Kind::Dir {
                moved.insert(index, to);
                self.whiteouts(&mut changes, index, to);
            }
        }
        Scan {
            rows: changes.finish(),
            roots: Arc::clone(&now.roots),
            lowers_known: true,
            above: now.above,
            clock: now.clock,
            report: Report::default(),
        }
    }

    /// Adds the whiteouts of one directory, sorted by name.
    fn whiteouts(&mut self, changes: &mut Builder, dir: u32, to: u32) {
        let names = Names::of(self.now, &self.now_ends, dir);
        let mut deleted: Vec<&[u8]> = (names.mark..names.mark_end)
            .filter(|&mark| self.included[mark as usize])
            .map(|mark| self.now.rows.name_at(mark))
            .collect();
        let gone = self.gone.remove(&dir).unwrap_or_default();
        deleted.extend(gone.into_iter().map(|at| self.earlier.rows.name_at(at)));
        deleted.sort_unstable();
        for name in deleted {
            let mark = Entry {
                kind: Kind::Whiteout,
                extra: NO_EXTRA,
                ..Entry::default()
            };
            changes.push(&mark, to, name, None);
        }
    }
}
