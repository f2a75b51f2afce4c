//! The result of a save: the reference for stdout and all figures for `--metadata-file`.

use std::os::unix::ffi::OsStrExt as _;
use std::path::PathBuf;

use serde::Serialize;

use super::changes::Changes;
use super::{CapturedTrees, Delivered, Error, Options};
use crate::common::digest::{DiffId, Digest};
use crate::common::escape;
use crate::common::private_files::{self, FileMode};
use crate::image::manifest::Image;
use crate::image::packages::Packages;
use crate::layer::content::Unstable;
use crate::layer::scan::{Example, Report, Sample};
use crate::node::container::{Base, Container, MountPoint, Pod, Runtime, Volume};
use crate::store::destination::Target;

/// Version of [`Metadata`]. It is incremented when a field changes its meaning or is removed, not when one is added.
pub(crate) const METADATA_VERSION: u32 = 3;

/// A finished save.
#[derive(Clone, Debug)]
pub(crate) struct Saved {
    /// `HOST/REPO@sha256:…`, or the layout's path with the digest.
    pub(crate) reference: String,
    /// Digest of the manifest.
    pub(crate) digest: Digest,
    /// All figures.
    pub(crate) metadata: Metadata,
}

/// All figures of a save. Sizes are in bytes, times in the unit of their name.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Metadata {
    /// Version of this structure: `METADATA_VERSION`.
    pub(crate) version: u32,
    /// The reference, as on stdout.
    pub(crate) reference: String,
    /// The destination, with the tag.
    pub(crate) destination: String,
    /// Digest of the manifest.
    pub(crate) digest: Digest,
    /// Digest of the config.
    pub(crate) config_digest: Digest,
    /// Sum of the compressed sizes of all layers.
    pub(crate) size_bytes: u64,
    /// Size of the config.
    pub(crate) config_size_bytes: u64,
    /// The container that was saved.
    pub(crate) container: ContainerOutcome,
    /// The base of the image.
    pub(crate) base: BaseOutcome,
    /// The layers that were added, bottom first; empty if nothing had changed.
    pub(crate) layers: Vec<LayerOutcome>,
    /// Number of layers above the base, including those of earlier saves that this one builds on.
    pub(crate) layers_above_base: usize,
    /// Time from the write of the freeze to the read-back of the thaw; `None` if nothing was frozen.
    pub(crate) pause_ms: Option<f64>,
    /// Whether another program had paused the container, which then is still paused.
    pub(crate) was_paused: bool,
    /// What is not in the image, and the reasons.
    #[serde(flatten)]
    pub(crate) report: Report,
    /// Files that changed while they were read.
    pub(crate) unstable: Vec<Unstable>,
    /// Volumes that are mounted and were not saved.
    pub(crate) volumes: Sample<VolumeOutcome>,
    /// Mount points of the volumes that were saved. The layers above the base contain them after the container's own
    /// changes.
    pub(crate) saved_volumes: Vec<PathBuf>,
    /// What was added, changed and removed; `None` if layers on top of the earlier save could not express it.
    pub(crate) changes: Option<Changes>,
    /// The packages by which the image differs from its base.
    pub(crate) packages: Packages,
    /// Duration of the whole save.
    pub(crate) seconds: f64,
}

/// A volume that is not in the image.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub(crate) struct VolumeOutcome {
    /// Its mount point in the container, with control characters escaped.
    pub(crate) destination: String,
    /// File system type.
    pub(crate) kind: String,
    /// Its source, as reported by the runtime or the kernel.
    pub(crate) source: String,
}

impl Example for VolumeOutcome {
    fn bytes(&self) -> usize {
        self.destination.len() + self.kind.len() + self.source.len()
    }
}

impl VolumeOutcome {
    fn new(mount: &MountPoint) -> Self {
        Self {
            destination: escape::path(mount.destination.as_os_str().as_bytes()),
            kind: mount.kind.clone(),
            source: escape::limited(&mount.source, 4096),
        }
    }
}

/// The container that was saved.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct ContainerOutcome {
    /// The runtime.
    pub(crate) runtime: Runtime,
    /// Its ID.
    pub(crate) id: String,
    /// Its names.
    pub(crate) names: Vec<String>,
    /// Its pod.
    pub(crate) pod: Option<Pod>,
}

/// The base of the image.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct BaseOutcome {
    /// Reference under which it was pulled.
    pub(crate) name: Option<String>,
    /// Digest of its manifest, if the runtime keeps one.
    pub(crate) digest: Option<Digest>,
    /// The kind of proof.
    pub(crate) proof: String,
    /// Its layers, bottom first, and the source of each.
    pub(crate) layers: Vec<Delivered>,
}

