//! The queue inside one process, for `upperdeck up` without Redis. It loses its data when the process ends; the record
//! does not.

mod state;
mod turns;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use super::{
    Claim, ClaimState, DAY, Delivered, Depth, Error, HEARTBEAT_LOST, Limits, Offered, Place,
    Settings, TAG_DOUBT, Withdrawn, truncated_session,
};
use crate::service::job::{Answer, JobId, Node, Order, Question, Report, Session, now_ms};
use state::{Job, JobState, NodeRecord, State};

/// A queue in this process. Clones refer to the same queue.
#[derive(Clone)]
pub struct Local(Arc<Shared>);

struct Shared {
    limits: Limits,
    settings: Settings,
    begun: Instant,
    begun_ms: i64,
    state: Mutex<State>,
    changed: Notify,
}

#[allow(
    clippy::unused_async,
    reason = "the same calls as of the queue in Redis"
)]
impl Local {
    /// Creates an empty queue.
    pub fn new(limits: Limits) -> Self {
        Self::with(limits, Settings::default())
    }

    /// Creates an empty queue with settings that differ from the default.
    pub fn with(limits: Limits, settings: Settings) -> Self {
        Self(Arc::new(Shared {
            limits,
            settings,
            begun: Instant::now(),
            begun_ms: now_ms(),
            state: Mutex::default(),
            changed: Notify::new(),
        }))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now_ms(&self) -> i64 {
        let since = self.now().duration_since(self.0.begun);
        self.0.begun_ms + since.as_millis() as i64
    }

    fn now(&self) -> Instant {
        Instant::now() + self.0.settings.clock.offset()
    }

    fn instant(&self, epoch_ms: i64) -> Instant {
        let after = u64::try_from(epoch_ms - self.0.begun_ms).unwrap_or(0);
        self.0
            .begun
            .checked_add(Duration::from_millis(after))
            .unwrap_or_else(|| self.now() + DAY)
    }

    /// Calls `attempt` after each change, and at the instant that it returned, until it yields something or `wait` has
    /// passed.
    async fn until<T>(
        &self,
        wait: Duration,
        mut attempt: impl FnMut() -> (Vec<T>, Option<Instant>),
    ) -> Vec<T> {
        let end = self.now() + wait.min(DAY);
        loop {
            let mut changed = std::pin::pin!(self.0.changed.notified());
            changed.as_mut().enable();
            let (got, next) = attempt();
            if !got.is_empty() || self.now() >= end {
                return got;
            }
            let wake = next.map_or(end, |next| next.min(end));
            tokio::select! {
                () = &mut changed => {}
                () = tokio::time::sleep(wake.duration_since(self.now())) => {}
            }
        }
    }

    pub(super) async fn offer(&self, order: &Order) -> Result<Offered, Error> {
        let mut state = self.state();
        if let Some(job) = state.jobs.get_mut(&order.job) {
            match job.at {
                JobState::Waiting => {
                    let list =
                        |order: &Order| (order.node.clone(), order.owner.clone(), order.autosave);
                    if list(order) == list(&job.order) {
                        job.order = order.clone();
                    }
                    return Ok(Offered::Known);
                }
                JobState::Ended { .. } if order.attempt > job.order.attempt => {}
                _ => return Ok(Offered::Known),
            }
        }
        let job = Job {
            order: order.clone(),
            at: JobState::Waiting,
            hurry: false,
        };
        state.jobs.insert(order.job, job);
        let node_queue = state.nodes.entry(order.node.clone()).or_default();
        let class = node_queue.class(order.autosave);
        if order.not_before_ms > self.now_ms() {
            class.later.push(order.job);
        } else {
            class.push(&order.owner, order.job);
        }
        drop(state);
        self.0.changed.notify_waiters();
        Ok(Offered::New)
    }

    pub(super) async fn withdraw(&self, job: JobId) -> Result<Withdrawn, Error> {
        let mut state = self.state();
        let Some(known) = state.jobs.get_mut(&job) else {
            return Ok(Withdrawn::Unknown);
        };
        match &mut known.at {
            JobState::Waiting => {}
            JobState::Held {
                until,
                cancelled,
                confirmed,
                ..
            } => {
                let now = self.now();
                if *confirmed && *until + self.0.settings.lease * TAG_DOUBT > now {
                    return Ok(Withdrawn::TooLate);
                }
                if *until > now {
                    *cancelled = true;
                    return Ok(Withdrawn::CancelRequested);
                }
            }
            JobState::Ended { .. } => return Ok(Withdrawn::TooLate),
        }
        state.forget(job);
        drop(state);
        self.0.changed.notify_waiters();
        Ok(Withdrawn::Removed)
    }

    pub(super) async fn hurry(&self, job: JobId) -> Result<bool, Error> {
        let mut state = self.state();
        let known = state.jobs.get_mut(&job);
        let known = known.filter(|known| !matches!(known.at, JobState::Ended { .. }));
        Ok(known.map(|known| known.hurry = true).is_some())
    }

    pub(super) async fn places(&self, jobs: &[JobId]) -> Result<Vec<Option<Place>>, Error> {
        let state = self.state();
        let now = self.now();
        Ok(jobs
            .iter()
            .map(|id| {
                let job = state.jobs.get(id)?;
                match &job.at {
                    JobState::Waiting => Some(Place::Waiting(
                        state.nodes.get(&job.order.node)?.before(&job.order),
                    )),
                    JobState::Held { until, .. } => Some(Place::Held {
                        lease_ms: until.saturating_duration_since(now).as_millis() as u64,
                    }),
                    JobState::Ended { .. } => Some(Place::Held { lease_ms: 0 }),
                }
            })
            .collect())
    }

    pub(super) async fn reports(
        &self,
        _manager: &str,
        most: usize,
        wait: Duration,
    ) -> Result<Vec<Delivered>, Error> {
        let patience = self.0.settings.ack_timeout;
        let attempt = || {
            let mut state = self.state();
            let now = self.now();
            let mut next: Option<Instant> = None;
            let mut got = Vec::new();
            for post in &mut state.reports {
                let again = post.given.map(|given| given + patience);
                match again {
                    Some(again) if again > now => {
                        next = Some(next.map_or(again, |next| next.min(again)));
                    }
                    _ if got.len() < most => {
                        post.given = Some(now);
                        got.push(Delivered {
                            entry: post.entry.clone(),
                            report: post.report.clone(),
                        });
                    }
                    _ => {}
                }
            }
            (got, next)
        };
        Ok(self.until(wait, attempt).await)
    }

    pub(super) async fn acknowledge(&self, entries: &[String]) -> Result<(), Error> {
        let mut state = self.state();
        let state = &mut *state;
        state.reports.retain(|post| {
            if !entries.contains(&post.entry) {
                return true;
            }
            let job = post.report.job;
            let over = post.last
                && state.jobs.get(&job).is_some_and(
                    |job| matches!(&job.at, JobState::Ended { report, .. } if *report == post.entry),
                );
            if over {
                state.jobs.remove(&job);
            }
            false
        });
        Ok(())
    }

    pub(super) async fn ask(
        &self,
        question: &Question,
        wait: Duration,
    ) -> Result<Option<Answer>, Error> {
        let nonce = question.nonce.clone();
        {
            let mut state = self.state();
            state.answers.insert(nonce.clone(), None);
            state.questions.push_back(question.clone());
        }
        let _waits = PendingQuestion { queue: self, nonce };
        self.0.changed.notify_waiters();
        let attempt = || {
            let mut state = self.state();
            let answer = state.answers.get_mut(&question.nonce);
            (answer.and_then(Option::take).into_iter().collect(), None)
        };
        Ok(self.until(wait, attempt).await.pop())
    }

    pub(super) async fn questions(&self, wait: Duration) -> Result<Vec<Question>, Error> {
        let attempt = || (self.state().questions.drain(..).collect(), None);
        Ok(self.until(wait, attempt).await)
    }

    pub(super) async fn answer(&self, answer: &Answer) -> Result<(), Error> {
        if let Some(place) = self.state().answers.get_mut(&answer.question.nonce) {
            *place = Some(answer.clone());
        }
        self.0.changed.notify_waiters();
        Ok(())
    }

    pub(super) async fn nodes(&self) -> Result<Vec<Node>, Error> {
        let mut state = self.state();
        let now = self.now();
        state
            .heard
            .retain(|_, heard| now.duration_since(heard.at) < DAY);
        Ok(state
            .heard
            .values()
            .map(|heard| heard.node.clone())
            .collect())
    }

    pub(super) async fn heartbeat_ages(&self) -> Result<HashMap<String, Duration>, Error> {
        let (state, now) = (self.state(), self.now());
        let silence = |(name, heard): (&String, &NodeRecord)| {
            (name.clone(), now.saturating_duration_since(heard.at))
        };
        Ok(state.heard.iter().map(silence).collect())
    }

    pub(super) async fn sessions(&self) -> Result<Vec<Session>, Error> {
        let now = self.now();
        Ok(self
            .state()
            .heard
            .values()
            .filter(|heard| now.duration_since(heard.at) < HEARTBEAT_LOST)
            .flat_map(|heard| heard.sessions.iter().cloned())
            .collect())
    }

    pub(super) async fn depth(&self) -> Result<Depth, Error> {
        let state = self.state();
        let mut depth = Depth {
            reports: state.reports.len() as u64,
            ..Depth::default()
        };
        for job in state.jobs.values() {
            match job.at {
                JobState::Waiting => depth.waiting += 1,
                JobState::Held { .. } => depth.held += 1,
                JobState::Ended { .. } => {}
            }
        }
        Ok(depth)
    }

    pub(super) async fn ping(&self) -> Result<(), Error> {
        Ok(())
    }

    pub(super) async fn reclaim(&self, node: &str, agent: &str) -> Result<Vec<Claim>, Error> {
        let now = self.now();
        let mut state = self.state();
        let youngest = state
            .nodes
            .entry(node.to_owned())
            .or_default()
            .register(agent);
        let take = |holder: &str, until: Instant| until <= now || (youngest && holder != agent);
        Ok(self.take_over(&mut state, node, agent, usize::MAX, take))
    }

    pub(super) async fn claim(
        &self,
        node: &str,
        agent: &str,
        most: usize,
        wait: Duration,
    ) -> Result<Vec<Claim>, Error> {
        let attempt = || {
            let now = self.now();
            let mut state = self.state();
            let node_queue = state.nodes.entry(node.to_owned()).or_default();
            node_queue.register(agent);
            let ended = |_: &str, until: Instant| until <= now;
            let mut got = self.take_over(&mut state, node, agent, most, ended);
            let due = [false, true].map(|class| self.enqueue_due(&mut state, node, class));
            for class in [false, true] {
                while got.len() < most
                    && let Some(claim) = self.admit(&mut state, node, agent, class)
                {
                    got.push(claim);
                }
            }
            let due = due.into_iter().flatten();
            (got, due.chain(state.next_end(now)).min())
        };
        Ok(self.until(wait, attempt).await)
    }

    /// Takes over claims of `node` for which `take` (given the holder and the end of the lease) returns `true`, as far
    /// as the limits permit.
    fn take_over(
        &self,
        state: &mut State,
        node: &str,
        agent: &str,
        most: usize,
        take: impl Fn(&str, Instant) -> bool,
    ) -> Vec<Claim> {
        let mut found: Vec<(Instant, JobId)> = state
            .jobs
            .iter()
            .filter_map(|(id, job)| match &job.at {
                JobState::Held { agent, until, .. }
                    if job.order.node == node && take(agent, *until) =>
                {
                    Some((*until, *id))
                }
                _ => None,
            })
            .collect();
        found.sort();
        let mut got = Vec::new();
        for (_, id) in found {
            if got.len() >= most {
                break;
            }
            let Some(order) = state.jobs.get(&id).map(|job| job.order.clone()) else {
                continue;
            };
            if order.expires_ms <= self.now_ms() {
                self.drop_expired(state, &order);
            } else if state.within_limits(self.now(), self.0.limits, &order) {
                got.push(self.grant(state, order, agent));
            }
        }
        got
    }

    /// Moves jobs that are due, autosaves or others, into the lists. Returns the instant at which the next one is due.
    fn enqueue_due(&self, state: &mut State, node: &str, autosave: bool) -> Option<Instant> {
        let now_ms = self.now_ms();
        let State { jobs, nodes, .. } = state;
        let class = nodes.get_mut(node)?.class(autosave);
        let mut next = None;
        for id in std::mem::take(&mut class.later) {
            let Some(job) = jobs.get(&id) else { continue };
            let at = job.order.not_before_ms;
            if at <= now_ms {
                class.push(&job.order.owner, id);
            } else {
                class.later.push(id);
                next = Some(next.map_or(at, |next: i64| next.min(at)));
            }
        }
        next.map(|at| self.instant(at))
    }

    /// Admits the next job of the user whose turn it is, of autosaves or of others, considering only jobs within the
    /// limits.
    fn admit(&self, state: &mut State, node: &str, agent: &str, autosave: bool) -> Option<Claim> {
        let node_queue = state.nodes.get_mut(node)?;
        if !node_queue.may_admit(autosave) {
            return None;
        }
        let class = node_queue.class(autosave);
        let mut users: Vec<(u64, String, Vec<JobId>)> = class
            .users
            .iter()
            .filter(|(_, (_, list))| !list.is_empty())
            .map(|(user, (turn, list))| (*turn, user.clone(), list.iter().copied().collect()))
            .collect();
        users.sort();
        for (turn, user, list) in users {
            for id in list {
                let Some(order) = state.jobs.get(&id).map(|job| job.order.clone()) else {
                    continue;
                };
                if order.expires_ms <= self.now_ms() {
                    self.drop_expired(state, &order);
                } else if state.within_limits(self.now(), self.0.limits, &order) {
                    let class = state.nodes.get_mut(node)?.class(autosave);
                    class.serve(&user, turn, id);
                    return Some(self.grant(state, order, agent));
                }
            }
        }
        None
    }

    #[allow(clippy::unused_self)]
    fn drop_expired(&self, state: &mut State, order: &Order) {
        tracing::warn!(job.id = %order.job, job.node = %order.node, "an order has expired; its manager has to offer it again");
        state.forget(order.job);
    }

    fn grant(&self, state: &mut State, order: Order, agent: &str) -> Claim {
        let (cancelled, confirmed, earlier) = match state.jobs.get(&order.job).map(|job| &job.at) {
            Some(JobState::Held {
                cancelled,
                confirmed,
                fence,
                ..
            }) => (*cancelled, *confirmed, *fence),
            _ => (false, false, 0),
        };
        let fence = state.last.max(order.fence_after).max(earlier) + 1;
        state.last = fence;
        let at = JobState::Held {
            agent: agent.to_owned(),
            fence,
            until: self.now() + self.0.settings.lease,
            cancelled,
            confirmed,
        };
        let hurry = state.jobs.get(&order.job).is_some_and(|job| job.hurry);
        let job = Job {
            order: order.clone(),
            at,
            hurry,
        };
        state.jobs.insert(order.job, job);
        Claim { order, fence }
    }

    /// Renews `claim` if it is still held. With `confirm`, the job can no longer be cancelled.
    fn renew_claim(&self, state: &mut State, claim: &Claim, confirm: bool) -> ClaimState {
        let now = self.now();
        let lost = match state.jobs.get(&claim.order.job) {
            Some(Job {
                at: JobState::Held { fence, until, .. },
                order,
                ..
            }) if *fence == claim.fence => {
                *until <= now && !state.within_limits(now, self.0.limits, order)
            }
            _ => true,
        };
        let Some(Job {
            at:
                JobState::Held {
                    until,
                    cancelled,
                    confirmed,
                    ..
                },
            hurry,
            ..
        }) = state.jobs.get_mut(&claim.order.job)
        else {
            return ClaimState::Lost;
        };
        if lost {
            return ClaimState::Lost;
        }
        *until = now + self.0.settings.lease;
        if *cancelled {
            return ClaimState::Cancelled;
        }
        *confirmed |= confirm;
        if *hurry {
            return ClaimState::Hurried;
        }
        ClaimState::Held
    }

    pub(super) async fn renew(&self, claim: &Claim) -> Result<ClaimState, Error> {
        Ok(self.renew_claim(&mut self.state(), claim, false))
    }

    pub(super) async fn confirm(&self, claim: &Claim) -> Result<ClaimState, Error> {
        Ok(self.renew_claim(&mut self.state(), claim, true))
    }

    pub(super) async fn report(&self, claim: &Claim, report: &Report) -> Result<ClaimState, Error> {
        let mut state = self.state();
        let hold = self.renew_claim(&mut state, claim, false);
        if hold != ClaimState::Lost {
            state.post(report, false);
            drop(state);
            self.0.changed.notify_waiters();
        }
        Ok(hold)
    }

    pub(super) async fn complete(
        &self,
        claim: &Claim,
        report: &Report,
    ) -> Result<ClaimState, Error> {
        let mut state = self.state();
        match state.jobs.get(&claim.order.job).map(|job| &job.at) {
            Some(JobState::Ended { fence, .. }) if *fence == claim.fence => {
                return Ok(ClaimState::Held);
            }
            Some(JobState::Held { fence, .. }) if *fence == claim.fence => {}
            _ => return Ok(ClaimState::Lost),
        }
        let entry = state.post(report, true);
        if let Some(job) = state.jobs.get_mut(&claim.order.job) {
            job.at = JobState::Ended {
                fence: claim.fence,
                report: entry,
            };
        }
        drop(state);
        self.0.changed.notify_waiters();
        Ok(ClaimState::Held)
    }

    pub(super) async fn heartbeat(
        &self,
        node: &Node,
        sessions: Option<&[Session]>,
    ) -> Result<(), Error> {
        let mut state = self.state();
        let heard = state.heard.remove(&node.name);
        let sessions = match sessions {
            Some(sessions) => sessions
                .iter()
                .map(|one| truncated_session(one).into_owned())
                .collect(),
            None => heard.map(|heard| heard.sessions).unwrap_or_default(),
        };
        let heard = NodeRecord {
            node: node.clone(),
            sessions,
            at: self.now(),
        };
        state.heard.insert(node.name.clone(), heard);
        Ok(())
    }
}

/// A pending question. Dropping it removes the question and its answer, however the wait ends.
struct PendingQuestion<'a> {
    queue: &'a Local,
    nonce: String,
}

impl Drop for PendingQuestion<'_> {
    fn drop(&mut self) {
        let mut state = self.queue.state();
        state.answers.remove(&self.nonce);
        state
            .questions
            .retain(|question| question.nonce != self.nonce);
    }
}
