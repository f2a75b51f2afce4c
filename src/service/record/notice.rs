//! The outbox of notices: what receivers outside of the service are told about a save. A notice is written in the
//! transaction of the change that it is about, and removed once its receiver has taken it, so that each is delivered at
//! least once, whichever manager restarts. How a kind of receiver is reached is the managers' business.

use std::sync::atomic::Ordering;
use std::time::Duration;

use sqlx::{Any, Row as _, Transaction};

use super::receiver::{Receiver, ReceiverKind, SaveEvent};
use super::save::Step;
use super::{Error, Record, Save, mail, read, written};
use crate::service::job::now_ms;

/// How long a notice belongs to the manager that took it. If it is not delivered by then, the manager is assumed to have
/// died. Longer than any delivery may take.
const HELD_FOR: Duration = Duration::from_secs(60);
/// Maximum number of notices about one user's saves that wait for the site's receivers, and again for the user's own.
const MAX_WAITING: i64 = 1000;

/// Which receivers notices are taken for. Each group has places of its own in a manager, so that none holds up another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Audience {
    /// The webhooks of the site.
    Site,
    /// The webhooks that users name.
    Users,
    /// The e-mails of users, which go through one server.
    Mail,
}

impl Audience {
    fn site(self) -> bool {
        self == Self::Site
    }

    fn kind(self) -> ReceiverKind {
        match self {
            Self::Site | Self::Users => ReceiverKind::Webhook,
            Self::Mail => ReceiverKind::Email,
        }
    }
}

/// A notice that this manager has taken.
#[derive(Clone, Debug, PartialEq)]
pub struct Notice {
    /// Unique; the same however often it is sent.
    pub id: String,
    /// What happened.
    pub event: SaveEvent,
    /// When: milliseconds since the epoch, UTC.
    pub at_ms: i64,
    /// How the receiver is reached.
    pub kind: ReceiverKind,
    /// Where it is.
    pub address: String,
    /// Whether it is a receiver of the site, not one that a user has named.
    pub site: bool,
    /// Number of deliveries that failed.
    pub tries: u32,
    /// The save after the change.
    pub save: Save,
    taken_ms: i64,
}

/// Writes the notices of a change to the receivers of the site and to those that the save names.
pub(super) async fn announce(
    record: &Record,
    work: &mut Transaction<'static, Any>,
    save: &Save,
    steps: &[Step],
) -> Result<(), Error> {
    if record.receivers.is_empty() && save.notify.is_empty() {
        return Ok(());
    }
    let site = record.receivers.iter().map(|receiver| (receiver, true));
    let own = save.notify.iter().map(|receiver| (receiver, false));
    let receivers: Vec<_> = site.chain(own).collect();
    let took = save
        .finished_ms
        .map(|end| end.saturating_sub(save.created_ms));
    for event in steps
        .iter()
        .filter_map(|step| SaveEvent::of(step.from, step.to))
    {
        for (receiver, site) in &receivers {
            if receiver.wants(event, took) {
                write(record, work, save, event, receiver, *site).await?;
            }
        }
    }
    Ok(())
}

async fn write(
    record: &Record,
    work: &mut Transaction<'static, Any>,
    save: &Save,
    event: SaveEvent,
    receiver: &Receiver,
    site: bool,
) -> Result<(), Error> {
    let waiting =
        sqlx::query("SELECT count(*) AS n FROM notices WHERE user_name = $1 AND site = $2")
            .bind(&save.user)
            .bind(i64::from(site))
            .fetch_one(&mut **work)
            .await?;
    if waiting.try_get::<i64, _>("n")? >= MAX_WAITING {
        record.notices_dropped.fetch_add(1, Ordering::Relaxed);
        tracing::warn!(job = %save.id, user = save.user, event = event.name(), site,
            "a notice is dropped: as many as may be wait already for receivers that do not take them");
        return Ok(());
    }
    let now = now_ms();
    if receiver.kind == ReceiverKind::Email && !mail::count(work, &save.user, now).await? {
        record.notices_dropped.fetch_add(1, Ordering::Relaxed);
        tracing::warn!(job = %save.id, user = save.user, event = event.name(),
            "an e-mail is dropped: this user has had as many within a day as may be");
        return Ok(());
    }
    // A lane is what one receiver, or one user with all receivers of a kind, may hold up.
    let lane = match (site, receiver.kind) {
        (true, kind) => format!("site:{}:{}", kind.name(), receiver.address),
        (false, ReceiverKind::Webhook) => format!("user:{}", save.user),
        (false, ReceiverKind::Email) => format!("mail:{}", save.user),
    };
    sqlx::query(
        "INSERT INTO notices (id, save, user_name, event, kind, address, site, lane, at_ms, body, tries, due_ms, taken_ms,
            taken_by)
         VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, 0, $9, 0, '')",
    )
    .bind(uuid::Uuid::now_v7().to_string())
    .bind(save.id.to_string())
    .bind(&save.user)
    .bind(event.name())
    .bind(receiver.kind.name())
    .bind(&receiver.address)
    .bind(i64::from(site))
    .bind(lane)
    .bind(now)
    .bind(written(save.id, save)?)
    .execute(&mut **work)
    .await?;
    Ok(())
}

