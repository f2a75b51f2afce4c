//! Reads a base named with `--base` from a layout or a registry and proves it by content against the mounted
//! directories. It is for containers whose base no runtime records (`pid:N`).

use std::io::{self, Read};
use std::path::PathBuf;
use std::sync::mpsc;

use bytes::{Buf, Bytes};
use oci_spec::image::{Descriptor, ImageIndex, ImageManifest};

use super::proofs::Proofs;
use super::{Context, Error, Options};
use crate::common::digest::{ChainId, DiffId, Digest};
use crate::image::manifest::Platform;
use crate::image::prove::{self, ProveError};
use crate::node::container::{self, Base, BaseLayer, Container, IdMapping, RawManifest};
use crate::node::overlay::id_map;
use crate::store::destination::Target;
use crate::store::harbor;
use crate::store::layout;
use crate::store::registry::{self, Reference, Repository};

/// The source of a named base.
enum Source {
    Layout(layout::Reader),
    Registry(Repository),
}

/// Reads the base and proves it. If it comes from a layout, the layout is returned too, because it has its blobs.
pub(super) async fn base(
    context: &Context,
    container: &Container,
    options: &Options,
    name: &str,
) -> Result<(Base, Option<layout::Reader>), Error> {
    let unusable = |reason: String| Error::BaseUnusable {
        name: name.to_owned(),
        reason,
    };
    let target: Target = name.parse()?;
    let platform = Platform::host();
    let (source, manifest, reference) =
        match target.open_layout().map_err(|e| unusable(e.to_string()))? {
            Some((reader, tag)) => {
                let manifest = reader
                    .manifest(tag, &platform)
                    .map_err(|e| unusable(e.to_string()))?;
                (Source::Layout(reader), manifest, None)
            }
            None => {
                let Target::Registry(reference) = target else {
                    return Err(Error::Worker);
                };
                let repository = context
                    .registries
                    .pull_from(&reference)
                    .map_err(registry_error)?;
                let manifest = match pull(&repository, &reference, &platform).await {
                    Ok(manifest) => manifest,
                    Err(PullError::Registry(error)) => {
                        let error = harbor::explain(&repository, error).await;
                        return Err(Error::Destination(error.into()));
                    }
                    Err(PullError::Unusable(reason)) => return Err(unusable(reason)),
                };
                (Source::Registry(repository), manifest, Some(reference))
            }
        };
    let parsed: ImageManifest = serde_json::from_slice(&manifest.bytes)
        .map_err(|e| unusable(format!("its manifest: {e}")))?;
    let config_digest: Digest = parsed
        .config()
        .digest()
        .to_string()
        .parse()
        .map_err(|e| unusable(format!("its config: {e}")))?;
    let config = match &source {
        Source::Layout(reader) => reader
            .blob(&config_digest)
            .map_err(|e| unusable(e.to_string()))?,
        Source::Registry(repository) => repository
            .blob(&config_digest)
            .await
            .map_err(registry_error)?,
    };
    let diff_ids = diff_ids(&config).map_err(unusable)?;
    if diff_ids.len() != parsed.layers().len() {
        return Err(unusable(format!(
            "its config lists {}, its manifest {}",
            crate::common::message::count(diff_ids.len(), "layer", "layers"),
            parsed.layers().len()
        )));
    }
    let proofs = options.state_dir.as_deref().map(Proofs::new);
    let proof = prove(container, &source, parsed.layers(), manifest.digest, proofs).await?;
    let lowers = &container.overlay.lowers;
    let one_each = lowers.len() == diff_ids.len();
    let chain = ChainId::chain(&diff_ids);
    let layers = diff_ids.iter().zip(chain).zip(parsed.layers()).enumerate();
    let layers = layers.map(|(index, ((&diff_id, chain_id), descriptor))| BaseLayer {
        diff_id,
        chain_id,
        lower: one_each.then(|| lowers[lowers.len() - 1 - index].clone()),
        descriptor: Some(descriptor.clone()),
        size_known: true,
        local_blob: None,
        repositories: reference.iter().map(Reference::name).collect(),
    });
    let base = Base {
        name: reference.as_ref().map(ToString::to_string),
        manifest: Some(RawManifest {
            bytes: manifest.bytes.to_vec(),
            media_type: manifest.media_type,
            digest: manifest.digest,
        }),
        config: config.to_vec(),
        layers: layers.collect(),
        proof,
    };
    Ok(match source {
        Source::Layout(reader) => (base, Some(reader)),
        Source::Registry(_) => (base, None),
    })
}

enum PullError {
    Registry(registry::Error),
    Unusable(String),
}

async fn pull(
    repository: &Repository,
    reference: &Reference,
    platform: &Platform,
) -> Result<crate::image::manifest::raw::RawManifest, PullError> {
    let wanted = reference.digest.map(|digest| digest.to_string());
    let wanted = wanted
        .or_else(|| reference.tag.clone())
        .unwrap_or_else(|| "latest".to_owned());
    let manifest = repository
        .manifest(&wanted)
        .await
        .map_err(PullError::Registry)?;
    if !manifest.is_index() {
        return Ok(manifest);
    }
    let index: ImageIndex = serde_json::from_slice(&manifest.bytes)
        .map_err(|e| PullError::Unusable(format!("its index: {e}")))?;
    let Some(chosen) = platform.choose(&index) else {
        return Err(PullError::Unusable(format!(
            "its index has nothing for {}",
            platform.architecture
        )));
    };
    repository
        .manifest(chosen.digest().as_ref())
        .await
        .map_err(PullError::Registry)
}

