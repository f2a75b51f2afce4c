//! The state machine of a save: the only place that changes its state, in response to reports of agents, requests of
//! users, and data loss in the queue. It does no I/O, so that every case can be tested.

use super::action::{OutboxAction, Step};
use super::policy::Policy;
use super::{Failure, Held, Save, SaveWarning};
use crate::service::job::{Changes, Code, Event, Outcome, Report, Saved, State, Update};

/// Maximum number of warnings that are kept; a tree can contain any number of unusual files.
const MAX_WARNINGS: usize = 100;
/// Maximum length of an agent's message that is kept, in bytes.
const MAX_MESSAGE: usize = 2000;

/// A pending change of a save: the save after the change, the transitions that lead there, and the resulting requests
/// to the queue.
#[derive(Clone, Debug)]
pub struct Draft {
    save: Save,
    before: Save,
    now_ms: i64,
    pub(in crate::service::record) steps: Vec<Step>,
    pub(in crate::service::record) actions: Vec<(OutboxAction, i64)>,
    pub(in crate::service::record) revoked: Vec<OutboxAction>,
}

impl Draft {
    pub(in crate::service::record) fn new(save: Save, now_ms: i64) -> Self {
        Self {
            before: save.clone(),
            save,
            now_ms,
            steps: Vec::new(),
            actions: Vec::new(),
            revoked: Vec::new(),
        }
    }

    /// Returns the save with the changes so far.
    pub(crate) fn save(&self) -> &Save {
        &self.save
    }

    /// Returns whether anything but the sequence number and the progress has changed.
    pub(crate) fn is_changed(&self) -> bool {
        let mut was = self.before.clone();
        was.seq = self.save.seq;
        was.progress = self.save.progress;
        !self.steps.is_empty() || was != self.save
    }

    pub(in crate::service::record) fn is_touched(&self) -> bool {
        self.is_changed() || self.before.seq != self.save.seq
    }

    pub(in crate::service::record) fn into_save(self) -> Save {
        self.save
    }

    /// Changes the state; no other function does. Returns `false` without a change if the transition is not permitted.
    fn transition(&mut self, to: State, detail: &str) -> bool {
        let from = self.save.state;
        if !from.can_become(to) {
            tracing::warn!(
                job = %self.save.id, from = from.name(), to = to.name(),
                "a transition that there is not was asked for"
            );
            return false;
        }
        self.save.state = to;
        self.save.since_ms = Some(self.now_ms);
        self.save.held = None;
        if to != State::Running {
            self.save.phase = None;
        }
        if to.is_final() {
            self.save.finished_ms = Some(self.now_ms);
            self.save.cancelling = false;
            self.revoked.push(OutboxAction::Offer);
            self.actions
                .retain(|(action, _)| *action != OutboxAction::Offer);
        }
        self.steps.push(Step {
            from: Some(from),
            to,
            attempt: self.save.attempt,
            fence: self.save.fence,
            detail: truncated(detail),
        });
        true
    }

    /// Changes the state by way of intermediate states, in case reports of them are late or lost.
    fn transition_via(&mut self, to: State, detail: &str) -> bool {
        let mut paths = vec![vec![self.save.state]];
        let mut seen = vec![self.save.state];
        while let Some(path) = (!paths.is_empty()).then(|| paths.remove(0)) {
            let Some(&last) = path.last() else { continue };
            for next in State::ALL {
                if !last.can_become(next) || seen.contains(&next) {
                    continue;
                }
                let mut longer = path.clone();
                longer.push(next);
                if next == to {
                    return longer[1..]
                        .iter()
                        .all(|&state| self.transition(state, detail));
                }
                seen.push(next);
                if !next.is_final() {
                    paths.push(longer);
                }
            }
        }
        false
    }

    fn send(&mut self, action: OutboxAction, due_ms: i64) {
        self.revoked.retain(|revoked| *revoked != action);
        self.actions.retain(|(other, _)| *other != action);
        self.actions.push((action, due_ms));
    }

