//! How often, and after which delay, a failed save is tried again.

/// How failed attempts are repeated.
#[derive(Clone, Copy, Debug)]
pub struct Policy {
    /// Total number of attempts.
    pub attempts: u32,
    /// Delay before the first retry, in milliseconds.
    pub backoff_ms: u64,
    /// Maximum delay, in milliseconds.
    pub backoff_most_ms: u64,
}

impl Policy {
    /// Returns the delay after this number of failures (starting at 1). It doubles each time, and `chance` (0 to 1)
    /// shortens it by up to a half.
    pub(super) fn pause_ms(&self, failures: u32, chance: f64) -> i64 {
        let doubled = self
            .backoff_ms
            .saturating_mul(1 << failures.saturating_sub(1).min(30))
            .min(self.backoff_most_ms);
        (doubled as f64 * (1.0 - chance.clamp(0.0, 1.0) / 2.0)) as i64
    }
}
