//! Lists the files that a container's processes have mapped shared. A write through such a mapping to a page that is
//! already dirty does not change any time stamp.
//!
//! Source: `proc_pid_maps(5)`; kernel `fs/proc/task_mmu.c`. The text is untrusted: the container chooses the paths in
//! it.

use std::collections::{BTreeMap, HashSet};
use std::io;
use std::path::{Path, PathBuf};

use super::members::{is_gone, members};
use super::{Error, Processes, groups};
use crate::node::procfs::{MAX_MAPS, Mapping, read_maps};

/// Maximum bytes of names kept for all processes together: each mapping can have a different name of up to the maximum
/// path length.
const MAX_NAMES: usize = 64 << 20;

/// A file that a process has mapped shared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SharedMapping {
    /// Absolute path in the process's mount namespace, without the suffix of a deleted file. Newlines in names are
    /// written as `\012`.
    pub path: Vec<u8>,
    /// Whether the kernel reports the file as deleted. A file may also have a name that ends like that.
    pub deleted: bool,
    /// Whether the mapping is writable now. If not, `mprotect` may make it writable later.
    pub writable: bool,
    /// Device numbers of the file system.
    pub device: (u32, u32),
    /// Inode number in that file system.
    pub inode: u64,
    /// Path of a kernel link that leads to the file for as long as the process has it mapped.
    pub link: PathBuf,
}

/// Returns every shared mapping of a file by a process of the container of `pid`, each file once.
///
/// Mappings made and processes started after the list was taken are not in it. They are not needed: the first write of
/// a mapping to a page faults, which updates the file's time stamps, also in a forked child.
pub fn shared_mappings(pid: u32, host_root: Option<&Path>) -> Result<Vec<SharedMapping>, Error> {
    let proc = host_root.unwrap_or(Path::new("/")).join("proc");
    let pids = container_pids(&proc, pid, host_root)?;
    let lists = pids
        .iter()
        .map(|pid| proc.join(pid.to_string()).join("maps"));
    Ok(collect_all(lists, MAX_NAMES)?.into_values().collect())
}

fn collect_all(lists: impl Iterator<Item = PathBuf>, most: usize) -> Result<Found, Error> {
    let (mut found, mut kept) = (BTreeMap::new(), 0);
    for path in lists {
        let result = collect(&path, &mut found).and_then(|added| {
            kept += added;
            if kept <= most {
                return Ok(());
            }
            Err(io::Error::other(format!(
                "with this one, its processes have more than {most} bytes of names of files mapped"
            )))
        });
        match result {
            Ok(()) => {}
            // The process exited and writes no more.
            Err(error) if is_gone(&error) => {}
            Err(error) => return Err(Error::io(path, error)),
        }
    }
    Ok(found)
}

/// Returns all processes that have the container's root or are in its cgroup.
pub(super) fn container_pids(
    proc: &Path,
    pid: u32,
    host_root: Option<&Path>,
) -> Result<HashSet<u32>, Error> {
    let mut pids: HashSet<u32> = Processes::new(proc, pid)?.in_root()?;
    for group in groups(proc, pid, host_root)? {
        pids.extend(members(proc, &group)?);
    }
    Ok(pids)
}

type Found = BTreeMap<(Vec<u8>, bool, (u32, u32)), SharedMapping>;

/// Adds the mappings of one process. Returns the number of bytes of names that were added.
fn collect(path: &Path, found: &mut Found) -> io::Result<usize> {
    let mut kept = 0;
    let complete = read_maps(path, |mapping| {
        if let Some((range, mapping)) = shared(mapping) {
            let key = (mapping.path.clone(), mapping.deleted, mapping.device);
            let entry = found.entry(key).or_insert_with(|| {
                kept += mapping.path.len();
                SharedMapping {
                    link: path.with_file_name("map_files").join(range),
                    ..mapping.clone()
                }
            });
            entry.writable |= mapping.writable;
        }
        true
    })?;
    if complete {
        return Ok(kept);
    }
    Err(io::Error::other(format!(
        "more than {MAX_MAPS} bytes of mappings"
    )))
}

/// Returns `None` for private mappings and for mappings without a file.
fn shared<'a>(mapping: &Mapping<'a>) -> Option<(&'a str, SharedMapping)> {
    if !mapping.is_shared() || mapping.inode == b"0" || !mapping.name.starts_with(b"/") {
        return None;
    }
    let range = std::str::from_utf8(mapping.range).ok()?;
    let inode = std::str::from_utf8(mapping.inode).ok()?.parse().ok()?;
    let plain = |b: u8| b.is_ascii_hexdigit() || b == b'-';
    let device = std::str::from_utf8(mapping.device).ok()?;
    let (major, minor) = device.split_once(':')?;
    let device = (
        u32::from_str_radix(major, 16).ok()?,
        u32::from_str_radix(minor, 16).ok()?,
    );
    range.bytes().all(plain).then(|| {
        let mapping = SharedMapping {
            path: mapping.name.to_vec(),
            deleted: mapping.deleted,
            writable: mapping.is_writable(),
            device,
            inode,
            link: PathBuf::new(),
        };
        (range, mapping)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_all_processes_together_are_bounded() -> std::io::Result<()> {
        let dir = tempfile::tempdir()?;
        let list = |pid: u32| {
            let process = dir.path().join(pid.to_string());
            std::fs::create_dir(&process)?;
            let name = format!("/{pid:099}");
            let line = format!("7f0a-7f0b rw-s 00000000 00:3e 1234 {name}\n");
            std::fs::write(process.join("maps"), line.repeat(3))?;
            Ok(process.join("maps"))
        };
        let lists = (1..=3).map(list).collect::<std::io::Result<Vec<_>>>()?;
        let of = |most| collect_all(lists.iter().cloned(), most).map(|found| found.len());
        assert_eq!(of(300).ok(), Some(3), "each name once");
        let error = of(299).map_err(|error| error.to_string());
        assert!(
            error.is_err_and(|error| error.contains("more than 299 bytes")),
            "three names of a hundred bytes"
        );
        Ok(())
    }

    #[test]
    fn only_shared_files_are_listed_whatever_they_are_called() {
        let file = |line: &str| {
            let mapping = Mapping::parse(line.as_bytes())?;
            shared(&mapping).map(|(range, m)| {
                (
                    range.to_owned(),
                    String::from_utf8_lossy(&m.path).into_owned(),
                    m.deleted,
                    m.writable,
                    m.device,
                )
            })
        };
        let some = |range: &str, path: &str, deleted, writable, device| {
            Some((range.to_owned(), path.to_owned(), deleted, writable, device))
        };
        assert_eq!(
            file("7f0a-7f0b rw-s 00000000 00:3e 1234                       /data/a b"),
            some("7f0a-7f0b", "/data/a b", false, true, (0, 0x3e))
        );
        assert_eq!(
            file("7f0a-7f0b r--s 00001000 fe:00 9 /x (deleted)"),
            some("7f0a-7f0b", "/x", true, false, (0xfe, 0))
        );
        for none in [
            "",
            "7f0a-7f0b rw-p 00000000 00:3e 1234 /private",
            "7f0a-7f0b rw-s 00000000 00:01 0 /anonymous",
            "7f0a-7f0b rw-s 00000000 00:01 1 anon_inode:[x]",
            "../../x rw-s 00000000 00:01 1 /x",
            "7f0a-7f0b rw-s 00000000 0001 1 /x",
            "7f0a-7f0b rw-s",
        ] {
            assert_eq!(file(none), None, "{none}");
        }
    }
}
