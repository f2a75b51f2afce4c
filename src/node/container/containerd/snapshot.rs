//! The snapshots that a container is mounted on, each with the chain ID of the image's layers that it holds.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use super::record::Record;
use super::wire::{text, uvarint};
use crate::common::digest::{ChainId, Digest};
use crate::node::container::bolt::{self, Snapshot};
use crate::node::container::error::{Error, Problem};
use crate::node::container::roots::{ContainerdRoot, Roots};
use crate::node::container::{BaseLayer, Container, placed};

/// Snapshot chains are as long as the kernel's limit on layers at most.
const MAX_CHAIN: usize = 512;

/// A snapshot: its directory's number and its key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Snap {
    pub(super) id: u64,
    key: String,
    /// A lazy snapshotter mounts it: its directory by itself is empty.
    mounted: bool,
}

/// The label of snapshots whose content is not unpacked, but mounted.
const REMOTE: &[u8] = b"containerd.io/snapshot/remote";

/// Whether each of its snapshots is a directory `snapshots/N/fs`.
pub(super) fn is_overlayfs(snapshotter: &str) -> bool {
    matches!(snapshotter, "" | "overlayfs")
}

pub(super) fn snapshots_of(containerd: &ContainerdRoot, snapshotter: &str) -> PathBuf {
    let snapshotter = if snapshotter.is_empty() {
        "overlayfs"
    } else {
        snapshotter
    };
    containerd.root.join(format!(
        "io.containerd.snapshotter.v1.{snapshotter}/snapshots"
    ))
}

/// The snapshots of each record, the container's own first, by snapshotter and key.
pub(super) fn chains_of<'r>(
    roots: &Roots,
    containerd: &ContainerdRoot,
    records: impl Iterator<Item = &'r Record>,
    problems: &mut Vec<Problem>,
) -> HashMap<(String, String), Vec<Snap>> {
    let mut keys: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for record in records {
        if let Some(key) = &record.snapshot {
            keys.entry(&record.snapshotter).or_default().push(key);
        }
    }
    let mut chains = HashMap::new();
    for (snapshotter, keys) in keys {
        let path = snapshots_of(containerd, snapshotter).with_file_name("metadata.db");
        // Snapshotters that are programs of their own keep their database elsewhere.
        let Ok(path) = roots.locate(&path) else {
            continue;
        };
        let found = bolt::read(&path, |db| {
            keys.iter()
                .map(|key| chain(db, &path, key))
                .collect::<Result<Vec<_>, Error>>()
        });
        match found {
            Ok(found) => {
                for (key, chain) in keys.iter().zip(found) {
                    chains.insert((snapshotter.to_owned(), (*key).to_owned()), chain);
                }
            }
            Err(error) => problems.push(error.into_problem(&path)),
        }
    }
    chains
}

/// The snapshot `key` and its ancestors; empty if there is none.
pub(super) fn chain(db: &Snapshot<'_>, path: &Path, key: &str) -> Result<Vec<Snap>, Error> {
    let Some(snapshots) = db.bucket(&[b"v1", b"snapshots"])? else {
        return Err(Error::damaged(path, "expected a bucket v1/snapshots"));
    };
    let mut chain: Vec<Snap> = Vec::new();
    let mut next = Some(key.to_owned());
    while let Some(key) = next {
        let Some(snapshot) = snapshots.bucket(key.as_bytes())? else {
            if chain.is_empty() {
                return Ok(chain);
            }
            return Err(Error::damaged(
                path,
                format!("snapshot {key:?} is a parent and does not exist"),
            ));
        };
        let id = snapshot.get(b"id")?.and_then(|id| uvarint(&id));
        let id = id.ok_or_else(|| Error::damaged(path, format!("snapshot {key:?} has no id")))?;
        next = snapshot
            .get(b"parent")?
            .map(|parent| text(&parent))
            .filter(|parent| !parent.is_empty());
        let mounted = match snapshot.bucket(b"labels")? {
            Some(labels) => labels.get(REMOTE)?.is_some(),
            None => false,
        };
        chain.push(Snap { id, key, mounted });
        if chain.len() > MAX_CHAIN {
            return Err(Error::damaged(
                path,
                format!("a chain of more than {MAX_CHAIN} snapshots"),
            ));
        }
    }
    Ok(chain)
}

/// The mounted layers, bottom first; diff IDs are still to be filled in.
pub(super) struct Stack {
    pub(super) layers: Vec<BaseLayer>,
    pub(super) proof: String,
}

