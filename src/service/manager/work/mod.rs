//! The background work of a manager: applies reports of agents (`hear`), answers their questions (`words`), executes
//! requests to the queue (`errands`), compares the record with the queue (`reconcile`), and deletes old data. Several
//! managers do this at the same time, because every change is written only over the version that it is based on.

mod errands;
mod hear;
mod reconcile;
mod words;

use std::future::Future;
use std::time::Duration;

use errands::errands;
use hear::hear;
use reconcile::reconcile;

use super::App;
use crate::service::queue;
use crate::service::record;

/// Interval at which the outbox is polled. Requests of this manager are executed at once.
const ERRANDS_EVERY: Duration = Duration::from_secs(1);
/// Delay after an error, which means that the record or the queue is unavailable.
const PAUSE: Duration = Duration::from_secs(1);
const FORGET_EVERY: Duration = Duration::from_secs(600);
const MEASURE_EVERY: Duration = Duration::from_secs(10);

/// Why a round of background work ended early. The next round starts over.
#[derive(Debug, thiserror::Error)]
enum Trouble {
    #[error(transparent)]
    Record(#[from] record::Error),
    #[error(transparent)]
    Queue(#[from] queue::Error),
}

/// Runs until the manager ends. An interruption leaves nothing half done, because each step is one transaction and the
/// next round or another manager continues.
pub(super) async fn run(app: App) {
    tokio::join!(
        hear(&app),
        rounds(&app, "errands", ERRANDS_EVERY, true, || errands(&app)),
        reconcile(&app),
        words::answer(&app),
        rounds(&app, "forget", FORGET_EVERY, false, || forget(&app)),
        rounds(&app, "measure", MEASURE_EVERY, false, || measure(&app)),
        app.hub.run(
            &app.record,
            &app.queue,
            app.options.watch_every,
            &app.cancel
        ),
    );
}

/// Runs a task at regular intervals and, if `woken`, also when the outbox is notified.
async fn rounds<F: Future<Output = Result<(), Trouble>>>(
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
            () = app.errands.notified(), if woken => {}
        }
    }
}

async fn forget(app: &App) -> Result<(), Trouble> {
    let gone = app.record.forget(app.options.retention).await?;
    if gone > 0 {
        tracing::info!(saves = gone, "old saves are forgotten");
    }
    Ok(())
}

async fn measure(app: &App) -> Result<(), Trouble> {
    app.metrics.record(&app.record.counts().await?);
    let depth = app.queue.depth().await;
    app.metrics.queue(depth.as_ref().ok().copied());
    let nodes = app.inventory.nodes(&app.queue).await?;
    let alive = nodes.iter().filter(|node| node.is_alive()).count();
    app.metrics.nodes(alive, nodes.len() - alive);
    depth?;
    Ok(())
}
