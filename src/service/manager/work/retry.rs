//! When something that was refused is tried again.

use std::time::{Duration, Instant};

/// Delay before the second attempt, which doubles with each further one, and its maximum.
const DELAY: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(300));

/// The next attempt.
#[derive(Clone, Copy, Debug)]
pub(super) struct Retry {
    at: Instant,
    delay: Duration,
}

impl Retry {
    /// Returns the next attempt after a refusal now; `before` is the one that was refused, if it was not the first.
    pub(super) fn after(before: Option<Self>) -> Self {
        let delay = before.map_or(Duration::ZERO, |before| before.delay * 2);
        let delay = delay.clamp(DELAY.0, DELAY.1);
        Self {
            at: Instant::now() + delay,
            delay,
        }
    }

    /// Returns whether it is time for it.
    pub(super) fn is_due(&self) -> bool {
        self.at <= Instant::now()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_delay_doubles_up_to_five_minutes() {
        let mut retry = Retry::after(None);
        assert!(!retry.is_due());
        let mut delays = vec![retry.delay.as_secs()];
        for _ in 0..7 {
            retry = Retry::after(Some(retry));
            delays.push(retry.delay.as_secs());
        }
        assert_eq!(delays, [5, 10, 20, 40, 80, 160, 300, 300]);
    }
}
