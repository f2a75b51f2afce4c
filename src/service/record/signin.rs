//! Sign-ins of browsers. They are in the record so that every manager accepts them and each can end them.
//!
//! Only digests of the browser's secrets are stored, so read access to the record is not enough to sign in.

use sqlx::Row as _;

use super::{Error, Record};

/// A sign-in of a browser.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SignIn {
    /// SHA-256 of the cookie's value.
    pub cookie: String,
    /// SHA-256 of the page's key.
    pub page: String,
    /// The signed-in identity that the limit of [`Record::sign_in`] applies to.
    pub caller: String,
    /// The credential that it is based on: a token, or tokens of an issuer.
    pub basis: String,
    /// The user, if `basis` does not determine it.
    pub user: String,
    /// Whether the credential identified an administrator.
    pub administrator: bool,
    /// The user's groups as the credential stated them, each on a line.
    pub groups: String,
    /// The user's e-mail address as the credential stated it.
    pub email: Option<String>,
    /// What the identity provider needs to end its own session, encrypted with the cookie's value; may be empty.
    pub hint: String,
    /// Expiry: milliseconds since the epoch, UTC.
    pub expires_ms: i64,
}

impl Record {
    /// Stores a sign-in. Only the latest `most` sign-ins of each caller are kept.
    pub async fn sign_in(&self, new: &SignIn, now_ms: i64, most: u32) -> Result<(), Error> {
        let mut work = self.begin().await?;
        sqlx::query("DELETE FROM signins WHERE caller = $1 AND expires_ms <= $2")
            .bind(&new.caller)
            .bind(now_ms)
            .execute(&mut *work)
            .await?;
        sqlx::query(
            "DELETE FROM signins WHERE caller = $1 AND cookie NOT IN
             (SELECT cookie FROM signins WHERE caller = $1 ORDER BY created_ms DESC, cookie LIMIT $2)",
        )
        .bind(&new.caller)
        .bind(i64::from(most.saturating_sub(1)))
        .execute(&mut *work)
        .await?;
        sqlx::query(
            "INSERT INTO signins (cookie, page, caller, basis, user_name, administrator, created_ms, expires_ms,
             user_groups, email, hint) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)",
        )
        .bind(&new.cookie)
        .bind(&new.page)
        .bind(&new.caller)
        .bind(&new.basis)
        .bind(&new.user)
        .bind(i64::from(new.administrator))
        .bind(now_ms)
        .bind(new.expires_ms)
        .bind(&new.groups)
        .bind(new.email.clone().unwrap_or_default())
        .bind(&new.hint)
        .execute(&mut *work)
        .await?;
        work.commit().await?;
        Ok(())
    }

    /// Returns the sign-in with this cookie if it is valid at `now_ms`.
    pub async fn signed_in(&self, cookie: &str, now_ms: i64) -> Result<Option<SignIn>, Error> {
        let row = sqlx::query(
            "SELECT page, caller, basis, user_name, administrator, expires_ms, user_groups, email, hint FROM signins
             WHERE cookie = $1 AND expires_ms > $2",
        )
        .bind(cookie)
        .bind(now_ms)
        .fetch_optional(&self.pool)
        .await?;
        let Some(row) = row else { return Ok(None) };
        Ok(Some(SignIn {
            cookie: cookie.to_owned(),
            page: row.try_get("page")?,
            caller: row.try_get("caller")?,
            basis: row.try_get("basis")?,
            user: row.try_get("user_name")?,
            administrator: row.try_get::<i64, _>("administrator")? != 0,
            groups: row.try_get("user_groups")?,
            email: Some(row.try_get::<String, _>("email")?).filter(|email| !email.is_empty()),
            hint: row.try_get("hint")?,
            expires_ms: row.try_get("expires_ms")?,
        }))
    }

    /// Records that a sign-in at an identity provider is complete, so that its answer is of no use a second time. Returns
    /// `false` if it was complete before. `flow` is a digest; it is remembered until `until_ms`.
    pub async fn use_flow(&self, flow: &str, now_ms: i64, until_ms: i64) -> Result<bool, Error> {
        sqlx::query("DELETE FROM signin_flows WHERE until_ms <= $1")
            .bind(now_ms)
            .execute(&self.pool)
            .await?;
        let done = sqlx::query(
            "INSERT INTO signin_flows (flow, until_ms) VALUES ($1, $2) ON CONFLICT (flow) DO NOTHING",
        )
        .bind(flow)
        .bind(until_ms)
        .execute(&self.pool)
        .await?;
        Ok(done.rows_affected() == 1)
    }

    /// Ends a sign-in for all managers.
    pub async fn sign_out(&self, cookie: &str) -> Result<(), Error> {
        sqlx::query("DELETE FROM signins WHERE cookie = $1")
            .bind(cookie)
            .execute(&self.pool)
            .await?;
        Ok(())
    }
}
