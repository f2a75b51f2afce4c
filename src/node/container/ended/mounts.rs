//! Finds where the mounts of a container's record were in its tree.
//!
//! A runtime follows the symbolic links of the tree when it mounts, and creates the mount point there. The record has
//! the path before that.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Component, Path, PathBuf};

use rustix::fs::FileType;

use super::super::MountPoint;
use super::super::error::Error;
use crate::node::overlay::lower::{Found, Lowers, Stack};
use crate::node::overlay::mount::OverlayMount;
use crate::node::overlay::root::Root;

/// Maximum number of symbolic links on a path, as in the kernel.
const MAX_LINKS: usize = 40;

/// Adds to each mount the path that it has in the tree, if that is another. The result is sorted by destination.
pub(super) fn resolve(
    overlay: &OverlayMount,
    mounts: Vec<MountPoint>,
) -> Result<Vec<MountPoint>, Error> {
    let tree = merged(overlay)?;
    let mut all: BTreeMap<PathBuf, MountPoint> = BTreeMap::new();
    for mut mount in mounts {
        let real = real_path(&tree, &mount.destination)
            .map_err(|source| Error::io(overlay.upper.join(tail(&mount.destination)), source))?;
        if real != mount.destination {
            let there = MountPoint {
                destination: real.clone(),
                ..mount.clone()
            };
            all.insert(real, there);
            // Reported once.
            mount.volume = false;
        }
        all.entry(mount.destination.clone()).or_insert(mount);
    }
    // The root itself is not a mount within the root.
    all.remove(Path::new("/"));
    Ok(all.into_values().collect())
}

fn tail(path: &Path) -> &Path {
    path.strip_prefix("/").unwrap_or(path)
}

/// Returns the container's tree: its upper directory takes the place of the topmost lower one.
fn merged(overlay: &OverlayMount) -> Result<Lowers, Error> {
    let merged = std::iter::once(&overlay.upper).chain(&overlay.lowers);
    let open = |path: &PathBuf| Root::open(path).map_err(|source| Error::io(path, source));
    let roots = merged.map(open).collect::<Result<Vec<_>, _>>()?;
    Ok(Lowers {
        merged: roots.len(),
        roots,
        namespace: overlay.namespace,
    })
}

/// Returns `path` with the symbolic links in it followed, within the tree.
fn real_path(tree: &Lowers, path: &Path) -> io::Result<PathBuf> {
    let mut pending = names(path);
    let mut done: Vec<(Vec<u8>, Stack)> = Vec::new();
    let mut links = 0;
    while let Some(name) = pending.pop() {
        if name == b".." {
            done.pop();
            continue;
        }
        let parent = done
            .last()
            .map_or_else(|| tree.root_stack(), |(_, stack)| stack.clone());
        match tree.lookup(&parent, &name)? {
            Found::Other { place, stat }
                if FileType::from_raw_mode(stat.st_mode) == FileType::Symlink =>
            {
                links += 1;
                if links > MAX_LINKS {
                    return Ok(path.to_path_buf());
                }
                let root = &tree.roots[usize::from(place.root)];
                let target = root.read_link(&place.path)?;
                let target = Path::new(OsStr::from_bytes(&target));
                if target.is_absolute() {
                    done.clear();
                }
                pending.extend(names(target));
            }
            Found::Dir { stack, .. } => done.push((name, stack)),
            Found::Absent | Found::Other { .. } => done.push((name, Stack::new())),
        }
    }
    let mut real = PathBuf::from("/");
    real.extend(done.iter().map(|(name, _)| OsStr::from_bytes(name)));
    Ok(real)
}

/// Returns the names of a path, the last one first.
fn names(path: &Path) -> Vec<Vec<u8>> {
    let names = path.components().rev();
    names
        .filter_map(|component| match component {
            Component::Normal(name) => Some(name.as_bytes().to_vec()),
            Component::ParentDir => Some(b"..".to_vec()),
            _ => None,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::node::overlay::xattr::Namespace;

    #[test]
    fn a_mount_is_where_the_links_of_the_tree_lead() {
        let dir = tempfile::tempdir().unwrap();
        let (upper, lower) = (dir.path().join("upper"), dir.path().join("lower"));
        fs::create_dir_all(upper.join("srv")).unwrap();
        fs::create_dir_all(lower.join("var")).unwrap();
        fs::create_dir_all(lower.join("run")).unwrap();
        symlink("/run", lower.join("var/run")).unwrap();
        symlink("../srv/./data", upper.join("work")).unwrap();
        symlink("loop", upper.join("loop")).unwrap();
        let overlay = OverlayMount {
            upper,
            lowers: vec![lower],
            data_only: vec![],
            id_mapped: vec![],
            namespace: Namespace::Trusted,
            index: false,
        };
        let mount = |destination: &str| MountPoint {
            destination: destination.into(),
            kind: "bind".to_owned(),
            source: "/x".to_owned(),
            volume: true,
        };
        for (destination, real) in [
            ("/var/run/secrets", "/run/secrets"),
            ("/work/deep", "/srv/data/deep"),
            ("/nowhere/at/all", "/nowhere/at/all"),
            ("/loop/x", "/loop/x"),
            ("/srv", "/srv"),
        ] {
            let found = resolve(&overlay, vec![mount(destination)]).unwrap();
            let there = |at: &str| found.iter().find(|m| m.destination == Path::new(at));
            assert_eq!(
                found.len(),
                1 + usize::from(real != destination),
                "{destination}"
            );
            assert!(there(real).unwrap().volume, "{destination}");
            assert_eq!(there(destination).unwrap().volume, real == destination);
        }
        assert!(resolve(&overlay, vec![mount("/")]).unwrap().is_empty());
    }
}
