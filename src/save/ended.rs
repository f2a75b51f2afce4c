//! Saves a container that has ended. Nothing of it is frozen, as it has no processes, and no change of it is expected.
//!
//! That this holds for as long as the files are read is checked afterwards. A second walk has to find every entry with
//! the stamps of the first, and every directory that was read has to be in its place. Then the runtime's record has to be
//! complete: a runtime records that it removes or starts a container before it touches its files, so if the record is
//! unchanged after the last read, no file was missing.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use super::changes::{Changes, Since};
use super::earlier::Earlier;
use super::in_flight_writes;
use super::stream::{finish, stream};
use super::trees::{self, Baseline};
use super::{CapturedTrees, Context, Error, Options};
use crate::common::escape;
use crate::layer::Layer;
use crate::layer::scan::{Entry, Scan, tick};
use crate::node::container::{Container, End};
use crate::save::event::Phase;
use crate::store::destination::{BlobWriter, Destination};

/// How often, and in which intervals, the records are read again for what explains a change of the files.
const EXPLANATIONS: u32 = 10;
const EXPLAINED_AFTER: Duration = Duration::from_millis(200);

/// Says that the container has ended, and how.
pub(super) fn announce(context: &Context, end: &End) {
    let how = end.in_brackets();
    context.warn(
        "ended",
        format!("the container has ended{how}: it is saved as its files are on disk"),
    );
}

/// Takes the tree of a container that has ended.
pub(super) async fn capture(
    context: &Context,
    options: &Options,
    container: &Container,
    destination: &Destination,
    earlier: &Earlier,
) -> Result<CapturedTrees, Error> {
    let read = read(context, options, container, destination, earlier).await;
    if let Err(error @ (Error::Destination(_) | Error::Cancelled)) = read {
        return Err(error);
    }
    // Before an error of reading, because a removal explains it. A start changes files before it is on record.
    trees::recheck(context, container, &[])?;
    if matches!(read, Err(Error::ChangedWhileRead { .. })) {
        for _ in 0..EXPLANATIONS {
            tokio::time::sleep(EXPLAINED_AFTER).await;
            trees::recheck(context, container, &[])?;
        }
    }
    let Read {
        scans,
        on_top,
        changes,
        made,
    } = read?;
    Ok(CapturedTrees {
        layers: finish(context, made).await?,
        on_top,
        changes: Some(changes),
        report: trees::report(&scans),
        pause: None,
        was_frozen: false,
        baselines: Some(Baseline::of_scans(scans.clone(), &HashSet::new())),
        scans,
    })
}

/// What was read, with layers that are not yet finished at the destination.
struct Read {
    scans: Vec<Arc<Scan>>,
    on_top: bool,
    changes: Changes,
    made: Vec<(Layer, BlobWriter)>,
}

async fn read(
    context: &Context,
    options: &Options,
    container: &Container,
    destination: &Destination,
    earlier: &Earlier,
) -> Result<Read, Error> {
    let scan = |before| trees::scan(context, options, container, &[], before, None);
    let changed = |path: &str| Error::ChangedWhileRead {
        container: container.id.clone(),
        path: format!("/{path}"),
    };
    context.phase(Phase::Scanning);
    // So that whatever is written from here on has a later stamp than all that was written before.
    tokio::time::sleep(4 * tick()).await;
    let under = earlier.previous.as_ref().map(|under| &under.known);
    let scans = scan(under.map(|known| trees::scans(known))).await?;
    let vanished = trees::report(&scans).vanished;
    if let Some(path) = vanished.examples().first() {
        return Err(changed(path));
    }
    let changes = under.and_then(|known| trees::changes(known, &scans));
    let on_top = changes.is_some();
    let emitted = changes.unwrap_or_else(|| scans.clone());
    let plans = trees::plans(emitted.clone(), options.timestamp);
    let plans = in_flight_writes::prepare_ended(context, plans);
    let plans = trees::split_plans(plans, options.layer_size);
    let mut made = Vec::new();
    if !plans.is_empty() {
        context.phase(Phase::Streaming);
        let codec = (options.compression, options.level);
        made = stream(context, codec, plans, destination, None).await?;
    }
    if let Some(file) = made.iter().find_map(|(layer, _)| layer.unstable.first()) {
        return Err(changed(&file.path));
    }
    let now = scan(Some(scans.clone())).await?;
    for (before, now) in scans.iter().zip(&now) {
        if let Some(path) = difference(before, now) {
            return Err(changed(&escape::path(&path)));
        }
    }
    Ok(Read {
        changes: Changes::of(Since::of(on_top), emitted.iter().map(AsRef::as_ref)),
        scans,
        on_top,
        made,
    })
}

/// Returns the path of an entry by which two scans of a tree differ.
fn difference(before: &Scan, now: &Scan) -> Option<Vec<u8>> {
    let stamps = |e: &Entry| (e.parent, e.kind, e.ino, e.size, e.ctime, e.ctime_nsec);
    let mut pairs = (0..).zip(before.entries().zip(now.entries()));
    let different =
        pairs.find(|(_, (a, b))| stamps(a) != stamps(b) || before.name(a) != now.name(b));
    match different {
        Some((index, _)) => Some(before.path(index)),
        None if before.len() == now.len() => None,
        None => {
            let longer = if before.len() > now.len() {
                before
            } else {
                now
            };
            Some(longer.path(before.len().min(now.len()) as u32))
        }
    }
}
