//! The child process that executes a job: this program with the subcommand `commit`, isolated from the agent.
//!
//! Its standard input carries the credentials. Its standard output is a socket that carries events from the child, and
//! the confirmation to set the tag to the child. So secrets never appear in arguments or variables, no descriptor is
//! inherited by accident, and a child notices the death of its agent whatever it is doing.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::net::unix::OwnedWriteHalf;
use tokio::process::Command;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use zeroize::Zeroizing;

use super::options::{Options, shared_directory};
use super::spool::JobFile;
use super::spool::Spool;
use crate::common::escape;
use crate::node::background::MemoryLimit;
use crate::node::container::{Pattern, Roots, process_start};
use crate::save::HURRY;
use crate::service::job::{Event, JobId, Order, Replaces};
use crate::store::destination::SAVE_ANNOTATION;

/// Minimum interval between two progress events.
const PROGRESS_EVERY: Duration = Duration::from_millis(500);
/// Maximum number of warnings that are forwarded per job; more would not help a reader.
const MAX_WARNINGS: usize = 1000;
/// Maximum length of a line of events, in bytes.
const MAX_LINE: usize = 1 << 20;
/// Maximum number of lines of stderr that are logged, and of characters in each.
const MAX_LOGGED: usize = 200;
const MAX_LOGGED_LINE: usize = 1000;
/// Maximum size of the credentials in bytes; a pipe holds this much without a reader.
const MAX_CREDS: u64 = 16 << 10;
/// Time from SIGTERM to SIGKILL.
const GRACE: Duration = Duration::from_secs(10);
/// Time from SIGKILL until the child is given up: a process that waits in the kernel for a response that never comes
/// cannot be ended.
pub(super) const REAP_TIMEOUT: Duration = Duration::from_secs(20);
/// Environment variables that the child keeps: those for network access of the node. Neither `HOME` nor any other
/// variable in which credentials are searched for is kept.
const INHERITED_VARIABLES: [&str; 11] = [
    "PATH",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
    "ALL_PROXY",
    "http_proxy",
    "https_proxy",
    "no_proxy",
    "all_proxy",
];

/// A running child process.
pub(super) struct Child {
    pub(super) process: tokio::process::Child,
    pub(super) pid: u32,
    /// Start time in ticks since boot; 0 if the process was gone before it could be read.
    pub(super) pid_start: u64,
    gate: Option<OwnedWriteHalf>,
    /// Events in order of arrival; closed when the child has ended.
    pub(super) events: mpsc::UnboundedReceiver<Event>,
    stderr: JoinHandle<String>,
}

/// Returns name and tag of the image, for its title.
fn title(destination: &str) -> Option<&str> {
    destination.rsplit('/').next().filter(|t| !t.is_empty())
}

