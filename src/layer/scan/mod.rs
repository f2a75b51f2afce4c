//! What is in an upper directory: a list of entries in the order of the layer, each with all that its tar
//! header needs, known before one content byte is read.
//!
//! `walk` makes it, `again` makes it anew where little changed, `rows` holds it in little memory, `changes` tells two of
//! them apart, `clock` says what can be told by time stamps, `stored` keeps one for the next save, `exclude` says what must
//! not get in, `sample` keeps reports short, `memory` counts what all of it takes.

mod again;
mod changes;
mod clock;
mod earlier;
mod exclude;
mod memory;
mod rows;
mod sample;
mod stored;
mod usage;
mod walk;

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

pub use clock::{Clock, tick};
pub use exclude::{Exclusions, Facts, PatternError, Reason, Rules};
pub use sample::{Counts, Example, Sample};
pub use stored::Stored;
pub use usage::{Usage, usage};

use crate::node::overlay::owner::IdMapping;
use crate::node::overlay::root::Root;
use crate::node::overlay::volume::Volume;
use crate::node::overlay::xattr::{Namespace, ValueError};
use memory::Xattrs;
use rows::Rows;

/// The directories of an overlay.
#[derive(Clone, Debug)]
pub struct Roots {
    /// What changed.
    pub upper: PathBuf,
    /// What it changed from, topmost first.
    pub lowers: Vec<PathBuf>,
    /// Lowers that only hold data for metacopy files.
    pub data_only: Vec<PathBuf>,
    /// Those of all these in which the ids are the container's own, whatever its map: they are mounted ID-mapped for it.
    pub id_mapped: Vec<PathBuf>,
    /// Whether `lowers` are all there are. If not, opaque directories are written as opaque whiteouts, and
    /// nothing can be left out for being unchanged.
    pub lowers_known: bool,
    /// Where the overlay keeps its marks.
    pub namespace: Namespace,
    /// What is scanned instead of `upper`: a directory that is mounted over the tree. Everything in it is its own, and
    /// what the lowers have at its path is hidden. Paths are those of the container.
    pub volume: Option<Volume>,
}

/// Bounds on what a hostile tree can make this program do. A refusal names the bound and its flag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caps {
    /// Entries (`--max-entries`).
    pub entries: u64,
    /// Levels of directories (`--max-depth`).
    pub depth: u32,
    /// Sum of apparent file sizes in bytes (`--max-size`).
    pub bytes: u64,
    /// Apparent size less allocated size, in bytes, of all files (`--max-holes`).
    pub holes: u64,
    /// Bytes of memory for what one look at a tree finds: names, attributes, link targets, and the directories under way
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
    /// Threads.
    pub jobs: usize,
    /// User ids of the container's user namespace; empty: none.
    pub uid_map: &'a [IdMapping],
    /// Group ids, likewise.
    pub gid_map: &'a [IdMapping],
    /// What must not get in.
    pub exclusions: &'a Exclusions,
    /// Bounds.
    pub caps: Caps,
    /// A mode that the runtime gives the upper's root by itself: no change of the user's.
    pub runtime_root_mode: Option<u32>,
    /// Set to stop early with [`Error::Cancelled`].
    pub cancel: &'a AtomicBool,
}

/// What an entry is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// `.wh..wh..opq`: the base's content of the parent directory is hidden.
    Opaque,
    /// `.wh.NAME`: the base's entry of that name is deleted.
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

/// One entry, as [`Scan::entry`] puts it together. Its name and rarer parts are in the [`Scan`].
#[derive(Clone, Copy, Debug, Default)]
pub struct Entry {
    /// Index of the directory that it is in; the root is its own parent.
    pub parent: u32,
    /// Whose names and extras the following are of.
    store: u32,
    name_at: u32,
    name_len: u16,
    /// Root that it comes from: 0 the upper, n the lower `n - 1`.
    pub root: u16,
    /// What it is.
    pub kind: Kind,
    /// What the walk found out about it.
    flags: Flags,
    /// Permission bits with setuid, setgid and sticky.
    pub mode: u16,
    extra: u32,
    /// Owner as the container sees it.
    pub uid: u32,
    /// Group as the container sees it.
    pub gid: u32,
    /// Hard links on disk.
    pub nlink: u32,
    /// Inode number in its root.
    pub ino: u64,
    /// Apparent size in bytes; 0 for all but files.
    pub size: u64,
    /// Bytes allocated on disk.
    pub allocated: u64,
    /// Device number of device entries.
    pub rdev: u64,
    /// Modification time, whole seconds (floor).
    pub mtime: i64,
    /// Nanoseconds of the modification time.
    pub mtime_nsec: u32,
    /// Nanoseconds of the change time.
    pub ctime_nsec: u32,
    /// Change time, whole seconds: the kernel moves it at every change, nobody can set it.
    pub ctime: i64,
}

