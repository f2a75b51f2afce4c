//! Maintains a minimum share (floor) for background processes: an idle group gets no processor time at all while other
//! groups want every core, but a save that has begun must end.
//!
//! If the group has wanted to run for a while and got less than the floor, it gets a weight instead of being idle. The
//! weight follows the measured result, because the effect of a weight depends on how many other groups want to run and
//! on their weights (on Kubernetes one group for all pods, whose weight grows with every core of the node). The group
//! and the floor are shared by all background processes. When cores are free again, the group becomes idle again.
//!
//! Sources: kernel `Documentation/admin-guide/cgroup-v2.rst` (`cpu.idle`, `cpu.weight`),
//! `Documentation/scheduler/sched-stats.rst` (`/proc/PID/schedstat`: time on a core, time of waiting for one),
//! `kernel/sched/core.c` (`sched_group_set_idle`: a group that is idle takes no weight).

use std::collections::HashMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Weak;
use std::time::{Duration, Instant};

use rustix::fs::FlockOperation;

/// How long the share may stay below the floor before the group gets a weight.
pub(crate) const GRACE_PERIOD: Duration = Duration::from_secs(10);
/// Interval between two measurements, long enough for a share of one per cent to consist of several time slices.
const SAMPLE_INTERVAL: Duration = Duration::from_secs(2);
/// Weight in per cent of a default group's: initial value and limits.
const INITIAL_WEIGHT: f64 = 1.0;
const MIN_WEIGHT: f64 = 0.2;
const MAX_WEIGHT: f64 = 100.0;
/// Maximum factor by which the weight is multiplied or divided per measurement.
const MAX_WEIGHT_FACTOR: f64 = 4.0;

/// The priority of the group among the others.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum CpuPriority {
    /// It runs when no other group wants to, or has the lowest weight if the kernel has no idle groups.
    Idle,
    /// It has a weight, in per cent of a default group's.
    Weight(f64),
}

/// A measurement of the group's processes between two points in time.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct CpuSample {
    /// Elapsed time.
    pub(super) wall: Duration,
    /// Time on cores, summed over all threads.
    pub(super) ran: Duration,
    /// Time in which threads were runnable without a core, summed over all threads.
    pub(super) waited: Duration,
}

/// Finds the weight at which the group gets its floor.
#[derive(Debug)]
pub(super) struct Regulator {
    /// In processor seconds per second.
    floor: f64,
    priority: CpuPriority,
    /// How long the share has been below the floor, or above it.
    below: Duration,
    above: Duration,
}

impl Regulator {
    /// Creates a regulator for a floor of `percent` of `cores`.
    pub(super) fn new(percent: f64, cores: usize) -> Self {
        Self {
            floor: percent / 100.0 * cores as f64,
            priority: CpuPriority::Idle,
            below: Duration::ZERO,
            above: Duration::ZERO,
        }
    }

    /// Returns the new priority of the group after a measurement.
    pub(super) fn update(&mut self, sample: CpuSample) -> CpuPriority {
        let share = sample.ran.as_secs_f64() / sample.wall.as_secs_f64().max(1e-3);
        // Threads that wait for a disk or a registry do not want a core.
        let wanted = sample.ran.max(sample.wall / 10);
        let below = share < self.floor && sample.waited > wanted;
        if below {
            (self.below, self.above) = (self.below + sample.wall, Duration::ZERO);
        } else {
            (self.below, self.above) = (Duration::ZERO, self.above + sample.wall);
        }
        self.priority = match self.priority {
            CpuPriority::Idle if self.below < GRACE_PERIOD => CpuPriority::Idle,
            CpuPriority::Idle => CpuPriority::Weight(INITIAL_WEIGHT),
            CpuPriority::Weight(_)
                if self.above >= GRACE_PERIOD && share > self.floor * MAX_WEIGHT_FACTOR =>
            {
                CpuPriority::Idle
            }
            CpuPriority::Weight(weight) if below || share > self.floor => {
                let by = (self.floor / share.max(1e-6))
                    .clamp(1.0 / MAX_WEIGHT_FACTOR, MAX_WEIGHT_FACTOR);
                CpuPriority::Weight((weight * by).clamp(MIN_WEIGHT, MAX_WEIGHT))
            }
            CpuPriority::Weight(_) if self.above >= GRACE_PERIOD => CpuPriority::Idle,
            priority @ CpuPriority::Weight(_) => priority,
        };
        self.priority
    }
}

/// The group of all background processes.
#[derive(Debug)]
pub(super) struct Group {
    dir: PathBuf,
    /// Time on cores and time waited for one at the last measurement, in nanoseconds, by process and thread.
    known: HashMap<(u32, u32), (u64, u64)>,
}

