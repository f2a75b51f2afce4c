//! Decides how often and after what pause a request is repeated, and bounds the total of all repetitions in a save.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::error::Error;
use crate::common::waits::Waits;

/// Maximum pause, unless the registry requests a longer one.
const MAX_BACKOFF: Duration = Duration::from_secs(30);
/// Maximum `Retry-After` that is honoured. Beyond it, the whole save is better retried later.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(120);

/// Numbers of attempts and lengths of pauses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retry {
    /// Maximum number of attempts for one request, including the first.
    pub max_attempts: u32,
    /// The first pause; each further one is twice as long. Every pause is shortened at random by up to a half, so that
    /// the clients of a registry that recovers do not return all at once.
    pub first_pause: Duration,
    /// Maximum number of repetitions in the whole save. An error that occurs more often is not transient.
    pub max_retries: u32,
    /// Maximum total of all pauses in the save.
    pub max_total_pause: Duration,
}

impl Default for Retry {
    fn default() -> Self {
        Self {
            max_attempts: 5,
            first_pause: Duration::from_millis(500),
            max_retries: 60,
            max_total_pause: Duration::from_secs(15 * 60),
        }
    }
}

/// Retry budget and deadline of a save, shared by all its requests.
#[derive(Debug)]
pub(super) struct RetryBudget {
    left: Mutex<(u32, Duration)>,
    started: Instant,
    total: Duration,
    waits: Arc<Waits>,
}

impl RetryBudget {
    /// Creates the budget and starts the clock. `total` is the maximum duration of the save.
    pub(super) fn new(retry: Retry, total: Duration) -> Self {
        Self {
            left: Mutex::new((retry.max_retries, retry.max_total_pause)),
            started: Instant::now(),
            total,
            waits: Arc::default(),
        }
    }

    /// Takes one repetition and its pause from the budget. Returns false if not enough is left.
    pub(super) fn take(&self, pause: Duration) -> bool {
        if pause > self.remaining() {
            return false;
        }
        let mut left = self.left.lock().unwrap_or_else(PoisonError::into_inner);
        let (Some(times), Some(pauses)) = (left.0.checked_sub(1), left.1.checked_sub(pause)) else {
            return false;
        };
        *left = (times, pauses);
        self.waits.pause(pause);
        true
    }

    /// Returns where the pauses are shown to who reports what the save waits for.
    pub(super) fn waits(&self) -> Arc<Waits> {
        Arc::clone(&self.waits)
    }

    /// Returns the time left until the deadline.
    pub(super) fn remaining(&self) -> Duration {
        self.total.saturating_sub(self.started.elapsed())
    }

    /// Returns the maximum duration of the save.
    pub(super) fn total(&self) -> Duration {
        self.total
    }
}

impl Retry {
    /// Returns the pause before the next attempt after `failed` attempts, the last of which failed with `error`.
    /// Returns `None` if there is to be no further attempt.
    pub(super) fn pause(&self, failed: u32, error: &Error) -> Option<Duration> {
        self.pause_with(failed, error, rand::random_range(0.5..=1.0))
    }

    fn pause_with(&self, failed: u32, error: &Error, jitter: f64) -> Option<Duration> {
        if !error.is_transient() || failed >= self.max_attempts {
            return None;
        }
        let doubled = self
            .first_pause
            .saturating_mul(1 << failed.saturating_sub(1).min(16));
        let own = doubled.min(MAX_BACKOFF).mul_f64(jitter);
        match error.retry_after() {
            // A registry whose clock is behind asks for a time in the past.
            Some(asked) => (asked <= MAX_RETRY_AFTER).then_some(asked.max(own)),
            None => Some(own),
        }
    }
}