/// Returns the arguments for `commit`. Values that users chose are complete arguments of the form `--flag=value` or
/// come after `--`, so that none can be taken for another flag. `ended` is whether the session has ended.
pub(super) fn arguments(
    options: &Options,
    spool: &Spool,
    order: &Order,
    threads: u32,
    harbor_labels: &[&str],
    ended: bool,
) -> Vec<OsString> {
    let mut all: Vec<OsString> = roots_flags(&options.roots);
    let flag = |name: &str, value: &dyn AsRef<std::ffi::OsStr>| {
        let mut text = OsString::from(format!("--{name}="));
        text.push(value.as_ref());
        text
    };
    all.push("commit".into());
    all.push("--progress=json".into());
    all.push("--gate-fd=1".into());
    all.push(flag(
        "metadata-file",
        &spool.file(order.job, JobFile::Metadata),
    ));
    all.push(flag(
        "freeze-mark",
        &spool.file(order.job, JobFile::FreezeMark),
    ));
    let nowhere = std::path::PathBuf::new();
    all.push(flag(
        "state-dir",
        options.state_dir.as_ref().unwrap_or(&nowhere),
    ));
    all.push(format!("--jobs={threads}").into());
    // What has ended may be removed at any moment, so that its save does not wait for free cores. The session no longer
    // needs those that it had.
    if !ended {
        all.extend(background_flags(options));
    }
    all.extend(memory_flags(options, &save_group(order.job)));
    if let Some(pause) = options.max_pause {
        all.push(format!("--max-pause={}ms", pause.as_millis().max(1)).into());
    }
    let registry = &options.registry;
    if registry.creds_file.is_some() {
        all.push("--creds-fd=0".into());
    }
    if let Some(file) = &registry.authfile {
        all.push(flag("authfile", file));
    }
    if let Some(dir) = &registry.cert_dir {
        all.push(flag("cert-dir", dir));
    }
    if !registry.tls_verify {
        all.push("--tls-verify=false".into());
    }
    if registry.create_project {
        all.push("--create-project".into());
        if let Some(bytes) = registry.project_quota {
            all.push(format!("--project-quota={bytes}").into());
        }
    }
    if let Some(dir) = shared_directory(&options.allowed, &order.destination) {
        all.push(flag("share-blobs", &dir));
    }
    if !registry.keep_replaced {
        all.push("--delete-replaced".into());
    }
    // Flags of the administrator come later and win.
    all.push(flag("author", &order.owner));
    if let Some(title) = title(&order.destination) {
        let annotation = format!("org.opencontainers.image.title={title}");
        all.push(flag("annotation", &annotation));
    }
    if let Some(vendor) = &registry.vendor {
        let annotation = format!("org.opencontainers.image.vendor={vendor}");
        all.push(flag("annotation", &annotation));
    }
    all.extend(harbor_labels.iter().map(|name| flag("harbor-label", name)));
    all.push(flag(
        "annotation",
        &format!("{SAVE_ANNOTATION}={}", order.job),
    ));
    all.extend(options.flags.iter().map(Into::into));
    match &order.replaces {
        Replaces::Any => {}
        Replaces::Nothing => all.push("--no-replace".into()),
        Replaces::Image(digest) => all.push(flag("replace-only", &digest.to_string())),
    }
    let chosen = &order.options;
    if let Some(codec) = chosen.compression.as_ref().or(options.compression.as_ref()) {
        all.push(flag("compression", codec));
    }
    if chosen.full {
        all.push("--full".into());
    }
    if let Some(message) = &order.message {
        all.push(flag("message", message));
    }
    for (key, value) in &chosen.labels {
        all.push(flag("label", &format!("{key}={value}")));
    }
    all.extend(
        chosen
            .exclude
            .iter()
            .map(|pattern| flag("exclude", pattern)),
    );
    let volumes = chosen.include_volumes.iter();
    all.extend(volumes.map(|volume| flag("include-volume", volume)));
    if !chosen.include_volumes.is_empty() {
        let allowed = allowed_volumes(options, &order.owner);
        all.extend(allowed.map(|pattern| flag("allow-volume", &pattern.to_string())));
    }
    all.extend([
        "--".into(),
        order.session.clone().into(),
        order.destination.clone().into(),
    ]);
    all
}

/// Returns the name of the cgroup of a save.
fn save_group(job: JobId) -> String {
    format!("save-{job}")
}

/// Returns the flags with which a child limits its memory.
pub(super) fn memory_flags(options: &Options, group: &str) -> Vec<OsString> {
    let bound = options.memory.map(|bytes| {
        [
            format!("--memory-limit={bytes}").into(),
            format!("--memory-group={group}").into(),
        ]
    });
    bound.into_iter().flatten().collect()
}

/// Its place behind everybody else on the node.
pub(super) fn background_flags(options: &Options) -> impl Iterator<Item = OsString> {
    let flags = options.background.map(|floor| {
        [
            "--background".into(),
            format!("--background-floor={floor}").into(),
        ]
    });
    flags.into_iter().flatten()
}

/// Removes the cgroup of a child that has ended. Whether it was ended for want of memory.
pub(super) fn release_memory(options: &Options, group: String) -> bool {
    let Some(bytes) = options.memory else {
        return false;
    };
    let host_root = options.roots.host_root.as_deref();
    let limit = MemoryLimit { bytes, group };
    // A save that was asked to hurry has had a group on either side.
    let idle = options.background.is_some() && limit.remove_cgroup(host_root, true);
    limit.remove_cgroup(host_root, false) || idle
}

/// Removes the cgroup of a save that has ended. Returns whether the save ran out of memory; where no cgroup limited it,
/// the child's own message about a failed allocation tells.
pub(super) fn exceeded_memory(options: &Options, job: JobId, words: &str) -> bool {
    release_memory(options, save_group(job))
        || (words.starts_with("memory allocation of ") && words.ends_with(" bytes failed"))
}

