//! Files that the container's processes write to through shared mappings: a way to change a file that need not show in
//! its time stamps. (Another is a write that had stamped it before it was looked at, and is still under way when it is
//! read: `layer::settle`.)
//!
//! While a page is dirty, more writes to it move nothing. Once it was written to disk it is clean and protected, and the
//! next write faults, which moves the change time. So before each scan these files, and no others, are written out, the
//! clock having been read before: an entry that is stamped before that clock had only clean pages when it was scanned,
//! and whatever is written to it later shows. An entry that is stamped later is read again under the freeze whatever its
//! stamps say then ([`crate::layer::scan::Scan::changes_since`]), and so is what could not be written out in time.
//!
//! A mapping that is made after the list was taken is not in it, and need not be: its first write to each page faults,
//! dirty or not (measured for the same process, another one and a forked child).

use std::collections::{HashMap, HashSet};
use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use super::trees::File;
use super::{Context, Error};
use crate::layer::scan::Clock;
use crate::node::container::{Container, Volume};
use crate::node::freeze::{self, SharedMapping};
use crate::node::overlay::flush::flush;
use crate::node::overlay::root::Root;

/// How long writing them out may take. What is not done by then is read under the freeze.
const FLUSH_BOUND: Duration = Duration::from_secs(5);
/// Lists that are taken until one has no name in it that changed meanwhile.
const LOOKS: u32 = 3;
/// How long one list may take. A process that waits for a file system of its own may keep the lock that its list needs.
pub(super) const LOOK_BOUND: Duration = Duration::from_secs(10);

/// What is known of shared mappings at one time.
#[derive(Debug)]
pub(super) struct Mapped {
    /// The clock before anything was looked at.
    pub(super) since: Clock,
    /// Files that are mapped, and may have dirty pages.
    pub(super) dirty: HashSet<File>,
    /// A file of the container's that is written to under a name that is not to be found where it should be: nothing can be
    /// said about what changes in it.
    pub(super) elsewhere: Option<String>,
}

/// Lists them and writes them out.
pub(super) async fn write_out(
    context: &Context,
    container: &Container,
    volumes: &[Volume],
) -> Result<Mapped, Error> {
    let (host_root, container) = (context.roots.host_root.clone(), container.clone());
    let volumes = volumes.to_vec();
    let work = move || {
        let since = Clock::now();
        let mut looks = 1;
        let (files, elsewhere) = loop {
            let found = find_in_time(host_root.clone(), &container, &volumes)?;
            if found.1.is_none() || looks == LOOKS {
                break found;
            }
            looks += 1;
        };
        let dirty = flush_all(files);
        Ok(Mapped {
            since,
            dirty,
            elsewhere,
        })
    };
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|_| Error::Worker)?
}

/// Lists them only: for a container that stands still.
pub(super) fn list(
    context: &Context,
    container: &Container,
    volumes: &[Volume],
) -> Result<Mapped, Error> {
    let since = Clock::now();
    let (files, elsewhere) = find_in_time(context.roots.host_root.clone(), container, volumes)?;
    Ok(Mapped {
        since,
        dirty: files.into_keys().collect(),
        elsewhere,
    })
}

/// Files, opened where they can be written out, and a mapping whose file is not to be found.
type Found = (HashMap<File, Option<OwnedFd>>, Option<String>);

/// As [`find`], and no longer than [`LOOK_BOUND`]. A thread that got stuck is left behind: it ends with this process.
fn find_in_time(
    host_root: Option<PathBuf>,
    container: &Container,
    volumes: &[Volume],
) -> Result<Found, Error> {
    let (container, volumes) = (container.clone(), volumes.to_vec());
    in_time(LOOK_BOUND, move || {
        find(host_root.as_deref(), &container, &volumes)
    })
    .unwrap_or(Err(Error::Unanswered {
        what: "the lists of what its processes have mapped",
        seconds: LOOK_BOUND.as_secs(),
    }))
}

/// What `work` comes to, if it does within `bound`.
pub(super) fn in_time<T: Send + 'static>(
    bound: Duration,
    work: impl FnOnce() -> T + Send + 'static,
) -> Option<T> {
    let (done, result) = mpsc::channel();
    // Without a thread there is no answer either: the sender is dropped, and nothing is waited for.
    let _ = std::thread::Builder::new().spawn(move || done.send(work()));
    result.recv_timeout(bound).ok()
}

