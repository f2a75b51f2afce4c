//! Creates files and directories that only their owner may access, regardless of the umask, because they hold data of a
//! session.
//!
//! Everything is created with its final mode, or with no name until it has that mode, so there is no window in which
//! others can open it.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Write as _};
use std::os::unix::fs::{
    DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _,
};
use std::path::Path;
use std::str::FromStr;

use rustix::fs::OFlags;

use super::regular_file;

/// Permission bits of group and others.
const GROUP_AND_OTHERS: u32 = 0o077;

/// Permission bits of created files. A directory gets the execute bit wherever it has the read bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FileMode(u32);

impl FileMode {
    /// 0600 for files, 0700 for directories.
    pub(crate) const PRIVATE: Self = Self(0o600);

    /// Returns the mode of `file` without the bits that an image file does not need (execute, setuid), and with read
    /// and write for the owner.
    pub(crate) fn of(file: &fs::Metadata) -> Self {
        Self(file.mode() & 0o666 | 0o600)
    }

    /// Returns whether a file has exactly this mode.
    pub(crate) fn is_of(self, file: &fs::Metadata) -> bool {
        file.mode() & 0o7777 == self.0
    }

    /// Returns the mode for directories.
    pub(crate) fn directory(self) -> u32 {
        self.0 | (self.0 & 0o444) >> 2
    }

    /// Sets the mode of a file that was created with 0600 and has no name yet, or lies in a private directory.
    pub(crate) fn set(self, file: &File) -> io::Result<()> {
        file.set_permissions(Permissions::from_mode(self.0))
    }
}

impl FromStr for FileMode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mode = u32::from_str_radix(text, 8).ok();
        mode.filter(|mode| mode & !0o666 == 0 && mode & 0o600 == 0o600)
            .map(Self)
            .ok_or_else(|| {
                "expected an octal mode of files, 0600 to 0666; directories get x where they have r"
                    .to_owned()
            })
    }
}

/// Creates `dir` and its missing parents. Directories that exist keep their mode.
pub(crate) fn make_dir(dir: &Path, mode: FileMode) -> io::Result<()> {
    match DirBuilder::new().mode(0o700).create(dir) {
        Ok(()) if mode == FileMode::PRIVATE => Ok(()),
        // The mode may be wider than the umask permits. It is set by descriptor, so that no other directory is changed.
        Ok(()) => open_dir(dir, OFlags::NOFOLLOW)?
            .set_permissions(Permissions::from_mode(mode.directory())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let above = dir.parent().filter(|above| !above.as_os_str().is_empty());
            make_dir(above.ok_or(error)?, mode)?;
            make_dir(dir, mode)
        }
        // If it cannot be examined, that error is reported.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            fs::metadata(dir)?.is_dir().then_some(()).ok_or(error)
        }
        Err(error) => Err(error),
    }
}

fn open_dir(dir: &Path, more: OFlags) -> io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | more;
    Ok(rustix::fs::open(dir, flags, rustix::fs::Mode::empty())?.into())
}

/// Takes an exclusive lock on the file at `path`, which is created with mode 0600. Returns `None` if another process holds
/// it. The lock is released with the descriptor. Whoever holds it may remove the file.
pub(crate) fn try_lock(path: &Path) -> io::Result<Option<File>> {
    loop {
        let mut options = OpenOptions::new();
        let options = options.write(true).create(true).truncate(false).mode(0o600);
        let file = regular_file::open_with(path, options, OFlags::NOFOLLOW)?;
        let how = rustix::fs::FlockOperation::NonBlockingLockExclusive;
        match rustix::io::retry_on_intr(|| rustix::fs::flock(&file, how)) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
            Err(error) => return Err(error.into()),
        }
        // If another process removed the file in between, this lock has no effect.
        if is_at(&file, path)? {
            return Ok(Some(file));
        }
    }
}

/// Returns whether `path` still refers to this file.
pub(crate) fn is_at(file: &File, path: &Path) -> io::Result<bool> {
    let there = match fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        // An error is not treated as "a different file": the caller would retry forever.
        there => there?,
    };
    let ours = file.metadata()?;
    Ok((there.dev(), there.ino()) == (ours.dev(), ours.ino()))
}

