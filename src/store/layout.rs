//! OCI image layouts on disk, as a directory or a tar archive. They are written as destinations and read as base
//! images.
//!
//! Format: image-spec `image-layout.md`. The archive is the same tree as a tar (`oci-archive:` of skopeo and Podman).

mod archive;
mod blobs;
mod directory;
mod lease;
mod neighbours;
mod prune;
mod read;
mod references;
mod staged;
mod sweep;
mod writer;

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

// The annotation that holds a tag in `index.json`.
use oci_client::annotations::ORG_OPENCONTAINERS_IMAGE_REF_NAME as REF_NAME;
use serde_json::{Map, Value, json};

use crate::common::digest::Digest;
use crate::common::regular_file;
use crate::image::manifest::INDEX;

pub use archive::{Archive, ArchiveBlob};
pub use blobs::BlobName;
pub(crate) use directory::GiveUp;
pub use directory::{Directory, DirectoryBlob};
pub use neighbours::{Merged, layouts_below, merge};
pub use prune::{PruneOptions, PruneProgress, Pruned, Unneeded};
pub use read::{Listing, Reader};
pub use sweep::{Freed, recover};

/// Content of the file `oci-layout`.
const LAYOUT_FILE: &str = r#"{"imageLayoutVersion":"1.0.0"}"#;
/// Maximum size of `index.json` and other documents, in bytes.
const MAX_DOCUMENT: u64 = 4 << 20;

/// How often, and after which pause, an empty document is read again.
const EMPTY_ATTEMPTS: u32 = 20;
const EMPTY_PAUSE: Duration = Duration::from_millis(50);

/// An error of a layout.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file operation failed.
    #[error("cannot {action} {}: {source}{}", path.display(), advice(source))]
    Io {
        /// Path of the file.
        path: PathBuf,
        /// The operation as a verb: `write`, `read`, `open`, ...
        action: &'static str,
        /// The cause.
        source: io::Error,
    },
    /// The file is written, but a crash of the machine may undo that.
    #[error("{} is written, but may be lost in a crash: its directory cannot be synced: {source}", path.display())]
    NotSynced {
        /// Path of the file.
        path: PathBuf,
        /// The error of the system.
        source: io::Error,
    },
    /// The path contains something other than a layout.
    #[error("{} is not an OCI layout: {reason}; name a new or empty directory, or a layout", path.display())]
    NotALayout {
        /// The path.
        path: PathBuf,
        /// What was found.
        reason: String,
    },
    /// A document cannot be parsed.
    #[error("{}: {what}: {reason}", path.display())]
    Document {
        /// Path of the layout.
        path: PathBuf,
        /// `index.json`, or a digest.
        what: String,
        /// What was expected and found.
        reason: String,
    },
    /// The tag does not exist, or none was given and there are several images.
    #[error("{}: {reason}; it has: {}", path.display(), list(found))]
    NoSuchImage {
        /// Path of the layout.
        path: PathBuf,
        /// What was requested.
        reason: String,
        /// Existing tags, and digests of untagged manifests.
        found: Vec<String>,
    },
    /// The blob does not exist.
    #[error("{}: no blob {digest}", path.display())]
    NoSuchBlob {
        /// Path of the layout.
        path: PathBuf,
        /// Digest of the blob.
        digest: Digest,
    },
    /// The content does not match its digest.
    #[error("{}: expected {expected}, found {found}: the copy is damaged", path.display())]
    Digest {
        /// Path of the layout.
        path: PathBuf,
        /// The digest that was requested.
        expected: Digest,
        /// The digest of the actual content.
        found: Digest,
    },
    /// The number of bytes differs from what was declared.
    #[error("{}: {what}: expected {expected} bytes, found {found}", path.display())]
    Size {
        /// Path of the layout.
        path: PathBuf,
        /// A digest, or the blob being written.
        what: String,
        /// Expected number of bytes.
        expected: u64,
        /// Actual number of bytes.
        found: u64,
    },
    /// What images need cannot be determined, so that no blob was deleted.
    #[error("{}: {reason}; no blob was deleted", path.display())]
    NotFreed {
        /// Path of the layout.
        path: PathBuf,
        /// What cannot be read.
        reason: String,
    },
    /// The manifest names a blob that is not there any more.
    #[error("{}: blob {digest} was deleted by another program during the save", path.display())]
    Incomplete {
        /// Path of the layout.
        path: PathBuf,
        /// Digest of the blob.
        digest: Digest,
    },
    /// The save was given up while it was being written.
    #[error("{}: the save was given up", path.display())]
    GivenUp {
        /// Path of the layout.
        path: PathBuf,
    },
    /// The archive was completed, or a failure left it unusable.
    #[error("{}: the archive is closed", path.display())]
    Closed {
        /// Path of the archive.
        path: PathBuf,
    },
}

