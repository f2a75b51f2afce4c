//! The files below `blobs/` of a layout, by directory descriptors: no symbolic link is followed, and nothing outside the
//! layout is read or deleted, whoever else may write there.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, Stat};
use rustix::io::Errno;

use super::{Error, MAX_DOCUMENT, io_error, staged};
use crate::common::digest::Digest;

/// Algorithms whose blobs may be deleted, with the number of hexadecimal digits. The names of others are not understood,
/// so their blobs are kept.
const ALGORITHMS: [(&str, usize); 4] = [
    ("sha256", 64),
    ("sha384", 96),
    ("sha512", 128),
    ("blake3", 64),
];

/// The name of a blob as in a descriptor, `ALGORITHM:ENCODED` (image-spec `descriptor.md`), with any algorithm.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlobName(String);

impl BlobName {
    /// Parses a descriptor's digest. Returns `None` if it violates the grammar, which also excludes `/` and `..`.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let (algorithm, encoded) = text.split_once(':')?;
        let component = |part: &str| {
            let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
            !part.is_empty() && part.bytes().all(plain)
        };
        let encoded_byte = |b: u8| b.is_ascii_alphanumeric() || b"=_-".contains(&b);
        let valid = algorithm.split(['+', '.', '_', '-']).all(component)
            && !encoded.is_empty()
            && encoded.bytes().all(encoded_byte)
            && text.len() <= 200;
        valid.then(|| Self(text.to_owned()))
    }

    /// Returns the name of a file in `blobs/ALGORITHM`. Returns `None` if no blob is named so.
    fn of_file(algorithm: &str, file: &str) -> Option<Self> {
        let &(_, digits) = ALGORITHMS.iter().find(|(name, _)| *name == algorithm)?;
        let hex = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
        (file.len() == digits && file.bytes().all(hex)).then(|| Self(format!("{algorithm}:{file}")))
    }

    fn parts(&self) -> (&str, &str) {
        self.0.split_once(':').unwrap_or_default()
    }

    /// Returns whether `bytes` are the blob's content; `None` if this program does not compute the algorithm.
    fn matches(&self, bytes: &[u8]) -> Option<bool> {
        use sha2::Digest as _;
        let (algorithm, encoded) = self.parts();
        let found = match algorithm {
            "sha256" => Digest::of(bytes).hex(),
            "sha384" => hex::encode(sha2::Sha384::digest(bytes)),
            "sha512" => hex::encode(sha2::Sha512::digest(bytes)),
            _ => return None,
        };
        Some(found == encoded)
    }
}

impl From<&Digest> for BlobName {
    fn from(digest: &Digest) -> Self {
        Self(digest.to_string())
    }
}

impl fmt::Display for BlobName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl serde::Serialize for BlobName {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

/// What a file below `blobs/` is.
pub(super) enum Found {
    /// A regular file with the name of a blob.
    Blob(BlobName),
    /// A file of this program that has no name of a blob yet ([`super::staged`]).
    Temporary,
    /// The same, of a version that does not lock it.
    UnlockedTemporary,
    /// Anything else: it is reported and left alone.
    Other,
}

/// A file below `blobs/`.
pub(super) struct Entry {
    pub(super) found: Found,
    /// Path from the layout.
    pub(super) path: String,
    pub(super) stat: Stat,
}

/// The directories `blobs/ALGORITHM` of a layout.
pub(super) struct Blobs {
    root: PathBuf,
    dirs: BTreeMap<String, OwnedFd>,
    /// What lies in `blobs/` and is no directory.
    others: Vec<String>,
}

impl Blobs {
    /// Opens the directories. A layout without `blobs` has none.
    ///
    /// Fails if `blobs` or `blobs/ALGORITHM` is a symbolic link: other layouts may use the directory that it leads to.
    pub(super) fn open(root: &Path) -> Result<Self, Error> {
        let mut opened = Self {
            root: root.to_path_buf(),
            dirs: BTreeMap::new(),
            others: Vec::new(),
        };
        let at = root.join("blobs");
        let layout = rustix::fs::open(root, directory_flags(OFlags::empty()), Mode::empty())
            .map_err(|e| io_error(root, "open")(e.into()))?;
        let blobs = match open_directory(&layout, "blobs") {
            Ok(blobs) => blobs,
            Err(Errno::NOENT) => return Ok(opened),
            Err(error) => return Err(opened.no_directory(&at, error)),
        };
        for (name, kind) in list(&blobs).map_err(io_error(&at, "read"))? {
            match kind {
                FileType::Directory => {
                    let path = at.join(&name);
                    let dir = open_directory(&blobs, &name)
                        .map_err(|error| opened.no_directory(&path, error))?;
                    opened.dirs.insert(name, dir);
                }
                FileType::Symlink if ALGORITHMS.iter().any(|(algorithm, _)| *algorithm == name) => {
                    return Err(opened.no_directory(&at.join(name), Errno::LOOP));
                }
                _ => opened.others.push(format!("blobs/{name}")),
            }
        }
        Ok(opened)
    }

