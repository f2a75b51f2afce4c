//! Saves a container: one function that follows the data flow of the design.

mod base;
pub(crate) mod changes;
pub(crate) mod copy_out;
mod earlier;
mod ended;
mod error;
pub(crate) mod event;
mod frozen;
mod gate;
pub(crate) mod history;
mod in_flight_writes;
pub(crate) mod indexed;
mod layer_size;
mod live;
mod mapped;
mod named;
mod next;
mod node_header;
mod options;
mod outcome;
pub(crate) mod packages;
mod proofs;
mod room;
pub(crate) mod source;
pub(crate) mod squash;
pub mod state_store;
mod stream;
mod tag;
mod tally;
mod together;
mod trees;
mod upper;
mod waiting;
mod warnings;

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use crate::image::manifest;
use crate::image::packages::Packages;
pub(crate) use crate::layer::Compression;
use crate::layer::Layer;
use crate::layer::scan::{Caps, Report, Scan};
use crate::node::container::{self, Base, Container, Volume};
use crate::save::event::{Event, Observer, Phase};
use crate::store::destination::{Destination, LocalFiles, Target};
use crate::store::layout;
use crate::store::registry::{Access, Registries};

use changes::{Changes, Since};
use earlier::Earlier;
use frozen::{FrozenGuard, freeze};
use room::Room;
use stream::{deliver, finish, stream};
use tally::Tally;
use tokio_util::sync::CancellationToken;
use trees::Baseline;

pub(crate) use base::Delivered;
pub(crate) use error::Error;
pub(crate) use gate::Gate;
#[cfg(feature = "service")]
pub(crate) use gate::HURRY;
pub use layer_size::LayerSize;
pub(crate) use layer_size::split_plan;
pub(crate) use live::MAX_PAUSE;
pub(crate) use next::{Kind as NextKind, NextSave, NextSaveOptions, next_save};
pub(crate) use options::{Options, Pause};
pub(crate) use outcome::Saved;
pub(crate) use together::Member;
pub use upper::Rules;

/// Attempts at a save whose layers were read under a freeze but could not be finished, if the error may pass.
const MAX_ATTEMPTS: u32 = 3;
/// Pause before the parts of an image are looked for again, times the number of attempts.
const PAUSE: Duration = Duration::from_secs(1);
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
    tally: Arc<Tally>,
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

/// Saves a container as an image.
///
/// A cancellation ends the save as long as the tag is not written: uploads are aborted, the container is thawed. Once
/// the tag is written the save has succeeded, and a cancellation only ends what follows.
pub(crate) async fn commit(
    options: &Options,
    roots: container::Roots,
    access: Access,
    observer: Arc<dyn Observer>,
    cancel: &CancellationToken,
) -> Result<Saved, Error> {
    let started = Instant::now();
    let target = check(options)?;
    let mut context = Context {
        roots,
        registries: Registries::new(access),
        observer,
        cancel: cancel.clone(),
        jobs: options.jobs.unwrap_or_else(cores),
        caps: options.rules.caps,
        room: Arc::default(),
        tally: Arc::default(),
    };
    let waits = context.registries.waits();
    let _waiting = waiting::Reporter::start(waits, Arc::clone(&context.observer));
    let mut attempt = 1;
    let (subject, made, permit) = loop {
        let subject = until_cancelled(cancel, Subject::find(&context, options, &target)).await?;
        let of = subject.of(options);
        let prepared = Box::pin(prepare(&mut context, &of, target.tag()));
        match until_cancelled(cancel, prepared).await {
            Err(error)
                if attempt < MAX_ATTEMPTS
                    && options.together.is_none()
                    && error.was_started_again() =>
            {
                context.warn("again", format!("the save begins anew: {error}"));
                attempt += 1;
            }
            prepared => {
                let (made, permit) = prepared?;
                break (subject, made, permit);
            }
        }
    };
    let of = subject.of(options);
    if let Some(member) = &options.together {
        until_cancelled(cancel, member.complete()).await?;
    }
    let (made, digest) =
        Box::pin(tag::write(&mut context, &of, made, target.tag(), &permit)).await?;
    let Made {
        earlier,
        taken,
        delivered,
        image,
        packages,
    } = made;
    let saved = outcome::saved(outcome::Parts {
        target: &target,
        digest,
        image: &image,
        container: of.container,
        volumes: of.volumes,
        base: of.base,
        delivered,
        packages,
        layers_above_base: earlier.layers(&taken).len(),
        taken: &taken,
        seconds: started.elapsed().as_secs_f64(),
    });
    let written = outcome::write_files(options, &saved);
    context.observer.event(Event::Saved {
        reference: saved.reference.clone(),
        digest,
        changes: saved.metadata.changes.clone(),
    });
    earlier.keep(&context, of.container, &target, &taken);
    // The next save of this container may begin.
    drop((earlier, taken));
    // The container runs from its base and may be started from it again.
    let own_base = of.base.manifest.as_ref().map(|manifest| manifest.digest);
    let replaced = permit.to_delete;
    let replaced = replaced.filter(|&old| old != digest && Some(old) != own_base);
    tag::follow_up(&context, &of, &digest, replaced.as_ref()).await;
    written?;
    Ok(saved)
}