fn diff_ids(config: &[u8]) -> Result<Vec<DiffId>, String> {
    #[derive(serde::Deserialize)]
    struct RootFs {
        diff_ids: Vec<DiffId>,
    }
    #[derive(serde::Deserialize)]
    struct Config {
        rootfs: RootFs,
    }
    let config: Config = serde_json::from_slice(config).map_err(|e| format!("its config: {e}"))?;
    Ok(config.rootfs.diff_ids)
}

async fn prove(
    container: &Container,
    source: &Source,
    layers: &[Descriptor],
    manifest: Digest,
    proofs: Option<Proofs>,
) -> Result<String, Error> {
    let (uid_map, gid_map) = id_maps_of_lowers(container)?;
    let directories = container.overlay.lowers.clone();
    let namespace = container.overlay.namespace;
    let mut readers: Vec<io::Result<Box<dyn Read + Send>>> = Vec::new();
    for descriptor in layers {
        let digest: Digest =
            descriptor
                .digest()
                .to_string()
                .parse()
                .map_err(|e| Error::BaseUnusable {
                    name: descriptor.digest().to_string(),
                    reason: format!("{e}"),
                })?;
        readers.push(match source {
            Source::Layout(reader) => reader
                .open_blob(&digest, Some(descriptor.size()))
                .map_err(io::Error::other),
            Source::Registry(repository) => Ok(Box::new(BlobReader::start(
                repository.clone(),
                digest,
                descriptor.size(),
            ))),
        });
    }
    let proven = tokio::task::spawn_blocking(move || {
        let lowers = prove::Lowers {
            directories: &directories,
            namespace,
            owner: |uid, gid| {
                Some((
                    id_map::container_id(&uid_map, uid)?,
                    id_map::container_id(&gid_map, gid)?,
                ))
            },
        };
        let mounted = prove::mounted(&lowers)?;
        if let Some(proof) = proofs.as_ref().and_then(|p| p.find(&manifest, &mounted)) {
            return Ok(proof);
        }
        let proof = prove::compare_content(readers, &mounted)?;
        if let Some(Err(error)) = proofs.map(|p| p.keep(&manifest, &mounted, &proof)) {
            tracing::info!(%error, "the proof of the base is not kept");
        }
        Ok(proof)
    });
    let proven: Result<String, ProveError> = proven.await.map_err(|_| Error::Worker)?;
    Ok(proven?)
}

/// Returns the ID maps of the lowers, which must be the same for all of them.
fn id_maps_of_lowers(container: &Container) -> Result<(Vec<IdMapping>, Vec<IdMapping>), Error> {
    let overlay = &container.overlay;
    let mapped = |lower: &&PathBuf| overlay.id_mapped.contains(lower);
    let (uids, gids) = (&container.uid_map, &container.gid_map);
    match overlay.lowers.iter().filter(mapped).count() {
        0 => Ok((uids.clone(), gids.clone())),
        all if all == overlay.lowers.len() => {
            Ok((id_map::on_disk_map(uids), id_map::on_disk_map(gids)))
        }
        some => Err(Error::Container(container::Error::BaseUnproven {
            container: container.id.clone(),
            compared: vec![format!(
                "{some} of its {} lower directories are ID-mapped: their owners cannot be compared with those of --base",
                overlay.lowers.len()
            )],
        })),
    }
}

fn registry_error(error: registry::Error) -> Error {
    Error::Destination(error.into())
}

/// A registry blob as a [`Read`], fetched at the first read.
struct BlobReader {
    begin: Option<Box<dyn FnOnce() + Send>>,
    pieces: mpsc::Receiver<io::Result<Bytes>>,
    piece: Bytes,
}

impl BlobReader {
    fn start(repository: Repository, digest: Digest, size: u64) -> Self {
        let (sender, pieces) = mpsc::sync_channel(4);
        let handle = tokio::runtime::Handle::current();
        let begin = move || {
            handle.spawn(async move {
                let mut stream = match repository.blob_stream(&digest, Some(size)).await {
                    Ok(stream) => stream,
                    Err(error) => {
                        return sender
                            .send(Err(io::Error::other(error)))
                            .unwrap_or_default();
                    }
                };
                loop {
                    let piece = match stream.next().await {
                        Ok(Some(piece)) => Ok(piece),
                        Ok(None) => return,
                        Err(error) => Err(io::Error::other(error)),
                    };
                    let failed = piece.is_err();
                    let sender = sender.clone();
                    // The reader may be slower than the registry, or gone.
                    let sent =
                        tokio::task::spawn_blocking(move || sender.send(piece).is_ok()).await;
                    if failed || !sent.unwrap_or(false) {
                        return;
                    }
                }
            });
        };
        Self {
            begin: Some(Box::new(begin)),
            pieces,
            piece: Bytes::new(),
        }
    }
}

impl Read for BlobReader {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        if let Some(begin) = self.begin.take() {
            begin();
        }
        while self.piece.is_empty() {
            match self.pieces.recv() {
                Ok(piece) => self.piece = piece?,
                Err(_) => return Ok(0),
            }
        }
        let n = self.piece.len().min(out.len());
        self.piece.copy_to_slice(&mut out[..n]);
        Ok(n)
    }
}
