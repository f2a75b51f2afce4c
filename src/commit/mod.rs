//! The save itself: one function that reads as the data flow of the design.

mod base;
mod error;
mod named;
mod outcome;
mod upper;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;

use crate::cancel::Cancel;
use crate::container::{self, Base, Container};
use crate::destination::{BlobWriter, Destination, Target};
use crate::freeze::{self, Frozen};
use crate::job::{Event, Observer, Phase};
pub use crate::layer::Compression;
use crate::layer::{self, Layer, Plan};
use crate::layout;
use crate::manifest;
use crate::registry::{Access, Registries};
use crate::scan::{self, Caps, Report, Scan};

pub use base::{Delivered, Origin};
pub use error::{Error, Kind};
pub use outcome::{BaseOutcome, Metadata, Saved};
pub use upper::Rules;

/// Saves of one layer that are begun again because what failed may pass.
const TRIES: u32 = 3;

/// What becomes of the container while its files are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Pause {
    /// Frozen while the layer is read.
    Full,
    /// Not frozen: files that change while they are read are reported.
    None,
}

/// Everything `upperdeck commit` was asked for, resolved from the flags.
#[derive(Clone, Debug)]
pub struct Options {
    /// CONTAINER as the user wrote it.
    pub container: String,
    /// DESTINATION as the user wrote it.
    pub destination: String,
    /// Author for the history entry and the config.
    pub author: Option<String>,
    /// Message: history comment.
    pub message: Option<String>,
    /// `--change` texts, in order.
    pub changes: Vec<String>,
    /// `--label` K=V.
    pub labels: Vec<(String, String)>,
    /// `--annotation` K=V, on the manifest.
    pub annotations: Vec<(String, String)>,
    /// Freeze or not.
    pub pause: Pause,
    /// The longest the container may stand still; none: no bound.
    pub max_pause: Option<Duration>,
    /// Codec.
    pub compression: Compression,
    /// Level of the codec, within [`Compression::levels`].
    pub level: u32,
    /// Threads; none: all cores.
    pub jobs: Option<usize>,
    /// What goes into the layer.
    pub rules: Rules,
    /// `--base` IMAGE, for `pid:N`: `oci:DIR[:TAG]`, `oci-archive:FILE[:TAG]` or a registry reference.
    pub base: Option<String>,
    /// Clamp times to at most this, in seconds since the epoch; also `created`.
    pub timestamp: Option<i64>,
    /// JSON with all figures.
    pub metadata_file: Option<PathBuf>,
    /// File that gets the manifest's digest.
    pub digestfile: Option<PathBuf>,
}

/// What a save works with besides its options.
struct Context {
    roots: container::Roots,
    registries: Registries,
    observer: Arc<dyn Observer>,
    cancel: Cancel,
    jobs: usize,
    caps: Caps,
}

impl Context {
    fn phase(&self, phase: Phase) {
        self.observer.event(Event::Phase { phase });
    }

    fn warn(&self, code: &str, message: String) {
        self.observer.event(Event::Warning {
            code: code.to_owned(),
            message,
        });
    }
}

/// Saves a running container as an image.
pub async fn commit(
    options: &Options,
    roots: container::Roots,
    access: Access,
    observer: Arc<dyn Observer>,
    cancel: &Cancel,
) -> Result<Saved, Error> {
    // Whatever is under way is dropped on cancellation: uploads are given up, the container thaws.
    let started = Instant::now();
    tokio::select! {
        saved = save(options, roots, access, Arc::clone(&observer), cancel, started) => saved,
        _ = cancel.cancelled() => Err(Error::Cancelled),
    }
}

async fn save(
    options: &Options,
    roots: container::Roots,
    access: Access,
    observer: Arc<dyn Observer>,
    cancel: &Cancel,
    started: Instant,
) -> Result<Saved, Error> {
    let target = Target::for_saving(&options.destination)?;
    let context = Context {
        roots,
        registries: Registries::new(access),
        observer,
        cancel: cancel.clone(),
        jobs: options.jobs.unwrap_or_else(cores),
        caps: options.rules.caps,
    };

    context.phase(Phase::Locating);
    let container = container::find(&context.roots, &options.container)?;
    let (base, layout) = prove_base(&context, &container, options).await?;
    // A destination that takes nothing is found out before anybody's work is stopped for it.
    let destination = Destination::open(&target, &context.registries)?;
    destination.check().await?;
    let found = base::look_up(&destination, &base).await?;

    let taken = take_layer(&context, options, &container, &destination).await?;
    warn_of(&context, &taken);

    context.phase(Phase::Base);
    let delivered = base::bring(
        &context,
        &destination,
        &container,
        &base,
        layout.as_ref(),
        found,
    )
    .await?;

    context.phase(Phase::Finishing);
    let image = assemble(options, &base, &delivered, taken.layer.as_ref())?;
    for warning in &image.warnings {
        context.warn(warning.code, warning.message.clone());
    }
    destination
        .put_blob(image.config.bytes.clone().into(), &image.config.digest)
        .await?;
    let manifest = Bytes::from(image.manifest.bytes.clone());
    let digest = destination
        .put_manifest(manifest, image.manifest.media_type, target.tag())
        .await?;
    let saved = outcome::saved(outcome::Parts {
        target: &target,
        digest,
        image: &image,
        container: &container,
        base: &base,
        delivered,
        taken,
        seconds: started.elapsed().as_secs_f64(),
    });
    outcome::write_files(options, &saved)?;
    Ok(saved)
}