impl Error {
    /// Returns whether the cause is a lack of permission (exit code 77).
    pub fn not_permitted(&self) -> bool {
        matches!(self, Self::Io { source, .. } if matches!(
            source.kind(),
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem
        ))
    }

    /// Returns whether a later attempt may succeed (exit code 75). A full disk does not count as transient.
    pub fn retryable(&self) -> bool {
        matches!(self, Self::Io { source, .. } if matches!(
            source.kind(),
            io::ErrorKind::Interrupted | io::ErrorKind::TimedOut | io::ErrorKind::StaleNetworkFileHandle
        ))
    }
}

fn advice(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::StorageFull => ": free some space there, or save to another file system",
        io::ErrorKind::QuotaExceeded => ": the quota there is used up",
        io::ErrorKind::FileTooLarge => ": that file system does not take files as large",
        _ => "",
    }
}

fn list(found: &[String]) -> String {
    if found.is_empty() {
        "nothing".to_owned()
    } else {
        found.join(", ")
    }
}

fn io_error<'a>(path: &'a Path, action: &'static str) -> impl FnOnce(io::Error) -> Error + 'a {
    move |source| Error::Io {
        path: path.to_path_buf(),
        action,
        source,
    }
}

/// Returns the error for a file that exists but whose directory was not synced to disk.
fn sync_error(path: &Path) -> impl FnOnce(io::Error) -> Error + '_ {
    move |source| Error::NotSynced {
        path: path.to_path_buf(),
        source,
    }
}

/// Reads a small file, or returns `None` if it does not exist. Some tools empty a file before they write it, so an empty
/// one is read again for a second.
fn read_document(path: &Path) -> Result<Option<Vec<u8>>, Error> {
    for _ in 0..EMPTY_ATTEMPTS {
        match read_document_once(path)? {
            Some(bytes) if bytes.is_empty() => std::thread::sleep(EMPTY_PAUSE),
            read => return Ok(read),
        }
    }
    read_document_once(path)
}

fn read_document_once(path: &Path) -> Result<Option<Vec<u8>>, Error> {
    let file = match regular_file::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(io_error(path, "open")(e)),
    };
    let bytes = regular_file::read_open(file, MAX_DOCUMENT).map_err(io_error(path, "read"))?;
    Ok(Some(bytes))
}