/// Saves several containers at one instant, each with its own options and observer. Returns the results in their order.
pub(crate) async fn commit_together(
    saves: Vec<(Options, Arc<dyn Observer>)>,
    roots: &container::Roots,
    access: &Access,
    cancel: &CancellationToken,
) -> Vec<Result<Saved, Error>> {
    let members = Member::group(saves.len());
    let saves = saves
        .into_iter()
        .zip(members)
        .map(async |((mut options, observer), member)| {
            options.together = Some(member.clone());
            let access = access.clone();
            let saved = Box::pin(commit(&options, roots.clone(), access, observer, cancel)).await;
            if saved.is_err() {
                member.fail();
            }
            saved
        });
    futures_util::future::join_all(saves).await
}

/// Carries out a part of a save that leaves nothing when it is cancelled.
async fn until_cancelled<T>(
    cancel: &CancellationToken,
    part: impl Future<Output = Result<T, Error>>,
) -> Result<T, Error> {
    tokio::select! {
        done = part => done,
        () = cancel.cancelled() => Err(Error::Cancelled),
    }
}

/// The container, its base, and the destination.
struct Subject {
    container: Container,
    volumes: Vec<Volume>,
    base: Base,
    layout: Option<layout::Reader>,
    destination: Destination,
    _unfinished: Option<layout::GiveUp>,
}

impl Subject {
    async fn find(context: &Context, options: &Options, target: &Target) -> Result<Self, Error> {
        context.phase(Phase::Locating);
        let container = container::find_any(&context.roots, &options.container, options.attempt)?;
        if let Some(ended) = container.ended() {
            if options.together.is_some() {
                return Err(Error::NotTogether {
                    why: "a container of the pod has ended meanwhile",
                });
            }
            ended::announce(context, &ended.end);
        }
        let volumes = trees::open(
            &context.roots,
            &container,
            &options.volumes,
            &options.volume_rules,
        )?;
        let proven = prove_base(context, &container, options).await;
        if proven.is_err() && container.ended().is_some() {
            // A removal explains it.
            container::recheck(&context.roots, &container)?;
        }
        let (base, layout) = proven?;
        manifest::check_changes(&base.config, &options.changes)?;
        // An unusable destination is detected before the container is frozen for it.
        let files = LocalFiles {
            mode: options.output_mode,
            share_blobs: options.share_blobs.clone(),
        };
        let destination = Destination::open_as(target, &context.registries, files)?;
        // A save that fails leaves nothing in a layout.
        let unfinished = destination.give_up_on_drop();
        destination.check().await?;
        destination.check_tag(target.tag()).await?;
        if let Some(rule) = &options.replaceable {
            destination.check_replaceable(target.tag(), rule).await?;
        }
        Ok(Self {
            container,
            volumes,
            base,
            layout,
            destination,
            _unfinished: unfinished,
        })
    }

