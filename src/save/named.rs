//! Reads a base named with `--base` from a layout or a registry and proves it by content against the mounted
//! directories. It is for containers whose base no runtime records (`pid:N`).

use std::path::PathBuf;

use super::history::diff_ids;
use super::proofs::Proofs;
use super::source::{self, LayerReader, SourceError};
use super::{Context, Error, Options};
use crate::common::digest::{ChainId, Digest};
use crate::image::prove::{self, ProveError};
use crate::node::container::{self, Base, BaseLayer, Container, IdMapping, RawManifest};
use crate::node::overlay::id_map;
use crate::store::destination::Target;
use crate::store::layout;
use crate::store::registry::Reference;

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
    let explained = |error| match error {
        SourceError::Unusable(reason) => unusable(reason),
        SourceError::Destination(error) => Error::Destination(error),
    };
    let image = source::open(target, &context.registries)
        .await
        .map_err(explained)?;
    let config = image.config().await.map_err(explained)?;
    let parsed = &image.parsed;
    let diff_ids = diff_ids(&config).map_err(unusable)?;
    if diff_ids.len() != parsed.layers().len() {
        return Err(unusable(format!(
            "its config lists {}, its manifest {}",
            crate::common::message::count(diff_ids.len(), "layer", "layers"),
            parsed.layers().len()
        )));
    }
    let proofs = options.state_dir.as_deref().map(Proofs::new);
    let readers = image.layers().map_err(explained)?;
    let proof = prove(container, readers, image.manifest.digest, proofs).await?;
    let reference = image.reference.as_ref();
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
        repositories: reference.into_iter().map(Reference::name).collect(),
    });
    let base = Base {
        name: reference.map(ToString::to_string),
        manifest: Some(RawManifest {
            bytes: image.manifest.bytes.to_vec(),
            media_type: image.manifest.media_type.clone(),
            digest: image.manifest.digest,
        }),
        config: config.to_vec(),
        layers: layers.collect(),
        proof,
    };
    Ok((base, image.into_layout()))
}

async fn prove(
    container: &Container,
    readers: Vec<LayerReader>,
    manifest: Digest,
    proofs: Option<Proofs>,
) -> Result<String, Error> {
    let (uid_map, gid_map) = id_maps_of_lowers(container)?;
    let directories = container.overlay.lowers.clone();
    let namespace = container.overlay.namespace;
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