/// Where a blob lies within a layout.
fn blob_path(digest: &Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

/// Adds a manifest to `index.json` under `tag`, which is removed from any other manifest. Unknown content is kept.
fn add_to_index(
    existing: Option<&[u8]>,
    media_type: &str,
    digest: &Digest,
    size: u64,
    tag: &str,
) -> Result<Vec<u8>, String> {
    let mut index = match existing {
        None => json!({
            "schemaVersion": 2,
            "mediaType": INDEX,
            "manifests": [],
        }),
        Some(bytes) => {
            serde_json::from_slice(bytes).map_err(|e| format!("expected an image index: {e}"))?
        }
    };
    let root: &mut Map<String, Value> = index
        .as_object_mut()
        .ok_or("expected an image index, found no object")?;
    if root.get("schemaVersion").and_then(Value::as_u64) != Some(2) {
        return Err("expected schemaVersion 2".to_owned());
    }
    let manifests = root.entry("manifests").or_insert_with(|| json!([]));
    let manifests = manifests
        .as_array_mut()
        .ok_or("expected a list of manifests")?;
    manifests.retain(|m| {
        m.pointer("/annotations")
            .and_then(|a| a.get(REF_NAME))
            .and_then(Value::as_str)
            != Some(tag)
    });
    manifests.push(json!({
        "mediaType": media_type,
        "digest": digest,
        "size": size,
        "annotations": { REF_NAME: tag },
    }));
    serde_json::to_vec(&index).map_err(|e| e.to_string())
}

/// Returns the digest of the manifest that has the tag in `index.json`, if there is one.
///
/// Fails with what was expected if the index cannot be read.
fn tagged(index: &[u8], tag: &str) -> Result<Option<Digest>, String> {
    let index: Value =
        serde_json::from_slice(index).map_err(|e| format!("expected an image index: {e}"))?;
    let Some(manifests) = index.get("manifests") else {
        return Ok(None);
    };
    let manifests = manifests.as_array().ok_or("expected a list of manifests")?;
    let named = |manifest: &&Value| {
        let name = manifest
            .pointer("/annotations")
            .and_then(|a| a.get(REF_NAME));
        name.and_then(Value::as_str) == Some(tag)
    };
    let Some(found) = manifests.iter().find(named) else {
        return Ok(None);
    };
    let digest = found.get("digest").and_then(Value::as_str);
    let digest = digest.and_then(|digest| digest.parse().ok());
    digest
        .map(Some)
        .ok_or_else(|| format!("the tag {tag:?} has no digest"))
}

/// Removes a manifest, or only one of its tags, from `index.json`. Unknown content is kept.
fn take_from_index(existing: &[u8], digest: &Digest, tag: Option<&str>) -> Result<Vec<u8>, String> {
    let mut index: Value =
        serde_json::from_slice(existing).map_err(|e| format!("expected an image index: {e}"))?;
    let manifests = index
        .get_mut("manifests")
        .and_then(Value::as_array_mut)
        .ok_or("expected a list of manifests")?;
    let digest = digest.to_string();
    manifests.retain(|m| {
        let this = m.get("digest").and_then(Value::as_str) == Some(&digest);
        let named = m.pointer("/annotations").and_then(|a| a.get(REF_NAME));
        !(this && tag.is_none_or(|tag| named.and_then(Value::as_str) == Some(tag)))
    });
    serde_json::to_vec(&index).map_err(|e| e.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_index_keeps_what_it_does_not_know_and_moves_the_tag() {
        let (one, two) = (Digest::of("1"), Digest::of("2"));
        let first = add_to_index(None, "m/t", &one, 1, "a").unwrap();
        let second = add_to_index(Some(&first), "m/t", &two, 2, "b").unwrap();
        let with_more = String::from_utf8(second)
            .unwrap()
            .replacen('{', r#"{"x-unknown":7,"#, 1);
        let third = add_to_index(Some(with_more.as_bytes()), "m/t", &two, 2, "a").unwrap();
        let index: Value = serde_json::from_slice(&third).unwrap();
        assert_eq!(index["x-unknown"], 7);
        let shown: Vec<_> = index["manifests"]
            .as_array()
            .unwrap()
            .iter()
            .map(|m| {
                (
                    m["digest"].clone(),
                    m["annotations"][REF_NAME].as_str().unwrap(),
                )
            })
            .collect();
        assert_eq!(shown, [(json!(two), "b"), (json!(two), "a")]);
        for bad in [
            "",
            "[]",
            "{}",
            r#"{"schemaVersion":1}"#,
            r#"{"schemaVersion":2,"manifests":{}}"#,
        ] {
            assert!(
                add_to_index(Some(bad.as_bytes()), "m/t", &one, 1, "a").is_err(),
                "{bad}"
            );
        }
    }

    #[test]
    fn one_tag_of_two_is_taken_and_the_rest_stays() {
        let (one, two) = (Digest::of("1"), Digest::of("2"));
        let mut index = add_to_index(None, "m/t", &one, 1, "a").unwrap();
        for (digest, tag) in [(one, "b"), (two, "c")] {
            index = add_to_index(Some(&index), "m/t", &digest, 1, tag).unwrap();
        }
        let left = |bytes: &[u8]| {
            let index: Value = serde_json::from_slice(bytes).unwrap();
            let manifests = index["manifests"].as_array().unwrap().iter();
            manifests
                .map(|m| m["annotations"][REF_NAME].as_str().unwrap().to_owned())
                .collect::<Vec<_>>()
        };
        assert_eq!(
            left(&take_from_index(&index, &one, Some("a")).unwrap()),
            ["b", "c"]
        );
        assert_eq!(
            left(&take_from_index(&index, &one, Some("c")).unwrap()),
            ["a", "b", "c"]
        );
        assert_eq!(left(&take_from_index(&index, &one, None).unwrap()), ["c"]);
        assert!(take_from_index(b"{}", &one, None).is_err());
    }

    #[test]
    fn a_full_disk_is_said_with_the_path() {
        let full = io::Error::from_raw_os_error(rustix::io::Errno::NOSPC.raw_os_error());
        let error = io_error(Path::new("/x/blobs"), "write")(full);
        let text = error.to_string();
        assert!(
            text.contains("/x/blobs") && text.contains("free some space"),
            "{text}"
        );
        assert!(!error.retryable() && !error.not_permitted());
        let read_only = io::Error::from_raw_os_error(rustix::io::Errno::ROFS.raw_os_error());
        assert!(io_error(Path::new("/x"), "write")(read_only).not_permitted());
    }
}