/// Cores that this process may use.
pub fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// The base as the runtime's own state proves it, or as the user named it, then perhaps with a layout that has it.
async fn prove_base(
    context: &Context,
    container: &Container,
    options: &Options,
) -> Result<(Base, Option<layout::Reader>), Error> {
    match &options.base {
        Some(name) => named::base(context, container, name).await,
        None if container.runtime == container::Runtime::Process => Err(Error::BaseNotNamed {
            container: options.container.clone(),
        }),
        None => Ok((container::prove_base(&context.roots, container)?, None)),
    }
}

/// What was read of the container.
struct Taken {
    /// None when nothing had changed.
    layer: Option<Layer>,
    report: Report,
    pause: Option<Duration>,
    /// Somebody else had paused it, and it stays so.
    was_frozen: bool,
}

/// Freeze, scan, plan, stream, thaw. Again from the start when the destination failed in a way that may pass.
async fn take_layer(
    context: &Context,
    options: &Options,
    container: &Container,
    destination: &Destination,
) -> Result<Taken, Error> {
    let mut attempt = 1;
    loop {
        match take_once(context, options, container, destination).await {
            Err(error)
                if error.kind() == Kind::Retryable
                    && error.is_of_destination()
                    && attempt < TRIES =>
            {
                context.warn("again", format!("the layer is made again: {error}"));
                attempt += 1;
            }
            taken => return taken,
        }
    }
}

async fn take_once(
    context: &Context,
    options: &Options,
    container: &Container,
    destination: &Destination,
) -> Result<Taken, Error> {
    context.phase(Phase::Scanning);
    let frozen = freeze(context, options, container)?;
    let was_frozen = frozen.as_ref().is_some_and(Frozen::was_frozen);
    container::recheck(&context.roots, container)?;
    let scan = scan_upper(context, options, container).await?;
    let report = scan.report.clone();
    let plan = Plan::new(Arc::new(scan), options.timestamp);

    let (layer, writer) = if plan.is_empty() {
        (None, None)
    } else {
        context.phase(Phase::Streaming);
        let bound = frozen
            .as_ref()
            .filter(|f| !f.was_frozen())
            .and(options.max_pause);
        let (layer, writer) = stream(
            context,
            (options.compression, options.level),
            plan,
            destination,
            bound,
        )
        .await?;
        (Some(layer), Some(writer))
    };
    container::recheck(&context.roots, container)?;
    // All is read: the container runs on while the destination finishes.
    let pause = frozen.map(Frozen::thaw).transpose()?;
    if let (Some(pause), false) = (pause, was_frozen) {
        context.observer.event(Event::Paused {
            pause_ms: pause.as_secs_f64() * 1000.0,
        });
    }
    if let (Some(layer), Some(writer)) = (&layer, writer) {
        writer.finish(&layer.digest, layer.size).await?;
    }
    Ok(Taken {
        layer,
        report,
        pause,
        was_frozen,
    })
}

fn freeze(
    context: &Context,
    options: &Options,
    container: &Container,
) -> Result<Option<Frozen>, Error> {
    if options.pause == Pause::None {
        return Ok(None);
    }
    let how = freeze::Options {
        host_root: context.roots.host_root.clone(),
        hold: options.max_pause,
        ..freeze::Options::default()
    };
    let frozen = freeze::freeze(container.pid, Some(container.pid_start), &how)?;
    if !frozen.outside().is_empty() {
        let pids = frozen
            .outside()
            .iter()
            .map(u32::to_string)
            .collect::<Vec<_>>()
            .join(", ");
        context.warn(
            "not_frozen",
            format!(
                "processes outside the container's cgroup see its root and are not frozen: {pids}"
            ),
        );
    }
    Ok(Some(frozen))
}

async fn scan_upper(
    context: &Context,
    options: &Options,
    container: &Container,
) -> Result<Scan, Error> {
    let (rules, container) = (options.rules.clone(), container.clone());
    let (jobs, cancel) = (context.jobs, context.cancel.clone());
    let scan = tokio::task::spawn_blocking(move || rules.scan(&container, jobs, &cancel));
    scan.await.map_err(|_| Error::Worker)?
}

