//! Files that the container's processes write to through shared mappings: the one way to change a file that need not
//! show in its time stamps.
//!
//! While a page is dirty, more writes to it move nothing. Once it was written to disk it is clean and protected, and the
//! next write faults, which moves the change time. So before each scan these files, and no others, are written out, the
//! clock having been read before: an entry that is stamped before that clock had only clean pages when it was scanned,
//! and whatever is written to it later shows. An entry that is stamped later is read again under the freeze whatever its
//! stamps say then ([`crate::scan::Scan::changes_since`]), and so is what could not be written out in time.
//!
//! A mapping that is made after the list was taken is not in it, and need not be: its first write to each page faults,
//! dirty or not (measured for the same process, another one and a forked child).

use std::collections::{HashMap, HashSet};
use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use super::{Context, Error};
use crate::container::Container;
use crate::freeze::{self, SharedMapping};
use crate::overlay::flush::flush;
use crate::overlay::root::Root;
use crate::scan::Clock;

/// How long writing them out may take. What is not done by then is read under the freeze.
const FLUSH_BOUND: Duration = Duration::from_secs(5);
/// Lists that are taken until one has no name in it that changed meanwhile.
const LOOKS: u32 = 3;

/// What is known of shared mappings at one time.
#[derive(Debug)]
pub(super) struct Mapped {
    /// The clock before anything was looked at.
    pub(super) since: Clock,
    /// Inodes of the upper that are mapped, and may have dirty pages.
    pub(super) dirty: HashSet<u64>,
    /// A file of the container's that is written to under a name that is not to be found in the upper: nothing can be
    /// said about what changes in it.
    pub(super) elsewhere: Option<String>,
}

/// Lists them and writes them out.
pub(super) async fn write_out(context: &Context, container: &Container) -> Result<Mapped, Error> {
    let (host_root, container) = (context.roots.host_root.clone(), container.clone());
    let work = move || {
        let since = Clock::now();
        let mut looks = 1;
        let (files, elsewhere) = loop {
            let found = find(host_root.as_deref(), &container)?;
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
pub(super) fn list(context: &Context, container: &Container) -> Result<Mapped, Error> {
    let since = Clock::now();
    let (files, elsewhere) = find(context.roots.host_root.as_deref(), container)?;
    Ok(Mapped {
        since,
        dirty: files.into_keys().collect(),
        elsewhere,
    })
}

/// Files by inode, and a mapping whose file is not to be found.
type Found = (HashMap<u64, OwnedFd>, Option<String>);

fn find(host_root: Option<&std::path::Path>, container: &Container) -> Result<Found, Error> {
    let upper =
        Root::open(&container.overlay.upper).map_err(|source| unreadable(container, source))?;
    let device = |dev: u64| (rustix::fs::major(dev), rustix::fs::minor(dev));
    let proc = host_root.unwrap_or(std::path::Path::new("/")).join("proc");
    let root = fs::metadata(proc.join(container.pid.to_string()).join("root"));
    // Kernels differ in whose numbers the list shows: the overlay's, or those of the file underneath.
    let mut devices = vec![device(
        fs::metadata(&container.overlay.upper)
            .map_err(|source| unreadable(container, source))?
            .dev(),
    )];
    devices.extend(root.ok().map(|root| device(root.dev())));
    let (mut files, mut elsewhere) = (HashMap::new(), None);
    for mapping in freeze::shared_mappings(container.pid, host_root)? {
        match in_upper(&upper, &mapping) {
            Some((ino, file)) => {
                files.insert(ino, file);
            }
            None if mapping.writable
                && devices.contains(&mapping.device)
                && !on_a_mount(container, &mapping)
                && has_a_name(&mapping) =>
            {
                elsewhere = Some(crate::escape::path(&mapping.path));
            }
            // From a lower, a volume, or nameless by now.
            None => {}
        }
    }
    Ok((files, elsewhere))
}

fn unreadable(container: &Container, source: std::io::Error) -> Error {
    Error::Scan(crate::scan::Error::Read {
        path: container.overlay.upper.display().to_string(),
        source,
    })
}

fn in_upper(upper: &Root, mapping: &SharedMapping) -> Option<(u64, OwnedFd)> {
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
        let ino = upper.stat(path).ok()??.st_ino;
        let file = upper.open_file(path, ino).ok()??;
        Some((ino, file))
    })
}

fn on_a_mount(container: &Container, mapping: &SharedMapping) -> bool {
    let path = std::path::Path::new(std::ffi::OsStr::from_bytes(&mapping.path));
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
fn flush_all(files: HashMap<u64, OwnedFd>) -> HashSet<u64> {
    let mut dirty: HashSet<u64> = files.keys().copied().collect();
    if files.is_empty() {
        return dirty;
    }
    let (done, flushed) = mpsc::channel();
    // Not waited for beyond the bound: a disk may hang for longer than anybody wants to.
    std::thread::spawn(move || {
        for (ino, file) in files {
            if flush(file.as_fd()).is_ok() && done.send(ino).is_err() {
                return;
            }
        }
    });
    let until = Instant::now() + FLUSH_BOUND;
    while let Ok(ino) = flushed.recv_timeout(until.saturating_duration_since(Instant::now())) {
        dirty.remove(&ino);
    }
    dirty
}
