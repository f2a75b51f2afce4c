//! File trees and their differences: the verifier for fixtures, for `validate` and for proving a base.
//!
//! It reads archives and directories with code of its own, separate from the code that creates layers, so that both do
//! not share the same mistake.

pub mod archive;
pub(crate) mod directory;
pub mod layers;
mod node;
pub(crate) mod paths;
pub mod specify;
pub mod text;
pub mod texts;
pub mod tree;
pub mod validate;
pub mod vis;
