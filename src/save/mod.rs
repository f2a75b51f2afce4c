//! Saves a container: one function that follows the data flow of the design.

mod base;
mod earlier;
mod error;
pub(crate) mod event;
mod gate;
mod in_flight_writes;
mod live;
mod mapped;
mod named;
mod next;
mod outcome;
mod room;
pub mod state_store;
mod trees;
mod upper;
mod warnings;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;

use crate::common::private_files::FileMode;
use crate::image::manifest;
pub(crate) use crate::layer::Compression;
use crate::layer::scan::{Caps, Report, Scan};
use crate::layer::{self, Layer, Part, Plan};
use crate::node::background::{Background, NormalPriority};
use crate::node::container::{self, Base, Container, Volume, VolumeRules};
use crate::node::freeze::{self, Frozen};
use crate::save::event::{Event, Observer, Phase};
use crate::store::destination::{BlobWriter, Destination, Target};
use crate::store::layout;
use crate::store::registry::{Access, Registries};

use earlier::Earlier;
use room::Room;
use tokio_util::sync::CancellationToken;
use trees::Baseline;

pub(crate) use base::Delivered;
pub(crate) use error::Error;
pub(crate) use gate::Gate;
pub(crate) use live::MAX_PAUSE;
pub(crate) use next::{Kind as NextKind, NextSave, NextSaveOptions, next_save};
pub(crate) use outcome::Saved;
pub use upper::Rules;

/// Attempts at a save whose layers were read under a freeze but could not be finished, if the error may pass.
const MAX_ATTEMPTS: u32 = 3;
/// Pause before the parts of an image are looked for again, times the number of attempts.
const PAUSE: Duration = Duration::from_secs(1);
/// Interval of looks for the end of another save's freeze.
const TURN: Duration = Duration::from_millis(50);
/// Size in tar bytes from which a save is divided into several layers by default, and the size of each: SHA-256 of that
/// much takes one core four seconds, and fewer layers are better for all consumers.
const SPLIT_THRESHOLD: u64 = 8 << 30;
const SPLIT_LAYER_SIZE: u64 = 4 << 30;
/// Number of cores that one core's SHA-256 keeps busy: fewer with a fast codec, more with a thorough one.
const CORES_PER_LAYER: usize = 4;
/// Maximum number of layers that are made concurrently.
const MAX_CONCURRENT_LAYERS: usize = 4;
/// Minimum size of a layer in tar bytes, whatever the number of cores: a sixth of a second of SHA-256.
const MIN_LAYER_SIZE: u64 = 256 << 20;

/// When another layer is begun.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum LayerSize {
    /// After this many bytes of tar; 0 means never.
    Bytes(u64),
    /// So that as many layers are hashed concurrently as keep this machine's cores busy. The image then differs between
    /// machines with different numbers of cores, so this is not the default.
    ByCores,
}

/// What happens to the container while its files are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Pause {
    /// Frozen for an instant, to take what changed while the rest was read and delivered.
    Live,
    /// Frozen while the layer is read.
    Full,
    /// Not frozen: files that change while they are read are reported.
    None,
}

