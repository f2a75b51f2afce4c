//! What runs on the node, as heartbeats tell it. Only what a runtime wrote down is a session: a bare process is its owner's
//! word for itself.

use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::Deserialize;

use super::kind;
use super::options::Options;
use crate::common::escape;
use crate::node::container::{self, Container, MountPoint, Runtime};
use crate::service::job::{NextSave, Session, Unsaved};

/// Problems that a heartbeat tells of at most, and characters of each.
const MAX_PROBLEMS: usize = 20;
const MAX_PROBLEM: usize = 500;
/// Mounts of one session that are told of, and bytes of their names together.
const MAX_MOUNTS: usize = 64;
const MAX_MOUNT_BYTES: usize = 16 << 10;
/// Characters of a name of a session.
const MAX_NAME: usize = 256;

/// What was seen last.
#[derive(Debug, Default)]
pub(super) struct Inventory(Mutex<Seen>);

#[derive(Debug, Default)]
struct Seen {
    sessions: Vec<Session>,
    processes: HashMap<String, (u32, u64)>,
    problems: Vec<String>,
    /// What is in them, and when somebody looked.
    looked: HashMap<String, (Inside, Instant)>,
    /// How long the last save of each took.
    seconds: HashMap<String, f64>,
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
        let mut problems: Vec<String> = listing
            .problems
            .iter()
            .map(|problem| escape::limited(&problem.to_string(), MAX_PROBLEM))
            .collect();
        if problems.len() > MAX_PROBLEMS {
            let more = problems.len() - MAX_PROBLEMS;
            problems.truncate(MAX_PROBLEMS);
            problems.push(format!("and {more} more"));
        }
        let mut state = self.state();
        let is_there = |id: &String| containers.iter().any(|container| container.id == *id);
        state.looked.retain(|id, _| is_there(id));
        state.seconds.retain(|id, _| is_there(id));
        let mut sessions: Vec<Session> = containers
            .iter()
            .map(|container| session(options, container))
            .collect();
        for session in &mut sessions {
            state.inside(session);
        }
        state.sessions = sessions;
        state.processes = containers
            .iter()
            .map(|container| (container.id.clone(), (container.pid, container.pid_start)))
            .collect();
        state.problems = problems;
    }

    /// Sessions that nobody looked into for `every`.
    pub(super) fn due(&self, every: Duration) -> Vec<String> {
        let state = self.state();
        let fresh = |session: &&Session| {
            let looked = state.looked.get(&session.id);
            looked.is_some_and(|(_, at)| at.elapsed() < every)
        };
        let due = state.sessions.iter().filter(|session| !fresh(session));
        due.map(|session| session.id.clone()).collect()
    }

    /// What a look into a session came to; nothing of it is known where that failed.
    pub(super) fn looked_into(&self, id: &str, found: Inside) {
        let mut state = self.state();
        state.looked.insert(id.to_owned(), (found, Instant::now()));
        let mut sessions = std::mem::take(&mut state.sessions);
        for session in sessions.iter_mut().filter(|session| session.id == id) {
            state.inside(session);
        }
        state.sessions = sessions;
    }

    /// It was saved: what the next save would be is another matter now.
    pub(super) fn saved(&self, id: &str, seconds: f64) {
        let mut state = self.state();
        state.looked.remove(id);
        state.seconds.insert(id.to_owned(), seconds);
    }
}

impl Seen {
    fn inside(&self, session: &mut Session) {
        if let Some((found, _)) = self.looked.get(&session.id) {
            session.upper_bytes = found.upper.bytes;
            session.upper_entries = found.upper.entries;
            session.next = found.next_save.as_ref().map(|next| NextSave {
                delta: next.kind == "delta",
                bytes: Some(next.bytes),
                last_seconds: self.seconds.get(&session.id).copied(),
            });
        }
    }
}

/// What of `upperdeck inspect --format json` a heartbeat tells.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub(super) struct Inside {
    #[serde(default)]
    upper: Upper,
    #[serde(default)]
    next_save: Option<Next>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
