//! The scan of an upper directory: a list of entries in the order of the layer, each with all that its tar header
//! needs, known before any content is read.
//!
//! `walk` builds it, `rescan` rebuilds it where little changed (over `earlier`), `rows` stores it compactly, `changes`
//! computes the difference of two scans, `clock` decides what time stamps can prove, `stored` serialises a scan for the
//! next save, `exclude` holds the exclusion rules, `sample` bounds reports, `memory` accounts for the memory used,
//! `usage` measures a tree on disk.

mod changes;
mod clock;
mod earlier;
mod exclude;
mod memory;
mod rescan;
mod rows;
mod sample;
mod stored;
mod usage;
mod walk;

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

pub use clock::{Clock, tick};
pub use exclude::{Exclusions, Facts, PatternError, Reason, Rules};
pub(crate) use sample::{Counts, Example, Sample};
pub use stored::Stored;
pub(crate) use usage::usage;

use crate::node::overlay::id_map::IdMapping;
use crate::node::overlay::root::Root;
use crate::node::overlay::volume::Volume;
use crate::node::overlay::xattr::{Namespace, ValueError};
use memory::Xattrs;
use rows::Rows;
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

/// The directories of an overlay.
#[derive(Clone, Debug)]
pub struct Roots {
    /// The upper directory.
    pub upper: PathBuf,
    /// Lower directories, topmost first.
    pub lowers: Vec<PathBuf>,
    /// Data-only lowers: they only hold the content of metacopy files.
    pub data_only: Vec<PathBuf>,
    /// The directories above that are mounted ID-mapped for the container: their ids are the container's own, whatever
    /// its map.
    pub id_mapped: Vec<PathBuf>,
    /// Whether `lowers` is complete. If not, opaque directories are written as opaque whiteouts, and no entry can be
    /// left out as unchanged.
    pub lowers_known: bool,
    /// Namespace of the overlay's own attributes.
    pub namespace: Namespace,
    /// A directory mounted over the tree that is scanned instead of `upper`. All of its content belongs to it, and the
    /// lowers' content at its path is hidden. Paths are those of the container.
    pub volume: Option<Volume>,
}

/// Limits on the resources that a hostile tree can consume. An error names the limit and its flag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caps {
    /// Number of entries (`--max-entries`).
    pub entries: u64,
    /// Depth of directories (`--max-depth`).
    pub depth: u32,
    /// Sum of apparent file sizes in bytes (`--max-size`).
    pub bytes: u64,
    /// Sum over all files of the apparent less the allocated size, in bytes (`--max-holes`).
    pub holes: u64,
    /// Bytes of memory for the results of one scan: names, attributes, link targets, and the directories being walked
    /// (`--max-memory`).
    pub memory: u64,
}

impl Default for Caps {
    fn default() -> Self {
        Self {
            entries: 20_000_000,
            depth: 4096,
            bytes: 4 << 40,
            holes: 64 << 30,
            memory: 1 << 30,
        }
    }
}

/// How to scan.
pub struct Options<'a> {
    /// Number of threads.
    pub jobs: usize,
    /// User ID map of the container's user namespace; empty if it has none.
    pub uid_map: &'a [IdMapping],
    /// Group ID map, likewise.
    pub gid_map: &'a [IdMapping],
    /// Exclusion rules.
    pub exclusions: &'a Exclusions,
    /// Limits.
    pub caps: Caps,
    /// Mode that the runtime itself gives to the upper's root; it does not count as a change by the user.
    pub runtime_root_mode: Option<u32>,
    /// Set to stop early with [`Error::Cancelled`].
    pub cancel: &'a CancellationToken,
}

/// Type of an entry.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// `.wh..wh..opq`: hides the base's content of the parent directory.
    Opaque,
    /// `.wh.NAME`: deletes the base's entry of that name.
    Whiteout,
    /// A directory.
    Dir,
    /// A regular file.
    #[default]
    File,
    /// A symbolic link.
    Symlink,
    /// A character device.
    Char,
    /// A block device.
    Block,
    /// A FIFO.
    Fifo,
}