/// Returns the volumes that may be saved with a session of this owner.
pub(super) fn allowed_volumes(options: &Options, owner: &str) -> impl Iterator<Item = Pattern> {
    let volumes = options.volumes.iter();
    volumes.filter_map(move |pattern| pattern.of(owner))
}

/// Returns the flags that make a child use the same roots.
pub(super) fn roots_flags(roots: &Roots) -> Vec<OsString> {
    let usual = Roots::default();
    let mut flags = Vec::new();
    let mut add =
        |name: &str, path: &Path| flags.extend([name.into(), path.as_os_str().to_owned()]);
    if let Some(root) = &roots.host_root {
        add("--host-root", root);
    }
    if roots.containerd != usual.containerd
        && let Some(containerd) = roots.containerd.first()
    {
        add("--containerd-root", &containerd.root);
        add("--containerd-state", &containerd.state);
    }
    if roots.docker != usual.docker
        && let Some(docker) = roots.docker.first()
    {
        add("--docker-root", docker);
    }
    if roots.storage != usual.storage
        && let Some(storage) = roots.storage.first()
    {
        add("--storage-root", &storage.root);
        add("--storage-runroot", &storage.runroot);
    }
    flags
}

/// Returns the read end of a pipe that contains the credentials.
fn credentials(file: &Path) -> io::Result<OwnedFd> {
    // Allocated at full size at once, because growing would leave copies in memory.
    let mut text = Zeroizing::new(Vec::with_capacity(MAX_CREDS as usize + 1));
    File::open(file)?
        .take(MAX_CREDS + 1)
        .read_to_end(&mut text)?;
    if text.len() as u64 > MAX_CREDS {
        return Err(io::Error::other(format!("larger than {MAX_CREDS} bytes")));
    }
    let (read, mut write) = io::pipe()?;
    write.write_all(&text)?;
    Ok(read.into())
}

impl Child {
    /// Starts a child.
    pub(super) fn spawn(options: &Options, job: JobId, arguments: &[OsString]) -> io::Result<Self> {
        let input = match &options.registry.creds_file {
            None => Stdio::null(),
            Some(file) => {
                let read = credentials(file).map_err(|error| {
                    let told = format!("the credentials in {}: {error}", file.display());
                    io::Error::new(error.kind(), told)
                })?;
                Stdio::from(read)
            }
        };
        let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
        ours.set_nonblocking(true)?;
        let kept = INHERITED_VARIABLES
            .iter()
            .filter_map(|name| Some((name, std::env::var_os(name)?)));
        let mut process = {
            let mut command = Command::new(&options.program);
            command
                .args(arguments)
                .env_clear()
                .envs(kept)
                .current_dir("/")
                .process_group(0)
                .stdin(input)
                .stdout(Stdio::from(OwnedFd::from(theirs)))
                .stderr(Stdio::piped())
                .kill_on_drop(true);
            // The command owns the child's end of the socket and is dropped here; otherwise the end of the child would
            // go unnoticed.
            command.spawn()?
        };
        let pid = process
            .id()
            .ok_or_else(|| io::Error::other("it has no process number"))?;
        let (events, gate) = UnixStream::from_std(ours)?.into_split();
        let (tell, told) = mpsc::unbounded_channel();
        tokio::spawn(read_events(events, tell));
        let stderr = process.stderr.take();
        Ok(Self {
            pid_start: process_start(pid).unwrap_or(0),
            process,
            pid,
            gate: Some(gate),
            events: told,
            stderr: tokio::spawn(async move {
                match stderr {
                    Some(stderr) => log_lines(stderr, job).await,
                    None => String::new(),
                }
            }),
        })
    }

    /// Permits the child to set the tag.
    pub(super) async fn open_gate(&mut self) -> io::Result<()> {
        match &mut self.gate {
            Some(gate) => gate.write_all(b"y").await,
            None => Ok(()),
        }
    }

    /// Has the child leave the background for good.
    pub(super) async fn hurry(&mut self) -> io::Result<()> {
        match &mut self.gate {
            Some(gate) => gate.write_all(&[HURRY]).await,
            None => Ok(()),
        }
    }