    /// Queues the save again with a new order.
    fn queue_again(&mut self, detail: &str, not_before_ms: i64) {
        if self.save.state != State::Queued && !self.transition(State::Queued, detail) {
            return;
        }
        self.save.attempt = self.save.attempt.saturating_add(1);
        self.save.queued_ms = self.now_ms;
        self.save.not_before_ms = not_before_ms;
        self.save.started_ms = None;
        self.save.finished_ms = None;
        self.save.progress = None;
        self.save.error = None;
        self.send(OutboxAction::Offer, self.now_ms);
    }

    fn fail(&mut self, failure: Failure) {
        let detail = format!("{}: {}", failure.code.name(), failure.message);
        if self.transition_via(State::Failed, &detail) {
            self.save.error = Some(failure);
        }
    }

    /// Applies a report of an agent. `chance` is between 0 and 1 and randomizes the delay before a retry.
    pub(crate) fn apply_report(&mut self, report: &Report, policy: &Policy, chance: f64) {
        // A job belongs to its node, so reports of other nodes are ignored.
        if report.fence < self.save.fence || report.node != self.save.node {
            return;
        }
        let taken_over = report.fence > self.save.fence;
        if self.save.state.is_final() {
            self.apply_late_report(report);
            return;
        }
        // A report about an earlier order must not affect a later order, unless it says that the image exists.
        let current = report.attempt >= self.save.attempt;
        // Its fence does not count either: an old order that a third party put back into the queue can have any fence.
        let made = matches!(
            &report.update,
            Update::Ended {
                outcome: Outcome::Succeeded { .. }
            }
        );
        if !current && !made {
            if let Update::Event { event } = &report.update {
                self.apply_event(event, false);
            }
            return;
        }
        if taken_over {
            self.save.fence = report.fence;
            self.save.seq = 0;
            if current && self.save.state != State::Queued {
                self.transition(State::Queued, "another agent has taken it over");
                self.save.started_ms = None;
            }
        }
        self.save.attempt = self.save.attempt.max(report.attempt);
        let newest = taken_over || report.seq >= self.save.seq;
        self.save.seq = self.save.seq.max(report.seq);
        match &report.update {
            Update::Assigned if current => {
                if self.save.state == State::Queued {
                    self.transition(State::Assigned, "");
                }
            }
            Update::Started if current => {
                if self.save.state != State::Running {
                    self.transition_via(State::Running, "");
                }
                self.save.started_ms = Some(report.at_ms);
            }
            Update::Event { event } => {
                if current && self.save.state != State::Running {
                    self.transition_via(State::Running, "");
                    self.save.started_ms.get_or_insert(report.at_ms);
                }
                self.apply_event(event, current && newest);
            }
            Update::GivenBack { reason } if current => {
                if self.save.cancelling {
                    self.transition_via(State::Cancelled, reason);
                } else {
                    self.queue_again(reason, self.now_ms);
                }
            }
            Update::Ended { outcome } => self.ended(outcome, current, policy, chance),
            Update::Assigned
            | Update::Started
            | Update::GivenBack { .. }
            | Update::Packages { .. } => {}
        }
    }

