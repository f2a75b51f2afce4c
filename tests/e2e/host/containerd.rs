//! Starts containerd with its CRI plugin, and pods in it without Kubernetes.

use std::cell::Cell;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::grpc::{Fields, Message, call};
use super::registry::Registry;
use super::{Daemon, Roots, Scratch, command, run};

const RUNTIME: &str = "/runtime.v1.RuntimeService";
/// `NamespaceMode` of CRI: the node's own network, so that no CNI is needed.
const NODE: u64 = 2;

/// A containerd process with its own directories.
#[derive(Debug)]
pub struct Containerd {
    daemon: Daemon,
    pub socket: PathBuf,
    pub root: PathBuf,
    pub state: PathBuf,
    pods: Cell<u32>,
}

/// A CRI container of a pod.
#[derive(Clone, Debug)]
pub struct Pod {
    pub sandbox: String,
    pub container: String,
    /// The pod's name; its namespace is `jupyter`, its container's name `notebook`.
    pub name: String,
    pub pid: i32,
    /// The merged view as containerd mounted it: without the mounts inside the container.
    pub rootfs: PathBuf,
}

/// The options of a pod's container besides the image.
#[derive(Clone, Debug, Default)]
pub struct PodOptions<'a> {
    /// Name of the pod [default: one that no other pod of the test has].
    pub name: Option<&'a str>,
    /// Replaces the image's entrypoint and command.
    pub command: &'a [&'a str],
    pub environment: &'a [(&'a str, &'a str)],
    /// Host directory or file, path in the container, read-only.
    pub mounts: &'a [(&'a Path, &'a str, bool)],
}

/// The result of a command in a container.
#[derive(Clone, Debug)]
pub struct Executed {
    pub stdout: String,
    pub stderr: String,
    pub code: u64,
}

impl Containerd {
    /// Starts containerd. Sandboxes of pods run the image `pause:1` of `registry`.
    pub fn start(scratch: &Scratch, registry: &Registry) -> Result<Self> {
        let dir = scratch.dir("containerd")?;
        let socket = dir.join("sock");
        let (root, state) = (dir.join("root"), dir.join("state"));
        let configuration = dir.join("config.toml");
        // Without CAP_SYS_RESOURCE the sandbox's OOM score is rejected, hence restrict_oom_score_adj.
        fs::write(
            &configuration,
            format!(
                "version = 2\n\
                 root = \"{}\"\nstate = \"{}\"\n\
                 disabled_plugins = [\"io.containerd.snapshotter.v1.btrfs\", \"io.containerd.snapshotter.v1.zfs\", \
                 \"io.containerd.snapshotter.v1.aufs\", \"io.containerd.snapshotter.v1.devmapper\"]\n\
                 [grpc]\naddress = \"{}\"\n\
                 [ttrpc]\naddress = \"{}\"\n\
                 [debug]\naddress = \"{}\"\n\
                 [plugins.\"io.containerd.grpc.v1.cri\"]\n\
                 restrict_oom_score_adj = true\n\
                 sandbox_image = {:?}\n\
                 [plugins.\"io.containerd.grpc.v1.cri\".cni]\nconf_dir = \"{}\"\n",
                root.display(),
                state.display(),
                socket.display(),
                dir.join("ttrpc").display(),
                dir.join("debug").display(),
                registry.reference("pause:1"),
                dir.join("no-cni").display(),
            ),
        )?;
        let mut containerd = Self {
            daemon: Self::spawn(&dir)?,
            socket,
            root,
            state,
            pods: Cell::new(0),
        };
        containerd.wait_ready()?;
        Ok(containerd)
    }

    fn spawn(dir: &Path) -> Result<Daemon> {
        Daemon::start(
            Command::new("containerd")
                .arg("--config")
                .arg(dir.join("config.toml")),
            dir.join("log"),
        )
    }

