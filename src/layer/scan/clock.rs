//! What a change time can tell: the file system's clock ticks, and two changes in one tick look like one.
//!
//! The kernel stamps a change with its coarse clock (`CLOCK_REALTIME_COARSE`, a tick of 1 to 10 ms), since Linux 6.13
//! more finely where somebody has looked at the stamp in between. Either way a change that comes after the coarse clock
//! showed `C` is stamped `C` or later. So an entry that was stamped before `C`, and is looked at after, cannot change
//! any more without its stamp showing it. What was stamped at `C` or later may, within the tick.

use std::sync::OnceLock;
use std::time::Duration;

use rustix::time::{ClockId, clock_getres, clock_gettime};

/// A reading of the clock that stamps files.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Clock {
    /// Seconds since the epoch.
    pub seconds: i64,
    /// And nanoseconds.
    pub nanos: u32,
}

impl Clock {
    /// What it shows.
    pub fn now() -> Self {
        let now = clock_gettime(ClockId::RealtimeCoarse);
        Self {
            seconds: now.tv_sec,
            nanos: now.tv_nsec as u32,
        }
    }

    /// What it showed a while before.
    #[must_use]
    pub fn before(self, a_while: Duration) -> Self {
        Self {
            seconds: self.seconds.saturating_sub_unsigned(a_while.as_secs()),
            nanos: self.nanos,
        }
    }

    /// Whether what was stamped so and is looked at from now on shows every later change.
    pub fn settles(&self, ctime: i64, ctime_nsec: u32) -> bool {
        let at = |seconds: i64, nanos: u32| i128::from(seconds) * 1_000_000_000 + i128::from(nanos);
        // No nanoseconds: most likely a file system that has none (ext4 with small inodes), where a tick is a second.
        let grain = if ctime_nsec == 0 {
            Duration::from_secs(1)
        } else {
            Duration::ZERO
        };
        let margin = i128::try_from((grain + 2 * tick()).as_nanos()).unwrap_or(i128::MAX);
        at(ctime, ctime_nsec) + margin < at(self.seconds, self.nanos)
    }
}

/// How far apart two readings are that differ. The kernel is asked once: every entry is held against it several times.
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
            // Whole seconds: the tick may be one.
            (100, 0, false),
            (99, 0, true),
            (98, 0, true),
        ] {
            assert_eq!(clock.settles(seconds, nanos), settled, "{seconds}.{nanos}");
        }
    }
}
