//! The agent's state on disk, so that its death loses nothing: running children, what they may have frozen, and the
//! outcomes of jobs that the queue has not received or has lost.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::fs::OFlags;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::Error;
use crate::common::{private_files, regular_file};
use crate::service::job::{JobId, Order, Outcome};
use crate::service::queue::Claim;

/// How long a success counts for later attempts. An older image may have been deleted since, so a later attempt does
/// the job again.
const KEEP_OUTCOMES: Duration = Duration::from_secs(24 * 60 * 60);
/// Maximum difference between the clocks of managers and nodes.
const MAX_CLOCK_SKEW: Duration = Duration::from_secs(60 * 60);
/// Maximum number of outcomes; the oldest are removed first.
const MAX_OUTCOMES: usize = 10_000;
/// Interval between two searches for expired outcomes.
const TIDY_EVERY: Duration = Duration::from_secs(5 * 60);
/// Maximum size of a file in bytes; a larger one was not written by the agent.
const MAX_FILE_SIZE: u64 = 4 << 20;

/// The spool directory and the lock on it.
#[derive(Debug)]
pub(super) struct Spool {
    running: PathBuf,
    outcomes: PathBuf,
    tidied: Mutex<Option<Instant>>,
    _lock: File,
}

/// A running child process.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ChildRecord {
    /// The container that it saves.
    pub(super) session: String,
    /// PID of the child, which is also its process group ID.
    pub(super) pid: u32,
    /// Start time of the child, in ticks since boot.
    pub(super) pid_start: u64,
}

/// Outcome of an attempt.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct StoredOutcome {
    session: String,
    destination: String,
    attempt: u32,
    fence: u64,
    at_ms: i64,
    /// Time after which no order for the attempt can be valid.
    until_ms: i64,
    outcome: Outcome,
}

/// A file of a running job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum JobFile {
    /// A [`ChildRecord`].
    Child,
    /// The mark of a freeze.
    FreezeMark,
    /// The output of `commit --metadata-file`.
    Metadata,
}

impl JobFile {
    const ALL: [Self; 3] = [Self::Child, Self::FreezeMark, Self::Metadata];

    fn suffix(self) -> &'static str {
        match self {
            Self::Child => "note",
            Self::FreezeMark => "frozen",
            Self::Metadata => "metadata",
        }
    }
}

