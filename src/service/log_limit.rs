//! Rate limit for log lines that untrusted input can cause, with a count of the lines that were dropped.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Limits the log lines of one kind to [`Hush::A_SECOND`] per second.
#[derive(Debug, Default)]
pub(crate) struct Hush(Mutex<(Option<Instant>, u32, u64)>);

impl Hush {
    const A_SECOND: u32 = 10;

    /// Returns `None` if the line is to be dropped, else the number of lines dropped since the last one written.
    pub(crate) fn line(&self) -> Option<u64> {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (since, written, hushed) = &mut *state;
        if since.is_none_or(|since| since.elapsed() >= Duration::from_secs(1)) {
            (*since, *written) = (Some(Instant::now()), 0);
        }
        if *written >= Self::A_SECOND {
            *hushed += 1;
            return None;
        }
        *written += 1;
        Some(std::mem::take(hushed))
    }
}

/// Logs a warning if the given [`Hush`] permits it. The field `more` is the number of lines dropped before it.
macro_rules! warn_hushed {
    ($hush:expr, $($rest:tt)*) => {
        if let Some(more) = $hush.line() {
            tracing::warn!(more, $($rest)*);
        }
    };
}
pub(crate) use warn_hushed;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_written_is_counted() {
        let hush = Hush::default();
        let lines = (0..1000).filter(|_| hush.line().is_some()).count();
        // A second may end between two lines.
        assert!((10..=100).contains(&lines), "{lines}");
        if let Ok(mut state) = hush.0.lock() {
            state.0 = None;
        }
        assert!(hush.line().is_some_and(|more| more > 0));
        assert_eq!(hush.line(), Some(0));
    }
}
