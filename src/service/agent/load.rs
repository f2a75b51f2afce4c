//! Determines how many saves a node can run at once, and with how many threads each, from the capacity that its pods
//! leave unused.
//!
//! Sources: kernel `Documentation/accounting/psi.rst` for `/proc/pressure`; `proc_loadavg(5)`; `proc_stat(5)`.

use std::fs;
use std::path::Path;

use crate::service::job::Load;

/// Pressure in percent up to which a node is considered idle.
const IDLE_PRESSURE: f64 = 10.0;
/// Pressure in percent from which on a node has no spare capacity.
const FULL_PRESSURE: f64 = 60.0;

/// Measurements of a node.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Measured {
    pub(super) cores: u32,
    /// `some avg10`, in percent; `None` if the kernel does not report it.
    pub(super) cpu_pressure: Option<f64>,
    pub(super) io_pressure: Option<f64>,
    pub(super) load1: f64,
    /// Threads of the agent's own saves, which the load average includes.
    pub(super) own_threads: u32,
    /// Number of the agent's own saves.
    pub(super) own_jobs: u32,
}

/// Limits set by the administrator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Bounds {
    pub(super) slots: u32,
    pub(super) threads: (u32, Option<u32>),
}

/// Returns the number of concurrent saves and the number of threads of the next one. Neither is ever 0: without spare
/// capacity one save continues slowly.
pub(super) fn capacity(measured: &Measured, bounds: Bounds) -> (u32, u32) {
    let cores = f64::from(measured.cores.max(1));
    // The agent's own threads wait for cores whenever others work, so the load of the others is what remains without
    // them.
    let others = (measured.load1 - f64::from(measured.own_threads)).max(0.0);
    let free = (cores - others).clamp(0.0, cores);
    // While the agent's own saves run, they contribute to the pressure; without them it is caused by others alone.
    let cpu = if measured.own_jobs == 0 {
        spare_share(measured.cpu_pressure)
    } else {
        1.0
    };
    let io = spare_share(measured.io_pressure);
    let left = free * cpu;
    let most = bounds.slots.max(1);
    let slots = (f64::from(most) * (left / cores) * io).ceil() as u32;
    let slots = slots.clamp(1, most);
    let shared = left / f64::from(measured.own_jobs + 1);
    let (least, top) = bounds.threads;
    let top = top.unwrap_or(measured.cores).max(1);
    let threads = (shared.round() as u32).clamp(least.clamp(1, top), top);
    (slots, threads)
}

/// Maps pressure to a factor from 1 (idle) to 0 (no spare capacity).
fn spare_share(pressure: Option<f64>) -> f64 {
    pressure.map_or(1.0, |pressure| {
        ((FULL_PRESSURE - pressure) / (FULL_PRESSURE - IDLE_PRESSURE)).clamp(0.0, 1.0)
    })
}

/// Measures the node. `proc` is the path of its `/proc`.
pub(super) fn measure(proc: &Path, own_jobs: u32, own_threads: u32) -> Measured {
    let read = |name: &str| fs::read_to_string(proc.join(name)).unwrap_or_default();
    Measured {
        cores: cores(&read("stat")),
        cpu_pressure: some_avg10(&read("pressure/cpu")),
        io_pressure: some_avg10(&read("pressure/io")),
        load1: first_number(&read("loadavg")).unwrap_or(0.0),
        own_threads,
        own_jobs,
    }
}

/// Counts the lines `cpuN ...` of `/proc/stat`. The CPUs that this process may use do not tell the size of the node.
fn cores(stat: &str) -> u32 {
    let counted = stat
        .lines()
        .filter(|line| {
            line.strip_prefix("cpu")
                .is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
        })
        .count();
    u32::try_from(counted).unwrap_or(1).max(1)
}

/// Parses `some avg10=0.00 avg60=...`.
fn some_avg10(pressure: &str) -> Option<f64> {
    let some = pressure
        .lines()
        .find_map(|line| line.strip_prefix("some "))?;
    let value: f64 = some
        .split_ascii_whitespace()
        .find_map(|word| word.strip_prefix("avg10="))?
        .parse()
        .ok()?;
    value.is_finite().then_some(value)
}

