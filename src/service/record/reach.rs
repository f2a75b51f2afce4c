//! Whether the database can be reached. The pool waits for a connection for a long time and then says only that there was
//! none; here the reason is found out within seconds, with a connection of its own.

use std::sync::Arc;
use std::time::Duration;

use sqlx::postgres::PgConnectOptions;
use sqlx::{AnyPool, ConnectOptions as _, Connection as _};
use tokio::sync::watch;

use super::Error;

/// Maximum wait for a connection of the pool before the reason is looked for.
const POOL: Duration = Duration::from_millis(1500);
/// Maximum time to connect, with authentication.
const CONNECT: Duration = Duration::from_secs(2);
/// Maximum time to connect at the start, where a database may be slow for once.
const FIRST: Duration = Duration::from_secs(4);

/// Where the database is. Clones share what is known about it.
#[derive(Clone)]
pub(super) struct Location(Arc<Inner>);

struct Inner {
    /// File, or host, port and database, without credentials.
    at: String,
    /// `None` for SQLite, which has no server.
    server: Option<PgConnectOptions>,
    /// Whether the last check failed.
    down: watch::Sender<bool>,
}

/// What a check found, compared with the one before.
#[derive(Debug)]
pub(crate) enum Change {
    /// It answers as before, or fails as before.
    None,
    /// It does not answer any more.
    Down(Error),
    /// It answers again.
    Up,
}

impl Location {
    pub(super) fn file(path: &str) -> Self {
        Self::new(path.to_owned(), None)
    }

    /// Fails with [`Error::Place`] if the URL is invalid. The error does not repeat the URL, which may hold a password.
    pub(super) fn server(url: &str) -> Result<Self, Error> {
        let server: PgConnectOptions = url
            .parse()
            .map_err(|_| Error::Place("(what follows postgres://)".to_owned()))?;
        let host = match server.get_socket() {
            Some(socket) => socket.display().to_string(),
            None => server.get_host().to_owned(),
        };
        let database = server.get_database().unwrap_or_default();
        let at = format!("{host}:{}/{database}", server.get_port());
        Ok(Self::new(at, Some(server)))
    }

    fn new(at: String, server: Option<PgConnectOptions>) -> Self {
        Self(Arc::new(Inner {
            at,
            server,
            down: watch::Sender::new(false),
        }))
    }

    pub(super) fn at(&self) -> &str {
        &self.0.at
    }

    pub(super) fn is_down(&self) -> bool {
        *self.0.down.borrow()
    }

    /// Completes when a check has found that the database does not answer.
    pub(super) async fn wait_until_down(&self) {
        // The sender lives as long as `self`, so that an error cannot occur.
        let _ = self.0.down.subscribe().wait_for(|down| *down).await;
    }

    /// Connects, and fails with the reason if the database cannot be used.
    pub(super) async fn connect(&self) -> Result<(), Error> {
        self.connect_within(FIRST).await
    }

    async fn connect_within(&self, limit: Duration) -> Result<(), Error> {
        let Some(server) = &self.0.server else {
            return Ok(());
        };
        let tried = async { server.connect().await?.close().await };
        let tried = tokio::time::timeout(limit, tried).await;
        tried
            .unwrap_or_else(|_| {
                let text = format!("no answer within {} s", limit.as_secs());
                Err(std::io::Error::new(std::io::ErrorKind::TimedOut, text).into())
            })
            .map_err(|source| Error::Unreachable {
                at: self.0.at.clone(),
                source,
            })
    }

    /// Checks whether the database answers, in less than 4 s. A pool that is only busy counts as an answer.
    pub(super) async fn check(&self, pool: &AnyPool) -> Change {
        if self.0.server.is_none() {
            return Change::None;
        }
        let answered = async { sqlx::query("SELECT 1").fetch_one(pool).await.is_ok() };
        let answered = tokio::time::timeout(POOL, answered).await.unwrap_or(false);
        let now = if answered {
            Ok(())
        } else {
            self.connect_within(CONNECT).await
        };
        let before = self.0.down.send_replace(now.is_err());
        match (before, now) {
            (false, Err(error)) => Change::Down(error),
            (true, Ok(())) => Change::Up,
            _ => Change::None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_shown_without_credentials() -> Result<(), Error> {
        for (url, at) in [
            (
                "postgres://u:hunter2@db.example.org/upperdeck",
                "db.example.org:5432/upperdeck",
            ),
            (
                "postgres://u:hunter2@%2Frun%2Fpostgresql/x",
                "/run/postgresql:5432/x",
            ),
            ("postgresql://u@[::1]:5433/x", "[::1]:5433/x"),
        ] {
            assert_eq!(Location::server(url)?.at(), at, "{url}");
        }
        let error = Location::server("postgres://u:hunter2@host:port/x").err();
        let told = error.map(|error| error.to_string()).unwrap_or_default();
        assert!(
            told.contains("location") && !told.contains("hunter2"),
            "{told}"
        );
        Ok(())
    }
}
