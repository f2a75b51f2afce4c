//! A save that stops where the test wants it to: each time it lists what the container's processes have mapped.
//!
//! In the save's own mount namespace the list of the first process's mappings (`/proc/PID/maps`) is a FIFO. Opening it
//! for reading waits for a writer, so the save stops there for as long as the test wants, before or during the freeze,
//! without a sleep in the test or a hook in the program.

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::PathBuf;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::Session;
use crate::host::{PATIENCE, wait_until};
use crate::save::{Saved, upperdeck_itself};

/// A running save. Killed when dropped.
pub struct WatchedSave {
    child: Child,
    /// The pipe for the answer to `--gate-fd`.
    gate: ChildStdin,
    events: Receiver<Value>,
    /// The FIFO that the save reads instead of the list.
    fifo: PathBuf,
    maps: PathBuf,
    metadata: PathBuf,
    stderr: PathBuf,
}

impl WatchedSave {
    pub fn start(session: &Session, tag: &str, options: &[&str]) -> Result<Self> {
        let path = |what: &str| session.scratch.path().join(format!("{what}-{tag}"));
        let fifo = path("maps");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRUSR)?;
        let maps = PathBuf::from(format!("/proc/{}/maps", session.container.pid));
        let (metadata, stderr) = (path("metadata"), path("stderr"));
        let mut save = upperdeck_itself("commit", &session.roots);
        save.args(["--progress", "json", "--max-pause", "0", "--gate-fd", "0"])
            .arg("--metadata-file")
            .arg(&metadata)
            .args(options)
            .args([
                &session.container.id,
                &format!("oci:{}:{tag}", session.layout()),
            ]);
        // The last exec makes it the program itself, as a child of this process.
        let script = r#"mount --bind "$1" "$2"; shift 2; exec "$@""#;
        let mut child = Command::new("unshare")
            .args(["--mount", "bash", "-ec", script, "watched"])
            .args([&fifo, &maps])
            .arg(save.get_program())
            .args(save.get_args())
            .env_clear()
            .envs(std::env::vars_os().filter(|(name, _)| name == "PATH"))
            .envs(
                save.get_envs()
                    .filter_map(|(name, value)| Some((name, value?))),
            )
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(fs::File::create(&stderr)?)
            .spawn()?;
        let gate = child.stdin.take().context("stdin")?;
        let lines = BufReader::new(child.stdout.take().context("stdout")?).lines();
        let (told, events) = channel();
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                let event = serde_json::from_str(&line).unwrap_or(Value::String(line));
                if told.send(event).is_err() {
                    return;
                }
            }
        });
        Ok(Self {
            child,
            gate,
            events,
            fifo,
            maps,
            metadata,
            stderr,
        })
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    fn stderr(&self) -> String {
        fs::read_to_string(&self.stderr).unwrap_or_default()
    }

    /// Waits for an event with this name, or for the beginning of a phase with this name.
    pub fn until(&self, what: &str) -> Result<()> {
        loop {
            let Ok(event) = self.events.recv_timeout(PATIENCE) else {
                bail!("the save never says {what}: {}", self.stderr());
            };
            if is_about(&event, what) {
                return Ok(());
            }
        }
    }

    /// Like `WatchedSave::until`, but answers every request for the list meanwhile: the save also searches it for rings
    /// of io_uring.
    pub fn until_answering(&self, what: &str) -> Result<()> {
        let started = std::time::Instant::now();
        while started.elapsed() < PATIENCE {
            self.answer_rest();
            let Ok(event) = self
                .events
                .recv_timeout(std::time::Duration::from_millis(5))
            else {
                continue;
            };
            if is_about(&event, what) {
                return Ok(());
            }
        }
        bail!("the save never says {what}: {}", self.stderr());
    }

    /// Answers the save if it has the list open now.
    pub fn answer_rest(&self) {
        if let Some(asked) = self.open() {
            // It may have been answered already.
            let _ = asked.answer();
        }
    }

    /// Returns the list if the save has it open for reading now.
    fn open(&self) -> Option<MappingRequest> {
        let open = fs::OpenOptions::new()
            .write(true)
            .custom_flags(nix::libc::O_NONBLOCK)
            .open(&self.fifo);
        open.ok().map(|list| MappingRequest {
            list,
            maps: self.maps.clone(),
        })
    }

    /// Waits until the save opens the list. The save waits there for the answer.
    pub fn asked(&self) -> Result<MappingRequest> {
        let mut asked = None;
        wait_until("the save asks what is mapped", || {
            asked = self.open();
            asked.is_some()
        })
        .with_context(|| self.stderr())?;
        asked.context("a list")
    }

    /// Sends SIGKILL. The save must still be running.
    pub fn kill(mut self) -> Result<()> {
        self.child.kill()?;
        let status = self.child.wait()?;
        ensure!(
            status.signal() == Some(nix::libc::SIGKILL),
            "it had ended by itself, {status}: {}",
            self.stderr()
        );
        Ok(())
    }

    /// Answers all further requests, allows the tag, and waits for the end of the save.
    pub fn finish(mut self) -> Result<Saved> {
        wait_until("all is delivered", || {
            self.answer_rest();
            let mut told = self.events.try_iter();
            told.any(|event| event["event"] == "ready")
        })
        .with_context(|| self.stderr())?;
        self.gate.write_all(b"y")?;
        let status = self.child.wait()?;
        let stderr = self.stderr();
        ensure!(status.success(), "{status}: {stderr}");
        let metadata: Value = serde_json::from_slice(&fs::read(&self.metadata)?)?;
        let text = |name: &str| metadata[name].as_str().context("text").map(str::to_owned);
        Ok(Saved {
            reference: text("reference")?,
            digest: text("digest")?,
            stderr,
            metadata,
        })
    }
}

impl Drop for WatchedSave {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A list that the save is waiting for.
pub struct MappingRequest {
    list: fs::File,
    maps: PathBuf,
}

impl MappingRequest {
    /// Returns the current mappings.
    pub fn mapped(&self) -> Result<Vec<u8>> {
        Ok(fs::read(&self.maps)?)
    }

    /// Answers with the current mappings.
    pub fn answer(self) -> Result<()> {
        let mapped = self.mapped()?;
        self.answer_with(&mapped)
    }

    /// Answers with a list that was made earlier.
    pub fn answer_with(mut self, mapped: &[u8]) -> Result<()> {
        Ok(self.list.write_all(mapped)?)
    }
}

/// Returns whether an event has this name, or begins a phase with this name.
fn is_about(event: &Value, what: &str) -> bool {
    event["event"] == what || (event["event"] == "phase" && event["phase"] == what)
}
