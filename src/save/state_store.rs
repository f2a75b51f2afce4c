//! Stores what a node keeps of a save for the next one of the same container: the scan, and the layers that contain it.
//!
//! Losing it costs one full save and nothing else, so no error here fails a save. A file is trusted if its checksum is
//! right: a file that is damaged, truncated, of another version or of another upper directory is not used.
//!
//! There is one file per container: magic, version, length of the description, description (JSON), the scans of the
//! upper and of the volumes that were saved with it, each preceded by its length, and the SHA-256 of all that. It is
//! written to a temporary file and renamed. A save of the container holds a lock on a second file meanwhile. A scan is
//! large and is never in memory in its file format.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufReader, BufWriter, Read as _, Seek as _, SeekFrom, Write};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;
use serde::{Deserialize, Serialize};

use crate::common::digest::{DiffId, Digest, HashingWriter};
use crate::common::{private_files, regular_file};
use crate::layer::index::Place;
use crate::layer::scan::{Scan, Stored};

const MAGIC: &[u8; 8] = b"updeckst";
/// Incremented when the meaning of anything in a file changes, including the scan: flags, what is emitted, what is left
/// out.
pub const VERSION: u32 = 4;
/// Maximum size of the description, in bytes.
const MAX_DESCRIPTION: u64 = 4 << 20;
/// Maximum size of a file, in bytes. A million entries take some 40 MB.
const MAX_FILE: u64 = 1 << 30;
/// Maximum size of all files together, in bytes. The oldest are removed first.
pub(crate) const MAX_TOTAL: u64 = 2 << 30;
/// Bytes of a file that are read or written at once.
const BUFFER: usize = 64 << 10;
const SUFFIX: &str = "state";
const LOCK: &str = "lock";

/// A layer of the saved image, above the base.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layer {
    /// Digest of the compressed bytes.
    pub digest: Digest,
    /// Digest of the tar (diff ID).
    pub diff_id: DiffId,
    /// Compressed size in bytes.
    pub size: u64,
    /// Its media type.
    pub media_type: String,
    /// Size of the tar in bytes.
    pub tar_size: u64,
    /// Where its index is, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub index: Option<Place>,
    /// Whether it belongs to a full save.
    pub full: bool,
}

/// Describes a kept save.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Description {
    /// Digest over everything that a layer on top depends on: base, rules, mounts, ID maps, the upper, this boot.
    pub fingerprint: Digest,
    /// The upper directory.
    pub upper: PathBuf,
    /// Its device and inode.
    pub upper_inode: (u64, u64),
    /// The location of the layers: `HOST/REPOSITORY` or a layout's path, as in a destination.
    pub destination: String,
    /// The layers above the base, bottom first.
    pub layers: Vec<Layer>,
}

/// A save that was kept.
#[derive(Debug)]
pub struct StoredSave {
    /// The description of the save.
    pub description: Description,
    /// The scans: the upper, then the volumes.
    pub stored: Vec<Stored>,
}

/// The data of one tree that is to be kept.
#[derive(Clone, Copy)]
pub struct TreeState<'a> {
    /// The scan of the tree.
    pub scan: &'a Scan,
    /// As [`Stored::unsure`].
    pub unsure: &'a [bool],
}

impl TreeState<'_> {
    fn length(&self) -> io::Result<u64> {
        let mut length = CountingWriter(0);
        self.write(&mut length)?;
        Ok(length.0)
    }

    fn write(&self, to: &mut dyn Write) -> io::Result<()> {
        let unsure = |index: u32| self.unsure.get(index as usize) == Some(&true);
        self.scan.store(&unsure, to)
    }
}

/// The reason why nothing that was kept can be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unusable {
    /// Nothing was kept, which needs no message.
    #[error("there is no state of an earlier save")]
    Absent,
    /// Something was kept but cannot be used.
    #[error("the state of the last save in {path} is not used: {why}")]
    Damaged {
        /// The file.
        path: String,
        /// The reason, as text for the user.
        why: String,
    },
}

/// The directory of kept saves.
#[derive(Clone, Debug)]
pub struct Store {
    dir: PathBuf,
}

/// The lock on a container, which excludes other saves of it that use the same directory.
#[derive(Debug)]
pub(crate) struct Lock {
    /// The lock is released with the descriptor.
    file: File,
    path: PathBuf,
}

