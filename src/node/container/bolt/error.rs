//! Errors of reading a database.

use std::io;
use std::path::PathBuf;

/// An error while reading a database.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be opened or read.
    #[error("{}: {source}", path.display())]
    Io {
        /// Path of the file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The file is not a bbolt database, or is damaged.
    #[error("{} is not a sound bbolt database: {detail}", path.display())]
    Damaged {
        /// Path of the file.
        path: PathBuf,
        /// What was expected and found.
        detail: String,
    },
    /// The owner wrote faster than the file could be read.
    #[error("{} changed during each of {attempts} reads; try again", path.display())]
    Busy {
        /// Path of the file.
        path: PathBuf,
        /// Number of attempts.
        attempts: u32,
    },
}