impl Spool {
    /// Opens the spool at `dir`, creating it if necessary, and locks it for this agent. Fails with [`Error::Locked`] if
    /// another agent holds the lock.
    pub(super) fn open(dir: &Path) -> Result<Self, Error> {
        let (running, outcomes) = (dir.join("running"), dir.join("outcomes"));
        let failed = |source| Error::Directory {
            path: dir.display().to_string(),
            source,
        };
        let ours = |name: &str| matches!(name, "running" | "outcomes" | "lock");
        private_files::prepare_dir(dir, ours).map_err(failed)?;
        for dir in [&running, &outcomes] {
            private_files::prepare_dir(dir, |_| true).map_err(failed)?;
        }
        let mut options = OpenOptions::new();
        let options = options.write(true).create(true).truncate(false).mode(0o600);
        let lock = regular_file::open_with(&dir.join("lock"), options, OFlags::NOFOLLOW)
            .map_err(failed)?;
        match rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Self {
                running,
                outcomes,
                tidied: Mutex::default(),
                _lock: lock,
            }),
            Err(rustix::io::Errno::WOULDBLOCK) => Err(Error::Locked {
                path: dir.display().to_string(),
            }),
            Err(error) => Err(failed(error.into())),
        }
    }

    /// Returns the path of a running job's file.
    pub(super) fn file(&self, job: JobId, of: JobFile) -> PathBuf {
        self.running.join(format!("{job}.{}", of.suffix()))
    }

    /// Records that a child runs.
    pub(super) fn begin(&self, job: JobId, note: &ChildRecord) -> io::Result<()> {
        write(&self.file(job, JobFile::Child), note)
    }

    /// Records that the child has ended and has left nothing frozen.
    pub(super) fn end(&self, job: JobId) {
        for of in [JobFile::Metadata, JobFile::Child] {
            remove(&self.file(job, of));
        }
    }

    /// Returns the jobs that have files left, each with its note if that can be read.
    pub(super) fn leftovers(&self) -> Vec<(JobId, Option<ChildRecord>)> {
        let mut jobs: Vec<JobId> = names(&self.running)
            .iter()
            .filter_map(|name| {
                let (job, suffix) = name.split_once('.')?;
                let known = JobFile::ALL.iter().any(|of| of.suffix() == suffix);
                known.then(|| job.parse().ok()).flatten()
            })
            .collect();
        jobs.sort_unstable();
        jobs.dedup();
        jobs.into_iter()
            .map(|job| (job, read(&self.file(job, JobFile::Child))))
            .collect()
    }

    fn outcome(&self, job: JobId) -> PathBuf {
        self.outcomes.join(format!("{job}.json"))
    }

    /// Stores the outcome of `claim`. This happens before the managers are informed.
    pub(super) fn store_outcome(
        &self,
        claim: &Claim,
        outcome: &Outcome,
        now_ms: i64,
    ) -> io::Result<()> {
        let order = &claim.order;
        // All orders for an attempt are signed before it ends and are valid for as long as this one.
        let lives = order.expires_ms.saturating_sub(order.issued_ms);
        let lives = lives.max(KEEP_OUTCOMES.as_millis() as i64);
        let kept = StoredOutcome {
            session: order.session.clone(),
            destination: order.destination.clone(),
            attempt: order.attempt,
            fence: claim.fence,
            at_ms: now_ms,
            until_ms: now_ms
                .saturating_add(lives)
                .saturating_add(MAX_CLOCK_SKEW.as_millis() as i64),
            outcome: outcome.clone(),
        };
        write(&self.outcome(order.job), &kept)
    }

    /// Returns the outcome of the attempt of `order`, or of a later one, if it has already ended. The outcome is
    /// reported again and the save is not repeated, whether the queue did not receive the outcome, lost it, or was
    /// given an old order by a third party with write access. A later attempt is new work, unless an earlier one
    /// recently created the same image.
    pub(super) fn stored_outcome(&self, order: &Order, now_ms: i64) -> Option<Outcome> {
        let kept: StoredOutcome = read(&self.outcome(order.job))?;
        if order.attempt <= kept.attempt {
            return Some(kept.outcome);
        }
        let age = now_ms.checked_sub(kept.at_ms)?;
        let fresh = (0..KEEP_OUTCOMES.as_millis() as i64).contains(&age);
        let same = kept.session == order.session && kept.destination == order.destination;
        let there = matches!(kept.outcome, Outcome::Succeeded { .. });
        (fresh && same && there).then_some(kept.outcome)
    }

    /// Removes outcomes that have expired or exceed the maximum number, at most once per [`TIDY_EVERY`].
    pub(super) fn tidy(&self, now_ms: i64) {
        let mut tidied = self.tidied.lock().unwrap_or_else(PoisonError::into_inner);
        if tidied.is_none_or(|at| at.elapsed() >= TIDY_EVERY) {
            *tidied = Some(Instant::now());
            self.tidy_now(now_ms);
        }
    }

    /// Removes the outcomes. File names sort by the creation time of their jobs.
    fn tidy_now(&self, now_ms: i64) {
        let mut names = names(&self.outcomes);
        names.sort_unstable();
        let surplus = names.len().saturating_sub(MAX_OUTCOMES);
        for (n, name) in names.iter().enumerate() {
            let path = self.outcomes.join(name);
            let old = || {
                let kept: Option<StoredOutcome> = read(&path);
                kept.is_none_or(|kept| now_ms >= kept.until_ms)
            };
            if n < surplus || old() {
                remove(&path);
            }
        }
    }
}

fn names(dir: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(dir) else {
        return Vec::new();
    };
    entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .collect()
}

fn read<T: DeserializeOwned>(path: &Path) -> Option<T> {
    let file = regular_file::open_own(path).ok()?;
    serde_json::from_slice(&regular_file::read_open(file, MAX_FILE_SIZE).ok()?).ok()
}

/// Writes to a temporary file in the same directory, syncs it and renames it, so that a file is always complete.
fn write<T: Serialize>(path: &Path, content: &T) -> io::Result<()> {
    let dir = path.parent().unwrap_or(Path::new("."));
    let mut file = tempfile::NamedTempFile::new_in(dir)?;
    file.write_all(&serde_json::to_vec(content)?)?;
    file.as_file().sync_all()?;
    file.persist(path).map_err(|error| error.error)?;
    File::open(dir)?.sync_all()
}

