//! Writes a layout directly as a tar file. The header of a blob is filled in when the blob is complete, so no second
//! copy is needed.

use std::collections::HashMap;
use std::io::{self, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use bytes::Bytes;

use super::staged::{Staged, delete_all_abandoned, sync_directory};
use super::{Error, LAYOUT_FILE, Reader, add_to_index, blob_path, io_error, sync_error};
use crate::common::digest::Digest;
use crate::common::private_files::FileMode;

const BLOCK: u64 = 512;

/// An archive file as a destination. An existing file is replaced when the manifest is written, as in skopeo, and is
/// left unchanged until then.
#[derive(Clone)]
pub struct Archive {
    shared: Arc<Shared>,
}

struct Shared {
    path: PathBuf,
    mode: FileMode,
    tar: Mutex<Slot>,
    returned: Condvar,
    /// Sizes of the completed blobs, in bytes.
    blobs: Mutex<HashMap<Digest, u64>>,
}

/// The tar stream. The writer of a blob takes it, and others wait until it is returned.
enum Slot {
    /// Nothing has been written yet.
    New,
    Free(Tar),
    Taken,
    /// The archive is complete, or a failure left it in an unknown state.
    Closed,
}

struct Tar {
    staged: Staged,
    /// Offset of the next header.
    end: u64,
}

impl Archive {
    /// Creates the destination, with access for the owner only. No file is touched before the first write.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self::with_mode(path, FileMode::PRIVATE)
    }

    /// Like [`Archive::new`], with the mode of the file. The mode of an existing file is not kept.
    pub(crate) fn with_mode(path: impl Into<PathBuf>, mode: FileMode) -> Self {
        let shared = Shared {
            path: path.into(),
            mode,
            tar: Mutex::new(Slot::New),
            returned: Condvar::new(),
            blobs: Mutex::default(),
        };
        Self {
            shared: Arc::new(shared),
        }
    }

    /// Checks whether the file can be written: its directory exists and is writable, and the path is not a directory or
    /// device.
    pub fn check(&self) -> Result<(), Error> {
        let path = &self.shared.path;
        match std::fs::metadata(path) {
            Ok(found) if !found.is_file() => {
                let reason = "it is no regular file".to_owned();
                return Err(Error::NotALayout {
                    path: path.clone(),
                    reason,
                });
            }
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(io_error(path, "open")(e)),
            _ => {}
        }
        let dir = directory_of(path);
        // On file systems where an unfinished archive has a name.
        if let Err(error) = delete_all_abandoned(dir) {
            tracing::debug!(dir = %dir.display(), %error, "what killed saves left is not looked for");
        }
        Staged::create(dir, FileMode::PRIVATE)
            .map(drop)
            .map_err(io_error(dir, "write into"))
    }

    /// Opens the file that is there now and would be replaced as a whole. Returns `None` if there is none.
    pub(crate) fn existing(&self) -> Result<Option<Reader>, Error> {
        let path = &self.shared.path;
        match std::fs::symlink_metadata(path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(io_error(path, "open")(e)),
            Ok(_) => Reader::archive(path).map(Some),
        }
    }

    /// Returns the path of the file.
    pub(crate) fn path(&self) -> &Path {
        &self.shared.path
    }

    /// Returns the size in bytes of a blob that was written. A blob whose size differs from `size` counts as missing.
    pub fn has_blob(&self, digest: &Digest, size: Option<u64>) -> Option<u64> {
        let blobs = self
            .shared
            .blobs
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        blobs
            .get(digest)
            .copied()
            .filter(|&n| size.is_none_or(|s| s == n))
    }

    /// Starts a blob whose digest is known only at its end. Its first write blocks until no other blob is being
    /// written, so writing two blobs from one thread deadlocks.
    pub fn begin_blob(&self) -> ArchiveBlob {
        ArchiveBlob {
            shared: Arc::clone(&self.shared),
            tar: None,
            start: 0,
            written: 0,
        }
    }

    /// Writes a blob from memory.
    pub fn put_blob(&self, bytes: &Bytes, digest: &Digest) -> Result<(), Error> {
        let found = Digest::of(bytes);
        if found != *digest {
            return Err(Error::Digest {
                path: self.shared.path.clone(),
                expected: *digest,
                found,
            });
        }
        if self.has_blob(digest, Some(bytes.len() as u64)).is_some() {
            return Ok(());
        }
        let mut blob = self.begin_blob();
        blob.write(bytes)?;
        blob.finish(digest, bytes.len() as u64)
    }

    /// Writes the manifest and the index with `tag`, and gives the archive its name. Nothing can be written afterwards.
    pub fn put_manifest(
        &self,
        bytes: &Bytes,
        media_type: &str,
        tag: &str,
    ) -> Result<Digest, Error> {
        let digest = Digest::of(bytes);
        self.put_blob(bytes, &digest)?;
        let path = &self.shared.path;
        let index =
            add_to_index(None, media_type, &digest, bytes.len() as u64, tag).map_err(|reason| {
                Error::Document {
                    path: path.clone(),
                    what: "index.json".to_owned(),
                    reason,
                }
            })?;
        let mut tar = self.shared.take()?;
        // The stream is not returned: whether this succeeds or not, the archive is closed.
        let publish = || {
            tar.append("oci-layout", LAYOUT_FILE.as_bytes())?;
            tar.append("index.json", &index)?;
            tar.staged.file.write_all(&[0; 2 * BLOCK as usize])?;
            tar.staged.publish(path)
        };
        let result = publish()
            .map_err(io_error(path, "write"))
            .and_then(|()| sync_directory(directory_of(path)).map_err(sync_error(path)));
        self.shared.give_back(Slot::Closed);
        result.map(|()| digest)
    }
}

