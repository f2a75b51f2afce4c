//! Lists of packages: of a container over its base (`container`), and of images (`image`); and what starts a container:
//! programs (`programs`), their interpreters (`shebang`) and the user (`user`), looked for in its tree (`tree`).

pub(crate) mod container;
pub(crate) mod image;
mod programs;
mod shebang;
mod tree;
mod user;

use std::fs::File;
use std::io::{self, Read as _};

/// Maximum number of packages in a list that is asked for, and of bytes of its texts.
const ASKED: usize = 20_000;
const ASKED_BYTES: usize = 2 << 20;

/// Reads at most `length` bytes.
fn read(file: &File, length: u64) -> io::Result<Vec<u8>> {
    let mut content = Vec::new();
    file.take(length).read_to_end(&mut content)?;
    Ok(content)
}
