//! Docker's state: containers, layers and image configs below its data root.
//!
//! Format: moby 20.10 to 28, `container/container.go` (`config.v2.json`), `layer/filestore.go` (layerdb), `image/fs.go`
//! (imagedb), `distribution/metadata`. With the overlay2 graph driver, Docker keeps image configs but no manifests;
//! with the containerd image store (driver `overlayfs`), all of that is in containerd's namespace `moby`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use oci_client::manifest::IMAGE_DOCKER_LAYER_GZIP_MEDIA_TYPE;
use oci_spec::image::{Descriptor, MediaType};
use serde::Deserialize;

use super::bundle::Bundle;
use super::error::{Error, Problem};
use super::image::{BLOB_CAP, Config, add_repositories, repository};
use super::recorded::{RecordedContainer, RecordedRoot};
use super::roots::{Roots, read_dir, read_file, read_json};
use super::{Base, BaseLayer, Container, Runtime, containerd};
use crate::common::digest::{ChainId, DiffId, Digest};

/// Docker's namespace in containerd.
const NAMESPACE: &str = "moby";
/// Maximum size in bytes of a config.v2.json, which holds the environment and network settings of a container.
pub(super) const CONFIG_CAP: u64 = 16 << 20;
/// Directory with the layers that each container is mounted on, below the data root.
const MOUNTS: &str = "image/overlay2/layerdb/mounts";
/// Maximum length of a layer chain. Docker's own limit is lower (moby#20298).
const MAX_CHAIN: usize = 512;

/// The fields of `containers/<id>/config.v2.json` that a save needs.
#[derive(Debug, Deserialize)]
pub(super) struct Config2 {
    #[serde(rename = "ID")]
    pub(super) id: String,
    #[serde(rename = "Name", default)]
    name: String,
    #[serde(rename = "State")]
    pub(super) state: State,
    /// Digest of the image's config (graph driver) or of the target of the tag (containerd image store).
    #[serde(rename = "Image", default)]
    image: String,
    #[serde(rename = "Config")]
    pub(super) config: RunConfig,
    /// Program of the first process, and its arguments.
    #[serde(rename = "Path", default)]
    pub(super) path: String,
    #[serde(rename = "Args", default)]
    pub(super) args: Option<Vec<String>>,
    #[serde(rename = "Driver", default)]
    pub(super) driver: String,
    /// Volumes and bind mounts by destination.
    #[serde(rename = "MountPoints", default)]
    pub(super) mount_points: Option<BTreeMap<PathBuf, StoredMount>>,
}

#[derive(Debug, Deserialize)]
pub(super) struct StoredMount {
    #[serde(rename = "Type", default)]
    pub(super) kind: String,
    #[serde(rename = "Source", default)]
    pub(super) source: String,
}

#[derive(Debug, Deserialize)]
pub(super) struct State {
    #[serde(rename = "Pid", default)]
    pub(super) pid: u32,
    #[serde(rename = "ExitCode", default)]
    pub(super) exit_code: i64,
    #[serde(rename = "OOMKilled", default)]
    pub(super) oom_killed: bool,
    /// RFC 3339; the year 1 for a container that was never started.
    #[serde(rename = "StartedAt", default)]
    pub(super) started_at: String,
    /// RFC 3339; the year 1 for a container that never ended.
    #[serde(rename = "FinishedAt", default)]
    pub(super) finished_at: String,
    /// Set before anything of a container is removed.
    #[serde(rename = "Dead", default)]
    pub(super) dead: bool,
    #[serde(rename = "RemovalInProgress", default)]
    pub(super) removal_in_progress: bool,
}

#[derive(Debug, Deserialize)]
pub(super) struct RunConfig {
    /// The image as named by the user.
    #[serde(rename = "Image", default)]
    pub(super) image: String,
    /// Environment variables as `NAME=VALUE`, those of the image included.
    #[serde(rename = "Env", default)]
    pub(super) env: Option<Vec<String>>,
}

