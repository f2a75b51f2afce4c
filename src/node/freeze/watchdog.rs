//! The watchdog: a process that thaws the container if the process that froze it dies.
//!
//! It is another process of this program, in its own session and (where permitted) in the root cgroups, so that neither
//! a signal to the caller's process group nor the end of its service or pod kills both at once. It holds the read end
//! of a pipe, whose other end the kernel closes however the caller dies.
//!
//! A caller that is about to give up the right to start programs starts standby watchdogs first ([`start_standby`]), one for
//! each freeze that it needs at the same time. They read their orders from the pipe and serve one freeze after another.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{self, Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::Error;
use super::cgroup::{Group, Version};
use crate::common::escape;
use crate::node::confine::{self, Role};
use crate::node::procfs;

/// The first argument of a watchdog process. Internal, and therefore not in the help.
pub(crate) const ARGUMENT: &str = "__freeze-watchdog";

/// Answer of the watchdog when it is ready to thaw.
const READY: &[u8] = b"ready\n";
/// Byte sent to the watchdog when the caller has thawed the container itself.
const DONE: u8 = b'd';
/// Answer of a standby watchdog to `DONE`: it waits for the next order.
const STANDBY_ANSWER: &[u8] = b"standing by\n";
/// An order has four fields, each terminated by NUL. A path is at most as long as the kernel accepts.
const ORDER_FIELDS: usize = 4;
const MAX_ORDER: usize = 16 << 10;
/// Timeout for the start. A watchdog starts in milliseconds; the rest is for a loaded machine.
const START_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a watchdog retries the thaw. After that, the cgroup is gone or out of reach.
const THAW_RETRY_TIME: Duration = Duration::from_secs(60);

/// A process that is a watchdog or stands by to become one.
#[derive(Debug)]
struct Process {
    child: Child,
    /// Closed by the kernel when this process dies.
    lifeline: ChildStdin,
    answers: ChildStdout,
    /// Whether the process returns to standby after a freeze.
    reusable: bool,
}

/// The standby watchdogs that guard nothing.
static STANDBY: Mutex<Standby> = Mutex::new(Standby {
    idle: Vec::new(),
    failed: None,
});

#[derive(Debug)]
struct Standby {
    idle: Vec<Process>,
    /// Why one could not be started: a process that has given up its rights can no longer start one.
    failed: Option<String>,
}

fn standby() -> std::sync::MutexGuard<'static, Standby> {
    STANDBY.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The standby watchdogs, which end when this is dropped.
#[derive(Debug)]
#[must_use = "the watchdogs end as soon as this is dropped"]
pub(crate) struct StandbyGuard(());

/// Starts watchdogs for all later freezes of this process, of which at most `count` last at the same time. They are used
/// again and again, and no program is started any more.
pub(crate) fn start_standby(count: usize) -> Result<StandbyGuard, Error> {
    let guard = StandbyGuard(());
    for _ in 0..count {
        match Process::start(&super::Options::default().program, &[], true) {
            Ok(process) => standby().idle.push(process),
            Err(why) => {
                // Kept for the freeze, whose own attempt would fail for another reason.
                standby().failed = Some(why.clone());
                return Err(failed(why));
            }
        }
    }
    Ok(guard)
}

impl Drop for StandbyGuard {
    fn drop(&mut self) {
        let idle = std::mem::take(&mut standby().idle);
        // A watchdog exits at the end of its input. All are waited for so that no zombie remains.
        for Process {
            mut child,
            lifeline,
            ..
        } in idle
        {
            drop(lifeline);
            let _ = child.wait();
        }
    }
}

fn failed(why: String) -> Error {
    Error::Watchdog { why }
}

