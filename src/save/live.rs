//! Saves a running container and freezes it only while the last changes are taken.
//!
//! Rounds beside the running container save its contents until little changes between two of them. Then it is frozen
//! and scanned again, and the last changes are kept in memory or as clones; it is thawed, and they are compressed and
//! delivered. The image is the container at the moment of the freeze: what the rounds read is used only if it has not
//! changed since, which the kernel's time stamps show (`scan::changes`, `mapped`), and if no write was in progress that
//! had stamped the file before it was scanned (`layer::pending_writes`).

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::changes::{Changes, Since};
use super::earlier::Earlier;
use super::in_flight_writes;
use super::mapped::{self, MappedFiles};
use super::trees::{self, Baseline, FileId};
use super::{CapturedTrees, Context, Error, Options, deliver, finish, freeze, stream};
use crate::layer::capture::{self, Capture, CaptureMethod};
use crate::layer::scan::{Kind, Scan};
use crate::layer::{CapturedContents, Layer, Plan};
use crate::node::container::{Container, Volume};
use crate::node::freeze::WriteModes;
use crate::save::event::{Event, Phase};
use crate::store::destination::Destination;

/// Maximum number of rounds before the freeze.
const MAX_PRECOPY_ROUNDS: u32 = 3;
/// Default limit of the pause.
pub(crate) const MAX_PAUSE: Duration = Duration::from_secs(1);
/// A warning is issued for files whose writers wait longer than this for the file's clone.
const LONG_WAIT: Duration = Duration::from_millis(500);

/// The result of the rounds.
struct Precopy {
    /// What the image contains so far, including the layers of earlier saves and of the rounds.
    known: Option<Vec<Baseline>>,
    on_top: bool,
    layers: Vec<Layer>,
    /// The shared mappings before the last scan.
    mapped: MappedFiles,
    /// The last scan, with which the one under the freeze is compared.
    last_scans: Vec<Arc<Scan>>,
    /// The ways in which the container's processes could write immediately before the freeze.
    ways: WriteModes,
}

/// Takes the container's trees as they are at one moment. Returns `None` if this is possible only while it is frozen.
pub(super) async fn capture_live(
    context: &Context,
    options: &Options,
    container: &Container,
    volumes: &[Volume],
    destination: &Destination,
    earlier: &Earlier,
) -> Result<Option<CapturedTrees>, Error> {
    let rounds = run_precopy(context, options, container, volumes, destination, earlier).await?;
    let Some(rounds) = rounds else {
        return Ok(None);
    };
    let instant =
        freeze_and_capture(context, options, container, volumes, destination, &rounds).await?;
    let Some(instant) = instant else {
        return Ok(None);
    };
    let FreezeResult {
        now,
        plans,
        held,
        streamed,
        pause,
        was_frozen,
        mut dirty,
    } = instant;
    let changes = if rounds.layers.is_empty() {
        let scans = plans.iter().map(Plan::scan);
        Some(Changes::of(Since::of(rounds.on_top), scans))
    } else {
        let previous = earlier.previous.as_ref().filter(|_| rounds.on_top);
        Changes::between(previous.map(|previous| &*previous.known), &now)
    };
    let mut layers = rounds.layers;
    let mut unsettled = HashSet::new();
    if let Some(held) = held.filter(|_| !plans.iter().all(Plan::is_empty)) {
        context.phase(Phase::Streaming);
        let held = complete_clones(context, held).await?;
        let mut unstable = held.iter().flat_map(|held| held.unstable.clone()).collect();
        unsettled = in_flight_writes::take_unsettled(&mut unstable);
        let plans = plans.into_iter().zip(held);
        let plans = plans.map(|(plan, held)| plan.with_captured(held)).collect();
        let plans = trees::split_plans(plans, options.layer_size);
        let codec = (options.compression, options.level);
        let mut made = deliver(context, codec, plans, destination).await?;
        if let Some(layer) = made.first_mut() {
            layer.unstable = unstable;
        }
        layers.extend(made);
    }
    for mut layer in streamed {
        unsettled.extend(in_flight_writes::take_unsettled(&mut layer.unstable));
        layers.push(layer);
    }
    in_flight_writes::warn_unsettled(context, &unsettled);
    if let Some(dirty) = &mut dirty {
        dirty.extend(in_flight_writes::files_of(&now, &unsettled));
    }
    trees::recheck(context, container, volumes)?;
    Ok(Some(CapturedTrees {
        changes,
        layers,
        on_top: rounds.on_top,
        report: trees::report(&now),
        pause: Some(pause),
        was_frozen,
        scans: now.clone(),
        baselines: dirty.map(|dirty| Baseline::of_scans(now, &dirty)),
    }))
}

