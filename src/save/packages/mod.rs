//! Lists of packages: of a container over its base (`container`), and of images (`image`).

pub(crate) mod container;
pub(crate) mod image;

/// Maximum number of packages in a list that is asked for, and of bytes of its texts.
const ASKED: usize = 20_000;
const ASKED_BYTES: usize = 2 << 20;
