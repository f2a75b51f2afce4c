//! What users have set about autosaves, and which autosaves there are.

use std::collections::{BTreeMap, HashMap};

use sqlx::{Any, Row as _, Transaction};

use super::save::{AUTOSAVE, AutosaveSetting};
use super::{Error, Record, id_of, places, state_of};
use crate::service::job::{JobId, SaveEnded, State, now_ms};

/// Maximum number of sessions or users per query.
const BATCH: usize = 200;
/// Maximum number of session names of a user that settings are kept for; those that were set first go.
const MAX_SETTINGS: i64 = 1000;
/// Whether the tag that a save wrote names another image by now, or none, as a condition on `saves`.
pub(super) const TAG_LOST: &str = "EXISTS (SELECT 1 FROM removed WHERE removed.destination = saves.destination \
    AND removed.at_ms >= saves.changed_ms)";

/// Which of their sessions a user wants to be saved when they end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EndSetting {
    /// Which.
    pub wanted: SaveEnded,
    /// Since when: milliseconds since the epoch, UTC.
    pub since_ms: i64,
}

/// The save of a session that ended last, among those that succeeded and the autosaves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LastSave {
    /// The save.
    pub id: JobId,
    /// How it ended.
    pub state: State,
    /// When it ended: milliseconds since the epoch, UTC.
    pub at_ms: i64,
    /// Whether its tag was deleted, or names the image of a later save.
    pub lost: bool,
}

/// An autosave whose image still has its tag, as far as the record knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredAutosave {
    /// The save.
    pub id: JobId,
    /// ID of its session.
    pub session: String,
    /// Destination without the tag: the same for all images of a user with the same name.
    pub repository: String,
    /// When it ended: milliseconds since the epoch, UTC.
    pub at_ms: i64,
    /// Number of the latest autosaves of a session that were to be kept when it was requested.
    pub keep: u32,
}

impl Record {
    /// Returns what these users have set about autosaves, by user and name of the session. The setting for all sessions of
    /// a user has an empty name.
    pub async fn autosave_settings(
        &self,
        users: &[&str],
    ) -> Result<BTreeMap<(String, String), AutosaveSetting>, Error> {
        let mut settings = BTreeMap::new();
        for users in users.chunks(BATCH) {
            let text = format!(
                "SELECT user_name, session_name, every_minutes, keep FROM autosave_settings WHERE user_name IN ({})",
                places(1, users.len())
            );
            let query = sqlx::query(&text);
            let query = users.iter().fold(query, |query, user| query.bind(*user));
            for row in query.fetch_all(&self.pool).await? {
                let number =
                    |column| Ok::<_, Error>(u32::try_from(row.try_get::<i64, _>(column)?).ok());
                let setting = AutosaveSetting {
                    every_minutes: number("every_minutes")?.filter(|minutes| *minutes > 0),
                    keep: number("keep")?.filter(|keep| *keep > 0),
                };
                let key = (row.try_get("user_name")?, row.try_get("session_name")?);
                settings.insert(key, setting);
            }
        }
        Ok(settings)
    }

    /// Sets what a user wants for sessions with a name; `None`: nothing.
    pub async fn set_autosave(
        &self,
        user: &str,
        name: &str,
        setting: Option<&AutosaveSetting>,
    ) -> Result<(), Error> {
        let mut work = self.begin().await?;
        set(&mut work, user, name, setting).await?;
        work.commit().await?;
        Ok(())
    }

    /// Sets what a user wants for all sessions: about autosaves, and when they end; `None`: nothing.
    pub async fn set_own(
        &self,
        user: &str,
        setting: Option<&AutosaveSetting>,
        at_end: Option<SaveEnded>,
    ) -> Result<(), Error> {
        let mut work = self.begin().await?;
        set(&mut work, user, "", setting).await?;
        match at_end {
            None => {
                sqlx::query("DELETE FROM end_settings WHERE user_name = $1")
                    .bind(user)
                    .execute(&mut *work)
                    .await?;
            }
            Some(wanted) => {
                sqlx::query(
                    "INSERT INTO end_settings (user_name, wanted, changed_ms) VALUES ($1, $2, $3)
                     ON CONFLICT (user_name) DO UPDATE SET wanted = excluded.wanted, changed_ms =
                     CASE WHEN end_settings.wanted = excluded.wanted THEN end_settings.changed_ms
                     ELSE excluded.changed_ms END",
                )
                .bind(user)
                .bind(wanted.name())
                .bind(now_ms())
                .execute(&mut *work)
                .await?;
            }
        }
        work.commit().await?;
        Ok(())
    }

