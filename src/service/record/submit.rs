//! Accepts a save: writes the save, the first row of its audit log, the request to the queue and the idempotency key in
//! one transaction.

use sqlx::{Any, Row as _, Transaction};

use super::save::{AUTOSAVE, Step};
use super::{Error, OutboxAction, Record, Save, id_of, view, written};
use crate::service::job::{JobId, now_ms};

/// Maximum number of attempts if another request with the same key is in progress.
const MAX_ATTEMPTS: u32 = 10;

/// The idempotency key of a request, which allows a caller to repeat it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// The caller that the key belongs to.
    pub caller: String,
    /// The key.
    pub key: String,
    /// Digest of the content of the request.
    pub hash: String,
}

/// Result of a request for a save.
#[derive(Clone, Debug, PartialEq)]
pub enum Submitted {
    /// The save was accepted.
    New(Box<Save>),
    /// The save had already been accepted under this key.
    Repeated(Box<Save>),
    /// The key was used for a different request.
    OtherRequest,
    /// Another save of the session is open.
    Busy(JobId),
    /// Another open save has the same destination.
    TagBusy(JobId),
    /// The user has this many open saves, which is the maximum.
    TooMany(u64),
    /// The user has requested this many saves in the last 24 hours, which is the maximum.
    TooManyToday(u64),
}

/// Limits on the saves of a user, without autosaves; 0 means no limit.
#[derive(Clone, Copy, Debug, Default)]
pub struct UserLimits {
    /// Saves that are open at the same time.
    pub open: u32,
    /// Saves in 24 hours, whatever their outcome.
    pub day: u32,
}

const DAY_MS: i64 = 24 * 3600 * 1000;

impl Record {
    /// Writes `save` as queued if it is within the limits `most` of its user.
    ///
    /// Fails with [`Error::Contended`] if concurrent requests keep interfering.
    pub async fn submit(
        &self,
        save: &Save,
        request: Option<&Request>,
        most: UserLimits,
    ) -> Result<Submitted, Error> {
        for _ in 0..MAX_ATTEMPTS {
            if let Some(submitted) = self.try_submit(save, request, most).await? {
                return Ok(submitted);
            }
        }
        Err(Error::Contended(save.id))
    }

    /// Returns the save that was accepted for this request under this key, if there is one.
    pub(crate) async fn repeated(&self, request: &Request) -> Result<Option<Save>, Error> {
        let row = sqlx::query(
            "SELECT saves.id AS id, body, progress FROM saves JOIN idempotency ON idempotency.save = saves.id
             WHERE idempotency.caller = $1 AND request_key = $2 AND request_hash = $3",
        )
        .bind(&request.caller)
        .bind(&request.key)
        .bind(&request.hash)
        .fetch_optional(&self.pool)
        .await?;
        row.as_ref().map(super::view::save_of).transpose()
    }

    /// Locks the count of this user's open saves until the end of the transaction. Without it, two concurrent requests
    /// could both find one free place. SQLite has only one writer at a time and needs no lock.
    async fn lock_user(
        &self,
        work: &mut Transaction<'static, Any>,
        user: &str,
    ) -> Result<(), Error> {
        if !self.sqlite {
            // The function returns void, for which the driver has no type.
            sqlx::query(
                "SELECT CASE WHEN pg_advisory_xact_lock(hashtextextended($1, 0)) IS NULL THEN 0 ELSE 1 END AS held",
            )
            .bind(user)
            .execute(&mut **work)
            .await?;
        }
        Ok(())
    }

