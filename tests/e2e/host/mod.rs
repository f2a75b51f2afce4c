//! Real servers and runtimes for tests. Each listens on loopback, has its own directories under one scratch directory,
//! and is killed by process ID when dropped (also if the test panics). The next test run removes what a killed one left
//! behind.

pub mod containerd;
pub mod docker;
pub mod grpc;
pub mod image;
pub mod podman;
pub mod process;
pub mod redis;
pub mod registry;
pub mod service;

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::Once;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Timeout for a server to start or a container to end. Generous, because the machine may be busy.
pub const PATIENCE: Duration = Duration::from_secs(180);

const PREFIX: &str = "upperdeck-test.";

/// The directory of one test with everything in it. When dropped, it ends the processes started from it, unmounts what
/// is mounted in it, and removes it.
#[derive(Debug)]
pub struct Scratch(PathBuf);

impl Scratch {
    pub fn new() -> Result<Self> {
        static SWEEP: Once = Once::new();
        SWEEP.call_once(sweep);
        let prefix = format!("{PREFIX}{}.", std::process::id());
        // Not under a longer TMPDIR, because the path of a unix socket is limited to 108 bytes.
        let dir = tempfile::Builder::new()
            .prefix(&prefix)
            .rand_bytes(4)
            .tempdir_in("/tmp")?;
        Ok(Self(dir.keep()))
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Creates a directory in it.
    pub fn dir(&self, name: &str) -> Result<PathBuf> {
        let dir = self.0.join(name);
        fs::create_dir_all(&dir)?;
        Ok(dir)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        reap(&self.0);
    }
}

/// Removes the scratch directories of test processes that no longer exist.
fn sweep() {
    for entry in fs::read_dir("/tmp").into_iter().flatten().flatten() {
        let name = entry.file_name();
        let pid = name.to_str().and_then(|name| {
            name.strip_prefix(PREFIX)?
                .split('.')
                .next()?
                .parse::<u32>()
                .ok()
        });
        if pid.is_some_and(|pid| !Path::new("/proc").join(pid.to_string()).exists()) {
            reap(&entry.path());
        }
    }
}

/// Ends every process that belongs to `root` and removes its mounts, cgroups, sockets and files.
fn reap(root: &Path) {
    let containers = bundles(root);
    let mut groups = BTreeSet::new();
    // Repeated, because conmon and dockerd may start processes while they are being ended; a shim does not.
    for _ in 0..20 {
        let pids = processes_of(root);
        if pids.is_empty() {
            break;
        }
        for &pid in &pids {
            groups.extend(cgroups_of(pid));
            thaw(pid);
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        let end = Instant::now() + Duration::from_secs(2);
        while Instant::now() < end
            && pids
                .iter()
                .any(|pid| Path::new("/proc").join(pid.to_string()).exists())
        {
            reap_zombies(&pids);
            std::thread::sleep(Duration::from_millis(10));
        }
    }
    for bundle in &containers {
        if let Ok(address) = fs::read_to_string(bundle.join("address")) {
            let _ = fs::remove_file(address.trim().trim_start_matches("unix://"));
        }
        // runc's own state, which is not below the directory of the engine that uses it.
        if let (Some(id), Some(namespace)) = (
            bundle.file_name(),
            bundle.parent().and_then(Path::file_name),
        ) {
            let _ = fs::remove_dir_all(Path::new("/run/containerd/runc").join(namespace).join(id));
            let _ = fs::remove_dir_all(Path::new("/run/runc").join(id));
        }
    }
    unmount_below(root);
    for group in groups.iter().rev() {
        let _ = fs::remove_dir(group);
    }
    if mounts_below(root).is_empty() {
        let _ = fs::remove_dir_all(root);
    }
}

/// Returns the bundles of containerd (its own and Docker's) and Podman below `root`. The directory has the name of the
/// container.
fn bundles(root: &Path) -> Vec<PathBuf> {
    let tasks = walkdir::WalkDir::new(root)
        .max_depth(7)
        .into_iter()
        .filter_entry(|entry| {
            entry.file_type().is_dir()
                && entry.file_name() != "rootfs"
                && entry.file_name() != "overlay2"
        });
    tasks
        .flatten()
        .filter(|entry| {
            let mut above = entry.path().ancestors().skip(1);
            above
                .next()
                .is_some_and(|dir| dir.ends_with("overlay-containers"))
                || above
                    .next()
                    .is_some_and(|dir| dir.ends_with("io.containerd.runtime.v2.task"))
        })
        .map(walkdir::DirEntry::into_path)
        .collect()
}

/// Returns servers started from `root`, and processes whose root file system is an overlay from there.
fn processes_of(root: &Path) -> Vec<i32> {
    let needle = root.as_os_str().as_bytes();
    let own = std::process::id() as i32;
    fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
        .filter(|&pid| {
            let proc = Path::new("/proc").join(pid.to_string());
            let state = fs::read_to_string(proc.join("stat")).unwrap_or_default();
            // After the name, which may contain anything.
            if pid == own
                || state
                    .rsplit(')')
                    .next()
                    .is_none_or(|rest| rest.trim_start().starts_with('Z'))
            {
                return false;
            }
            let has = |bytes: &[u8]| {
                bytes.windows(needle.len()).enumerate().any(|(at, window)| {
                    window == needle
                        && matches!(bytes.get(at + needle.len()), None | Some(b'/' | 0 | b' '))
                })
            };
            // Only command lines of servers: an editor may have the directory open.
            let server = [
                "containerd",
                "dockerd",
                "docker-registry",
                "redis-server",
                "conmon",
                "runc",
                "upperdeck",
            ];
            let command = fs::read(proc.join("cmdline")).unwrap_or_default();
            let program = command.split(|&b| b == 0).next().unwrap_or_default();
            let program = Path::new(OsStr::from_bytes(program))
                .file_name()
                .unwrap_or_default()
                .to_string_lossy();
            let root_mount = fs::read(proc.join("mountinfo")).unwrap_or_default();
            let mut lines = root_mount.split(|&b| b == b'\n');
            (server.iter().any(|name| program.starts_with(name)) && has(&command))
                || lines.any(|line| line.split(|&b| b == b' ').nth(4) == Some(b"/") && has(line))
        })
        .collect()
}

/// Returns every cgroup directory of a process, except the roots and those that this process is in.
pub fn cgroups_of(pid: i32) -> Vec<PathBuf> {
    let read = |pid: &str| {
        fs::read_to_string(Path::new("/proc").join(pid).join("cgroup")).unwrap_or_default()
    };
    let own = read("self");
    let mut dirs = Vec::new();
    for line in read(&pid.to_string())
        .lines()
        .filter(|line| !own.lines().any(|mine| mine == *line))
    {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else {
            continue;
        };
        let hierarchy = match controllers {
            "" => "unified",
            named => named.strip_prefix("name=").unwrap_or(named),
        };
        let dir = Path::new("/sys/fs/cgroup")
            .join(hierarchy)
            .join(path.trim_start_matches('/'));
        if path != "/" && dir.is_dir() {
            dirs.push(dir);
        }
    }
    dirs
}

/// Thaws the cgroups of a process: SIGKILL has no effect on a frozen one.
fn thaw(pid: i32) {
    for dir in cgroups_of(pid) {
        let _ = fs::write(dir.join("freezer.state"), "THAWED");
        if dir.starts_with("/sys/fs/cgroup/unified") {
            let _ = fs::write(dir.join("cgroup.freeze"), "0");
        }
    }
}

/// Waits for those of `pids` that are children of this process and have exited.
fn reap_zombies(pids: &[i32]) {
    use nix::sys::wait::{WaitPidFlag, waitpid};
    for &pid in pids {
        let _ = waitpid(Pid::from_raw(pid), Some(WaitPidFlag::WNOHANG));
    }
}

/// Returns the mount points at and below `root`, in the order in which they were mounted.
fn mounts_below(root: &Path) -> Vec<PathBuf> {
    let table = fs::read("/proc/self/mountinfo").unwrap_or_default();
    table
        .split(|&b| b == b'\n')
        .filter_map(|line| line.split(|&b| b == b' ').nth(4))
        .map(|point| PathBuf::from(OsStr::from_bytes(point)))
        .filter(|point| point.starts_with(root))
        .collect()
}

/// Unmounts everything below `root`.
pub fn unmount_below(root: &Path) {
    for mount in mounts_below(root).iter().rev() {
        let _ = umount2(mount, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
    }
}

/// Kills all containers whose root is an overlay below `root`.
pub fn end_containers(root: &Path) {
    let needle = root.to_string_lossy().into_owned();
    for pid in processes_of(root) {
        let mounts = fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap_or_default();
        let mut lines = mounts.lines();
        if lines.any(|line| line.split(' ').nth(4) == Some("/") && line.contains(&needle)) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
    }
}

/// A server in the background, killed when dropped. Its output is in a log file.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    log: PathBuf,
}

impl Daemon {
    pub fn start(command: &mut Command, log: PathBuf) -> Result<Self> {
        let file = File::create(&log)?;
        let child = command
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .spawn()
            .with_context(|| format!("starting {}", command.get_program().display()))?;
        Ok(Self { child, log })
    }

    pub fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// Waits until `ready` returns a value. Fails with the end of the log if the server exits or takes too long.
    pub fn wait_for<T>(&mut self, mut ready: impl FnMut(&Self) -> Option<T>) -> Result<T> {
        let end = Instant::now() + PATIENCE;
        loop {
            if let Some(value) = ready(self) {
                return Ok(value);
            }
            let log = self.log();
            let tail = &log[log.len().saturating_sub(3000)..];
            if let Some(status) = self.child.try_wait()? {
                bail!("the server ended with {status}:\n{tail}");
            }
            if Instant::now() > end {
                bail!("the server is not ready after {PATIENCE:?}:\n{tail}");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Sends SIGKILL and waits for the exit.
    pub fn kill(&mut self) -> Result<ExitStatus> {
        let _ = self.child.kill();
        Ok(self.child.wait()?)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.kill();
    }
}

/// Runs a command to its end. Fails with its output unless it succeeds. Returns stdout without the last newline.
pub fn run(command: &mut Command) -> Result<String> {
    let output = output(command)?;
    if !output.status.success() {
        bail!(
            "{command:?}: {}\n{}{}",
            output.status,
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout)
        .trim_end_matches('\n')
        .to_owned())
}

/// Runs a command to its end, whether or not it succeeds.
pub fn output(command: &mut Command) -> Result<Output> {
    command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("running {}", command.get_program().display()))
}

/// Returns a command with its arguments.
pub fn command<S: AsRef<OsStr>>(program: &str, arguments: impl IntoIterator<Item = S>) -> Command {
    let program = crate::support::find_program(program).unwrap_or_else(|| PathBuf::from(program));
    let mut command = Command::new(program);
    command.args(arguments);
    command
}

/// Waits until `done`, polling every few milliseconds. Fails with `what` after [`PATIENCE`].
pub fn wait_until(what: &str, done: impl FnMut() -> bool) -> Result<Duration> {
    wait_at_most(PATIENCE, what, done)
}

/// Like [`wait_until`], with its own limit. Returns the time it took.
pub fn wait_at_most(
    bound: Duration,
    what: &str,
    mut done: impl FnMut() -> bool,
) -> Result<Duration> {
    let start = Instant::now();
    while !done() {
        if start.elapsed() > bound {
            bail!("not within {bound:?}: {what}");
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(start.elapsed())
}

/// The state directories for `upperdeck`. Those of runtimes that a test does not start are empty, so that nothing else
/// on the machine is found.
#[derive(Clone, Debug)]
pub struct Roots {
    pub containerd_root: PathBuf,
    pub containerd_state: PathBuf,
    pub docker_root: PathBuf,
    pub storage_root: PathBuf,
    pub storage_runroot: PathBuf,
}

impl Roots {
    pub fn none(scratch: &Scratch) -> Self {
        let none = scratch.path().join("none");
        Self {
            containerd_root: none.clone(),
            containerd_state: none.clone(),
            docker_root: none.clone(),
            storage_root: none.clone(),
            storage_runroot: none,
        }
    }

    /// Returns them as command line flags.
    pub fn flags(&self) -> Vec<String> {
        [
            ("containerd-root", &self.containerd_root),
            ("containerd-state", &self.containerd_state),
            ("docker-root", &self.docker_root),
            ("storage-root", &self.storage_root),
            ("storage-runroot", &self.storage_runroot),
        ]
        .map(|(flag, dir)| format!("--{flag}={}", dir.display()))
        .into()
    }
}

/// The freezers of a process. A hybrid machine has two, and each of them stops it.
#[derive(Clone, Debug)]
pub struct Freezer(Vec<PathBuf>);

impl Freezer {
    pub fn of(pid: i32) -> Result<Self> {
        let mut files = Vec::new();
        for dir in cgroups_of(pid) {
            files.extend(["freezer.state", "cgroup.freeze"].map(|name| dir.join(name)));
        }
        files.retain(|file| file.exists());
        ensure!(
            !files.is_empty(),
            "the process is in no cgroup with a freezer"
        );
        Ok(Self(files))
    }

    pub fn frozen(&self) -> bool {
        let states = self
            .0
            .iter()
            .map(|file| fs::read_to_string(file).unwrap_or_default());
        states
            .into_iter()
            .any(|state| state.starts_with("FR") || state.trim() == "1")
    }

    /// Freezes or thaws as another program's `pause` would: engines use the first hierarchy if there are two.
    pub fn set(&self, frozen: bool) -> Result<()> {
        let file = &self.0[0];
        let state = match (file.ends_with("freezer.state"), frozen) {
            (true, true) => "FROZEN",
            (true, false) => "THAWED",
            (false, true) => "1",
            (false, false) => "0",
        };
        Ok(fs::write(file, state)?)
    }
}

/// Returns mounts, processes and files that belong to `root`, for the test of the harness itself.
pub fn leftovers(root: &Path) -> Vec<String> {
    let mut left: Vec<String> = processes_of(root)
        .iter()
        .map(|pid| format!("process {pid}"))
        .collect();
    left.extend(
        mounts_below(root)
            .iter()
            .map(|mount| format!("mount {}", mount.display())),
    );
    if fs::symlink_metadata(root).is_ok_and(|metadata| metadata.nlink() > 0) {
        left.push(root.display().to_string());
    }
    left
}
