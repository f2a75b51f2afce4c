//! Runs a program with all its threads and children under `ptrace`, and makes one of their system calls fail.
//!
//! A separate process does that (this test program again), as only the tracing thread may control the traced ones, and
//! as all of them end with it. A seccomp filter stops them at the traced calls, and at no others.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context as _, Result, bail, ensure};
use libc::user_regs_struct as Registers;
use nix::errno::Errno;
use nix::sys::ptrace::{self, Options};
use nix::sys::signal::{Signal, kill, raise};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use crate::calls::{self, Call, CallObject};
use crate::{case, clock};

/// First argument of the tracing process.
const TRACE: &str = "--trace-an-order";
/// First argument of the process that becomes the traced program.
const TRACED: &str = "--become-traced";
/// Paths outside the test's own directory that are relevant for a save.
const SYSTEM: [&str; 2] = ["/proc/", "/sys/fs/cgroup"];

/// What happens to a call.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub enum Fault {
    /// It fails with this errno, without effect.
    Fails(i32),
    /// This call and all later ones fail with this errno.
    FailsFrom(i32),
    /// Its length is reduced to one byte.
    One,
    /// Its length is halved.
    Half,
}

impl std::fmt::Display for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Fails(number) => write!(f, "{:?}", Errno::from_raw(*number)),
            Self::FailsFrom(number) => write!(f, "{:?} from then on", Errno::from_raw(*number)),
            Self::One => write!(f, "one byte"),
            Self::Half => write!(f, "half"),
        }
    }
}

/// A call and its fault.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Target {
    pub call: String,
    /// The object of the call, without the parts that differ between runs.
    pub about: String,
    /// Index among the calls of this name on this object, from 0.
    pub nth: usize,
    pub fault: Fault,
}

/// A program to run.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Order {
    pub arguments: Vec<String>,
    /// Files below this directory are relevant.
    pub home: PathBuf,
    /// Directory for its output and the report.
    pub output: PathBuf,
    pub target: Option<Target>,
    /// Shifts of the wall clock in seconds, each from the n-th reading on; empty: the clock is unchanged.
    pub clock: Vec<(usize, i64)>,
    /// Limit of open files.
    pub files: Option<u64>,
    /// A change of one of the container's files while it is read.
    pub meanwhile: Option<ConcurrentWrite>,
}

impl Order {
    /// Returns the object of a call without the parts that differ between runs: the directory, numbers, and random
    /// names.
    pub fn plain(&self, about: &str) -> String {
        let home = self.home.display().to_string();
        let about = about.replace(&home, "");
        let made_up = [".tmp", ".new-"]
            .iter()
            .filter_map(|name| Some(about.find(name)? + name.len()))
            .min();
        case::plain(&about[..made_up.unwrap_or(about.len())])
    }
}

/// Writes a file at the first call of this name on an object whose name ends with `about`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ConcurrentWrite {
    pub call: String,
    pub about: String,
    pub file: PathBuf,
    pub content: String,
}

/// A call that was observed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ObservedCall {
    pub call: String,
    /// A path, or the name of a descriptor in `/proc/PID/fd`.
    pub about: String,
    /// Requested length, if the call has one.
    pub length: u64,
}

/// The result of a run.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Report {
    pub exit: Option<i32>,
    pub signal: Option<String>,
    pub calls: Vec<ObservedCall>,
    pub hit: Option<ObservedCall>,
    pub clock_reads: usize,
    /// Processes that were still running after the program had ended, and did not end by themselves.
    pub stayed: usize,
}

/// Runs this process as one of the two helpers if its arguments say so; called by `main`.
pub fn entry() -> Option<ExitCode> {
    let mut arguments = std::env::args_os().skip(1);
    let first = arguments.next()?;
    let done = if first == TRACE {
        trace(Path::new(&arguments.next()?))
    } else if first == TRACED {
        become_traced(&arguments.collect::<Vec<_>>())
    } else {
        return None;
    };
    Some(match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let text = format!("{error:#}\n");
            // The parent reports that there is no report; this is the reason.
            drop(io::Write::write_all(&mut io::stderr(), text.as_bytes()));
            ExitCode::FAILURE
        }
    })
}

/// Returns the command that traces `order`.
pub fn command(order: &Order) -> Result<Command> {
    let file = order.output.join("order");
    fs::write(&file, serde_json::to_vec(order)?)?;
    let mut command = Command::new(std::env::current_exe()?);
    command.arg(TRACE).arg(file);
    Ok(command)
}