    fn wait_ready(&mut self) -> Result<()> {
        let socket = self.socket.clone();
        self.daemon
            .wait_for(|_| call(&socket, &format!("{RUNTIME}/Version"), &Message::new()).ok())
            .map(drop)
    }

    /// Kills it, as in a crash: its shims and the containers keep running.
    pub fn kill(&mut self) -> Result<()> {
        self.daemon.kill().map(drop)
    }

    /// Starts it again after [`Self::kill`].
    pub fn restart(&mut self) -> Result<()> {
        let _ = fs::remove_file(&self.socket);
        self.daemon = Self::spawn(self.socket.parent().context("a socket has a directory")?)?;
        self.wait_ready()
    }

    pub fn roots(&self, scratch: &Scratch) -> Roots {
        Roots {
            containerd_root: self.root.clone(),
            containerd_state: self.state.clone(),
            ..Roots::none(scratch)
        }
    }

    fn cri(&self, method: &str, request: &Message) -> Result<Fields> {
        call(&self.socket, &format!("{RUNTIME}/{method}"), request)
    }

    /// Runs `ctr` in the namespace of CRI.
    pub fn ctr<'a>(&self, arguments: impl IntoIterator<Item = &'a str>) -> Result<String> {
        let mut ctr = command("ctr", ["--address"]);
        run(ctr
            .arg(&self.socket)
            .args(["--namespace", "k8s.io"])
            .args(arguments))
    }

    /// Pulls an image as the kubelet does. Returns the digest of the config.
    pub fn pull(&self, image: &str) -> Result<String> {
        let request = Message::new().message(1, &Message::new().bytes(1, image));
        Ok(call(&self.socket, "/runtime.v1.ImageService/PullImage", &request)?.text(1))
    }

    /// Pulls `image` and runs it in a new pod.
    pub fn run_pod(&self, image: &str, options: &PodOptions<'_>) -> Result<Pod> {
        self.pull(image)?;
        let attempt = self.pods.get();
        self.pods.set(attempt + 1);
        let name = options
            .name
            .map_or_else(|| format!("session-{attempt}"), str::to_owned);
        let namespaces = Message::new().int(1, NODE);
        let metadata = Message::new()
            .bytes(1, &name)
            .bytes(2, format!("00000000-0000-4000-8000-{attempt:012}"))
            .bytes(3, "jupyter")
            .int(4, 0);
        // No hostname: a pod on the node's network has the node's hostname.
        let sandbox_config = Message::new()
            .message(1, &metadata)
            .pair(6, "app", "jupyter")
            .message(
                8,
                &Message::new().message(2, &Message::new().message(1, &namespaces)),
            );
        let sandbox = self
            .cri("RunPodSandbox", &Message::new().message(1, &sandbox_config))?
            .text(1);

        let config = container_config("notebook", image, options)?;
        let pod = Pod {
            sandbox,
            container: String::new(),
            name,
            pid: 0,
            rootfs: PathBuf::new(),
        };
        self.start_container(pod, config, &sandbox_config)
    }

    /// Runs another container beside that of a pod.
    pub fn add_container(
        &self,
        pod: &Pod,
        name: &str,
        image: &str,
        options: &PodOptions<'_>,
    ) -> Result<Pod> {
        let metadata = Message::new().bytes(1, &pod.name).bytes(3, "jupyter");
        let sandbox_config = Message::new().message(1, &metadata);
        let config = container_config(name, image, options)?;
        self.start_container(pod.clone(), config, &sandbox_config)
    }

    /// Runs `image` in a pod whose container has ended, as the kubelet does.
    pub fn next_container(&self, pod: &Pod, image: &str) -> Result<Pod> {
        let metadata = Message::new().bytes(1, &pod.name).bytes(3, "jupyter");
        let sandbox_config = Message::new().message(1, &metadata);
        let config = Message::new()
            .message(1, &Message::new().bytes(1, "notebook").int(2, 1))
            .message(2, &Message::new().bytes(1, image));
        self.start_container(pod.clone(), config, &sandbox_config)
    }

    fn start_container(&self, pod: Pod, config: Message, sandbox_config: &Message) -> Result<Pod> {
        let security = Message::new().message(3, &Message::new().int(1, NODE));
        let config = config.message(15, &Message::new().message(2, &security));
        let request = Message::new()
            .bytes(1, &pod.sandbox)
            .message(2, &config)
            .message(3, sandbox_config);
        let container = self.cri("CreateContainer", &request)?.text(1);
        self.cri("StartContainer", &Message::new().bytes(1, &container))?;
        let pid = fs::read_to_string(self.bundle(&container).join("init.pid"))?
            .trim()
            .parse()?;
        Ok(Pod {
            pid,
            rootfs: self.rootfs(&container),
            container,
            ..pod
        })
    }

    /// Returns the merged view of a container as containerd mounted it.
    pub fn rootfs(&self, container: &str) -> PathBuf {
        self.bundle(container).join("rootfs")
    }

    fn bundle(&self, container: &str) -> PathBuf {
        self.state
            .join("io.containerd.runtime.v2.task/k8s.io")
            .join(container)
    }

    /// Runs a command in a pod and waits until it exits.
    pub fn exec<S: AsRef<str>>(&self, pod: &Pod, command: &[S]) -> Result<Executed> {
        let request = Message::new()
            .bytes(1, &pod.container)
            .strings(2, command)
            .int(3, 900);
        let answer = self.cri("ExecSync", &request)?;
        Ok(Executed {
            stdout: answer.text(1),
            stderr: answer.text(2),
            code: answer.int(3),
        })
    }

    /// Runs a shell script in a pod. Fails unless the script succeeds.
    pub fn shell(&self, pod: &Pod, script: &str) -> Result<String> {
        let done = self.exec(pod, &["/bin/sh", "-ec", script])?;
        ensure!(
            done.code == 0,
            "in the pod, exit {}: {}{}\n(of {script})",
            done.code,
            done.stdout,
            done.stderr
        );
        Ok(done.stdout)
    }

    /// Starts a container without CRI, as `ctr run -d` does. The image must have been pulled. Returns its process ID.
    pub fn ctr_run(&self, image: &str, id: &str, command: &[&str]) -> Result<i32> {
        // Without an OCI hook or CNI: the node's network.
        self.ctr(
            ["run", "-d", "--net-host", image, id]
                .iter()
                .chain(command)
                .copied(),
        )?;
        Ok(fs::read_to_string(self.bundle(id).join("init.pid"))?
            .trim()
            .parse()?)
    }

    /// Returns the path of a blob in the content store.
    pub fn blob(&self, digest: &str) -> PathBuf {
        let hex = digest.trim_start_matches("sha256:");
        self.root
            .join("io.containerd.content.v1.content/blobs/sha256")
            .join(hex)
    }
}

/// Returns the configuration of a pod's first container of this name.
fn container_config(name: &str, image: &str, options: &PodOptions<'_>) -> Result<Message> {
    let mut config = Message::new()
        .message(1, &Message::new().bytes(1, name).int(2, 0))
        .message(2, &Message::new().bytes(1, image))
        .strings(3, options.command)
        // As the kubelet does: the pod's secrets are passed in the environment.
        .message(
            6,
            &Message::new()
                .bytes(1, "POD_SECRET")
                .bytes(2, "hunter2-of-the-pod"),
        );
    for (key, value) in options.environment {
        config = config.message(6, &Message::new().bytes(1, key).bytes(2, value));
    }
    for (host, inside, read_only) in options.mounts {
        let host = host.to_str().context("a mount's path is text")?;
        config = config.message(
            7,
            &Message::new()
                .bytes(1, inside)
                .bytes(2, host)
                .int(3, u64::from(*read_only)),
        );
    }
    Ok(config)
}
