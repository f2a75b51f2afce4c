//! What a node keeps of a save for the next one of the same container: the scan, and the layers that hold it.
//!
//! Losing it costs one full save and nothing else, so nothing here fails a save. A file is as trustworthy as its
//! checksum: what is damaged, cut off, of another version or about another upper directory is not used.
//!
//! One file a container: magic, version, length of the description, description (JSON), the scans of the upper and of the
//! volumes that were saved with it, each with its length before it, and the SHA-256 of all that. Written beside and renamed; who saves the container holds a lock on a file beside it meanwhile.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::digest::{DiffId, Digest};
use crate::scan::{Scan, Stored};

const MAGIC: &[u8; 8] = b"updeckst";
/// Grows when the meaning of anything in a file changes, the scan's included: flags, what is emitted, what is left out.
pub const VERSION: u32 = 2;
/// Largest description.
const MAX_DESCRIPTION: u64 = 4 << 20;
/// Largest file. A million entries take some 60 MB.
const MAX_FILE: u64 = 1 << 30;
/// All files together; the oldest go first.
pub const MAX_TOTAL: u64 = 2 << 30;
const SUFFIX: &str = "state";
const LOCK: &str = "lock";

/// A layer of the image that was saved, above the base.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layer {
    /// Digest of the compressed bytes.
    pub digest: Digest,
    /// Digest of the tar.
    pub diff_id: DiffId,
    /// Compressed size in bytes.
    pub size: u64,
    /// Its media type.
    pub media_type: String,
    /// Size of the tar in bytes.
    pub tar_size: u64,
    /// Whether it is of a full save.
    pub full: bool,
}

/// What was saved, and of what.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Description {
    /// Over everything that a layer on top takes for granted: base, rules, mounts, id maps, the upper, this boot.
    pub fingerprint: Digest,
    /// The upper directory.
    pub upper: PathBuf,
    /// Its device and inode.
    pub upper_inode: (u64, u64),
    /// Where the layers are: `HOST/REPOSITORY` or a layout's path, as destinations are written.
    pub destination: String,
    /// Bottom first.
    pub layers: Vec<Layer>,
}

/// A save that was kept.
#[derive(Debug)]
pub struct Kept {
    /// What was saved.
    pub description: Description,
    /// What was there: the upper, then the volumes.
    pub stored: Vec<Stored>,
}

/// Why nothing that was kept can be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unusable {
    /// Nothing was kept: no reason for a word.
    #[error("nothing is kept of an earlier save")]
    Absent,
    /// It was, and is of no use.
    #[error("what was kept of the last save in {path} is not used: {why}")]
    Damaged {
        /// The file.
        path: String,
        /// Why, in words.
        why: String,
    },
}

/// The directory.
#[derive(Clone, Debug)]
pub struct Store {
    dir: PathBuf,
}

