//! Changes a save: reads it, applies a decision, and writes the result only over the version that was read. If another
//! writer was faster, it starts over.

use std::collections::BTreeMap;

use sqlx::{Any, Row as _, Transaction};

use super::{Draft, Error, Policy, Progress, Record, Save, view, written};
use crate::service::job::{Event, JobId, Report, Update, now_ms};

/// Maximum number of attempts at the same change.
const MAX_ATTEMPTS: u32 = 30;

impl Record {
    /// Changes a save with `decide`, which may be called several times, each time with the current state of the save.
    /// Returns the save, whether or not it changed, and the last result of `decide`; `None` if there is no such save.
    ///
    /// Fails with [`Error::Contended`] if other writers keep changing the save, and with [`Error::Conflict`] if another
    /// open save has the same session or destination.
    pub async fn change<T>(
        &self,
        id: JobId,
        actor: &str,
        mut decide: impl FnMut(&mut Draft) -> T,
    ) -> Result<Option<(Save, T)>, Error> {
        for _ in 0..MAX_ATTEMPTS {
            let mut work = self.begin().await?;
            let Some(save) = view::get(&mut work, id).await? else {
                return Ok(None);
            };
            let mut draft = Draft::new(save, now_ms());
            let said = decide(&mut draft);
            if !draft.is_changed() && draft.actions.is_empty() {
                return Ok(Some((draft.into_save(), said)));
            }
            match write(self, &mut work, draft, actor).await {
                Ok(Some(save)) => {
                    work.commit().await?;
                    return Ok(Some((save, said)));
                }
                Ok(None) => {}
                Err(error) if is_unique(&error) => {
                    drop(work);
                    return Err(self.conflict(id, error).await);
                }
                Err(error) => return Err(error),
            }
        }
        Err(Error::Contended(id))
    }

    /// Changes a save as [`Record::change`] does, but only while its version is `version`. For decisions based on data
    /// other than the save itself. Returns `None` if the version differs.
    pub async fn change_at<T>(
        &self,
        id: JobId,
        version: u64,
        actor: &str,
        mut decide: impl FnMut(&mut Draft) -> T,
    ) -> Result<Option<(Save, T)>, Error> {
        let found = self
            .change(id, actor, |draft| {
                (draft.save().version == version).then(|| decide(draft))
            })
            .await?;
        Ok(found.and_then(|(save, said)| Some((save, said?))))
    }

    /// Applies reports of agents, each only once, all in one transaction. Returns the saves that changed.
    pub async fn apply_reports(
        &self,
        reports: &[Report],
        policy: &Policy,
    ) -> Result<Vec<Save>, Error> {
        // Grouped by save, so that two managers lock the rows in the same order; within a save ordered by fence and
        // sequence number.
        let mut by_save = BTreeMap::<JobId, Vec<&Report>>::new();
        for report in reports.iter().filter(|report| !is_progress(report)) {
            by_save.entry(report.job).or_default().push(report);
        }
        for reports in by_save.values_mut() {
            reports.sort_by_key(|report| (report.fence, report.seq));
        }
        let ids: Vec<JobId> = by_save.keys().copied().collect();
        'again: for _ in 0..MAX_ATTEMPTS {
            let mut changed = Vec::new();
            let mut work = self.begin().await?;
            for (id, reports) in &by_save {
                let Some(save) = view::get(&mut work, *id).await? else {
                    continue;
                };
                let mut draft = Draft::new(save, now_ms());
                let mut actor = "";
                for report in reports {
                    // Checked before the report is marked as processed; otherwise another node could use up the save's
                    // sequence numbers.
                    if report.node != draft.save().node {
                        continue;
                    }
                    if !is_new(&mut work, report).await? {
                        continue;
                    }
                    // That of an agent which has lost the save describes another image.
                    if let Update::Packages { packages } = &report.update
                        && report.fence >= draft.save().fence
                    {
                        super::packages::keep(&mut work, *id, packages).await?;
                    }
                    draft.apply_report(report, policy, rand::random());
                    actor = &report.node;
                }
                if !draft.is_touched() {
                    continue;
                }
                let counts = draft.is_changed();
                match write(self, &mut work, draft, &format!("node:{actor}")).await? {
                    Some(save) if counts => changed.push(save),
                    Some(_) => {}
                    None => continue 'again,
                }
            }
            work.commit().await?;
            return Ok(changed);
        }
        Err(Error::Contended(ids.first().copied().unwrap_or_default()))
    }

    /// Stores the progress of a save unless newer progress is known. Returns whether it was stored. Progress does not
    /// create a new version.
    pub async fn apply_progress(
        &self,
        report: &Report,
        progress: &Progress,
    ) -> Result<bool, Error> {
        let done = sqlx::query(
            "UPDATE saves SET progress = $1, progress_fence = $2, progress_seq = $3
             WHERE id = $4 AND node = $5 AND state IN ('queued', 'assigned', 'running')
             AND (progress_fence < $2 OR (progress_fence = $2 AND progress_seq < $3))",
        )
        .bind(written(report.job, progress)?)
        .bind(report.fence as i64)
        .bind(report.seq as i64)
        .bind(report.job.to_string())
        .bind(&report.node)
        .execute(&self.pool)
        .await?;
        Ok(done.rows_affected() > 0)
    }

    async fn conflict(&self, id: JobId, error: Error) -> Error {
        let found = async {
            let row = sqlx::query(
                "SELECT other.id AS id FROM saves AS other JOIN saves AS mine
                 ON other.session = mine.session OR other.destination = mine.destination
                 WHERE mine.id = $1 AND other.id <> mine.id
                 AND other.state IN ('queued', 'assigned', 'running')",
            )
            .bind(id.to_string())
            .fetch_optional(&self.pool)
            .await
            .ok()??;
            row.try_get::<String, _>("id").ok()?.parse().ok()
        };
        found.await.map_or(error, Error::Conflict)
    }
}

