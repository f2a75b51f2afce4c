//! Files and directories for their owner alone, whatever the umask says: what a session held is nobody else's.
//!
//! All is made with its mode, or without a name until it has it: there is no moment in which others can open it.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Write as _};
use std::os::unix::fs::{
    DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _,
};
use std::path::Path;
use std::str::FromStr;

use rustix::fs::OFlags;

/// What others may do with a file.
const OTHERS: u32 = 0o077;

/// The permission bits of files that are made. A directory has the right to enter wherever it has the right to read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileMode(u32);

impl FileMode {
    /// 0600, and 0700 for directories.
    pub const PRIVATE: Self = Self(0o600);

    /// That of `file`, without what an image's file does not have: execution, setuid. Its owner may read and write.
    pub fn of(file: &fs::Metadata) -> Self {
        Self(file.mode() & 0o666 | 0o600)
    }

    /// For files.
    pub fn file(self) -> u32 {
        self.0
    }

    /// For directories.
    pub fn directory(self) -> u32 {
        self.0 | (self.0 & 0o444) >> 2
    }

    /// Gives a file that was made with 0600, and has no name yet or a private one, its mode.
    pub fn set(self, file: &File) -> io::Result<()> {
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

/// Makes `dir` and what is missing above it. What is there already keeps its mode.
pub fn make_dir(dir: &Path, mode: FileMode) -> io::Result<()> {
    match DirBuilder::new().mode(0o700).create(dir) {
        Ok(()) if mode == FileMode::PRIVATE => Ok(()),
        // Wider than the umask may allow: by descriptor, so that no other directory is meant.
        Ok(()) => open_dir(dir, OFlags::NOFOLLOW)?
            .set_permissions(Permissions::from_mode(mode.directory())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let above = dir.parent().filter(|above| !above.as_os_str().is_empty());
            make_dir(above.ok_or(error)?, mode)?;
            make_dir(dir, mode)
        }
        // Where it cannot be looked at, that is what is wrong.
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

/// Makes `dir` with 0700, or takes others' rights from it. Another user's is refused, and one with something in it that is
/// not `ours` where others have rights: it was not made for this, and who uses it would lose it.
pub fn own_dir(dir: &Path, ours: impl Fn(&str) -> bool) -> io::Result<()> {
    make_dir(dir, FileMode::PRIVATE)?;
    let open = open_dir(dir, OFlags::empty())?;
    let there = open.metadata()?;
    let shown = crate::escape::text(&dir.display().to_string());
    let denied = |told| Err(io::Error::new(io::ErrorKind::PermissionDenied, told));
    let own = rustix::process::geteuid().as_raw();
    // Whatever its mode: its owner reads what is in it, and puts in what is believed later.
    if there.uid() != own {
        return denied(format!(
            "it belongs to user {}, and this runs as user {own}: 'chown {own} {shown}', or name another directory",
            there.uid()
        ));
    }
    if there.mode() & OTHERS == 0 {
        return Ok(());
    }
    for entry in fs::read_dir(dir)? {
        let name = entry?.file_name();
        if !name.to_str().is_some_and(&ours) {
            return denied(format!(
                "others may look into it (mode {:04o}), and it has in it what upperdeck did not make: 'chmod 700 {shown}', \
                 or name another directory",
                there.mode() & 0o7777
            ));
        }
    }
    tracing::warn!(dir = %dir.display(), mode = format!("{:04o}", there.mode() & 0o7777), "others could look into a directory of upperdeck's; from now on it has mode 0700");
    open.set_permissions(Permissions::from_mode(there.mode() & 0o7700))
}

/// Writes a file that is only as long as `bytes` afterwards: a new one with `mode`; one that is there (a device, too)
/// keeps its own. Where it cannot be written, none is left that was not there, and no part of the bytes in one that was.
pub fn write(path: &Path, bytes: &[u8], mode: FileMode) -> io::Result<()> {
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

/// Whether others than its owner and its group may read or change a file with a secret. Only regular files: what stands
/// behind a pipe has no such rights.
pub fn is_shared(file: &fs::Metadata) -> bool {
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
        own_dir(&loose, |_| false)?;
        assert_eq!(mode(&loose), 0o700, "an empty one");
        fs::set_permissions(&loose, Permissions::from_mode(0o755))?;
        fs::write(loose.join("ours"), "")?;
        own_dir(&loose, |name| name.starts_with("our"))?;
        assert_eq!(mode(&loose), 0o700);
        fs::write(loose.join("somebody's"), "")?;
        own_dir(&loose, |name| name.starts_with("our"))?;
        fs::set_permissions(&loose, Permissions::from_mode(0o755))?;
        let refused = own_dir(&loose, |name| name.starts_with("our"));
        let told = refused.err().map(|error| error.to_string());
        assert!(told.is_some_and(|told| told.contains("chmod 700")));
        assert_eq!(mode(&loose), 0o755, "left as it is");
        Ok(())
    }

    #[test]
    fn a_directory_of_another_user_is_refused_though_nobody_else_sees_into_it() -> io::Result<()> {
        if !rustix::process::geteuid().is_root() {
            // Nobody else can give a directory away.
            return Ok(());
        }
        let dir = tempfile::tempdir()?;
        let theirs = dir.path().join("theirs");
        for mode in [0o700, 0o755] {
            make_dir(&theirs, FileMode::PRIVATE)?;
            fs::set_permissions(&theirs, Permissions::from_mode(mode))?;
            std::os::unix::fs::chown(&theirs, Some(1234), Some(1234))?;
            let told = own_dir(&theirs, |_| true).err().map(|e| e.to_string());
            assert!(
                told.is_some_and(|told| told.contains("chown 0 ")),
                "{mode:o}"
            );
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
