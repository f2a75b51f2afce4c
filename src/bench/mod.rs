//! `upperdeck bench`: measures each stage of a save on this node, computes the resulting limit, and compares a save
//! with it.
//!
//! The functions measured are those that a save consists of (`stages`). They alternate over several rounds, so that
//! disturbances of the machine affect all of them alike (`measure`). The rest is arithmetic on the results (`limit`,
//! `advice`).

pub(crate) mod advice;
pub mod clock;
pub(crate) mod limit;
mod measure;
mod registry_process;
pub(crate) mod report;
pub mod stages;
pub mod tree;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use registry_process::RegistryProcess;
use report::{Report, Subject};
use stages::{Setting, Sink, Source};
use tree::Tree;

use measure::Bench;
use tokio_util::sync::CancellationToken;

use crate::common::cancel::Cancelled;
use crate::common::escape;
use crate::layer::Plan;
use crate::node::container::{self, Roots};
use crate::save::{self, Rules};
use crate::store::destination::{self, Target};
use crate::store::registry::{Access, Reference, Registries};

/// An error of the benchmark.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Access to the container, tree, layer or registry failed as it would in a save.
    #[error(transparent)]
    Save(#[from] save::Error),
    /// The generated tree, or the file that a save is written to, cannot be written.
    #[error("cannot write below {path}: {source}; name another directory with --scratch")]
    Scratch {
        /// The path.
        path: String,
        /// The cause.
        source: io::Error,
    },
    /// The container or directory has no changes.
    #[error(
        "{name} contains nothing that goes into a layer: name another directory, or none for a generated tree"
    )]
    Empty {
        /// Name of the container or directory.
        name: String,
    },
    /// The I/O threads cannot be started.
    #[error("cannot start the I/O threads: {0}")]
    Runtime(#[source] io::Error),
    /// Cancelled by SIGINT or SIGTERM.
    #[error(transparent)]
    Cancelled(#[from] Cancelled),
}

impl Error {
    fn io(path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = escape::text(&path.display().to_string());
        move |source| Self::Scratch { path, source }
    }
}

/// The tree to measure on.
#[derive(Clone, Debug)]
pub(crate) enum BenchTree {
    /// A container, as named by the user.
    Container(String),
    /// A directory.
    Directory(PathBuf),
    /// A generated tree of this size in bytes.
    Generated(u64),
}

/// Options of the benchmark.
#[derive(Clone, Debug)]
pub(crate) struct Options {
    /// The tree to measure on.
    pub(crate) tree: BenchTree,
    /// Rules for the content of the layer.
    pub(crate) rules: Rules,
    /// Directory for the generated tree and the unnamed file.
    pub(crate) scratch: PathBuf,
    /// Registry for test uploads, and the access to it.
    pub(crate) registry: Option<(Reference, Access)>,
    /// Number of rounds, at least 1.
    pub(crate) rounds: usize,
    /// Workers of the whole saves; if `None`, one per core.
    pub(crate) jobs: Option<usize>,
    /// Codec and level of the whole saves.
    pub(crate) setting: Setting,
    /// Further codecs and levels to measure.
    pub(crate) settings: Vec<Setting>,
    /// Times later than this are replaced by it.
    pub(crate) timestamp: Option<i64>,
    /// Tar bytes after which whole saves begin another layer, see [`save::split_plan`].
    pub(crate) layer_size: Option<save::LayerSize>,
}

/// Runs the benchmark. `progress` is called with a short description of each step.
pub(crate) fn run(
    options: &Options,
    roots: &Roots,
    cancel: &CancellationToken,
    progress: &dyn Fn(&str),
) -> Result<Report, Error> {
    let (source, kind, name, tree) = subject(options, roots, cancel, progress)?;
    let upload = options
        .registry
        .as_ref()
        .map(|(to, access)| Upload::open(to, access))
        .transpose()?;
    let bench = Bench {
        options,
        source,
        cancel,
        progress,
        cores: save::cores(),
        jobs: options.jobs.unwrap_or_else(save::cores),
        upload: upload.as_ref(),
    };
    progress("reading the tree once");
    let scan = bench.source.scan(&options.rules, bench.jobs, cancel)?;
    let plan = Plan::new(Arc::new(scan), options.timestamp);
    if plan.is_empty() {
        return Err(Error::Empty { name });
    }
    let subject = Subject {
        kind,
        name,
        entries: plan.len() as u64,
        tar_bytes: plan.tar_size(),
        sample_bytes: 0,
    };
    let report = bench.measure(&plan, subject)?;
    // A failure to remove the tree is reported, unless there is another error already.
    tree.map_or(Ok(()), Tree::remove)?;
    Ok(report)
}

type ResolvedSubject = (Source, &'static str, String, Option<Tree>);

fn subject(
    options: &Options,
    roots: &Roots,
    cancel: &CancellationToken,
    progress: &dyn Fn(&str),
) -> Result<ResolvedSubject, Error> {
    Ok(match &options.tree {
        BenchTree::Container(name) => {
            let container = container::find(roots, name).map_err(save::Error::from)?;
            let id = container.id.clone();
            (
                Source::Container(Box::new(container)),
                "container",
                id,
                None,
            )
        }
        BenchTree::Directory(directory) => {
            let name = escape::text(&directory.display().to_string());
            (
                Source::Directory(directory.clone()),
                "directory",
                name,
                None,
            )
        }
        BenchTree::Generated(bytes) => {
            let tree = Tree::generate(&options.scratch, *bytes, cancel, &|done| {
                progress(&format!(
                    "making a tree: {} of {} MB",
                    done / 1_000_000,
                    bytes / 1_000_000
                ));
            })?;
            let source = Source::Directory(tree.path().to_owned());
            (source, "generated", "tree".to_owned(), Some(tree))
        }
    })
}

/// A registry for test uploads.
struct Upload {
    place: Sink,
    registry_process: RegistryProcess,
    // Last, because the requests of `place` run on it.
    _runtime: tokio::runtime::Runtime,
}

impl Upload {
    /// Opens the repository. Fails if it cannot be pushed to.
    fn open(to: &Reference, access: &Access) -> Result<Self, Error> {
        let of_registry = |error| save::Error::from(destination::Error::from(error));
        let runtime = tokio::runtime::Runtime::new().map_err(Error::Runtime)?;
        let repository = Registries::new(access.clone())
            .push_to(to)
            .map_err(of_registry)?;
        runtime
            .block_on(repository.check_push())
            .map_err(of_registry)?;
        Ok(Self {
            place: Sink::Registry(repository, runtime.handle().clone()),
            registry_process: RegistryProcess::find(&to.host),
            _runtime: runtime,
        })
    }
}

/// Parses the value of `--registry`. There is no tag, because no image is saved.
pub(crate) fn registry(text: &str) -> Result<Reference, save::Error> {
    match Target::for_saving(text)? {
        Target::Registry(reference) => Ok(reference),
        _ => Err(destination::TargetError::Transport(text.chars().take(200).collect()).into()),
    }
}
