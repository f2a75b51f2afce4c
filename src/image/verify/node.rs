//! Nodes of a tree, as the entries of archives describe them.

use std::collections::BTreeMap;

use super::archive::{Entry, EntryKind};
use super::tree::{Kind, Node, Time};

impl Node {
    /// Returns the node that an entry describes, without its content. A hard link is described as a file.
    pub(crate) fn of_entry(entry: &Entry, inode: u64) -> Self {
        Self {
            kind: match entry.kind {
                EntryKind::File | EntryKind::Hardlink => Kind::File,
                EntryKind::Symlink => Kind::Symlink,
                EntryKind::Char => Kind::Char,
                EntryKind::Block => Kind::Block,
                EntryKind::Directory => Kind::Directory,
                EntryKind::Fifo => Kind::Fifo,
            },
            mode: entry.mode & 0o7777,
            uid: entry.uid,
            gid: entry.gid,
            size: entry.size,
            mtime: entry.mtime,
            content: None,
            target: (entry.kind == EntryKind::Symlink).then(|| entry.link.clone()),
            rdev: matches!(entry.kind, EntryKind::Char | EntryKind::Block).then_some(entry.rdev),
            xattrs: entry.xattrs.clone(),
            inode,
            implicit: false,
        }
    }

    /// Returns a directory that no entry describes.
    pub(crate) fn implicit_directory(inode: u64) -> Self {
        Self {
            kind: Kind::Directory,
            mode: 0o755,
            uid: 0,
            gid: 0,
            size: 0,
            mtime: Time::default(),
            content: None,
            target: None,
            rdev: None,
            xattrs: BTreeMap::new(),
            inode,
            implicit: true,
        }
    }
}
