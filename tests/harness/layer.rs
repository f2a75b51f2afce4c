//! Creates layers with the library, in the one place where tests do so.

use std::convert::Infallible;
use std::path::PathBuf;
use std::sync::Arc;

use tokio_util::sync::CancellationToken;
use upperdeck::layer::scan::{Caps, Exclusions, Options, Roots, Rules, Scan};
use upperdeck::layer::{self, Compression, Layer, Part, Plan};
use upperdeck::node::overlay::id_map::IdMapping;
use upperdeck::node::overlay::volume::Volume;
use upperdeck::node::overlay::xattr::Namespace;

/// The input of a layer.
pub struct Source {
    /// The upper directory.
    pub upper: PathBuf,
    /// Lower directories, topmost first.
    pub lowers: Vec<PathBuf>,
    /// Data-only lower directories.
    pub data_only: Vec<PathBuf>,
    /// Lower directories that are ID-mapped.
    pub id_mapped: Vec<PathBuf>,
    /// Whether `lowers` is complete.
    pub lowers_known: bool,
    /// Namespace of the overlay's extended attributes.
    pub namespace: Namespace,
    /// UID map of the container.
    pub uid_map: Vec<IdMapping>,
    /// GID map of the container.
    pub gid_map: Vec<IdMapping>,
    /// Mount points in the container, absolute.
    pub mounts: Vec<String>,
    /// Those of them that are saved in layers of their own.
    pub saved: Vec<String>,
    /// A volume that is scanned instead of `upper`.
    pub volume: Option<Volume>,
    /// `--exclude` patterns.
    pub exclude: Vec<String>,
    /// Whether credentials, caches and remains of the GPU hook are left out.
    pub policy: bool,
    /// `--timestamp`.
    pub timestamp: Option<i64>,
}

impl Source {
    /// Creates a source from an upper directory and lower directories.
    #[allow(
        dead_code,
        reason = "each test program compiles this module and uses what it needs"
    )]
    pub fn new(upper: PathBuf, lowers: Vec<PathBuf>, namespace: Namespace) -> Self {
        Self {
            upper,
            lowers,
            data_only: Vec::new(),
            id_mapped: Vec::new(),
            lowers_known: true,
            namespace,
            uid_map: Vec::new(),
            gid_map: Vec::new(),
            mounts: Vec::new(),
            saved: Vec::new(),
            volume: None,
            exclude: Vec::new(),
            policy: false,
            timestamp: None,
        }
    }
}

/// A layer and its content.
pub struct BuiltLayer {
    /// Description by the library.
    pub layer: Layer,
    /// The compressed bytes.
    pub bytes: Vec<u8>,
    /// Whether the plan has nothing to save.
    #[allow(
        dead_code,
        reason = "each test program compiles this module and uses what it needs"
    )]
    pub empty: bool,
}

/// Returns the complete error message, as a user would see it.
fn message(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

/// Creates a layer.
pub fn make(source: &Source, compression: Compression, jobs: usize) -> Result<BuiltLayer, String> {
    let plan = plan(source, jobs)?;
    let empty = plan.is_empty();
    let mut layers = write(&[plan], compression, jobs)?;
    let (layer, bytes) = layers.pop().ok_or("no layer")?;
    Ok(BuiltLayer {
        layer,
        bytes,
        empty,
    })
}

/// Creates several layers of about `size` bytes of tar, in the order in which they are applied.
#[allow(
    dead_code,
    reason = "each test program compiles this module and uses what it needs"
)]
pub fn make_cut(source: &Source, size: u64) -> Result<Vec<(Layer, Vec<u8>)>, String> {
    write(&plan(source, 2)?.split(size), Compression::None, 2)
}

fn plan(source: &Source, jobs: usize) -> Result<Plan, String> {
    let scan = scan(source, jobs, None)?;
    Ok(Plan::new(Arc::new(scan), source.timestamp))
}

/// Creates one layer of everything that a scan emits.
#[allow(
    dead_code,
    reason = "each test program compiles this module and uses what it needs"
)]
pub fn layer_of(scan: Scan) -> Result<BuiltLayer, String> {
    let plan = Plan::new(Arc::new(scan), None);
    let empty = plan.is_empty();
    let mut layers = write(&[plan], Compression::None, 2)?;
    let (layer, bytes) = layers.pop().ok_or("no layer")?;
    Ok(BuiltLayer {
        layer,
        bytes,
        empty,
    })
}

/// Scans the source, incrementally if there is an earlier scan.
pub fn scan(source: &Source, jobs: usize, earlier: Option<&Scan>) -> Result<Scan, String> {
    let mounts: Vec<Vec<u8>> = source
        .mounts
        .iter()
        .map(|mount| mount.as_bytes().to_vec())
        .collect();
    let saved: Vec<Vec<u8>> = source
        .saved
        .iter()
        .map(|mount| mount.as_bytes().to_vec())
        .collect();
    let rules = Rules {
        mounts: &mounts,
        saved: &saved,
        user: &source.exclude,
        credentials: source.policy,
        caches: source.policy,
        gpu: source.policy,
        of_image: false,
    };
    let exclusions = Exclusions::new(rules).map_err(|error| message(&error))?;
    let roots = Roots {
        upper: source.upper.clone(),
        lowers: source.lowers.clone(),
        data_only: source.data_only.clone(),
        id_mapped: source.id_mapped.clone(),
        lowers_known: source.lowers_known,
        namespace: source.namespace,
        volume: source.volume.clone(),
    };
    let cancel = CancellationToken::new();
    let options = Options {
        jobs,
        uid_map: &source.uid_map,
        gid_map: &source.gid_map,
        exclusions: &exclusions,
        caps: Caps::default(),
        runtime_root_mode: None,
        cancel: &cancel,
    };
    if let Some(earlier) = earlier
        && let Some(scan) =
            Scan::rescan(earlier, &roots, &options).map_err(|error| message(&error))?
    {
        return Ok(scan);
    }
    Scan::new(&roots, &options).map_err(|error| message(&error))
}

fn write(
    plans: &[Plan],
    compression: Compression,
    jobs: usize,
) -> Result<Vec<(Layer, Vec<u8>)>, String> {
    let cancel = CancellationToken::new();
    let options = layer::Options {
        compression,
        level: compression.default_level(),
        jobs,
        cancel: &cancel,
    };
    let mut bytes = vec![Vec::new(); plans.len()];
    let parts = plans.iter().zip(&mut bytes).map(|(plan, bytes)| Part {
        plan,
        sink: |chunk: bytes::Bytes| {
            bytes.extend_from_slice(&chunk);
            Ok::<(), Infallible>(())
        },
    });
    let layers = layer::stream::write_all(parts.collect(), options, &|_| ());
    layers
        .into_iter()
        .zip(bytes)
        .map(|(layer, bytes)| Ok((layer.map_err(|error| message(&error))?, bytes)))
        .collect()
}
