//! Compares the clock of this machine with the clock of a server: messages between managers and agents expire, and so
//! do tokens.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::Finding;

/// Difference in milliseconds above which the finding is a warning: a response takes time to arrive, and HTTP dates
/// have a resolution of one second.
const WARN_SKEW_MS: u64 = 5_000;
/// Difference in milliseconds above which the finding is a failure: tokens of registries and of users are valid for
/// minutes.
const MAX_SKEW_MS: u64 = 120_000;

/// Returns the current time in milliseconds since the epoch.
pub(super) fn now_ms() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_millis() as i64)
}

/// Judges the offset between two clocks. `theirs_ms` is the time in the server's response, `ours_ms` lies between the
/// request and the response; both are milliseconds since the epoch.
pub(super) fn judge(whose: &str, theirs_ms: i64, ours_ms: i64) -> Finding {
    let apart = theirs_ms.abs_diff(ours_ms);
    let seconds = Duration::from_millis(apart).as_secs_f64();
    let direction = if theirs_ms < ours_ms {
        "ahead of"
    } else {
        "behind"
    };
    let found = format!("{seconds:.1} s {direction} {whose}");
    let advice = "keep the time by NTP (chrony, systemd-timesyncd) on all machines: orders and tokens expire";
    if apart > MAX_SKEW_MS {
        Finding::failed("clock", found, advice)
    } else if apart > WARN_SKEW_MS {
        Finding::warning("clock", found, advice)
    } else {
        Finding::ok("clock", format!("agrees with {whose}"))
    }
}

#[cfg(test)]
mod tests {
    use super::super::State;
    use super::*;

    #[test]
    fn a_clock_that_is_off_is_told_with_its_direction() {
        assert_eq!(judge("Redis", 1_000_000, 1_001_500).state, State::Ok);
        let ahead = judge("Redis", 1_000_000, 1_010_000);
        assert_eq!(ahead.state, State::Warning);
        assert_eq!(ahead.found, "10.0 s ahead of Redis");
        let behind = judge("the registry", 10_000_000, 1_000_000);
        assert_eq!(behind.state, State::Failed);
        assert_eq!(behind.found, "9000.0 s behind the registry");
    }
}
