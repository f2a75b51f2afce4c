//! The kernel's view of a process: its identity, root, mounts and ID maps.
//!
//! Format: `proc_pid_stat(5)`, `proc_pid_mountinfo(5)`, `user_namespaces(7)`.

use std::fs::{self, File};
use std::io::Read as _;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Mode, OFlags, StatxFlags};

use super::IdMapping;
use super::error::Error;
use super::roots::{Roots, read_dir, read_kernel_file};
use crate::node::overlay::identity::{Identity, ReadCapability};
use crate::node::procfs::{
    self, MountInfo, Stat, effective_capabilities, field, parse_mountinfo, root_mount,
};

/// Maximum size of mountinfo in bytes. On a node with many pods it has a few megabytes.
const MOUNTINFO_CAP: u64 = 64 << 20;

/// Limits on a process's mount table. A container can make any number of mounts with names of any length.
#[derive(Clone, Copy, Debug)]
pub(super) struct MountLimits {
    pub(super) mounts: usize,
    pub(super) bytes: usize,
}

/// Limits for a save, which has to know every mount, because mounts are not part of the image.
pub(super) const SAVE_LIMITS: MountLimits = MountLimits {
    mounts: 8192,
    bytes: 4 << 20,
};
/// Limits for lists of all containers.
pub(super) const LIST_LIMITS: MountLimits = MountLimits {
    mounts: 512,
    bytes: 256 << 10,
};

/// A living process.
#[derive(Clone, Debug)]
pub(super) struct Process {
    pub(super) pid: u32,
    /// Start time in clock ticks since boot.
    pub(super) start: u64,
    /// PID of the parent; 0 if it is in another PID namespace.
    pub(super) parent: u32,
    /// ID of the mount that contains its root, as resolved by the kernel; `None` if `proc` is only a recording.
    pub(super) root: Option<u64>,
    pub(super) mounts: Vec<MountInfo>,
    /// Whether the table has more mounts.
    pub(super) mounts_cut: bool,
    /// UID map. Empty if IDs are those on disk. A user namespace without any mapping is an error instead.
    pub(super) uid_map: Vec<IdMapping>,
    /// GID map. Empty if IDs are those on disk.
    pub(super) gid_map: Vec<IdMapping>,
}

impl Process {
    /// Returns the mount that is its root.
    pub(super) fn root(&self) -> Option<&MountInfo> {
        match self.root {
            Some(id) => {
                let mut at_root = self
                    .mounts
                    .iter()
                    .filter(|m| m.mount_point == Path::new("/"));
                at_root.find(|m| m.id == id)
            }
            None => root_mount(&self.mounts),
        }
    }
}

/// Reads the first complete lines of a file within the limits, and returns whether there is more.
fn read_lines(path: &Path, most: MountLimits) -> Result<(Vec<u8>, bool), Error> {
    let failed = |source| Error::io(path, source);
    let file = File::open(path).map_err(failed)?;
    let mut text = Vec::new();
    file.take(most.bytes as u64 + 1)
        .read_to_end(&mut text)
        .map_err(failed)?;
    let longer = text.len() > most.bytes;
    text.truncate(most.bytes);
    let ends = text.iter().enumerate().filter(|(_, byte)| **byte == b'\n');
    let ends: Vec<usize> = ends.take(most.mounts).map(|(at, _)| at + 1).collect();
    let end = ends.last().copied().unwrap_or(0);
    // A last line without a newline is complete if nothing follows.
    if !longer && (end == text.len() || ends.len() < most.mounts) {
        return Ok((text, false));
    }
    text.truncate(end);
    Ok((text, true))
}

/// Returns the start time of a process in clock ticks since boot, or `None` if it does not exist or is a zombie.
pub(super) fn start_of(roots: &Roots, pid: u32) -> Result<Option<u64>, Error> {
    Ok(stat_of(roots, pid)?.map(|stat| stat.start))
}

fn stat_of(roots: &Roots, pid: u32) -> Result<Option<Stat>, Error> {
    let path = roots.proc(&format!("{pid}/stat"));
    let stat = match read_kernel_file(&path, 64 << 10) {
        Ok(stat) => stat,
        Err(e) if is_gone(&e) => return Ok(None),
        Err(e) => return Err(e),
    };
    Stat::parse(&stat)
        .map(|stat| stat.is_alive().then_some(stat))
        .ok_or_else(|| Error::damaged(&path, "expected a state and, as field 22, a start time"))
}

/// Number of the initial PID namespace (`PROC_PID_INIT_INO` of the kernel).
const INITIAL_PID_NAMESPACE: &str = "pid:[4026531836]";