/// Returns the report of a trace that has ended.
pub fn report(order: &Order) -> Result<Report> {
    let bytes = fs::read(order.output.join("report")).context("no report")?;
    Ok(serde_json::from_slice(&bytes)?)
}

/// Stops for the tracer, installs the filter for the traced calls, and executes the program.
fn become_traced(arguments: &[std::ffi::OsString]) -> Result<()> {
    let (clock, arguments) = arguments.split_first().context("no clock")?;
    let (program, arguments) = arguments.split_first().context("no program")?;
    raise(Signal::SIGSTOP)?;
    let mut numbers: Vec<i64> = calls::CALLS.iter().map(|call| call.number).collect();
    if clock == "clock" {
        numbers.extend(clock::CALLS);
    }
    let rules: BTreeMap<i64, Vec<seccompiler::SeccompRule>> = numbers
        .into_iter()
        .map(|number| (number, Vec::new()))
        .collect();
    let filter = seccompiler::SeccompFilter::new(
        rules,
        seccompiler::SeccompAction::Allow,
        seccompiler::SeccompAction::Trace(0),
        std::env::consts::ARCH.try_into()?,
    )?;
    let filter: seccompiler::BpfProgram = filter.try_into()?;
    seccompiler::apply_filter(&filter)?;
    Err(Command::new(program).args(arguments).exec().into())
}

/// The state of one trace.
struct Trace {
    order: Order,
    main: Pid,
    alive: HashSet<Pid>,
    /// Whether the program has replaced the helper.
    begun: bool,
    nth: usize,
    /// Registers to restore at the end of a call whose length was changed.
    changed: HashMap<Pid, Registers>,
    report: Report,
}

fn trace(file: &Path) -> Result<()> {
    let order: Order = serde_json::from_slice(&fs::read(file)?)?;
    let create = |name: &str| File::create(order.output.join(name)).map(Stdio::from);
    let clock = if order.clock.is_empty() {
        "as it is"
    } else {
        "clock"
    };
    let mut command = Command::new(std::env::current_exe()?);
    command
        .args([TRACED, clock])
        .args(&order.arguments)
        .stdin(Stdio::null())
        .stdout(create("stdout")?)
        .stderr(create("stderr")?);
    if let Some(files) = order.files {
        // After the files above are open, and inherited.
        nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE, files, files)?;
    }
    let child = command.spawn()?;
    let main = Pid::from_raw(child.id() as i32);
    let stopped = waitpid(main, Some(WaitPidFlag::WUNTRACED))?;
    ensure!(
        stopped == WaitStatus::Stopped(main, Signal::SIGSTOP),
        "{stopped:?}"
    );
    let options = Options::PTRACE_O_EXITKILL
        | Options::PTRACE_O_TRACECLONE
        | Options::PTRACE_O_TRACEFORK
        | Options::PTRACE_O_TRACEVFORK
        | Options::PTRACE_O_TRACEEXEC
        | Options::PTRACE_O_TRACESYSGOOD
        | Options::PTRACE_O_TRACESECCOMP;
    ptrace::seize(main, options)?;
    kill(main, Signal::SIGCONT)?;
    let mut trace = Trace {
        main,
        alive: HashSet::from([main]),
        begun: false,
        nth: 0,
        changed: HashMap::new(),
        report: Report::default(),
        order,
    };
    trace.run()?;
    let written = serde_json::to_vec(&trace.report)?;
    Ok(fs::write(trace.order.output.join("report"), written)?)
}

impl Trace {
    fn run(&mut self) -> Result<()> {
        let mut ended = None;
        loop {
            let flags = WaitPidFlag::__WALL | WaitPidFlag::WNOHANG;
            let flags = if ended.is_some() {
                flags
            } else {
                WaitPidFlag::__WALL
            };
            let status = match waitpid(None, Some(flags)) {
                Ok(status) => status,
                Err(Errno::ECHILD) => return Ok(()),
                Err(error) => return Err(error.into()),
            };
            match status {
                WaitStatus::StillAlive => {
                    let since: std::time::Instant = ended.context("the end")?;
                    if since.elapsed() > std::time::Duration::from_secs(5) {
                        // The kernel ends them with this process.
                        self.report.stayed = self.alive.len();
                        return Ok(());
                    }
                    std::thread::sleep(std::time::Duration::from_millis(1));
                }
                WaitStatus::Exited(pid, code) => {
                    self.alive.remove(&pid);
                    if pid == self.main {
                        self.report.exit = Some(code);
                        ended = Some(std::time::Instant::now());
                    }
                }
                WaitStatus::Signaled(pid, signal, _) => {
                    self.alive.remove(&pid);
                    if pid == self.main {
                        self.report.signal = Some(signal.to_string());
                        ended = Some(std::time::Instant::now());
                    }
                }
                other => self.stopped(other)?,
            }
        }
    }