fn directory_of(path: &Path) -> &Path {
    path.parent()
        .filter(|p| !p.as_os_str().is_empty())
        .unwrap_or(Path::new("."))
}

impl Shared {
    fn take(&self) -> Result<Tar, Error> {
        let mut slot = self.tar.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            match std::mem::replace(&mut *slot, Slot::Taken) {
                Slot::New => {
                    return Tar::create(directory_of(&self.path), self.mode).map_err(|e| {
                        *slot = Slot::New;
                        io_error(&self.path, "write")(e)
                    });
                }
                Slot::Free(tar) => return Ok(tar),
                Slot::Taken => {
                    slot = self
                        .returned
                        .wait(slot)
                        .unwrap_or_else(PoisonError::into_inner);
                }
                Slot::Closed => {
                    *slot = Slot::Closed;
                    return Err(Error::Closed {
                        path: self.path.clone(),
                    });
                }
            }
        }
    }

    fn give_back(&self, state: Slot) {
        *self.tar.lock().unwrap_or_else(PoisonError::into_inner) = state;
        self.returned.notify_all();
    }
}

impl Tar {
    fn create(dir: &Path, mode: FileMode) -> io::Result<Self> {
        let mut tar = Self {
            staged: Staged::create(dir, mode)?,
            end: 0,
        };
        for name in ["blobs/", "blobs/sha256/"] {
            let mut header = header(name, 0)?;
            header.set_entry_type(tar::EntryType::Directory);
            header.set_mode(0o755);
            header.set_cksum();
            tar.staged.file.write_all(header.as_bytes())?;
            tar.end += BLOCK;
        }
        Ok(tar)
    }

    fn append(&mut self, name: &str, content: &[u8]) -> io::Result<()> {
        let header = header(name, content.len() as u64)?;
        self.staged.file.write_all(header.as_bytes())?;
        self.staged.file.write_all(content)?;
        self.end += BLOCK + content.len() as u64;
        self.pad()
    }

    /// Pads to the next block.
    fn pad(&mut self) -> io::Result<()> {
        let missing = self.end.next_multiple_of(BLOCK) - self.end;
        self.staged
            .file
            .write_all(&[0; BLOCK as usize][..missing as usize])?;
        self.end += missing;
        Ok(())
    }

