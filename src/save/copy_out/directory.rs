//! Files, directories and links of an image in a directory of this machine, with modes, times, owners and extended
//! attributes as `cp -a` sets them where that is permitted.
//!
//! Every path is resolved by the kernel below the directory's descriptor without following a symbolic link (`openat2`), so
//! that neither the image nor what is in the directory already can lead a write elsewhere. Everything but a directory is
//! made under a temporary name and renamed, so that no name has half of a content. Device nodes are not created: one with
//! a generous mode would open this machine's disks to its users.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;

use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, RawMode, ResolveFlags, Timespec, Timestamps, Uid,
    XattrFlags,
};
use tokio_util::sync::CancellationToken;

use super::{Error, FirstNames, Written, placed};
use crate::common::cancel::Cancelled;
use crate::image::extract::{Extracted, Member};
use crate::image::verify::tree::{Kind, Node};
use crate::image::verify::vis;

/// Bytes copied at once.
const PIECE: u64 = 4 << 20;
/// Bits of a mode that give a file's rights to who runs it.
const SET_ID: u32 = 0o6000;

/// Writes everything to `name` in the open directory `into`, or into the directory itself if `name` is empty; its own
/// attributes stay then. What is there is replaced, but no directory by another type and no other type by a directory.
pub(crate) fn write(
    found: &Extracted,
    into: &OwnedFd,
    name: &[u8],
    cancel: &CancellationToken,
) -> Result<Written, Error> {
    let mut writer = Writer {
        found,
        into: into.as_fd(),
        parent: None,
        written: Written::default(),
        temporary: format!(".upperdeck-{}", uuid_like()).into_bytes(),
    };
    let mut first_names = FirstNames::default();
    let mut directories = Vec::new();
    for (relative, member) in &found.members {
        if cancel.is_cancelled() {
            return Err(Cancelled.into());
        }
        let path = placed(name, relative);
        let earlier = first_names
            .earlier(relative, member)
            .map(|first| placed(name, first));
        let done = writer.member(&path, member, earlier.as_deref(), cancel);
        match done {
            Ok(()) => {}
            Err(_) if cancel.is_cancelled() => return Err(Cancelled.into()),
            Err(source) => return Err(failed(&path, source)),
        }
        if member.node.kind == Kind::Directory && !path.is_empty() {
            directories.push((path, &member.node));
        }
    }
    // Children first: what is made in a directory changes its time, and its mode may forbid to make anything.
    for (path, node) in directories.iter().rev() {
        writer
            .finish_directory(path, node)
            .map_err(|source| failed(path, source))?;
    }
    Ok(writer.written)
}

fn failed(path: &[u8], source: io::Error) -> Error {
    Error::Write {
        path: vis::encode(path),
        source,
    }
}

/// A name that no other copy has.
fn uuid_like() -> String {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let nanos = now.unwrap_or_default().as_nanos();
    format!("{}-{nanos}", std::process::id())
}

struct Writer<'a> {
    found: &'a Extracted,
    into: BorrowedFd<'a>,
    /// The directory that was written to last.
    parent: Option<(Vec<u8>, OwnedFd)>,
    written: Written,
    temporary: Vec<u8>,
}