fn first_number(text: &str) -> Option<f64> {
    let value: f64 = text.split_ascii_whitespace().next()?.parse().ok()?;
    value.is_finite().then_some(value)
}

/// Returns the measurements in the form of a heartbeat.
pub(super) fn to_load(measured: &Measured, bounds: Bounds) -> Load {
    let (slots, threads) = capacity(measured, bounds);
    Load {
        cores: measured.cores,
        cpu_pressure: measured.cpu_pressure,
        io_pressure: measured.io_pressure,
        load1: measured.load1,
        slots,
        threads,
        background: false,
        hurry: false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_pods_leave_over_is_what_saves_get() {
        let bounds = Bounds {
            slots: 4,
            threads: (1, None),
        };
        let measured = |cpu: f64, io: f64, load1: f64, own_jobs: u32, own_threads: u32| Measured {
            cores: 8,
            cpu_pressure: Some(cpu),
            io_pressure: Some(io),
            load1,
            own_threads,
            own_jobs,
        };
        for (case, at, expected) in [
            ("idle", measured(0.0, 0.0, 0.1, 0, 0), (4, 8)),
            ("half of it used", measured(5.0, 0.0, 4.0, 0, 0), (2, 4)),
            ("all of it used", measured(30.0, 0.0, 8.0, 0, 0), (1, 1)),
            (
                "more wanted than there is",
                measured(90.0, 0.0, 30.0, 0, 0),
                (1, 1),
            ),
            (
                "load is low and pressure high",
                measured(60.0, 0.0, 1.0, 0, 0),
                (1, 1),
            ),
            ("disks are busy", measured(0.0, 35.0, 0.0, 0, 0), (2, 8)),
            (
                "disks are all that is waited for",
                measured(0.0, 80.0, 0.0, 0, 0),
                (1, 8),
            ),
            (
                "a save has the node to itself",
                measured(40.0, 0.0, 8.0, 1, 8),
                (4, 4),
            ),
            (
                "a save beside busy pods",
                measured(90.0, 0.0, 16.0, 1, 8),
                (1, 1),
            ),
            ("three saves", measured(10.0, 0.0, 8.0, 3, 8), (4, 2)),
        ] {
            assert_eq!(capacity(&at, bounds), expected, "{case}");
        }
    }

    #[test]
    fn the_administrators_bounds_hold() {
        let idle = Measured {
            cores: 64,
            ..Measured::default()
        };
        let busy = Measured {
            load1: 100.0,
            ..idle
        };
        let bounds = |slots, least, most| Bounds {
            slots,
            threads: (least, most),
        };
        assert_eq!(capacity(&idle, bounds(2, 1, Some(16))), (2, 16));
        assert_eq!(capacity(&busy, bounds(2, 4, Some(16))), (1, 4));
        // Contradictory limits are resolved.
        assert_eq!(capacity(&idle, bounds(0, 0, Some(0))), (1, 1));
        assert_eq!(capacity(&idle, bounds(1, 9, Some(2))), (1, 2));
        assert_eq!(capacity(&Measured::default(), bounds(3, 1, None)), (3, 1));
    }

    #[test]
    fn what_the_kernel_writes_is_read_and_nonsense_is_not() {
        let text = "some avg10=12.34 avg60=1.04 avg300=3.21 total=2297037559\nfull avg10=99.00 avg60=0.00\n";
        assert_eq!(some_avg10(text), Some(12.34));
        for bad in [
            "",
            "full avg10=1.00",
            "some avg60=1",
            "some avg10=x",
            "some avg10=inf",
            "some avg10=NaN",
        ] {
            assert_eq!(some_avg10(bad), None, "{bad}");
        }
        assert_eq!(cores("cpu  1 2\ncpu0 1\ncpu1 2\ncpufreq 1\nintr 5\n"), 2);
        assert_eq!(cores(""), 1);
        assert_eq!(first_number("0.52 0.3 1/2 3\n"), Some(0.52));
        let here = measure(Path::new("/proc"), 0, 0);
        assert!(here.cores >= 1 && here.load1 >= 0.0);
    }
}
