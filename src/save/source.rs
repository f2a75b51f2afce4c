//! An image as its manifest, its config and the content of its layers, from a layout, an archive or a registry.

use std::io::{self, Read};
use std::sync::mpsc;

use bytes::{Buf, Bytes};
use oci_spec::image::{Descriptor, ImageIndex, ImageManifest};

use super::Error;
use crate::common::digest::Digest;
use crate::image::manifest::Platform;
use crate::image::manifest::raw::RawManifest;
use crate::store::destination::{self, Target};
use crate::store::harbor;
use crate::store::layout;
use crate::store::registry::{self, Reference, Registries, Repository};

/// The content of a layer as it is stored.
pub(crate) type LayerReader = io::Result<Box<dyn Read + Send>>;

enum Source {
    Layout(layout::Reader),
    Registry(Repository),
}

/// An image that can be read.
pub(crate) struct Image {
    source: Source,
    /// The manifest for this machine's platform.
    pub(crate) manifest: RawManifest,
    /// The same, parsed.
    pub(crate) parsed: ImageManifest,
    /// The reference in a registry.
    pub(crate) reference: Option<Reference>,
}

/// Why an image cannot be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SourceError {
    /// It is not there, or damaged.
    #[error("{0}")]
    Unusable(String),
    /// The place cannot be read.
    #[error(transparent)]
    Destination(#[from] destination::Error),
}

impl SourceError {
    /// Returns the error about the image `name`.
    pub(crate) fn of(self, name: &str) -> Error {
        match self {
            Self::Unusable(reason) => Error::ImageUnreadable {
                name: name.to_owned(),
                reason,
            },
            Self::Destination(error) => Error::Destination(error),
        }
    }
}

impl From<registry::Error> for SourceError {
    fn from(error: registry::Error) -> Self {
        Self::Destination(error.into())
    }
}

/// Opens an image and reads its manifest.
pub(crate) async fn open(target: Target, registries: &Registries) -> Result<Image, SourceError> {
    let unusable = |reason: String| SourceError::Unusable(reason);
    let platform = Platform::host();
    let opened = target.open_layout().map_err(|e| unusable(e.to_string()))?;
    let (source, manifest, reference) = match opened {
        Some((reader, tag)) => {
            let manifest = reader
                .manifest(tag, &platform)
                .map_err(|e| unusable(e.to_string()))?;
            (Source::Layout(reader), manifest, None)
        }
        None => {
            let Target::Registry(reference) = target else {
                return Err(unusable("it is in no layout and in no registry".to_owned()));
            };
            let repository = registries.pull_from(&reference)?;
            let manifest = match pull(&repository, &reference, &platform).await {
                Ok(manifest) => manifest,
                Err(PullError::Registry(error)) => {
                    let error = harbor::explain(&repository, error).await;
                    return Err(SourceError::Destination(error.into()));
                }
                Err(PullError::Unusable(reason)) => return Err(unusable(reason)),
            };
            (Source::Registry(repository), manifest, Some(reference))
        }
    };
    let parsed = serde_json::from_slice(&manifest.bytes)
        .map_err(|e| unusable(format!("its manifest: {e}")))?;
    Ok(Image {
        source,
        manifest,
        parsed,
        reference,
    })
}

impl Image {
    /// Reads the config.
    pub(crate) async fn config(&self) -> Result<Bytes, SourceError> {
        let digest = self.parsed.config().digest().to_string();
        let digest: Digest = digest
            .parse()
            .map_err(|e| SourceError::Unusable(format!("its config: {e}")))?;
        match &self.source {
            Source::Layout(reader) => reader
                .blob(&digest)
                .map_err(|e| SourceError::Unusable(e.to_string())),
            Source::Registry(repository) => Ok(repository.blob(&digest).await?),
        }
    }

    /// Returns the layers, bottom first. Those of a registry are fetched at their first read, for which a runtime of
    /// tokio must be current.
    pub(crate) fn layers(&self) -> Result<Vec<LayerReader>, SourceError> {
        let layers = self.parsed.layers().iter();
        layers.map(|layer| self.layer(layer)).collect()
    }

    /// Returns the number of lowest layers that are the same in both images.
    pub(crate) fn common_layers(&self, other: &Self) -> usize {
        let pairs = self.parsed.layers().iter().zip(other.parsed.layers());
        pairs.take_while(|(a, b)| a.digest() == b.digest()).count()
    }

    /// Opens one layer like [`Image::layers`].
    pub(crate) fn layer(&self, descriptor: &Descriptor) -> Result<LayerReader, SourceError> {
        let digest = layer_digest(descriptor)?;
        Ok(match &self.source {
            Source::Layout(reader) => reader
                .open_blob(&digest, Some(descriptor.size()))
                .map_err(io::Error::other),
            Source::Registry(repository) => Ok(Box::new(BlobReader::start(
                repository.clone(),
                digest,
                descriptor.size(),
            ))),
        })
    }

