//! The packages by which an image differs from its base or from another image, from its layers.

use super::{ASKED, ASKED_BYTES};
use crate::image::packages::layers;
use crate::image::packages::{Installed, Packages};
use crate::image::verify::archive::ArchiveError;
use crate::save::Error;
use crate::save::history::saved_layers;
use crate::save::source::{Image, LayerReader, SourceError};

/// Returns the packages of an image: those by which it differs from the layers that no save made or, with `earlier`,
/// from another image. Reads all layers of both, those that they have in common once.
pub(crate) async fn of_image(image: &Image, earlier: Option<&Image>) -> Result<Packages, Error> {
    let failed = |error: SourceError| error.of(&image.name());
    let mut below = image.layers().map_err(failed)?;
    let (before, after, whole) = if let Some(earlier) = earlier {
        let common = image.common_layers(earlier);
        let mut before = earlier.layers().map_err(failed)?;
        (before.split_off(common), below.split_off(common), false)
    } else {
        let own = saved_layers(&image.config().await.map_err(failed)?);
        let own = below.split_off(below.len().saturating_sub(own));
        if own.is_empty() {
            (Vec::new(), std::mem::take(&mut below), true)
        } else {
            (Vec::new(), own, false)
        }
    };
    let compared = tokio::task::spawn_blocking(move || of_layers(below, before, after));
    let compared = compared.await.map_err(|_| Error::Worker)?;
    let mut compared = compared.map_err(|error| Error::ImageUnreadable {
        name: image.name(),
        reason: error.to_string(),
    })?;
    if whole {
        compared.note("no layer is of a save: all packages of the image are listed");
    }
    Ok(compared)
}

/// Returns the packages by which the layers `after` differ from the layers `before`, both on top of `below`; each bottom
/// first. Every layer is read once.
pub(crate) fn of_layers(
    below: Vec<LayerReader>,
    before: Vec<LayerReader>,
    after: Vec<LayerReader>,
) -> Result<Packages, ArchiveError> {
    let mut was = Installed::default();
    apply(&mut was, below)?;
    let mut is = was.clone();
    apply(&mut was, before)?;
    apply(&mut is, after)?;
    Ok(Packages::between(&was, &is).limited(ASKED, ASKED_BYTES))
}

fn apply(installed: &mut Installed, readers: Vec<LayerReader>) -> Result<(), ArchiveError> {
    for reader in readers {
        let reader = reader.map_err(|source| ArchiveError::Io { offset: 0, source })?;
        layers::apply(installed, reader)?;
    }
    Ok(())
}
