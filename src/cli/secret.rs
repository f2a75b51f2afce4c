//! Secrets come in the first line of a file or descriptor: read with a bound, and with no copy left behind.

use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::path::Path;

use zeroize::Zeroizing;

/// A secret is one line; what is larger, in bytes, is another file.
const MOST: u64 = 64 << 10;

/// The first line as it stands. [`ErrorKind::InvalidData`] says that the file is no such one.
pub(super) fn first_line(path: &Path) -> io::Result<Zeroizing<String>> {
    let file = File::open(path)?;
    // Large enough from the start: growing would leave copies behind.
    let mut bytes = Zeroizing::new(Vec::with_capacity(MOST as usize + 1));
    file.take(MOST + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MOST {
        return Err(io::Error::new(
            ErrorKind::InvalidData,
            format!("it is larger than {MOST} bytes"),
        ));
    }
    let line = bytes
        .split(|byte| *byte == b'\n')
        .next()
        .unwrap_or_default();
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    let text = std::str::from_utf8(line)
        .map_err(|_| io::Error::new(ErrorKind::InvalidData, "it is not text"))?;
    Ok(Zeroizing::new(text.to_owned()))
}

/// The same without the blanks around it; an empty one is refused.
pub(super) fn word(path: &Path) -> io::Result<Zeroizing<String>> {
    let line = first_line(path)?;
    let word = line.trim();
    if word.is_empty() {
        return Err(io::Error::other("it is empty"));
    }
    Ok(Zeroizing::new(word.to_owned()))
}
