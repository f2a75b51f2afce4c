//! Produces the tar bytes of any range of a layer from the plan and the files, on any thread, in any order and any
//! number of times.

use std::io;

use super::content::{Instability, ReadError, Unstable, is_sparse, read_sparse, same_file};
use super::plan::Item;
use super::read_ahead::ReadAhead;
use crate::common::escape;

/// Reusable buffers of one worker.
#[derive(Default)]
pub(crate) struct Scratch {
    path: Vec<u8>,
    link: Vec<u8>,
    header: Vec<u8>,
}

/// Fills `out` with bytes `start..end` of the tar, whatever it held before. Appends files that changed during the read
/// to `unstable`.
///
/// Fails if a file cannot be opened or read.
pub(crate) fn fill(
    ahead: &ReadAhead<'_>,
    start: u64,
    end: u64,
    out: &mut Vec<u8>,
    scratch: &mut Scratch,
    unstable: &mut Vec<Unstable>,
) -> Result<(), ReadError> {
    let plan = ahead.plan();
    let end = end.min(plan.tar_size());
    // Bytes of an earlier block need no clearing: each byte is overwritten by a header, by content, or by zeros below.
    out.resize((end - start) as usize, 0);
    let target = &mut out[..];
    // End of the bytes produced so far.
    let mut made = start;
    for item in plan.items_in(start, end) {
        let content = item.offset + u64::from(item.header_len);
        if content > start {
            scratch.header.clear();
            let header = &mut scratch.header;
            plan.header(item, &mut scratch.path, &mut scratch.link, |h| {
                h.write(header);
            });
            // Padding between two entries.
            clear(target, start, made, item.offset);
            copy_overlap(target, start, &scratch.header, item.offset);
        }
        made = (content + plan.content_size(item)).max(start);
    }
    // Padding, and the end of the archive.
    clear(target, start, made, end);
    for (index, item, from, to) in plan.contents(start, end) {
        let at = item.offset + u64::from(item.header_len) + from - start;
        let part = &mut target[at as usize..][..(to - from) as usize];
        read_part(ahead, index, item, from, part, scratch, unstable)?;
    }
    Ok(())
}

/// Zeroes the overlap of tar bytes `from..to` with `target`, which begins at `start`.
fn clear(target: &mut [u8], start: u64, from: u64, to: u64) {
    let within = |at: u64| (at.saturating_sub(start)).min(target.len() as u64) as usize;
    let (from, to) = (within(from), within(to));
    if from < to {
        target[from..to].fill(0);
    }
}

/// Copies the overlap of `bytes`, located at `at` in the tar, with `target`, which begins at `start`.
fn copy_overlap(target: &mut [u8], start: u64, bytes: &[u8], at: u64) {
    let skip = start.saturating_sub(at) as usize;
    let to = at.saturating_sub(start) as usize;
    let len = bytes
        .len()
        .saturating_sub(skip)
        .min(target.len().saturating_sub(to));
    target[to..to + len].copy_from_slice(&bytes[skip..skip + len]);
}

/// Reads `part.len()` bytes of a file's content from `offset`. Bytes that the file no longer has become zero.
fn read_part(
    ahead: &ReadAhead<'_>,
    index: usize,
    item: &Item,
    offset: u64,
    part: &mut [u8],
    scratch: &mut Scratch,
    unstable: &mut Vec<Unstable>,
) -> Result<(), ReadError> {
    let plan = ahead.plan();
    let entry = &plan.entry(item);
    if let Some(content) = plan.captured(item) {
        part.fill(0);
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
            let settled = plan.writes_are_complete(item, &file);
            if is_sparse(entry) {
                part.fill(0);
            }
            let read = |at, part: &mut [u8]| ahead.read(index, &file, at, part);
            let read = read_sparse(&file, read, offset, part, entry).map_err(fail)?;
            // The file is shorter than at the scan.
            part[read..].fill(0);
            let stat = rustix::fs::fstat(&file).map_err(|e| fail(e.into()))?;
            // A lower does not change, and its times are not those of the entry.
            let changed = plan.scan().content_location(entry).is_none() && !same_file(&stat, entry);
            match (stat.st_size as u64).cmp(&entry.size) {
                std::cmp::Ordering::Less => Some(Instability::Shrank),
                std::cmp::Ordering::Greater => Some(Instability::Grew),
                std::cmp::Ordering::Equal if read < part.len() => Some(Instability::Shrank),
                std::cmp::Ordering::Equal if changed => Some(Instability::Changed),
                std::cmp::Ordering::Equal => (!settled).then_some(Instability::Unsettled),
            }
        }
        None => {
            part.fill(0);
            Some(Instability::Vanished)
        }
    };
    if let Some(what) = found {
        unstable.push(Unstable {
            path: escape::path(&plan.scan().path(item.entry)),
            what,
        });
    }
    Ok(())
}

#[cfg(test)]
pub(super) mod tests {
    use std::fs;
    use std::os::unix::fs::FileExt as _;
    use std::path::Path;
    use std::sync::Arc;
    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::layer::plan::Plan;
    use crate::layer::scan::{Caps, Exclusions, Options, Roots, Rules, Scan};
    use crate::node::overlay::xattr::Namespace;

    /// Returns a plan of everything in a directory.
    pub(crate) fn plan_of(dir: &Path) -> Plan {
        let roots = Roots {
            upper: dir.to_owned(),
            lowers: Vec::new(),
            data_only: Vec::new(),
            id_mapped: Vec::new(),
            lowers_known: true,
            namespace: Namespace::User,
            volume: None,
        };
        let exclusions = Exclusions::new(Rules::default()).unwrap();
        let options = Options {
            jobs: 1,
            uid_map: &[],
            gid_map: &[],
            exclusions: &exclusions,
            caps: Caps::default(),
            runtime_root_mode: None,
            cancel: &CancellationToken::new(),
        };
        let scan = Scan::new(&roots, &options).unwrap();
        Plan::new(Arc::new(scan), None)
    }

    #[test]
    fn a_block_has_nothing_of_what_was_in_its_buffer() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        for (name, size) in [("a", 700), ("empty", 0), ("gone", 3000), ("short", 5000)] {
            fs::write(at(name), vec![b'x'; size]).unwrap();
        }
        // A hole between two extents.
        let sparse = fs::File::create(at("sparse")).unwrap();
        sparse.write_at(b"begin", 0).unwrap();
        sparse.write_at(b"end", 100_000).unwrap();
        sparse.sync_all().unwrap();
        let plan = plan_of(dir.path());
        fs::remove_file(at("gone")).unwrap();
        fs::write(at("short"), "x").unwrap();
        let ahead = ReadAhead::new(&plan);
        let make = |block: u64, dirt: &[u8]| {
            let (mut tar, mut unstable) = (Vec::new(), Vec::new());
            let mut scratch = Scratch::default();
            let mut out = Vec::new();
            for start in (0..plan.tar_size()).step_by(block as usize) {
                out.clear();
                out.extend(dirt);
                let end = start + block;
                fill(&ahead, start, end, &mut out, &mut scratch, &mut unstable).unwrap();
                tar.extend(&out);
            }
            tar
        };
        let clean = make(1 << 20, b"");
        assert_eq!(clean.len() as u64, plan.tar_size());
        let text = |tar: &[u8], what: &[u8]| tar.windows(what.len()).any(|part| part == what);
        assert!(text(&clean, b"begin\0") && text(&clean, b"\0end"));
        for block in [100, 512, 1000, 4096, 1 << 20] {
            assert!(
                make(block, &vec![0xee; 1 << 20]) == clean,
                "blocks of {block}"
            );
        }
    }
}
