//! The process that thaws when the one that froze is no longer there to do it.
//!
//! It is this program again, in a session of its own and (where permitted) in the root cgroups, so that neither a
//! signal to the caller's process group nor the end of its service or pod takes both at once. It holds the read end of
//! a pipe: the kernel closes the other end whatever way the caller dies.
//!
//! A caller that is about to give up the right to start programs has one stand by before ([`stand_by`]): it takes what it is
//! to guard from the pipe, and serves for one freeze after the other.

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

/// The first argument of a process that is a watchdog. Not for people: it is not in the help.
pub const ARGUMENT: &str = "__freeze-watchdog";

/// What the watchdog answers once it is ready to thaw.
const READY: &[u8] = b"ready\n";
/// What it is told when the caller has thawed by itself.
const DONE: u8 = b'd';
/// What one that stands by answers to that: it waits for the next order.
const STANDS_BY: &[u8] = b"standing by\n";
/// An order is four fields, each with a NUL at its end; a path is no longer than the kernel takes.
const ORDER_FIELDS: usize = 4;
const MAX_ORDER: usize = 16 << 10;
/// It starts in milliseconds; a machine under load gets this long.
const START_BOUND: Duration = Duration::from_secs(10);
/// How long a watchdog goes on trying to thaw. Beyond, the cgroup is gone or not to be had.
const THAW_TRIES: Duration = Duration::from_secs(60);

/// A process that is, or will be, a watchdog.
#[derive(Debug)]
struct Process {
    child: Child,
    /// Closed by the kernel when this process dies.
    life: ChildStdin,
    answers: ChildStdout,
    /// Whether it goes on standing by when a freeze is over.
    stays: bool,
}

/// The one that stands by, while it guards nothing; or why there is none.
static SPARE: Mutex<Spare> = Mutex::new(Spare::None);

#[derive(Debug)]
enum Spare {
    /// None was asked for, or it guards.
    None,
    Process(Process),
    /// It could not be started, and a process that has given up its rights cannot start one any more.
    Failed(String),
}

impl Spare {
    fn take(&mut self) -> Self {
        std::mem::replace(self, Self::None)
    }
}

fn spare() -> std::sync::MutexGuard<'static, Spare> {
    SPARE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A watchdog that stands by until this is dropped.
#[derive(Debug)]
#[must_use = "the watchdog ends as soon as this is dropped"]
pub struct StandBy(());

/// Starts a watchdog that the freezes of this process will use, one after the other: from then on none of them starts a
/// program.
pub fn stand_by() -> Result<StandBy, Error> {
    match Process::start(&super::Options::default().program, &[], true) {
        Ok(process) => {
            *spare() = Spare::Process(process);
            Ok(StandBy(()))
        }
        Err(why) => {
            // For the freeze, whose own try would be refused for another reason.
            *spare() = Spare::Failed(why.clone());
            Err(failed(why))
        }
    }
}

impl Drop for StandBy {
    fn drop(&mut self) {
        let process = spare().take();
        if let Spare::Process(mut process) = process {
            // The end of its input is its end; it is waited for, so that no zombie is left.
            drop(process.life);
            let _ = process.child.wait();
        }
    }
}

fn failed(why: String) -> Error {
    Error::Watchdog { why }
}

impl Process {
    fn start(program: &Path, order: &[OsString], stays: bool) -> Result<Self, String> {
        let mut child = Command::new(program)
            .arg(ARGUMENT)
            .args(order)
            .env_clear()
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .map_err(|e| format!("starting {}: {e}", program.display()))?;
        let (Some(life), Some(answers)) = (child.stdin.take(), child.stdout.take()) else {
            return Err("its pipes are missing".to_owned());
        };
        Ok(Self {
            child,
            life,
            answers,
            stays,
        })
    }

    /// The one that stands by, given its order; else one that is started with it.
    fn ordered(program: &Path, order: &[OsString]) -> Result<Self, Error> {
        let mut process = match spare().take() {
            Spare::Process(process) => process,
            Spare::None => return Self::start(program, order, false).map_err(failed),
            Spare::Failed(why) => return Err(failed(why)),
        };
        let mut text = Vec::new();
        for field in order {
            text.extend_from_slice(field.as_bytes());
            text.push(0);
        }
        match process.life.write_all(&text) {
            Ok(()) => Ok(process),
            Err(error) => {
                let _ = process.child.kill();
                let _ = process.child.wait();
                Err(failed(format!("telling it what to guard: {error}")))
            }
        }
    }
}

/// A watchdog that is up.
#[derive(Debug)]
pub(super) struct Watchdog {
    child: Option<Child>,
    /// Closed by the kernel when this process dies.
    life: Option<ChildStdin>,
    /// Thaws if the watchdog itself is killed: nobody would be left to do it when this process dies next. Hands back its
    /// answers if it stands by for the next freeze.
    guard: Option<JoinHandle<Option<ChildStdout>>>,
    ending: Arc<AtomicBool>,
    stays: bool,
}