/// Returns the data roots, including those of `userns-remap` (`<uid>.<gid>` below them).
pub(super) fn data_roots(roots: &Roots, problems: &mut Vec<Problem>) -> Vec<PathBuf> {
    let mut all = Vec::new();
    for root in &roots.docker {
        all.push(root.clone());
        let directory = roots.path(root);
        match read_dir(&directory) {
            Ok(names) => all.extend(
                names
                    .iter()
                    .filter(|name| remapped(name).is_some())
                    .map(|name| root.join(name)),
            ),
            Err(error) => problems.push(error.into_problem(&directory)),
        }
    }
    all
}

/// Parses the name of a remapped data root, which is the first user and group ID on the node.
pub(super) fn remapped(name: &std::ffi::OsStr) -> Option<(u32, u32)> {
    let (uid, gid) = name.to_str()?.split_once('.')?;
    Some((uid.parse().ok()?, gid.parse().ok()?))
}

pub(super) fn recorded_containers(
    roots: &Roots,
    problems: &mut Vec<Problem>,
) -> Vec<RecordedContainer> {
    let mut drafts = Vec::new();
    for root in data_roots(roots, problems) {
        let containers = roots.path(&root.join("containers"));
        let ids = read_dir(&containers).unwrap_or_else(|error| {
            problems.push(error.into_problem(&containers));
            Vec::new()
        });
        for id in ids {
            let directory = containers.join(&id);
            match draft(roots, &root, &directory, problems) {
                Ok(draft) => drafts.extend(draft),
                // Removed meanwhile, or still being created, unless its config says that it is running.
                Err(error) if error.is_not_found() && !runs(&directory) => {}
                Err(error) => problems.push(error.into_problem(&directory)),
            }
        }
    }
    drafts
}

/// Returns whether the container in `directory` has a process, if its config can be read.
fn runs(directory: &Path) -> bool {
    read_json::<Config2>(&directory.join("config.v2.json"), CONFIG_CAP)
        .is_ok_and(|config| config.state.pid != 0)
}

/// Returns the container's name, which Docker writes with a slash before it.
pub(super) fn names(config: &Config2) -> Vec<String> {
    let name = config.name.trim_start_matches('/');
    if name.is_empty() {
        Vec::new()
    } else {
        vec![name.to_owned()]
    }
}

fn draft(
    roots: &Roots,
    root: &Path,
    directory: &Path,
    problems: &mut Vec<Problem>,
) -> Result<Option<RecordedContainer>, Error> {
    let config: Config2 = read_json(&directory.join("config.v2.json"), CONFIG_CAP)?;
    // Docker writes this file when a container starts and when it ends, so a stopped one has PID 0.
    if config.state.pid == 0 {
        return Ok(None);
    }
    let (bundle, mounted_at) = match bundle_directory(roots, &config.id) {
        Some(directory) => match Bundle::read(&roots.path(&directory.join("config.json"))) {
            Ok(bundle) => {
                let mounted_at = bundle.root_path(&directory);
                (Some(bundle), mounted_at)
            }
            Err(error) => {
                problems.push(error.into_problem(&directory));
                (None, None)
            }
        },
        None => (None, None),
    };
    let overlay2 = root.join("overlay2");
    let record = if config.driver == "overlay2" {
        Some(record(roots, root, &config.id)?)
    } else {
        None
    };
    Ok(Some(RecordedContainer {
        runtime: Runtime::Docker,
        names: names(&config),
        namespace: None,
        pod: None,
        image_name: Some(config.config.image).filter(|image| !image.is_empty()),
        runtime_root_mode: None,
        sandbox: false,
        pid: config.state.pid,
        bundle,
        state: directory.to_path_buf(),
        store_ids: root.file_name().and_then(remapped),
        record,
        bases: vec![overlay2],
        mounted_at,
        id: config.id,
    }))
}

