//! State of containers/storage, which Podman and CRI-O use for containers, layers and images.
//!
//! Format: containers/storage `containers.go`, `layers.go`, `images.go` (JSON lists, big data in files whose names are
//! `=` and base64 of the key), `drivers/overlay`; CRI-O `internal/storage/runtime.go` (the metadata of a container).
//! Observed with Podman 4.3.1 and CRI-O 1.36.3.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

use base64::Engine as _;
use serde::Deserialize;

use super::bundle::Bundle;
use super::crio_pod;
use super::error::{Error, Problem};
use super::image::{BLOB_CAP, Config, Document, Manifest, add_repositories, repository};
use super::recorded::{RecordedContainer, RecordedRoot};
use super::roots::{Roots, StorageRoot, pid_file, read_file, read_json};
use super::{Base, BaseLayer, Container, Pod, Runtime};
use crate::common::digest::{ChainId, DiffId, Digest};

/// Maximum size of a list in bytes, sufficient for a node with thousands of layers and their IDs.
const LIST_CAP: u64 = 256 << 20;
const MAX_CHAIN: usize = 512;
/// Default mode that the overlay driver sets on the root of a container's layer.
pub(super) const ROOT_MODE: u32 = 0o555;

/// An entry of `containers.json`.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct StoredContainer {
    pub(super) id: String,
    #[serde(default)]
    pub(super) names: Option<Vec<String>>,
    #[serde(default)]
    image: String,
    #[serde(default)]
    pub(super) layer: String,
    /// JSON text of the program that created it.
    #[serde(default)]
    metadata: String,
}

/// `metadata` of a container, in the format of both Podman and CRI-O. CRI-O takes it from the kubelet's request, while
/// annotations in `config.json` can come from the pod.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Metadata {
    #[serde(rename = "image-name")]
    pub(super) image_name: String,
    #[serde(rename = "pod-id")]
    pod_id: String,
    #[serde(rename = "metadata-name")]
    name: String,
    uid: String,
    namespace: String,
    /// Whether it is a pod's infrastructure container.
    pub(super) pod: bool,
}

/// An entry of `layers.json`.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct StoredLayer {
    pub(super) id: String,
    #[serde(default)]
    parent: String,
    #[serde(default, rename = "diff-digest")]
    diff_digest: Option<Digest>,
    /// The IDs that its files have on disk, if those are not the IDs in the container.
    #[serde(default)]
    pub(super) uidmap: Option<Vec<StoredId>>,
    #[serde(default)]
    pub(super) gidmap: Option<Vec<StoredId>>,
    #[serde(default)]
    pub(super) flags: Option<HashMap<String, serde_json::Value>>,
}

impl StoredLayer {
    /// Returns whether the owners of its files were changed for a user namespace.
    fn is_chowned(&self) -> bool {
        self.uidmap.as_ref().is_some_and(|map| !map.is_empty())
    }
}

/// A range of IDs of a layer.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct StoredId {
    pub(super) container_id: u32,
    pub(super) host_id: u32,
    pub(super) size: u32,
}

/// An entry of `images.json`.
#[derive(Clone, Debug, Deserialize)]
struct StoredImage {
    id: String,
    #[serde(default)]
    names: Option<Vec<String>>,
    #[serde(default, rename = "names-history")]
    names_history: Option<Vec<String>>,
    #[serde(default, rename = "big-data-digests")]
    big_data_digests: Option<HashMap<String, String>>,
}

/// Reads all entries of a list that is stored in several files. Missing files count as empty.
fn list<T: serde::de::DeserializeOwned>(roots: &Roots, files: &[PathBuf]) -> Result<Vec<T>, Error> {
    let mut all = Vec::new();
    for file in files {
        match read_json::<Option<Vec<T>>>(&roots.path(file), LIST_CAP) {
            Ok(entries) => all.extend(entries.unwrap_or_default()),
            Err(error) if error.is_not_found() => {}
            Err(error) => return Err(error),
        }
    }
    Ok(all)
}

