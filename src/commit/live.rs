//! Saving a container that runs on: it stands still only while what changed meanwhile is taken.
//!
//! Rounds beside the running container save what there is, until what changes between two of them is little. Then it is
//! frozen, scanned again, and the last changes are kept in memory or as clones; it thaws, and they are compressed and
//! delivered. The image is the container at the instant of the freeze: whatever the rounds read is in it only where
//! nothing changed it since, which the kernel's stamps tell (`scan::changes`, `mapped`).

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use super::earlier::{Earlier, Known};
use super::mapped::{self, Mapped};
use super::{Context, Error, Options, Taken, cut, deliver, finish, freeze, scan_upper, stream};
use crate::container::{self, Container};
use crate::destination::Destination;
use crate::escape;
use crate::job::{Event, Phase};
use crate::layer::held::{self, Way};
use crate::layer::{Held, Layer, Plan};
use crate::scan::{Kind, Scan};

/// Rounds before the freeze, at most.
const ROUNDS: u32 = 3;
/// The longest pause, where nobody says otherwise.
pub const MAX_PAUSE: Duration = Duration::from_secs(1);
/// Entries up to which the last look before the freeze is kept for it: more would be too much memory for three scans.
const KEEP_LOOK: usize = 200_000;

/// What a save has so far.
struct Rounds {
    /// What the image shows by now, with the layers of earlier saves and of the rounds.
    known: Option<Known>,
    on_top: bool,
    layers: Vec<Layer>,
    /// The shared mappings before the last look.
    mapped: Mapped,
    /// The last look.
    look: Option<Arc<Scan>>,
}

/// Takes the container's tree as it is at one instant. `None` when it can only be done while it stands still.
pub(super) async fn take(
    context: &Context,
    options: &Options,
    container: &Container,
    destination: &Destination,
    earlier: &Earlier,
) -> Result<Option<Taken>, Error> {
    let Some(rounds) = approach(context, options, container, destination, earlier).await? else {
        return Ok(None);
    };
    let Some(instant) = stand_still(context, options, container, destination, &rounds).await?
    else {
        return Ok(None);
    };
    let Instantly {
        now,
        plan,
        held,
        streamed,
        pause,
        was_frozen,
        dirty,
    } = instant;
    let mut layers = rounds.layers;
    if let Some(held) = held.filter(|_| !plan.is_empty()) {
        context.phase(Phase::Streaming);
        let unstable = held.unstable.clone();
        let plans = cut(plan.with(held), options.layer_size);
        let codec = (options.compression, options.level);
        let mut made = deliver(context, codec, plans, destination).await?;
        if let Some(layer) = made.first_mut() {
            layer.unstable = unstable;
        }
        layers.extend(made);
    }
    layers.extend(streamed);
    container::recheck(&context.roots, container)?;
    Ok(Some(Taken {
        layers,
        on_top: rounds.on_top,
        report: now.report.clone(),
        pause: Some(pause),
        was_frozen,
        seen: dirty.map(|dirty| Known::new(now, &dirty)),
    }))
}

/// Saves beside the running container until little is left.
async fn approach(
    context: &Context,
    options: &Options,
    container: &Container,
    destination: &Destination,
    earlier: &Earlier,
) -> Result<Option<Rounds>, Error> {
    let mut known = earlier.under.as_ref().map(|under| under.known.clone());
    let mut on_top = known.is_some();
    let mut layers = Vec::new();
    let mut round = 0;
    loop {
        context.phase(Phase::Scanning);
        let mapped = mapped::write_out(context, container).await?;
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
        container::recheck(&context.roots, container)?;
        let before = known.as_ref().map(|known| Arc::clone(&known.scan));
        // What was stamped while the mappings were written out may have dirty pages.
        let scan = scan_upper(context, options, container, before).await?;
        let scan = Arc::new(scan.since(mapped.since));
        let changes = match &known {
            None => Some(Arc::clone(&scan)),
            Some(known) => known.changes(&scan).map(Arc::new),
        };
        let Some(changes) = changes else {
            // No layer on top can say it. From nothing, then; what was delivered of this save is of no use.
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
        let plan = Plan::new(changes, options.timestamp);
        let way = held::way(&plan, options.live_limit);
        if way != Way::No || round == ROUNDS {
            let plan = (way == Way::Clones).then_some(plan);
            let prepare = move || plan.iter().for_each(held::prepare_clones);
            tokio::task::spawn_blocking(prepare)
                .await
                .map_err(|_| Error::Worker)?;
            let look = (scan.entries().len() <= KEEP_LOOK || known.is_none()).then_some(scan);
            return Ok(Some(Rounds {
                known,
                on_top,
                layers,
                mapped,
                look,
            }));
        }
        round += 1;
        let mut dirty = mapped.dirty;
        if !plan.is_empty() {
            context.phase(Phase::Streaming);
            let plans = cut(plan, options.layer_size);
            let codec = (options.compression, options.level);
            let mut made = deliver(context, codec, plans, destination).await?;
            dirty.extend(unstable(&scan, &mut made));
            layers.extend(made);
        }
        known = Some(Known::new(scan, &dirty));
    }
}

/// Inodes of the files that changed while they were read. They are read again, so nobody needs to hear of them.
fn unstable(scan: &Scan, layers: &mut [Layer]) -> HashSet<u64> {
    let paths: HashSet<String> = layers
        .iter_mut()
        .flat_map(|layer| std::mem::take(&mut layer.unstable))
        .map(|unstable| unstable.path)
        .collect();
    if paths.is_empty() {
        return HashSet::new();
    }
    let mut path = Vec::new();
    let mut found = HashSet::new();
    for (index, entry) in (0..).zip(scan.entries()) {
        if entry.kind == Kind::File {
            scan.path_into(index, &mut path);
            if paths.contains(&escape::path(&path)) {
                found.insert(entry.ino);
            }
        }
    }
    found
}

/// What there was at the instant of the freeze.
struct Instantly {
    now: Arc<Scan>,
    plan: Plan,
    /// The contents, or none: then they were streamed.
    held: Option<Held>,
    streamed: Vec<Layer>,
    pause: Duration,
    was_frozen: bool,
    /// Inodes that may be written to from now on without it showing; none when they cannot be told.
    dirty: Option<HashSet<u64>>,
}

/// Freeze, scan, take what changed, thaw.
async fn stand_still(
    context: &Context,
    options: &Options,
    container: &Container,
    destination: &Destination,
    rounds: &Rounds,
) -> Result<Option<Instantly>, Error> {
    context.phase(Phase::Scanning);
    let bound = options.max_pause.filter(|bound| !bound.is_zero());
    let hurry = options.hurry();
    let frozen = match (freeze(context, options, container), bound) {
        // Asked to stop, they did not in the time that they may stand still.
        (Err(Error::Freeze(crate::freeze::Error::Timeout { waited, .. })), Some(bound))
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
        destination,
        rounds,
        bound,
        since,
    )
    .await;
    let was_frozen = frozen.was_frozen();
    let thawed = frozen.thaw();
    drop(hurry);
    // What was taken while it ran on is of no use, whatever came of it.
    let pause = match (thawed, bound) {
        (Ok(pause), _) => pause,
        (Err(crate::freeze::Error::NotHeld { .. }), Some(bound)) if since.elapsed() >= bound => {
            return Err(too_long(bound));
        }
        (Err(error), _) => return Err(error.into()),
    };
    let Some((now, plan, held, made, mappings)) = taken? else {
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
            let late =
                |e: &&crate::scan::Entry| !rounds.mapped.since.settles(e.ctime, e.ctime_nsec);
            let written = now.entries().iter().filter(late).map(|e| e.ino);
            dirty.extend(written.filter(|ino| mapped.dirty.contains(ino)));
            Some(dirty)
        }
    };
    Ok(Some(Instantly {
        now,
        plan,
        held,
        streamed,
        pause,
        was_frozen,
        dirty,
    }))
}

