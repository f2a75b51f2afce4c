//! Reads the record: one save, the history, open saves, and changes for watchers. Also deletes old data.

use std::collections::BTreeMap;
use std::time::Duration;

use sqlx::{Any, Row as _, Transaction};

use super::autosave::TAG_LOST;
use super::save::AUTOSAVE;
use super::{Error, Progress, Record, Save, id_of, read, state_of};
use crate::service::job::{JobId, State, now_ms};

/// How long every version of a save is kept after its end. A watcher that was away for longer gets only the last
/// version.
const CHANGES_FOR: Duration = Duration::from_secs(3600);
/// How long an autosave is kept that failed or was cancelled, or after its image was deleted.
const AUTOSAVES_FOR: Duration = Duration::from_secs(7 * 24 * 3600);
/// The saves that have ended, as a condition.
const DONE: &str = "state IN ('succeeded', 'failed', 'cancelled')";
/// How long an idempotency key is kept.
const KEYS_FOR: Duration = Duration::from_secs(7 * 24 * 3600);
/// Numbers of IDs per query. Shorter lists are padded, so that there are few different statements.
const BATCHES: [usize; 4] = [1, 16, 128, 500];
/// Maximum number of saves in the list of images.
const MAX_SAVED: i64 = 5000;

/// Selects a part of the history.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// Only saves of this user.
    pub user: Option<String>,
    /// With `user`: also saves that this caller asked for.
    pub caller: Option<String>,
    /// Only saves in this state.
    pub state: Option<State>,
    /// Only saves that have not ended.
    pub open: bool,
    /// Only saves of this session.
    pub session: Option<String>,
    /// Only saves that are older than this one.
    pub after: Option<JobId>,
}

/// Version and progress of a save, for watchers of many saves.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SaveVersion {
    /// The save.
    pub id: JobId,
    /// Version of the save.
    pub version: u64,
    /// Increases with the progress: fence and sequence number of the report.
    pub heard: (i64, i64),
    /// Progress of the save.
    pub progress: Option<Progress>,
}

/// The part of an open save that is compared with the queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpenSaveState {
    /// The save.
    pub id: JobId,
    /// Its node.
    pub node: String,
    /// Its state.
    pub state: State,
    /// Its version.
    pub version: u64,
    /// Whether its cancellation was requested.
    pub cancelling: bool,
    /// When it was last queued: milliseconds since the epoch, UTC.
    pub queued_ms: i64,
}

/// An open save of a session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpenSave {
    /// The session.
    pub session: String,
    /// The save.
    pub id: JobId,
    /// Whether it is an autosave.
    pub autosave: bool,
}

pub(super) async fn get(
    work: &mut Transaction<'static, Any>,
    id: JobId,
) -> Result<Option<Save>, Error> {
    let row = sqlx::query("SELECT id, body, progress FROM saves WHERE id = $1")
        .bind(id.to_string())
        .fetch_optional(&mut **work)
        .await?;
    row.as_ref().map(save_of).transpose()
}

impl Record {
    /// Returns a save; `None` if there is no such save.
    pub async fn save(&self, id: JobId) -> Result<Option<Save>, Error> {
        let row = sqlx::query("SELECT id, body, progress FROM saves WHERE id = $1")
            .bind(id.to_string())
            .fetch_optional(&self.pool)
            .await?;
        row.as_ref().map(save_of).transpose()
    }

    /// Returns at most `most` saves, the latest first.
    pub async fn history(&self, filter: &Filter, most: u32) -> Result<Vec<Save>, Error> {
        let rows = sqlx::query(
            "SELECT id, body, progress FROM saves
             WHERE ($1 = '' OR user_name = $1 OR ($7 <> '' AND caller = $7))
             AND ($2 = '' OR state = $2) AND ($3 = '' OR session = $3)
             AND ($4 = '' OR id < $4) AND ($5 = 0 OR state IN ('queued', 'assigned', 'running'))
             ORDER BY id DESC LIMIT $6",
        )
        .bind(filter.user.clone().unwrap_or_default())
        .bind(filter.state.map_or("", State::name))
        .bind(filter.session.clone().unwrap_or_default())
        .bind(filter.after.map(|id| id.to_string()).unwrap_or_default())
        .bind(i64::from(filter.open))
        .bind(i64::from(most))
        .bind(filter.caller.clone().unwrap_or_default())
        .fetch_all(&self.pool)
        .await?;
        rows.iter().map(save_of).collect()
    }

