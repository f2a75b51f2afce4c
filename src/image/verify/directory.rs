//! Reads a directory on disk into a [`Tree`]. Only for trees that do not change meanwhile and were made by this program
//! or an unpacker; untrusted upper directories are read by `scan`.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ffi::{OsStr, OsString};
use std::fs::{self, File, Metadata};
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, StatxAttributes, StatxFlags};

use super::paths::join;
use super::tree::{Kind, Node, Time, Tree};
use crate::common::digest::{Digest, HashingWriter};
use crate::node::overlay::xattr::Namespace;

/// A path of the tree cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("cannot read {path:?}: {source}", path = .path)]
pub struct DirectoryError {
    /// The path.
    pub path: PathBuf,
    /// The cause.
    pub source: io::Error,
}

impl DirectoryError {
    /// Returns a conversion for `map_err`.
    pub(crate) fn at(path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self {
            path: path.to_owned(),
            source,
        }
    }
}

/// A stack of overlay directories cannot be merged.
#[derive(Debug, thiserror::Error)]
pub enum LowersError {
    /// A path cannot be read.
    #[error(transparent)]
    Directory(#[from] DirectoryError),
    /// A directory or file has an overlay attribute that no unpacked layer has, and whose target is elsewhere.
    #[error(
        "{path:?} has the overlay attribute {mark}, which is not valid in an unpacked image layer"
    )]
    Mark {
        /// The path.
        path: PathBuf,
        /// `redirect` or `metacopy`.
        mark: &'static str,
    },
}

/// Numbers the files of a tree; all hard links to a file get the same number.
#[derive(Default)]
pub(crate) struct Inodes {
    seen: HashMap<(u64, u64), u64>,
    next: u64,
}

impl Inodes {
    /// Returns the number of a file with this metadata.
    pub(crate) fn number(&mut self, meta: &Metadata) -> u64 {
        self.next += 1;
        if meta.is_dir() || meta.nlink() < 2 {
            return self.next;
        }
        *self
            .seen
            .entry((meta.dev(), meta.ino()))
            .or_insert(self.next)
    }
}

impl Tree {
    /// Reads the tree at `root`, including `root` itself. With `skip_mounts`, mount points are left out with everything
    /// below them, for files as well as for directories.
    pub fn from_directory(root: &Path, skip_mounts: bool) -> Result<Self, DirectoryError> {
        let mut tree = Self::default();
        let mut inodes = Inodes::default();
        let mut walk = walkdir::WalkDir::new(root).follow_links(false).into_iter();
        while let Some(entry) = walk.next() {
            let entry = entry.map_err(|error| DirectoryError {
                path: error.path().unwrap_or(root).to_owned(),
                source: error.into(),
            })?;
            let path = entry.path();
            if skip_mounts
                && entry.depth() > 0
                && is_mount_point(path).map_err(DirectoryError::at(path))?
            {
                if entry.file_type().is_dir() {
                    walk.skip_current_dir();
                }
                continue;
            }
            let meta = fs::symlink_metadata(path).map_err(DirectoryError::at(path))?;
            let node = node(path, &meta, inodes.number(&meta)).map_err(DirectoryError::at(path))?;
            let relative = path.strip_prefix(root).unwrap_or(path);
            tree.nodes
                .insert(relative.as_os_str().as_bytes().to_vec(), node);
        }
        Ok(tree)
    }
}

impl Tree {
    /// Reads the merged view of an overlay over `lowers` (topmost first): whiteouts and opaque directories are
    /// resolved, and the overlay's own extended attributes are left out.
    ///
    /// Source: kernel `Documentation/filesystems/overlayfs.rst`, "whiteouts and opaque directories".
    pub fn from_lowers(lowers: &[PathBuf], namespace: Namespace) -> Result<Self, LowersError> {
        let prefix: &[u8] = match namespace {
            Namespace::Trusted => b"trusted.overlay.",
            Namespace::User => b"user.overlay.",
        };
        let mut stack = LowerMerge {
            tree: Self::default(),
            inodes: Inodes::default(),
            prefix,
        };
        // Directories still to be merged: path in the tree, and their parts on disk, topmost first.
        let mut left: Vec<(Vec<u8>, Vec<PathBuf>)> = vec![(Vec::new(), lowers.to_vec())];
        while let Some((path, parts)) = left.pop() {
            stack.merge(&path, &parts, &mut left)?;
        }
        Ok(stack.tree)
    }
}

struct LowerMerge {
    tree: Tree,
    inodes: Inodes,
    prefix: &'static [u8],
}

