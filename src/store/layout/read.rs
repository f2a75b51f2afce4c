//! Reads images from layouts, for `--base` and for verifying what was saved.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use oci_spec::image::{Descriptor, ImageIndex};
use sha2::{Digest as _, Sha256};

use super::{Error, MAX_DOCUMENT, REF_NAME, blob_path, io_error};
use crate::common::digest::Digest;
use crate::common::regular_file;
use crate::image::manifest::Platform;
use crate::image::manifest::raw::{MANIFEST_TYPES, RawManifest, manifest_type};

/// containerd's annotation with the full name of an image in an export.
const CONTAINERD_NAME: &str = "io.containerd.image.name";
/// Maximum number of entries in an archive.
const MAX_ENTRIES: usize = 100_000;
/// Maximum depth of nested indexes.
const MAX_DEPTH: usize = 3;

/// An image that an index lists.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listing {
    /// Digest of the manifest.
    pub digest: Digest,
    /// Media type of the manifest.
    pub media_type: String,
    /// Tags, sorted; empty if the tag was moved to another image.
    pub tags: Vec<String>,
}

/// A layout opened for reading.
pub struct Reader {
    path: PathBuf,
    files: Files,
}

enum Files {
    Directory,
    /// Offset and length of each file, by its name in the archive.
    Archive {
        file: Arc<File>,
        entries: HashMap<Vec<u8>, (u64, u64)>,
    },
}

impl Reader {
    /// Opens a layout directory.
    pub fn directory(path: impl Into<PathBuf>) -> Result<Self, Error> {
        let path = path.into();
        let reader = Self {
            path,
            files: Files::Directory,
        };
        reader.check()?;
        Ok(reader)
    }

    /// Opens an uncompressed layout archive and lists its files.
    pub fn archive(path: impl Into<PathBuf>) -> Result<Self, Error> {
        let path = path.into();
        let file = regular_file::open(&path).map_err(io_error(&path, "open"))?;
        let length = file.metadata().map_err(io_error(&path, "read"))?.len();
        let entries = list_archive(&file, length).map_err(|e| Error::NotALayout {
            path: path.clone(),
            reason: format!("expected a tar archive: {e}"),
        })?;
        let reader = Self {
            path,
            files: Files::Archive {
                file: Arc::new(file),
                entries,
            },
        };
        reader.check()?;
        Ok(reader)
    }