/// Device numbers of what `path` leads to. Whoever serves it is not asked.
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
) -> Result<Found, Error> {
    let upper =
        Root::open(&container.overlay.upper).map_err(|source| unreadable(container, source))?;
    let device = |dev: u64| (rustix::fs::major(dev), rustix::fs::minor(dev));
    let proc = host_root.unwrap_or(Path::new("/")).join("proc");
    let root = device_of(&proc.join(container.pid.to_string()).join("root"));
    // Kernels differ in whose numbers the list shows: the overlay's, or those of the file underneath.
    let mut devices = vec![device(
        fs::metadata(&container.overlay.upper)
            .map_err(|source| unreadable(container, source))?
            .dev(),
    )];
    devices.extend(root);
    let (mut files, mut elsewhere) = (HashMap::new(), None);
    for mapping in freeze::shared_mappings(container.pid, host_root)? {
        if let Some((number, volume)) = volume_of(volumes, container, &mapping) {
            match named(volume.opened.root(), &mapping) {
                Some((ino, file)) => {
                    files.insert((number, ino), Some(file));
                }
                // Of another device it is a file of a mount that came later, which is not asked for its status.
                None if mapping.writable
                    && mapping.device == volume.device
                    && has_a_name(&mapping) =>
                {
                    elsewhere = Some(crate::common::escape::path(&mapping.path));
                }
                None => {}
            }
            continue;
        }
        // Mounted in another place as well, or at it alone: the inode tells, and it is not written out.
        for (number, volume) in (1..).zip(volumes) {
            if volume.device == mapping.device {
                files.entry((number, mapping.inode)).or_insert(None);
            }
        }
        match named(&upper, &mapping) {
            Some((ino, file)) => {
                files.insert((0, ino), Some(file));
            }
            None if mapping.writable
                && devices.contains(&mapping.device)
                && !on_a_mount(container, &mapping)
                && has_a_name(&mapping) =>
            {
                elsewhere = Some(crate::common::escape::path(&mapping.path));
            }
            // From a lower, a volume, or nameless by now.
            None => {}
        }
    }
    Ok((files, elsewhere))
}

fn unreadable(container: &Container, source: std::io::Error) -> Error {
    Error::Scan(crate::layer::scan::Error::Read {
        path: container.overlay.upper.display().to_string(),
        source,
    })
}

fn named(root: &Root, mapping: &SharedMapping) -> Option<(u64, OwnedFd)> {
    let mut names = vec![mapping.path.clone()];
    if mapping.deleted {
        names.push([&mapping.path[..], b" (deleted)"].concat());
    }
    // A name may hold a newline, or what stands for one.
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

/// The volume that a mapping's path leads into, with the number of its tree: not into what is mounted in it.
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

fn on_a_mount(container: &Container, mapping: &SharedMapping) -> bool {
    let path = Path::new(std::ffi::OsStr::from_bytes(&mapping.path));
    container
        .mounts
        .iter()
        .any(|mount| path.starts_with(&mount.destination))
}

fn has_a_name(mapping: &SharedMapping) -> bool {
    match fs::metadata(&mapping.link) {
        Ok(meta) => !mapping.deleted || meta.nlink() > 0,
        // Unmapped by now, or its process has ended.
        Err(error) => error.kind() != std::io::ErrorKind::NotFound,
    }
}

/// Writes the files out. Those that are not done in time are returned.
fn flush_all(files: HashMap<File, Option<OwnedFd>>) -> HashSet<File> {
    let mut dirty: HashSet<File> = files.keys().copied().collect();
    if files.is_empty() {
        return dirty;
    }
    let (done, flushed) = mpsc::channel();
    // Not waited for beyond the bound: a disk may hang for longer than anybody wants to.
    let _ = std::thread::Builder::new().spawn(move || {
        let opened = files.into_iter();
        for (which, file) in opened.filter_map(|(which, file)| Some((which, file?))) {
            if flush(file.as_fd()).is_ok() && done.send(which).is_err() {
                return;
            }
        }
    });
    let until = Instant::now() + FLUSH_BOUND;
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
        let late = in_time(Duration::from_millis(20), move || waits.recv().is_ok());
        assert_eq!(late, None);
        assert_eq!(in_time(Duration::from_secs(60), || 7), Some(7));
    }

    #[test]
    fn a_device_is_the_one_that_a_status_tells() {
        let dev = fs::metadata("/proc/self/root").map(|root| root.dev());
        let told = device_of(Path::new("/proc/self/root"));
        let same = |dev: u64| (rustix::fs::major(dev), rustix::fs::minor(dev));
        assert_eq!(told, dev.ok().map(same));
    }
}
