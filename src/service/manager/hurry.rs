//! Has a save run at normal priority, where the administrator of its node allows it.

use axum::extract::State as Extracted;
use axum::http::StatusCode;
use axum::response::Response;

use super::App;
use super::api::Save as Shown;
use super::auth::Caller;
use super::extract::Path;
use super::refusal::Refusal;
use super::saves::{accepted, get};
use super::standing::standings;
use crate::service::job::JobId;

/// Has a queued or running save run at normal priority instead of in the background. 403 if the agent of its node runs
/// without `--allow-hurry`. A repeated call changes nothing.
#[utoipa::path(
    post, path = "/api/v1/saves/{id}/hurry", tag = "saves",
    params(("id" = JobId, Path)),
    responses((status = 202, body = Shown, description = "Its agent is told"), Refusal)
)]
pub(super) async fn hurry(
    Extracted(app): Extracted<App>,
    caller: Caller,
    Path(id): Path<String>,
) -> Result<Response, Refusal> {
    let save = get(&app, &caller, &id).await?;
    let standing = standings(&app, std::slice::from_ref(&save)).await;
    let allowed = standing.get(&save.id).is_none_or(|known| known.can_hurry);
    if !allowed {
        // While the queue does not answer, no node is known.
        app.inventory.nodes(&app.queue).await?;
        return Err(Refusal::new(
            StatusCode::FORBIDDEN,
            "not_permitted",
            format!(
                "saves on node {} cannot be hurried: its agent runs without --allow-hurry, or without a background, or is \
                 not heard of",
                save.node
            ),
        ));
    }
    let changed = app
        .record
        .change(save.id, &caller.name, |draft| {
            draft.request_hurry(&caller.name)
        })
        .await?;
    let (save, wanted) = changed.ok_or_else(|| Refusal::not_found("there is no such save"))?;
    if !wanted {
        return Err(Refusal::new(
            StatusCode::CONFLICT,
            "too_late",
            "this save has ended, or is being cancelled",
        ));
    }
    app.hub.touch(&[save.id]);
    app.outbox_wake.notify_one();
    Ok(accepted(&app, &save).await)
}
