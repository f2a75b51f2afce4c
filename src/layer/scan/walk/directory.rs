//! Reads one directory: the entries of the upper, and the names of the base that have to be hidden.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{FileType, Stat};

use super::entry::{Attributes, kind_of};
use super::flatten::{Output, sorted};
use super::links::indexed_nlink;
use super::queue::{Collected, lock};
use super::{Task, Walker};
use crate::common::escape;
use crate::layer::scan::memory::Reservation;
use crate::layer::scan::rows::NO_EXTRA;
use crate::layer::scan::{Entry, Error, Extra, Flags, Kind, Reason, Report};
use crate::node::overlay::lower::{Found, Stack, join};
use crate::node::overlay::root::{self, Follow, is_absent, read_link_at, xattr_at};
use crate::node::overlay::xattr::PROTECTED;
use crate::node::overlay::xattr::proc_path;

/// A directory being read.
pub(super) struct Directory<'a> {
    pub(super) walker: &'a Walker<'a>,
    pub(super) task: &'a Task,
    /// Whether the thread may change its working directory.
    own_cwd: bool,
    pub(super) output: Output,
    pub(super) tasks: Vec<(u32, Task)>,
    /// Names for which nothing more is to be merged in or hidden.
    pub(super) decided: HashSet<Vec<u8>>,
    /// Names that the upper deleted: nothing is merged in for them.
    pub(super) deleted: HashSet<Vec<u8>>,
    /// Entries of the earlier scan in this directory.
    known: HashMap<&'a [u8], u32>,
    pub(super) report: Report,
    /// Memory taken for all of this.
    pub(super) reservation: Reservation,
}

/// Why a listing of the base stops.
enum ListingError {
    Read(io::Error),
    Full(Error),
}

impl From<io::Error> for ListingError {
    fn from(error: io::Error) -> Self {
        Self::Read(error)
    }
}

/// Memory that a set takes per name besides its bytes.
const SET_ENTRY_BYTES: usize = 48;
/// Memory kept per directory, besides its entries, until the walk ends.
const DIRECTORY_BYTES: u64 = 128;

impl Walker<'_> {
    pub(super) fn directory(&self, task: &Task, own_cwd: bool) -> Result<Collected, Error> {
        let mut reservation = self.memory.reservation();
        reservation.reserve_for_scan(DIRECTORY_BYTES)?;
        let mut known = HashMap::new();
        if let (Some(earlier), Some(dir)) = (self.earlier, task.earlier) {
            for (name, index) in earlier.children(dir) {
                reservation.reserve(SET_ENTRY_BYTES as u64)?;
                known.insert(name, index);
            }
        }
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
            known,
            report: Report::default(),
            reservation,
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
            reservation,
            ..
        } = dir;
        lock(&self.report).add(report);
        let (output, tasks) = sorted(output, tasks);
        Ok((output, tasks, reservation))
    }
}

