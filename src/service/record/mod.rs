//! What was asked for and what became of it: the truth that survives every process and every queue.
//!
//! SQLite for one manager, PostgreSQL for several; one text of SQL for both. Every change of a save is one transaction: the
//! save with its next version, that version for those who watch, the transitions for the audit, and the errands to the
//! queue that follow from it. A change is written only over the version that it was made from.

mod audit;
mod change;
mod outbox;
mod save;
mod schema;
mod signin;
mod submit;
mod view;

use std::path::{Path, PathBuf};
use std::time::Duration;

use sqlx::any::{AnyConnectOptions, AnyPoolOptions};
use sqlx::{Any, AnyPool, Executor as _, Transaction};

use crate::service::job::{JobId, State};

pub use self::audit::Transition;
pub use self::outbox::Taken;
pub use self::save::{Draft, Errand, Failure, Policy, Progress, Remark, Save};
pub use self::signin::SignIn;
pub use self::submit::{Most, Request, Submitted};
pub use self::view::{Filter, Head, OpenSave, Standing};

/// PostgreSQL connections of one manager.
const CONNECTIONS: u32 = 8;
/// How long a connection is waited for, and SQLite's lock.
const PATIENCE: Duration = Duration::from_secs(20);

/// The record in SQLite or PostgreSQL. Clones are the same one.
#[derive(Clone)]
pub struct Record {
    pool: AnyPool,
    sqlite: bool,
}

/// Why the record cannot be used, or does not hold what was looked for.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A place that is none.
    #[error(
        "{0:?} is no place for a record: write sqlite:PATH, a path, or postgres://USER:PASSWORD@HOST/DATABASE"
    )]
    Place(String),
    /// The file cannot be made.
    #[error("the record at {path}: {source}")]
    File {
        /// The database's file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A later version has been here.
    #[error(
        "the record's tables are of version {found}, this program knows up to {known}: use the newer program"
    )]
    Newer {
        /// In the record.
        found: i64,
        /// The program's.
        known: i64,
    },
    /// The database says so.
    #[error("the record: {0}")]
    Database(#[from] sqlx::Error),
    /// A row that this program did not write.
    #[error("the record of save {save} cannot be read: {reason}")]
    Row {
        /// Which.
        save: String,
        /// Why.
        reason: String,
    },
    /// Others change it all the time.
    #[error("save {0} is being changed by others again and again")]
    Contended(JobId),
    /// Another save of that session, or to that tag, is open.
    #[error("save {0} is in the way")]
    InTheWay(JobId),
}

impl Error {
    /// Whether it lies in what is to be read or written, however often that is tried, and not in the database.
    pub fn is_of_one_save(&self) -> bool {
        match self {
            Self::Row { .. } => true,
            // SQLSTATE class 22: data exceptions. SQLite's codes are shorter.
            Self::Database(sqlx::Error::Database(error)) => error
                .code()
                .is_some_and(|code| code.len() == 5 && code.starts_with("22")),
            _ => false,
        }
    }
}

impl Record {
    /// Opens the record at `place` (`sqlite:PATH`, a path, `postgres://…`), makes it where there is none and brings it up to
    /// this version. Several managers may do so at once.
    pub async fn open(place: &str) -> Result<Self, Error> {
        sqlx::any::install_default_drivers();
        if place.starts_with("postgres://") || place.starts_with("postgresql://") {
            return Self::connect(place, false).await;
        }
        let path = match place.strip_prefix("sqlite:") {
            Some(path) => path.strip_prefix("//").unwrap_or(path),
            // A scheme that is none of ours is no file name.
            None if place.contains("://") => "",
            None => place,
        };
        // The driver would take these for something else.
        if path.is_empty() || path.contains(['?', '#', '%']) || path.contains(":memory:") {
            return Err(Error::Place(place.chars().take(200).collect()));
        }
        make_private(Path::new(path)).map_err(|source| Error::File {
            path: path.into(),
            source,
        })?;
        Self::connect(&format!("sqlite:{path}"), true).await
    }

