//! A Redis of its own, on a socket file.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;

use super::{Daemon, Scratch, command, run};

#[derive(Debug)]
pub struct Redis {
    daemon: Daemon,
    dir: PathBuf,
}

impl Redis {
    pub fn start(scratch: &Scratch) -> Result<Self> {
        let dir = scratch.dir("redis")?;
        let mut redis = Self {
            daemon: Self::spawn(&dir)?,
            dir,
        };
        redis.wait_ready()?;
        Ok(redis)
    }

    fn spawn(dir: &Path) -> Result<Daemon> {
        // It writes what it holds now and then only, as many a centre has it: a crash loses the last of it.
        Daemon::start(
            Command::new("redis-server")
                .args(["--port", "0", "--save", "1 1", "--appendonly", "no"])
                .arg("--unixsocket")
                .arg(dir.join("sock"))
                .arg("--dir")
                .arg(dir),
            dir.join("log"),
        )
    }

    fn wait_ready(&mut self) -> Result<()> {
        let socket = self.dir.join("sock");
        self.daemon
            .wait_for(|_| std::os::unix::net::UnixStream::connect(&socket).ok())
            .map(drop)
    }

    /// As `--redis` takes it.
    pub fn url(&self) -> String {
        format!("redis+unix://{}", self.dir.join("sock").display())
    }

    /// What `redis-cli` prints.
    pub fn cli(&self, words: &[&str]) -> Result<String> {
        let mut cli = command("redis-cli", ["-s"]);
        run(cli.arg(self.dir.join("sock")).args(words))
    }

    /// Everything is gone at once.
    pub fn flush(&self) -> Result<()> {
        self.cli(&["FLUSHALL"]).map(drop)
    }

    /// SIGKILL, and up again with what it had written.
    pub fn crash(&mut self) -> Result<()> {
        self.daemon.kill()?;
        self.daemon = Self::spawn(&self.dir)?;
        self.wait_ready()
    }
}
