//! Secrets come in the first line of a file or descriptor: read with a bound, and with no copy left behind.

use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::path::Path;

use zeroize::Zeroizing;

use crate::common::private;

/// A secret is one line; what is larger, in bytes, is another file.
const MOST: u64 = 64 << 10;

/// Says so where others can read a secret, as ssh does of keys.
pub(super) fn warn_if_shared(path: &Path) {
    if std::fs::metadata(path).is_ok_and(|there| private::is_shared(&there)) {
        tracing::warn!(file = %path.display(), "any user of this machine can read or change this file with a secret: take their rights from it ('chmod o= FILE')");
    }
}

#[cfg(feature = "service")]
/// The text of a file of keys. One that others can read or change is refused: with it orders and reports can be made up.
pub(super) fn keys(path: &Path) -> io::Result<Zeroizing<String>> {
    let file = File::open(path)?;
    if private::is_shared(&file.metadata()?) {
        let told = "any user of this machine can read or change it: 'chmod 600' it, and make a new key if somebody may have read it";
        return Err(io::Error::new(ErrorKind::PermissionDenied, told));
    }
    let mut text = Zeroizing::new(String::with_capacity(MOST as usize + 1));
    file.take(MOST + 1).read_to_string(&mut text)?;
    if text.len() as u64 > MOST {
        return Err(io::Error::new(
            ErrorKind::InvalidData,
            format!("it is larger than {MOST} bytes"),
        ));
    }
    Ok(text)
}

/// The first line as it stands. [`ErrorKind::InvalidData`] says that the file is no such one.
pub(super) fn first_line(path: &Path) -> io::Result<Zeroizing<String>> {
    let file = File::open(path)?;
    warn_if_shared(path);
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

#[cfg(feature = "service")]
/// The same without the blanks around it; an empty one is refused.
pub(super) fn word(path: &Path) -> io::Result<Zeroizing<String>> {
    let line = first_line(path)?;
    let word = line.trim();
    if word.is_empty() {
        return Err(io::Error::other("it is empty"));
    }
    Ok(Zeroizing::new(word.to_owned()))
}
