//! Files that have no name until they are complete, so that a killed save leaves nothing behind. Where that is not possible
//! they have a temporary name and are locked (flock), so that the next command can tell those of dead processes.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, fchown};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use tempfile::TempPath;

use crate::common::private_files::FileMode;
use crate::common::regular_file;

/// Start of temporary names; six letters or digits follow.
pub(super) const PREFIX: &str = ".upperdeck-tmp-";
/// Start of temporary names of versions that do not lock the files.
const UNLOCKED_PREFIX: &str = ".upperdeck-";

/// An open file that does not have its final name yet.
pub(super) struct Staged {
    pub(super) file: File,
    dir: PathBuf,
    /// Path of a temporary file, on file systems without `O_TMPFILE`.
    temporary: Option<TempPath>,
}

impl Staged {
    /// Like [`Staged::create`], in a directory of a layout: root's files are given to the user whose layout it is.
    pub(super) fn create_in_layout(dir: &Path, mode: FileMode) -> io::Result<Self> {
        let staged = Self::create_private(dir)?;
        give_to_owner_of(regular_file::open_directory(dir)?, &staged.file)?;
        mode.set(&staged.file)?;
        Ok(staged)
    }

    /// Creates a file with `mode` in `dir`, which has to be on the file system of the final name.
    pub(super) fn create(dir: &Path, mode: FileMode) -> io::Result<Self> {
        let staged = Self::create_private(dir)?;
        mode.set(&staged.file)?;
        Ok(staged)
    }

    fn create_private(dir: &Path) -> io::Result<Self> {
        let mode = Mode::from_raw_mode(0o600);
        match rustix::fs::open(dir, OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC, mode) {
            Ok(fd) => Ok(Self {
                file: fd.into(),
                dir: dir.to_path_buf(),
                temporary: None,
            }),
            // Kernels and file systems without O_TMPFILE return EISDIR.
            Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL) => Self::create_named(dir),
            Err(e) => Err(e.into()),
        }
    }

    fn create_named(dir: &Path) -> io::Result<Self> {
        loop {
            let (file, path) = tempfile::Builder::new()
                .prefix(PREFIX)
                .permissions(std::fs::Permissions::from_mode(0o600))
                .tempfile_in(dir)?
                .into_parts();
            // Another process may have taken the file for that of a dead one before it was locked.
            if try_lock(&file)? && file.metadata()?.nlink() > 0 {
                return Ok(Self {
                    file,
                    dir: dir.to_path_buf(),
                    temporary: Some(path),
                });
            }
        }
    }

    /// Syncs the file and gives it its name atomically, replacing an existing file.
    pub(super) fn publish(self, target: &Path) -> io::Result<()> {
        self.file.sync_all()?;
        if let Some(temporary) = self.temporary {
            return temporary.persist(target).map_err(|e| e.error);
        }
        match link(&self.file, target) {
            Err(Errno::EXIST) => {}
            other => return Ok(other?),
        }
        // link(2) does not replace an existing file. rename(2) does, and needs an existing name. The file has been locked
        // before it gets one.
        try_lock(&self.file)?;
        let between = tempfile::Builder::new()
            .prefix(PREFIX)
            .make_in(&self.dir, |path| Ok(link(&self.file, path)?))?;
        between
            .into_temp_path()
            .persist(target)
            .map_err(|e| e.error)
    }
}

fn link(file: &File, target: &Path) -> rustix::io::Result<()> {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    match rustix::fs::linkat(CWD, path.as_str(), CWD, target, AtFlags::SYMLINK_FOLLOW) {
        // Without /proc, `AT_EMPTY_PATH` is used, which requires CAP_DAC_READ_SEARCH.
        Err(Errno::NOENT) => rustix::fs::linkat(file, "", CWD, target, AtFlags::EMPTY_PATH),
        other => other,
    }
}

/// Gives a file or directory that root has created in the directory of another user to that user, who could not read it
/// otherwise.
pub(super) fn give_to_owner_of(dir: impl AsFd, file: &File) -> io::Result<()> {
    let to = rustix::fs::fstat(dir)?;
    let own = rustix::process::geteuid();
    if !own.is_root() || to.st_uid == 0 || file.metadata()?.uid() != 0 {
        return Ok(());
    }
    fchown(file, Some(to.st_uid), Some(to.st_gid))
}

