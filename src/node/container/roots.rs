//! The directories with the runtimes' state, and the conversion of a path on the node to one for this program.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, ResolveFlags};

use super::error::{Error, Problem};
use super::records;

/// The two directories of a containerd.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContainerdRoot {
    /// `state` of its configuration: bundles of running containers.
    pub state: PathBuf,
    /// `root` of its configuration: metadata, snapshots, blobs.
    pub root: PathBuf,
}

/// The two directories of containers/storage (Podman, CRI-O, Buildah).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StorageRoot {
    /// `graphroot` of storage.conf.
    pub root: PathBuf,
    /// `runroot` of storage.conf.
    pub runroot: PathBuf,
}

/// All places to search. Missing ones are ignored, because no node has all runtimes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Roots {
    /// If set, all other paths including `proc` are below this directory, where an agent in a pod sees its node's root.
    pub host_root: Option<PathBuf>,
    /// containerd instances. By default that of the system (`/run/containerd`, `/var/lib/containerd`), those of k3s and
    /// RKE2 (`/run/k3s/containerd`, `/var/lib/rancher/{k3s,rke2}/agent/containerd`) and Docker's own
    /// (`/run/docker/containerd/daemon`, `/var/lib/docker/containerd/daemon`).
    pub containerd: Vec<ContainerdRoot>,
    /// Docker's data roots, by default `/var/lib/docker`; with user namespaces also their `UID.GID` subdirectories.
    pub docker: Vec<PathBuf>,
    /// Storage directories, by default `/var/lib/containers/storage` and `/run/containers/storage`.
    pub storage: Vec<StorageRoot>,
    /// The node's procfs, by default `/proc`.
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
    /// Returns the roots with their symbolic links resolved, and without those whose records another user can write
    /// ([`records`]). Each root that is left out is added to `problems`.
    pub(super) fn believed(&self, problems: &mut Vec<Problem>) -> Self {
        let mut roots = self.clone();
        let mut believes = |path: &mut PathBuf| match self.resolve_root(path) {
            Err(error) if error.kind() == io::ErrorKind::Other => {
                problems.push(Problem {
                    path: path.clone(),
                    reason: error.to_string(),
                    permission: false,
                });
                false
            }
            // A directory that does not exist has no records, and other errors are reported when they are read.
            Ok(()) | Err(_) => true,
        };
        roots
            .containerd
            .retain_mut(|c| believes(&mut c.root) && believes(&mut c.state));
        roots.docker.retain_mut(&mut believes);
        roots
            .storage
            .retain_mut(|s| believes(&mut s.root) && believes(&mut s.runroot));
        roots
    }

    /// Makes the path of a root absolute and resolves its symbolic links.
    fn resolve_root(&self, path: &mut PathBuf) -> io::Result<()> {
        let node = self.host_root.as_deref().unwrap_or(Path::new("/"));
        *path = match &self.host_root {
            Some(_) => Path::new("/").join(&*path),
            None => std::path::absolute(&*path)?,
        };
        *path = records::resolve_root(node, path)?;
        Ok(())
    }

    /// Converts a path on the node to one that this program can open: below the host root, with symbolic links
    /// (including absolute ones) resolved as on the node. Fails with [`io::ErrorKind::NotFound`] if it does not exist.
    pub(crate) fn locate(&self, path: &Path) -> io::Result<PathBuf> {
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

    /// Locates a directory below another without following symbolic links, which are an error (`ELOOP`). `store` itself
    /// is a directory of the records.
    pub(super) fn locate_below(&self, store: &Path, inside: &Path) -> io::Result<PathBuf> {
        let flags = OFlags::PATH | OFlags::CLOEXEC | OFlags::DIRECTORY;
        let store = records::open_directory(&self.path(store))?;
        let resolve =
            ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let found = rustix::fs::openat2(&store, inside, flags, Mode::empty(), resolve)?;
        fs::read_link(format!("/proc/self/fd/{}", found.as_raw_fd()))
    }

    /// Converts a path of [`Roots::believed`] to one that this program can open. No symbolic link is resolved below the
    /// root, where the records have none.
    pub(super) fn path(&self, path: &Path) -> PathBuf {
        match &self.host_root {
            Some(host_root) => fs::canonicalize(host_root)
                .unwrap_or_else(|_| host_root.clone())
                .join(path.strip_prefix("/").unwrap_or(path)),
            None => path.to_path_buf(),
        }
    }

    /// Returns a path in the node's procfs.
    pub(super) fn proc(&self, inside: &str) -> PathBuf {
        // Not resolved, because the links below /proc/PID are magic links.
        let proc = self.proc.strip_prefix("/").unwrap_or(&self.proc);
        match &self.host_root {
            Some(host_root) => host_root.join(proc).join(inside),
            None => self.proc.join(inside),
        }
    }
}

/// Reads a regular file of the records of at most `cap` bytes.
pub(super) fn read_file(path: &Path, cap: u64) -> Result<Vec<u8>, Error> {
    read(path, records::open_file(path), cap)
}

/// Reads a file of at most `cap` bytes from the kernel (procfs, sysfs).
pub(super) fn read_kernel_file(path: &Path, cap: u64) -> Result<Vec<u8>, Error> {
    read(path, File::open(path), cap)
}

fn read(path: &Path, file: io::Result<File>, cap: u64) -> Result<Vec<u8>, Error> {
    let mut bytes = Vec::new();
    file.and_then(|file| file.take(cap + 1).read_to_end(&mut bytes))
        .map_err(|e| Error::io(path, e))?;
    if bytes.len() as u64 > cap {
        return Err(Error::damaged(path, format!("longer than {cap} bytes")));
    }
    Ok(bytes)
}

/// Reads a JSON file of at most `cap` bytes.
pub(super) fn read_json<T: serde::de::DeserializeOwned>(path: &Path, cap: u64) -> Result<T, Error> {
    serde_json::from_slice(&read_file(path, cap)?).map_err(|e| Error::damaged(path, e))
}

/// Returns the names in a directory of the records, sorted; an empty list if it does not exist.
pub(super) fn read_dir(path: &Path) -> Result<Vec<OsString>, Error> {
    match records::names(path) {
        Ok(mut names) => {
            names.sort();
            Ok(names)
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(e) => Err(Error::io(path, e)),
    }
}

/// Reads a file that contains only a PID.
pub(super) fn pid_file(path: &Path) -> Result<u32, Error> {
    let text = read_file(path, 64)?;
    let pid = std::str::from_utf8(&text)
        .ok()
        .and_then(|text| text.trim().parse().ok());
    pid.filter(|&pid| pid > 0)
        .ok_or_else(|| Error::damaged(path, "expected a process number"))
}