/// One entry, as assembled by [`Scan::entry`]. Its name and rarer parts are in the [`Scan`].
#[derive(Clone, Copy, Debug, Default)]
pub struct Entry {
    /// Index of the parent directory; the root is its own parent.
    pub parent: u32,
    /// Store of the facts that the following indices refer to.
    store: u32,
    name_at: u32,
    name_len: u16,
    /// Root that holds it: 0 is the upper, n the lower `n - 1`.
    pub root: u16,
    /// Its type.
    pub kind: Kind,
    /// Results of the walk.
    flags: Flags,
    /// Permission bits including setuid, setgid and sticky.
    pub mode: u16,
    extra: u32,
    /// Owner as seen in the container.
    pub uid: u32,
    /// Group as seen in the container.
    pub gid: u32,
    /// Hard link count on disk.
    pub nlink: u32,
    /// Inode number in its root.
    pub ino: u64,
    /// Apparent size in bytes; 0 for everything but files.
    pub size: u64,
    /// Bytes allocated on disk.
    pub allocated: u64,
    /// Device number of a device.
    pub rdev: u64,
    /// Modification time, whole seconds (floor).
    pub mtime: i64,
    /// Nanoseconds of the modification time.
    pub mtime_nsec: u32,
    /// Nanoseconds of the change time.
    pub ctime_nsec: u32,
    /// Change time, whole seconds: the kernel updates it on every change, and no process can set it.
    pub ctime: i64,
}

/// Results of the walk for an entry, one bit each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
struct Flags(u8);

impl Flags {
    /// Metadata and content equal those of the base.
    const UNCHANGED: Self = Self(1);
    /// A directory that differs from the base's only in its modification time.
    const TIME_ONLY: Self = Self(2);
    /// A directory that the runtime created as a parent of a mount point.
    const MOUNT_PARENT: Self = Self(4);
    /// The base has an entry at this path.
    const IN_BASE: Self = Self(8);
    /// Not in the layer, because the image already has the right entry from the base: an entry equal to the base, or
    /// the root without a relevant change.
    const OMITTED: Self = Self(16);
    /// A directory in which an entry made by the runtime was left out.
    const STUBS: Self = Self(32);
    /// A directory that contains more than the entries of the scan: some were left out, or have no meaning for the
    /// image.
    const PARTIAL: Self = Self(64);
    /// A directory that is marked opaque.
    const OPAQUE: Self = Self(128);

    fn has(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }

    fn set(&mut self, other: Self) {
        self.0 |= other.0;
    }

    fn clear(&mut self, other: Self) {
        self.0 &= !other.0;
    }
}

/// Name and value of an extended attribute as it is in the image.
pub(crate) type Xattr = (Vec<u8>, Vec<u8>);

/// Location of content that is not in the upper at the entry's own path.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ContentLocation {
    /// Root: 0 is the upper, n the lower `n - 1`.
    pub root: u16,
    /// Path below that root.
    #[serde(with = "serde_bytes")]
    pub path: Vec<u8>,
    /// Inode number there.
    pub ino: u64,
}

/// The rarer parts of an entry.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Extra {
    #[serde(with = "serde_bytes")]
    link: Option<Vec<u8>>,
    #[serde(skip)]
    xattrs: Option<Xattrs>,
    content: Option<ContentLocation>,
    /// Root and inode number of the base's file at the same path, for hard link groups.
    base: Option<(u16, u64)>,
    /// Hard link count as seen in the container, where the overlay's index tracks the links.
    indexed_nlink: Option<u32>,
    /// A directory that was moved here (redirect) and is merged with content from its old path.
    moved: bool,
    /// A file with setuid, setgid or file capabilities that it does not have in the base.
    privileged: bool,
}

impl Extra {
    /// Returns the extended attributes, sorted by name.
    fn xattrs(&self) -> &[Xattr] {
        self.xattrs.as_deref().unwrap_or_default()
    }
}

/// An entry that is deliberately not in the layer.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
pub struct Excluded {
    /// Path without a leading slash; a directory stands for everything below it. Lossy if not UTF-8.
    pub path: String,
    /// Reason for the exclusion.
    #[serde(flatten)]
    pub reason: Reason,
}

