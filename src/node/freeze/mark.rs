//! The mark: a file that is written before a container is frozen. If this process and its watchdog are both dead, a
//! later process learns from it that the freeze was theirs and may be ended. A freeze without a mark belongs to another
//! program.

use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;
use serde::{Deserialize, Serialize};

use super::Error;
use super::cgroup::{Group, State, Version};
use crate::common::regular_file;

/// Maximum size of a mark, in bytes. A larger file was not written by this program.
const MAX_MARK: u64 = 64 << 10;

/// Identifies the cgroup, distinct from a later one of the same name.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Mark {
    version: String,
    dir: PathBuf,
    inode: u64,
    /// Boot ID: inode numbers restart at boot.
    boot: String,
}

/// The result of [`thaw_leftover`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ThawOutcome {
    /// No freeze was begun, or it was ended properly.
    Nothing,
    /// The cgroup no longer exists.
    Gone,
    /// The cgroup was already running.
    Running,
    /// The cgroup was frozen and is running again.
    Thawed,
}

fn boot() -> String {
    let id = fs::read_to_string("/proc/sys/kernel/random/boot_id");
    id.map(|id| id.trim().to_owned()).unwrap_or_default()
}

/// Writes the mark. Called before the freeze.
pub(super) fn write(path: &Path, group: &Group) -> Result<(), Error> {
    let io = |error| Error::io(path.to_owned(), error);
    let mark = Mark {
        version: group.version().name().to_owned(),
        dir: group.dir().to_owned(),
        inode: fs::metadata(group.dir()).map_err(io)?.ino(),
        boot: boot(),
    };
    let json = serde_json::to_vec(&mark).map_err(|error| io(error.into()))?;
    let mut options = fs::OpenOptions::new();
    let options = options.write(true).create(true).truncate(true).mode(0o600);
    let mut file = regular_file::open_with(path, options, OFlags::NOFOLLOW).map_err(io)?;
    // A few bytes in one write. It need not survive a power failure, because a freeze does not outlive the boot.
    io::Write::write_all(&mut file, &json).map_err(io)
}

/// Removes the mark. Called after the thaw.
pub(super) fn remove(path: &Path) {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(path = ?path, %error, "the mark of a freeze that is over cannot be removed");
        }
        _ => {}
    }
}

/// Ends the freeze that the mark at `path` describes (see [`super::Options::mark`]) and removes the mark. On `Ok` the
/// container runs as far as the writer of the mark is concerned; this is read back from the kernel.
pub fn thaw_leftover(path: &Path) -> Result<ThawOutcome, Error> {
    let io = |error| Error::io(path.to_owned(), error);
    let text = match regular_file::read(path, MAX_MARK) {
        // None was written, or the watchdog has removed it after its thaw.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(ThawOutcome::Nothing),
        Err(error) if error.kind() == io::ErrorKind::FileTooLarge => Vec::new(),
        text => text.map_err(io)?,
    };
    // A truncated mark was never followed by a freeze.
    let Ok(mark) = serde_json::from_slice::<Mark>(&text) else {
        remove(path);
        return Ok(ThawOutcome::Nothing);
    };
    let there = fs::metadata(&mark.dir).is_ok_and(|dir| dir.ino() == mark.inode);
    let version = Version::from_name(mark.version.as_ref());
    let left = match version.filter(|_| there && mark.boot == boot()) {
        None => ThawOutcome::Gone,
        Some(version) => match thaw(version, mark.dir) {
            Err(Error::Gone { .. }) => ThawOutcome::Gone,
            left => left?,
        },
    };
    remove(path);
    Ok(left)
}

fn thaw(version: Version, dir: PathBuf) -> Result<ThawOutcome, Error> {
    let group = Group::open(version, dir)?;
    let left = match group.state()? {
        State::Running => ThawOutcome::Running,
        State::Freezing | State::Frozen => ThawOutcome::Thawed,
    };
    group.thaw()?;
    Ok(left)
}