/// Podman's containers are in the first file, CRI-O's in the second, those of a transient store in the third.
pub(super) fn containers(
    roots: &Roots,
    storage: &StorageRoot,
) -> Result<Vec<StoredContainer>, Error> {
    let kind = "overlay-containers";
    list(
        roots,
        &[
            storage.root.join(kind).join("containers.json"),
            storage.root.join(kind).join("volatile-containers.json"),
            storage.runroot.join(kind).join("volatile-containers.json"),
        ],
    )
}

pub(super) fn layers(
    roots: &Roots,
    storage: &StorageRoot,
) -> Result<HashMap<String, StoredLayer>, Error> {
    let kind = "overlay-layers";
    let layers: Vec<StoredLayer> = list(
        roots,
        &[
            storage.root.join(kind).join("layers.json"),
            storage.root.join(kind).join("volatile-layers.json"),
            storage.runroot.join(kind).join("volatile-layers.json"),
        ],
    )?;
    Ok(layers
        .into_iter()
        .map(|layer| (layer.id.clone(), layer))
        .collect())
}

pub(super) fn metadata(container: &StoredContainer) -> Metadata {
    serde_json::from_str(&container.metadata).unwrap_or_default()
}

/// Checks an ID, which becomes part of paths. Podman and CRI-O use 64 hex digits.
pub(super) fn is_id(id: &str) -> bool {
    !id.is_empty()
        && id
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
}

fn diff(storage: &StorageRoot, layer: &str) -> PathBuf {
    storage.root.join("overlay").join(below(layer))
}

/// Returns a layer's directory relative to that of the overlay driver.
pub(super) fn below(layer: &str) -> PathBuf {
    Path::new(layer).join("diff")
}

pub(super) fn recorded_containers(
    roots: &Roots,
    problems: &mut Vec<Problem>,
) -> Vec<RecordedContainer> {
    let mut drafts = Vec::new();
    for storage in &roots.storage {
        let state = roots.path(&storage.root.join("overlay-containers"));
        let containers = containers(roots, storage).unwrap_or_else(|error| {
            problems.push(error.into_problem(&state));
            Vec::new()
        });
        if containers.is_empty() {
            continue;
        }
        let layers = layers(roots, storage).unwrap_or_else(|error| {
            problems.push(error.into_problem(&state));
            HashMap::new()
        });
        let by_id: HashMap<&str, &StoredContainer> =
            containers.iter().map(|c| (c.id.as_str(), c)).collect();
        let mut seen = HashSet::new();
        for container in containers.iter().filter(|c| seen.insert(c.id.as_str())) {
            match draft(roots, storage, container, &by_id, &layers) {
                Ok(draft) => drafts.extend(draft),
                Err(error) => problems.push(error.into_problem(&state.join(&container.id))),
            }
        }
    }
    drafts
}

