//! The walk: directories from a shared queue, one at a time a thread, put into the layer's order at the end.

use std::collections::{HashMap, HashSet};
use std::ffi::CString;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use nix::sched::{CloneFlags, unshare};
use rustix::fs::{FileType, OFlags, Stat};

use super::again::Earlier;
use super::{
    Caps, Clock, Elsewhere, Entry, Error, Excluded, Extra, Facts, Flags, Kind, Options, Reason,
    Report, Roots, Scan, Xattr,
};
use crate::escape;
use crate::overlay::lower::{Found, Lowers, Place, Stack, basename, join};
use crate::overlay::owner;
use crate::overlay::root::{
    self, Follow, Root, is_absent, proc_path, read_link_at, stat_at, xattr_at, xattr_names_at,
};
use crate::overlay::volume::Volume;
use crate::overlay::xattr::{
    Fate, Mark, Namespace, ValueError, acl_inside, capability_inside, fate, plain_fate,
};

/// setuid and setgid.
const SET_ID: u16 = 0o6000;
/// The attribute that holds file capabilities.
const CAPABILITY: &[u8] = b"security.capability";
/// `Entry::extra` of entries without any.
pub(super) const NO_EXTRA: u32 = u32::MAX;

/// A directory to be walked.
pub(super) struct Task {
    /// Index of its output.
    pub(super) id: u32,
    pub(super) depth: u32,
    /// Path in the layer.
    pub(super) path: Vec<u8>,
    /// The earlier scan's directory of this path, if what it says of what is in it holds where nothing changed.
    pub(super) earlier: Option<u32>,
    /// Whether the upper has it (then under the same path).
    pub(super) upper: bool,
    /// What the overlay merges beneath the upper's.
    pub(super) merge: Stack,
    /// What the base has at the layer's path.
    pub(super) base: Stack,
    /// The directory was moved here: all that is merged must be in the layer, not the upper's part alone.
    pub(super) full: bool,
    /// What the base has here must not shine through.
    pub(super) hidden: bool,
    /// The same, but what the base has here is not known.
    pub(super) opaque: bool,
}

/// What walking one directory gave.
#[derive(Default)]
pub(super) struct Output {
    pub(super) id: u32,
    pub(super) entries: Vec<Entry>,
    names: Vec<u8>,
    extras: Vec<Extra>,
    /// Entry index (in this output) of each subdirectory, and its output.
    pub(super) children: HashMap<u32, u32>,
    /// Entry index of each subdirectory that was not walked, and the earlier scan's directory that it equals.
    pub(super) kept: HashMap<u32, u32>,
    /// Something was left out here that the runtime had made.
    pub(super) stubs: bool,
    /// The entries are not all that is here.
    pub(super) partial: bool,
}

impl Output {
    /// Notes on a directory's entry what walking it told.
    pub(super) fn mark(&self, directory: &mut Entry) {
        for (is, flag) in [(self.stubs, Flags::STUBS), (self.partial, Flags::PARTIAL)] {
            if is {
                directory.flags.set(flag);
            } else {
                directory.flags.clear(flag);
            }
        }
    }

    fn name(&self, entry: &Entry) -> &[u8] {
        let at = entry.name_at as usize;
        &self.names[at..at + usize::from(entry.name_len)]
    }
}

struct Queue {
    tasks: Vec<Task>,
    outputs: Vec<Output>,
    working: usize,
    next_id: u32,
    failed: Option<Error>,
}

pub(super) struct Walker<'a> {
    pub(super) upper: &'a Root,
    pub(super) lowers: &'a Lowers,
    lowers_known: bool,
    namespace: Namespace,
    /// What is walked instead of an upper directory: nothing in it is a mark of an overlay's, and nothing that the base
    /// has at its path is to be seen.
    volume: Option<&'a Volume>,
    pub(super) options: &'a Options<'a>,
    /// What is held against, where the tree was scanned before.
    pub(super) earlier: Option<&'a Earlier<'a>>,
    queue: Mutex<Queue>,
    changed: Condvar,
    report: Mutex<Report>,
    count: Counters,
}

#[derive(Default)]
struct Counters {
    entries: AtomicU64,
    bytes: AtomicU64,
    holes: AtomicU64,
}

/// Attributes of one entry, sorted by what becomes of them.
#[derive(Default)]
pub(super) struct Attributes {
    kept: Vec<Xattr>,
    pub(super) opaque: Option<Vec<u8>>,
    pub(super) redirect: Option<Vec<u8>>,
    metacopy: bool,
    whiteout: bool,
    nlink: Option<Vec<u8>>,
}

pub(super) fn walk(roots: &Roots, options: &Options<'_>) -> Result<Scan, Error> {
    let clock = Clock::now();
    let (upper, lowers) = open(roots)?;
    let walker = Walker::new(&upper, &lowers, roots, options, None);
    let top = walker.top()?;
    let (outputs, count, report) = walker.run(vec![walker.root_task()?])?;
    let flat = flatten(top, outputs, count);
    let mut all_roots = vec![upper];
    all_roots.extend(lowers.roots);
    finish(flat, Arc::new(all_roots), roots, clock, report)
}

/// Opens the directories of an overlay, if their marks can be read.
pub(super) fn open(roots: &Roots) -> Result<(Root, Lowers), Error> {
    if roots.namespace == Namespace::Trusted && !may_read_trusted() {
        return Err(Error::MarksUnreadable);
    }
    let open = |path: &Path| Root::open(path).map_err(|source| read_error(path, b"", source));
    let upper = match &roots.volume {
        Some(volume) => volume.root().clone(),
        None => open(&roots.upper)?,
    };
    let lowers = Lowers {
        roots: roots
            .lowers
            .iter()
            .chain(&roots.data_only)
            .map(|p| open(p))
            .collect::<Result<_, _>>()?,
        merged: roots.lowers.len(),
        namespace: roots.namespace,
    };
    Ok((upper, lowers))
}

/// Takes out what needs no entry, and puts the scan together.
pub(super) fn finish(
    mut flat: Flat,
    opened: Arc<Vec<Root>>,
    roots: &Roots,
    clock: Clock,
    mut report: Report,
) -> Result<Scan, Error> {
    check_indexed(&flat)?;
    report.split_links = split_links(&flat);
    prune(&mut flat);
    report.excluded.sort_by(|a, b| a.path.cmp(&b.path));
    report.sockets.sort();
    report.privileged.sort();
    report.vanished.sort();
    Ok(Scan {
        entries: flat.entries,
        names: flat.names,
        extras: flat.extras,
        roots: opened,
        lowers_known: roots.lowers_known,
        above: above(roots.volume.as_ref()),
        clock,
        report,
    })
}

/// Directories above what is walked, the root included: none where that is the root.
pub(super) fn above(volume: Option<&Volume>) -> u32 {
    volume.map_or(0, |volume| volume.above().count() as u32 + 1)
}

