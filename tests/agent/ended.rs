//! Sessions that have ended: listed at once with the reason, and saved as their files are on disk.

use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::json;
use upperdeck::service::agent::SaveEnded;
use upperdeck::service::job::{Event, Outcome, Session, SessionEnd, Update};

use crate::node::{Node, STARTED, Service, local};

/// Nothing is looked at again within a test.
const NEVER: Duration = Duration::from_secs(3600);

/// Waits until the only session is as `is` says.
async fn session(service: &Service, is: impl Fn(&Session) -> bool) -> Result<Session> {
    let until = std::time::Instant::now() + Duration::from_secs(120);
    loop {
        let sessions = service.queue.sessions().await?;
        match sessions.as_slice() {
            [session] if is(session) => return Ok(session.clone()),
            _ => ensure!(std::time::Instant::now() < until, "{sessions:?}"),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_end_is_told_at_once_and_what_ended_is_saved() -> Result<()> {
    let Some(node) = Node::new().await? else {
        return Ok(());
    };
    let mut options = node.options();
    options.heartbeat_every = NEVER;
    options.inventory_every = NEVER;
    options.save_ended = SaveEnded::Failure;
    let service = Service::start(options, local());
    let running = session(&service, |session| session.ended.is_none()).await?;
    let state = json!({
        "Pid": 0, "ExitCode": 137, "OOMKilled": true, "StartedAt": STARTED, "FinishedAt": "2026-11-24T12:00:00Z",
    });
    node.die(&state).await?;
    let recorded = |session: &Session| {
        let end = session.ended.as_ref();
        end.is_some_and(|end| end.exit_code.is_some())
    };
    let ended = session(&service, recorded).await?;
    let at = "2026-11-24T12:00:00Z".parse::<jiff::Timestamp>()?;
    let end = SessionEnd {
        at_ms: Some(at.as_millisecond()),
        exit_code: Some(137),
        out_of_memory: true,
        save: true,
        by_pod: false,
        settled: true,
    };
    assert_eq!(ended.ended, Some(end));
    assert_eq!(ended.owner, running.owner);
    assert_eq!(
        ended.started_ms,
        STARTED.parse::<jiff::Timestamp>()?.as_millisecond()
    );
    assert!(service.queue.nodes().await?[0].to_save.is_some());

    let mut order = node.order();
    order.owner = "mallory".to_owned();
    service.queue.offer(&order).await?;
    let refused = service.outcome(order.job).await?;
    ensure!(matches!(refused, Outcome::Failed { .. }), "{refused:?}");
    let order = node.order();
    service.queue.offer(&order).await?;
    let outcome = service.outcome(order.job).await?;
    let Outcome::Succeeded { saved } = outcome else {
        anyhow::bail!("{outcome:?}");
    };
    assert_eq!(saved.pause_ms, None, "nothing is frozen");
    assert!(node.tagged() && saved.entries >= 2, "{saved:?}");
    let warned = service.reports_of(order.job).into_iter().any(|report| {
        matches!(&report.update, Update::Event { event: Event::Warning { code, message } }
            if code == "ended" && message.contains("out of memory"))
    });
    assert!(warned);
    // A session that ended and is removed is not listed any more, and cannot be saved.
    std::fs::remove_dir_all(node.path("docker/containers").join(&node.id))?;
    let order = node.order();
    service.queue.offer(&order).await?;
    let outcome = service.outcome(order.job).await?;
    ensure!(
        matches!(&outcome, Outcome::Failed { message, .. } if message.contains("was removed")),
        "{outcome:?}"
    );
    service.end().await?;
    Ok(())
}
