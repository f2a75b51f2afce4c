//! Serialises a scan, to be kept until the next save of the same container.
//!
//! The format is compact, because a node keeps many: numbers have variable length, and times are relative to the
//! previous entry. Reading is strict: it rejects everything that writing does not produce exactly. Both directions
//! stream, so that the bytes are never all in memory.

use std::collections::HashMap;
use std::io::{self, BufRead, Write};
use std::sync::Arc;

use super::memory::Xattrs;
use super::rows::{Builder, NO_EXTRA};
use super::{Clock, ContentLocation, Entry, Extra, Flags, Kind, Report, Scan, Xattr};

/// Maximum length of a directory entry's name in bytes.
const MAX_NAME: usize = 255;
/// Maximum length in bytes of a path, attribute or link target: more than any file system returns.
const MAX_BYTES: u64 = 1 << 20;
/// Maximum number of attributes of one entry: no more fit into the 64 KiB of their list.
const MAX_XATTRS: u64 = 1 << 16;

/// Instead of the number of an attribute set: the set follows.
const NEW_SET: u64 = 1;
/// Number of the first attribute set in later references.
const FIRST_SET: u64 = 2;

const KINDS: [Kind; 8] = [
    Kind::Opaque,
    Kind::Whiteout,
    Kind::Dir,
    Kind::File,
    Kind::Symlink,
    Kind::Char,
    Kind::Block,
    Kind::Fifo,
];