    fn check(&self) -> Result<(), Error> {
        match self.open("oci-layout") {
            Ok(_) => Ok(()),
            Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                Err(Error::NotALayout {
                    path: self.path.clone(),
                    reason: "it has no oci-layout".to_owned(),
                })
            }
            Err(e) => Err(e),
        }
    }

    fn open(&self, name: &str) -> Result<(FileSection, u64), Error> {
        let (file, offset, length) = match &self.files {
            Files::Directory => {
                let path = self.path.join(name);
                let file = regular_file::open(&path).map_err(io_error(&path, "open"))?;
                let length = file.metadata().map_err(io_error(&path, "read"))?.len();
                (Arc::new(file), 0, length)
            }
            Files::Archive { file, entries } => {
                let &(offset, length) = entries.get(name.as_bytes()).ok_or_else(|| {
                    io_error(&self.path.join(name), "open")(io::ErrorKind::NotFound.into())
                })?;
                (Arc::clone(file), offset, length)
            }
        };
        let left = length;
        Ok((FileSection { file, offset, left }, length))
    }

    /// Lists the images of the index, each once, with all its tags.
    pub fn list(&self) -> Result<Vec<Listing>, Error> {
        let bytes = match self.open("index.json") {
            Ok((index, _)) => self.read_whole(index, "index.json")?,
            // The first save into this layout is still in progress.
            Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                return Ok(Vec::new());
            }
            Err(e) => return Err(e),
        };
        let index = self.parse_index("index.json", &bytes)?;
        let mut found: Vec<Listing> = Vec::new();
        for descriptor in index.manifests() {
            let digest = self.digest_of(descriptor)?;
            let tag = descriptor
                .annotations()
                .as_ref()
                .and_then(|a| a.get(REF_NAME).or_else(|| a.get(CONTAINERD_NAME)))
                .cloned();
            match found.iter_mut().find(|listing| listing.digest == digest) {
                Some(listing) => listing.tags.extend(tag),
                None => found.push(Listing {
                    digest,
                    media_type: descriptor.media_type().to_string(),
                    tags: tag.into_iter().collect(),
                }),
            }
        }
        for listing in &mut found {
            listing.tags.sort();
        }
        Ok(found)
    }

    /// Reads the manifest or index of an image returned by [`Reader::list`].
    pub fn manifest_of(&self, digest: &Digest, media_type: &str) -> Result<RawManifest, Error> {
        let bytes = self.blob(digest)?;
        let media_type =
            manifest_type(Some(media_type), &bytes).map_err(|reason| Error::Document {
                path: self.path.clone(),
                what: digest.to_string(),
                reason,
            })?;
        Ok(RawManifest {
            bytes,
            media_type,
            digest: *digest,
        })
    }

    /// Reads the manifest of `tag`, or of the only image if `tag` is `None`. From an index, the manifest for `platform`
    /// is selected.
    pub fn manifest(&self, tag: Option<&str>, platform: &Platform) -> Result<RawManifest, Error> {
        let (index, _) = self.open("index.json")?;
        let bytes = self.read_whole(index, "index.json")?;
        let index = self.parse_index("index.json", &bytes)?;
        let mut descriptor = self.choose(&index, tag)?.clone();
        for _ in 0..MAX_DEPTH {
            let digest = self.digest_of(&descriptor)?;
            let bytes = self.blob(&digest)?;
            let media_type = manifest_type(Some(descriptor.media_type().as_ref()), &bytes)
                .map_err(|reason| Error::Document {
                    path: self.path.clone(),
                    what: digest.to_string(),
                    reason,
                })?;
            let manifest = RawManifest {
                bytes,
                media_type,
                digest,
            };
            if !manifest.is_index() {
                return Ok(manifest);
            }
            let index = self.parse_index(&digest.to_string(), &manifest.bytes)?;
            let chosen = platform.choose(&index).ok_or_else(|| Error::NoSuchImage {
                path: self.path.clone(),
                reason: format!(
                    "no image for linux/{} in index {digest}",
                    platform.architecture
                ),
                found: index
                    .manifests()
                    .iter()
                    .filter_map(|m| m.platform().as_ref())
                    .map(|p| format!("{}/{}", p.os(), p.architecture()))
                    .collect(),
            })?;
            descriptor = chosen.clone();
        }
        let reason = format!("more than {MAX_DEPTH} indexes within each other");
        Err(Error::Document {
            path: self.path.clone(),
            what: "index.json".to_owned(),
            reason,
        })
    }

    fn parse_index(&self, what: &str, bytes: &[u8]) -> Result<ImageIndex, Error> {
        serde_json::from_slice(bytes).map_err(|e| Error::Document {
            path: self.path.clone(),
            what: what.to_owned(),
            reason: format!("expected an image index: {e}"),
        })
    }

    fn choose<'a>(
        &self,
        index: &'a ImageIndex,
        tag: Option<&str>,
    ) -> Result<&'a Descriptor, Error> {
        let annotation =
            |d: &'a Descriptor, name: &str| d.annotations().as_ref().and_then(|a| a.get(name));
        let images: Vec<&Descriptor> = index
            .manifests()
            .iter()
            .filter(|d| MANIFEST_TYPES.contains(&d.media_type().as_ref()))
            .collect();
        let found = || {
            let name = |d: &&'a Descriptor| {
                annotation(d, REF_NAME)
                    .cloned()
                    .unwrap_or_else(|| d.digest().to_string())
            };
            images
                .iter()
                .map(|d| crate::common::escape::limited(&name(d), 200))
                .take(50)
                .collect()
        };
        let none = |reason: String| Error::NoSuchImage {
            path: self.path.clone(),
            reason,
            found: found(),
        };
        match tag {
            Some(tag) => images
                .iter()
                .find(|d| annotation(d, REF_NAME).is_some_and(|n| n == tag))
                .or_else(|| {
                    images
                        .iter()
                        .find(|d| annotation(d, CONTAINERD_NAME).is_some_and(|n| n == tag))
                })
                .copied()
                .ok_or_else(|| none(format!("no image is tagged {tag:?}"))),
            None => match images.as_slice() {
                [only] => Ok(only),
                [] => Err(none("there is no image".to_owned())),
                _ => Err(none(
                    "there are several images: name one by its tag".to_owned(),
                )),
            },
        }
    }

    fn digest_of(&self, descriptor: &Descriptor) -> Result<Digest, Error> {
        descriptor
            .digest()
            .to_string()
            .parse()
            .map_err(|e: crate::common::digest::DigestError| Error::Document {
                path: self.path.clone(),
                what: "index.json".to_owned(),
                reason: e.to_string(),
            })
    }

    /// Reads a small blob (a manifest or config) into memory and verifies its digest.
    pub fn blob(&self, digest: &Digest) -> Result<Bytes, Error> {
        let (file, _) = self.open_blob_file(digest)?;
        let bytes = self.read_whole(file, &digest.to_string())?;
        let found = Digest::of(&bytes);
        if found != *digest {
            return Err(Error::Digest {
                path: self.path.clone(),
                expected: *digest,
                found,
            });
        }
        Ok(bytes.into())
    }

    /// Opens a blob as a stream that fails at its end if size or digest are wrong. `size` is in bytes, if known.
    pub fn open_blob(
        &self,
        digest: &Digest,
        size: Option<u64>,
    ) -> Result<Box<dyn Read + Send>, Error> {
        let (file, found) = self.open_blob_file(digest)?;
        if let Some(expected) = size.filter(|&s| s != found) {
            return Err(Error::Size {
                path: self.path.clone(),
                what: digest.to_string(),
                expected,
                found,
            });
        }
        Ok(Box::new(VerifyingReader {
            inner: file,
            hasher: Sha256::new(),
            expected: *digest,
            done: false,
        }))
    }

    /// Reads `length` bytes of a blob from `offset` on. They are not verified.
    ///
    /// Fails if the blob is shorter.
    pub fn blob_range(&self, digest: &Digest, offset: u64, length: u64) -> Result<Bytes, Error> {
        let (mut part, size) = self.open_blob_file(digest)?;
        let end = offset.checked_add(length);
        if let Some(expected) = end.filter(|&end| end > size) {
            return Err(Error::Size {
                path: self.path.clone(),
                what: digest.to_string(),
                expected,
                found: size,
            });
        }
        part.offset += offset;
        part.left = length;
        let mut bytes = Vec::new();
        part.read_to_end(&mut bytes)
            .map_err(io_error(&self.path, "read"))?;
        Ok(bytes.into())
    }

    fn open_blob_file(&self, digest: &Digest) -> Result<(FileSection, u64), Error> {
        self.open(&blob_path(digest)).map_err(|e| match e {
            Error::Io { source, .. } if source.kind() == io::ErrorKind::NotFound => {
                Error::NoSuchBlob {
                    path: self.path.clone(),
                    digest: *digest,
                }
            }
            other => other,
        })
    }

    fn read_whole(&self, file: impl Read, what: &str) -> Result<Vec<u8>, Error> {
        let mut bytes = Vec::new();
        file.take(MAX_DOCUMENT + 1)
            .read_to_end(&mut bytes)
            .map_err(io_error(&self.path, "read"))?;
        if bytes.len() as u64 > MAX_DOCUMENT {
            let reason = format!("larger than {MAX_DOCUMENT} bytes");
            return Err(Error::Document {
                path: self.path.clone(),
                what: what.to_owned(),
                reason,
            });
        }
        Ok(bytes)
    }
}

