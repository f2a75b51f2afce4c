//! What is written to disk before a container is frozen, so that whoever comes after this process and its watchdog are
//! both dead knows that the freeze was theirs, and may end it. A freeze without a mark is somebody else's.

use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::Error;
use super::cgroup::{Group, State, Version};

/// Larger ones are none of ours.
const MAX_MARK: u64 = 64 << 10;

/// The cgroup, told apart from a later one of the same name.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Mark {
    version: String,
    dir: PathBuf,
    inode: u64,
    /// Inodes count from boot.
    boot: String,
}

/// What became of a freeze that somebody left behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Left {
    /// None was begun, or whoever began it ended it.
    Nothing,
    /// The cgroup is no more.
    Gone,
    /// It ran already.
    Running,
    /// It was frozen, and runs again.
    Thawed,
}

fn boot() -> String {
    let id = fs::read_to_string("/proc/sys/kernel/random/boot_id");
    id.map(|id| id.trim().to_owned()).unwrap_or_default()
}

/// Written before the freeze is.
pub(super) fn write(path: &Path, group: &Group) -> Result<(), Error> {
    let io = |error| Error::io(path.to_owned(), error);
    let mark = Mark {
        version: group.version().name().to_owned(),
        dir: group.dir().to_owned(),
        inode: fs::metadata(group.dir()).map_err(io)?.ino(),
        boot: boot(),
    };
    let json = serde_json::to_vec(&mark).map_err(|error| io(error.into()))?;
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
        .map_err(io)?;
    // A few bytes in one write, and no power failure concerns a freeze: it does not outlive the boot.
    io::Write::write_all(&mut file, &json).map_err(io)
}

/// After the thaw.
pub(super) fn remove(path: &Path) {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(path = ?path, %error, "the mark of a freeze that is over cannot be removed");
        }
        _ => {}
    }
}

/// Ends the freeze that the mark at `path` speaks of (see [`super::Options::mark`]), and removes the mark. On `Ok` the
/// container runs, as far as the one who wrote the mark is concerned; that is read back.
pub fn thaw_left(path: &Path) -> Result<Left, Error> {
    let io = |error| Error::io(path.to_owned(), error);
    let text = match fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Left::Nothing),
        Err(error) => return Err(io(error)),
        Ok(there) if there.len() > MAX_MARK => Vec::new(),
        Ok(_) => match fs::read(path) {
            // Removed by the watchdog, which thawed.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Left::Nothing),
            text => text.map_err(io)?,
        },
    };
    // One that was cut off was not followed by a freeze.
    let Ok(mark) = serde_json::from_slice::<Mark>(&text) else {
        remove(path);
        return Ok(Left::Nothing);
    };
    let there = fs::metadata(&mark.dir).is_ok_and(|dir| dir.ino() == mark.inode);
    let version = Version::from_name(mark.version.as_ref());
    let left = match version.filter(|_| there && mark.boot == boot()) {
        None => Left::Gone,
        Some(version) => match thaw(version, mark.dir) {
            Err(Error::Gone { .. }) => Left::Gone,
            left => left?,
        },
    };
    remove(path);
    Ok(left)
}

fn thaw(version: Version, dir: PathBuf) -> Result<Left, Error> {
    let group = Group::open(version, dir)?;
    let left = match group.state()? {
        State::Running => Left::Running,
        State::Freezing | State::Frozen => Left::Thawed,
    };
    group.thaw()?;
    Ok(left)
}
