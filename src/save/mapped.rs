//! Files that the container's processes write to through shared mappings, which can change a file without changing its
//! time stamps. (Another such case is a write that had stamped the file before it was scanned, and is still in progress
//! when the file is read: `layer::pending_writes`.)
//!
//! While a page is dirty, further writes to it change no time stamp. Once it is written to disk it is clean and
//! write-protected, and the next write faults, which updates the change time. Before each scan, therefore, these files,
//! and no others, are written out, and the clock is read before that: an entry stamped before that clock had only clean
//! pages when it was scanned, and any later write to it is visible. An entry that is stamped later is read again under
//! the freeze whatever its stamps are then ([`crate::layer::scan::Scan::changes_since`]), and so is a file that could
//! not be written out in time.
//!
//! A mapping that is made after the list was taken is not in it and need not be: its first write to each page faults,
//! dirty or not (measured for the same process, another one and a forked child).

use std::collections::{HashMap, HashSet};
use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use super::trees::FileId;
use super::{Context, Error};
use crate::layer::scan::Clock;
use crate::node::container::{Container, Volume};
use crate::node::freeze::{self, SharedMapping};
use crate::node::overlay::flush::flush;
use crate::node::overlay::root::Root;

/// Timeout for writing the files out. The rest is read under the freeze.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(5);
/// Maximum number of lists that are taken until one contains no name that changed meanwhile.
const MAX_LISTINGS: u32 = 3;
/// Timeout for one list. A process that waits for a file system of its own may hold the lock that its list needs.
pub(super) const LISTING_TIMEOUT: Duration = Duration::from_secs(10);

/// The shared mappings at one time.
#[derive(Debug)]
pub(super) struct MappedFiles {
    /// The clock before anything was examined.
    pub(super) since: Clock,
    /// Mapped files that may have dirty pages.
    pub(super) dirty: HashSet<FileId>,
    /// A file of the container that is written to but cannot be found under its name: changes to it cannot be detected.
    pub(super) unresolved: Option<String>,
}

/// Lists the mapped files and writes them out.
pub(super) async fn write_out(
    context: &Context,
    container: &Container,
    volumes: &[Volume],
) -> Result<MappedFiles, Error> {
    let (host_root, container) = (context.roots.host_root.clone(), container.clone());
    let volumes = volumes.to_vec();
    let work = move || {
        let since = Clock::now();
        let mut looks = 1;
        let (files, unresolved) = loop {
            let found = find_with_timeout(host_root.clone(), &container, &volumes)?;
            if found.1.is_none() || looks == MAX_LISTINGS {
                break found;
            }
            looks += 1;
        };
        let dirty = flush_all(files);
        Ok(MappedFiles {
            since,
            dirty,
            unresolved,
        })
    };
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|_| Error::Worker)?
}

/// Only lists the mapped files, for a frozen container.
pub(super) fn list(
    context: &Context,
    container: &Container,
    volumes: &[Volume],
) -> Result<MappedFiles, Error> {
    let since = Clock::now();
    let (files, unresolved) =
        find_with_timeout(context.roots.host_root.clone(), container, volumes)?;
    Ok(MappedFiles {
        since,
        dirty: files.into_keys().collect(),
        unresolved,
    })
}

/// Files, with a descriptor if they can be written out, and a mapping whose file cannot be found.
type FoundFiles = (HashMap<FileId, Option<OwnedFd>>, Option<String>);

/// Like [`find`], for at most [`LISTING_TIMEOUT`]. A thread that hangs is abandoned: it ends with this process.
fn find_with_timeout(
    host_root: Option<PathBuf>,
    container: &Container,
    volumes: &[Volume],
) -> Result<FoundFiles, Error> {
    let (container, volumes) = (container.clone(), volumes.to_vec());
    with_timeout(LISTING_TIMEOUT, move || {
        find(host_root.as_deref(), &container, &volumes)
    })
    .unwrap_or(Err(Error::Unanswered {
        what: "the lists of what its processes have mapped",
        seconds: LISTING_TIMEOUT.as_secs(),
    }))
}

/// Returns the result of `work` if it is ready within `bound`.
pub(super) fn with_timeout<T: Send + 'static>(
    bound: Duration,
    work: impl FnOnce() -> T + Send + 'static,
) -> Option<T> {
    let (done, result) = mpsc::channel();
    // If the thread cannot be started, the sender is dropped and nothing is waited for.
    let _ = std::thread::Builder::new().spawn(move || done.send(work()));
    result.recv_timeout(bound).ok()
}

/// Returns the device numbers of the file at `path`, without a request to the server of its file system.
fn device_of(path: &Path) -> Option<(u32, u32)> {
    use rustix::fs::{AtFlags, CWD, Mode, OFlags, StatxFlags, openat, statx};
    let root = openat(CWD, path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).ok()?;
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let found = statx(&root, "", flags, StatxFlags::TYPE).ok()?;
    Some((found.stx_dev_major, found.stx_dev_minor))
}