fn draft(
    roots: &Roots,
    storage: &StorageRoot,
    container: &StoredContainer,
    by_id: &HashMap<&str, &StoredContainer>,
    layers: &HashMap<String, StoredLayer>,
) -> Result<Option<RecordedContainer>, Error> {
    if !is_id(&container.id) || !(container.layer.is_empty() || is_id(&container.layer)) {
        return Err(Error::damaged(
            &storage.root,
            format!("container ID {:?}", container.id),
        ));
    }
    let userdata = |root: &Path| userdata_of(root, &container.id);
    let pid = match pid_file(&roots.path(&userdata(&storage.runroot).join("pidfile"))) {
        Ok(pid) => pid,
        // Never started, already ended, or created by Buildah.
        Err(error) if error.is_not_found() => return Ok(None),
        Err(error) => return Err(error),
    };
    // Podman keeps the spec with the data, CRI-O in both places.
    let directories = [userdata(&storage.runroot), userdata(&storage.root)];
    let mut bundle = None;
    for directory in &directories {
        match Bundle::read(&roots.path(&directory.join("config.json"))) {
            Ok(found) => {
                bundle = Some((found, directory));
                break;
            }
            Err(error) if error.is_not_found() => {}
            Err(error) => return Err(error),
        }
    }
    let annotation = |key: &str| {
        bundle
            .as_ref()
            .and_then(|(bundle, _)| bundle.annotation(key))
    };
    let crio = annotation("io.container.manager") == Some("cri-o");
    let own = metadata(container);
    let mut pod = pod(&own, by_id).filter(|_| crio);
    if let Some(pod) = &mut pod
        && is_id(&own.pod_id)
    {
        let directories =
            [&storage.runroot, &storage.root].map(|root| userdata_of(root, &own.pod_id));
        crio_pod::add_texts(pod, &directories.map(|directory| roots.path(&directory)));
    }
    let chain = chain(layers, &container.layer);
    Ok(Some(RecordedContainer {
        runtime: if crio { Runtime::Crio } else { Runtime::Podman },
        id: container.id.clone(),
        names: container.names.clone().unwrap_or_default(),
        namespace: None,
        pod,
        image_name: Some(own.image_name).filter(|name| !name.is_empty()),
        runtime_root_mode: Some(ROOT_MODE),
        sandbox: own.pod || annotation("io.kubernetes.cri-o.ContainerType") == Some("sandbox"),
        pid,
        state: roots.path(&userdata(&storage.runroot)),
        store_ids: None,
        record: (!container.layer.is_empty()).then(|| RecordedRoot {
            store: storage.root.join("overlay"),
            upper: below(&container.layer),
            // Where ID-mapped mounts are not possible, the topmost layer is a copy with other owners.
            id_mapped: chain
                .as_ref()
                .is_ok_and(|chain| !chain.iter().skip(1).any(|layer| layer.is_chowned())),
            lowers: chain
                .ok()
                .map(|chain| chain.iter().skip(1).map(|layer| below(&layer.id)).collect()),
        }),
        bases: vec![storage.root.join("overlay")],
        mounted_at: bundle
            .as_ref()
            .and_then(|(bundle, directory)| bundle.root_path(directory)),
        bundle: bundle.map(|(bundle, _)| bundle),
    }))
}

/// Returns the directory of a container's own files.
pub(super) fn userdata_of(root: &Path, id: &str) -> PathBuf {
    root.join("overlay-containers").join(id).join("userdata")
}

/// Returns the pod that CRI-O recorded for a container.
pub(super) fn pod(own: &Metadata, by_id: &HashMap<&str, &StoredContainer>) -> Option<Pod> {
    let sandbox = metadata(by_id.get(own.pod_id.as_str())?);
    Some(Pod {
        namespace: sandbox.namespace,
        name: sandbox.name,
        container: own.name.clone(),
        uid: Some(sandbox.uid).filter(|uid| !uid.is_empty()),
        ..Pod::default()
    })
}

/// Returns a layer and its ancestors, or a text that describes what is wrong.
pub(super) fn chain<'l>(
    layers: &'l HashMap<String, StoredLayer>,
    top: &str,
) -> Result<Vec<&'l StoredLayer>, String> {
    let mut chain = Vec::new();
    let mut next = top;
    while !next.is_empty() {
        let layer = layers
            .get(next)
            .ok_or_else(|| format!("layer {next} is not recorded"))?;
        if !is_id(&layer.id) {
            return Err(format!("layer ID {:?}", layer.id));
        }
        chain.push(layer);
        if chain.len() > MAX_CHAIN {
            return Err(format!("a chain of more than {MAX_CHAIN} layers"));
        }
        next = &layer.parent;
    }
    Ok(chain)
}

pub(super) fn prove(roots: &Roots, container: &Container) -> Result<Base, Error> {
    let mut unread = None;
    for storage in &roots.storage {
        let containers = match containers(roots, storage) {
            Ok(containers) => containers,
            // The node's storage is not for other users, who have one of their own.
            Err(error) => {
                unread.get_or_insert(error);
                continue;
            }
        };
        if let Some(stored) = containers.iter().find(|stored| stored.id == container.id) {
            return prove_stored(roots, storage, container, stored);
        }
    }
    if let Some(error) = unread {
        return Err(error);
    }
    Err(Error::BaseUnproven {
        container: container.id.clone(),
        compared: vec!["no containers/storage below the given roots has a record of it".to_owned()],
    })
}

