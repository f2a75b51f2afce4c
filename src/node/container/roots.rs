//! Where the runtimes keep their state on this node, and how a path of the node becomes a path of this program.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, ResolveFlags};

use super::error::Error;

/// Where a containerd keeps its two halves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContainerdRoot {
    /// `state` of its configuration: bundles of running containers.
    pub state: PathBuf,
    /// `root` of its configuration: metadata, snapshots, blobs.
    pub root: PathBuf,
}

/// Where containers/storage (Podman, CRI-O, Buildah) keeps its two halves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StorageRoot {
    /// `graphroot` of storage.conf.
    pub root: PathBuf,
    /// `runroot` of storage.conf.
    pub runroot: PathBuf,
}

/// All places to look in. What is not there is passed over: no node has all runtimes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Roots {
    /// Everything else in here, `proc` too, lies below this directory (an agent in a pod sees its node's root there).
    pub host_root: Option<PathBuf>,
    /// containerds. By default the system's (`/run/containerd`, `/var/lib/containerd`), those of k3s and RKE2
    /// (`/run/k3s/containerd`, `/var/lib/rancher/{k3s,rke2}/agent/containerd`) and Docker's own
    /// (`/run/docker/containerd/daemon`, `/var/lib/docker/containerd/daemon`).
    pub containerd: Vec<ContainerdRoot>,
    /// Docker's data roots, by default `/var/lib/docker`; with user namespaces its `UID.GID` subdirectories too.
    pub docker: Vec<PathBuf>,
    /// By default `/var/lib/containers/storage` and `/run/containers/storage`.
    pub storage: Vec<StorageRoot>,
    /// By default `/proc`.
    pub proc: PathBuf,
}

impl Default for Roots {
    fn default() -> Self {
        let containerd = |state: &str, root: &str| ContainerdRoot {
            state: state.into(),
            root: root.into(),
        };
        Self {
            host_root: None,
            containerd: vec![
                containerd("/run/containerd", "/var/lib/containerd"),
                containerd(
                    "/run/k3s/containerd",
                    "/var/lib/rancher/k3s/agent/containerd",
                ),
                containerd(
                    "/run/k3s/containerd",
                    "/var/lib/rancher/rke2/agent/containerd",
                ),
                containerd(
                    "/run/docker/containerd/daemon",
                    "/var/lib/docker/containerd/daemon",
                ),
            ],
            docker: vec!["/var/lib/docker".into()],
            storage: vec![StorageRoot {
                root: "/var/lib/containers/storage".into(),
                runroot: "/run/containers/storage".into(),
            }],
            proc: "/proc".into(),
        }
    }
}

impl Roots {
    /// A path of the node as this program has to open it: below the host root, symlinks (absolute ones too) resolved
    /// as the node would. Fails with [`io::ErrorKind::NotFound`] where there is nothing.
    pub fn locate(&self, path: &Path) -> io::Result<PathBuf> {
        let Some(host_root) = &self.host_root else {
            return fs::canonicalize(path);
        };
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let root = rustix::fs::open(host_root, flags | OFlags::DIRECTORY, Mode::empty())?;
        let inside = path.strip_prefix("/").unwrap_or(path);
        let inside = if inside.as_os_str().is_empty() {
            Path::new(".")
        } else {
            inside
        };
        let found =
            rustix::fs::openat2(&root, inside, flags, Mode::empty(), ResolveFlags::IN_ROOT)?;
        fs::read_link(format!("/proc/self/fd/{}", found.as_raw_fd()))
    }

    /// A directory below another, by names alone: a symbolic link on the way is an error (`ELOOP`).
    /// `store` itself is located as the node would.
    pub(super) fn locate_below(&self, store: &Path, inside: &Path) -> io::Result<PathBuf> {
        let flags = OFlags::PATH | OFlags::CLOEXEC | OFlags::DIRECTORY;
        let store = rustix::fs::open(self.locate(store)?, flags, Mode::empty())?;
        let resolve =
            ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let found = rustix::fs::openat2(&store, inside, flags, Mode::empty(), resolve)?;
        fs::read_link(format!("/proc/self/fd/{}", found.as_raw_fd()))
    }

    /// As [`Roots::locate`]; what is not there keeps its place below the host root, for the error message.
    pub(super) fn path(&self, path: &Path) -> PathBuf {
        self.locate(path).unwrap_or_else(|_| match &self.host_root {
            Some(host_root) => host_root.join(path.strip_prefix("/").unwrap_or(path)),
            None => path.to_path_buf(),
        })
    }

    /// A path in the node's /proc.
    pub(super) fn proc(&self, inside: &str) -> PathBuf {
        // Not located: what is below /proc/PID are no ordinary links.
        let proc = self.proc.strip_prefix("/").unwrap_or(&self.proc);
        match &self.host_root {
            Some(host_root) => host_root.join(proc).join(inside),
            None => self.proc.join(inside),
        }
    }
}

/// The whole of a file of at most `cap` bytes.
pub(super) fn read_file(path: &Path, cap: u64) -> Result<Vec<u8>, Error> {
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(|e| Error::io(path, e))?;
    file.take(cap + 1)
        .read_to_end(&mut bytes)
        .map_err(|e| Error::io(path, e))?;
    if bytes.len() as u64 > cap {
        return Err(Error::damaged(path, format!("longer than {cap} bytes")));
    }
    Ok(bytes)
}

/// A JSON file of at most `cap` bytes.
pub(super) fn read_json<T: serde::de::DeserializeOwned>(path: &Path, cap: u64) -> Result<T, Error> {
    serde_json::from_slice(&read_file(path, cap)?).map_err(|e| Error::damaged(path, e))
}

/// The names in a directory, sorted; none if it is not there.
pub(super) fn read_dir(path: &Path) -> Result<Vec<std::ffi::OsString>, Error> {
    let entries = match fs::read_dir(path) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(Error::io(path, e)),
    };
    let mut names = Vec::new();
    for entry in entries {
        names.push(entry.map_err(|e| Error::io(path, e))?.file_name());
    }
    names.sort();
    Ok(names)
}

/// A file with nothing but a process number in it.
pub(super) fn pid_file(path: &Path) -> Result<u32, Error> {
    let text = read_file(path, 64)?;
    let pid = std::str::from_utf8(&text)
        .ok()
        .and_then(|text| text.trim().parse().ok());
    pid.filter(|&pid| pid > 0)
        .ok_or_else(|| Error::damaged(path, "expected a process number"))
}
