//! The words in which the builder, the agents, the queue and the manager speak of a save: what was asked for, what it is
//! doing, what became of it. Pure data, no I/O; the clock by which all of it tells the time.

mod order;
mod report;
mod seal;
mod session;
mod state;
mod word;

pub use crate::save::event::{EVENT_VERSION, Event, Observer, Phase};
pub use order::{JobId, Order, SaveOptions};
pub use report::{Outcome, Report, Said, Saved};
pub use seal::{Keys, Message, SealError, Sealed};
pub use session::{Category, Kind, Load, NextSave, Node, Session, Unsaved};
pub use state::{Code, State};
pub use word::{Answer, Before, Question, Word};

/// Milliseconds since the epoch, UTC, as all the `_ms` instants here; 0 on a machine whose clock stands before it.
pub fn now_ms() -> i64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |since| since.as_millis() as i64)
}