    fn ended(&mut self, outcome: &Outcome, current: bool, policy: &Policy, chance: f64) {
        match outcome {
            Outcome::Succeeded { saved } => {
                if !current {
                    self.send(OutboxAction::Withdraw, self.now_ms);
                }
                self.succeed(saved, "");
            }
            Outcome::Cancelled if current && self.save.cancelling => {
                self.transition_via(State::Cancelled, "the agent has stopped it");
            }
            // A third party with write access to the queue can tell an agent to stop. No user requested that, so the
            // save is retried.
            Outcome::Cancelled if current => {
                self.save.failures += 1;
                let pause = policy.pause_ms(self.save.failures, chance);
                self.add_warning(
                    "retried",
                    "the queue had it stopped without a request to cancel it",
                );
                self.queue_again("stopped without being asked for", self.now_ms + pause);
            }
            Outcome::Failed {
                code,
                message,
                retryable,
            } if current => {
                if self.save.cancelling {
                    self.transition_via(State::Cancelled, message);
                    return;
                }
                self.save.failures += 1;
                let message = truncated(message);
                if *retryable && self.save.failures < policy.attempts {
                    let pause = policy.pause_ms(self.save.failures, chance);
                    self.add_warning("retried", &format!("{}: {message}", code.name()));
                    self.queue_again(&message, self.now_ms + pause);
                } else {
                    self.fail(Failure {
                        code: *code,
                        message,
                        retryable: *retryable,
                    });
                }
            }
            Outcome::Cancelled | Outcome::Failed { .. } => {}
        }
    }

    fn succeed(&mut self, saved: &Saved, detail: &str) {
        if self.transition_via(State::Succeeded, detail) {
            self.save.error = None;
            self.save.pause_ms = saved.pause_ms.or(self.save.pause_ms);
            self.save.result = Some(Saved {
                reference: truncated(&saved.reference),
                digest: truncated(&saved.digest),
                base_name: saved.base_name.as_deref().map(truncated),
                base_digest: saved.base_digest.as_deref().map(truncated),
                changes: saved.changes.clone().map(Changes::sanitised),
                ..saved.clone()
            });
        }
    }

    /// Applies a report that arrives after the end: a late warning, or the success of a node that was given up too
    /// early.
    fn apply_late_report(&mut self, report: &Report) {
        let given_up = |failure: &Failure| failure.code == Code::NodeLost;
        match &report.update {
            Update::Ended {
                outcome: Outcome::Succeeded { saved },
            } if self.save.state == State::Failed
                && self.save.error.as_ref().is_some_and(given_up) =>
            {
                self.save.fence = report.fence;
                self.succeed(saved, "the node was not lost: its image is there");
            }
            Update::Event { event } if report.fence == self.save.fence => {
                self.apply_event(event, false);
            }
            _ => {}
        }
    }

    fn apply_event(&mut self, event: &Event, newest: bool) {
        match event {
            Event::Waiting { reason, seconds } if newest => {
                self.save.held = reason.map(|reason| Held {
                    reason,
                    until_ms: seconds.and_then(|seconds| self.instant_in(seconds)),
                });
            }
            Event::Phase { phase } if newest => {
                if self.save.phase != Some(*phase) {
                    self.save.since_ms = Some(self.now_ms);
                }
                self.save.phase = Some(*phase);
            }
            Event::Warning { code, message } => self.add_warning(code, message),
            Event::Paused { pause_ms } => self.save.pause_ms = Some(*pause_ms),
            _ => {}
        }
    }

    /// Returns the instant after so many seconds, if that is in the next day.
    fn instant_in(&self, seconds: f64) -> Option<i64> {
        let soon = (0.0..=86_400.0).contains(&seconds);
        soon.then(|| self.now_ms.saturating_add((seconds * 1000.0) as i64))
    }

    fn add_warning(&mut self, code: &str, message: &str) {
        let warning = SaveWarning {
            code: truncated(code).chars().take(64).collect(),
            message: truncated(message),
        };
        let warnings = &mut self.save.warnings;
        if warnings.len() < MAX_WARNINGS && !warnings.contains(&warning) {
            warnings.push(warning);
        }
    }

    /// Requests the cancellation of the save for the reason `why`. Returns `false` if it has already ended.
    pub fn request_cancel(&mut self, why: &str) -> bool {
        if self.save.state.is_final() {
            return false;
        }
        if !self.save.cancelling {
            self.save.cancelling = true;
            self.send(OutboxAction::Withdraw, self.now_ms);
            self.revoked.push(OutboxAction::Offer);
            self.steps.push(Step {
                from: Some(self.save.state),
                to: self.save.state,
                attempt: self.save.attempt,
                fence: self.save.fence,
                detail: truncated(why),
            });
        }
        true
    }