/// Waits for the clones that were begun during the freeze.
async fn complete_clones(
    context: &Context,
    holding: Vec<Capture>,
) -> Result<Vec<CapturedContents>, Error> {
    let cancel = context.cancel.clone();
    let work = move || {
        let complete = |holding: Capture| holding.complete(&cancel);
        holding
            .into_iter()
            .map(complete)
            .collect::<Result<Vec<_>, _>>()
    };
    let completed = tokio::task::spawn_blocking(work)
        .await
        .map_err(|_| Error::Worker)?
        .map_err(crate::layer::Error::from)?;
    let (held, waited): (Vec<_>, Vec<_>) = completed.into_iter().unzip();
    for waited in waited.into_iter().flatten() {
        if waited.time >= LONG_WAIT {
            context.warn(
                "long_clone",
                format!(
                    "{} lies in so many pieces that cloning it went on for {:.1} s after the container did; writes \
                     to that file waited",
                    waited.path,
                    waited.time.as_secs_f64()
                ),
            );
        }
    }
    Ok(held)
}

/// Saves beside the running container until little is left.
async fn run_precopy(
    context: &Context,
    options: &Options,
    container: &Container,
    volumes: &[Volume],
    destination: &Destination,
    earlier: &Earlier,
) -> Result<Option<Precopy>, Error> {
    let mut known = earlier.previous.as_ref().map(|under| under.known.clone());
    let mut on_top = known.is_some();
    let mut layers = Vec::new();
    let mut round = 0;
    loop {
        context.phase(Phase::Scanning);
        let mapped = mapped::write_out(context, container, volumes).await?;
        if let Some(path) = &mapped.unresolved {
            context.warn(
                "mapped_elsewhere",
                format!(
                    "/{path} is written to through a mapping, and is not to be found under this name: the container \
                     stands still while its files are read"
                ),
            );
            return Ok(None);
        }
        trees::recheck(context, container, volumes)?;
        let before = known.as_deref().map(trees::scans);
        // Files stamped while the mappings were written out may have dirty pages.
        let since = Some(mapped.since);
        let scans = trees::scan(context, options, container, volumes, before, since).await?;
        let changes = match &known {
            None => Some(scans.clone()),
            Some(known) => trees::changes(known, &scans),
        };
        let Some(changes) = changes else {
            // A layer on top cannot express the changes. Start from nothing; what was delivered of this save is of no
            // use.
            if !on_top && round > 0 {
                return Ok(None);
            }
            context.warn(
                "full_save",
                "everything is saved anew: what changed cannot be said on top of the last save"
                    .to_owned(),
            );
            (known, on_top, round) = (None, false, 0);
            layers.clear();
            continue;
        };
        // Determined after the scan: a write that has been in progress since before the scan belongs to a ring or
        // descriptor that still exists.
        let ways = in_flight_writes::write_modes(context, container).await?;
        let plans = trees::plans(changes, options.timestamp);
        let plans = in_flight_writes::prepare_running(context, plans, volumes, ways);
        let way = capture::method(&plans, options.live_limit);
        if way != CaptureMethod::Impossible || round == MAX_PRECOPY_ROUNDS {
            let plans = if way == CaptureMethod::Clones {
                plans
            } else {
                Vec::new()
            };
            let prepare = move || plans.iter().for_each(capture::prepare_clones);
            tokio::task::spawn_blocking(prepare)
                .await
                .map_err(|_| Error::Worker)?;
            return Ok(Some(Precopy {
                known,
                on_top,
                layers,
                mapped,
                last_scans: scans,
                ways,
            }));
        }
        round += 1;
        let mut dirty = mapped.dirty;
        let plans = trees::split_plans(plans, options.layer_size);
        if !plans.is_empty() {
            context.phase(Phase::Streaming);
            let codec = (options.compression, options.level);
            let mut made = deliver(context, codec, plans, destination).await?;
            dirty.extend(unstable(&scans, &mut made));
            layers.extend(made);
        }
        known = Some(Baseline::of_scans(scans, &dirty));
    }
}

