//! A manager and an agent, each in its own process, and the command line client that uses them.

use std::fs;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::redis::Redis;
use super::registry::Registry;
use super::{Daemon, Roots, Scratch, output, wait_until};
use crate::save::upperdeck_itself;

/// Tokens, and their SHA-256 as in the manager's file.
const PORTAL: &str = "the portal's token";
const ADMINISTRATOR: &str = "the administrator's token";

#[derive(Debug)]
pub struct Service {
    manager: Daemon,
    agent: Daemon,
    dir: PathBuf,
    roots: Roots,
    port: u16,
    redis: String,
    registry: String,
    state: PathBuf,
    /// Further flags of the manager and of the agent.
    manager_flags: Vec<String>,
    flags: Vec<String>,
}

/// Writes the managers' `key` and node-1's `node-key` to `dir`, as an administrator would.
pub fn write_keys(dir: &Path) -> Result<()> {
    let key = dir.join("key");
    fs::write(&key, "a key that is long enough for this\n")?;
    fs::set_permissions(&key, fs::Permissions::from_mode(0o600))?;
    let made = Command::new(crate::support::program())
        .args(["key", "--node", "node-1", "--key-file"])
        .arg(&key)
        .arg("--output")
        .arg(dir.join("node-key"))
        .status()?;
    ensure!(made.success(), "{made}");
    Ok(())
}

impl Service {
    /// Starts the service. A session belongs to the user in its `JUPYTERHUB_USER`; images go to `sessions/` of the
    /// registry.
    pub fn start(
        scratch: &Scratch,
        roots: &Roots,
        redis: &Redis,
        registry: &Registry,
        flags: &[&str],
    ) -> Result<Self> {
        Self::start_with(scratch, roots, redis, registry, &[], flags)
    }

    /// Starts the service with further flags of the manager and of the agent.
    pub fn start_with(
        scratch: &Scratch,
        roots: &Roots,
        redis: &Redis,
        registry: &Registry,
        manager_flags: &[&str],
        flags: &[&str],
    ) -> Result<Self> {
        let owned = |flags: &[&str]| -> Vec<String> {
            flags.iter().map(|flag| (*flag).to_owned()).collect()
        };
        let (manager_flags, flags) = (owned(manager_flags), owned(flags));
        let dir = scratch.dir("service")?;
        write_keys(&dir)?;
        fs::write(dir.join("portal"), PORTAL)?;
        fs::write(dir.join("administrator"), ADMINISTRATOR)?;
        let token = |name: &str, token: &str| {
            let digest = <sha2::Sha256 as sha2::Digest>::digest(token);
            format!(
                "[[token]]\nname = \"{name}\"\nrole = \"{name}\"\nsha256 = \"{}\"\n",
                hex::encode(digest)
            )
        };
        let tokens = token("portal", PORTAL) + &token("administrator", ADMINISTRATOR);
        fs::write(dir.join("tokens.toml"), tokens)?;
        // The port is free now, and will hardly be taken before the manager starts.
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let (redis, registry) = (redis.url(), registry.host.clone());
        let mut service = Self {
            manager: Self::spawn_manager(&dir, roots, port, &redis, &registry, &manager_flags)?,
            agent: Self::spawn_agent(&dir, roots, &redis, &registry, &flags)?,
            state: crate::save::state_dir(roots),
            manager_flags,
            flags,
            dir,
            roots: roots.clone(),
            port,
            redis,
            registry,
        };
        service.wait_ready()?;
        Ok(service)
    }

    fn spawn_manager(
        dir: &Path,
        roots: &Roots,
        port: u16,
        redis: &str,
        registry: &str,
        flags: &[String],
    ) -> Result<Daemon> {
        let mut manager = upperdeck_itself("manager", roots);
        manager
            .args(["--log", "info", "--tls-verify=false", "--redis", redis])
            .args(["--running-per-user", "2", "--running-per-node", "4"])
            .args(["--backoff", "1s", "--attempts", "20", "--rate", "0"])
            .args(["--listen", &format!("127.0.0.1:{port}")])
            .args([
                "--target",
                &format!("{registry}/sessions/{{user}}/{{name}}:{{tag}}"),
            ])
            .arg(format!(
                "--record=sqlite:{}",
                dir.join("manager.db").display()
            ))
            .arg("--key-file")
            .arg(dir.join("key"))
            .arg("--tokens-file")
            .arg(dir.join("tokens.toml"))
            .args(flags);
        Daemon::start(&mut manager, dir.join("manager.log"))
    }