/// Returns whether `/proc` shows the initial PID namespace, that of a node's processes, or this cannot be seen.
pub(super) fn shows_initial_namespace(roots: &Roots) -> bool {
    let namespace = std::fs::read_link(roots.proc("1/ns/pid"));
    namespace.map_or(true, |namespace| {
        namespace == Path::new(INITIAL_PID_NAMESPACE)
    })
}

/// Reads a process, or returns `None` if it does not exist. Fails if its mount table exceeds [`SAVE_LIMITS`].
pub(super) fn read(roots: &Roots, pid: u32) -> Result<Option<Process>, Error> {
    read_up_to(roots, pid, SAVE_LIMITS)
}

/// Like [`read`] with [`SAVE_LIMITS`]. With others, the mount table is truncated.
pub(super) fn read_up_to(
    roots: &Roots,
    pid: u32,
    most: MountLimits,
) -> Result<Option<Process>, Error> {
    match read_limited(roots, pid, most)? {
        Some(process) if process.mounts_cut && most.mounts >= SAVE_LIMITS.mounts => {
            Err(Error::TooManyMounts {
                pid,
                mounts: SAVE_LIMITS.mounts,
                bytes: SAVE_LIMITS.bytes,
            })
        }
        process => Ok(process),
    }
}

/// Like [`read`], with a mount table truncated at `most`.
pub(super) fn read_limited(
    roots: &Roots,
    pid: u32,
    most: MountLimits,
) -> Result<Option<Process>, Error> {
    let Some(Stat { parent, start, .. }) = stat_of(roots, pid)? else {
        return Ok(None);
    };
    let read = |name: &str, cap| match read_kernel_file(&roots.proc(&format!("{pid}/{name}")), cap)
    {
        Ok(bytes) => Ok(Some(bytes)),
        Err(e) if is_gone(&e) => Ok(None),
        Err(e) => Err(e),
    };
    let mountinfo = match read_lines(&roots.proc(&format!("{pid}/mountinfo")), most) {
        Ok(lines) => Some(lines),
        Err(e) if is_gone(&e) => None,
        Err(e) => return Err(e),
    };
    let (Some((mountinfo, mounts_cut)), Some(uid_text), Some(gid_text)) = (
        mountinfo,
        read("uid_map", 64 << 10)?,
        read("gid_map", 64 << 10)?,
    ) else {
        return Ok(None);
    };
    let path = |name: &str| roots.proc(&format!("{pid}/{name}"));
    let mounts = parse_mountinfo(&mountinfo).map_err(|e| Error::damaged(path("mountinfo"), e))?;
    let ids = |bytes: &[u8], name| parse_id_map(bytes).map_err(|e| Error::damaged(path(name), e));
    let (mut uid_map, mut gid_map) = (ids(&uid_text, "uid_map")?, ids(&gid_text, "gid_map")?);
    // For a process in our own user namespace, the map gives the IDs of the parent namespace, which are not those that
    // we see.
    let user_namespace = |pid: &str| fs::read_link(roots.proc(&format!("{pid}/ns/user"))).ok();
    if user_namespace(&pid.to_string())
        .is_some_and(|theirs| user_namespace("self").is_some_and(|ours| ours == theirs))
    {
        (uid_map, gid_map) = (Vec::new(), Vec::new());
    } else if let Some(name) = unwritten_map(&uid_text, &gid_text) {
        return Err(Error::damaged(
            path(name),
            "it is empty: its process is in a user namespace without ids, which says of nothing whose it is",
        ));
    }
    let root = match root_id(roots, pid) {
        Ok(root) => root,
        Err(error) if is_gone(&error) => return Ok(None),
        Err(error) => return Err(error),
    };
    // The PID may have been reused while the process was being read.
    if start_of(roots, pid)? != Some(start) {
        return Ok(None);
    }
    Ok(Some(Process {
        pid,
        start,
        parent,
        root,
        mounts,
        mounts_cut,
        uid_map,
        gid_map,
    }))
}

/// Reads the mount table of a process.
pub(super) fn mounts(roots: &Roots, pid: u32) -> Result<Vec<MountInfo>, Error> {
    let path = roots.proc(&format!("{pid}/mountinfo"));
    let bytes = read_kernel_file(&path, MOUNTINFO_CAP)?;
    parse_mountinfo(&bytes).map_err(|e| Error::damaged(path, e))
}

