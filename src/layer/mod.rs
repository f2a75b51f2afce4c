//! Turns a scan into a layer: a plan fixes the place of every byte, any thread produces blocks in any order, and one
//! ordered stream delivers them.
//!
//! `scan` lists the entries, `plan` lays them out, `tar` encodes headers, `content` reads files, `capture` keeps contents
//! as they were at one instant, `block` produces tar bytes, `read_ahead` manages the page cache, `pending_writes` waits for writes
//! under way, `codec` compresses blocks (`deflate` for gzip), `index` says where
//! each entry is in the stored layer, and `stream` runs all of it.

pub(crate) mod block;
pub mod capture;
pub(crate) mod codec;
pub mod content;
pub mod deflate;
pub mod index;
mod pending_writes;
pub(crate) mod plan;
pub(crate) mod read_ahead;
pub mod scan;
pub(crate) mod sequential;
pub mod stream;
pub(crate) mod tar;

pub use codec::Compression;
pub(crate) use content::CapturedContents;
pub use pending_writes::Writers;
pub use plan::Plan;
pub use stream::{Error, Layer, Options, Part, Progress};
