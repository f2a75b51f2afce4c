//! Lists what is on a node: the containers that run, and those that have ended.

use super::Container;
use super::discovery::{assemble, ended_records, first_process, recorded_containers};
use super::ended;
use super::error::{Error, Problem};
use super::mount_tables::Tables;
use super::process;
use super::roots::Roots;

/// Everything on this node that runs with an overlay as its root.
#[derive(Clone, Debug, Default)]
pub struct Listing {
    /// Containers, sorted by namespace, pod and name.
    pub containers: Vec<Container>,
    /// Pause containers of pods, which are never saved.
    pub sandboxes: Vec<Container>,
    /// State that could not be read, and running containers that cannot be saved.
    pub problems: Vec<Problem>,
}

/// Lists all running containers on this node, with the problems encountered.
pub fn list(roots: &Roots) -> Listing {
    let mut listing = Listing::default();
    let tables = Tables::default();
    for draft in recorded_containers(roots, &mut listing.problems) {
        let process = first_process(roots, &draft, process::LIST_LIMITS);
        let result = process.and_then(|process| {
            process
                .map(|p| assemble(roots, &tables, &draft, &p))
                .transpose()
        });
        match result {
            Ok(Some(container)) if draft.sandbox => listing.sandboxes.push(container),
            Ok(Some(container)) => listing.containers.push(container),
            // The container has ended.
            Ok(None) => {}
            Err(error) => listing.problems.push(error.into_problem(&draft.state)),
        }
    }
    listing.containers.sort_by_cached_key(sort_key);
    listing.sandboxes.sort_by_cached_key(sort_key);
    listing
}

/// Containers that have ended, or were never started, and are still on disk.
#[derive(Clone, Debug, Default)]
pub struct EndedListing {
    /// Containers, sorted by namespace, pod and name.
    pub containers: Vec<Container>,
    /// Those that cannot be saved.
    pub problems: Vec<Problem>,
    /// Number of those that were not looked at.
    pub more: usize,
}

/// Lists the containers that have ended and are still on disk, with `created` also those that were never started: `most`
/// of them, those that ended last. Pause containers are left out.
pub fn list_ended(roots: &Roots, created: bool, most: usize) -> EndedListing {
    let drafts = recorded_containers(roots, &mut Vec::new());
    let mut records = ended_records(roots, &drafts);
    records.retain(|record| !record.sandbox && (created || !record.end.never_started));
    // One whose end is not on record yet has ended just now.
    records.sort_by_key(|record| {
        (
            record.end.unnoticed.is_none(),
            std::cmp::Reverse(record.end.at),
        )
    });
    let mut listing = EndedListing {
        more: records.len().saturating_sub(most),
        ..EndedListing::default()
    };
    let tables = Tables::default();
    for record in records.iter().take(most) {
        match ended::assemble(roots, &tables, record) {
            Ok(container) => listing.containers.push(container),
            // It was removed, or started, after it was listed.
            Err(error) if error.is_not_found() || matches!(error, Error::StartedAgain { .. }) => {}
            Err(error) => listing.problems.push(error.into_problem(&record.state)),
        }
    }
    listing.containers.sort_by_cached_key(sort_key);
    listing
}

fn sort_key(container: &Container) -> (Option<String>, Option<(String, String)>, Vec<String>) {
    let pod = container.pod.clone();
    (
        container.namespace.clone(),
        pod.map(|pod| (pod.namespace, pod.name)),
        container.names.clone(),
    )
}