impl Group {
    pub(super) fn new(dir: PathBuf) -> Self {
        Self {
            dir,
            known: HashMap::new(),
        }
    }

    /// Measures the processes from the `schedstat` file of each thread.
    fn measure(&mut self, wall: Duration, proc: &Path) -> CpuSample {
        let mut now = HashMap::new();
        let (mut ran, mut waited) = (0, 0);
        for pid in self.processes() {
            let tasks = fs::read_dir(proc.join(format!("{pid}/task")));
            for task in tasks.into_iter().flatten().flatten() {
                let text = fs::read_to_string(task.path().join("schedstat"));
                let name = task.file_name().to_str().and_then(|tid| tid.parse().ok());
                let (Some(tid), Ok(text)) = (name, text) else {
                    continue;
                };
                let mut figures = text.split_ascii_whitespace().map(str::parse::<u64>);
                let (Some(Ok(on)), Some(Ok(off))) = (figures.next(), figures.next()) else {
                    continue;
                };
                // A new thread may have run outside the group before, in a process that had left it for a while.
                if let Some((on_before, off_before)) = self.known.get(&(pid, tid)) {
                    ran += on.saturating_sub(*on_before);
                    waited += off.saturating_sub(*off_before);
                }
                now.insert((pid, tid), (on, off));
            }
        }
        self.known = now;
        CpuSample {
            wall,
            ran: Duration::from_nanos(ran),
            waited: Duration::from_nanos(waited),
        }
    }

    /// Returns the processes of the group. In the unified hierarchy they are one level below.
    fn processes(&self) -> Vec<u32> {
        let below = fs::read_dir(&self.dir).into_iter().flatten().flatten();
        let below = below.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
        let dirs = std::iter::once(self.dir.clone()).chain(below.map(|entry| entry.path()));
        let texts = dirs.filter_map(|dir| fs::read_to_string(dir.join("cgroup.procs")).ok());
        let pids = texts.flat_map(|text| {
            let pids = text.lines().filter_map(|line| line.parse().ok());
            pids.collect::<Vec<u32>>()
        });
        // Processes of another PID namespace are shown as 0.
        pids.filter(|pid| *pid != 0).collect()
    }

    /// Sets the priority of the group, in v1 and v2.
    fn apply(&self, priority: CpuPriority) {
        let set = |file: &str, value: &str| {
            let path = self.dir.join(file);
            // The file is never created: in cgroupfs, a missing file means a missing controller.
            path.exists() && fs::write(path, value).is_ok()
        };
        match priority {
            CpuPriority::Idle => {
                let _ = set("cpu.weight", "1") || set("cpu.shares", "2");
                set("cpu.idle", "1");
            }
            CpuPriority::Weight(percent) => {
                // An idle group rejects a weight.
                set("cpu.idle", "0");
                let weight = percent.round().clamp(1.0, 100.0);
                let shares = (percent * 10.24).round().clamp(2.0, 1024.0);
                let _ = set("cpu.weight", &format!("{weight}"))
                    || set("cpu.shares", &format!("{shares}"));
            }
        }
    }
}

