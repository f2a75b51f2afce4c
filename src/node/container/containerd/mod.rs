//! containerd's state: bundles of running containers, metadata, snapshots and content.
//!
//! This module finds running tasks and drafts their containers. `record` reads the metadata, `cri` the data of
//! Kubernetes, `snapshot` the snapshots, and `content` the blobs of images; `prove` combines them, and `protobuf` decodes
//! integers and messages.
//!
//! Format: containerd 1.6 to 2.2, `core/metadata/buckets.go` and `core/snapshots/storage/bolt.go` for the databases,
//! `plugins/content/local` for blobs, `internal/cri/annotations` for Kubernetes. Integers are Go's uvarint.

mod content;
mod cri;
mod protobuf;
mod prove;
mod record;
mod snapshot;

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

pub(super) use prove::prove;

pub(super) use record::{Record, container_ids, record};
use snapshot::is_overlayfs;
pub(super) use snapshot::{SnapshotId, chains_of, snapshots_of};

use super::bolt;
use super::bundle::{Bundle, bounded};
use super::error::{Error, Problem};
use super::recorded::{RecordedContainer, RecordedRoot};
use super::roots::{ContainerdRoot, Roots, pid_file, read_dir};
use super::{Pod, Runtime};

pub(super) const TASKS: &str = "io.containerd.runtime.v2.task";
pub(super) const METADATA: &str = "io.containerd.metadata.v1.bolt/meta.db";

/// A task according to its bundle directory.
struct Task {
    namespace: String,
    id: String,
    directory: PathBuf,
    bundle: Bundle,
    pid: u32,
}

pub(super) fn recorded_containers(
    roots: &Roots,
    problems: &mut Vec<Problem>,
) -> Vec<RecordedContainer> {
    let mut drafts = Vec::new();
    for containerd in &roots.containerd {
        // Two roots may be configured for one state directory (k3s and RKE2 share it); the existing one is used.
        let meta_is_there = |c: &ContainerdRoot| roots.locate(&c.root.join(METADATA)).is_ok();
        let other_is_meant = || {
            roots
                .containerd
                .iter()
                .any(|c| c.state == containerd.state && c != containerd && meta_is_there(c))
        };
        if !meta_is_there(containerd) && other_is_meant() {
            continue;
        }
        let tasks = tasks(roots, containerd, problems);
        if tasks.is_empty() {
            continue;
        }
        let meta = roots.path(&containerd.root.join(METADATA));
        let records = bolt::read(&meta, |db| {
            tasks
                .iter()
                .map(|task| record(db, &meta, &task.namespace, &task.id))
                .collect::<Result<Vec<_>, Error>>()
        });
        let records = records.unwrap_or_else(|error| {
            problems.push(error.into_problem(&meta));
            vec![None; tasks.len()]
        });
        let chains = chains_of(roots, containerd, records.iter().flatten(), problems);
        for (task, record) in tasks.into_iter().zip(records) {
            drafts.push(draft(containerd, task, record, &chains));
        }
    }
    drafts
}

/// Returns the name that nerdctl gave the container.
pub(super) fn names(record: &Record) -> Vec<String> {
    let name = record.labels.get("nerdctl/name");
    name.filter(|name| !name.is_empty())
        .cloned()
        .into_iter()
        .collect()
}

/// Returns the pod according to the records of the CRI plugin.
pub(super) fn pod(record: &Record) -> Option<Pod> {
    let (cri, pod) = (record.cri.as_ref()?, record.pod.as_ref()?);
    let sandbox = &pod.metadata;
    Some(Pod {
        namespace: sandbox.namespace.clone(),
        name: sandbox.name.clone(),
        container: cri.config.metadata.name.clone(),
        uid: Some(sandbox.uid.clone()).filter(|uid| !uid.is_empty()),
        labels: bounded(pod.labels.clone()).unwrap_or_default(),
        annotations: bounded(pod.annotations.clone()).unwrap_or_default(),
    })
}

