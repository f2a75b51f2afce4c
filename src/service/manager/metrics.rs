//! Metrics for Prometheus: requests, saves and their outcomes, and the state of the queue and the nodes.

use std::sync::atomic::{AtomicI64, AtomicU64};
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use crate::service::connections::Closed;
use crate::service::health;
use crate::service::job::{Code, State};
use crate::service::queue::Depth;
use crate::service::record::Save;

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct RequestLabels {
    method: &'static str,
    path: String,
    status: u16,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct PathLabel {
    path: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct EndedLabels {
    state: &'static str,
    /// Empty unless the save failed.
    code: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct StateLabel {
    state: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct TaskLabel {
    task: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct CloseLabel {
    why: &'static str,
}

/// The tasks whose errors are counted.
const TASKS: [&str; 12] = [
    "hear",
    "errands",
    "words",
    "reconcile",
    "forget",
    "measure",
    "record",
    "notices",
    "ended",
    "autosave",
    "thin",
    "clock",
];
const OUTCOMES: [&str; 3] = ["delivered", "retried", "given_up"];

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ReceiverLabel {
    receiver: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct NoticeLabels {
    receiver: &'static str,
    outcome: &'static str,
}

fn receiver(site: bool) -> &'static str {
    if site { "site" } else { "user" }
}

type Int = Gauge<i64, AtomicI64>;

/// The metrics of a manager.
pub(super) struct Metrics {
    registry: Registry,
    requests: Family<RequestLabels, Counter>,
    took: Family<PathLabel, Histogram>,
    accepted: Counter,
    ended: Family<EndedLabels, Counter>,
    retried: Counter,
    deleted: Counter,
    saves: Family<StateLabel, Int>,
    waited: Histogram,
    seconds: Histogram,
    pause: Histogram,
    packed: Counter<u64, AtomicU64>,
    sent: Counter<u64, AtomicU64>,
    queue: Family<StateLabel, Int>,
    queue_up: Int,
    nodes: Family<StateLabel, Int>,
    watchers: Int,
    connections: Int,
    closed: Family<CloseLabel, Counter>,
    reports: Counter,
    offered_again: Counter,
    errors: Family<TaskLabel, Counter>,
    notices: Family<NoticeLabels, Counter>,
    notices_waiting: Family<ReceiverLabel, Int>,
    notices_dropped: Counter,
}

fn seconds(buckets: &[f64]) -> Histogram {
    Histogram::new(buckets.iter().copied())
}

impl Metrics {
    pub(super) fn new(manager: &str) -> Self {
        let mut registry = health::registry("upperdeck", "manager", manager);
        let requests = Family::default();
        registry.register("http_requests", "Requests answered", requests.clone());
        let took = Family::<PathLabel, Histogram>::new_with_constructor(|| {
            seconds(&[0.001, 0.005, 0.02, 0.1, 0.5, 2.0, 10.0])
        });
        registry.register(
            "http_request_seconds",
            "Until an answer began",
            took.clone(),
        );
        let accepted = Counter::default();
        registry.register("saves_accepted", "Saves written down", accepted.clone());
        let ended = Family::default();
        registry.register(
            "saves_ended",
            "Saves that ended, as this manager heard",
            ended.clone(),
        );
        let retried = Counter::default();
        registry.register(
            "saves_retried",
            "Attempts that are made again",
            retried.clone(),
        );
        let deleted = Counter::default();
        registry.register("tags_deleted", "Tags deleted", deleted.clone());
        let saves = Family::default();
        registry.register("saves", "Saves in the record, by state", saves.clone());
        let waited = seconds(&[0.1, 1.0, 5.0, 30.0, 120.0, 600.0, 3600.0, 14400.0]);
        registry.register(
            "save_waited_seconds",
            "From acceptance to the last attempt's beginning",
            waited.clone(),
        );
        let took_seconds = seconds(&health::SAVE_SECONDS);
        registry.register(
            "save_seconds",
            "From the last attempt's beginning to success",
            took_seconds.clone(),
        );
        let pause = seconds(&health::PAUSE_SECONDS);
        registry.register(
            "save_pause_seconds",
            "How long containers were frozen",
            pause.clone(),
        );
        let packed = Counter::default();
        registry.register(
            "save_layer_bytes",
            "Compressed bytes of the layers made",
            packed.clone(),
        );
        let sent = Counter::default();
        registry.register(
            "save_sent_bytes",
            "Bytes sent to the registry",
            sent.clone(),
        );
        let queue = Family::default();
        registry.register(
            "queue_entries",
            "Orders that wait or are held, reports not taken",
            queue.clone(),
        );
        let queue_up = Int::default();
        registry.register("queue_up", "Whether the queue answers", queue_up.clone());
        let nodes = Family::default();
        registry.register(
            "nodes",
            "Nodes, by whether they were heard of lately",
            nodes.clone(),
        );
        let watchers = Int::default();
        registry.register("watchers", "Event streams that are open", watchers.clone());
        let connections = Int::default();
        registry.register(
            "connections",
            "Connections that are open",
            connections.clone(),
        );
        let closed = Family::default();
        registry.register(
            "connections_closed",
            "Connections that the manager broke off: no request in time, idle, an answer not taken, no place",
            closed.clone(),
        );
        let reports = Counter::default();
        registry.register(
            "reports_taken",
            "Reports of agents taken in",
            reports.clone(),
        );
        let offered_again = Counter::default();
        registry.register(
            "orders_offered_again",
            "Orders that the queue had lost",
            offered_again.clone(),
        );
        let errors = Family::default();
        registry.register(
            "background_errors",
            "Rounds of background work that failed",
            errors.clone(),
        );
        let notices = Family::default();
        registry.register(
            "notices",
            "Deliveries of notices about saves, by outcome",
            notices.clone(),
        );
        let notices_waiting = Family::default();
        registry.register(
            "notices_waiting",
            "Notices about saves that are not delivered yet",
            notices_waiting.clone(),
        );
        let notices_dropped = Counter::default();
        registry.register(
            "notices_dropped",
            "Notices about saves that were not written down because too many of one user waited",
            notices_dropped.clone(),
        );
        let metrics = Self {
            registry,
            requests,
            took,
            accepted,
            ended,
            retried,
            deleted,
            saves,
            waited,
            seconds: took_seconds,
            pause,
            packed,
            sent,
            queue,
            queue_up,
            nodes,
            watchers,
            connections,
            closed,
            reports,
            offered_again,
            errors,
            notices,
            notices_waiting,
            notices_dropped,
        };
        metrics.start_at_zero();
        metrics
    }

    /// Creates the time series whose labels are known. `increase()` does not see the step from no series to 1, so that
    /// an alert would miss the first error.
    fn start_at_zero(&self) {
        for task in TASKS {
            let _ = self.errors.get_or_create(&TaskLabel { task });
        }
        for why in Closed::ALL {
            let why = why.name();
            let _ = self.closed.get_or_create(&CloseLabel { why });
        }
        let failed = Code::ALL.map(|code| (State::Failed, code.name()));
        let ends = [(State::Succeeded, ""), (State::Cancelled, "")];
        for (state, code) in ends.into_iter().chain(failed) {
            let state = state.name();
            let _ = self.ended.get_or_create(&EndedLabels { state, code });
        }
        for receiver in [true, false].map(receiver) {
            for outcome in OUTCOMES {
                let _ = self
                    .notices
                    .get_or_create(&NoticeLabels { receiver, outcome });
            }
        }
        self.record(&[]);
    }

    /// Returns the content of `/metrics` in OpenMetrics 1.0.
    pub(super) fn text(&self) -> String {
        health::open_metrics(&self.registry)
    }

    /// Counts a request. `method` and `path` come from fixed sets, because values from requests would create an
    /// unbounded number of time series.
    pub(super) fn request(&self, method: &'static str, path: &str, status: u16, took: Duration) {
        let asked = RequestLabels {
            method,
            path: path.to_owned(),
            status,
        };
        self.requests.get_or_create(&asked).inc();
        let path = path.to_owned();
        self.took
            .get_or_create(&PathLabel { path })
            .observe(took.as_secs_f64());
    }

    pub(super) fn accepted(&self) {
        self.accepted.inc();
    }

    pub(super) fn deleted(&self) {
        self.deleted.inc();
    }

    /// Records a save that has just ended.
    pub(super) fn ended(&self, save: &Save) {
        let code = save
            .error
            .as_ref()
            .map_or("", |failure| failure.code.name());
        let ended = EndedLabels {
            state: save.state.name(),
            code,
        };
        self.ended.get_or_create(&ended).inc();
        if let Some(pause) = save.pause_ms {
            self.pause.observe(pause / 1000.0);
        }
        if let (State::Succeeded, Some(result)) = (save.state, &save.result) {
            let between = |from: i64, to: i64| to.saturating_sub(from).max(0) as f64 / 1000.0;
            if let (Some(started), Some(finished)) = (save.started_ms, save.finished_ms) {
                self.waited.observe(between(save.created_ms, started));
                self.seconds.observe(between(started, finished));
            }
            self.packed.inc_by(result.layer_bytes);
            self.sent.inc_by(result.sent_bytes);
        }
    }

    pub(super) fn retried(&self) {
        self.retried.inc();
    }

    pub(super) fn reports(&self, count: usize) {
        self.reports.inc_by(count as u64);
    }

    pub(super) fn offered_again(&self) {
        self.offered_again.inc();
    }

    pub(super) fn error(&self, task: &'static str) {
        self.errors.get_or_create(&TaskLabel { task }).inc();
    }

    /// Counts a delivery of a notice.
    pub(super) fn notice(&self, site: bool, outcome: &'static str) {
        let receiver = receiver(site);
        let labels = NoticeLabels { receiver, outcome };
        self.notices.get_or_create(&labels).inc();
    }

    /// Records the numbers of notices that wait for the site's receivers and for users' own, and of those dropped so far.
    pub(super) fn notices_waiting(&self, (site, user): (u64, u64), dropped: u64) {
        for (of_site, count) in [(true, site), (false, user)] {
            let receiver = receiver(of_site);
            let waiting = self
                .notices_waiting
                .get_or_create(&ReceiverLabel { receiver });
            waiting.set(count as i64);
        }
        self.notices_dropped
            .inc_by(dropped.saturating_sub(self.notices_dropped.get()));
    }

    pub(super) fn connections(&self, count: usize) {
        self.connections.set(count as i64);
    }

    pub(super) fn closed(&self, why: Closed) {
        let why = why.name();
        self.closed.get_or_create(&CloseLabel { why }).inc();
    }

    pub(super) fn watchers(&self, more: i64) {
        self.watchers.inc_by(more);
    }

    pub(super) fn record(&self, counts: &[(State, u64)]) {
        for state in State::ALL {
            let found = counts.iter().find(|(of, _)| *of == state);
            let count = found.map_or(0, |(_, count)| *count);
            let state = state.name();
            self.saves
                .get_or_create(&StateLabel { state })
                .set(count as i64);
        }
    }

    /// Records the number of items in the queue; `None` if it does not respond.
    pub(super) fn queue(&self, depth: Option<Depth>) {
        self.queue_up.set(i64::from(depth.is_some()));
        let Some(depth) = depth else { return };
        for (state, count) in [
            ("waiting", depth.waiting),
            ("held", depth.held),
            ("reports", depth.reports),
        ] {
            self.queue
                .get_or_create(&StateLabel { state })
                .set(count as i64);
        }
    }

    pub(super) fn nodes(&self, alive: usize, silent: usize) {
        for (state, count) in [("alive", alive), ("silent", silent)] {
            self.nodes
                .get_or_create(&StateLabel { state })
                .set(count as i64);
        }
    }
}