fn list_archive(file: &File, length: u64) -> io::Result<HashMap<Vec<u8>, (u64, u64)>> {
    let mut archive = tar::Archive::new(file);
    let mut entries = HashMap::new();
    for (n, entry) in archive.entries_with_seek()?.enumerate() {
        let entry = entry?;
        if n >= MAX_ENTRIES {
            return Err(io::Error::other(format!("more than {MAX_ENTRIES} entries")));
        }
        if !entry.header().entry_type().is_file() {
            continue;
        }
        let (offset, size) = (entry.raw_file_position(), entry.size());
        if offset.checked_add(size).is_none_or(|end| end > length) {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "an entry is longer than the archive",
            ));
        }
        let name = entry.path_bytes();
        let name = name.strip_prefix(b"./").unwrap_or(&name);
        entries.insert(name.to_vec(), (offset, size));
    }
    Ok(entries)
}

/// A part of a file, read without moving the file's offset.
struct FileSection {
    file: Arc<File>,
    offset: u64,
    left: u64,
}

impl Read for FileSection {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = self.left.min(buffer.len() as u64) as usize;
        let n = self.file.read_at(&mut buffer[..most], self.offset)?;
        if n == 0 && most > 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.offset += n as u64;
        self.left -= n as u64;
        Ok(n)
    }
}

/// A reader that fails at its end if the digest of the data is wrong.
struct VerifyingReader<R> {
    inner: R,
    hasher: Sha256,
    expected: Digest,
    done: bool,
}

impl<R: Read> Read for VerifyingReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buffer)?;
        self.hasher.update(&buffer[..n]);
        if n == 0 && !buffer.is_empty() && !self.done {
            let found = hex::encode(std::mem::take(&mut self.hasher).finalize());
            if found != self.expected.hex() {
                let text = format!(
                    "expected blob {}, found sha256:{found}: the copy is damaged",
                    self.expected
                );
                return Err(io::Error::new(io::ErrorKind::InvalidData, text));
            }
            self.done = true;
        }
        Ok(n)
    }
}
