//! Parses the files of `/proc`: `mountinfo`, and of a process `stat`, `status`, `cgroup`, `maps` and `fdinfo`.
//!
//! Formats: `proc_pid_mountinfo(5)`, `proc_pid_stat(5)`, `proc_pid_status(5)`, `cgroups(7)`, `proc_pid_maps(5)`,
//! `proc_pid_fdinfo(5)`. Names in these files are untrusted: a container chooses them.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, BufRead as _, BufReader, Read as _};
use std::os::fd::{AsRawFd as _, BorrowedFd};
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};

/// Maximum bytes read of one process's `maps`: four times what the kernel's default of 65,530 mappings takes with short
/// names.
pub(crate) const MAX_MAPS: u64 = 32 << 20;

/// A text that does not have the kernel's format.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not in the kernel's format: {expected}")]
pub struct Malformed {
    /// The line or option, with the kernel's escapes.
    pub text: OsString,
    /// What was expected.
    pub expected: &'static str,
}

fn lines(text: &[u8]) -> impl Iterator<Item = &[u8]> {
    text.split(|&b| b == b'\n')
}

fn path_of(bytes: Vec<u8>) -> PathBuf {
    PathBuf::from(OsString::from_vec(bytes))
}

/// One line of `/proc/PID/mountinfo`. Octal escapes are resolved in all fields except `super_options`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountInfo {
    /// Mount ID.
    pub id: u64,
    /// ID of the mount that it is mounted on.
    pub parent: u64,
    /// Device number of the file system, major and minor.
    pub device: (u32, u32),
    /// The directory of the file system that is mounted (`/`, except for a bind mount of a subdirectory).
    pub root: PathBuf,
    /// The mount point, relative to the root of the process whose mountinfo this is.
    pub mount_point: PathBuf,
    /// Whether the mount is writable, as far as its own options say.
    pub writable: bool,
    /// Whether the mount maps the owners of files (`MOUNT_ATTR_IDMAP`).
    pub id_mapped: bool,
    /// File system type.
    pub fs_type: String,
    /// The source that the file system reports.
    pub source: OsString,
    /// Options of the file system, with the kernel's escapes: a `,` in a value is `\054`.
    pub super_options: Vec<u8>,
}

/// Parses all lines of a mountinfo file, in their order.
pub fn parse_mountinfo(bytes: &[u8]) -> Result<Vec<MountInfo>, Malformed> {
    mountinfo_lines(bytes).collect()
}

/// Parses the lines of a mountinfo file one by one.
pub(crate) fn mountinfo_lines(
    bytes: &[u8],
) -> impl Iterator<Item = Result<MountInfo, Malformed>> + '_ {
    lines(bytes).filter(|line| !line.is_empty()).map(parse_line)
}

/// Reads this process's mounts, in which the hierarchies of cgroups are looked up. A line that cannot be parsed is left
/// out: it is not of a cgroup file system, whose lines contain nothing but the kernel's own text and an escaped path.
pub(crate) fn own_mounts() -> io::Result<Vec<MountInfo>> {
    let text = fs::read("/proc/self/mountinfo")?;
    Ok(mountinfo_lines(&text).filter_map(Result::ok).collect())
}

fn parse_line(line: &[u8]) -> Result<MountInfo, Malformed> {
    let malformed = |expected| Malformed {
        text: OsString::from_vec(line.to_vec()),
        expected,
    };
    let fields: Vec<&[u8]> = line.split(|&b| b == b' ').collect();
    // Fields 1 to 6, any number of optional fields, "-", type, source, options.
    let dash = fields
        .iter()
        .skip(6)
        .position(|f| *f == b"-")
        .map(|at| at + 6);
    let Some(dash) = dash.filter(|dash| fields.len() == dash + 4) else {
        return Err(malformed("six fields, optional ones, a dash, three fields"));
    };
    let number = |field: &[u8]| {
        std::str::from_utf8(field)
            .ok()
            .and_then(|f| f.parse::<u64>().ok())
    };
    let device = std::str::from_utf8(fields[2])
        .ok()
        .and_then(|f| f.split_once(':'))
        .and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)));
    Ok(MountInfo {
        id: number(fields[0]).ok_or_else(|| malformed("a number as the mount ID"))?,
        parent: number(fields[1]).ok_or_else(|| malformed("a number as the parent's ID"))?,
        device: device.ok_or_else(|| malformed("MAJOR:MINOR as the third field"))?,
        root: path_of(unescape_octal(fields[3])),
        mount_point: path_of(unescape_octal(fields[4])),
        writable: has_option(fields[5], b"rw"),
        id_mapped: has_option(fields[5], b"idmapped"),
        fs_type: String::from_utf8_lossy(&unescape_octal(fields[dash + 1])).into_owned(),
        source: OsString::from_vec(unescape_octal(fields[dash + 2])),
        super_options: fields[dash + 3].to_vec(),
    })
}