/// What the walk found out about an entry, one bit each.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
struct Flags(u8);

impl Flags {
    /// Metadata and content equal the base's.
    const UNCHANGED: Self = Self(1);
    /// A directory that differs from the base's in its time only.
    const TIME_ONLY: Self = Self(2);
    /// A directory that the runtime made to mount something below it.
    const MOUNT_PARENT: Self = Self(4);
    /// The base has something at this path.
    const IN_BASE: Self = Self(8);
    /// Not in the layer: what the base has at this path is what it is to be. The root, when nothing about it changed
    /// that counts, and what equals the base.
    const SILENT: Self = Self(16);
    /// A directory in which something was left out that the runtime had made.
    const STUBS: Self = Self(32);
    /// A directory in which there is more than the entries say: left out, or without meaning for the image.
    const PARTIAL: Self = Self(64);
    /// A directory marked opaque.
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

/// An extended attribute as the image is to have it: name and value.
pub type Xattr = (Vec<u8>, Vec<u8>);

/// Where content is that is not in the upper under the entry's own path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Elsewhere {
    /// 0 the upper, n the lower `n - 1`.
    pub root: u16,
    /// Path below that root.
    pub path: Vec<u8>,
    /// Inode number there.
    pub ino: u64,
}

/// The rarer parts of an entry.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Extra {
    link: Option<Vec<u8>>,
    xattrs: Option<Xattrs>,
    content: Option<Elsewhere>,
    /// Root and inode of the base's file of the same path, for hard link groups.
    base: Option<(u16, u64)>,
    /// Hard links that the container sees, where the overlay's index keeps them together.
    indexed_nlink: Option<u32>,
    /// A directory that was moved here, and is merged with what lies elsewhere.
    moved: bool,
    /// A file with setuid, setgid or file capabilities that the base does not have so.
    privileged: bool,
}

impl Extra {
    /// Extended attributes, sorted by name.
    fn xattrs(&self) -> &[Xattr] {
        self.xattrs.as_deref().unwrap_or_default()
    }
}

/// Something that is not in the layer on purpose.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
pub struct Excluded {
    /// Path without a leading slash; a directory stands for all below it. Lossy where it is not UTF-8.
    pub path: String,
    /// Why.
    #[serde(flatten)]
    pub reason: Reason,
}

impl Example for Excluded {
    fn bytes(&self) -> usize {
        self.path.len()
    }
}

/// What the walk has to tell besides the entries. Paths are lossy where they are not UTF-8.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct Report {
    /// What was left out by the rules, by the kind of reason ([`Reason::kind`]).
    pub excluded: BTreeMap<&'static str, Sample<Excluded>>,
    /// Sockets: no archive can hold one.
    pub sockets: Sample<String>,
    /// Files with setuid, setgid or file capabilities that the base does not have so.
    pub privileged: Sample<String>,
    /// Extended attributes that belong to the host and were left out: name to number of entries.
    pub dropped_xattrs: Counts,
    /// Paths with an attribute whose value is empty: some unpackers leave such attributes out.
    pub empty_xattrs: Sample<String>,
    /// Files in renamed directories that have hard links elsewhere in the base: those come out as files of their own.
    pub split_links: Sample<String>,
    /// Entries that vanished while the tree was walked (only when the container runs).
    pub vanished: Sample<String>,
    /// What the container may not read itself in its volumes, and what is therefore left out. A directory stands for all below
    /// it.
    pub unreadable: Sample<String>,
}

