//! Compares the record with the queue at regular intervals, and repairs differences that persist.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use super::TaskError;
use crate::service::job::{Code, JobId, State, now_ms};
use crate::service::manager::App;
use crate::service::queue::Place;
use crate::service::record::OpenSaveState;

/// Number of saves per query.
const BATCH: u32 = 500;
/// A queue that has not responded for this long and two more rounds counts as unavailable in the meantime.
const MAX_QUEUE_GAP: Duration = Duration::from_secs(2);
/// Time before a save that the queue does not know counts as lost while unacknowledged reports may explain it.
const REPORTS_GRACE: Duration = Duration::from_secs(120);
/// Interval at which a request for cancellation is repeated.
const REMIND_EVERY: Duration = Duration::from_secs(30);

/// A difference between the record and the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mismatch {
    /// The queue does not know the save.
    Unknown,
    /// An agent had claimed the save but does not renew its lease.
    NoLease,
    /// Cancellation was requested, but the save continues.
    StillActive,
}

/// The repair of a difference.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Repair {
    OfferAgain,
    LoseLease,
    End,
    Remind,
    GiveUp(Code),
}

/// The observations that a decision is based on.
#[derive(Clone, Copy, Debug)]
struct Observation {
    /// The difference, and how long it has existed for the same version of the save.
    mismatch: Option<(Mismatch, Duration)>,
    /// Whether there are unacknowledged reports that may explain it.
    reports_wait: bool,
    /// Whether the node's last heartbeat is too old.
    node_lost: bool,
    /// How long the save has been queued.
    waiting: Duration,
}

fn mismatch(save: &OpenSaveState, place: Option<Place>) -> Option<Mismatch> {
    match place {
        None => Some(Mismatch::Unknown),
        Some(Place::Held { lease_ms: 0 }) => Some(Mismatch::NoLease),
        Some(_) if save.cancelling => Some(Mismatch::StillActive),
        Some(_) => None,
    }
}

/// Chooses the repair. Only differences that were seen at least twice count, because a difference that results from
/// reading between two steps of another process has disappeared the next time.
fn repair(
    save: &OpenSaveState,
    look: &Observation,
    every: Duration,
    expiry: Duration,
) -> Option<Repair> {
    let settled = |for_so_long: Duration| {
        for_so_long >= every && (!look.reports_wait || for_so_long >= REPORTS_GRACE)
    };
    match look.mismatch {
        Some((Mismatch::Unknown, time)) if settled(time) => {
            if save.cancelling {
                return Some(Repair::End);
            }
            if look.node_lost {
                return Some(Repair::GiveUp(Code::NodeLost));
            }
            return Some(Repair::OfferAgain);
        }
        Some((Mismatch::NoLease, time)) if settled(time) => {
            if look.node_lost {
                return Some(Repair::GiveUp(Code::NodeLost));
            }
            if save.state != State::Queued {
                return Some(Repair::LoseLease);
            }
        }
        Some((Mismatch::StillActive, time)) if time >= REMIND_EVERY => return Some(Repair::Remind),
        _ => {}
    }
    if save.state == State::Queued && look.mismatch.is_none() {
        if look.node_lost {
            return Some(Repair::GiveUp(Code::NodeLost));
        }
        if look.waiting >= expiry {
            return Some(Repair::GiveUp(Code::TimedOut));
        }
    }
    None
}

/// Time of each node's last heartbeat by this manager's clock, because the nodes' clocks may be wrong.
#[derive(Default)]
struct Heartbeats {
    nodes: HashMap<String, (i64, Instant)>,
    listened: Option<Instant>,
}

impl Heartbeats {
    /// Records that the queue responds. If it did not for longer than `patience`, no heartbeats could arrive, so all
    /// nodes count as seen now.
    fn on_response(&mut self, patience: Duration) {
        let now = Instant::now();
        let was_down = self
            .listened
            .is_none_or(|at| now.duration_since(at) > patience);
        self.listened = Some(now);
        if was_down {
            for heard in self.nodes.values_mut() {
                heard.1 = now;
            }
        }
    }

