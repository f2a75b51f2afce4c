//! What became of a tree since an earlier scan, as a scan of its own that a layer can be made of.
//!
//! An image that holds the earlier scan's layer over the base shows the earlier tree; with the layer of the changes on
//! top, it shows this one. Each path is held against what the image has there so far, in four states: as the base has
//! it (no entry, or a silent one), something of the upper's, deleted, or (in this scan only) gone without a trace.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use super::rows::{Builder, NO_EXTRA, Rows};
use super::{Entry, Flags, Kind, Report, Scan};

/// No entry.
const NONE: u32 = u32::MAX;

/// Names of one directory, in two runs as the layer's order has them: marks, then the others.
#[derive(Clone, Copy)]
struct Names {
    mark: u32,
    mark_end: u32,
    other: u32,
    end: u32,
}

/// A directory that both scans have, as far as it was compared.
struct Pair {
    earlier: Names,
    now: Names,
    /// Index of the directory now.
    dir: u32,
}

/// What to do with a part of the tree that the image does not have so.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Take {
    /// The image shows the base there.
    OverBase,
    /// The image shows nothing there.
    OverNothing,
}

struct Comparison<'a> {
    earlier: &'a Scan,
    now: &'a Scan,
    earlier_ends: Vec<u32>,
    now_ends: Vec<u32>,
    /// By index now: belongs to the changes.
    take: Vec<bool>,
    /// By index now: names of that directory that the image has and that are gone.
    gone: HashMap<u32, Vec<u32>>,
}

/// The changes cannot be said on top of the earlier layer: where it has something, the base is to be seen again.
#[derive(Debug)]
struct Inexpressible;

impl Scan {
    /// What a layer on top of the earlier scan's must have to show this scan's tree.
    ///
    /// `unsure` says of an entry of the earlier scan that what was read of it may not be what its stamps stand for: it
    /// is taken whatever they say now. An earlier scan's entries that were stamped too close to its clock are taken in
    /// any case.
    ///
    /// `None` when no layer on top can do it, because the base would have to be seen where the earlier layer has
    /// something: then everything has to be saved anew.
    pub fn changes_since(&self, earlier: &Scan, unsure: &dyn Fn(u32) -> bool) -> Option<Scan> {
        if !self.lowers_known || !earlier.lowers_known || self.above != earlier.above {
            return None;
        }
        let mut comparison = Comparison {
            earlier,
            now: self,
            earlier_ends: earlier.rows.ends(),
            now_ends: self.rows.ends(),
            take: vec![false; self.len()],
            gone: HashMap::new(),
        };
        comparison.root(unsure).ok()?;
        comparison.tree(unsure).ok()?;
        comparison.link_groups();
        comparison.parents();
        Some(comparison.scan())
    }

    /// Takes everything out of the changes of a volume that are none but of directories above it, where those of the
    /// tree that they belong to have them as well.
    pub fn leave_to(&mut self, tree: &Scan) {
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
                self.rows.flags_mut(index).set(Flags::SILENT);
            }
        }
    }

    /// Whether an entry's stamps show every change that came after this scan.
    pub fn settled(&self, entry: &Entry) -> bool {
        entry.root != 0 || self.clock.settles(entry.ctime, entry.ctime_nsec)
    }

    /// Whether what lies behind two entries is the same, by all that the kernel moves when it changes.
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

/// Allocated size is not among them: it moves when data reach the disk, which changes nothing.
pub(super) fn same_stamps(a: &Entry, b: &Entry) -> bool {
    let times = |e: &Entry| (e.ctime, e.ctime_nsec, e.mtime, e.mtime_nsec);
    let inode = |e: &Entry| (e.kind, e.root, e.ino, e.rdev, e.size);
    let meta = |e: &Entry| (e.mode, e.uid, e.gid);
    times(a) == times(b)
        && inode(a) == inode(b)
        && meta(a) == meta(b)
        && (a.kind == Kind::Dir || a.nlink == b.nlink)
}

