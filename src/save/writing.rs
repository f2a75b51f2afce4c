//! Decides what the readers of files have to expect of concurrent writers, and handles files that were read without
//! proof that all writes to them were complete (`layer::settle`).

use std::collections::HashSet;
use std::time::Duration;

use super::mapped;
use super::trees::File;
use super::{Context, Error};
use crate::common::escape;
use crate::layer::content::{Instability, Unstable};
use crate::layer::scan::{Kind, Scan};
use crate::layer::{Plan, Writers};
use crate::node::container::{Container, Volume};
use crate::node::freeze::{self, Ways};

/// Timeout for writes in progress while the container runs, over all files of a tree together.
const BESIDE: Duration = Duration::from_secs(60);
/// The same while it is frozen: only writes from outside the container are in progress then.
const FROZEN: Duration = Duration::from_millis(100);
/// Divisor of the permitted pause: a quarter of it may be spent on waiting for asynchronous requests, which continue
/// during a freeze.
const PART: u32 = 4;

/// Assumed if the lists of the processes are not available.
const ANY: Ways = Ways {
    direct: true,
    asynchronous: true,
};

/// Returns the ways in which the container's processes can write.
pub(super) async fn ways(context: &Context, container: &Container) -> Result<Ways, Error> {
    let (pid, host_root) = (container.pid, context.roots.host_root.clone());
    let look = move || {
        let look = move || freeze::ways_to_write(pid, host_root.as_deref());
        mapped::in_time(mapped::LOOK_BOUND, look).unwrap_or(Ok(ANY))
    };
    let ways = tokio::task::spawn_blocking(look);
    Ok(ways.await.map_err(|_| Error::Worker)??)
}

/// Prepares plans, one per tree, that are read beside the running container.
pub(super) fn beside(plans: Vec<Plan>, volumes: &[Volume], ways: Ways) -> Vec<Plan> {
    let writers = Writers {
        direct: ways.direct || ways.asynchronous,
        remote: false,
        still: false,
        patience: BESIDE,
    };
    told(plans, volumes, writers)
}

/// Prepares plans that are read while the container is frozen, for at most `bound`. Synchronous direct writes have
/// ended by then.
pub(super) fn frozen(
    plans: Vec<Plan>,
    volumes: &[Volume],
    ways: Ways,
    bound: Option<Duration>,
) -> Vec<Plan> {
    let patience = match bound {
        _ if !ways.asynchronous => FROZEN,
        Some(bound) => (bound / PART).max(FROZEN),
        None => BESIDE,
    };
    let writers = Writers {
        direct: ways.asynchronous,
        remote: false,
        still: true,
        patience,
    };
    told(plans, volumes, writers)
}

fn told(plans: Vec<Plan>, volumes: &[Volume], writers: Writers) -> Vec<Plan> {
    let told = |(tree, plan): (usize, Plan)| {
        let volume = tree.checked_sub(1).and_then(|at| volumes.get(at));
        plan.beside(Writers {
            // Programs elsewhere that write to a volume are unknown.
            direct: writers.direct || volume.is_some(),
            remote: volume.is_some_and(|volume| !volume.local),
            ..writers
        })
    };
    plans.into_iter().enumerate().map(told).collect()
}

/// Removes from `unstable` the files for which it is unknown whether a write was in progress, and returns their paths.
pub(super) fn take_unsettled(unstable: &mut Vec<Unstable>) -> HashSet<String> {
    let unsettled = |file: &mut Unstable| file.what == Instability::Unsettled;
    let taken = unstable.extract_if(.., unsettled);
    taken.map(|file| file.path).collect()
}

/// Warns of files that were read under the freeze while a write to them may have been in progress.
pub(super) fn tell_unsettled(context: &Context, paths: &HashSet<String>) {
    let Some(first) = paths.iter().min() else {
        return;
    };
    context.warn(
        "unsettled",
        format!(
            "requests to write to {} may have been under way while the container stood still (asynchronous \
             ones, or from outside it), and be in the image in part, e.g. /{first}; the next save takes these files again",
            crate::common::message::count(paths.len(), "file", "files")
        ),
    );
}

/// Returns the files with these paths, which are escaped as in reports.
pub(super) fn files_of<S: AsRef<Scan>>(scans: &[S], paths: &HashSet<String>) -> HashSet<File> {
    if paths.is_empty() {
        return HashSet::new();
    }
    let mut path = Vec::new();
    let mut found = HashSet::new();
    for (tree, scan) in scans.iter().enumerate() {
        let scan = scan.as_ref();
        for (index, entry) in (0..).zip(scan.entries()) {
            if entry.kind == Kind::File {
                scan.path_into(index, &mut path);
                if paths.contains(&escape::path(&path)) {
                    found.insert((tree, entry.ino));
                }
            }
        }
    }
    found
}
