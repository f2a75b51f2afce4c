//! Who is signed in in a browser: so that every manager knows it, and each can end it.
//!
//! What the browser holds is here as a digest only: who reads the record can sign in nowhere.

use sqlx::Row as _;

use super::{Error, Record};

/// Someone who is signed in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SignIn {
    /// SHA-256 of the cookie's value.
    pub cookie: String,
    /// SHA-256 of the page's key.
    pub page: String,
    /// Who, for the bound of [`Record::sign_in`].
    pub caller: String,
    /// What it rests on: which token, or whose tokens.
    pub basis: String,
    /// The user, where the basis does not say it.
    pub user: String,
    /// Whether the basis said that this is an administrator.
    pub administrator: bool,
    /// From when on it does not hold any more.
    pub expires_ms: i64,
}

impl Record {
    /// Writes it down. Of each caller the `most` latest stay.
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
            "INSERT INTO signins (cookie, page, caller, basis, user_name, administrator, created_ms, expires_ms)
             VALUES ($1, $2, $3, $4, $5, $6, $7, $8)",
        )
        .bind(&new.cookie)
        .bind(&new.page)
        .bind(&new.caller)
        .bind(&new.basis)
        .bind(&new.user)
        .bind(i64::from(new.administrator))
        .bind(now_ms)
        .bind(new.expires_ms)
        .execute(&mut *work)
        .await?;
        work.commit().await?;
        Ok(())
    }

    /// Whose this cookie is, if it holds at `now_ms`.
    pub async fn signed_in(&self, cookie: &str, now_ms: i64) -> Result<Option<SignIn>, Error> {
        let row = sqlx::query(
            "SELECT page, caller, basis, user_name, administrator, expires_ms FROM signins
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
            expires_ms: row.try_get("expires_ms")?,
        }))
    }

    /// Ends it, for all managers.
    pub async fn sign_out(&self, cookie: &str) -> Result<(), Error> {
        sqlx::query("DELETE FROM signins WHERE cookie = $1")
            .bind(cookie)
            .execute(&self.pool)
            .await?;
        Ok(())
    }
}
