//! Files that have no name until they are complete, so that a killed save leaves nothing behind.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode, OFlags};
use rustix::io::Errno;
use tempfile::TempPath;

use crate::common::private_files::FileMode;

/// An open file that does not have its final name yet.
pub(super) struct Staged {
    pub(super) file: File,
    dir: PathBuf,
    /// Path of a temporary file, on file systems without `O_TMPFILE`.
    temporary: Option<TempPath>,
}

impl Staged {
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
            Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL) => {
                let (file, path) = tempfile::Builder::new()
                    .prefix(".upperdeck-")
                    .permissions(std::fs::Permissions::from_mode(0o600))
                    .tempfile_in(dir)?
                    .into_parts();
                Ok(Self {
                    file,
                    dir: dir.to_path_buf(),
                    temporary: Some(path),
                })
            }
            Err(e) => Err(e.into()),
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
        // link(2) does not replace an existing file. rename(2) does, and needs an existing name.
        let between = tempfile::Builder::new()
            .prefix(".upperdeck-")
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

/// Syncs a directory, so that its entries survive a crash.
pub(super) fn sync_directory(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
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
}