    fn spawn_agent(
        dir: &Path,
        roots: &Roots,
        redis: &str,
        registry: &str,
        flags: &[String],
    ) -> Result<Daemon> {
        let mut agent = upperdeck_itself("agent", roots);
        agent
            .args(["--log", "info", "--tls-verify=false", "--redis", redis])
            .args(["--node", "node-1", "--owner", "env:JUPYTERHUB_USER"])
            .args(["--allow", &format!("{registry}/sessions")])
            .arg("--key-file")
            .arg(dir.join("node-key"))
            .arg("--spool-dir")
            .arg(dir.join("spool"))
            .args(flags);
        Daemon::start(&mut agent, dir.join("agent.log"))
    }

    fn wait_ready(&mut self) -> Result<()> {
        let port = self.port;
        self.manager
            .wait_for(|_| std::net::TcpStream::connect(("127.0.0.1", port)).ok())
            .map(drop)
    }

    /// Sends SIGKILL to the manager and starts a new one.
    pub fn crash_manager(&mut self) -> Result<()> {
        self.manager.kill()?;
        self.manager = Self::spawn_manager(
            &self.dir,
            &self.roots,
            self.port,
            &self.redis,
            &self.registry,
            &self.manager_flags,
        )?;
        self.wait_ready()
    }

    /// Sends SIGKILL to the agent and starts a new one.
    pub fn crash_agent(&mut self) -> Result<()> {
        self.agent.kill()?;
        self.agent = Self::spawn_agent(
            &self.dir,
            &self.roots,
            &self.redis,
            &self.registry,
            &self.flags,
        )?;
        Ok(())
    }

    /// Returns the agent's running children, found by the state directory in their command lines.
    pub fn children(&self) -> Vec<i32> {
        let needle = self.state.display().to_string();
        let pids = fs::read_dir("/proc").into_iter().flatten().flatten();
        pids.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok())
            .filter(|pid| {
                let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
                let line = String::from_utf8_lossy(&line).replace('\0', " ");
                line.contains(" commit ") && line.contains(&needle)
            })
            .collect()
    }

    pub fn log(&self, who: &str) -> String {
        fs::read_to_string(self.dir.join(format!("{who}.log"))).unwrap_or_default()
    }

    /// Returns the program as a client of the manager, for `user` with the portal's token, or for the administrator.
    pub fn shell(&self, user: Option<&str>, words: &[&str]) -> Command {
        let mut shell = Command::new("timeout");
        shell
            .args(["--signal=KILL", "600", crate::support::program()])
            .args(words)
            .arg(format!("--server=http://127.0.0.1:{}", self.port));
        match user {
            Some(user) => shell
                .arg("--token-file")
                .arg(self.dir.join("portal"))
                .args(["--as-user", user]),
            None => shell
                .arg("--token-file")
                .arg(self.dir.join("administrator")),
        };
        shell
    }

    /// Returns its output as JSON. Fails with its message if the request is refused.
    pub fn ask(&self, user: Option<&str>, words: &[&str]) -> Result<Value> {
        let done = self.output(user, words)?;
        if !done.status.success() {
            bail!(
                "{words:?}: {}: {}",
                done.status,
                String::from_utf8_lossy(&done.stderr)
            );
        }
        serde_json::from_slice(&done.stdout)
            .with_context(|| String::from_utf8_lossy(&done.stdout).into_owned())
    }

    pub fn output(&self, user: Option<&str>, words: &[&str]) -> Result<Output> {
        output(&mut self.shell(user, words))
    }

    /// Waits until the manager lists `count` sessions.
    pub fn wait_for_sessions(&self, count: usize) -> Result<()> {
        let mut last = String::new();
        let waited = wait_until("the manager knows the sessions", || {
            match self.ask(None, &["job", "sessions", "--format", "json"]) {
                Ok(found) => {
                    last = found.to_string();
                    found.as_array().is_some_and(|found| found.len() >= count)
                }
                Err(error) => {
                    last = error.to_string();
                    false
                }
            }
        });
        waited.with_context(|| format!("{last}\n{}", self.log("agent")))?;
        ensure!(!last.is_empty());
        Ok(())
    }
}