/// Reads the directories of a container's root from Docker's layerdb.
pub(super) fn record(roots: &Roots, root: &Path, id: &str) -> Result<RecordedRoot, Error> {
    let diff = |id: String| Path::new(&id).join("diff");
    let upper = diff(mount_file(roots, root, id, "mount-id")?);
    let init = diff(mount_file(roots, root, id, "init-id")?);
    let parents = match mount_file(roots, root, id, "parent") {
        Ok(parent) => {
            let parent = parent
                .parse()
                .map_err(|e| Error::damaged(root.join(MOUNTS).join(id).join("parent"), e))?;
            layer_chain(roots, root, ChainId(parent))?
        }
        // Not started from an image.
        Err(error) if error.is_not_found() => Vec::new(),
        Err(error) => return Err(error),
    };
    let parents = parents.into_iter().map(|layer| diff(layer.cache_id));
    Ok(RecordedRoot {
        store: root.join("overlay2"),
        upper,
        lowers: Some(std::iter::once(init).chain(parents).collect()),
        // Docker changes the owners of the files instead.
        id_mapped: false,
    })
}

/// Returns the bundle in which containerd keeps the runtime spec from Docker.
fn bundle_directory(roots: &Roots, id: &str) -> Option<PathBuf> {
    let bundles = roots.containerd.iter().map(|c| {
        c.state
            .join("io.containerd.runtime.v2.task")
            .join(NAMESPACE)
            .join(id)
    });
    bundles
        .into_iter()
        .find(|directory| roots.locate(&directory.join("config.json")).is_ok())
}

/// Reads a one-line file on a container's mount: `mount-id`, `init-id` or `parent`.
fn mount_file(roots: &Roots, root: &Path, id: &str, name: &str) -> Result<String, Error> {
    one_line(&roots.path(&root.join(MOUNTS).join(id).join(name)))
}

/// Reads an ID that becomes part of a path. Docker's IDs have neither slashes nor dots, and others are refused.
fn one_line(path: &Path) -> Result<String, Error> {
    let text = read_file(path, 1024)?;
    let text = String::from_utf8(text).map_err(|e| Error::damaged(path, e))?;
    let text = text.trim_end_matches('\n');
    if text.is_empty() || text.contains(['/', '.', '\0']) {
        return Err(Error::damaged(
            path,
            format!("expected an ID, found {text:?}"),
        ));
    }
    Ok(text.to_owned())
}

fn digest_file(path: &Path) -> Result<Digest, Error> {
    one_line(path)?.parse().map_err(|e| Error::damaged(path, e))
}

/// Returns `overlay2/<id>/diff`, independent of the short symbolic links in the mount options.
fn diff(roots: &Roots, root: &Path, id: &str) -> PathBuf {
    roots.path(&root.join("overlay2").join(id).join("diff"))
}

/// A layer of the layerdb.
struct Layer {
    chain_id: ChainId,
    diff_id: DiffId,
    cache_id: String,
    directory: PathBuf,
}

pub(super) fn prove(roots: &Roots, container: &Container) -> Result<Base, Error> {
    let mut problems = Vec::new();
    for root in data_roots(roots, &mut problems) {
        let path = roots.path(
            &root
                .join("containers")
                .join(&container.id)
                .join("config.v2.json"),
        );
        let config: Config2 = match read_json(&path, CONFIG_CAP) {
            Err(error) if error.is_not_found() => continue,
            other => other?,
        };
        return match config.driver.as_str() {
            "overlay2" => prove_overlay2(roots, &root, container, &config),
            _ => containerd::prove(roots, container),
        };
    }
    Err(Error::BaseUnproven {
        container: container.id.clone(),
        compared: vec!["no data root of Docker has a config.v2.json of it".to_owned()],
    })
}

