//! Reads the status and the attributes of one name on disk, as seen in the container.

use std::ffi::CString;
use std::os::fd::AsFd;

use rustix::fs::{FileType, OFlags, Stat};

use super::{Walker, read_error};
use crate::common::escape;
use crate::layer::scan::changes::same_stamps;
use crate::layer::scan::earlier::EarlierScan;
use crate::layer::scan::rows::NO_EXTRA;
use crate::layer::scan::{Entry, Error, Flags, Kind, Xattr};
use crate::node::overlay::id_map::{self, IdMapping};
use crate::node::overlay::lower::Place;
use crate::node::overlay::root::{Follow, xattr_at, xattr_names_at};
use crate::node::overlay::xattr::{
    Mark, ValueError, XattrAction, acl_inside, capability_inside, classify, classify_plain,
    proc_path,
};

/// setuid and setgid.
pub(super) const SET_ID: u16 = 0o6000;

/// The attribute that holds file capabilities.
pub(super) const CAPABILITY: &[u8] = b"security.capability";

/// Attributes of one entry, by purpose.
#[derive(Default)]
pub(in crate::layer::scan) struct Attributes {
    pub(super) kept: Vec<Xattr>,
    pub(in crate::layer::scan) opaque: Option<Vec<u8>>,
    pub(in crate::layer::scan) redirect: Option<Vec<u8>>,
    pub(super) metacopy: bool,
    pub(super) whiteout: bool,
    pub(super) nlink: Option<Vec<u8>>,
}

