//! Reads the snapshots that a container is mounted on, each with the chain ID of the image layers that it holds.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use super::protobuf::{text, uvarint};
use super::record::Record;
use crate::common::digest::{ChainId, Digest};
use crate::node::container::bolt::{self, Snapshot};
use crate::node::container::error::{Error, Problem};
use crate::node::container::roots::{ContainerdRoot, Roots};
use crate::node::container::{BaseLayer, Container, layer_check};

/// Maximum length of a snapshot chain, which is above the kernel's limit on overlay layers.
const MAX_CHAIN: usize = 512;

/// A snapshot: the number of its directory, and its key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::node::container) struct SnapshotId {
    pub(super) id: u64,
    key: String,
    /// Whether a lazy snapshotter mounts it, so that its directory is empty without that mount.
    mounted: bool,
    /// Whether it was made for a user namespace.
    remapped: bool,
}

impl SnapshotId {
    /// The part of the key that the client chose: for the layer of an image, its chain ID.
    fn name(&self) -> &str {
        self.key.splitn(3, '/').nth(2).unwrap_or(&self.key)
    }

    /// Returns whether `parents` are mounted ID-mapped below this snapshot of a container. Where that is not possible,
    /// the topmost is a copy with other owners.
    pub(super) fn id_mapped(&self, parents: &[Self]) -> bool {
        let copied = matches!(parents, [top, below, ..] if is_remapped(top.name(), below.name()));
        self.remapped && !copied
    }
}

/// Label of snapshots that are made for a user namespace, with its map.
const UID_MAPPING: &[u8] = b"containerd.io/snapshot/uidmapping";

/// Label of snapshots whose content is mounted instead of unpacked.
const REMOTE: &[u8] = b"containerd.io/snapshot/remote";

/// Returns whether the snapshotter stores each snapshot in a directory `snapshots/N/fs`.
pub(super) fn is_overlayfs(snapshotter: &str) -> bool {
    matches!(snapshotter, "" | "overlayfs")
}

pub(in crate::node::container) fn snapshots_of(
    containerd: &ContainerdRoot,
    snapshotter: &str,
) -> PathBuf {
    let snapshotter = if snapshotter.is_empty() {
        "overlayfs"
    } else {
        snapshotter
    };
    containerd.root.join(format!(
        "io.containerd.snapshotter.v1.{snapshotter}/snapshots"
    ))
}

