//! A tar stream of what was found, as `docker cp CONTAINER:PATH -` writes one.

use std::io::{self, Write};
use std::os::unix::fs::FileExt as _;

use tokio_util::sync::CancellationToken;

use super::{Error, FirstNames, Written, placed};
use crate::common::cancel::Cancelled;
use crate::image::extract::Extracted;
use crate::image::verify::tree::Kind;
use crate::layer::scan::Xattr;
use crate::layer::tar::{END, Header, RECORD};

/// Bytes copied at once.
const PIECE: usize = 1 << 20;

/// Writes everything below the directory or file `name`, or without one if it is empty.
pub(crate) fn write(
    found: &Extracted,
    name: &[u8],
    out: &mut dyn Write,
    cancel: &CancellationToken,
) -> Result<Written, Error> {
    let mut written = Written::default();
    let mut first_names = FirstNames::default();
    let mut header = Vec::new();
    for (relative, member) in &found.members {
        let node = &member.node;
        let mut path = placed(name, relative);
        if node.kind == Kind::Directory {
            path.extend(if path.is_empty() { &b"./"[..] } else { b"/" });
        }
        let earlier = first_names.earlier(relative, member);
        let typeflag = match node.kind {
            _ if earlier.is_some() => b'1',
            Kind::File => b'0',
            Kind::Symlink => b'2',
            Kind::Char => b'3',
            Kind::Block => b'4',
            Kind::Directory => b'5',
            Kind::Fifo | Kind::Socket => b'6',
        };
        let link = match earlier {
            Some(first) => placed(name, first),
            None => node.target.clone().unwrap_or_default(),
        };
        let size = if typeflag == b'0' { node.size } else { 0 };
        let xattrs: Vec<Xattr> = match earlier {
            Some(_) => Vec::new(),
            None => node.xattrs.clone().into_iter().collect(),
        };
        header.clear();
        Header {
            path: &path,
            typeflag,
            mode: (node.mode & 0o7777) as u16,
            uid: node.uid,
            gid: node.gid,
            size,
            mtime: node.mtime.seconds,
            mtime_nanos: node.mtime.nanos,
            link: &link,
            device: node.rdev.unwrap_or_default(),
            xattrs: &xattrs,
        }
        .write(&mut header);
        out.write_all(&header).map_err(Error::Archive)?;
        content(found, member.at, size, out, cancel)?;
        written.paths += 1;
        written.bytes += size;
    }
    out.write_all(&[0; END as usize])
        .and_then(|()| out.flush())
        .map_err(Error::Archive)?;
    Ok(written)
}

/// Writes a content with its padding.
fn content(
    found: &Extracted,
    at: u64,
    size: u64,
    out: &mut dyn Write,
    cancel: &CancellationToken,
) -> Result<(), Error> {
    let mut buffer = vec![0; PIECE.min(size as usize)];
    let mut done = 0;
    while done < size {
        if cancel.is_cancelled() {
            return Err(Cancelled.into());
        }
        let piece = &mut buffer[..(size - done).min(PIECE as u64) as usize];
        found
            .spool
            .read_exact_at(piece, at + done)
            .and_then(|()| out.write_all(piece))
            .map_err(Error::Archive)?;
        done += piece.len() as u64;
    }
    let padding = size.next_multiple_of(RECORD) - size;
    let padded: io::Result<()> = out.write_all(&[0; RECORD as usize][..padding as usize]);
    padded.map_err(Error::Archive)
}