    /// Returns the successful saves of a user, or of all users, the latest first.
    pub async fn saved(&self, user: Option<&str>) -> Result<Vec<Save>, Error> {
        let rows = sqlx::query(
            "SELECT id, body, progress FROM saves
             WHERE ($1 = '' OR user_name = $1) AND state = 'succeeded' ORDER BY id DESC LIMIT $2",
        )
        .bind(user.unwrap_or_default())
        .bind(MAX_SAVED)
        .fetch_all(&self.pool)
        .await?;
        rows.iter().map(save_of).collect()
    }

    /// Returns the open saves with their sessions.
    pub async fn open_saves(&self) -> Result<Vec<OpenSave>, Error> {
        let rows = sqlx::query(
            "SELECT id, session, caller FROM saves WHERE state IN ('queued', 'assigned', 'running')",
        )
        .fetch_all(&self.pool)
        .await?;
        rows.iter()
            .map(|row| {
                Ok(OpenSave {
                    session: row.try_get("session")?,
                    id: id_of(&row.try_get::<String, _>("id")?)?,
                    autosave: row.try_get::<String, _>("caller")? == AUTOSAVE,
                })
            })
            .collect()
    }

    /// Returns the open saves with their users, the latest first.
    pub(crate) async fn open_saves_of_users(&self) -> Result<Vec<(JobId, String)>, Error> {
        let rows = sqlx::query(
            "SELECT id, user_name FROM saves WHERE state IN ('queued', 'assigned', 'running') ORDER BY id DESC",
        )
        .fetch_all(&self.pool)
        .await?;
        rows.iter()
            .map(|row| {
                let id = id_of(&row.try_get::<String, _>("id")?)?;
                Ok((id, row.try_get("user_name")?))
            })
            .collect()
    }

    /// Returns the open saves of the callers whose names begin with `callers`, each with its idempotency key.
    pub(crate) async fn open_saves_of_keys(
        &self,
        callers: &str,
    ) -> Result<Vec<(Save, String)>, Error> {
        let rows = sqlx::query(
            "SELECT saves.id AS id, body, progress, request_key
             FROM saves JOIN idempotency ON idempotency.save = saves.id
             WHERE saves.state IN ('queued', 'assigned', 'running')
             AND substr(idempotency.caller, 1, length($1)) = $1",
        )
        .bind(callers)
        .fetch_all(&self.pool)
        .await?;
        rows.iter()
            .map(|row| Ok((save_of(row)?, row.try_get("request_key")?)))
            .collect()
    }

    /// Returns the save that was accepted for a caller under an idempotency key.
    pub(crate) async fn save_of_key(&self, caller: &str, key: &str) -> Result<Option<Save>, Error> {
        let row = sqlx::query(
            "SELECT saves.id AS id, body, progress FROM saves JOIN idempotency ON idempotency.save = saves.id
             WHERE idempotency.caller = $1 AND request_key = $2",
        )
        .bind(caller)
        .bind(key)
        .fetch_optional(&self.pool)
        .await?;
        row.as_ref().map(save_of).transpose()
    }

    /// Returns the open save that will set the tag at `destination`.
    pub async fn open_save_to(&self, destination: &str) -> Result<Option<JobId>, Error> {
        let row = sqlx::query(
            "SELECT id FROM saves WHERE destination = $1 AND state IN ('queued', 'assigned', 'running')",
        )
        .bind(destination)
        .fetch_optional(&self.pool)
        .await?;
        row.map(|row| id_of(&row.try_get::<String, _>("id")?))
            .transpose()
    }