type Frozenly = (
    Arc<Scan>,
    Plan,
    Option<Held>,
    Vec<(Layer, crate::destination::BlobWriter)>,
    Option<Mapped>,
);

async fn take_frozen(
    context: &Context,
    options: &Options,
    container: &Container,
    destination: &Destination,
    rounds: &Rounds,
    bound: Option<Duration>,
    since: Instant,
) -> Result<Option<Frozenly>, Error> {
    let before = rounds
        .look
        .clone()
        .or_else(|| rounds.known.as_ref().map(|known| Arc::clone(&known.scan)));
    let now = Arc::new(scan_upper(context, options, container, before).await?);
    let changes = match &rounds.known {
        None => Some(Arc::clone(&now)),
        Some(known) => known.changes(&now).map(Arc::new),
    };
    let Some(changes) = changes else {
        return Ok(None);
    };
    // Only what was written to since its pages were clean may be written to without a trace after the thaw.
    let written = |e: &crate::scan::Entry| {
        e.kind == Kind::File && e.root == 0 && !rounds.mapped.since.settles(e.ctime, e.ctime_nsec)
    };
    let mappings = if now.entries().iter().any(written) {
        Some(mapped::list(context, container)?)
    } else {
        None
    };
    let plan = Plan::new(changes, options.timestamp);
    if bound.is_some_and(|bound| since.elapsed() >= bound) {
        return Err(too_long(bound.unwrap_or_default()));
    }
    match held::way(&plan, options.live_limit) {
        Way::No => {
            context.phase(Phase::Streaming);
            let left = bound.map(|bound| bound.saturating_sub(since.elapsed()));
            let plans = cut(plan.clone(), options.layer_size);
            let made = stream(
                context,
                (options.compression, options.level),
                plans,
                destination,
                left,
            )
            .await;
            let made = made.map_err(|error| match (error, bound) {
                (Error::PausedTooLong { .. }, Some(bound)) => too_long(bound),
                (error, _) => error,
            })?;
            Ok(Some((now, plan, None, made, mappings)))
        }
        way => {
            let (jobs, cancel) = (context.jobs, context.cancel.clone());
            let work = move || {
                let flag: &AtomicBool = cancel.flag();
                let held = held::hold(&plan, way, jobs, flag);
                (plan, held)
            };
            let (plan, held) = tokio::task::spawn_blocking(work)
                .await
                .map_err(|_| Error::Worker)?;
            let held = held.map_err(crate::layer::Error::from)?;
            Ok(Some((now, plan, Some(held), Vec::new(), mappings)))
        }
    }
}

fn too_long(bound: Duration) -> Error {
    Error::PausedTooLong {
        limit_ms: bound.as_secs_f64() * 1000.0,
    }
}

/// Whether the container can be frozen at all: found out before anything is delivered.
pub(super) fn check(context: &Context, container: &Container) -> Result<(), Error> {
    let how = crate::freeze::Options {
        host_root: context.roots.host_root.clone(),
        ..crate::freeze::Options::default()
    };
    Ok(crate::freeze::can_be_frozen(
        container.pid,
        Some(container.pid_start),
        &how,
    )?)
}