/// Returns whether a report contains only progress.
pub(super) fn is_progress(report: &Report) -> bool {
    matches!(
        &report.update,
        Update::Event {
            event: Event::Progress { .. } | Event::BaseProgress { .. }
        }
    )
}

fn is_unique(error: &Error) -> bool {
    matches!(error, Error::Database(sqlx::Error::Database(e)) if e.is_unique_violation())
}

/// Marks a report as processed. Returns `false` if it already was.
async fn is_new(work: &mut Transaction<'static, Any>, report: &Report) -> Result<bool, Error> {
    let done = sqlx::query(
        "INSERT INTO reports (save, fence, seq) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING",
    )
    .bind(report.job.to_string())
    .bind(report.fence as i64)
    .bind(report.seq as i64)
    .execute(&mut **work)
    .await?;
    Ok(done.rows_affected() > 0)
}

/// Writes a change over the version that it is based on. Returns `None` if the save has a newer version.
async fn write(
    record: &Record,
    work: &mut Transaction<'static, Any>,
    draft: Draft,
    actor: &str,
) -> Result<Option<Save>, Error> {
    let (was, counts, now) = (draft.save().version, draft.is_changed(), now_ms());
    let (steps, actions, revoked) = (
        draft.steps.clone(),
        draft.actions.clone(),
        draft.revoked.clone(),
    );
    let mut save = draft.into_save();
    if counts {
        save.version += 1;
    }
    let id = save.id.to_string();
    let body = written(save.id, &save)?;
    let done = sqlx::query(
        "UPDATE saves SET state = $1, version = $2, cancelling = $3, queued_ms = $4, changed_ms = $5, body = $6,
         progress = CASE WHEN $7 = 0 THEN NULL ELSE progress END
         WHERE id = $8 AND version = $9",
    )
    .bind(save.state.name())
    .bind(save.version as i64)
    .bind(i64::from(save.cancelling))
    .bind(save.queued_ms)
    .bind(now)
    .bind(&body)
    .bind(i64::from(save.progress.is_some()))
    .bind(&id)
    .bind(was as i64)
    .execute(&mut **work)
    .await?;
    if done.rows_affected() == 0 {
        return Ok(None);
    }
    if counts {
        sqlx::query("INSERT INTO changes (save, version, body) VALUES ($1, $2, $3)")
            .bind(&id)
            .bind(save.version as i64)
            .bind(&body)
            .execute(&mut **work)
            .await?;
    }
    super::audit::append(work, &save, &steps, actor, now).await?;
    super::notice::announce(record, work, &save, &steps).await?;
    for action in revoked {
        super::outbox::revoke(work, save.id, action).await?;
    }
    for (action, due_ms) in actions {
        super::outbox::send(work, save.id, action, due_ms).await?;
    }
    Ok(Some(save))
}