/// Removes and returns the files that changed while they were read, or may have. They are read again, so they need no
/// warning.
fn unstable(scans: &[Arc<Scan>], layers: &mut [Layer]) -> HashSet<FileId> {
    let layers = layers.iter_mut();
    let unstable = layers.flat_map(|layer| std::mem::take(&mut layer.unstable));
    let paths = unstable.map(|unstable| unstable.path).collect();
    in_flight_writes::files_of(scans, &paths)
}

/// The state of the container at the moment of the freeze.
struct FreezeResult {
    now: Vec<Arc<Scan>>,
    plans: Vec<Plan>,
    /// The contents by plan, or `None` if they were streamed.
    held: Option<Vec<Capture>>,
    streamed: Vec<Layer>,
    pause: Duration,
    was_frozen: bool,
    /// Files that may be written to from now on without a change of time stamps; `None` if they cannot be determined.
    dirty: Option<HashSet<FileId>>,
}

/// Freezes, scans, takes what changed, and thaws.
async fn freeze_and_capture(
    context: &Context,
    options: &Options,
    container: &Container,
    volumes: &[Volume],
    destination: &Destination,
    rounds: &Precopy,
) -> Result<Option<FreezeResult>, Error> {
    context.phase(Phase::Scanning);
    let bound = options.max_pause.filter(|bound| !bound.is_zero());
    let normal_priority = options.normal_priority();
    let frozen = match (freeze(context, options, container).await, bound) {
        // The processes did not stop within the time for which they may be frozen.
        (Err(Error::Freeze(crate::node::freeze::Error::Timeout { waited, .. })), Some(bound))
            if waited >= bound =>
        {
            return Err(pause_too_long(bound));
        }
        (frozen, _) => frozen?.ok_or(Error::Worker)?,
    };
    let since = Instant::now();
    let taken = capture_frozen(
        context,
        options,
        container,
        volumes,
        destination,
        rounds,
        bound,
        since,
    )
    .await;
    let was_frozen = frozen.was_frozen();
    let thawed = frozen.thaw();
    drop(normal_priority);
    // If the container ran meanwhile, what was taken is useless, whether or not that succeeded.
    let pause = match (thawed, bound) {
        (Ok(pause), _) => pause,
        (Err(Error::Freeze(crate::node::freeze::Error::ThawedEarly { .. })), Some(bound))
            if since.elapsed() >= bound =>
        {
            return Err(pause_too_long(bound));
        }
        (Err(error), _) => return Err(error),
    };
    let Some((now, plans, held, made, mappings)) = taken? else {
        return Ok(None);
    };
    if !was_frozen {
        context.observer.event(Event::Paused {
            pause_ms: pause.as_secs_f64() * 1000.0,
        });
    }
    let streamed = finish(context, made).await?;
    let dirty = match mappings {
        None => Some(rounds.mapped.dirty.clone()),
        Some(MappedFiles {
            unresolved: Some(_),
            ..
        }) => None,
        Some(mapped) => {
            let mut dirty = rounds.mapped.dirty.clone();
            // Stamped before the files were written out: clean since.
            let written = stamped_since(&now, volumes, rounds.mapped.since);
            dirty.extend(written.filter(|file| mapped.dirty.contains(file)));
            Some(dirty)
        }
    };
    Ok(Some(FreezeResult {
        now,
        plans,
        held,
        streamed,
        pause,
        was_frozen,
        dirty,
    }))
}

