//! Serialises a scan, to be kept until the next save of the same container.
//!
//! The format is postcard's: a header, then a row for each entry. It is compact, because a node keeps many: numbers have
//! variable length, and inode numbers and times are relative to the previous entry. Reading is strict: it rejects a tree
//! that no scan can have. Both directions stream, so that the bytes are never all in memory.

use std::borrow::Cow;
use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_bytes::{ByteBuf, Bytes};

use super::memory::Xattrs;
use super::rows::{Builder, NO_EXTRA};
use super::{Clock, Entry, Extra, Flags, Kind, Report, Scan, Xattr};

/// Maximum length of a directory entry's name in bytes.
const MAX_NAME: usize = 255;
/// Maximum length in bytes of the strings of one row: more than the attributes (64 KiB, and as many in the base), the
/// path and the link target of an entry have on any file system.
const MAX_BYTES: usize = 1 << 20;

/// The head of a stored scan.
#[derive(Serialize, Deserialize)]
struct Header {
    entries: u64,
    above: u32,
    clock: Clock,
    dropped_xattrs: Vec<(String, u64)>,
}

/// One entry.
#[derive(Serialize, Deserialize)]
struct Row<'a> {
    flags: Flags,
    kind: Kind,
    unsure: bool,
    /// Number of entries between the parent and this one, plus one; 0 for the root.
    back: u32,
    #[serde(borrow)]
    name: &'a Bytes,
    /// Absent for whiteouts.
    status: Option<Status>,
    extra: Option<(Cow<'a, Extra>, Option<StoredXattrs>)>,
}

/// What `stat` says of an entry. Inode number and times are differences from the previous entry that has a status.
#[derive(Serialize, Deserialize)]
struct Status {
    root: u16,
    mode: u16,
    uid: u32,
    gid: u32,
    nlink: u32,
    size: u64,
    allocated: u64,
    rdev: u64,
    mtime_nsec: u32,
    ctime_nsec: u32,
    ino: i64,
    mtime: i64,
    ctime: i64,
}

/// The extended attributes of an entry.
#[derive(Serialize, Deserialize)]
enum StoredXattrs {
    /// A set that no entry before has.
    New(Vec<(ByteBuf, ByteBuf)>),
    /// The number of a set, in the order of their first entries.
    Known(u32),
}

/// A stored scan, and the entries whose content may have changed without a change of their stamps.
#[derive(Debug)]
pub struct Stored {
    /// The scan. Its directories are opened when it is scanned again.
    pub scan: Scan,
    /// By entry: the content is unsure.
    pub unsure: Vec<bool>,
}

impl Scan {
    /// Writes the scan to `to`. `unsure` is as for [`Scan::changes_since`]; entries whose stamps are too recent are
    /// added.
    pub fn store(&self, unsure: &dyn Fn(u32) -> bool, to: &mut dyn Write) -> io::Result<()> {
        let header = Header {
            entries: self.len() as u64,
            above: self.above,
            clock: self.clock,
            dropped_xattrs: (self.report.dropped_xattrs.iter())
                .map(|(name, count)| (name.to_owned(), count))
                .collect(),
        };
        write(&header, to)?;
        let mut before = Entry::default();
        let mut sets = HashMap::new();
        for (index, entry) in (0..).zip(self.entries()) {
            let marker = matches!(entry.kind, Kind::Whiteout | Kind::Opaque);
            let status = (!marker).then(|| Status {
                root: entry.root,
                mode: entry.mode,
                uid: entry.uid,
                gid: entry.gid,
                nlink: entry.nlink,
                size: entry.size,
                allocated: entry.allocated,
                rdev: entry.rdev,
                mtime_nsec: entry.mtime_nsec,
                ctime_nsec: entry.ctime_nsec,
                ino: entry.ino.wrapping_sub(before.ino) as i64,
                mtime: entry.mtime.wrapping_sub(before.mtime),
                ctime: entry.ctime.wrapping_sub(before.ctime),
            });
            let row = Row {
                flags: entry.flags,
                kind: entry.kind,
                unsure: !marker && !self.has_reliable_stamps(&entry) || unsure(index),
                back: index - entry.parent,
                name: Bytes::new(self.name(&entry)),
                status,
                extra: self.extra(&entry).filter(|_| !marker).map(|extra| {
                    let xattrs = extra.xattrs.as_ref();
                    let xattrs = xattrs.map(|xattrs| store_xattrs(xattrs, &mut sets));
                    (Cow::Borrowed(extra), xattrs)
                }),
            };
            write(&row, to)?;
            if !marker {
                before = entry;
            }
        }
        Ok(())
    }

