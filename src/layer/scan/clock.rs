//! What change times can prove: the clock of the file system has a tick, and two changes within one tick have the same
//! stamp.
//!
//! The kernel stamps a change with its coarse clock (`CLOCK_REALTIME_COARSE`, a tick of 1 to 10 ms), and since Linux
//! 6.13 with a finer one if the stamp was queried in between. Either way, a change made after the coarse clock showed
//! `C` has the stamp `C` or a later one. So if an entry has a stamp before `C` and is read after that, every later
//! change of it shows in the stamp. An entry with the stamp `C` or later may change within the tick without a trace.

use std::sync::OnceLock;
use std::time::Duration;

use rustix::time::{ClockId, clock_getres, clock_gettime};
use serde::{Deserialize, Serialize};

/// A reading of the clock that stamps files.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Clock {
    /// Seconds since the epoch.
    pub seconds: i64,
    /// Nanoseconds within the second.
    pub nanos: u32,
}

impl Clock {
    /// Returns the current reading.
    pub fn now() -> Self {
        let now = clock_gettime(ClockId::RealtimeCoarse);
        Self {
            seconds: now.tv_sec,
            nanos: now.tv_nsec as u32,
        }
    }

    /// Returns the reading `a_while` earlier.
    #[must_use]
    pub(crate) fn before(self, a_while: Duration) -> Self {
        Self {
            seconds: self.seconds.saturating_sub_unsigned(a_while.as_secs()),
            nanos: self.nanos,
        }
    }

    /// Returns whether an entry with this change time, if read after this clock reading, shows every later change.
    pub fn can_trust(&self, ctime: i64, ctime_nsec: u32) -> bool {
        let at = |seconds: i64, nanos: u32| i128::from(seconds) * 1_000_000_000 + i128::from(nanos);
        // Zero nanoseconds most likely mean a file system without them (ext4 with small inodes), where a tick is a
        // second.
        let grain = if ctime_nsec == 0 {
            Duration::from_secs(1)
        } else {
            Duration::ZERO
        };
        let margin = i128::try_from((grain + 2 * tick()).as_nanos()).unwrap_or(i128::MAX);
        at(ctime, ctime_nsec) + margin < at(self.seconds, self.nanos)
    }
}

/// Returns the tick of the clock that stamps files. The result is cached, as it is needed several times per entry.
pub fn tick() -> Duration {
    static TICK: OnceLock<Duration> = OnceLock::new();
    *TICK.get_or_init(|| {
        let tick = clock_getres(ClockId::RealtimeCoarse);
        Duration::new(
            tick.tv_sec.try_into().unwrap_or(0),
            tick.tv_nsec.try_into().unwrap_or(0),
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_older_than_a_tick_is_settled() {
        let clock = Clock {
            seconds: 100,
            nanos: 500_000_000,
        };
        let tick = tick().as_nanos() as u32;
        assert!(tick > 0);
        for (seconds, nanos, settled) in [
            (100, 500_000_001, false),
            (100, 500_000_000, false),
            (100, 500_000_000 - tick, false),
            (100, 500_000_000 - 2 * tick - 1, true),
            (101, 1, false),
            (0, 1, true),
            (-1, 1, true),
            // Whole seconds: the tick may be a second.
            (100, 0, false),
            (99, 0, true),
            (98, 0, true),
        ] {
            assert_eq!(
                clock.can_trust(seconds, nanos),
                settled,
                "{seconds}.{nanos}"
            );
        }
    }
}