    fn record(&mut self, name: &str, at_ms: i64) {
        let now = Instant::now();
        let heard = self.nodes.entry(name.to_owned()).or_insert((at_ms, now));
        if heard.0 != at_ms {
            *heard = (at_ms, now);
        }
    }

    /// Returns the time since the last heartbeat. A node without any counts as seen at the first call.
    fn time_since(&mut self, name: &str) -> Duration {
        let now = Instant::now();
        let heard = self.nodes.entry(name.to_owned()).or_insert((0, now));
        now.duration_since(heard.1)
    }
}

type Seen = HashMap<JobId, (u64, Mismatch, Instant)>;

/// Compares the record with the queue at regular intervals until the manager ends.
pub(super) async fn reconcile(app: &App) {
    let mut seen = Seen::new();
    let mut heard = Heartbeats::default();
    loop {
        match compare(app, std::mem::take(&mut seen), &mut heard).await {
            Ok(now) => seen = now,
            Err(error) => {
                tracing::warn!(task = "reconcile", error = %error, "record and queue cannot be compared");
                app.metrics.error("reconcile");
            }
        }
        tokio::select! {
            () = app.cancel.cancelled() => return,
            () = tokio::time::sleep(app.options.reconcile_every) => {}
        }
    }
}

async fn compare(app: &App, before: Seen, heard: &mut Heartbeats) -> Result<Seen, TaskError> {
    let mut seen = Seen::new();
    let nodes = app.queue.nodes().await?;
    heard.on_response(MAX_QUEUE_GAP + app.options.reconcile_every * 2);
    for node in nodes {
        heard.record(&node.name, node.at_ms);
    }
    let mut after = None;
    loop {
        // The record is read before the queue. If a save ends in between, its version differs, and the write is
        // rejected.
        let saves = app.record.open_save_states(after, BATCH).await?;
        let Some(last) = saves.last() else {
            return Ok(seen);
        };
        after = Some(last.id);
        let ids: Vec<JobId> = saves.iter().map(|save| save.id).collect();
        let places = app.queue.places(&ids).await?;
        let reports_wait = app.queue.depth().await?.reports > 0;
        for (save, place) in saves.iter().zip(places) {
            let mismatch = mismatch(save, place).map(|mismatch| {
                let since = match before.get(&save.id) {
                    Some((version, was, since)) if *version == save.version && *was == mismatch => {
                        *since
                    }
                    _ => Instant::now(),
                };
                seen.insert(save.id, (save.version, mismatch, since));
                (mismatch, since.elapsed())
            });
            let waiting = Duration::from_millis((now_ms() - save.queued_ms).max(0) as u64);
            let look = Observation {
                mismatch,
                reports_wait,
                node_lost: heard.time_since(&save.node) >= app.options.node_lost,
                waiting,
            };
            let every = app.options.reconcile_every;
            if let Some(repair) = repair(save, &look, every, app.options.order_expiry) {
                apply(app, save, repair).await?;
                seen.remove(&save.id);
            }
        }
    }
}