fn silent(entry: &Entry) -> bool {
    entry.flags.has(Flags::SILENT)
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

impl Comparison<'_> {
    fn root(&mut self, unsure: &dyn Fn(u32) -> bool) -> Result<(), Inexpressible> {
        let (Some(now), Some(before)) = (self.now.entries().next(), self.earlier.entries().next())
        else {
            return Err(Inexpressible);
        };
        match (silent(&before), silent(&now)) {
            (true, true) => {}
            (true, false) => self.take[0] = true,
            // What the base has is not what the upper's root has, where a runtime gives that its own mode.
            (false, true) => return Err(Inexpressible),
            (false, false) => {
                let looks = |e: &Entry| (e.mode, e.uid, e.gid, e.mtime);
                self.take[0] = looks(&now) != looks(&before)
                    || self.now.xattrs(&now) != self.earlier.xattrs(&before)
                    || unsure(0);
            }
        }
        Ok(())
    }

    fn tree(&mut self, unsure: &dyn Fn(u32) -> bool) -> Result<(), Inexpressible> {
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

    /// One path: the earlier scan's mark and entry, and this one's. A directory that both have is to be gone through.
    fn path(
        &mut self,
        dir: u32,
        [mark_before, before, mark_now, now]: [u32; 4],
        unsure: &dyn Fn(u32) -> bool,
    ) -> Result<Option<Pair>, Inexpressible> {
        let entry_of = |scan: &Scan, at: u32| (at != NONE).then(|| scan.entry(at));
        let opaque = |mark: Option<Entry>| mark.is_some_and(|mark| mark.kind == Kind::Opaque);
        let (was_mark, is_mark) = (
            entry_of(self.earlier, mark_before),
            entry_of(self.now, mark_now),
        );
        if opaque(was_mark) || opaque(is_mark) {
            return Err(Inexpressible);
        }
        match (
            was_mark.is_some(),
            entry_of(self.earlier, before),
            is_mark.is_some(),
            entry_of(self.now, now),
        ) {
            // A directory above what was scanned is another layer's; here only what it looks like.
            (false, Some(was), false, Some(is)) if now < self.now.above => {
                let looks = |e: &Entry| (e.mode, e.uid, e.gid, e.mtime);
                self.take[now as usize] |=
                    looks(&was) != looks(&is) || self.now.xattrs(&is) != self.earlier.xattrs(&was);
                return Ok(Some(self.pair(before, now)));
            }
            // Deleted then and now.
            (true, _, true, _) | (false, None, false, None) => {}
            (false, _, true, _) => self.take[mark_now as usize] = true,
            (true, _, false, Some(entry)) => self.subtree(now, &entry, Take::OverNothing)?,
            // The base is to be seen where the image has it deleted.
            (true, _, false, None) => return Err(Inexpressible),
            (false, None, false, Some(entry)) => self.subtree(now, &entry, Take::OverBase)?,
            (false, Some(was), false, Some(is))
                if was.kind == Kind::Dir || is.kind != Kind::Dir =>
            {
                let same = self.now.same(&is, self.earlier, &was)
                    && self.earlier.settled(&was)
                    && !unsure(before);
                let shown = match (silent(&was), silent(&is)) {
                    (true, true) => true,
                    // What equals the base is in the image as it is; a directory whose time alone differs is not.
                    (true, false) => same && was.flags.has(Flags::UNCHANGED),
                    (false, _) => same,
                };
                self.take[now as usize] |= !shown;
                if (was.kind, is.kind) == (Kind::Dir, Kind::Dir) {
                    return Ok(Some(self.pair(before, now)));
                }
            }
            // A directory where there was none.
            (false, Some(_), false, Some(is)) => self.subtree(now, &is, Take::OverNothing)?,
            (false, Some(was), false, None) => {
                if silent(&was) || was.flags.has(Flags::IN_BASE) {
                    let mut range = before..self.earlier_ends[before as usize];
                    if !range.all(|at| self.earlier.rows.flags(at).has(Flags::SILENT)) {
                        return Err(Inexpressible);
                    }
                } else {
                    self.gone.entry(dir).or_default().push(before);
                }
            }
        }
        Ok(None)
    }

    fn subtree(&mut self, at: u32, entry: &Entry, how: Take) -> Result<(), Inexpressible> {
        let range = at..self.now_ends[at as usize];
        if how == Take::OverNothing {
            // What the base has in it, and the upper does not, would be missing.
            let shows_base = |e: &Entry| {
                e.kind == Kind::Dir
                    && e.root == 0
                    && e.flags.has(Flags::IN_BASE)
                    && !e.flags.has(Flags::OPAQUE)
                    && !self.now.extra(e).is_some_and(|extra| extra.moved)
            };
            if shows_base(entry) {
                return Err(Inexpressible);
            }
        }
        for index in range {
            let entry = self.now.entry(index);
            self.take[index as usize] |= match how {
                Take::OverBase => !silent(&entry),
                Take::OverNothing => !is_mark(entry.kind),
            };
        }
        Ok(())
    }

    /// A changed group of hard links is there as a whole, or what links to it would be another file.
    fn link_groups(&mut self) {
        let linked = |e: &Entry| e.nlink > 1 && e.kind != Kind::Dir && !is_mark(e.kind);
        let mut changed = HashSet::new();
        for (index, _) in (0..).zip(&self.take).filter(|(_, taken)| **taken) {
            let entry = self.now.entry(index);
            if linked(&entry) {
                changed.insert((entry.root, entry.ino));
            }
        }
        if changed.is_empty() {
            return;
        }
        for (entry, taken) in self.now.entries().zip(&mut self.take) {
            *taken |= linked(&entry) && changed.contains(&(entry.root, entry.ino));
        }
    }

    /// Every parent directory of a change is there, with what it is like now.
    fn parents(&mut self) {
        for &dir in self.gone.keys() {
            self.take[dir as usize] |= dir != 0;
        }
        for index in (1..self.take.len()).rev() {
            let parent = self.now.parent(index as u32) as usize;
            self.take[parent] |= self.take[index] && parent != 0;
        }
    }

    fn scan(mut self) -> Scan {
        let now = self.now;
        let mut changes = Builder::new(Rows::sharing(&now.rows));
        let mut moved: HashMap<u32, u32> = HashMap::new();
        for index in 0..now.len() as u32 {
            let taken = self.take[index as usize];
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
                flags.set(Flags::SILENT);
            } else {
                flags.clear(Flags::SILENT);
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

    /// Everything deleted in one directory, by name.
    fn whiteouts(&mut self, changes: &mut Builder, dir: u32, to: u32) {
        let names = Names::of(self.now, &self.now_ends, dir);
        let mut deleted: Vec<&[u8]> = (names.mark..names.mark_end)
            .filter(|&mark| self.take[mark as usize])
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
