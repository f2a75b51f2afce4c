//! Detects whether a container's processes can write to files past the page cache or asynchronously: `O_DIRECT`,
//! `libaio`, `io_uring`. Locks and time stamps reveal the least about such writes.
//!
//! Source: `proc_pid_fdinfo(5)`; kernel `fs/aio.c` (the ring is mapped under a name of its own), `io_uring/fdinfo.c`,
//! `io_uring/register.c` (the descriptor of a ring may be closed once it is registered; its mapping remains).

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::path::Path;

use super::Error;
use super::mapped::container_pids;
use super::members::is_gone;
use crate::node::procfs::{Mapping, field, read_maps};

/// Maximum number of descriptors that are examined. Beyond it, every way of writing is assumed.
const MAX_DESCRIPTORS: usize = 100_000;
/// Maximum bytes read of one descriptor's `fdinfo`: enough for the flags and the first word of a ring.
const MAX_INFO: u64 = 1 << 10;

/// The modes in which the processes may write.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WriteModes {
    /// A file is open with `O_DIRECT`.
    pub direct: bool,
    /// There is a ring of `libaio` or `io_uring`: writes continue while the process is frozen.
    pub asynchronous: bool,
}

/// Returns the modes in which the processes of the container of `pid` can write now.
///
/// A write that was submitted before and is still in flight belongs to a ring or descriptor that still exists, with two
/// exceptions: programs that close theirs without waiting, and rings in the program's own memory whose descriptor is
/// only registered (`IORING_SETUP_NO_MMAP` with `IORING_SETUP_REGISTERED_FD_ONLY`), which no file in `/proc` shows. All
/// modes are returned if the container has no cgroup of its own that lists its processes: such a container cannot be
/// frozen, but it can be saved while it runs.
pub fn write_modes(pid: u32, host_root: Option<&Path>) -> Result<WriteModes, Error> {
    let proc = host_root.unwrap_or(Path::new("/")).join("proc");
    let mut modes = WriteModes::default();
    let mut left = MAX_DESCRIPTORS;
    let pids = match container_pids(&proc, pid, host_root) {
        Err(Error::Unsupported { .. }) => {
            return Ok(WriteModes {
                direct: true,
                asynchronous: true,
            });
        }
        pids => pids?,
    };
    for pid in pids {
        let process = proc.join(pid.to_string());
        let looked = descriptors(&process.join("fdinfo"), &mut left, &mut modes)
            .and_then(|()| find_rings(&process.join("maps"), &mut modes));
        match looked {
            Ok(()) => {}
            // The process exited: the kernel waits for its writes.
            Err(error) if is_gone(&error) => {}
            Err(error) => return Err(Error::io(process, error)),
        }
        if modes.direct && modes.asynchronous {
            break;
        }
    }
    Ok(modes)
}

fn descriptors(dir: &Path, left: &mut usize, modes: &mut WriteModes) -> io::Result<()> {
    let mut text = Vec::new();
    for entry in fs::read_dir(dir)? {
        let Some(fewer) = left.checked_sub(1) else {
            (modes.direct, modes.asynchronous) = (true, true);
            return Ok(());
        };
        *left = fewer;
        text.clear();
        let read = File::open(entry?.path()).and_then(|file| {
            let mut file = file.take(MAX_INFO);
            file.read_to_end(&mut text)
        });
        match read {
            Ok(_) => parse_fdinfo(&text, modes),
            // The descriptor was closed meanwhile.
            Err(error) if is_gone(&error) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn parse_fdinfo(info: &[u8], modes: &mut WriteModes) {
    let flags = field(info, "flags").and_then(|flags| u32::from_str_radix(flags, 8).ok());
    modes.direct |= flags.is_some_and(|flags| flags & libc::O_DIRECT as u32 != 0);
    modes.asynchronous |= field(info, "SqMask").is_some();
}

fn find_rings(maps: &Path, modes: &mut WriteModes) -> io::Result<()> {
    let complete = read_maps(maps, |mapping| {
        modes.asynchronous |= is_ring(mapping);
        !modes.asynchronous
    })?;
    // The rest of a truncated list is unknown.
    modes.asynchronous |= !complete;
    Ok(())
}

/// Returns whether a mapping is a ring. A file may have the same name.
fn is_ring(mapping: &Mapping<'_>) -> bool {
    matches!(mapping.name, b"/[aio]" | b"anon_inode:[io_uring]")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_and_rings_are_told_from_all_else() {
        let of = |info: &str| {
            let mut modes = WriteModes::default();
            parse_fdinfo(info.as_bytes(), &mut modes);
            (modes.direct, modes.asynchronous)
        };
        let direct = format!(
            "pos:\t0\nflags:\t0{:o}\nmnt_id:\t15\n",
            0o100_001 | libc::O_DIRECT
        );
        assert_eq!(of(&direct), (true, false));
        assert_eq!(
            of("pos:\t0\nflags:\t0100001\nmnt_id:\t15\n"),
            (false, false)
        );
        assert_eq!(
            of("flags:\t02000002\nino:\t3\nSqMask:\t0x7\n"),
            (false, true)
        );
        for none in [
            "",
            "flags:",
            "flags:\tx\n",
            "flags:\t99999999999999\n",
            "x SqMask:",
        ] {
            assert_eq!(of(none), (false, false), "{none:?}");
        }
    }

    #[test]
    fn a_ring_without_a_descriptor_is_told_by_its_mapping() -> io::Result<()> {
        let line = |rest: &str| {
            format!("7fe22cd75000-7fe22cd76000 rw-s 00000000 00:10 747132    {rest}\n")
        };
        let dir = tempfile::tempdir()?;
        let maps = dir.path().join("maps");
        let of = |name: &str| {
            let mut modes = WriteModes::default();
            fs::write(&maps, [line("/usr/bin/x"), line(name), line("")].concat())?;
            find_rings(&maps, &mut modes)?;
            Ok::<_, io::Error>(modes.asynchronous)
        };
        assert!(of("anon_inode:[io_uring]")?);
        assert!(of("/[aio] (deleted)")?);
        assert!(of("/[aio]")?);
        for none in ["", "/aio", "anon_inode:[eventfd]", "/io_uring"] {
            assert!(!of(none)?, "{none:?}");
        }
        Ok(())
    }

    #[test]
    fn a_file_that_is_open_for_direct_io_is_found() {
        use std::os::unix::fs::OpenOptionsExt as _;
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let fds = Path::new("/proc/self/fdinfo");
        let look = || {
            let (mut modes, mut left) = (WriteModes::default(), MAX_DESCRIPTORS);
            descriptors(fds, &mut left, &mut modes).unwrap();
            modes.direct
        };
        let mut options = fs::File::options();
        options
            .write(true)
            .create(true)
            .custom_flags(libc::O_DIRECT);
        // Not every file system supports `O_DIRECT`.
        let Ok(file) = options.open(dir.path().join("file")) else {
            return;
        };
        assert!(look());
        drop(file);
        let (mut modes, mut left) = (WriteModes::default(), 0);
        descriptors(fds, &mut left, &mut modes).unwrap();
        assert!(modes.direct && modes.asynchronous, "too many to look at");
    }
}