    /// Stops the child with SIGTERM, and its process group with SIGKILL if it does not end. Fails with
    /// [`io::ErrorKind::TimedOut`] if it cannot be ended; it is reaped in the background once it is.
    pub(super) async fn stop(&mut self) -> io::Result<ExitStatus> {
        self.gate = None;
        self.signal(Signal::TERM);
        if let Ok(ended) = tokio::time::timeout(GRACE, self.process.wait()).await {
            return ended;
        }
        self.signal(Signal::KILL);
        match tokio::time::timeout(REAP_TIMEOUT, self.process.wait()).await {
            Ok(ended) => ended,
            Err(_) => Err(io::ErrorKind::TimedOut.into()),
        }
    }

    fn signal(&self, signal: Signal) {
        // The process has not been reaped, so its PID cannot have been reused.
        if self.process.id().is_some() {
            signal_group(self.pid, signal);
        }
    }

    /// Returns the last line of stderr, for messages. The child must have ended.
    pub(super) async fn last_stderr_line(self) -> String {
        let Self { stderr, .. } = self;
        // A grandchild that keeps stderr open must not block the agent.
        match tokio::time::timeout(Duration::from_secs(2), stderr).await {
            Ok(Ok(words)) => words,
            _ => String::new(),
        }
    }
}

