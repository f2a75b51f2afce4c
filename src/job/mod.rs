//! The words in which the builder, the agents, the queue and the manager speak of a save: what was asked for, what it is
//! doing, what became of it. Pure data, no I/O.

mod event;
mod order;
mod report;
mod seal;
mod session;
mod state;

pub use event::{EVENT_VERSION, Event, Observer, Phase};
pub use order::{JobId, Order, SaveOptions};
pub use report::{Outcome, Report, Said, Saved};
pub use seal::{Keys, SealError, Sealed};
pub use session::{Category, Kind, Load, NextSave, Node, Session, Unsaved};
pub use state::{Code, State};
