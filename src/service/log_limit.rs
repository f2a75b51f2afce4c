//! Rate limit for log lines that untrusted input can cause, with a count of the lines that were dropped.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Limits the log lines of one kind to [`LogLimit::MAX_PER_SECOND`] per second.
#[derive(Debug, Default)]
pub(crate) struct LogLimit(Mutex<(Option<Instant>, u32, u64)>);

impl LogLimit {
    const MAX_PER_SECOND: u32 = 10;

    /// Returns `None` if the line is to be dropped, else the number of lines dropped since the last one written.
    pub(crate) fn permit(&self) -> Option<u64> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (since, written, dropped) = &mut *state;
        if since.is_none_or(|since| since.elapsed() >= Duration::from_secs(1)) {
            (*since, *written) = (Some(Instant::now()), 0);
        }
        if *written >= Self::MAX_PER_SECOND {
            *dropped += 1;
            return None;
        }
        *written += 1;
        Some(std::mem::take(dropped))
    }
}

/// Logs a warning if the given [`LogLimit`] permits it. The field `more` is the number of lines dropped before it.
macro_rules! warn_limited {
    ($log_limit:expr, $($rest:tt)*) => {
        if let Some(more) = $log_limit.permit() {
            tracing::warn!(more, $($rest)*);
        }
    };
}
pub(crate) use warn_limited;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_written_is_counted() {
        let log_limit = LogLimit::default();
        let lines = (0..1000).filter(|_| log_limit.permit().is_some()).count();
        // A second may end between two lines.
        assert!((10..=100).contains(&lines), "{lines}");
        if let Ok(mut state) = log_limit.0.lock() {
            state.0 = None;
        }
        assert!(log_limit.permit().is_some_and(|more| more > 0));
        assert_eq!(log_limit.permit(), Some(0));
    }
}
