//! Writes to a layout directory: each blob when it is complete, and the tag last and atomically. Deletes from it.

use std::collections::HashSet;
use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;

use super::blobs::{self, BlobDirectory, BlobName};
use super::lease::{Before, Lease};
use super::neighbours::Neighbours;
use super::prune::{self, PruneOptions, PruneProgress, Pruned};
use super::staged::{Staged, sync_directory};
use super::sweep::{self, Freed, Lock};
use super::writer::Writer;
use super::{
    Error, LAYOUT_FILE, add_to_index, blob_path, io_error, read_document, references, sync_error,
    tagged, take_from_index,
};
use crate::common::digest::Digest;
use crate::common::private_files::{self, FileMode};
use crate::image::manifest::{DOCKER_LIST, INDEX};

/// A layout directory as a destination. It may be missing, or hold other images.
///
/// Clones share one save, which begins with the first write. If it does not end with [`Directory::put_manifest`], what
/// was written is deleted with the last clone.
#[derive(Clone, Debug)]
pub struct Directory {
    path: PathBuf,
    mode: Option<FileMode>,
    /// Layouts whose blobs are linked instead of being written again.
    neighbours: Option<Arc<Neighbours>>,
    writer: Arc<Writer>,
}

impl Directory {
    /// Creates the destination. No file is touched before the first write.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            mode: None,
            neighbours: None,
            writer: Arc::default(),
        }
    }

    /// Sets the mode of created files. `None` selects that of the layout's files, or access for the owner only in a new
    /// layout.
    #[must_use]
    pub(crate) fn with_mode(self, mode: Option<FileMode>) -> Self {
        Self { mode, ..self }
    }

    /// Sets a directory with layouts, at any depth, whose blobs are shared by hard links: [`Directory::has_blob`] finds
    /// them, too. `None` selects that of this layout alone.
    #[must_use]
    pub fn sharing(self, below: Option<PathBuf>) -> Self {
        let neighbours = below.map(|below| Arc::new(Neighbours::below(below)));
        Self { neighbours, ..self }
    }

    /// Begins a save and gives it up when the result is dropped, unless it has ended: what was written is deleted, even
    /// while a thread still writes.
    pub(crate) fn give_up_on_drop(&self) -> GiveUp {
        GiveUp(Arc::clone(&self.writer))
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
                self.open_blobs()?;
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
            .map_err(io_error(place, "write into"))?;
        // What is found from here on is there until the save ends.
        if self.path.exists() {
            self.begin()?;
        }
        Ok(())
    }

    fn begin(&self) -> Result<super::writer::Writing<'_>, Error> {
        let check = || self.check_version().map(drop);
        self.writer.begin(&self.path, self.mode(), check)
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
    fn prepare(&self) -> Result<BlobDirectory, Error> {
        let _writing = self.begin()?;
        if let Some(blobs) = self.open_blobs()?
            && self.path.join("oci-layout").exists()
        {
            return Ok(blobs);
        }
        let is_one = self.check_version()?;
        let path = self.path.join("blobs/sha256");
        private_files::make_dir(&path, self.mode())
            .and_then(|()| blobs::give_to_owner(&self.path))
            .map_err(io_error(&path, "create"))?;
        if !is_one {
            self.replace("oci-layout", LAYOUT_FILE.as_bytes())?;
        }
        let blobs = self.open_blobs()?;
        blobs.ok_or_else(|| io_error(&path, "open")(io::ErrorKind::NotFound.into()))
    }

    /// Opens `blobs/sha256`, if it exists.
    ///
    /// Fails if a symbolic link is there: what is written would go to wherever it leads.
    fn open_blobs(&self) -> Result<Option<BlobDirectory>, Error> {
        BlobDirectory::open(&self.path).map_err(|error| match error {
            Error::NotFreed { reason, .. } => self.not_a_layout(&reason),
            error => error,
        })
    }

    fn replace(&self, name: &str, bytes: &[u8]) -> Result<(), Error> {
        let target = self.path.join(name);
        let write = || {
            let mut staged = Staged::create_in_layout(&self.path, self.mode())?;
            staged.file.write_all(bytes)?;
            staged.publish(&target)
        };
        write().map_err(io_error(&target, "write"))?;
        sync_directory(&self.path).map_err(sync_error(&target))
    }

    /// Returns the size in bytes of an existing blob. A blob whose size differs from `size` counts as missing. During a
    /// save, no other process of this program deletes a blob that was found.
    ///
    /// A blob that only a neighbour has ([`Directory::sharing`]) is linked into this layout.
    pub fn has_blob(&self, digest: &Digest, size: Option<u64>) -> Result<Option<u64>, Error> {
        let find = || self.stat_blob(digest, size);
        let begun = self.writer.begun();
        let found = match begun {
            Some(mut writing) => writing.add_found(digest.into(), find)?,
            None => find()?,
        };
        match &self.neighbours {
            Some(neighbours) if found.is_none() => self.link(neighbours, digest, size),
            _ => Ok(found),
        }
    }

    fn stat_blob(&self, digest: &Digest, size: Option<u64>) -> Result<Option<u64>, Error> {
        let path = self.path.join(blob_path(digest));
        match fs::symlink_metadata(&path) {
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

    fn link(
        &self,
        neighbours: &Neighbours,
        digest: &Digest,
        size: Option<u64>,
    ) -> Result<Option<u64>, Error> {
        let Some(found) = neighbours.find(&self.path, digest, size, self.mode()) else {
            return Ok(None);
        };
        let blobs = self.prepare()?;
        let target = blobs.at().join(digest.hex());
        let mut writing = self.begin()?;
        writing.add(digest.into())?;
        match found.link_to(&target) {
            Ok(size) => Ok(Some(size)),
            Err(error) => {
                tracing::debug!(%error, %digest, "a blob of another layout cannot be shared");
                Ok(None)
            }
        }
    }

    /// Starts a blob whose digest is known only at its end. Its file has no name until then.
    pub fn begin_blob(&self) -> Result<DirectoryBlob, Error> {
        let blobs = self.prepare()?;
        let staged = Staged::create_in_layout(&blobs.at(), self.mode())
            .map_err(io_error(&blobs.shown, "write into"))?;
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
        let mut writing = self.begin()?;
        let lock = writing.lock_exclusively(&self.path)?;
        let existing = read_document(&self.path.join("index.json"))?;
        let replaced = self.tagged(existing.as_deref(), tag)?;
        if let Some(found) = replaced
            && !may(found)
        {
            return Ok(Err(found));
        }
        self.check_complete(bytes, media_type)?;
        if let Some(replaced) = replaced.filter(|replaced| *replaced != digest) {
            // An image that cannot be read takes nothing with it.
            let needed = sweep::needed_by(&self.path, (&replaced).into());
            writing.add_locked(needed.unwrap_or_default())?;
        }
        let index = add_to_index(
            existing.as_deref(),
            media_type,
            &digest,
            bytes.len() as u64,
            tag,
        )
        .map_err(|reason| self.bad_index(reason))?;
        self.replace("index.json", &index)?;
        let known = sweep::needed_by(&self.path, (&digest).into());
        writing.end(&known.unwrap_or_default(), &lock);
        Ok(Ok(digest))
    }

    fn bad_index(&self, reason: String) -> Error {
        Error::Document {
            path: self.path.clone(),
            what: "index.json".to_owned(),
            reason,
        }
    }

    /// Checks that everything that a manifest names is there: another program may have deleted what this save has found.
    /// An index may name manifests that a copy has left out.
    fn check_complete(&self, bytes: &[u8], media_type: &str) -> Result<(), Error> {
        if [INDEX, DOCKER_LIST].contains(&media_type) {
            return Ok(());
        }
        let manifest = serde_json::from_slice(bytes).unwrap_or_default();
        for named in references::references(&manifest) {
            let Ok(digest) = named.name.to_string().parse() else {
                continue;
            };
            if !named.elsewhere && self.stat_blob(&digest, named.size)?.is_none() {
                return Err(Error::Incomplete {
                    path: self.path.clone(),
                    digest,
                });
            }
        }
        Ok(())
    }

    /// Returns the digest of the image that a tag names, if there is one.
    pub(crate) fn digest_of(&self, tag: &str) -> Result<Option<Digest>, Error> {
        let existing = read_document(&self.path.join("index.json"))?;
        self.tagged(existing.as_deref(), tag)
    }

    fn tagged(&self, index: Option<&[u8]>, tag: &str) -> Result<Option<Digest>, Error> {
        let Some(index) = index else { return Ok(None) };
        tagged(index, tag).map_err(|reason| self.bad_index(reason))
    }

    /// Returns the content of a document's blob; `None` if it cannot be read.
    pub(crate) fn small_blob(&self, digest: &Digest) -> Option<Bytes> {
        let read = read_document(&self.path.join(blob_path(digest)));
        read.ok()?.map(Bytes::from)
    }

    /// Removes images, or single tags of them, from the index, and deletes the blobs that no other image needs. `choose`
    /// names them while no other process changes the layout; all tags of an image if none is named.
    ///
    /// Returns, besides what `choose` returned, what was deleted, or why nothing was although the images are removed.
    pub(crate) fn remove<T, E: From<Error>>(
        &self,
        choose: impl FnOnce() -> Result<(Vec<(Digest, Option<String>)>, T), E>,
    ) -> Result<(T, Result<Freed, Error>), E> {
        let lock = sweep::lock(
            &self.path,
            Lock::Exclusive,
            sweep::REMOVE_LOCK_LIMIT,
            &mut || true,
        )?;
        if let Err(error) = sweep::recover_locked(&self.path, &lock) {
            tracing::warn!(layout = %self.path.display(), %error, "what a killed save left stays");
        }
        let (chosen, answer) = choose()?;
        let mut index = read_document(&self.path.join("index.json"))?.unwrap_or_default();
        let mut names = HashSet::new();
        let mut unread = None;
        for (digest, tag) in &chosen {
            match sweep::needed_by(&self.path, digest.into()) {
                Ok(needed) => names.extend(needed),
                Err(error) => unread = Some(error),
            }
            index = take_from_index(&index, digest, tag.as_deref())
                .map_err(|reason| self.bad_index(reason))?;
        }
        // For the case of a crash. A full disk must not keep an image from being deleted.
        let mut lease = Lease::create(&self.path, self.mode(), Before::Layout).ok();
        if let Some(lease) = &mut lease
            && let Err(error) = lease.add_durably(names.iter().cloned())
        {
            tracing::debug!(%error, "a crash from here on leaves blobs for image prune");
        }
        self.replace("index.json", &index)?;
        let freed = sweep::delete(&self.path, &names, lease.as_ref(), &lock);
        if let (Ok(_), Some(lease)) = (&freed, &lease) {
            lease.remove()?;
        }
        Ok((answer, unread.map_or(freed, Err)))
    }

    /// Deletes all blobs that no image needs. `seen` is called now and then; if it returns false, the work ends early.
    ///
    /// Fails without having deleted anything if what images need cannot be determined.
    pub fn prune(
        &self,
        options: PruneOptions,
        seen: &mut dyn FnMut(PruneProgress) -> bool,
    ) -> Result<Pruned, Error> {
        match fs::metadata(&self.path) {
            Ok(found) if !found.is_dir() => return Err(self.not_a_layout("it is no directory")),
            Ok(_) if !self.path.join("oci-layout").is_file() => {
                return Err(self.not_a_layout("it has no oci-layout"));
            }
            Ok(_) => self.check_version()?,
            Err(e) => return Err(io_error(&self.path, "open")(e)),
        };
        prune::prune(&self.path, options, seen)
    }

    /// Returns the path of the directory.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

/// Gives a save up when it is dropped, unless it has ended.
#[must_use]
pub(crate) struct GiveUp(Arc<Writer>);

impl Drop for GiveUp {
    fn drop(&mut self) {
        self.0.give_up();
    }
}

/// A blob that is being written to a layout directory. If dropped before [`DirectoryBlob::finish`], nothing remains.
pub struct DirectoryBlob {
    layout: Directory,
    blobs: BlobDirectory,
    staged: Staged,
    written: u64,
}

impl DirectoryBlob {
    /// Writes bytes.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.staged
            .file
            .write_all(bytes)
            .map_err(io_error(&self.blobs.shown, "write into"))?;
        self.written += bytes.len() as u64;
        Ok(())
    }

    /// Completes the blob and gives it its name. Fails if `size` differs from the number of bytes written. An existing
    /// blob is kept.
    pub fn finish(self, digest: &Digest, size: u64) -> Result<(), Error> {
        if self.written != size {
            return Err(Error::Size {
                path: self.blobs.shown,
                what: "the blob that was written".to_owned(),
                expected: size,
                found: self.written,
            });
        }
        let shown = self.blobs.shown.join(digest.hex());
        let failed = || io_error(&shown, "write");
        // Its digest was not known when it was looked for.
        if let Some(neighbours) = &self.layout.neighbours
            && self.layout.stat_blob(digest, Some(size))?.is_none()
            && self.layout.link(neighbours, digest, Some(size))?.is_some()
        {
            return Ok(());
        }
        // The slow part comes before the lock.
        self.staged.file.sync_all().map_err(failed())?;
        let mut writing = self.layout.begin()?;
        writing.add(BlobName::from(digest))?;
        if self.layout.stat_blob(digest, Some(size))?.is_some() {
            return Ok(());
        }
        let target = self.blobs.at().join(digest.hex());
        self.staged.publish(&target).map_err(failed())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_save_that_is_given_up_does_not_wait_for_the_lock() -> Result<(), Box<dyn std::error::Error>>
    {
        let dir = tempfile::tempdir()?;
        let layout = Directory::new(dir.path());
        layout.check()?;
        let held = fs::File::open(dir.path())?;
        rustix::fs::flock(&held, rustix::fs::FlockOperation::LockExclusive)?;
        let save = layout.give_up_on_drop();
        let waiting = layout.clone();
        let blob = Bytes::from_static(b"content");
        let writer = std::thread::spawn(move || waiting.put_blob(&blob, &Digest::of(&blob)));
        drop(save);
        let ended = writer.join().map_err(|_| "panic")?;
        assert!(matches!(ended, Err(Error::GivenUp { .. })), "{ended:?}");
        Ok(())
    }
}
