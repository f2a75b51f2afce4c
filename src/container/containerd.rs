//! containerd's state: bundles of running containers, metadata, snapshots, content.
//!
//! Format: containerd 1.6 to 2.2, `core/metadata/buckets.go` and `core/snapshots/storage/bolt.go` for the databases,
//! `plugins/content/local` for blobs, `internal/cri/annotations` for Kubernetes. Integers are Go's uvarint.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

use oci_spec::image::Descriptor;
use serde::Deserialize;

use super::bolt::{self, Bucket, Snapshot, Value};
use super::bundle::Bundle;
use super::error::{Error, Problem};
use super::image::{BLOB_CAP, Config, Document, Manifest, add_repositories, repository};
use super::roots::{ContainerdRoot, Roots, read_dir, read_file};
use super::survey::Draft;
use super::{Base, BaseLayer, Container, Pod, Runtime};
use crate::digest::{ChainId, Digest};

const TASKS: &str = "io.containerd.runtime.v2.task";
const METADATA: &str = "io.containerd.metadata.v1.bolt/meta.db";
const BLOBS: &str = "io.containerd.content.v1.content/blobs/sha256";
/// Snapshot chains are as long as the kernel's limit on layers at most.
const MAX_CHAIN: usize = 512;

/// One container record of `meta.db`.
#[derive(Clone, Debug, Default)]
struct Record {
    image: Option<String>,
    snapshotter: String,
    /// Key in the snapshotter's own database.
    snapshot: Option<String>,
    labels: BTreeMap<String, String>,
    /// What CRI keeps about a container of a pod.
    cri: Option<CriContainer>,
    /// Whether it is a pod's sandbox.
    sandbox: bool,
    /// What CRI keeps about the sandbox of its pod.
    pod: Option<CriMetadata>,
}

#[derive(Clone, Debug, Deserialize)]
struct CriContainer {
    #[serde(rename = "SandboxID")]
    sandbox_id: String,
    /// Digest of the image's config.
    #[serde(rename = "ImageRef", default)]
    image_ref: String,
    #[serde(rename = "Config")]
    config: CriConfig,
}

#[derive(Clone, Debug, Deserialize)]
struct CriSandbox {
    #[serde(rename = "Config")]
    config: CriConfig,
}

#[derive(Clone, Debug, Deserialize)]
struct CriConfig {
    metadata: CriMetadata,
}

/// `ContainerMetadata` or `PodSandboxMetadata` of the CRI, as the kubelet sent it.
#[derive(Clone, Debug, Default, Deserialize)]
struct CriMetadata {
    name: String,
    #[serde(default)]
    namespace: String,
    #[serde(default)]
    uid: String,
}

/// The extensions are versioned JSON.
#[derive(Deserialize)]
struct Versioned<T> {
    #[serde(rename = "Metadata")]
    metadata: T,
}

/// A snapshot: its directory's number and its key.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Snap {
    id: u64,
    key: String,
}

/// What a bundle directory says.
struct Task {
    namespace: String,
    id: String,
    directory: PathBuf,
    bundle: Bundle,
    pid: u32,
}