/// The options of `upperdeck commit`, resolved from the flags.
#[derive(Clone, Debug)]
pub(crate) struct Options {
    /// CONTAINER as the user wrote it.
    pub(crate) container: String,
    /// DESTINATION as the user wrote it.
    pub(crate) destination: String,
    /// Author for the history entry and the config.
    pub(crate) author: Option<String>,
    /// Message, for the history comment.
    pub(crate) message: Option<String>,
    /// Texts of `--change`, in order.
    pub(crate) changes: Vec<String>,
    /// Whether the image that the tag moves away from is deleted in Harbor, if nothing needs it.
    pub(crate) delete_replaced: bool,
    /// `--label` K=V.
    pub(crate) labels: Vec<(String, String)>,
    /// `--annotation` K=V, on the manifest.
    pub(crate) annotations: Vec<(String, String)>,
    /// Whether to freeze the container.
    pub(crate) pause: Pause,
    /// The longest time for which the container may be frozen. `None` or zero means no limit.
    pub(crate) max_pause: Option<Duration>,
    /// Maximum bytes of changes that may be kept in memory while the container runs.
    pub(crate) live_limit: u64,
    /// Directory for what the next save needs. `None` means that nothing is kept.
    pub(crate) state_dir: Option<PathBuf>,
    /// Maximum number of layers above the base, those of a full save counted as one. Beyond it, everything is saved anew.
    pub(crate) max_layers: usize,
    /// Save everything anew in any case.
    pub(crate) full: bool,
    /// The codec.
    pub(crate) compression: Compression,
    /// Level of the codec, within [`Compression::levels`].
    pub(crate) level: u32,
    /// Number of threads. `None` means all cores.
    pub(crate) jobs: Option<usize>,
    /// When another layer is begun. `None` means only if the change set is large, in the same way on every machine.
    pub(crate) layer_size: Option<LayerSize>,
    /// What goes into the layer.
    pub(crate) rules: Rules,
    /// `--include-volume`: mount points of the volumes that are saved too.
    pub(crate) volumes: Vec<PathBuf>,
    /// `--allow-volume`, `--volume-identity`: which of them may be saved, and with whose rights they are read.
    pub(crate) volume_rules: VolumeRules,
    /// `--base` IMAGE, for `pid:N`: `oci:DIR[:TAG]`, `oci-archive:FILE[:TAG]` or a registry reference.
    pub(crate) base: Option<String>,
    /// Maximum for all times, in seconds since the epoch; also the value of `created`.
    pub(crate) timestamp: Option<i64>,
    /// Path of a JSON file for all figures.
    pub(crate) metadata_file: Option<PathBuf>,
    /// Mode of the files that are created: layout, archive, metadata, digest. `None` means readable by the owner alone,
    /// or the mode of an existing layout.
    pub(crate) output_mode: Option<FileMode>,
    /// Path of a file for the manifest's digest.
    pub(crate) digestfile: Option<PathBuf>,
    /// The gate that must open before the tag is set.
    pub(crate) gate: Option<Gate>,
    /// A file that exists while the container may be frozen by this save ([`freeze::Options::mark`]).
    pub(crate) freeze_mark: Option<PathBuf>,
    /// The background priority, which is left while the container is frozen.
    pub(crate) background: Option<Background>,
}

impl Options {
    /// Returns to the usual priority while another program waits for the save.
    fn normal_priority(&self) -> Option<NormalPriority> {
        self.background.as_ref().map(Background::normal_priority)
    }
}

