//! Starts `docker-registry` of the distribution project, as packaged by Debian.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};

use super::{Daemon, Scratch, command, run};

/// Credentials of a registry with a password.
pub const CREDENTIALS: &str = "tester:secret";

/// The same with the bcrypt hash for the server (made with `crypt(3)`, so that no further package is needed).
const HTPASSWD: &str = "tester:$2y$05$abcdefghijklmnopqrstuuOQiyCxlgf/oeuTqixKmWdcYUh4Hjl0a\n";

/// A registry on a free port of loopback, plain HTTP, deletion enabled.
#[derive(Debug)]
pub struct Registry {
    daemon: Daemon,
    /// `127.0.0.1:PORT`.
    pub host: String,
    /// Directory of its blobs.
    pub storage: PathBuf,
    credentials: Option<&'static str>,
}

impl Registry {
    pub fn start(scratch: &Scratch) -> Result<Self> {
        Self::start_named(scratch, "registry", None)
    }

    /// Starts a registry with basic authentication by [`CREDENTIALS`].
    pub fn start_with_password(scratch: &Scratch) -> Result<Self> {
        Self::start_named(scratch, "registry-auth", Some(CREDENTIALS))
    }

    /// Starts another registry, in a directory of its own.
    pub fn start_named(
        scratch: &Scratch,
        name: &str,
        credentials: Option<&'static str>,
    ) -> Result<Self> {
        let dir = scratch.dir(name)?;
        let storage = dir.join("storage");
        let auth = match credentials {
            None => String::new(),
            Some(_) => {
                fs::write(dir.join("htpasswd"), HTPASSWD)?;
                format!(
                    "auth: {{htpasswd: {{realm: test, path: {}}}}}\n",
                    dir.join("htpasswd").display()
                )
            }
        };
        let configuration = format!(
            "version: 0.1\nlog: {{level: info}}\nstorage: {{filesystem: {{rootdirectory: {}}}, delete: {{enabled: true}}}}\n\
             http: {{addr: '127.0.0.1:0'}}\n{auth}",
            storage.display()
        );
        let file = dir.join("config.yml");
        fs::write(&file, configuration)?;
        let mut daemon = Daemon::start(
            Command::new("docker-registry").arg("serve").arg(&file),
            dir.join("log"),
        )?;
        // The kernel chooses the port, so that no two tests use the same one; the log contains it.
        let host = daemon.wait_for(|daemon| {
            let log = daemon.log();
            let rest = log.split_once("listening on ")?.1;
            Some(
                rest.split(|c: char| c != '.' && c != ':' && !c.is_ascii_digit())
                    .next()?
                    .to_owned(),
            )
        })?;
        Ok(Self {
            daemon,
            host,
            storage,
            credentials,
        })
    }

    /// Returns `HOST/NAME`.
    pub fn reference(&self, name: &str) -> String {
        format!("{}/{name}", self.host)
    }

    /// Copies an image of another transport (`oci:…`, `dir:…`) to `name` with unchanged digests.
    pub fn push(&self, from: &str, name: &str) -> Result<String> {
        let mut copy = command(
            "skopeo",
            [
                "copy",
                "--quiet",
                "--preserve-digests",
                "--dest-tls-verify=false",
            ],
        );
        if let Some(credentials) = self.credentials {
            copy.args(["--dest-creds", credentials]);
        }
        run(copy.args([from, &format!("docker://{}", self.reference(name))]))?;
        Ok(self.reference(name))
    }

    /// Returns how many blobs of a repository were read, by the registry's log.
    pub fn blobs_read(&self, repository: &str) -> usize {
        self.daemon
            .log()
            .matches(&format!("\"GET /v2/{repository}/blobs/"))
            .count()
    }

    /// Returns the tags of a repository; empty if it does not exist.
    pub fn tags(&self, repository: &str) -> Vec<String> {
        let dir = self
            .storage
            .join("docker/registry/v2/repositories")
            .join(repository)
            .join("_manifests/tags");
        let entries = fs::read_dir(dir).into_iter().flatten().flatten();
        entries
            .filter_map(|entry| entry.file_name().into_string().ok())
            .collect()
    }

    /// Sends SIGKILL, and starts it again at the same address.
    pub fn crash(&mut self) -> Result<()> {
        self.daemon.kill()?;
        let dir = self.storage.parent().context("it has a directory")?;
        let file = dir.join("config.yml");
        let configuration = fs::read_to_string(&file)?;
        fs::write(&file, configuration.replace("127.0.0.1:0", &self.host))?;
        self.daemon = Daemon::start(
            Command::new("docker-registry").arg("serve").arg(&file),
            dir.join("log-again"),
        )?;
        let host = self.host.clone();
        self.daemon
            .wait_for(|_| std::net::TcpStream::connect(&host).ok())
            .map(drop)
    }

    /// Ends it, so that it cannot be reached any more.
    pub fn kill(&mut self) -> Result<()> {
        self.daemon.kill().map(drop)
    }
}