    /// Returns at most `most` open saves in order of their IDs, starting after `after`.
    pub async fn open_save_states(
        &self,
        after: Option<JobId>,
        most: u32,
    ) -> Result<Vec<OpenSaveState>, Error> {
        let rows = sqlx::query(
            "SELECT id, node, state, version, cancelling, queued_ms FROM saves
             WHERE state IN ('queued', 'assigned', 'running') AND id > $1 ORDER BY id LIMIT $2",
        )
        .bind(after.map(|id| id.to_string()).unwrap_or_default())
        .bind(i64::from(most))
        .fetch_all(&self.pool)
        .await?;
        rows.iter()
            .map(|row| {
                let id: String = row.try_get("id")?;
                Ok(OpenSaveState {
                    state: state_of(&id, &row.try_get::<String, _>("state")?)?,
                    id: id_of(&id)?,
                    node: row.try_get("node")?,
                    version: row.try_get::<i64, _>("version")? as u64,
                    cancelling: row.try_get::<i64, _>("cancelling")? != 0,
                    queued_ms: row.try_get("queued_ms")?,
                })
            })
            .collect()
    }

    /// Returns the version and progress of each of `ids`. Saves that no longer exist are left out.
    pub async fn versions(&self, ids: &[JobId]) -> Result<Vec<SaveVersion>, Error> {
        let mut heads = Vec::with_capacity(ids.len());
        for ids in ids.chunks(BATCHES[BATCHES.len() - 1]) {
            let size = BATCHES
                .into_iter()
                .find(|size| *size >= ids.len())
                .unwrap_or(ids.len());
            let places: Vec<_> = (1..=size).map(|n| format!("${n}")).collect();
            let text = format!(
                "SELECT id, version, progress, progress_fence, progress_seq FROM saves WHERE id IN ({})",
                places.join(", ")
            );
            let mut query = sqlx::query(&text);
            for at in 0..size {
                query = query.bind(ids.get(at).map(JobId::to_string).unwrap_or_default());
            }
            for row in query.fetch_all(&self.pool).await? {
                let id: String = row.try_get("id")?;
                let progress = row.try_get::<Option<String>, _>("progress")?;
                heads.push(SaveVersion {
                    progress: progress.map(|text| read(&id, &text)).transpose()?,
                    id: id_of(&id)?,
                    version: row.try_get::<i64, _>("version")? as u64,
                    heard: (row.try_get("progress_fence")?, row.try_get("progress_seq")?),
                });
            }
        }
        Ok(heads)
    }

    /// Returns every version of a save after `version` in order, as far as they are still kept.
    pub async fn changes(&self, id: JobId, version: u64) -> Result<Vec<Save>, Error> {
        let rows = sqlx::query(
            "SELECT body FROM changes WHERE save = $1 AND version > $2 ORDER BY version",
        )
        .bind(id.to_string())
        .bind(version as i64)
        .fetch_all(&self.pool)
        .await?;
        let id = id.to_string();
        rows.iter()
            .map(|row| read(&id, &row.try_get::<String, _>("body")?))
            .collect()
    }

    /// Returns the number of queued saves per node.
    pub async fn waiting_by_node(&self) -> Result<BTreeMap<String, u64>, Error> {
        let rows = sqlx::query(
            "SELECT node, count(*) AS n FROM saves WHERE state = 'queued' GROUP BY node",
        )
        .fetch_all(&self.pool)
        .await?;
        rows.iter()
            .map(|row| Ok((row.try_get("node")?, row.try_get::<i64, _>("n")? as u64)))
            .collect()
    }

    /// Returns the number of saves in each state.
    pub async fn counts(&self) -> Result<Vec<(State, u64)>, Error> {
        let rows = sqlx::query("SELECT state, count(*) AS n FROM saves GROUP BY state")
            .fetch_all(&self.pool)
            .await?;
        rows.iter()
            .map(|row| {
                let state = state_of("?", &row.try_get::<String, _>("state")?)?;
                Ok((state, row.try_get::<i64, _>("n")? as u64))
            })
            .collect()
    }

