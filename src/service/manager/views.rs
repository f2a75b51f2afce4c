//! Saves as the API shows them: with what holds them back and what became of their images.

use super::App;
use super::api::{
    ImageFate, ImageState, Progress, Save as Shown, SaveError, Waiting, WaitingReason, Warning,
};
use super::refusal::Refusal;
use super::standing::{Standing, standings};
use super::time::rfc3339;
use crate::service::job::{State, WaitReason, now_ms};
use crate::service::record::{Fate, Save};

/// Returns what holds a save back. What its own process says is more exact than what follows from its node's load, unless
/// the node is not heard of.
fn waiting(save: &Save, standing: &Standing) -> Option<Waiting> {
    let of_node = standing.waiting.as_ref();
    let lost = of_node.is_some_and(|waiting| waiting.reason == WaitingReason::Node);
    let held = save.held.filter(|_| save.state == State::Running && !lost);
    let Some(held) = held.filter(|held| held.until_ms.is_none_or(|end| end > now_ms())) else {
        return standing.waiting.clone();
    };
    Some(Waiting {
        reason: match held.reason {
            WaitReason::Writers => WaitingReason::Writers,
            WaitReason::Registry => WaitingReason::Registry,
            WaitReason::OtherSave => WaitingReason::OtherSave,
        },
        node: save.node.clone(),
        until: held.until_ms.map(rfc3339),
    })
}

/// Converts a save to its representation in the API.
pub(super) fn shown(save: &Save, standing: &Standing) -> Shown {
    let left = |progress: &crate::service::record::Progress| {
        let rate = progress.rate.filter(|rate| *rate > 0.0)?;
        Some(progress.bytes_total.saturating_sub(progress.bytes_done) as f64 / rate)
    };
    let open = !save.state.is_final();
    Shown {
        id: save.id,
        session: save.session.clone(),
        session_name: save.session_name.clone(),
        node: save.node.clone(),
        user: save.user.clone(),
        name: save.name.clone(),
        tag: save.tag.clone(),
        target: save.destination.clone(),
        message: save.message.clone(),
        state: save.state,
        phase: save.phase,
        since: save.since_ms.map(rfc3339),
        place: standing.place.filter(|_| save.state == State::Queued),
        waiting: waiting(save, standing).filter(|_| open),
        made_by: save.made_by(),
        attempt: save.attempt,
        progress: save.progress.map(|progress| Progress {
            bytes_done: progress.bytes_done,
            bytes_total: progress.bytes_total,
            base_done: progress.base_done,
            base_total: progress.base_total,
            bytes_sent: progress.bytes_sent,
            entries_total: progress.entries_total,
            rate: progress.rate.filter(|_| open),
            seconds_left: left(&progress).filter(|_| open),
        }),
        pause_ms: save.pause_ms,
        warnings: save
            .warnings
            .iter()
            .map(|remark| Warning {
                code: remark.code.clone(),
                message: remark.message.clone(),
            })
            .collect(),
        result: save.result.clone(),
        error: save.error.as_ref().map(|failure| SaveError {
            code: failure.code,
            message: failure.message.clone(),
            retryable: failure.retryable,
        }),
        image: None,
        cancelling: save.cancelling,
        hurried: save.hurried,
        can_hurry: standing.can_hurry && open && !save.hurried && !save.cancelling,
        created: rfc3339(save.created_ms),
        started: save.started_ms.map(rfc3339),
        finished: save.finished_ms.map(rfc3339),
        version: save.version,
    }
}

pub(super) async fn show(app: &App, save: &Save) -> Shown {
    let mut standings = standings(app, std::slice::from_ref(save)).await;
    shown(save, &standings.remove(&save.id).unwrap_or_default())
}

/// Converts what became of an image to its representation in the API.
pub(super) fn shown_fate(fate: Option<&Fate>) -> ImageFate {
    let tagged = ImageFate {
        state: ImageState::Tagged,
        at: None,
        save: None,
        session_name: None,
        caller: None,
        renamed_to: None,
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
        Some(Fate::Deleted {
            at_ms,
            by,
            renamed_to,
        }) => ImageFate {
            state: match renamed_to {
                Some(_) => ImageState::Renamed,
                None => ImageState::Deleted,
            },
            renamed_to: renamed_to.clone(),
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
