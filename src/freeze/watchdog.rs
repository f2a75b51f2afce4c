//! The process that thaws when the one that froze is no longer there to do it.
//!
//! It is this program again, in a session of its own and (where permitted) in the root cgroups, so that neither a
//! signal to the caller's process group nor the end of its service or pod takes both at once. It holds the read end of
//! a pipe: the kernel closes the other end whatever way the caller dies.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{self, Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitCode, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::Error;
use super::cgroup::{Group, Version};

/// The first argument of a process that is a watchdog. Not for people: it is not in the help.
pub const ARGUMENT: &str = "__freeze-watchdog";

/// What the watchdog answers once it is ready to thaw.
const READY: &[u8] = b"ready\n";
/// What it is told when the caller has thawed by itself.
const DONE: u8 = b'd';
/// It starts in milliseconds; a machine under load gets this long.
const START_BOUND: Duration = Duration::from_secs(10);
/// How long a watchdog goes on trying to thaw. Beyond, the cgroup is gone or not to be had.
const THAW_TRIES: Duration = Duration::from_secs(60);

/// A watchdog that is up.
#[derive(Debug)]
pub(super) struct Watchdog {
    child: Child,
    /// Closed by the kernel when this process dies.
    life: Option<ChildStdin>,
    /// Thaws if the watchdog itself is killed: nobody would be left to do it when this process dies next.
    guard: Option<JoinHandle<()>>,
    ending: Arc<AtomicBool>,
}

impl Watchdog {
    /// Starts one for `group` and waits until it is ready.
    pub(super) fn start(
        program: &Path,
        group: &Arc<Group>,
        hold: Option<Duration>,
        mark: Option<&Path>,
    ) -> Result<Self, Error> {
        let failed = |why: String| Error::Watchdog { why };
        let millis = hold.map_or_else(String::new, |d| d.as_millis().max(1).to_string());
        let mut child = Command::new(program)
            .arg(ARGUMENT)
            .arg(group.version().name())
            .arg(group.dir())
            .arg(millis)
            .arg(mark.unwrap_or(Path::new("")))
            .env_clear()
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|e| failed(format!("starting {program:?}: {e}")))?;
        let (Some(life), Some(mut answers)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(failed("its pipes are missing".to_owned()));
        };
        let ending = Arc::new(AtomicBool::new(false));
        let mut watchdog = Self {
            child,
            life: Some(life),
            guard: None,
            ending: Arc::clone(&ending),
        };
        match read_answer(&mut answers) {
            Ok(answer) if answer == READY => {}
            Ok(answer) => {
                watchdog.dismiss(false);
                return Err(failed(format!(
                    "it answered {:?}",
                    answer.escape_ascii().to_string()
                )));
            }
            Err(error) => {
                let _ = watchdog.child.kill();
                watchdog.dismiss(false);
                return Err(failed(format!("no answer: {error}")));
            }
        }
        let group = Arc::clone(group);
        let guard = std::thread::Builder::new().name("freeze-guard".to_owned()).spawn(move || {
            // Returns when the watchdog ends; it writes nothing more.
            let _ = answers.read_to_end(&mut Vec::new());
            if !ending.load(Ordering::SeqCst) {
                tracing::warn!(cgroup = ?group.dir(), "the freeze's watchdog died, thawing at once");
                let _ = group.thaw();
            }
        });
        match guard {
            Ok(guard) => watchdog.guard = Some(guard),
            Err(error) => {
                watchdog.dismiss(false);
                return Err(failed(format!("starting a thread: {error}")));
            }
        }
        Ok(watchdog)
    }

    /// Ends it; with `thawed` false it thaws once more before it goes.
    pub(super) fn dismiss(&mut self, thawed: bool) {
        self.ending.store(true, Ordering::SeqCst);
        if let Some(mut life) = self.life.take()
            && thawed
        {
            // A watchdog that is gone cannot be told, and need not be.
            let _ = life.write_all(&[DONE]);
        }
        let _ = self.child.wait();
        if let Some(guard) = self.guard.take() {
            let _ = guard.join();
        }
    }

    /// Whether it still stands guard.
    pub(super) fn alive(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }
}

fn read_answer(answers: &mut ChildStdout) -> io::Result<Vec<u8>> {
    let deadline = Instant::now() + START_BOUND;
    let mut answer = Vec::new();
    while !answer.ends_with(b"\n") && answer.len() < 4096 {
        if !wait_readable(&*answers, Some(deadline))? {
            return Err(io::Error::new(
                io::ErrorKind::TimedOut,
                format!("waited {} s", START_BOUND.as_secs()),
            ));
        }
        let mut buffer = [0; 512];
        match answers.read(&mut buffer)? {
            0 => break,
            n => answer.extend_from_slice(&buffer[..n]),
        }
    }
    Ok(answer)
}

