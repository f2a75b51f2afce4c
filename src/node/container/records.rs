//! Opens the runtimes' records, and only those that no other user can write: root reads what the records name, so that a
//! forged record would give its author the files and the name of any container.
//!
//! Each directory on the way to a file is opened and examined by its descriptor, and no symbolic link is followed except
//! on the way to a root as configured. A directory counts only as far as other users can reach it: runtimes give
//! directories within their own private ones to the IDs of a container.

use std::ffi::{OsStr, OsString};
use std::fs::{File, Metadata};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{Dir, Mode, OFlags};

/// Maximum number of symbolic links on the way to a root, as in the kernel.
const MAX_LINKS: usize = 40;

/// Directory of a container in containers/storage, which Podman gives to the container's root (`--uidmap`). Whoever has
/// that ID can exchange files in it, but for none with another content: every file has to belong to a believed user.
const USERDATA: &str = "userdata";

/// The users whose files are believed: root, and the one of this process.
#[derive(Clone, Copy)]
struct Trust {
    user: u32,
    group: u32,
    /// Whether owners and modes are examined. Within a user namespace, all that can be read belongs to its user.
    examined: bool,
}

impl Trust {
    fn current() -> Self {
        Self {
            user: rustix::process::geteuid().as_raw(),
            group: rustix::process::getegid().as_raw(),
            examined: is_initial_user_namespace(),
        }
    }

    /// Returns why an owner and a mode are not believed. `sticky` tells whether only the owners of entries may replace
    /// them, which is sufficient for a directory that merely leads to another one.
    fn objection(self, meta: &Metadata, sticky: bool) -> Option<String> {
        if !self.examined {
            return None;
        }
        if meta.uid() != 0 && meta.uid() != self.user {
            return Some(format!(
                "it belongs to user {}, who can write anything into these records; run this as that user (podman unshare \
                 upperdeck ...)",
                meta.uid()
            ));
        }
        self.writers(meta, sticky)
    }

    /// Returns why a mode is not believed.
    fn writers(self, meta: &Metadata, sticky: bool) -> Option<String> {
        if !self.examined || meta.is_symlink() || sticky && meta.mode() & 0o1000 != 0 {
            return None;
        }
        if meta.mode() & 0o002 != 0 {
            return Some("every user can write to it, so these records prove nothing".to_owned());
        }
        let own_group = meta.gid() == 0 || meta.gid() == self.group;
        (meta.mode() & 0o020 != 0 && !own_group).then(|| {
            format!(
                "group {} can write to it, so these records prove nothing",
                meta.gid()
            )
        })
    }
}

/// A directory on the way, opened with `O_PATH`.
struct Place {
    dir: OwnedFd,
    /// Whether users other than the trusted ones can get to its entries.
    reachable: bool,
}

impl Place {
    fn open(path: &Path) -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Self {
            dir: rustix::fs::open(path, flags, Mode::empty())?,
            reachable: true,
        })
    }

    /// Opens an entry without following it.
    fn entry(&self, name: &OsStr, flags: OFlags) -> io::Result<(File, Metadata)> {
        let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = File::from(rustix::fs::openat(&self.dir, name, flags, Mode::empty())?);
        let meta = file.metadata()?;
        Ok((file, meta))
    }

    /// Enters a directory whose owner and mode are believed as one that leads to others.
    fn below(&self, file: File, meta: &Metadata) -> Self {
        Self {
            dir: file.into(),
            // Rights of an access control list are within those of the group.
            reachable: self.reachable && meta.mode() & 0o011 != 0,
        }
    }

    /// Fails with a text about `path` if the directory is not believed.
    fn check(&self, trust: Trust, meta: &Metadata, sticky: bool, path: &Path) -> io::Result<()> {
        let objection = if path.file_name() == Some(OsStr::new(USERDATA)) {
            trust.writers(meta, sticky)
        } else {
            trust.objection(meta, sticky)
        };
        match objection {
            Some(reason) if self.reachable => Err(refused(path, &reason)),
            _ => Ok(()),
        }
    }
}

fn refused(path: &Path, reason: &str) -> io::Error {
    let shown = crate::common::escape::text(&path.display().to_string());
    io::Error::other(format!("{shown} is not believed: {reason}"))
}

