//! `image squash`: rewrites the layers above an image's base into one.

use std::sync::Arc;

use serde::Serialize;

use super::args::ImageSquash;
use super::exit::Usage;
use super::print::print;
use super::reading::{self, Layers};
use crate::common::digest::{DiffId, Digest};
use crate::common::message::{count, size};
use crate::image::manifest;
use crate::save;
use crate::save::history;
use crate::save::source::Image;
use crate::save::squash;
use crate::store::destination::{Destination, Replaceable, SAVE_ANNOTATION, Target};
use crate::store::registry::Registries;

/// Output of `image squash`.
#[derive(Serialize)]
struct SquashView {
    image: String,
    digest: Digest,
    base_layers: usize,
    squashed_layers: usize,
    layer: LayerView,
    before_bytes: u64,
}

#[derive(Serialize)]
struct LayerView {
    digest: Digest,
    diff_id: DiffId,
    size: u64,
    paths: usize,
}

pub(super) fn run(args: &ImageSquash) -> anyhow::Result<()> {
    let from: Target = args.image.parse().map_err(save::Error::from)?;
    let to = args.new.as_deref().unwrap_or(&args.image);
    let to = Target::for_saving(to).map_err(save::Error::from)?;
    let base: Option<Target> = args
        .base
        .as_deref()
        .map(str::parse)
        .transpose()
        .map_err(save::Error::from)?;
    let view = reading::run(&args.registry, Some(&from), async |registries, cancel| {
        let image = Arc::new(reading::open(from.clone(), registries, &args.image).await?);
        let destination = Destination::open(&to, registries).map_err(save::Error::from)?;
        let rule = rule(args, &to, &destination, &image).await?;
        // Before all layers are read.
        destination
            .check_replaceable(to.tag(), &rule)
            .await
            .map_err(save::Error::from)?;
        let unreadable = |error: save::source::SourceError| error.of(&args.image);
        let config = image.config().await.map_err(unreadable)?;
        let layers = Layers::new(Arc::clone(&image), cancel);
        let total = layers.len();
        let keep = kept(args, base, registries, &config, total).await?;
        let compression = args.compression;
        let squashed = reading::blocking(move || {
            let mut open = |layer: usize| layers.open(layer);
            Ok::<_, anyhow::Error>(squash::squash(total, keep, &mut open, compression)?)
        })
        .await?;
        let layer = manifest::Layer {
            descriptor: squash::descriptor(compression, &squashed.digests),
            diff_id: squashed.digests.diff_id,
        };
        let built = manifest::squash::squash(
            &image.manifest.bytes,
            &config,
            keep,
            &layer,
            history::CREATED_BY,
            &[SAVE_ANNOTATION],
        )
        .map_err(save::Error::from)?;
        let (digests, paths) = (squashed.digests, squashed.paths);
        let digest =
            squash::publish(&image, &built, squashed, &destination, to.tag(), &rule).await?;
        let before = image.parsed.layers().iter().skip(keep);
        Ok(SquashView {
            image: format!("{to}@{digest}"),
            digest,
            base_layers: keep,
            squashed_layers: total - keep,
            layer: LayerView {
                digest: digests.digest,
                diff_id: digests.diff_id,
                size: digests.size,
                paths,
            },
            before_bytes: before.map(oci_spec::image::Descriptor::size).sum(),
        })
    })?;
    print(args.format, &view, summary)
}

/// Returns what the tag may be taken from: without NEW the image itself, else with --replace what it names now.
async fn rule(
    args: &ImageSquash,
    to: &Target,
    destination: &Destination,
    image: &Image,
) -> anyhow::Result<Replaceable> {
    let digest = match (&args.new, args.replace) {
        (None, _) => match destination.digest_of(to.tag()).await {
            // Of an index, the tag names more than this machine's image.
            Ok(Some(found)) if found != image.manifest.digest => {
                return Err(Usage(format!(
                    "{} is an index of images for several platforms: name the new image",
                    args.image
                ))
                .into());
            }
            found => found.map_err(save::Error::from)?,
        },
        (Some(_), true) => destination
            .digest_of(to.tag())
            .await
            .map_err(save::Error::from)?,
        (Some(_), false) => None,
    };
    Ok(Replaceable { digest, save: None })
}

/// Returns how many of the lowest layers stay.
async fn kept(
    args: &ImageSquash,
    base: Option<Target>,
    registries: &Registries,
    config: &[u8],
    total: usize,
) -> anyhow::Result<usize> {
    let failed = |name: &str, reason: String| save::Error::ImageUnreadable {
        name: name.to_owned(),
        reason,
    };
    let ids = history::diff_ids(config).map_err(|reason| failed(&args.image, reason))?;
    if ids.len() != total {
        let reason = format!(
            "its config lists {}, its manifest {total}",
            count(ids.len(), "layer", "layers")
        );
        return Err(failed(&args.image, reason).into());
    }
    let keep = match (base, &args.base) {
        (Some(target), Some(name)) => {
            let base = reading::open(target, registries, name).await?;
            let config = base.config().await.map_err(|error| error.of(name))?;
            let below = history::diff_ids(&config).map_err(|reason| failed(name, reason))?;
            if !ids.starts_with(&below) {
                let reason = format!("its layers are not the lowest ones of {}", args.image);
                let name = name.clone();
                return Err(save::Error::BaseUnusable { name, reason }.into());
            }
            below.len()
        }
        _ => total - history::saved_layers(config).min(total),
    };
    if keep == total {
        let why = "no layer is of a save, by the image's history: name the image below with --base";
        return Err(Usage(why.to_owned()).into());
    }
    Ok(keep)
}

fn summary(view: &SquashView) -> String {
    format!(
        "{}\n{} of {} became one of {}, on {} of the base\n",
        view.image,
        count(view.squashed_layers, "layer", "layers"),
        size(view.before_bytes),
        size(view.layer.size),
        count(view.base_layers, "layer", "layers"),
    )
}