/// Waits for data or the end of a pipe; `false` when `deadline` comes first.
fn wait_readable(pipe: impl std::os::fd::AsFd, deadline: Option<Instant>) -> io::Result<bool> {
    loop {
        let timeout = match deadline {
            None => None,
            Some(deadline) => {
                let left = deadline.saturating_duration_since(Instant::now());
                Some(Timespec {
                    tv_sec: left.as_secs() as i64,
                    tv_nsec: i64::from(left.subsec_nanos()),
                })
            }
        };
        match poll(&mut [PollFd::new(&pipe, PollFlags::IN)], timeout.as_ref()) {
            Ok(0) => return Ok(false),
            Ok(_) => return Ok(true),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// The watchdog's own `main`: `ARGUMENT` is taken off, `args` are the version, the cgroup's directory, the longest
/// time in milliseconds that it may stand still (empty: no bound) and the mark of the freeze (empty: none). Talks over stdin and stdout, see [`super::freeze`].
pub fn watchdog_main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let args: Vec<OsString> = args.into_iter().collect();
    let mut stdout = io::stdout();
    match prepare(&args) {
        Ok((group, deadline, mark)) => {
            let told = stdout.write_all(READY).and_then(|()| stdout.flush());
            if told.is_err() {
                return ExitCode::FAILURE;
            }
            watch(&group, deadline, mark.as_deref())
        }
        Err(why) => {
            // One line: the other side reads up to its end.
            let _ = writeln!(stdout, "{}", why.escape_debug());
            ExitCode::FAILURE
        }
    }
}

fn prepare(args: &[OsString]) -> Result<(Group, Option<Instant>, Option<PathBuf>), String> {
    let [version, dir, millis, mark] = args else {
        return Err(format!(
            "expected VERSION DIRECTORY MILLISECONDS MARK, got {} arguments",
            args.len()
        ));
    };
    let version =
        Version::from_name(version).ok_or_else(|| format!("no cgroup version: {version:?}"))?;
    let deadline = match millis.to_str() {
        Some("") => None,
        Some(text) => {
            let millis = text
                .parse()
                .map_err(|_| format!("not milliseconds: {text:?}"))?;
            // Too far away to be reckoned with is no deadline.
            Instant::now().checked_add(Duration::from_millis(millis))
        }
        None => return Err(format!("not milliseconds: {millis:?}")),
    };
    nix::unistd::setsid().map_err(|e| format!("setsid: {e}"))?;
    // Nothing but SIGKILL ends it before its work is done; blocked is as good as ignored, and is inherited by none.
    nix::sys::signal::SigSet::all()
        .thread_block()
        .map_err(|e| format!("blocking signals: {e}"))?;
    close_inherited();
    // Whatever the caller stood in can be unmounted.
    let _ = std::env::set_current_dir("/");
    // The last to go when memory runs out; lowering it wants CAP_SYS_RESOURCE.
    let _ = fs::write("/proc/self/oom_score_adj", "-1000");
    leave_cgroups(&PathBuf::from("/proc"));
    let group = Group::open(version, PathBuf::from(dir)).map_err(|e| e.to_string())?;
    if super::members::pids_below(group.dir())
        .map_err(|e| e.to_string())?
        .contains(&std::process::id())
    {
        return Err(format!("it is in {dir:?} itself"));
    }
    let mark = (!mark.is_empty()).then(|| PathBuf::from(mark));
    Ok((group, deadline, mark))
}

/// Descriptors that the caller's parent left open would keep pipes and mounts of strangers alive.
fn close_inherited() {
    let Ok(entries) = fs::read_dir("/proc/self/fd") else {
        return;
    };
    let open: Vec<i32> = entries
        .filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok())
        .filter(|&fd| fd > 2)
        .collect();
    for fd in open {
        // The listing's own descriptor is among them and already closed.
        let _ = nix::unistd::close(fd);
    }
}

/// Moves this process to the root cgroup of every hierarchy in which it may: service managers, kubelets and the
/// out-of-memory killer end all that is in one cgroup. Not being allowed to is no error, only less protection.
fn leave_cgroups(proc: &Path) {
    let Ok(text) = fs::read(proc.join("self/mountinfo")) else {
        return;
    };
    for mount in super::cgroup::all_mount_points(&text) {
        let _ = fs::write(mount.join("cgroup.procs"), "0");
    }
}

fn watch(group: &Group, deadline: Option<Instant>, mark: Option<&Path>) -> ExitCode {
    let stdin = io::stdin();
    if !wait_readable(stdin.as_fd(), deadline).unwrap_or(true) {
        thaw(group, None);
        // The caller may still be about to freeze (it was stopped): its end is waited for, and thawed again then.
        let _ = wait_readable(stdin.as_fd(), None);
    }
    let mut word = [0];
    match stdin.lock().read(&mut word) {
        Ok(1) if word[0] == DONE => ExitCode::SUCCESS,
        _ => thaw(group, mark),
    }
}

/// Until it is thawed; then nobody has to know any more that it was frozen.
fn thaw(group: &Group, mark: Option<&Path>) -> ExitCode {
    let deadline = Instant::now() + THAW_TRIES;
    loop {
        match group.thaw() {
            // When the cgroup is gone, nothing is left that could be frozen.
            Ok(()) | Err(Error::Gone { .. }) => {
                mark.into_iter().for_each(super::mark::remove);
                return ExitCode::SUCCESS;
            }
            Err(_) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(20)),
            Err(_) => return ExitCode::FAILURE,
        }
    }
}

/// If this process was started as a watchdog: runs it. For `main`, before anything else.
pub fn entry() -> Option<ExitCode> {
    let mut args = std::env::args_os().skip(1);
    (args.next().as_deref() == Some(OsStr::new(ARGUMENT))).then(|| watchdog_main(args))
}