impl<'a> Walker<'a> {
    pub(super) fn new(
        upper: &'a Root,
        lowers: &'a Lowers,
        roots: &'a Roots,
        options: &'a Options<'a>,
        earlier: Option<&'a Earlier<'a>>,
    ) -> Self {
        Self {
            upper,
            lowers,
            lowers_known: roots.lowers_known,
            namespace: roots.namespace,
            volume: roots.volume.as_ref(),
            options,
            earlier,
            queue: Mutex::new(Queue {
                tasks: Vec::new(),
                outputs: Vec::new(),
                working: 0,
                next_id: 0,
                failed: None,
            }),
            changed: Condvar::new(),
            report: Mutex::new(Report::default()),
            count: Counters::default(),
        }
    }

    /// The directory with which all walks begin: the root, or that which is mounted.
    pub(super) fn root_task(&self) -> Result<Task, Error> {
        let base = self.lowers.root_stack();
        let Some(volume) = self.volume else {
            return Ok(Task {
                id: 0,
                depth: 0,
                path: Vec::new(),
                earlier: None,
                upper: true,
                merge: base.clone(),
                base,
                full: false,
                hidden: false,
                opaque: false,
            });
        };
        let mut base = base;
        for name in volume.at().split(|&b| b == b'/') {
            let found = self.lowers.lookup(&base, name);
            base = match found.map_err(|e| self.read_error(volume.at(), e))? {
                Found::Dir { stack, .. } => stack,
                Found::Absent | Found::Other { .. } => Stack::new(),
            };
        }
        Ok(Task {
            id: 0,
            depth: above(Some(volume)),
            path: volume.at().to_vec(),
            earlier: None,
            upper: true,
            merge: Stack::new(),
            hidden: !base.is_empty(),
            base,
            full: false,
            opaque: !self.lowers_known,
        })
    }

    /// Walks the directories of `tasks` and what is to be walked below them: the outputs (those of `tasks` numbered as
    /// they come), how many there are, and what there is to tell.
    pub(super) fn run(&self, mut tasks: Vec<Task>) -> Result<(Vec<Output>, u32, Report), Error> {
        {
            let mut queue = lock(&self.queue);
            for (id, task) in tasks.iter_mut().enumerate() {
                task.id = id as u32;
            }
            queue.next_id = tasks.len() as u32;
            queue.tasks = tasks;
        }
        std::thread::scope(|scope| {
            for _ in 0..self.options.jobs.max(1) {
                scope.spawn(|| self.work());
            }
        });
        let mut queue = lock(&self.queue);
        if let Some(error) = queue.failed.take() {
            return Err(error);
        }
        let outputs = std::mem::take(&mut queue.outputs);
        Ok((
            outputs,
            queue.next_id,
            std::mem::take(&mut *lock(&self.report)),
        ))
    }
}

