//! The timeline of a session: its own saves, and those of earlier sessions that had the same name.

use super::view::save_of;
use super::{Error, Record, Save};
use crate::service::job::JobId;

/// Maximum number of sessions that are left out; a user has far fewer of one name.
const MAX_OTHERS: usize = 100;

/// Selects the saves of a timeline.
#[derive(Clone, Debug, Default)]
pub struct TimelineFilter {
    /// Full ID of the session.
    pub session: String,
    /// Only images of this user; without, only saves of the session itself.
    pub user: Option<String>,
    /// With `user`: the saves of other sessions that went to this repository belong to the timeline as well.
    pub repository: Option<String>,
    /// IDs of sessions whose saves do not, because they are beside this session and not before it. At most 100 count.
    pub others: Vec<String>,
    /// Only saves that this caller asked for.
    pub caller: Option<String>,
    /// No saves whose images this caller has deleted.
    pub not_removed_by: Option<String>,
    /// Only saves that are older than this one.
    pub after: Option<JobId>,
}

impl Record {
    /// Returns at most `most` succeeded saves of a timeline, the latest first.
    pub async fn timeline(&self, filter: &TimelineFilter, most: u32) -> Result<Vec<Save>, Error> {
        // By its index where there is a user.
        let whose = match filter.user {
            Some(_) => {
                "user_name = $2 AND (session = $1 OR ($3 <> '' AND substr(destination, 1, length($3)) = $3))"
            }
            None => "session = $1 AND $2 = '' AND $3 = ''",
        };
        let others = &filter.others[..filter.others.len().min(MAX_OTHERS)];
        let beside: String = (0..others.len())
            .map(|n| format!(" AND (session = $1 OR session <> ${})", n + 8))
            .collect();
        let text = format!(
            "SELECT id, body, progress FROM saves WHERE state = 'succeeded' AND {whose}{beside}
             AND ($4 = '' OR caller = $4) AND ($5 = '' OR id < $5)
             AND ($6 = '' OR NOT EXISTS (SELECT 1 FROM removed WHERE removed.destination = saves.destination
                 AND removed.by_name = $6 AND removed.renamed_to = ''))
             ORDER BY id DESC LIMIT $7"
        );
        let repository = filter.repository.as_ref().filter(|_| filter.user.is_some());
        let mut query = sqlx::query(&text)
            .bind(&filter.session)
            .bind(filter.user.clone().unwrap_or_default())
            .bind(
                repository
                    .map(|name| format!("{name}:"))
                    .unwrap_or_default(),
            )
            .bind(filter.caller.clone().unwrap_or_default())
            .bind(filter.after.map(|id| id.to_string()).unwrap_or_default())
            .bind(filter.not_removed_by.clone().unwrap_or_default())
            .bind(i64::from(most));
        for other in others {
            query = query.bind(other);
        }
        let rows = query.fetch_all(&self.pool).await?;
        rows.iter().map(save_of).collect()
    }
}