    async fn try_submit(
        &self,
        save: &Save,
        request: Option<&Request>,
        most: UserLimits,
    ) -> Result<Option<Submitted>, Error> {
        let (id, now) = (save.id.to_string(), now_ms());
        let mut work = self.begin().await?;
        if let Some(request) = request {
            let done = sqlx::query(
                "INSERT INTO idempotency (caller, request_key, request_hash, save, created_ms)
                 VALUES ($1, $2, $3, $4, $5) ON CONFLICT DO NOTHING",
            )
            .bind(&request.caller)
            .bind(&request.key)
            .bind(&request.hash)
            .bind(&id)
            .bind(now)
            .execute(&mut *work)
            .await?;
            if done.rows_affected() == 0 {
                let found = sqlx::query(
                    "SELECT request_hash, save FROM idempotency WHERE caller = $1 AND request_key = $2",
                )
                .bind(&request.caller)
                .bind(&request.key)
                .fetch_optional(&mut *work)
                .await?;
                let Some(found) = found else { return Ok(None) };
                if found.try_get::<String, _>("request_hash")? != request.hash {
                    return Ok(Some(Submitted::OtherRequest));
                }
                let earlier = id_of(&found.try_get::<String, _>("save")?)?;
                let save = view::get(&mut work, earlier).await?;
                return Ok(save.map(|save| Submitted::Repeated(Box::new(save))));
            }
        }
        if most.open > 0 || most.day > 0 {
            self.lock_user(&mut work, &save.user).await?;
        }
        if most.open > 0 {
            let row = sqlx::query(
                "SELECT count(*) AS n FROM saves WHERE user_name = $1 AND caller <> $2
                 AND state IN ('queued', 'assigned', 'running')",
            )
            .bind(&save.user)
            .bind(AUTOSAVE)
            .fetch_one(&mut *work)
            .await?;
            let open = row.try_get::<i64, _>("n")? as u64;
            if open >= u64::from(most.open) {
                // If the session itself is being saved, that is the more helpful answer.
                let busy = sqlx::query(
                    "SELECT id FROM saves WHERE session = $1 AND caller <> $2
                     AND state IN ('queued', 'assigned', 'running')",
                )
                .bind(&save.session)
                .bind(AUTOSAVE)
                .fetch_optional(&mut *work)
                .await?;
                return Ok(Some(match busy {
                    Some(row) => Submitted::Busy(id_of(&row.try_get::<String, _>("id")?)?),
                    None => Submitted::TooMany(open),
                }));
            }
        }
        if most.day > 0 {
            let row = sqlx::query(
                "SELECT count(*) AS n FROM saves WHERE user_name = $1 AND id > $2 AND caller <> $3",
            )
            .bind(&save.user)
            .bind(JobId::earliest(now - DAY_MS).to_string())
            .bind(AUTOSAVE)
            .fetch_one(&mut *work)
            .await?;
            let asked = row.try_get::<i64, _>("n")? as u64;
            if asked >= u64::from(most.day) {
                return Ok(Some(Submitted::TooManyToday(asked)));
            }
        }
        let body = written(save.id, save)?;
        let done = sqlx::query(
            "INSERT INTO saves (id, session, user_name, destination, node, state, version, cancelling, queued_ms,
                changed_ms, body, caller, keep, progress_fence, progress_seq)
             VALUES ($1, $2, $3, $4, $5, $6, $7, 0, $8, $8, $9, $10, $11, 0, -1) ON CONFLICT DO NOTHING",
        )
        .bind(&id)
        .bind(&save.session)
        .bind(&save.user)
        .bind(&save.destination)
        .bind(&save.node)
        .bind(save.state.name())
        .bind(save.version as i64)
        .bind(now)
        .bind(&body)
        .bind(&save.caller)
        .bind(i64::from(save.keep.unwrap_or(0)))
        .execute(&mut *work)
        .await?;
        if done.rows_affected() == 0 {
            let found = sqlx::query(
                "SELECT id, session FROM saves WHERE (session = $1 OR destination = $2)
                 AND state IN ('queued', 'assigned', 'running') ORDER BY CASE WHEN session = $1 THEN 0 ELSE 1 END",
            )
            .bind(&save.session)
            .bind(&save.destination)
            .fetch_optional(&mut *work)
            .await?;
            // The conflicting save has ended in the meantime.
            let Some(found) = found else { return Ok(None) };
            let other = id_of(&found.try_get::<String, _>("id")?)?;
            let same = found.try_get::<String, _>("session")? == save.session;
            return Ok(Some(if same {
                Submitted::Busy(other)
            } else {
                Submitted::TagBusy(other)
            }));
        }
        sqlx::query("INSERT INTO changes (save, version, body) VALUES ($1, $2, $3)")
            .bind(&id)
            .bind(save.version as i64)
            .bind(&body)
            .execute(&mut *work)
            .await?;
        let asked_for = Step {
            from: None,
            to: save.state,
            attempt: save.attempt,
            fence: save.fence,
            detail: String::new(),
        };
        let steps = [asked_for];
        super::audit::append(&mut work, save, &steps, &save.caller, now).await?;
        super::notice::announce(self, &mut work, save, &steps).await?;
        super::outbox::send(&mut work, save.id, OutboxAction::Offer, now).await?;
        work.commit().await?;
        Ok(Some(Submitted::New(Box::new(save.clone()))))
    }
}