impl Walker<'_> {
    fn work(&self) {
        // A working directory of this thread's own: attributes can only be asked for by path, and a name alone is the
        // shortest. Where that is not granted the way leads through /proc, which takes twice as long.
        let own_cwd = unshare(CloneFlags::CLONE_FS).is_ok();
        loop {
            let mut queue = lock(&self.queue);
            let task = loop {
                if queue.failed.is_some() {
                    return;
                }
                if let Some(task) = queue.tasks.pop() {
                    queue.working += 1;
                    break task;
                }
                if queue.working == 0 {
                    return;
                }
                queue = self
                    .changed
                    .wait(queue)
                    .unwrap_or_else(PoisonError::into_inner);
            };
            drop(queue);
            let result = if self.options.cancel.load(Ordering::Relaxed) {
                Err(Error::Cancelled)
            } else {
                self.directory(&task, own_cwd)
            };
            let mut queue = lock(&self.queue);
            queue.working -= 1;
            match result {
                Ok((mut output, tasks)) => {
                    // Subdirectories get the numbers of their outputs here, where the counter is.
                    for (entry, mut task) in tasks {
                        task.id = queue.next_id;
                        queue.next_id += 1;
                        output.children.insert(entry, task.id);
                        queue.tasks.push(task);
                    }
                    queue.outputs.push(output);
                }
                Err(error) => queue.failed = Some(error),
            }
            drop(queue);
            self.changed.notify_all();
        }
    }

    /// The entry of the root directory itself; for what is mounted elsewhere, all from the root on down to it.
    pub(super) fn top(&self) -> Result<Output, Error> {
        match self.volume {
            None => self.root_entry(),
            Some(volume) => self.entries_down_to(volume),
        }
    }

    /// The directories on the way are as the container sees them, the mounted one as it is itself. What the image has at
    /// the root is another layer's.
    fn entries_down_to(&self, volume: &Volume) -> Result<Output, Error> {
        let mut output = Output::default();
        output.entries.push(Entry {
            kind: Kind::Dir,
            extra: NO_EXTRA,
            flags: Flags::SILENT,
            ..Entry::default()
        });
        let handle = self.upper.open_dir(volume.at());
        let handle = handle.map_err(|source| self.read_error(volume.at(), source))?;
        let mounted = (volume.name(), handle.as_fd());
        for (name, fd) in volume.above().chain([mounted]) {
            let failed = |source| self.read_error(volume.at(), source);
            let stat = rustix::fs::fstat(fd).map_err(|e| failed(e.into()))?;
            let attributes =
                self.attributes_of(proc_path(fd), Follow::Yes, volume.at(), &mut Vec::new())?;
            let mut entry = self.entry(&stat, 0, Kind::Dir, volume.at())?;
            entry.name_at = output.names.len() as u32;
            entry.name_len = name.len() as u16;
            output.names.extend(name);
            if !attributes.kept.is_empty() {
                entry.extra = output.extras.len() as u32;
                output.extras.push(Extra {
                    xattrs: attributes.kept,
                    ..Extra::default()
                });
            }
            output.entries.push(entry);
        }
        Ok(output)
    }

    /// In the layer only if its mode, owner or attributes changed.
    fn root_entry(&self) -> Result<Output, Error> {
        let stat = self
            .upper
            .stat(b"")
            .and_then(|s| s.ok_or(io::ErrorKind::NotFound.into()));
        let stat = stat.map_err(|source| self.read_error(b"", source))?;
        let handle = self
            .upper
            .open_dir(b"")
            .map_err(|source| self.read_error(b"", source))?;
        let mut output = Output::default();
        let attributes =
            self.attributes_of(proc_path(handle.as_fd()), Follow::Yes, b"", &mut Vec::new())?;
        let mut entry = self.entry(&stat, 0, Kind::Dir, b"")?;
        let mut silent = !self.lowers_known || self.lowers.merged == 0;
        if let (false, Some(place)) = (silent, self.lowers.root_stack().first()) {
            let (base, kept) = self.base_facts(place)?;
            let by_runtime = self.options.runtime_root_mode == Some(u32::from(entry.mode));
            silent = (by_runtime || mode_of(&base) == entry.mode)
                && self.owner_of(&base, b"")? == (entry.uid, entry.gid)
                && kept == attributes.kept;
        }
        if silent {
            entry.flags.set(Flags::SILENT);
        }
        if !attributes.kept.is_empty() {
            output.extras.push(Extra {
                xattrs: attributes.kept,
                ..Extra::default()
            });
            entry.extra = 0;
        }
        output.entries.push(entry);
        Ok(output)
    }

    fn directory(&self, task: &Task, own_cwd: bool) -> Result<(Output, Vec<(u32, Task)>), Error> {
        let mut dir = Directory {
            walker: self,
            task,
            own_cwd,
            output: Output {
                id: task.id,
                ..Output::default()
            },
            tasks: Vec::new(),
            decided: HashSet::new(),
            deleted: HashSet::new(),
            known: match (self.earlier, task.earlier) {
                (Some(earlier), Some(dir)) => earlier.children(dir).collect(),
                _ => HashMap::new(),
            },
            report: Report::default(),
        };
        if task.opaque {
            dir.push_mark(Kind::Opaque, b"")?;
        }
        if task.upper {
            dir.upper_entries()?;
        }
        if task.full {
            dir.merged_entries()?;
        }
        if task.hidden {
            dir.hide_base()?;
        }
        let Directory {
            output,
            tasks,
            report,
            ..
        } = dir;
        lock(&self.report).add(report);
        Ok(sorted(output, tasks))
    }

    pub(super) fn entry(
        &self,
        stat: &Stat,
        root: u16,
        kind: Kind,
        path: &[u8],
    ) -> Result<Entry, Error> {
        let (uid, gid) = self.owner_of(stat, path)?;
        let size = if kind == Kind::File {
            u64::try_from(stat.st_size).unwrap_or(0)
        } else {
            0
        };
        Ok(Entry {
            parent: 0,
            name_at: 0,
            name_len: 0,
            root,
            kind,
            flags: Flags::default(),
            mode: mode_of(stat),
            extra: NO_EXTRA,
            uid,
            gid,
            nlink: stat.st_nlink as u32,
            ino: stat.st_ino,
            size,
            allocated: stat.st_blocks as u64 * 512,
            rdev: if matches!(kind, Kind::Char | Kind::Block) {
                stat.st_rdev
            } else {
                0
            },
            mtime: stat.st_mtime,
            mtime_nsec: stat.st_mtime_nsec as u32,
            ctime: stat.st_ctime,
            ctime_nsec: stat.st_ctime_nsec as u32,
        })
    }

    fn owner_of(&self, stat: &Stat, path: &[u8]) -> Result<(u32, u32), Error> {
        let unmapped = |what, id| Error::Unmapped {
            path: escape::path(path),
            what,
            id,
        };
        let uid = owner::inside(self.options.uid_map, stat.st_uid);
        let gid = owner::inside(self.options.gid_map, stat.st_gid);
        Ok((
            uid.ok_or_else(|| unmapped("user", stat.st_uid))?,
            gid.ok_or_else(|| unmapped("group", stat.st_gid))?,
        ))
    }

    /// Attributes of what `at` names, told apart; `dropped` collects the names of those that stay behind.
    pub(super) fn attributes_of(
        &self,
        at: impl Into<Vec<u8>>,
        follow: Follow,
        path: &[u8],
        dropped: &mut Vec<Vec<u8>>,
    ) -> Result<Attributes, Error> {
        let mut attributes = Attributes::default();
        let at = CString::new(at).map_err(|e| self.read_error(path, e.into()))?;
        let at = at.as_c_str();
        let list = xattr_names_at(at, follow).map_err(|source| self.read_error(path, source))?;
        for name in list.split(|&b| b == 0).filter(|n| !n.is_empty()) {
            let value = || -> Result<Option<Vec<u8>>, Error> {
                let name = CString::new(name).map_err(|e| self.read_error(path, e.into()))?;
                xattr_at(at, name.as_c_str(), follow)
                    .map_err(|source| self.read_error(path, source))
            };
            let fate = match self.volume {
                Some(_) => plain_fate(name),
                None => fate(name, self.namespace),
            };
            match fate {
                Fate::Mark(Mark::Opaque) => attributes.opaque = value()?,
                Fate::Mark(Mark::Redirect) => attributes.redirect = value()?,
                Fate::Mark(Mark::Metacopy) => attributes.metacopy = true,
                Fate::Mark(Mark::Whiteout) => attributes.whiteout = true,
                Fate::Mark(Mark::Nlink) => attributes.nlink = value()?,
                Fate::Mark(Mark::Kernel) => {}
                Fate::Drop => dropped.push(name.to_vec()),
                Fate::Keep(kept) => {
                    if let Some(value) = value()? {
                        let value =
                            self.value_inside(&kept, value)
                                .map_err(|source| Error::Xattr {
                                    path: escape::path(path),
                                    source,
                                })?;
                        attributes.kept.push((kept.into_owned(), value));
                    }
                }
            }
        }
        attributes.kept.sort();
        Ok(attributes)
    }

    fn value_inside(&self, name: &[u8], value: Vec<u8>) -> Result<Vec<u8>, ValueError> {
        let uid = |id| owner::inside(self.options.uid_map, id);
        let gid = |id| owner::inside(self.options.gid_map, id);
        match name {
            b"security.capability" => capability_inside(&value, uid),
            n if n.starts_with(b"system.posix_acl_") => acl_inside(&value, uid, gid),
            _ => Ok(value),
        }
    }

    /// Status and kept attributes of something in a lower.
    fn base_facts(&self, place: &Place) -> Result<(Stat, Vec<Xattr>), Error> {
        let root = &self.lowers.roots[usize::from(place.root)];
        let fail = |source| read_error(root.path(), &place.path, source);
        let handle = root.open_beneath(&place.path, OFlags::PATH).map_err(fail)?;
        let stat = rustix::fs::fstat(&handle).map_err(|e| fail(e.into()))?;
        let attributes = self.attributes_of(
            proc_path(handle.as_fd()),
            Follow::Yes,
            &place.path,
            &mut Vec::new(),
        )?;
        Ok((stat, attributes.kept))
    }

    pub(super) fn read_error(&self, path: &[u8], source: io::Error) -> Error {
        read_error(self.upper.path(), path, source)
    }

    pub(super) fn count(&self, entry: &Entry) -> Result<(), Error> {
        let Caps {
            entries,
            bytes,
            holes,
            ..
        } = self.options.caps;
        let over = |what: &str, limit, flag| {
            Err(Error::Cap {
                what: what.to_owned(),
                limit,
                flag,
            })
        };
        if self.count.entries.fetch_add(1, Ordering::Relaxed) >= entries {
            return over("the number of entries", entries, "--max-entries");
        }
        if self
            .count
            .bytes
            .fetch_add(entry.size, Ordering::Relaxed)
            .saturating_add(entry.size)
            > bytes
        {
            return over("the size of all files in bytes", bytes, "--max-size");
        }
        let hole = entry.size.saturating_sub(entry.allocated);
        // A metacopy file is all hole here, its data are elsewhere; the bound is for what would be expanded.
        if entry.kind == Kind::File
            && self
                .count
                .holes
                .fetch_add(hole, Ordering::Relaxed)
                .saturating_add(hole)
                > holes
        {
            return over(
                "the size of the holes in sparse files in bytes",
                holes,
                "--max-holes",
            );
        }
        Ok(())
    }
}

/// One directory being walked.
struct Directory<'a> {
    walker: &'a Walker<'a>,
    task: &'a Task,
    /// The thread's working directory is its own to change.
    own_cwd: bool,
    output: Output,
    tasks: Vec<(u32, Task)>,
    /// Names of which nothing is to be merged in or hidden any more.
    decided: HashSet<Vec<u8>>,
    /// Names that the upper deleted: nothing is merged in under them.
    deleted: HashSet<Vec<u8>>,
    /// What the earlier scan has here.
    known: HashMap<&'a [u8], u32>,
    report: Report,
}

