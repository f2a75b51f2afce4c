//! What something took: time on the wall, and processor time of this process, of one thread, of another process.

use std::time::Instant;

use rustix::time::{ClockId, clock_gettime};

/// Seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Spent {
    /// On the wall.
    pub wall: f64,
    /// Of all this process' threads on processors.
    pub cpu: f64,
}

/// Runs from its making.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    wall: Instant,
    cpu: f64,
}

impl Clock {
    /// Starts.
    pub fn start() -> Self {
        Self {
            wall: Instant::now(),
            cpu: seconds(ClockId::ProcessCPUTime),
        }
    }

    /// Until now.
    pub fn spent(&self) -> Spent {
        self.spent_until(Instant::now())
    }

    /// On the wall until `end`, of the processors until now.
    pub fn spent_until(&self, end: Instant) -> Spent {
        Spent {
            wall: end.duration_since(self.wall).as_secs_f64(),
            cpu: seconds(ClockId::ProcessCPUTime) - self.cpu,
        }
    }
}

/// Seconds that the calling thread has had a processor.
pub fn of_thread() -> f64 {
    seconds(ClockId::ThreadCPUTime)
}

fn seconds(clock: ClockId) -> f64 {
    let time = clock_gettime(clock);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// The middle of some figures; 0 of none. Of an even number, the mean of the two in the middle.
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
