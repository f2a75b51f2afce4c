//! Executes the requests to the queue from the outbox: offers and withdraws orders.

use std::time::Duration;

use futures_util::StreamExt as _;

use super::{PAUSE, Trouble};
use crate::service::job::{JobId, Order, State, now_ms};
use crate::service::manager::App;
use crate::service::queue::{Offered, Withdrawn};
use crate::service::record::{Errand, Save, Taken};

const ERRANDS: u32 = 200;
const ERRANDS_AT_ONCE: usize = 16;

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
        attempt: save.attempt,
        fence_after: save.fence,
        issued_ms: now_ms,
        not_before_ms: save.not_before_ms,
        expires_ms: now_ms + ms(app.options.order_expiry),
        timeout_s: app.options.timeout.as_secs().max(1),
    }
}

/// Executes all requests in the outbox that are due.
pub(super) async fn errands(app: &App) -> Result<(), Trouble> {
    loop {
        let taken = app.record.take_errands(&app.name, ERRANDS).await?;
        let full = taken.len() >= ERRANDS as usize;
        let done: Vec<Result<(), Trouble>> = futures_util::stream::iter(taken)
            .map(|taken| errand(app, taken))
            .buffer_unordered(ERRANDS_AT_ONCE)
            .collect()
            .await;
        done.into_iter().collect::<Result<Vec<()>, _>>()?;
        if !full || app.cancel.is_cancelled() {
            return Ok(());
        }
    }
}

async fn errand(app: &App, taken: Taken) -> Result<(), Trouble> {
    let done = match taken.errand {
        Errand::Offer => offer(app, taken.save).await,
        Errand::Withdraw => withdraw(app, taken.save).await,
    };
    match done {
        Ok(()) => app.record.errand_done(&app.name, &taken).await?,
        Err(error) => {
            app.record.errand_failed(&app.name, &taken, PAUSE).await?;
            return Err(error);
        }
    }
    Ok(())
}

async fn offer(app: &App, id: JobId) -> Result<(), Trouble> {
    let Some(save) = app.record.save(id).await? else {
        return Ok(());
    };
    if save.state != State::Queued || save.cancelling {
        return Ok(());
    }
    let offered = app.queue.offer(&order(app, &save)).await?;
    tracing::debug!(job = %id, attempt = save.attempt, known = offered == Offered::Known, "an order is out");
    Ok(())
}

async fn withdraw(app: &App, id: JobId) -> Result<(), Trouble> {
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
                Withdrawn::Taken => {
                    draft.end("taken back before an agent had it");
                }
                Withdrawn::Unknown if save.state == State::Queued => {
                    draft.end("taken back before it was offered");
                }
                Withdrawn::TooLate => draft.too_late_to_end(),
                Withdrawn::Told | Withdrawn::Unknown => {}
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
