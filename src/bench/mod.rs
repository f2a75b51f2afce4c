//! `upperdeck bench`: what each stage of a save does on this node, the limit that follows, how near a save comes to it.
//!
//! Measured are the functions that saves are made of (`stages`), alternating, several rounds, so that a noisy machine
//! hits all alike (`measure`); what follows from the figures is arithmetic (`limit`, `advice`).

pub mod advice;
pub mod clock;
pub mod limit;
mod measure;
mod neighbour;
pub mod report;
pub mod stages;
pub mod tree;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use neighbour::Neighbour;
use report::{Report, Subject};
use stages::{Place, Setting, Source};
use tree::Tree;

use measure::Bench;

use crate::cancel::{Cancel, Cancelled};
use crate::commit::{self, Rules};
use crate::container::{self, Roots};
use crate::destination::{self, Target};
use crate::escape;
use crate::layer::Plan;
use crate::registry::{Access, Reference, Registries};

/// Why there are no figures.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The container, the tree, the layer or the registry: as a save would fail.
    #[error(transparent)]
    Save(#[from] commit::Error),
    /// The generated tree, or the file that a save is written to.
    #[error("cannot write below {path}: {source}; name another directory with --scratch")]
    Scratch {
        /// Where.
        path: String,
        /// What the system said.
        source: io::Error,
    },
    /// The container or directory has no changes.
    #[error(
        "{name} has nothing that a layer would hold: name another, or none for a generated tree"
    )]
    Empty {
        /// Which.
        name: String,
    },
    /// The I/O threads cannot be started.
    #[error("cannot start the I/O threads: {0}")]
    Runtime(#[source] io::Error),
    /// SIGINT or SIGTERM.
    #[error(transparent)]
    Cancelled(#[from] Cancelled),
}

impl Error {
    fn io(path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = escape::text(&path.display().to_string());
        move |source| Self::Scratch { path, source }
    }
}

/// What to measure on.
#[derive(Clone, Debug)]
pub enum On {
    /// CONTAINER as the user wrote it.
    Container(String),
    /// A directory.
    Directory(PathBuf),
    /// A tree of so many bytes.
    Generated(u64),
}

/// Everything `upperdeck bench` was asked for.
#[derive(Clone, Debug)]
pub struct Options {
    /// What to measure on.
    pub on: On,
    /// What would go into the layer.
    pub rules: Rules,
    /// Where the generated tree and the unnamed file are made.
    pub scratch: PathBuf,
    /// Where uploads are tried.
    pub registry: Option<(Reference, Access)>,
    /// How often, at least 1.
    pub rounds: usize,
    /// Workers of the whole saves; none: all cores.
    pub jobs: Option<usize>,
    /// Of the whole saves.
    pub setting: Setting,
    /// Measured besides.
    pub settings: Vec<Setting>,
    /// Times later than this become it.
    pub timestamp: Option<i64>,
    /// Tar bytes after which whole saves begin another layer, see [`commit::cut`].
    pub layer_size: Option<commit::LayerSize>,
}

/// Measures. `told` hears in a few words what is being done.
pub fn run(
    options: &Options,
    roots: &Roots,
    cancel: &Cancel,
    told: &dyn Fn(&str),
) -> Result<Report, Error> {
    let (source, kind, name, tree) = subject(options, roots, cancel, told)?;
    let upload = options
        .registry
        .as_ref()
        .map(|(to, access)| Upload::open(to, access))
        .transpose()?;
    let bench = Bench {
        options,
        source,
        cancel,
        told,
        cores: commit::cores(),
        jobs: options.jobs.unwrap_or_else(commit::cores),
        upload: upload.as_ref(),
    };
    told("reading the tree once");
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
    // Said if it cannot be done; on the way out of an error it goes silently.
    tree.map_or(Ok(()), Tree::remove)?;
    Ok(report)
}

type Found = (Source, &'static str, String, Option<Tree>);

fn subject(
    options: &Options,
    roots: &Roots,
    cancel: &Cancel,
    told: &dyn Fn(&str),
) -> Result<Found, Error> {
    Ok(match &options.on {
        On::Container(name) => {
            let container = container::find(roots, name).map_err(commit::Error::from)?;
            let id = container.id.clone();
            (
                Source::Container(Box::new(container)),
                "container",
                id,
                None,
            )
        }
        On::Directory(directory) => {
            let name = escape::text(&directory.display().to_string());
            (
                Source::Directory(directory.clone()),
                "directory",
                name,
                None,
            )
        }
        On::Generated(bytes) => {
            let tree = Tree::generate(&options.scratch, *bytes, cancel, &|done| {
                told(&format!(
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

/// A registry to try uploads on.
struct Upload {
    place: Place,
    neighbour: Neighbour,
    // Last: the place's requests run on it.
    _runtime: tokio::runtime::Runtime,
}

impl Upload {
    /// Refused here and now where one may not push.
    fn open(to: &Reference, access: &Access) -> Result<Self, Error> {
        let of_registry = |error| commit::Error::from(destination::Error::from(error));
        let runtime = tokio::runtime::Runtime::new().map_err(Error::Runtime)?;
        let repository = Registries::new(access.clone())
            .push_to(to)
            .map_err(of_registry)?;
        runtime
            .block_on(repository.check_push())
            .map_err(of_registry)?;
        Ok(Self {
            place: Place::Registry(repository, runtime.handle().clone()),
            neighbour: Neighbour::find(&to.host),
            _runtime: runtime,
        })
    }
}

/// `HOST/REPO` as `--registry` takes it: nothing is saved, so there is no tag.
pub fn registry(text: &str) -> Result<Reference, commit::Error> {
    match Target::for_saving(text)? {
        Target::Registry(reference) => Ok(reference),
        _ => Err(destination::TargetError::Transport(text.chars().take(200).collect()).into()),
    }
}
