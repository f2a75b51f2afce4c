//! The record: the authoritative database of all saves, which survives the loss of any process and of the queue.
//!
//! It uses SQLite for one manager and PostgreSQL for several, with the same SQL for both. Every change of a save is one
//! transaction: the save with its next version, that version for watchers, the transitions for the audit log, and the
//! resulting requests to the queue. A change is written only over the version that it is based on.

mod audit;
mod autosave;
mod change;
mod images;
mod mail;
mod notice;
mod outbox;
mod packages;
mod reach;
mod receiver;
mod save;
mod schema;
mod sessions;
mod signin;
mod submit;
mod timeline;
mod view;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use sqlx::any::{AnyConnectOptions, AnyPoolOptions};
use sqlx::{Any, AnyPool, Executor as _, Transaction};

use crate::service::job::{JobId, State};

pub use self::autosave::{EndSetting, LastSave, StoredAutosave};
pub use self::images::{Fate, ImageKey, Note, NoteChange};
pub use self::mail::{MAILS_PER_DAY, MailSetting};
pub use self::notice::{Audience, Notice};
pub(crate) use self::outbox::OutboxEntry;
pub(crate) use self::reach::Change;
use self::reach::Location;
pub use self::receiver::{Language, Receiver, ReceiverKind, SaveEvent};
pub(crate) use self::save::{AUTOSAVE, ENDED};
pub use self::save::{
    AutosaveSetting, Draft, Failure, Held, MadeBy, OutboxAction, Policy, Progress, Save,
    SaveWarning,
};
pub use self::signin::SignIn;
pub use self::submit::{Request, Submitted, UserLimits};
pub use self::timeline::TimelineFilter;
pub use self::view::{Filter, OpenSave, OpenSaveState, SaveVersion};

/// Number of PostgreSQL connections per manager.
const CONNECTIONS: u32 = 8;
/// Maximum wait for a connection, and for SQLite's lock.
const PATIENCE: Duration = Duration::from_secs(20);

/// The record in SQLite or PostgreSQL. Clones share their connections.
#[derive(Clone)]
pub struct Record {
    pool: AnyPool,
    sqlite: bool,
    /// Receivers that are told about every save.
    receivers: Arc<[Receiver]>,
    notices_dropped: Arc<AtomicU64>,
    location: Location,
}

