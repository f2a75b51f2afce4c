//! Ensures that every base layer is at the destination before a manifest names it: it is there already, is mounted from
//! another repository, is copied from this node or a registry, or, if its blob is found nowhere, is remade from the
//! mounted directory.

use std::collections::HashMap;
use std::io::Read;
use std::str::FromStr;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::{StreamExt as _, TryStreamExt as _};
use oci_spec::image::Descriptor;

use super::tally::Tally;
use super::{Context, Error};
use crate::common::digest::{DiffId, Digest};
use crate::common::regular_file;
use crate::image::manifest;
use crate::layer::index::{ANNOTATION, Place};
use crate::layer::scan::{self, Exclusions, Rules, Scan};
use crate::layer::{self, Compression, Plan};
use crate::node::container::{Base, BaseLayer, Container};
use crate::save::event::Event;
use crate::store::destination::{self, BlobWriter, Destination};
use crate::store::layout::Reader;
use crate::store::registry;

/// Maximum number of concurrent requests to a registry.
const MAX_CONCURRENT_LOOKUPS: usize = 4;
/// Bytes read from a local blob at a time.
const READ_SIZE: usize = 1 << 20;

/// The source of a base layer at the destination.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(tag = "from", rename_all = "snake_case")]
pub(crate) enum Origin {
    /// The destination had it.
    Present,
    /// The destination's registry mounted it from another of its repositories.
    Mounted {
        /// `HOST/REPOSITORY`.
        repository: String,
    },
    /// The compressed blob in the runtime's store on this node, byte for byte.
    Local,
    /// Streamed through from a registry.
    Registry {
        /// `HOST/REPOSITORY`.
        repository: String,
    },
    /// Remade from the mounted directory, with a new diff ID, because its blob was found nowhere.
    Remade,
}

/// A base layer at the destination.
#[derive(Clone, Debug, serde::Serialize)]
pub(crate) struct Delivered {
    /// Digest of the compressed blob.
    pub(crate) digest: Digest,
    /// Digest of its tar (diff ID).
    pub(crate) diff_id: DiffId,
    /// Compressed size in bytes.
    pub(crate) size: u64,
    /// Its media type.
    pub(crate) media_type: String,
    /// Where its index is, if it was made here and has one.
    #[serde(skip)]
    pub(crate) index: Option<Place>,
    /// Where it came from.
    #[serde(flatten)]
    pub(crate) origin: Origin,
}

impl Delivered {
    /// Returns whether it was made again from a directory.
    pub(super) fn is_remade(&self) -> bool {
        matches!(self.origin, Origin::Remade)
    }

    pub(super) fn layer(&self) -> manifest::Layer {
        manifest::Layer {
            descriptor: indexed(
                descriptor(&self.media_type, self.digest, self.size),
                self.index.as_ref(),
            ),
            diff_id: self.diff_id,
        }
    }
}

/// Returns the descriptor of a blob.
pub(super) fn descriptor(media_type: &str, digest: Digest, size: u64) -> Descriptor {
    let digest = oci_spec::image::Sha256Digest::from_str(&digest.hex());
    // 64 hex digits are always a valid digest.
    Descriptor::new(
        media_type.into(),
        size,
        digest.unwrap_or_else(|_| unreachable!()),
    )
}

/// Adds where the index of a layer is.
pub(super) fn indexed(mut descriptor: Descriptor, index: Option<&Place>) -> Descriptor {
    let annotation = |place: &Place| HashMap::from([(ANNOTATION.to_owned(), place.to_string())]);
    descriptor.set_annotations(index.map(annotation));
    descriptor
}

/// The data that is needed to look for a base layer's blob.
struct Blob<'a> {
    digest: Digest,
    /// Compressed size in bytes; 0 if unknown.
    size: u64,
    media_type: String,
    layer: &'a BaseLayer,
}

impl<'a> Blob<'a> {
    fn of(layer: &'a BaseLayer) -> Option<Self> {
        let descriptor = layer.descriptor.as_ref()?;
        Some(Self {
            digest: descriptor.digest().to_string().parse().ok()?,
            size: if layer.size_known {
                descriptor.size()
            } else {
                0
            },
            media_type: descriptor.media_type().to_string(),
            layer,
        })
    }