async fn apply(app: &App, save: &OpenSaveState, repair: Repair) -> Result<(), TaskError> {
    let actor = format!("manager:{}", app.name);
    let changed = app
        .record
        .change_at(save.id, save.version, &actor, |draft| match repair {
            Repair::OfferAgain => draft.offer_again("the queue has lost it"),
            Repair::LoseLease => draft.requeue_after_lost_lease(),
            Repair::End => {
                draft.end("no agent holds it");
            }
            Repair::Remind => draft.repeat_cancel(),
            Repair::GiveUp(code) => {
                let message = match code {
                    Code::NodeLost => format!(
                        "node {} has not been heard of for {}; the session may be gone with it",
                        save.node,
                        crate::common::message::count(
                            app.options.node_lost.as_secs(),
                            "second",
                            "seconds"
                        )
                    ),
                    _ => format!(
                        "it has waited for {} without being begun",
                        crate::common::message::count(
                            app.options.order_expiry.as_secs() / 3600,
                            "hour",
                            "hours"
                        )
                    ),
                };
                draft.give_up(code, &message);
            }
        })
        .await?;
    if let Some((changed, ())) = changed {
        tracing::info!(job = %save.id, was = save.state.name(), state = changed.state.name(), remedy = ?repair, "a save is put right");
        if repair == Repair::OfferAgain {
            app.metrics.offered_again();
        }
        if changed.state.is_final() {
            app.metrics.ended(&changed);
        }
        app.hub.touch(&[save.id]);
        app.outbox_wake.notify_one();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const EVERY: Duration = Duration::from_secs(3);

    const HOUR: Duration = Duration::from_secs(3600);

    fn standing(state: State, cancelling: bool) -> OpenSaveState {
        OpenSaveState {
            id: JobId::new(),
            node: "n".into(),
            state,
            version: 1,
            cancelling,
            queued_ms: 0,
        }
    }

    #[test]
    fn what_is_wrong_is_put_right_only_when_it_stays_so() {
        use Mismatch::{NoLease, StillActive, Unknown};
        use State::{Assigned, Queued, Running};
        let cases = [
            // state, cancelling, difference, seconds, unacknowledged reports, node lost -> repair
            (Queued, false, Some(Unknown), 0, false, false, None),
            (
                Queued,
                false,
                Some(Unknown),
                3,
                false,
                false,
                Some(Repair::OfferAgain),
            ),
            (
                Running,
                false,
                Some(Unknown),
                3,
                false,
                false,
                Some(Repair::OfferAgain),
            ),
            (Running, false, Some(Unknown), 3, true, false, None),
            (
                Running,
                false,
                Some(Unknown),
                120,
                true,
                false,
                Some(Repair::OfferAgain),
            ),
            (
                Running,
                true,
                Some(Unknown),
                3,
                false,
                false,
                Some(Repair::End),
            ),
            (
                Running,
                false,
                Some(Unknown),
                3,
                false,
                true,
                Some(Repair::GiveUp(Code::NodeLost)),
            ),
            (Running, false, Some(NoLease), 2, false, false, None),
            (
                Running,
                false,
                Some(NoLease),
                3,
                false,
                false,
                Some(Repair::LoseLease),
            ),
            (
                Assigned,
                false,
                Some(NoLease),
                3,
                false,
                true,
                Some(Repair::GiveUp(Code::NodeLost)),
            ),
            (Queued, false, Some(NoLease), 9, false, false, None),
            (Running, true, Some(StillActive), 9, false, false, None),
            (
                Running,
                true,
                Some(StillActive),
                30,
                false,
                false,
                Some(Repair::Remind),
            ),
            (Running, false, None, 0, false, true, None),
            (
                Queued,
                false,
                None,
                0,
                false,
                true,
                Some(Repair::GiveUp(Code::NodeLost)),
            ),
            (Queued, false, None, 0, false, false, None),
        ];
        for (state, cancelling, mismatch, seconds, reports_wait, node_lost, expected) in cases {
            let look = Observation {
                mismatch: mismatch.map(|mismatch| (mismatch, Duration::from_secs(seconds))),
                reports_wait,
                node_lost,
                waiting: Duration::ZERO,
            };
            let found = repair(&standing(state, cancelling), &look, EVERY, HOUR);
            assert_eq!(found, expected, "{state:?} {cancelling} {look:?}");
        }
        let old = Observation {
            mismatch: None,
            reports_wait: false,
            node_lost: false,
            waiting: HOUR,
        };
        assert_eq!(
            repair(&standing(Queued, false), &old, EVERY, HOUR),
            Some(Repair::GiveUp(Code::TimedOut))
        );
        assert_eq!(repair(&standing(Running, false), &old, EVERY, HOUR), None);
    }

    #[test]
    fn while_the_queue_is_away_no_node_is_lost() {
        let long_ago = Instant::now()
            .checked_sub(HOUR)
            .unwrap_or_else(Instant::now);
        let mut heard = Heartbeats::default();
        heard.on_response(EVERY);
        heard.nodes.insert("n".into(), (1, long_ago));
        heard.on_response(EVERY);
        assert!(heard.time_since("n") >= HOUR);
        heard.listened = Some(long_ago);
        heard.on_response(EVERY);
        assert!(heard.time_since("n") < HOUR);
    }
}
