//! What a writer of a layout is about to need, in a file that only exists while it works: `.upperdeck-save-*`, locked by
//! the writer (flock), with one blob name a line.
//!
//! - A blob is listed before it gets its name, or is relied on. So no other process of this program deletes it.
//! - What a writer lists and no image needs in the end is deleted by the writer itself, or, if that was killed, by the
//!   next command: the file of a dead process is not locked. This needs no assumption about how old a blob has to be.
//! - An image to be deleted is listed before `index.json` changes. So a crash between that and the deletion of the last
//!   blob leaves nothing behind either.
//!
//! Names are added under a shared lock on the layout's directory and compared under an exclusive one.

use std::collections::HashSet;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;
use rustix::io::Errno;

use super::blobs::BlobName;
use super::staged::{give_to_owner_of, sync_directory, try_lock};
use super::{Error, io_error};
use crate::common::private_files::FileMode;
use crate::common::regular_file;

/// Start of the names of these files.
const PREFIX: &str = ".upperdeck-save-";
/// First line of a writer to an existing layout.
const EXISTING: &str = "upperdeck 1";
/// First line of a writer to a layout without `index.json`, and of one that has created the directory, too.
const NEW: &str = "upperdeck 1 new";
const CREATED: &str = "upperdeck 1 new created";

/// Maximum size of a list, in bytes.
const MAX_LIST: u64 = 64 << 20;

/// Whether the layout was there before the writer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Before {
    /// It had an `index.json`.
    Layout,
    /// The directory existed.
    Directory,
    /// The writer created the directory.
    Nothing,
}

/// The list of this process.
#[derive(Debug)]
pub(super) struct Lease {
    root: PathBuf,
    path: PathBuf,
    file: File,
    names: HashSet<BlobName>,
    before: Before,
}

impl Lease {
    /// Creates the list of a writer in `root`.
    pub(super) fn create(root: &Path, mode: FileMode, before: Before) -> Result<Self, Error> {
        loop {
            let path = root.join(format!("{PREFIX}{:016x}", rand::random::<u64>()));
            let file = OpenOptions::new()
                .read(true)
                .append(true)
                .create_new(true)
                .mode(0o600)
                .open(&path)
                .map_err(io_error(&path, "create"))?;
            let mut lease = Self {
                root: root.to_path_buf(),
                path,
                file,
                names: HashSet::new(),
                before,
            };
            let begin = |lease: &mut Self| {
                let locked = try_lock(&lease.file)?;
                give_to_owner_of(regular_file::open_directory(root)?, &lease.file)?;
                mode.set(&lease.file)?;
                // Another process may have taken the file for that of a dead writer before it was locked.
                if !locked || lease.file.metadata()?.nlink() == 0 {
                    return Ok(false);
                }
                let first = match before {
                    Before::Layout => EXISTING,
                    Before::Directory => NEW,
                    Before::Nothing => CREATED,
                };
                lease.file.write_all(format!("{first}\n").as_bytes())?;
                sync_directory(root)?;
                Ok(true)
            };
            match begin(&mut lease) {
                Ok(true) => return Ok(lease),
                Ok(false) => lease.remove()?,
                Err(error) => {
                    lease.remove()?;
                    return Err(io_error(&lease.path, "write")(error));
                }
            }
        }
    }

    /// Lists blobs that are relied on. The caller holds a lock on the layout's directory.
    pub(super) fn add(&mut self, names: impl IntoIterator<Item = BlobName>) -> Result<(), Error> {
        // A line that a full disk cut off ends before this.
        let mut text = "\n".to_owned();
        let mut added = Vec::new();
        for name in names {
            if !self.names.contains(&name) {
                text.push_str(&format!("{name}\n"));
                added.push(name);
            }
        }
        if added.is_empty() {
            return Ok(());
        }
        self.file
            .write_all(text.as_bytes())
            .map_err(io_error(&self.path, "write"))?;
        self.names.extend(added);
        Ok(())
    }

    /// Lists blobs that are about to get a name, or to lose it. The list is on disk before that, for a crash of the
    /// machine.
    pub(super) fn add_durably(
        &mut self,
        names: impl IntoIterator<Item = BlobName>,
    ) -> Result<(), Error> {
        self.add(names)?;
        self.file.sync_data().map_err(io_error(&self.path, "write"))
    }

    /// Returns what is listed.
    pub(super) fn names(&self) -> &HashSet<BlobName> {
        &self.names
    }

    /// Returns the layout's directory.
    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    /// Returns whether the layout was there before.
    pub(super) fn before(&self) -> Before {
        self.before
    }

