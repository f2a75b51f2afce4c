//! Saves a running container and freezes it only while the last changes are taken.
//!
//! Rounds beside the running container save its contents until little changes between two of them. Then it is frozen
//! and scanned again, and the last changes are kept in memory or as clones; it is thawed, and they are compressed and
//! delivered. The image is the container at the moment of the freeze: what the rounds read is used only if it has not
//! changed since, which the kernel's time stamps show (`scan::changes`, `mapped`), and if no write was in progress that
//! had stamped the file before it was scanned (`layer::settle`).

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::earlier::Earlier;
use super::mapped::{self, Mapped};
use super::trees::{self, File, Known};
use super::writing;
use super::{Context, Error, Options, Taken, deliver, finish, freeze, stream};
use crate::layer::held::{self, Holding, Way};
use crate::layer::scan::{Kind, Scan};
use crate::layer::{Held, Layer, Plan};
use crate::node::container::{Container, Volume};
use crate::node::freeze::Ways;
use crate::save::event::{Event, Phase};
use crate::store::destination::Destination;

/// Maximum number of rounds before the freeze.
const ROUNDS: u32 = 3;
/// Default limit of the pause.
pub(crate) const MAX_PAUSE: Duration = Duration::from_secs(1);
/// A warning is issued for files whose writers wait longer than this for the file's clone.
const LONG_WAIT: Duration = Duration::from_millis(500);

/// The result of the rounds.
struct Rounds {
    /// What the image contains so far, including the layers of earlier saves and of the rounds.
    known: Option<Vec<Known>>,
    on_top: bool,
    layers: Vec<Layer>,
    /// The shared mappings before the last scan.
    mapped: Mapped,
    /// The last scan, with which the one under the freeze is compared.
    look: Vec<Arc<Scan>>,
    /// The ways in which the container's processes could write immediately before the freeze.
    ways: Ways,
}

/// Takes the container's trees as they are at one moment. Returns `None` if this is possible only while it is frozen.
pub(super) async fn take(
    context: &Context,
    options: &Options,
    container: &Container,
    volumes: &[Volume],
    destination: &Destination,
    earlier: &Earlier,
) -> Result<Option<Taken>, Error> {
    let rounds = approach(context, options, container, volumes, destination, earlier).await?;
    let Some(rounds) = rounds else {
        return Ok(None);
    };
    let instant = stand_still(context, options, container, volumes, destination, &rounds).await?;
    let Some(instant) = instant else {
        return Ok(None);
    };
    let Instantly {
        now,
        plans,
        held,
        streamed,
        pause,
        was_frozen,
        mut dirty,
    } = instant;
    let mut layers = rounds.layers;
    let mut unsettled = HashSet::new();
    if let Some(held) = held.filter(|_| !plans.iter().all(Plan::is_empty)) {
        context.phase(Phase::Streaming);
        let held = complete(context, held).await?;
        let mut unstable = held.iter().flat_map(|held| held.unstable.clone()).collect();
        unsettled = writing::take_unsettled(&mut unstable);
        let plans = plans.into_iter().zip(held);
        let plans = plans.map(|(plan, held)| plan.with(held)).collect();
        let plans = trees::cut(plans, options.layer_size);
        let codec = (options.compression, options.level);
        let mut made = deliver(context, codec, plans, destination).await?;
        if let Some(layer) = made.first_mut() {
            layer.unstable = unstable;
        }
        layers.extend(made);
    }
    for mut layer in streamed {
        unsettled.extend(writing::take_unsettled(&mut layer.unstable));
        layers.push(layer);
    }
    writing::tell_unsettled(context, &unsettled);
    if let Some(dirty) = &mut dirty {
        dirty.extend(writing::files_of(&now, &unsettled));
    }
    trees::recheck(context, container, volumes)?;
    Ok(Some(Taken {
        layers,
        on_top: rounds.on_top,
        report: trees::report(&now),
        pause: Some(pause),
        was_frozen,
        seen: dirty.map(|dirty| Known::all(now, &dirty)),
    }))
}