/// Returns the root mount of the process: of the mounts at `/`, the one that no other covers.
pub fn root_mount(mounts: &[MountInfo]) -> Option<&MountInfo> {
    let at_root = || mounts.iter().filter(|m| m.mount_point == Path::new("/"));
    at_root().find(|m| !at_root().any(|over| over.parent == m.id && over.id != m.id))
}

impl MountInfo {
    /// Returns whether the file system has an option, such as the controller of a cgroup hierarchy.
    pub(crate) fn has_super_option(&self, wanted: &[u8]) -> bool {
        has_option(&self.super_options, wanted)
    }
}

fn has_option(options: &[u8], wanted: &[u8]) -> bool {
    options.split(|&b| b == b',').any(|option| option == wanted)
}

/// Replaces octal escapes, such as `\012` by a newline. Any other text after a backslash is unchanged.
pub(crate) fn unescape_octal(bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(bytes.len());
    let mut rest = bytes;
    while let Some((&first, tail)) = rest.split_first() {
        if first == b'\\'
            && let [
                a @ b'0'..=b'3',
                b @ b'0'..=b'7',
                c @ b'0'..=b'7',
                after @ ..,
            ] = tail
        {
            out.push((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'));
            rest = after;
        } else {
            out.push(first);
            rest = tail;
        }
    }
    out
}

/// The fields of `proc_pid_stat(5)` that are used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stat {
    state: u8,
    /// PID of the parent; 0 if it is in another PID namespace.
    pub(crate) parent: u32,
    /// Time on cores (user and system), in clock ticks.
    pub(crate) cpu_ticks: u64,
    /// Start time, in clock ticks since boot.
    pub(crate) start: u64,
}

impl Stat {
    /// Parses fields 3, 4, 14, 15 and 22. Field 2 is the name in parentheses and may contain anything, including
    /// parentheses.
    pub(crate) fn parse(text: &[u8]) -> Option<Self> {
        let end = text.iter().rposition(|&b| b == b')')?;
        let fields = std::str::from_utf8(&text[end + 1..]).ok()?;
        let fields: Vec<&str> = fields.split_ascii_whitespace().collect();
        let number = |at: usize| fields.get(at)?.parse::<u64>().ok();
        Some(Self {
            state: *fields.first()?.as_bytes().first()?,
            parent: fields.get(1)?.parse().ok()?,
            cpu_ticks: number(11)?.checked_add(number(12)?)?,
            start: number(19)?,
        })
    }

    /// Returns whether it is the `stat` of a process that has not ended: a zombie has.
    pub(crate) fn is_alive(self) -> bool {
        !matches!(self.state, b'Z' | b'X' | b'x')
    }
}

/// Returns the value of the first line `NAME: VALUE` of a `status` or `fdinfo` file, without the white space around it.
pub(crate) fn field<'a>(text: &'a [u8], name: &str) -> Option<&'a str> {
    let value = |line: &'a [u8]| line.strip_prefix(name.as_bytes())?.strip_prefix(b":");
    let value = lines(text).find_map(value)?;
    std::str::from_utf8(value).ok().map(str::trim)
}

