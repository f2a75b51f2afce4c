//! Fuzzes the readers of a node's files: those of containerd, CRI-O, Podman and Docker, and `/proc` for a tenant's
//! processes.
//!
//! An input is a list of files. A line `@ f OFFSET PATH` begins a file or a part of one; `@ d PATH` is a directory and
//! `@ l PATH TARGET` a symbolic link.

use std::collections::HashSet;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, symlink};
use std::path::{Component, Path};

use upperdeck::common::digest::ChainId;
use upperdeck::node::container::{
    Attempt, ContainerdRoot, Roots, StorageRoot, find, find_any, list, list_ended, prove_base,
    recheck,
};
use upperdeck::node::freeze;

use crate::errors;
use crate::files;

/// Maximum length of a file in bytes.
const LONGEST: u64 = 1 << 20;
/// Maximum number of files and directories of a node.
const MOST: usize = 200;

pub fn run(input: &[u8]) {
    let dir = files::directory();
    make(dir.path(), input);
    let roots = roots(dir.path());
    let listing = list(&roots);
    for problem in &listing.problems {
        assert!(!problem.reason.is_empty());
    }
    let mut seen = HashSet::new();
    for container in listing.containers.iter().chain(&listing.sandboxes).take(8) {
        assert!(!container.overlay.lowers.is_empty());
        // No path read from it is outside the node.
        let overlay = &container.overlay;
        for path in overlay.lowers.iter().chain([&overlay.upper]) {
            assert!(path.starts_with(dir.path()), "{}", path.display());
        }
        errors::checked(recheck(&roots, container));
        if let Some(base) = errors::checked(prove_base(&roots, container)) {
            let diff_ids: Vec<_> = base.layers.iter().map(|layer| layer.diff_id).collect();
            let chain: Vec<_> = base.layers.iter().map(|layer| layer.chain_id).collect();
            assert_eq!(ChainId::chain(&diff_ids), chain);
        }
        if let Some(running) = container.running()
            && seen.insert(running.pid)
        {
            errors::checked(freeze::shared_mappings(running.pid, Some(dir.path())));
            errors::checked(freeze::write_modes(running.pid, Some(dir.path())));
        }
    }
    let ended = list_ended(&roots, true, usize::MAX).containers;
    for container in ended.iter().take(8) {
        let overlay = &container.overlay;
        for path in overlay.lowers.iter().chain([&overlay.upper]) {
            assert!(path.starts_with(dir.path()), "{}", path.display());
        }
        errors::checked(recheck(&roots, container));
        errors::checked(prove_base(&roots, container));
    }
    let first = listing.containers.first();
    errors::checked(find(&roots, first.map_or("c0ffee", |found| &found.id)));
    errors::checked(find(&roots, "pid:77"));
    errors::checked(find_any(&roots, "hub/notebook-alice", Attempt::Previous));
}

/// Returns the locations of the runtimes in the seeds.
fn roots(node: &Path) -> Roots {
    let containerd = ["containerd", "containerd-2.2"].map(|name| ContainerdRoot {
        state: Path::new("/run").join(name),
        root: Path::new("/var/lib").join(name),
    });
    let storage = ["containers/storage", "crio-1.36"].map(|name| StorageRoot {
        root: Path::new("/var/lib").join(name),
        runroot: Path::new("/run").join(name),
    });
    Roots {
        host_root: Some(node.to_owned()),
        containerd: containerd.into(),
        docker: vec!["/var/lib/docker".into()],
        storage: storage.into(),
        proc: "/proc".into(),
    }
}

fn make(node: &Path, input: &[u8]) {
    let mut rest = input;
    for _ in 0..MOST {
        let Some(at) = next(rest) else {
            return;
        };
        rest = &rest[at + 2..];
        let end = rest.iter().position(|&byte| byte == b'\n');
        let (line, after) = rest.split_at(end.unwrap_or(rest.len()));
        let after = after.strip_prefix(b"\n").unwrap_or(after);
        rest = after;
        let Ok(line) = std::str::from_utf8(line) else {
            continue;
        };
        let content = &after[..next(after).unwrap_or(after.len())];
        let words: Vec<&str> = line.splitn(3, ' ').collect();
        // Files that cannot be created are skipped.
        let _ = match words.as_slice() {
            ["f", offset, path] if plain(path) => {
                write(&node.join(path), offset.parse().unwrap_or(0), content)
            }
            ["d", path] if plain(path) => fs::create_dir_all(node.join(path)),
            ["l", path, target] if plain(path) && inside(path, target) => {
                link(&node.join(path), target)
            }
            _ => Ok(()),
        };
    }
}

/// Returns the start of the next line of the list.
fn next(text: &[u8]) -> Option<usize> {
    if text.starts_with(b"@ ") {
        return Some(0);
    }
    let found = text.windows(3).position(|window| window == b"\n@ ");
    found.map(|at| at + 1)
}

/// Returns whether a path stays below the node.
fn plain(path: &str) -> bool {
    let path = Path::new(path);
    let mut parts = path.components();
    path.as_os_str().len() < 1000
        && path.components().count() > 0
        && parts.all(|part| matches!(part, Component::Normal(_)))
}

/// Returns whether a link leads into the node's own directories, or nowhere.
fn inside(path: &str, target: &str) -> bool {
    let above = target.split('/').filter(|part| *part == "..").count();
    !target.starts_with('/') && above < Path::new(path).components().count()
}

fn write(path: &Path, offset: u64, content: &[u8]) -> std::io::Result<()> {
    fs::create_dir_all(path.parent().unwrap_or(path))?;
    let file = File::options()
        .create(true)
        .write(true)
        .truncate(false)
        .open(path)?;
    file.write_all_at(content, offset.min(LONGEST))
}

fn link(path: &Path, target: &str) -> std::io::Result<()> {
    fs::create_dir_all(path.parent().unwrap_or(path))?;
    symlink(target, path)
}
