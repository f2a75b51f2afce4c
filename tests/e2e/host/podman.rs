//! Runs Podman as root, on containers/storage with its overlay driver.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::Result;

use super::docker::Running;
use super::{Roots, Scratch, command, run};

/// Runs a container in the background on the network of the node, from an image that is there.
pub const BACKGROUND: [&str; 6] = ["run", "-d", "--network", "host", "--pull", "never"];

/// Podman with its own storage; there is no daemon.
#[derive(Debug)]
pub struct Podman {
    dir: PathBuf,
    pub root: PathBuf,
    pub runroot: PathBuf,
}

impl Podman {
    pub fn new(scratch: &Scratch) -> Result<Self> {
        let dir = scratch.dir("podman")?;
        // Locks in files, because those in shared memory are shared by all Podman instances of the machine.
        fs::write(
            dir.join("containers.conf"),
            format!(
                "[containers]\ndefault_ulimits = [\"nofile=1024:1024\", \"nproc=1024:1024\"]\n\
                 [engine]\nruntime = \"runc\"\ncgroup_manager = \"cgroupfs\"\nevents_logger = \"none\"\n\
                 lock_type = \"file\"\ntmp_dir = \"{}\"\n",
                dir.join("tmp").display()
            ),
        )?;
        let (root, runroot) = (dir.join("root"), dir.join("runroot"));
        fs::write(
            dir.join("storage.conf"),
            format!(
                "[storage]\ndriver = \"overlay\"\ngraphroot = \"{}\"\nrunroot = \"{}\"\n",
                root.display(),
                runroot.display()
            ),
        )?;
        Ok(Self { dir, root, runroot })
    }

    fn command(&self) -> Command {
        let mut podman = command::<&str>("podman", []);
        // conmon notes there that a container was out of memory.
        podman
            .current_dir(&self.dir)
            .env("CONTAINERS_CONF", self.dir.join("containers.conf"))
            .env("CONTAINERS_STORAGE_CONF", self.dir.join("storage.conf"));
        podman
    }

    pub fn podman<'a>(&self, arguments: impl IntoIterator<Item = &'a str>) -> Result<String> {
        run(self.command().args(arguments))
    }

    /// Pulls and runs an image in the background.
    pub fn run(
        &self,
        name: &str,
        image: &str,
        options: &[&str],
        command: &[&str],
    ) -> Result<Running> {
        self.podman(["pull", "--quiet", "--tls-verify=false", image])?;
        let id = self.podman(
            BACKGROUND
                .iter()
                .chain(&["--name", name])
                .chain(options)
                .chain(&[image])
                .chain(command)
                .copied(),
        )?;
        let pid = self
            .podman(["inspect", "--format", "{{.State.Pid}}", &id])?
            .parse()?;
        let rootfs = self
            .podman([
                "inspect",
                "--format",
                "{{.GraphDriver.Data.MergedDir}}",
                &id,
            ])?
            .into();
        Ok(Running { id, pid, rootfs })
    }

    pub fn shell(&self, container: &Running, script: &str) -> Result<String> {
        self.podman([
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
            storage_root: self.root.clone(),
            storage_runroot: self.runroot.clone(),
            ..Roots::none(scratch)
        }
    }
}