impl LowerMerge {
    fn merge(
        &mut self,
        path: &[u8],
        parts: &[PathBuf],
        left: &mut Vec<(Vec<u8>, Vec<PathBuf>)>,
    ) -> Result<(), LowersError> {
        let Some(top) = parts.first() else {
            return Ok(());
        };
        let meta = fs::symlink_metadata(top).map_err(DirectoryError::at(top))?;
        self.insert(path, top, &meta)?;
        // Names that a higher part has decided, and directories whose lower parts are merged into them.
        let mut decided: HashSet<OsString> = HashSet::new();
        let mut open: BTreeMap<OsString, Vec<PathBuf>> = BTreeMap::new();
        for part in parts {
            let may_hide_by_xattr = self.mark(part, "opaque")?.as_deref() == Some(b"x");
            for entry in fs::read_dir(part).map_err(DirectoryError::at(part))? {
                let name = entry.map_err(DirectoryError::at(part))?.file_name();
                if decided.contains(&name) {
                    continue;
                }
                let here = part.join(&name);
                let meta = fs::symlink_metadata(&here).map_err(DirectoryError::at(&here))?;
                let whiteout = meta.file_type().is_char_device() && meta.rdev() == 0
                    || may_hide_by_xattr
                        && meta.is_file()
                        && self.mark(&here, "whiteout")?.is_some();
                if whiteout || !meta.is_dir() {
                    if !whiteout && !open.contains_key(&name) {
                        self.insert(&join(path, name.as_bytes()), &here, &meta)?;
                    }
                    decided.insert(name);
                    continue;
                }
                if self.mark(&here, "redirect")?.is_some() {
                    return Err(LowersError::Mark {
                        path: here,
                        mark: "redirect",
                    });
                }
                if self.mark(&here, "opaque")?.as_deref() == Some(b"y") {
                    decided.insert(name.clone());
                }
                open.entry(name).or_default().push(here);
            }
        }
        left.extend(
            open.into_iter()
                .map(|(name, parts)| (join(path, name.as_bytes()), parts)),
        );
        Ok(())
    }

    fn insert(&mut self, path: &[u8], at: &Path, meta: &Metadata) -> Result<(), LowersError> {
        if meta.is_file() && self.mark(at, "metacopy")?.is_some() {
            return Err(LowersError::Mark {
                path: at.to_owned(),
                mark: "metacopy",
            });
        }
        let mut node = node(at, meta, self.inodes.number(meta)).map_err(DirectoryError::at(at))?;
        node.xattrs.retain(|name, _| !name.starts_with(self.prefix));
        self.tree.nodes.insert(path.to_vec(), node);
        Ok(())
    }

    fn mark(&self, path: &Path, mark: &str) -> Result<Option<Vec<u8>>, DirectoryError> {
        let name = [self.prefix, mark.as_bytes()].concat();
        let mut value = [0; 4096];
        match rustix::fs::lgetxattr(path, OsStr::from_bytes(&name), &mut value[..]) {
            Ok(length) => Ok(Some(value[..length].to_vec())),
            Err(rustix::io::Errno::NODATA | rustix::io::Errno::NOTSUP) => Ok(None),
            Err(error) => Err(DirectoryError {
                path: path.to_owned(),
                source: error.into(),
            }),
        }
    }
}

fn is_mount_point(path: &Path) -> io::Result<bool> {
    let stat = rustix::fs::statx(
        rustix::fs::CWD,
        path,
        AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT,
        StatxFlags::TYPE,
    )?;
    Ok(stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT))
}

/// Reads the file at `path`, with its content as a digest and all extended attributes.
pub(crate) fn node(path: &Path, meta: &Metadata, inode: u64) -> io::Result<Node> {
    let kind = match meta.file_type() {
        t if t.is_file() => Kind::File,
        t if t.is_dir() => Kind::Directory,
        t if t.is_symlink() => Kind::Symlink,
        t if t.is_char_device() => Kind::Char,
        t if t.is_block_device() => Kind::Block,
        t if t.is_fifo() => Kind::Fifo,
        _ => Kind::Socket,
    };
    let device = matches!(kind, Kind::Char | Kind::Block);
    Ok(Node {
        kind,
        mode: meta.mode() & 0o7777,
        uid: meta.uid(),
        gid: meta.gid(),
        size: if kind == Kind::File { meta.len() } else { 0 },
        mtime: Time {
            seconds: meta.mtime(),
            nanos: meta.mtime_nsec() as u32,
        },
        content: if kind == Kind::File {
            Some(content(path)?)
        } else {
            None
        },
        target: if kind == Kind::Symlink {
            Some(fs::read_link(path)?.into_os_string().into_vec())
        } else {
            None
        },
        rdev: device.then(|| {
            (
                rustix::fs::major(meta.rdev()),
                rustix::fs::minor(meta.rdev()),
            )
        }),
        xattrs: xattrs(path)?,
        inode,
        implicit: false,
    })
}

/// Returns the digest of a regular file's content.
pub(crate) fn content(path: &Path) -> io::Result<Digest> {
    let mut hash = HashingWriter::new(io::sink());
    io::copy(&mut File::open(path)?, &mut hash)?;
    Ok(hash.complete().1)
}

/// Reads all extended attributes of `path` itself. Returns none if the file system does not support them.
pub(crate) fn xattrs(path: &Path) -> io::Result<BTreeMap<Vec<u8>, Vec<u8>>> {
    let mut xattrs = BTreeMap::new();
    // The kernel's limits: XATTR_LIST_MAX and XATTR_SIZE_MAX.
    let mut names = vec![0; 64 * 1024];
    let length = match rustix::fs::llistxattr(path, &mut names[..]) {
        Ok(length) => length,
        Err(rustix::io::Errno::NOTSUP) => return Ok(xattrs),
        Err(error) => return Err(error.into()),
    };
    if length == 0 {
        return Ok(xattrs);
    }
    let mut value = vec![0; 64 * 1024];
    for name in names[..length]
        .split(|&b| b == 0)
        .filter(|name| !name.is_empty())
    {
        match rustix::fs::lgetxattr(path, OsStr::from_bytes(name), &mut value[..]) {
            Ok(length) => {
                xattrs.insert(name.to_vec(), value[..length].to_vec());
            }
            // The attribute is listed but not readable without privilege, or was removed meanwhile.
            Err(rustix::io::Errno::NODATA) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(xattrs)
}
