//! A tar stream of what was found, as `docker cp CONTAINER:PATH -` writes one.

use std::io::{self, Write};
use std::os::unix::fs::FileExt as _;

use tokio_util::sync::CancellationToken;

use super::super::node_header;
use super::{Error, FirstNames, Written, placed};
use crate::common::cancel::Cancelled;
use crate::image::extract::Extracted;
use crate::layer::tar::{END, RECORD};

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
        let earlier = first_names.earlier(relative, member);
        let first = earlier.map(|first| placed(name, first));
        header.clear();
        let path = placed(name, relative);
        let size = node_header::write(&path, node, first.as_deref(), &mut header);
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
