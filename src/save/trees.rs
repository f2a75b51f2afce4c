//! The trees that a save reads: the container's upper directory, then each requested volume. Each tree has layers of
//! its own, and all are taken at the same moment. Lists of per-tree items are in this order.

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::{Context, Error, LayerSize, Options};
use crate::layer::Plan;
use crate::layer::scan::{Clock, Entry, Report, Scan};
use crate::node::container::{self, Container, Volume, VolumeRules};

/// How far the clock of a server that stamps files may be behind this node's. Files stamped later than this before a
/// scan are read again.
const MAX_SERVER_CLOCK_LAG: Duration = Duration::from_secs(60);

/// A file: the number of its tree, and its inode number.
pub(super) type FileId = (usize, u64);

/// Opens the requested volumes, outer ones before those mounted inside them, which are volumes of their own.
pub(super) fn open(
    roots: &container::Roots,
    container: &Container,
    paths: &[PathBuf],
    rules: &VolumeRules,
) -> Result<Vec<Volume>, container::Error> {
    let mut volumes = paths
        .iter()
        .map(|path| container::volume(roots, container, path, rules))
        .collect::<Result<Vec<_>, _>>()?;
    volumes.sort_by(|a, b| a.destination.cmp(&b.destination));
    volumes.dedup_by(|a, b| a.destination == b.destination);
    Ok(volumes)
}

/// Checks that everything that is read still belongs to the container.
pub(super) fn recheck(
    context: &Context,
    container: &Container,
    volumes: &[Volume],
) -> Result<(), Error> {
    container::recheck(&context.roots, container)?;
    for volume in volumes {
        container::recheck_volume(&context.roots, container, volume)?;
    }
    Ok(())
}

/// Scans all trees, as a rescan if there are earlier scans. `since` is the clock before the preparations on which the
/// time stamps depend, if there were any.
pub(super) async fn scan(
    context: &Context,
    options: &Options,
    container: &Container,
    volumes: &[Volume],
    earlier: Option<Vec<Arc<Scan>>>,
    since: Option<Clock>,
) -> Result<Vec<Arc<Scan>>, Error> {
    let (rules, container) = (options.rules.clone(), container.clone());
    let (jobs, cancel) = (context.jobs, context.cancel.clone());
    let volumes = volumes.to_vec();
    let scans = tokio::task::spawn_blocking(move || {
        let scans = scan_all(
            &rules,
            &container,
            &volumes,
            earlier.as_deref(),
            jobs,
            &cancel,
        )?;
        Ok(limit_trust(scans, &volumes, since))
    });
    scans.await.map_err(|_| Error::Worker)?
}

/// Like [`scan`], but synchronous and with each scan's own clock.
pub(super) fn scan_all(
    rules: &super::Rules,
    container: &Container,
    volumes: &[Volume],
    earlier: Option<&[Arc<Scan>]>,
    jobs: usize,
    cancel: &CancellationToken,
) -> Result<Vec<Scan>, Error> {
    let before = |tree: usize| earlier.and_then(|earlier| earlier.get(tree)).map(|s| &**s);
    let mut scans = vec![rules.scan(container, volumes, before(0), jobs, cancel)?];
    for (tree, volume) in (1..).zip(volumes) {
        scans.push(rules.scan_volume(container, volume, before(tree), jobs, cancel)?);
    }
    Ok(scans)
}

/// Limits the trust in time stamps to what the clocks justify.
pub(super) fn limit_trust(
    scans: Vec<Scan>,
    volumes: &[Volume],
    clock: Option<Clock>,
) -> Vec<Arc<Scan>> {
    let trusted = |(tree, scan): (usize, Scan)| {
        let own = scan.clock();
        Arc::new(scan.with_clock(since(volumes, tree, clock.unwrap_or(own).min(own))))
    };
    scans.into_iter().enumerate().map(trusted).collect()
}

