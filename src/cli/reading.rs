//! Reading images: threads, signals and registries of verbs that read, and nothing else.

use std::collections::HashMap;
use std::io::{self, Read};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Context;
use indicatif::{ProgressBar, ProgressStyle};
use oci_spec::image::Descriptor;
use tokio_util::sync::CancellationToken;

use super::{args, options, signals};
use crate::common::cancel::Cancelled;
use crate::common::escape;
use crate::layer::index::Index;
use crate::save;
use crate::save::indexed::{self, Fetch, NoIndex};
use crate::save::source::{self, Image, LayerReader};
use crate::store::destination::Target;
use crate::store::registry::Registries;

/// How long a cancelled verb waits for its threads, which remove their temporary files.
const GRACE: std::time::Duration = std::time::Duration::from_secs(2);

/// Runs `work` until a signal cancels. Credentials are for the registry of `target`, if it is in one.
pub(super) fn run<T>(
    registry: &args::Registry,
    target: Option<&Target>,
    work: impl AsyncFnOnce(&Registries, &CancellationToken) -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let host = match target {
        Some(Target::Registry(reference)) => Some(reference.host.clone()),
        _ => None,
    };
    let registries = options::registries(registry, host)?;
    let cancel = CancellationToken::new();
    signals::cancel_on_signals(&cancel).context("cannot listen for SIGINT and SIGTERM")?;
    let runtime = tokio::runtime::Runtime::new().context("cannot start the I/O threads")?;
    let done = runtime.block_on(async {
        tokio::select! {
            done = work(&registries, &cancel) => done,
            () = cancel.cancelled() => Err(Cancelled.into()),
        }
    });
    // A thread may still read a layer.
    if cancel.is_cancelled() {
        runtime.shutdown_timeout(GRACE);
        return Err(Cancelled.into());
    }
    runtime.shutdown_background();
    done
}

/// Runs `work` in a thread in which it may block.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> anyhow::Result<T> + Send + 'static,
) -> anyhow::Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|_| save::Error::Worker)?
}

/// Opens an image, named `name` in messages.
pub(super) async fn open(
    target: Target,
    registries: &Registries,
    name: &str,
) -> Result<Image, save::Error> {
    let name = escape::limited(name, 400);
    source::open(target, registries)
        .await
        .map_err(|error| error.of(&name))
}

/// Returns the layers of an image, bottom first, whose reading ends with an error when `cancel` is set.
pub(super) fn layers(
    image: &Image,
    name: &str,
    cancel: &CancellationToken,
) -> Result<Vec<LayerReader>, save::Error> {
    let name = escape::limited(name, 400);
    let layers = image.layers().map_err(|error| error.of(&name))?;
    let cancellable = |layer: Box<dyn Read + Send>| -> Box<dyn Read + Send> {
        Box::new(Cancellable {
            layer,
            cancel: cancel.clone(),
        })
    };
    Ok(layers
        .into_iter()
        .map(|layer| layer.map(cancellable))
        .collect())
}

/// The layers of an image, each of which can be opened again and again.
pub(super) struct Layers {
    image: Arc<Image>,
    cancel: CancellationToken,
    read: Arc<AtomicU64>,
    bar: ProgressBar,
    /// Indexes of layers, by layer; `None`: it is read whole.
    indexes: Mutex<HashMap<usize, Option<Arc<Index>>>>,
}

