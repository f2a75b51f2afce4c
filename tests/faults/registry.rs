//! A registry server from a distribution package.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::ensure;

use crate::case::SaveOutput;
use crate::harness::Stop;

/// A running registry, which ends when dropped.
pub struct Registry {
    child: Child,
    host: String,
    storage: PathBuf,
}

impl Registry {
    pub fn start(home: &Path) -> Result<Self, Stop> {
        let (storage, file, log) = (
            home.join("storage"),
            home.join("registry.yml"),
            home.join("registry.log"),
        );
        let settings = format!(
            "version: 0.1\nlog: {{level: info}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\n\
             http: {{addr: '127.0.0.1:0'}}\n",
            storage.display()
        );
        fs::write(&file, settings)?;
        let started = Command::new("docker-registry")
            .arg("serve")
            .arg(&file)
            .stdout(Stdio::null())
            .stderr(File::create(&log)?)
            .spawn();
        let child = started.map_err(|error| Stop::Ignored(format!("docker-registry: {error}")))?;
        let mut registry = Self {
            child,
            host: String::new(),
            storage,
        };
        let begun = Instant::now();
        // The kernel chooses the port; the log contains it.
        while registry.host.is_empty() {
            ensure(begun.elapsed() < Duration::from_secs(30))?;
            std::thread::sleep(Duration::from_millis(20));
            let text = fs::read_to_string(&log)?;
            if let Some((_, rest)) = text.split_once("listening on ") {
                let end = rest.find(|c: char| c != '.' && c != ':' && !c.is_ascii_digit());
                rest[..end.unwrap_or_default()].clone_into(&mut registry.host);
            }
        }
        Ok(registry)
    }

    pub fn made(&self) -> SaveOutput {
        SaveOutput::Registry {
            host: self.host.clone(),
            storage: self.storage.clone(),
        }
    }
}

fn ensure(what: bool) -> anyhow::Result<()> {
    ensure!(what, "the registry does not start");
    Ok(())
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
