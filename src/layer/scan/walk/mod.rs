//! The walk of a tree: threads take directories from a shared queue, and the results are put into the order of the
//! layer at the end.
//!
//! `queue` distributes the directories, `directory` reads one, `entry` reads status and attributes of one name, `redirect`
//! resolves redirects and metacopy, `base` compares with the base, `filter` applies the exclusion rules, `top`
//! creates the entries above the tree, `flatten` combines everything into one list, `links` checks hard link counts, and
//! `finish` removes unneeded entries.

mod base;
mod directory;
mod entry;
mod filter;
mod finish;
mod flatten;
mod links;
mod queue;
mod redirect;
mod top;

use std::io;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};

use rustix::fs::Stat;

pub(super) use finish::finish;
pub(super) use flatten::{
    Cursor, EntrySource, Output, WalkedDirectory, WalkedEntry, append_chain, by_id,
};

use flatten::flatten;
use queue::Queue;

use super::earlier::EarlierScan;
use super::memory::MemoryBudget;
use super::rows::FactBuffer;
use super::{Caps, Clock, Entry, Error, Kind, Options, Report, Roots, Scan};
use crate::common::escape;
use crate::node::overlay::id_map::{self, IdMapping};
use crate::node::overlay::lower::{Found, Lowers, Place, Stack};
use crate::node::overlay::root::{Root, stat_at};
use crate::node::overlay::volume::{NameStatus, Volume};
use crate::node::overlay::xattr::Namespace;
use crate::node::procfs::effective_capabilities;

/// A directory to be walked.
pub(super) struct Task {
    /// Number of its output.
    pub(super) id: u32,
    pub(super) depth: u32,
    /// Path in the layer.
    pub(super) path: Vec<u8>,
    /// The earlier scan's directory at this path, if its entries are still valid where nothing changed.
    pub(super) earlier: Option<u32>,
    /// Whether the directory is in the upper (then at the same path).
    pub(super) upper: bool,
    /// Directories of the lowers that the overlay merges below that of the upper.
    pub(super) merge: Stack,
    /// Directories of the base at the path in the layer.
    pub(super) base: Stack,
    /// The directory was moved here: all merged content goes into the layer, not only the upper's part.
    pub(super) full: bool,
    /// The base's content here has to be hidden.
    pub(super) hidden: bool,
    /// Like `hidden`, but the base's content is unknown.
    pub(super) opaque: bool,
}

impl Task {
    /// Returns the memory, in bytes, that it takes until it is done.
    pub(super) fn weight(&self) -> u64 {
        let places = self.merge.iter().chain(&self.base);
        let places: usize = places
            .map(|place| size_of::<Place>() + place.path.len())
            .sum();
        (size_of::<Self>() + self.path.len() + places) as u64
    }
}

/// Result of a walk.
pub(super) struct Walk {
    /// The outputs; those of the initial directories are numbered in their order.
    pub(super) outputs: Vec<WalkedDirectory>,
    /// Number of outputs.
    pub(super) count: u32,
    /// Buffers that the outputs refer to, by number.
    pub(super) buffers: Vec<FactBuffer>,
    /// Findings of the walk.
    pub(super) report: Report,
}

pub(super) struct Walker<'a> {
    pub(super) upper: &'a Root,
    pub(super) lowers: &'a Lowers,
    lowers_known: bool,
    namespace: Namespace,
    /// The volume walked instead of an upper directory: nothing in it is a mark of an overlay, and the base's content
    /// at its path is invisible.
    volume: Option<&'a Volume>,
    pub(super) options: &'a Options<'a>,
    /// Whether each root is mounted ID-mapped for the container: 0 is the upper, n the lower `n - 1`.
    id_mapped: Vec<bool>,
    /// User and group maps for those.
    stored_ids: (Vec<IdMapping>, Vec<IdMapping>),
    /// The earlier scan of the tree, if there is one.
    pub(super) earlier: Option<&'a EarlierScan<'a>>,
    queue: Mutex<Queue>,
    changed: Condvar,
    next_buffer: AtomicU32,
    report: Mutex<Report>,
    count: Counters,
    pub(super) memory: Arc<MemoryBudget>,
}

