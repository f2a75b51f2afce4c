//! What runs on the node, as heartbeats tell it. Only what a runtime wrote down is a session: a bare process is its owner's
//! word for itself.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::kind;
use super::options::Options;
use crate::container::{self, Container, MountPoint, Runtime};
use crate::job::{Session, Unsaved};
use crate::scan::{self, Usage};

/// Problems that a heartbeat tells of at most.
const MAX_PROBLEMS: usize = 20;
/// The nicest: a look at a large tree is not to be felt.
const NICEST: i32 = 19;

/// What was seen last.
#[derive(Debug, Default)]
pub(super) struct Inventory(Mutex<Seen>);

#[derive(Debug, Default)]
struct Seen {
    sessions: Vec<Session>,
    processes: HashMap<String, (u32, u64)>,
    uppers: HashMap<String, PathBuf>,
    problems: Vec<String>,
    sizes: HashMap<String, (Usage, Instant)>,
}

impl Inventory {
    fn state(&self) -> MutexGuard<'_, Seen> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Process and start time of a session when it was looked at last.
    pub(super) fn seen(&self, session: &str) -> Option<(u32, u64)> {
        self.state().processes.get(session).copied()
    }

    /// Sessions, and what stands in the way of knowing more.
    pub(super) fn told(&self) -> (Vec<Session>, Vec<String>) {
        let state = self.state();
        (state.sessions.clone(), state.problems.clone())
    }

    /// Looks again. Reads the runtimes' state and `/proc`, no trees.
    pub(super) fn look(&self, options: &Options) {
        let listing = container::list(&options.roots);
        let of_runtime = |container: &&Container| container.runtime != Runtime::Process;
        let containers: Vec<&Container> = listing.containers.iter().filter(of_runtime).collect();
        let mut problems: Vec<String> = listing.problems.iter().map(ToString::to_string).collect();
        if problems.len() > MAX_PROBLEMS {
            let more = problems.len() - MAX_PROBLEMS;
            problems.truncate(MAX_PROBLEMS);
            problems.push(format!("and {more} more"));
        }
        let mut state = self.state();
        state
            .sizes
            .retain(|id, _| containers.iter().any(|container| container.id == *id));
        state.sessions = containers
            .iter()
            .map(|container| {
                session(
                    options,
                    container,
                    state.sizes.get(&container.id).map(|(usage, _)| *usage),
                )
            })
            .collect();
        state.processes = containers
            .iter()
            .map(|container| (container.id.clone(), (container.pid, container.pid_start)))
            .collect();
        state.uppers = containers
            .iter()
            .map(|container| (container.id.clone(), container.overlay.upper.clone()))
            .collect();
        state.problems = problems;
    }

    /// Counts the upper directories that were not counted for `every`, one after another, as a thread that is not felt.
    pub(super) fn count(&self, every: Duration, stop: &dyn Fn() -> bool) {
        let _ = rustix::process::setpriority_process(None, NICEST);
        let due: Vec<(String, PathBuf)> = {
            let state = self.state();
            let fresh = |id: &String| {
                state
                    .sizes
                    .get(id)
                    .is_some_and(|(_, at)| at.elapsed() < every)
            };
            let due = state.uppers.iter().filter(|(id, _)| !fresh(id));
            due.map(|(id, upper)| (id.clone(), upper.clone())).collect()
        };
        for (id, upper) in due {
            if stop() {
                return;
            }
            // What cannot be read is not known.
            let Ok(usage) = scan::usage(&upper) else {
                continue;
            };
            let mut state = self.state();
            if let Some(session) = state.sessions.iter_mut().find(|session| session.id == id) {
                session.upper_bytes = Some(usage.bytes);
                session.upper_entries = Some(usage.entries);
            }
            state.sizes.insert(id, (usage, Instant::now()));
        }
    }
}

fn session(options: &Options, container: &Container, usage: Option<Usage>) -> Session {
    let pod = container.pod.as_ref();
    Session {
        id: container.id.clone(),
        node: options.node.clone(),
        owner: options.owner.owner(container),
        namespace: pod.map(|pod| pod.namespace.clone()),
        pod: pod.map(|pod| pod.name.clone()),
        container: pod
            .map(|pod| pod.container.clone())
            .or_else(|| container.names.first().cloned()),
        runtime: container.runtime.name().to_owned(),
        kind: kind::kind(container),
        category: kind::category(container),
        image: container.image_name.clone(),
        started_ms: container.started_ms(&options.roots).unwrap_or(0),
        upper_bytes: usage.map(|usage| usage.bytes),
        upper_entries: usage.map(|usage| usage.entries),
        next: None,
        unsaved: unsaved(&container.mounts),
    }
}

/// Each place once. What the runtime mounts for itself is told of too, as what it is.
fn unsaved(mounts: &[MountPoint]) -> Vec<Unsaved> {
    let mut told = HashSet::new();
    let mut unsaved: Vec<Unsaved> = mounts
        .iter()
        .map(|mount| Unsaved {
            path: mount.destination.to_string_lossy().into_owned(),
            kind: mount.kind.clone(),
            data: mount.volume,
        })
        // Below /proc, /sys and /dev everything is the kernel's: one line for each tells as much.
        .filter(|mount| {
            !["/proc/", "/sys/", "/dev/"]
                .iter()
                .any(|own| mount.path.starts_with(own))
                || mount.data
        })
        .filter(|mount| told.insert(mount.path.clone()))
        .collect();
    unsaved.sort_by(|a, b| (!a.data, &a.path).cmp(&(!b.data, &b.path)));
    unsaved
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::OwnerRule;
    use crate::agent::kind::tests::{container, mount};

    #[test]
    fn a_session_says_whose_it_is_and_what_is_not_saved() {
        let options = Options::new(OwnerRule::Env("JUPYTERHUB_USER".to_owned()));
        let mut it = container();
        it.names = vec!["web".to_owned()];
        it.spec.env = vec!["JUPYTERHUB_USER=alice".to_owned()];
        it.mounts = vec![
            mount("/proc", false),
            mount("/proc/kcore", false),
            mount("/etc/hosts", false),
            mount("/home/alice", true),
            mount("/home/alice", true),
        ];
        let usage = Usage {
            entries: 3,
            bytes: 4096,
        };
        let session = session(&options, &it, Some(usage));
        assert_eq!(session.owner.as_deref(), Some("alice"));
        assert_eq!(
            (session.upper_bytes, session.upper_entries),
            (Some(4096), Some(3))
        );
        assert_eq!(
            (session.container.as_deref(), session.runtime.as_str()),
            (Some("web"), "containerd")
        );
        let told: Vec<(&str, bool)> = session
            .unsaved
            .iter()
            .map(|mount| (mount.path.as_str(), mount.data))
            .collect();
        assert_eq!(
            told,
            [
                ("/home/alice", true),
                ("/etc/hosts", false),
                ("/proc", false)
            ]
        );
        it.spec.env = vec!["JUPYTERHUB_USER=../x".to_owned()];
        assert_eq!(super::session(&options, &it, None).owner, None);
    }
}
