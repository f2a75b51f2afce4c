//! Tar bytes of any stretch of a layer, made from the plan and the files: any thread, any order, any number of times.

use std::io;

use super::ahead::Ahead;
use super::content::{Instability, ReadError, Unstable, read_sparse, same_file};
use super::plan::Item;
use crate::common::escape;

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
