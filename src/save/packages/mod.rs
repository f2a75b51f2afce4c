//! Lists of packages: of a container over its base (`container`), and of images (`image`); and what starts a container:
//! programs (`programs`), their interpreters (`shebang`) and the user (`user`), looked for in its tree (`tree`).

pub(crate) mod container;
pub(crate) mod image;
mod programs;
mod shebang;
mod tree;
mod user;

/// Maximum number of packages in a list that is asked for, and of bytes of its texts.
const ASKED: usize = 20_000;
const ASKED_BYTES: usize = 2 << 20;
