//! containerd's containers that have ended: their bundles are gone, and the metadata has the spec, the image and the
//! snapshots.
//!
//! Of pods, the CRI plugin keeps a file `status` for each container (`internal/cri/store/container/status.go`, 1.6 to
//! 2.2). Without CRI, how a container ended is known only to its shim.

use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::super::Runtime;
use super::super::bolt;
use super::super::bundle::{Bundle, IdMaps};
use super::super::containerd::{
    METADATA, Record, TASKS, chains_of, container_ids, names, pod, record as metadata_of, root_of,
    snapshots_of,
};
use super::super::error::Error;
use super::super::roots::{ContainerdRoot, Roots, pid_file, read_json};
use super::{End, EndedRecord};

/// Directory with a directory for each container of the CRI plugin.
const CRI: &str = "io.containerd.grpc.v1.cri/containers";
/// Maximum size of a status file in bytes; it has one message, which the kubelet bounds.
const STATUS_CAP: u64 = 1 << 20;

/// The status of a pod's container.
#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "PascalCase")]
struct Status {
    /// Nanoseconds since the epoch; 0 if there is none.
    started_at: i64,
    finished_at: i64,
    exit_code: i64,
    /// `OOMKilled`, `Error`, `Completed`.
    reason: String,
    removing: bool,
}

#[derive(Debug, Deserialize)]
struct Versioned {
    #[serde(rename = "Version", default)]
    _version: String,
    #[serde(flatten)]
    status: Status,
}

/// Lists the containers of all namespaces. What cannot be read is left out.
pub(super) fn records(roots: &Roots) -> Vec<EndedRecord> {
    let mut records = Vec::new();
    let mut seen = std::collections::HashSet::new();
    for containerd in &roots.containerd {
        let Ok(meta) = roots.locate(&containerd.root.join(METADATA)) else {
            continue;
        };
        // The roots of k3s may be links to others.
        if !seen.insert(meta.clone()) {
            continue;
        }
        let found = bolt::read(&meta, |db| {
            let mut found = Vec::new();
            for (namespace, id) in container_ids(db)? {
                if let Some(record) = metadata_of(db, &meta, &namespace, &id)? {
                    found.push((namespace, id, record));
                }
            }
            Ok::<_, Error>(found)
        });
        let found = found.unwrap_or_default();
        let of = found.iter().map(|(_, _, record)| record);
        let chains = chains_of(roots, containerd, of, &mut Vec::new());
        for (namespace, id, record) in found {
            let chain = record.snapshot.as_ref().and_then(|key| {
                chains
                    .get(&(record.snapshotter.clone(), key.clone()))
                    .cloned()
            });
            let store = snapshots_of(containerd, &record.snapshotter);
            let root = root_of(&store, &record, chain.as_deref());
            let status = status(roots, containerd, &id);
            let bundle = containerd.state.join(TASKS).join(&namespace).join(&id);
            let pid = pid_file(&roots.path(&bundle.join("init.pid"))).ok();
            let record = one(namespace, id, &record, root, status.as_ref(), &meta);
            records.push(EndedRecord { pid, ..record });
        }
    }
    records
}

fn one(
    namespace: String,
    id: String,
    record: &Record,
    root: Option<super::RecordedRoot>,
    status: Option<&Status>,
    meta: &Path,
) -> EndedRecord {
    let spec = record.spec.as_deref().map(Bundle::parse);
    let (bundle, ids) = match spec {
        Some(Ok(bundle)) => {
            let ids = bundle.id_maps();
            (Some(bundle), ids)
        }
        Some(Err(error)) => (None, Err(format!("its spec cannot be read: {error}"))),
        None => (None, Err("its spec is not on record".to_owned())),
    };
    let annotation = |key: &str| bundle.as_ref().and_then(|bundle| bundle.annotation(key));
    let mapped = ids.as_ref().is_ok_and(|ids| *ids != IdMaps::default());
    EndedRecord {
        runtime: Runtime::Containerd,
        names: names(record),
        pod: pod(record),
        attempt: record
            .cri
            .as_ref()
            .map_or(0, |cri| cri.config.metadata.attempt),
        sandbox: record.sandbox,
        end: status.map(end).unwrap_or_default(),
        pid: None,
        removing: status.is_some_and(|status| status.removing),
        state: meta.to_path_buf(),
        image_name: annotation("io.kubernetes.cri.image-name")
            .map(str::to_owned)
            .or_else(|| record.image.clone())
            .filter(|name| !name.is_empty()),
        runtime_root_mode: None,
        id_mapped: match &root {
            Some(root) if mapped && root.id_mapped => root.lowers.clone().unwrap_or_default(),
            _ => Vec::<PathBuf>::new(),
        },
        root: root.ok_or_else(|| {
            format!(
                "of its snapshotter {:?}, the directories are only known while it runs",
                record.snapshotter
            )
        }),
        ids,
        mounts: bundle
            .as_ref()
            .map(Bundle::mount_points)
            .unwrap_or_default(),
        spec: bundle.as_ref().map(Bundle::spec).unwrap_or_default(),
        namespace: Some(namespace),
        id,
    }
}

fn status(roots: &Roots, containerd: &ContainerdRoot, id: &str) -> Option<Status> {
    let path = containerd.root.join(CRI).join(id).join("status");
    let path = roots.locate(&path).ok()?;
    let versioned: Versioned = read_json(&path, STATUS_CAP).ok()?;
    Some(versioned.status)
}

fn end(status: &Status) -> End {
    let nanoseconds = |at: i64| jiff::Timestamp::from_nanosecond(at.into()).ok();
    let at = nanoseconds(status.finished_at).filter(|_| status.finished_at > 0);
    End {
        exit_code: at.map(|_| status.exit_code),
        out_of_memory: status.reason == "OOMKilled",
        at,
        started: nanoseconds(status.started_at).filter(|_| status.started_at > 0),
        never_started: status.started_at == 0 && at.is_none(),
        unnoticed: None,
    }
}