    /// Deletes the file.
    pub(super) fn remove(&self) -> Result<(), Error> {
        remove(&self.path)
    }
}

/// The lists of other processes in a layout.
#[derive(Debug, Default)]
pub(super) struct Others {
    /// Blobs that running writers need.
    pub(super) in_use: HashSet<BlobName>,
    /// Number of running writers.
    pub(super) writers: usize,
    /// Those of processes that are dead.
    pub(super) abandoned: Vec<Abandoned>,
}

/// The list of a process that is dead. It stays locked until it is dropped.
#[derive(Debug)]
pub(super) struct Abandoned {
    path: PathBuf,
    pub(super) names: HashSet<BlobName>,
    pub(super) before: Before,
    /// Keeps the file locked.
    _file: File,
}

impl Abandoned {
    /// Deletes the file.
    pub(super) fn remove(&self) -> Result<(), Error> {
        remove(&self.path)
    }
}

impl Others {
    /// Returns what was there before the first of the dead writers.
    pub(super) fn before_abandoned(&self) -> Before {
        let mut all = self.abandoned.iter().map(|dead| dead.before);
        if self.abandoned.is_empty() || all.any(|before| before == Before::Layout) {
            return Before::Layout;
        }
        let mut all = self.abandoned.iter().map(|dead| dead.before);
        if all.any(|before| before == Before::Nothing) {
            Before::Nothing
        } else {
            Before::Directory
        }
    }

    /// Reads the lists in `root`, except `own`. The caller holds the exclusive lock on the directory.
    ///
    /// Fails if one cannot be read: what it lists would not be known to be in use.
    pub(super) fn read(root: &Path, own: Option<&Lease>) -> Result<Self, Error> {
        let mut found = Self::default();
        for path in files(root)? {
            if own.is_some_and(|own| own.path == path) {
                continue;
            }
            let Some(file) = open(&path).map_err(io_error(&path, "open"))? else {
                continue;
            };
            let dead = try_lock(&file).map_err(io_error(&path, "lock"))?;
            let (before, names) = parse(&file).map_err(io_error(&path, "read"))?;
            if dead {
                found.abandoned.push(Abandoned {
                    path,
                    names,
                    before,
                    _file: file,
                });
            } else {
                found.in_use.extend(names);
                found.writers += 1;
            }
        }
        Ok(found)
    }
}

/// Returns whether there is the list of a dead process. Needs no lock.
pub(super) fn any_abandoned(root: &Path) -> Result<bool, Error> {
    for path in files(root)? {
        let file = open(&path).map_err(io_error(&path, "open"))?;
        let Some(file) = file else { continue };
        if try_lock(&file).map_err(io_error(&path, "lock"))? {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Returns whether a file of the layout's directory is such a list.
pub(super) fn is_lease(file: &str) -> bool {
    let random = file.strip_prefix(PREFIX);
    random.is_some_and(|text| text.len() == 16 && text.bytes().all(|b| b.is_ascii_hexdigit()))
}

fn files(root: &Path) -> Result<Vec<PathBuf>, Error> {
    let failed = || io_error(root, "read");
    let mut found = Vec::new();
    for entry in fs::read_dir(root).map_err(failed())? {
        let name = entry.map_err(failed())?.file_name();
        if name.to_str().is_some_and(is_lease) {
            found.push(root.join(name));
        }
    }
    Ok(found)
}

/// Opens a list; `None` if it is gone or no regular file.
fn open(path: &Path) -> io::Result<Option<File>> {
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let opened = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(flags.bits() as i32)
        .open(path);
    match opened {
        Ok(file) => Ok(file.metadata()?.is_file().then_some(file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) if error.raw_os_error() == Some(Errno::LOOP.raw_os_error()) => Ok(None),
        Err(error) => Err(error),
    }
}

fn parse(file: &File) -> io::Result<(Before, HashSet<BlobName>)> {
    let mut lines = BufReader::new(file.take(MAX_LIST)).lines();
    let before = match lines.next().transpose()?.as_deref() {
        Some(NEW) => Before::Directory,
        Some(CREATED) => Before::Nothing,
        _ => Before::Layout,
    };
    let mut names = HashSet::new();
    for line in lines {
        // A line that a crash cut off is of a blob that has no name yet.
        names.extend(BlobName::parse(&line?));
    }
    Ok((before, names))
}

fn remove(path: &Path) -> Result<(), Error> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(io_error(path, "delete")(error))
        }
        _ => Ok(()),
    }
}
