//! From a scan to a layer: a plan that knows every byte's place, blocks that any thread can make in any
//! order, and one ordered stream of them.
//!
//! `tar` writes headers, `plan` lays entries out, `held` keeps contents of an instant, `block` makes tar bytes with
//! `ahead` minding the page cache and `settle` the writes that are under way, `codec` compresses them
//! (gzip with `deflate`), `stream` puts all of it to work.

pub mod ahead;
pub mod block;
pub mod codec;
pub mod deflate;
pub mod held;
pub mod plan;
mod settle;
pub mod stream;
pub mod tar;

pub use codec::Compression;
pub use held::Held;
pub use plan::Plan;
pub use settle::Writers;
pub use stream::{Error, Layer, Options, Part, Progress};
