//! Decides what the readers of files have to expect of concurrent writers, and handles files that were read without
//! proof that all writes to them were complete (`layer::pending_writes`).

use std::collections::HashSet;
use std::time::Duration;

use super::mapped;
use super::trees::FileId;
use super::{Context, Error};
use crate::common::escape;
use crate::layer::content::{Instability, Unstable};
use crate::layer::scan::{Kind, Scan};
use crate::layer::{Plan, Writers};
use crate::node::container::{Container, Volume};
use crate::node::freeze::{self, WriteModes};

/// Timeout for writes in progress while the container runs, over all files of a tree together.
const RUNNING_TIMEOUT: Duration = Duration::from_secs(60);
/// The same while it is frozen: only writes from outside the container are in progress then.
const FROZEN_TIMEOUT: Duration = Duration::from_millis(100);
/// Divisor of the permitted pause: a quarter of it may be spent on waiting for asynchronous requests, which continue
/// during a freeze.
const PAUSE_DIVISOR: u32 = 4;

/// Assumed if the lists of the processes are not available.
const ANY: WriteModes = WriteModes {
    direct: true,
    asynchronous: true,
};

/// Returns the ways in which the container's processes can write.
pub(super) async fn write_modes(
    context: &Context,
    container: &Container,
) -> Result<WriteModes, Error> {
    let pid = container.require_running()?.pid;
    let host_root = context.roots.host_root.clone();
    let look = move || {
        let look = move || freeze::write_modes(pid, host_root.as_deref());
        mapped::with_timeout(mapped::LISTING_TIMEOUT, look).unwrap_or(Ok(ANY))
    };
    let ways = tokio::task::spawn_blocking(look);
    Ok(ways.await.map_err(|_| Error::Worker)??)
}

/// Prepares plans, one per tree, that are read beside the running container.
pub(super) fn prepare_running(
    context: &Context,
    plans: Vec<Plan>,
    volumes: &[Volume],
    ways: WriteModes,
) -> Vec<Plan> {
    let writers = Writers {
        direct: ways.direct || ways.asynchronous,
        remote: false,
        frozen: false,
        max_wait: RUNNING_TIMEOUT,
    };
    with_writers(context, plans, volumes, writers)
}

/// Prepares plans of a container without processes.
pub(super) fn prepare_ended(context: &Context, plans: Vec<Plan>) -> Vec<Plan> {
    let nothing = WriteModes {
        direct: false,
        asynchronous: false,
    };
    prepare_frozen(context, plans, &[], nothing, None)
}

/// Prepares plans that are read while the container is frozen, for at most `bound`. Synchronous direct writes have
/// ended by then.
pub(super) fn prepare_frozen(
    context: &Context,
    plans: Vec<Plan>,
    volumes: &[Volume],
    ways: WriteModes,
    bound: Option<Duration>,
) -> Vec<Plan> {
    let max_wait = match bound {
        _ if !ways.asynchronous => FROZEN_TIMEOUT,
        Some(bound) => (bound / PAUSE_DIVISOR).max(FROZEN_TIMEOUT),
        None => RUNNING_TIMEOUT,
    };
    let writers = Writers {
        direct: ways.asynchronous,
        remote: false,
        frozen: true,
        max_wait,
    };
    with_writers(context, plans, volumes, writers)
}

fn with_writers(
    context: &Context,
    plans: Vec<Plan>,
    volumes: &[Volume],
    writers: Writers,
) -> Vec<Plan> {
    let told = |(tree, plan): (usize, Plan)| {
        let volume = tree.checked_sub(1).and_then(|at| volumes.get(at));
        let writers = Writers {
            // Programs elsewhere that write to a volume are unknown.
            direct: writers.direct || volume.is_some(),
            remote: volume.is_some_and(|volume| !volume.local),
            ..writers
        };
        plan.with_counted_writers(writers, context.registries.waits())
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
pub(super) fn warn_unsettled(context: &Context, paths: &HashSet<String>) {
    let Some(first) = paths.iter().min() else {
        return;
    };
    context.warn(
        "unsettled",
        format!(
            "requests to write to {} may have been in progress while the container was frozen (asynchronous \
             ones, or from outside it), and be in the image in part, e.g. /{first}; the next save takes these files again",
            crate::common::message::count(paths.len(), "file", "files")
        ),
    );
}

/// Returns the files with these paths, which are escaped as in reports.
pub(super) fn files_of<S: AsRef<Scan>>(scans: &[S], paths: &HashSet<String>) -> HashSet<FileId> {
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
