//! Starts Docker with its overlay2 graph driver.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};

use super::{Daemon, Roots, Scratch, command, output, run};

/// A Docker daemon with its own directories.
#[derive(Debug)]
pub struct Docker {
    daemon: Daemon,
    socket: String,
    pub root: PathBuf,
}

/// A running container of Docker or Podman.
#[derive(Clone, Debug)]
pub struct Running {
    pub id: String,
    pub pid: i32,
    /// The merged view as the engine mounted it: without the mounts inside the container.
    pub rootfs: PathBuf,
}

impl Docker {
    pub fn start(scratch: &Scratch) -> Result<Self> {
        let server = crate::support::find_program("dockerd").context("no dockerd")?;
        Self::with(scratch, Command::new(server), &[])
    }

    /// Starts a daemon with `userns-remap`: root's files belong to user 200000 in its store. Only this daemon sees the
    /// file that assigns these IDs, but its mounts are visible everywhere.
    pub fn remapped(scratch: &Scratch) -> Result<Self> {
        let (dir, ids) = (scratch.dir("docker")?, scratch.dir("ids")?.join("ids"));
        std::fs::write(&ids, "daemon:200000:65536\n")?;
        run(command("mount", ["--bind"]).args([&dir, &dir]))?;
        run(command("mount", ["--make-shared"]).arg(&dir))?;
        let script = "ids=$1; shift; mount --make-private /
            for file in /etc/subuid /etc/subgid; do mount --bind \"$ids\" $file; done; exec dockerd \"$@\"";
        let namespace = [
            "-m",
            "--propagation",
            "unchanged",
            "sh",
            "-ec",
            script,
            "sh",
        ];
        let mut server = command("unshare", namespace);
        server.arg(ids);
        Self::with(scratch, server, &["--userns-remap=daemon"])
    }

    fn with(scratch: &Scratch, mut server: Command, options: &[&str]) -> Result<Self> {
        let dir = scratch.dir("docker")?;
        let socket = format!("unix://{}", dir.join("sock").display());
        let root = dir.join("root");
        server
            .args(options)
            .args([
                "--storage-driver",
                "overlay2",
                "--bridge",
                "none",
                "--iptables=false",
                "--ip-forward=false",
            ])
            .args(["--host", &socket])
            .arg("--data-root")
            .arg(&root)
            .arg("--exec-root")
            .arg(dir.join("exec"))
            .arg("--pidfile")
            .arg(dir.join("pid"))
            // An empty configuration, so that the configuration of the machine's own Docker has no effect.
            .arg("--config-file")
            .arg(dir.join("daemon.json"));
        std::fs::write(dir.join("daemon.json"), "{}")?;
        let mut docker = Self {
            daemon: Daemon::start(&mut server, dir.join("log"))?,
            socket,
            root,
        };
        let probe = docker.socket.clone();
        docker.daemon.wait_for(|_| {
            output(&mut command("docker", ["--host", &probe, "version"]))
                .ok()?
                .status
                .success()
                .then_some(())
        })?;
        Ok(docker)
    }

    /// Kills the engine, as in a crash: the containers keep running.
    pub fn kill(&mut self) -> Result<()> {
        self.daemon.kill().map(drop)
    }

    pub fn docker<'a>(&self, arguments: impl IntoIterator<Item = &'a str>) -> Result<String> {
        run(command("docker", ["--host", &self.socket]).args(arguments))
    }

    /// Pulls and runs an image in the background.
    pub fn run(
        &self,
        name: &str,
        image: &str,
        options: &[&str],
        command: &[&str],
    ) -> Result<Running> {
        self.docker(["pull", "--quiet", image])?;
        let fixed = ["run", "-d", "--network", "none", "--name", name];
        let id = self.docker(
            fixed
                .iter()
                .chain(options)
                .chain(&[image])
                .chain(command)
                .copied(),
        )?;
        let pid = self
            .docker(["inspect", "--format", "{{.State.Pid}}", &id])?
            .parse()?;
        let rootfs = self
            .docker([
                "inspect",
                "--format",
                "{{.GraphDriver.Data.MergedDir}}",
                &id,
            ])?
            .into();
        Ok(Running { id, pid, rootfs })
    }

    pub fn shell(&self, container: &Running, script: &str) -> Result<String> {
        self.docker([
            "exec",
            "--user",
            "0",
            &container.id,
            "/bin/sh",
            "-ec",
            script,
        ])
    }

    pub fn roots(&self, scratch: &Scratch) -> Roots {
        Roots {
            docker_root: self.root.clone(),
            ..Roots::none(scratch)
        }
    }
}
