//! What users have set about e-mails, and how many each has had.

use sqlx::{Any, Row as _, Transaction};

use super::receiver::Language;
use super::{Error, Record};
use crate::service::job::now_ms;

/// Maximum number of e-mails about one user's saves in a day (UTC).
pub const MAILS_PER_DAY: i64 = 100;
/// How many days the counts are kept.
const DAYS_KEPT: i64 = 2;
const DAY_MS: i64 = 24 * 3600 * 1000;

/// Which ends of saves a user wants e-mails about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MailSetting {
    /// The user's address when this was set, for requests that do not contain one: those of portals and of API tokens.
    pub address: String,
    /// Language of the e-mails.
    pub language: Language,
    /// Seconds that a save has to take.
    pub over_s: u32,
}

/// Counts an e-mail of a user. Returns `false` if there were as many today as may be.
pub(super) async fn count(
    work: &mut Transaction<'static, Any>,
    user: &str,
    now_ms: i64,
) -> Result<bool, Error> {
    let row = sqlx::query(
        "INSERT INTO mail_counts (user_name, day, n) VALUES ($1, $2, 1)
         ON CONFLICT (user_name, day) DO UPDATE SET n = mail_counts.n + 1 RETURNING n",
    )
    .bind(user)
    .bind(now_ms.div_euclid(DAY_MS))
    .fetch_one(&mut **work)
    .await?;
    Ok(row.try_get::<i64, _>("n")? <= MAILS_PER_DAY)
}

impl Record {
    /// Returns what a user has set about e-mails; `None`: the user wants none.
    pub async fn mail_setting(&self, user: &str) -> Result<Option<MailSetting>, Error> {
        let row =
            sqlx::query("SELECT address, language, over_s FROM mail_settings WHERE user_name = $1")
                .bind(user)
                .fetch_optional(&self.pool)
                .await?;
        let Some(row) = row else { return Ok(None) };
        let language: String = row.try_get("language")?;
        Ok(Some(MailSetting {
            address: row.try_get("address")?,
            // That of a newer program is not an error: the text is in English then.
            language: Language::from_code(&language).unwrap_or_default(),
            over_s: u32::try_from(row.try_get::<i64, _>("over_s")?).unwrap_or(u32::MAX),
        }))
    }

    /// Sets which e-mails a user wants; `None`: none.
    pub async fn set_mail(&self, user: &str, setting: Option<&MailSetting>) -> Result<(), Error> {
        let Some(setting) = setting else {
            sqlx::query("DELETE FROM mail_settings WHERE user_name = $1")
                .bind(user)
                .execute(&self.pool)
                .await?;
            return Ok(());
        };
        sqlx::query(
            "INSERT INTO mail_settings (user_name, address, language, over_s) VALUES ($1, $2, $3, $4)
             ON CONFLICT (user_name) DO UPDATE
             SET address = excluded.address, language = excluded.language, over_s = excluded.over_s",
        )
        .bind(user)
        .bind(&setting.address)
        .bind(setting.language.code())
        .bind(i64::from(setting.over_s))
        .execute(&self.pool)
        .await?;
        Ok(())
    }

    /// Deletes counts of earlier days.
    pub(super) async fn forget_mail_counts(&self) -> Result<(), Error> {
        sqlx::query("DELETE FROM mail_counts WHERE day < $1")
            .bind(now_ms().div_euclid(DAY_MS) - DAYS_KEPT)
            .execute(&self.pool)
            .await?;
        Ok(())
    }
}