/// Bits of an entry's second byte besides its kind.
const EXTRA: u8 = 0x80;
const UNSURE: u8 = 0x40;

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
        let mut out = Vec::new();
        number(&mut out, self.len() as u64);
        number(&mut out, self.above.into());
        signed(&mut out, self.clock.seconds);
        number(&mut out, self.clock.nanos.into());
        number(&mut out, self.report.dropped_xattrs.iter().count() as u64);
        for (name, count) in self.report.dropped_xattrs.iter() {
            bytes(&mut out, name.as_bytes());
            number(&mut out, count);
        }
        let mut before = Entry::default();
        let mut sets = HashMap::new();
        for (index, entry) in (0..).zip(self.entries()) {
            to.write_all(&out)?;
            out.clear();
            let extra = self.extra(&entry);
            let kind = KINDS
                .iter()
                .position(|&kind| kind == entry.kind)
                .unwrap_or(0) as u8;
            let late = !matches!(entry.kind, Kind::Whiteout | Kind::Opaque)
                && !self.has_reliable_stamps(&entry);
            let unsure = late || unsure(index);
            out.push(entry.flags.0);
            out.push(
                kind | if extra.is_some() { EXTRA } else { 0 } | if unsure { UNSURE } else { 0 },
            );
            number(&mut out, u64::from(index - entry.parent));
            bytes(&mut out, self.name(&entry));
            if matches!(entry.kind, Kind::Whiteout | Kind::Opaque) {
                continue;
            }
            for value in [
                u64::from(entry.root),
                entry.mode.into(),
                entry.uid.into(),
                entry.gid.into(),
                entry.nlink.into(),
                entry.size,
                entry.allocated,
                entry.rdev,
                entry.mtime_nsec.into(),
                entry.ctime_nsec.into(),
            ] {
                number(&mut out, value);
            }
            signed(&mut out, entry.ino.wrapping_sub(before.ino) as i64);
            signed(&mut out, entry.mtime.wrapping_sub(before.mtime));
            signed(&mut out, entry.ctime.wrapping_sub(before.ctime));
            before = entry;
            if let Some(extra) = extra {
                write_extra(&mut out, extra, &mut sets);
            }
        }
        to.write_all(&out)
    }

    /// Reads the `length` bytes written by [`Scan::store`]. Returns `None` if they are not valid.
    pub fn restore(from: &mut impl BufRead, length: u64) -> Option<Stored> {
        let mut from = Reader { from, left: length };
        let count = from.number()?;
        // 4 is the minimum size of an entry.
        if count == 0 || count > length / 4 || count >= u32::MAX.into() {
            return None;
        }
        let count = usize::try_from(count).ok()?;
        let above: u32 = from.small()?;
        if above as usize >= count {
            return None;
        }
        let clock = Clock {
            seconds: from.signed()?,
            nanos: from.small()?,
        };
        let mut report = Report::default();
        for _ in 0..from.number()? {
            let (name, count) = (from.text()?, from.number()?);
            report.dropped_xattrs.at_least(&name, count);
        }
        let mut scan = Builder::default();
        scan.reserve(count);
        let mut unsure = Vec::with_capacity(count);
        // The chain of directories of the previous entry, each with its last child.
        let mut open: Vec<(u32, Option<u32>)> = Vec::new();
        let mut before = Entry::default();
        let mut sets = Vec::new();
        let mut name = Vec::new();
        for index in 0..count as u32 {
            let (flags, kind) = (from.byte()?, from.byte()?);
            let back: u32 = from.small()?;
            from.bytes(&mut name)?;
            let mut entry = Entry {
                flags: Flags(flags),
                kind: *KINDS.get(usize::from(kind & !(EXTRA | UNSURE)))?,
                extra: NO_EXTRA,
                parent: index.checked_sub(back)?,
                ..Entry::default()
            };
            let mut extra = None;
            if index == 0 {
                if !name.is_empty() || entry.kind != Kind::Dir {
                    return None;
                }
            } else {
                let plain = !name.is_empty()
                    && name.len() <= MAX_NAME
                    && !name.contains(&b'/')
                    && !name.contains(&0);
                if !plain
                    || name == b"."
                    || name == b".."
                    || back == 0
                    || entry.kind == Kind::Opaque
                {
                    return None;
                }
                // Parents come first, and a directory's entries follow it immediately, in order.
                while open.last()?.0 != entry.parent {
                    open.pop();
                }
                let last = open.last_mut()?;
                if let Some(sibling) = last.1.replace(index) {
                    let (kind, before) = (scan.own().kind(sibling), scan.own().name(sibling));
                    let rank = |kind: Kind| kind != Kind::Whiteout;
                    if (rank(kind), before) >= (rank(entry.kind), &name) {
                        return None;
                    }
                }
            }
            if entry.kind == Kind::Whiteout {
                if kind & EXTRA != 0 {
                    return None;
                }
            } else {
                entry.root = from.small()?;
                entry.mode = from.small()?;
                entry.uid = from.small()?;
                entry.gid = from.small()?;
                entry.nlink = from.small()?;
                entry.size = from.number()?;
                entry.allocated = from.number()?;
                entry.rdev = from.number()?;
                entry.mtime_nsec = from.small()?;
                entry.ctime_nsec = from.small()?;
                entry.ino = before.ino.wrapping_add(from.signed()? as u64);
                entry.mtime = before.mtime.wrapping_add(from.signed()?);
                entry.ctime = before.ctime.wrapping_add(from.signed()?);
                before = entry;
                if kind & EXTRA != 0 {
                    extra = Some(read_extra(&mut from, &mut sets)?);
                }
            }
            if entry.kind == Kind::Dir {
                open.push((index, None));
            }
            // The directories above the tree form a chain, each the only entry of the one before.
            if index <= above && (entry.kind != Kind::Dir || (index > 0 && back != 1))
                || index > above && entry.parent < above
            {
                return None;
            }
            unsure.push(kind & UNSURE != 0);
            scan.push(&entry, entry.parent, &name, extra);
        }
        let scan = Scan {
            rows: scan.finish(),
            roots: Arc::default(),
            lowers_known: true,
            above,
            clock,
            report,
        };
        (from.left == 0).then_some(Stored { scan, unsure })
    }
}

/// Writes an `Extra`. `sets` maps the attribute sets written so far to their numbers.
fn write_extra(out: &mut Vec<u8>, extra: &Extra, sets: &mut HashMap<*const Xattr, u64>) {
    let has = [
        extra.link.is_some(),
        extra.content.is_some(),
        extra.base.is_some(),
        extra.indexed_nlink.is_some(),
        extra.moved,
        extra.privileged,
    ];
    out.push((0..).zip(has).map(|(bit, has)| u8::from(has) << bit).sum());
    if let Some(link) = &extra.link {
        bytes(out, link);
    }
    if let Some(content) = &extra.content {
        number(out, content.root.into());
        bytes(out, &content.path);
        number(out, content.ino);
    }
    if let Some((root, ino)) = extra.base {
        number(out, root.into());
        number(out, ino);
    }
    if let Some(nlink) = extra.indexed_nlink {
        number(out, nlink.into());
    }
    // 0: no attributes. 1: a new set follows. Larger: the number of a set written before.
    let Some(xattrs) = &extra.xattrs else {
        number(out, 0);
        return;
    };
    let next = sets.len() as u64 + FIRST_SET;
    if let Some(known) = sets.insert(xattrs.as_ptr(), next) {
        sets.insert(xattrs.as_ptr(), known);
        number(out, known);
        return;
    }
    number(out, NEW_SET);
    number(out, xattrs.len() as u64);
    for (name, value) in xattrs.iter() {
        bytes(out, name);
        bytes(out, value);
    }
}