    /// Whether the record at `place` answers, without making or changing anything; false where it is a file that is not
    /// there yet and can be made.
    pub async fn look(place: &str) -> Result<bool, Error> {
        sqlx::any::install_default_drivers();
        let url = if place.starts_with("postgres://") || place.starts_with("postgresql://") {
            place.to_owned()
        } else {
            let path = place.strip_prefix("sqlite:").unwrap_or(place);
            let path = path.strip_prefix("//").unwrap_or(path);
            let file = |source| Error::File {
                path: path.into(),
                source,
            };
            let path_of = Path::new(path);
            let dir = path_of.parent().filter(|dir| !dir.as_os_str().is_empty());
            let writes = rustix::fs::Access::WRITE_OK;
            rustix::fs::access(dir.unwrap_or(Path::new(".")), writes)
                .map_err(|error| file(error.into()))?;
            match rustix::fs::access(path_of, writes | rustix::fs::Access::READ_OK) {
                Ok(()) => format!("sqlite:{path}?mode=ro"),
                Err(rustix::io::Errno::NOENT) => return Ok(false),
                Err(error) => return Err(file(error.into())),
            }
        };
        let options: AnyConnectOptions = url
            .parse()
            .map_err(|_| Error::Place("(what follows postgres://)".to_owned()))?;
        let pool = AnyPoolOptions::new()
            .max_connections(1)
            .acquire_timeout(PATIENCE)
            .connect_with(options)
            .await?;
        sqlx::query("SELECT 1").fetch_one(&pool).await?;
        pool.close().await;
        Ok(true)
    }

    async fn connect(url: &str, sqlite: bool) -> Result<Self, Error> {
        let options: AnyConnectOptions = url
            .parse()
            .map_err(|_| Error::Place("(what follows postgres://)".to_owned()))?;
        // SQLite has one writer: one connection queues in memory what the file would make wait.
        let pool = AnyPoolOptions::new()
            .max_connections(if sqlite { 1 } else { CONNECTIONS })
            .acquire_timeout(PATIENCE)
            .after_connect(move |connection, _| {
                Box::pin(async move {
                    if sqlite {
                        // FULL: what was accepted survives a power cut.
                        let pragmas = format!(
                            "PRAGMA busy_timeout = {}; PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL",
                            PATIENCE.as_millis()
                        );
                        connection.execute(pragmas.as_str()).await?;
                    }
                    Ok(())
                })
            })
            .connect_with(options)
            .await?;
        schema::migrate(&pool, sqlite).await?;
        Ok(Self { pool, sqlite })
    }

    /// Whether it answers.
    pub async fn ping(&self) -> Result<(), Error> {
        sqlx::query("SELECT 1").fetch_one(&self.pool).await?;
        Ok(())
    }

    /// Ends its connections, once what is under way is done.
    pub async fn close(&self) {
        self.pool.close().await;
    }

    async fn begin(&self) -> Result<Transaction<'static, Any>, Error> {
        let begin = if self.sqlite {
            "BEGIN IMMEDIATE"
        } else {
            "BEGIN"
        };
        Ok(self.pool.begin_with(begin).await?)
    }
}

/// The file, for nobody else: messages and names are users' own.
fn make_private(path: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::OpenOptionsExt as _;
    std::fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .map(drop)
}

/// Rows hold what was written, or say whose they are.
fn read<T: serde::de::DeserializeOwned>(save: &str, text: &str) -> Result<T, Error> {
    serde_json::from_str(text).map_err(|error| Error::Row {
        save: save.to_owned(),
        reason: error.to_string(),
    })
}

fn written<T: serde::Serialize>(save: JobId, value: &T) -> Result<String, Error> {
    serde_json::to_string(value).map_err(|error| Error::Row {
        save: save.to_string(),
        reason: error.to_string(),
    })
}

fn id_of(text: &str) -> Result<JobId, Error> {
    text.parse().map_err(|_| Error::Row {
        save: text.to_owned(),
        reason: "its ID is none".to_owned(),
    })
}

fn state_of(save: &str, text: &str) -> Result<State, Error> {
    State::named(text).ok_or_else(|| Error::Row {
        save: save.to_owned(),
        reason: format!("{text:?} is no state"),
    })
}