impl Process {
    fn start(program: &Path, order: &[OsString], reusable: bool) -> Result<Self, String> {
        let mut child = Command::new(program)
            .arg(ARGUMENT)
            .args(order)
            .env_clear()
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|e| format!("starting {}: {e}", program.display()))?;
        let (Some(lifeline), Some(answers)) = (child.stdin.take(), child.stdout.take()) else {
            return Err("its pipes are missing".to_owned());
        };
        Ok(Self {
            child,
            lifeline,
            answers,
            reusable,
        })
    }

    /// Returns a standby watchdog after sending it `order`, or else starts one with it.
    fn with_order(program: &Path, order: &[OsString]) -> Result<Self, Error> {
        let (idle, why) = {
            let mut standby = standby();
            (standby.idle.pop(), standby.failed.clone())
        };
        let mut process = match (idle, why) {
            (Some(process), _) => process,
            (None, Some(why)) => return Err(failed(why)),
            (None, None) => return Self::start(program, order, false).map_err(failed),
        };
        let mut text = Vec::new();
        for field in order {
            text.extend_from_slice(field.as_bytes());
            text.push(0);
        }
        match process.lifeline.write_all(&text) {
            Ok(()) => Ok(process),
            Err(error) => {
                let _ = process.child.kill();
                let _ = process.child.wait();
                Err(failed(format!("telling it what to guard: {error}")))
            }
        }
    }
}

/// A running watchdog.
#[derive(Debug)]
pub(super) struct Watchdog {
    child: Option<Child>,
    /// Closed by the kernel when this process dies.
    lifeline: Option<ChildStdin>,
    /// Thread that thaws the container if the watchdog itself is killed: a death of this process would otherwise leave
    /// the container frozen. Returns the pipe of answers if the watchdog goes back to standby.
    guard: Option<JoinHandle<Option<ChildStdout>>>,
    ending: Arc<AtomicBool>,
    reusable: bool,
}

impl Watchdog {
    /// Starts a watchdog for `group`, or takes one on standby, and waits until it is ready.
    pub(super) fn start(
        program: &Path,
        group: &Arc<Group>,
        hold: Option<Duration>,
        mark: Option<&Path>,
    ) -> Result<Self, Error> {
        let millis = hold.map_or_else(String::new, |d| d.as_millis().max(1).to_string());
        let order: [OsString; ORDER_FIELDS] = [
            group.version().name().into(),
            group.dir().into(),
            millis.into(),
            mark.unwrap_or(Path::new("")).into(),
        ];
        let Process {
            child,
            lifeline,
            mut answers,
            reusable,
        } = Process::with_order(program, &order)?;
        let ending = Arc::new(AtomicBool::new(false));
        let mut watchdog = Self {
            child: Some(child),
            lifeline: Some(lifeline),
            guard: None,
            ending: Arc::clone(&ending),
            reusable,
        };
        match read_answer(&mut answers) {
            Ok(answer) if answer == READY => {}
            Ok(answer) => {
                watchdog.stop(false);
                // The answer is a single line and already escaped.
                let answer = String::from_utf8_lossy(&answer);
                return Err(failed(answer.trim_end().to_owned()));
            }
            Err(error) => {
                if let Some(child) = &mut watchdog.child {
                    let _ = child.kill();
                }
                watchdog.stop(false);
                return Err(failed(format!("no answer: {error}")));
            }
        }
        let group = Arc::clone(group);
        let guard = std::thread::Builder::new()
            .name("freeze-guard".to_owned())
            .spawn(move || guard(answers, &ending, &group));
        match guard {
            Ok(guard) => watchdog.guard = Some(guard),
            Err(error) => {
                watchdog.stop(false);
                return Err(failed(format!("starting a thread: {error}")));
            }
        }
        Ok(watchdog)
    }

    /// Ends the watchdog or returns it to standby. If `thawed` is `false`, it thaws once more before it exits.
    pub(super) fn stop(&mut self, thawed: bool) {
        self.ending.store(true, Ordering::SeqCst);
        let mut lifeline = self.lifeline.take();
        if let Some(lifeline) = &mut lifeline
            && thawed
        {
            // A write to a watchdog that has exited fails, which does not matter.
            let _ = lifeline.write_all(&[DONE]);
        }
        let reusable = self.reusable && thawed;
        if !reusable {
            lifeline = None;
        }
        let answers = self.guard.take().and_then(|guard| guard.join().ok()?);
        match (self.child.take(), lifeline, answers) {
            (Some(child), Some(lifeline), Some(answers)) if reusable => {
                standby().idle.push(Process {
                    child,
                    lifeline,
                    answers,
                    reusable,
                });
            }
            (Some(mut child), lifeline, _) => {
                drop(lifeline);
                let _ = child.wait();
            }
            (None, ..) => {}
        }
    }

    /// Returns whether the watchdog process is still running.
    pub(super) fn alive(&mut self) -> bool {
        self.child
            .as_mut()
            .is_some_and(|child| matches!(child.try_wait(), Ok(None)))
    }
}

