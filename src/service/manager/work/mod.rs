//! The background work of a manager: applies reports of agents (`reports`), answers their questions (`questions`), executes
//! requests to the queue (`outbox`), asks for saves of sessions that have ended (`ended`) and for autosaves (`autosave`),
//! deletes images of autosaves that are not needed any more (`thin`, as `thinning` and `times` decide), compares the record with the
//! queue (`reconcile`), and deletes old data. Several managers do this at the same time, because every change is written
//! only over the version that it is based on.

mod autosave;
mod ended;
mod notices;
mod outbox;
mod questions;
mod reconcile;
mod reports;
mod retry;
mod thin;
mod thinning;
mod times;
mod turns;

use std::future::Future;
use std::time::Duration;

use outbox::execute_due;
use reconcile::reconcile;
use reports::process_reports;

use super::{App, kept};
use crate::service::queue;
use crate::service::ready;
use crate::service::record;

/// Interval at which the outbox is polled. Requests of this manager are executed at once.
const OUTBOX_INTERVAL: Duration = Duration::from_secs(1);
/// Delay after an error, which means that the record or the queue is unavailable.
const ERROR_DELAY: Duration = Duration::from_secs(1);
const FORGET_EVERY: Duration = Duration::from_secs(600);
const MEASURE_EVERY: Duration = Duration::from_secs(10);
/// Interval at which it is checked whether the record answers. With the time for a check, an outage is known within 5 s.
const REACH_EVERY: Duration = Duration::from_secs(1);

/// Why a round of background work ended early. The next round starts over.
#[derive(Debug, thiserror::Error)]
enum TaskError {
    #[error(transparent)]
    Record(#[from] record::Error),
    #[error(transparent)]
    Queue(#[from] queue::Error),
}

/// Runs until the manager ends. An interruption leaves nothing half done, because each step is one transaction and the
/// next round or another manager continues.
pub(super) async fn run(app: App) {
    tokio::join!(
        process_reports(&app),
        run_periodically(&app, "errands", OUTBOX_INTERVAL, true, || execute_due(&app)),
        reconcile(&app),
        watch_record(&app),
        questions::answer(&app),
        ended::save_ended(&app),
        autosave::save_due(&app),
        thin::thin_images(&app),
        run_periodically(&app, "forget", FORGET_EVERY, false, || delete_old_saves(
            &app
        )),
        run_periodically(&app, "measure", MEASURE_EVERY, false, || update_gauges(
            &app
        )),
        notices::deliver(&app),
        app.hub.run(&app),
    );
}

/// Runs a task at regular intervals and, if `woken`, also when the outbox is notified.
async fn run_periodically<F: Future<Output = Result<(), TaskError>>>(
    app: &App,
    task: &'static str,
    every: Duration,
    woken: bool,
    mut round: impl FnMut() -> F,
) {
    loop {
        if let Err(error) = round().await {
            tracing::warn!(task, error = %error, "a round of background work failed");
            app.metrics.error(task);
        }
        tokio::select! {
            () = app.cancel.cancelled() => return,
            () = tokio::time::sleep(every) => {}
            () = app.outbox_wake.notified(), if woken => {}
        }
    }
}

/// Logs when the record stops and starts to answer, with the reason and its host.
async fn watch_record(app: &App) {
    loop {
        match app.record.check_reachable().await {
            record::Change::None => {}
            record::Change::Down(error) => {
                tracing::error!(%error, "the record does not answer: until it does, requests get 503");
                ready::say_status(&error.to_string());
                app.metrics.error("record");
            }
            record::Change::Up => {
                let at = app.record.address();
                tracing::warn!(record = at, "the record answers again");
                ready::say_status(&format!("ready, record in {at}"));
            }
        }
        tokio::select! {
            () = app.cancel.cancelled() => return,
            () = tokio::time::sleep(REACH_EVERY) => {}
        }
    }
}

async fn delete_old_saves(app: &App) -> Result<(), TaskError> {
    kept::forget(app).await?;
    let gone = app.record.forget(app.options.retention).await?;
    if gone > 0 {
        tracing::info!(saves = gone, "old saves are forgotten");
    }
    Ok(())
}

async fn update_gauges(app: &App) -> Result<(), TaskError> {
    app.metrics.record(&app.record.counts().await?);
    app.metrics.notices_waiting(
        app.record.notices_waiting().await?,
        app.record.notices_dropped(),
    );
    let depth = app.queue.depth().await;
    app.metrics.queue(depth.as_ref().ok().copied());
    let sessions = app.inventory.sessions(&app.queue).await;
    let nodes = app.inventory.nodes(&app.queue).await?;
    let alive = nodes.iter().filter(|node| node.is_alive()).count();
    app.metrics.nodes(alive, nodes.len() - alive);
    kept::keep(app, &sessions?).await?;
    depth?;
    Ok(())
}