impl Directory<'_> {
    fn upper_entries(&mut self) -> Result<(), Error> {
        let walker = self.walker;
        let fd = match walker.upper.open_dir(&self.task.path) {
            Ok(fd) => fd,
            Err(error) if is_absent(&error) => {
                self.report.vanished.push(escape::path(&self.task.path));
                return Ok(());
            }
            Err(source) => return Err(walker.read_error(&self.task.path, source)),
        };
        let names = match root::names(fd.as_fd()) {
            Ok(names) => names,
            // Removed since it was opened.
            Err(error) if is_absent(&error) => {
                self.report.vanished.push(escape::path(&self.task.path));
                return Ok(());
            }
            Err(source) => return Err(walker.read_error(&self.task.path, source)),
        };
        let within = if self.own_cwd && rustix::process::fchdir(&fd).is_ok() {
            Vec::new()
        } else {
            [proc_path(fd.as_fd()).as_bytes(), b"/"].concat()
        };
        // Regular files are whiteouts only in a directory that says so.
        let mut holds_whiteout_files = None;
        for name in names {
            let path = join(&self.task.path, &name);
            let stat = stat_at(fd.as_fd(), &name).map_err(|e| walker.read_error(&path, e))?;
            let Some(stat) = stat else {
                self.report.vanished.push(escape::path(&path));
                continue;
            };
            let file_type = FileType::from_raw_mode(stat.st_mode);
            if self.as_before(&name, &path, &stat)? {
                continue;
            }
            if file_type == FileType::CharacterDevice && stat.st_rdev == 0 {
                if walker.volume.is_some() {
                    if !self.left_out(&path, Some(file_type), &stat, None, false) {
                        return Err(Error::WhiteoutDevice {
                            path: escape::path(&path),
                        });
                    }
                    self.decide(&name);
                    continue;
                }
                self.whiteout(name, &path, &stat)?;
                continue;
            }
            // Nothing about a file that is no directory's frame depends on the base or on attributes: a cache full of
            // them is not worth reading either. An empty one may be a whiteout.
            if file_type == FileType::RegularFile
                && stat.st_size > 0
                && self.left_out(&path, Some(file_type), &stat, None, false)
            {
                self.decide(&name);
                continue;
            }
            let mut dropped = Vec::new();
            let at = [within.as_slice(), &name].concat();
            let attributes = match walker.attributes_of(at, Follow::No, &path, &mut dropped) {
                Err(Error::Read { source, .. }) if is_absent(&source) => {
                    self.report.vanished.push(escape::path(&path));
                    continue;
                }
                other => other?,
            };
            if file_type == FileType::RegularFile && stat.st_size == 0 && attributes.whiteout {
                let marked = match holds_whiteout_files {
                    Some(marked) => marked,
                    None => {
                        let name = walker.namespace.name("opaque");
                        let value =
                            xattr_at(proc_path(fd.as_fd()).as_str(), name.as_str(), Follow::Yes);
                        let value = value.map_err(|e| walker.read_error(&self.task.path, e))?;
                        *holds_whiteout_files.insert(value.as_deref() == Some(b"x"))
                    }
                };
                if marked {
                    self.whiteout(name, &path, &stat)?;
                    continue;
                }
            }
            self.upper_entry(fd.as_fd(), name, path, &stat, attributes, dropped)?;
        }
        Ok(())
    }

    fn whiteout(&mut self, name: Vec<u8>, path: &[u8], stat: &Stat) -> Result<(), Error> {
        let in_base = !matches!(self.base(&name, path)?, Found::Absent);
        if self.left_out(path, None, stat, None, in_base) {
            self.decide(&name);
        } else if self.task.full || self.task.hidden {
            // What the base has under this name is hidden with all else that is not here.
            self.deleted.insert(name);
        } else if in_base || !self.walker.lowers_known {
            self.push_mark(Kind::Whiteout, &name)?;
        } else {
            self.output.partial = true;
        }
        Ok(())
    }

    /// Takes over the earlier scan's entry of that name, if nothing about it changed. False: it has to be looked at.
    fn as_before(&mut self, name: &[u8], path: &[u8], stat: &Stat) -> Result<bool, Error> {
        let (Some(earlier), Some(&index)) = (self.walker.earlier, self.known.get(name)) else {
            return Ok(false);
        };
        let before = &earlier.scan.entries()[index as usize];
        if before.kind == Kind::Whiteout {
            let device = FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice;
            let still = device && stat.st_rdev == 0 && !self.task.hidden;
            if still {
                self.push_mark(Kind::Whiteout, name)?;
            }
            return Ok(still);
        }
        if !earlier.holds(self.walker, index, stat, path)? || earlier.is_dirty(index) {
            return Ok(false);
        }
        let mut entry = *before;
        entry.flags.clear(Flags::SILENT);
        entry.flags.clear(Flags::STUBS);
        let extra = earlier.scan.extra(before).cloned().unwrap_or_default();
        self.decide(name);
        let at = self.push(entry, name, extra)?;
        if entry.kind == Kind::Dir {
            self.output.kept.insert(at, index);
        }
        Ok(true)
    }

    fn upper_entry(
        &mut self,
        dir: BorrowedFd<'_>,
        name: Vec<u8>,
        path: Vec<u8>,
        stat: &Stat,
        attributes: Attributes,
        dropped: Vec<Vec<u8>>,
    ) -> Result<(), Error> {
        let walker = self.walker;
        let file_type = FileType::from_raw_mode(stat.st_mode);
        let base = self.base(&name, &path)?;
        let in_base = !matches!(base, Found::Absent);
        let link = if file_type == FileType::Symlink {
            let link = read_link_at(dir, &name).map_err(|e| walker.read_error(&path, e))?;
            if link.is_none() {
                self.report.vanished.push(escape::path(&path));
                return Ok(());
            }
            link
        } else {
            None
        };
        if let Some(link) = &link
            && walker.options.exclusions.gpu_link(&path)
            && self.leads_nowhere(dir, link, &path)?
        {
            self.note_left_out(&path, Reason::Gpu);
            self.decide(&name);
            return Ok(());
        }
        if self.left_out(&path, Some(file_type), stat, link.as_deref(), in_base) {
            self.decide(&name);
            return Ok(());
        }
        let Some(kind) = kind_of(file_type) else {
            self.output.partial = true;
            self.report.sockets.push(escape::path(&path));
            // The container sees a socket here, never what the base has.
            if in_base && !self.task.full && !self.task.hidden {
                self.push_mark(Kind::Whiteout, &name)?;
            }
            self.deleted.insert(name);
            return Ok(());
        };
        if name.starts_with(b".wh.") {
            return Err(Error::ReservedName {
                path: escape::path(&path),
            });
        }
        for name in dropped {
            // Labels of the host's security module are on every file: that they stay behind is no news.
            if !name.starts_with(b"security.") && !name.starts_with(b"trusted.") {
                *self
                    .report
                    .dropped_xattrs
                    .entry(escape::path(&name))
                    .or_default() += 1;
            }
        }
        let opaque = attributes.opaque.as_deref() == Some(b"y");
        let moved = kind == Kind::Dir && attributes.redirect.is_some();
        let mut entry = walker.entry(stat, 0, kind, &path)?;
        let content = if kind == Kind::File && attributes.metacopy {
            Some(self.metacopy(&name, &path, attributes.redirect.as_deref(), &mut entry)?)
        } else {
            None
        };
        let merge = if kind == Kind::Dir && !opaque {
            self.merged_with(&name, &path, attributes.redirect.as_deref())?
        } else {
            Stack::new()
        };
        let mut extra = Extra {
            link,
            xattrs: attributes.kept,
            content,
            moved,
            ..Extra::default()
        };
        if kind == Kind::Dir && opaque {
            entry.flags.set(Flags::OPAQUE);
        }
        if let (true, Some(nlink)) = (kind != Kind::Dir, &attributes.nlink) {
            extra.indexed_nlink = indexed_nlink(nlink, stat, &base);
        }
        let mut base_stack = Stack::new();
        let shown = !self.task.full && !self.task.hidden;
        match &base {
            Found::Absent => {
                if kind == Kind::Dir
                    && walker.volume.is_none()
                    && walker.lowers_known
                    && walker.options.exclusions.mount_ancestor(&path)
                {
                    entry.flags.set(Flags::MOUNT_PARENT);
                }
            }
            // All of it is hidden: nothing here depends on it.
            Found::Dir { stack, .. } if walker.volume.is_some() => base_stack.clone_from(stack),
            Found::Other { .. } if walker.volume.is_some() => {}
            Found::Dir { stack, .. } => {
                entry.flags.set(Flags::IN_BASE);
                if let (Kind::Dir, true, false, false, Some(place)) =
                    (kind, shown, opaque, moved, stack.first())
                {
                    self.compare_dir(&mut entry, &extra, place)?;
                }
                base_stack.clone_from(stack);
            }
            Found::Other { place, .. } => {
                entry.flags.set(Flags::IN_BASE);
                if shown && kind != Kind::Dir {
                    self.compare_other(&mut entry, &mut extra, place, &path)?;
                }
            }
        }
        self.privilege(&entry, &extra, &base, &path)?;
        self.decide(&name);
        let index = self.push(entry, &name, extra)?;
        if kind == Kind::Dir {
            let full = self.task.full || moved;
            let before = self.known.get(name.as_slice());
            let task = Task {
                id: 0,
                depth: self.depth_below()?,
                path,
                earlier: walker
                    .earlier
                    .zip(before)
                    .and_then(|(earlier, &index)| earlier.same_directory(index, &entry))
                    .filter(|_| !full),
                upper: true,
                merge,
                hidden: !base_stack.is_empty() && (self.task.hidden || full || opaque),
                base: base_stack,
                full,
                opaque: opaque && !walker.lowers_known,
            };
            self.tasks.push((index, task));
        }
        Ok(())
    }

    /// In a directory that was moved here: what is merged from where it was.
    fn merged_entries(&mut self) -> Result<(), Error> {
        let walker = self.walker;
        let merged = walker
            .lowers
            .list(&self.task.merge)
            .map_err(|e| walker.read_error(&self.task.path, e))?;
        for (name, found) in merged {
            if self.decided.contains(&name) || self.deleted.contains(&name) {
                continue;
            }
            let path = join(&self.task.path, &name);
            let (place, merge) = match &found {
                Found::Absent => continue,
                Found::Dir { stack, .. } => (stack.first().cloned(), stack.clone()),
                Found::Other { place, .. } => (Some(place.clone()), Stack::new()),
            };
            let Some(place) = place else { continue };
            let (stat, kept) = walker.base_facts(&place)?;
            let file_type = FileType::from_raw_mode(stat.st_mode);
            let base = self.base(&name, &path)?;
            let root = &walker.lowers.roots[usize::from(place.root)];
            let link = if file_type == FileType::Symlink {
                Some(
                    root.read_link(&place.path)
                        .map_err(|e| read_error(root.path(), &place.path, e))?,
                )
            } else {
                None
            };
            let in_base = !matches!(base, Found::Absent);
            if self.left_out(&path, Some(file_type), &stat, link.as_deref(), in_base) {
                self.decide(&name);
                continue;
            }
            let Some(kind) = kind_of(file_type) else {
                self.report.sockets.push(escape::path(&path));
                continue;
            };
            if name.starts_with(b".wh.") {
                return Err(Error::ReservedName {
                    path: escape::path(&path),
                });
            }
            let mut entry = walker.entry(&stat, place.root + 1, kind, &path)?;
            if in_base {
                entry.flags.set(Flags::IN_BASE);
            }
            let content = if kind == Kind::File {
                let data = walker.lowers.data_of(place, stat, &self.task.merge, &name);
                let data = data.map_err(|e| walker.read_error(&path, e))?;
                Some(elsewhere(data, &path, &mut entry)?)
            } else {
                None
            };
            self.decide(&name);
            let index = self.push(
                entry,
                &name,
                Extra {
                    link,
                    xattrs: kept,
                    content,
                    ..Extra::default()
                },
            )?;
            if kind == Kind::Dir {
                let base = match base {
                    Found::Dir { stack, .. } => stack,
                    _ => Stack::new(),
                };
                let task = Task {
                    id: 0,
                    depth: self.depth_below()?,
                    path,
                    earlier: None,
                    upper: false,
                    merge,
                    hidden: !base.is_empty(),
                    base,
                    full: true,
                    opaque: false,
                };
                self.tasks.push((index, task));
            }
        }
        Ok(())
    }

    /// Where the base's content must not shine through: a whiteout for each name that is not here.
    fn hide_base(&mut self) -> Result<(), Error> {
        let walker = self.walker;
        let base = walker
            .lowers
            .list(&self.task.base)
            .map_err(|e| walker.read_error(&self.task.path, e))?;
        for (name, found) in base {
            let (Found::Dir { stat, .. } | Found::Other { stat, .. }) = found else {
                continue;
            };
            if self.decided.contains(&name) {
                continue;
            }
            let path = join(&self.task.path, &name);
            if !self.left_out(&path, None, &stat, None, true) {
                self.push_mark(Kind::Whiteout, &name)?;
            }
        }
        Ok(())
    }

    /// Nothing is merged in or hidden under this name any more: only directories where either happens need to know.
    fn decide(&mut self, name: &[u8]) {
        if self.task.full || self.task.hidden {
            self.decided.insert(name.to_vec());
        }
    }

    fn base(&self, name: &[u8], path: &[u8]) -> Result<Found, Error> {
        self.walker
            .lowers
            .lookup(&self.task.base, name)
            .map_err(|e| self.walker.read_error(path, e))
    }

    /// The directories that the overlay merges beneath the upper's directory `name`.
    fn merged_with(
        &self,
        name: &[u8],
        path: &[u8],
        redirect: Option<&[u8]>,
    ) -> Result<Stack, Error> {
        let lowers = self.walker.lowers;
        let found = match redirect {
            Some(redirect) => lowers.lookup_redirect(&self.task.merge, redirect),
            None => lowers.lookup(&self.task.merge, name),
        };
        match found.map_err(|e| self.walker.read_error(path, e))? {
            Found::Dir { stack, .. } => Ok(stack),
            // The kernel's view of a redirect that leads nowhere is an empty directory; ours is doubt.
            _ if redirect.is_some() => Err(Error::Dangling {
                path: escape::path(path),
                mark: "redirect",
            }),
            _ => Ok(Stack::new()),
        }
    }

    fn metacopy(
        &self,
        name: &[u8],
        path: &[u8],
        redirect: Option<&[u8]>,
        entry: &mut Entry,
    ) -> Result<Elsewhere, Error> {
        let data = self.walker.lowers.data(&self.task.merge, name, redirect);
        elsewhere(
            data.map_err(|e| self.walker.read_error(path, e))?,
            path,
            entry,
        )
    }

    fn compare_dir(&self, entry: &mut Entry, extra: &Extra, place: &Place) -> Result<(), Error> {
        let (base, kept) = self.walker.base_facts(place)?;
        let owner = self.walker.owner_of(&base, &place.path)?;
        if mode_of(&base) != entry.mode || owner != (entry.uid, entry.gid) || kept != extra.xattrs {
            return Ok(());
        }
        let same_time =
            (base.st_mtime, base.st_mtime_nsec as u32) == (entry.mtime, entry.mtime_nsec);
        entry.flags.set(if same_time {
            Flags::UNCHANGED
        } else {
            Flags::TIME_ONLY
        });
        Ok(())
    }

    /// Whether a copied-up entry still equals the base's: metadata first, then content.
    fn compare_other(
        &self,
        entry: &mut Entry,
        extra: &mut Extra,
        place: &Place,
        path: &[u8],
    ) -> Result<(), Error> {
        let walker = self.walker;
        let (base, kept) = walker.base_facts(place)?;
        let same = kind_of(FileType::from_raw_mode(base.st_mode)) == Some(entry.kind)
            && mode_of(&base) == entry.mode
            && walker.owner_of(&base, &place.path)? == (entry.uid, entry.gid)
            && (base.st_mtime, base.st_mtime_nsec as u32) == (entry.mtime, entry.mtime_nsec)
            && base.st_nlink as u32 == entry.nlink
            && kept == extra.xattrs;
        if !same {
            return Ok(());
        }
        let root = &walker.lowers.roots[usize::from(place.root)];
        let equal = match entry.kind {
            Kind::File if base.st_size as u64 != entry.size => false,
            Kind::File => {
                let data =
                    walker
                        .lowers
                        .data_of(place.clone(), base, &self.task.merge, basename(path));
                match data.map_err(|e| walker.read_error(path, e))? {
                    Some((data, stat)) => self.same_content(entry, extra, path, &data, &stat)?,
                    None => false,
                }
            }
            Kind::Symlink => {
                let target = root
                    .read_link(&place.path)
                    .map_err(|e| read_error(root.path(), &place.path, e))?;
                extra.link.as_deref() == Some(&target)
            }
            Kind::Char | Kind::Block => base.st_rdev == entry.rdev,
            _ => true,
        };
        if equal {
            entry.flags.set(Flags::UNCHANGED);
            extra.base = Some((place.root, base.st_ino));
        }
        Ok(())
    }

    fn same_content(
        &self,
        entry: &Entry,
        extra: &Extra,
        path: &[u8],
        base: &Place,
        base_stat: &Stat,
    ) -> Result<bool, Error> {
        let walker = self.walker;
        if let Some(elsewhere) = &extra.content {
            return Ok(elsewhere.root == base.root + 1 && elsewhere.ino == base_stat.st_ino);
        }
        let base_root = &walker.lowers.roots[usize::from(base.root)];
        let ours = walker
            .upper
            .open_file(path, entry.ino)
            .map_err(|e| walker.read_error(path, e))?;
        let theirs = base_root
            .open_file(&base.path, base_stat.st_ino)
            .map_err(|e| read_error(base_root.path(), &base.path, e))?;
        let (Some(ours), Some(theirs)) = (ours, theirs) else {
            return Ok(false);
        };
        same_bytes(ours.into(), theirs.into()).map_err(|e| walker.read_error(path, e))
    }

    /// Notes files that give whoever runs them somebody else's rights, unless the base has them so.
    fn privilege(
        &mut self,
        entry: &Entry,
        extra: &Extra,
        base: &Found,
        path: &[u8],
    ) -> Result<(), Error> {
        let capability = |xattrs: &[Xattr]| {
            xattrs
                .iter()
                .find(|(name, _)| name == CAPABILITY)
                .map(|(_, value)| value.clone())
        };
        let ours = (entry.mode & SET_ID, capability(&extra.xattrs));
        if entry.kind != Kind::File || ours == (0, None) {
            return Ok(());
        }
        if let Found::Other { place, .. } = base {
            let (stat, kept) = self.walker.base_facts(place)?;
            if (mode_of(&stat) & SET_ID, capability(&kept)) == ours
                && self.walker.owner_of(&stat, path)? == (entry.uid, entry.gid)
            {
                return Ok(());
            }
        }
        self.report.privileged.push(escape::path(path));
        Ok(())
    }

    /// Asks the rules, and notes what they leave out. No file type means a whiteout.
    fn left_out(
        &mut self,
        path: &[u8],
        file_type: Option<FileType>,
        stat: &Stat,
        link: Option<&[u8]>,
        in_base: bool,
    ) -> bool {
        let facts = Facts {
            file_type,
            size: stat.st_size as u64,
            link,
            in_base,
        };
        let Some(reason) = self.walker.options.exclusions.check(path, &facts) else {
            return false;
        };
        self.note_left_out(path, reason);
        true
    }

    fn note_left_out(&mut self, path: &[u8], reason: Reason) {
        if matches!(
            reason,
            Reason::Mount | Reason::MountStub | Reason::RuntimeDevice | Reason::Gpu
        ) {
            self.output.stubs = true;
        }
        self.output.partial = true;
        self.report.excluded.push(Excluded {
            path: escape::path(path),
            reason,
        });
    }

    /// Whether a link's target in the same directory of the merged tree is missing or an empty file.
    fn leads_nowhere(&self, dir: BorrowedFd<'_>, link: &[u8], path: &[u8]) -> Result<bool, Error> {
        let mut name = link.to_vec();
        // A few links in a row are usual (`libx.so -> libx.so.1 -> libx.so.1.2`); what goes elsewhere is not looked at.
        for _ in 0..8 {
            if name.contains(&b'/') {
                return Ok(false);
            }
            let failed = |error| self.walker.read_error(path, error);
            let stat = match (
                stat_at(dir, &name).map_err(failed)?,
                self.base(&name, path)?,
            ) {
                (Some(stat), _) | (None, Found::Other { stat, .. } | Found::Dir { stat, .. }) => {
                    stat
                }
                (None, Found::Absent) => return Ok(true),
            };
            match FileType::from_raw_mode(stat.st_mode) {
                FileType::RegularFile => return Ok(stat.st_size == 0),
                FileType::CharacterDevice => return Ok(stat.st_rdev == 0),
                FileType::Symlink => match read_link_at(dir, &name).map_err(failed)? {
                    Some(next) => name = next,
                    None => return Ok(false),
                },
                _ => return Ok(false),
            }
        }
        Ok(false)
    }

    fn depth_below(&self) -> Result<u32, Error> {
        let limit = self.walker.options.caps.depth;
        if self.task.depth >= limit {
            let what = "the depth of directories".to_owned();
            return Err(Error::Cap {
                what,
                limit: u64::from(limit),
                flag: "--max-depth",
            });
        }
        Ok(self.task.depth + 1)
    }

    fn push_mark(&mut self, kind: Kind, name: &[u8]) -> Result<(), Error> {
        let entry = Entry {
            kind,
            extra: NO_EXTRA,
            ..Entry::default()
        };
        self.push(entry, name, Extra::default()).map(|_| ())
    }

    fn push(&mut self, mut entry: Entry, name: &[u8], extra: Extra) -> Result<u32, Error> {
        self.walker.count(&entry)?;
        entry.name_at = self.output.names.len() as u32;
        entry.name_len = name.len() as u16;
        self.output.names.extend(name);
        if extra != Extra::default() {
            entry.extra = self.output.extras.len() as u32;
            self.output.extras.push(extra);
        }
        self.output.entries.push(entry);
        Ok(self.output.entries.len() as u32 - 1)
    }
}