fn find(
    host_root: Option<&Path>,
    container: &Container,
    volumes: &[Volume],
) -> Result<FoundFiles, Error> {
    let pid = container.require_running()?.pid;
    let upper =
        Root::open(&container.overlay.upper).map_err(|source| unreadable(container, source))?;
    let device = |dev: u64| (rustix::fs::major(dev), rustix::fs::minor(dev));
    let proc = host_root.unwrap_or(Path::new("/")).join("proc");
    let root = device_of(&proc.join(pid.to_string()).join("root"));
    // Kernels differ in whose device numbers the list shows: the overlay's, or those of the underlying file.
    let mut devices = vec![device(
        fs::metadata(&container.overlay.upper)
            .map_err(|source| unreadable(container, source))?
            .dev(),
    )];
    devices.extend(root);
    let (mut files, mut unresolved) = (HashMap::new(), None);
    for mapping in freeze::shared_mappings(pid, host_root)? {
        if let Some((number, volume)) = volume_of(volumes, container, &mapping) {
            match open_mapped_file(volume.opened.root(), &mapping) {
                Some((ino, file)) => {
                    files.insert((number, ino), Some(file));
                }
                // A file of another device belongs to a mount that was made later, whose status is not queried.
                None if mapping.writable
                    && mapping.device == volume.device
                    && is_named_file(&mapping) =>
                {
                    unresolved = Some(crate::common::escape::path(&mapping.path));
                }
                None => {}
            }
            continue;
        }
        // Mounted in another place as well, or only there: the inode identifies the file, and it is not written out.
        for (number, volume) in (1..).zip(volumes) {
            if volume.device == mapping.device {
                files.entry((number, mapping.inode)).or_insert(None);
            }
        }
        match open_mapped_file(&upper, &mapping) {
            Some((ino, file)) => {
                files.insert((0, ino), Some(file));
            }
            None if mapping.writable
                && devices.contains(&mapping.device)
                && !is_on_mount(container, &mapping)
                && is_named_file(&mapping) =>
            {
                unresolved = Some(crate::common::escape::path(&mapping.path));
            }
            // From a lower or a volume, or deleted by now.
            None => {}
        }
    }
    Ok((files, unresolved))
}

fn unreadable(container: &Container, source: std::io::Error) -> Error {
    Error::Scan(crate::layer::scan::Error::Read {
        path: container.overlay.upper.display().to_string(),
        source,
    })
}

fn open_mapped_file(root: &Root, mapping: &SharedMapping) -> Option<(u64, OwnedFd)> {
    let mut names = vec![mapping.path.clone()];
    if mapping.deleted {
        names.push([&mapping.path[..], b" (deleted)"].concat());
    }
    // A name may contain a newline, or the text that stands for one.
    let with_newlines = |name: &Vec<u8>| {
        let text = name.split(|&b| b == b'\\').collect::<Vec<_>>();
        let mut out = text[0].to_vec();
        for part in &text[1..] {
            match part.strip_prefix(b"012") {
                Some(rest) => out.extend([b"\n", rest].concat()),
                None => out.extend([b"\\", *part].concat()),
            }
        }
        out
    };
    names.extend(names.iter().map(with_newlines).collect::<Vec<_>>());
    names.iter().find_map(|name| {
        let path = name.strip_prefix(b"/")?;
        let ino = root.stat(path).ok()??.st_ino;
        let file = root.open_file(path, ino).ok()??;
        Some((ino, file))
    })
}

/// Returns the volume that a mapping's path leads into, with the number of its tree; not if it leads into a mount
/// inside the volume.
fn volume_of<'v>(
    volumes: &'v [Volume],
    container: &Container,
    mapping: &SharedMapping,
) -> Option<(usize, &'v Volume)> {
    let path = Path::new(std::ffi::OsStr::from_bytes(&mapping.path));
    let mounts = container.mounts.iter().map(|mount| &mount.destination);
    let deepest = mounts
        .filter(|at| path.starts_with(at))
        .max_by_key(|at| at.as_os_str().len())?;
    (1..).zip(volumes).find(|(_, v)| v.destination == *deepest)
}

fn is_on_mount(container: &Container, mapping: &SharedMapping) -> bool {
    let path = Path::new(std::ffi::OsStr::from_bytes(&mapping.path));
    container
        .mounts
        .iter()
        .any(|mount| path.starts_with(&mount.destination))
}

fn is_named_file(mapping: &SharedMapping) -> bool {
    match fs::metadata(&mapping.link) {
        Ok(meta) => !mapping.deleted || meta.nlink() > 0,
        // The file was unmapped meanwhile, or its process has ended.
        Err(error) => error.kind() != std::io::ErrorKind::NotFound,
    }
}

/// Writes the files out. Returns those that were not written in time.
fn flush_all(files: HashMap<FileId, Option<OwnedFd>>) -> HashSet<FileId> {
    let mut dirty: HashSet<FileId> = files.keys().copied().collect();
    if files.is_empty() {
        return dirty;
    }
    let (done, flushed) = mpsc::channel();
    // The thread is abandoned after the timeout: a disk may hang for much longer.
    let _ = std::thread::Builder::new().spawn(move || {
        let opened = files.into_iter();
        for (which, file) in opened.filter_map(|(which, file)| Some((which, file?))) {
            if flush(file.as_fd()).is_ok() && done.send(which).is_err() {
                return;
            }
        }
    });
    let until = Instant::now() + FLUSH_TIMEOUT;
    while let Ok(which) = flushed.recv_timeout(until.saturating_duration_since(Instant::now())) {
        dirty.remove(&which);
    }
    dirty
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_come_in_time_is_given_up() {
        let (_never, waits) = mpsc::channel::<()>();
        let late = with_timeout(Duration::from_millis(20), move || waits.recv().is_ok());
        assert_eq!(late, None);
        assert_eq!(with_timeout(Duration::from_secs(60), || 7), Some(7));
    }

    #[test]
    fn a_device_is_the_one_that_a_status_tells() {
        let dev = fs::metadata("/proc/self/root").map(|root| root.dev());
        let told = device_of(Path::new("/proc/self/root"));
        let same = |dev: u64| (rustix::fs::major(dev), rustix::fs::minor(dev));
        assert_eq!(told, dev.ok().map(same));
    }
}