/// A container that nobody else saves meanwhile (who asks here).
#[derive(Debug)]
pub struct Lock(#[expect(dead_code, reason = "the lock goes with the descriptor")] File);

impl Store {
    /// The store in `dir`, which is made when it is needed.
    pub fn new(dir: &Path) -> Self {
        Self {
            dir: dir.to_owned(),
        }
    }

    /// A name that no other container's is, whatever its ID has in it.
    fn path(&self, container: &str, suffix: &str) -> PathBuf {
        self.dir.join(format!(
            "{}.{suffix}",
            Digest::of(container.as_bytes()).hex()
        ))
    }

    fn make_dir(&self) -> io::Result<()> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.dir)
    }

    /// Takes the container's lock; none while another save has it.
    pub fn try_lock(&self, container: &str) -> io::Result<Option<Lock>> {
        self.make_dir()?;
        let path = self.path(container, LOCK);
        loop {
            let file = OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .open(&path)?;
            match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {}
                Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
                Err(error) => return Err(error.into()),
            }
            // Cleared away by somebody else in between: then it locks nothing.
            let same =
                |a: &fs::Metadata, b: &fs::Metadata| (a.dev(), a.ino()) == (b.dev(), b.ino());
            if fs::metadata(&path)
                .is_ok_and(|there| file.metadata().is_ok_and(|ours| same(&there, &ours)))
            {
                return Ok(Some(Lock(file)));
            }
        }
    }

    /// What is kept of a container.
    pub fn load(&self, container: &str) -> Result<Kept, Unusable> {
        let path = self.path(container, SUFFIX);
        let damaged = |why: String| Unusable::Damaged {
            path: path.display().to_string(),
            why,
        };
        let mut bytes = Vec::new();
        match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(Unusable::Absent),
            Err(error) => return Err(damaged(error.to_string())),
            Ok(file) => match file.take(MAX_FILE + 1).read_to_end(&mut bytes) {
                Err(error) => return Err(damaged(error.to_string())),
                Ok(_) if bytes.len() as u64 > MAX_FILE => {
                    return Err(damaged(format!("it is larger than {MAX_FILE} bytes")));
                }
                Ok(_) => {}
            },
        }
        parse(&bytes).map_err(|why| damaged(why.to_owned()))
    }

    /// Keeps a save instead of what was kept before, atomically, within the bound on all.
    pub fn keep(
        &self,
        container: &str,
        description: &Description,
        scans: &[Vec<u8>],
    ) -> io::Result<()> {
        self.make_dir()?;
        let bytes = write(description, scans)?;
        self.clear(bytes.len() as u64);
        let mut file = tempfile::Builder::new()
            .prefix(".new-")
            .tempfile_in(&self.dir)?;
        file.write_all(&bytes)?;
        file.as_file().sync_all()?;
        file.persist(self.path(container, SUFFIX))
            .map_err(|error| error.error)?;
        File::open(&self.dir)?.sync_all()
    }

    /// Forgets a container.
    pub fn forget(&self, container: &str) -> io::Result<()> {
        match fs::remove_file(self.path(container, SUFFIX)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// Removes what belongs to containers that are gone, what was left half written, and the oldest of the rest where
    /// all of it with `more` bytes would be too much.
    pub fn clear(&self, more: u64) {
        let Ok(entries) = fs::read_dir(&self.dir) else {
            return;
        };
        let mut files = Vec::new();
        for entry in entries.flatten() {
            let path = entry.path();
            let Ok(meta) = entry.metadata() else { continue };
            let name = entry.file_name();
            let name = name.to_string_lossy();
            if name.starts_with(".new-") {
                // An hour is longer than writing one takes.
                if meta
                    .modified()
                    .is_ok_and(|t| t.elapsed().is_ok_and(|age| age.as_secs() > 3600))
                {
                    fs::remove_file(&path).ok();
                }
            } else if name.ends_with(&format!(".{SUFFIX}")) {
                if is_orphan(&path) {
                    fs::remove_file(&path).ok();
                    fs::remove_file(path.with_extension(LOCK)).ok();
                } else {
                    files.push((meta.modified().ok(), meta.len(), path));
                }
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
    }
}

/// Whether the upper directory that a file is about is no more.
fn is_orphan(path: &Path) -> bool {
    let description = || -> Option<Description> {
        let mut head = Vec::new();
        File::open(path)
            .ok()?
            .take(MAX_DESCRIPTION + 16)
            .read_to_end(&mut head)
            .ok()?;
        describe(&head).ok().map(|(description, _)| description)
    };
    // What cannot be read is the next save's to replace.
    description().is_some_and(|description| match fs::metadata(&description.upper) {
        Ok(meta) => (meta.dev(), meta.ino()) != description.upper_inode,
        Err(error) => error.kind() == io::ErrorKind::NotFound,
    })
}

fn write(description: &Description, scans: &[Vec<u8>]) -> io::Result<Vec<u8>> {
    let json = serde_json::to_vec(description)?;
    let length: usize = scans.iter().map(|scan| scan.len() + 8).sum();
    let mut bytes = Vec::with_capacity(16 + json.len() + length + 32);
    bytes.extend(MAGIC);
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend((json.len() as u32).to_le_bytes());
    bytes.extend(&json);
    for scan in scans {
        bytes.extend((scan.len() as u64).to_le_bytes());
        bytes.extend(scan);
    }
    bytes.extend(checksum(&bytes));
    Ok(bytes)
}

fn checksum(bytes: &[u8]) -> [u8; 32] {
    use sha2::Digest as _;
    sha2::Sha256::digest(bytes).into()
}

/// The description, and where the scan begins.
fn describe(bytes: &[u8]) -> Result<(Description, usize), &'static str> {
    let head = bytes.get(..16).ok_or("it is cut off")?;
    if &head[..8] != MAGIC {
        return Err("it is no such file");
    }
    let word = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
    if word(8) != VERSION {
        return Err("it is of another version of upperdeck");
    }
    let len = word(12);
    if u64::from(len) > MAX_DESCRIPTION {
        return Err("it is damaged");
    }
    let end = 16 + len as usize;
    let json = bytes.get(16..end).ok_or("it is cut off")?;
    serde_json::from_slice(json)
        .map(|description| (description, end))
        .map_err(|_| "it is damaged")
}

fn parse(bytes: &[u8]) -> Result<Kept, &'static str> {
    // The version first: another version's checksum may be elsewhere.
    let (description, at) = describe(bytes)?;
    let end = bytes
        .len()
        .checked_sub(32)
        .filter(|&end| end >= at)
        .ok_or("it is cut off")?;
    if checksum(&bytes[..end]) != bytes[end..] {
        return Err("its checksum does not fit");
    }
    let mut rest = &bytes[at..end];
    let mut stored = Vec::new();
    while let Some((length, after)) = rest.split_first_chunk::<8>() {
        let length = usize::try_from(u64::from_le_bytes(*length)).map_err(|_| "it is damaged")?;
        let (scan, after) = after.split_at_checked(length).ok_or("it is damaged")?;
        stored.push(Scan::restore(scan).ok_or("it is damaged")?);
        rest = after;
    }
    if !rest.is_empty() || stored.is_empty() {
        return Err("it is damaged");
    }
    Ok(Kept {
        description,
        stored,
    })
}