impl Drop for Lock {
    /// Removes the lock file if nothing is kept of the container.
    fn drop(&mut self) {
        if !self.path.with_extension(SUFFIX).exists()
            && private_files::is_at(&self.file, &self.path).unwrap_or(false)
        {
            // Otherwise `Store::clear` removes it.
            fs::remove_file(&self.path).ok();
        }
    }
}

/// Returns whether a file name in a state directory belongs to upperdeck: to a save, an agent or `upperdeck up`.
pub(crate) fn is_state_file(name: &str) -> bool {
    [".state", ".lock", ".proof"]
        .iter()
        .any(|end| name.ends_with(end))
        || name.starts_with(".new-")
        || name.starts_with("manager.db")
        || ["agent", "images", "key", "up.url"].contains(&name)
}

/// Creates a state directory, or refuses one that is not private.
pub(super) fn prepare_dir(dir: &Path) -> io::Result<()> {
    private_files::prepare_dir(dir, is_state_file)
}

impl Store {
    /// Returns the store in `dir`, which is created when it is needed.
    pub fn new(dir: &Path) -> Self {
        Self {
            dir: dir.to_owned(),
        }
    }

    /// Returns a path that is unique to the container, whatever characters its ID contains.
    fn path(&self, container: &str, suffix: &str) -> PathBuf {
        self.dir.join(format!(
            "{}.{suffix}",
            Digest::of(container.as_bytes()).hex()
        ))
    }

    /// Takes the container's lock. Returns `None` if another save holds it.
    pub(crate) fn try_lock(&self, container: &str) -> io::Result<Option<Lock>> {
        prepare_dir(&self.dir)?;
        let path = self.path(container, LOCK);
        let file = private_files::try_lock(&path)?;
        Ok(file.map(|file| Lock { file, path }))
    }

    /// Loads what is kept of a container.
    pub fn load(&self, container: &str) -> Result<StoredSave, Unusable> {
        let path = self.path(container, SUFFIX);
        let damaged = |why: String| Unusable::Damaged {
            path: path.display().to_string(),
            why,
        };
        let file = match regular_file::open_own(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(Unusable::Absent),
            opened => opened.map_err(|error| damaged(error.to_string()))?,
        };
        parse(&file).map_err(|why| damaged(why.to_string()))
    }

