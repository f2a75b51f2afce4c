//! Contents of files, read in place or held from an earlier instant, and the errors and changes met while reading them.

use std::collections::HashMap;
use std::fs::File;
use std::io;

use rustix::fs::{SeekFrom, Stat};

use crate::layer::scan::Entry;

/// How a file changed between the scan and the end of its read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Instability {
    /// It was modified: the layer may hold a mixture of old and new content.
    Changed,
    /// It became shorter: the remainder is zeros.
    Shrank,
    /// It became longer: the appended content is not in the layer.
    Grew,
    /// It was removed or replaced: its content is zeros.
    Vanished,
    /// A write that began before the scan may still have been under way: the layer may hold part of it.
    Unsettled,
}

/// A file that changed between the scan and the end of its read.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
pub struct Unstable {
    /// Path in the layer, escaped for printing.
    pub path: String,
    /// The kind of change.
    pub what: Instability,
}

/// A file that could not be read.
#[derive(Debug, thiserror::Error)]
#[error("cannot read {path}: {source}")]
pub struct ReadError {
    /// Path in the container, escaped for printing.
    pub path: String,
    /// Error of the operating system.
    pub source: io::Error,
}

/// The content of one file.
#[derive(Debug)]
pub(crate) enum Content {
    /// Extents by offset; the gaps are holes.
    Memory(Vec<(u64, Vec<u8>)>),
    /// A clone, which no other process writes to.
    Clone(File),
}

/// Captured contents, by index of the entry in the plan's scan.
#[derive(Debug, Default)]
pub struct CapturedContents {
    pub(super) contents: HashMap<u32, Content>,
    /// Files that changed while their content was being captured.
    pub unstable: Vec<Unstable>,
}

impl CapturedContents {
    pub(super) fn get(&self, entry: u32) -> Option<&Content> {
        self.contents.get(&entry)
    }
}

impl Content {
    /// Reads content from `offset` into `part`, which must be zeroed.
    pub(super) fn read(&self, offset: u64, part: &mut [u8], entry: &Entry) -> io::Result<()> {
        match self {
            Self::Memory(pieces) => {
                for (at, bytes) in pieces {
                    let from = offset.max(*at);
                    let to = (offset + part.len() as u64).min(at + bytes.len() as u64);
                    if from < to {
                        part[(from - offset) as usize..(to - offset) as usize]
                            .copy_from_slice(&bytes[(from - at) as usize..(to - at) as usize]);
                    }
                }
            }
            Self::Clone(file) => {
                let read = |at, part: &mut [u8]| read_full(file, at, part);
                read_sparse(file, read, offset, part, entry)?;
            }
        }
        Ok(())
    }
}

/// Returns whether a file is unmodified since its entry was made. The kernel updates ctime on every change, and no
/// process can set it.
pub(super) fn same_file(stat: &Stat, entry: &Entry) -> bool {
    (stat.st_ctime, stat.st_ctime_nsec as u32) == (entry.ctime, entry.ctime_nsec)
        && (stat.st_mtime, stat.st_mtime_nsec as u32) == (entry.mtime, entry.mtime_nsec)
}

pub(super) fn is_sparse(entry: &Entry) -> bool {
    entry.allocated < entry.size
}

/// Reads only the data extents: the holes of `part` must be zeroed already. Returns how far into `part` the file
/// reaches.
pub(super) fn read_sparse(
    file: &File,
    read: impl Fn(u64, &mut [u8]) -> io::Result<usize>,
    offset: u64,
    part: &mut [u8],
    entry: &Entry,
) -> io::Result<usize> {
    if !is_sparse(entry) {
        return read(offset, part);
    }
    let mut done = 0;
    while done < part.len() {
        let at = offset + done as u64;
        let data = match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(data) => data,
            // There is only a hole up to the end of the file; or the file has become shorter, which its status will
            // show.
            Err(rustix::io::Errno::NXIO) => return Ok(part.len()),
            // The file system does not report holes: treat everything as data.
            Err(rustix::io::Errno::INVAL | rustix::io::Errno::OPNOTSUPP) => at,
            Err(error) => return Err(error.into()),
        };
        let skip = usize::try_from(data - at).unwrap_or(usize::MAX);
        if skip >= part.len() - done {
            return Ok(part.len());
        }
        done += skip;
        let hole = rustix::fs::seek(file, SeekFrom::Hole(data)).unwrap_or(u64::MAX);
        let len = usize::try_from(hole.saturating_sub(data))
            .unwrap_or(usize::MAX)
            .min(part.len() - done);
        let len = if len == 0 { part.len() - done } else { len };
        let n = read(data, &mut part[done..done + len])?;
        done += n;
        if n < len {
            break;
        }
    }
    Ok(done)
}

/// Reads until `part` is full or the file ends. Returns the number of bytes read.
pub(super) fn read_full(file: &File, offset: u64, part: &mut [u8]) -> io::Result<usize> {
    let mut done = 0;
    while done < part.len() {
        match rustix::io::pread(file, &mut part[done..], offset + done as u64) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(done)
}