    /// Asks for normal priority. Returns `false` if the save has ended, or is about to be cancelled.
    pub fn request_hurry(&mut self, who: &str) -> bool {
        if self.save.state.is_final() || self.save.cancelling {
            return false;
        }
        if !self.save.hurried {
            self.save.hurried = true;
            self.send(OutboxAction::Hurry, self.now_ms);
            self.steps.push(Step {
                from: Some(self.save.state),
                to: self.save.state,
                attempt: self.save.attempt,
                fence: self.save.fence,
                detail: truncated(&format!("{who} asked it to hurry")),
            });
        }
        true
    }

    /// Records that the cancellation came too late, because the tag is being set.
    pub(crate) fn cancel_too_late(&mut self) {
        self.save.cancelling = false;
        self.revoked.push(OutboxAction::Withdraw);
    }

    /// Cancels a save that no agent holds. Returns whether the state changed.
    pub fn end(&mut self, detail: &str) -> bool {
        self.transition_via(State::Cancelled, detail)
    }

    /// Queues the save again after its lease has ended while the order is still in the queue.
    pub(crate) fn requeue_after_lost_lease(&mut self) {
        if self.save.state != State::Queued {
            self.transition(State::Queued, "the lease has ended");
            self.save.queued_ms = self.now_ms;
            self.save.started_ms = None;
        }
    }

    /// Offers the order again because the queue does not know it; with a new order if an agent had claimed it.
    pub fn offer_again(&mut self, detail: &str) {
        if self.save.state == State::Queued {
            self.send(OutboxAction::Offer, self.now_ms);
        } else {
            self.queue_again(detail, self.now_ms);
        }
    }

    /// Gives the save up, and removes it from the queue.
    pub(crate) fn give_up(&mut self, code: Code, message: &str) {
        if self.save.state.is_final() {
            return;
        }
        if self.save.cancelling {
            self.transition_via(State::Cancelled, message);
        } else {
            self.fail(Failure {
                code,
                message: message.to_owned(),
                retryable: true,
            });
        }
        self.send(OutboxAction::Withdraw, self.now_ms);
    }

    /// Repeats the request for cancellation, which the queue may not have received.
    pub(crate) fn repeat_cancel(&mut self) {
        if self.save.cancelling && !self.save.state.is_final() {
            self.send(OutboxAction::Withdraw, self.now_ms);
        }
    }

    /// Queues a failed save again on request of an administrator. Returns `false` if it has not failed.
    pub fn requeue(&mut self, who: &str) -> bool {
        if self.save.state != State::Failed {
            return false;
        }
        self.save.failures = 0;
        self.queue_again(&format!("{who} asked for it"), self.now_ms);
        true
    }
}

