//! The sessions that managers saw last, by node. While the queue does not answer, saves are accepted by them, also by a
//! manager that was restarted meanwhile.

use sqlx::Row as _;

use super::{Error, Record, read};
use crate::service::job::{Session, now_ms};

/// Maximum number of sessions of a node that are kept. A node has far fewer.
const MAX_OF_NODE: usize = 1000;
/// Maximum number of nodes of which sessions are kept.
const MAX_NODES: i64 = 5000;

impl Record {
    /// Keeps the sessions of a node, in place of those that were kept of it.
    pub async fn keep_sessions(&self, node: &str, sessions: &[Session]) -> Result<(), Error> {
        let kept = &sessions[..sessions.len().min(MAX_OF_NODE)];
        let body = serde_json::to_string(kept).map_err(|error| Error::Row {
            save: format!("(the sessions of {node})"),
            reason: error.to_string(),
        })?;
        sqlx::query(
            "INSERT INTO sessions_seen (node, seen_ms, body) SELECT $1, $2, $3
             WHERE (SELECT count(*) FROM sessions_seen WHERE node <> $1) < $4
             ON CONFLICT (node) DO UPDATE SET seen_ms = excluded.seen_ms, body = excluded.body",
        )
        .bind(node)
        .bind(now_ms())
        .bind(body)
        .bind(MAX_NODES)
        .execute(&self.pool)
        .await?;
        Ok(())
    }

    /// Returns the sessions that were kept since `since_ms` (milliseconds since the epoch, UTC).
    pub async fn kept_sessions(&self, since_ms: i64) -> Result<Vec<Session>, Error> {
        let rows = sqlx::query("SELECT node, body FROM sessions_seen WHERE seen_ms >= $1")
            .bind(since_ms)
            .fetch_all(&self.pool)
            .await?;
        let mut sessions = Vec::new();
        for row in rows {
            let node: String = row.try_get("node")?;
            let of_node = format!("(the sessions of {node})");
            let found: Result<Vec<Session>, _> = read(&of_node, &row.try_get::<String, _>("body")?);
            match found {
                Ok(found) => sessions.extend(found),
                // Of another version of the program. The next list replaces it.
                Err(error) => tracing::warn!(error = %error, "kept sessions are not read"),
            }
        }
        Ok(sessions)
    }

    /// Deletes the sessions that were kept before `before_ms`.
    pub async fn forget_sessions(&self, before_ms: i64) -> Result<(), Error> {
        sqlx::query("DELETE FROM sessions_seen WHERE seen_ms < $1")
            .bind(before_ms)
            .execute(&self.pool)
            .await?;
        Ok(())
    }
}
