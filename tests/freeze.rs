//! Tests of the freezer on real cgroups of both versions, with processes that count, including a freezer that is killed
//! at arbitrary moments.
#![allow(clippy::print_stderr, reason = "figures")]
#![allow(
    clippy::unnecessary_debug_formatting,
    reason = "control characters in paths are escaped that way"
)]

#[allow(dead_code, reason = "each test program uses its part")]
#[path = "support/mod.rs"]
mod support;

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;
use upperdeck::common::failure::FailureKind;
use upperdeck::node::freeze::{Error, Options, freeze};

type Result<T = (), E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

/// A version of the freezer.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Version {
    V1,
    V2,
}

fn hierarchy(version: Version) -> Option<PathBuf> {
    let candidates: &[&str] = match version {
        Version::V1 => &["/sys/fs/cgroup/freezer"],
        Version::V2 => &["/sys/fs/cgroup/unified", "/sys/fs/cgroup"],
    };
    let wanted = if version == Version::V2 {
        "cgroup.controllers"
    } else {
        "cgroup.procs"
    };
    let path = candidates
        .iter()
        .map(PathBuf::from)
        .find(|p| p.join(wanted).exists())?;
    let probe = path.join(format!("upperdeck-probe-{}-{}", std::process::id(), next()));
    fs::create_dir(&probe).ok()?;
    fs::remove_dir(&probe).ok()?;
    Some(path)
}

fn next() -> u32 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// Returns the versions that can be tested here. Reports those that cannot, and the test if there is none.
fn versions() -> Vec<Version> {
    const WHY: &str = "no cgroup can be made here (needs root and a writable cgroup file system)";
    let (found, missing): (Vec<_>, Vec<_>) = [Version::V1, Version::V2]
        .into_iter()
        .partition(|&v| hierarchy(v).is_some());
    for version in missing {
        let name = match version {
            Version::V1 => "freezer_v1",
            Version::V2 => "freezer_v2",
        };
        support::ignoring::report(name, WHY);
    }
    if found.is_empty() {
        support::ignore(WHY);
    }
    found
}

static ALONE: Mutex<()> = Mutex::new(());

/// A cgroup with processes that count, in a mount namespace of their own. Removed when dropped.
struct Counters {
    /// Counters of several tests at the same time would starve each other.
    _alone: Option<MutexGuard<'static, ()>>,
    cgroup: PathBuf,
    children: Vec<Child>,
    files: Vec<PathBuf>,
    dir: tempfile::TempDir,
    subgroups: Vec<PathBuf>,
}

impl Counters {
    fn new(version: Version) -> Result<Self> {
        Self::beside(None, version)
    }

    /// Returns counters with one process in their cgroup, that cgroup, and the process's PID.
    fn started(version: Version) -> Result<(Self, PathBuf, u32)> {
        let mut counters = Self::new(version)?;
        let cgroup = counters.cgroup.clone();
        let pid = counters.spawn(&cgroup)?;
        Ok((counters, cgroup, pid))
    }

    /// Like `new`, in the mount namespace of another one if given.
    fn beside(with: Option<&Self>, version: Version) -> Result<Self> {
        let name = format!("upperdeck-test-{}-{}", std::process::id(), next());
        let cgroup = hierarchy(version).ok_or("no hierarchy")?.join(name);
        fs::create_dir(&cgroup)?;
        let dir = tempfile::tempdir()?;
        let alone = with
            .is_none()
            .then(|| ALONE.lock().unwrap_or_else(PoisonError::into_inner));
        Ok(Self {
            _alone: alone,
            cgroup,
            children: Vec::new(),
            files: Vec::new(),
            dir,
            subgroups: Vec::new(),
        })
    }

    fn subgroup(&mut self, name: &str) -> Result<PathBuf> {
        let path = self.cgroup.join(name);
        fs::create_dir(&path)?;
        self.subgroups.push(path.clone());
        Ok(path)
    }