/// Hard links that the container sees of an indexed file (`ovl_get_nlink` in the kernel's `util.c`).
fn indexed_nlink(mark: &[u8], stat: &Stat, base: &Found) -> Option<u32> {
    let (of, difference) = mark.split_first()?;
    let difference: i64 = std::str::from_utf8(difference).ok()?.parse().ok()?;
    let on_disk = match (of, base) {
        (b'U', _) => stat.st_nlink as i64,
        (b'L', Found::Other { stat, .. }) => stat.st_nlink as i64,
        _ => return None,
    };
    u32::try_from(on_disk + difference).ok()
}

/// The content of a file that is not where its metadata are.
fn elsewhere(
    data: Option<(Place, Stat)>,
    path: &[u8],
    entry: &mut Entry,
) -> Result<Elsewhere, Error> {
    let Some((place, stat)) = data else {
        return Err(Error::Dangling {
            path: escape::path(path),
            mark: "metacopy",
        });
    };
    entry.size = stat.st_size as u64;
    entry.allocated = stat.st_blocks as u64 * 512;
    Ok(Elsewhere {
        root: place.root + 1,
        path: place.path,
        ino: stat.st_ino,
    })
}

/// Puts a directory's entries into the order of the layer.
fn sorted(mut output: Output, tasks: Vec<(u32, Task)>) -> (Output, Vec<(u32, Task)>) {
    let mut order: Vec<u32> = (0..output.entries.len() as u32).collect();
    order.sort_unstable_by(|&a, &b| {
        let (a, b) = (&output.entries[a as usize], &output.entries[b as usize]);
        let rank = |entry: &Entry| match entry.kind {
            Kind::Opaque => 0,
            Kind::Whiteout => 1,
            _ => 2,
        };
        rank(a)
            .cmp(&rank(b))
            .then_with(|| output.name(a).cmp(output.name(b)))
    });
    let mut place = vec![0u32; order.len()];
    for (new, &old) in order.iter().enumerate() {
        place[old as usize] = new as u32;
    }
    output.entries = order
        .iter()
        .map(|&old| output.entries[old as usize])
        .collect();
    output.kept = std::mem::take(&mut output.kept)
        .into_iter()
        .map(|(old, earlier)| (place[old as usize], earlier))
        .collect();
    (
        output,
        tasks
            .into_iter()
            .map(|(old, task)| (place[old as usize], task))
            .collect(),
    )
}