/// Makes the layer and hands it on, as it is made. What is returned is all read, and not yet finished.
///
/// Given up when the container, frozen meanwhile, would have to stand still for longer than `bound`.
async fn stream(
    context: &Context,
    (compression, level): (Compression, u32),
    plan: Plan,
    destination: &Destination,
    bound: Option<Duration>,
) -> Result<(Layer, BlobWriter), Error> {
    let mut writer = destination.begin_blob(tokio::runtime::Handle::current())?;
    let observer = Arc::clone(&context.observer);
    let (jobs, cancel) = (context.jobs, context.cancel.clone());
    let started = Instant::now();
    let made = tokio::task::spawn_blocking(move || {
        let (bytes_total, entries_total) = (plan.tar_size(), plan.len() as u64);
        let options = layer::Options {
            compression,
            level,
            jobs,
            cancel: cancel.flag(),
        };
        let sink = |bytes| match bound.filter(|&bound| started.elapsed() > bound) {
            Some(bound) => Err(Error::PausedTooLong {
                limit_ms: bound.as_secs_f64() * 1000.0,
            }),
            None => Ok(writer.write(bytes)?),
        };
        let layer = layer::stream::write(&plan, options, sink, &|at| {
            let (bytes_done, bytes_sent) = (at.tar_bytes, at.sent_bytes);
            observer.event(Event::Progress {
                bytes_done,
                bytes_total,
                bytes_sent,
                entries_total,
            });
        });
        // A writer that is dropped leaves nothing behind.
        layer.map(|layer| (layer, writer))
    });
    made.await
        .map_err(|_| Error::Worker)?
        .map_err(|error| match error {
            layer::Error::Sink(source) => match source.downcast::<Error>() {
                Ok(own) => *own,
                Err(source) => layer::Error::Sink(source).into(),
            },
            other => other.into(),
        })
}

/// What the user should hear of without asking.
fn warn_of(context: &Context, taken: &Taken) {
    for file in taken.layer.iter().flat_map(|layer| &layer.unstable) {
        let what = match file.what {
            layer::block::Instability::Changed => "was written to while it was read",
            layer::block::Instability::Shrank => {
                "became shorter while it was read; the rest is zeros"
            }
            layer::block::Instability::Grew => {
                "became longer while it was read; what was added is not in the image"
            }
            layer::block::Instability::Vanished => {
                "vanished before it was read; its content is zeros"
            }
        };
        context.warn("unstable_file", format!("/{} {what}", file.path));
    }
    for path in &taken.report.vanished {
        context.warn(
            "unstable_file",
            format!("/{path} vanished while the tree was walked"),
        );
    }
    for path in &taken.report.privileged {
        context.warn(
            "privileged_file",
            format!(
                "/{path} is setuid, setgid or has file capabilities, which the base does not have"
            ),
        );
    }
    if !taken.report.sockets.is_empty() {
        let (count, first) = (taken.report.sockets.len(), &taken.report.sockets[0]);
        context.warn(
            "sockets",
            format!("{count} sockets cannot be in an image and are left out, e.g. /{first}"),
        );
    }
    for (name, count) in &taken.report.dropped_xattrs {
        context.warn(
            "xattrs",
            format!("the attribute {name} of {count} entries belongs to the host and is left out"),
        );
    }
    let kept_out =
        |reason: &scan::Reason| matches!(reason, scan::Reason::Credential | scan::Reason::Cache);
    let excluded: Vec<_> = taken
        .report
        .excluded
        .iter()
        .filter(|e| kept_out(&e.reason))
        .collect();
    if let Some(first) = excluded.first() {
        context.warn(
            "excluded",
            format!(
                "{} paths with credentials or caches are left out, e.g. /{} (--include-credentials, --include-caches)",
                excluded.len(),
                first.path
            ),
        );
    }
}

fn assemble(
    options: &Options,
    base: &Base,
    delivered: &[Delivered],
    layer: Option<&Layer>,
) -> Result<manifest::Image, Error> {
    let base_manifest = base
        .manifest
        .as_ref()
        .map(|manifest| manifest::BaseManifest {
            bytes: &manifest.bytes,
            media_type: &manifest.media_type,
            digest: manifest.digest,
        });
    let now = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |t| t.as_secs() as i64);
    Ok(manifest::assemble(&manifest::Input {
        base_manifest,
        base_config: &base.config,
        base_name: base.name.as_deref(),
        base_layers: delivered.iter().map(Delivered::layer).collect(),
        layers: layer
            .map(|layer| manifest::NewLayer {
                layer: manifest::Layer {
                    descriptor: base::descriptor(layer.media_type, layer.digest, layer.size),
                    diff_id: layer.diff_id,
                },
                created_by: None,
            })
            .into_iter()
            .collect(),
        changes: &options.changes,
        labels: &options.labels,
        annotations: &options.annotations,
        author: options.author.as_deref(),
        message: options.message.as_deref(),
        created: options.timestamp.unwrap_or(now),
        created_by: "upperdeck commit",
    })?)
}
