//! The inventory of the node's sessions for heartbeats. Only a container that a runtime recorded is a session, because
//! a bare process could claim any identity.

use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::Deserialize;

use super::ended::{self, EndedSessions, Run};
use super::options::Options;
use super::session::session;
use super::watch::Process;
use crate::common::escape;
use crate::image::packages::Packages;
use crate::node::container::{self, Container, Problem, Runtime};
use crate::service::job::{JobId, Look, NextSave, Session, SessionEnd, now_ms};

/// Maximum number of problems in a heartbeat, and of characters in each.
const MAX_PROBLEMS: usize = 20;
const MAX_PROBLEM: usize = 500;
/// Maximum number of packages that are listed per session, and of bytes in all their texts.
const MAX_PACKAGES: usize = 200;
const MAX_PACKAGE_BYTES: usize = 8 << 10;
/// Result of the latest listing and inspections.
#[derive(Debug, Default)]
pub(super) struct Inventory(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    sessions: Vec<Session>,
    processes: HashMap<String, Process>,
    problems: Vec<String>,
    /// Result and time of the latest inspection of each session.
    inspected: HashMap<String, Inspected>,
    /// The last save of each session since the agent was started.
    saved: HashMap<String, Saved>,
    ended: EndedSessions,
}

/// The latest inspection of a session.
#[derive(Debug)]
struct Inspected {
    found: Inspection,
    look: Look,
    at: Instant,
}

/// The last save of a session.
#[derive(Clone, Copy, Debug)]
struct Saved {
    job: JobId,
    seconds: f64,
}

impl Inventory {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns PID and start time of a session at the latest listing.
    pub(super) fn process_of(&self, session: &str) -> Option<Process> {
        self.state().processes.get(session).copied()
    }

    /// Returns the first processes of all sessions at the latest listing.
    pub(super) fn processes(&self) -> HashSet<Process> {
        self.state().processes.values().copied().collect()
    }

    /// Returns whether a session has ended of which the runtime has not yet recorded how.
    pub(super) fn is_settling(&self) -> bool {
        self.state().ended.is_settling()
    }

    /// Returns the number of sessions that have ended and are not listed.
    pub(super) fn ended_more(&self) -> u64 {
        self.state().ended.more()
    }

    /// Returns the sessions, and the problems that limit what is known about them.
    pub(super) fn snapshot(&self) -> (Vec<Session>, Vec<String>) {
        let state = self.state();
        (state.sessions.clone(), state.problems.clone())
    }

    /// Returns the numbers of sessions and of problems.
    pub(super) fn counts(&self) -> (usize, usize) {
        let state = self.state();
        (state.sessions.len(), state.problems.len())
    }

    /// Lists the sessions again. Reads the state of the runtimes and `/proc`, but no trees. Returns whether one has ended or
    /// was started, or more is known of one that has ended.
    pub(super) fn refresh(&self, options: &Options) -> bool {
        let listing = container::list(&options.roots);
        let of_runtime = |container: &&Container| container.runtime != Runtime::Process;
        let containers: Vec<&Container> = listing.containers.iter().filter(of_runtime).collect();
        let mut sessions: Vec<Session> = containers
            .iter()
            .map(|container| session(options, container))
            .collect();
        let runs: HashMap<String, Run> = containers
            .iter()
            .zip(&sessions)
            .filter_map(|(container, session)| {
                let running = container.running()?;
                let run = Run {
                    pid: running.pid,
                    pid_start: running.pid_start,
                    started_ms: session.started_ms,
                };
                Some((container.id.clone(), run))
            })
            .collect();
        let process = |run: &Run| (run.pid, run.pid_start);
        let processes = runs.iter().map(|(id, run)| (id.clone(), process(run)));
        let processes = processes.collect();
        let is_due = self.state().ended.observe(runs);
        let read = is_due.then(|| ended::read(options));
        let mut state = self.state();
        if let Some(read) = read {
            state.ended.set(options, read);
        }
        state.problems = problems(&listing.problems, state.ended.problems());
        sessions.extend(state.ended.sessions().cloned());
        let there: HashSet<&String> = sessions.iter().map(|session| &session.id).collect();
        state.inspected.retain(|id, _| there.contains(id));
        state.saved.retain(|id, _| there.contains(id));
        for session in &mut sessions {
            state.apply_inspection(session);
        }
        let lives = |sessions: &[Session]| -> Vec<(String, Option<SessionEnd>)> {
            let one = |session: &Session| (session.id.clone(), session.ended.clone());
            sessions.iter().map(one).collect()
        };
        let changed = lives(&state.sessions) != lives(&sessions);
        state.sessions = sessions;
        state.processes = processes;
        changed
    }

