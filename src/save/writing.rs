//! What the readers of files are told of those who write to them meanwhile, and what becomes of files that were read
//! without knowing that all writes to them were over (`layer::settle`).

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

/// For how long writes are waited for beside the running container, all files of a tree together.
const BESIDE: Duration = Duration::from_secs(60);
/// And while it stands still: then only those of others are under way.
const FROZEN: Duration = Duration::from_millis(100);
/// Requests that go on while it stands still may take this part of the time that it may do so.
const PART: u32 = 4;

/// What is reckoned with where the lists of the processes do not come.
const ANY: Ways = Ways {
    direct: true,
    asynchronous: true,
};

/// In which ways the container's processes can write.
pub(super) async fn ways(context: &Context, container: &Container) -> Result<Ways, Error> {
    let (pid, host_root) = (container.pid, context.roots.host_root.clone());
    let look = move || {
        let look = move || freeze::ways_to_write(pid, host_root.as_deref());
        mapped::in_time(mapped::LOOK_BOUND, look).unwrap_or(Ok(ANY))
    };
    let ways = tokio::task::spawn_blocking(look);
    Ok(ways.await.map_err(|_| Error::Worker)??)
}

/// Plans, one for each tree, that are read beside the running container.
pub(super) fn beside(plans: Vec<Plan>, volumes: &[Volume], ways: Ways) -> Vec<Plan> {
    let writers = Writers {
        direct: ways.direct || ways.asynchronous,
        remote: false,
        still: false,
        patience: BESIDE,
    };
    told(plans, volumes, writers)
}

/// Those that are read while it stands still, for `bound` at most: direct writes that somebody waits for have ended.
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
            // Nothing is known of those who write to a volume from elsewhere.
            direct: writers.direct || volume.is_some(),
            remote: volume.is_some_and(|volume| !volume.local),
            ..writers
        })
    };
    plans.into_iter().enumerate().map(told).collect()
}

/// Takes the files out of `unstable` of which nobody knows whether a write was under way.
pub(super) fn take_unsettled(unstable: &mut Vec<Unstable>) -> HashSet<String> {
    let unsettled = |file: &mut Unstable| file.what == Instability::Unsettled;
    let taken = unstable.extract_if(.., unsettled);
    taken.map(|file| file.path).collect()
}

/// Says of files that were read while the container stood still what may be wrong with them.
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

/// The files that have these paths, printable as in reports.
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
