//! Applies the exclusion rules to the entries of a directory, and records what they leave out.

use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::fs::{FileType, Stat};

use super::directory::Directory;
use crate::common::escape;
use crate::layer::scan::{Error, Excluded, Facts, Reason};
use crate::node::overlay::lower::{Found, basename};
use crate::node::overlay::root::{read_link_at, stat_at};
use crate::node::overlay::volume::{NameStatus, Volume};

/// Length in bytes of the longest path that can be unpacked: `PATH_MAX` (4096) less the prefix of the directory into
/// which Podman, umoci and others unpack.
const LONGEST_PATH: usize = 3840;
/// Prefix of a whiteout's name.
const WHITEOUT: &[u8] = b".wh.";

impl Directory<'_> {
    /// Applies the rules, and records the entry if it is left out; returns whether it is. No file type means a
    /// whiteout.
    pub(super) fn exclude(
        &mut self,
        path: &[u8],
        file_type: Option<FileType>,
        stat: &Stat,
        link: Option<&[u8]>,
        in_base: bool,
    ) -> bool {
        // The entry itself is left out, and the name of a whiteout for it is not shorter.
        let mark = file_type.map_or(WHITEOUT.len(), |_| 0);
        if path.len() + mark > LONGEST_PATH {
            self.record_excluded(path, Reason::PathTooLong);
            return true;
        }
        if file_type.is_some() && basename(path).starts_with(WHITEOUT) {
            self.record_excluded(path, Reason::ReservedName);
            return true;
        }
        let facts = Facts {
            file_type,
            size: stat.st_size as u64,
            link,
            in_base,
        };
        let Some(reason) = self.walker.options.exclusions.check(path, &facts) else {
            return false;
        };
        self.record_excluded(path, reason);
        true
    }

    pub(super) fn record_excluded(&mut self, path: &[u8], reason: Reason) {
        if matches!(
            reason,
            Reason::Mount | Reason::MountStub | Reason::RuntimeDevice | Reason::Gpu
        ) {
            self.output.stubs = true;
        }
        self.output.partial = true;
        let of_kind = self.report.excluded.entry(reason.kind()).or_default();
        of_kind.add(Excluded {
            path: escape::path(path),
            reason,
        });
    }

    /// Leaves out an entry that the container itself may not read. It is inspected on every scan, as it may become
    /// readable.
    pub(super) fn record_unreadable(&mut self, name: &[u8], path: &[u8]) -> Result<(), Error> {
        self.report.unreadable.add(escape::path(path));
        self.output.partial = true;
        self.mark_resolved(name)
    }

    /// Returns the status of a name in the directory; `None` if nothing is to be added to the layer, which is recorded.
    pub(super) fn status(
        &mut self,
        dir: BorrowedFd<'_>,
        name: &[u8],
        path: &[u8],
    ) -> Result<Option<Stat>, Error> {
        let failed = |error| self.walker.read_error(path, error);
        let look = match self.walker.volume {
            Some(volume) => volume.name_status(dir, name).map_err(failed)?,
            None => match stat_at(dir, name).map_err(failed)? {
                Some(stat) => return Ok(Some(stat)),
                None => NameStatus::Gone,
            },
        };
        self.visible_status(look, name, path)
    }

    fn visible_status(
        &mut self,
        look: NameStatus,
        name: &[u8],
        path: &[u8],
    ) -> Result<Option<Stat>, Error> {
        match look {
            NameStatus::Present(stat) => return Ok(Some(*stat)),
            NameStatus::Gone => self.report.vanished.add(escape::path(path)),
            NameStatus::Denied => self.record_unreadable(name, path)?,
            NameStatus::Mounted => {
                self.record_excluded(path, Reason::Mount);
                self.mark_resolved(name)?;
            }
        }
        Ok(None)
    }

    /// Opens an entry with the status `stat` for inspection; returns `None` if it is gone or may not be read.
    pub(super) fn readable(
        &mut self,
        volume: &Volume,
        dir: BorrowedFd<'_>,
        name: &[u8],
        path: &[u8],
        stat: &Stat,
    ) -> Result<Option<OwnedFd>, Error> {
        let failed = |error| self.walker.read_error(path, error);
        let handle = match Volume::handle(dir, name) {
            Ok(handle) => handle,
            Err(error) => {
                let look = volume.not_there(error).map_err(failed)?;
                self.visible_status(look, name, path)?;
                return Ok(None);
            }
        };
        let now = rustix::fs::fstat(&handle).map_err(|e| failed(e.into()))?;
        if (now.st_ino, now.st_mode) != (stat.st_ino, stat.st_mode) {
            self.report.vanished.add(escape::path(path));
            return Ok(None);
        }
        let file_type = FileType::from_raw_mode(stat.st_mode);
        let may = match (volume.root().identity(), file_type) {
            (Some(who), FileType::RegularFile) => who.may_read(&handle, false).map_err(failed)?,
            (Some(who), FileType::Directory) => who.may_read(&handle, true).map_err(failed)?,
            // Other types have no content beyond their directory entry.
            _ => true,
        };
        if !may {
            self.record_unreadable(name, path)?;
        }
        Ok(may.then_some(handle))
    }

    /// Returns whether a link's target in the same directory of the merged tree is missing or an empty file.
    pub(super) fn is_dangling_link(
        &self,
        dir: BorrowedFd<'_>,
        link: &[u8],
        path: &[u8],
    ) -> Result<bool, Error> {
        let mut name = link.to_vec();
        // Short chains of links are common (`libx.so -> libx.so.1 -> libx.so.1.2`); links to other directories are not
        // followed.
        for _ in 0..8 {
            if name.contains(&b'/') {
                return Ok(false);
            }
            let failed = |error| self.walker.read_error(path, error);
            let stat = match (
                self.walker.status(dir, &name).map_err(failed)?,
                self.base(&name, path)?,
            ) {
                (Some(stat), _) | (None, Found::Other { stat, .. } | Found::Dir { stat, .. }) => {
                    stat
                }
                (None, Found::Absent) => return Ok(true),
            };
            match FileType::from_raw_mode(stat.st_mode) {
                FileType::RegularFile => return Ok(stat.st_size == 0),
                FileType::CharacterDevice => return Ok(stat.st_rdev == 0),
                FileType::Symlink => match read_link_at(dir, &name).map_err(failed)? {
                    Some(next) => name = next,
                    None => return Ok(false),
                },
                _ => return Ok(false),
            }
        }
        Ok(false)
    }
}