    /// Starts a process in `cgroup`. The first one creates the container's mount namespace, the others join it.
    fn spawn(&mut self, cgroup: &Path) -> Result<u32> {
        let mut command = match self.children.first() {
            None => {
                let mut command = Command::new("unshare");
                command.arg("--mount");
                command
            }
            Some(first) => {
                let mut command = Command::new("nsenter");
                command.arg(format!("--mount=/proc/{}/ns/mnt", first.id()));
                command
            }
        };
        let file = self.dir.path().join(format!("count{}", self.files.len()));
        let script = r#"read go; while :; do printf x >> "$0"; done"#;
        let mut child = command
            .args(["sh", "-c", script])
            .arg(&file)
            .stdin(Stdio::piped())
            .spawn()?;
        fs::write(cgroup.join("cgroup.procs"), child.id().to_string())?;
        child.stdin.as_mut().ok_or("stdin")?.write_all(b"go\n")?;
        let pid = child.id();
        self.children.push(child);
        self.files.push(file);
        self.assert_runs("just started");
        Ok(pid)
    }

    fn pid(&self) -> u32 {
        self.children[0].id()
    }

    fn counts(&self) -> Vec<u64> {
        self.files
            .iter()
            .map(|file| fs::metadata(file).map_or(0, |m| m.len()))
            .collect()
    }