/// Returns the effective capabilities in the text of a `status` file, as a bit set.
pub(crate) fn effective_capabilities(status: &[u8]) -> Option<u64> {
    u64::from_str_radix(field(status, "CapEff")?, 16).ok()
}

/// Returns the ID of the mount that a descriptor of this process belongs to. `statx` would query the file system.
pub(crate) fn mount_id(fd: BorrowedFd<'_>) -> io::Result<u64> {
    let text = fs::read(format!("/proc/self/fdinfo/{}", fd.as_raw_fd()))?;
    let id = field(&text, "mnt_id").and_then(|id| id.parse().ok());
    id.ok_or_else(|| io::Error::other("the kernel does not say in which mount a descriptor is"))
}

/// A line of `/proc/PID/cgroup`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Membership<'a> {
    /// Whether the hierarchy is the unified one of v2.
    pub(crate) unified: bool,
    controllers: &'a [u8],
    /// The line up to its path.
    pub(crate) before_path: &'a [u8],
    /// Path of the cgroup, relative to the root of the reader's cgroup namespace.
    pub(crate) path: &'a [u8],
}

impl Membership<'_> {
    /// Returns whether it is the v1 hierarchy of a controller.
    pub(crate) fn has(&self, controller: &str) -> bool {
        has_option(self.controllers, controller.as_bytes())
    }

    /// Returns whether it is the v1 hierarchy that has these options of its file system.
    pub(crate) fn is_in(&self, super_options: &[u8]) -> bool {
        let mut controllers = self.controllers.split(|&b| b == b',');
        controllers.all(|controller| has_option(super_options, controller))
    }
}

/// Parses the lines `ID:CONTROLLERS:PATH` of `/proc/PID/cgroup`. Others are left out.
pub(crate) fn memberships(text: &[u8]) -> impl Iterator<Item = Membership<'_>> {
    lines(text).filter_map(|line| {
        // The path may contain colons: only the first two are separators.
        let mut fields = line.splitn(3, |&b| b == b':');
        let (id, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
        Some(Membership {
            unified: id == b"0" && controllers.is_empty(),
            controllers,
            before_path: &line[..line.len() - path.len()],
            path,
        })
    })
}

/// A line of `/proc/PID/maps`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mapping<'a> {
    /// `START-END`.
    pub(crate) range: &'a [u8],
    permissions: &'a [u8],
    /// `MAJOR:MINOR`.
    pub(crate) device: &'a [u8],
    pub(crate) inode: &'a [u8],
    /// Path or description, without the suffix of a deleted file. A newline is written as `\012`.
    pub(crate) name: &'a [u8],
    /// Whether the kernel reports the file as deleted. A file may also have a name that ends like that.
    pub(crate) deleted: bool,
}

impl<'a> Mapping<'a> {
    /// Parses `START-END PERMISSIONS OFFSET MAJOR:MINOR INODE NAME`.
    pub(crate) fn parse(line: &'a [u8]) -> Option<Self> {
        let mut rest = line.trim_ascii_end();
        let mut field = || {
            rest = rest.trim_ascii_start();
            let end = rest.iter().position(|&b| b == b' ').unwrap_or(rest.len());
            let (field, after) = rest.split_at(end);
            rest = after;
            (!field.is_empty()).then_some(field)
        };
        let (range, permissions, _offset) = (field()?, field()?, field()?);
        let (device, inode) = (field()?, field()?);
        let name = rest.trim_ascii_start();
        let alive = name.strip_suffix(b" (deleted)");
        Some(Self {
            range,
            permissions,
            device,
            inode,
            name: alive.unwrap_or(name),
            deleted: alive.is_some(),
        })
    }

    pub(crate) fn is_shared(&self) -> bool {
        self.permissions.get(3) == Some(&b's')
    }

    pub(crate) fn is_writable(&self) -> bool {
        self.permissions.get(1) == Some(&b'w')
    }
}

