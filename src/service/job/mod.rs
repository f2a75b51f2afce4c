//! The data types with which the builder, the agents, the queue and the manager describe a save: the order, its
//! progress and its outcome. They do no I/O; the only exception is the clock that all of them share.

mod order;
mod question;
mod report;
mod save_ended;
mod seal;
mod session;
mod state;

pub use crate::save::changes::{ChangedFile, Changes, Since};
pub use crate::save::event::{EVENT_VERSION, Event, Observer, Phase, WaitReason};
pub use order::{JobId, Order, Replaces, SaveOptions};
pub use question::{Answer, NextStep, Question, Verdict};
pub use report::{Outcome, Report, Saved, Update};
pub use save_ended::SaveEnded;
pub use seal::{Keys, Message, SealError, Sealed};
pub use session::{
    AutosaveWish, Category, EndWish, Kind, Load, Look, NextSave, Node, Session, SessionEnd, Unsaved,
};
pub use state::{Code, State};

/// Returns milliseconds since the epoch, UTC, like every `_ms` instant in this module. Returns 0 if the machine's clock
/// is set to a time before the epoch.
pub fn now_ms() -> i64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |since| since.as_millis() as i64)
}