/// Limits the length of foreign text, and replaces zero bytes, which PostgreSQL does not accept.
fn truncated(text: &str) -> String {
    let mut end = text.len().min(MAX_MESSAGE);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    let mut kept = text[..end].replace('\0', "\u{fffd}");
    if end < text.len() {
        kept.push('…');
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::service::job::{JobId, Kind, Phase, WaitReason};

    pub(crate) fn save() -> Save {
        Save {
            id: JobId::new(),
            session: "c".repeat(64),
            session_name: "ns/pod".into(),
            node: "n1".into(),
            user: "alice".into(),
            owner: "alice".into(),
            name: "torch".into(),
            tag: "v1".into(),
            destination: "h.example/alice/torch:v1".into(),
            kind: Kind::Jupyter,
            attempt: 1,
            version: 1,
            caller: "token:x".into(),
            created_ms: 1,
            queued_ms: 1,
            not_before_ms: 1,
            ..Save::default()
        }
    }

    const POLICY: Policy = Policy {
        attempts: 3,
        backoff_ms: 1000,
        backoff_most_ms: 3000,
    };

    fn saved() -> Saved {
        Saved {
            reference: "h.example/alice/torch@sha256:0".into(),
            digest: "sha256:0".into(),
            layer_bytes: 1,
            image_bytes: 2,
            sent_bytes: 1,
            entries: 1,
            pause_ms: Some(3.0),
            seconds: 1.0,
            ..Saved::default()
        }
    }

    fn done() -> Update {
        Update::Ended {
            outcome: Outcome::Succeeded { saved: saved() },
        }
    }

    fn failed(retryable: bool) -> Update {
        Update::Ended {
            outcome: Outcome::Failed {
                code: Code::RegistryUnavailable,
                message: "503".into(),
                retryable,
            },
        }
    }

    fn hear(save: Save, attempt: u32, fence: u64, seq: u64, update: Update) -> Draft {
        let mut draft = Draft::new(save, 100);
        let (job, node) = (draft.save.id, "n1".to_owned());
        let report = Report {
            job,
            node,
            attempt,
            fence,
            seq,
            at_ms: 50,
            update,
        };
        draft.apply_report(&report, &POLICY, 0.0);
        draft
    }

    #[test]
    fn a_save_goes_its_way() {
        let mut at = save();
        for (seq, said, state) in [
            (0, Update::Assigned, State::Assigned),
            (1, Update::Started, State::Running),
            (
                2,
                Update::Event {
                    event: Event::Phase {
                        phase: Phase::Streaming,
                    },
                },
                State::Running,
            ),
            (3, done(), State::Succeeded),
        ] {
            let draft = hear(at, 1, 7, seq, said);
            assert!(draft.is_changed());
            at = draft.into_save();
            assert_eq!((at.state, at.fence), (state, 7));
        }
        assert_eq!((at.pause_ms, at.finished_ms), (Some(3.0), Some(100)));
    }

    #[test]
    fn what_holds_a_save_is_known_until_it_is_over() {
        let says = |reason, seconds| Update::Event {
            event: Event::Waiting { reason, seconds },
        };
        let registry = Some(WaitReason::Registry);
        let at = hear(save(), 1, 7, 1, Update::Started).into_save();
        let at = hear(at, 1, 7, 2, says(registry, Some(8.0))).into_save();
        let held = |until_ms| {
            let reason = WaitReason::Registry;
            Some(Held { reason, until_ms })
        };
        assert_eq!(at.held, held(Some(8_100)));
        for (seconds, until_ms) in [(None, None), (Some(f64::NAN), None), (Some(1e300), None)] {
            let at = hear(at.clone(), 1, 7, 3, says(registry, seconds)).into_save();
            assert_eq!(at.held, held(until_ms), "{seconds:?}");
        }
        let over = hear(at.clone(), 1, 7, 3, says(None, None)).into_save();
        assert_eq!(over.held, None);
        assert_eq!(hear(at, 1, 7, 3, failed(true)).into_save().held, None);
    }

    #[test]
    fn reports_in_any_order_come_to_the_same() {
        // The final report can overtake the first one, because two managers read the reports.
        let at = hear(save(), 1, 7, 3, done()).into_save();
        assert_eq!(at.state, State::Succeeded);
        let at = hear(at, 1, 7, 1, Update::Started);
        assert!(!at.is_changed());
        let warning = Update::Event {
            event: Event::Warning {
                code: "unstable_file".into(),
                message: "x".into(),
            },
        };
        let at = hear(at.into_save(), 1, 7, 2, warning);
        assert!(at.is_changed());
        assert_eq!(at.save().state, State::Succeeded);
    }

    #[test]
    fn what_may_pass_is_tried_again_with_growing_pauses_and_not_for_ever() {
        let mut at = save();
        for (attempt, pause) in [(1, 1000), (2, 2000)] {
            let draft = hear(at, attempt, u64::from(attempt), 5, failed(true));
            assert_eq!(draft.actions, [(OutboxAction::Offer, 100)]);
            at = draft.into_save();
            assert_eq!((at.state, at.attempt), (State::Queued, attempt + 1));
            assert_eq!(at.not_before_ms, 100 + pause);
        }
        let at = hear(at, 3, 3, 5, failed(true)).into_save();
        assert_eq!(at.state, State::Failed);
        let at = hear(save(), 1, 1, 5, failed(false)).into_save();
        assert_eq!(at.state, State::Failed);
    }

    #[test]
    fn an_earlier_agent_moves_nothing_but_an_image_that_is_there_counts() {
        let retried = hear(save(), 1, 7, 5, failed(true)).into_save();
        for said in [Update::Assigned, Update::Started, failed(false)] {
            assert!(!hear(retried.clone(), 1, 7, 4, said).is_changed());
        }
        let draft = hear(retried.clone(), 1, 7, 6, done());
        assert_eq!(draft.save().state, State::Succeeded);
        assert!(
            draft
                .actions
                .iter()
                .any(|(e, _)| *e == OutboxAction::Withdraw)
        );
        let taken = hear(retried, 2, 8, 0, Update::Assigned).into_save();
        assert!(!hear(taken, 2, 7, 9, done()).is_changed());
    }

    #[test]
    fn a_claim_that_another_agent_took_over_begins_anew() {
        let running = hear(save(), 1, 7, 1, Update::Started).into_save();
        let draft = hear(running, 1, 8, 0, Update::Assigned);
        let states: Vec<_> = draft.steps.iter().map(|step| step.to).collect();
        assert_eq!(states, [State::Queued, State::Assigned]);
        assert_eq!(draft.save().attempt, 1);
    }

    #[test]
    fn whose_end_is_wanted_does_not_begin_again() {
        let mut draft = Draft::new(hear(save(), 1, 7, 1, Update::Started).into_save(), 100);
        assert!(draft.request_cancel("alice"));
        let at = draft.into_save();
        for said in [failed(true), Update::GivenBack { reason: "x".into() }] {
            assert_eq!(
                hear(at.clone(), 1, 7, 2, said).into_save().state,
                State::Cancelled
            );
        }
        assert_eq!(
            hear(at, 1, 7, 2, done()).into_save().state,
            State::Succeeded
        );
    }

    #[test]
    fn another_node_is_not_heard() {
        let mut draft = Draft::new(save(), 100);
        let report = Report {
            job: draft.save.id,
            node: "n2".into(),
            attempt: 1,
            fence: 9,
            seq: 0,
            at_ms: 50,
            update: done(),
        };
        draft.apply_report(&report, &POLICY, 0.0);
        assert!(!draft.is_touched());
    }

    #[test]
    fn a_node_that_comes_back_with_the_image_was_not_lost() {
        let mut draft = Draft::new(hear(save(), 1, 7, 1, Update::Started).into_save(), 100);
        draft.give_up(Code::NodeLost, "gone");
        let lost = draft.into_save();
        assert_eq!(lost.state, State::Failed);
        assert_eq!(
            hear(lost, 1, 7, 2, done()).into_save().state,
            State::Succeeded
        );
        let failed = hear(save(), 1, 7, 2, failed(false)).into_save();
        assert_eq!(
            hear(failed, 1, 7, 3, done()).into_save().state,
            State::Failed
        );
    }

    #[test]
    fn pauses_are_shortened_by_chance_and_bounded() {
        assert_eq!(POLICY.pause_ms(1, 1.0), 500);
        assert_eq!(POLICY.pause_ms(9, 0.0), 3000);
        assert_eq!(POLICY.pause_ms(u32::MAX, 0.0), 3000);
    }
}
