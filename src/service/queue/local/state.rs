//! What the queue in this process knows.

use std::collections::{BTreeMap, HashMap, VecDeque};

use tokio::time::Instant;

use super::turns::NodeQueue;
use crate::service::job::{Answer, JobId, Node, Order, Question, Report, Session};
use crate::service::queue::{Limits, registry_of};

#[derive(Default)]
pub(super) struct State {
    pub(super) jobs: HashMap<JobId, Job>,
    pub(super) nodes: HashMap<String, NodeQueue>,
    pub(super) reports: VecDeque<PendingReport>,
    pub(super) heard: BTreeMap<String, NodeRecord>,
    pub(super) questions: VecDeque<Question>,
    /// Answers by the nonces of the pending questions.
    pub(super) answers: HashMap<String, Option<Answer>>,
    /// The last number used for a fence or for the identifier of a report. Numbers are never reused.
    pub(super) last: u64,
}

/// A job that the queue knows.
pub(super) struct Job {
    pub(super) order: Order,
    pub(super) at: JobState,
    /// Whether the agent that has it, or will have it, is told to hurry.
    pub(super) hurry: bool,
}

pub(super) enum JobState {
    /// In its user's list, or not due yet.
    Waiting,
    Held {
        agent: String,
        fence: u64,
        until: Instant,
        cancelled: bool,
        confirmed: bool,
    },
    /// The final report has not been acknowledged yet.
    Ended { fence: u64, report: String },
}

pub(super) struct PendingReport {
    pub(super) entry: String,
    pub(super) report: Report,
    pub(super) last: bool,
    /// Time at which it was delivered to a manager.
    pub(super) given: Option<Instant>,
}

pub(super) struct NodeRecord {
    pub(super) node: Node,
    pub(super) sessions: Vec<Session>,
    pub(super) at: Instant,
}

impl State {
    /// Returns whether another claim of `order` is within the limits. Claims whose lease has ended do not count, nor
    /// does the job itself.
    pub(super) fn within_limits(&self, now: Instant, limits: Limits, order: &Order) -> bool {
        let limits = limits.of(order);
        let registry = registry_of(&order.destination);
        let (mut user, mut node, mut into) = (0, 0, 0);
        for (id, job) in &self.jobs {
            if let JobState::Held { until, .. } = job.at
                && until > now
                && *id != order.job
            {
                user += u32::from(job.order.owner == order.owner);
                node += u32::from(job.order.node == order.node);
                into += u32::from(registry_of(&job.order.destination) == registry);
            }
        }
        let fits = |count, limit| limit == 0 || count < limit;
        fits(user, limits.user) && fits(node, limits.node) && fits(into, limits.registry)
    }

    /// Returns when the next lease ends. A job may then be taken over, or fit into the limits.
    pub(super) fn next_end(&self, now: Instant) -> Option<Instant> {
        self.jobs
            .values()
            .filter_map(|job| match job.at {
                JobState::Held { until, .. } if until > now => Some(until),
                _ => None,
            })
            .min()
    }

    pub(super) fn forget(&mut self, id: JobId) {
        let Some(job) = self.jobs.remove(&id) else {
            return;
        };
        if let Some(node_queue) = self.nodes.get_mut(&job.order.node) {
            node_queue.forget(&job.order);
        }
    }

    pub(super) fn post(&mut self, report: &Report, last: bool) -> String {
        self.last += 1;
        let entry = self.last.to_string();
        self.reports.push_back(PendingReport {
            entry: entry.clone(),
            report: report.clone(),
            last,
            given: None,
        });
        entry
    }
}
