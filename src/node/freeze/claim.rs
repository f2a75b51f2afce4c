//! The claim on a container's freezer. Savers of one node take turns: without it, one would take the freeze of another
//! for that of the runtime, and find its container running in the middle of reading.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use super::{Error, Options, Target, groups};
use crate::common::private_files;

/// Directory of the claims, below `--host-root`. It is the administrator's own: a process of a container cannot claim
/// its own freezer there.
const DIR: &str = "run/upperdeck/freeze";

/// A held claim. It is released when dropped, or when the process ends.
#[derive(Debug)]
pub struct Claim {
    path: PathBuf,
    /// The lock is released with the descriptor.
    _file: File,
}

/// The result of [`claim`].
#[derive(Debug)]
pub enum Claimed {
    /// No other saver has the container.
    Held(Claim),
    /// Another saver of this node has it now.
    Busy,
    /// There is no place for claims, as for an unprivileged user: savers do not know of each other.
    Nowhere,
}

impl Drop for Claim {
    fn drop(&mut self) {
        // A process that takes the lock at this moment notices that the file is gone and creates another.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Claims the freezer of the container of process `pid`, which started at `start` (clock ticks since boot). A claim must
/// be held before [`super::freeze`] and until the thaw.
pub fn claim(pid: u32, start: Option<u64>, options: &Options) -> Result<Claimed, Error> {
    let host = options.host_root.as_deref().unwrap_or(Path::new("/"));
    let target = Target {
        proc: host.join("proc"),
        pid,
        start,
    };
    target.alive()?;
    // As in a freeze, the end of a container makes many calls fail. Only the end is reported then.
    claim_group(&target, host, options).map_err(|error| target.alive().err().unwrap_or(error))
}

fn claim_group(target: &Target, host: &Path, options: &Options) -> Result<Claimed, Error> {
    let groups = groups(&target.proc, target.pid, options.host_root.as_deref())?;
    let Some(group) = groups.first() else {
        return Ok(Claimed::Nowhere);
    };
    let dir = group.dir();
    let meta = std::fs::metadata(dir).map_err(|error| Error::io(dir.to_owned(), error))?;
    // The inode identifies the cgroup in whatever namespace it is seen from.
    let name = format!("{:x}-{:x}.lock", meta.dev(), meta.ino());
    match lock(&host.join(DIR), &name) {
        Ok(Some(claim)) => Ok(Claimed::Held(claim)),
        Ok(None) => Ok(Claimed::Busy),
        Err(error) => {
            tracing::warn!(%error, "other saves of this container on this node cannot be detected");
            Ok(Claimed::Nowhere)
        }
    }
}

/// Takes the lock file. Returns `None` if another process holds it.
fn lock(dir: &Path, name: &str) -> io::Result<Option<Claim>> {
    private_files::prepare_dir(dir, |name| name.strip_suffix(".lock").is_some())?;
    let path = dir.join(name);
    let file = private_files::try_lock(&path)?;
    Ok(file.map(|file| Claim { path, _file: file }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_has_a_container_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path().join("claims");
        let first = lock(&at, "1-2.lock").unwrap().unwrap();
        assert!(lock(&at, "1-2.lock").unwrap().is_none(), "two have it");
        let other = lock(&at, "1-3.lock").unwrap();
        assert!(other.is_some(), "another container's");
        drop(first);
        assert!(lock(&at, "1-2.lock").unwrap().is_some());
        drop(other);
        assert_eq!(std::fs::read_dir(&at).unwrap().count(), 0, "files stay");
    }
}