    /// Reads the `length` bytes written by [`Scan::store`]. Returns `None` if they are not valid.
    pub fn restore(from: &mut impl Read, length: u64) -> Option<Stored> {
        let mut from = from.take(length);
        let mut buffer = vec![0; MAX_BYTES];
        let header: Header = read(&mut from, &mut buffer)?;
        let count = header.entries;
        // A row has at least seven bytes.
        if count == 0 || count > length / 7 || count >= u32::MAX.into() {
            return None;
        }
        let count = usize::try_from(count).ok()?;
        let above = header.above;
        if above as usize >= count {
            return None;
        }
        let mut report = Report::default();
        for (name, count) in header.dropped_xattrs {
            report.dropped_xattrs.at_least(&name, count);
        }
        let mut scan = Builder::default();
        scan.reserve(count);
        let mut unsure = Vec::with_capacity(count);
        // The chain of directories of the previous entry, each with its last child.
        let mut open: Vec<(u32, Option<u32>)> = Vec::new();
        let mut before = Entry::default();
        let mut sets = Vec::new();
        for index in 0..count as u32 {
            let row: Row<'_> = read(&mut from, &mut buffer)?;
            let (name, kind) = (&**row.name, row.kind);
            let parent = index.checked_sub(row.back)?;
            if index == 0 {
                if !name.is_empty() || kind != Kind::Dir {
                    return None;
                }
            } else {
                let plain = !name.is_empty()
                    && name.len() <= MAX_NAME
                    && !name.contains(&b'/')
                    && !name.contains(&0);
                if !plain || name == b"." || name == b".." || row.back == 0 || kind == Kind::Opaque
                {
                    return None;
                }
                // Parents come first, and a directory's entries follow it immediately, in order.
                while open.last()?.0 != parent {
                    open.pop();
                }
                let last = open.last_mut()?;
                if let Some(sibling) = last.1.replace(index) {
                    let (before, before_name) =
                        (scan.own().kind(sibling), scan.own().name(sibling));
                    let rank = |kind: Kind| kind != Kind::Whiteout;
                    if (rank(before), before_name) >= (rank(kind), name) {
                        return None;
                    }
                }
            }
            if kind == Kind::Dir {
                open.push((index, None));
            }
            // The directories above the tree form a chain, each the only entry of the one before.
            if index <= above && (kind != Kind::Dir || (index > 0 && row.back != 1))
                || index > above && parent < above
            {
                return None;
            }
            let mut entry = Entry {
                flags: row.flags,
                kind,
                extra: NO_EXTRA,
                parent,
                ..Entry::default()
            };
            if row.status.is_some() == (kind == Kind::Whiteout)
                || row.extra.is_some() && kind == Kind::Whiteout
            {
                return None;
            }
            if let Some(status) = row.status {
                entry.root = status.root;
                entry.mode = status.mode;
                entry.uid = status.uid;
                entry.gid = status.gid;
                entry.nlink = status.nlink;
                entry.size = status.size;
                entry.allocated = status.allocated;
                entry.rdev = status.rdev;
                entry.mtime_nsec = status.mtime_nsec;
                entry.ctime_nsec = status.ctime_nsec;
                entry.ino = before.ino.wrapping_add(status.ino as u64);
                entry.mtime = before.mtime.wrapping_add(status.mtime);
                entry.ctime = before.ctime.wrapping_add(status.ctime);
                before = entry;
            }
            let extra = match row.extra {
                Some((extra, xattrs)) => {
                    let mut extra = extra.into_owned();
                    if let Some(xattrs) = xattrs {
                        extra.xattrs = Some(restore_xattrs(xattrs, &mut sets)?);
                    }
                    Some(extra)
                }
                None => None,
            };
            unsure.push(row.unsure);
            scan.push(&entry, parent, name, extra);
        }
        let scan = Scan {
            rows: scan.finish(),
            roots: Arc::default(),
            lowers_known: true,
            above,
            clock: header.clock,
            report,
        };
        (from.limit() == 0).then_some(Stored { scan, unsure })
    }
}

fn write(row: &impl Serialize, to: &mut dyn Write) -> io::Result<()> {
    postcard::to_io(row, to).map(drop).map_err(io::Error::other)
}

/// Reads a value that may borrow from `buffer`, which bounds the length of its strings.
fn read<'a, T: Deserialize<'a>>(from: &'a mut impl Read, buffer: &'a mut [u8]) -> Option<T> {
    postcard::from_io((from, buffer)).ok().map(|(row, _)| row)
}

/// `sets` maps the attribute sets written so far to their numbers.
fn store_xattrs(xattrs: &Xattrs, sets: &mut HashMap<*const Xattr, u32>) -> StoredXattrs {
    let next = sets.len() as u32;
    let number = *sets.entry(xattrs.as_ptr()).or_insert(next);
    if number < next {
        return StoredXattrs::Known(number);
    }
    let copy = |bytes: &Vec<u8>| ByteBuf::from(bytes.clone());
    let set = xattrs.iter().map(|(name, value)| (copy(name), copy(value)));
    StoredXattrs::New(set.collect())
}