/// Calls `each` with the mappings in a `maps` file until it returns false. Returns false if the file has more than
/// [`MAX_MAPS`] bytes, of which the rest is not read.
pub(crate) fn read_maps(
    path: &Path,
    mut each: impl FnMut(&Mapping<'_>) -> bool,
) -> io::Result<bool> {
    let mut from = BufReader::with_capacity(64 << 10, File::open(path)?.take(MAX_MAPS + 1));
    let (mut line, mut read) = (Vec::new(), 0);
    loop {
        line.clear();
        read += from.read_until(b'\n', &mut line)? as u64;
        if read > MAX_MAPS {
            return Ok(false);
        }
        if line.is_empty() || Mapping::parse(&line).is_some_and(|mapping| !each(&mapping)) {
            return Ok(true);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_visible_root_is_the_one_nothing_covers() {
        let text = b"305 219 0:108 / / rw,relatime - overlay overlay rw,lowerdir=/a,upperdir=/b\n\
            310 305 0:22 / / rw shared:1 master:2 - tmpfs tmp\\040fs rw\n\
            306 305 0:110 /x\\134y /a\\040b rw,nosuid - proc proc rw\n";
        let mounts = parse_mountinfo(text).unwrap();
        assert_eq!(root_mount(&mounts).unwrap().id, 310);
        assert_eq!(root_mount(&mounts[..1]).unwrap().device, (0, 108));
        assert_eq!(
            (mounts[2].root.as_path(), mounts[2].mount_point.as_path()),
            (Path::new("/x\\y"), Path::new("/a b"))
        );
        assert_eq!(mounts[1].source, "tmp fs");
        assert!(root_mount(&mounts[2..]).is_none());
    }

    #[test]
    fn a_line_that_is_no_mount_is_refused() {
        for bad in [
            "x",
            "1 2 0:3 / / rw - overlay overlay",
            "a 2 0:3 / / rw - overlay overlay rw",
            "1 2 03 / / rw - o o rw",
        ] {
            assert!(parse_mountinfo(bad.as_bytes()).is_err(), "{bad}");
        }
    }

    #[test]
    fn unescape_leaves_what_is_no_escape() {
        for (text, expected) in [
            ("a\\040b", "a b"),
            ("\\134", "\\"),
            ("a\\04", "a\\04"),
            ("\\999", "\\999"),
            ("\\", "\\"),
        ] {
            assert_eq!(
                unescape_octal(text.as_bytes()),
                expected.as_bytes(),
                "{text}"
            );
        }
    }

    #[test]
    fn stat_survives_a_name_with_parentheses() {
        let text =
            b"42 (a) S 9 (x\n) R 7 42 42 0 -1 4194560 1 2 3 4 250 50 7 8 20 0 1 0 987654 1 2 3\n";
        assert_eq!(
            Stat::parse(text),
            Some(Stat {
                state: b'R',
                parent: 7,
                cpu_ticks: 300,
                start: 987_654
            })
        );
        let zombie = text.map(|byte| if byte == b'R' { b'Z' } else { byte });
        assert_eq!(Stat::parse(&zombie).map(Stat::is_alive), Some(false));
        for bad in [
            &b""[..],
            b"1 (a",
            b"1 (a)",
            b"1 (a) S",
            b"1 (a) S x",
            b"1 (a) S 1 2 3",
            b"7 (a) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 x",
            b"1 (a) \xff 1",
        ] {
            assert_eq!(Stat::parse(bad), None, "{}", bad.escape_ascii());
        }
    }

    #[test]
    fn a_list_of_mappings_is_read_up_to_a_bound() -> io::Result<()> {
        let dir = tempfile::tempdir()?;
        let path = dir.path().join("maps");
        let line = format!("7f0a-7f0b rw-s 00000000 00:3e 1234 /{:04000}\n", 1);
        let count = MAX_MAPS as usize / line.len();
        let mut seen = 0;
        let mut read = |lines: usize| -> io::Result<(bool, usize)> {
            fs::write(&path, line.repeat(lines))?;
            seen = 0;
            let complete = read_maps(&path, |_| {
                seen += 1;
                true
            })?;
            Ok((complete, seen))
        };
        assert_eq!(read(count)?, (true, count));
        assert_eq!(read(count + 1)?, (false, count));
        Ok(())
    }
}