impl Watchdog {
    /// Has one for `group` and waits until it is ready.
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
            life,
            mut answers,
            stays,
        } = Process::ordered(program, &order)?;
        let ending = Arc::new(AtomicBool::new(false));
        let mut watchdog = Self {
            child: Some(child),
            life: Some(life),
            guard: None,
            ending: Arc::clone(&ending),
            stays,
        };
        match read_answer(&mut answers) {
            Ok(answer) if answer == READY => {}
            Ok(answer) => {
                watchdog.dismiss(false);
                // It is one line, and escaped.
                let answer = String::from_utf8_lossy(&answer);
                return Err(failed(answer.trim_end().to_owned()));
            }
            Err(error) => {
                if let Some(child) = &mut watchdog.child {
                    let _ = child.kill();
                }
                watchdog.dismiss(false);
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
                watchdog.dismiss(false);
                return Err(failed(format!("starting a thread: {error}")));
            }
        }
        Ok(watchdog)
    }

    /// Ends it, or has it stand by again; with `thawed` false it thaws once more before it goes.
    pub(super) fn dismiss(&mut self, thawed: bool) {
        self.ending.store(true, Ordering::SeqCst);
        let mut life = self.life.take();
        if let Some(life) = &mut life
            && thawed
        {
            // A watchdog that is gone cannot be told, and need not be.
            let _ = life.write_all(&[DONE]);
        }
        let stays = self.stays && thawed;
        if !stays {
            life = None;
        }
        let answers = self.guard.take().and_then(|guard| guard.join().ok()?);
        match (self.child.take(), life, answers) {
            (Some(child), Some(life), Some(answers)) if stays => {
                *spare() = Spare::Process(Process {
                    child,
                    life,
                    answers,
                    stays,
                });
            }
            (Some(mut child), life, _) => {
                drop(life);
                let _ = child.wait();
            }
            (None, ..) => {}
        }
    }

    /// Whether it still stands guard.
    pub(super) fn alive(&mut self) -> bool {
        self.child
            .as_mut()
            .is_some_and(|child| matches!(child.try_wait(), Ok(None)))
    }
}

/// Until the watchdog ends, or says that it stands by again: then its answers are handed back.
fn guard(mut answers: ChildStdout, ending: &AtomicBool, group: &Group) -> Option<ChildStdout> {
    let mut said = Vec::new();
    let mut piece = [0; 64];
    while !said.ends_with(STANDS_BY) {
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
        match answers.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => answer.extend_from_slice(&buffer[..n]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
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
/// time in milliseconds that it may stand still (empty: no bound) and the mark of the freeze (empty: none). Without any it
/// stands by: it reads them from stdin, each with a NUL at its end, again and again. Talks over stdin and stdout, see
/// [`super::freeze`].
pub fn watchdog_main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let args: Vec<OsString> = args.into_iter().collect();
    if let Err(why) = leave() {
        return refuse(&why);
    }
    if !args.is_empty() {
        return match serve(&args) {
            Ok(Ended::Thawed) => ExitCode::SUCCESS,
            Ok(Ended::Alone(code)) | Err(code) => code,
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
            Ok(Ended::Alone(code)) | Err(code) => return code,
        }
        if say(STANDS_BY).is_err() {
            return ExitCode::SUCCESS;
        }
    }
}

/// How a freeze ended.
enum Ended {
    /// The caller thawed, and said so.
    Thawed,
    /// The caller is no more: this process thawed, or could not.
    Alone(ExitCode),
}

fn say(word: &[u8]) -> io::Result<()> {
    let mut stdout = io::stdout();
    stdout.write_all(word)?;
    stdout.flush()
}

fn refuse(why: &str) -> ExitCode {
    // One line: the other side reads up to its end.
    let _ = say(format!("{}\n", escape::text(why)).as_bytes());
    ExitCode::FAILURE
}

/// Guards one freeze.
fn serve(order: &[OsString]) -> Result<Ended, ExitCode> {
    let (group, deadline, mark) = prepare(order).map_err(|why| refuse(&why))?;
    say(READY).map_err(|_| ExitCode::FAILURE)?;
    Ok(watch(&group, deadline, mark.as_deref()))
}

/// The next order, or nothing when the caller has no more.
fn read_order() -> io::Result<Option<Vec<OsString>>> {
    let mut stdin = io::stdin().lock();
    let mut text = Vec::new();
    let mut byte = [0];
    let mut ends = 0;
    // One byte after the other: what follows is not for this function.
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

/// Out of all that the caller stands in, and with no more rights than a write to a cgroup takes.
fn leave() -> Result<(), String> {
    nix::unistd::setsid().map_err(|e| format!("setsid: {e}"))?;
    // Nothing but SIGKILL ends it before its work is done; blocked is as good as ignored, and is inherited by none.
    nix::sys::signal::SigSet::all()
        .thread_block()
        .map_err(|e| format!("blocking signals: {e}"))?;
    // Whatever the caller stood in can be unmounted.
    let _ = std::env::set_current_dir("/");
    // The last to go when memory runs out; lowering it wants CAP_SYS_RESOURCE.
    let _ = fs::write("/proc/self/oom_score_adj", "-1000");
    leave_cgroups(&PathBuf::from("/proc"));
    // Descriptors that the caller's parent left open would keep pipes and mounts of strangers alive: they are closed, too.
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
            // Too far away to be reckoned with is no deadline.
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

fn watch(group: &Group, deadline: Option<Instant>, mark: Option<&Path>) -> Ended {
    let stdin = io::stdin();
    if !wait_readable(stdin.as_fd(), deadline).unwrap_or(true) {
        thaw(group, None);
        // The caller may still be about to freeze (it was stopped): its end is waited for, and thawed again then.
        let _ = wait_readable(stdin.as_fd(), None);
    }
    let mut word = [0];
    // `read_exact` goes on where a read is interrupted: that is not the end of the caller.
    match stdin.lock().read_exact(&mut word) {
        Ok(()) if word[0] == DONE => Ended::Thawed,
        _ => Ended::Alone(thaw(group, mark)),
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