fn remove(path: &Path) {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(path = %path.display(), %error, "cannot remove a file of the spool");
        }
        _ => {}
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::service::job::Saved;

    const DAY: i64 = 24 * 3600 * 1000;

    pub(in crate::service::agent) fn order() -> Order {
        Order {
            job: JobId::new(),
            node: "node-1".to_owned(),
            session: "ab".repeat(32),
            owner: "alice".to_owned(),
            destination: "oci:/srv/images/alice/x:1".to_owned(),
            attempt: 1,
            expires_ms: DAY,
            timeout_s: 600,
            ..Order::default()
        }
    }

    fn succeeded() -> Outcome {
        let saved = Saved {
            reference: "x".to_owned(),
            digest: "sha256:0".to_owned(),
            layer_bytes: 1,
            image_bytes: 2,
            sent_bytes: 3,
            entries: 4,
            pause_ms: Some(1.5),
            seconds: 0.5,
            ..Saved::default()
        };
        Outcome::Succeeded { saved }
    }

    fn claim(order: &Order) -> Claim {
        Claim {
            order: order.clone(),
            fence: 7,
        }
    }

    #[test]
    fn a_success_is_told_to_later_attempts_of_the_same_save_and_not_for_ever()
    -> Result<(), Box<dyn std::error::Error>> {
        let dir = tempfile::tempdir()?;
        let spool = Spool::open(dir.path())?;
        let first = order();
        let order = Order {
            attempt: 2,
            ..first.clone()
        };
        assert_eq!(spool.stored_outcome(&order, 5), None);
        spool.store_outcome(&claim(&first), &succeeded(), 1000)?;
        assert_eq!(spool.stored_outcome(&order, 2000), Some(succeeded()));
        assert_eq!(spool.stored_outcome(&order, 1000 + DAY), None);
        assert_eq!(
            spool.stored_outcome(&order, 10),
            None,
            "a clock that was put back proves nothing"
        );
        let elsewhere = Order {
            destination: "oci:/srv/images/alice/y:1".to_owned(),
            ..order.clone()
        };
        assert_eq!(spool.stored_outcome(&elsewhere, 2000), None);
        fs::write(spool.outcome(order.job), b"{")?;
        assert_eq!(spool.stored_outcome(&order, 2000), None);
        spool.tidy_now(2000);
        assert!(
            !spool.outcome(order.job).exists(),
            "what cannot be read is of no use"
        );
        Ok(())
    }

    #[test]
    fn what_has_ended_is_remembered_as_long_as_an_order_for_it_lives()
    -> Result<(), Box<dyn std::error::Error>> {
        let dir = tempfile::tempdir()?;
        let week = Order {
            attempt: 3,
            issued_ms: DAY,
            expires_ms: 8 * DAY,
            ..order()
        };
        let failed = Outcome::Failed {
            code: crate::service::job::Code::Internal,
            message: "why".to_owned(),
            retryable: true,
        };
        for outcome in [Outcome::Cancelled, failed, succeeded()] {
            let order = Order {
                job: JobId::new(),
                ..week.clone()
            };
            Spool::open(dir.path())?.store_outcome(&claim(&order), &outcome, 2 * DAY)?;
            // Also by another agent, and whatever the clock shows.
            let spool = Spool::open(dir.path())?;
            for at in [0, 2 * DAY, 9 * DAY] {
                spool.tidy_now(at);
                assert_eq!(spool.stored_outcome(&order, at).as_ref(), Some(&outcome));
                let earlier = Order {
                    attempt: 1,
                    destination: "oci:/srv/images/alice/y:1".to_owned(),
                    ..order.clone()
                };
                assert_eq!(spool.stored_outcome(&earlier, at).as_ref(), Some(&outcome));
            }
            let later = Order {
                attempt: 4,
                ..order.clone()
            };
            let told = spool.stored_outcome(&later, 2 * DAY);
            assert_eq!(told, (outcome == succeeded()).then(succeeded));
            spool.tidy_now(9 * DAY + MAX_CLOCK_SKEW.as_millis() as i64);
            assert_eq!(spool.stored_outcome(&order, 9 * DAY), None);
        }
        Ok(())
    }

    #[test]
    fn no_more_is_remembered_than_there_is_room_for() -> Result<(), Box<dyn std::error::Error>> {
        let dir = tempfile::tempdir()?;
        let spool = Spool::open(dir.path())?;
        let orders: Vec<Order> = (0..MAX_OUTCOMES + 3)
            .map(|_| Order {
                job: JobId::new(),
                ..order()
            })
            .collect();
        spool.store_outcome(&claim(&orders[0]), &Outcome::Cancelled, 0)?;
        for order in &orders[1..] {
            fs::hard_link(spool.outcome(orders[0].job), spool.outcome(order.job))?;
        }
        spool.tidy_now(1);
        let left = names(&spool.outcomes);
        assert_eq!(left.len(), MAX_OUTCOMES);
        let kept = |order: &Order| left.contains(&format!("{}.json", order.job));
        let newest = orders.last().ok_or("none")?;
        assert!(!kept(&orders[0]) && kept(newest));
        Ok(())
    }

    #[test]
    fn what_is_left_of_jobs_is_found_and_a_spool_has_one_agent()
    -> Result<(), Box<dyn std::error::Error>> {
        let dir = tempfile::tempdir()?;
        let spool = Spool::open(dir.path())?;
        assert!(matches!(Spool::open(dir.path()), Err(Error::Locked { .. })));
        let (noted, marked) = (JobId::new(), JobId::new());
        let note = || ChildRecord {
            session: "x".to_owned(),
            pid: 7,
            pid_start: 9,
        };
        spool.begin(noted, &note())?;
        fs::write(spool.file(marked, JobFile::FreezeMark), b"{}")?;
        fs::write(spool.running.join("stranger"), b"")?;
        fs::write(spool.running.join("x.note"), b"")?;
        assert_eq!(spool.leftovers(), [(noted, Some(note())), (marked, None)]);
        spool.end(noted);
        assert_eq!(spool.leftovers(), [(marked, None)]);
        drop(spool);
        Spool::open(dir.path())?;
        Ok(())
    }
}
