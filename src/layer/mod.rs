//! Turns a scan into a layer: a plan fixes the place of every byte, any thread produces blocks in any order, and one
//! ordered stream delivers them.
//!
//! `scan` lists the entries, `plan` lays them out, `tar` encodes headers, `content` reads files, `held` keeps contents
//! as they were at one instant, `block` produces tar bytes, `ahead` manages the page cache, `settle` waits for writes
//! under way, `codec` compresses blocks (`deflate` for gzip), and `stream` runs all of it.

pub(crate) mod ahead;
pub(crate) mod block;
pub(crate) mod codec;
pub mod content;
pub mod deflate;
pub mod held;
pub(crate) mod plan;
pub mod scan;
mod settle;
pub mod stream;
pub(crate) mod tar;

pub use codec::Compression;
pub(crate) use content::Held;
pub use plan::Plan;
pub use settle::Writers;
pub use stream::{Error, Layer, Options, Part, Progress};