/// Returns which map of a user namespace was not written yet. Such a map maps no ID, whereas an empty map in
/// [`Process`] means that IDs are those on disk.
fn unwritten_map(uid_map: &[u8], gid_map: &[u8]) -> Option<&'static str> {
    let maps = [("uid_map", uid_map), ("gid_map", gid_map)];
    let empty = maps.iter().find(|(_, map)| map.trim_ascii().is_empty());
    empty.map(|(name, _)| *name)
}

/// Returns the process's current file access rights.
///
/// The ID maps are read after the capabilities: a process can at any time enter a user namespace of its own, in which
/// it has all capabilities, and can never leave it. So the maps are those that the capabilities belong to, or narrower
/// ones.
pub(super) fn identity(roots: &Roots, process: &Process) -> Result<Identity, Error> {
    let path = roots.proc(&format!("{}/status", process.pid));
    let status = read_kernel_file(&path, 64 << 10)?;
    let (mut identity, reads) = parse_status(&status)
        .ok_or_else(|| Error::damaged(&path, "expected Uid, Gid, Groups and CapEff"))?;
    if reads {
        let now = read(roots, process.pid)?.filter(|now| now.start == process.start);
        let now = now.ok_or_else(|| Error::io(&path, rustix::io::Errno::SRCH.into()))?;
        // Capabilities are relative to the process's user namespace, so they cover only the IDs mapped there if it is
        // not ours.
        identity.read_capability = if now.uid_map.is_empty() && now.gid_map.is_empty() {
            ReadCapability::All
        } else {
            ReadCapability::Mapped {
                uids: now.uid_map,
                gids: now.gid_map,
            }
        };
    }
    Ok(identity)
}

/// Parses `proc_pid_status(5)`: the IDs by which files are opened, and whether a capability bypasses read permissions.
fn parse_status(status: &[u8]) -> Option<(Identity, bool)> {
    // Real, effective, saved, file system.
    let id = |name| {
        field(status, name)?
            .split_ascii_whitespace()
            .nth(3)?
            .parse()
            .ok()
    };
    let groups = field(status, "Groups")?.split_ascii_whitespace();
    let mut groups = groups
        .map(|group| group.parse().ok())
        .collect::<Option<Vec<u32>>>()?;
    groups.sort_unstable();
    // CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH.
    let reads = effective_capabilities(status)? & 0b110 != 0;
    let identity = Identity {
        uid: id("Uid")?,
        gid: id("Gid")?,
        groups,
        read_capability: ReadCapability::Nothing,
    };
    Some((identity, reads))
}

/// Converts a start time to milliseconds since the epoch, with `btime` of `proc_stat(5)`.
pub(super) fn started_ms(roots: &Roots, start: u64) -> Option<i64> {
    let stat = read_kernel_file(&roots.proc("stat"), 16 << 20).ok()?;
    let booted = boot_time(&stat)?;
    let since_boot = start
        .checked_mul(1000)?
        .checked_div(rustix::param::clock_ticks_per_second())?;
    booted
        .checked_mul(1000)?
        .checked_add(i64::try_from(since_boot).ok()?)
}

/// Parses the line `btime SECONDS`.
fn boot_time(stat: &[u8]) -> Option<i64> {
    let line = stat
        .split(|&b| b == b'\n')
        .find_map(|line| line.strip_prefix(b"btime "))?;
    std::str::from_utf8(line).ok()?.trim().parse().ok()
}