impl Writer<'_> {
    fn member(
        &mut self,
        path: &[u8],
        member: &Member,
        earlier: Option<&[u8]>,
        cancel: &CancellationToken,
    ) -> io::Result<()> {
        if path.is_empty() {
            return Ok(());
        }
        let node = &member.node;
        if matches!(node.kind, Kind::Char | Kind::Block | Kind::Socket) {
            self.written.leave_out_device(path);
            return Ok(());
        }
        let (above, name) = match path.iter().rposition(|&b| b == b'/') {
            Some(slash) => (&path[..slash], &path[slash + 1..]),
            None => (&path[..0], path),
        };
        let parent = self.open_parent(above)?;
        self.written.paths += 1;
        if node.kind == Kind::Directory {
            return make_directory(&parent, name);
        }
        let made = match earlier {
            Some(first) => self.hard_link(first, &parent),
            None => self.make(member, &parent, cancel),
        };
        let done = made.and_then(|()| {
            refuse_directory(&parent, name)?;
            let (from, to) = (OsStr::from_bytes(&self.temporary), OsStr::from_bytes(name));
            Ok(rustix::fs::renameat(&parent, from, &parent, to)?)
        });
        // It is still there after an error, or if both names were those of one file.
        let _ = rustix::fs::unlinkat(
            &parent,
            OsStr::from_bytes(&self.temporary),
            AtFlags::empty(),
        );
        done
    }

    /// Makes a file, link or FIFO under the temporary name.
    fn make(
        &mut self,
        member: &Member,
        parent: &OwnedFd,
        cancel: &CancellationToken,
    ) -> io::Result<()> {
        let node = &member.node;
        let name = OsStr::from_bytes(&self.temporary).to_owned();
        match node.kind {
            Kind::Symlink => {
                let target = node.target.as_deref().unwrap_or_default();
                rustix::fs::symlinkat(OsStr::from_bytes(target), parent, &name)?;
                self.own_link(parent, &name, node)
            }
            Kind::Fifo => {
                let kind = FileType::Fifo;
                rustix::fs::mknodat(parent, &name, kind, Mode::from_raw_mode(0o600), 0)?;
                let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let fifo = rustix::fs::openat(parent, &name, flags, Mode::empty())?;
                self.attributes(fifo.as_fd(), node)
            }
            _ => {
                let flags = OFlags::WRONLY
                    | OFlags::CREATE
                    | OFlags::EXCL
                    | OFlags::NOFOLLOW
                    | OFlags::CLOEXEC;
                let file = rustix::fs::openat(parent, &name, flags, Mode::from_raw_mode(0o600))?;
                let mut file = File::from(file);
                self.content(member, &mut file, cancel)?;
                self.attributes(file.as_fd(), node)
            }
        }
    }

    fn content(
        &mut self,
        member: &Member,
        file: &mut File,
        cancel: &CancellationToken,
    ) -> io::Result<()> {
        let mut spool = &self.found.spool;
        spool.seek(SeekFrom::Start(member.at))?;
        let mut left = member.node.size;
        while left > 0 {
            if cancel.is_cancelled() {
                return Err(io::Error::other(Cancelled));
            }
            let piece = left.min(PIECE);
            if io::copy(&mut spool.take(piece), file)? != piece {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            left -= piece;
        }
        self.written.bytes += member.node.size;
        Ok(())
    }

    fn hard_link(&mut self, first: &[u8], parent: &OwnedFd) -> io::Result<()> {
        let (above, name) = match first.iter().rposition(|&b| b == b'/') {
            Some(slash) => (&first[..slash], &first[slash + 1..]),
            None => (&first[..0], first),
        };
        let from = open_below(self.into, above)?;
        let (name, to) = (OsStr::from_bytes(name), OsStr::from_bytes(&self.temporary));
        Ok(rustix::fs::linkat(
            &from,
            name,
            parent,
            to,
            AtFlags::empty(),
        )?)
    }

    /// Returns the directory `above`.
    fn open_parent(&mut self, above: &[u8]) -> io::Result<OwnedFd> {
        if let Some((path, open)) = &self.parent
            && path == above
        {
            return open.try_clone();
        }
        let opened = open_below(self.into, above)?;
        self.parent = Some((above.to_vec(), opened.try_clone()?));
        Ok(opened)
    }

    fn finish_directory(&mut self, path: &[u8], node: &Node) -> io::Result<()> {
        let opened = open_below(self.into, path)?;
        self.attributes(opened.as_fd(), node)
    }

    /// Sets owner, extended attributes, mode and time, in this order: a change of the owner removes rights.
    fn attributes(&mut self, file: BorrowedFd<'_>, node: &Node) -> io::Result<()> {
        let (uid, gid) = (Uid::from_raw(node.uid), Gid::from_raw(node.gid));
        let owned = self.owned(rustix::fs::fchown(file, Some(uid), Some(gid)))?;
        for (name, value) in &node.xattrs {
            let set =
                rustix::fs::fsetxattr(file, OsStr::from_bytes(name), value, XattrFlags::empty());
            self.written.xattrs_not_set += u64::from(set.is_err());
        }
        let mode = if owned {
            node.mode
        } else {
            node.mode & !SET_ID
        };
        rustix::fs::fchmod(file, Mode::from_raw_mode(mode as RawMode))?;
        Ok(rustix::fs::futimens(file, &times(node))?)
    }

    fn own_link(&mut self, parent: &OwnedFd, name: &OsStr, node: &Node) -> io::Result<()> {
        let (uid, gid) = (Uid::from_raw(node.uid), Gid::from_raw(node.gid));
        let flags = AtFlags::SYMLINK_NOFOLLOW;
        self.owned(rustix::fs::chownat(
            parent,
            name,
            Some(uid),
            Some(gid),
            flags,
        ))?;
        self.written.xattrs_not_set += node.xattrs.len() as u64;
        Ok(rustix::fs::utimensat(parent, name, &times(node), flags)?)
    }

    /// Returns whether the owner was set. That it may not be is counted.
    fn owned(&mut self, set: rustix::io::Result<()>) -> io::Result<bool> {
        use rustix::io::Errno;
        match set {
            Ok(()) => Ok(true),
            // Without the right, on a file system without owners, or outside of the ID map of a user namespace.
            Err(Errno::PERM | Errno::OPNOTSUPP | Errno::INVAL) => {
                self.written.owners_not_set += 1;
                Ok(false)
            }
            Err(error) => Err(error.into()),
        }
    }
}

fn times(node: &Node) -> Timestamps {
    let time = Timespec {
        tv_sec: node.mtime.seconds,
        tv_nsec: node.mtime.nanos.into(),
    };
    Timestamps {
        last_access: time,
        last_modification: time,
    }
}

/// Opens a directory below `into` without following a symbolic link.
fn open_below(into: BorrowedFd<'_>, path: &[u8]) -> io::Result<OwnedFd> {
    let path = if path.is_empty() { b"." } else { path };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    loop {
        match rustix::fs::openat2(into, OsStr::from_bytes(path), flags, Mode::empty(), resolve) {
            // A rename somewhere raced with the resolution.
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {}
            other => return Ok(other?),
        }
    }
}

/// Makes a directory that others cannot enter until it is complete, or takes the one that is there.
fn make_directory(parent: &OwnedFd, name: &[u8]) -> io::Result<()> {
    match rustix::fs::mkdirat(parent, OsStr::from_bytes(name), Mode::from_raw_mode(0o700)) {
        Err(rustix::io::Errno::EXIST) => {
            open_below(parent.as_fd(), name)?;
            Ok(())
        }
        other => Ok(other?),
    }
}

/// Fails if `name` is a directory.
fn refuse_directory(parent: &OwnedFd, name: &[u8]) -> io::Result<()> {
    let found = rustix::fs::statat(parent, OsStr::from_bytes(name), AtFlags::SYMLINK_NOFOLLOW);
    match found {
        Ok(found) if FileType::from_raw_mode(found.st_mode) == FileType::Directory => {
            Err(rustix::io::Errno::ISDIR.into())
        }
        _ => Ok(()),
    }
}
