//! The steps that change a machine's files. Each reports what it did, or would do.

use std::fs::{self, File, Metadata, Permissions};
use std::io::{self, Write as _};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, fchown};
use std::path::{Path, PathBuf};

use serde::Serialize;
use zeroize::Zeroizing;

use super::Error;
use crate::common::escape;
use crate::common::private_files::{self, FileMode};
use crate::common::regular_file;

/// What became of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum State {
    /// It was made.
    Created,
    /// Owner, mode or place were changed.
    Changed,
    /// It was as it should be.
    Unchanged,
    /// The administrator has to provide it.
    Missing,
}

/// A step.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Action {
    /// What became of it.
    pub(crate) state: State,
    /// Path, or the name of the user.
    pub(crate) what: String,
    /// Mode and owner, or what is missing.
    pub(crate) detail: String,
}

/// A user and the group of the same name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct User {
    pub(super) name: &'static str,
    /// `None` if a dry run only would create it.
    pub(super) uid: Option<u32>,
    pub(super) gid: Option<u32>,
}

pub(super) const ROOT: User = User {
    name: "root",
    uid: Some(0),
    gid: Some(0),
};

/// Owner and group of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Owner {
    pub(super) user: User,
    pub(super) group: User,
}

impl Owner {
    /// A user that a dry run only would create has no numbers yet.
    fn ids(self) -> Option<(u32, u32)> {
        Some((self.user.uid?, self.group.gid?))
    }
}

/// The machine that is prepared.
pub(super) struct Machine<'a> {
    root: PathBuf,
    dry_run: bool,
    done: &'a mut dyn FnMut(&Action),
    actions: Vec<Action>,
}

impl<'a> Machine<'a> {
    pub(super) fn new(root: &Path, dry_run: bool, done: &'a mut dyn FnMut(&Action)) -> Self {
        Self {
            root: root.to_owned(),
            dry_run,
            done,
            actions: Vec::new(),
        }
    }

    pub(super) fn dry_run(&self) -> bool {
        self.dry_run
    }

    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    /// Returns where the machine's `path` is for this process.
    pub(super) fn at(&self, path: &str) -> PathBuf {
        self.root.join(path.trim_start_matches('/'))
    }

    pub(super) fn finish(self) -> Vec<Action> {
        self.actions
    }

    pub(super) fn report(&mut self, state: State, what: &str, detail: String) {
        let action = Action {
            state,
            what: what.to_owned(),
            detail,
        };
        (self.done)(&action);
        self.actions.push(action);
    }

    pub(super) fn missing(&mut self, path: &str, detail: String) {
        self.report(State::Missing, path, detail);
    }