/// The environment of a save besides its options.
struct Context {
    roots: container::Roots,
    registries: Registries,
    observer: Arc<dyn Observer>,
    cancel: CancellationToken,
    jobs: usize,
    caps: Caps,
    /// The room at the destination.
    room: Arc<Room>,
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
pub(crate) async fn commit(
    options: &Options,
    roots: container::Roots,
    access: Access,
    observer: Arc<dyn Observer>,
    cancel: &CancellationToken,
) -> Result<Saved, Error> {
    // On cancellation everything in progress is dropped: uploads are aborted, the container is thawed.
    let started = Instant::now();
    tokio::select! {
        saved = save(options, roots, access, Arc::clone(&observer), cancel, started) => saved,
        () = cancel.cancelled() => Err(Error::Cancelled),
    }
}

async fn save(
    options: &Options,
    roots: container::Roots,
    access: Access,
    observer: Arc<dyn Observer>,
    cancel: &CancellationToken,
    started: Instant,
) -> Result<Saved, Error> {
    let target = check(options)?;
    let mut context = Context {
        roots,
        registries: Registries::new(access),
        observer,
        cancel: cancel.clone(),
        jobs: options.jobs.unwrap_or_else(cores),
        caps: options.rules.caps,
        room: Arc::default(),
    };

    context.phase(Phase::Locating);
    let container = container::find(&context.roots, &options.container)?;
    let volumes = trees::open(
        &context.roots,
        &container,
        &options.volumes,
        &options.volume_rules,
    )?;
    let (base, layout) = prove_base(&context, &container, options).await?;
    manifest::check_changes(&base.config, &options.changes)?;
    // An unusable destination is detected before the container is frozen for it.
    let destination = Destination::open_as(&target, &context.registries, options.output_mode)?;
    destination.check().await?;
    destination.check_tag(target.tag()).await?;
    let of = Of {
        options,
        container: &container,
        volumes: &volumes,
        base: &base,
        layout: layout.as_ref(),
        destination: &destination,
    };
    let mut made = make(&mut context, &of).await?;
    if let Some(gate) = &options.gate {
        context.observer.event(Event::Ready);
        gate.pass().await?;
    }
    let replaced = if options.delete_replaced {
        destination.tagged(target.tag()).await
    } else {
        None
    };
    let mut attempt = 1;
    let digest = loop {
        let manifest = Bytes::from(made.image.manifest.bytes.clone());
        let media_type = made.image.manifest.media_type;
        match destination
            .put_manifest(manifest, media_type, target.tag())
            .await
        {
            Err(error) if attempt < MAX_ATTEMPTS && error.may_lack_blobs() => {
                let why = format!(
                    "the registry may lack parts of the image, which are looked for again: {error}"
                );
                context.warn("again", why);
                tokio::time::sleep(PAUSE * attempt).await;
                attempt += 1;
                if !send_again(&context, &of, &mut made).await? {
                    // The lock on what is kept of the container is taken anew.
                    drop(made);
                    made = make(&mut context, &of).await?;
                }
            }
            digest => break digest?,
        }
    };
    if let Some(replaced) = replaced.filter(|&old| old != digest)
        && let Err(error) = destination.delete_replaced(&replaced).await
    {
        let why = format!("the image that had the tag before stays, without a tag: {error}");
        context.warn("replaced_kept", why);
    }
    let Made {
        earlier,
        taken,
        delivered,
        image,
    } = made;
    earlier.keep(&context, &container, &target, &taken);
    let saved = outcome::saved(outcome::Parts {
        target: &target,
        digest,
        image: &image,
        container: &container,
        volumes: &volumes,
        base: &base,
        delivered,
        layers_above_base: earlier.layers(&taken).len(),
        taken,
        seconds: started.elapsed().as_secs_f64(),
    });
    outcome::write_files(options, &saved)?;
    Ok(saved)
}

/// What is saved, and where.
struct Of<'s> {
    options: &'s Options,
    container: &'s Container,
    volumes: &'s [Volume],
    base: &'s Base,
    layout: Option<&'s layout::Reader>,
    destination: &'s Destination,
}

/// An image that is at its destination except for its manifest.
struct Made {
    earlier: Earlier,
    taken: CapturedTrees,
    delivered: Vec<Delivered>,
    image: manifest::Image,
}

/// Brings everything but the manifest to the destination. What is there already, and what is known to come, is compared
/// with the destination's quota before anything is written or mounted.
async fn make(context: &mut Context, of: &Of<'_>) -> Result<Made, Error> {
    let Of {
        options,
        container,
        volumes,
        base,
        destination,
        ..
    } = *of;
    context.room = Arc::new(Room::of(destination).await?);
    context.room.add(destination, &base.layers).await?;
    let context = &*context;
    let earlier = earlier::find(context, options, container, volumes, base, destination).await?;
    let taken = capture_layers(context, options, container, volumes, destination, &earlier).await?;
    warnings::emit(context, container, volumes, &taken);

    context.phase(Phase::Base);
    let delivered = base::copy_missing(context, destination, container, base, of.layout).await?;

    context.phase(Phase::Finishing);
    let image = assemble(options, base, &delivered, &earlier.layers(&taken))?;
    for warning in &image.warnings {
        context.warn(warning.code, warning.message.clone());
    }
    destination
        .put_blob(image.config.bytes.clone().into(), &image.config.digest)
        .await?;
    Ok(Made {
        earlier,
        taken,
        delivered,
        image,
    })
}