/// Returns the snapshots of each record, the container's own first, by snapshotter and key.
pub(in crate::node::container) fn chains_of<'r>(
    roots: &Roots,
    containerd: &ContainerdRoot,
    records: impl Iterator<Item = &'r Record>,
    problems: &mut Vec<Problem>,
) -> HashMap<(String, String), Vec<SnapshotId>> {
    let mut keys: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for record in records {
        if let Some(key) = &record.snapshot {
            keys.entry(&record.snapshotter).or_default().push(key);
        }
    }
    let mut chains = HashMap::new();
    for (snapshotter, keys) in keys {
        let path = snapshots_of(containerd, snapshotter).with_file_name("metadata.db");
        // Proxy snapshotters keep their database elsewhere.
        if roots.locate(&path).is_err() {
            continue;
        }
        let path = roots.path(&path);
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

/// Returns the snapshot `key` and its ancestors, or an empty list if it does not exist.
pub(super) fn chain(db: &Snapshot<'_>, path: &Path, key: &str) -> Result<Vec<SnapshotId>, Error> {
    let Some(snapshots) = db.bucket(&[b"v1", b"snapshots"])? else {
        return Err(Error::damaged(path, "expected a bucket v1/snapshots"));
    };
    let mut chain: Vec<SnapshotId> = Vec::new();
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
        let (mounted, remapped) = match snapshot.bucket(b"labels")? {
            Some(labels) => (
                labels.get(REMOTE)?.is_some(),
                labels.get(UID_MAPPING)?.is_some(),
            ),
            None => (false, false),
        };
        chain.push(SnapshotId {
            id,
            key,
            mounted,
            remapped,
        });
        if chain.len() > MAX_CHAIN {
            return Err(Error::damaged(
                path,
                format!("a chain of more than {MAX_CHAIN} snapshots"),
            ));
        }
    }
    Ok(chain)
}

/// The mounted layers, bottom first. Their diff IDs are not set yet.
pub(super) struct MountedLayers {
    pub(super) layers: Vec<BaseLayer>,
    pub(super) proof: String,
}

/// Maps mounted lower directories to snapshots and chain IDs. The inner error describes where they differ.
pub(super) fn mounted_stack(
    roots: &Roots,
    containerd: &ContainerdRoot,
    container: &Container,
    record: &Record,
) -> Result<Result<MountedLayers, String>, Error> {
    let Some(key) = &record.snapshot else {
        return Ok(Err(format!(
            "its snapshot is not recorded (snapshotter {:?})",
            record.snapshotter
        )));
    };
    let upper = &container.overlay.upper;
    // The snapshotter's directory, or for a proxy snapshotter the one that contains the upper directory.
    let inside = roots.path(&snapshots_of(containerd, &record.snapshotter));
    let built_in = inside.with_file_name("metadata.db").exists();
    let snapshots = match upper.parent().and_then(Path::parent) {
        Some(outside) if !built_in && !upper.starts_with(&inside) => outside.to_path_buf(),
        _ => inside,
    };
    let metadata = snapshots.with_file_name("metadata.db");
    if !metadata.exists() {
        return Ok(Err(format!(
            "{} is not there: snapshotter {:?} keeps its records elsewhere",
            metadata.display(),
            record.snapshotter
        )));
    }
    let chain = bolt::read(&metadata, |db| chain(db, &metadata, key))?;
    let Some((own, parents)) = chain.split_first() else {
        return Ok(Err(format!(
            "{} has no snapshot {key:?}",
            metadata.display()
        )));
    };
    let directory = |snap: &SnapshotId| snapshots.join(snap.id.to_string()).join("fs");
    // The upper directory can be in an image, which is mounted elsewhere: EROFS with a size for the writable layer.
    let in_image = built_in && !upper.starts_with(&snapshots) && mounts_images(record);
    if directory(own) != *upper && !in_image {
        return Ok(Err(format!(
            "mounted upper {}, snapshot {key:?} is {}",
            upper.display(),
            directory(own).display()
        )));
    }
    let expected: Vec<PathBuf> = parents.iter().map(directory).collect();
    let as_directories = expected == container.overlay.lowers;
    let numbers: Vec<u64> = parents.iter().map(|snap| snap.id).collect();
    if !as_directories
        && mounts_images(record)
        && let Some(mounted) = layer_check::image_snapshots(&container.overlay.lowers)?
        && mounted != numbers
    {
        return Ok(Err(format!(
            "mounted on the images of snapshots {mounted:?}; the parents of snapshot {key:?} are {numbers:?}"
        )));
    }
    if !as_directories && !mounts_images(record) {
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
    // The mount may have been removed from the node's table since; then all tables show an empty directory.
    for lower in parents.iter().filter(|snap| snap.mounted).map(directory) {
        if as_directories && !layer_check::is_mount(&lower)? {
            return Ok(Err(format!(
                "{} is the snapshot of a layer that is mounted, and nothing is mounted there",
                lower.display()
            )));
        }
    }
    let mut layers = Vec::with_capacity(parents.len());
    for (at, snap) in parents.iter().enumerate() {
        let name = snap.name();
        let Ok(chain_id) = name.parse::<Digest>() else {
            // With ID mapping, ctr and nerdctl add a copy with other owners on top, which belongs to no image.
            let below = parents.get(at + 1).map(SnapshotId::name);
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
        "{} snapshots {} of {}",
        container.stands_on(),
        ids.join(", "),
        record.snapshotter
    );
    Ok(Ok(MountedLayers { layers, proof }))
}

/// Returns whether a snapshotter may mount images: then the lower directories are others than those of the snapshots,
/// which are the layers nevertheless.
fn mounts_images(record: &Record) -> bool {
    !matches!(record.snapshotter.as_str(), "" | "overlayfs" | "native")
}

/// Returns whether `name` is a remapped copy of `below`: `sha256:X-1000-1000` for `sha256:X`.
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