/// Creates `dir` with 0700, or removes the rights of group and others from an existing one.
///
/// Fails with `PermissionDenied` if `dir` belongs to another user, or if others have rights to it and it contains an
/// entry for which `ours` returns false: such a directory was not made for this purpose, and its users would lose
/// access.
pub(crate) fn prepare_dir(dir: &Path, ours: impl Fn(&str) -> bool) -> io::Result<()> {
    make_dir(dir, FileMode::PRIVATE)?;
    let open = open_dir(dir, OFlags::empty())?;
    let there = open.metadata()?;
    let shown = crate::common::escape::text(&dir.display().to_string());
    let denied = |told| Err(io::Error::new(io::ErrorKind::PermissionDenied, told));
    let own = rustix::process::geteuid().as_raw();
    // Refused regardless of the mode: the owner could read what is stored there, and could add files that are trusted
    // later.
    let (owned, open_to_others) = (there.uid() == own, there.mode() & GROUP_AND_OTHERS != 0);
    if owned && !open_to_others {
        return Ok(());
    }
    let mut only_ours = true;
    for entry in fs::read_dir(dir)? {
        only_ours = only_ours && entry?.file_name().to_str().is_some_and(&ours);
    }
    if !owned {
        // Other programs may need what is there: /tmp does not become usable by giving it away.
        let advice = if only_ours {
            format!("'chown {own} {shown}', or name")
        } else {
            "name".to_owned()
        };
        return denied(format!(
            "it belongs to user {}, and this runs as user {own}: {advice} a directory for upperdeck alone",
            there.uid()
        ));
    }
    if !only_ours {
        return denied(format!(
            "others may look into it (mode {:04o}), and it has in it what upperdeck did not make: name a directory for \
             upperdeck alone, e.g. a new one in {shown}",
            there.mode() & 0o7777
        ));
    }
    tracing::warn!(dir = %dir.display(), mode = format!("{:04o}", there.mode() & 0o7777), "others could look into a directory of upperdeck's; from now on it has mode 0700");
    open.set_permissions(Permissions::from_mode(there.mode() & 0o7700))
}

/// Writes `bytes` to a file and truncates it to that length. A new file gets `mode`; an existing one (which may be a
/// device) keeps its mode.
pub(crate) fn write(path: &Path, bytes: &[u8], mode: FileMode) -> io::Result<()> {
    let made = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path);
    match made {
        Ok(mut file) => {
            let written = mode.set(&file).and_then(|()| file.write_all(bytes));
            written.inspect_err(|_| drop(fs::remove_file(path)))
        }
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            let mut file = OpenOptions::new().write(true).truncate(true).open(path)?;
            // A device has no length.
            file.write_all(bytes).inspect_err(|_| drop(file.set_len(0)))
        }
        Err(error) => Err(error),
    }
}