fn prove_stored(
    roots: &Roots,
    storage: &StorageRoot,
    container: &Container,
    stored: &StoredContainer,
) -> Result<Base, Error> {
    let unproven = |compared| Error::BaseUnproven {
        container: container.id.clone(),
        compared,
    };
    let layers = layers(roots, storage)?;
    let chain = chain(&layers, &stored.layer).map_err(|reason| unproven(vec![reason]))?;
    let directory = |layer: &StoredLayer| roots.path(&diff(storage, &layer.id));
    let Some((own, parents)) = chain.split_first() else {
        return Err(unproven(vec![
            "it has no layer: its root is not of an image".to_owned(),
        ]));
    };
    let expected: Vec<PathBuf> = parents.iter().map(|layer| directory(layer)).collect();
    if directory(own) != container.overlay.upper || expected != container.overlay.lowers {
        let show = |paths: &[PathBuf]| {
            paths
                .iter()
                .map(|p| p.display().to_string())
                .collect::<Vec<_>>()
                .join(", ")
        };
        return Err(unproven(vec![
            format!(
                "mounted {} over {}",
                container.overlay.upper.display(),
                show(&container.overlay.lowers)
            ),
            format!(
                "recorded {} over {}",
                directory(own).display(),
                show(&expected)
            ),
        ]));
    }
    let mut diff_ids = Vec::with_capacity(parents.len());
    for layer in parents.iter().rev() {
        let Some(diff_id) = layer.diff_digest else {
            // Pulled in parts (zstd:chunked), so the whole tar was never hashed.
            return Err(unproven(vec![format!(
                "layer {} is recorded without the digest of its tar",
                layer.id
            )]));
        };
        diff_ids.push(DiffId(diff_id));
    }
    let chain_ids = ChainId::chain(&diff_ids);
    let Some(top) = chain_ids.last() else {
        return Err(unproven(vec![
            "its layer has no parent: it was not started from an image".to_owned(),
        ]));
    };

    let images: Vec<StoredImage> = list(roots, &[storage.root.join("overlay-images/images.json")])?;
    let mut compared = vec![format!(
        "mounted: {}, chain {top}",
        crate::common::message::count(chain_ids.len(), "layer", "layers")
    )];
    let mut fits: Vec<(&StoredImage, Manifest, Config)> = Vec::new();
    for image in images.iter().filter(|image| is_id(&image.id)) {
        let recorded = image.id == stored.image;
        match image_of(roots, storage, image) {
            Ok((manifest, config)) if config.diff_ids == diff_ids => {
                if recorded {
                    fits.clear();
                }
                fits.push((image, manifest, config));
                if recorded {
                    break;
                }
            }
            Ok((_, config)) if recorded => {
                compared.push(format!(
                    "recorded image {}: {} other layers",
                    image.id,
                    config.diff_ids.len()
                ));
            }
            Err(error) if recorded => {
                compared.push(format!("recorded image {}: {error}", image.id));
            }
            _ => {}
        }
    }
    compared.push(format!(
        "and {} in {}",
        crate::common::message::count(images.len(), "image", "images"),
        storage.root.display()
    ));
    let configs: HashSet<Digest> = fits.iter().map(|(_, _, config)| config.digest).collect();
    if configs.len() > 1 {
        compared.extend(
            configs
                .iter()
                .map(|config| format!("config {config}: the same layers, another configuration")),
        );
        return Err(unproven(compared));
    }
    let Some((image, manifest, config)) = fits.into_iter().next() else {
        return Err(unproven(compared));
    };

    let names: Vec<&String> = image
        .names
        .iter()
        .chain(&image.names_history)
        .flatten()
        .collect();
    let name = container
        .image_name
        .clone()
        .filter(|name| names.contains(&name));
    let name = name
        .or_else(|| names.first().map(|&name| name.clone()))
        .or_else(|| container.image_name.clone());
    let mut repositories = Vec::new();
    add_repositories(&mut repositories, name.as_deref().and_then(repository));
    add_repositories(
        &mut repositories,
        names.iter().filter_map(|name| repository(name)),
    );
    let layers: Vec<BaseLayer> = diff_ids
        .iter()
        .zip(&chain_ids)
        .zip(expected.into_iter().rev())
        .zip(&manifest.layers)
        .map(|(((diff_id, chain_id), lower), descriptor)| BaseLayer {
            diff_id: *diff_id,
            chain_id: *chain_id,
            lower: Some(lower),
            descriptor: Some(descriptor.clone()),
            size_known: true,
            // Only the unpacked layers are kept.
            local_blob: None,
            repositories: repositories.clone(),
        })
        .collect();
    let proof = format!(
        "{} {} recorded below layer {}; the layers of config {} of image {} give exactly this chain, \
         manifest {}",
        container.stands_on(),
        crate::common::message::count(layers.len(), "layer", "layers"),
        own.id,
        config.digest,
        image.id,
        manifest.raw.digest
    );
    Ok(Base {
        name,
        manifest: Some(manifest.raw),
        config: config.bytes,
        layers,
        proof,
    })
}

