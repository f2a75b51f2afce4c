//! Lists of packages: of a container over its base (`container`), and of images (`image`); and the programs that start a
//! container (`programs`).

pub(crate) mod container;
pub(crate) mod image;
mod programs;

/// Maximum number of packages in a list that is asked for, and of bytes of its texts.
const ASKED: usize = 20_000;
const ASKED_BYTES: usize = 2 << 20;
