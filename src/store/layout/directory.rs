//! Writes to a layout directory: each blob when it is complete, and the tag last and atomically.

use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use rustix::fs::FlockOperation;

use super::staged::{Staged, sync_directory};
use super::{
    Error, LAYOUT_FILE, MAX_DOCUMENT, add_to_index, blob_path, io_error, sync_error, tagged,
    take_from_index,
};
use crate::common::digest::Digest;
use crate::common::private_files::{self, FileMode};

/// A layout directory as a destination. It may be missing, or hold other images.
#[derive(Clone, Debug)]
pub struct Directory {
    path: PathBuf,
    mode: Option<FileMode>,
}

impl Directory {
    /// Creates the destination. No file is touched before the first write.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            mode: None,
        }
    }

    /// Sets the mode of created files. `None` selects that of the layout's files, or access for the owner only in a new
    /// layout.
    #[must_use]
    pub(crate) fn with_mode(self, mode: Option<FileMode>) -> Self {
        Self { mode, ..self }
    }

    /// Returns the mode of the next file. In a layout with shared access, a blob that others cannot read would break
    /// it.
    fn mode(&self) -> FileMode {
        let layout = || fs::symlink_metadata(self.path.join("oci-layout")).ok();
        let existing = || layout().filter(fs::Metadata::is_file);
        self.mode
            .or_else(|| existing().map(|file| FileMode::of(&file)))
            .unwrap_or(FileMode::PRIVATE)
    }

    /// Checks whether images can be written here: the path is a layout, an empty directory, or can be created.
    pub fn check(&self) -> Result<(), Error> {
        match fs::metadata(&self.path) {
            Ok(found) if !found.is_dir() => {
                return Err(self.not_a_layout("it is no directory"));
            }
            Ok(_) => {
                self.check_version()?;
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(io_error(&self.path, "open")(e)),
        }
        let mut probed = self.path.join("blobs/sha256");
        while !probed.exists() && probed.pop() {}
        let place = if probed.as_os_str().is_empty() {
            Path::new(".")
        } else {
            &probed
        };
        Staged::create(place, FileMode::PRIVATE)
            .map(drop)
            .map_err(io_error(place, "write into"))
    }

    fn not_a_layout(&self, reason: &str) -> Error {
        Error::NotALayout {
            path: self.path.clone(),
            reason: reason.to_owned(),
        }
    }

    /// Checks `oci-layout`. Returns false if there is nothing at the path, and fails if there is anything but a layout.
    fn check_version(&self) -> Result<bool, Error> {
        if let Some(bytes) = read_document(&self.path.join("oci-layout"))? {
            let version = serde_json::from_slice::<serde_json::Value>(&bytes)
                .ok()
                .and_then(|v| Some(v.get("imageLayoutVersion")?.as_str()?.to_owned()));
            match version {
                Some(v) if v.starts_with("1.") => Ok(true),
                Some(v) => {
                    Err(self.not_a_layout(&format!("expected imageLayoutVersion 1, found {v:?}")))
                }
                None => Err(self.not_a_layout("its oci-layout names no version")),
            }
        } else {
            let names = fs::read_dir(&self.path)
                .and_then(|entries| {
                    entries
                        .map(|e| Ok(e?.file_name()))
                        .collect::<io::Result<Vec<_>>>()
                })
                .map_err(io_error(&self.path, "read"))?;
            // What an interrupted save left in a new directory may be continued.
            let ours = |name: &std::ffi::OsStr| {
                name == "blobs" || name.as_encoded_bytes().starts_with(b".upperdeck-")
            };
            match names.iter().find(|name| !ours(name)) {
                None => Ok(false),
                // A concurrent save may have created the layout between the two checks.
                Some(_) if self.path.join("oci-layout").exists() => self.check_version(),
                Some(_) => Err(self.not_a_layout("it has files and no oci-layout")),
            }
        }
    }

    /// Creates the directories and `oci-layout`.
    fn prepare(&self) -> Result<PathBuf, Error> {
        let blobs = self.path.join("blobs/sha256");
        if blobs.is_dir() && self.path.join("oci-layout").exists() {
            return Ok(blobs);
        }
        private_files::make_dir(&self.path, self.mode()).map_err(io_error(&self.path, "create"))?;
        let is_one = self.check_version()?;
        private_files::make_dir(&blobs, self.mode()).map_err(io_error(&blobs, "create"))?;
        if !is_one {
            self.replace("oci-layout", LAYOUT_FILE.as_bytes())?;
        }
        Ok(blobs)
    }

    fn replace(&self, name: &str, bytes: &[u8]) -> Result<(), Error> {
        let target = self.path.join(name);
        let write = || {
            let mut staged = Staged::create(&self.path, self.mode())?;
            staged.file.write_all(bytes)?;
            staged.publish(&target)
        };
        write().map_err(io_error(&target, "write"))?;
        sync_directory(&self.path).map_err(sync_error(&target))
    }

    /// Returns the size in bytes of an existing blob. A blob whose size differs from `size` counts as missing.
    pub fn has_blob(&self, digest: &Digest, size: Option<u64>) -> Result<Option<u64>, Error> {
        let path = self.path.join(blob_path(digest));
        match fs::metadata(&path) {
            Ok(found) if found.is_file() => {
                Ok(Some(found.len()).filter(|&n| size.is_none_or(|s| s == n)))
            }
            Ok(_) => Ok(None),
            Err(e)
                if matches!(
                    e.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
                ) =>
            {
                Ok(None)
            }
            Err(e) => Err(io_error(&path, "open")(e)),
        }
    }

    /// Starts a blob whose digest is known only at its end. Its file has no name until then.
    pub fn begin_blob(&self) -> Result<DirectoryBlob, Error> {
        let blobs = self.prepare()?;
        let staged = Staged::create(&blobs, self.mode()).map_err(io_error(&blobs, "write into"))?;
        Ok(DirectoryBlob {
            layout: self.clone(),
            blobs,
            staged,
            written: 0,
        })
    }

    /// Writes a blob from memory.
    pub fn put_blob(&self, bytes: &Bytes, digest: &Digest) -> Result<(), Error> {
        let found = Digest::of(bytes);
        if found != *digest {
            return Err(Error::Digest {
                path: self.path.clone(),
                expected: *digest,
                found,
            });
        }
        let mut blob = self.begin_blob()?;
        blob.write(bytes)?;
        blob.finish(digest, bytes.len() as u64)
    }

    /// Writes a manifest and sets `tag` on it, removing the tag from any other manifest. Concurrent writers to the same
    /// layout are serialised by a lock.
    pub fn put_manifest(
        &self,
        bytes: &Bytes,
        media_type: &str,
        tag: &str,
    ) -> Result<Digest, Error> {
        match self.put_manifest_if(bytes, media_type, tag, |_| true)? {
            Ok(digest) | Err(digest) => Ok(digest),
        }
    }

    /// Like [`Directory::put_manifest`], but only if `may` returns true for the image that has the tag now, if there is
    /// one. Otherwise returns the digest of that image as an error, and changes nothing.
    pub(crate) fn put_manifest_if(
        &self,
        bytes: &Bytes,
        media_type: &str,
        tag: &str,
        may: impl FnOnce(Digest) -> bool,
    ) -> Result<Result<Digest, Digest>, Error> {
        let digest = Digest::of(bytes);
        self.put_blob(bytes, &digest)?;
        let blobs = self.path.join("blobs/sha256");
        sync_directory(&blobs).map_err(io_error(&blobs, "write"))?;
        let lock = self.lock()?;
        let existing = read_document(&self.path.join("index.json"))?;
        if let Some(found) = existing.as_deref().and_then(|index| tagged(index, tag))
            && !may(found)
        {
            return Ok(Err(found));
        }
        let index = add_to_index(
            existing.as_deref(),
            media_type,
            &digest,
            bytes.len() as u64,
            tag,
        )
        .map_err(|reason| Error::Document {
            path: self.path.clone(),
            what: "index.json".to_owned(),
            reason,
        })?;
        self.replace("index.json", &index)?;
        drop(lock);
        Ok(Ok(digest))
    }

    /// Returns the digest of the image that a tag names, if there is one.
    pub(crate) fn digest_of(&self, tag: &str) -> Result<Option<Digest>, Error> {
        let existing = read_document(&self.path.join("index.json"))?;
        Ok(existing.and_then(|index| tagged(&index, tag)))
    }

    /// Returns the content of a document's blob; `None` if it cannot be read.
    pub(crate) fn small_blob(&self, digest: &Digest) -> Option<Bytes> {
        let read = read_document(&self.path.join(blob_path(digest)));
        read.ok()?.map(Bytes::from)
    }

    /// Locks the layout against concurrent writers until the returned file is closed.
    fn lock(&self) -> Result<File, Error> {
        // The directory itself is locked, so that no lock file remains in the layout.
        let lock = File::open(&self.path).map_err(io_error(&self.path, "open"))?;
        rustix::io::retry_on_intr(|| rustix::fs::flock(&lock, FlockOperation::LockExclusive))
            .map_err(|e| io_error(&self.path, "lock")(e.into()))?;
        Ok(lock)
    }

    /// Removes an image, or only one of its tags, from the index. The blobs are kept, because other images may share
    /// them and a concurrent save may rely on them.
    pub(crate) fn remove(&self, digest: &Digest, tag: Option<&str>) -> Result<(), Error> {
        let lock = self.lock()?;
        let existing = read_document(&self.path.join("index.json"))?.unwrap_or_default();
        let index = take_from_index(&existing, digest, tag).map_err(|reason| Error::Document {
            path: self.path.clone(),
            what: "index.json".to_owned(),
            reason,
        })?;
        self.replace("index.json", &index)?;
        drop(lock);
        Ok(())
    }

    /// Returns the path of the directory.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

/// Reads a small file, or returns `None` if it does not exist.
fn read_document(path: &Path) -> Result<Option<Vec<u8>>, Error> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(io_error(path, "open")(e)),
    };
    let mut bytes = Vec::new();
    file.take(MAX_DOCUMENT + 1)
        .read_to_end(&mut bytes)
        .map_err(io_error(path, "read"))?;
    if bytes.len() as u64 > MAX_DOCUMENT {
        return Err(io_error(path, "read")(io::ErrorKind::FileTooLarge.into()));
    }
    Ok(Some(bytes))
}

/// A blob that is being written to a layout directory. If dropped before [`DirectoryBlob::finish`], nothing remains.
pub struct DirectoryBlob {
    layout: Directory,
    blobs: PathBuf,
    staged: Staged,
    written: u64,
}

impl DirectoryBlob {
    /// Writes bytes.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.staged
            .file
            .write_all(bytes)
            .map_err(io_error(&self.blobs, "write into"))?;
        self.written += bytes.len() as u64;
        Ok(())
    }

    /// Completes the blob and gives it its name. Fails if `size` differs from the number of bytes written. An existing
    /// blob is kept.
    pub fn finish(self, digest: &Digest, size: u64) -> Result<(), Error> {
        if self.written != size {
            return Err(Error::Size {
                path: self.blobs,
                what: "the blob that was written".to_owned(),
                expected: size,
                found: self.written,
            });
        }
        if self.layout.has_blob(digest, Some(size))?.is_some() {
            return Ok(());
        }
        let target = self.blobs.join(digest.hex());
        self.staged
            .publish(&target)
            .map_err(io_error(&target, "write"))
    }
}
