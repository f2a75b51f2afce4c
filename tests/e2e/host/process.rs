//! Containers without an engine: a process whose root is an overlay with the mount options of the test.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};

use super::image::{Base, Format, base};
use super::{Scratch, command, run, wait_until};

/// The options of the overlay.
#[derive(Clone, Copy, Debug)]
pub struct Mount<'a> {
    /// More mount options, e.g. `redirect_dir=on`.
    pub options: &'a str,
    /// `trusted` or `user`: the namespace of the extended attributes in which the kernel stores its marks.
    pub prefix: &'a str,
    /// Whether the lowers are relative to a directory above them and the upper, as containerd does if the options get
    /// long.
    pub relative: bool,
    /// Number of layers in addition to the three of the small base.
    pub more_layers: usize,
    /// The host's ID of the container's root; 0 means no user namespace.
    pub shift: u32,
    /// Whether each lower is a mount of its own over an empty directory.
    pub mounted: bool,
}

impl Default for Mount<'_> {
    fn default() -> Self {
        Self {
            options: "",
            prefix: "trusted",
            relative: false,
            more_layers: 0,
            shift: 0,
            mounted: false,
        }
    }
}

/// A process on an overlay, in its own mount namespace and freezer cgroup.
#[derive(Debug)]
pub struct Process {
    child: Child,
    pub pid: i32,
    /// The merged view, in the process's mount namespace.
    pub merged: PathBuf,
    /// The image that the lowers are unpacked from.
    pub base: String,
    shift: u32,
}

impl Process {
    pub fn start(scratch: &Scratch, mount: &Mount<'_>) -> Result<Self> {
        let dir = scratch.dir("process")?;
        let layout = dir.join("layout");
        let image = format!("{}:latest", layout.display());
        run(command(
            "skopeo",
            ["copy", "--quiet", &base(Base::Small, Format::Oci)?],
        )
        .arg(format!("oci:{image}")))?;
        if mount.more_layers > 0 {
            let stack = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/e2e/host/stack.py");
            let mut add = command("python3", [stack]);
            run(add.arg(&layout).arg(mount.more_layers.to_string()))?;
        }
        // Short names, because a hundred of them must fit into the page for mount options.
        let lowers = dir.join("l");
        fs::create_dir(&lowers)?;
        let mut names = Vec::new();
        for (number, digest) in layer_digests(&layout)?.iter().enumerate() {
            let blob = layout
                .join("blobs/sha256")
                .join(digest.trim_start_matches("sha256:"));
            let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/e2e/host/lower.py");
            let mut unpack = command("python3", [script]);
            unpack
                .arg(&blob)
                .arg(lowers.join(number.to_string()))
                .args(["--prefix", mount.prefix]);
            run(unpack.args(["--shift", &mount.shift.to_string()]))?;
            if mount.mounted {
                mount_over(&lowers.join(number.to_string()))?;
            }
            names.insert(0, number.to_string());
        }
        let names: Vec<String> = names
            .iter()
            .map(|name| {
                if mount.relative {
                    format!("l/{name}")
                } else {
                    lowers.join(name).display().to_string()
                }
            })
            .collect();
        let (upper, work, merged) = (
            scratch.dir("process/upper")?,
            scratch.dir("process/work")?,
            scratch.dir("process/merged")?,
        );
        for path in [&upper, &work, &merged] {
            std::os::unix::fs::chown(path, Some(mount.shift), Some(mount.shift))?;
        }
        let separator = if mount.options.is_empty() { "" } else { "," };
        let options = format!(
            "lowerdir={},upperdir={},workdir={}{separator}{}",
            names.join(":"),
            upper.display(),
            work.display(),
            mount.options
        );
        let holder = if mount.shift > 0 {
            Some(UserNamespace::new(mount.shift)?)
        } else {
            None
        };
        let script = "set -e; read -r _; cd \"$1\"; mount -t overlay overlay -o \"$2\" \"$3\"; \
                      mount --rbind /dev \"$3/dev\"; exec chroot \"$3\" /bin/sleep 100000";
        let unshare = ["unshare", "--mount", "bash", "-c", script, "process"];
        let mut start = match &holder {
            // As the namespace's root: a process without an ID in it loses its capabilities at the next exec.
            Some(namespace) => {
                let target = namespace.0.id().to_string();
                command(
                    "nsenter",
                    [
                        "--target", &target, "--user", "--setuid", "0", "--setgid", "0",
                    ]
                    .iter()
                    .chain(&unshare),
                )
            }
            None => command("unshare", &unshare[1..]),
        };
        let mut child = start
            .arg(&dir)
            .arg(options)
            .arg(&merged)
            .stdin(Stdio::piped())
            .spawn()?;
        let pid = child.id() as i32;
        let freezer =
            Path::new("/sys/fs/cgroup/freezer").join(scratch.path().file_name().context("a name")?);
        if freezer.parent().is_some_and(Path::is_dir) {
            fs::create_dir_all(&freezer)?;
            fs::write(freezer.join("cgroup.procs"), pid.to_string())?;
        }
        // The line that the process waits for tells it that it is in its cgroup.
        child.stdin.take().context("stdin")?.write_all(b"go\n")?;
        let cmdline = Path::new("/proc").join(pid.to_string()).join("cmdline");
        wait_until("the process is on its overlay", || {
            fs::read(&cmdline).is_ok_and(|command| command.starts_with(b"/bin/sleep"))
                || !matches!(child.try_wait(), Ok(None))
        })?;
        ensure!(
            child.try_wait()?.is_none(),
            "the process could not start on its overlay: {mount:?}"
        );
        Ok(Self {
            child,
            pid,
            merged,
            base: format!("oci:{image}"),
            shift: mount.shift,
        })
    }

