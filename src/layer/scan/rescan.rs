//! Rescans a tree that was scanned before: one `stat` per entry, and a full inspection only where something changed.
//!
//! The result equals that of a scan from scratch. This relies on the kernel: every change of an inode updates its
//! change time, and every added, removed or renamed entry updates that of the directory. Entries and directories whose
//! stamps are too close to the earlier scan's clock are treated as changed.

use std::collections::{HashMap, HashSet};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::OFlags;

use super::changes::same_stamps;
use super::earlier::EarlierScan;
use super::rows::{Builder, Rows};
use super::walk::{
    self, Cursor, EntrySource, Output, Task, Walk, WalkedDirectory, WalkedEntry, Walker,
};
use super::{Clock, Entry, Error, Flags, Kind, Options, Report, Roots, Scan};
use crate::node::overlay::lower::{Found, Place, Stack};
use crate::node::overlay::root::{Follow, is_absent};
use crate::node::overlay::xattr::proc_path;

/// Directories that a thread takes at a time.
const DIRECTORIES_PER_CHUNK: usize = 16;

/// State of the comparison of the earlier scan with the tree.
struct Comparison<'a> {
    earlier: EarlierScan<'a>,
    contexts: Mutex<HashMap<u32, Arc<Context>>>,
}

/// What a walk needs to know about a directory before it enters it.
struct Context {
    merge: Stack,
    base: Stack,
    hidden: bool,
}

impl Context {
    /// Returns the memory it takes, in bytes.
    fn weight(&self) -> u64 {
        let places = self.merge.iter().chain(&self.base);
        let places: usize = places
            .map(|place| size_of::<Place>() + place.path.len())
            .sum();
        (size_of::<Self>() + places) as u64
    }
}

impl Scan {
    /// Rescans the upper directory.
    ///
    /// `earlier` must be a scan of the same directories with the same rules. Returns `None` if the earlier scan cannot
    /// be used, or if too much changed during the rescan; a full scan is needed then.
    pub fn rescan(
        earlier: &Scan,
        roots: &Roots,
        options: &Options<'_>,
    ) -> Result<Option<Self>, Error> {
        if !roots.lowers_known || !earlier.lowers_known || earlier.rows.len() == 0 {
            return Ok(None);
        }
        if earlier.above != walk::above(roots.volume.as_ref()) {
            return Ok(None);
        }
        let clock = Clock::now();
        let (upper, lowers) = walk::open(roots)?;
        let last = u16::try_from(lowers.roots.len()).unwrap_or(u16::MAX);
        let content = earlier.rows.extras();
        let content = content.filter_map(|extra| extra.content.as_ref());
        let places = earlier
            .rows
            .roots()
            .chain(content.map(|content| content.root));
        if places.max() > Some(last) {
            return Ok(None);
        }
        let mut known = Comparison::new(earlier);
        let top = {
            let walker = Walker::new(&upper, &lowers, roots, options, None);
            // As for every directory, the root's stamps are read before its names.
            let top = walker.top()?;
            let Some(begin) = top.entries.last() else {
                return Ok(None);
            };
            known.compare_all(&walker, begin)?;
            top
        };
        let walker = Walker::new(&upper, &lowers, roots, options, Some(&known.earlier));
        let tops = known.walk_roots();
        let mut tasks = Vec::with_capacity(tops.len());
        {
            let mut reservation = walker.memory.reservation();
            for &top in &tops {
                let Some(task) = known.task(&walker, top)? else {
                    return Ok(None);
                };
                reservation.reserve(task.weight())?;
                tasks.push(task);
            }
        }
        let mut walk = walker.run(tasks)?;
        let report = std::mem::take(&mut walk.report);
        let rows = known.flatten(top, &tops, walk);
        // The limits apply to the whole tree, not only to what was walked.
        let counter = Walker::new(&upper, &lowers, roots, options, None);
        let mut reservation = counter.memory.reservation();
        let mut sets = HashSet::new();
        for entry in rows.iter().skip(1) {
            counter.count(&entry)?;
            let extra = rows.extra(&entry);
            reservation.reserve_entry_for_scan(rows.name(&entry), extra)?;
            if let Some(set) = extra.and_then(|extra| extra.xattrs.as_ref())
                && sets.insert(set.as_ptr())
            {
                reservation.reserve_set_for_scan(set)?;
            }
        }
        let report = known.report(report);
        let opened = if earlier.roots.is_empty() {
            let mut all = vec![upper];
            all.extend(lowers.roots);
            Arc::new(all)
        } else {
            Arc::clone(&earlier.roots)
        };
        walk::finish(rows, opened, roots, clock, report).map(Some)
    }
}