/// Parses `Retry-After` (RFC 9110, 10.2.3): seconds or a date.
pub(super) fn read_retry_after(value: &str, now: jiff::Timestamp) -> Option<Duration> {
    if let Ok(seconds) = value.trim().parse() {
        return Some(Duration::from_secs(seconds));
    }
    let date = jiff::fmt::rfc2822::parse(value.trim()).ok()?.timestamp();
    Some(Duration::try_from(date.duration_since(now)).unwrap_or(Duration::ZERO))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::registry::error::{Reply, Request, Step};

    fn reply(status: u16, retry_after: Option<u64>) -> Error {
        let url = "http://r.example/v2/".parse().unwrap();
        Error::Reply(Box::new(Reply {
            request: Request::new(&http::Method::GET, &url),
            step: Step::Ping,
            status,
            code: None,
            message: None,
            retry_after: retry_after.map(Duration::from_secs),
            tag: None,
            credentials: None,
            mid_upload: false,
        }))
    }

    #[test]
    fn a_pause_is_shown_to_who_reports_waits() {
        let budget = RetryBudget::new(Retry::default(), Duration::from_secs(3600));
        assert_eq!(budget.waits().current(), None);
        // One that is not made is not shown.
        assert!(!budget.take(Duration::from_secs(7200)));
        assert_eq!(budget.waits().current(), None);
        assert!(budget.take(Duration::from_secs(600)));
        let (reason, left) = budget.waits().current().unwrap();
        assert_eq!(reason, crate::common::waits::WaitReason::Registry);
        assert!(left > Some(Duration::from_secs(500)), "{left:?}");
    }

    #[test]
    fn a_save_does_not_repeat_for_ever() {
        let retry = Retry {
            max_retries: 3,
            max_total_pause: Duration::from_secs(10),
            ..Retry::default()
        };
        let (second, hour) = (Duration::from_secs(1), Duration::from_secs(3600));
        let budget = RetryBudget::new(retry, hour);
        assert_eq!(
            [0; 4].map(|_| budget.take(second)),
            [true, true, true, false]
        );
        let budget = RetryBudget::new(retry, hour);
        assert_eq!(
            [6, 6, 4, 1].map(|n| budget.take(n * second)),
            [true, false, true, false],
            "ten seconds in all"
        );
        // A pause never extends beyond the deadline.
        assert!(!RetryBudget::new(retry, second).take(2 * second));
    }

    #[test]
    fn pauses_double_and_end() {
        let retry = Retry::default();
        let pauses: Vec<_> = (1..=5)
            .map(|n| retry.pause_with(n, &reply(503, None), 1.0))
            .collect();
        let ms = |n| Some(Duration::from_millis(n));
        assert_eq!(pauses, [ms(500), ms(1000), ms(2000), ms(4000), None]);
        assert_eq!(retry.pause_with(1, &reply(404, None), 1.0), None);
        assert_eq!(retry.pause_with(1, &reply(507, None), 1.0), None);
        let shortest = retry.pause_with(1, &reply(503, None), 0.5);
        assert_eq!(shortest, ms(250));
    }

    #[test]
    fn retry_after_is_obeyed_or_left_to_the_caller() {
        let retry = Retry::default();
        assert_eq!(
            retry.pause_with(1, &reply(429, Some(7)), 0.5),
            Some(Duration::from_secs(7))
        );
        assert_eq!(retry.pause_with(1, &reply(429, Some(3600)), 0.5), None);
        let past = retry.pause_with(2, &reply(429, Some(0)), 1.0);
        assert_eq!(past, Some(Duration::from_secs(1)));
        let now = "2026-11-23T22:00:00Z".parse().unwrap();
        assert_eq!(read_retry_after("7", now), Some(Duration::from_secs(7)));
        assert_eq!(
            read_retry_after("Mon, 23 Nov 2026 22:00:09 GMT", now),
            Some(Duration::from_secs(9))
        );
        assert_eq!(
            read_retry_after("Mon, 23 Nov 2026 21:00:00 GMT", now),
            Some(Duration::ZERO)
        );
        for bad in ["", "-1", "soon", "1.5", "99999999999999999999999"] {
            assert_eq!(read_retry_after(bad, now), None, "{bad}");
        }
    }
}
