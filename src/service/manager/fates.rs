//! What became of the images of saves, for the history.

use super::App;
use super::api::{ImageFate, ImageState, Save as Shown};
use super::refusal::Refusal;
use super::saves::shown;
use super::standing::standings;
use super::time::rfc3339;
use crate::service::record::{Fate, Save};

fn shown_fate(fate: Option<&Fate>) -> ImageFate {
    let tagged = ImageFate {
        state: ImageState::Tagged,
        at: None,
        save: None,
        session_name: None,
        caller: None,
    };
    match fate {
        None => tagged,
        Some(Fate::Replaced(by)) => ImageFate {
            state: ImageState::Replaced,
            at: by.finished_ms.map(rfc3339),
            save: Some(by.id),
            session_name: Some(by.session_name.clone()),
            ..tagged
        },
        Some(Fate::Deleted { at_ms, by }) => ImageFate {
            state: ImageState::Deleted,
            at: Some(rfc3339(*at_ms)),
            caller: Some(by.clone()).filter(|by| !by.is_empty()),
            ..tagged
        },
    }
}

/// Converts saves to their representation in the API, with their positions in the queue and what became of their
/// images.
pub(super) async fn show_all(app: &App, saves: &[Save]) -> Result<Vec<Shown>, Refusal> {
    let mut standings = standings(app, saves).await;
    let fates = app.record.fates(saves).await?;
    let all = saves.iter().map(|save| {
        let standing = standings.remove(&save.id).unwrap_or_default();
        let mut view = shown(save, &standing);
        view.image = save
            .result
            .as_ref()
            .map(|_| shown_fate(fates.get(&save.id)));
        view
    });
    Ok(all.collect())
}