/// `sets` holds the attribute sets read so far.
fn restore_xattrs(stored: StoredXattrs, sets: &mut Vec<Xattrs>) -> Option<Xattrs> {
    match stored {
        StoredXattrs::Known(number) => sets.get(number as usize).map(Arc::clone),
        StoredXattrs::New(set) if set.is_empty() => None,
        StoredXattrs::New(set) => {
            let owned = |(name, value): (ByteBuf, ByteBuf)| (name.into_vec(), value.into_vec());
            let set: Xattrs = set.into_iter().map(owned).collect();
            sets.push(Arc::clone(&set));
            Some(set)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scan() -> Scan {
        let mut rows = Builder::default();
        let mut ino = u64::MAX;
        let mut add = |parent, name: &[u8], kind, extra: Option<Extra>| {
            let mark = Entry {
                kind,
                extra: NO_EXTRA,
                ..Entry::default()
            };
            let entry = Entry {
                mode: 0o644,
                ino,
                mtime: -5,
                ctime: 900,
                ctime_nsec: 3,
                ..mark
            };
            ino -= name.len() as u64;
            let entry = if kind == Kind::Whiteout { mark } else { entry };
            rows.push(&entry, parent, name, extra);
        };
        add(0, b"", Kind::Dir, None);
        add(0, b"gone", Kind::Whiteout, None);
        add(0, b"a", Kind::Dir, None);
        let set = Xattrs::from([(b"user.a".to_vec(), vec![0, 255])]);
        let file = Extra {
            xattrs: Some(set.clone()),
            ..Extra::default()
        };
        let link = Extra {
            link: Some(b"to".to_vec()),
            xattrs: Some(set.clone()),
            base: Some((1, 9)),
            privileged: true,
            ..Extra::default()
        };
        add(2, b"l", Kind::Symlink, Some(link));
        add(0, b"b", Kind::File, Some(file));
        Scan {
            rows: rows.finish(),
            roots: Arc::default(),
            lowers_known: true,
            above: 0,
            clock: Clock {
                seconds: 1_000,
                nanos: 7,
            },
            report: Report {
                dropped_xattrs: [("system.nfs4_acl", 2)].into_iter().collect(),
                ..Report::default()
            },
        }
    }

    fn stored(scan: &Scan, unsure: &dyn Fn(u32) -> bool) -> Vec<u8> {
        let mut bytes = Vec::new();
        scan.store(unsure, &mut bytes).expect("memory takes it all");
        bytes
    }

    fn restored(mut bytes: &[u8]) -> Option<Stored> {
        let length = bytes.len() as u64;
        Scan::restore(&mut bytes, length)
    }

    fn told(scan: &Scan) -> String {
        let entries: Vec<_> = (0..)
            .zip(scan.entries())
            .map(|(i, e)| (scan.path(i), e, scan.extra(&e).cloned()))
            .collect();
        format!("{entries:?} {:?} {:?}", scan.clock, scan.report)
    }

    #[test]
    fn what_was_stored_comes_back() {
        let scan = scan();
        let stored = stored(&scan, &|index| index == 4);
        let back = restored(&stored).expect("it is whole");
        assert_eq!(told(&scan), told(&back.scan));
        assert_eq!(back.unsure, [false, false, false, false, true]);
        let set = |index| back.scan.xattrs(&back.scan.entry(index)).as_ptr();
        assert_eq!(set(3), set(4), "the same attributes are kept once");
    }

    #[test]
    fn damaged_bytes_are_no_scan_or_a_sane_one() {
        let stored = stored(&scan(), &|_| false);
        for cut in 0..stored.len() {
            assert!(restored(&stored[..cut]).is_none(), "cut at {cut}");
        }
        for at in 0..stored.len() {
            for value in [
                0,
                1,
                2,
                0x2f,
                0x7f,
                0x80,
                0xff,
                stored[at] ^ 1,
                stored[at] ^ 0x10,
            ] {
                let mut damaged = stored.clone();
                damaged[at] = value;
                let Some(Stored { scan, .. }) = restored(&damaged) else {
                    continue;
                };
                let ends = scan.rows.ends();
                for (index, entry) in scan.entries().enumerate().skip(1) {
                    assert!((entry.parent as usize) < index, "a parent after its child");
                    assert!(ends[entry.parent as usize] > index as u32);
                    assert_eq!(scan.entry(entry.parent).kind, Kind::Dir);
                    let path = scan.path(index as u32);
                    assert!(
                        !path.starts_with(b"/")
                            && !path
                                .split(|&b| b == b'/')
                                .any(|n| matches!(n, b"" | b".." | b"."))
                    );
                }
            }
        }
    }
}
