//! What the rules keep out of the layer, and what is noted of it.

use std::os::fd::BorrowedFd;

use rustix::fs::{FileType, Stat};

use super::directory::Directory;
use crate::escape;
use crate::overlay::lower::Found;
use crate::overlay::root::{read_link_at, stat_at};
use crate::scan::{Error, Excluded, Facts, Reason};

impl Directory<'_> {
    /// Asks the rules, and notes what they leave out. No file type means a whiteout.
    pub(super) fn left_out(
        &mut self,
        path: &[u8],
        file_type: Option<FileType>,
        stat: &Stat,
        link: Option<&[u8]>,
        in_base: bool,
    ) -> bool {
        let facts = Facts {
            file_type,
            size: stat.st_size as u64,
            link,
            in_base,
        };
        let Some(reason) = self.walker.options.exclusions.check(path, &facts) else {
            return false;
        };
        self.note_left_out(path, reason);
        true
    }

    pub(super) fn note_left_out(&mut self, path: &[u8], reason: Reason) {
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

    /// Whether a link's target in the same directory of the merged tree is missing or an empty file.
    pub(super) fn leads_nowhere(
        &self,
        dir: BorrowedFd<'_>,
        link: &[u8],
        path: &[u8],
    ) -> Result<bool, Error> {
        let mut name = link.to_vec();
        // A few links in a row are usual (`libx.so -> libx.so.1 -> libx.so.1.2`); what goes elsewhere is not looked at.
        for _ in 0..8 {
            if name.contains(&b'/') {
                return Ok(false);
            }
            let failed = |error| self.walker.read_error(path, error);
            let stat = match (
                stat_at(dir, &name).map_err(failed)?,
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
