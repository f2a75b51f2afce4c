//! The metrics of an agent for Prometheus.

use std::path::Path;
use std::sync::atomic::{AtomicI64, AtomicU64};
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;

use crate::save::state_store;
use crate::service::health;
use crate::service::job::{Code, Load, Outcome, Update};

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct EndLabels {
    end: &'static str,
    /// Empty unless the save failed.
    code: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct SlotLabel {
    state: &'static str,
}

type Int = Gauge<i64, AtomicI64>;
type Float = Gauge<f64, AtomicU64>;

/// How an attempt ended on this node.
#[derive(Clone, Copy, Debug)]
pub(in super::super) enum End<'a> {
    /// It was reported to the managers.
    Said(&'a Update),
    /// Another agent holds the claim, so nothing was reported.
    ClaimLost,
}

impl End<'_> {
    fn labels(self) -> EndLabels {
        let (end, code) = match self {
            Self::ClaimLost => ("claim_lost", ""),
            Self::Said(Update::Ended { outcome }) => match outcome {
                Outcome::Succeeded { .. } => ("succeeded", ""),
                Outcome::Failed { code, .. } => ("failed", code.name()),
                Outcome::Cancelled => ("cancelled", ""),
            },
            Self::Said(_) => ("given_back", ""),
        };
        EndLabels { end, code }
    }
}

/// The state of the agent when metrics are asked for.
pub(super) struct State {
    pub(super) ready: bool,
    pub(super) queue_up: bool,
    /// Seconds since the queue took a heartbeat.
    pub(super) lag: f64,
    pub(super) running: usize,
    /// Numbers of sessions of the node, and of problems in listing them.
    pub(super) sessions: (usize, usize),
}

/// The metrics of an agent.
pub(in super::super) struct Metrics {
    registry: Registry,
    ended: Family<EndLabels, Counter>,
    seconds: Histogram,
    pause: Histogram,
    packed: Counter<u64, AtomicU64>,
    sent: Counter<u64, AtomicU64>,
    slots: Family<SlotLabel, Int>,
    threads: Int,
    ready: Int,
    queue_up: Int,
    lag: Float,
    heartbeat: Histogram,
    sessions: Int,
    problems: Int,
    stuck: Int,
    kept_bytes: Int,
    kept_sessions: Int,
}

impl Metrics {
    /// Creates the metrics of the agent of `node`.
    pub(in super::super) fn new(node: &str) -> Self {
        let mut registry = health::registry("upperdeck_agent", "node", node);
        let mut metrics = Self {
            ended: Family::default(),
            seconds: Histogram::new(health::SAVE_SECONDS),
            pause: Histogram::new(health::PAUSE_SECONDS),
            packed: Counter::default(),
            sent: Counter::default(),
            slots: Family::default(),
            threads: Int::default(),
            ready: Int::default(),
            queue_up: Int::default(),
            lag: Float::default(),
            heartbeat: Histogram::new([0.001, 0.005, 0.02, 0.1, 0.5, 2.0, 5.0]),
            sessions: Int::default(),
            problems: Int::default(),
            stuck: Int::default(),
            kept_bytes: Int::default(),
            kept_sessions: Int::default(),
            registry: Registry::default(),
        };
        metrics.register(&mut registry);
        metrics.registry = registry;
        metrics.start_at_zero();
        metrics
    }