    fn no_directory(&self, path: &Path, error: Errno) -> Error {
        match error {
            Errno::LOOP | Errno::NOTDIR => self.unreadable(format!(
                "{} is a symbolic link, and other layouts may use what it leads to",
                path.display()
            )),
            error => io_error(path, "open")(error.into()),
        }
    }

    /// Returns the error for content that does not say what is needed.
    pub(super) fn unreadable(&self, reason: String) -> Error {
        Error::NotFreed {
            path: self.root.clone(),
            reason,
        }
    }

    /// Reads a blob of at most [`MAX_DOCUMENT`] bytes and verifies its digest. Returns [`Document::Large`] for a larger
    /// one.
    ///
    /// Fails if it is no regular file, cannot be read, or is damaged.
    pub(super) fn read(&self, name: &BlobName) -> Result<Document, Error> {
        let failed = |error: io::Error| self.unreadable(format!("cannot read {name}: {error}"));
        let Some((file, size)) = self.open_file(name).map_err(failed)? else {
            return Ok(Document::Missing);
        };
        if size > MAX_DOCUMENT {
            return Ok(Document::Large);
        }
        let mut bytes = Vec::new();
        file.take(MAX_DOCUMENT)
            .read_to_end(&mut bytes)
            .map_err(failed)?;
        if name.matches(&bytes) == Some(false) {
            return Err(
                self.unreadable(format!("{name} is damaged: its content has another digest"))
            );
        }
        Ok(Document::Read(bytes))
    }

    /// Reads a blob that no document names, if it is a small JSON object. Its digest is not verified.
    pub(super) fn json_object(&self, name: &BlobName) -> Result<Option<serde_json::Value>, Error> {
        let failed = |error: io::Error| self.unreadable(format!("cannot read {name}: {error}"));
        let Some((mut file, size)) = self.open_file(name).map_err(failed)? else {
            return Ok(None);
        };
        let mut bytes = vec![0];
        let read = file.read(&mut bytes).map_err(failed)?;
        if size > MAX_DOCUMENT || read == 0 || bytes != b"{" {
            return Ok(None);
        }
        file.take(MAX_DOCUMENT)
            .read_to_end(&mut bytes)
            .map_err(failed)?;
        Ok(serde_json::from_slice(&bytes).ok())
    }

    /// Opens a blob and returns its size in bytes.
    fn open_file(&self, name: &BlobName) -> io::Result<Option<(File, u64)>> {
        let (algorithm, encoded) = name.parts();
        let Some(dir) = self.dirs.get(algorithm) else {
            return Ok(None);
        };
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file: File = match rustix::fs::openat(dir, encoded, flags, Mode::empty()) {
            Ok(file) => file.into(),
            Err(Errno::NOENT) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let meta = file.metadata()?;
        if !meta.is_file() {
            return Err(io::Error::other("it is no regular file"));
        }
        Ok(Some((file, meta.len())))
    }

    /// Lists everything below `blobs/`; directories within `blobs/ALGORITHM` are not entered.
    pub(super) fn list(&self) -> Result<(Vec<Entry>, Vec<String>), Error> {
        let mut entries = Vec::new();
        for (algorithm, dir) in &self.dirs {
            let shown = self.root.join("blobs").join(algorithm);
            for (file, _) in list(dir).map_err(io_error(&shown, "read"))? {
                let stat = match rustix::fs::statat(dir, &file, AtFlags::SYMLINK_NOFOLLOW) {
                    Ok(stat) => stat,
                    Err(Errno::NOENT) => continue,
                    Err(error) => return Err(io_error(&shown.join(&file), "read")(error.into())),
                };
                let regular = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
                let found = match BlobName::of_file(algorithm, &file) {
                    Some(name) if regular => Found::Blob(name),
                    None if regular && staged::is_temporary(&file) => Found::Temporary,
                    None if regular && staged::is_unlocked_temporary(&file) => {
                        Found::UnlockedTemporary
                    }
                    _ => Found::Other,
                };
                let path = format!("blobs/{algorithm}/{file}");
                entries.push(Entry { found, path, stat });
            }
        }
        Ok((entries, self.others.clone()))
    }

    /// Deletes a blob. Returns the number of bytes that this frees (none if the file has other hard links), or `None` if
    /// there is no such regular file.
    pub(super) fn delete(&self, name: &BlobName) -> Result<Option<u64>, Error> {
        let (algorithm, encoded) = name.parts();
        let Some(dir) = self.dirs.get(algorithm) else {
            return Ok(None);
        };
        let path = self.root.join("blobs").join(algorithm).join(encoded);
        let failed = |error: Errno| io_error(&path, "delete")(error.into());
        if BlobName::of_file(algorithm, encoded).is_none() {
            return Ok(None);
        }
        let stat = match rustix::fs::statat(dir, encoded, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => stat,
            Err(Errno::NOENT) => return Ok(None),
            Err(error) => return Err(failed(error)),
        };
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Ok(None);
        }
        match rustix::fs::unlinkat(dir, encoded, AtFlags::empty()) {
            Ok(()) => Ok(Some(freed_bytes(&stat))),
            Err(Errno::NOENT) => Ok(None),
            Err(error) => Err(failed(error)),
        }
    }

