//! The sessions that have ended and are still on disk.
//!
//! All records of the runtimes are read to list them, so that is not done with every listing of what runs: only after a
//! session has ended or was started, after one that had ended was removed, and now and then.

use std::collections::HashMap;
use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash as _, Hasher as _};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::options::Options;
use super::save_ended;
use super::session::session;
use crate::node::container::{self, Container, End, Problem};
use crate::service::job::{Session, SessionEnd, now_ms};

/// Maximum number of sessions that are listed after they have ended, those that ended last.
const MAX_ENDED: usize = 200;
/// Longest interval between two readings of the records.
const READ_EVERY: Duration = Duration::from_secs(60);
/// Time for a runtime to record an end that was noticed. Without CRI, containerd never does.
const SETTLE: Duration = Duration::from_secs(5);
/// Time after that for one more reading.
const LAST_LOOK: Duration = Duration::from_secs(2);

/// One run of a container: its first process, and when that was started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) pid: u32,
    pub(super) pid_start: u64,
    pub(super) started_ms: i64,
}

/// The end of a run that was seen running before.
#[derive(Clone, Copy, Debug)]
struct Noticed {
    at: Instant,
    at_ms: i64,
    started_ms: i64,
}

/// A session that has ended.
#[derive(Debug)]
struct Known {
    session: Session,
    upper: PathBuf,
    /// Whether its runtime has recorded its end.
    recorded: bool,
}

/// The sessions that have ended, as of the last reading of the records.
#[derive(Debug, Default)]
pub(super) struct EndedSessions {
    known: Vec<Known>,
    problems: Vec<Problem>,
    more: u64,
    read: Option<Instant>,
    /// What ran at the last listing, by session.
    running: HashMap<String, Run>,
    noticed: HashMap<String, Noticed>,
}

impl EndedSessions {
    /// Takes note of what runs now. Returns whether the records have to be read again.
    pub(super) fn observe(&mut self, running: HashMap<String, Run>) -> bool {
        let now = Noticed {
            at: Instant::now(),
            at_ms: now_ms(),
            started_ms: 0,
        };
        for (id, run) in &self.running {
            if running.get(id) != Some(run) {
                let started_ms = run.started_ms;
                self.noticed
                    .insert(id.clone(), Noticed { started_ms, ..now });
            }
        }
        self.noticed.retain(|id, _| !running.contains_key(id));
        let changed = self.running != running;
        self.running = running;
        self.known
            .retain(|known| !self.running.contains_key(&known.session.id));
        let stale = self.read.is_none_or(|read| read.elapsed() >= READ_EVERY);
        changed || stale || self.is_settling() || self.known.iter().any(is_removed)
    }

    /// Returns whether a session has ended of which the runtime has not yet recorded how.
    pub(super) fn is_settling(&self) -> bool {
        let recorded = |id: &String| {
            let mut known = self.known.iter();
            known.any(|known| known.session.id == *id && known.recorded)
        };
        let mut noticed = self.noticed.iter();
        noticed.any(|(id, noticed)| noticed.at.elapsed() < SETTLE + LAST_LOOK && !recorded(id))
    }

    /// Stores what was read from the records.
    pub(super) fn set(&mut self, options: &Options, listing: container::EndedListing) {
        let mut known: Vec<Known> = listing
            .containers
            .iter()
            .filter(|container| !self.running.contains_key(&container.id))
            .filter_map(|container| {
                let end = &container.ended()?.end;
                Some(Known {
                    session: self.session(options, container, end),
                    upper: container.overlay.upper.clone(),
                    recorded: end.is_recorded(),
                })
            })
            .collect();
        known.sort_by_key(|known| {
            std::cmp::Reverse(known.session.ended.as_ref().and_then(|end| end.at_ms))
        });
        self.noticed.retain(|id, noticed| {
            noticed.at.elapsed() < SETTLE || known.iter().any(|known| known.session.id == *id)
        });
        self.known = known;
        self.problems = listing.problems;
        self.more = listing.more as u64;
        self.read = Some(Instant::now());
    }