/// Mounted lowers -> snapshots -> chain IDs; the inner error says where they part.
pub(super) fn mounted_stack(
    roots: &Roots,
    containerd: &ContainerdRoot,
    container: &Container,
    record: &Record,
) -> Result<Result<Stack, String>, Error> {
    let Some(key) = &record.snapshot else {
        return Ok(Err(format!(
            "its snapshot is not recorded (snapshotter {:?})",
            record.snapshotter
        )));
    };
    let upper = &container.overlay.upper;
    // The snapshotter's directory, or, for those that are programs of their own, the one that the upper lies in.
    let inside = roots.path(&snapshots_of(containerd, &record.snapshotter));
    let snapshots = match upper.parent().and_then(Path::parent) {
        Some(outside) if !upper.starts_with(&inside) => outside.to_path_buf(),
        _ => inside,
    };
    let metadata = snapshots.with_file_name("metadata.db");
    let chain = bolt::read(&metadata, |db| chain(db, &metadata, key))?;
    let Some((own, parents)) = chain.split_first() else {
        return Ok(Err(format!(
            "{} has no snapshot {key:?}",
            metadata.display()
        )));
    };
    let directory = |snap: &Snap| snapshots.join(snap.id.to_string()).join("fs");
    if directory(own) != *upper {
        return Ok(Err(format!(
            "mounted upper {}, snapshot {key:?} is {}",
            upper.display(),
            directory(own).display()
        )));
    }
    let expected: Vec<PathBuf> = parents.iter().map(directory).collect();
    let as_directories = expected == container.overlay.lowers;
    // Snapshotters that mount images have lowers of their own kind; their snapshots still are the layers.
    let may_be_images = !matches!(record.snapshotter.as_str(), "" | "overlayfs" | "native");
    if !as_directories && !may_be_images {
        let show = |paths: &[PathBuf]| {
            paths
                .iter()
                .map(|p| p.display().to_string())
                .collect::<Vec<_>>()
                .join(", ")
        };
        return Ok(Err(format!(
            "mounted lowers {}; the parents of snapshot {key:?} are {}",
            show(&container.overlay.lowers),
            show(&expected)
        )));
    }
    // The node's own table may have lost the mount since: then all tables agree on an empty directory.
    for lower in parents.iter().filter(|snap| snap.mounted).map(directory) {
        if as_directories && !placed::is_mount(&lower)? {
            return Ok(Err(format!(
                "{} is the snapshot of a layer that is mounted, and nothing is mounted there",
                lower.display()
            )));
        }
    }
    let mut layers = Vec::with_capacity(parents.len());
    for (at, snap) in parents.iter().enumerate() {
        let name = snap.key.splitn(3, '/').nth(2).unwrap_or(&snap.key);
        let Ok(chain_id) = name.parse::<Digest>() else {
            // ctr and nerdctl put a copy with other owners on top where ids are mapped: it belongs to no image.
            let below = parents
                .get(at + 1)
                .and_then(|below| below.key.splitn(3, '/').nth(2));
            if at == 0 && below.is_some_and(|below| is_remapped(name, below)) {
                continue;
            }
            return Ok(Err(format!(
                "snapshot {:?} under it is not a layer of an image",
                snap.key
            )));
        };
        layers.push(BaseLayer {
            diff_id: crate::common::digest::DiffId(chain_id),
            chain_id: ChainId(chain_id),
            lower: as_directories.then(|| expected[at].clone()),
            descriptor: None,
            size_known: false,
            local_blob: None,
            repositories: Vec::new(),
        });
    }
    layers.reverse();
    let ids: Vec<String> = parents.iter().map(|snap| snap.id.to_string()).collect();
    let proof = format!(
        "mounted on snapshots {} of {}",
        ids.join(", "),
        record.snapshotter
    );
    Ok(Ok(Stack { layers, proof }))
}

/// `sha256:X-1000-1000` above `sha256:X`.
fn is_remapped(name: &str, below: &str) -> bool {
    let ids = name
        .strip_prefix(below)
        .and_then(|rest| rest.strip_prefix('-'))
        .and_then(|ids| ids.split_once('-'));
    ids.is_some_and(|(uid, gid)| uid.parse::<u32>().is_ok() && gid.parse::<u32>().is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_remapped_copy_is_told_from_a_layer() {
        assert!(is_remapped("sha256:ab-1000-1000", "sha256:ab"));
        for (name, below) in [
            ("sha256:ab", "sha256:ab"),
            ("sha256:ac-1-1", "sha256:ab"),
            ("sha256:ab-x-1", "sha256:ab"),
        ] {
            assert!(!is_remapped(name, below), "{name}");
        }
    }
}