    fn of<'s>(&'s self, options: &'s Options) -> Of<'s> {
        Of {
            options,
            container: &self.container,
            volumes: &self.volumes,
            base: &self.base,
            layout: self.layout.as_ref(),
            destination: &self.destination,
        }
    }
}

/// Brings everything but the manifest to the destination, and waits for the permission to write the tag.
async fn prepare(
    context: &mut Context,
    of: &Of<'_>,
    tag: &str,
) -> Result<(Made, tag::Permit), Error> {
    let made = make(context, of, false).await?;
    let permit = tag::Permit::ask(context, of, &made, tag).await?;
    Ok((made, permit))
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
    packages: Packages,
}

/// Brings everything but the manifest to the destination. What is there already, and what is known to come, is compared
/// with the destination's quota before anything is written or mounted.
///
/// With `again`, nothing builds on the last save.
async fn make(context: &mut Context, of: &Of<'_>, again: bool) -> Result<Made, Error> {
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
    let earlier = earlier::find(
        context,
        options,
        container,
        volumes,
        base,
        destination,
        again,
    )
    .await?;
    // What the destination lacks of the base is counted while the container is read.
    let (taken, ()) = tokio::join!(
        capture_layers(context, options, container, volumes, destination, &earlier),
        base::count_missing(context, destination, &base.layers)
    );
    let taken = taken?;
    // After the new layers, whose size is known only now: a save that the quota has no room for leaves nothing.
    if taken.on_top
        && let Err(why) = earlier.bring(context, destination).await?
    {
        context.warn("full_save", format!("everything is saved anew: {why}"));
        // With the lock on what is kept of the container.
        drop((earlier, taken));
        return Box::pin(make(context, of, true)).await;
    }
    let context = &*context;
    warnings::emit(context, container, volumes, &taken);

    context.phase(Phase::Base);
    let start = manifest::Start::of(&base.config, &options.changes)?;
    // Soon, before the container changes the files in question.
    let (delivered, packages) = tokio::join!(
        base::copy_missing(context, destination, container, base, of.layout),
        packages::container::of_save(context, container, start, &taken.scans),
    );
    let (delivered, packages) = (delivered?, packages?);
    if container.ended().is_some() && delivered.iter().any(Delivered::is_remade) {
        // A layer that was made from a directory, after the container was read.
        trees::recheck(context, container, volumes)?;
    }

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
        packages,
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
        Some(name) => named::base(context, container, options, name).await,
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
    /// What they contain; `None` if layers on top of the earlier save could not express it.
    changes: Option<Changes>,
    report: Report,
    pause: Option<Duration>,
    /// Another program had paused the container, and it stays paused.
    was_frozen: bool,
    /// The scans of the trees, of what is in the image.
    scans: Vec<Arc<Scan>>,
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
    if options.pause == Pause::Live && container.running().is_some() {
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
    if container.ended().is_some() {
        return ended::capture(context, options, container, destination, earlier).await;
    }
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
    let emitted = changes.unwrap_or_else(|| scans.clone());
    let plans = trees::plans(emitted.clone(), options.timestamp);
    let bound = frozen
        .as_ref()
        .filter(|f| !f.was_frozen())
        .and(options.max_pause)
        .filter(|bound| !bound.is_zero());
    let plans = match frozen {
        Some(_) => in_flight_writes::prepare_frozen(context, plans, volumes, ways, bound),
        None => in_flight_writes::prepare_running(context, plans, volumes, ways),
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
        changes: Some(Changes::of(
            Since::of(on_top),
            emitted.iter().map(AsRef::as_ref),
        )),
        report,
        pause,
        was_frozen,
        scans,
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
        created_by: history::CREATED_BY,
    })?)
}
