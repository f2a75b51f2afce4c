//! The record of an earlier version, which was in the directory that now belongs to agents.

use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt as _, fchown};
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use rustix::process::{Flock, FlockType, fcntl_getlk};

use super::machine::{Machine, ROOT, State, User, failed};
use super::{Error, MANAGER_STATE, NODE_STATE};
use crate::common::regular_file;

/// The database, and the files that SQLite keeps beside it: what was written last is in the first of these.
const FILES: [&str; 3] = ["manager.db", "manager.db-wal", "manager.db-shm"];

/// Returns `place`, the default location of a manager's record. Fails with a text if only an earlier version's is there:
/// the manager would otherwise begin an empty one.
pub(crate) fn default_record(place: &'static str) -> Result<&'static str, String> {
    let new = Path::new(place.trim_start_matches("sqlite:"));
    let old = Path::new(NODE_STATE).join(FILES[0]);
    if !new.exists() && old.exists() {
        return Err(format!(
            "the record of an earlier version is at {}: 'upperdeck setup manager' moves it to {}, or name it with --record",
            old.display(),
            new.display()
        ));
    }
    Ok(place)
}

/// Moves the record of an earlier version to the manager's directory, and gives the directory that it was in to root.
pub(super) fn move_earlier(machine: &mut Machine<'_>, user: User) -> Result<(), Error> {
    let path = |dir: &str, name: &str| format!("{dir}/{name}");
    let old = path(NODE_STATE, FILES[0]);
    let exists = |at: &Path| at.symlink_metadata().is_ok();
    let Ok(there) = machine.at(&old).symlink_metadata() else {
        return Ok(());
    };
    // A record of root's is that of 'upperdeck up', which keeps it there.
    if there.uid() == 0 || !there.is_file() {
        return Ok(());
    }
    let new = path(MANAGER_STATE, FILES[0]);
    if exists(&machine.at(&new)) {
        return Err(Error::InTheWay(format!(
            "{old} is the record of an earlier version, and there is {new}: remove one of them"
        )));
    }
    if in_use(&machine.at(&path(NODE_STATE, FILES[2]))).map_err(|error| failed(&old, error))? {
        return Err(Error::InTheWay(format!(
            "{old} is in use: end the manager first ('systemctl stop upperdeck-manager')"
        )));
    }
    // The database last: until it is moved, the next attempt begins again here.
    for name in FILES.iter().rev() {
        let (from, to) = (path(NODE_STATE, name), path(MANAGER_STATE, name));
        if !exists(&machine.at(&from)) {
            continue;
        }
        if !machine.dry_run() {
            let moved = fs::rename(machine.at(&from), machine.at(&to))
                .and_then(|()| give(&machine.at(&to), user));
            moved.map_err(|error| failed(&from, error))?;
        }
        machine.report(State::Changed, &from, format!("moved to {to}"));
    }
    let dir = machine.at(NODE_STATE);
    let owner = dir.metadata().map_err(|error| failed(NODE_STATE, error))?;
    if Some(owner.uid()) == user.uid {
        if !machine.dry_run() {
            give(&dir, ROOT).map_err(|error| failed(NODE_STATE, error))?;
        }
        machine.report(State::Changed, NODE_STATE, "belongs to root".to_owned());
    }
    Ok(())
}

fn give(path: &Path, user: User) -> io::Result<()> {
    // A directory or a file: neither waits for anything, as a FIFO would.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = rustix::fs::open(path, flags, Mode::empty())?;
    fchown(file, user.uid, user.gid)
}

/// Returns whether a process has the database open: it holds a lock on the file of the shared index for as long.
fn in_use(index: &Path) -> io::Result<bool> {
    let file = match regular_file::open(index) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error),
    };
    Ok(fcntl_getlk(&file, &Flock::from(FlockType::WriteLock))?.is_some())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_open_database_is_in_use_and_a_closed_one_is_not() -> Result<(), Box<dyn std::error::Error>>
    {
        let dir = tempfile::tempdir()?;
        let place = dir.path().join("manager.db");
        let index = dir.path().join("manager.db-shm");
        assert!(!in_use(&index)?);
        fs::write(&index, "")?;
        assert!(!in_use(&index)?, "left by a process that died");
        // A process does not see its own locks, so another one takes it.
        let mut holder = std::process::Command::new("python3")
            .args(["-c", "import sqlite3,sys; c=sqlite3.connect(sys.argv[1]); c.execute('PRAGMA journal_mode=WAL'); c.execute('CREATE TABLE t (x)'); print(flush=True); sys.stdin.read()"])
            .arg(&place)
            .stdin(std::process::Stdio::piped())
            .stdout(std::process::Stdio::piped())
            .spawn()?;
        let mut line = [0];
        io::Read::read_exact(holder.stdout.as_mut().ok_or("stdout")?, &mut line)?;
        assert!(in_use(&index)?);
        drop(holder.stdin.take());
        holder.wait()?;
        assert!(!in_use(&index)?);
        Ok(())
    }
}
