//! Errands to the queue, written with the change that they follow from and done by whichever manager takes them first.

use std::time::Duration;

use sqlx::{Any, Row as _, Transaction};

use super::{Errand, Error, Record, id_of};
use crate::service::job::{JobId, now_ms};

/// Who takes an errand and does not say that it is done has died: another one takes it then.
const HELD_FOR: Duration = Duration::from_secs(10);

/// An errand that is this manager's to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Taken {
    /// The save.
    pub save: JobId,
    /// What is to be done.
    pub errand: Errand,
    since_ms: i64,
}

/// Writes an errand down; one that is there already becomes new.
pub(super) async fn send(
    work: &mut Transaction<'static, Any>,
    save: JobId,
    errand: Errand,
    due_ms: i64,
) -> Result<(), Error> {
    sqlx::query(
        "INSERT INTO outbox (save, errand, due_ms, taken_ms, taken_by) VALUES ($1, $2, $3, 0, '')
         ON CONFLICT (save, errand) DO UPDATE SET due_ms = excluded.due_ms, taken_ms = 0, taken_by = ''",
    )
    .bind(save.to_string())
    .bind(errand.name())
    .bind(due_ms)
    .execute(&mut **work)
    .await?;
    Ok(())
}

pub(super) async fn revoke(
    work: &mut Transaction<'static, Any>,
    save: JobId,
    errand: Errand,
) -> Result<(), Error> {
    sqlx::query("DELETE FROM outbox WHERE save = $1 AND errand = $2")
        .bind(save.to_string())
        .bind(errand.name())
        .execute(&mut **work)
        .await?;
    Ok(())
}

impl Record {
    /// Takes at most `most` errands that are due. No other manager has them for ten seconds.
    pub async fn take_errands(&self, manager: &str, most: u32) -> Result<Vec<Taken>, Error> {
        let now = now_ms();
        // The condition stands twice: who waited for another's lock looks again before taking the row.
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
                Ok(Taken {
                    errand: Errand::named(&errand).ok_or_else(|| Error::Row {
                        save: save.clone(),
                        reason: format!("{errand:?} is no errand"),
                    })?,
                    save: id_of(&save)?,
                    since_ms: now,
                })
            })
            .collect()
    }

    /// It is done, unless it was sent anew meanwhile.
    pub async fn errand_done(&self, manager: &str, taken: &Taken) -> Result<(), Error> {
        sqlx::query(
            "DELETE FROM outbox WHERE save = $1 AND errand = $2 AND taken_by = $3 AND taken_ms = $4",
        )
        .bind(taken.save.to_string())
        .bind(taken.errand.name())
        .bind(manager)
        .bind(taken.since_ms)
        .execute(&self.pool)
        .await?;
        Ok(())
    }

    /// It could not be done: due again after `pause`.
    pub async fn errand_failed(
        &self,
        manager: &str,
        taken: &Taken,
        pause: Duration,
    ) -> Result<(), Error> {
        sqlx::query(
            "UPDATE outbox SET taken_ms = 0, taken_by = '', due_ms = $5
             WHERE save = $1 AND errand = $2 AND taken_by = $3 AND taken_ms = $4",
        )
        .bind(taken.save.to_string())
        .bind(taken.errand.name())
        .bind(manager)
        .bind(taken.since_ms)
        .bind(now_ms() + pause.as_millis() as i64)
        .execute(&self.pool)
        .await?;
        Ok(())
    }
}