impl<'a> Comparison<'a> {
    fn new(scan: &'a Scan) -> Self {
        Self {
            earlier: EarlierScan::new(scan),
            contexts: Mutex::new(HashMap::new()),
        }
    }

    /// Takes the status of every entry and marks the directories that have to be walked.
    fn compare_all(&mut self, walker: &Walker<'_>, root: &Entry) -> Result<(), Error> {
        // Moved directories are always walked in full, as they are merged with directories from elsewhere.
        let mut moved = vec![
            false;
            if self.earlier.scan.rows.extras().any(|e| e.moved) {
                self.earlier.scan.len()
            } else {
                0
            }
        ];
        let mut directories = Vec::new();
        for (index, entry) in self.earlier.scan.entries().enumerate() {
            if let Some(above) = moved.get(entry.parent as usize).copied() {
                moved[index] = above
                    || self
                        .earlier
                        .scan
                        .extra(&entry)
                        .is_some_and(|extra| extra.moved);
                if moved[index] {
                    continue;
                }
            }
            if entry.kind == Kind::Dir && index as u32 >= self.earlier.scan.above {
                directories.push(index as u32);
            }
        }
        let next = AtomicUsize::new(0);
        let found: Mutex<Vec<u32>> = Mutex::new(Vec::new());
        let failed: Mutex<Option<Error>> = Mutex::new(None);
        let this = &*self;
        std::thread::scope(|scope| {
            let (mut started, mut refused) = (0, None);
            for _ in 0..walker.options.jobs.max(1) {
                let look = || {
                    let mut dirty = Vec::new();
                    let rights = walker.upper.enter();
                    loop {
                        let from = next.fetch_add(DIRECTORIES_PER_CHUNK, Ordering::Relaxed);
                        let Some(chunk) = directories
                            .get(from..directories.len().min(from + DIRECTORIES_PER_CHUNK))
                        else {
                            break;
                        };
                        if chunk.is_empty() {
                            break;
                        }
                        let looked = if walker.options.cancel.is_cancelled() {
                            Err(Error::Cancelled)
                        } else if let Err(error) = &rights {
                            let error = std::io::Error::other(error.to_string());
                            Err(walker.read_error(b"", error))
                        } else {
                            chunk.iter().try_for_each(|&dir| {
                                this.compare_directory(walker, dir, &mut dirty)
                            })
                        };
                        if let Err(error) = looked {
                            *failed.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                            break;
                        }
                    }
                    found
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .append(&mut dirty);
                };
                match std::thread::Builder::new().spawn_scoped(scope, look) {
                    Ok(_) => started += 1,
                    Err(error) => refused = Some(error),
                }
            }
            // With fewer threads it is slower. The current thread cannot do the work: access rights for the upper
            // directory are set per thread.
            if let (0, Some(error)) = (started, refused) {
                *failed.lock().unwrap_or_else(PoisonError::into_inner) = Some(Error::Thread(error));
            }
        });
        if let Some(error) = failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
            return Err(error);
        }
        for index in found.into_inner().unwrap_or_else(PoisonError::into_inner) {
            self.earlier.dirty[index as usize] = true;
        }
        let before = self.earlier.scan.entry(self.earlier.scan.above);
        self.earlier.dirty[self.earlier.scan.above as usize] |=
            !same_stamps(root, &before) || !self.earlier.scan.has_reliable_stamps(&before);
        Ok(())
    }

    /// Adds to `dirty` this directory and those of its subdirectories that have to be walked, as far as their status
    /// shows it.
    fn compare_directory(
        &self,
        walker: &Walker<'_>,
        dir: u32,
        dirty: &mut Vec<u32>,
    ) -> Result<(), Error> {
        let entry = &self.earlier.scan.entry(dir);
        let mut changed = entry.flags.has(Flags::PARTIAL)
            || (dir != self.earlier.scan.above && !self.earlier.scan.has_reliable_stamps(entry));
        let path = self.earlier.scan.path(dir);
        let fd = match walker
            .upper
            .open_beneath(&path, OFlags::PATH | OFlags::DIRECTORY)
        {
            Ok(fd) => fd,
            Err(error) if is_absent(&error) || walker.upper.is_denied(&error) => {
                dirty.push(dir);
                return Ok(());
            }
            Err(source) => return Err(walker.read_error(&path, source)),
        };
        for (name, index) in self.earlier.children(dir) {
            let before = &self.earlier.scan.entry(index);
            if matches!(before.kind, Kind::Whiteout | Kind::Opaque) {
                // A deleted name can only reappear by a change of the directory.
                continue;
            }
            let stat = walker
                .status(fd.as_fd(), name)
                .map_err(|e| walker.read_error(&path, e))?;
            let holds = match &stat {
                Some(stat) => walker.is_unchanged(&self.earlier, index, stat, &path)?,
                None => false,
            };
            if !holds {
                changed = true;
                if before.kind == Kind::Dir {
                    dirty.push(index);
                }
            }
        }
        if changed {
            dirty.push(dir);
        }
        Ok(())
    }

    /// Returns the directories to walk whose parents are not walked.
    fn walk_roots(&self) -> Vec<u32> {
        (0..self.earlier.dirty.len() as u32)
            .filter(|&index| {
                let parent = self.earlier.scan.parent(index) as usize;
                self.earlier.dirty[index as usize]
                    && (index == self.earlier.scan.above || !self.earlier.dirty[parent])
            })
            .collect()
    }

    /// Returns the task for a directory whose parent is not walked.
    fn task(&self, walker: &Walker<'_>, dir: u32) -> Result<Option<Task>, Error> {
        let Some(context) = self.context(walker, dir)? else {
            return Ok(None);
        };
        let path = self.earlier.scan.path(dir);
        let mut depth = 0;
        let mut at = dir;
        while at != 0 {
            depth += 1;
            at = self.earlier.scan.parent(at);
        }
        Ok(Some(Task {
            id: 0,
            depth,
            path,
            earlier: Some(dir),
            upper: true,
            merge: context.merge.clone(),
            base: context.base.clone(),
            full: false,
            hidden: context.hidden,
            opaque: false,
        }))
    }

    fn context(&self, walker: &Walker<'_>, dir: u32) -> Result<Option<Arc<Context>>, Error> {
        let mut chain = Vec::new();
        let mut at = dir;
        let contexts = || self.contexts.lock().unwrap_or_else(PoisonError::into_inner);
        let mut context = loop {
            if let Some(context) = contexts().get(&at) {
                break Arc::clone(context);
            }
            if at == self.earlier.scan.above {
                let Task {
                    merge,
                    base,
                    hidden,
                    ..
                } = walker.root_task()?;
                break Arc::new(Context {
                    merge,
                    base,
                    hidden,
                });
            }
            chain.push(at);
            at = self.earlier.scan.parent(at);
        };
        while let Some(index) = chain.pop() {
            let Some(next) = self.context_below(walker, &context, index)? else {
                return Ok(None);
            };
            walker
                .memory
                .reservation()
                .reserve_for_scan(next.weight())?;
            context = Arc::new(next);
            contexts().insert(index, Arc::clone(&context));
        }
        Ok(Some(context))
    }

    fn context_below(
        &self,
        walker: &Walker<'_>,
        parent: &Context,
        index: u32,
    ) -> Result<Option<Context>, Error> {
        let entry = &self.earlier.scan.entry(index);
        let (path, name) = (self.earlier.scan.path(index), self.earlier.scan.name(entry));
        let handle = match walker
            .upper
            .open_beneath(&path, OFlags::PATH | OFlags::DIRECTORY)
        {
            Ok(handle) => handle,
            Err(error) if is_absent(&error) || walker.upper.is_denied(&error) => return Ok(None),
            Err(source) => return Err(walker.read_error(&path, source)),
        };
        let at = proc_path(handle.as_fd());
        let attributes = walker.attributes_of(at, Follow::Yes, &path, &mut Vec::new())?;
        let opaque = attributes.opaque.as_deref() == Some(b"y");
        if attributes.redirect.is_some() || opaque != entry.flags.has(Flags::OPAQUE) {
            return Ok(None);
        }
        let stack = |below: &Stack| match walker.lowers.lookup(below, name) {
            Ok(Found::Dir { stack, .. }) => Ok(stack),
            Ok(_) => Ok(Stack::new()),
            Err(source) => Err(walker.read_error(&path, source)),
        };
        let base = stack(&parent.base)?;
        Ok(Some(Context {
            merge: if opaque {
                Stack::new()
            } else {
                stack(&parent.merge)?
            },
            hidden: !base.is_empty() && (parent.hidden || opaque),
            base,
        }))
    }

    /// Merges the entries of the earlier scan, where nothing changed, with the results of the walk.
    fn flatten(&self, top: Output, tops: &[u32], walk: Walk) -> Rows {
        enum Open {
            /// A walked directory, and its index.
            WalkedDirectory(Cursor, u32),
            /// Index of the next entry of the earlier scan, the end of the range, and the index of the directory.
            Kept(u32, u32, u32),
        }
        let tops: HashMap<u32, u32> = tops.iter().zip(0..).map(|(&top, id)| (top, id)).collect();
        let walked: usize = walk.outputs.iter().map(WalkedDirectory::len).sum();
        let mut by_id = walk::by_id(walk.outputs, walk.count);
        let share = self.earlier.scan.rows.is_worth_sharing();
        let mut rows = if share {
            Rows::sharing(&self.earlier.scan.rows)
        } else {
            Rows::default()
        };
        rows.reserve(self.earlier.scan.len() + walked);
        let begin = walk::append_chain(&mut rows, top);
        let buffers: Vec<u32> = walk.buffers.into_iter().map(|s| rows.add(s)).collect();
        let mut rows = Builder::new(rows);
        let mut walked = |rows: &mut Builder, id: u32, index: u32| {
            let walked: WalkedDirectory = by_id[id as usize].take()?;
            walked.mark(rows.rows.flags_mut(index));
            Some(Open::WalkedDirectory(Cursor::new(walked), index))
        };
        let kept =
            |rows: &mut Builder,
             dir: u32,
             index: u32,
             walked: &mut dyn FnMut(&mut Builder, u32, u32) -> Option<Open>| {
                match tops.get(&dir) {
                    Some(&id) => walked(rows, id, index),
                    None => Some(Open::Kept(dir + 1, self.earlier.ends[dir as usize], index)),
                }
            };
        let mut open: Vec<Open> = kept(&mut rows, self.earlier.scan.above, begin, &mut walked)
            .into_iter()
            .collect();
        while let Some(top) = open.last_mut() {
            let below = match top {
                Open::WalkedDirectory(cursor, parent) => {
                    let Some(WalkedEntry { flags, from, child }) = cursor.next() else {
                        open.pop();
                        continue;
                    };
                    let (index, same) = match from {
                        EntrySource::Buffer(buffer, number) => {
                            let place = buffers[buffer as usize] + number;
                            (rows.rows.push(*parent, flags, place), None)
                        }
                        EntrySource::Earlier(at) => {
                            (self.take_over(&mut rows, at, *parent, share), Some(at))
                        }
                    };
                    match (child, same) {
                        (Some(id), _) => walked(&mut rows, id, index),
                        (None, Some(at)) if self.earlier.scan.rows.kind(at) == Kind::Dir => {
                            kept(&mut rows, at, index, &mut walked)
                        }
                        (None, _) => None,
                    }
                }
                Open::Kept(next, end, parent) => {
                    if next >= end {
                        open.pop();
                        continue;
                    }
                    let at = *next;
                    *next = self.earlier.ends[at as usize];
                    let index = self.take_over(&mut rows, at, *parent, share);
                    if self.earlier.scan.rows.kind(at) == Kind::Dir {
                        kept(&mut rows, at, index, &mut walked)
                    } else {
                        None
                    }
                }
            };
            open.extend(below);
        }
        rows.finish()
    }

    /// Adds an entry of the earlier scan. Its facts are copied if they are not shared.
    fn take_over(&self, to: &mut Builder, at: u32, parent: u32, share: bool) -> u32 {
        let rows = &self.earlier.scan.rows;
        let mut flags = rows.flags(at);
        flags.clear(Flags::OMITTED);
        flags.clear(Flags::STUBS);
        if share {
            return to.rows.push(parent, flags, rows.place(at));
        }
        let mut entry = rows.entry(at);
        entry.flags = flags;
        to.push(
            &entry,
            parent,
            rows.name(&entry),
            rows.extra(&entry).cloned(),
        )
    }

    /// Keeps the findings on entries that were not inspected again.
    fn report(&self, mut new: Report) -> Report {
        for (name, count) in self.earlier.scan.report.dropped_xattrs.iter() {
            new.dropped_xattrs.at_least(name, count);
        }
        new
    }
}