struct Upper {
    #[serde(default)]
    bytes: Option<u64>,
    #[serde(default)]
    entries: Option<u64>,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
struct Next {
    kind: String,
    bytes: u64,
}

fn session(options: &Options, container: &Container) -> Session {
    let pod = container.pod.as_ref();
    let (unsaved, more) = unsaved(&container.mounts);
    let name = |text: &String| escape::limited(text, MAX_NAME);
    Session {
        id: container.id.clone(),
        node: options.node.clone(),
        owner: options.owner.owner(container),
        namespace: pod.map(|pod| name(&pod.namespace)),
        pod: pod.map(|pod| name(&pod.name)),
        container: pod
            .map(|pod| &pod.container)
            .or_else(|| container.names.first())
            .map(name),
        runtime: container.runtime.name().to_owned(),
        kind: kind::kind(container),
        category: kind::category(container),
        image: container.image_name.as_ref().map(name),
        started_ms: container.started_ms(&options.roots).unwrap_or(0),
        upper_bytes: None,
        upper_entries: None,
        next: None,
        unsaved,
        unsaved_more: more,
        problem: container.mounts_cut.then(|| {
            "more is mounted in it than is listed; a save is refused where it is more than a save can take".to_owned()
        }),
    }
}

/// Each place once, as far as there is room, and how many more there are. What the runtime mounts for itself is told of too,
/// as what it is.
fn unsaved(mounts: &[MountPoint]) -> (Vec<Unsaved>, u64) {
    let mut told = HashSet::new();
    let mut unsaved: Vec<Unsaved> = mounts
        .iter()
        .map(|mount| Unsaved {
            path: escape::text(&mount.destination.to_string_lossy()),
            kind: escape::limited(&mount.kind, MAX_NAME),
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
    let mut bytes = 0;
    let fits = unsaved.iter().take_while(|mount| {
        bytes += mount.path.len() + mount.kind.len();
        bytes <= MAX_MOUNT_BYTES
    });
    let fits = fits.count().min(MAX_MOUNTS);
    let more = unsaved.len() - fits;
    unsaved.truncate(fits);
    (unsaved, more as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::service::agent::OwnerRule;
    use crate::service::agent::kind::tests::{container, mount};

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
        let session = session(&options, &it);
        assert_eq!(session.owner.as_deref(), Some("alice"));
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
        assert_eq!(super::session(&options, &it).owner, None);
    }

    #[test]
    fn what_is_told_of_one_session_is_bounded() -> Result<(), serde_json::Error> {
        let options = Options::new(OwnerRule::Namespace(None));
        let mut it = container();
        let long = "\u{1}".repeat(3700);
        it.names = vec![long.clone()];
        it.pod = None;
        it.image_name = Some(long.clone());
        it.mounts = (0..750)
            .map(|number| mount(&format!("/mnt/{long}{number}"), false))
            .chain([mount("/home/alice", true)])
            .collect();
        let told = session(&options, &it);
        assert_eq!(told.unsaved[0].path, "/home/alice");
        assert_eq!(told.unsaved.len() as u64 + told.unsaved_more, 751);
        let json = serde_json::to_string(&told)?;
        assert!(json.len() < 64 << 10, "{} bytes", json.len());
        it.mounts = (0..750)
            .map(|number| mount(&format!("/m{number}"), true))
            .collect();
        let told = session(&options, &it);
        assert_eq!((told.unsaved.len(), told.unsaved_more), (64, 686));
        Ok(())
    }

    #[test]
    fn what_is_in_a_session_is_kept_until_it_is_saved_or_gone() -> Result<(), serde_json::Error> {
        let inventory = Inventory::default();
        let options = Options::new(OwnerRule::Namespace(None));
        inventory.state().sessions = vec![session(&options, &container())];
        let id = container().id;
        let hour = Duration::from_secs(3600);
        assert_eq!(inventory.due(hour), std::slice::from_ref(&id));
        inventory.saved(&id, 2.5);
        let json = r#"{"id":"x","upper":{"path":"/u","bytes":4096,"entries":3},
            "next_save":{"kind":"delta","reason":"r","entries":1,"bytes":7,"layers":2}}"#;
        inventory.looked_into(&id, serde_json::from_str(json)?);
        assert_eq!(inventory.due(hour), Vec::<String>::new());
        assert_eq!(inventory.due(Duration::ZERO), std::slice::from_ref(&id));
        let told = &inventory.told().0[0];
        let next = NextSave {
            delta: true,
            bytes: Some(7),
            last_seconds: Some(2.5),
        };
        assert_eq!(
            (told.upper_bytes, told.upper_entries),
            (Some(4096), Some(3))
        );
        assert_eq!(told.next, Some(next));
        inventory.saved(&id, 1.0);
        assert_eq!(inventory.due(hour), [id]);
        Ok(())
    }
}
