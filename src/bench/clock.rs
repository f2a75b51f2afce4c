//! Measures wall time, and CPU time of this process and of single threads.

use std::time::Instant;

use rustix::time::{ClockId, clock_gettime};

/// Time spent, in seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Elapsed {
    /// Wall time.
    pub wall: f64,
    /// CPU time of all threads of this process.
    pub cpu: f64,
}

/// A clock that runs from its creation.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clock {
    wall: Instant,
    cpu: f64,
}

impl Clock {
    /// Starts a clock.
    pub(crate) fn start() -> Self {
        Self {
            wall: Instant::now(),
            cpu: seconds(ClockId::ProcessCPUTime),
        }
    }

    /// Returns the time spent until now.
    pub(crate) fn spent(&self) -> Elapsed {
        self.spent_until(Instant::now())
    }

    /// Returns the wall time until `end` and the CPU time until now.
    pub(crate) fn spent_until(&self, end: Instant) -> Elapsed {
        Elapsed {
            wall: end.duration_since(self.wall).as_secs_f64(),
            cpu: seconds(ClockId::ProcessCPUTime) - self.cpu,
        }
    }
}

/// Returns the CPU time of the calling thread in seconds.
pub fn thread_cpu_seconds() -> f64 {
    seconds(ClockId::ThreadCPUTime)
}

fn seconds(clock: ClockId) -> f64 {
    let time = clock_gettime(clock);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// Returns the median, or 0 for an empty slice. For an even number of values, it is the mean of the two in the middle.
pub fn median(figures: &[f64]) -> f64 {
    let mut sorted = figures.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => 0.0,
        n if n % 2 == 1 => sorted[n / 2],
        n => f64::midpoint(sorted[n / 2 - 1], sorted[n / 2]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_middle() {
        for (figures, expected) in [
            (vec![], 0.0),
            (vec![3.0], 3.0),
            (vec![9.0, 1.0, 2.0], 2.0),
            (vec![4.0, 1.0, 3.0, 100.0], 3.5),
        ] {
            assert!((median(&figures) - expected).abs() < 1e-12, "{figures:?}");
        }
    }
}
