//! The limit of a process's cgroups on processor time: a pod's CPU limit.
//!
//! A process that has used its share of a period waits for the next one, also while it has a container frozen.
//!
//! Sources: kernel `Documentation/admin-guide/cgroup-v2.rst` (`cpu.max`), `Documentation/scheduler/sched-bwc.rst`
//! (`cpu.cfs_quota_us`, `cpu.cfs_period_us`).

use std::fs;
use std::path::{Component, Path, PathBuf};

use super::hierarchies;
use crate::node::procfs::MountInfo;

/// Cgroup at the top of the hierarchy for processes that have a container frozen. It is never removed; an empty one
/// costs nothing.
const FREEZING_CGROUP: &str = "upperdeck-freezing";

/// A limit on processor time.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct CpuLimit {
    /// Number of cores that the limit is worth.
    pub(crate) cores: f64,
    /// The file that sets it.
    pub(crate) file: PathBuf,
    /// Whether this process can leave the limited cgroup while it has a container frozen.
    pub(crate) can_be_left: bool,
}

impl std::fmt::Display for CpuLimit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let file = crate::common::escape::path(self.file.as_os_str().as_encoded_bytes());
        write!(f, "no more than {:.2} cores ({file})", self.cores)
    }
}

/// Returns the lowest limit on this process, of its own cgroup and those above it that are visible. Cgroup file systems
/// below `host_root` are the node's.
pub(crate) fn cpu_limit(host_root: Option<&Path>) -> Option<CpuLimit> {
    let (mounts, own) = super::own_cgroups();
    let (dir, top) = own_cpu_cgroup(&mounts, &own, host_root)?;
    let (cores, file) = lowest(&dir, &top)?;
    Some(CpuLimit {
        cores,
        file,
        can_be_left: freezing_cgroup(&top).is_some(),
    })
}

/// Returns the directory of this process's cgroup in the hierarchy that distributes processor time, and the highest
/// directory of it that is visible.
fn own_cpu_cgroup(
    mounts: &[MountInfo],
    own: &[u8],
    host_root: Option<&Path>,
) -> Option<(PathBuf, PathBuf)> {
    hierarchies(mounts, own, host_root, &["cpu"]).find_map(|hierarchy| {
        let below = hierarchy.path.strip_prefix(&hierarchy.mount.root).ok()?;
        let mut parts = below.components();
        let plain = parts.all(|part| matches!(part, Component::Normal(_)));
        let top = &hierarchy.mount.mount_point;
        let dir = top.join(below);
        let has_files = ["cpu.max", "cpu.cfs_quota_us", "cpu.weight"];
        let is_there = has_files.iter().any(|file| dir.join(file).exists());
        (plain && is_there).then(|| (dir, top.clone()))
    })
}

/// Returns the lowest limit of `dir` and the directories above it up to `top`, in cores, and the file that sets it.
pub(super) fn lowest(dir: &Path, top: &Path) -> Option<(f64, PathBuf)> {
    let above = dir.ancestors().take_while(|above| above.starts_with(top));
    above
        .filter_map(limit_of)
        .min_by(|(a, _), (b, _)| a.total_cmp(b))
}

fn limit_of(dir: &Path) -> Option<(f64, PathBuf)> {
    let read = |name: &str| fs::read_to_string(dir.join(name)).ok();
    if let Some(text) = read("cpu.max") {
        let (quota, period) = text.trim().split_once(' ')?;
        return Some((cores(quota, period)?, dir.join("cpu.max")));
    }
    let (quota, period) = (read("cpu.cfs_quota_us")?, read("cpu.cfs_period_us")?);
    Some((cores(&quota, &period)?, dir.join("cpu.cfs_quota_us")))
}

/// Returns a quota in cores: `None` for `max` and -1, which mean no limit.
fn cores(quota: &str, period: &str) -> Option<f64> {
    let number = |text: &str| text.trim().parse::<u32>().ok().filter(|n| *n > 0);
    Some(f64::from(number(quota)?) / f64::from(number(period)?))
}

/// Returns the cgroup without a limit, or `None` if this process cannot use one.
pub(super) fn freezing_cgroup(top: &Path) -> Option<PathBuf> {
    let dir = top.join(FREEZING_CGROUP);
    let _ = fs::create_dir(&dir);
    let writable = rustix::fs::access(dir.join("cgroup.procs"), rustix::fs::Access::WRITE_OK);
    writable.is_ok().then_some(dir)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::procfs::parse_mountinfo;

    #[test]
    fn the_lowest_limit_on_the_way_up_counts() -> std::io::Result<()> {
        let dir = tempfile::tempdir()?;
        let top = dir.path().join("v2");
        let own = top.join("kube/pod/agent");
        fs::create_dir_all(&own)?;
        assert_eq!(lowest(&own, &top), None);
        fs::write(own.join("cpu.max"), "max 100000\n")?;
        assert_eq!(lowest(&own, &top), None);
        let pod = top.join("kube/pod/cpu.max");
        fs::write(&pod, "10000 100000\n")?;
        fs::write(top.join("kube/cpu.max"), "200000 100000\n")?;
        // Not part of the hierarchy.
        fs::write(dir.path().join("cpu.max"), "1000 100000\n")?;
        assert_eq!(lowest(&own, &top), Some((0.1, pod)));

        let top = dir.path().join("v1");
        let own = top.join("agent");
        fs::create_dir_all(&own)?;
        for (quota, expected) in [
            ("-1\n", None),
            ("50000\n", Some(0.5)),
            ("0\n", None),
            ("x", None),
        ] {
            fs::write(own.join("cpu.cfs_quota_us"), quota)?;
            fs::write(own.join("cpu.cfs_period_us"), "100000\n")?;
            let file = own.join("cpu.cfs_quota_us");
            assert_eq!(lowest(&own, &top), expected.map(|cores| (cores, file)));
        }
        Ok(())
    }

    #[test]
    fn the_cgroup_is_found_in_either_version() -> Result<(), Box<dyn std::error::Error>> {
        let dir = tempfile::tempdir()?;
        let at = dir.path().display().to_string();
        let mounts = format!(
            "30 1 0:30 / {at}/cpu rw - cgroup cgroup rw,cpu,cpuacct\n31 1 0:31 / {at}/unified rw - cgroup2 cgroup2 rw\n"
        );
        let mounts = parse_mountinfo(mounts.as_bytes())?;
        let found = |own: &str| own_cpu_cgroup(&mounts, own.as_bytes(), None).map(|(dir, _)| dir);
        for (name, file) in [("cpu/a", "cpu.cfs_quota_us"), ("unified/b", "cpu.max")] {
            fs::create_dir_all(dir.path().join(name))?;
            fs::write(dir.path().join(name).join(file), "")?;
        }
        let both = "3:cpu,cpuacct:/a\n0::/x\n";
        assert_eq!(found(both), Some(dir.path().join("cpu/a")));
        assert_eq!(found("0::/b\n"), Some(dir.path().join("unified/b")));
        // Another namespace's path, and one without the controller.
        for none in ["0::/../b\n", "0::/x\n", "3:cpu:/gone\n", ""] {
            assert_eq!(found(none), None, "{none}");
        }
        Ok(())
    }
}