    /// Creates a directory, or gives an existing one this owner and mode.
    pub(super) fn directory(&mut self, path: &str, mode: u32, owner: Owner) -> Result<(), Error> {
        let at = self.at(path);
        let failed = |source| failed(path, source);
        let exists = match fs::symlink_metadata(&at) {
            Ok(there) if there.is_dir() => true,
            Ok(_) => return Err(Error::InTheWay(format!("{path}: it is no directory"))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => false,
            Err(error) => return Err(failed(error)),
        };
        if !exists {
            if !self.dry_run {
                self.make_parents(&at).map_err(failed)?;
                private_files::make_dir(&at, FileMode::PRIVATE).map_err(failed)?;
                let dir = regular_file::open_directory(&at).map_err(failed)?;
                assign(&dir, mode, owner).map_err(failed)?;
            }
            self.report(State::Created, path, shown(mode, owner));
            return Ok(());
        }
        let dir = regular_file::open_directory(&at).map_err(failed)?;
        self.mend(path, &dir, mode, Some(owner))
    }

    /// Creates the missing directories above `at`, which belong to the machine and are for all of its users.
    fn make_parents(&self, at: &Path) -> io::Result<()> {
        let parents = at.ancestors().skip(1);
        let missing: Vec<&Path> = parents
            .take_while(|dir| *dir != self.root && fs::symlink_metadata(dir).is_err())
            .collect();
        for dir in missing.into_iter().rev() {
            private_files::make_dir(dir, FileMode::PRIVATE)?;
            let dir = regular_file::open_directory(dir)?;
            dir.set_permissions(Permissions::from_mode(0o755))?;
        }
        Ok(())
    }

    /// Creates a file, unless there is one. Its content is written before it has a name. An existing one keeps its content,
    /// and gets this owner and loses the rights that `mode` lacks.
    pub(super) fn file(
        &mut self,
        path: &str,
        mode: u32,
        owner: Owner,
        content: impl FnOnce() -> Zeroizing<String>,
    ) -> Result<(), Error> {
        if self.secret(path, mode, Some(owner))? {
            return Ok(());
        }
        if !self.dry_run {
            let created = self.create(path, mode, owner, &content());
            created.map_err(|source| failed(path, source))?;
        }
        self.report(State::Created, path, shown(mode, owner));
        Ok(())
    }

    fn create(&self, path: &str, mode: u32, owner: Owner, content: &str) -> io::Result<()> {
        let at = self.at(path);
        let dir = at.parent().unwrap_or(Path::new("/"));
        let mut made = tempfile::NamedTempFile::new_in(dir)?;
        made.write_all(content.as_bytes())?;
        assign(made.as_file(), mode, owner)?;
        made.as_file().sync_all()?;
        // Fails if another process has created it in between.
        made.persist_noclobber(&at)?;
        Ok(())
    }

    /// Takes the rights that `mode` lacks from an existing file, and gives it to `owner`; without one it keeps its own.
    /// Returns whether there is one.
    pub(super) fn secret(
        &mut self,
        path: &str,
        mode: u32,
        owner: Option<Owner>,
    ) -> Result<bool, Error> {
        let file = match regular_file::open(&self.at(path)) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(failed(path, error)),
        };
        let there = file.metadata().map_err(|source| failed(path, source))?;
        self.mend(path, &file, there.mode() & 0o7777 & mode, owner)?;
        Ok(true)
    }

    /// Gives an open file or directory this mode and owner if it has others.
    fn mend(
        &mut self,
        path: &str,
        file: &File,
        mode: u32,
        owner: Option<Owner>,
    ) -> Result<(), Error> {
        let there = file.metadata().map_err(|source| failed(path, source))?;
        let ids = owner.and_then(Owner::ids);
        let right_owner = ids.is_none_or(|ids| ids == (there.uid(), there.gid()));
        let was = there.mode() & 0o7777;
        if right_owner && was == mode {
            self.report(State::Unchanged, path, present(&there, owner));
            return Ok(());
        }
        if !self.dry_run {
            let changed = match owner {
                Some(owner) => assign(file, mode, owner),
                None => file.set_permissions(Permissions::from_mode(mode)),
            };
            changed.map_err(|source| failed(path, source))?;
        }
        let owners = owner.map_or_else(String::new, |owner| {
            format!(", {}:{}", owner.user.name, owner.group.name)
        });
        let is_open = |mode: u32| mode & 0o007 != 0;
        let warning = if there.is_file() && !is_open(mode) && is_open(was) {
            "; any user could read or change it: replace what it holds if that may have happened"
        } else {
            ""
        };
        let detail = format!(
            "mode {mode:04o}{owners}; was mode {was:04o}, user {}, group {}{warning}",
            there.uid(),
            there.gid()
        );
        self.report(State::Changed, path, detail);
        Ok(())
    }
}

/// Sets owner and mode, in this order, because a change of the owner may clear bits of the mode.
fn assign(file: &File, mode: u32, owner: Owner) -> io::Result<()> {
    if let Some((uid, gid)) = owner.ids() {
        fchown(file, Some(uid), Some(gid))?;
    }
    file.set_permissions(Permissions::from_mode(mode))
}

pub(super) fn failed(path: &str, source: io::Error) -> Error {
    Error::Path {
        path: path.into(),
        source,
    }
}

fn shown(mode: u32, owner: Owner) -> String {
    let (user, group) = (owner.user.name, owner.group.name);
    format!("mode {mode:04o}, {user}:{group}")
}

fn present(there: &Metadata, owner: Option<Owner>) -> String {
    let mode = there.mode() & 0o7777;
    match owner {
        Some(owner) => shown(mode, owner),
        None => format!("mode {mode:04o}"),
    }
}

impl std::fmt::Display for Action {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let line = format!("{}: {}", self.what, self.detail);
        out.write_str(&escape::text(&line))
    }
}