/// Reads an `Extra`. `sets` holds the attribute sets read so far.
fn read_extra(from: &mut Reader<'_, impl BufRead>, sets: &mut Vec<Xattrs>) -> Option<Extra> {
    let has = from.byte()?;
    let bit = |n: u8| has & (1 << n) != 0;
    if has >= 1 << 6 {
        return None;
    }
    let mut extra = Extra {
        moved: bit(4),
        privileged: bit(5),
        ..Extra::default()
    };
    if bit(0) {
        extra.link = Some(from.vec()?);
    }
    if bit(1) {
        extra.content = Some(ContentLocation {
            root: from.small()?,
            path: from.vec()?,
            ino: from.number()?,
        });
    }
    if bit(2) {
        extra.base = Some((from.small()?, from.number()?));
    }
    if bit(3) {
        extra.indexed_nlink = Some(from.small()?);
    }
    extra.xattrs = match from.number()? {
        0 => None,
        NEW_SET => {
            let set = read_set(from)?;
            sets.push(Arc::clone(&set));
            Some(set)
        }
        known => {
            let number = usize::try_from(known - FIRST_SET).ok()?;
            Some(Arc::clone(sets.get(number)?))
        }
    };
    Some(extra)
}

fn read_set(from: &mut Reader<'_, impl BufRead>) -> Option<Xattrs> {
    let count = from.number()?;
    if count == 0 || count > MAX_XATTRS {
        return None;
    }
    let mut xattrs = Vec::new();
    for _ in 0..count {
        xattrs.push((from.vec()?, from.vec()?));
    }
    Some(xattrs.into())
}

/// Writes a number with seven bits per byte, lowest first.
fn number(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// Writes a signed number in zigzag encoding, which is short for small absolute values.
fn signed(out: &mut Vec<u8>, value: i64) {
    number(out, ((value << 1) ^ (value >> 63)) as u64);
}

fn bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    number(out, bytes.len() as u64);
    out.extend(bytes);
}

struct Reader<'a, R> {
    from: &'a mut R,
    /// Remaining bytes.
    left: u64,
}

impl<R: BufRead> Reader<'_, R> {
    fn byte(&mut self) -> Option<u8> {
        self.left = self.left.checked_sub(1)?;
        let byte = *self.from.fill_buf().ok()?.first()?;
        self.from.consume(1);
        Some(byte)
    }

    fn number(&mut self) -> Option<u64> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            let bits = u64::from(byte & 0x7f);
            if bits << shift >> shift != bits {
                return None;
            }
            value |= bits << shift;
            if byte < 0x80 {
                return Some(value);
            }
        }
        None
    }

    fn small<T: TryFrom<u64>>(&mut self) -> Option<T> {
        T::try_from(self.number()?).ok()
    }

    fn signed(&mut self) -> Option<i64> {
        let value = self.number()?;
        Some((value >> 1) as i64 ^ -((value & 1) as i64))
    }

    /// Reads a byte string into a buffer that is cleared first.
    fn bytes(&mut self, bytes: &mut Vec<u8>) -> Option<()> {
        let length = self
            .number()
            .filter(|&length| length <= MAX_BYTES && length <= self.left)?;
        bytes.clear();
        bytes.resize(length as usize, 0);
        self.from.read_exact(bytes).ok()?;
        self.left -= length;
        Some(())
    }

    fn vec(&mut self) -> Option<Vec<u8>> {
        let mut bytes = Vec::new();
        self.bytes(&mut bytes)?;
        Some(bytes)
    }

    fn text(&mut self) -> Option<String> {
        String::from_utf8(self.vec()?).ok()
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
