//! A node for tests of the agent: a container with an overlay root in its own cgroup, the files that Docker would have
//! written about it, and an in-process queue.

use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use bytes::Bytes;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;
use tempfile::TempDir;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use upperdeck::common::digest::Digest;
use upperdeck::node::container::{ContainerdRoot, Roots};
use upperdeck::service::agent::{self, Options, OwnerRule};
use upperdeck::service::job::{
    Answer, JobId, NextStep, Order, Outcome, Report, Update, Verdict, now_ms,
};
use upperdeck::service::queue::{Limits, Local, Queue};
use upperdeck::store::layout::Directory;

use crate::support::{Need, ignored};

pub const UPPERDECK: &str = env!("CARGO_BIN_EXE_upperdeck");
pub const NODE: &str = "node-1";
/// Longer than anything takes, even on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// When the container was started, according to its runtime.
pub const STARTED: &str = "2026-11-24T10:00:00Z";

/// The node. Dropping it ends its processes.
pub struct Node {
    pub id: String,
    pub pid: u32,
    pub cgroup: PathBuf,
    pub roots: Roots,
    monitor: Child,
    dir: TempDir,
}

/// Waits until `look` returns something. Fails with `what` if that takes too long.
pub async fn wait<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> Result<T> {
    let until = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look() {
            return Ok(found);
        }
        ensure!(Instant::now() < until, "{what}: not within {PATIENCE:?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn run(program: &str, args: &[&str]) -> Result<()> {
    let done = Command::new(program).args(args).output()?;
    let told = String::from_utf8_lossy(&done.stderr);
    ensure!(done.status.success(), "{program} {args:?}: {told}");
    Ok(())
}

/// Creates a cgroup that can be frozen.
fn cgroup() -> Result<PathBuf> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let name = format!("upperdeck-agent-test-{}-{number}", std::process::id());
    for place in [
        "/sys/fs/cgroup/freezer",
        "/sys/fs/cgroup/unified",
        "/sys/fs/cgroup",
    ] {
        let dir = Path::new(place).join(&name);
        if Path::new(place).join("cgroup.procs").exists() && fs::create_dir(&dir).is_ok() {
            return Ok(dir);
        }
    }
    bail!("no cgroup can be made")
}

/// Creates an image of one layer in a layout and its unpacked tree: busybox and writable directories.
fn base(layout: &Path, lower: &Path) -> Result<()> {
    let tree = tempfile::tempdir()?;
    for dir in ["bin", "proc", "home", "tmp"] {
        fs::create_dir(tree.path().join(dir))?;
    }
    let busybox = crate::support::find_program("busybox").context("busybox")?;
    fs::copy(busybox, tree.path().join("bin/busybox"))?;
    let archive = tree.path().join("base.tar");
    let (root, file) = (
        tree.path().display().to_string(),
        archive.display().to_string(),
    );
    run(
        "tar",
        &[
            "-C",
            &root,
            "--owner=0",
            "--group=0",
            "-cf",
            &file,
            "bin",
            "proc",
            "home",
            "tmp",
        ],
    )?;
    fs::create_dir(lower)?;
    run("tar", &["-C", &lower.display().to_string(), "-xpf", &file])?;
    let tar = Bytes::from(fs::read(&archive)?);
    let destination = Directory::new(layout);
    let digest = Digest::of(&tar);
    destination.put_blob(&tar, &digest)?;
    let config = json!({
        "architecture": if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" },
        "os": "linux",
        "config": {},
        "rootfs": {"type": "layers", "diff_ids": [digest]},
    });
    let config = Bytes::from(config.to_string());
    let config_digest = Digest::of(&config);
    destination.put_blob(&config, &config_digest)?;
    let manifest_type = "application/vnd.oci.image.manifest.v1+json";
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": manifest_type,
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": config_digest, "size": config.len()},
        "layers": [{"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": digest, "size": tar.len()}],
    });
    destination.put_manifest(&Bytes::from(manifest.to_string()), manifest_type, "base")?;
    Ok(())
}

/// Returns what Docker records of the container.
fn config(id: &str, state: &serde_json::Value) -> String {
    let config = json!({
        "ID": id, "Name": "/web", "State": state, "Driver": "overlay2", "Image": Digest::of(b"unknown"),
        "Config": {"Image": "jupyter/base:1", "Env": ["JUPYTERHUB_USER=alice"]},
    });
    config.to_string()
}