fn prove_overlay2(
    roots: &Roots,
    root: &Path,
    container: &Container,
    config: &Config2,
) -> Result<Base, Error> {
    let unproven = |compared| Error::BaseUnproven {
        container: container.id.clone(),
        compared,
    };
    let mount_file = |name| mount_file(roots, root, &container.id, name);
    let (mount_id, init_id) = (mount_file("mount-id")?, mount_file("init-id")?);
    let upper = diff(roots, root, &mount_id);
    if upper != container.overlay.upper {
        let mounted = container.overlay.upper.display();
        return Err(unproven(vec![format!(
            "mounted upper {mounted}, Docker's is {}",
            upper.display()
        )]));
    }
    let parent = mount_file("parent").and_then(|parent| {
        parent
            .parse::<Digest>()
            .map_err(|e| Error::damaged(root.join(MOUNTS), e))
    });
    let parent = match parent {
        Err(error) if error.is_not_found() => {
            return Err(unproven(vec![
                "its layer has no parent: it was not started from an image".to_owned(),
            ]));
        }
        other => other?,
    };
    let stack = layer_chain(roots, root, ChainId(parent))?;
    // Between image and container is a layer with /etc/hosts and similar files, which belongs to no image.
    let init = diff(roots, root, &init_id);
    let expected: Vec<&PathBuf> = std::iter::once(&init)
        .chain(stack.iter().map(|layer| &layer.directory))
        .collect();
    if !container.overlay.lowers.iter().eq(expected.iter().copied()) {
        let show = |paths: &mut dyn Iterator<Item = &PathBuf>| {
            paths
                .map(|p| p.display().to_string())
                .collect::<Vec<_>>()
                .join(", ")
        };
        return Err(unproven(vec![
            format!(
                "mounted lowers {}",
                show(&mut container.overlay.lowers.iter())
            ),
            format!("Docker's layers {}", show(&mut expected.into_iter())),
        ]));
    }
    let mounted: Vec<ChainId> = stack.iter().rev().map(|layer| layer.chain_id).collect();
    let found = config_of(roots, root, config, &mounted)?.map_err(unproven)?;

    let name = Some(config.config.image.clone()).filter(|name| !name.is_empty());
    let mut layers = Vec::with_capacity(stack.len());
    for layer in stack.into_iter().rev() {
        let known = distribution(roots, root, layer.diff_id)?;
        let mut repositories = Vec::new();
        // The image's own repository is the most likely source, but only if it is among the known ones or Docker knows
        // none.
        add_repositories(
            &mut repositories,
            known
                .iter()
                .filter_map(|v2| repository(&v2.source_repository)),
        );
        add_repositories(&mut repositories, name.as_deref().and_then(repository));
        layers.push(BaseLayer {
            diff_id: layer.diff_id,
            chain_id: layer.chain_id,
            lower: Some(layer.directory),
            // Docker compresses layers with gzip for a push and pulls them as gzip. It does not record the size.
            descriptor: known.first().and_then(|v2| {
                Some(Descriptor::new(
                    MediaType::Other(IMAGE_DOCKER_LAYER_GZIP_MEDIA_TYPE.to_owned()),
                    0_u64,
                    v2.digest
                        .to_string()
                        .parse::<oci_spec::image::Digest>()
                        .ok()?,
                ))
            }),
            size_known: false,
            local_blob: None,
            repositories,
        });
    }
    let proof = format!(
        "{} {} of Docker's layerdb up to chain {}; the layers of config {} give exactly this chain",
        container.stands_on(),
        crate::common::message::count(layers.len(), "layer", "layers"),
        ChainId(parent),
        found.digest
    );
    Ok(Base {
        name,
        manifest: None,
        config: found.bytes,
        layers,
        proof,
    })
}

