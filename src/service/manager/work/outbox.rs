//! Executes the requests to the queue from the outbox: offers and withdraws orders.

use std::time::Duration;

use futures_util::StreamExt as _;

use super::{ERROR_DELAY, TaskError};
use crate::service::job::{JobId, Order, State, now_ms};
use crate::service::manager::App;
use crate::service::queue::{Offered, Withdrawn};
use crate::service::record::{MadeBy, OutboxAction, OutboxEntry, Save};

const BATCH: u32 = 200;
const CONCURRENCY: usize = 16;

fn order(app: &App, save: &Save) -> Order {
    let ms = |time: Duration| i64::try_from(time.as_millis()).unwrap_or(i64::MAX / 4);
    let now_ms = now_ms();
    Order {
        job: save.id,
        node: save.node.clone(),
        session: save.session.clone(),
        owner: save.owner.clone(),
        destination: save.destination.clone(),
        message: save.message.clone(),
        options: save.options.clone(),
        replaces: save.replaces.clone(),
        autosave: save.made_by() == MadeBy::Autosave,
        attempt: save.attempt,
        fence_after: save.fence,
        issued_ms: now_ms,
        not_before_ms: save.not_before_ms,
        expires_ms: now_ms + ms(app.options.order_expiry),
        timeout_s: app.options.timeout.as_secs().max(1),
    }
}

/// Executes all requests in the outbox that are due.
pub(super) async fn execute_due(app: &App) -> Result<(), TaskError> {
    loop {
        let taken = app.record.take_outbox(&app.name, BATCH).await?;
        let full = taken.len() >= BATCH as usize;
        let done: Vec<Result<(), TaskError>> = futures_util::stream::iter(taken)
            .map(|taken| execute(app, taken))
            .buffer_unordered(CONCURRENCY)
            .collect()
            .await;
        done.into_iter().collect::<Result<Vec<()>, _>>()?;
        if !full || app.cancel.is_cancelled() {
            return Ok(());
        }
    }
}

async fn execute(app: &App, taken: OutboxEntry) -> Result<(), TaskError> {
    let done = match taken.action {
        OutboxAction::Offer => offer(app, taken.save).await,
        OutboxAction::Withdraw => withdraw(app, taken.save).await,
        OutboxAction::Hurry => hurry(app, taken.save).await,
    };
    match done {
        Ok(()) => app.record.outbox_done(&app.name, &taken).await?,
        Err(error) => {
            app.record
                .outbox_failed(&app.name, &taken, ERROR_DELAY)
                .await?;
            return Err(error);
        }
    }
    Ok(())
}

async fn offer(app: &App, id: JobId) -> Result<(), TaskError> {
    let Some(save) = app.record.save(id).await? else {
        return Ok(());
    };
    if save.state != State::Queued || save.cancelling {
        return Ok(());
    }
    let offered = app.queue.offer(&order(app, &save)).await?;
    if save.hurried {
        app.queue.hurry(id).await?;
    }
    tracing::debug!(job = %id, attempt = save.attempt, known = offered == Offered::Known, "an order is out");
    Ok(())
}

/// A job that the queue does not know is marked when it is offered.
async fn hurry(app: &App, id: JobId) -> Result<(), TaskError> {
    app.queue.hurry(id).await?;
    Ok(())
}

async fn withdraw(app: &App, id: JobId) -> Result<(), TaskError> {
    let withdrawn = app.queue.withdraw(id).await?;
    let actor = format!("manager:{}", app.name);
    let changed = app
        .record
        .change(id, &actor, |draft| {
            let save = draft.save();
            if !save.cancelling {
                return;
            }
            match withdrawn {
                Withdrawn::Removed => {
                    draft.end("taken back before an agent had it");
                }
                Withdrawn::Unknown if save.state == State::Queued => {
                    draft.end("taken back before it was offered");
                }
                Withdrawn::TooLate => draft.cancel_too_late(),
                Withdrawn::CancelRequested | Withdrawn::Unknown => {}
            }
        })
        .await?;
    app.hub.touch(&[id]);
    if let Some((save, ())) = changed
        && save.state == State::Cancelled
    {
        app.metrics.ended(&save);
    }
    Ok(())
}