/// Returns a lower bound of the clock that stamps a tree's files, for the time when this node's clock was `clock`.
pub(super) fn since(volumes: &[Volume], tree: usize, clock: Clock) -> Clock {
    let volume = tree.checked_sub(1).and_then(|at| volumes.get(at));
    if volume.is_some_and(|volume| !volume.local) {
        clock.before(MAX_SERVER_CLOCK_LAG)
    } else {
        clock
    }
}

/// A scan, and for each of its entries whether its content may differ from what its time stamps imply.
#[derive(Clone, Debug)]
pub(super) struct Baseline {
    pub(super) scan: Arc<Scan>,
    pub(super) unsure: Arc<Vec<bool>>,
}

impl Baseline {
    /// Returns one item per tree. `dirty` are the files whose time stamps are not reliable.
    pub(super) fn of_scans(scans: Vec<Arc<Scan>>, dirty: &HashSet<FileId>) -> Vec<Self> {
        let known = |(number, scan): (usize, Arc<Scan>)| {
            let unsure = |e: Entry| e.root == 0 && dirty.contains(&(number, e.ino));
            let unsure = scan.entries().map(unsure).collect();
            Self {
                scan,
                unsure: Arc::new(unsure),
            }
        };
        scans.into_iter().enumerate().map(known).collect()
    }

    /// Marks the time stamps of more files as unreliable. `tree` is the number of this tree.
    pub(super) fn mark_unreliable(&mut self, tree: usize, files: &HashSet<FileId>) {
        let doubted = |e: Entry| e.root == 0 && files.contains(&(tree, e.ino));
        let doubted = self.scan.entries().map(doubted);
        let unsure = self.unsure.iter().zip(doubted).map(|(a, b)| *a || b);
        self.unsure = Arc::new(unsure.collect());
    }
}

/// Returns the scan of each tree.
pub(super) fn scans(known: &[Baseline]) -> Vec<Arc<Scan>> {
    known.iter().map(|known| Arc::clone(&known.scan)).collect()
}

/// Returns what layers on top must contain, or `None` if such layers cannot express the changes.
pub(super) fn changes(known: &[Baseline], now: &[Arc<Scan>]) -> Option<Vec<Arc<Scan>>> {
    if known.len() != now.len() {
        return None;
    }
    let changes = |(known, now): (&Baseline, &Arc<Scan>)| {
        now.changes_since(&known.scan, &|index| known.unsure[index as usize])
    };
    let changes = known.iter().zip(now).map(changes);
    let mut changes = changes.collect::<Option<Vec<Scan>>>()?;
    if let Some((upper, volumes)) = changes.split_first_mut() {
        for volume in volumes {
            volume.clear_if_covered_by(upper);
        }
    }
    Some(changes.into_iter().map(Arc::new).collect())
}

/// Returns whether all that differs is times of directories.
pub(super) fn differ_only_in_times(known: &[Baseline], now: &[Arc<Scan>]) -> bool {
    let same = |(known, now): (&Baseline, &Arc<Scan>)| {
        now.differs_only_in_times(&known.scan, &|index| known.unsure[index as usize])
    };
    known.len() == now.len() && known.iter().zip(now).all(same)
}

/// Returns one plan per tree.
pub(super) fn plans(scans: Vec<Arc<Scan>>, timestamp: Option<i64>) -> Vec<Plan> {
    let plan = |scan| Plan::new(scan, timestamp);
    scans.into_iter().map(plan).collect()
}

/// Returns the plans that are not empty, divided into layers of the requested size.
pub(super) fn split_plans(plans: Vec<Plan>, layer_size: Option<LayerSize>) -> Vec<Plan> {
    let some = plans.into_iter().filter(|plan| !plan.is_empty());
    some.flat_map(|plan| super::split_plan(plan, layer_size))
        .collect()
}

/// Returns the combined report of all trees.
pub(super) fn report(scans: &[Arc<Scan>]) -> Report {
    let mut report = Report::default();
    for scan in scans {
        report.add(scan.report.clone());
    }
    report
}