    /// Keeps a save in place of the previous one, atomically and within the limit on the total size.
    pub fn keep(
        &self,
        container: &str,
        description: &Description,
        scans: &[TreeState<'_>],
    ) -> io::Result<()> {
        prepare_dir(&self.dir)?;
        let json = serde_json::to_vec(description)?;
        // Everything is written twice, the first time only to count, because the lengths come first.
        let lengths = scans.iter().map(TreeState::length);
        let lengths = lengths.collect::<io::Result<Vec<u64>>>()?;
        let all: u64 = lengths.iter().map(|length| 8 + length).sum();
        self.prune(16 + json.len() as u64 + all + 32);
        let mut file = tempfile::Builder::new()
            .prefix(".new-")
            .tempfile_in(&self.dir)?;
        write(&json, scans.iter().zip(lengths), file.as_file_mut())?;
        // Not synced to disk, which could force out everything else on it: after a failure of the machine nothing that
        // was kept before is used anyway (the fingerprint of `save::earlier` includes the boot's ID).
        file.persist(self.path(container, SUFFIX))
            .map_err(|error| error.error)?;
        Ok(())
    }

    /// Removes what is kept of a container.
    pub(crate) fn forget(&self, container: &str) -> io::Result<()> {
        match fs::remove_file(self.path(container, SUFFIX)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// Removes the files of containers that are gone, files left half written, and the oldest of the rest if their
    /// total plus `more` bytes would exceed the limit.
    pub(crate) fn prune(&self, more: u64) {
        let Ok(entries) = fs::read_dir(&self.dir) else {
            return;
        };
        let (mut files, mut locks) = (Vec::new(), Vec::new());
        for entry in entries.flatten() {
            let path = entry.path();
            let Ok(meta) = entry.metadata() else { continue };
            let name = entry.file_name();
            let name = name.to_string_lossy();
            if name.starts_with(".new-") {
                // Writing a file takes less than an hour.
                if meta
                    .modified()
                    .is_ok_and(|t| t.elapsed().is_ok_and(|age| age.as_secs() > 3600))
                {
                    fs::remove_file(&path).ok();
                }
            } else if name.ends_with(&format!(".{SUFFIX}")) {
                if is_orphan(&path) {
                    fs::remove_file(&path).ok();
                } else {
                    files.push((meta.modified().ok(), meta.len(), path));
                }
            } else if name.ends_with(&format!(".{LOCK}")) {
                locks.push(path);
            }
        }
        files.sort();
        let mut total = more + files.iter().map(|(_, size, _)| size).sum::<u64>();
        for (_, size, path) in files {
            if total <= MAX_TOTAL {
                break;
            }
            if fs::remove_file(&path).is_ok() {
                total -= size;
            }
        }
        for path in locks {
            if !path.with_extension(SUFFIX).exists() {
                remove_unless_held(&path);
            }
        }
    }
}

/// Returns the number and the total size in bytes of the files in `dir` that were kept for later saves.
#[cfg(feature = "service")]
pub(crate) fn size_of(dir: &Path) -> (usize, u64) {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let kept = entries.filter(|entry| {
        let name = entry.file_name();
        Path::new(&name)
            .extension()
            .is_some_and(|found| found == SUFFIX)
    });
    let sizes = kept.filter_map(|entry| entry.metadata().ok());
    sizes.fold((0, 0), |(count, size), meta| (count + 1, size + meta.len()))
}

/// Removes a lock file that is not held. A process that takes the lock at this moment notices that the file is gone and
/// creates another.
fn remove_unless_held(path: &Path) {
    let mut options = OpenOptions::new();
    let Ok(file) = regular_file::open_with(path, options.write(true), OFlags::NOFOLLOW) else {
        return;
    };
    let how = rustix::fs::FlockOperation::NonBlockingLockExclusive;
    if rustix::fs::flock(&file, how).is_ok() {
        fs::remove_file(path).ok();
    }
}

/// Returns whether the upper directory that a file describes no longer exists.
fn is_orphan(path: &Path) -> bool {
    let description = || -> Result<Description, LoadError> {
        Ok(read_description(&mut regular_file::open_own(path)?)?.0)
    };
    // An unreadable file is left for the next save to replace.
    description().is_ok_and(|description| match fs::metadata(&description.upper) {
        Ok(meta) => (meta.dev(), meta.ino()) != description.upper_inode,
        Err(error) => error.kind() == io::ErrorKind::NotFound,
    })
}

/// Writes a whole file: the header, then the scans with their lengths.
fn write<'a>(
    json: &[u8],
    scans: impl Iterator<Item = (&'a TreeState<'a>, u64)>,
    file: &mut File,
) -> io::Result<()> {
    let mut to = BufWriter::with_capacity(BUFFER, HashingWriter::new(file));
    to.write_all(MAGIC)?;
    to.write_all(&VERSION.to_le_bytes())?;
    to.write_all(&(json.len() as u32).to_le_bytes())?;
    to.write_all(json)?;
    for (scan, length) in scans {
        to.write_all(&length.to_le_bytes())?;
        scan.write(&mut to)?;
    }
    let hashed = to.into_inner().map_err(io::IntoInnerError::into_error)?;
    let (file, checksum, _) = hashed.complete();
    file.write_all(checksum.as_bytes())
}

/// A writer that counts bytes.
struct CountingWriter(u64);

impl Write for CountingWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0 += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Reads the description from the beginning of a file. Also returns the offset of the first scan's length.
fn read_description(file: &mut impl io::Read) -> Result<(Description, u64), LoadError> {
    if &take_array::<8>(file)? != MAGIC {
        return Err("it is no such file".into());
    }
    // Checked first, because another version may have a different layout.
    if u32::from_le_bytes(take_array(file)?) != VERSION {
        return Err("it is of another version of upperdeck".into());
    }
    let length = u64::from(u32::from_le_bytes(take_array(file)?));
    if length > MAX_DESCRIPTION {
        return Err("it is damaged".into());
    }
    let mut json = Vec::new();
    file.take(length).read_to_end(&mut json)?;
    if (json.len() as u64) < length {
        return Err("it is cut off".into());
    }
    let description = serde_json::from_slice(&json).map_err(|_| "it is damaged")?;
    Ok((description, 16 + length))
}

/// The reason why a file is unusable.
#[derive(Debug, thiserror::Error)]
enum LoadError {
    #[error("{0}")]
    Read(#[from] io::Error),
    #[error("it is larger than {MAX_FILE} bytes")]
    TooLarge,
    #[error("{0}")]
    Content(&'static str),
}

impl From<&'static str> for LoadError {
    fn from(why: &'static str) -> Self {
        Self::Content(why)
    }
}

/// Reads a file twice: first to verify the checksum, then to parse it.
fn parse(file: &File) -> Result<StoredSave, LoadError> {
    let length = file.metadata()?.len();
    if length > MAX_FILE {
        return Err(LoadError::TooLarge);
    }
    let mut from = BufReader::with_capacity(BUFFER, file);
    let (description, at) = read_description(&mut from)?;
    let mut left = length
        .checked_sub(32)
        .and_then(|end| end.checked_sub(at))
        .ok_or("it is cut off")?;
    from.seek(SeekFrom::Start(0))?;
    if checksum(&mut from, at + left)?.as_bytes() != &take_array::<32>(&mut from)? {
        return Err("its checksum does not fit".into());
    }
    from.seek(SeekFrom::Start(at))?;
    let mut stored = Vec::new();
    while left > 0 {
        left = left.checked_sub(8).ok_or("it is damaged")?;
        let length = u64::from_le_bytes(take_array(&mut from)?);
        left = left.checked_sub(length).ok_or("it is damaged")?;
        stored.push(Scan::restore(&mut from, length).ok_or("it is damaged")?);
    }
    if stored.is_empty() {
        return Err("it is damaged".into());
    }
    Ok(StoredSave {
        description,
        stored,
    })
}

fn take_array<const N: usize>(from: &mut impl io::Read) -> Result<[u8; N], LoadError> {
    let mut bytes = [0; N];
    match from.read_exact(&mut bytes) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Err("it is cut off".into()),
        Err(error) => Err(error.into()),
        Ok(()) => Ok(bytes),
    }
}

/// Returns the checksum of the next `length` bytes.
fn checksum(from: &mut impl io::Read, length: u64) -> Result<Digest, LoadError> {
    let mut hash = HashingWriter::new(io::sink());
    io::copy(&mut from.take(length), &mut hash)?;
    let (_, checksum, read) = hash.complete();
    if read < length {
        return Err("it is cut off".into());
    }
    Ok(checksum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_file_of_a_lock_stays_without_a_save() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::new(dir.path());
        let there = || fs::read_dir(dir.path()).unwrap().count();
        let lock = store.try_lock("a").unwrap().unwrap();
        assert!(store.try_lock("a").unwrap().is_none(), "two have it");
        store.prune(0);
        assert_eq!(there(), 1, "the file of a lock that is held is gone");
        assert!(store.try_lock("a").unwrap().is_none(), "two have it");
        drop(lock);
        assert_eq!(there(), 0, "it stays when its holder ends");

        // The lock file stays as long as something is kept of the container, and both are removed together.
        let kept = store.path("a", SUFFIX);
        fs::write(&kept, "damaged").unwrap();
        drop(store.try_lock("a").unwrap().unwrap());
        assert_eq!(there(), 2);
        fs::remove_file(&kept).unwrap();
        // The state that a killed process leaves.
        store.prune(0);
        assert_eq!(there(), 0, "it stays when nothing is kept any more");
    }

    #[test]
    fn a_fifo_or_a_link_in_place_of_a_file_is_not_used_and_does_not_block() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::new(dir.path());
        for suffix in [SUFFIX, LOCK] {
            let (kind, mode) = (
                rustix::fs::FileType::Fifo,
                rustix::fs::Mode::from_raw_mode(0o600),
            );
            rustix::fs::mknodat(rustix::fs::CWD, store.path("a", suffix), kind, mode, 0).unwrap();
            std::os::unix::fs::symlink("/dev/zero", store.path("b", suffix)).unwrap();
        }
        for container in ["a", "b"] {
            assert!(store.try_lock(container).is_err());
            assert!(matches!(
                store.load(container),
                Err(Unusable::Damaged { .. })
            ));
        }
        store.prune(0);
        assert!(
            store.path("a", SUFFIX).exists(),
            "what is not understood stays"
        );
    }
}