pub(super) fn drafts(roots: &Roots, problems: &mut Vec<Problem>) -> Vec<Draft> {
    let mut drafts = Vec::new();
    for containerd in &roots.containerd {
        // Two roots may be given for one state (k3s and RKE2 share it): the one that is there is meant.
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

fn draft(
    containerd: &ContainerdRoot,
    task: Task,
    record: Option<Record>,
    chains: &HashMap<(String, String), Vec<Snap>>,
) -> Draft {
    let annotation = |key: &str| task.bundle.annotation(key).map(str::to_owned);
    let record = record.unwrap_or_default();
    let pod = match (&record.cri, &record.pod) {
        (Some(cri), Some(pod)) => Some(Pod {
            namespace: pod.namespace.clone(),
            name: pod.name.clone(),
            container: cri.config.metadata.name.clone(),
            uid: Some(pod.uid.clone()).filter(|uid| !uid.is_empty()),
        }),
        // Without the records the annotations do; the UID is among them only since late 2022, and before that a pod
        // could have written one itself.
        _ => (|| {
            Some(Pod {
                namespace: annotation("io.kubernetes.cri.sandbox-namespace")?,
                name: annotation("io.kubernetes.cri.sandbox-name")?,
                container: annotation("io.kubernetes.cri.container-name").unwrap_or_default(),
                uid: None,
            })
        })(),
    };
    let sandbox = record.sandbox
        || annotation("io.kubernetes.cri.container-type").as_deref() == Some("sandbox");
    let snapshots = snapshots_of(containerd, &record.snapshotter);
    let chain = record
        .snapshot
        .and_then(|key| chains.get(&(record.snapshotter.clone(), key)));
    let directory = |snap: &Snap| snapshots.join(snap.id.to_string()).join("fs");
    Draft {
        runtime: Runtime::Containerd,
        names: record
            .labels
            .get("nerdctl/name")
            .filter(|name| !name.is_empty())
            .cloned()
            .into_iter()
            .collect(),
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
        upper: chain.and_then(|chain| chain.first()).map(directory),
        lowers: chain.map(|chain| chain.iter().skip(1).map(directory).collect()),
        bases: vec![snapshots.clone()],
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
            // Removed meanwhile: it has ended.
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

/// A file with nothing but a process number in it.
pub(super) fn pid_file(path: &Path) -> Result<u32, Error> {
    let text = read_file(path, 64)?;
    let pid = std::str::from_utf8(&text)
        .ok()
        .and_then(|text| text.trim().parse().ok());
    pid.filter(|&pid| pid > 0)
        .ok_or_else(|| Error::damaged(path, "expected a process number"))
}

fn snapshots_of(containerd: &ContainerdRoot, snapshotter: &str) -> PathBuf {
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
fn chains_of<'r>(
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
fn chain(db: &Snapshot<'_>, path: &Path, key: &str) -> Result<Vec<Snap>, Error> {
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
        chain.push(Snap { id, key });
        if chain.len() > MAX_CHAIN {
            return Err(Error::damaged(
                path,
                format!("a chain of more than {MAX_CHAIN} snapshots"),
            ));
        }
    }
    Ok(chain)
}

/// The record of one container; none if there is none.
fn record(
    db: &Snapshot<'_>,
    path: &Path,
    namespace: &str,
    id: &str,
) -> Result<Option<Record>, Error> {
    let Some(containers) = db.bucket(&[b"v1", namespace.as_bytes(), b"containers"])? else {
        return Ok(None);
    };
    let Some(container) = containers.bucket(id.as_bytes())? else {
        return Ok(None);
    };
    let string = |key: &[u8]| Ok::<_, Error>(container.get(key)?.map(|value| text(&value)));
    let snapshotter = string(b"snapshotter")?.unwrap_or_default();
    let key = string(b"snapshotKey")?.unwrap_or_default();
    let snapshot = match db.bucket(&[
        b"v1",
        namespace.as_bytes(),
        b"snapshots",
        snapshotter.as_bytes(),
        key.as_bytes(),
    ])? {
        Some(snapshot) => snapshot.get(b"name")?.map(|name| text(&name)),
        None => None,
    };
    let cri: Option<CriContainer> =
        extension(&container, path, "io.cri-containerd.container.metadata")?;
    let pod = match &cri {
        Some(cri) => match containers.bucket(cri.sandbox_id.as_bytes())? {
            Some(sandbox) => {
                extension::<CriSandbox>(&sandbox, path, "io.cri-containerd.sandbox.metadata")?
            }
            None => None,
        },
        None => None,
    };
    let sandbox = match container.bucket(b"extensions")? {
        Some(extensions) => extensions
            .get(b"io.cri-containerd.sandbox.metadata")?
            .is_some(),
        None => false,
    };
    Ok(Some(Record {
        image: string(b"image")?,
        snapshotter,
        snapshot,
        labels: labels(&container)?,
        cri,
        sandbox,
        pod: pod.map(|pod| pod.config.metadata),
    }))
}

fn labels(of: &Bucket<'_>) -> Result<BTreeMap<String, String>, Error> {
    let Some(labels) = of.bucket(b"labels")? else {
        return Ok(BTreeMap::new());
    };
    let entries = labels.entries()?.into_iter();
    Ok(entries
        .filter_map(|(key, value)| match value {
            Value::Bytes(value) => Some((text(&key), text(&value))),
            Value::Bucket(_) => None,
        })
        .collect())
}

/// A CRI extension: JSON in a protobuf `Any`.
fn extension<T: serde::de::DeserializeOwned>(
    container: &Bucket<'_>,
    path: &Path,
    name: &str,
) -> Result<Option<T>, Error> {
    let Some(extensions) = container.bucket(b"extensions")? else {
        return Ok(None);
    };
    let Some(any) = extensions.get(name.as_bytes())? else {
        return Ok(None);
    };
    let value = any_value(&any)
        .ok_or_else(|| Error::damaged(path, format!("{name} is no protobuf Any")))?;
    let versioned: Versioned<T> =
        serde_json::from_slice(value).map_err(|e| Error::damaged(path, format!("{name}: {e}")))?;
    Ok(Some(versioned.metadata))
}

/// Field 2 (`value`) of a `google.protobuf.Any`.
fn any_value(mut any: &[u8]) -> Option<&[u8]> {
    let mut found = None;
    while !any.is_empty() {
        let (tag, rest) = split_uvarint(any)?;
        // Both fields of the message are length-delimited.
        if tag & 7 != 2 {
            return None;
        }
        let (len, rest) = split_uvarint(rest)?;
        let (value, rest) = rest.split_at_checked(usize::try_from(len).ok()?)?;
        if tag >> 3 == 2 {
            found = Some(value);
        }
        any = rest;
    }
    found
}

fn uvarint(bytes: &[u8]) -> Option<u64> {
    split_uvarint(bytes).map(|(value, _)| value)
}

fn split_uvarint(bytes: &[u8]) -> Option<(u64, &[u8])> {
    let mut value = 0;
    for (at, &byte) in bytes.iter().enumerate().take(10) {
        let bits = u64::from(byte & 0x7f);
        let shift = 7 * at as u32;
        if bits.leading_zeros() < shift {
            return None;
        }
        value |= bits << shift;
        if byte & 0x80 == 0 {
            return Some((value, &bytes[at + 1..]));
        }
    }
    None
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// An image record: a name and what it points at.
#[derive(Clone, Debug)]
struct ImageRecord {
    name: String,
    target: Digest,
    media_type: Option<String>,
}

fn images(db: &Snapshot<'_>, namespace: &str) -> Result<Vec<ImageRecord>, Error> {
    let Some(images) = db.bucket(&[b"v1", namespace.as_bytes(), b"images"])? else {
        return Ok(Vec::new());
    };
    let mut records = Vec::new();
    for (name, value) in images.entries()? {
        let Value::Bucket(image) = value else {
            continue;
        };
        let Some(target) = image.bucket(b"target")? else {
            continue;
        };
        let digest = target
            .get(b"digest")?
            .and_then(|digest| text(&digest).parse().ok());
        let Some(digest) = digest else { continue };
        let media_type = target
            .get(b"mediatype")?
            .map(|media_type| text(&media_type));
        records.push(ImageRecord {
            name: text(&name),
            target: digest,
            media_type,
        });
    }
    Ok(records)
}

/// The content store's blobs.
struct Content(PathBuf);

impl Content {
    fn path(&self, digest: &Digest) -> PathBuf {
        self.0.join(digest.hex())
    }

    /// A small blob, its digest checked; none if it is not there, or too long for JSON.
    fn blob(&self, digest: &Digest) -> Result<Option<Vec<u8>>, Error> {
        let path = self.path(digest);
        match fs::metadata(&path) {
            Ok(metadata) if metadata.len() > BLOB_CAP => return Ok(None),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Ok(_) => {}
            Err(e) => return Err(Error::io(path, e)),
        }
        let bytes = match read_file(&path, BLOB_CAP) {
            Err(e) if e.is_not_found() => return Ok(None),
            other => other?,
        };
        let found = Digest::of(&bytes);
        if found != *digest {
            return Err(Error::damaged(
                path,
                format!("its contents have the digest {found}"),
            ));
        }
        Ok(Some(bytes))
    }

    /// The manifests behind `digest`: itself, or those that an index names and that are here.
    fn manifests(&self, digest: &Digest, media_type: Option<&str>) -> Result<Vec<Manifest>, Error> {
        let mut manifests = Vec::new();
        let mut seen = BTreeSet::from([*digest]);
        let mut pending = vec![(*digest, media_type)];
        while let Some((digest, media_type)) = pending.pop() {
            let Some(bytes) = self.blob(&digest)? else {
                continue;
            };
            match Document::parse(bytes, media_type) {
                Document::Manifest(manifest) => manifests.push(manifest),
                Document::Index(digests) => {
                    pending.extend(
                        digests
                            .into_iter()
                            .rev()
                            .filter(|d| seen.insert(*d))
                            .map(|d| (d, None)),
                    );
                }
                Document::Other => {}
            }
        }
        Ok(manifests)
    }

    /// Every manifest in the store, in the order of digests.
    fn all_manifests(&self) -> Result<Vec<Manifest>, Error> {
        let mut manifests = Vec::new();
        for name in read_dir(&self.0)? {
            let Some(digest) = name.to_str().and_then(|hex| Digest::from_hex(hex).ok()) else {
                continue;
            };
            // Layers are no JSON; the first byte tells without reading them.
            if !starts_with_brace(&self.path(&digest)) {
                continue;
            }
            let Ok(Some(bytes)) = self.blob(&digest) else {
                continue;
            };
            if let Document::Manifest(manifest) = Document::parse(bytes, None) {
                manifests.push(manifest);
            }
        }
        Ok(manifests)
    }

    /// The config of a manifest if both say the same number of layers; the words say why not.
    fn config(&self, manifest: &Manifest) -> Result<Config, String> {
        let bytes = self.blob(&manifest.config).map_err(|e| e.to_string())?;
        let bytes =
            bytes.ok_or_else(|| format!("config {} is not on this node", manifest.config))?;
        let config = Config::parse(bytes)?;
        if config.diff_ids.len() == manifest.layers.len() {
            return Ok(config);
        }
        Err(format!(
            "its config has {} layers, it has {}",
            config.diff_ids.len(),
            manifest.layers.len()
        ))
    }
}

fn starts_with_brace(path: &Path) -> bool {
    use std::os::unix::fs::FileExt;
    let mut first = [0];
    fs::File::open(path).is_ok_and(|file| file.read_exact_at(&mut first, 0).is_ok())
        && first == *b"{"
}

/// A manifest that gives the mounted chain.
struct Fit {
    manifest: Option<Manifest>,
    config: Config,
    /// The image record that names it.
    name: Option<String>,
}

pub(super) fn prove(roots: &Roots, container: &Container) -> Result<Base, Error> {
    let namespace = container.namespace.as_deref().unwrap_or("moby");
    let mut compared = Vec::new();
    for containerd in &roots.containerd {
        let Ok(meta) = roots.locate(&containerd.root.join(METADATA)) else {
            continue;
        };
        let found = bolt::read(&meta, |db| {
            let Some(record) = record(db, &meta, namespace, &container.id)? else {
                return Ok(None);
            };
            Ok::<_, Error>(Some((record, images(db, namespace)?)))
        })?;
        let Some((record, images)) = found else {
            compared.push(format!(
                "{} has no container {namespace}/{}",
                meta.display(),
                container.id
            ));
            continue;
        };
        return prove_record(
            roots, containerd, &meta, container, namespace, &record, images,
        );
    }
    if compared.is_empty() {
        compared.push("no metadata of containerd was found below the given roots".to_owned());
    }
    Err(Error::BaseUnproven {
        container: container.id.clone(),
        compared,
    })
}

fn prove_record(
    roots: &Roots,
    containerd: &ContainerdRoot,
    meta: &Path,
    container: &Container,
    namespace: &str,
    record: &Record,
    images: Vec<ImageRecord>,
) -> Result<Base, Error> {
    let unproven = |compared| Error::BaseUnproven {
        container: container.id.clone(),
        compared,
    };
    let stack = mounted_stack(roots, containerd, container, record)?
        .map_err(|reason| unproven(vec![reason]))?;
    let mounted: Vec<ChainId> = stack.layers.iter().map(|layer| layer.chain_id).collect();
    let Some(top) = mounted.last() else {
        return Err(unproven(vec![
            "its snapshot has no parent: it was not started from an image".to_owned(),
        ]));
    };

    let image_ref: Option<Digest> = record
        .cri
        .as_ref()
        .and_then(|cri| cri.image_ref.parse().ok());
    let content = Content(roots.path(&containerd.root.join(BLOBS)));
    let mut compared = vec![format!("mounted: {} layers, chain {top}", mounted.len())];
    let mut fits: Vec<Fit> = Vec::new();
    let mut named: Vec<ImageRecord> = images;
    // What the container was started as, then names that people gave, then bare digests.
    let rank = |image: &ImageRecord| {
        (
            Some(&image.name) != record.image.as_ref(),
            Some(&image.name) != container.image_name.as_ref(),
            repository(&image.name).is_none(),
        )
    };
    named.sort_by(|a, b| rank(a).cmp(&rank(b)).then_with(|| a.name.cmp(&b.name)));
    for image in &named {
        let recorded = record.image.as_ref() == Some(&image.name);
        let manifests = match content.manifests(&image.target, image.media_type.as_deref()) {
            Ok(manifests) => manifests,
            // Another image's damage is no reason not to save this container.
            Err(error) => {
                compared.push(format!("{}: {error}", image.name));
                continue;
            }
        };
        for manifest in manifests {
            let verdict = match content.config(&manifest) {
                Ok(config) if config.chain == mounted => {
                    fits.push(Fit {
                        manifest: Some(manifest),
                        config,
                        name: Some(image.name.clone()),
                    });
                    continue;
                }
                Ok(config) => match config.chain.last() {
                    Some(top) => format!("{} layers, chain {top}", config.chain.len()),
                    None => "no layers".to_owned(),
                },
                Err(reason) => reason,
            };
            // The others are too many to be of help.
            if recorded {
                compared.push(format!(
                    "{} -> manifest {}: {verdict}",
                    image.name, manifest.raw.digest
                ));
            }
        }
    }
    let is_wanted = |fit: &Fit| image_ref.is_none_or(|wanted| fit.config.digest == wanted);
    if !fits.iter().any(is_wanted) {
        let mut scanned = 0;
        for manifest in content.all_manifests()? {
            scanned += 1;
            if let Ok(config) = content.config(&manifest)
                && config.chain == mounted
                && !fits.iter().any(|fit| {
                    fit.manifest
                        .as_ref()
                        .is_some_and(|m| m.raw.digest == manifest.raw.digest)
                })
            {
                fits.push(Fit {
                    manifest: Some(manifest),
                    config,
                    name: None,
                });
            }
        }
        compared.push(format!(
            "and the {scanned} manifests in {}",
            content.0.display()
        ));
    }
    if let Some(wanted) = image_ref
        && !fits.iter().any(is_wanted)
    {
        let config = match content.blob(&wanted) {
            Ok(Some(bytes)) => Config::parse(bytes),
            Ok(None) => Err("not on this node".to_owned()),
            Err(error) => Err(error.to_string()),
        };
        match config {
            Ok(config) if config.chain == mounted => fits.push(Fit {
                manifest: None,
                config,
                name: None,
            }),
            Ok(config) => compared.push(format!(
                "recorded config {wanted}: {} layers",
                config.chain.len()
            )),
            Err(reason) => compared.push(format!("recorded config {wanted}: {reason}")),
        }
    }
    if fits.iter().any(is_wanted) {
        fits.retain(is_wanted);
    } else if fits
        .iter()
        .any(|fit| fit.name.is_some() && fit.name == record.image)
    {
        fits.retain(|fit| fit.name == record.image);
    }
    let configs: BTreeSet<Digest> = fits.iter().map(|fit| fit.config.digest).collect();
    if configs.len() > 1 {
        compared.extend(
            configs
                .iter()
                .map(|config| format!("config {config}: the same layers, another configuration")),
        );
        return Err(unproven(compared));
    }
    let Some(fit) = fits.into_iter().next() else {
        return Err(unproven(compared));
    };

    let name = fit
        .name
        .filter(|name| repository(name).is_some() || container.image_name.is_none());
    let name = name
        .or_else(|| container.image_name.clone())
        .or_else(|| record.image.clone());
    let descriptors = fit
        .manifest
        .as_ref()
        .map(|manifest| manifest.layers.clone())
        .unwrap_or_default();
    let hosts: BTreeSet<String> = named
        .iter()
        .filter_map(|image| {
            repository(&image.name)?
                .split_once('/')
                .map(|(host, _)| host.to_owned())
        })
        .collect();
    let sources = bolt::read(meta, |db| {
        descriptors
            .iter()
            .map(|layer| sources(db, namespace, layer, &hosts))
            .collect::<Result<Vec<_>, Error>>()
    })?;
    let mut layers = stack.layers;
    for (layer, diff_id) in layers.iter_mut().zip(&fit.config.diff_ids) {
        layer.diff_id = *diff_id;
    }
    for ((layer, descriptor), sources) in layers.iter_mut().zip(descriptors).zip(sources) {
        layer.local_blob = descriptor
            .digest()
            .to_string()
            .parse()
            .ok()
            .map(|digest| content.path(&digest))
            .filter(|path| {
                fs::metadata(path)
                    .is_ok_and(|blob| blob.is_file() && blob.len() == descriptor.size())
            });
        add_repositories(
            &mut layer.repositories,
            name.as_deref().and_then(repository),
        );
        add_repositories(&mut layer.repositories, sources);
        layer.descriptor = Some(descriptor);
        layer.size_known = true;
    }
    let proof = format!(
        "{}; the {} layers of config {}{} give exactly this chain{}",
        stack.proof,
        layers.len(),
        fit.config.digest,
        if image_ref == Some(fit.config.digest) {
            ", which CRI recorded for this container,"
        } else {
            ""
        },
        match &fit.manifest {
            Some(manifest) => format!(", manifest {}", manifest.raw.digest),
            None => format!(
                ", whose manifest is not on this node ({})",
                compared.join("; ")
            ),
        }
    );
    Ok(Base {
        name,
        manifest: fit.manifest.map(|manifest| manifest.raw),
        config: fit.config.bytes,
        layers,
        proof,
    })
}

/// The mounted layers, bottom first; diff IDs are still to be filled in.
struct Stack {
    layers: Vec<BaseLayer>,
    proof: String,
}

/// Mounted lowers -> snapshots -> chain IDs; the inner error says where they part.
fn mounted_stack(
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
            diff_id: crate::digest::DiffId(chain_id),
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

/// The repositories that the content store says a blob came from. The labels name hosts without their ports; where
/// images of this namespace name the same host with one, that is meant.
fn sources(
    db: &Snapshot<'_>,
    namespace: &str,
    layer: &Descriptor,
    hosts: &BTreeSet<String>,
) -> Result<Vec<String>, Error> {
    let digest = layer.digest().to_string();
    let Some(blob) = db.bucket(&[
        b"v1",
        namespace.as_bytes(),
        b"content",
        b"blob",
        digest.as_bytes(),
    ])?
    else {
        return Ok(Vec::new());
    };
    let mut repositories = Vec::new();
    for (key, value) in labels(&blob)? {
        let Some(host) = key.strip_prefix("containerd.io/distribution.source.") else {
            continue;
        };
        let mut meant: Vec<&str> = hosts
            .iter()
            .map(String::as_str)
            .filter(|h| without_port(h) == host)
            .collect();
        if meant.is_empty() {
            meant.push(host);
        }
        for path in value.split(',').filter(|path| !path.is_empty()) {
            repositories.extend(meant.iter().map(|host| format!("{host}/{path}")));
        }
    }
    Ok(repositories)
}

/// `[::1]:5000` -> `[::1]`.
fn without_port(host: &str) -> &str {
    match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) => name,
        _ => host,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uvarints_are_bounded() {
        let cases: &[(&[u8], Option<u64>)] = &[
            (&[5], Some(5)),
            (&[0x80, 1], Some(128)),
            (
                &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1],
                Some(u64::MAX),
            ),
            (
                &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2],
                None,
            ),
            (&[0x80; 11], None),
            (&[0x80], None),
            (&[], None),
        ];
        for (bytes, expected) in cases {
            assert_eq!(uvarint(bytes), *expected, "{bytes:?}");
        }
    }

    #[test]
    fn an_any_gives_its_value_and_garbage_gives_none() {
        assert_eq!(any_value(b"\x0a\x01u\x12\x02{}"), Some(b"{}".as_slice()));
        assert_eq!(any_value(b"\x12\x00"), Some(b"".as_slice()));
        for bad in [
            b"".as_slice(),
            b"\x0a\x01u",
            b"\x12\x05{}",
            b"\x12\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
            b"\x08\x01",
        ] {
            assert_eq!(any_value(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn a_port_is_told_from_an_address() {
        for (host, expected) in [
            ("a:5000", "a"),
            ("a", "a"),
            ("[::1]:5000", "[::1]"),
            ("[::1]", "[::1]"),
        ] {
            assert_eq!(without_port(host), expected);
        }
    }

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
