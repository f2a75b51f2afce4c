//! What a file tree is and how two of them differ: the oracle for fixtures, for `validate` and for proving a base.
//!
//! It reads archives and directories by its own code, apart from the code that makes layers, so that one mistake
//! cannot hide behind the other.

pub mod archive;
pub mod directory;
pub mod layers;
pub mod text;
pub mod tree;
pub mod validate;
pub mod vis;