/// All entries in one list.
#[derive(Default)]
pub(super) struct Flat {
    pub(super) entries: Vec<Entry>,
    names: Vec<u8>,
    extras: Vec<Extra>,
}

impl Flat {
    /// As [`Flat::append`], from an earlier scan.
    pub(super) fn take_over(&mut self, scan: &Scan, index: u32, parent: u32) -> u32 {
        let mut entry = scan.entries()[index as usize];
        entry.flags.clear(Flags::SILENT);
        entry.flags.clear(Flags::STUBS);
        entry.parent = parent;
        entry.name_at = self.names.len() as u32;
        self.names
            .extend(scan.name(&scan.entries()[index as usize]));
        if let Some(extra) = scan.extra(&entry) {
            self.extras.push(extra.clone());
            entry.extra = self.extras.len() as u32 - 1;
        }
        self.entries.push(entry);
        self.entries.len() as u32 - 1
    }

    /// Printable paths of the files that may give whoever runs them somebody else's rights.
    pub(super) fn set_ids(&self) -> HashSet<String> {
        let capable = |entry: &Entry| {
            let extra = self.extras.get(entry.extra as usize);
            extra.is_some_and(|extra| extra.xattrs.iter().any(|(name, _)| name == CAPABILITY))
        };
        let mut path = Vec::new();
        let entries = self.entries.iter().enumerate();
        entries
            .filter(|(_, e)| e.kind == Kind::File && (e.mode & SET_ID != 0 || capable(e)))
            .map(|(index, _)| {
                super::path_of(&self.entries, &self.names, index as u32, &mut path);
                escape::path(&path)
            })
            .collect()
    }