    /// Returns a command in its namespaces. The root is the host's unless `root` is set.
    pub fn enter(&self, root: bool) -> Command {
        let mut enter = command("nsenter", ["--target", &self.pid.to_string(), "--mount"]);
        if root {
            enter.args(["--root", "--wd=/"]);
            if self.shift > 0 {
                enter.args(["--user", "--setuid", "0", "--setgid", "0"]);
            }
        }
        enter
    }

    /// Runs a script in the container's shell.
    pub fn shell(&self, script: &str) -> Result<String> {
        run(self
            .enter(true)
            .args(["/bin/sh", "-ec", script])
            .env("PATH", "/usr/bin:/bin"))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Moves the contents of a directory to a mount over it, and leaves the directory beneath empty.
pub fn mount_over(directory: &Path) -> Result<()> {
    let aside = directory.with_extension("aside");
    fs::rename(directory, &aside)?;
    fs::create_dir(directory)?;
    run(command("mount", ["--bind"]).arg(&aside).arg(directory))?;
    Ok(())
}

/// A user namespace, which exists while its first process runs.
#[derive(Debug)]
struct UserNamespace(Child);

impl UserNamespace {
    fn new(shift: u32) -> Result<Self> {
        let namespace = Self(command("unshare", ["--user", "sleep", "60"]).spawn()?);
        let proc = Path::new("/proc").join(namespace.0.id().to_string());
        let own = fs::read_link("/proc/self/ns/user")?;
        wait_until("a user namespace of its own", || {
            fs::read_link(proc.join("ns/user")).is_ok_and(|ns| ns != own)
        })?;
        for map in ["uid_map", "gid_map"] {
            fs::write(proc.join(map), format!("0 {shift} 65536\n"))?;
        }
        Ok(namespace)
    }
}

impl Drop for UserNamespace {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Returns the digests of the layers of the only image in an OCI layout, bottom first.
pub fn layer_digests(layout: &Path) -> Result<Vec<String>> {
    let blob = |digest: &serde_json::Value| -> Result<serde_json::Value> {
        let hex = digest
            .as_str()
            .context("a digest")?
            .trim_start_matches("sha256:");
        Ok(serde_json::from_slice(&fs::read(
            layout.join("blobs/sha256").join(hex),
        )?)?)
    };
    let index: serde_json::Value = serde_json::from_slice(&fs::read(layout.join("index.json"))?)?;
    let manifest = blob(&index["manifests"][0]["digest"])?;
    let layers = manifest["layers"].as_array().context("layers")?;
    Ok(layers
        .iter()
        .filter_map(|layer| layer["digest"].as_str().map(str::to_owned))
        .collect())
}