/// Looks for all blobs of an image again, and sends those that can be sent. Returns false if a layer of the container
/// is gone, which only another look at the container can make.
async fn send_again(context: &Context, of: &Of<'_>, made: &mut Made) -> Result<bool, Error> {
    for layer in &made.taken.layers {
        let there = of.destination.has_blob(&layer.digest, Some(layer.size));
        if there.await?.is_none() {
            return Ok(false);
        }
    }
    if !made.earlier.bring_again(context, of.destination).await? {
        return Ok(false);
    }
    let delivered =
        base::copy_missing(context, of.destination, of.container, of.base, of.layout).await?;
    let layers = made.earlier.layers(&made.taken);
    made.image = assemble(of.options, of.base, &delivered, &layers)?;
    made.delivered = delivered;
    let config = &made.image.config;
    of.destination
        .put_blob(config.bytes.clone().into(), &config.digest)
        .await?;
    Ok(true)
}

/// Checks the request by itself, before anything is looked up. Returns the destination.
fn check(options: &Options) -> Result<Target, Error> {
    let target = Target::for_saving(&options.destination)?;
    if let Some(base) = &options.base {
        base.parse::<Target>()?;
    }
    manifest::check(
        &options.changes,
        &options.labels,
        &options.annotations,
        options.timestamp,
    )?;
    options.rules.exclusions(&[])?;
    Ok(target)
}

/// Returns the number of cores that this process may use.
pub fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Returns the base as the runtime's own state proves it, or as the user named it; in the latter case possibly with a
/// layout that contains it.
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
struct CapturedTrees {
    /// The layers in the order in which they are applied; empty if nothing had changed.
    layers: Vec<Layer>,
    /// Whether they go on top of an earlier save's layers.
    on_top: bool,
    report: Report,
    pause: Option<Duration>,
    /// Another program had paused the container, and it stays paused.
    was_frozen: bool,
    /// What the image contains of each tree, for the next save; `None` if that cannot be determined.
    baselines: Option<Vec<Baseline>>,
}

/// Freezes, scans, plans, streams and thaws. Starts again if a blob could not be finished because of an error that may
/// pass: by then the container is running again.
async fn capture_layers(
    context: &Context,
    options: &Options,
    container: &Container,
    volumes: &[Volume],
    destination: &Destination,
    earlier: &Earlier,
) -> Result<CapturedTrees, Error> {
    if options.pause == Pause::Live {
        live::check(context, container)?;
    }
    let mut attempt = 1;
    loop {
        match capture_once(context, options, container, volumes, destination, earlier).await {
            Err(error) if attempt < MAX_ATTEMPTS && error.is_transient_at_destination() => {
                context.warn("again", format!("the layers are made again: {error}"));
                attempt += 1;
            }
            taken => return taken,
        }
    }
}

