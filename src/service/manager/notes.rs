//! What owners say about their images, as it is shown and as it is obeyed.

use std::collections::BTreeMap;

use axum::http::StatusCode;

use super::App;
use super::api::ImageView;
use super::refusal::Refusal;
use crate::service::record::{ImageKey, Note};

/// Adds what is said about images.
pub(super) fn annotate(views: &mut [ImageView], notes: &BTreeMap<ImageKey, Note>) {
    for view in views {
        let key = ImageKey::new(&view.user, &view.name, view.digest.clone());
        if let Some(note) = notes.get(&key) {
            view.pinned = note.pinned;
            view.shared.clone_from(&note.shared);
            view.shared_groups.clone_from(&note.groups);
            if note.description.is_some() {
                view.message.clone_from(&note.description);
            }
        }
    }
}

/// Fails if an image is pinned.
pub(super) async fn check_unpinned(app: &App, key: &ImageKey) -> Result<(), Refusal> {
    if app.record.is_pinned(key).await? {
        return Err(Refusal::new(
            StatusCode::CONFLICT,
            "image_pinned",
            "the image is pinned: unpin it first",
        ));
    }
    Ok(())
}
