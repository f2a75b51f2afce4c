//! Reads manifests and configs from containerd's content store. All content is verified against its digest.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use crate::common::digest::Digest;
use crate::node::container::error::Error;
use crate::node::container::image::{BLOB_CAP, Config, Document, Manifest};
use crate::node::container::records::open_file;
use crate::node::container::roots::{read_dir, read_file};

pub(super) const BLOBS: &str = "io.containerd.content.v1.content/blobs/sha256";

/// The directory of the content store's blobs.
pub(super) struct Content(pub(super) PathBuf);

impl Content {
    pub(super) fn path(&self, digest: &Digest) -> PathBuf {
        self.0.join(digest.hex())
    }

    /// Reads a small blob and verifies its digest. Returns `None` if it does not exist or is too large for JSON.
    pub(super) fn blob(&self, digest: &Digest) -> Result<Option<Vec<u8>>, Error> {
        let path = self.path(digest);
        match fs::metadata(&path) {
            Ok(metadata) if metadata.len() > BLOB_CAP => return Ok(None),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Ok(_) => {}
            Err(e) => return Err(Error::io(path, e)),
        }
        let bytes = match read_file(&path, BLOB_CAP) {
            Err(e) if e.is_not_found() => return Ok(None),
            other => other?,
        };
        let found = Digest::of(&bytes);
        if found != *digest {
            return Err(Error::damaged(
                path,
                format!("its contents have the digest {found}"),
            ));
        }
        Ok(Some(bytes))
    }

    /// Returns the manifests for `digest`: itself, or those listed in an index that exist on this node.
    pub(super) fn manifests(
        &self,
        digest: &Digest,
        media_type: Option<&str>,
    ) -> Result<Vec<Manifest>, Error> {
        let mut manifests = Vec::new();
        let mut seen = BTreeSet::from([*digest]);
        let mut pending = vec![(*digest, media_type)];
        while let Some((digest, media_type)) = pending.pop() {
            let Some(bytes) = self.blob(&digest)? else {
                continue;
            };
            match Document::parse(bytes, media_type) {
                Document::Manifest(manifest) => manifests.push(manifest),
                Document::Index(digests) => {
                    pending.extend(
                        digests
                            .into_iter()
                            .rev()
                            .filter(|d| seen.insert(*d))
                            .map(|d| (d, None)),
                    );
                }
                Document::Other => {}
            }
        }
        Ok(manifests)
    }

    /// Returns all manifests in the store, ordered by digest.
    pub(super) fn all_manifests(&self) -> Result<Vec<Manifest>, Error> {
        let mut manifests = Vec::new();
        for name in read_dir(&self.0)? {
            let Some(digest) = name.to_str().and_then(|hex| Digest::from_hex(hex).ok()) else {
                continue;
            };
            // Layers are not JSON, which shows in the first byte.
            if !starts_with_brace(&self.path(&digest)) {
                continue;
            }
            let Ok(Some(bytes)) = self.blob(&digest) else {
                continue;
            };
            if let Document::Manifest(manifest) = Document::parse(bytes, None) {
                manifests.push(manifest);
            }
        }
        Ok(manifests)
    }

    /// Returns the config of a manifest if both have the same number of layers, else a text with the reason.
    pub(super) fn config(&self, manifest: &Manifest) -> Result<Config, String> {
        let bytes = self.blob(&manifest.config).map_err(|e| e.to_string())?;
        let bytes =
            bytes.ok_or_else(|| format!("config {} is not on this node", manifest.config))?;
        let config = Config::parse(bytes)?;
        if config.diff_ids.len() == manifest.layers.len() {
            return Ok(config);
        }
        Err(format!(
            "its config has {}, it has {}",
            crate::common::message::count(config.diff_ids.len(), "layer", "layers"),
            manifest.layers.len()
        ))
    }
}

fn starts_with_brace(path: &Path) -> bool {
    use std::os::unix::fs::FileExt;
    let mut first = [0];
    open_file(path).is_ok_and(|file| file.read_exact_at(&mut first, 0).is_ok()) && first == *b"{"
}