async fn capture_once(
    context: &Context,
    options: &Options,
    container: &Container,
    volumes: &[Volume],
    destination: &Destination,
    earlier: &Earlier,
) -> Result<CapturedTrees, Error> {
    if options.pause == Pause::Live
        && let Some(taken) =
            live::capture_live(context, options, container, volumes, destination, earlier).await?
    {
        return Ok(taken);
    }
    context.phase(Phase::Scanning);
    let ways = in_flight_writes::write_modes(context, container).await?;
    let normal_priority = options
        .normal_priority()
        .filter(|_| options.pause != Pause::None);
    let frozen = freeze(context, options, container).await?;
    let was_frozen = frozen.as_ref().is_some_and(FrozenGuard::was_frozen);
    trees::recheck(context, container, volumes)?;
    let under = earlier.previous.as_ref().map(|under| &under.known);
    let before = under.map(|known| trees::scans(known));
    let scans = trees::scan(context, options, container, volumes, before, None).await?;
    let report = trees::report(&scans);
    let mut baselines = match frozen {
        Some(_) => baselines_of_frozen(context, container, volumes, &scans)?,
        None => None,
    };
    let changes = under.and_then(|known| trees::changes(known, &scans));
    let on_top = changes.is_some();
    let plans = trees::plans(changes.unwrap_or_else(|| scans.clone()), options.timestamp);
    let bound = frozen
        .as_ref()
        .filter(|f| !f.was_frozen())
        .and(options.max_pause)
        .filter(|bound| !bound.is_zero());
    let plans = match frozen {
        Some(_) => in_flight_writes::prepare_frozen(plans, volumes, ways, bound),
        None => in_flight_writes::prepare_running(plans, volumes, ways),
    };
    let plans = trees::split_plans(plans, options.layer_size);

    let mut made = if plans.is_empty() {
        Vec::new()
    } else {
        context.phase(Phase::Streaming);
        let codec = (options.compression, options.level);
        stream(context, codec, plans, destination, bound).await?
    };
    trees::recheck(context, container, volumes)?;
    // Everything is read: the container resumes while the destination finishes.
    let stood_still = frozen.is_some();
    let pause = frozen.map(FrozenGuard::thaw).transpose()?;
    drop(normal_priority);
    if let (Some(pause), false) = (pause, was_frozen) {
        context.observer.event(Event::Paused {
            pause_ms: pause.as_secs_f64() * 1000.0,
        });
    }
    if stood_still {
        let layers = made.iter_mut().map(|(layer, _)| &mut layer.unstable);
        let unsettled = layers.flat_map(in_flight_writes::take_unsettled).collect();
        in_flight_writes::warn_unsettled(context, &unsettled);
        let files = in_flight_writes::files_of(&scans, &unsettled);
        if let Some(baselines) = &mut baselines {
            baselines
                .iter_mut()
                .enumerate()
                .for_each(|(tree, known)| known.mark_unreliable(tree, &files));
        }
    }
    Ok(CapturedTrees {
        layers: finish(context, made).await?,
        on_top,
        report,
        pause,
        was_frozen,
        baselines,
    })
}

/// Returns what is known of a frozen container, including the files that may be written to without a trace once it
/// runs.
fn baselines_of_frozen(
    context: &Context,
    container: &Container,
    volumes: &[Volume],
    scans: &[Arc<Scan>],
) -> Result<Option<Vec<Baseline>>, Error> {
    let mapped = mapped::list(context, container, volumes)?;
    let tells = mapped.unresolved.is_none();
    Ok(tells.then(|| Baseline::of_scans(scans.to_vec(), &mapped.dirty)))
}

/// Finishes the blobs of layers that have been read completely.
async fn finish(context: &Context, made: Vec<(Layer, BlobWriter)>) -> Result<Vec<Layer>, Error> {
    let size = made.iter().map(|(layer, _)| layer.size).sum();
    context.room.check_exactly(size).await?;
    let finish = |(layer, writer): (Layer, BlobWriter)| async move {
        writer.finish(&layer.digest, layer.size).await?;
        Ok::<_, Error>(layer)
    };
    let layers = futures_util::future::try_join_all(made.into_iter().map(finish)).await?;
    context.room.spend(size);
    Ok(layers)
}

/// Divides a plan into several layers if that was requested, or if one layer would be very large.
pub(crate) fn split_plan(plan: Plan, layer_size: Option<LayerSize>) -> Vec<Plan> {
    match split_size(plan.tar_size(), layer_size, cores()) {
        Some(size) => plan.split(size),
        None => vec![plan],
    }
}

/// Returns the number of tar bytes after which another layer is begun, or `None` if `tar` bytes are not divided.
fn split_size(tar: u64, layer_size: Option<LayerSize>, cores: usize) -> Option<u64> {
    let usual = (tar > SPLIT_THRESHOLD).then_some(SPLIT_LAYER_SIZE);
    match layer_size {
        Some(LayerSize::Bytes(size)) => (size > 0).then_some(size),
        None => usual,
        Some(LayerSize::ByCores) => {
            let layers = (cores / CORES_PER_LAYER).clamp(1, MAX_CONCURRENT_LAYERS) as u64;
            let size = tar.div_ceil(layers).max(MIN_LAYER_SIZE);
            let size = usual.map_or(size, |usual| usual.min(size));
            (size < tar).then_some(size)
        }
    }
}

/// A frozen container. Freezing and thawing may take seconds, for which the other tasks of the async runtime do not
/// wait.
struct FrozenGuard {
    frozen: Option<Frozen>,
    /// StoredSave until the container is thawed, so that no other save of this node takes the freeze for the runtime's.
    _claim: Option<freeze::Claim>,
}