/// Waits for the clones that were begun during the freeze.
async fn complete(context: &Context, holding: Vec<Holding>) -> Result<Vec<Held>, Error> {
    let cancel = context.cancel.clone();
    let work = move || {
        let complete = |holding: Holding| holding.complete(&cancel);
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
async fn approach(
    context: &Context,
    options: &Options,
    container: &Container,
    volumes: &[Volume],
    destination: &Destination,
    earlier: &Earlier,
) -> Result<Option<Rounds>, Error> {
    let mut known = earlier.under.as_ref().map(|under| under.known.clone());
    let mut on_top = known.is_some();
    let mut layers = Vec::new();
    let mut round = 0;
    loop {
        context.phase(Phase::Scanning);
        let mapped = mapped::write_out(context, container, volumes).await?;
        if let Some(path) = &mapped.elsewhere {
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
        let ways = writing::ways(context, container).await?;
        let plans = trees::plans(changes, options.timestamp);
        let plans = writing::beside(plans, volumes, ways);
        let way = held::way(&plans, options.live_limit);
        if way != Way::No || round == ROUNDS {
            let plans = if way == Way::Clones {
                plans
            } else {
                Vec::new()
            };
            let prepare = move || plans.iter().for_each(held::prepare_clones);
            tokio::task::spawn_blocking(prepare)
                .await
                .map_err(|_| Error::Worker)?;
            return Ok(Some(Rounds {
                known,
                on_top,
                layers,
                mapped,
                look: scans,
                ways,
            }));
        }
        round += 1;
        let mut dirty = mapped.dirty;
        let plans = trees::cut(plans, options.layer_size);
        if !plans.is_empty() {
            context.phase(Phase::Streaming);
            let codec = (options.compression, options.level);
            let mut made = deliver(context, codec, plans, destination).await?;
            dirty.extend(unstable(&scans, &mut made));
            layers.extend(made);
        }
        known = Some(Known::all(scans, &dirty));
    }
}

/// Removes and returns the files that changed while they were read, or may have. They are read again, so they need no
/// warning.
fn unstable(scans: &[Arc<Scan>], layers: &mut [Layer]) -> HashSet<File> {
    let layers = layers.iter_mut();
    let unstable = layers.flat_map(|layer| std::mem::take(&mut layer.unstable));
    let paths = unstable.map(|unstable| unstable.path).collect();
    writing::files_of(scans, &paths)
}

/// The state of the container at the moment of the freeze.
struct Instantly {
    now: Vec<Arc<Scan>>,
    plans: Vec<Plan>,
    /// The contents by plan, or `None` if they were streamed.
    held: Option<Vec<Holding>>,
    streamed: Vec<Layer>,
    pause: Duration,
    was_frozen: bool,
    /// Files that may be written to from now on without a change of time stamps; `None` if they cannot be determined.
    dirty: Option<HashSet<File>>,
}

/// Freezes, scans, takes what changed, and thaws.
async fn stand_still(
    context: &Context,
    options: &Options,
    container: &Container,
    volumes: &[Volume],
    destination: &Destination,
    rounds: &Rounds,
) -> Result<Option<Instantly>, Error> {
    context.phase(Phase::Scanning);
    let bound = options.max_pause.filter(|bound| !bound.is_zero());
    let hurry = options.hurry();
    let frozen = match (freeze(context, options, container), bound) {
        // The processes did not stop within the time for which they may be frozen.
        (Err(Error::Freeze(crate::node::freeze::Error::Timeout { waited, .. })), Some(bound))
            if waited >= bound =>
        {
            return Err(too_long(bound));
        }
        (frozen, _) => frozen?.ok_or(Error::Worker)?,
    };
    let since = Instant::now();
    let taken = take_frozen(
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
    drop(hurry);
    // If the container ran meanwhile, what was taken is useless, whether or not that succeeded.
    let pause = match (thawed, bound) {
        (Ok(pause), _) => pause,
        (Err(Error::Freeze(crate::node::freeze::Error::NotHeld { .. })), Some(bound))
            if since.elapsed() >= bound =>
        {
            return Err(too_long(bound));
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
    let streamed = finish(made).await?;
    let dirty = match mappings {
        None => Some(rounds.mapped.dirty.clone()),
        Some(Mapped {
            elsewhere: Some(_), ..
        }) => None,
        Some(mapped) => {
            let mut dirty = rounds.mapped.dirty.clone();
            // Stamped before the files were written out: clean since.
            let written = late(&now, volumes, rounds.mapped.since);
            dirty.extend(written.filter(|file| mapped.dirty.contains(file)));
            Some(dirty)
        }
    };
    Ok(Some(Instantly {
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
fn late(
    scans: &[Arc<Scan>],
    volumes: &[Volume],
    clock: crate::layer::scan::Clock,
) -> impl Iterator<Item = File> {
    scans.iter().enumerate().flat_map(move |(tree, scan)| {
        let clock = trees::since(volumes, tree, clock);
        let files = scan.entries();
        let late = move |e: &crate::layer::scan::Entry| {
            e.kind == Kind::File && e.root == 0 && !clock.settles(e.ctime, e.ctime_nsec)
        };
        files.filter(late).map(move |e| (tree, e.ino))
    })
}

type Frozenly = (
    Vec<Arc<Scan>>,
    Vec<Plan>,
    Option<Vec<Holding>>,
    Vec<(Layer, crate::store::destination::BlobWriter)>,
    Option<Mapped>,
);

#[allow(
    clippy::too_many_arguments,
    reason = "what a save works with, and the moment"
)]
async fn take_frozen(
    context: &Context,
    options: &Options,
    container: &Container,
    volumes: &[Volume],
    destination: &Destination,
    rounds: &Rounds,
    bound: Option<Duration>,
    since: Instant,
) -> Result<Option<Frozenly>, Error> {
    let before = Some(rounds.look.clone());
    let now = trees::scan(context, options, container, volumes, before, None).await?;
    let changes = match &rounds.known {
        None => Some(now.clone()),
        Some(known) => trees::changes(known, &now),
    };
    let Some(changes) = changes else {
        return Ok(None);
    };
    // Only files written to since their pages were clean can be written to without a trace after the thaw.
    let written = late(&now, volumes, rounds.mapped.since).next().is_some();
    let mappings = if written {
        Some(mapped::list(context, container, volumes)?)
    } else {
        None
    };
    let plans = trees::plans(changes, options.timestamp);
    let plans = writing::frozen(plans, volumes, rounds.ways, bound);
    if bound.is_some_and(|bound| since.elapsed() >= bound) {
        return Err(too_long(bound.unwrap_or_default()));
    }
    match held::way(&plans, options.live_limit) {
        Way::No => {
            context.phase(Phase::Streaming);
            let left = bound.map(|bound| bound.saturating_sub(since.elapsed()));
            let made = stream(
                context,
                (options.compression, options.level),
                trees::cut(plans.clone(), options.layer_size),
                destination,
                left,
            )
            .await;
            let made = made.map_err(|error| match (error, bound) {
                (Error::PausedTooLong { .. }, Some(bound)) => too_long(bound),
                (error, _) => error,
            })?;
            Ok(Some((now, plans, None, made, mappings)))
        }
        way => {
            let (jobs, cancel) = (context.jobs, context.cancel.clone());
            let work = move || {
                let hold = |plan: &Plan| held::hold(plan, way, jobs, &cancel);
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

fn too_long(bound: Duration) -> Error {
    Error::PausedTooLong {
        limit_ms: bound.as_secs_f64() * 1000.0,
    }
}

/// Checks that the container can be frozen, before anything is delivered.
pub(super) fn check(context: &Context, container: &Container) -> Result<(), Error> {
    let how = crate::node::freeze::Options {
        host_root: context.roots.host_root.clone(),
        ..crate::node::freeze::Options::default()
    };
    Ok(crate::node::freeze::can_be_frozen(
        container.pid,
        Some(container.pid_start),
        &how,
    )?)
}
