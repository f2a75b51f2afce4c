//! Tar bytes of any stretch of a layer, made from the plan and the files: any thread, any order, any number of times.

use std::fs::File;
use std::io;

use rustix::fs::{SeekFrom, Stat};

use super::ahead::Ahead;
use super::plan::Item;
use crate::common::escape;
use crate::layer::scan::Entry;

/// How a file turned out when its content was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Instability {
    /// It was written to: the layer may hold some of the old and some of the new.
    Changed,
    /// It became shorter: the rest is zeros.
    Shrank,
    /// It became longer: what was added is not in the layer.
    Grew,
    /// It is gone, or something else is there now: its content is zeros.
    Vanished,
    /// A write that had begun before it was found may have been under way: part of it may be in the layer.
    Unsettled,
}

/// A file that was not the same when it was read as when it was found.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
pub struct Unstable {
    /// Path in the layer, printable.
    pub path: String,
    /// In what way.
    pub what: Instability,
}

/// A file that could not be read.
#[derive(Debug, thiserror::Error)]
#[error("cannot read {path}: {source}")]
pub struct ReadError {
    /// Path in the container, printable.
    pub path: String,
    /// What the system said.
    pub source: io::Error,
}

/// Buffers of one worker.
#[derive(Default)]
pub struct Scratch {
    path: Vec<u8>,
    link: Vec<u8>,
    header: Vec<u8>,
}

/// Appends to `out` the bytes `start..end` of the tar; `unstable` collects what changed meanwhile.
pub fn fill(
    ahead: &Ahead<'_>,
    start: u64,
    end: u64,
    out: &mut Vec<u8>,
    scratch: &mut Scratch,
    unstable: &mut Vec<Unstable>,
) -> Result<(), ReadError> {
    let plan = ahead.plan();
    let base = out.len();
    let end = end.min(plan.tar_size());
    // Zeros are padding, holes, the archive's end, and what a file that shrank no longer has.
    out.resize(base + (end - start) as usize, 0);
    let target = &mut out[base..];
    for item in plan.items_in(start, end) {
        if item.offset + u64::from(item.header_len) > start {
            scratch.header.clear();
            let header = &mut scratch.header;
            plan.header(item, &mut scratch.path, &mut scratch.link, |h| {
                h.write(header);
            });
            copy_overlap(target, start, &scratch.header, item.offset);
        }
    }
    for (index, item, from, to) in plan.contents(start, end) {
        let at = item.offset + u64::from(item.header_len) + from - start;
        let part = &mut target[at as usize..][..(to - from) as usize];
        read_part(ahead, index, item, from, part, scratch, unstable)?;
    }
    Ok(())
}

/// Copies what of `bytes`, which stand at `at` in the tar, falls into `target`, which begins at `start`.
fn copy_overlap(target: &mut [u8], start: u64, bytes: &[u8], at: u64) {
    let skip = start.saturating_sub(at) as usize;
    let to = at.saturating_sub(start) as usize;
    let len = bytes
        .len()
        .saturating_sub(skip)
        .min(target.len().saturating_sub(to));
    target[to..to + len].copy_from_slice(&bytes[skip..skip + len]);
}

/// Reads `part.len()` bytes of a file's content from `offset` on. What is not there stays zero.
fn read_part(
    ahead: &Ahead<'_>,
    index: usize,
    item: &Item,
    offset: u64,
    part: &mut [u8],
    scratch: &mut Scratch,
    unstable: &mut Vec<Unstable>,
) -> Result<(), ReadError> {
    let plan = ahead.plan();
    let entry = &plan.entry(item);
    if let Some(content) = plan.held(item) {
        return content
            .read(offset, part, entry)
            .map_err(|source| ReadError {
                path: format!("/{}", escape::path(&plan.scan().path(item.entry))),
                source,
            });
    }
    let opened = plan.open(item, &mut scratch.path);
    let fail = |source: io::Error| {
        let path = plan.scan().path(item.entry);
        ReadError {
            path: format!("/{}", escape::path(&path)),
            source,
        }
    };
    let found = match opened.map_err(fail)? {
        Some(file) => {
            let settled = plan.settled(item, &file);
            let read = |at, part: &mut [u8]| ahead.read(index, &file, at, part);
            let read = read_sparse(&file, read, offset, part, entry).map_err(fail)?;
            let stat = rustix::fs::fstat(&file).map_err(|e| fail(e.into()))?;
            // A lower does not change, and its times are not the entry's.
            let changed = plan.scan().elsewhere(entry).is_none() && !same_file(&stat, entry);
            match (stat.st_size as u64).cmp(&entry.size) {
                std::cmp::Ordering::Less => Some(Instability::Shrank),
                std::cmp::Ordering::Greater => Some(Instability::Grew),
                std::cmp::Ordering::Equal if read < part.len() => Some(Instability::Shrank),
                std::cmp::Ordering::Equal if changed => Some(Instability::Changed),
                std::cmp::Ordering::Equal => (!settled).then_some(Instability::Unsettled),
            }
        }
        None => Some(Instability::Vanished),
    };
    if let Some(what) = found {
        unstable.push(Unstable {
            path: escape::path(&plan.scan().path(item.entry)),
            what,
        });
    }
    Ok(())
}

/// The kernel moves ctime at every change, and nobody can set it.
pub(super) fn same_file(stat: &Stat, entry: &Entry) -> bool {
    (stat.st_ctime, stat.st_ctime_nsec as u32) == (entry.ctime, entry.ctime_nsec)
        && (stat.st_mtime, stat.st_mtime_nsec as u32) == (entry.mtime, entry.mtime_nsec)
}

/// Reads without touching holes. Returns how far into `part` the file reaches.
pub(super) fn read_sparse(
    file: &File,
    read: impl Fn(u64, &mut [u8]) -> io::Result<usize>,
    offset: u64,
    part: &mut [u8],
    entry: &Entry,
) -> io::Result<usize> {
    if entry.allocated >= entry.size {
        return read(offset, part);
    }
    let mut done = 0;
    while done < part.len() {
        let at = offset + done as u64;
        let data = match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(data) => data,
            // Only a hole, up to the end of the file; or the file is shorter by now, which its status will tell.
            Err(rustix::io::Errno::NXIO) => return Ok(part.len()),
            // A file system without holes: then all of it is data.
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

/// Reads until `part` is full or the file ends.
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