    fn stopped(&mut self, status: WaitStatus) -> Result<()> {
        // ESRCH: a stopped thread can still be killed by the end of its process.
        let gone = |done: nix::Result<()>| match done {
            Err(Errno::ESRCH) => Ok(()),
            other => other,
        };
        match status {
            WaitStatus::PtraceEvent(pid, _, event) => {
                self.alive.insert(pid);
                let mut to_the_end = false;
                if event == ptrace::Event::PTRACE_EVENT_SECCOMP as i32 {
                    match self.call(pid) {
                        Ok(changed) => to_the_end = changed,
                        Err(error) if error.downcast_ref() == Some(&Errno::ESRCH) => {}
                        Err(error) => return Err(error),
                    }
                } else if event == ptrace::Event::PTRACE_EVENT_EXEC as i32 {
                    self.begun = true;
                    if !self.order.clock.is_empty() {
                        clock::patch(pid.as_raw())?;
                    }
                }
                if to_the_end {
                    gone(ptrace::syscall(pid, None))?;
                } else {
                    gone(ptrace::cont(pid, None))?;
                }
            }
            WaitStatus::PtraceSyscall(pid) => {
                if let Some(before) = self.changed.remove(&pid) {
                    let mut now = ptrace::getregs(pid)?;
                    (now.rdi, now.rsi, now.rdx) = (before.rdi, before.rsi, before.rdx);
                    (now.r10, now.r8, now.r9) = (before.r10, before.r8, before.r9);
                    ptrace::setregs(pid, now)?;
                }
                gone(ptrace::cont(pid, None))?;
            }
            WaitStatus::Stopped(pid, signal) => {
                self.alive.insert(pid);
                gone(ptrace::cont(pid, signal))?;
            }
            other => bail!("{other:?}"),
        }
        Ok(())
    }

    /// Handles the start of a call. Returns true if its registers have to be restored at its end.
    fn call(&mut self, pid: Pid) -> Result<bool> {
        if !self.begun {
            return Ok(false);
        }
        let registers = ptrace::getregs(pid)?;
        let number = registers.orig_rax as i64;
        if clock::CALLS.contains(&number) {
            return self.time(pid, registers);
        }
        let Some(call) = calls::of(number) else {
            return Ok(false);
        };
        let arguments = [
            registers.rdi,
            registers.rsi,
            registers.rdx,
            registers.r10,
            registers.r8,
            registers.r9,
        ];
        let Some(about) = self.matters(pid, call, arguments) else {
            return Ok(false);
        };
        let seen = ObservedCall {
            call: call.name.to_owned(),
            about,
            length: call.length.map_or(0, |at| arguments[at]),
        };
        self.report.calls.push(seen.clone());
        let now = |other: &mut ConcurrentWrite| {
            other.call == seen.call && seen.about.ends_with(&other.about)
        };
        if let Some(other) = self.order.meanwhile.take_if(now) {
            fs::write(other.file, other.content)?;
        }
        let Some(target) = &self.order.target else {
            return Ok(false);
        };
        let lasting = matches!(target.fault, Fault::FailsFrom(_)) && self.report.hit.is_some();
        // Lasting failures are those of disks and of the descriptor table: not of pipes, of memory, or of cgroups, as
        // one that can be frozen can be thawed. Output must not fail either, as it has to be read.
        let disk = seen.about.starts_with('/')
            && !(seen.about.starts_with("/sys/") && call.length.is_some())
            && !Path::new(&seen.about).starts_with(&self.order.output);
        let other = if lasting {
            !disk
        } else {
            target.about != self.order.plain(&seen.about)
        };
        if target.call != call.name || other {
            return Ok(false);
        }
        let here = self.nth;
        self.nth += 1;
        if here != target.nth && !lasting {
            return Ok(false);
        }
        self.report.hit.get_or_insert(seen);
        let fault = target.fault;
        change(pid, call, registers, fault).inspect(|&changed| {
            if changed {
                self.changed.insert(pid, registers);
            }
        })
    }

