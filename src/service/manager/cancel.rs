//! Cancels saves: in the record, and in the queue as soon as that answers.

use axum::http::StatusCode;

use super::App;
use super::refusal::Refusal;
use crate::service::job::State;
use crate::service::queue::Withdrawn;
use crate::service::record::{Draft, Save};

/// Cancels a save for `caller`, and returns it as it is then.
pub(super) async fn cancel_save(app: &App, caller: &str, save: Save) -> Result<Save, Refusal> {
    cancel_because(app, caller, &format!("{caller} asked for its end"), save).await
}

/// Cancels a save for `caller` as [`cancel_save`] does, for the reason `why`, which the audit log gets.
pub(super) async fn cancel_because(
    app: &App,
    caller: &str,
    why: &str,
    save: Save,
) -> Result<Save, Refusal> {
    let gone = || Refusal::not_found("there is no such save");
    let wanted = app
        .record
        .change(save.id, caller, |draft| draft.request_cancel(why))
        .await?
        .ok_or_else(gone)?;
    let (mut save, wanted) = wanted;
    if !wanted {
        if save.state == State::Cancelled {
            return Ok(save);
        }
        return Err(too_late("it has ended already"));
    }
    app.hub.touch(&[save.id]);
    // The request is in the record already. If the queue cannot be reached, the background work delivers it later.
    match app.queue.withdraw(save.id).await {
        Ok(Withdrawn::TooLate) => {
            app.record
                .change(save.id, caller, Draft::cancel_too_late)
                .await?;
            app.hub.touch(&[save.id]);
            return Err(too_late("its tag is being put on at this moment"));
        }
        Ok(Withdrawn::Removed) => {
            save = end(app, &save, caller).await?.unwrap_or(save);
        }
        Ok(Withdrawn::Unknown) if save.state == State::Queued => {
            save = end(app, &save, caller).await?.unwrap_or(save);
        }
        Ok(Withdrawn::CancelRequested | Withdrawn::Unknown) => {}
        Err(error) => {
            tracing::warn!(job = %save.id, error = %error, "the queue hears of a cancellation later");
        }
    }
    app.hub.touch(&[save.id]);
    Ok(save)
}

async fn end(app: &App, save: &Save, actor: &str) -> Result<Option<Save>, Refusal> {
    let ended = app
        .record
        .change(save.id, actor, |draft| {
            if draft.save().cancelling {
                draft.end("");
            }
        })
        .await?;
    let Some((ended, ())) = ended else {
        return Ok(None);
    };
    if ended.state.is_final() && !save.state.is_final() {
        app.metrics.ended(&ended);
    }
    Ok(Some(ended))
}

fn too_late(why: &str) -> Refusal {
    Refusal::new(
        StatusCode::CONFLICT,
        "too_late",
        format!("this save cannot be cancelled any more: {why}"),
    )
}
