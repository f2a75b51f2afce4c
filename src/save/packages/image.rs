//! The packages by which an image differs from its base or from another image, from its layers.

use super::{ASKED, ASKED_BYTES};
use crate::image::packages::layers;
use crate::image::packages::{Installed, Packages};
use crate::image::verify::archive::ArchiveError;
use crate::save::Error;
use crate::save::history::saved_layers;
use crate::save::source::{Image, LayerReader, SourceError};

/// Returns the packages of an image: those by which it differs from the layers that no save made or, with `earlier`,
/// from another image. Reads all layers of both.
pub(crate) async fn of_image(image: &Image, earlier: Option<&Image>) -> Result<Packages, Error> {
    let failed = |error: SourceError| error.of(&image.name());
    let readers = image.layers().map_err(failed)?;
    let own = match earlier {
        Some(_) => 0,
        None => saved_layers(&image.config().await.map_err(failed)?),
    };
    let below = readers.len().saturating_sub(own);
    let before = earlier.map(Image::layers).transpose().map_err(failed)?;
    let compared = tokio::task::spawn_blocking(move || {
        let mut now = Installed::default();
        let mut before = before.map(installed).transpose()?;
        for (at, reader) in readers.into_iter().enumerate() {
            if at == below && own > 0 {
                before = Some(now.clone());
            }
            apply(&mut now, reader)?;
        }
        Ok::<_, ArchiveError>(match before {
            Some(before) => Packages::between(&before, &now),
            None => {
                let mut all = Packages::between(&Installed::default(), &now);
                all.note("no layer is of a save: all packages of the image are listed");
                all
            }
        })
    });
    let compared = compared.await.map_err(|_| Error::Worker)?;
    let compared = compared.map_err(|error| Error::ImageUnreadable {
        name: image.name(),
        reason: error.to_string(),
    })?;
    Ok(compared.limited(ASKED, ASKED_BYTES))
}

fn installed(readers: Vec<LayerReader>) -> Result<Installed, ArchiveError> {
    let mut all = Installed::default();
    for reader in readers {
        apply(&mut all, reader)?;
    }
    Ok(all)
}

fn apply(installed: &mut Installed, reader: LayerReader) -> Result<(), ArchiveError> {
    let reader = reader.map_err(|source| ArchiveError::Io { offset: 0, source })?;
    layers::apply(installed, reader)
}