/// Maintains the floor for as long as `of` is alive. One process per group does so, under a lock; the others wait to
/// take over.
pub(super) fn maintain<T>(mut group: Group, percent: f64, of: &Weak<T>) {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let mut regulator = Regulator::new(percent, cores);
    let Ok(lock) = File::open(&group.dir) else {
        return;
    };
    let mut last = Instant::now();
    let mut before = CpuPriority::Idle;
    while of.strong_count() > 0 {
        std::thread::sleep(SAMPLE_INTERVAL);
        if rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
            continue;
        }
        let wall = last.elapsed();
        last = Instant::now();
        let sample = group.measure(wall, Path::new("/proc"));
        let priority = regulator.update(sample);
        // A weight is set every time, because a process that enters the group resets it.
        if priority != CpuPriority::Idle || before != CpuPriority::Idle {
            tracing::debug!(?sample, ?priority, "the floor of the background");
            group.apply(priority);
        }
        before = priority;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// Returns a measurement of one second with these milliseconds on cores and of waiting.
    fn second(ran: u64, waited: u64) -> CpuSample {
        CpuSample {
            wall: SECOND,
            ran: Duration::from_millis(ran),
            waited: Duration::from_millis(waited),
        }
    }

    #[test]
    fn who_gets_less_than_the_floor_is_idle_until_the_bound_and_then_has_a_weight() {
        let mut regulator = Regulator::new(2.0, 2);
        for _ in 1..GRACE_PERIOD.as_secs() {
            assert_eq!(regulator.update(second(1, 900)), CpuPriority::Idle);
        }
        assert_eq!(regulator.update(second(1, 900)), CpuPriority::Weight(1.0));
    }

    #[test]
    fn a_second_of_enough_begins_the_bound_anew() {
        let mut regulator = Regulator::new(2.0, 2);
        for _ in 0..3 {
            for _ in 1..GRACE_PERIOD.as_secs() {
                assert_eq!(regulator.update(second(1, 900)), CpuPriority::Idle);
            }
            assert_eq!(regulator.update(second(50, 900)), CpuPriority::Idle);
        }
    }

    #[test]
    fn who_waits_for_a_disk_or_a_registry_stays_idle() {
        let mut regulator = Regulator::new(2.0, 2);
        for _ in 0..100 {
            assert_eq!(regulator.update(second(5, 2)), CpuPriority::Idle);
        }
    }

    /// Neighbours of any weight: the group's share is its weight divided by the sum of weights.
    #[test]
    fn the_weight_finds_the_floor_whatever_the_neighbours_weigh() {
        for (cores, neighbours) in [(2, 100.0), (2, 400.0), (64, 2500.0)] {
            let mut regulator = Regulator::new(2.0, cores);
            let mut share = 0.0;
            for _ in 0..40 {
                let ran = (share * 1000.0 * cores as f64) as u64;
                share = match regulator.update(second(ran, 2000)) {
                    CpuPriority::Idle => 0.0,
                    CpuPriority::Weight(weight) => weight / (weight + neighbours),
                };
            }
            assert!((0.019..0.021).contains(&share), "{share} of {cores} cores");
        }
    }

    #[test]
    fn where_cores_are_free_again_it_is_idle_again() {
        let mut regulator = Regulator::new(2.0, 2);
        for _ in 0..GRACE_PERIOD.as_secs() {
            regulator.update(second(0, 900));
        }
        let mut free = (0..GRACE_PERIOD.as_secs()).map(|_| regulator.update(second(1800, 100)));
        assert_eq!(free.next(), Some(CpuPriority::Weight(0.25)));
        assert_eq!(free.last(), Some(CpuPriority::Idle));
    }

    #[test]
    fn it_never_weighs_more_than_another_group() {
        let mut regulator = Regulator::new(2.0, 2);
        let last = (0..60).map(|_| regulator.update(second(0, 900))).last();
        assert_eq!(last, Some(CpuPriority::Weight(MAX_WEIGHT)));
    }

    /// A directory in place of cgroupfs: which files are written, in v1 and v2.
    #[test]
    fn idleness_goes_before_a_weight_is_written() -> std::io::Result<()> {
        for (file, of_two, least) in [("cpu.weight", "2", "1"), ("cpu.shares", "20", "2")] {
            let top = tempfile::tempdir()?;
            let read = |file: &str| fs::read_to_string(top.path().join(file));
            let group = Group::new(top.path().to_owned());
            group.apply(CpuPriority::Weight(2.0));
            assert!(read(file).is_err(), "no controller, no file");
            fs::write(top.path().join(file), "1")?;
            fs::write(top.path().join("cpu.idle"), "1")?;
            group.apply(CpuPriority::Weight(2.0));
            assert_eq!(
                (read(file)?.as_str(), read("cpu.idle")?.as_str()),
                (of_two, "0")
            );
            group.apply(CpuPriority::Weight(0.0));
            assert_eq!(read(file)?, least);
            group.apply(CpuPriority::Idle);
            assert_eq!(read("cpu.idle")?, "1");
        }
        Ok(())
    }

    #[test]
    fn a_look_counts_the_threads_of_all_processes_since_the_last() -> std::io::Result<()> {
        let top = tempfile::tempdir()?;
        let (proc, dir) = (top.path().join("proc"), top.path().join("group"));
        let thread = |pid: u32, tid: u32, text: &str| {
            let dir = proc.join(format!("{pid}/task/{tid}"));
            fs::create_dir_all(&dir)?;
            fs::write(dir.join("schedstat"), text)
        };
        fs::create_dir_all(dir.join("unbounded"))?;
        fs::write(dir.join("cgroup.procs"), "0\n7\n")?;
        fs::write(dir.join("unbounded/cgroup.procs"), "8\n")?;
        thread(7, 7, "1000000000 500000000 3\n")?;
        thread(7, 9, "5000000 0 3\n")?;
        thread(8, 8, "garbage\n")?;
        let mut group = Group::new(dir);
        let first = group.measure(SECOND, &proc);
        assert_eq!((first.ran, first.waited), (Duration::ZERO, Duration::ZERO));
        thread(7, 7, "1020000000 900000000 4\n")?;
        thread(7, 9, "25000000 1000000 4\n")?;
        thread(8, 8, "4000000000 4000000000 4\n")?;
        let next = group.measure(SECOND, &proc);
        assert_eq!(next.ran, Duration::from_millis(40));
        assert_eq!(next.waited, Duration::from_millis(401));
        Ok(())
    }
}
