//! Delivers the notices of the record's outbox. Those to the site's receivers, those to users' own and e-mails have places
//! of their own, and of one receiver or user only a few are under way, so that whoever hangs holds up only itself.

use std::time::Duration;

use tokio::task::JoinSet;

use super::TaskError;
use crate::service::job::now_ms;
use crate::service::manager::App;
use crate::service::manager::api::SaveNotice;
use crate::service::manager::standing::Standing;
use crate::service::manager::time::rfc3339;
use crate::service::manager::views::shown;
use crate::service::manager::webhooks::Delivery;
use crate::service::record::{Audience, Notice, ReceiverKind};

/// Interval at which the outbox is polled.
const INTERVAL: Duration = Duration::from_secs(1);
/// Maximum number of webhooks under way to the site's receivers, and again to users' own.
const CONCURRENCY: usize = 32;
/// Maximum number of e-mails under way, each with a connection to the server.
const MAILS: usize = 8;
/// Maximum number of them of one receiver of the site, or of one user.
const OF_EACH: u32 = 4;
/// The task, in the log and in metrics.
const TASK: &str = "notices";

/// Delivers until the manager ends.
pub(super) async fn deliver(app: &App) {
    tokio::join!(
        deliver_to(app, Audience::Site, CONCURRENCY),
        deliver_to(app, Audience::Users, CONCURRENCY),
        deliver_to(app, Audience::Mail, MAILS)
    );
}

async fn deliver_to(app: &App, audience: Audience, most: usize) {
    let mut running = JoinSet::new();
    loop {
        let room = most.saturating_sub(running.len());
        if room > 0 {
            match app
                .record
                .take_notices(&app.name, audience, room as u32, OF_EACH)
                .await
            {
                Ok(taken) => {
                    for notice in taken {
                        let app = app.clone();
                        running.spawn(async move { deliver_one(&app, &notice).await });
                    }
                }
                Err(error) => failed(app, &error.into()),
            }
        }
        tokio::select! {
            () = app.cancel.cancelled() => break,
            () = tokio::time::sleep(INTERVAL) => {}
            Some(done) = running.join_next() => {
                if let Ok(Err(error)) = done {
                    failed(app, &error);
                }
            }
        }
    }
    // They end soon, because each has a time limit. What is not noted is delivered again.
    while running.join_next().await.is_some() {}
}

fn failed(app: &App, error: &TaskError) {
    tracing::warn!(task = TASK, error = %error, "a round of background work failed");
    app.metrics.error(TASK);
}

async fn deliver_one(app: &App, notice: &Notice) -> Result<(), TaskError> {
    let delivery = match notice.kind {
        ReceiverKind::Webhook => {
            let message = SaveNotice {
                event: notice.event,
                timestamp: rfc3339(notice.at_ms),
                data: shown(&notice.save, &Standing::default()),
            };
            app.webhooks.send(notice, &message).await
        }
        ReceiverKind::Email => match &app.mailer {
            Some(mailer) => mailer.send(notice).await,
            None => Delivery::Refused("no server for e-mails is set any more".to_owned()),
        },
    };
    let (job, event) = (notice.save.id, notice.event.name());
    let (reason, after) = match delivery {
        Delivery::Done => {
            tracing::debug!(job = %job, event, notice = notice.id, "a notice is delivered");
            app.metrics.notice(notice.site, "delivered");
            return Ok(app.record.notice_done(&app.name, notice).await?);
        }
        Delivery::Failed(reason, after) => (reason, after),
        Delivery::Refused(reason) => return give_up(app, notice, &reason).await,
    };
    let age = Duration::from_millis(now_ms().saturating_sub(notice.at_ms).max(0) as u64);
    let settings = &app.options.webhooks;
    let tries = notice.tries.saturating_add(1);
    let Some(pause) = settings.pause(tries, age, rand::random()) else {
        return give_up(app, notice, &reason).await;
    };
    let pause = pause.max(after.unwrap_or_default().min(settings.backoff_most));
    tracing::info!(job = %job, event, notice = notice.id, site = notice.site, tries, reason, "a notice is sent again later");
    app.metrics.notice(notice.site, "retried");
    Ok(app.record.notice_failed(&app.name, notice, pause).await?)
}

async fn give_up(app: &App, notice: &Notice, reason: &str) -> Result<(), TaskError> {
    tracing::warn!(
        job = %notice.save.id, event = notice.event.name(), notice = notice.id, site = notice.site, tries = notice.tries,
        reason, "a notice is given up"
    );
    app.metrics.notice(notice.site, "given_up");
    Ok(app.record.notice_done(&app.name, notice).await?)
}
