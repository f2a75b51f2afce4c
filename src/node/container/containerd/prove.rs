//! Proves a base: compares the mounted snapshots with the images whose layers have the same chain ID.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use super::METADATA;
use super::content::{BLOBS, Content};
use super::record::{ImageRecord, Record, images, record, sources};
use super::snapshot::mounted_stack;
use crate::common::digest::{ChainId, Digest};
use crate::node::container::bolt;
use crate::node::container::error::Error;
use crate::node::container::image::{Config, Manifest, add_repositories, repository};
use crate::node::container::roots::{ContainerdRoot, Roots};
use crate::node::container::{Base, Container};

/// An image with the mounted chain ID.
struct MatchingImage {
    manifest: Option<Manifest>,
    config: Config,
    /// Name of the image record that refers to it.
    name: Option<String>,
}

pub(in crate::node::container) fn prove(
    roots: &Roots,
    container: &Container,
) -> Result<Base, Error> {
    let namespace = container.namespace.as_deref().unwrap_or("moby");
    let mut compared = Vec::new();
    for containerd in &roots.containerd {
        let meta = containerd.root.join(METADATA);
        if roots.locate(&meta).is_err() {
            continue;
        }
        let meta = roots.path(&meta);
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
    let mut compared = vec![format!(
        "mounted: {}, chain {top}",
        crate::common::message::count(mounted.len(), "layer", "layers")
    )];
    let mut fits: Vec<MatchingImage> = Vec::new();
    let mut named: Vec<ImageRecord> = images;
    // First the image that the container was started from, then other names, then digests.
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
            // Damage to another image does not prevent the save of this container.
            Err(error) => {
                compared.push(format!("{}: {error}", image.name));
                continue;
            }
        };
        for manifest in manifests {
            let verdict = match content.config(&manifest) {
                Ok(config) if config.chain == mounted => {
                    fits.push(MatchingImage {
                        manifest: Some(manifest),
                        config,
                        name: Some(image.name.clone()),
                    });
                    continue;
                }
                Ok(config) => match config.chain.last() {
                    Some(top) => format!(
                        "{}, chain {top}",
                        crate::common::message::count(config.chain.len(), "layer", "layers")
                    ),
                    None => "no layers".to_owned(),
                },
                Err(reason) => reason,
            };
            // Other images are not listed, because there may be very many of them.
            if recorded {
                compared.push(format!(
                    "{} -> manifest {}: {verdict}",
                    image.name, manifest.raw.digest
                ));
            }
        }
    }
    let is_wanted =
        |fit: &MatchingImage| image_ref.is_none_or(|wanted| fit.config.digest == wanted);
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
                fits.push(MatchingImage {
                    manifest: Some(manifest),
                    config,
                    name: None,
                });
            }
        }
        compared.push(format!(
            "and {} in {}",
            crate::common::message::count(scanned, "manifest", "manifests"),
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
            Ok(config) if config.chain == mounted => fits.push(MatchingImage {
                manifest: None,
                config,
                name: None,
            }),
            Ok(config) => compared.push(format!(
                "recorded config {wanted}: {}",
                crate::common::message::count(config.chain.len(), "layer", "layers")
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
        "{}; the layers of config {}{} give exactly this chain{}",
        stack.proof,
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
