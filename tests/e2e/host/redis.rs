//! Starts a Redis server on a unix socket.

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
        // It writes its data only from time to time, as in many installations: a crash loses the most recent data.
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

    /// Returns the URL for `--redis`.
    pub fn url(&self) -> String {
        format!("redis+unix://{}", self.dir.join("sock").display())
    }

    /// Returns the output of `redis-cli`.
    pub fn cli(&self, words: &[&str]) -> Result<String> {
        let mut cli = command("redis-cli", ["-s"]);
        run(cli.arg(self.dir.join("sock")).args(words))
    }

    /// Deletes everything at once.
    pub fn flush(&self) -> Result<()> {
        self.cli(&["FLUSHALL"]).map(drop)
    }

    /// Sends SIGKILL, and starts it again with the data that it had written.
    pub fn crash(&mut self) -> Result<()> {
        self.stop()?;
        self.start_again()
    }

    /// Sends SIGKILL.
    pub fn stop(&mut self) -> Result<()> {
        self.daemon.kill()?;
        Ok(())
    }

    /// Starts it with the data that it had written.
    pub fn start_again(&mut self) -> Result<()> {
        self.daemon = Self::spawn(&self.dir)?;
        self.wait_ready()
    }
}