    fn size(&self) -> Option<u64> {
        (self.size != 0).then_some(self.size)
    }

    fn delivered(&self, size: u64, origin: Origin) -> Delivered {
        let media_type = self.media_type.clone();
        Delivered {
            digest: self.digest,
            diff_id: self.layer.diff_id,
            size,
            media_type,
            index: None,
            origin,
        }
    }
}

/// Returns which base layers the destination has, or has mounted by itself from another repository. No content is moved.
///
/// The result has one item per layer, bottom first; `None` if the content has to be copied.
pub(super) async fn look_up(
    destination: &Destination,
    layers: &[BaseLayer],
) -> Result<Vec<Option<Delivered>>, Error> {
    let answers = layers.iter().map(|layer| async move {
        let Some(blob) = Blob::of(layer) else {
            return Ok(None);
        };
        if let Some(size) = destination.has_blob(&blob.digest, blob.size()).await? {
            return Ok(Some(blob.delivered(size, Origin::Present)));
        }
        for repository in &layer.repositories {
            if destination.mount_blob(&blob.digest, repository).await? {
                let size = destination.has_blob(&blob.digest, blob.size()).await?;
                // The blob is checked for: some registries report a mount as done before the blob is available.
                if let Some(size) = size {
                    return Ok(Some(blob.delivered(
                        size,
                        Origin::Mounted {
                            repository: repository.clone(),
                        },
                    )));
                }
            }
        }
        Ok(None)
    });
    let answers: Vec<Result<_, Error>> = futures_util::stream::iter(answers)
        .buffered(MAX_CONCURRENT_LOOKUPS)
        .collect()
        .await;
    answers.into_iter().collect()
}

/// Returns digest and size of each layer, and whether the destination's project may have its blob already. Only queries
/// are sent. A layer of unknown digest or size is left out.
pub(super) async fn sizes(
    destination: &Destination,
    layers: &[BaseLayer],
) -> Result<Vec<(Digest, u64, bool)>, Error> {
    let asked = layers.iter().filter_map(Blob::of).map(|blob| async move {
        let there = destination.has_blob(&blob.digest, blob.size()).await?;
        let size = there.unwrap_or(blob.size);
        // A mount within the project costs nothing if an image of it has the blob.
        let mut known = blob.layer.repositories.iter();
        let near = known.any(|name| destination.shares_quota(name));
        Ok((blob.digest, size, there.is_some() || near))
    });
    let asked: Vec<Result<_, Error>> = futures_util::stream::iter(asked)
        .buffered(MAX_CONCURRENT_LOOKUPS)
        .collect()
        .await;
    asked.into_iter().collect()
}

/// Counts the bytes of the layers that the destination lacks: they are copied, mounted or made again later. Only queries
/// are sent, and what cannot be found out now is counted later.
pub(super) async fn count_missing(
    context: &Context,
    destination: &Destination,
    layers: &[BaseLayer],
) {
    let asked = layers.iter().filter_map(Blob::of).map(|blob| async move {
        let there = destination.has_blob(&blob.digest, blob.size()).await;
        if matches!(there, Ok(None)) {
            context.tally.expect(blob.layer.diff_id, blob.size);
        }
    });
    futures_util::stream::iter(asked)
        .buffer_unordered(MAX_CONCURRENT_LOOKUPS)
        .collect::<Vec<()>>()
        .await;
}

/// Ensures that all layers of the base are at the destination; copies those that it lacks, several at a time.
pub(super) async fn copy_missing(
    context: &Context,
    destination: &Destination,
    container: &Container,
    base: &Base,
    layout: Option<&Reader>,
) -> Result<Vec<Delivered>, Error> {
    let found = look_up(destination, &base.layers).await?;
    for (layer, found) in base.layers.iter().zip(&found) {
        context.expect_or_count(layer, found.as_ref());
    }
    let brought = found
        .into_iter()
        .enumerate()
        .map(|(index, found)| async move {
            let delivered = match found {
                Some(found) => found,
                None => {
                    copy_or_remake(context, destination, container, base, layout, index).await?
                }
            };
            context.room.arrived(&delivered.digest);
            context.tally.arrived(base.layers[index].diff_id);
            context.tally.report(context.observer.as_ref());
            Ok(delivered)
        });
    futures_util::stream::iter(brought)
        .buffered(destination.max_concurrent_blobs())
        .try_collect()
        .await
}

