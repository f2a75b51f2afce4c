//! `upperdeck demo`: creates a container, changes files in it, saves it, unpacks the image and compares, using only
//! this program.
//!
//! The container is real (namespaces and an overlay mount), and the save is that of `upperdeck commit`. It runs as
//! root, or in a user namespace if the kernel permits.

mod base;
mod inside;

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, BufRead as _, BufReader, Write};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::Deserialize;
use tokio_util::sync::CancellationToken;

use crate::common::cancel::Cancelled;
use crate::common::digest::Digest;
use crate::common::failure::FailureKind;
use crate::image::manifest::platform::Platform;
use crate::image::verify::directory::DirectoryError;
use crate::image::verify::layers::Layers;
use crate::image::verify::tree::{Difference, Ignore, Tree, compare};
use crate::layer::scan::{Caps, Sample};
use crate::node::container;
use crate::save::event::{Event, Observer};
use crate::save::{self, Compression, Pause, Rules, Saved};
use crate::store::layout::{self, Reader};
use crate::store::registry::Access;

pub use inside::entry;

/// What the container does before the first save.
const FIRST_CHANGES: &str = "installs 20 packages, writes programs and 12 MB of results, links, renames, deletes,\n\
    \x20    replaces a directory; and leaves a key in ~/.ssh, a cache, /tmp and a volume";
/// What the container does before the second save.
const SECOND_CHANGES: &str =
    "edits a file, deletes the results, turns a link into a directory, renames 300 files' parent";

/// Time given to the container's process to end on request; long enough for a loaded machine.
const STOP_TIMEOUT: Duration = Duration::from_secs(3);

