//! Moves reports of agents from the queue into the record.

use std::collections::HashMap;
use std::time::Duration;

use super::ERROR_DELAY;
use crate::service::job::{Event, JobId, Report, State, Update};
use crate::service::manager::App;
use crate::service::record::{self, MadeBy, Policy, Progress, Save};

/// Maximum number of reports per transaction.
const REPORTS: usize = 200;
const REPORTS_WAIT: Duration = Duration::from_secs(5);
/// Weight of the latest interval in the displayed rate.
const SMOOTHING: f64 = 0.3;
/// Maximum number of saves whose rates are remembered.
const MAX_RATES: usize = 20_000;

/// Computes bytes per second from consecutive progress reports of a save.
#[derive(Default)]
struct TransferRates(HashMap<JobId, (u64, Progress)>);

impl TransferRates {
    fn next(&mut self, report: &Report, mut progress: Progress) -> Progress {
        if self.0.len() > MAX_RATES {
            self.0.clear();
        }
        let before = self
            .0
            .get(&report.job)
            .filter(|(fence, _)| *fence == report.fence);
        if let Some((_, before)) = before {
            let seconds = progress.at_ms.saturating_sub(before.at_ms) as f64 / 1000.0;
            let bytes = progress.bytes_done.saturating_sub(before.bytes_done) as f64;
            progress.rate = before.rate;
            if seconds > 0.05 {
                let now = bytes / seconds;
                let smooth = before
                    .rate
                    .map_or(now, |rate| rate + SMOOTHING * (now - rate));
                progress.rate = Some(smooth);
            }
        }
        self.0.insert(report.job, (report.fence, progress));
        progress
    }
}

fn progress_of(report: &Report) -> Option<Progress> {
    match &report.update {
        Update::Event {
            event:
                Event::Progress {
                    bytes_done,
                    bytes_total,
                    bytes_sent,
                    entries_total,
                    base_done,
                    base_total,
                },
        } => Some(Progress {
            bytes_done: bytes_done.saturating_add(*base_done),
            bytes_total: bytes_total.saturating_add(*base_total),
            base_done: *base_done,
            base_total: *base_total,
            bytes_sent: *bytes_sent,
            entries_total: *entries_total,
            rate: None,
            at_ms: report.at_ms,
        }),
        _ => None,
    }
}

/// Applies reports of agents until the manager ends. A report is acknowledged only after it has been recorded.
pub(super) async fn process_reports(app: &App) {
    let mut rates = TransferRates::default();
    loop {
        let delivered = tokio::select! {
            () = app.cancel.cancelled() => return,
            delivered = app.queue.reports(&app.name, REPORTS, REPORTS_WAIT) => delivered,
        };
        let delivered = match delivered {
            Ok(delivered) if delivered.is_empty() => continue,
            Ok(delivered) => delivered,
            Err(error) => {
                tracing::warn!(error = %error, "agents cannot be heard");
                app.metrics.error("hear");
                pause(app).await;
                continue;
            }
        };
        let (entries, reports): (Vec<_>, Vec<_>) = delivered
            .into_iter()
            .map(|delivered| (delivered.entry, delivered.report))
            .unzip();
        while let Err(error) = apply_reports(app, &reports, &mut rates).await {
            tracing::warn!(error = %error, reports = reports.len(), "reports cannot be taken in yet");
            app.metrics.error("hear");
            pause(app).await;
            if app.cancel.is_cancelled() {
                // Not acknowledged, so the queue delivers them again.
                return;
            }
        }
        app.metrics.reports(reports.len());
        if let Err(error) = app.queue.acknowledge(&entries).await {
            // They will be delivered again and recognized as known.
            tracing::warn!(error = %error, "reports are in the record, and the queue does not know");
        }
    }
}

async fn pause(app: &App) {
    tokio::select! {
        () = app.cancel.cancelled() => {}
        () = tokio::time::sleep(ERROR_DELAY) => {}
    }
}

async fn apply_reports(
    app: &App,
    reports: &[Report],
    rates: &mut TransferRates,
) -> Result<(), record::Error> {
    let changed = match app.record.apply_reports(reports, &app.policy).await {
        Ok(changed) => changed,
        // A save that cannot be read or written must not block the reports of others.
        Err(error) if error.is_of_one_save() => apply_one_by_one(app, reports, &app.policy).await?,
        Err(error) => return Err(error),
    };
    let mut newest = HashMap::<JobId, &Report>::new();
    for report in reports {
        if progress_of(report).is_some() {
            let entry = newest.entry(report.job).or_insert(report);
            if (report.fence, report.seq) > (entry.fence, entry.seq) {
                *entry = report;
            }
        }
    }
    let mut touched: Vec<JobId> = changed.iter().map(|save| save.id).collect();
    for report in newest.into_values() {
        if let Some(progress) = progress_of(report) {
            let progress = rates.next(report, progress);
            if app.record.apply_progress(report, &progress).await? {
                touched.push(report.job);
            }
        }
    }
    app.hub.touch(&touched);
    for save in &changed {
        on_save_changed(app, save).await;
        if save.state.is_final() {
            rates.0.remove(&save.id);
        }
    }
    Ok(())
}

async fn apply_one_by_one(
    app: &App,
    reports: &[Report],
    policy: &Policy,
) -> Result<Vec<Save>, record::Error> {
    let mut changed = Vec::new();
    for report in reports {
        match app
            .record
            .apply_reports(std::slice::from_ref(report), policy)
            .await
        {
            Ok(saves) => changed.extend(saves),
            Err(error) if error.is_of_one_save() => {
                tracing::error!(job = %report.job, error = %error, "a report is dropped");
            }
            Err(error) => return Err(error),
        }
    }
    Ok(changed)
}

/// Handles a save that was changed by a report.
async fn on_save_changed(app: &App, save: &Save) {
    let code = save
        .error
        .as_ref()
        .map_or("", |failure| failure.code.name());
    tracing::info!(
        job = %save.id, state = save.state.name(), attempt = save.attempt, fence = save.fence, code, node = save.node,
        "a save has changed"
    );
    if save.state.is_final() {
        app.metrics.ended(save);
        app.store.forget(&save.user).await;
        if save.state == State::Succeeded && save.made_by() == MadeBy::Autosave {
            app.autosaves.made(&save.user);
        }
    } else if save.state == State::Queued {
        app.metrics.retried();
        app.outbox_wake.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_of_one_claim() {
        let mut rates = TransferRates::default();
        let job = JobId::new();
        let mut at = |fence, at_ms, bytes_done| {
            let report = Report {
                job,
                node: "n".into(),
                attempt: 1,
                fence,
                seq: 0,
                at_ms,
                update: Update::Started,
            };
            let progress = Progress {
                bytes_done,
                at_ms,
                ..Progress::default()
            };
            rates.next(&report, progress).rate
        };
        assert_eq!(at(1, 0, 0), None);
        assert_eq!(at(1, 1000, 500), Some(500.0));
        assert_eq!(at(1, 1010, 510), Some(500.0));
        assert_eq!(at(2, 2000, 0), None);
    }
}