impl FrozenGuard {
    fn was_frozen(&self) -> bool {
        self.frozen.as_ref().is_some_and(Frozen::was_frozen)
    }

    fn thaw(mut self) -> Result<Duration, Error> {
        let frozen = self.frozen.take().ok_or(Error::Worker)?;
        Ok(run_in_place(|| frozen.thaw())?)
    }
}

impl Drop for FrozenGuard {
    fn drop(&mut self) {
        if let Some(frozen) = self.frozen.take() {
            run_in_place(|| drop(frozen));
        }
    }
}

/// Runs blocking work in place, so that it is complete on return. The other tasks of this thread are moved to another
/// thread.
fn run_in_place<T>(work: impl FnOnce() -> T) -> T {
    use tokio::runtime::{Handle, RuntimeFlavor};
    match Handle::try_current().map(|handle| handle.runtime_flavor()) {
        Ok(RuntimeFlavor::MultiThread) => tokio::task::block_in_place(work),
        _ => work(),
    }
}

/// Waits until no other save of this node has the container frozen, and freezes it.
async fn freeze(
    context: &Context,
    options: &Options,
    container: &Container,
) -> Result<Option<FrozenGuard>, Error> {
    if options.pause == Pause::None {
        return Ok(None);
    }
    let how = freeze::Options {
        host_root: context.roots.host_root.clone(),
        max_duration: options.max_pause.filter(|bound| !bound.is_zero()),
        mark: options.freeze_mark.clone(),
        ..freeze::Options::default()
    };
    let claim = claim(context, container, &how).await?;
    let frozen = run_in_place(|| freeze::freeze(container.pid, Some(container.pid_start), &how))?;
    if !frozen.processes_outside().is_empty() {
        let pids = frozen
            .processes_outside()
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
    Ok(Some(FrozenGuard {
        frozen: Some(frozen),
        _claim: claim,
    }))
}

/// Claims the container's freezer. Returns `None` if there is no place for claims.
async fn claim(
    context: &Context,
    container: &Container,
    how: &freeze::Options,
) -> Result<Option<freeze::Claim>, Error> {
    let mut told = false;
    loop {
        match freeze::claim(container.pid, how)? {
            freeze::Claimed::Held(claim) => return Ok(Some(claim)),
            freeze::Claimed::Nowhere => return Ok(None),
            freeze::Claimed::Busy => {}
        }
        if !told {
            let why = "another save has this container frozen: waiting for its end";
            context.warn("waiting", why.to_owned());
            told = true;
        }
        // Cancellation drops this future.
        tokio::time::sleep(TURN).await;
    }
}

/// Makes the layers and passes them on as they are made. The returned layers are read completely but not finished: a
/// frozen container may be thawed before [`finish`].
///
/// Fails if the container, which is frozen meanwhile, would have to stay frozen for longer than `bound`.
async fn stream(
    context: &Context,
    codec: (Compression, u32),
    plans: Vec<Plan>,
    destination: &Destination,
    bound: Option<Duration>,
) -> Result<Vec<(Layer, BlobWriter)>, Error> {
    stream_with_retries(context, codec, plans, destination, bound, FinishTime::Later).await
}

/// Like `stream`, for sources that can be read repeatedly. Also finishes the blobs.
async fn deliver(
    context: &Context,
    codec: (Compression, u32),
    plans: Vec<Plan>,
    destination: &Destination,
) -> Result<Vec<Layer>, Error> {
    let made = stream_with_retries(
        context,
        codec,
        plans,
        destination,
        None,
        FinishTime::Immediately,
    )
    .await?;
    Ok(made.into_iter().map(|(layer, _)| layer).collect())
}

/// When the destination is asked to finish a blob.
#[derive(Clone, Copy, PartialEq, Eq)]
enum FinishTime {
    /// As soon as it is complete: a blob that fails then is made again.
    Immediately,
    /// By the caller, after the container is thawed.
    Later,
}

/// Makes layers again from their plans if their upload failed in a way that may pass.
async fn stream_with_retries(
    context: &Context,
    codec: (Compression, u32),
    plans: Vec<Plan>,
    destination: &Destination,
    bound: Option<Duration>,
    ends: FinishTime,
) -> Result<Vec<(Layer, BlobWriter)>, Error> {
    let until = bound.map(|bound| (Instant::now() + bound, bound));
    let plans = Arc::new(plans);
    let mut made: Vec<Option<(Layer, BlobWriter)>> = plans.iter().map(|_| None).collect();
    let handle = tokio::runtime::Handle::current();
    let begin = |n| Ok((n, destination.begin_blob(handle.clone())?));
    let mut missing = (0..plans.len())
        .map(begin)
        .collect::<Result<Vec<_>, Error>>()?;
    while !missing.is_empty() {
        let mut failed = None;
        let outcomes = stream_once(context, codec, &plans, missing, until).await?;
        if ends == FinishTime::Immediately {
            let whole = outcomes
                .iter()
                .filter_map(|(_, made, _)| made.as_ref().ok());
            let size = whole.map(|layer| layer.size).sum();
            context.room.check_exactly(size).await?;
        }
        let ended = outcomes
            .into_iter()
            .map(|(number, outcome, mut writer)| async move {
                let outcome = match outcome {
                    Ok(layer) if ends == FinishTime::Immediately => {
                        match writer.try_finish(&layer.digest, layer.size).await {
                            Ok(()) => {
                                context.room.spend(layer.size);
                                Ok(layer)
                            }
                            Err(error) => Err(error.into()),
                        }
                    }
                    outcome => outcome,
                };
                (number, outcome, writer)
            });
        missing = Vec::new();
        for (number, outcome, writer) in futures_util::future::join_all(ended).await {
            match outcome {
                Ok(layer) => made[number] = Some((layer, writer)),
                // A layer that was cancelled because another failed for good does not carry the reason.
                Err(Error::Cancelled) if failed.is_some() => {}
                Err(Error::Destination(error)) if error.retryable() => {
                    let said = error.to_string();
                    match writer.retry(error).await {
                        Ok(writer) => {
                            context.warn("again", format!("a layer is made again: {said}"));
                            missing.push((number, writer));
                        }
                        Err(error) => failed = Some(error.into()),
                    }
                }
                Err(error) => failed = Some(error),
            }
        }
        if let Some(error) = failed {
            return Err(error);
        }
    }
    Ok(made.into_iter().flatten().collect())
}

type LayerResult = Result<Layer, Error>;

/// Makes each of the named plans once, concurrently, each into its own writer.
async fn stream_once(
    context: &Context,
    (compression, level): (Compression, u32),
    plans: &Arc<Vec<Plan>>,
    parts: Vec<(usize, BlobWriter)>,
    until: Option<(Instant, Duration)>,
) -> Result<Vec<(usize, LayerResult, BlobWriter)>, Error> {
    let (numbers, mut writers): (Vec<usize>, Vec<BlobWriter>) = parts.into_iter().unzip();
    let observer = Arc::clone(&context.observer);
    let (jobs, cancel, plans) = (context.jobs, context.cancel.clone(), Arc::clone(plans));
    let room = Arc::clone(&context.room);
    let made = tokio::task::spawn_blocking(move || {
        let (sent, done) = (AtomicU64::new(0), AtomicU64::new(0));
        let planned = |n: &usize| &plans[*n];
        let bytes_total: u64 = numbers.iter().map(planned).map(Plan::tar_size).sum();
        let entries_total = numbers.iter().map(planned).map(Plan::len).sum::<usize>() as u64;
        let options = layer::Options {
            compression,
            level,
            jobs,
            cancel: &cancel,
        };
        let given_up = AtomicBool::new(false);
        let parts = numbers.iter().map(planned).zip(&mut writers);
        let parts = parts.map(|(plan, writer)| {
            let (given_up, sent, done, room) = (&given_up, &sent, &done, &room);
            let sink = move |bytes: Bytes| {
                if given_up.load(Ordering::Relaxed) {
                    return Err(Error::Cancelled);
                }
                let size = bytes.len() as u64;
                let sent = sent.fetch_add(size, Ordering::Relaxed) + size;
                let fits = room.check_sent(sent, done.load(Ordering::Relaxed), bytes_total);
                let written = match until.filter(|(until, _)| Instant::now() > *until) {
                    Some((_, bound)) => Err(Error::PausedTooLong {
                        limit_ms: bound.as_secs_f64() * 1000.0,
                    }),
                    None => fits.and_then(|()| Ok(writer.write(bytes)?)),
                };
                if written
                    .as_ref()
                    .is_err_and(|e| !e.is_transient_at_destination())
                {
                    given_up.store(true, Ordering::Relaxed);
                }
                written
            };
            Part { plan, sink }
        });
        let layers = layer::stream::write_all(parts.collect(), options, &|at| {
            done.store(at.tar_bytes, Ordering::Relaxed);
            let (bytes_done, bytes_sent) = (at.tar_bytes, at.sent_bytes);
            observer.event(Event::Progress {
                bytes_done,
                bytes_total,
                bytes_sent,
                entries_total,
            });
        });
        let layers = layers
            .into_iter()
            .map(|layer| layer.map_err(unwrap_sink_error));
        let parts = numbers.into_iter().zip(layers).zip(writers);
        parts
            .map(|((n, layer), writer)| (n, layer, writer))
            .collect()
    });
    made.await.map_err(|_| Error::Worker)
}

/// Returns the sink's own error, which the stream passed through.
fn unwrap_sink_error(error: layer::Error) -> Error {
    match error {
        layer::Error::Sink(source) => match source.downcast::<Error>() {
            Ok(own) => *own,
            Err(source) => layer::Error::Sink(source).into(),
        },
        other => other.into(),
    }
}

fn assemble(
    options: &Options,
    base: &Base,
    delivered: &[Delivered],
    layers: &[state_store::Layer],
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
        layers: earlier::to_manifest_layers(layers),
        changes: &options.changes,
        labels: &options.labels,
        annotations: &options.annotations,
        author: options.author.as_deref(),
        message: options.message.as_deref(),
        created: options.timestamp.unwrap_or(now),
        created_by: "upperdeck commit",
    })?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_by_cores_are_as_many_as_cores_keep_busy_and_no_small_ones() {
        let by_cores = |tar, cores| split_size(tar, Some(LayerSize::ByCores), cores);
        for (cores, layers) in [(1, 1), (4, 1), (8, 2), (12, 3), (32, 4), (128, 4)] {
            let tar = 4 << 30;
            let expected = (layers > 1).then(|| u64::div_ceil(tar, layers));
            assert_eq!(by_cores(tar, cores), expected, "{cores} cores");
        }
        assert_eq!(by_cores(600 << 20, 128), Some(256 << 20));
        assert_eq!(by_cores(200 << 20, 128), None);
        assert_eq!(by_cores(40 << 30, 2), Some(SPLIT_LAYER_SIZE));
        // By default the same for any number of cores.
        for cores in [1, 128] {
            assert_eq!(split_size(4 << 30, None, cores), None);
            assert_eq!(split_size(40 << 30, None, cores), Some(SPLIT_LAYER_SIZE));
            assert_eq!(split_size(40 << 30, Some(LayerSize::Bytes(0)), cores), None);
            assert_eq!(split_size(5, Some(LayerSize::Bytes(3)), cores), Some(3));
        }
    }

    #[test]
    fn a_freeze_that_takes_long_keeps_no_other_task_waiting() {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .build()
            .unwrap();
        let (say, heard) = std::sync::mpsc::channel();
        let save = async move {
            let other = tokio::spawn(async move { say.send(()) });
            // The other task runs while the container is being frozen.
            let heard = run_in_place(|| heard.recv_timeout(Duration::from_secs(60)));
            other.await.unwrap().unwrap();
            heard
        };
        let heard = runtime.block_on(async { tokio::spawn(save).await.unwrap() });
        assert_eq!(heard, Ok(()));
        assert_eq!(run_in_place(|| 7), 7, "without a runtime");
    }
}
