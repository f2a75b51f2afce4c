//! The base images of the tests. `bases.sh` creates them once per machine in a cache under `/var/tmp`.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rustix::fs::{FlockOperation, flock};
use upperdeck::common::digest::Digest;

use super::{command, run};

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/e2e/host/bases.sh");

/// A base image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Base {
    /// busybox and a few files of every kind: 3 layers, 2 MB.
    Small,
    /// Debian with Python and pip: 2 layers, 300 MB.
    Big,
    /// For the sandboxes of pods.
    Pause,
}

/// The family of media types of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Oci,
    Docker,
}

/// Returns the location of the image in skopeo's notation. Creates the image if it does not exist yet.
pub fn base(base: Base, format: Format) -> Result<String> {
    let name = match base {
        Base::Small => "small",
        Base::Big => "big",
        Base::Pause => "pause",
    };
    let dir = made(name)?;
    Ok(match format {
        Format::Oci => format!("oci:{}:latest", dir.join("oci").display()),
        Format::Docker => format!("dir:{}", dir.join("docker").display()),
    })
}

fn made(name: &str) -> Result<PathBuf> {
    // A changed recipe makes another image.
    let recipe = Digest::of(fs::read(SCRIPT)?).hex();
    let cache = Path::new("/var/tmp/upperdeck-test-bases");
    let dir = cache.join(format!("{name}-{}", &recipe[..16]));
    fs::create_dir_all(cache)?;
    let lock = File::create(cache.join(format!("{name}.lock")))?;
    flock(&lock, FlockOperation::LockExclusive)?;
    if !dir.join("done").exists() {
        let _ = fs::remove_dir_all(&dir);
        run(command("bash", [SCRIPT, name]).arg(&dir))
            .with_context(|| format!("making the {name} base image"))?;
        File::create(dir.join("done"))?;
    }
    Ok(dir)
}