impl Walker<'_> {
    /// Returns whether an entry is unchanged since the earlier scan, so that all its facts are still valid.
    pub(in crate::layer::scan) fn is_unchanged(
        &self,
        earlier: &EarlierScan<'_>,
        index: u32,
        stat: &Stat,
        path: &[u8],
    ) -> Result<bool, Error> {
        let before = &earlier.scan.entry(index);
        if before.root != 0 || !earlier.scan.has_reliable_stamps(before) {
            return Ok(false);
        }
        let kind = kind_of(FileType::from_raw_mode(stat.st_mode));
        if kind != Some(before.kind) || stat.st_ino != before.ino || stat.st_ctime != before.ctime {
            return Ok(false);
        }
        let mut now = self.entry(stat, 0, before.kind, path)?;
        let extra = earlier.scan.extra(before);
        if extra.is_some_and(|extra| extra.content.is_some()) {
            // The size is that of the content, which is in a lower.
            now.size = before.size;
        }
        Ok(same_stamps(&now, before) && !extra.is_some_and(|extra| extra.moved))
    }

    pub(in crate::layer::scan) fn entry(
        &self,
        stat: &Stat,
        root: u16,
        kind: Kind,
        path: &[u8],
    ) -> Result<Entry, Error> {
        let (uid, gid) = self.owner_of(stat, root, path)?;
        let size = if kind == Kind::File {
            u64::try_from(stat.st_size).unwrap_or(0)
        } else {
            0
        };
        Ok(Entry {
            parent: 0,
            store: 0,
            name_at: 0,
            name_len: 0,
            root,
            kind,
            flags: Flags::default(),
            mode: mode_of(stat),
            extra: NO_EXTRA,
            uid,
            gid,
            nlink: stat.st_nlink as u32,
            ino: stat.st_ino,
            size,
            allocated: stat.st_blocks as u64 * 512,
            rdev: if matches!(kind, Kind::Char | Kind::Block) {
                stat.st_rdev
            } else {
                0
            },
            mtime: stat.st_mtime,
            mtime_nsec: stat.st_mtime_nsec as u32,
            ctime: stat.st_ctime,
            ctime_nsec: stat.st_ctime_nsec as u32,
        })
    }

    /// Returns the maps from the ids in `root` to the container's: users, groups.
    fn ids_of(&self, root: u16) -> (&[IdMapping], &[IdMapping]) {
        if self.id_mapped.get(usize::from(root)) == Some(&true) {
            (&self.stored_ids.0, &self.stored_ids.1)
        } else {
            (self.options.uid_map, self.options.gid_map)
        }
    }

    /// Returns owner and group, as seen in the container, of the inode at `path` in `root`.
    ///
    /// Fails if either is outside the container's ID map.
    pub(super) fn owner_of(
        &self,
        stat: &Stat,
        root: u16,
        path: &[u8],
    ) -> Result<(u32, u32), Error> {
        let (uids, gids) = self.ids_of(root);
        let unmapped = |what, id| Error::Unmapped {
            path: match path {
                [] => "/".to_owned(),
                path => escape::path(path),
            },
            what,
            id,
        };
        let uid = id_map::container_id(uids, stat.st_uid);
        let gid = id_map::container_id(gids, stat.st_gid);
        Ok((
            uid.ok_or_else(|| unmapped("user", stat.st_uid))?,
            gid.ok_or_else(|| unmapped("group", stat.st_gid))?,
        ))
    }

    /// Returns the attributes of `at` in the upper, by purpose; appends the names of those that are left out to
    /// `dropped`.
    pub(in crate::layer::scan) fn attributes_of(
        &self,
        at: impl Into<Vec<u8>>,
        follow: Follow,
        path: &[u8],
        dropped: &mut Vec<Vec<u8>>,
    ) -> Result<Attributes, Error> {
        self.attributes_in(0, at, follow, path, dropped)
    }

    fn attributes_in(
        &self,
        root: u16,
        at: impl Into<Vec<u8>>,
        follow: Follow,
        path: &[u8],
        dropped: &mut Vec<Vec<u8>>,
    ) -> Result<Attributes, Error> {
        let mut attributes = Attributes::default();
        let at = CString::new(at).map_err(|e| self.read_error(path, e.into()))?;
        let at = at.as_c_str();
        let list = xattr_names_at(at, follow).map_err(|source| self.read_error(path, source))?;
        for name in list.split(|&b| b == 0).filter(|n| !n.is_empty()) {
            let value = || -> Result<Option<Vec<u8>>, Error> {
                let name = CString::new(name).map_err(|e| self.read_error(path, e.into()))?;
                xattr_at(at, name.as_c_str(), follow)
                    .map_err(|source| self.read_error(path, source))
            };
            let fate = match self.volume {
                Some(_) => classify_plain(name),
                None => classify(name, self.namespace),
            };
            match fate {
                XattrAction::Mark(Mark::Opaque) => attributes.opaque = value()?,
                XattrAction::Mark(Mark::Redirect) => attributes.redirect = value()?,
                XattrAction::Mark(Mark::Metacopy) => attributes.metacopy = true,
                XattrAction::Mark(Mark::Whiteout) => attributes.whiteout = true,
                XattrAction::Mark(Mark::Nlink) => attributes.nlink = value()?,
                XattrAction::Mark(Mark::Kernel) => {}
                XattrAction::Drop | XattrAction::Mark(Mark::Protected) => {
                    dropped.push(name.to_vec());
                }
                XattrAction::Keep(kept) => {
                    if let Some(value) = value()? {
                        let value = self.value_inside(root, &kept, value).map_err(|source| {
                            Error::Xattr {
                                path: escape::path(path),
                                source,
                            }
                        })?;
                        attributes.kept.push((kept.into_owned(), value));
                    }
                }
            }
        }
        attributes.kept.sort();
        Ok(attributes)
    }

    fn value_inside(&self, root: u16, name: &[u8], value: Vec<u8>) -> Result<Vec<u8>, ValueError> {
        let (uids, gids) = self.ids_of(root);
        let uid = |id| id_map::container_id(uids, id);
        let gid = |id| id_map::container_id(gids, id);
        match name {
            b"security.capability" => capability_inside(&value, uid),
            n if n.starts_with(b"system.posix_acl_") => acl_inside(&value, uid, gid),
            _ => Ok(value),
        }
    }

    /// Returns the status and the kept attributes of an entry of a lower.
    pub(super) fn base_facts(&self, place: &Place) -> Result<(Stat, Vec<Xattr>), Error> {
        let root = &self.lowers.roots[usize::from(place.root)];
        let fail = |source| read_error(root.path(), &place.path, source);
        let _rights = root.enter().map_err(fail)?;
        let handle = root.open_beneath(&place.path, OFlags::PATH).map_err(fail)?;
        let stat = rustix::fs::fstat(&handle).map_err(|e| fail(e.into()))?;
        let attributes = self.attributes_in(
            place.root + 1,
            proc_path(handle.as_fd()),
            Follow::Yes,
            &place.path,
            &mut Vec::new(),
        )?;
        Ok((stat, attributes.kept))
    }
}

pub(in crate::layer::scan) fn kind_of(file_type: FileType) -> Option<Kind> {
    match file_type {
        FileType::Directory => Some(Kind::Dir),
        FileType::RegularFile => Some(Kind::File),
        FileType::Symlink => Some(Kind::Symlink),
        FileType::CharacterDevice => Some(Kind::Char),
        FileType::BlockDevice => Some(Kind::Block),
        FileType::Fifo => Some(Kind::Fifo),
        FileType::Socket | FileType::Unknown => None,
    }
}

pub(super) fn mode_of(stat: &Stat) -> u16 {
    (stat.st_mode & 0o7777) as u16
}
