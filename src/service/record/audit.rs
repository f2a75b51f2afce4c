//! The audit log: every transition of a save with its time, its attempt and its actor. Rows are only appended.

use serde::{Deserialize, Serialize};
use sqlx::{Any, Row as _, Transaction};

use super::save::Step;
use super::{Error, Record, Save, state_of};
use crate::service::job::{JobId, State};

/// One row of the audit log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Transition {
    /// Version of the save after the transition.
    pub version: u64,
    /// Time of the transition: milliseconds since the epoch, UTC.
    pub at_ms: i64,
    /// State before the transition; `None` for the submission.
    pub from: Option<State>,
    /// State after the transition. Equal to `from` if only a request was recorded.
    pub to: State,
    /// Number of the order.
    pub attempt: u32,
    /// Highest fence known at that time.
    pub fence: u64,
    /// A caller, `node:NAME` or `manager:NAME`.
    pub actor: String,
    /// Reason as a sentence; may be empty.
    pub detail: String,
}

pub(super) async fn append(
    work: &mut Transaction<'static, Any>,
    save: &Save,
    steps: &[Step],
    actor: &str,
    now_ms: i64,
) -> Result<(), Error> {
    for (at, step) in steps.iter().enumerate() {
        sqlx::query(
            "INSERT INTO audit (save, version, step, at_ms, from_state, to_state, attempt, fence, actor, detail)
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)",
        )
        .bind(save.id.to_string())
        .bind(save.version as i64)
        .bind(at as i64)
        .bind(now_ms)
        .bind(step.from.map_or("", State::name))
        .bind(step.to.name())
        .bind(i64::from(step.attempt))
        .bind(step.fence as i64)
        .bind(actor)
        .bind(&step.detail)
        .execute(&mut **work)
        .await?;
    }
    Ok(())
}

impl Record {
    /// Returns the audit log of a save in chronological order.
    pub async fn audit(&self, id: JobId) -> Result<Vec<Transition>, Error> {
        let rows = sqlx::query(
            "SELECT version, at_ms, from_state, to_state, attempt, fence, actor, detail FROM audit
             WHERE save = $1 ORDER BY version, step",
        )
        .bind(id.to_string())
        .fetch_all(&self.pool)
        .await?;
        let id = id.to_string();
        rows.iter()
            .map(|row| {
                let from: String = row.try_get("from_state")?;
                Ok(Transition {
                    version: row.try_get::<i64, _>("version")? as u64,
                    at_ms: row.try_get("at_ms")?,
                    from: State::from_name(&from),
                    to: state_of(&id, &row.try_get::<String, _>("to_state")?)?,
                    attempt: row.try_get::<i64, _>("attempt")? as u32,
                    fence: row.try_get::<i64, _>("fence")? as u64,
                    actor: row.try_get("actor")?,
                    detail: row.try_get("detail")?,
                })
            })
            .collect()
    }
}