    /// Discards everything from offset `end` on.
    fn rewind(&mut self, end: u64) -> io::Result<()> {
        self.end = end;
        self.staged.file.set_len(end)?;
        io::Seek::seek(&mut self.staged.file, io::SeekFrom::Start(end)).map(drop)
    }
}

/// Returns a header that is independent of the machine and the time. A size of 8 GiB or more is in GNU's binary form
/// within the same field, which all current readers support.
fn header(name: &str, size: u64) -> io::Result<tar::Header> {
    let mut header = tar::Header::new_gnu();
    header.set_path(name)?;
    header.set_entry_type(tar::EntryType::Regular);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_size(size);
    header.set_cksum();
    Ok(header)
}

/// A blob that is being written to an archive. If dropped before [`ArchiveBlob::finish`], it is truncated away.
pub struct ArchiveBlob {
    shared: Arc<Shared>,
    tar: Option<Tar>,
    start: u64,
    written: u64,
}

impl ArchiveBlob {
    /// Writes bytes. The first call waits for other blobs to end.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), Error> {
        let shared = Arc::clone(&self.shared);
        let tar = self.tar()?;
        tar.staged
            .file
            .write_all(bytes)
            .map_err(io_error(&shared.path, "write"))?;
        tar.end += bytes.len() as u64;
        self.written += bytes.len() as u64;
        Ok(())
    }

    fn tar(&mut self) -> Result<&mut Tar, Error> {
        if self.tar.is_none() {
            let mut tar = self.shared.take()?;
            self.start = tar.end;
            // Space for the header, which is known only at the end.
            let room = tar.staged.file.write_all(&[0; BLOCK as usize]);
            tar.end += BLOCK;
            // Stored before the error is returned, so that the stream is given back on failure.
            self.tar = Some(tar);
            room.map_err(io_error(&self.shared.path, "write"))?;
        }
        self.tar.as_mut().ok_or_else(|| Error::Closed {
            path: self.shared.path.clone(),
        })
    }

    /// Completes the blob and fills in its header. Fails if `size` differs from the number of bytes written. A blob
    /// that the archive has already is discarded.
    pub fn finish(mut self, digest: &Digest, size: u64) -> Result<(), Error> {
        let path = self.shared.path.clone();
        if self.written != size {
            let what = "the blob that was written".to_owned();
            return Err(Error::Size {
                path,
                what,
                expected: size,
                found: self.written,
            });
        }
        let known = self
            .shared
            .blobs
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .contains_key(digest);
        if known {
            return Ok(());
        }
        let start = self.start_of_header()?;
        let header = header(&blob_path(digest), size).map_err(io_error(&path, "write"))?;
        let tar = self.tar()?;
        let fill = |tar: &mut Tar| {
            tar.pad()?;
            tar.staged.file.write_all_at(header.as_bytes(), start)
        };
        fill(tar).map_err(io_error(&path, "write"))?;
        self.shared
            .blobs
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(*digest, size);
        if let Some(tar) = self.tar.take() {
            self.shared.give_back(Slot::Free(tar));
        }
        Ok(())
    }

    /// Returns the offset of the header. An empty blob takes the stream only here.
    fn start_of_header(&mut self) -> Result<u64, Error> {
        self.tar()?;
        Ok(self.start)
    }
}

impl Drop for ArchiveBlob {
    fn drop(&mut self) {
        if let Some(mut tar) = self.tar.take() {
            let state = match tar.rewind(self.start) {
                Ok(()) => Slot::Free(tar),
                Err(_) => Slot::Closed,
            };
            self.shared.give_back(state);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_takes_any_size_in_place() -> io::Result<()> {
        // Eleven octal digits end at 8 GiB.
        for size in [0, 511, (1 << 33) - 1, 1 << 33, 1 << 50] {
            let name = blob_path(&Digest::of("x"));
            let header = header(&name, size)?;
            assert_eq!(header.as_bytes().len() as u64, BLOCK);
            assert_eq!(
                (header.size()?, header.path_bytes().as_ref()),
                (size, name.as_bytes())
            );
        }
        Ok(())
    }
}
