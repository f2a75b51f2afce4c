//! Sends the reports of one job, in order and each only once, over a queue that may be unreachable for some time.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use crate::service::job::{Before, Event, Question, Report, Said, Word, now_ms};
use crate::service::queue::{Claim, Error, Hold, Queue};

/// Time limit of a call of the queue.
pub(super) const CALL: Duration = Duration::from_secs(5);
/// Time limit for a manager's answer. The question is then sent again, because it may have been lost.
const ANSWER: Duration = Duration::from_secs(3);
/// Delay before the next attempt when the queue cannot be reached.
const AGAIN: Duration = Duration::from_secs(1);
/// Maximum number of reports that are buffered.
const MAX_WAITING: usize = 2000;
/// How long a draining agent keeps trying to send a job's final report. A success is on disk by then.
const LAST_WORD: Duration = Duration::from_secs(20);

/// Runs a call of the queue with a time limit.
pub(super) async fn call<T>(
    what: impl Future<Output = Result<T, Error>>,
    bound: Duration,
) -> Result<T, Error> {
    match tokio::time::timeout(bound, what).await {
        Ok(answer) => answer,
        Err(_) => Err(Error::Unreachable {
            at: "its address".to_owned(),
            reason: format!("no answer within {} s", bound.as_secs()),
        }),
    }
}

/// Reports and questions for one claim.
pub(super) struct Teller {
    queue: Queue,
    node: String,
    pub(super) claim: Claim,
    seq: u64,
    waiting: VecDeque<Report>,
    /// Time of the next attempt if the queue could not be reached.
    not_before: Option<Instant>,
}

impl Teller {
    pub(super) fn new(queue: Queue, node: String, claim: Claim) -> Self {
        Self {
            queue,
            node,
            claim,
            seq: 0,
            waiting: VecDeque::new(),
            not_before: None,
        }
    }

    fn report(&mut self, said: Said) -> Report {
        let report = Report {
            job: self.claim.order.job,
            node: self.node.clone(),
            attempt: self.claim.order.attempt,
            fence: self.claim.fence,
            seq: self.seq,
            at_ms: now_ms(),
            said,
        };
        self.seq += 1;
        report
    }

    /// Sends a report now, or as soon as the queue can be reached. Progress is dropped if it cannot be sent now.
    /// Returns `None` if the state of the claim is unknown.
    pub(super) async fn tell(&mut self, said: Said) -> Option<Hold> {
        let passing = matches!(
            said,
            Said::Event {
                event: Event::Progress { .. } | Event::BaseProgress { .. }
            }
        );
        if self.waiting.len() >= MAX_WAITING || (passing && !self.waiting.is_empty()) {
            return None;
        }
        let report = self.report(said);
        self.waiting.push_back(report);
        self.flush().await
    }

    /// Sends the buffered reports.
    async fn flush(&mut self) -> Option<Hold> {
        let mut hold = None;
        while let Some(report) = self.waiting.front() {
            if self.not_before.is_some_and(|at| Instant::now() < at) {
                return None;
            }
            match call(self.queue.report(&self.claim, report), CALL).await {
                Ok(Hold::Lost) => return Some(Hold::Lost),
                Ok(left) => {
                    self.waiting.pop_front();
                    self.not_before = None;
                    hold = Some(left);
                }
                Err(error) => {
                    self.away(&error);
                    return None;
                }
            }
        }
        hold
    }

    fn away(&mut self, error: &Error) {
        if self.not_before.is_none() {
            tracing::warn!(job.id = %self.claim.order.job, %error, "the queue does not hear what a save says");
        }
        self.not_before = Some(Instant::now() + AGAIN);
    }

    /// Renews the lease, after sending the buffered reports.
    pub(super) async fn renew(&mut self) -> Option<Hold> {
        if let Some(hold) = self.flush().await
            && hold != Hold::Held
        {
            return Some(hold);
        }
        match call(self.queue.renew(&self.claim), CALL).await {
            Ok(hold) => Some(hold),
            Err(error) => {
                self.away(&error);
                None
            }
        }
    }

    /// Asks the managers whether the save is wanted now. Returns `None` if none answered in time. Answers to earlier
    /// questions are ignored, so the result is never older than this call.
    pub(super) async fn wanted(&self, before: Before) -> Option<Word> {
        let order = &self.claim.order;
        let question = Question::new(
            order.job,
            &self.node,
            order.attempt,
            self.claim.fence,
            before,
        );
        let asked = self.queue.ask(&question, ANSWER);
        match call(asked, ANSWER + CALL).await {
            Ok(answer) => answer.map(|answer| answer.word),
            Err(error) => {
                tracing::debug!(job.id = %order.job, %error, "no manager can be asked");
                None
            }
        }
    }

    /// Returns whether the claim is still held, so that the tag may be set. From then on the job cannot be cancelled.
    pub(super) async fn confirm(&mut self) -> Option<Hold> {
        match call(self.queue.confirm(&self.claim), CALL).await {
            Ok(hold) => Some(hold),
            Err(error) => {
                self.away(&error);
                None
            }
        }
    }

    /// Sends the final report, and retries as long as necessary. `over` limits that time, because the agent is about to
    /// end.
    pub(super) async fn complete(mut self, said: Said, over: &CancellationToken) -> Hold {
        let last = self.report(said);
        let mut until = None;
        loop {
            let told = self.flush().await;
            if told == Some(Hold::Lost) {
                return Hold::Lost;
            }
            if self.waiting.is_empty() {
                match call(self.queue.complete(&self.claim, &last), CALL).await {
                    Ok(hold) => return hold,
                    Err(error) => self.away(&error),
                }
            }
            if over.is_cancelled() {
                let until = *until.get_or_insert_with(|| Instant::now() + LAST_WORD);
                if Instant::now() >= until {
                    return Hold::Lost;
                }
            }
            tokio::time::sleep(AGAIN).await;
        }
    }
}