    /// Adds entries each of which is in the one before. The index of the last.
    pub(super) fn append_chain(&mut self, chain: &mut Output) -> u32 {
        let mut parent = 0;
        for at in 0..chain.entries.len() {
            let entry = chain.entries[at];
            parent = self.append(entry, parent, chain);
        }
        parent
    }

    pub(super) fn append(&mut self, mut entry: Entry, parent: u32, output: &mut Output) -> u32 {
        entry.parent = parent;
        let name_at = self.names.len() as u32;
        self.names.extend(output.name(&entry));
        entry.name_at = name_at;
        if entry.extra != NO_EXTRA {
            self.extras
                .push(std::mem::take(&mut output.extras[entry.extra as usize]));
            entry.extra = self.extras.len() as u32 - 1;
        }
        self.entries.push(entry);
        self.entries.len() as u32 - 1
    }
}

/// Parents first, each directory's content right after it.
fn flatten(mut top: Output, outputs: Vec<Output>, count: u32) -> Flat {
    let mut by_id: Vec<Option<Output>> = Vec::new();
    by_id.resize_with(count as usize, || None);
    let mut flat = Flat::default();
    flat.entries
        .reserve_exact(1 + outputs.iter().map(|o| o.entries.len()).sum::<usize>());
    flat.names
        .reserve_exact(outputs.iter().map(|o| o.names.len()).sum());
    for output in outputs {
        let id = output.id as usize;
        by_id[id] = Some(output);
    }
    let begin = flat.append_chain(&mut top);
    let mut open: Vec<(Output, usize, u32)> = Vec::new();
    let mut enter = |flat: &mut Flat, open: &mut Vec<(Output, usize, u32)>, id: u32, index: u32| {
        if let Some(output) = by_id[id as usize].take() {
            output.mark(&mut flat.entries[index as usize]);
            open.push((output, 0, index));
        }
    };
    enter(&mut flat, &mut open, 0, begin);
    while let Some((output, next, parent)) = open.last_mut() {
        let Some(&entry) = output.entries.get(*next) else {
            open.pop();
            continue;
        };
        let child = output.children.get(&(*next as u32)).copied();
        *next += 1;
        let index = flat.append(entry, *parent, output);
        if let Some(id) = child {
            enter(&mut flat, &mut open, id, index);
        }
    }
    flat
}