/// Ends a process that a dead agent left running. Returns when it is gone or after [`GRACE`].
pub(super) async fn end_leftover(pid: u32, pid_start: u64) {
    let until = Instant::now() + GRACE;
    while process_start(pid) == Some(pid_start) && Instant::now() < until {
        signal_group(pid, Signal::KILL);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Sends `signal` to the process group. A group that has ended is not an error.
fn signal_group(group: u32, signal: Signal) {
    if let Some(group) = Pid::from_raw(group as i32) {
        let _ = kill_process_group(group, signal);
    }
}

/// Calls `line` with each line, without its newline. Lines longer than `longest` are skipped.
async fn read_lines(mut from: impl AsyncRead + Unpin, longest: usize, mut line: impl FnMut(&[u8])) {
    let (mut rest, mut skipping) = (Vec::new(), false);
    let mut piece = vec![0; 64 << 10];
    loop {
        let n = match from.read(&mut piece).await {
            Ok(0) => break,
            Ok(n) => n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(_) => break,
        };
        for part in piece[..n].split_inclusive(|&b| b == b'\n') {
            let (text, ends) = match part.strip_suffix(b"\n") {
                Some(text) => (text, true),
                None => (part, false),
            };
            skipping |= rest.len() + text.len() > longest;
            if !skipping {
                rest.extend_from_slice(text);
            }
            if ends {
                if !skipping {
                    line(&rest);
                }
                rest.clear();
                skipping = false;
            }
        }
    }
    if !rest.is_empty() && !skipping {
        line(&rest);
    }
}

async fn read_events(from: impl AsyncRead + Unpin, tell: mpsc::UnboundedSender<Event>) {
    let (mut last, mut warnings) = (None::<Instant>, 0);
    read_lines(from, MAX_LINE, |line| {
        // Events of other versions are ignored.
        let Ok(event) = serde_json::from_slice::<Event>(line) else {
            return;
        };
        match &event {
            // Their sum is in the other events.
            Event::BaseProgress { .. } => return,
            Event::Progress {
                bytes_done,
                bytes_total,
                base_done,
                base_total,
                ..
            } => {
                let frequent = bytes_done < bytes_total || base_done < base_total;
                if frequent && last.is_some_and(|last| last.elapsed() < PROGRESS_EVERY) {
                    return;
                }
                last = Some(Instant::now());
            }
            Event::Warning { .. } => {
                warnings += 1;
                if warnings > MAX_WARNINGS {
                    return;
                }
            }
            _ => {}
        }
        // If the receiver is gone, the events are still read, so that the child does not block.
        let _ = tell.send(event);
    })
    .await;
}

/// Logs the stderr of a child and returns its last line.
async fn log_lines(from: impl AsyncRead + Unpin, job: JobId) -> String {
    let (mut logged, mut last) = (0, String::new());
    read_lines(from, MAX_LINE, |line| {
        let text = escape::limited(&String::from_utf8_lossy(line), MAX_LOGGED_LINE);
        if text.trim().is_empty() {
            return;
        }
        if logged < MAX_LOGGED {
            tracing::info!(job.id = %job, job.stderr = text, "the child says");
        }
        logged += 1;
        last = text;
    })
    .await;
    if logged > MAX_LOGGED {
        tracing::info!(job.id = %job, job.stderr_lines = logged, "the child said more than is logged");
    }
    last
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::service::agent::OwnerRule;
    use crate::service::agent::spool::tests::order;

    type Outcome = Result<(), Box<dyn std::error::Error>>;

    #[test]
    fn what_users_write_is_never_a_flag_of_its_own() -> Outcome {
        let dir = tempfile::tempdir()?;
        let spool = Spool::open(dir.path())?;
        let mut options = Options::new(OwnerRule::Fixed("alice".to_owned()));
        options.registry.creds_file = Some("/run/secrets/robot".into());
        options.roots.host_root = Some("/host".into());
        options.registry.vendor = Some("Example University".to_owned());
        options.flags = vec!["--max-size=500G".to_owned()];
        let mut order = order();
        order.replaces = Replaces::Nothing;
        order.message = Some("--full\n-x".to_owned());
        order.options.labels = [("--creds".to_owned(), "a:b=c".to_owned())].into();
        order.options.exclude = vec!["-rf".to_owned(), "--".to_owned()];
        let in_background = |ended| {
            let all = arguments(&options, &spool, &order, 3, &[], ended);
            all.iter().any(|word| word == "--background")
        };
        assert!(in_background(false) && !in_background(true));
        let all = arguments(&options, &spool, &order, 3, &["jupyter", "gpu"], false);
        let all: Vec<&str> = all.iter().filter_map(|word| word.to_str()).collect();
        let metadata = format!(
            "--metadata-file={}/running/{}.metadata",
            dir.path().display(),
            order.job
        );
        let mark = format!(
            "--freeze-mark={}/running/{}.frozen",
            dir.path().display(),
            order.job
        );
        assert_eq!(
            all,
            [
                "--host-root",
                "/host",
                "commit",
                "--progress=json",
                "--gate-fd=1",
                &metadata,
                &mark,
                "--state-dir=/var/lib/upperdeck",
                "--jobs=3",
                "--background",
                "--background-floor=2",
                "--memory-limit=3221225472",
                &format!("--memory-group=save-{}", order.job),
                "--creds-fd=0",
                "--delete-replaced",
                "--author=alice",
                "--annotation=org.opencontainers.image.title=x:1",
                "--annotation=org.opencontainers.image.vendor=Example University",
                "--harbor-label=jupyter",
                "--harbor-label=gpu",
                &format!("--annotation=upperdeck.save={}", order.job),
                "--max-size=500G",
                "--no-replace",
                "--message=--full\n-x",
                "--label=--creds=a:b=c",
                "--exclude=-rf",
                "--exclude=--",
                "--",
                &order.session,
                &order.destination,
            ]
        );
        Ok(())
    }

    #[tokio::test]
    async fn lines_are_whole_and_bounded() {
        let mut seen = Vec::new();
        let text = b"one\n\ntoo long a line\ntwo\nlast";
        read_lines(&text[..], 5, |line| {
            seen.push(String::from_utf8_lossy(line).into_owned());
        })
        .await;
        assert_eq!(seen, ["one", "", "two", "last"]);
    }

    #[tokio::test]
    async fn progress_is_thinned_and_the_last_of_a_count_is_told() {
        let line = |done: u64| {
            format!(
                "{{\"version\":1,\"time\":\"x\",\"event\":\"progress\",\"bytes_done\":{done},\"bytes_total\":9,\
                 \"bytes_sent\":0,\"entries_total\":1}}\n"
            )
        };
        let mut text: String = (1..=9).map(line).collect();
        text += "no json\n{\"event\":\"of another version\"}\n{\"event\":\"ready\"}\n";
        let (tell, mut told) = mpsc::unbounded_channel();
        read_events(text.as_bytes(), tell).await;
        let mut done = Vec::new();
        let mut ready = false;
        while let Some(event) = told.recv().await {
            match event {
                Event::Progress { bytes_done, .. } => done.push(bytes_done),
                Event::Ready { .. } => ready = true,
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(done, [1, 9]);
        assert!(ready);
    }
}