    fn session(&self, options: &Options, container: &Container, end: &End) -> Session {
        let noticed = self.noticed.get(&container.id);
        // What the runtime says does not change when the agent is started again.
        let started_ms = end.started.map(jiff::Timestamp::as_millisecond);
        let at_ms = end.at.filter(|_| end.is_recorded());
        let at_ms = at_ms.map(jiff::Timestamp::as_millisecond);
        let settled =
            end.is_recorded() || noticed.is_some_and(|noticed| noticed.at.elapsed() >= SETTLE);
        let wish = save_ended::wish(options, container);
        let mut session = session(options, container);
        session.started_ms = started_ms
            .or(noticed.map(|noticed| noticed.started_ms))
            .unwrap_or(0);
        session.ended = Some(SessionEnd {
            at_ms: at_ms.or(noticed.map(|noticed| noticed.at_ms)),
            exit_code: end.exit_code,
            out_of_memory: end.out_of_memory,
            save: settled
                && session.owner.is_some()
                && !session.auxiliary
                && wish.wanted.wants(end.exit_code, end.out_of_memory),
            by_pod: wish.by_pod,
            settled,
        });
        session
    }

    /// Returns the sessions, those that ended last first.
    pub(super) fn sessions(&self) -> impl Iterator<Item = &Session> {
        self.known.iter().map(|known| &known.session)
    }

    /// Returns those that cannot be saved.
    pub(super) fn problems(&self) -> &[Problem] {
        &self.problems
    }

    /// Returns the number of those that are not listed, because others ended later.
    pub(super) fn more(&self) -> u64 {
        self.more
    }

    /// Returns when the agent noticed the end of a session.
    pub(super) fn noticed(&self, session: &str) -> Option<Instant> {
        self.noticed.get(session).map(|noticed| noticed.at)
    }
}

/// Reads all records.
pub(super) fn read(options: &Options) -> container::EndedListing {
    container::list_ended(&options.roots, false, MAX_ENDED)
}

fn is_removed(known: &Known) -> bool {
    let found = std::fs::symlink_metadata(&known.upper);
    found.is_err_and(|error| error.kind() == std::io::ErrorKind::NotFound)
}

/// Returns a number that changes whenever there are other sessions that are to be saved; `None` if there are none.
pub(super) fn mark(sessions: &[Session]) -> Option<u64> {
    let wanted = |session: &&Session| session.ended.as_ref().is_some_and(|end| end.save);
    let mut runs: Vec<(&str, i64)> = sessions
        .iter()
        .filter(wanted)
        .map(|session| (session.id.as_str(), session.started_ms))
        .collect();
    runs.sort_unstable();
    let mut hasher = DefaultHasher::new();
    runs.hash(&mut hasher);
    (!runs.is_empty()).then(|| hasher.finish())
}

#[cfg(test)]
mod tests {
    use super::super::save_ended::SAVE_ON_END;
    use super::*;
    use crate::node::container::{Life, Pod};
    use crate::service::agent::OwnerRule;
    use crate::service::agent::kind::tests::container;
    use crate::service::job::SaveEnded;

    fn ended(end: End) -> Container {
        Container {
            life: Life::Ended(container::Ended::of(end)),
            ..container()
        }
    }

    fn listing(containers: Vec<Container>) -> container::EndedListing {
        container::EndedListing {
            containers,
            ..container::EndedListing::default()
        }
    }

    fn recorded() -> End {
        End {
            exit_code: Some(1),
            at: jiff::Timestamp::from_second(1_764_000_000).ok(),
            started: jiff::Timestamp::from_second(1_763_000_000).ok(),
            ..End::default()
        }
    }

    fn options() -> Options {
        Options::new(OwnerRule::Fixed("alice".to_owned()))
    }