    fn register(&self, registry: &mut Registry) {
        registry.register(
            "saves_ended",
            "Attempts of saves that ended on this node",
            self.ended.clone(),
        );
        registry.register(
            "save_seconds",
            "Duration of saves that succeeded",
            self.seconds.clone(),
        );
        registry.register(
            "pause_seconds",
            "How long containers were frozen, each time",
            self.pause.clone(),
        );
        registry.register(
            "layer_bytes",
            "Compressed bytes of the layers made",
            self.packed.clone(),
        );
        registry.register(
            "sent_bytes",
            "Bytes sent to the registry",
            self.sent.clone(),
        );
        registry.register(
            "slots",
            "Saves that run, that may run at the node's load, and that may run at most",
            self.slots.clone(),
        );
        registry.register(
            "threads",
            "Threads that the next save would have",
            self.threads.clone(),
        );
        registry.register("ready", "Whether saves can be made", self.ready.clone());
        registry.register(
            "queue_up",
            "Whether the queue took the last heartbeat",
            self.queue_up.clone(),
        );
        registry.register(
            "queue_lag_seconds",
            "Time since the queue took a heartbeat",
            self.lag.clone(),
        );
        registry.register(
            "heartbeat_seconds",
            "How long the queue took for a heartbeat",
            self.heartbeat.clone(),
        );
        registry.register(
            "sessions",
            "Containers that can be saved",
            self.sessions.clone(),
        );
        registry.register(
            "listing_problems",
            "Problems in listing the node's containers",
            self.problems.clone(),
        );
        registry.register(
            "stuck_processes",
            "Saves that were killed and do not end, because they wait in the kernel",
            self.stuck.clone(),
        );
        registry.register(
            "kept_bytes",
            "Size of what is kept on this node to make later saves small",
            self.kept_bytes.clone(),
        );
        registry.register(
            "kept_sessions",
            "Containers of which something is kept on this node",
            self.kept_sessions.clone(),
        );
    }

    /// Creates the time series whose labels are known, because `increase()` does not see the step from none to 1.
    fn start_at_zero(&self) {
        let failed = Code::ALL.map(|code| ("failed", code.name()));
        let others = ["succeeded", "cancelled", "given_back", "claim_lost"].map(|end| (end, ""));
        for (end, code) in others.into_iter().chain(failed) {
            let _ = self.ended.get_or_create(&EndLabels { end, code });
        }
    }

    /// Records an attempt that has ended.
    pub(in super::super) fn ended(&self, end: End<'_>) {
        self.ended.get_or_create(&end.labels()).inc();
        if let End::Said(Update::Ended {
            outcome: Outcome::Succeeded { saved },
        }) = end
        {
            self.seconds.observe(saved.seconds);
            self.packed.inc_by(saved.layer_bytes);
            self.sent.inc_by(saved.sent_bytes);
        }
    }

    /// Records that a container was frozen for `ms` milliseconds.
    pub(in super::super) fn paused(&self, ms: f64) {
        self.pause.observe(ms / 1000.0);
    }

    /// Records how long the queue took for a heartbeat.
    pub(in super::super) fn heartbeat(&self, took: Duration) {
        self.heartbeat.observe(took.as_secs_f64());
    }

    /// Records the load as of a heartbeat, the number of `slots` that are configured, and of processes that are stuck.
    pub(in super::super) fn load(&self, load: &Load, slots: u32, stuck: usize) {
        self.slot("allowed", load.slots.into());
        self.slot("configured", slots.into());
        self.threads.set(load.threads.into());
        self.stuck.set(stuck as i64);
    }

    fn slot(&self, state: &'static str, count: i64) {
        self.slots.get_or_create(&SlotLabel { state }).set(count);
    }

    /// Measures what is kept in the state directory.
    pub(super) fn kept(&self, state_dir: Option<&Path>) {
        let (files, bytes) = state_dir.map(state_store::size_of).unwrap_or_default();
        self.kept_sessions.set(files as i64);
        self.kept_bytes.set(bytes as i64);
    }

    pub(super) fn state(&self, state: &State) {
        self.ready.set(state.ready.into());
        self.queue_up.set(state.queue_up.into());
        self.lag.set(state.lag);
        self.slot("running", state.running as i64);
        self.sessions.set(state.sessions.0 as i64);
        self.problems.set(state.sessions.1 as i64);
    }

    /// Returns the content of `/metrics` in OpenMetrics 1.0.
    pub(super) fn text(&self) -> String {
        health::open_metrics(&self.registry)
    }
}