/// Opens the file or directory at an absolute path without symbolic links.
fn open(path: &Path, directory: bool) -> io::Result<File> {
    let trust = Trust::current();
    let mut place = Place::open(Path::new("/"))?;
    let mut at = PathBuf::from("/");
    let mut names = Vec::new();
    for component in path.components() {
        match component {
            Component::RootDir => {}
            Component::Normal(name) => names.push(name),
            _ => return Err(io::ErrorKind::InvalidInput.into()),
        }
    }
    let last = names.pop().ok_or(io::ErrorKind::InvalidInput)?;
    for name in names {
        at.push(name);
        let (file, meta) = place.entry(name, OFlags::PATH)?;
        expect_no_link(&meta, &at)?;
        if !meta.is_dir() {
            return Err(rustix::io::Errno::NOTDIR.into());
        }
        place.check(trust, &meta, true, &at)?;
        place = place.below(file, &meta);
    }
    at.push(last);
    expect_no_link(&place.entry(last, OFlags::PATH)?.1, &at)?;
    // Without waiting for a writer if it is a FIFO.
    let kind = if directory {
        OFlags::DIRECTORY
    } else {
        OFlags::NONBLOCK
    };
    let (file, meta) = place.entry(last, OFlags::RDONLY | kind)?;
    if directory {
        place.check(trust, &meta, false, &at)?;
    } else if !meta.is_file() {
        return Err(io::Error::other("expected a regular file"));
    } else if let Some(reason) = trust.objection(&meta, false) {
        // Wherever it lies: it may have been moved there, and have another name elsewhere.
        return Err(refused(&at, &reason));
    }
    Ok(file)
}

fn expect_no_link(meta: &Metadata, at: &Path) -> io::Result<()> {
    if meta.is_symlink() {
        let reason = "it is a symbolic link, and runtimes have none here";
        return Err(refused(at, reason));
    }
    Ok(())
}

/// Opens a regular file of the records, at an absolute path without symbolic links.
pub(super) fn open_file(path: &Path) -> io::Result<File> {
    open(path, false)
}

/// Opens a directory of the records, at an absolute path without symbolic links.
pub(super) fn open_directory(path: &Path) -> io::Result<OwnedFd> {
    open(path, true).map(Into::into)
}

/// Returns the names in a directory of the records.
pub(super) fn names(path: &Path) -> io::Result<Vec<OsString>> {
    let mut names = Vec::new();
    for entry in Dir::read_from(open_directory(path)?.as_fd())? {
        let entry = entry?;
        let name = OsStr::from_bytes(entry.file_name().to_bytes());
        if name != "." && name != ".." {
            names.push(name.to_owned());
        }
    }
    Ok(names)
}

/// Resolves the absolute path of a root as on the node whose root directory is `node`, which needs not be believed: its symbolic
/// links are followed, and every directory and link on the way is examined. Returns the path on the node.
///
/// Fails with [`io::ErrorKind::Other`] if another user can replace any of it, or can write to the root itself.
pub(super) fn resolve_root(node: &Path, root: &Path) -> io::Result<PathBuf> {
    let trust = Trust::current();
    let mut places = vec![Place::open(node)?];
    let mut at = PathBuf::from("/");
    let mut left = parts(root);
    let mut links = 0;
    let mut found = None;
    while let Some(name) = left.pop() {
        if name == "/" {
            places.truncate(1);
            at = PathBuf::from("/");
            continue;
        }
        if name == ".." {
            if places.len() > 1 {
                places.pop();
                at.pop();
            }
            continue;
        }
        let place = places.last().ok_or(io::ErrorKind::InvalidInput)?;
        let (file, meta) = place.entry(&name, OFlags::PATH)?;
        place.check(trust, &meta, true, &at.join(&name))?;
        if meta.is_symlink() {
            links += 1;
            if links > MAX_LINKS {
                return Err(rustix::io::Errno::LOOP.into());
            }
            let target = rustix::fs::readlinkat(&file, "", Vec::new())?;
            left.extend(parts(Path::new(OsStr::from_bytes(target.as_bytes()))));
            continue;
        }
        let below = place.below(file, &meta);
        places.push(below);
        at.push(name);
        found = Some(meta);
    }
    // As a directory that holds records, it may not be sticky.
    if let (Some(meta), [.., above, _]) = (found, places.as_slice()) {
        above.check(trust, &meta, false, &at)?;
    }
    Ok(at)
}

/// Returns the parts of a path, the first one last. `/` stands for the node's root.
fn parts(path: &Path) -> Vec<OsString> {
    let mut parts: Vec<OsString> = path
        .components()
        .filter(|part| *part != Component::CurDir)
        .map(|part| part.as_os_str().to_owned())
        .collect();
    parts.reverse();
    parts
}

/// Returns whether this process is in the node's own user namespace, in which IDs are those of the node.
pub fn is_initial_user_namespace() -> bool {
    let identity = |map: &str| map.split_ascii_whitespace().eq(["0", "0", "4294967295"]);
    std::fs::read_to_string("/proc/self/uid_map").is_ok_and(|map| identity(&map))
}