impl Directory<'_> {
    fn upper_entries(&mut self) -> Result<(), Error> {
        let walker = self.walker;
        let fd = match walker.upper.open_dir(&self.task.path) {
            Ok(fd) => fd,
            Err(error) if is_absent(&error) => {
                self.report.vanished.add(escape::path(&self.task.path));
                return Ok(());
            }
            // Its mode changed after it was queued.
            Err(error) if walker.upper.is_denied(&error) => {
                self.report.unreadable.add(escape::path(&self.task.path));
                self.output.partial = true;
                return Ok(());
            }
            Err(source) => return Err(walker.read_error(&self.task.path, source)),
        };
        let within = if self.own_cwd && rustix::process::fchdir(&fd).is_ok() {
            Vec::new()
        } else {
            [proc_path(fd.as_fd()).as_bytes(), b"/"].concat()
        };
        // Regular files are whiteouts only in a directory that is marked accordingly.
        let mut holds_whiteout_files = None;
        let mut names = root::names(fd.as_fd());
        while let Some(name) = names.next() {
            let name = match name {
                Ok(name) => name,
                // Removed after it was opened.
                Err(error) if is_absent(&error) => {
                    self.report.vanished.add(escape::path(&self.task.path));
                    return Ok(());
                }
                Err(source) => return Err(walker.read_error(&self.task.path, source)),
            };
            self.output.in_pieces = names.in_pieces();
            let path = join(&self.task.path, &name);
            let Some(stat) = self.status(fd.as_fd(), &name, &path)? else {
                continue;
            };
            let file_type = FileType::from_raw_mode(stat.st_mode);
            if self.reuse_if_unchanged(&name, &path, &stat)? {
                continue;
            }
            if file_type == FileType::CharacterDevice && stat.st_rdev == 0 {
                if walker.volume.is_some() {
                    if !self.exclude(&path, Some(file_type), &stat, None, false) {
                        return Err(Error::WhiteoutDevice {
                            path: escape::path(&path),
                        });
                    }
                    self.mark_resolved(&name)?;
                    continue;
                }
                self.whiteout(name, &path, &stat)?;
                continue;
            }
            // The rules for a regular file that is not empty depend neither on the base nor on attributes, so excluded
            // files (a full cache) need not be opened. An empty file may be a whiteout.
            if file_type == FileType::RegularFile
                && stat.st_size > 0
                && self.exclude(&path, Some(file_type), &stat, None, false)
            {
                self.mark_resolved(&name)?;
                continue;
            }
            let mut dropped = Vec::new();
            let mut handle = None;
            let (at, follow) = match walker.volume {
                None => ([within.as_slice(), &name].concat(), Follow::No),
                Some(volume) => {
                    let Some(opened) = self.readable(volume, fd.as_fd(), &name, &path, &stat)?
                    else {
                        continue;
                    };
                    let opened: &OwnedFd = handle.insert(opened);
                    (proc_path(opened.as_fd()).into_bytes(), Follow::Yes)
                }
            };
            let attributes = match walker.attributes_of(at, follow, &path, &mut dropped) {
                Err(Error::Read { source, .. }) if walker.upper.is_denied(&source) => {
                    self.record_unreadable(&name, &path)?;
                    continue;
                }
                Err(Error::Read { source, .. }) if is_absent(&source) => {
                    self.report.vanished.add(escape::path(&path));
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

    pub(super) fn whiteout(
        &mut self,
        name: Vec<u8>,
        path: &[u8],
        stat: &Stat,
    ) -> Result<(), Error> {
        let in_base = !matches!(self.base(&name, path)?, Found::Absent);
        if self.exclude(path, None, stat, None, in_base) {
            self.mark_resolved(&name)?;
        } else if self.task.full || self.task.hidden {
            // The base's entry of this name is hidden with everything else that is not here.
            self.delete(name)?;
        } else if in_base || !self.walker.lowers_known {
            self.push_mark(Kind::Whiteout, &name)?;
        } else {
            self.output.partial = true;
        }
        Ok(())
    }

    /// Takes over the earlier scan's entry of this name if it is unchanged. Returns false if the entry has to be
    /// inspected.
    fn reuse_if_unchanged(&mut self, name: &[u8], path: &[u8], stat: &Stat) -> Result<bool, Error> {
        let (Some(earlier), Some(&index)) = (self.walker.earlier, self.known.get(name)) else {
            return Ok(false);
        };
        let before = earlier.scan.entry(index);
        if before.kind == Kind::Whiteout {
            let device = FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice;
            let still = device && stat.st_rdev == 0 && !self.task.hidden;
            if still {
                self.push_mark(Kind::Whiteout, name)?;
            }
            return Ok(still);
        }
        if !self.walker.is_unchanged(earlier, index, stat, path)? || earlier.is_dirty(index) {
            return Ok(false);
        }
        let mut entry = before;
        // The earlier scan keeps the entry with its rarer parts.
        entry.extra = NO_EXTRA;
        entry.flags.clear(Flags::OMITTED);
        entry.flags.clear(Flags::STUBS);
        self.mark_resolved(name)?;
        let at = self.push(entry, name, Extra::default())?;
        self.output.kept.push((at, index));
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
                self.report.vanished.add(escape::path(&path));
                return Ok(());
            }
            link
        } else {
            None
        };
        if let Some(link) = &link
            && walker.options.exclusions.may_be_gpu_link(&path)
            && self.is_dangling_link(dir, link, &path)?
        {
            self.record_excluded(&path, Reason::Gpu);
            self.mark_resolved(&name)?;
            return Ok(());
        }
        if self.exclude(&path, Some(file_type), stat, link.as_deref(), in_base) {
            self.mark_resolved(&name)?;
            return Ok(());
        }
        let Some(kind) = kind_of(file_type) else {
            self.output.partial = true;
            self.report.sockets.add(escape::path(&path));
            // The container sees a socket here, never the base's entry.
            if in_base && !self.task.full && !self.task.hidden {
                self.push_mark(Kind::Whiteout, &name)?;
            }
            return self.delete(name);
        };
        for name in dropped {
            // Every file has labels of the host's security module: that they are dropped is not reported.
            let label = name.starts_with(b"security.") || name.starts_with(b"trusted.");
            if !label || name == walker.namespace.name(PROTECTED).as_bytes() {
                self.report.dropped_xattrs.add(&escape::path(&name), 1);
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
            xattrs: self.reservation.intern_xattrs(attributes.kept)?,
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
            // The whole directory is hidden, so nothing here depends on the entry found.
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
        extra.privileged = self.is_privileged(&entry, &extra, &base, &path)?;
        self.mark_resolved(&name)?;
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
            self.queue_subdirectory(index, task)?;
        }
        Ok(())
    }

    /// Adds a whiteout for each name of the base that is not in this directory, where the base's content has to be
    /// hidden.
    fn hide_base(&mut self) -> Result<(), Error> {
        for name in self.base_names(&self.task.base)? {
            if self.decided.contains(&name) {
                continue;
            }
            let found = self.base(&name, &self.task.path)?;
            let (Found::Dir { stat, .. } | Found::Other { stat, .. }) = found else {
                continue;
            };
            let path = join(&self.task.path, &name);
            if !self.exclude(&path, None, &stat, None, true) {
                self.push_mark(Kind::Whiteout, &name)?;
            }
        }
        Ok(())
    }

    /// Records that nothing more is merged in or hidden for this name; needed only in directories where either happens.
    pub(super) fn mark_resolved(&mut self, name: &[u8]) -> Result<(), Error> {
        if self.task.full || self.task.hidden {
            self.reservation
                .reserve((name.len() + SET_ENTRY_BYTES) as u64)?;
            self.decided.insert(name.to_vec());
        }
        Ok(())
    }

    /// Records that nothing is merged in for this name; needed only in directories where that happens.
    fn delete(&mut self, name: Vec<u8>) -> Result<(), Error> {
        if self.task.full {
            self.reservation
                .reserve((name.len() + SET_ENTRY_BYTES) as u64)?;
            self.deleted.insert(name);
        }
        Ok(())
    }

    /// Queues a subdirectory.
    pub(super) fn queue_subdirectory(&mut self, index: u32, task: Task) -> Result<(), Error> {
        self.reservation.reserve_for_scan(task.weight())?;
        self.tasks.push((index, task));
        Ok(())
    }

    /// Returns the names in a directory of the base, some of which may be deleted there.
    pub(super) fn base_names(&mut self, stack: &Stack) -> Result<BTreeSet<Vec<u8>>, Error> {
        let (walker, reservation) = (self.walker, &mut self.reservation);
        let room = |length: usize| {
            let held = reservation.reserve((length + SET_ENTRY_BYTES) as u64);
            held.map_err(ListingError::Full)
        };
        walker.lowers.names(stack, room).map_err(|stop| match stop {
            ListingError::Read(source) => walker.read_error(&self.task.path, source),
            ListingError::Full(error) => error,
        })
    }

    pub(super) fn base(&self, name: &[u8], path: &[u8]) -> Result<Found, Error> {
        self.walker
            .lowers
            .lookup(&self.task.base, name)
            .map_err(|e| self.walker.read_error(path, e))
    }

    pub(super) fn depth_below(&self) -> Result<u32, Error> {
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

    pub(super) fn push(
        &mut self,
        mut entry: Entry,
        name: &[u8],
        extra: Extra,
    ) -> Result<u32, Error> {
        self.walker.count(&entry)?;
        self.reservation.reserve_entry(name)?;
        entry.name_at = self.output.names.len() as u32;
        entry.name_len = name.len() as u16;
        self.output.names.extend(name);
        let rare = extra != Extra::default();
        self.reservation
            .reserve_entry_for_scan(name, rare.then_some(&extra))?;
        if rare {
            entry.extra = self.output.extras.len() as u32;
            self.output.extras.push(extra);
        }
        self.output.entries.push(entry);
        Ok(self.output.entries.len() as u32 - 1)
    }
}
