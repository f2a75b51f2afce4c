//! Recognizes what runtimes, the GPU hook and conda leave behind.

use rustix::fs::FileType;

use super::{Facts, Reason};
use crate::node::overlay::lower::basename;

/// Empty files that runtimes create to mount something over them or to mark a container.
pub(super) const EMPTY_STUBS: &[&[u8]] = &[
    b"etc/hosts",
    b"etc/hostname",
    b"etc/resolv.conf",
    b".dockerenv",
    b"run/.containerenv",
    b"dev/console",
];

/// Symbolic links that runtimes create, and their targets.
pub(super) const LINK_STUBS: &[(&[u8], &[u8])] = &[
    (b"etc/mtab", b"/proc/mounts"),
    (b"dev/fd", b"/proc/self/fd"),
    (b"dev/stdin", b"/proc/self/fd/0"),
    (b"dev/stdout", b"/proc/self/fd/1"),
    (b"dev/stderr", b"/proc/self/fd/2"),
    (b"dev/core", b"/proc/kcore"),
    (b"dev/ptmx", b"pts/ptmx"),
];

/// Directories that runtimes create as mount points.
pub(super) const DIRECTORY_STUBS: &[&[u8]] = &[
    b"dev",
    b"dev/pts",
    b"dev/shm",
    b"dev/mqueue",
    b"proc",
    b"sys",
    b"run/secrets",
];

/// Default devices (runtime-spec, `config-linux.md`, "Default Devices").
pub(super) const DEFAULT_DEVICES: &[&[u8]] = &[
    b"null", b"zero", b"full", b"random", b"urandom", b"tty", b"console", b"ptmx",
];

/// Returns the reason for a stub made by a runtime. A file with content is the user's.
pub(super) fn stub(path: &[u8], facts: &Facts<'_>) -> Option<Reason> {
    // Fast path: the first component rules out nearly all paths.
    let first = path.split(|&b| b == b'/').next()?;
    if !matches!(
        first,
        b"etc" | b"dev" | b"proc" | b"sys" | b"run" | b".dockerenv"
    ) {
        return None;
    }
    let in_dev = path.strip_prefix(b"dev/");
    let device = matches!(
        facts.file_type,
        Some(FileType::CharacterDevice | FileType::BlockDevice)
    );
    if device
        && in_dev.is_some_and(|name| DEFAULT_DEVICES.contains(&name) || name.starts_with(b"pts/"))
    {
        return Some(Reason::RuntimeDevice);
    }
    let stub = match facts.file_type {
        // Some runtimes bind-mount the host's devices over empty files.
        Some(FileType::RegularFile) => {
            facts.size == 0
                && (EMPTY_STUBS.contains(&path)
                    || in_dev.is_some_and(|name| DEFAULT_DEVICES.contains(&name)))
        }
        Some(FileType::Symlink) => LINK_STUBS
            .iter()
            .any(|(link, target)| path == *link && facts.link == Some(target)),
        None => {
            EMPTY_STUBS.contains(&path)
                || LINK_STUBS.iter().any(|(link, _)| path == *link)
                || DIRECTORY_STUBS.contains(&path)
                || [&b"dev"[..], b"proc", b"sys"].contains(&first)
        }
        _ => false,
    };
    stub.then_some(Reason::MountStub)
}

/// Returns whether an entry was left in the upper by libnvidia-container: it creates empty files, mounts the driver's
/// files over them, and `ldconfig` adds links to them (libnvidia-container#50, nvidia-docker#1488).
pub(super) fn is_gpu_remnant(path: &[u8], facts: &Facts<'_>) -> bool {
    let name = basename(path);
    match facts.file_type {
        Some(FileType::RegularFile) if facts.size == 0 => {
            is_driver_library(name)
                || path
                    .strip_prefix(b"usr/bin/")
                    .is_some_and(|n| n.starts_with(b"nvidia-") && !n.contains(&b'/'))
                || path
                    .strip_prefix(b"usr/")
                    .unwrap_or(path)
                    .starts_with(b"lib/firmware/nvidia/")
        }
        Some(FileType::CharacterDevice) => path.starts_with(b"dev/nvidia"),
        _ => false,
    }
}

/// Returns whether a name is that of a driver's shared library: `lib{cuda,nvidia-*,nvcuvid,nvoptix}*.so` with or
/// without a version.
pub(super) fn is_driver_library(name: &[u8]) -> bool {
    let Some(stem) = name.strip_prefix(b"lib") else {
        return false;
    };
    let driver = [&b"cuda"[..], b"nvidia-", b"nvcuvid", b"nvoptix"]
        .iter()
        .any(|start| stem.starts_with(start));
    driver && (stem.ends_with(b".so") || stem.windows(4).any(|part| part == b".so."))
}

/// Returns whether a path is an archive that conda has unpacked and kept: `pkgs/NAME-VERSION-BUILD.conda` or
/// `.tar.bz2`. The two dashes distinguish it from a user's archive in a directory that happens to be called `pkgs`.
pub(super) fn is_conda_archive(path: &[u8]) -> bool {
    let name = basename(path);
    let Some(stem) = name
        .strip_suffix(b".conda")
        .or_else(|| name.strip_suffix(b".tar.bz2"))
    else {
        return false;
    };
    let parent = path[..path.len() - name.len()].strip_suffix(b"/");
    parent.is_some_and(|parent| basename(parent) == b"pkgs")
        && stem.split(|&b| b == b'-').count() >= 3
}