#[derive(Default)]
struct Counters {
    entries: AtomicU64,
    bytes: AtomicU64,
    holes: AtomicU64,
}

pub(super) fn walk(roots: &Roots, options: &Options<'_>) -> Result<Scan, Error> {
    let clock = Clock::now();
    let (upper, lowers) = open(roots)?;
    let walker = Walker::new(&upper, &lowers, roots, options, None);
    let top = walker.top()?;
    let mut walk = walker.run(vec![walker.root_task()?])?;
    let report = std::mem::take(&mut walk.report);
    let rows = flatten(top, walk);
    let mut all_roots = vec![upper];
    all_roots.extend(lowers.roots);
    finish(rows, Arc::new(all_roots), roots, clock, report)
}

/// Opens the directories of an overlay. Fails if its marks cannot be read.
pub(super) fn open(roots: &Roots) -> Result<(Root, Lowers), Error> {
    if roots.namespace == Namespace::Trusted && !may_read_trusted()? {
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

/// Returns, for each opened directory, whether it is mounted ID-mapped.
fn id_mapped(roots: &Roots) -> Vec<bool> {
    let upper = Some(&roots.upper).filter(|_| roots.volume.is_none());
    let lowers = roots.lowers.iter().chain(&roots.data_only).map(Some);
    let all = std::iter::once(upper).chain(lowers);
    all.map(|path| path.is_some_and(|path| roots.id_mapped.contains(path)))
        .collect()
}

/// Returns the number of directories above the walked tree, the root included; 0 if the tree is the root.
pub(super) fn above(volume: Option<&Volume>) -> u32 {
    volume.map_or(0, |volume| volume.above().count() as u32 + 1)
}

impl<'a> Walker<'a> {
    pub(super) fn new(
        upper: &'a Root,
        lowers: &'a Lowers,
        roots: &'a Roots,
        options: &'a Options<'a>,
        earlier: Option<&'a EarlierScan<'a>>,
    ) -> Self {
        Self {
            upper,
            lowers,
            lowers_known: roots.lowers_known,
            namespace: roots.namespace,
            volume: roots.volume.as_ref(),
            options,
            id_mapped: id_mapped(roots),
            stored_ids: (
                id_map::on_disk_map(options.uid_map),
                id_map::on_disk_map(options.gid_map),
            ),
            earlier,
            queue: Mutex::default(),
            changed: Condvar::new(),
            next_buffer: AtomicU32::new(0),
            report: Mutex::new(Report::default()),
            count: Counters::default(),
            memory: MemoryBudget::new(options.caps.memory),
        }
    }

    /// Returns the directory at which every walk begins: the root, or the mounted directory.
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
}

impl Walker<'_> {
    pub(super) fn read_error(&self, path: &[u8], source: io::Error) -> Error {
        read_error(self.upper.path(), path, source)
    }

    /// Returns the status of a name in a directory of the walked tree; `None` if there is nothing, or nothing visible.
    pub(super) fn status(&self, dir: BorrowedFd<'_>, name: &[u8]) -> io::Result<Option<Stat>> {
        match self.volume {
            None => stat_at(dir, name),
            Some(volume) => Ok(match volume.name_status(dir, name)? {
                NameStatus::Present(stat) => Some(*stat),
                NameStatus::Gone | NameStatus::Mounted | NameStatus::Denied => None,
            }),
        }
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
        // A metacopy file has no data in the upper and looks like one hole; the limit applies to holes that would be
        // expanded.
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

/// Returns whether `trusted.*` attributes are visible: CAP_SYS_ADMIN in the initial user namespace. Without it the
/// kernel reports them as absent, and deleted files would silently reappear.
fn may_read_trusted() -> Result<bool, Error> {
    const CAP_SYS_ADMIN: u32 = 21;
    let read = |path: &str| {
        std::fs::read_to_string(path).map_err(|source| read_error(Path::new(path), b"", source))
    };
    let status = read("/proc/self/status")?;
    let effective = effective_capabilities(status.as_bytes());
    let map = read("/proc/self/uid_map")?;
    let initial = map.split_whitespace().eq(["0", "0", "4294967295"]);
    Ok(initial && effective.is_some_and(|set| set & (1 << CAP_SYS_ADMIN) != 0))
}