impl Node {
    /// Kills the container, and after that records how it ended, as Docker does.
    pub async fn die(&self, state: &serde_json::Value) -> Result<()> {
        kill(Pid::from_raw(self.pid as i32), Signal::SIGKILL)?;
        wait("the end", || (!alive(self.pid)).then_some(())).await?;
        let path = self
            .path("docker/containers")
            .join(&self.id)
            .join("config.v2.json");
        Ok(fs::write(path, config(&self.id, state))?)
    }

    /// Creates a node; `None` if this machine does not support it.
    pub async fn new() -> Result<Option<Self>> {
        Self::start("", "").await
    }

    /// Creates a node with the directory `volume` of [`Self::path`] mounted at `/srv/data`. `chroot` contains flags of
    /// chroot(1) for the user of the first process.
    pub async fn with_volume(chroot: &str) -> Result<Option<Self>> {
        Self::start(
            "mkdir -p \"$3/srv/data\" && mount --bind \"$4\" \"$3/srv/data\" &&",
            chroot,
        )
        .await
    }

    async fn start(mounts: &str, chroot: &str) -> Result<Option<Self>> {
        let programs = ["busybox", "unshare", "tar", "chroot"].map(Need::Program);
        if ignored(&[&[Need::Root], &programs[..]].concat()) {
            return Ok(None);
        }
        let dir = tempfile::tempdir()?;
        let at = |name: &str| dir.path().join(name);
        let id = format!(
            "{:064x}",
            u128::from_str_radix(&JobId::new().to_string().replace('-', ""), 16)?
        );
        let docker = at("docker");
        let overlay = docker.join("overlay2/mounted");
        for name in ["diff", "work", "merged"] {
            fs::create_dir_all(overlay.join(name))?;
        }
        let lower = docker.join("overlay2/lower/diff");
        fs::create_dir_all(docker.join("overlay2/lower"))?;
        base(&at("base"), &lower)?;
        let cgroup = cgroup()?;
        fs::create_dir(at("volume"))?;
        // As a shim does it: the root is mounted in a namespace in which the container's parent stays, and the container
        // is in one of its own.
        let container = format!(
            "mount -t proc proc \"$3/proc\" && {mounts} exec chroot {chroot} \"$3\" /bin/busybox sleep 100000"
        );
        let monitor = "mount -t overlay overlay -o \"lowerdir=$1,upperdir=$2/diff,workdir=$2/work\" \"$3\" || exit; \
                       unshare --mount --propagation private sh -c \"$5\" sh \"$1\" \"$2\" \"$3\" \"$4\" >&2 & echo $!; wait";
        let mut monitor = Command::new("unshare")
            .args([
                "--mount",
                "--propagation",
                "private",
                "sh",
                "-c",
                monitor,
                "sh",
            ])
            .args([&lower, &overlay, &overlay.join("merged"), &at("volume")])
            .arg(container)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()?;
        let mut line = String::new();
        let stdout = monitor.stdout.take().context("stdout")?;
        io::BufRead::read_line(&mut io::BufReader::new(stdout), &mut line)?;
        let pid: u32 = line.trim().parse().context("the container's process")?;
        fs::write(cgroup.join("cgroup.procs"), pid.to_string())?;
        let write = |path: PathBuf, text: String| -> io::Result<()> {
            fs::create_dir_all(path.parent().unwrap_or(Path::new("/")))?;
            fs::write(path, text)
        };
        let directory = docker.join("containers").join(&id);
        write(
            directory.join("config.v2.json"),
            config(&id, &json!({"Pid": pid, "StartedAt": STARTED})),
        )?;
        write(directory.join("hostconfig.json"), "{}".to_owned())?;
        // Not started from an image of this Docker: its only lower is the layer that Docker itself makes for each container.
        for (name, layer) in [("mount-id", "mounted"), ("init-id", "lower")] {
            write(
                docker.join(format!("image/overlay2/layerdb/mounts/{id}/{name}")),
                layer.to_owned(),
            )?;
        }
        let spec = json!({
            "process": {"args": ["start-notebook.py"], "env": ["JUPYTERHUB_USER=alice"]},
            "root": {"path": "rootfs"},
        });
        let bundle = at("containerd")
            .join("io.containerd.runtime.v2.task/moby")
            .join(&id);
        write(bundle.join("config.json"), spec.to_string())?;
        let node = Self {
            id,
            pid,
            cgroup,
            roots: Roots {
                containerd: vec![ContainerdRoot {
                    state: at("containerd"),
                    root: at("containerd-root"),
                }],
                docker: vec![docker],
                storage: Vec::new(),
                ..Roots::default()
            },
            monitor,
            dir,
        };
        wait("the container is up", || {
            let command = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
            command.starts_with(b"/bin/busybox").then_some(())
        })
        .await?;
        node.work("home/notes", b"something\n")?;
        Ok(Some(node))
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Returns where the container's root is mounted, in its own mount namespace.
    pub fn merged(&self) -> PathBuf {
        self.path("docker/overlay2/mounted/merged")
    }

    /// Writes a file in the container.
    pub fn work(&self, path: &str, content: &[u8]) -> io::Result<()> {
        fs::write(format!("/proc/{}/root/{path}", self.pid), content)
    }

    /// Writes so much incompressible data that a full pause is long enough to be observed.
    pub fn work_a_lot(&self) -> Result<()> {
        let mut bytes = vec![0; 48 << 20];
        io::Read::read_exact(&mut fs::File::open("/dev/urandom")?, &mut bytes)?;
        Ok(self.work("home/big", &bytes)?)
    }

    pub fn frozen(&self) -> bool {
        if let Ok(state) = fs::read_to_string(self.cgroup.join("freezer.state")) {
            return state.trim() != "THAWED";
        }
        let events = fs::read_to_string(self.cgroup.join("cgroup.events"));
        events.is_ok_and(|events| events.lines().any(|line| line == "frozen 1"))
    }

    /// Freezes or thaws the container, as an administrator would.
    pub fn pause(&self, pause: bool) -> io::Result<()> {
        let v1 = self.cgroup.join("freezer.state");
        if v1.exists() {
            return fs::write(v1, if pause { "FROZEN" } else { "THAWED" });
        }
        fs::write(
            self.cgroup.join("cgroup.freeze"),
            if pause { "1" } else { "0" },
        )
    }

    pub fn options(&self) -> Options {
        let rule = OwnerRule::Env("JUPYTERHUB_USER".to_owned());
        let images = format!("oci:{}", self.path("images").display());
        Options {
            node: NODE.to_owned(),
            roots: self.roots.clone(),
            program: UPPERDECK.into(),
            allowed: images.parse().into_iter().collect(),
            state_dir: Some(self.path("state")),
            spool_dir: self.path("spool"),
            background: None,
            // The base is not in this Docker's store.
            flags: vec![format!("--base=oci:{}:base", self.path("base").display())],
            ..Options::new(rule)
        }
    }

    pub fn order(&self) -> Order {
        Order {
            job: JobId::new(),
            node: NODE.to_owned(),
            session: self.id.clone(),
            owner: "alice".to_owned(),
            destination: format!("oci:{}:monday", self.path("images/alice/x").display()),
            message: Some("--with pandas".to_owned()),
            attempt: 1,
            issued_ms: now_ms(),
            expires_ms: i64::MAX,
            timeout_s: 600,
            ..Order::default()
        }
    }

    /// Returns whether the tag of the orders exists.
    pub fn tagged(&self) -> bool {
        let index = fs::read_to_string(self.path("images/alice/x/index.json"));
        index.is_ok_and(|index| index.contains("monday"))
    }

    /// Creates a program that runs `lines` instead of saving.
    pub fn program(&self, lines: &str) -> Result<PathBuf> {
        let path = self.path(&format!("program-{}", JobId::new()));
        // By a process of its own: a child that another test forks meanwhile would hold the descriptor, and what is open
        // for writing cannot be started.
        let mut cat = Command::new("sh")
            .args(["-c", "cat > \"$1\" && chmod 755 \"$1\"", "sh"])
            .arg(&path)
            .stdin(Stdio::piped())
            .spawn()?;
        let mut input = cat.stdin.take().context("stdin")?;
        input.write_all(format!("#!/bin/sh\n{lines}\n").as_bytes())?;
        drop(input);
        ensure!(cat.wait()?.success());
        Ok(path)
    }

    /// Returns the child process of a running job, according to the agent's spool.
    pub fn child(&self, job: JobId) -> Option<u32> {
        let note = fs::read(self.path(&format!("spool/running/{job}.note"))).ok()?;
        let note: serde_json::Value = serde_json::from_slice(&note).ok()?;
        u32::try_from(note["pid"].as_u64()?).ok()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = self.pause(false);
        let _ = kill(Pid::from_raw(self.pid as i32), Signal::SIGKILL);
        // It waits for the container.
        let _ = self.monitor.wait();
        for _ in 0..200 {
            if fs::remove_dir(&self.cgroup).is_ok() {
                break;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

pub fn alive(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"));
    stat.is_ok_and(|stat| !stat.contains(") Z "))
}

/// A queue with its reports, and an agent that works for it.
pub struct Service {
    pub queue: Queue,
    pub reports: Arc<Mutex<Vec<Report>>>,
    /// The manager's answers other than "wanted"; `None` means no answer.
    words: AnswerScript,
    cancel: CancellationToken,
    agent: JoinHandle<Result<(), agent::Error>>,
    manager: JoinHandle<()>,
    answers: JoinHandle<()>,
}

pub type AnswerScript = Arc<Mutex<Vec<(NextStep, Option<Verdict>)>>>;

/// Answers questions as a manager would for which all saves are wanted, except for `words`.
async fn answer(queue: Queue, words: AnswerScript) {
    loop {
        let Ok(questions) = queue.questions(Duration::from_millis(200)).await else {
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        for question in questions {
            let verdict = {
                let words = words.lock().unwrap_or_else(PoisonError::into_inner);
                let said = words.iter().find(|(before, _)| *before == question.before);
                said.map_or(Some(Verdict::Wanted), |(_, verdict)| *verdict)
            };
            if let Some(verdict) = verdict {
                let _ = queue.answer(&Answer { question, verdict }).await;
            }
        }
    }
}

pub fn local() -> Queue {
    Queue::Local(Local::new(Limits {
        user: 0,
        node: 0,
        registry: 0,
    }))
}

impl Service {
    pub fn start(options: Options, queue: Queue) -> Self {
        Self::over(options, queue.clone(), queue)
    }

    /// Starts the service with separate queue clients for the agent and the manager.
    pub fn over(options: Options, agents: Queue, queue: Queue) -> Self {
        let reports: Arc<Mutex<Vec<Report>>> = Arc::default();
        let words = AnswerScript::default();
        let answers = tokio::spawn(answer(queue.clone(), Arc::clone(&words)));
        let manager = {
            let (queue, reports) = (queue.clone(), Arc::clone(&reports));
            tokio::spawn(async move {
                loop {
                    let Ok(delivered) = queue
                        .reports("manager", 100, Duration::from_millis(200))
                        .await
                    else {
                        continue;
                    };
                    let entries: Vec<String> = delivered.iter().map(|d| d.entry.clone()).collect();
                    let new = delivered.into_iter().map(|delivered| delivered.report);
                    reports
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .extend(new);
                    let _ = queue.acknowledge(&entries).await;
                }
            })
        };
        let cancel = CancellationToken::new();
        let agent = tokio::spawn(agent::run(options, agents, cancel.clone()));
        Self {
            queue,
            reports,
            words,
            cancel,
            agent,
            manager,
            answers,
        }
    }

    /// Sets the manager's answer from now on; `None` means no answer.
    pub fn set_answer(&self, before: NextStep, verdict: Option<Verdict>) {
        let mut words = self.words.lock().unwrap_or_else(PoisonError::into_inner);
        words.retain(|(known, _)| *known != before);
        words.push((before, verdict));
    }

    pub fn reports_of(&self, job: JobId) -> Vec<Report> {
        let reports = self.reports.lock().unwrap_or_else(PoisonError::into_inner);
        reports
            .iter()
            .filter(|report| report.job == job)
            .cloned()
            .collect()
    }

    /// Waits for the final report of a job.
    pub async fn final_update(&self, job: JobId) -> Result<Update> {
        wait("the job's last word", || {
            let mut said = self.reports_of(job).into_iter().map(|report| report.update);
            said.find(|said| matches!(said, Update::Ended { .. } | Update::GivenBack { .. }))
        })
        .await
        .with_context(|| format!("said so far: {:#?}", self.reports_of(job)))
    }

    pub async fn outcome(&self, job: JobId) -> Result<Outcome> {
        match self.final_update(job).await? {
            Update::Ended { outcome } => Ok(outcome),
            other => bail!("{other:?}"),
        }
    }

    /// Ends the agent and waits until it has ended.
    pub async fn end(self) -> Result<Vec<Report>> {
        self.cancel.cancel();
        let ended = tokio::time::timeout(PATIENCE, self.agent).await;
        ended.context("the agent does not end")???;
        // The manager takes what was said last.
        let reports = Arc::clone(&self.reports);
        let depth = || async { self.queue.depth().await.map(|depth| depth.reports) };
        let until = Instant::now() + PATIENCE;
        while depth().await? > 0 {
            ensure!(Instant::now() < until, "reports are left");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        self.manager.abort();
        self.answers.abort();
        Ok(reports
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone())
    }
}