async fn copy_or_remake(
    context: &Context,
    destination: &Destination,
    container: &Container,
    base: &Base,
    layout: Option<&Reader>,
    index: usize,
) -> Result<Delivered, Error> {
    let layer = &base.layers[index];
    let bar = LayerProgress {
        context,
        diff_id: layer.diff_id,
        layer: index,
        layers: base.layers.len(),
    };
    let tried = match Blob::of(layer) {
        Some(blob) => match copy_blob(context, destination, &blob, layout, &bar).await? {
            Ok(delivered) => return Ok(delivered),
            Err(tried) => tried,
        },
        None => vec![format!("nothing says which blob it is: {}", base.proof)],
    };
    context.warn(
        "base_layer_remade",
        format!(
            "base layer {} ({}) is made again from its directory, with a new digest: {}",
            index + 1,
            layer.diff_id,
            tried.join("; ")
        ),
    );
    remake(context, destination, container, base, index, &bar).await
}

/// Copies a layer that does not belong to the base from a known source. Returns the sources that were tried if none
/// worked.
pub(super) async fn copy(
    context: &Context,
    destination: &Destination,
    layer: &BaseLayer,
) -> Result<Result<Delivered, Vec<String>>, Error> {
    let bar = LayerProgress {
        context,
        diff_id: layer.diff_id,
        layer: 0,
        layers: 1,
    };
    match Blob::of(layer) {
        Some(blob) => copy_blob(context, destination, &blob, None, &bar).await,
        None => Ok(Err(vec!["nothing says which blob it is".to_owned()])),
    }
}

/// Copies the blob from the first source that has it. Returns what was tried if none does.
async fn copy_blob(
    context: &Context,
    destination: &Destination,
    blob: &Blob<'_>,
    layout: Option<&Reader>,
    bar: &LayerProgress<'_>,
) -> Result<Result<Delivered, Vec<String>>, Error> {
    let mut tried = Vec::new();
    for (name, open) in local_copies(blob, layout) {
        match copy_local(destination, blob, &*open, bar).await {
            Ok(size) => return Ok(Ok(blob.delivered(size, Origin::Local))),
            // An error of the destination would occur with the next source too.
            Err(CopyError::Destination(error)) => return Err(error),
            Err(CopyError::Source(reason)) => tried.push(format!("{name}: {reason}")),
        }
    }
    for name in &blob.layer.repositories {
        match copy_remote(context, destination, blob, name, bar).await {
            Ok(size) => {
                let repository = name.clone();
                return Ok(Ok(blob.delivered(size, Origin::Registry { repository })));
            }
            Err(CopyError::Destination(error)) => return Err(error),
            Err(CopyError::Source(reason)) => tried.push(format!("{name}: {reason}")),
        }
    }
    if tried.is_empty() {
        tried.push("no copy on this node, and no registry known that has it".to_owned());
    }
    Ok(Err(tried))
}

/// The side on which a copy failed.
enum CopyError {
    Source(String),
    Destination(Error),
}

impl From<crate::store::destination::Error> for CopyError {
    fn from(error: crate::store::destination::Error) -> Self {
        Self::Destination(error.into())
    }
}

/// An opened copy of a blob on this node, or the reason why it cannot be read.
type Opened = Result<Box<dyn Read + Send>, String>;
/// Opens the copy anew for each attempt to send it.
type Open<'a> = Box<dyn Fn() -> Opened + Send + Sync + 'a>;