impl Example for Excluded {
    fn bytes(&self) -> usize {
        self.path.len()
    }
}

/// Findings of the walk besides the entries. Paths are lossy where they are not UTF-8.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct Report {
    /// Entries excluded by the rules, by kind of reason ([`Reason::kind`]).
    pub excluded: BTreeMap<&'static str, Sample<Excluded>>,
    /// Sockets, which no archive can represent.
    pub sockets: Sample<String>,
    /// Files with setuid, setgid or file capabilities that they do not have in the base.
    pub privileged: Sample<String>,
    /// Extended attributes that belong to the host and were left out: number of entries by name.
    pub dropped_xattrs: Counts,
    /// Paths with an attribute whose value is empty, which some unpackers drop.
    pub empty_xattrs: Sample<String>,
    /// Files in renamed directories that have hard links elsewhere in the base: they become separate files.
    pub split_links: Sample<String>,
    /// Entries that vanished during the walk (only while the container runs).
    pub vanished: Sample<String>,
    /// Entries of volumes that the container itself may not read, and that are therefore left out. A directory stands
    /// for everything below it.
    pub unreadable: Sample<String>,
}

impl Report {
    /// Adds the findings of another walk.
    pub(crate) fn add(&mut self, other: Self) {
        for (kind, sample) in other.excluded {
            self.excluded.entry(kind).or_default().append(sample);
        }
        self.sockets.append(other.sockets);
        self.privileged.append(other.privileged);
        self.split_links.append(other.split_links);
        self.empty_xattrs.append(other.empty_xattrs);
        self.vanished.append(other.vanished);
        self.unreadable.append(other.unreadable);
        for (name, count) in other.dropped_xattrs.iter() {
            self.dropped_xattrs.add(name, count);
        }
    }
}

/// The entries of a tree in the order of the layer: parents before children, siblings in byte order, whiteouts before
/// their siblings.
#[derive(Debug)]
pub struct Scan {
    rows: Rows,
    roots: Arc<Vec<Root>>,
    /// Whether the list of lowers was complete.
    lowers_known: bool,
    /// Number of leading entries that are directories above the scanned tree, the root included; 0 if the tree is the
    /// root.
    above: u32,
    /// Time at which the walk began.
    clock: Clock,
    /// Findings of the walk.
    pub report: Report,
}

impl Scan {
    /// Walks the upper directory.
    ///
    /// Fails if the tree cannot be read or represented, or exceeds a limit; see `Error`.
    pub fn new(roots: &Roots, options: &Options<'_>) -> Result<Self, Error> {
        walk::walk(roots, options)
    }