/// Reads the manifest and config of an image and verifies their digests.
fn image_of(
    roots: &Roots,
    storage: &StorageRoot,
    image: &StoredImage,
) -> Result<(Manifest, Config), Error> {
    let directory = roots.path(&storage.root.join("overlay-images").join(&image.id));
    let path = directory.join("manifest");
    let bytes = read_file(&path, BLOB_CAP)?;
    let expected = image
        .big_data_digests
        .as_ref()
        .and_then(|digests| digests.get("manifest"));
    let found = Digest::of(&bytes);
    if let Some(expected) = expected.filter(|expected| **expected != found.to_string()) {
        return Err(Error::damaged(
            path,
            format!("its digest is {found}, expected {expected}"),
        ));
    }
    let Document::Manifest(manifest) = Document::parse(bytes, None) else {
        return Err(Error::damaged(path, "no image manifest"));
    };
    let path = directory.join(big_data_file(&manifest.config.to_string()));
    let config =
        Config::parse(read_file(&path, BLOB_CAP)?).map_err(|e| Error::damaged(&path, e))?;
    if config.digest != manifest.config {
        return Err(Error::damaged(
            path,
            format!(
                "its digest is {}, expected {}",
                config.digest, manifest.config
            ),
        ));
    }
    if config.diff_ids.len() != manifest.layers.len() {
        let (of_config, of_manifest) = (config.diff_ids.len(), manifest.layers.len());
        return Err(Error::damaged(
            path,
            format!(
                "{}, its manifest has {of_manifest}",
                crate::common::message::count(of_config, "layer", "layers")
            ),
        ));
    }
    Ok((manifest, config))
}

/// Returns the file name of a key. Keys that are not valid file names are encoded in base64.
fn big_data_file(key: &str) -> String {
    format!("={}", base64::engine::general_purpose::STANDARD.encode(key))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn big_data_keys_are_file_names() {
        let key = "sha256:235ed3b5e2cd0efe54aa55e4c39083bbf1bc75f1d624a2f98bedc90196f25408";
        assert_eq!(
            big_data_file(key),
            "=c2hhMjU2OjIzNWVkM2I1ZTJjZDBlZmU1NGFhNTVlNGMzOTA4M2JiZjFiYzc1ZjFkNjI0YTJmOThiZWRjOTAxOTZmMjU0MDg="
        );
    }

    #[test]
    fn a_chain_that_bites_its_tail_ends() {
        let layer = |id: &str, parent: &str| {
            let layer = StoredLayer {
                id: id.to_owned(),
                parent: parent.to_owned(),
                diff_digest: None,
                uidmap: None,
                gidmap: None,
                flags: None,
            };
            (id.to_owned(), layer)
        };
        let layers = HashMap::from([
            layer("a", "b"),
            layer("b", "a"),
            layer("c", "../x"),
            layer("d", ""),
        ]);
        assert!(chain(&layers, "a").is_err());
        assert!(chain(&layers, "c").is_err());
        assert_eq!(chain(&layers, "d").map(|c| c.len()), Ok(1));
        assert!(is_id("4a6b9c47") && !is_id("../x") && !is_id(""));
    }
}