/// Returns whether users other than the owner and the group can read or change a file that holds a secret. Only regular
/// files count: the mode of a pipe says nothing about its source.
pub(crate) fn is_accessible_to_others(file: &fs::Metadata) -> bool {
    file.is_file() && file.mode() & 0o007 != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).map_or(0, |there| there.mode() & 0o7777)
    }

    #[test]
    fn modes_are_those_of_files() -> Result<(), String> {
        for (text, directory) in [
            ("0600", 0o700),
            ("640", 0o750),
            ("0644", 0o755),
            ("0660", 0o770),
            ("0666", 0o777),
        ] {
            let mode: FileMode = text.parse()?;
            assert_eq!(mode.directory(), directory, "{text}");
        }
        for text in ["", "0755", "0444", "4644", "0o644", "rw-", "-1", "0000"] {
            assert!(text.parse::<FileMode>().is_err(), "{text}");
        }
        Ok(())
    }

    #[test]
    fn directories_are_made_private_or_as_wide_as_was_asked_for()
    -> Result<(), Box<dyn std::error::Error>> {
        let dir = tempfile::tempdir()?;
        let deep = dir.path().join("a/b/c");
        make_dir(&deep, FileMode::PRIVATE)?;
        let wide = dir.path().join("w/x");
        make_dir(&wide, "0666".parse()?)?;
        for (path, expected) in [("a", 0o700), ("a/b/c", 0o700), ("w", 0o777), ("w/x", 0o777)] {
            assert_eq!(mode(&dir.path().join(path)), expected, "{path}");
        }
        make_dir(&wide, FileMode::PRIVATE)?;
        assert_eq!(mode(&wide), 0o777, "it was there");
        fs::write(dir.path().join("file"), "")?;
        assert!(make_dir(&dir.path().join("file"), FileMode::PRIVATE).is_err());
        Ok(())
    }

    #[test]
    fn a_directory_of_ours_is_tightened_and_anothers_refused() -> io::Result<()> {
        let dir = tempfile::tempdir()?;
        let loose = dir.path().join("loose");
        fs::create_dir(&loose)?;
        fs::set_permissions(&loose, Permissions::from_mode(0o755))?;
        prepare_dir(&loose, |_| false)?;
        assert_eq!(mode(&loose), 0o700, "an empty one");
        fs::set_permissions(&loose, Permissions::from_mode(0o755))?;
        fs::write(loose.join("ours"), "")?;
        prepare_dir(&loose, |name| name.starts_with("our"))?;
        assert_eq!(mode(&loose), 0o700);
        fs::write(loose.join("somebody's"), "")?;
        prepare_dir(&loose, |name| name.starts_with("our"))?;
        fs::set_permissions(&loose, Permissions::from_mode(0o755))?;
        let refused = prepare_dir(&loose, |name| name.starts_with("our"));
        let told = refused.err().map(|error| error.to_string());
        assert!(told.is_some_and(|told| !told.contains("chmod") && told.contains("a new one in")));
        assert_eq!(mode(&loose), 0o755, "left as it is");
        Ok(())
    }

    #[test]
    fn a_directory_of_another_user_is_refused_though_nobody_else_sees_into_it() -> io::Result<()> {
        if !rustix::process::geteuid().is_root() {
            crate::common::ignoring::ignore(
                "needs root, which alone gives a directory to another user",
            );
            return Ok(());
        }
        let dir = tempfile::tempdir()?;
        let theirs = dir.path().join("theirs");
        for mode in [0o700, 0o755] {
            make_dir(&theirs, FileMode::PRIVATE)?;
            fs::set_permissions(&theirs, Permissions::from_mode(mode))?;
            std::os::unix::fs::chown(&theirs, Some(1234), Some(1234))?;
            let told = prepare_dir(&theirs, |_| true).err().map(|e| e.to_string());
            assert!(
                told.is_some_and(|told| told.contains("chown 0 ")),
                "{mode:o}"
            );
            // Of a directory with other files, that would be bad advice.
            fs::write(theirs.join("another's"), "")?;
            let told = prepare_dir(&theirs, |_| false).err().map(|e| e.to_string());
            assert!(
                told.is_some_and(|told| !told.contains("chown") && told.contains("1234")),
                "{mode:o}"
            );
            fs::remove_file(theirs.join("another's"))?;
        }
        Ok(())
    }

    #[test]
    fn a_file_that_is_there_keeps_its_mode() -> Result<(), Box<dyn std::error::Error>> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("x");
        write(&path, b"longer", FileMode::PRIVATE)?;
        assert_eq!(mode(&path), 0o600);
        fs::set_permissions(&path, Permissions::from_mode(0o640))?;
        write(&path, b"short", "0644".parse()?)?;
        assert_eq!((mode(&path), fs::read(&path)?), (0o640, b"short".to_vec()));
        let wide = dir.path().join("w");
        write(&wide, b"", "0666".parse()?)?;
        assert_eq!(mode(&wide), 0o666, "whatever the umask");
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(dir.path().join("nowhere"), &link)?;
        assert!(write(&link, b"x", FileMode::PRIVATE).is_err());
        assert!(!dir.path().join("nowhere").exists());
        Ok(())
    }
}