    /// Iterates over all entries; the first is the root directory itself.
    pub fn entries(
        &self,
    ) -> impl ExactSizeIterator<Item = Entry> + DoubleEndedIterator + Clone + '_ {
        self.rows.iter()
    }

    /// Returns the entry with this index.
    pub fn entry(&self, index: u32) -> Entry {
        self.rows.entry(index)
    }

    /// Returns the number of entries.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Returns the index of an entry's parent directory.
    pub(crate) fn parent(&self, index: u32) -> u32 {
        self.rows.parent(index)
    }

    /// Returns whether the layer would be empty.
    pub fn is_empty(&self) -> bool {
        self.emitted().next().is_none()
    }

    /// Iterates over the indices of the entries that go into a layer: all but those that equal the base.
    pub fn emitted(&self) -> impl Iterator<Item = u32> + Clone + '_ {
        (0..self.len() as u32).filter(|&i| !self.rows.flags(i).has(Flags::OMITTED))
    }

    /// Returns the name of an entry in its directory; for a whiteout, the name that it deletes.
    pub(crate) fn name(&self, entry: &Entry) -> &[u8] {
        self.rows.name(entry)
    }

    /// Returns the path of an entry without a leading slash; for a whiteout, the path that it deletes.
    pub fn path(&self, index: u32) -> Vec<u8> {
        let mut path = Vec::new();
        self.path_into(index, &mut path);
        path
    }

    /// Like [`Scan::path`], into a buffer that is cleared first.
    pub(crate) fn path_into(&self, index: u32, path: &mut Vec<u8>) {
        self.rows.path_into(index, path);
    }

    /// Returns the target of a symlink.
    pub fn link(&self, entry: &Entry) -> Option<&[u8]> {
        self.extra(entry)?.link.as_deref()
    }

    /// Returns the extended attributes for the image, sorted by name.
    pub fn xattrs(&self, entry: &Entry) -> &[Xattr] {
        self.extra(entry).map_or(&[], Extra::xattrs)
    }

    /// Returns the location of the content if it is not in the upper at the entry's own path.
    pub fn content_location(&self, entry: &Entry) -> Option<&ContentLocation> {
        self.extra(entry)?.content.as_ref()
    }

    /// Returns an opened directory: 0 is the upper, n the lower `n - 1`.
    pub(crate) fn root(&self, root: u16) -> &Root {
        &self.roots[usize::from(root)]
    }

    /// Returns whether the base has an entry at this path.
    pub fn in_base(&self, entry: &Entry) -> bool {
        entry.flags.has(Flags::IN_BASE)
    }

    /// Returns the time at which the walk began: an entry with a sufficiently earlier stamp shows every later change.
    pub(crate) fn clock(&self) -> Clock {
        self.clock
    }

    /// Lowers the clock of the scan to `clock` if that is earlier, so that fewer time stamps are trusted. `clock` is a
    /// reading from before the walk, and from before any preparation on which the stamps depend.
    #[must_use]
    pub fn with_clock(mut self, clock: Clock) -> Self {
        self.clock = self.clock.min(clock);
        self
    }

    fn extra(&self, entry: &Entry) -> Option<&Extra> {
        self.rows.extra(entry)
    }
}

/// Why a tree cannot be scanned.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file or directory could not be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// Full path.
        path: String,
        /// Error of the operating system.
        source: io::Error,
    },
    /// The process may not read the overlay's attributes; without them, deleted files would silently reappear.
    #[error(
        "the overlay keeps its marks in trusted.overlay.* attributes, which this process cannot read: \
         run as root in the initial user namespace with CAP_SYS_ADMIN"
    )]
    MarksUnreadable,
    /// The kernel has no more threads for this process (`pids.max`, `RLIMIT_NPROC`).
    #[error("cannot start a thread: {0}")]
    Thread(#[source] io::Error),
    /// A thread of the walk panicked.
    #[error("a thread that walks the tree died; this is a defect of upperdeck")]
    Worker,
    /// A limit was exceeded.
    #[error("refused: {what} is over the limit of {limit}; raise it with {flag} if intended")]
    Cap {
        /// The limited quantity.
        what: String,
        /// The limit.
        limit: u64,
        /// Flag that raises it.
        flag: &'static str,
    },
    /// A character device 0:0, which unpackers of layers take for a whiteout.
    #[error(
        "{path} cannot be stored in a layer: a character device 0:0 is a whiteout; remove it, or use --exclude"
    )]
    WhiteoutDevice {
        /// The path.
        path: String,
    },
    /// An owner outside the container's ID map.
    #[error("{path} belongs to {what} {id}, which is outside the container's id map")]
    Unmapped {
        /// The path.
        path: String,
        /// `user` or `group`.
        what: &'static str,
        /// The id on the host.
        id: u32,
    },
    /// An extended attribute that cannot be represented in the image.
    #[error("{path}: {source}")]
    Xattr {
        /// The path.
        path: String,
        /// The reason.
        source: ValueError,
    },
    /// A redirect or metacopy mark whose target does not exist.
    #[error("{path} has the attribute {mark}, whose target is not in the lower directories")]
    Dangling {
        /// The path.
        path: String,
        /// `redirect` or `metacopy`.
        mark: &'static str,
    },
    /// A file of a lower with several hard links under `index=on`, of which the upper has only some.
    #[error(
        "{path} is one name of a hard-linked base file on an overlay mounted with index=on; \
         its other names changed with it but are not in the upper directory"
    )]
    IndexedLink {
        /// The path.
        path: String,
    },
    /// The operation was cancelled.
    #[error("cancelled")]
    Cancelled,
}
