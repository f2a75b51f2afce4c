//! Tar headers of a tree's nodes.

use crate::image::verify::tree::{Kind, Node};
use crate::layer::scan::Xattr;
use crate::layer::tar::Header;

/// Appends the header of `node`, and returns the size of the content that has to follow. `first` is the name of the file
/// that it is a hard link to.
pub(super) fn write(path: &[u8], node: &Node, first: Option<&[u8]>, out: &mut Vec<u8>) -> u64 {
    let mut path = path.to_vec();
    if node.kind == Kind::Directory {
        path.extend(if path.is_empty() { &b"./"[..] } else { b"/" });
    }
    let typeflag = match node.kind {
        _ if first.is_some() => b'1',
        Kind::File => b'0',
        Kind::Symlink => b'2',
        Kind::Char => b'3',
        Kind::Block => b'4',
        Kind::Directory => b'5',
        Kind::Fifo | Kind::Socket => b'6',
    };
    let size = if typeflag == b'0' { node.size } else { 0 };
    let xattrs: Vec<Xattr> = match first {
        Some(_) => Vec::new(),
        None => node.xattrs.clone().into_iter().collect(),
    };
    Header {
        path: &path,
        typeflag,
        mode: (node.mode & 0o7777) as u16,
        uid: node.uid,
        gid: node.gid,
        size,
        mtime: node.mtime.seconds,
        mtime_nanos: node.mtime.nanos,
        link: first.unwrap_or_else(|| node.target.as_deref().unwrap_or_default()),
        device: node.rdev.unwrap_or_default(),
        xattrs: &xattrs,
    }
    .write(out);
    size
}