impl Report {
    /// Adds what another walk has to tell.
    pub fn add(&mut self, other: Self) {
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

/// The entries of a tree in the order of the layer: parents first, siblings by bytes, whiteouts before their siblings.
#[derive(Debug)]
pub struct Scan {
    rows: Rows,
    roots: Arc<Vec<Root>>,
    /// Whether the lowers were all there are.
    lowers_known: bool,
    /// The first entries that are directories above the tree, the root included; 0 where that is the tree.
    above: u32,
    /// When the walk began.
    clock: Clock,
    /// What the walk has to tell.
    pub report: Report,
}

impl Scan {
    /// Walks the upper directory.
    pub fn new(roots: &Roots, options: &Options<'_>) -> Result<Self, Error> {
        walk::walk(roots, options)
    }

    /// Every entry; the first is the root directory itself.
    pub fn entries(
        &self,
    ) -> impl ExactSizeIterator<Item = Entry> + DoubleEndedIterator + Clone + '_ {
        self.rows.iter()
    }

    /// The entry with this index.
    pub fn entry(&self, index: u32) -> Entry {
        self.rows.entry(index)
    }

    /// Number of entries.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// Index of the directory that an entry is in.
    pub fn parent(&self, index: u32) -> u32 {
        self.rows.parent(index)
    }

    /// Whether there is nothing to save.
    pub fn is_empty(&self) -> bool {
        self.emitted().next().is_none()
    }

    /// The entries that a layer has: all but those that equal the base.
    pub fn emitted(&self) -> impl Iterator<Item = u32> + Clone + '_ {
        (0..self.len() as u32).filter(|&i| !self.rows.flags(i).has(Flags::SILENT))
    }

    /// Name of an entry in its directory; of a whiteout, the name that is deleted.
    pub fn name(&self, entry: &Entry) -> &[u8] {
        self.rows.name(entry)
    }

    /// Path of an entry without a leading slash; of a whiteout, the path that is deleted.
    pub fn path(&self, index: u32) -> Vec<u8> {
        let mut path = Vec::new();
        self.path_into(index, &mut path);
        path
    }

    /// As [`Scan::path`], into a buffer that is cleared first.
    pub fn path_into(&self, index: u32, path: &mut Vec<u8>) {
        self.rows.path_into(index, path);
    }

    /// Target of a symlink.
    pub fn link(&self, entry: &Entry) -> Option<&[u8]> {
        self.extra(entry)?.link.as_deref()
    }

    /// Extended attributes for the image, sorted by name.
    pub fn xattrs(&self, entry: &Entry) -> &[Xattr] {
        self.extra(entry).map_or(&[], Extra::xattrs)
    }

    /// Where the content is, if it is not in the upper under the entry's own path.
    pub fn elsewhere(&self, entry: &Entry) -> Option<&Elsewhere> {
        self.extra(entry)?.content.as_ref()
    }

    /// The opened directories: 0 the upper, n the lower `n - 1`.
    pub fn root(&self, root: u16) -> &Root {
        &self.roots[usize::from(root)]
    }

    /// Whether the base has something at this entry's path.
    pub fn in_base(&self, entry: &Entry) -> bool {
        entry.flags.has(Flags::IN_BASE)
    }

    /// When the walk began: what is stamped earlier, and not too closely, shows every later change.
    pub fn clock(&self) -> Clock {
        self.clock
    }

    /// The same, with less trust in stamps: `clock` is what it showed before the walk, and before what was to be done
    /// for the stamps to tell.
    #[must_use]
    pub fn since(mut self, clock: Clock) -> Self {
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
    /// Something could not be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// Full path.
        path: String,
        /// What the system said.
        source: io::Error,
    },
    /// The process may not read the overlay's marks, and without them deletions would silently come back.
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
    /// A bound was reached.
    #[error("refused: {what} is over the limit of {limit}; if that is meant, raise it with {flag}")]
    Cap {
        /// What was counted.
        what: String,
        /// The bound.
        limit: u64,
        /// Flag that raises it.
        flag: &'static str,
    },
    /// A device that is a deletion where layers are unpacked.
    #[error(
        "{path} cannot be put into a layer: character devices 0:0 mean deletions where it is unpacked; \
         remove it, or leave it out with --exclude"
    )]
    WhiteoutDevice {
        /// The path.
        path: String,
    },
    /// An owner outside the container's user namespace.
    #[error("{path} belongs to {what} {id}, which is outside the container's id map")]
    Unmapped {
        /// The path.
        path: String,
        /// `user` or `group`.
        what: &'static str,
        /// The host's id.
        id: u32,
    },
    /// An extended attribute that cannot be carried over.
    #[error("{path}: {source}")]
    Xattr {
        /// The path.
        path: String,
        /// Why.
        source: ValueError,
    },
    /// A mark that leads nowhere.
    #[error("{path} is marked {mark}, but what the mark leads to is not in the lower directories")]
    Dangling {
        /// The path.
        path: String,
        /// `redirect` or `metacopy`.
        mark: &'static str,
    },
    /// Hard links of a lower file under `index=on` of which the upper has only some.
    #[error(
        "{path} is one name of a hard-linked base file on an overlay mounted with index=on; \
         its other names changed with it but are not in the upper directory"
    )]
    IndexedLink {
        /// The path.
        path: String,
    },
    /// Somebody asked to stop.
    #[error("cancelled")]
    Cancelled,
}
