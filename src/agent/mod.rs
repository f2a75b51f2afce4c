//! One a node: takes orders from the queue, runs `upperdeck commit` as a child for each, tells what the child says, and
//! sees to it that no container stays frozen, whoever dies.

mod options;
mod owner;

use crate::cancel::Cancel;
use crate::queue::{self, Queue};

pub use options::{Allowed, AllowedError, Options, Registry};
pub use owner::{OwnerRule, RuleError};

/// Why an agent does not start. Once it runs, nothing ends it but a request to.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A directory that it needs cannot be made or written to.
    #[error("{path}: {source}; the agent needs it to survive its own death")]
    Directory {
        /// Which one.
        path: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// Something in the options that cannot be meant.
    #[error("{0}")]
    Options(String),
    /// Another agent works from the same spool.
    #[error(
        "another agent of this node uses {path}: end it first, or give this one a spool of its own"
    )]
    Taken {
        /// The spool.
        path: String,
    },
    /// The queue cannot be used at all.
    #[error(transparent)]
    Queue(#[from] queue::Error),
}

/// Works until `cancel`, then drains: what runs may finish within [`Options::drain`], the rest is given back.
#[allow(clippy::unused_async)]
pub async fn run(options: Options, queue: Queue, cancel: Cancel) -> Result<(), Error> {
    let _ = (options, queue, cancel);
    Err(Error::Options("not yet".to_owned()))
}
