//! Reading: one save, the history, what is open, what has changed for those who watch; and forgetting what is old.

use std::collections::BTreeMap;
use std::time::Duration;

use sqlx::{Any, Row as _, Transaction};

use super::{Error, Progress, Record, Save, id_of, read, state_of};
use crate::service::job::{JobId, State, now_ms};

/// Every version of a save is kept for so long after its end: a watcher who was away for longer sees the last one only.
const CHANGES_FOR: Duration = Duration::from_secs(3600);
/// A caller's key means the same request for so long.
const KEYS_FOR: Duration = Duration::from_secs(7 * 24 * 3600);
/// IDs in one question; fewer are filled up, so that there are few texts of it.
const BATCHES: [usize; 4] = [1, 16, 128, 500];
/// Saves whose images are described in a list.
const MAX_SAVED: i64 = 5000;

/// Which part of the history.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    /// Only this user's.
    pub user: Option<String>,
    /// Only those in this state.
    pub state: Option<State>,
    /// Only those of this session.
    pub session: Option<String>,
    /// Only those before this one.
    pub after: Option<JobId>,
}

/// How a save stands, for those who watch many.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Head {
    /// The save.
    pub id: JobId,
    /// Its version.
    pub version: u64,
    /// Grows with its progress: fence and number of the report.
    pub heard: (i64, i64),
    /// Its progress.
    pub progress: Option<Progress>,
}

/// A save that is not done, as much as is compared with the queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Standing {
    /// The save.
    pub id: JobId,
    /// Its node.
    pub node: String,
    /// Where it is.
    pub state: State,
    /// Its version.
    pub version: u64,
    /// Whether somebody asked for its end.
    pub cancelling: bool,
    /// When it last began to wait.
    pub queued_ms: i64,
}

/// Which session is being saved.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpenSave {
    /// The session.
    pub session: String,
    /// The save.
    pub id: JobId,
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
    /// A save.
    pub async fn save(&self, id: JobId) -> Result<Option<Save>, Error> {
        let row = sqlx::query("SELECT id, body, progress FROM saves WHERE id = $1")
            .bind(id.to_string())
            .fetch_optional(&self.pool)
            .await?;
        row.as_ref().map(save_of).transpose()
    }

    /// The history, the latest first, at most `most`.
    pub async fn history(&self, filter: &Filter, most: u32) -> Result<Vec<Save>, Error> {
        let rows = sqlx::query(
            "SELECT id, body, progress FROM saves
             WHERE ($1 = '' OR user_name = $1) AND ($2 = '' OR state = $2) AND ($3 = '' OR session = $3)
             AND ($4 = '' OR id < $4) ORDER BY id DESC LIMIT $5",
        )
        .bind(filter.user.clone().unwrap_or_default())
        .bind(filter.state.map_or("", State::name))
        .bind(filter.session.clone().unwrap_or_default())
        .bind(filter.after.map(|id| id.to_string()).unwrap_or_default())
        .bind(i64::from(most))
        .fetch_all(&self.pool)
        .await?;
        rows.iter().map(save_of).collect()
    }

    /// The saves that made images, of a user or of all, the latest first.
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

    /// Which sessions are being saved.
    pub async fn open_saves(&self) -> Result<Vec<OpenSave>, Error> {
        let rows = sqlx::query(
            "SELECT id, session FROM saves WHERE state IN ('queued', 'assigned', 'running')",
        )
        .fetch_all(&self.pool)
        .await?;
        rows.iter()
            .map(|row| {
                Ok(OpenSave {
                    session: row.try_get("session")?,
                    id: id_of(&row.try_get::<String, _>("id")?)?,
                })
            })
            .collect()
    }

    /// The open save that will put its tag on `destination`.
    pub async fn writing_to(&self, destination: &str) -> Result<Option<JobId>, Error> {
        let row = sqlx::query(
            "SELECT id FROM saves WHERE destination = $1 AND state IN ('queued', 'assigned', 'running')",
        )
        .bind(destination)
        .fetch_optional(&self.pool)
        .await?;
        row.map(|row| id_of(&row.try_get::<String, _>("id")?))
            .transpose()
    }

    /// What is not done, in order, from behind `after` on; at most `most`.
    pub async fn standing(&self, after: Option<JobId>, most: u32) -> Result<Vec<Standing>, Error> {
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
                Ok(Standing {
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

    /// How each of `ids` stands; those that are gone are left out.
    pub async fn heads(&self, ids: &[JobId]) -> Result<Vec<Head>, Error> {
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
                heads.push(Head {
                    progress: progress.map(|text| read(&id, &text)).transpose()?,
                    id: id_of(&id)?,
                    version: row.try_get::<i64, _>("version")? as u64,
                    heard: (row.try_get("progress_fence")?, row.try_get("progress_seq")?),
                });
            }
        }
        Ok(heads)
    }

    /// Every version of a save after `version`, in order, as far as they are kept.
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

    /// How many saves wait for each node.
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

    /// How many saves there are in each state.
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

    /// Forgets what is old: versions nobody waits for, keys, sign-ins, and (with `retention`) saves that ended before it.
    pub async fn forget(&self, retention: Option<Duration>) -> Result<u64, Error> {
        const DONE: &str = "SELECT id FROM saves WHERE state IN ('succeeded', 'failed', 'cancelled') AND changed_ms < $1";
        let before =
            |age: Duration| now_ms() - i64::try_from(age.as_millis()).unwrap_or(i64::MAX / 2);
        for table in ["changes", "reports"] {
            let text = format!("DELETE FROM {table} WHERE save IN ({DONE})");
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
        let Some(retention) = retention else {
            return Ok(0);
        };
        let mut work = self.begin().await?;
        for table in ["changes", "reports", "audit", "outbox", "idempotency"] {
            let text = format!("DELETE FROM {table} WHERE save IN ({DONE})");
            sqlx::query(&text)
                .bind(before(retention))
                .execute(&mut *work)
                .await?;
        }
        let done = sqlx::query(
            "DELETE FROM saves WHERE state IN ('succeeded', 'failed', 'cancelled') AND changed_ms < $1",
        )
        .bind(before(retention))
        .execute(&mut *work)
        .await?;
        work.commit().await?;
        Ok(done.rows_affected())
    }
}

/// A save and its progress, from their columns.
pub(super) fn save_of(row: &sqlx::any::AnyRow) -> Result<Save, Error> {
    let id: String = row.try_get("id")?;
    let mut save: Save = read(&id, &row.try_get::<String, _>("body")?)?;
    save.progress = match row.try_get::<Option<String>, _>("progress")? {
        Some(text) => Some(read(&id, &text)?),
        None => None,
    };
    Ok(save)
}