/// Returns the directories of a container's snapshots, which are in `store`. Other snapshotters have other directory
/// layouts.
pub(super) fn root_of(
    store: &Path,
    record: &Record,
    chain: Option<&[SnapshotId]>,
) -> Option<RecordedRoot> {
    let directory = |snap: &SnapshotId| Path::new(&snap.id.to_string()).join("fs");
    let chain = chain.filter(|_| is_overlayfs(&record.snapshotter));
    let (own, parents) = chain?.split_first()?;
    Some(RecordedRoot {
        store: store.to_path_buf(),
        upper: directory(own),
        lowers: Some(parents.iter().map(directory).collect()),
        id_mapped: own.id_mapped(parents),
    })
}

fn draft(
    containerd: &ContainerdRoot,
    task: Task,
    record: Option<Record>,
    chains: &HashMap<(String, String), Vec<SnapshotId>>,
) -> RecordedContainer {
    let annotation = |key: &str| task.bundle.annotation(key).map(str::to_owned);
    let record = record.unwrap_or_default();
    // Without the records, the annotations are used. They include the UID only since late 2022; in earlier versions a
    // pod could set that annotation itself.
    let pod = pod(&record).or_else(|| {
        Some(Pod {
            namespace: annotation("io.kubernetes.cri.sandbox-namespace")?,
            name: annotation("io.kubernetes.cri.sandbox-name")?,
            container: annotation("io.kubernetes.cri.container-name").unwrap_or_default(),
            uid: None,
            labels: BTreeMap::new(),
            annotations: BTreeMap::new(),
        })
    });
    let sandbox = record.sandbox
        || annotation("io.kubernetes.cri.container-type").as_deref() == Some("sandbox");
    let snapshots = snapshots_of(containerd, &record.snapshotter);
    let chain = record
        .snapshot
        .as_ref()
        .and_then(|key| chains.get(&(record.snapshotter.clone(), key.clone())));
    let record_of_root = root_of(&snapshots, &record, chain.map(Vec::as_slice));
    RecordedContainer {
        runtime: Runtime::Containerd,
        names: names(&record),
        namespace: Some(task.namespace),
        pod,
        image_name: annotation("io.kubernetes.cri.image-name")
            .or(record.image)
            .filter(|name| !name.is_empty()),
        runtime_root_mode: None,
        sandbox,
        pid: task.pid,
        mounted_at: task.bundle.root_path(&task.directory),
        state: task.directory,
        store_ids: None,
        record: record_of_root,
        bases: vec![snapshots],
        bundle: Some(task.bundle),
        id: task.id,
    }
}

fn tasks(roots: &Roots, containerd: &ContainerdRoot, problems: &mut Vec<Problem>) -> Vec<Task> {
    let mut tasks = Vec::new();
    let state = containerd.state.join(TASKS);
    let mut children = |directory: &Path| {
        let directory = roots.path(directory);
        read_dir(&directory).unwrap_or_else(|error| {
            problems.push(error.into_problem(&directory));
            Vec::new()
        })
    };
    let namespaces = children(&state);
    let mut found = Vec::new();
    for namespace in namespaces {
        for id in children(&state.join(&namespace)) {
            found.push((namespace.clone(), id));
        }
    }
    for (namespace, id) in found {
        let directory = state.join(&namespace).join(&id);
        match task(
            roots,
            &directory,
            &namespace.to_string_lossy(),
            &id.to_string_lossy(),
        ) {
            Ok(task) => tasks.push(task),
            // Removed meanwhile, so the container has ended.
            Err(_) if roots.locate(&directory).is_err() => {}
            Err(error) => problems.push(error.into_problem(&directory)),
        }
    }
    tasks
}

fn task(roots: &Roots, directory: &Path, namespace: &str, id: &str) -> Result<Task, Error> {
    let bundle = Bundle::read(&roots.path(&directory.join("config.json")))?;
    let pid = pid_file(&roots.path(&directory.join("init.pid")))?;
    Ok(Task {
        namespace: namespace.to_owned(),
        id: id.to_owned(),
        directory: directory.to_path_buf(),
        bundle,
        pid,
    })
}