    /// Returns the sessions that have not been inspected for `every`, or not since they ended.
    pub(super) fn due(&self, every: Duration) -> Vec<String> {
        let state = self.state();
        let fresh = |session: &&Session| {
            let Some(Inspected { at, .. }) = state.inspected.get(&session.id) else {
                return false;
            };
            match session.ended {
                Some(_) => state.ended.noticed(&session.id).is_none_or(|end| *at > end),
                None => at.elapsed() < every,
            }
        };
        let due = state.sessions.iter().filter(|session| !fresh(session));
        due.map(|session| session.id.clone()).collect()
    }

    /// Returns the description of an inspection that begins now.
    pub(super) fn begin_look(&self, id: &str) -> Look {
        Look {
            at_ms: now_ms(),
            after: self.state().saved.get(id).map(|saved| saved.job),
        }
    }

    /// Stores the result of an inspection; the default value if it failed. One that began before the last save ended is
    /// dropped.
    pub(super) fn set_inspection(&self, id: &str, look: Look, mut found: Inspection) {
        let packages = found.packages.take();
        found.packages = packages.map(|all| all.sanitised(MAX_PACKAGES, MAX_PACKAGE_BYTES));
        let mut state = self.state();
        if state.saved.get(id).map(|saved| saved.job) != look.after {
            return;
        }
        let at = Instant::now();
        let inspected = Inspected { found, look, at };
        state.inspected.insert(id.to_owned(), inspected);
        let mut sessions = std::mem::take(&mut state.sessions);
        for session in sessions.iter_mut().filter(|session| session.id == id) {
            state.apply_inspection(session);
        }
        state.sessions = sessions;
    }

    /// Records a completed save. The earlier inspection is dropped, because the next save depends on the new state.
    pub(super) fn record_save(&self, id: &str, job: JobId, seconds: f64) {
        let mut state = self.state();
        state.inspected.remove(id);
        state.saved.insert(id.to_owned(), Saved { job, seconds });
    }
}

impl State {
    fn apply_inspection(&self, session: &mut Session) {
        if let Some(Inspected { found, look, .. }) = self.inspected.get(&session.id) {
            session.look = Some(*look);
            session.upper_bytes = found.upper.bytes;
            session.upper_entries = found.upper.entries;
            session.packages.clone_from(&found.packages);
            session.next = found.next_save.as_ref().map(|next| NextSave {
                delta: next.kind == "delta",
                bytes: Some(next.bytes),
                entries: Some(next.entries),
                times_only: next.times_only,
                last_seconds: self.saved.get(&session.id).map(|saved| saved.seconds),
            });
        }
    }
}

/// The part of `upperdeck inspect --format json` that heartbeats contain.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub(super) struct Inspection {
    #[serde(default)]
    upper: Upper,
    #[serde(default)]
    next_save: Option<Next>,
    #[serde(default)]
    packages: Option<Packages>,
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
    entries: u64,
    #[serde(default)]
    times_only: bool,
}

/// Returns the problems of a listing as sentences, those with what runs before the others.
fn problems(running: &[Problem], ended: &[Problem]) -> Vec<String> {
    let all = running.len() + ended.len();
    let mut problems: Vec<String> = running
        .iter()
        .chain(ended)
        .take(MAX_PROBLEMS)
        .map(|problem| escape::limited(&problem.to_string(), MAX_PROBLEM))
        .collect();
    if all > problems.len() {
        problems.push(format!("and {} more", all - problems.len()));
    }
    problems
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
        let before = inventory.begin_look(&id);
        let job = JobId::new();
        inventory.record_save(&id, job, 2.5);
        let json = r#"{"id":"x","upper":{"path":"/u","bytes":4096,"entries":3},
            "next_save":{"kind":"delta","reason":"r","entries":1,"bytes":7,"layers":2}}"#;
        // One that began before the save ended tells nothing about what changed since.
        inventory.set_inspection(&id, before, serde_json::from_str(json)?);
        assert_eq!(inventory.due(hour), std::slice::from_ref(&id));
        assert_eq!(inventory.snapshot().0[0].look, None);
        let look = inventory.begin_look(&id);
        assert_eq!(look.after, Some(job));
        inventory.set_inspection(&id, look, serde_json::from_str(json)?);
        assert_eq!(inventory.due(hour), Vec::<String>::new());
        assert_eq!(inventory.due(Duration::ZERO), std::slice::from_ref(&id));
        let told = &inventory.snapshot().0[0];
        let next = NextSave {
            delta: true,
            bytes: Some(7),
            entries: Some(1),
            times_only: false,
            last_seconds: Some(2.5),
        };
        assert_eq!(
            (told.upper_bytes, told.upper_entries),
            (Some(4096), Some(3))
        );
        assert_eq!((&told.next, told.look), (&Some(next), Some(look)));
        inventory.record_save(&id, JobId::new(), 1.0);
        assert_eq!(inventory.due(hour), [id]);
        Ok(())
    }
}