    /// Deletes a file of this program that no process has open any more. Returns whether it did.
    pub(super) fn delete_temporary(&self, path: &str) -> Result<bool, Error> {
        let mut parts = path.rsplitn(3, '/');
        let (Some(file), Some(algorithm)) = (parts.next(), parts.next()) else {
            return Ok(false);
        };
        let Some(dir) = self.dirs.get(algorithm) else {
            return Ok(false);
        };
        staged::delete_abandoned(dir, file).map_err(io_error(&self.root.join(path), "delete"))
    }
}

/// The directory that blobs are written to, held open: whoever may write to the layout cannot put a symbolic link in its
/// place.
pub(super) struct BlobDirectory {
    dir: OwnedFd,
    /// Its path, for messages.
    pub(super) shown: PathBuf,
}

impl BlobDirectory {
    /// Opens `blobs/sha256` of the layout at `root`; `None` if there is none. Fails as [`Blobs::open`] does.
    pub(super) fn open(root: &Path) -> Result<Option<Self>, Error> {
        let dir = Blobs::open(root)?.dirs.remove("sha256");
        Ok(dir.map(|dir| Self {
            dir,
            shown: root.join("blobs/sha256"),
        }))
    }

    /// Returns a path of the open directory, whatever lies at its name now.
    pub(super) fn at(&self) -> PathBuf {
        format!("/proc/self/fd/{}", self.dir.as_raw_fd()).into()
    }
}

/// Gives the directories of the blobs to the user whose layout it is, if root has created them.
pub(super) fn give_to_owner(root: &Path) -> io::Result<()> {
    let layout = File::from(rustix::fs::open(
        root,
        directory_flags(OFlags::empty()),
        Mode::empty(),
    )?);
    let blobs = File::from(open_directory(&layout, "blobs")?);
    staged::give_to_owner_of(&layout, &blobs)?;
    staged::give_to_owner_of(&layout, &open_directory(&blobs, "sha256")?.into())
}

/// Returns the bytes that are free once this name of a file is deleted.
pub(super) fn freed_bytes(stat: &Stat) -> u64 {
    if stat.st_nlink > 1 {
        0
    } else {
        stat.st_size as u64
    }
}

/// The content of a blob that may be a document.
pub(super) enum Document {
    Missing,
    /// Larger than any document.
    Large,
    Read(Vec<u8>),
}

fn directory_flags(more: OFlags) -> OFlags {
    OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | more
}

fn open_directory(parent: impl AsFd, name: &str) -> rustix::io::Result<OwnedFd> {
    rustix::fs::openat(
        parent,
        name,
        directory_flags(OFlags::NOFOLLOW),
        Mode::empty(),
    )
}

/// Lists a directory: names and types. Names that are not UTF-8 are shown with replacements, so that no file is found by
/// them.
fn list(dir: &OwnedFd) -> io::Result<Vec<(String, FileType)>> {
    let mut found = Vec::new();
    for entry in Dir::read_from(dir)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name == "." || name == ".." {
            continue;
        }
        let kind = match entry.file_type() {
            FileType::Unknown => {
                let stat = rustix::fs::statat(dir, entry.file_name(), AtFlags::SYMLINK_NOFOLLOW)?;
                FileType::from_raw_mode(stat.st_mode)
            }
            kind => kind,
        };
        found.push((name, kind));
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_blobs() {
        let hex = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        for good in [
            &format!("sha256:{hex}"),
            "sha512:ab",
            "multihash+base58:QmRZxt2b1FVZPNqd8hsiykDL3TdBDeTSPX9Kv46HmX4Gx8",
            "sha256+b64u:LCa0a2j_xo_5m0U8HTBBNBNCLXBkg7-g-YpeiGJm564",
        ] {
            assert!(BlobName::parse(good).is_some(), "{good}");
        }
        for bad in [
            "",
            ":",
            "sha256:",
            "sha256:../x",
            "..:x",
            "a/b:c",
            "A:b",
            "sha256",
            "a:b c",
        ] {
            assert!(BlobName::parse(bad).is_none(), "{bad}");
        }
        assert!(BlobName::of_file("sha256", hex).is_some());
        for (algorithm, file) in [
            ("sha256", &hex[1..]),
            ("sha512", hex),
            ("md5", hex),
            ("sha256", &hex.to_uppercase()),
        ] {
            assert!(
                BlobName::of_file(algorithm, file).is_none(),
                "{algorithm} {file}"
            );
        }
    }
}