    /// Returns which of their sessions these users want to be saved when they end.
    pub async fn end_settings(&self, users: &[&str]) -> Result<HashMap<String, EndSetting>, Error> {
        let mut settings = HashMap::new();
        for users in users.chunks(BATCH) {
            let text = format!(
                "SELECT user_name, wanted, changed_ms FROM end_settings WHERE user_name IN ({})",
                places(1, users.len())
            );
            let query = sqlx::query(&text);
            let query = users.iter().fold(query, |query, user| query.bind(*user));
            for row in query.fetch_all(&self.pool).await? {
                // That of a newer program counts as none.
                if let Ok(wanted) = row.try_get::<String, _>("wanted")?.parse() {
                    let since_ms = row.try_get("changed_ms")?;
                    settings.insert(row.try_get("user_name")?, EndSetting { wanted, since_ms });
                }
            }
        }
        Ok(settings)
    }

    /// Returns the save of each session that ended last, among those that succeeded and the autosaves. One that ended after
    /// `until_ms` (milliseconds since the epoch, UTC), by a clock that was ahead, does not count.
    pub async fn last_saves(
        &self,
        sessions: &[&str],
        until_ms: i64,
    ) -> Result<HashMap<String, LastSave>, Error> {
        let mut found = HashMap::new();
        for sessions in sessions.chunks(BATCH) {
            let text = format!(
                "SELECT session, id, state, changed_ms,
                     CASE WHEN {TAG_LOST} OR EXISTS (
                         SELECT 1 FROM saves AS later WHERE later.destination = saves.destination
                         AND later.state = 'succeeded' AND later.changed_ms > saves.changed_ms
                     ) THEN 1 ELSE 0 END AS lost
                 FROM (
                     SELECT session, id, state, changed_ms, destination,
                         row_number() OVER (PARTITION BY session ORDER BY changed_ms DESC, id DESC) AS place
                     FROM saves WHERE session IN ({}) AND changed_ms <= $2
                     AND (state = 'succeeded' OR (caller = $1 AND state IN ('failed', 'cancelled')))
                 ) AS saves WHERE place = 1",
                places(3, sessions.len())
            );
            let query = sqlx::query(&text).bind(AUTOSAVE).bind(until_ms);
            let query = sessions.iter().fold(query, |query, id| query.bind(*id));
            for row in query.fetch_all(&self.pool).await? {
                let id: String = row.try_get("id")?;
                let last = LastSave {
                    state: state_of(&id, &row.try_get::<String, _>("state")?)?,
                    id: id_of(&id)?,
                    at_ms: row.try_get("changed_ms")?,
                    lost: row.try_get::<i64, _>("lost")? != 0,
                };
                found.insert(row.try_get("session")?, last);
            }
        }
        Ok(found)
    }

    /// Returns when the last successful autosave of each session ended: milliseconds since the epoch, UTC.
    pub async fn last_autosaves(&self, sessions: &[&str]) -> Result<HashMap<String, i64>, Error> {
        let mut found = HashMap::new();
        for sessions in sessions.chunks(BATCH) {
            let text = format!(
                "SELECT session, max(changed_ms) AS at_ms FROM saves
                 WHERE session IN ({}) AND caller = $1 AND state = 'succeeded' GROUP BY session",
                places(2, sessions.len())
            );
            let query = sqlx::query(&text).bind(AUTOSAVE);
            let query = sessions.iter().fold(query, |query, id| query.bind(*id));
            for row in query.fetch_all(&self.pool).await? {
                found.insert(row.try_get("session")?, row.try_get("at_ms")?);
            }
        }
        Ok(found)
    }