/// Returns the layers from `top` to the bottom.
fn layer_chain(roots: &Roots, root: &Path, top: ChainId) -> Result<Vec<Layer>, Error> {
    let layerdb = root.join("image/overlay2/layerdb/sha256");
    let mut layers = Vec::new();
    let mut next = Some(top);
    while let Some(chain_id) = next {
        let directory = roots.path(&layerdb.join(chain_id.0.hex()));
        let diff_id = DiffId(digest_file(&directory.join("diff"))?);
        next = match digest_file(&directory.join("parent")) {
            Ok(parent) => Some(ChainId(parent)),
            Err(error) if error.is_not_found() => None,
            Err(error) => return Err(error),
        };
        // The directory's name has to match its content.
        let computed =
            next.map_or_else(|| ChainId::bottom(diff_id), |parent| parent.child(diff_id));
        if computed != chain_id {
            return Err(Error::damaged(
                directory,
                format!("its diff and parent give the chain {computed}"),
            ));
        }
        let cache_id = one_line(&directory.join("cache-id"))?;
        layers.push(Layer {
            chain_id,
            diff_id,
            directory: diff(roots, root, &cache_id),
            cache_id,
        });
        if layers.len() > MAX_CHAIN {
            return Err(Error::damaged(
                directory,
                format!("a chain of more than {MAX_CHAIN} layers"),
            ));
        }
    }
    Ok(layers)
}

/// Returns the image config with the mounted chain: the recorded one, or else the only one in the store that matches.
fn config_of(
    roots: &Roots,
    root: &Path,
    container: &Config2,
    mounted: &[ChainId],
) -> Result<Result<Config, Vec<String>>, Error> {
    let store = roots.path(&root.join("image/overlay2/imagedb/content/sha256"));
    let read = |hex: &str| -> Result<Config, Error> {
        let path = store.join(hex);
        let config =
            Config::parse(read_file(&path, BLOB_CAP)?).map_err(|e| Error::damaged(&path, e))?;
        if config.digest.hex() != hex {
            return Err(Error::damaged(
                path,
                format!("its contents have the digest {}", config.digest),
            ));
        }
        Ok(config)
    };
    let mut compared = Vec::new();
    if let Some(top) = mounted.last() {
        compared.push(format!(
            "mounted: {}, chain {top}",
            crate::common::message::count(mounted.len(), "layer", "layers")
        ));
    }
    if let Ok(recorded) = container.image.parse::<Digest>() {
        match read(&recorded.hex()) {
            Ok(config) if config.chain == mounted => return Ok(Ok(config)),
            Ok(config) => compared.push(format!(
                "recorded config {recorded}: {} other layers",
                config.chain.len()
            )),
            Err(error) => compared.push(format!("recorded config {recorded}: {error}")),
        }
    }
    let mut fits: Vec<Config> = Vec::new();
    let names = read_dir(&store)?;
    for config in names.iter().filter_map(|name| read(name.to_str()?).ok()) {
        if config.chain == mounted {
            fits.push(config);
        }
    }
    compared.push(format!(
        "and the {} configs in {}",
        names.len(),
        store.display()
    ));
    if fits.len() == 1 {
        return Ok(Ok(fits.remove(0)));
    }
    compared.extend(fits.iter().map(|fit| {
        format!(
            "config {}: the same layers, another configuration",
            fit.digest
        )
    }));
    Ok(Err(compared))
}

/// A compressed blob of a layer that Docker has pulled or pushed.
#[derive(Debug, Deserialize)]
struct V2Metadata {
    #[serde(rename = "Digest")]
    digest: Digest,
    #[serde(rename = "SourceRepository", default)]
    source_repository: String,
}

/// Returns the compressed blobs of a layer, the latest first; Docker appends to its list.
fn distribution(roots: &Roots, root: &Path, diff_id: DiffId) -> Result<Vec<V2Metadata>, Error> {
    let path = root
        .join("image/overlay2/distribution/v2metadata-by-diffid/sha256")
        .join(diff_id.0.hex());
    match read_json::<Vec<V2Metadata>>(&roots.path(&path), BLOB_CAP) {
        Ok(mut known) => {
            known.reverse();
            Ok(known)
        }
        Err(error) if error.is_not_found() => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}