/// Returns the copies of the blob in the runtime's store and in the layout that `--base` names.
fn local_copies<'a>(blob: &'a Blob<'_>, layout: Option<&'a Reader>) -> Vec<(String, Open<'a>)> {
    let mut copies: Vec<(String, Open<'a>)> = Vec::new();
    if let Some(path) = &blob.layer.local_blob {
        let open = move || match regular_file::open(path) {
            Ok(file) => Ok(Box::new(file) as Box<dyn Read + Send>),
            Err(error) => Err(error.to_string()),
        };
        copies.push((path.display().to_string(), Box::new(open)));
    }
    if let Some(layout) = layout {
        let open = move || {
            layout
                .open_blob(&blob.digest, blob.size())
                .map_err(|e| e.to_string())
        };
        copies.push(("--base".to_owned(), Box::new(open)));
    }
    copies
}

/// Copies a blob until the destination has it or has failed for good. After a failure that may pass, it is read and
/// written again.
async fn copy_local(
    destination: &Destination,
    blob: &Blob<'_>,
    open: &(dyn Fn() -> Opened + Send + Sync),
    bar: &LayerProgress<'_>,
) -> Result<u64, CopyError> {
    let mut writer = destination.begin_blob(tokio::runtime::Handle::current())?;
    loop {
        let mut file = open().map_err(CopyError::Source)?;
        let (bar, total) = (bar.shared(), blob.size);
        let read = tokio::task::spawn_blocking(move || {
            use sha2::Digest as _;
            let mut hasher = sha2::Sha256::new();
            let mut size = 0;
            loop {
                let mut piece = vec![0; READ_SIZE];
                match file.read(&mut piece) {
                    Ok(0) => return (writer, Ok(Ok((Digest::finish(hasher), size)))),
                    Ok(n) => piece.truncate(n),
                    Err(error) => return (writer, Err(CopyError::Source(error.to_string()))),
                }
                hasher.update(&piece);
                size += piece.len() as u64;
                if let Err(error) = writer.write(Bytes::from(piece)) {
                    return (writer, Ok(Err(error)));
                }
                bar.progress(size, total);
            }
        });
        let (mut written, read) = read
            .await
            .map_err(|_| CopyError::Destination(Error::Worker))?;
        let error = match read? {
            Ok((digest, _)) if digest != blob.digest => {
                written.abort().await;
                return Err(CopyError::Source(format!(
                    "its content is {digest}, not {}",
                    blob.digest
                )));
            }
            Ok((digest, size)) => match written.try_finish(&digest, size).await {
                Ok(()) => return Ok(size),
                Err(error) => error,
            },
            Err(error) => error,
        };
        writer = retry_writer(written, error).await?;
    }
}

/// Returns a writer for another attempt, or the error if it is not retryable.
async fn retry_writer(
    writer: BlobWriter,
    error: destination::Error,
) -> Result<BlobWriter, CopyError> {
    if error.retryable() {
        Ok(writer.retry(error).await?)
    } else {
        Err(error.into())
    }
}

async fn copy_remote(
    context: &Context,
    destination: &Destination,
    blob: &Blob<'_>,
    name: &str,
    bar: &LayerProgress<'_>,
) -> Result<u64, CopyError> {
    let source = |error: registry::Error| CopyError::Source(error.to_string());
    let repository = context.registries.repository(name).map_err(source)?;
    let mut writer = destination.begin_blob(tokio::runtime::Handle::current())?;
    loop {
        let mut stream = repository
            .blob_stream(&blob.digest, blob.size())
            .await
            .map_err(source)?;
        let mut size = 0;
        let error = loop {
            match stream.next().await {
                Ok(Some(bytes)) => {
                    size += bytes.len() as u64;
                    // The writer blocks if the destination is slower than the source.
                    let written;
                    (writer, written) = tokio::task::spawn_blocking(move || {
                        let written = writer.write(bytes);
                        (writer, written)
                    })
                    .await
                    .map_err(|_| CopyError::Destination(Error::Worker))?;
                    if let Err(error) = written {
                        break error;
                    }
                    bar.shared().progress(size, blob.size);
                }
                Ok(None) => match writer.try_finish(&blob.digest, size).await {
                    Ok(()) => return Ok(size),
                    Err(error) => break error,
                },
                Err(error) => {
                    writer.abort().await;
                    return Err(source(error));
                }
            }
        };
        writer = retry_writer(writer, error).await?;
    }
}

/// Makes a layer from the directory that holds it unpacked, relative to the layers below it.
async fn remake(
    context: &Context,
    destination: &Destination,
    container: &Container,
    base: &Base,
    index: usize,
    bar: &LayerProgress<'_>,
) -> Result<Delivered, Error> {
    let lowers: Option<Vec<_>> = base.layers[..=index]
        .iter()
        .rev()
        .map(|layer| layer.lower.clone())
        .collect();
    let lowers = lowers.filter(|lowers| !lowers.is_empty());
    let Some((upper, below)) = lowers.as_ref().and_then(|lowers| lowers.split_first()) else {
        return Err(Error::BaseLayerNotFound {
            diff_id: base.layers[index].diff_id,
        });
    };
    let exclusions = Exclusions::new(Rules {
        of_image: true,
        ..Rules::default()
    })?;
    let roots = scan::Roots {
        upper: upper.clone(),
        lowers: below.to_vec(),
        data_only: container.overlay.data_only.clone(),
        id_mapped: container.overlay.id_mapped.clone(),
        lowers_known: true,
        namespace: container.overlay.namespace,
        volume: None,
    };
    let scan = Scan::new(
        &roots,
        &scan::Options {
            jobs: context.jobs,
            uid_map: &container.uid_map,
            gid_map: &container.gid_map,
            exclusions: &exclusions,
            caps: context.caps,
            runtime_root_mode: None,
            cancel: &context.cancel,
        },
    )?;
    let plan = Arc::new(Plan::new(Arc::new(scan), None));
    let total = plan.tar_size();
    let mut writer = destination.begin_blob(tokio::runtime::Handle::current())?;
    let compression = Compression::Gzip;
    let layer = loop {
        let (jobs, cancel, bar) = (context.jobs, context.cancel.clone(), bar.shared());
        let plan = Arc::clone(&plan);
        let made = tokio::task::spawn_blocking(move || {
            let options = layer::Options {
                compression,
                level: compression.default_level(),
                jobs,
                cancel: &cancel,
            };
            let sink = |bytes| writer.write(bytes).map_err(Error::from);
            let made = layer::stream::write(&plan, options, sink, &|at| {
                bar.progress(at.tar_bytes, total);
            });
            (made.map_err(super::stream::unwrap_sink_error), writer)
        });
        let (made, mut written) = made.await.map_err(|_| Error::Worker)?;
        let error = match made {
            Ok(layer) => match written.try_finish(&layer.digest, layer.size).await {
                Ok(()) => break layer,
                Err(error) => error,
            },
            Err(Error::Destination(error)) => error,
            Err(error) => {
                written.abort().await;
                return Err(error);
            }
        };
        if !error.retryable() {
            return Err(error.into());
        }
        writer = written.retry(error).await?;
    };
    Ok(Delivered {
        digest: layer.digest,
        diff_id: layer.diff_id,
        size: layer.size,
        media_type: layer.media_type.to_owned(),
        index: layer.index,
        origin: Origin::Remade,
    })
}

impl Context {
    /// Counts a layer that the destination lacks, or notes one that it has or has mounted by now.
    pub(super) fn expect_or_count(&self, layer: &BaseLayer, found: Option<&Delivered>) {
        match (found, Blob::of(layer)) {
            (Some(_), _) => self.tally.arrived(layer.diff_id),
            (None, Some(blob)) => self.tally.expect(layer.diff_id, blob.size),
            (None, None) => self.tally.expect(layer.diff_id, 0),
        }
    }
}

/// Reports the progress of a base layer.
struct LayerProgress<'a> {
    context: &'a Context,
    diff_id: DiffId,
    layer: usize,
    layers: usize,
}

/// Like `LayerProgress`, for use on another thread.
struct SharedLayerProgress {
    observer: Arc<dyn crate::save::event::Observer>,
    tally: Arc<Tally>,
    diff_id: DiffId,
    layer: usize,
    layers: usize,
}

impl LayerProgress<'_> {
    fn shared(&self) -> SharedLayerProgress {
        SharedLayerProgress {
            observer: Arc::clone(&self.context.observer),
            tally: Arc::clone(&self.context.tally),
            diff_id: self.diff_id,
            layer: self.layer,
            layers: self.layers,
        }
    }
}

impl SharedLayerProgress {
    fn progress(&self, bytes_done: u64, bytes_total: u64) {
        let (layer, layers) = (self.layer, self.layers);
        self.tally.bring(self.diff_id, bytes_done, bytes_total);
        self.tally.report(self.observer.as_ref());
        self.observer.event(Event::BaseProgress {
            layer,
            layers,
            bytes_done,
            bytes_total,
        });
    }
}