/// Waits until the watchdog exits or reports that it is on standby again, in which case the pipe of answers is
/// returned.
fn guard(mut answers: ChildStdout, ending: &AtomicBool, group: &Group) -> Option<ChildStdout> {
    let mut said = Vec::new();
    let mut piece = [0; 64];
    while !said.ends_with(STANDBY_ANSWER) {
        match answers.read(&mut piece) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Ok(n) if n > 0 && said.len() < MAX_ORDER => said.extend_from_slice(&piece[..n]),
            _ => {
                if !ending.load(Ordering::SeqCst) {
                    tracing::warn!(cgroup = ?group.dir(), "the freeze's watchdog died, thawing at once");
                    let _ = group.thaw();
                }
                return None;
            }
        }
    }
    Some(answers)
}

fn read_answer(answers: &mut ChildStdout) -> io::Result<Vec<u8>> {
    let deadline = Instant::now() + START_TIMEOUT;
    let mut answer = Vec::new();
    while !answer.ends_with(b"\n") && answer.len() < 4096 {
        if !wait_readable(&*answers, Some(deadline))? {
            return Err(io::Error::new(
                io::ErrorKind::TimedOut,
                format!("waited {} s", START_TIMEOUT.as_secs()),
            ));
        }
        let mut buffer = [0; 512];
        match answers.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => answer.extend_from_slice(&buffer[..n]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(answer)
}

/// Waits for data or the end of a pipe. Returns `false` if `deadline` passes first.
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

/// The `main` function of the watchdog. `args`, without `ARGUMENT`, are the version, the cgroup's directory, the
/// longest time in milliseconds for which it may be frozen (empty: no limit) and the path of the mark (empty: none).
/// Without arguments it is on standby and reads them repeatedly from stdin, each terminated by NUL. It communicates
/// over stdin and stdout, see [`super::freeze`].
pub(crate) fn watchdog_main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let args: Vec<OsString> = args.into_iter().collect();
    if let Err(why) = detach() {
        return refuse(&why);
    }
    if !args.is_empty() {
        return match serve(&args) {
            Ok(Ended::Thawed) => ExitCode::SUCCESS,
            Ok(Ended::CallerGone(code)) | Err(code) => code,
        };
    }
    loop {
        let order = match read_order() {
            Ok(Some(order)) => order,
            Ok(None) => return ExitCode::SUCCESS,
            Err(error) => return refuse(&format!("reading the order: {error}")),
        };
        match serve(&order) {
            Ok(Ended::Thawed) => {}
            Ok(Ended::CallerGone(code)) | Err(code) => return code,
        }
        if send_answer(STANDBY_ANSWER).is_err() {
            return ExitCode::SUCCESS;
        }
    }
}

/// The way in which a freeze ended.
enum Ended {
    /// The caller thawed the container and reported it.
    Thawed,
    /// The caller died: this process thawed the container, or failed to.
    CallerGone(ExitCode),
}

fn send_answer(word: &[u8]) -> io::Result<()> {
    let mut stdout = io::stdout();
    stdout.write_all(word)?;
    stdout.flush()
}

fn refuse(why: &str) -> ExitCode {
    // One line, because the other side reads up to the newline.
    let _ = send_answer(format!("{}\n", escape::text(why)).as_bytes());
    ExitCode::FAILURE
}

/// Guards one freeze.
fn serve(order: &[OsString]) -> Result<Ended, ExitCode> {
    let (group, deadline, mark) = prepare(order).map_err(|why| refuse(&why))?;
    send_answer(READY).map_err(|_| ExitCode::FAILURE)?;
    Ok(watch(&group, deadline, mark.as_deref()))
}

/// Reads the next order. Returns `None` at the end of the input.
fn read_order() -> io::Result<Option<Vec<OsString>>> {
    let mut stdin = io::stdin().lock();
    let mut text = Vec::new();
    let mut byte = [0];
    let mut ends = 0;
    // One byte at a time: the bytes after the order belong to another reader.
    while ends < ORDER_FIELDS {
        if text.len() > MAX_ORDER {
            return Err(io::Error::other(format!("longer than {MAX_ORDER} bytes")));
        }
        match stdin.read(&mut byte) {
            Ok(0) if text.is_empty() => return Ok(None),
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) => {
                text.push(byte[0]);
                ends += usize::from(byte[0] == 0);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    let fields = text[..text.len() - 1].split(|&b| b == 0);
    Ok(Some(
        fields
            .map(|field| OsStr::from_bytes(field).to_owned())
            .collect(),
    ))
}

/// Leaves the caller's session, directory and cgroups, closes inherited descriptors and drops every right except those
/// needed to write to a cgroup.
fn detach() -> Result<(), String> {
    rustix::process::setsid().map_err(|e| format!("setsid: {e}"))?;
    // Only SIGKILL may end the watchdog before its work is done. Blocking has the same effect as ignoring, and it
    // starts no process that would inherit the mask.
    nix::sys::signal::SigSet::all()
        .thread_block()
        .map_err(|e| format!("blocking signals: {e}"))?;
    // So that the caller's working directory can be unmounted.
    let _ = std::env::set_current_dir("/");
    // Makes this process the last to be killed when memory runs out. Lowering the value needs CAP_SYS_RESOURCE.
    let _ = fs::write("/proc/self/oom_score_adj", "-1000");
    leave_cgroups();
    // Descriptors left open by the caller's parent would keep unrelated pipes and mounts alive, so they are closed too.
    confine::close_inherited(&[]);
    confine::apply(Role::Watchdog);
    Ok(())
}

fn prepare(args: &[OsString]) -> Result<(Group, Option<Instant>, Option<PathBuf>), String> {
    let [version, dir, millis, mark] = args else {
        return Err(format!(
            "expected VERSION DIRECTORY MILLISECONDS MARK, got {}",
            crate::common::message::count(args.len(), "argument", "arguments")
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
            // A time too far in the future to be represented means no deadline.
            Instant::now().checked_add(Duration::from_millis(millis))
        }
        None => return Err(format!("not milliseconds: {millis:?}")),
    };
    let group = Group::open(version, PathBuf::from(dir)).map_err(|e| e.to_string())?;
    if super::members::pids_below(group.dir())
        .map_err(|e| e.to_string())?
        .contains(&std::process::id())
    {
        return Err(format!("it is in {} itself", group.dir().display()));
    }
    let mark = (!mark.is_empty()).then(|| PathBuf::from(mark));
    Ok((group, deadline, mark))
}

/// Moves this process to the root cgroup of every hierarchy where that is permitted, because service managers, kubelets
/// and the out-of-memory killer end all processes of a cgroup. A refusal is no error; it only means less protection.
fn leave_cgroups() {
    let mounts = procfs::own_mounts().unwrap_or_default();
    let cgroups = mounts
        .iter()
        .filter(|mount| matches!(mount.fs_type.as_str(), "cgroup" | "cgroup2"));
    for mount in cgroups {
        let _ = fs::write(mount.mount_point.join("cgroup.procs"), "0");
    }
}

fn watch(group: &Group, deadline: Option<Instant>, mark: Option<&Path>) -> Ended {
    let stdin = io::stdin();
    if !wait_readable(stdin.as_fd(), deadline).unwrap_or(true) {
        thaw(group, None);
        // The caller may have been stopped just before it freezes: wait for its end and thaw again then.
        let _ = wait_readable(stdin.as_fd(), None);
    }
    let mut word = [0];
    // `read_exact` retries an interrupted read, which is not the end of the caller.
    match stdin.lock().read_exact(&mut word) {
        Ok(()) if word[0] == DONE => Ended::Thawed,
        _ => Ended::CallerGone(thaw(group, mark)),
    }
}

/// Thaws the group, retrying until it succeeds or the time is over, and then removes the mark.
fn thaw(group: &Group, mark: Option<&Path>) -> ExitCode {
    let deadline = Instant::now() + THAW_RETRY_TIME;
    loop {
        match group.thaw() {
            // If the cgroup is gone, nothing can be frozen.
            Ok(()) | Err(Error::Gone { .. }) => {
                mark.into_iter().for_each(super::mark::remove);
                return ExitCode::SUCCESS;
            }
            Err(_) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(20)),
            Err(_) => return ExitCode::FAILURE,
        }
    }
}

/// Runs the watchdog if this process was started as one. `main` calls this before anything else.
pub fn entry() -> Option<ExitCode> {
    let mut args = std::env::args_os().skip(1);
    (args.next().as_deref() == Some(OsStr::new(ARGUMENT))).then(|| watchdog_main(args))
}