/// Returns whether a file has a temporary name.
pub(super) fn is_temporary(file: &str) -> bool {
    file.strip_prefix(PREFIX).is_some_and(is_random)
}

/// Returns whether a file has a temporary name of a version that does not lock such files.
pub(super) fn is_unlocked_temporary(file: &str) -> bool {
    file.strip_prefix(UNLOCKED_PREFIX).is_some_and(is_random)
}

fn is_random(text: &str) -> bool {
    text.len() == 6 && text.bytes().all(|b| b.is_ascii_alphanumeric())
}

/// Deletes a file with a temporary name if no process has it locked. Returns whether it did.
pub(super) fn delete_abandoned(dir: impl AsFd, file: &str) -> io::Result<bool> {
    let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let found: File = match rustix::fs::openat(&dir, file, flags, Mode::empty()) {
        Ok(found) => found.into(),
        Err(Errno::NOENT | Errno::LOOP) => return Ok(false),
        Err(error) => return Err(error.into()),
    };
    if !found.metadata()?.is_file() || !try_lock(&found)? {
        return Ok(false);
    }
    match rustix::fs::unlinkat(dir, file, AtFlags::empty()) {
        Ok(()) => Ok(true),
        Err(Errno::NOENT) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Deletes the files with a temporary name in `dir` that no process has locked. Returns their number.
pub(super) fn delete_all_abandoned(dir: &Path) -> io::Result<u64> {
    let opened = regular_file::open_directory(dir)?;
    let mut deleted = 0;
    for entry in std::fs::read_dir(dir)? {
        let name = entry?.file_name();
        if let Some(name) = name.to_str().filter(|name| is_temporary(name)) {
            deleted += u64::from(delete_abandoned(&opened, name)?);
        }
    }
    Ok(deleted)
}

/// Returns false if another process holds the lock.
pub(super) fn try_lock(file: &File) -> io::Result<bool> {
    let how = FlockOperation::NonBlockingLockExclusive;
    match rustix::io::retry_on_intr(|| rustix::fs::flock(file, how)) {
        Ok(()) => Ok(true),
        Err(Errno::WOULDBLOCK) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Syncs a directory, so that its entries survive a crash.
pub(super) fn sync_directory(dir: &Path) -> io::Result<()> {
    regular_file::open_directory(dir)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::io::Write as _;

    #[test]
    fn there_is_nothing_until_there_is_all() -> io::Result<()> {
        let dir = tempfile::tempdir()?;
        let target = dir.path().join("x");
        for content in ["one", "two"] {
            let mut staged = Staged::create(dir.path(), FileMode::PRIVATE)?;
            staged.file.write_all(content.as_bytes())?;
            staged.publish(&target)?;
            assert_eq!(fs::read_to_string(&target)?, content);
        }
        let mut dropped = Staged::create(dir.path(), FileMode::PRIVATE)?;
        dropped.file.write_all(b"three")?;
        drop(dropped);
        assert_eq!(fs::read_to_string(&target)?, "two");
        assert_eq!(fs::read_dir(dir.path())?.count(), 1);
        Ok(())
    }

    #[test]
    fn a_temporary_file_is_deleted_once_its_process_is_gone() -> io::Result<()> {
        let dir = tempfile::tempdir()?;
        let staged = Staged::create_named(dir.path())?;
        for other in [
            ".upperdeck-tmp-abc",
            "upperdeck-tmp-abcdef",
            ".upperdeck-abcdef",
        ] {
            fs::write(dir.path().join(other), "")?;
        }
        std::os::unix::fs::symlink("/etc/passwd", dir.path().join(".upperdeck-tmp-abcdef"))?;
        assert_eq!(delete_all_abandoned(dir.path())?, 0);
        // As after a crash: the lock is released, the name stays.
        let temporary = staged.temporary.ok_or(io::ErrorKind::NotFound)?;
        let path = temporary.keep().map_err(|error| error.error)?;
        drop(staged.file);
        assert!(path.exists());
        assert_eq!(delete_all_abandoned(dir.path())?, 1);
        assert!(!path.exists());
        assert_eq!(fs::read_dir(dir.path())?.count(), 4);
        Ok(())
    }
}