    /// Reads `length` bytes of a stored layer from `offset` on, unverified, or `None` if the registry delivers blobs only as
    /// a whole. For a registry, a runtime of tokio must be current, in a thread that may block.
    pub(crate) fn layer_range(
        &self,
        descriptor: &Descriptor,
        offset: u64,
        length: u64,
    ) -> io::Result<Option<Bytes>> {
        let digest = layer_digest(descriptor).map_err(io::Error::other)?;
        match &self.source {
            Source::Layout(reader) => {
                let read = reader.blob_range(&digest, offset, length);
                read.map(Some).map_err(io::Error::other)
            }
            Source::Registry(repository) => tokio::runtime::Handle::current()
                .block_on(repository.blob_range(&digest, offset, length))
                .map_err(io::Error::other),
        }
    }

    /// Returns the reference in a registry, or the digest, for messages.
    pub(crate) fn name(&self) -> String {
        match &self.reference {
            Some(reference) => reference.to_string(),
            None => self.manifest.digest.to_string(),
        }
    }

    /// Returns the layout, if it is in one.
    pub(crate) fn into_layout(self) -> Option<layout::Reader> {
        match self.source {
            Source::Layout(reader) => Some(reader),
            Source::Registry(_) => None,
        }
    }
}

/// Returns the digest of a layer of a manifest.
pub(crate) fn layer_digest(descriptor: &Descriptor) -> Result<Digest, SourceError> {
    let digest = descriptor.digest().to_string();
    digest
        .parse()
        .map_err(|e| SourceError::Unusable(format!("its layer {digest}: {e}")))
}

enum PullError {
    Registry(registry::Error),
    Unusable(String),
}

async fn pull(
    repository: &Repository,
    reference: &Reference,
    platform: &Platform,
) -> Result<RawManifest, PullError> {
    let wanted = reference.digest.map(|digest| digest.to_string());
    let wanted = wanted
        .or_else(|| reference.tag.clone())
        .unwrap_or_else(|| "latest".to_owned());
    let manifest = repository
        .manifest(&wanted)
        .await
        .map_err(PullError::Registry)?;
    if !manifest.is_index() {
        return Ok(manifest);
    }
    let index: ImageIndex = serde_json::from_slice(&manifest.bytes)
        .map_err(|e| PullError::Unusable(format!("its index: {e}")))?;
    let Some(chosen) = platform.choose(&index) else {
        return Err(PullError::Unusable(format!(
            "its index has nothing for {}",
            platform.architecture
        )));
    };
    repository
        .manifest(chosen.digest().as_ref())
        .await
        .map_err(PullError::Registry)
}

/// A registry blob as a [`Read`], fetched at the first read.
struct BlobReader {
    begin: Option<Box<dyn FnOnce() + Send>>,
    pieces: mpsc::Receiver<io::Result<Bytes>>,
    piece: Bytes,
}

impl BlobReader {
    fn start(repository: Repository, digest: Digest, size: u64) -> Self {
        let (sender, pieces) = mpsc::sync_channel(4);
        let handle = tokio::runtime::Handle::current();
        let begin = move || {
            handle.spawn(async move {
                let mut stream = match repository.blob_stream(&digest, Some(size)).await {
                    Ok(stream) => stream,
                    Err(error) => {
                        return sender
                            .send(Err(io::Error::other(error)))
                            .unwrap_or_default();
                    }
                };
                loop {
                    let piece = match stream.next().await {
                        Ok(Some(piece)) => Ok(piece),
                        Ok(None) => return,
                        Err(error) => Err(io::Error::other(error)),
                    };
                    let failed = piece.is_err();
                    let sender = sender.clone();
                    // The reader may be slower than the registry, or gone.
                    let sent =
                        tokio::task::spawn_blocking(move || sender.send(piece).is_ok()).await;
                    if failed || !sent.unwrap_or(false) {
                        return;
                    }
                }
            });
        };
        Self {
            begin: Some(Box::new(begin)),
            pieces,
            piece: Bytes::new(),
        }
    }
}

impl Read for BlobReader {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if let Some(begin) = self.begin.take() {
            begin();
        }
        while self.piece.is_empty() {
            match self.pieces.recv() {
                Ok(piece) => self.piece = piece?,
                Err(_) => return Ok(0),
            }
        }
        let n = self.piece.len().min(out.len());
        self.piece.copy_to_slice(&mut out[..n]);
        Ok(n)
    }
}
