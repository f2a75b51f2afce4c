//! Compares entries with those of the base: an entry equal to the base's is left out of the layer and causes no
//! warning.

use std::io::{self, Read};

use rustix::fs::{FileType, Stat};

use super::directory::Directory;
use super::entry::{CAPABILITY, SET_ID, kind_of, mode_of};
use super::read_error;
use crate::layer::scan::{Entry, Error, Extra, Flags, Kind, Xattr};
use crate::node::overlay::lower::{Found, Place, basename};

impl Directory<'_> {
    pub(super) fn compare_dir(
        &self,
        entry: &mut Entry,
        extra: &Extra,
        place: &Place,
    ) -> Result<(), Error> {
        let (base, kept) = self.walker.base_facts(place)?;
        let owner = self.walker.owner_of(&base, place.root + 1, &place.path)?;
        if mode_of(&base) != entry.mode || owner != (entry.uid, entry.gid) || kept != extra.xattrs()
        {
            return Ok(());
        }
        let same_time =
            (base.st_mtime, base.st_mtime_nsec as u32) == (entry.mtime, entry.mtime_nsec);
        entry.flags.set(if same_time {
            Flags::UNCHANGED
        } else {
            Flags::TIME_ONLY
        });
        Ok(())
    }

    /// Marks a copied-up entry as unchanged if it equals the base's; compares the metadata first, then the content.
    pub(super) fn compare_other(
        &self,
        entry: &mut Entry,
        extra: &mut Extra,
        place: &Place,
        path: &[u8],
    ) -> Result<(), Error> {
        let walker = self.walker;
        let (base, kept) = walker.base_facts(place)?;
        let same = kind_of(FileType::from_raw_mode(base.st_mode)) == Some(entry.kind)
            && mode_of(&base) == entry.mode
            && walker.owner_of(&base, place.root + 1, &place.path)? == (entry.uid, entry.gid)
            && (base.st_mtime, base.st_mtime_nsec as u32) == (entry.mtime, entry.mtime_nsec)
            && base.st_nlink as u32 == entry.nlink
            && kept == extra.xattrs();
        if !same {
            return Ok(());
        }
        let root = &walker.lowers.roots[usize::from(place.root)];
        let equal = match entry.kind {
            Kind::File if base.st_size as u64 != entry.size => false,
            Kind::File => {
                let data =
                    walker
                        .lowers
                        .data_of(place.clone(), base, &self.task.merge, basename(path));
                match data.map_err(|e| walker.read_error(path, e))? {
                    Some((data, stat)) => self.same_content(entry, extra, path, &data, &stat)?,
                    None => false,
                }
            }
            Kind::Symlink => {
                let target = root
                    .read_link(&place.path)
                    .map_err(|e| read_error(root.path(), &place.path, e))?;
                extra.link.as_deref() == Some(&target)
            }
            Kind::Char | Kind::Block => base.st_rdev == entry.rdev,
            _ => true,
        };
        if equal {
            entry.flags.set(Flags::UNCHANGED);
            extra.base = Some((place.root, base.st_ino));
        }
        Ok(())
    }

    fn same_content(
        &self,
        entry: &Entry,
        extra: &Extra,
        path: &[u8],
        base: &Place,
        base_stat: &Stat,
    ) -> Result<bool, Error> {
        let walker = self.walker;
        if let Some(elsewhere) = &extra.content {
            return Ok(elsewhere.root == base.root + 1 && elsewhere.ino == base_stat.st_ino);
        }
        let base_root = &walker.lowers.roots[usize::from(base.root)];
        let ours = walker
            .upper
            .open_file(path, entry.ino)
            .map_err(|e| walker.read_error(path, e))?;
        let theirs = base_root
            .open_file(&base.path, base_stat.st_ino)
            .map_err(|e| read_error(base_root.path(), &base.path, e))?;
        let (Some(ours), Some(theirs)) = (ours, theirs) else {
            return Ok(false);
        };
        same_bytes(ours.into(), theirs.into()).map_err(|e| walker.read_error(path, e))
    }

    /// Returns whether a file runs with privileges other than its caller's (setuid, setgid or file capabilities),
    /// unless the base's file has the same.
    pub(super) fn is_privileged(
        &self,
        entry: &Entry,
        extra: &Extra,
        base: &Found,
        path: &[u8],
    ) -> Result<bool, Error> {
        let capability = |xattrs: &[Xattr]| {
            xattrs
                .iter()
                .find(|(name, _)| name == CAPABILITY)
                .map(|(_, value)| value.clone())
        };
        let ours = (entry.mode & SET_ID, capability(extra.xattrs()));
        if entry.kind != Kind::File || ours == (0, None) {
            return Ok(false);
        }
        if let Found::Other { place, .. } = base {
            let (stat, kept) = self.walker.base_facts(place)?;
            if (mode_of(&stat) & SET_ID, capability(&kept)) == ours
                && self.walker.owner_of(&stat, place.root + 1, path)? == (entry.uid, entry.gid)
            {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

fn same_bytes(mut a: std::fs::File, mut b: std::fs::File) -> io::Result<bool> {
    let (mut left, mut right) = (vec![0; 128 * 1024], vec![0; 128 * 1024]);
    loop {
        let n = a.read(&mut left)?;
        if n == 0 {
            return Ok(b.read(&mut right[..1])? == 0);
        }
        match b.read_exact(&mut right[..n]) {
            Ok(()) if left[..n] == right[..n] => {}
            Ok(()) => return Ok(false),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(false),
            Err(error) => return Err(error),
        }
    }
}