    #[test]
    fn records_are_read_when_something_ended_and_until_the_runtime_has_recorded_it() {
        let mut known = EndedSessions::default();
        let run = Run {
            pid: 42,
            pid_start: 7,
            started_ms: 5,
        };
        let runs = |run| HashMap::from([(container().id, run)]);
        assert!(known.observe(runs(run)), "for the first time");
        known.set(&options(), listing(vec![]));
        assert!(!known.observe(runs(run)), "nothing happened");
        assert!(known.observe(HashMap::new()), "it ended");
        // Its runtime has not noticed yet.
        let unnoticed = End {
            unnoticed: Some(42),
            ..End::default()
        };
        let mut it = ended(unnoticed);
        it.overlay.upper = "/".into();
        known.set(&options(), listing(vec![it.clone()]));
        let told = known.sessions().next().cloned().unwrap_or_default();
        let end = told.ended.unwrap_or_default();
        assert!(end.at_ms.is_some() && end.exit_code.is_none() && !end.save);
        assert_eq!(told.started_ms, 5);
        assert!(known.is_settling() && known.observe(HashMap::new()));
        it.life = ended(recorded()).life;
        known.set(&options(), listing(vec![it]));
        let told = known.sessions().next().cloned().unwrap_or_default();
        let end = told.ended.unwrap_or_default();
        assert_eq!(
            (end.at_ms, end.exit_code),
            (Some(1_764_000_000_000), Some(1))
        );
        assert_eq!(told.started_ms, 1_763_000_000_000);
        assert!(!known.is_settling() && !known.observe(HashMap::new()));
        // It is removed.
        known.known[0].upper = "/nowhere/at/all".into();
        assert!(known.observe(HashMap::new()));
        known.known[0].upper = "/".into();
        // It was started again, which is another run of it.
        assert!(known.observe(runs(Run { pid: 43, ..run })));
        assert_eq!(known.sessions().count(), 0);
        known.set(&options(), listing(vec![ended(recorded())]));
        assert_eq!(
            known.sessions().count(),
            0,
            "the record is older than the process"
        );
    }

    #[test]
    fn what_is_saved_by_itself_is_said_by_pod_and_administrator() {
        let save = |default, said: Option<(&str, bool)>, end: End| {
            let mut it = ended(end);
            let mut pod = Pod {
                container: "notebook".to_owned(),
                ..Pod::default()
            };
            if let Some((value, annotated)) = said {
                let values = if annotated {
                    &mut pod.annotations
                } else {
                    &mut pod.labels
                };
                values.insert(SAVE_ON_END.to_owned(), value.to_owned());
            }
            it.pod = Some(pod);
            let mut known = EndedSessions::default();
            let options = Options {
                save_ended: default,
                ..options()
            };
            known.set(&options, listing(vec![it]));
            let told = known.sessions().next().cloned().unwrap_or_default();
            let wanted = told.ended.as_ref().is_some_and(|end| end.save);
            let known = said.is_some_and(|(value, _)| value.parse::<SaveEnded>().is_ok());
            assert_eq!(told.ended.as_ref().map(|end| end.by_pod), Some(known));
            assert_eq!(told.at_end.map(|wish| wish.by_pod), Some(known));
            assert_eq!(mark(&[told]).is_some(), wanted);
            wanted
        };
        let by_itself = || End {
            exit_code: Some(0),
            ..recorded()
        };
        assert!(!save(SaveEnded::Never, None, recorded()));
        assert!(
            save(SaveEnded::Failure, None, recorded())
                && !save(SaveEnded::Failure, None, by_itself())
        );
        assert!(save(SaveEnded::Always, None, by_itself()));
        assert!(save(SaveEnded::Never, Some(("always", true)), by_itself()));
        assert!(save(SaveEnded::Never, Some(("failure", false)), recorded()));
        assert!(!save(SaveEnded::Always, Some(("never", true)), recorded()));
        assert!(
            !save(SaveEnded::Never, Some(("yes", true)), recorded()),
            "not known"
        );
        // When it ended is not known.
        assert!(!save(SaveEnded::Always, None, End::default()));
    }
}