/// Returns the files that were stamped at `clock` or later.
fn stamped_since(
    scans: &[Arc<Scan>],
    volumes: &[Volume],
    clock: crate::layer::scan::Clock,
) -> impl Iterator<Item = FileId> {
    scans.iter().enumerate().flat_map(move |(tree, scan)| {
        let clock = trees::since(volumes, tree, clock);
        let files = scan.entries();
        let late = move |e: &crate::layer::scan::Entry| {
            e.kind == Kind::File && e.root == 0 && !clock.can_trust(e.ctime, e.ctime_nsec)
        };
        files.filter(late).map(move |e| (tree, e.ino))
    })
}

type FrozenCapture = (
    Vec<Arc<Scan>>,
    Vec<Plan>,
    Option<Vec<Capture>>,
    Vec<(Layer, crate::store::destination::BlobWriter)>,
    Option<MappedFiles>,
);

#[allow(
    clippy::too_many_arguments,
    reason = "what a save works with, and the moment"
)]
async fn capture_frozen(
    context: &Context,
    options: &Options,
    container: &Container,
    volumes: &[Volume],
    destination: &Destination,
    rounds: &Precopy,
    bound: Option<Duration>,
    since: Instant,
) -> Result<Option<FrozenCapture>, Error> {
    let before = Some(rounds.last_scans.clone());
    let now = trees::scan(context, options, container, volumes, before, None).await?;
    let changes = match &rounds.known {
        None => Some(now.clone()),
        Some(known) => trees::changes(known, &now),
    };
    let Some(changes) = changes else {
        return Ok(None);
    };
    // Only files written to since their pages were clean can be written to without a trace after the thaw.
    let written = stamped_since(&now, volumes, rounds.mapped.since)
        .next()
        .is_some();
    let mappings = if written {
        Some(mapped::list(context, container, volumes)?)
    } else {
        None
    };
    let plans = trees::plans(changes, options.timestamp);
    let plans = in_flight_writes::prepare_frozen(context, plans, volumes, rounds.ways, bound);
    if bound.is_some_and(|bound| since.elapsed() >= bound) {
        return Err(pause_too_long(bound.unwrap_or_default()));
    }
    match capture::method(&plans, options.live_limit) {
        CaptureMethod::Impossible => {
            context.phase(Phase::Streaming);
            let left = bound.map(|bound| bound.saturating_sub(since.elapsed()));
            let made = stream(
                context,
                (options.compression, options.level),
                trees::split_plans(plans.clone(), options.layer_size),
                destination,
                left,
            )
            .await;
            let made = made.map_err(|error| match (error, bound) {
                (Error::PausedTooLong { .. }, Some(bound)) => pause_too_long(bound),
                (error, _) => error,
            })?;
            Ok(Some((now, plans, None, made, mappings)))
        }
        way => {
            let (jobs, cancel) = (context.jobs, context.cancel.clone());
            let work = move || {
                let hold = |plan: &Plan| capture::capture(plan, way, jobs, &cancel);
                let held = plans.iter().map(hold).collect::<Result<Vec<_>, _>>();
                (plans, held)
            };
            let (plans, held) = tokio::task::spawn_blocking(work)
                .await
                .map_err(|_| Error::Worker)?;
            let held = held.map_err(crate::layer::Error::from)?;
            Ok(Some((now, plans, Some(held), Vec::new(), mappings)))
        }
    }
}

fn pause_too_long(bound: Duration) -> Error {
    Error::PausedTooLong {
        limit_ms: bound.as_secs_f64() * 1000.0,
    }
}

/// Checks that the container can be frozen, before anything is delivered.
pub(super) fn check(context: &Context, container: &Container) -> Result<(), Error> {
    let running = container.require_running()?;
    let how = crate::node::freeze::Options {
        host_root: context.roots.host_root.clone(),
        ..crate::node::freeze::Options::default()
    };
    Ok(crate::node::freeze::can_be_frozen(
        running.pid,
        Some(running.pid_start),
        &how,
    )?)
}