/// With `index=on` a base file's other names change with the one that was written to, without being in the upper.
fn check_indexed(flat: &Flat) -> Result<(), Error> {
    let mut names: HashMap<u64, u32> = HashMap::new();
    for entry in flat
        .entries
        .iter()
        .filter(|e| e.root == 0 && e.kind != Kind::Dir && e.nlink > 1)
    {
        *names.entry(entry.ino).or_default() += 1;
    }
    for (index, entry) in flat.entries.iter().enumerate() {
        let expected = flat
            .extras
            .get(entry.extra as usize)
            .and_then(|e| e.indexed_nlink);
        if let Some(expected) = expected
            && names.get(&entry.ino).copied().unwrap_or(1) < expected
        {
            let mut path = Vec::new();
            super::path_of(&flat.entries, &flat.names, index as u32, &mut path);
            return Err(Error::IndexedLink {
                path: escape::path(&path),
            });
        }
    }
    Ok(())
}

/// Files taken from a lower (a renamed directory's) of which the lower has more names than were taken.
fn split_links(flat: &Flat) -> Vec<String> {
    let linked = |e: &&Entry| e.root != 0 && e.kind != Kind::Dir && e.nlink > 1;
    let mut names: HashMap<(u16, u64), u32> = HashMap::new();
    for entry in flat.entries.iter().filter(linked) {
        *names.entry((entry.root, entry.ino)).or_default() += 1;
    }
    let mut split = Vec::new();
    for (index, entry) in flat.entries.iter().enumerate() {
        if linked(&entry)
            && names
                .get(&(entry.root, entry.ino))
                .is_some_and(|&n| n < entry.nlink)
        {
            let mut path = Vec::new();
            super::path_of(&flat.entries, &flat.names, index as u32, &mut path);
            split.push(escape::path(&path));
        }
    }
    split
}

/// Takes out what needs no entry: what equals the base, and what only the runtime made. The root stays.
fn prune(flat: &mut Flat) {
    let mut groups: HashMap<(u16, u64), Vec<u32>> = HashMap::new();
    for (index, entry) in flat.entries.iter().enumerate() {
        if entry.nlink > 1 && !matches!(entry.kind, Kind::Dir | Kind::Whiteout | Kind::Opaque) {
            groups
                .entry((entry.root, entry.ino))
                .or_default()
                .push(index as u32);
        }
    }
    // A group of hard links is left out as a whole or not at all: half of it would be another file.
    for group in groups.values() {
        let base = |&index: &u32| {
            let entry = &flat.entries[index as usize];
            let base = flat.extras.get(entry.extra as usize).and_then(|e| e.base);
            if entry.flags.has(Flags::UNCHANGED) {
                base
            } else {
                None
            }
        };
        let first = group.first().and_then(base);
        let whole = first.is_some()
            && group.iter().all(|index| base(index) == first)
            && group.len() as u32 == flat.entries[group[0] as usize].nlink;
        if !whole {
            for &index in group {
                flat.entries[index as usize].flags.clear(Flags::UNCHANGED);
            }
        }
    }
    let count = flat.entries.len();
    let mut dropped = vec![false; count];
    let mut inside = vec![false; count];
    let mut keep = vec![false; count];
    let mut real = false;
    // Children stand behind their parents: backwards, each parent is seen after all of its children.
    for index in (1..count).rev() {
        let entry = flat.entries[index];
        let parent = entry.parent as usize;
        if entry.flags.has(Flags::MOUNT_PARENT) && !inside[index] {
            flat.entries[parent].flags.set(Flags::STUBS);
            flat.entries[parent].flags.set(Flags::PARTIAL);
            dropped[index] = true;
            continue;
        }
        let stubs_only = entry.flags.has(Flags::TIME_ONLY) && entry.flags.has(Flags::STUBS);
        if inside[index] || !entry.flags.has(Flags::UNCHANGED) {
            keep[index] = true;
            inside[parent] = true;
            real |= !inside[index] && !stubs_only;
        }
    }
    real |= flat
        .entries
        .first()
        .is_some_and(|root| !root.flags.has(Flags::SILENT));
    let mut moved = vec![0u32; count];
    let mut to = 0;
    for from in 0..count {
        let mut entry = flat.entries[from];
        // What equals the base stays, silently: when it changes, that has to be told from what is new.
        dropped[from] |= from != 0 && dropped[entry.parent as usize];
        if dropped[from] {
            continue;
        }
        if from != 0 && !(keep[from] && real) {
            entry.flags.set(Flags::SILENT);
        }
        entry.parent = moved[entry.parent as usize];
        moved[from] = to as u32;
        flat.entries[to] = entry;
        to += 1;
    }
    flat.entries.truncate(to);
}

fn same_bytes(mut a: std::fs::File, mut b: std::fs::File) -> io::Result<bool> {
    let (mut left, mut right) = (vec![0; 128 * 1024], vec![0; 128 * 1024]);
    loop {
        let n = a.read(&mut left)?;
        if n == 0 {
            return Ok(b.read(&mut right[..1])? == 0);
        }
        match b.read_exact(&mut right[..n]) {
            Ok(()) if left[..n] == right[..n] => {}
            Ok(()) => return Ok(false),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(false),
            Err(error) => return Err(error),
        }
    }
}

pub(super) fn kind_of(file_type: FileType) -> Option<Kind> {
    match file_type {
        FileType::Directory => Some(Kind::Dir),
        FileType::RegularFile => Some(Kind::File),
        FileType::Symlink => Some(Kind::Symlink),
        FileType::CharacterDevice => Some(Kind::Char),
        FileType::BlockDevice => Some(Kind::Block),
        FileType::Fifo => Some(Kind::Fifo),
        FileType::Socket | FileType::Unknown => None,
    }
}

fn mode_of(stat: &Stat) -> u16 {
    (stat.st_mode & 0o7777) as u16
}

fn read_error(root: &Path, path: &[u8], source: io::Error) -> Error {
    let mut full = std::os::unix::ffi::OsStrExt::as_bytes(root.as_os_str()).to_vec();
    if !path.is_empty() {
        full.push(b'/');
        full.extend(path);
    }
    Error::Read {
        path: escape::path(&full),
        source,
    }
}

/// A panicked thread leaves nothing half done here: every change under the lock is a whole one.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether `trusted.*` attributes can be seen: CAP_SYS_ADMIN in the initial user namespace. Without it the
/// kernel reads them as absent, and deletions would silently come back.
fn may_read_trusted() -> bool {
    const CAP_SYS_ADMIN: u32 = 21;
    let effective = std::fs::read_to_string("/proc/self/status")
        .ok()
        .and_then(|status| {
            let line = status
                .lines()
                .find_map(|line| line.strip_prefix("CapEff:"))?;
            u64::from_str_radix(line.trim(), 16).ok()
        });
    let initial = std::fs::read_to_string("/proc/self/uid_map")
        .is_ok_and(|map| map.split_whitespace().collect::<Vec<_>>() == ["0", "0", "4294967295"]);
    initial && effective.is_some_and(|set| set & (1 << CAP_SYS_ADMIN) != 0)
}