    /// Asserts that every counter advances soon. The tests that promise a thaw within a second assert that themselves.
    fn assert_runs(&self, when: &str) {
        let before = self.counts();
        let deadline = Instant::now() + Duration::from_secs(5);
        loop {
            let now = self.counts();
            if before.iter().zip(&now).all(|(before, now)| now > before) {
                return;
            }
            assert!(
                Instant::now() < deadline,
                "{when}: not running, {before:?} -> {now:?}, {:?}",
                self.cgroup
            );
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn assert_stands(&self, when: &str) {
        let before = self.counts();
        std::thread::sleep(Duration::from_millis(60));
        assert_eq!(
            before,
            self.counts(),
            "{when}: not standing still, {:?}",
            self.cgroup
        );
    }

    fn is_frozen(&self) -> bool {
        is_frozen(&self.cgroup)
    }
}

fn is_frozen(cgroup: &Path) -> bool {
    let read = |name: &str| fs::read_to_string(cgroup.join(name)).unwrap_or_default();
    read("freezer.state").trim() == "FROZEN" || read("cgroup.events").contains("frozen 1")
}

fn set_frozen(cgroup: &Path, frozen: bool) -> Result {
    let v2 = cgroup.join("cgroup.freeze");
    if v2.exists() {
        fs::write(v2, if frozen { "1" } else { "0" })?;
    } else {
        fs::write(
            cgroup.join("freezer.state"),
            if frozen { "FROZEN" } else { "THAWED" },
        )?;
    }
    let deadline = Instant::now() + Duration::from_secs(5);
    while is_frozen(cgroup) != frozen {
        assert!(Instant::now() < deadline, "{cgroup:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

impl Drop for Counters {
    fn drop(&mut self) {
        let _ = set_frozen(&self.cgroup, false);
        for child in &mut self.children {
            let _ = child.kill();
            let _ = child.wait();
        }
        for dir in self.subgroups.iter().rev().chain([&self.cgroup]) {
            let deadline = Instant::now() + Duration::from_secs(5);
            while fs::remove_dir(dir).is_err() && dir.exists() && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    }
}

fn options() -> Options {
    Options {
        program: PathBuf::from(env!("CARGO_BIN_EXE_upperdeck")),
        ..Options::default()
    }
}

/// Returns the watchdogs among the children of a process.
fn watchdogs(parent: u32) -> Vec<Pid> {
    let mut found = Vec::new();
    for task in fs::read_dir(format!("/proc/{parent}/task"))
        .into_iter()
        .flatten()
        .flatten()
    {
        let children = fs::read_to_string(task.path().join("children")).unwrap_or_default();
        for pid in children.split_ascii_whitespace() {
            let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            if command
                .split(|&b| b == 0)
                .any(|arg| arg == b"__freeze-watchdog")
            {
                found.extend(pid.parse().ok().map(Pid::from_raw));
            }
        }
    }
    found
}

fn watchdogs_of(cgroup: &Path) -> Vec<Pid> {
    let about = |pid: &Pid| {
        fs::read(format!("/proc/{pid}/cmdline"))
            .unwrap_or_default()
            .split(|&b| b == 0)
            .any(|arg| arg == cgroup.as_os_str().as_encoded_bytes())
    };
    watchdogs(std::process::id())
        .into_iter()
        .filter(about)
        .collect()
}

#[test]
fn stands_still_and_runs_again() -> Result {
    for version in versions() {
        let mut counters = Counters::new(version)?;
        let cgroup = counters.cgroup.clone();
        counters.spawn(&cgroup)?;
        counters.spawn(&cgroup)?;
        let below = counters.subgroup("below")?;
        counters.spawn(&below)?;
        let mut frozen = freeze(counters.pid(), None, &options())?;
        assert_eq!(frozen.cgroup(), cgroup, "{version:?}");
        assert!(!frozen.was_frozen());
        assert!(
            frozen.processes_outside().is_empty(),
            "{:?}",
            frozen.processes_outside()
        );
        counters.assert_stands("frozen");
        frozen.check_frozen()?;
        let pause = frozen.thaw()?;
        assert!(
            (Duration::from_millis(60)..Duration::from_secs(2)).contains(&pause),
            "{pause:?}"
        );
        counters.assert_runs("thawed");
        assert!(watchdogs_of(&cgroup).is_empty());
    }
    Ok(())
}

#[test]
fn thaws_on_drop_and_on_panic() -> Result {
    for version in versions() {
        let (counters, _, pid) = Counters::started(version)?;
        drop(freeze(pid, None, &options())?);
        counters.assert_runs("dropped");
        let panicked = std::thread::spawn(move || {
            let _frozen = freeze(pid, None, &options());
            panic!("a bug in the middle of a save (this message is expected)");
        });
        assert!(panicked.join().is_err());
        counters.assert_runs("panicked");
        assert!(!counters.is_frozen());
    }
    Ok(())
}

/// moby#10932: a container that was paused before is still paused afterwards.
#[test]
fn a_container_paused_by_somebody_else_stays_paused() -> Result {
    for version in versions() {
        let mut counters = Counters::new(version)?;
        let above = counters.cgroup.clone();
        let cgroup = counters.subgroup("container")?;
        let pid = counters.spawn(&cgroup)?;
        for paused in [&cgroup, &above] {
            set_frozen(paused, true)?;
            let frozen = freeze(pid, None, &options())?;
            assert!(frozen.was_frozen());
            assert!(watchdogs_of(&cgroup).is_empty());
            assert_eq!(frozen.thaw()?, Duration::ZERO);
            assert!(is_frozen(paused));
            drop(freeze(pid, None, &options())?);
            assert!(is_frozen(paused));
            counters.assert_stands("paused by another process");
            let frozen = freeze(pid, None, &options())?;
            set_frozen(paused, false)?;
            assert!(matches!(frozen.thaw(), Err(Error::ThawedEarly { .. })));
            counters.assert_runs("unpaused by another process");
        }
    }
    Ok(())
}

/// Docker pauses in v1 if both versions are mounted; choosing v2 must not hide that pause.
#[test]
fn a_pause_in_the_other_hierarchy_is_seen() -> Result {
    if versions().len() < 2 {
        support::ignore("needs both versions of cgroups");
        return Ok(());
    }
    let mut counters = Counters::new(Version::V1)?;
    let other = Counters::beside(Some(&counters), Version::V2)?;
    let cgroup = counters.cgroup.clone();
    let pid = counters.spawn(&cgroup)?;
    fs::write(other.cgroup.join("cgroup.procs"), pid.to_string())?;
    set_frozen(&cgroup, true)?;
    assert!(freeze(pid, None, &options())?.was_frozen());
    set_frozen(&cgroup, false)?;
    let frozen = freeze(pid, None, &options())?;
    assert_eq!(
        frozen.cgroup(),
        other.cgroup,
        "v2 first: its processes can be killed while they are frozen"
    );
    counters.assert_stands("v2");
    frozen.thaw()?;
    counters.assert_runs("v2 thawed");
    fs::write(
        hierarchy(Version::V2).ok_or("v2")?.join("cgroup.procs"),
        pid.to_string(),
    )?;
    Ok(())
}

#[test]
fn refuses_itself_strangers_and_the_root() -> Result {
    for version in versions() {
        let (counters, cgroup, pid) = Counters::started(version)?;
        let mut stranger = Command::new("sleep").arg("1000").spawn()?;
        fs::write(cgroup.join("cgroup.procs"), stranger.id().to_string())?;
        match freeze(pid, None, &options()) {
            Err(Error::Shared {
                foreign_processes, ..
            }) => {
                assert_eq!(
                    (foreign_processes.len(), foreign_processes[0].pid),
                    (1, stranger.id())
                );
                assert_eq!(foreign_processes[0].name, "sleep");
            }
            other => panic!("{other:?}"),
        }
        counters.assert_runs("refused");
        stranger.kill()?;
        stranger.wait()?;
        freeze(pid, None, &options())?.thaw()?;
    }
    // A process in the cgroup of this test, which includes this program.
    let mut sibling = Command::new("unshare")
        .args(["--mount", "sleep", "1000"])
        .spawn()?;
    let refusal = freeze(sibling.id(), None, &options());
    sibling.kill()?;
    sibling.wait()?;
    assert!(
        matches!(
            refusal,
            Err(Error::WouldFreezeSelf { .. } | Error::Unsupported { .. })
        ),
        "{refusal:?}"
    );
    assert_eq!(refusal.err().map(|e| e.kind()), Some(FailureKind::Final));
    Ok(())
}

/// The process that moves into the container's cgroup is a child of this test, so that other tests are not affected.
#[test]
fn refuses_when_this_program_is_in_the_cgroup() -> Result {
    for version in versions() {
        let (counters, cgroup, pid) = Counters::started(version)?;
        let child = freezer(pid, &[("UPPERDECK_TEST_JOIN", cgroup.as_os_str())])?;
        let output = child.wait_with_output()?;
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(
            text.contains("refused: this program runs in the container's own cgroup"),
            "{text}"
        );
        counters.assert_runs("refused");
    }
    Ok(())
}

/// A service manager inside the container moves itself to a child cgroup; the rest of the container is beside it.
#[test]
fn takes_the_ancestor_that_holds_the_whole_container() -> Result {
    for version in versions() {
        let mut counters = Counters::new(version)?;
        let init = counters.subgroup("init.scope")?;
        let service = counters.subgroup("service")?;
        let pid = counters.spawn(&init)?;
        counters.spawn(&service)?;
        let frozen = freeze(pid, None, &options())?;
        assert_eq!(frozen.cgroup(), counters.cgroup);
        counters.assert_stands("both");
        frozen.thaw()?;
        counters.assert_runs("both");
        // With a foreign process in the ancestor, only the first process's cgroup can be frozen, and this is reported.
        let mut stranger = Command::new("sleep").arg("1000").spawn()?;
        fs::write(
            counters.cgroup.join("cgroup.procs"),
            stranger.id().to_string(),
        )?;
        let frozen = freeze(pid, None, &options())?;
        assert_eq!(frozen.cgroup(), init);
        assert_eq!(frozen.processes_outside(), [counters.children[1].id()]);
        frozen.thaw()?;
        stranger.kill()?;
        stranger.wait()?;
    }
    Ok(())
}

/// Containers inside the container, or a service with private mounts: other mount namespaces, but the container's own
/// processes.
#[test]
fn descendants_with_mounts_of_their_own_belong() -> Result {
    for version in versions() {
        let mut counters = Counters::new(version)?;
        let cgroup = counters.cgroup.clone();
        let script = "read go; unshare --mount sleep 1000 & wait";
        let mut child = Command::new("unshare")
            .args(["--mount", "sh", "-c", script])
            .stdin(Stdio::piped())
            .spawn()?;
        fs::write(cgroup.join("cgroup.procs"), child.id().to_string())?;
        child.stdin.as_mut().ok_or("stdin")?.write_all(b"go\n")?;
        let pid = child.id();
        counters.children.push(child);
        let deadline = Instant::now() + Duration::from_secs(5);
        while fs::read_to_string(cgroup.join("cgroup.procs"))?
            .lines()
            .count()
            < 2
        {
            assert!(Instant::now() < deadline);
        }
        freeze(pid, None, &options())?.thaw()?;
        for pid in fs::read_to_string(cgroup.join("cgroup.procs"))?.lines() {
            kill(Pid::from_raw(pid.parse()?), Signal::SIGKILL)?;
        }
    }
    Ok(())
}

#[test]
fn stands_no_longer_than_it_may() -> Result {
    for version in versions() {
        let (counters, _, pid) = Counters::started(version)?;
        let options = Options {
            max_duration: Some(Duration::from_millis(300)),
            ..options()
        };
        let begun = Instant::now();
        let frozen = freeze(pid, None, &options)?;
        counters.assert_stands("before the deadline");
        // This process does not thaw, as if it hung, so the watchdog has to.
        while counters.is_frozen() {
            assert!(begun.elapsed() < Duration::from_secs(2));
            std::thread::sleep(Duration::from_millis(1));
        }
        counters.assert_runs("after the deadline");
        let outcome = frozen.thaw();
        assert!(
            matches!(outcome, Err(Error::ThawedEarly { .. })),
            "{outcome:?}"
        );
    }
    Ok(())
}

#[test]
fn a_killed_watchdog_ends_the_freeze() -> Result {
    for version in versions() {
        let (counters, cgroup, pid) = Counters::started(version)?;
        let frozen = freeze(pid, None, &options())?;
        let watchdogs = watchdogs_of(&cgroup);
        assert_eq!(watchdogs.len(), 1);
        // Only SIGKILL ends the watchdog.
        for signal in [
            Signal::SIGTERM,
            Signal::SIGINT,
            Signal::SIGHUP,
            Signal::SIGPIPE,
        ] {
            kill(watchdogs[0], signal)?;
        }
        counters.assert_stands("signals it does not hear");
        kill(watchdogs[0], Signal::SIGKILL)?;
        counters.assert_runs("without watchdog");
        let outcome = frozen.thaw();
        assert!(
            matches!(outcome, Err(Error::ThawedEarly { .. })),
            "{outcome:?}"
        );
    }
    Ok(())
}

#[test]
fn says_that_the_container_ended() -> Result {
    for version in versions() {
        let (mut counters, cgroup, pid) = Counters::started(version)?;
        // The same PID, but another process.
        assert!(matches!(
            freeze(pid, Some(1), &options()),
            Err(Error::Gone { .. })
        ));
        let frozen = freeze(pid, None, &options())?;
        counters.children[0].kill()?;
        if version == Version::V2 {
            // v1 holds even killed processes; they die with the thaw.
            counters.children[0].wait()?;
            let outcome = frozen.thaw();
            assert!(matches!(outcome, Err(Error::Gone { .. })), "{outcome:?}");
        } else {
            frozen.thaw()?;
            counters.children[0].wait()?;
        }
        let outcome = freeze(pid, None, &options());
        assert!(
            matches!(&outcome, Err(e @ Error::Gone { .. }) if e.kind() == FailureKind::ContainerGone),
            "{outcome:?}"
        );
        // The cgroup itself is removed while the guard exists.
        let pid = counters.spawn_again(&cgroup)?;
        if version == Version::V2 {
            let frozen = freeze(pid, None, &options())?;
            counters.children[0].kill()?;
            counters.children[0].wait()?;
            while let Err(error) = fs::remove_dir(&cgroup) {
                assert_eq!(error.raw_os_error(), Some(16), "{error}");
            }
            let outcome = frozen.thaw();
            assert!(matches!(outcome, Err(Error::Gone { .. })), "{outcome:?}");
        }
    }
    Ok(())
}

impl Counters {
    fn spawn_again(&mut self, cgroup: &Path) -> Result<u32> {
        self.children.clear();
        self.files.clear();
        self.spawn(cgroup)
    }
}

#[test]
fn without_a_watchdog_nothing_is_frozen() -> Result {
    for version in versions() {
        let (counters, _, pid) = Counters::started(version)?;
        for program in ["/bin/true", "/bin/echo", "/nonexistent"] {
            let options = Options {
                program: PathBuf::from(program),
                ..Options::default()
            };
            let outcome = freeze(pid, None, &options);
            assert!(
                matches!(outcome, Err(Error::Watchdog { .. })),
                "{program}: {outcome:?}"
            );
            assert!(!counters.is_frozen());
        }
        counters.assert_runs("never frozen");
    }
    Ok(())
}

/// Starts this test program as a process that freezes `pid` and then hangs, in a process group of its own.
fn freezer(pid: u32, env: &[(&str, &std::ffi::OsStr)]) -> Result<Child> {
    let child = Command::new(std::env::current_exe()?)
        .args([
            "--exact",
            "helper_freezes_and_hangs",
            "--ignored",
            "--nocapture",
            "--test-threads=1",
        ])
        .env("UPPERDECK_TEST_PID", pid.to_string())
        .envs(env.iter().copied())
        .stdout(Stdio::piped())
        .process_group(0)
        .spawn()?;
    Ok(child)
}

/// Waits until a process started by `freezer` has frozen the container. Returns its output, which has to stay open.
fn wait_until_frozen(child: &mut Child) -> Result<impl Sized + use<>> {
    let mut lines = BufReader::new(child.stdout.take().ok_or("stdout")?).lines();
    while lines.next().ok_or("no freeze")?? != "frozen" {}
    Ok(lines)
}

#[test]
#[ignore = "the other side of the tests that kill it"]
fn helper_freezes_and_hangs() -> Result {
    let Some(pid) = std::env::var("UPPERDECK_TEST_PID")
        .ok()
        .and_then(|pid| pid.parse().ok())
    else {
        return Ok(());
    };
    if let Some(cgroup) = std::env::var_os("UPPERDECK_TEST_JOIN") {
        fs::write(Path::new(&cgroup).join("cgroup.procs"), "0")?;
    }
    match freeze(pid, None, &options()) {
        Ok(frozen) => {
            println!("\nfrozen");
            std::thread::sleep(Duration::from_secs(1000));
            frozen.thaw()?;
        }
        Err(error) => println!("\nrefused: {error}"),
    }
    Ok(())
}

/// Sends SIGKILL to the process and to its group, at moments spread over the whole life of a freeze. The number is
/// limited here; `UPPERDECK_TEST_KILLS` raises it.
#[test]
fn runs_again_within_a_second_of_kill_9() -> Result {
    let kills: u64 = std::env::var("UPPERDECK_TEST_KILLS")
        .ok()
        .and_then(|n| n.parse().ok())
        .unwrap_or(25);
    for version in versions() {
        let (mut counters, cgroup, pid) = Counters::started(version)?;
        counters.spawn(&cgroup)?;
        // The sweep covers the time that one freeze takes on this machine.
        let begun = Instant::now();
        let mut child = freezer(pid, &[])?;
        let _output = wait_until_frozen(&mut child)?;
        let whole = begun.elapsed();
        counters.assert_stands("frozen by the other process");
        kill_and_check(&mut child, &counters, false)?;

        let (mut while_frozen, mut worst) = (0, Duration::ZERO);
        for round in 0..kills {
            let mut child = freezer(pid, &[])?;
            if round % 5 == 0 {
                // On a busy machine the sweep alone may miss every freeze.
                let _output = wait_until_frozen(&mut child)?;
            } else {
                std::thread::sleep(whole.mul_f64(1.5 * (round * 37 % 100) as f64 / 100.0));
            }
            while_frozen += u64::from(counters.is_frozen());
            worst = worst.max(kill_and_check(&mut child, &counters, round % 2 == 0)?);
        }
        eprintln!(
            "{version:?}: {kills} kills, {while_frozen} of them frozen, running after at most {worst:?}"
        );
        assert!(
            kills < 10 || while_frozen > 0,
            "no kill hit a frozen container"
        );
    }
    Ok(())
}

/// A service manager, a kubelet and the out-of-memory killer end all processes of a cgroup at once.
#[test]
fn survives_the_end_of_the_callers_whole_cgroup() -> Result {
    let Some(unified) = hierarchy(Version::V2) else {
        return Ok(());
    };
    for version in versions() {
        let (counters, _, pid) = Counters::started(version)?;
        let service = unified.join(format!("upperdeck-test-service-{}", std::process::id()));
        fs::create_dir(&service)?;
        let mut child = freezer(pid, &[("UPPERDECK_TEST_JOIN", service.as_os_str())])?;
        let _output = wait_until_frozen(&mut child)?;
        counters.assert_stands("frozen by the other process");
        fs::write(service.join("cgroup.kill"), "1")?;
        let killed = Instant::now();
        while counters.is_frozen() {
            assert!(killed.elapsed() < Duration::from_secs(1), "still frozen");
        }
        counters.assert_runs("killed");
        child.wait()?;
        fs::remove_dir(&service)?;
    }
    Ok(())
}

fn kill_and_check(child: &mut Child, counters: &Counters, group: bool) -> Result<Duration> {
    let pid = Pid::from_raw(child.id() as i32);
    if group {
        killpg(pid, Signal::SIGKILL)?;
    } else {
        kill(pid, Signal::SIGKILL)?;
    }
    let killed = Instant::now();
    child.wait()?;
    while counters.is_frozen() {
        assert!(killed.elapsed() < Duration::from_secs(1), "still frozen");
        std::thread::sleep(Duration::from_micros(100));
    }
    let took = killed.elapsed();
    counters.assert_runs("killed");
    // It must not be frozen again later.
    std::thread::sleep(Duration::from_millis(5));
    counters.assert_runs("a moment after the kill");
    Ok(took)
}
