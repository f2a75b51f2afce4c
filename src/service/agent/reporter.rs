//! Sends the reports of one job, in order and each only once, over a queue that may be unreachable for some time.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use crate::common::digest::Digest;
use crate::service::job::{Event, NextStep, Question, Report, Update, Verdict, now_ms};
use crate::service::queue::{Claim, ClaimState, Error, Queue};

/// Time limit of a call of the queue.
pub(super) const CALL_TIMEOUT: Duration = Duration::from_secs(5);
/// Time limit for a manager's answer. The question is then sent again, because it may have been lost.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(3);
/// Delay before the next attempt when the queue cannot be reached.
const RETRY_DELAY: Duration = Duration::from_secs(1);
/// Maximum number of reports that are buffered.
const MAX_BUFFERED: usize = 2000;
/// How long a draining agent keeps trying to send a job's final report. A success is on disk by then.
const FINAL_REPORT_TIMEOUT: Duration = Duration::from_secs(20);

/// Runs a call of `queue` with a time limit.
pub(super) async fn call<T>(
    queue: &Queue,
    what: impl Future<Output = Result<T, Error>>,
    bound: Duration,
) -> Result<T, Error> {
    match tokio::time::timeout(bound, what).await {
        Ok(answer) => answer,
        Err(_) => Err(Error::Unreachable {
            at: queue.address().to_owned(),
            reason: format!("no answer within {} s", bound.as_secs()),
        }),
    }
}

/// Reports and questions for one claim.
pub(super) struct Reporter {
    queue: Queue,
    node: String,
    pub(super) claim: Claim,
    seq: u64,
    waiting: VecDeque<Report>,
    /// Time of the next attempt if the queue could not be reached.
    not_before: Option<Instant>,
    /// Whether the queue says that the save was asked to hurry. Its claim is reported as held.
    pub(super) hurried: bool,
}

impl Reporter {
    pub(super) fn new(queue: Queue, node: String, claim: Claim) -> Self {
        Self {
            queue,
            node,
            claim,
            seq: 0,
            waiting: VecDeque::new(),
            not_before: None,
            hurried: false,
        }
    }

    fn noted(&mut self, hold: ClaimState) -> ClaimState {
        if hold != ClaimState::Hurried {
            return hold;
        }
        self.hurried = true;
        ClaimState::Held
    }

    fn report(&mut self, update: Update) -> Report {
        let report = Report {
            job: self.claim.order.job,
            node: self.node.clone(),
            attempt: self.claim.order.attempt,
            fence: self.claim.fence,
            seq: self.seq,
            at_ms: now_ms(),
            update,
        };
        self.seq += 1;
        report
    }

    /// Sends a report now, or as soon as the queue can be reached. Progress is dropped if it cannot be sent now.
    /// Returns `None` if the state of the claim is unknown.
    pub(super) async fn send(&mut self, update: Update) -> Option<ClaimState> {
        let is_progress = matches!(
            update,
            Update::Event {
                event: Event::Progress { .. } | Event::BaseProgress { .. }
            }
        );
        if self.waiting.len() >= MAX_BUFFERED || (is_progress && !self.waiting.is_empty()) {
            return None;
        }
        let report = self.report(update);
        self.waiting.push_back(report);
        self.flush().await
    }

    /// Sends the buffered reports.
    async fn flush(&mut self) -> Option<ClaimState> {
        let mut hold = None;
        while let Some(report) = self.waiting.front() {
            if self.not_before.is_some_and(|at| Instant::now() < at) {
                return None;
            }
            match call(
                &self.queue,
                self.queue.report(&self.claim, report),
                CALL_TIMEOUT,
            )
            .await
            {
                Ok(ClaimState::Lost) => return Some(ClaimState::Lost),
                Ok(left) => {
                    self.waiting.pop_front();
                    self.not_before = None;
                    hold = Some(self.noted(left));
                }
                Err(error) => {
                    self.on_unreachable(&error);
                    return None;
                }
            }
        }
        hold
    }

    fn on_unreachable(&mut self, error: &Error) {
        if self.not_before.is_none() {
            tracing::warn!(job.id = %self.claim.order.job, %error, "the queue does not hear what a save says");
        }
        self.not_before = Some(Instant::now() + RETRY_DELAY);
    }

    /// Renews the lease, after sending the buffered reports.
    pub(super) async fn renew(&mut self) -> Option<ClaimState> {
        if let Some(hold) = self.flush().await
            && hold != ClaimState::Held
        {
            return Some(hold);
        }
        match call(&self.queue, self.queue.renew(&self.claim), CALL_TIMEOUT).await {
            Ok(hold) => Some(self.noted(hold)),
            Err(error) => {
                self.on_unreachable(&error);
                None
            }
        }
    }

    /// Asks the managers whether the save is wanted now. Returns `None` if none answered in time. Answers to earlier
    /// questions are ignored, so the result is never older than this call.
    /// `replaces` is the image that would lose its tag.
    pub(super) async fn ask_managers(
        &self,
        before: NextStep,
        replaces: Option<Digest>,
    ) -> Option<Verdict> {
        let order = &self.claim.order;
        let mut question = Question::new(
            order.job,
            &self.node,
            order.attempt,
            self.claim.fence,
            before,
        );
        question.replaces = replaces;
        let asked = self.queue.ask(&question, ANSWER_TIMEOUT);
        match call(&self.queue, asked, ANSWER_TIMEOUT + CALL_TIMEOUT).await {
            Ok(answer) => answer.map(|answer| answer.verdict),
            Err(error) => {
                tracing::debug!(job.id = %order.job, %error, "no manager can be asked");
                None
            }
        }
    }

    /// Returns whether the claim is still held, so that the tag may be set. From then on the job cannot be cancelled.
    pub(super) async fn confirm(&mut self) -> Option<ClaimState> {
        match call(&self.queue, self.queue.confirm(&self.claim), CALL_TIMEOUT).await {
            Ok(hold) => Some(self.noted(hold)),
            Err(error) => {
                self.on_unreachable(&error);
                None
            }
        }
    }

    /// Sends the final report, and retries as long as necessary. `over` limits that time, because the agent is about to
    /// end.
    pub(super) async fn complete(mut self, update: Update, over: &CancellationToken) -> ClaimState {
        let last = self.report(update);
        let mut until = None;
        loop {
            let hold = self.flush().await;
            if hold == Some(ClaimState::Lost) {
                return ClaimState::Lost;
            }
            if self.waiting.is_empty() {
                match call(
                    &self.queue,
                    self.queue.complete(&self.claim, &last),
                    CALL_TIMEOUT,
                )
                .await
                {
                    Ok(hold) => return hold,
                    Err(error) => self.on_unreachable(&error),
                }
            }
            if over.is_cancelled() {
                let until = *until.get_or_insert_with(|| Instant::now() + FINAL_REPORT_TIMEOUT);
                if Instant::now() >= until {
                    return ClaimState::Lost;
                }
            }
            tokio::time::sleep(RETRY_DELAY).await;
        }
    }
}
