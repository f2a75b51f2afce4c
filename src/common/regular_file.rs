//! Opens files in directories into which other programs or users may have put anything. What is no regular file is
//! refused at once: a FIFO would otherwise keep the opening process waiting for its other end, where no signal ends it.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;

use rustix::fs::OFlags;
use rustix::io::Errno;

/// Opens a regular file for reading.
///
/// Fails with [`io::ErrorKind::InvalidInput`] if it is something else.
pub(crate) fn open(path: &Path) -> io::Result<File> {
    open_with(path, OpenOptions::new().read(true), OFlags::empty())
}

/// Like [`open`], without following a symbolic link as the last part of the path.
pub(crate) fn open_no_follow(path: &Path) -> io::Result<File> {
    open_with(path, OpenOptions::new().read(true), OFlags::NOFOLLOW)
}

/// Opens a regular file that this program has written and trusts: it belongs to the user of this process, and is no
/// symbolic link.
///
/// Fails with [`io::ErrorKind::PermissionDenied`] if it belongs to another user.
pub(crate) fn open_own(path: &Path) -> io::Result<File> {
    let file = open_no_follow(path)?;
    let (owner, own) = (file.metadata()?.uid(), rustix::process::geteuid().as_raw());
    if owner != own {
        return Err(io::Error::new(
            io::ErrorKind::PermissionDenied,
            format!("it belongs to user {owner}, and this runs as user {own}"),
        ));
    }
    Ok(file)
}

/// Opens or creates a regular file. `flags` are added to those of `options`.
pub(crate) fn open_with(path: &Path, options: &mut OpenOptions, flags: OFlags) -> io::Result<File> {
    let flags = flags | OFlags::NONBLOCK;
    let file = match options.custom_flags(flags.bits() as i32).open(path) {
        // A FIFO that is opened for writing and has no reader, or a socket.
        Err(error) if error.raw_os_error() == Some(Errno::NXIO.raw_os_error()) => {
            return Err(not_regular());
        }
        opened => opened?,
    };
    if !file.metadata()?.is_file() {
        return Err(not_regular());
    }
    Ok(file)
}

fn not_regular() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file")
}

/// Reads a regular file of at most `max` bytes.
///
/// Fails with [`io::ErrorKind::FileTooLarge`] if it is larger.
pub(crate) fn read(path: &Path, max: u64) -> io::Result<Vec<u8>> {
    read_open(open(path)?, max)
}

/// Reads the rest of an open file of at most `max` bytes, as [`read`] does.
pub(crate) fn read_open(file: File, max: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.take(max.saturating_add(1)).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > max {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    Ok(bytes)
}

/// Opens a directory, and nothing else.
pub(crate) fn open_directory(path: &Path) -> io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(rustix::fs::open(path, flags, rustix::fs::Mode::empty())?.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fifo_is_refused_at_once_and_a_link_where_it_matters() -> io::Result<()> {
        let dir = tempfile::tempdir()?;
        let fifo = dir.path().join("fifo");
        let mode = rustix::fs::Mode::from_raw_mode(0o600);
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, mode, 0)?;
        let create = |path: &Path| {
            let mut options = OpenOptions::new();
            open_with(path, options.write(true).create(true), OFlags::empty())
        };
        for opened in [
            open(&fifo),
            open_own(&fifo),
            create(&fifo),
            open(dir.path()),
            open(Path::new("/dev/zero")),
        ] {
            let kind = opened.err().map(|error| error.kind());
            assert_eq!(kind, Some(io::ErrorKind::InvalidInput));
        }
        assert!(open_directory(&fifo).is_err());
        let (file, link) = (dir.path().join("file"), dir.path().join("link"));
        std::fs::write(&file, "four")?;
        std::os::unix::fs::symlink(&file, &link)?;
        assert!(open(&link).is_ok() && open_own(&file).is_ok());
        assert!(open_no_follow(&link).is_err() && open_own(&link).is_err());
        assert_eq!(read(&file, 4)?, b"four");
        let larger = read(&file, 3).err().map(|error| error.kind());
        assert_eq!(larger, Some(io::ErrorKind::FileTooLarge));
        Ok(())
    }

    #[test]
    fn a_file_of_another_user_is_not_ones_own() -> io::Result<()> {
        if !rustix::process::geteuid().is_root() {
            crate::common::ignoring::ignore("needs root, which alone gives a file to another user");
            return Ok(());
        }
        let dir = tempfile::tempdir()?;
        let theirs = dir.path().join("theirs");
        std::fs::write(&theirs, "")?;
        std::os::unix::fs::chown(&theirs, Some(1234), None)?;
        let kind = open_own(&theirs).err().map(|error| error.kind());
        assert_eq!(kind, Some(io::ErrorKind::PermissionDenied));
        Ok(())
    }
}