/// A layer that a save added.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct LayerOutcome {
    /// Digest of the compressed bytes.
    pub(crate) digest: Digest,
    /// Digest of the tar (diff ID).
    pub(crate) diff_id: DiffId,
    /// Media type of the compressed bytes.
    pub(crate) media_type: String,
    /// Compressed size.
    pub(crate) size_bytes: u64,
    /// Size of the tar.
    pub(crate) tar_size_bytes: u64,
    /// Number of entries.
    pub(crate) entries: usize,
}

pub(super) struct Parts<'a> {
    pub(super) target: &'a Target,
    pub(super) digest: Digest,
    pub(super) image: &'a Image,
    pub(super) container: &'a Container,
    pub(super) volumes: &'a [Volume],
    pub(super) base: &'a Base,
    pub(super) delivered: Vec<Delivered>,
    pub(super) packages: Packages,
    pub(super) taken: &'a CapturedTrees,
    pub(super) layers_above_base: usize,
    pub(super) seconds: f64,
}

pub(super) fn saved(parts: Parts<'_>) -> Saved {
    let Parts {
        target,
        digest,
        image,
        container,
        volumes,
        base,
        delivered,
        packages,
        taken,
        layers_above_base,
        seconds,
    } = parts;
    let reference = target.with_digest(&digest);
    let (mut unstable, mut layers) = (Vec::new(), Vec::new());
    for layer in &taken.layers {
        unstable.extend(layer.unstable.iter().cloned());
        layers.push(LayerOutcome {
            digest: layer.digest,
            diff_id: layer.diff_id,
            media_type: layer.media_type.to_owned(),
            size_bytes: layer.size,
            tar_size_bytes: layer.tar_size,
            entries: layer.entries,
        });
    }
    let metadata = Metadata {
        version: METADATA_VERSION,
        reference: reference.clone(),
        destination: target.to_string(),
        digest,
        config_digest: image.config.digest,
        size_bytes: image
            .layers
            .iter()
            .map(oci_spec::image::Descriptor::size)
            .sum(),
        config_size_bytes: image.config.bytes.len() as u64,
        container: ContainerOutcome {
            runtime: container.runtime,
            id: container.id.clone(),
            names: container.names.clone(),
            pod: container.pod.clone(),
        },
        base: BaseOutcome {
            name: base.name.clone(),
            digest: base.manifest.as_ref().map(|manifest| manifest.digest),
            proof: base.proof.clone(),
            layers: delivered,
        },
        layers,
        layers_above_base,
        pause_ms: taken
            .pause
            .filter(|_| !taken.was_frozen)
            .map(|pause| pause.as_secs_f64() * 1000.0),
        was_paused: taken.was_frozen,
        report: taken.report.clone(),
        unstable,
        volumes: volumes_left_out(container, volumes)
            .into_iter()
            .map(VolumeOutcome::new)
            .collect(),
        saved_volumes: volumes.iter().map(|v| v.destination.clone()).collect(),
        changes: taken.changes.clone(),
        packages,
        seconds,
    };
    Saved {
        reference,
        digest,
        metadata,
    }
}

/// Returns the volumes that are mounted and not saved.
pub(super) fn volumes_left_out<'a>(
    container: &'a Container,
    saved: &[Volume],
) -> Vec<&'a MountPoint> {
    let mounts = container.mounts.iter().filter(|mount| mount.volume);
    mounts
        .filter(|mount| saved.iter().all(|v| v.destination != mount.destination))
        .collect()
}

/// Writes `--metadata-file` and `--digestfile`.
pub(super) fn write_files(options: &Options, saved: &Saved) -> Result<(), Error> {
    let write = |path: &std::path::Path, bytes: &[u8]| {
        let mode = options.output_mode.unwrap_or(FileMode::PRIVATE);
        private_files::write(path, bytes, mode).map_err(|source| Error::Report {
            reference: saved.reference.clone(),
            path: path.display().to_string(),
            source,
        })
    };
    if let Some(path) = &options.metadata_file {
        let mut json = serde_json::to_vec_pretty(&saved.metadata).map_err(|e| Error::Report {
            reference: saved.reference.clone(),
            path: path.display().to_string(),
            source: e.into(),
        })?;
        json.push(b'\n');
        write(path, &json)?;
    }
    if let Some(path) = &options.digestfile {
        write(path, saved.digest.to_string().as_bytes())?;
    }
    Ok(())
}