impl Record {
    /// Sets the receivers that are told about every save, for this value and its clones.
    #[must_use]
    pub fn with_receivers(mut self, receivers: Vec<Receiver>) -> Self {
        self.receivers = receivers.into();
        self
    }

    /// Returns the number of notices that this process has not written because too many were waiting.
    pub fn notices_dropped(&self) -> u64 {
        self.notices_dropped.load(Ordering::Relaxed)
    }

    /// Takes at most `most` notices for `audience` that are due, and at most `of_each` of one receiver of the site, or of
    /// one user. No other manager can take them for a minute, nor others of the same lane: a receiver that hangs holds up
    /// only itself.
    pub async fn take_notices(
        &self,
        manager: &str,
        audience: Audience,
        most: u32,
        of_each: u32,
    ) -> Result<Vec<Notice>, Error> {
        let now = now_ms();
        let rows = sqlx::query(
            "UPDATE notices SET taken_ms = $1, taken_by = $2
             WHERE due_ms <= $1 AND taken_ms < $3 AND id IN (
                 SELECT id FROM (
                     SELECT id, due_ms, row_number() OVER (PARTITION BY lane ORDER BY due_ms, id) AS place FROM notices
                     WHERE site = $4 AND kind = $7 AND due_ms <= $1 AND taken_ms < $3
                     AND lane NOT IN (SELECT lane FROM notices WHERE taken_ms >= $3)
                 ) AS waiting WHERE place <= $5 ORDER BY due_ms, id LIMIT $6
             ) RETURNING id, save, event, at_ms, kind, address, tries, body",
        )
        .bind(now)
        .bind(manager)
        .bind(now - HELD_FOR.as_millis() as i64)
        .bind(i64::from(audience.site()))
        .bind(i64::from(of_each))
        .bind(i64::from(most))
        .bind(audience.kind().name())
        .fetch_all(&self.pool)
        .await?;
        let mut notices = Vec::with_capacity(rows.len());
        for row in &rows {
            match notice(row, audience.site(), now) {
                Ok(notice) => notices.push(notice),
                // Of a newer program, which delivers it once it holds the row no longer.
                Err(error) => tracing::error!(error = %error, "a notice cannot be read"),
            }
        }
        notices.sort_by(|a: &Notice, b| a.id.cmp(&b.id));
        Ok(notices)
    }

    /// Removes a notice that is delivered or given up.
    pub async fn notice_done(&self, manager: &str, taken: &Notice) -> Result<(), Error> {
        sqlx::query("DELETE FROM notices WHERE id = $1 AND taken_by = $2 AND taken_ms = $3")
            .bind(&taken.id)
            .bind(manager)
            .bind(taken.taken_ms)
            .execute(&self.pool)
            .await?;
        Ok(())
    }

    /// Releases a notice whose delivery failed. It is due again after `pause`.
    pub async fn notice_failed(
        &self,
        manager: &str,
        taken: &Notice,
        pause: Duration,
    ) -> Result<(), Error> {
        let pause = i64::try_from(pause.as_millis()).unwrap_or(i64::MAX / 4);
        sqlx::query(
            "UPDATE notices SET taken_ms = 0, taken_by = '', tries = tries + 1, due_ms = $4
             WHERE id = $1 AND taken_by = $2 AND taken_ms = $3",
        )
        .bind(&taken.id)
        .bind(manager)
        .bind(taken.taken_ms)
        .bind(now_ms().saturating_add(pause))
        .execute(&self.pool)
        .await?;
        Ok(())
    }

    /// Returns the numbers of notices that wait for the site's receivers and for users' own.
    pub async fn notices_waiting(&self) -> Result<(u64, u64), Error> {
        let rows = sqlx::query("SELECT site, count(*) AS n FROM notices GROUP BY site")
            .fetch_all(&self.pool)
            .await?;
        let mut waiting = (0, 0);
        for row in rows {
            let count = row.try_get::<i64, _>("n")? as u64;
            if row.try_get::<i64, _>("site")? != 0 {
                waiting.0 = count;
            } else {
                waiting.1 = count;
            }
        }
        Ok(waiting)
    }
}

fn notice(row: &sqlx::any::AnyRow, site: bool, taken_ms: i64) -> Result<Notice, Error> {
    let save: String = row.try_get("save")?;
    let unknown = |what: &str| Error::Row {
        save: save.clone(),
        reason: format!("{what:?} is unknown in a notice"),
    };
    let event: String = row.try_get("event")?;
    let kind: String = row.try_get("kind")?;
    Ok(Notice {
        id: row.try_get("id")?,
        event: SaveEvent::from_name(&event).ok_or_else(|| unknown(&event))?,
        at_ms: row.try_get("at_ms")?,
        kind: ReceiverKind::from_name(&kind).ok_or_else(|| unknown(&kind))?,
        address: row.try_get("address")?,
        site,
        tries: u32::try_from(row.try_get::<i64, _>("tries")?).unwrap_or(u32::MAX),
        save: read(&save, &row.try_get::<String, _>("body")?)?,
        taken_ms,
    })
}