    /// Deletes old data: versions of saves that ended over an hour ago, idempotency keys, expired sign-ins, autosaves that
    /// failed or whose images were deleted a week ago, and with `retention` also saves that ended longer ago. An autosave
    /// whose image has its tag stays: without it, the image would never be deleted. Returns the number of deleted saves.
    pub async fn forget(&self, retention: Option<Duration>) -> Result<u64, Error> {
        let before =
            |age: Duration| now_ms() - i64::try_from(age.as_millis()).unwrap_or(i64::MAX / 2);
        for table in ["changes", "reports"] {
            let text = format!(
                "DELETE FROM {table} WHERE save IN (SELECT id FROM saves WHERE {DONE} AND changed_ms < $1)"
            );
            sqlx::query(&text)
                .bind(before(CHANGES_FOR))
                .execute(&self.pool)
                .await?;
        }
        sqlx::query("DELETE FROM idempotency WHERE created_ms < $1")
            .bind(before(KEYS_FOR))
            .execute(&self.pool)
            .await?;
        sqlx::query("DELETE FROM signins WHERE expires_ms <= $1")
            .bind(now_ms())
            .execute(&self.pool)
            .await?;
        self.forget_mail_counts().await?;
        let useless = format!(
            "caller = '{AUTOSAVE}' AND changed_ms < $1 AND (state IN ('failed', 'cancelled') OR (state = 'succeeded'
             AND EXISTS (SELECT 1 FROM removed WHERE removed.destination = saves.destination
             AND removed.at_ms >= saves.changed_ms AND removed.at_ms < $1)))"
        );
        let mut gone = self.delete_saves(&useless, before(AUTOSAVES_FOR)).await?;
        sqlx::query(
            "DELETE FROM removed WHERE by_name = $1 AND at_ms < $2
             AND NOT EXISTS (SELECT 1 FROM saves WHERE saves.destination = removed.destination)",
        )
        .bind(AUTOSAVE)
        .bind(before(AUTOSAVES_FOR))
        .execute(&self.pool)
        .await?;
        if let Some(retention) = retention {
            let old = format!(
                "{DONE} AND changed_ms < $1 AND NOT (caller = '{AUTOSAVE}' AND state = 'succeeded' AND NOT {TAG_LOST})"
            );
            gone += self.delete_saves(&old, before(retention)).await?;
        }
        Ok(gone)
    }

    /// Deletes the saves that satisfy a condition, in which `$1` is `before_ms`, with all that belongs to them.
    async fn delete_saves(&self, condition: &str, before_ms: i64) -> Result<u64, Error> {
        let mut work = self.begin().await?;
        let tables = [
            "changes",
            "reports",
            "audit",
            "outbox",
            "notices",
            "packages",
            "package_lists",
            "idempotency",
        ];
        for table in tables {
            let text = format!(
                "DELETE FROM {table} WHERE save IN (SELECT id FROM saves WHERE {condition})"
            );
            sqlx::query(&text)
                .bind(before_ms)
                .execute(&mut *work)
                .await?;
        }
        let done = sqlx::query(&format!("DELETE FROM saves WHERE {condition}"))
            .bind(before_ms)
            .execute(&mut *work)
            .await?;
        work.commit().await?;
        Ok(done.rows_affected())
    }
}

/// Reads a save and its progress from a row.
pub(super) fn save_of(row: &sqlx::any::AnyRow) -> Result<Save, Error> {
    let id: String = row.try_get("id")?;
    let mut save: Save = read(&id, &row.try_get::<String, _>("body")?)?;
    save.progress = match row.try_get::<Option<String>, _>("progress")? {
        Some(text) => Some(read(&id, &text)?),
        None => None,
    };
    Ok(save)
}