impl Layers {
    /// Takes the layers of an image, whose reading ends with an error when `cancel` is set. What was read is shown on
    /// stderr if that is a terminal.
    pub(super) fn new(image: Arc<Image>, cancel: &CancellationToken) -> Self {
        let bar = ProgressBar::new_spinner();
        if let Ok(style) = ProgressStyle::with_template("{spinner} {msg}{bytes} read") {
            bar.set_style(style);
        }
        Self {
            image,
            cancel: cancel.clone(),
            read: Arc::default(),
            bar,
            indexes: Mutex::default(),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.image.parsed.layers().len()
    }

    /// Returns the sum of the stored sizes in bytes.
    pub(super) fn stored_bytes(&self) -> u64 {
        let layers = self.image.parsed.layers().iter();
        layers.map(Descriptor::size).fold(0, u64::saturating_add)
    }

    /// Returns how many stored bytes were read.
    pub(super) fn bytes_read(&self) -> u64 {
        self.read.load(Ordering::Relaxed)
    }

    /// Opens a layer; the bottom is 0.
    pub(super) fn open(&self, layer: usize) -> LayerReader {
        let descriptor = self.image.parsed.layers().get(layer);
        let descriptor = descriptor.ok_or(io::ErrorKind::NotFound)?;
        let opened = self.image.layer(descriptor);
        Ok(Box::new(Counted {
            layer: Cancellable {
                layer: opened.map_err(io::Error::other)??,
                cancel: self.cancel.clone(),
            },
            read: Arc::clone(&self.read),
            bar: self.bar.clone(),
        }))
    }

    /// Opens what concerns `path` of a layer that has an index, or else the layer.
    pub(super) fn open_for(&self, layer: usize, path: Option<&[u8]>) -> LayerReader {
        let index = match path {
            Some(_) => self.index(layer)?,
            None => None,
        };
        match index.zip(path) {
            Some((index, path)) => Ok(indexed::open(index, path, self.fetch(layer)?)),
            None => self.open(layer),
        }
    }

    /// Reads all layers whole from now on.
    pub(super) fn use_no_index(&self) {
        let all = (0..self.len()).map(|layer| (layer, None));
        *self.indexes.lock().unwrap_or_else(PoisonError::into_inner) = all.collect();
    }

    /// Returns the index of a layer, which is read once.
    fn index(&self, layer: usize) -> io::Result<Option<Arc<Index>>> {
        let mut indexes = self.indexes.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = indexes.get(&layer) {
            return Ok(known.clone());
        }
        let descriptor = self.image.parsed.layers().get(layer);
        let descriptor = descriptor.ok_or(io::ErrorKind::NotFound)?;
        let index = match indexed::load(descriptor, &mut self.fetch(layer)?) {
            Ok(index) => index,
            Err(NoIndex::Io(error)) => return Err(error),
            Err(NoIndex::WholeOnly) => {
                tracing::debug!("{}: layers are read whole", NoIndex::WholeOnly);
                None
            }
            Err(NoIndex::Unusable(reason)) => {
                tracing::warn!(
                    layer,
                    "the layer is read whole, its index is not used: {reason}"
                );
                None
            }
        };
        indexes.insert(layer, index.clone());
        Ok(index)
    }

    /// Returns what reads parts of a stored layer.
    fn fetch(&self, layer: usize) -> io::Result<Fetch> {
        let descriptor = self.image.parsed.layers().get(layer);
        let descriptor = descriptor.ok_or(io::ErrorKind::NotFound)?.clone();
        let (image, cancel) = (Arc::clone(&self.image), self.cancel.clone());
        let (read, bar) = (Arc::clone(&self.read), self.bar.clone());
        Ok(Box::new(move |offset, length| {
            if cancel.is_cancelled() {
                return Err(io::Error::other(Cancelled));
            }
            let bytes = image.layer_range(&descriptor, offset, length)?;
            let n = bytes.as_ref().map_or(0, |bytes| bytes.len() as u64);
            read.fetch_add(n, Ordering::Relaxed);
            bar.inc(n);
            Ok(bytes)
        }))
    }
}

impl Drop for Layers {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

struct Counted {
    layer: Cancellable,
    read: Arc<AtomicU64>,
    bar: ProgressBar,
}

impl Read for Counted {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let n = self.layer.read(out)?;
        self.read.fetch_add(n as u64, Ordering::Relaxed);
        self.bar.inc(n as u64);
        Ok(n)
    }
}

struct Cancellable {
    layer: Box<dyn Read + Send>,
    cancel: CancellationToken,
}

impl Read for Cancellable {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if self.cancel.is_cancelled() {
            return Err(io::Error::other(Cancelled));
        }
        self.layer.read(out)
    }
}
