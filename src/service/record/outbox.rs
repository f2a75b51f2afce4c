//! The outbox: requests to the queue, written in the transaction of the change that they result from, and executed by
//! the first manager that takes them.

use std::time::Duration;

use sqlx::{Any, Row as _, Transaction};

use super::{Error, OutboxAction, Record, id_of};
use crate::service::job::{JobId, now_ms};

/// How long a request belongs to the manager that took it. If it is not done by then, the manager is assumed to have
/// died and another one takes it.
const HELD_FOR: Duration = Duration::from_secs(10);

/// A request that this manager has taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutboxEntry {
    /// The save.
    pub save: JobId,
    /// The request.
    pub action: OutboxAction,
    since_ms: i64,
}

/// Writes a request; an existing one for the same save is reset.
pub(super) async fn send(
    work: &mut Transaction<'static, Any>,
    save: JobId,
    action: OutboxAction,
    due_ms: i64,
) -> Result<(), Error> {
    sqlx::query(
        "INSERT INTO outbox (save, errand, due_ms, taken_ms, taken_by) VALUES ($1, $2, $3, 0, '')
         ON CONFLICT (save, errand) DO UPDATE SET due_ms = excluded.due_ms, taken_ms = 0, taken_by = ''",
    )
    .bind(save.to_string())
    .bind(action.name())
    .bind(due_ms)
    .execute(&mut **work)
    .await?;
    Ok(())
}

pub(super) async fn revoke(
    work: &mut Transaction<'static, Any>,
    save: JobId,
    action: OutboxAction,
) -> Result<(), Error> {
    sqlx::query("DELETE FROM outbox WHERE save = $1 AND errand = $2")
        .bind(save.to_string())
        .bind(action.name())
        .execute(&mut **work)
        .await?;
    Ok(())
}

impl Record {
    /// Takes at most `most` requests that are due. No other manager can take them for ten seconds.
    pub async fn take_outbox(&self, manager: &str, most: u32) -> Result<Vec<OutboxEntry>, Error> {
        let now = now_ms();
        // The condition is repeated because a transaction that waited for another one's lock evaluates it again before
        // it takes the row.
        let rows = sqlx::query(
            "UPDATE outbox SET taken_ms = $1, taken_by = $2
             WHERE due_ms <= $1 AND taken_ms < $3 AND (save, errand) IN (
                 SELECT save, errand FROM outbox WHERE due_ms <= $1 AND taken_ms < $3 ORDER BY due_ms, save LIMIT $4
             ) RETURNING save, errand",
        )
        .bind(now)
        .bind(manager)
        .bind(now - HELD_FOR.as_millis() as i64)
        .bind(i64::from(most))
        .fetch_all(&self.pool)
        .await?;
        rows.iter()
            .map(|row| {
                let save: String = row.try_get("save")?;
                let errand: String = row.try_get("errand")?;
                Ok(OutboxEntry {
                    action: OutboxAction::from_name(&errand).ok_or_else(|| Error::Row {
                        save: save.clone(),
                        reason: format!("{errand:?} is no errand"),
                    })?,
                    save: id_of(&save)?,
                    since_ms: now,
                })
            })
            .collect()
    }

    /// Removes a request that is done, unless it was written again meanwhile.
    pub async fn outbox_done(&self, manager: &str, taken: &OutboxEntry) -> Result<(), Error> {
        sqlx::query(
            "DELETE FROM outbox WHERE save = $1 AND errand = $2 AND taken_by = $3 AND taken_ms = $4",
        )
        .bind(taken.save.to_string())
        .bind(taken.action.name())
        .bind(manager)
        .bind(taken.since_ms)
        .execute(&self.pool)
        .await?;
        Ok(())
    }

    /// Releases a request that failed. It is due again after `pause`.
    pub async fn outbox_failed(
        &self,
        manager: &str,
        taken: &OutboxEntry,
        pause: Duration,
    ) -> Result<(), Error> {
        sqlx::query(
            "UPDATE outbox SET taken_ms = 0, taken_by = '', due_ms = $5
             WHERE save = $1 AND errand = $2 AND taken_by = $3 AND taken_ms = $4",
        )
        .bind(taken.save.to_string())
        .bind(taken.action.name())
        .bind(manager)
        .bind(taken.since_ms)
        .bind(now_ms() + pause.as_millis() as i64)
        .execute(&self.pool)
        .await?;
        Ok(())
    }
}
