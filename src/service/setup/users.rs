//! The user that managers run as. Only the machine's own user database is read: a service's user belongs there, and not into
//! a directory service.

use std::io;
use std::process::{Command, Stdio};

use super::Error;
use super::machine::{Machine, State, User, failed};
use crate::common::escape;
use crate::common::regular_file;

/// Maximum length of the message of `useradd` in characters.
const MAX_MESSAGE: usize = 500;

/// Maximum size of the user database in bytes.
const MAX_USERS: u64 = 64 << 20;

/// Returns the user, which is created as a system user without a login if it does not exist.
pub(super) fn find_or_create(
    machine: &mut Machine<'_>,
    name: &'static str,
    home: &str,
) -> Result<User, Error> {
    if let Some(user) = find(machine, name)? {
        let detail = format!("user {}", user.uid.unwrap_or_default());
        machine.report(State::Unchanged, name, detail);
        return Ok(user);
    }
    let user = if machine.dry_run() {
        User {
            name,
            uid: None,
            gid: None,
        }
    } else {
        create(machine, name, home)?;
        find(machine, name)?.ok_or_else(|| Error::User {
            user: name,
            reason: "useradd succeeded, and /etc/passwd has none".to_owned(),
        })?
    };
    machine.report(
        State::Created,
        name,
        "system user without a login".to_owned(),
    );
    Ok(user)
}

/// The machine's user database.
const FILE: &str = "/etc/passwd";

/// Returns the group of the user that managers run as, if there is one.
pub(crate) fn managers_group() -> Option<u32> {
    let users = regular_file::read(FILE.as_ref(), MAX_USERS).ok()?;
    ids_of(&String::from_utf8_lossy(&users), super::MANAGER_USER).map(|(_, gid)| gid)
}

/// Returns the IDs of a user and of its group.
fn ids_of(users: &str, name: &str) -> Option<(u32, u32)> {
    users.lines().find_map(|line| {
        let mut fields = line.split(':');
        let found = fields.next()? == name;
        let ids = (fields.nth(1)?.parse().ok()?, fields.next()?.parse().ok()?);
        found.then_some(ids)
    })
}

fn find(machine: &Machine<'_>, name: &'static str) -> Result<Option<User>, Error> {
    let users = match regular_file::read(&machine.at(FILE), MAX_USERS) {
        Ok(users) => String::from_utf8_lossy(&users).into_owned(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(FILE, error)),
    };
    Ok(ids_of(&users, name).map(|(uid, gid)| User {
        name,
        uid: Some(uid),
        gid: Some(gid),
    }))
}

fn create(machine: &Machine<'_>, name: &'static str, home: &str) -> Result<(), Error> {
    let failed = |reason: String| Error::User { user: name, reason };
    let mut useradd = Command::new("useradd");
    if machine.root() != std::path::Path::new("/") {
        useradd.arg("--prefix").arg(machine.root());
    }
    let output = useradd
        .args(["--system", "--user-group", "--no-create-home"])
        .args(["--home-dir", home, "--shell", "/usr/sbin/nologin", name])
        .stdin(Stdio::null())
        .output()
        .map_err(|error| failed(format!("useradd cannot be run: {error}")))?;
    if output.status.success() {
        return Ok(());
    }
    let message = String::from_utf8_lossy(&output.stderr);
    Err(failed(escape::limited(message.trim(), MAX_MESSAGE)))
}