    /// Returns the object of a call if it belongs to the test or the system, and not to the loader or a library.
    fn matters(&self, pid: Pid, call: &Call, arguments: [u64; 6]) -> Option<String> {
        let fd = |number: u64| {
            if number as i32 == libc::AT_FDCWD {
                return fs::read_link(format!("/proc/{pid}/cwd")).ok();
            }
            fs::read_link(format!("/proc/{pid}/fd/{}", number as i32)).ok()
        };
        let about = match call.about {
            CallObject::Process => {
                // The loader maps memory as well, before any file of the test is accessed.
                return (!self.report.calls.is_empty()).then(String::new);
            }
            CallObject::Fd(at) => fd(arguments[at])?,
            CallObject::Path(at) => string(pid, arguments[at]),
            CallObject::At(dir, at) => {
                let path = string(pid, arguments[at]);
                if path.is_absolute() {
                    path
                } else {
                    fd(arguments[dir])?.join(path)
                }
            }
        };
        if call.number == libc::SYS_fcntl {
            // Only requests to the kernel: a lease, a second descriptor, the size of a pipe.
            let asks = [libc::F_SETLEASE, libc::F_DUPFD_CLOEXEC, libc::F_SETPIPE_SZ];
            if !asks.contains(&(arguments[1] as i32)) {
                return None;
            }
        }
        if call.number == libc::SYS_lseek && ![3, 4].contains(&arguments[2]) {
            // Of lseek, only SEEK_DATA and SEEK_HOLE reach the file system.
            return None;
        }
        let text = about.to_string_lossy().into_owned();
        let matters = about.starts_with(&self.order.home)
            || SYSTEM.iter().any(|path| text.starts_with(path))
            || ["socket:", "pipe:", "/memfd:", "anon_inode:"]
                .iter()
                .any(|kind| text.starts_with(kind));
        matters.then_some(text)
    }

    /// Answers a reading of the wall clock.
    fn time(&mut self, pid: Pid, mut registers: Registers) -> Result<bool> {
        let seen = self.report.clock_reads;
        let shift = self.order.clock.iter().rfind(|(from, _)| *from <= seen);
        if let Some(answered) = clock::tell(pid.as_raw(), &registers, shift.map_or(0, |s| s.1))? {
            self.report.clock_reads += 1;
            registers.orig_rax = u64::MAX;
            registers.rax = answered;
            ptrace::setregs(pid, registers)?;
        }
        Ok(false)
    }
}

/// Makes a call fail, or reduces its length. Returns true if its registers have to be restored.
fn change(pid: Pid, call: &Call, mut registers: Registers, fault: Fault) -> Result<bool> {
    let shorter = match fault {
        Fault::Fails(number) | Fault::FailsFrom(number) => {
            registers.orig_rax = u64::MAX;
            registers.rax = i64::from(-number) as u64;
            ptrace::setregs(pid, registers)?;
            return Ok(false);
        }
        Fault::One => |_: u64| 1,
        Fault::Half => |length: u64| length.div_ceil(2),
    };
    let length = match call.length.context("it has no length")? {
        2 => &mut registers.rdx,
        3 => &mut registers.r10,
        4 => &mut registers.r8,
        other => bail!("argument {other}"),
    };
    if *length == 0 {
        return Ok(false);
    }
    *length = shorter(*length);
    ptrace::setregs(pid, registers)?;
    Ok(true)
}

/// Returns a string of the traced program, as far as it can be read.
fn string(pid: Pid, at: u64) -> PathBuf {
    use std::os::unix::ffi::OsStringExt as _;
    let mut bytes = vec![0; 4096];
    let read = File::open(format!("/proc/{pid}/mem")).and_then(|memory| {
        // The memory after the end of a page may not be mapped.
        let whole = 4096 - at as usize % 4096;
        let first = memory.read_at(&mut bytes[..whole], at)?;
        Ok(first
            + memory
                .read_at(&mut bytes[whole..], at + whole as u64)
                .unwrap_or(0))
    });
    bytes.truncate(read.unwrap_or(0));
    let end = bytes.iter().position(|&byte| byte == 0).unwrap_or(0);
    bytes.truncate(end);
    PathBuf::from(std::ffi::OsString::from_vec(bytes))
}