/// Reads the mount table of a process, or returns `None` if it does not exist.
pub(super) fn mounts_of(roots: &Roots, pid: u32) -> Result<Option<Vec<MountInfo>>, Error> {
    match mounts(roots, pid) {
        Ok(mounts) => Ok(Some(mounts)),
        Err(error) if is_gone(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Reads the cgroups of a process (`cgroups(7)`), or returns `None` if it does not exist.
pub(super) fn cgroups_of(roots: &Roots, pid: u32) -> Result<Option<Vec<u8>>, Error> {
    match read_kernel_file(&roots.proc(&format!("{pid}/cgroup")), 64 << 10) {
        Ok(cgroups) => Ok(Some(cgroups)),
        Err(error) if is_gone(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Returns a process whose root is in the file system `device`. The file systems are not accessed.
pub(super) fn user_of_device(roots: &Roots, device: (u32, u32)) -> Result<Option<u32>, Error> {
    let names = read_dir(&roots.proc(""))?;
    let pids = names.iter().filter_map(|name| name.to_str()?.parse().ok());
    for pid in pids {
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let Ok(root) = rustix::fs::open(roots.proc(&format!("{pid}/root")), flags, Mode::empty())
        else {
            // It has ended, or it is no process of this program's PID namespace.
            continue;
        };
        let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
        let found = rustix::fs::statx(&root, "", flags, StatxFlags::TYPE);
        if found.is_ok_and(|found| (found.stx_dev_major, found.stx_dev_minor) == device) {
            return Ok(Some(pid));
        }
    }
    Ok(None)
}

/// Returns the ID of the mount that contains the root of a process. A table can list several mounts at `/`, and the
/// process's root is not necessarily the topmost.
pub(super) fn root_id(roots: &Roots, pid: u32) -> Result<Option<u64>, Error> {
    let link = roots.proc(&format!("{pid}/root"));
    // Recordings of /proc have no such links; then the mount table alone determines the root.
    if fs::symlink_metadata(&link).is_err_and(|e| e.kind() == std::io::ErrorKind::NotFound) {
        return Ok(None);
    }
    // `O_PATH`, because the file system may be an arbitrary one and must not be accessed.
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let root =
        rustix::fs::open(&link, flags, Mode::empty()).map_err(|e| Error::io(&link, e.into()))?;
    let id = procfs::mount_id(root.as_fd()).map_err(|e| Error::io(&link, e))?;
    Ok(Some(id))
}

/// Returns whether overlays have an index by default: the module's parameter, or false if there is none.
pub(super) fn index_default() -> bool {
    let parameter = PathBuf::from("/sys/module/overlay/parameters/index");
    read_kernel_file(&parameter, 16).is_ok_and(|value| value.starts_with(b"Y"))
}

/// Returns whether the file does not exist, or the process ended after the file was opened (ESRCH), or it has given up its
/// namespaces and is about to be a zombie (EINVAL for its mounts; kernel `fs/proc_namespace.c`, `mounts_open_common`).
fn is_gone(error: &Error) -> bool {
    let Error::Io { path, source } = error else {
        return error.is_not_found();
    };
    let is = |errno: rustix::io::Errno| source.raw_os_error() == Some(errno.raw_os_error());
    error.is_not_found()
        || is(rustix::io::Errno::SRCH)
        || (is(rustix::io::Errno::INVAL) && path.ends_with("mountinfo"))
}

/// Parses lines of three numbers. The identity mapping of all IDs is returned as an empty map.
fn parse_id_map(bytes: &[u8]) -> Result<Vec<IdMapping>, String> {
    let text = std::str::from_utf8(bytes).map_err(|e| e.to_string())?;
    let mut map = Vec::new();
    for line in text.lines() {
        let numbers: Vec<u32> = line
            .split_ascii_whitespace()
            .map_while(|n| n.parse().ok())
            .collect();
        let &[inside, outside, count] = numbers.as_slice() else {
            return Err(format!("{line:?} is not three numbers"));
        };
        map.push(IdMapping {
            inside,
            outside,
            count,
        });
    }
    if map
        == [IdMapping {
            inside: 0,
            outside: 0,
            count: u32::MAX,
        }]
    {
        map.clear();
    }
    Ok(map)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rights_are_those_by_which_files_are_opened() {
        let status = |groups: &str, caps: &str| {
            format!(
                "Name:\tsh\nUid:\t0\t1\t2\t1000\nGid:\t0\t1\t2\t1001\nGroups:\t{groups}\nCapPrm:\t000001ffffffffff\n\
                 CapEff:\t{caps}\n"
            )
        };
        let (identity, reads) =
            parse_status(status("2000 27 ", "0000000000000000").as_bytes()).unwrap();
        assert_eq!((identity.uid, identity.gid, reads), (1000, 1001, false));
        assert_eq!(identity.groups, [27, 2000]);
        for (caps, expected) in [
            ("0000000000000002", true),
            ("0000000000000004", true),
            ("00000000a80425fb", true),
            ("00000000a80425f9", false),
            ("0000000000200000", false),
        ] {
            let parsed = parse_status(status("", caps).as_bytes());
            assert_eq!(parsed.map(|(_, reads)| reads), Some(expected), "{caps}");
        }
        for bad in [
            "",
            "Uid:\t0\t0\t0\nGid:\t0\t0\t0\t0\nGroups:\t\nCapEff:\t0\n",
        ] {
            assert_eq!(parse_status(bad.as_bytes()), None, "{bad}");
        }
    }

    #[test]
    fn a_process_was_started_after_the_node_and_before_now() {
        assert_eq!(
            boot_time(b"cpu 1 2\nbtime 1700000000\n"),
            Some(1_700_000_000)
        );
        assert_eq!(boot_time(b"cpu 1 2\n"), None);
        let roots = Roots::default();
        let start = start_of(&roots, std::process::id()).unwrap().unwrap();
        let started = started_ms(&roots, start).unwrap();
        let now = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap()
            .as_millis() as i64;
        // The boot clock and the wall clock are adjusted independently.
        assert!(
            (now - 3_600_000..=now + 60_000).contains(&started),
            "{started} {now}"
        );
        assert_eq!(started_ms(&roots, u64::MAX), None);
    }

    #[test]
    fn the_full_identity_is_no_map_and_a_part_of_it_is() {
        assert_eq!(
            parse_id_map(b"         0          0 4294967295\n"),
            Ok(vec![])
        );
        assert_eq!(
            parse_id_map(b"0 100000 65536\n65536 1000 1\n"),
            Ok(vec![
                IdMapping {
                    inside: 0,
                    outside: 100_000,
                    count: 65536
                },
                IdMapping {
                    inside: 65536,
                    outside: 1000,
                    count: 1
                },
            ])
        );
        assert_eq!(parse_id_map(b"0 0 65536\n").map(|m| m.len()), Ok(1));
        assert!(parse_id_map(b"0 0\n").is_err());
        assert!(parse_id_map(b"0 0 -1\n").is_err());
    }

    #[test]
    fn a_mount_table_is_taken_in_whole_lines_up_to_a_bound() -> Result<(), Error> {
        let file = tempfile::NamedTempFile::new().map_err(|e| Error::io("a temporary file", e))?;
        let text = b"one\ntwo\nthree\n";
        fs::write(file.path(), text).map_err(|e| Error::io(file.path(), e))?;
        for (mounts, bytes, lines, cut) in [
            (3, 100, &text[..], false),
            (3, 14, text, false),
            (2, 100, b"one\ntwo\n", true),
            (9, 13, b"one\ntwo\n", true),
            (9, 7, b"one\n", true),
            (9, 2, b"", true),
            (0, 100, b"", true),
        ] {
            let got = read_lines(file.path(), MountLimits { mounts, bytes })?;
            assert_eq!(got, (lines.to_vec(), cut), "{mounts} mounts, {bytes} bytes");
        }
        Ok(())
    }

    #[test]
    fn a_user_namespace_without_ids_is_not_ours() {
        assert_eq!(unwritten_map(b"0 0 1\n", b"0 0 1\n"), None);
        assert_eq!(unwritten_map(b"", b"0 0 1\n"), Some("uid_map"));
        assert_eq!(unwritten_map(b"0 0 1\n", b"\n"), Some("gid_map"));

        // The process has all capabilities, but its namespace maps no ID.
        let command = "echo; exec sleep 600";
        let mut child = std::process::Command::new("unshare")
            .args(["--user", "sh", "-c", command])
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = [0];
        let ready = child
            .stdout
            .take()
            .map(|mut out| std::io::Read::read(&mut out, &mut line));
        let found = read(&Roots::default(), child.id());
        child.kill().unwrap();
        child.wait().unwrap();
        // Some machines do not permit user namespaces.
        if matches!(ready, Some(Ok(1))) {
            let error = found.unwrap_err().to_string();
            assert!(
                error.contains("uid_map") && error.contains("without ids"),
                "{error}"
            );
        }
    }

    #[test]
    fn a_process_that_gives_up_its_namespaces_is_gone() -> Result<(), Box<dyn std::error::Error>> {
        let roots = Roots::default();
        // It is not waited for yet, so it stays a zombie.
        let mut child = std::process::Command::new("true").spawn()?;
        while start_of(&roots, child.id())?.is_some() {
            std::thread::yield_now();
        }
        let path = roots.proc(&format!("{}/mountinfo", child.id()));
        let error = File::open(path)
            .err()
            .and_then(|error| error.raw_os_error());
        assert_eq!(error, Some(rustix::io::Errno::INVAL.raw_os_error()));
        let mounts = mounts_of(&roots, child.id());
        child.wait()?;
        assert!(mounts?.is_none());
        Ok(())
    }

    #[test]
    fn this_process_can_be_read_and_has_the_start_time_it_keeps() {
        let roots = Roots::default();
        let process = read(&roots, std::process::id()).unwrap().unwrap();
        assert_eq!(start_of(&roots, process.pid).unwrap(), Some(process.start));
        assert!(process.uid_map.is_empty());
        assert!(process.root().is_some());
        assert!(read(&roots, u32::MAX).unwrap().is_none());
    }
}
