//! From a scan to a layer: a plan that knows every byte's place, blocks that any thread can make in any
//! order, and one ordered stream of them.
//!
//! `tar` writes headers, `plan` lays entries out, `content` reads files, `held` keeps what they held at an instant, `block` makes tar bytes with
//! `ahead` minding the page cache and `settle` the writes that are under way, `codec` compresses them,
//! `stream` puts all of it to work.

pub mod ahead;
pub mod block;
pub mod codec;
pub mod content;
pub mod deflate;
pub mod held;
pub mod plan;
pub mod scan;
mod settle;
pub mod stream;
pub mod tar;

pub use codec::Compression;
pub use content::Held;
pub use plan::Plan;
pub use settle::Writers;
pub use stream::{Error, Layer, Options, Part, Progress};