    /// Returns when saves were accepted that succeeded, of all users, in ascending order: milliseconds since the epoch, UTC.
    /// Of those within a period of 4.7 hours (2^24 ms) only the last one.
    pub async fn save_times(&self) -> Result<Vec<i64>, Error> {
        // An ID begins with 48 bits of its time. By the index alone.
        let rows = sqlx::query(
            "SELECT substr(id, 1, 6) AS period, max(id) AS last FROM saves WHERE state = 'succeeded'
             GROUP BY substr(id, 1, 6) ORDER BY 1",
        )
        .fetch_all(&self.pool)
        .await?;
        rows.iter()
            .map(|row| Ok(id_of(&row.try_get::<String, _>("last")?)?.created_ms()))
            .collect()
    }

    /// Returns the users who have autosaves whose images still have their tags.
    pub async fn users_with_autosaves(&self) -> Result<Vec<String>, Error> {
        let text = format!(
            "SELECT DISTINCT user_name FROM saves WHERE caller = $1 AND state = 'succeeded' AND NOT {TAG_LOST}"
        );
        let rows = sqlx::query(&text)
            .bind(AUTOSAVE)
            .fetch_all(&self.pool)
            .await?;
        rows.iter()
            .map(|row| Ok(row.try_get("user_name")?))
            .collect()
    }

    /// Returns the autosaves of a user whose images still have their tags.
    pub async fn autosaves(&self, user: &str) -> Result<Vec<StoredAutosave>, Error> {
        let text = format!(
            "SELECT id, session, destination, changed_ms, keep FROM saves
             WHERE user_name = $1 AND caller = $2 AND state = 'succeeded' AND NOT {TAG_LOST}"
        );
        let rows = sqlx::query(&text)
            .bind(user)
            .bind(AUTOSAVE)
            .fetch_all(&self.pool)
            .await?;
        rows.iter()
            .map(|row| {
                let destination: String = row.try_get("destination")?;
                let repository = destination
                    .rsplit_once(':')
                    .map(|(name, _)| name.to_owned());
                Ok(StoredAutosave {
                    id: id_of(&row.try_get::<String, _>("id")?)?,
                    session: row.try_get("session")?,
                    repository: repository.unwrap_or(destination),
                    at_ms: row.try_get("changed_ms")?,
                    keep: u32::try_from(row.try_get::<i64, _>("keep")?).unwrap_or(0),
                })
            })
            .collect()
    }
}

async fn set(
    work: &mut Transaction<'static, Any>,
    user: &str,
    name: &str,
    setting: Option<&AutosaveSetting>,
) -> Result<(), Error> {
    let Some(setting) = setting else {
        sqlx::query("DELETE FROM autosave_settings WHERE user_name = $1 AND session_name = $2")
            .bind(user)
            .bind(name)
            .execute(&mut **work)
            .await?;
        return Ok(());
    };
    sqlx::query(
        "INSERT INTO autosave_settings (user_name, session_name, every_minutes, keep, changed_ms)
         VALUES ($1, $2, $3, $4, $5) ON CONFLICT (user_name, session_name) DO UPDATE SET
         every_minutes = excluded.every_minutes, keep = excluded.keep, changed_ms = excluded.changed_ms",
    )
    .bind(user)
    .bind(name)
    .bind(i64::from(setting.every_minutes.unwrap_or(0)))
    .bind(i64::from(setting.keep.unwrap_or(0)))
    .bind(now_ms())
    .execute(&mut **work)
    .await?;
    sqlx::query(
        "DELETE FROM autosave_settings WHERE user_name = $1 AND session_name IN (
             SELECT session_name FROM autosave_settings WHERE user_name = $1 AND session_name <> ''
             ORDER BY changed_ms DESC, session_name LIMIT $2 OFFSET $2)",
    )
    .bind(user)
    .bind(MAX_SETTINGS)
    .execute(&mut **work)
    .await?;
    Ok(())
}