/// Why the record cannot be used or read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The address of the database is invalid.
    #[error(
        "{0:?} is not the location of a record: write sqlite:PATH, a path, or postgres://USER:PASSWORD@HOST/DATABASE"
    )]
    Place(String),
    /// The file of the database cannot be created or opened.
    #[error("the record at {path}: {source}")]
    File {
        /// Path of the file.
        path: PathBuf,
        /// Error of the operating system.
        source: std::io::Error,
    },
    /// The database was migrated by a newer program.
    #[error(
        "the record's tables are of version {found}, this program knows up to {known}: use the newer program"
    )]
    Newer {
        /// Version of the schema in the database.
        found: i64,
        /// Highest version that this program supports.
        known: i64,
    },
    /// The server of the database cannot be reached, or does not let this program in.
    #[error("the record at {at} cannot be used: {source}")]
    Unreachable {
        /// Host, port and database, without credentials.
        at: String,
        /// Error of the client.
        source: sqlx::Error,
    },
    /// The database returned an error.
    #[error("the record: {0}")]
    Database(#[from] sqlx::Error),
    /// A row was not written by this program.
    #[error("the record of save {save} cannot be read: {reason}")]
    Row {
        /// ID of the save.
        save: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Other writers kept changing the save.
    #[error("save {0} keeps being changed by others")]
    Contended(JobId),
    /// Another open save has the same session or destination.
    #[error("save {0} is in the way")]
    Conflict(JobId),
}

impl Error {
    /// Returns whether the error is caused by the data of one save, so that a retry cannot help, rather than by the
    /// database.
    pub(crate) fn is_of_one_save(&self) -> bool {
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
    /// Opens the record at `place` (`sqlite:PATH`, a path, or `postgres://…`), creates it if it does not exist, and
    /// migrates it to the current version. Several managers may do so at the same time.
    ///
    /// Fails with [`Error::Place`] if the address is invalid, and with [`Error::Newer`] if a newer program has migrated
    /// it.
    pub async fn open(place: &str) -> Result<Self, Error> {
        sqlx::any::install_default_drivers();
        if place.starts_with("postgres://") || place.starts_with("postgresql://") {
            let location = Location::server(place)?;
            location.connect().await?;
            return Self::connect(place, location, false).await;
        }
        let path = match place.strip_prefix("sqlite:") {
            Some(path) => path.strip_prefix("//").unwrap_or(path),
            // An address with an unknown scheme is not taken for a file name.
            None if place.contains("://") => "",
            None => place,
        };
        // The driver gives these characters a special meaning.
        if path.is_empty() || path.contains(['?', '#', '%']) || path.contains(":memory:") {
            return Err(Error::Place(place.chars().take(200).collect()));
        }
        make_private(Path::new(path)).map_err(|source| Error::File {
            path: path.into(),
            source,
        })?;
        Self::connect(&format!("sqlite:{path}"), Location::file(path), true).await
    }

    /// Checks whether the record at `place` responds, without creating or changing anything. Returns `false` if it is a
    /// file that does not exist but can be created.
    pub(crate) async fn check(place: &str) -> Result<bool, Error> {
        sqlx::any::install_default_drivers();
        if place.starts_with("postgres://") || place.starts_with("postgresql://") {
            return Location::server(place)?.connect().await.map(|()| true);
        }
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
        let url = match rustix::fs::access(path_of, writes | rustix::fs::Access::READ_OK) {
            Ok(()) => format!("sqlite:{path}?mode=ro"),
            Err(rustix::io::Errno::NOENT) => return Ok(false),
            Err(error) => return Err(file(error.into())),
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

    async fn connect(url: &str, location: Location, sqlite: bool) -> Result<Self, Error> {
        let options: AnyConnectOptions = url
            .parse()
            .map_err(|_| Error::Place("(what follows postgres://)".to_owned()))?;
        // SQLite permits only one writer. With one connection, writers queue in memory instead of waiting for the lock
        // on the file.
        let pool = AnyPoolOptions::new()
            .max_connections(if sqlite { 1 } else { CONNECTIONS })
            .acquire_timeout(PATIENCE)
            .after_connect(move |connection, _| {
                Box::pin(async move {
                    if sqlite {
                        // With FULL, an accepted save survives a power failure.
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
        Ok(Self {
            pool,
            sqlite,
            receivers: Arc::default(),
            notices_dropped: Arc::default(),
            location,
        })
    }

    /// Returns where the record is, without credentials: the file, or host, port and database.
    pub(crate) fn address(&self) -> &str {
        self.location.at()
    }

    /// Checks whether the database answers, in less than 4 s, and returns what changed since the last check.
    pub(crate) async fn check_reachable(&self) -> Change {
        self.location.check(&self.pool).await
    }

    /// Completes when a check has found that the database does not answer: requests then need not wait for a connection.
    pub(crate) async fn wait_until_down(&self) {
        self.location.wait_until_down().await;
    }

    /// Returns whether the last check found that the database does not answer.
    pub(crate) fn is_down(&self) -> bool {
        self.location.is_down()
    }

    /// Checks whether the database responds.
    pub async fn ping(&self) -> Result<(), Error> {
        sqlx::query("SELECT 1").fetch_one(&self.pool).await?;
        Ok(())
    }

    /// Closes the connections once pending queries have finished.
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

/// Creates the file with access for its owner only, because it contains messages and names of users.
fn make_private(path: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::OpenOptionsExt as _;
    let mut options = std::fs::OpenOptions::new();
    let options = options.write(true).create(true).truncate(false).mode(0o600);
    crate::common::regular_file::open_with(path, options, rustix::fs::OFlags::empty()).map(drop)
}

/// Returns `$from, …` with `count` placeholders.
fn places(from: usize, count: usize) -> String {
    let all: Vec<_> = (from..from + count).map(|n| format!("${n}")).collect();
    all.join(", ")
}

/// Parses the JSON of a row. Fails with the ID of the save that the row belongs to.
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
    State::from_name(text).ok_or_else(|| Error::Row {
        save: save.to_owned(),
        reason: format!("{text:?} is no state"),
    })
}