/// An error of the demonstration.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// A container can be created neither as root nor in a user namespace.
    #[error("a container cannot be created on this machine: {0}")]
    NoContainer(String),
    /// The container failed.
    #[error("the demonstration's container: {0}")]
    Container(String),
    /// The save failed.
    #[error(transparent)]
    Commit(#[from] save::Error),
    /// The image cannot be written or read.
    #[error(transparent)]
    Layout(#[from] layout::Error),
    /// The container's tree cannot be read.
    #[error("what the container sees: {0}")]
    Directory(#[from] DirectoryError),
    /// A layer or the manifest of the image cannot be read.
    #[error("the saved image: {0}")]
    Image(String),
    /// The image differs from what the container saw, which is a bug.
    #[error("the image differs from the container's files in {} places: {}", .0.len(), list(.0))]
    Differs(Vec<Difference>),
    /// Cancelled by SIGINT or SIGTERM.
    #[error(transparent)]
    Cancelled(#[from] Cancelled),
    /// Another operation failed.
    #[error("{doing}: {source}")]
    Io {
        /// The operation.
        doing: &'static str,
        /// The cause.
        source: io::Error,
    },
}

impl Error {
    fn io(doing: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { doing, source }
    }

    /// Returns the kind of the error, unless a nested [`save::Error`] determines it.
    pub(crate) fn kind(&self) -> FailureKind {
        match self {
            Self::NoContainer(_) => FailureKind::NotPermitted,
            Self::Cancelled(_) => FailureKind::Cancelled,
            _ => FailureKind::Final,
        }
    }
}

fn list(differences: &[Difference]) -> String {
    const SHOWN: usize = 5;
    let shown: Vec<String> = differences
        .iter()
        .take(SHOWN)
        .map(ToString::to_string)
        .collect();
    shown.join("; ")
}

/// Runs the demonstration and describes it on `out`. Everything created is removed afterwards, even after an error.
pub(crate) fn run(out: &mut dyn Write, cancel: &CancellationToken) -> Result<(), Error> {
    let begun = Instant::now();
    let mut story = StepPrinter {
        out,
        step: 0,
        begun,
    };
    let told = |error| Error::Io {
        doing: "writing to stdout",
        source: error,
    };

    story
        .step("A base image of two layers, and a container on it")
        .map_err(told)?;
    let mut stage = Environment::open()?;
    let kind = if stage.rootless {
        "user, mount and PID namespaces"
    } else {
        "mount and PID namespaces"
    };
    story
        .line(&format!(
            "process {} in its own {kind}, its root an overlay",
            stage.container.pid
        ))
        .map_err(told)?;

    for (round, (work, what)) in [("first", FIRST_CHANGES), ("second", SECOND_CHANGES)]
        .into_iter()
        .enumerate()
    {
        Cancelled::check(cancel)?;
        story
            .step(if round == 0 {
                "Packages are installed and files changed in it"
            } else {
                "More changes"
            })
            .map_err(told)?;
        stage.container.run_command(work)?;
        story.line(what).map_err(told)?;

        Cancelled::check(cancel)?;
        let destination = format!("oci:{}:{work}", stage.layout().display());
        let base = format!("oci:{}:base", stage.layout().display());
        story.step("Save it while it runs").map_err(told)?;
        story
            .line(&format!(
                "upperdeck commit --base {base} pid:{} {destination}",
                stage.container.pid
            ))
            .map_err(told)?;
        let (saved, warnings) = save(&stage, destination, base, cancel)?;
        for line in figures(&saved, &warnings) {
            story.line(&line).map_err(told)?;
        }

        Cancelled::check(cancel)?;
        story
            .step("Unpack the image and compare it with what the container sees")
            .map_err(told)?;
        let paths = check(&stage, &saved)?;
        story
            .line(&format!("{paths} paths: types, modes, owners, sizes, times, links, attributes, contents: no difference"))
            .map_err(told)?;
    }
    stage.close()?;
    story.end().map_err(told)
}

/// Prints the steps.
struct StepPrinter<'a> {
    out: &'a mut dyn Write,
    step: usize,
    begun: Instant,
}

impl StepPrinter<'_> {
    fn step(&mut self, title: &str) -> io::Result<()> {
        self.step += 1;
        writeln!(
            self.out,
            "{:>6.2} s  {}. {title}",
            self.begun.elapsed().as_secs_f64(),
            self.step
        )?;
        self.out.flush()
    }

    fn line(&mut self, text: &str) -> io::Result<()> {
        writeln!(
            self.out,
            "             {}",
            text.replace('\n', "\n        ")
        )?;
        self.out.flush()
    }

    fn end(&mut self) -> io::Result<()> {
        let seconds = self.begun.elapsed().as_secs_f64();
        writeln!(
            self.out,
            "{seconds:>6.2} s  Done: two saves, both exact. The container and all files are gone again."
        )?;
        self.out.flush()
    }
}

/// The temporary directory and the container.
struct Environment {
    container: DemoContainer,
    rootless: bool,
    cgroup: Option<Cgroup>,
    // Last, so that it is removed after the container has ended.
    dir: TemporaryDirectory,
}

impl Environment {
    /// Starts the container as root if possible, else in a user namespace, in the first temporary directory that can
    /// hold an overlay.
    fn open() -> Result<Self, Error> {
        // Root of a user namespace may not use `trusted.*`, where an overlay keeps its attributes.
        let everybody = fs::read_to_string("/proc/self/uid_map").unwrap_or_default();
        let root = rustix::process::geteuid().is_root()
            && everybody
                .split_ascii_whitespace()
                .eq(["0", "0", "4294967295"]);
        let places = [std::env::temp_dir(), "/var/tmp".into(), "/dev/shm".into()];
        let mut refusals = Vec::new();
        for rootless in [false, true]
            .into_iter()
            .filter(|&rootless| root || rootless)
        {
            for place in &places {
                match Self::open_in(place, rootless) {
                    Err(Error::Container(why)) if !refusals.contains(&why) => refusals.push(why),
                    Err(Error::Container(_)) => {}
                    opened => return opened,
                }
            }
        }
        refusals.extend(userns_restrictions());
        Err(Error::NoContainer(refusals.join("; ")))
    }

    fn open_in(place: &Path, rootless: bool) -> Result<Self, Error> {
        let dir = TemporaryDirectory::new(place)?;
        let path = |name: &str| dir.path().join(name);
        base::make(
            &path("images"),
            [&path("lower1"), &path("lower2")],
            !rootless,
        )?;
        for name in ["upper", "work", "merged"] {
            fs::create_dir(path(name)).map_err(Error::io("making the overlay's directories"))?;
        }
        fs::set_permissions(path("upper"), fs::Permissions::from_mode(0o755))
            .map_err(Error::io("making the overlay's directories"))?;
        let (container, cgroup) = DemoContainer::start(dir.path(), rootless)?;
        Ok(Self {
            container,
            rootless,
            cgroup,
            dir,
        })
    }

    fn layout(&self) -> PathBuf {
        self.dir.path().join("images")
    }

    fn close(self) -> Result<(), Error> {
        let Self {
            container,
            cgroup,
            dir,
            ..
        } = self;
        drop(container);
        drop(cgroup);
        dir.remove()
    }
}

/// Returns the sysctl settings that prevent user namespaces.
fn userns_restrictions() -> Vec<String> {
    let settings = [
        ("user.max_user_namespaces", "0", "a number above 0"),
        ("user.max_mnt_namespaces", "0", "a number above 0"),
        ("user.max_pid_namespaces", "0", "a number above 0"),
        ("kernel.unprivileged_userns_clone", "0", "1"),
        ("kernel.apparmor_restrict_unprivileged_userns", "1", "0"),
    ];
    let read =
        |name: &str| fs::read_to_string(format!("/proc/sys/{}", name.replace('.', "/"))).ok();
    let mut found: Vec<String> = settings
        .into_iter()
        .filter(|(name, bad, _)| read(name).is_some_and(|value| value.trim() == *bad))
        .map(|(name, bad, good)| {
            format!("{name} is {bad}: `sysctl -w {name}` with {good}, or run as root")
        })
        .collect();
    if found.is_empty() {
        found.push("run it as root, or outside a container, or set TMPDIR to a directory on ext4, XFS or tmpfs".into());
    }
    found
}

/// A temporary directory that can be removed although the kernel's `work` directory is not readable for its owner.
struct TemporaryDirectory(Option<tempfile::TempDir>, PathBuf);

impl TemporaryDirectory {
    fn new(place: &Path) -> Result<Self, Error> {
        let dir = tempfile::Builder::new()
            .prefix("upperdeck-demo-")
            .tempdir_in(place);
        let dir = dir.map_err(Error::io("making a temporary directory"))?;
        // The kernel shows the overlay's directories with symbolic links resolved.
        let path = dir
            .path()
            .canonicalize()
            .map_err(Error::io("making a temporary directory"))?;
        Ok(Self(Some(dir), path))
    }

    fn path(&self) -> &Path {
        &self.1
    }

    fn remove(mut self) -> Result<(), Error> {
        self.make_accessible();
        self.0
            .take()
            .map_or(Ok(()), tempfile::TempDir::close)
            .map_err(Error::io("removing the temporary directory"))
    }

    fn make_accessible(&self) {
        let _ = fs::set_permissions(self.1.join("work/work"), fs::Permissions::from_mode(0o700));
    }
}

impl Drop for TemporaryDirectory {
    fn drop(&mut self) {
        self.make_accessible();
    }
}

/// A cgroup for the container, so that it can be frozen. Removed when dropped.
struct Cgroup(PathBuf);

impl Cgroup {
    /// Moves `pid` into a new cgroup. Returns `None` if that is not permitted; it requires root.
    fn for_process(pid: u32) -> Option<Self> {
        let unified = ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"].map(Path::new);
        let unified = unified
            .into_iter()
            .find(|path| path.join("cgroup.controllers").exists());
        let freezer = Some(Path::new("/sys/fs/cgroup/freezer"));
        unified.into_iter().chain(freezer).find_map(|hierarchy| {
            let path = hierarchy.join(format!("upperdeck-demo-{}", std::process::id()));
            fs::create_dir(&path).ok()?;
            let cgroup = Self(path);
            fs::write(cgroup.0.join("cgroup.procs"), pid.to_string()).ok()?;
            Some(cgroup)
        })
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let deadline = Instant::now() + STOP_TIMEOUT;
        // The last process may still be exiting.
        while fs::remove_dir(&self.0).is_err() && self.0.exists() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// The container as seen from outside. It ends when this is dropped or this process ends.
struct DemoContainer {
    maker: Child,
    commands: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
    /// PID of its first process.
    pid: u32,
}

impl DemoContainer {
    fn start(dir: &Path, rootless: bool) -> Result<(Self, Option<Cgroup>), Error> {
        let mut maker = Command::new("/proc/self/exe")
            .arg(inside::ARGUMENT)
            .arg(dir)
            .arg(if rootless { "user" } else { "root" })
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            // Ctrl-C goes only to this process, which then ends the container.
            .process_group(0)
            .spawn()
            .map_err(Error::io("starting the container"))?;
        let pipes = (maker.stdin.take(), maker.stdout.take());
        let (Some(mut commands), Some(answers)) = pipes else {
            return Err(Error::Container("its pipes are missing".to_owned()));
        };
        let cgroup = Cgroup::for_process(maker.id());
        let sent = commands.write_all(b"\n");
        let mut running = Self {
            maker,
            commands: Some(commands),
            answers: BufReader::new(answers),
            pid: 0,
        };
        sent.map_err(Error::io("starting the container"))?;
        let mut ready = false;
        // Two processes answer, in either order.
        while !ready || running.pid == 0 {
            let line = running.read_answer()?;
            match line.strip_prefix("pid ").map(str::parse) {
                Some(Ok(pid)) => running.pid = pid,
                None if line == "ready" => ready = true,
                _ => return Err(Error::Container(format!("it said {line:?}"))),
            }
        }
        Ok((running, cgroup))
    }

    fn read_answer(&mut self) -> Result<String, Error> {
        let mut line = String::new();
        let n = self
            .answers
            .read_line(&mut line)
            .map_err(Error::io("hearing from the container"))?;
        let line = line.trim_end();
        match line.strip_prefix("error ") {
            Some(why) => Err(Error::Container(why.to_owned())),
            None if n == 0 => Err(Error::Container("it ended".to_owned())),
            None => Ok(line.to_owned()),
        }
    }

    /// Sends a command to the container and waits until it is done.
    fn run_command(&mut self, work: &str) -> Result<(), Error> {
        let mut commands = self
            .commands
            .as_ref()
            .ok_or_else(|| Error::Container("it ended".to_owned()))?;
        writeln!(commands, "{work}").map_err(Error::io("talking to the container"))?;
        match self.read_answer()?.as_str() {
            "done" => Ok(()),
            other => Err(Error::Container(format!("it said {other:?}"))),
        }
    }
}

impl Drop for DemoContainer {
    fn drop(&mut self) {
        // The container's first process ends with its standard input, and all others with it.
        drop(self.commands.take());
        let deadline = Instant::now() + STOP_TIMEOUT;
        while matches!(self.maker.try_wait(), Ok(None)) {
            if Instant::now() >= deadline {
                // Kills the container as well.
                let _ = self.maker.kill();
                let _ = self.maker.wait();
                return;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

/// Collects the warnings of a save.
#[derive(Default)]
struct Warnings(Mutex<Vec<String>>);

impl Observer for Warnings {
    fn event(&self, event: Event) {
        if let Event::Warning { message, .. } = event {
            self.0
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push(message);
        }
    }
}

fn save(
    stage: &Environment,
    destination: String,
    base: String,
    cancel: &CancellationToken,
) -> Result<(Saved, Vec<String>), Error> {
    let options = save::Options {
        container: format!("pid:{}", stage.container.pid),
        attempt: container::Attempt::Current,
        destination,
        author: None,
        replaceable: None,
        delete_replaced: false,
        harbor_labels: Vec::new(),
        message: Some("saved by the demonstration".to_owned()),
        changes: Vec::new(),
        labels: Vec::new(),
        annotations: Vec::new(),
        pause: if stage.cgroup.is_some() {
            Pause::Live
        } else {
            Pause::None
        },
        max_pause: Some(save::MAX_PAUSE),
        live_limit: 32 << 20,
        state_dir: Some(stage.dir.path().join("state")),
        max_layers: 16,
        full: false,
        compression: Compression::Gzip,
        level: Compression::Gzip.default_level(),
        jobs: None,
        layer_size: None,
        rules: Rules {
            exclude: Vec::new(),
            include_credentials: false,
            include_caches: false,
            caps: Caps::default(),
        },
        volumes: Vec::new(),
        volume_rules: container::VolumeRules::default(),
        base: Some(base),
        timestamp: None,
        metadata_file: None,
        output_mode: None,
        share_blobs: None,
        digestfile: None,
        gate: None,
        freeze_mark: None,
        together: None,
        background: None,
    };
    let warnings = Arc::new(Warnings::default());
    let runtime = tokio::runtime::Runtime::new().map_err(Error::io("starting the I/O threads"))?;
    let observer: Arc<dyn Observer> = Arc::<Warnings>::clone(&warnings);
    let roots = container::Roots::default();
    let saved = runtime.block_on(save::commit(
        &options,
        roots,
        Access::default(),
        observer,
        cancel,
    ));
    // A thread that is blocked by a slow disk must not delay a cancelled save.
    runtime.shutdown_timeout(Duration::from_secs(2));
    let saved = saved?;
    let warnings = std::mem::take(&mut *warnings.0.lock().unwrap_or_else(PoisonError::into_inner));
    Ok((saved, warnings))
}

fn figures(saved: &Saved, warnings: &[String]) -> Vec<String> {
    let metadata = &saved.metadata;
    let megabytes = |bytes: u64| bytes as f64 / 1e6;
    let mut lines = vec![format!("base proven {}", metadata.base.proof)];
    if metadata.layers.is_empty() {
        lines.push(format!("nothing had changed ({:.2} s)", metadata.seconds));
    }
    let below = metadata.layers_above_base - metadata.layers.len();
    if below > 0 {
        lines.push(format!(
            "only what changed since the save before, on top of {below} {} of it",
            if below == 1 { "layer" } else { "layers" }
        ));
    }
    for layer in &metadata.layers {
        lines.push(format!(
            "a layer of {} entries, {:.1} MB, compressed {:.1} MB, in {:.2} s",
            layer.entries,
            megabytes(layer.tar_size_bytes),
            megabytes(layer.size_bytes),
            metadata.seconds
        ));
    }
    lines.push(match metadata.pause_ms {
        Some(pause) => format!("the container was frozen for {pause:.0} ms"),
        None => "the container was not frozen: a cgroup of its own takes root".to_owned(),
    });
    lines.extend(warnings.iter().cloned());
    let volumes: Vec<_> = metadata
        .volumes
        .examples()
        .iter()
        .map(|volume| volume.destination.as_str())
        .collect();
    if !volumes.is_empty() {
        lines.push(format!("not saved, being volumes: {}", volumes.join(", ")));
    }
    lines.push(saved.digest.to_string());
    lines
}

/// The required fields of a manifest.
#[derive(Deserialize)]
struct Manifest {
    layers: Vec<Blob>,
}

#[derive(Deserialize)]
struct Blob {
    digest: Digest,
    size: u64,
}

/// Unpacks the image and compares it with the container's root as seen in the container. Returns the number of paths.
fn check(stage: &Environment, saved: &Saved) -> Result<usize, Error> {
    let reader = Reader::directory(stage.layout())?;
    let tag = saved.metadata.destination.rsplit(':').next();
    let manifest = reader.manifest(tag, &Platform::host())?;
    let unreadable = |error: &dyn std::fmt::Display| Error::Image(error.to_string());
    if manifest.digest != saved.digest {
        return Err(Error::Image(format!(
            "the tag shows {}, saved was {}",
            manifest.digest, saved.digest
        )));
    }
    let manifest: Manifest = serde_json::from_slice(&manifest.bytes).map_err(|e| unreadable(&e))?;
    let mut layers = Layers::new();
    for blob in &manifest.layers {
        layers
            .apply(reader.open_blob(&blob.digest, Some(blob.size))?)
            .map_err(|e| unreadable(&e))?;
    }
    let image = layers.into_tree();

    let root = PathBuf::from(format!("/proc/{}/root/", stage.container.pid));
    let seen = Tree::from_directory(&root, true)?;
    let seen = if stage.rootless {
        let ours = (
            rustix::process::geteuid().as_raw(),
            rustix::process::getegid().as_raw(),
        );
        seen.map_owners(|uid, gid| ((uid, gid) == ours).then_some((0, 0)))
            .map_err(|(path, ..)| {
                Error::Container(format!("a file of another user: {}", path.escape_ascii()))
            })?
    } else {
        seen
    };
    let excluded = saved
        .metadata
        .report
        .excluded
        .values()
        .flat_map(Sample::examples)
        .map(|excluded| excluded.path.clone().into_bytes());
    let mounts = ["proc", "data"].map(|path| path.as_bytes().to_vec());
    let ignore = Ignore {
        // Layers store whole seconds.
        mtime_nanos: true,
        // No layer has an entry for the root directory; every unpacker creates its own.
        root: true,
        paths: excluded.chain(mounts).collect::<BTreeSet<_>>(),
        ..Ignore::default()
    };
    let differences = compare(&seen, &image, &ignore);
    if differences.is_empty() {
        Ok(seen.len())
    } else {
        Err(Error::Differs(differences))
    }
}
