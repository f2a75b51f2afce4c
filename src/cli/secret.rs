//! Reads secrets from the first line of a file or descriptor, with a size limit and without leaving copies in memory.

use std::fs::File;
use std::io::{self, ErrorKind, Read};
use std::path::Path;

use zeroize::Zeroizing;

use crate::common::private_files;

/// Maximum size of a file with a secret, in bytes.
const MAX_SECRET_BYTES: u64 = 64 << 10;

/// Logs a warning if other users can read or change a file with a secret.
pub(super) fn warn_if_shared(path: &Path) {
    if std::fs::metadata(path).is_ok_and(|there| private_files::is_accessible_to_others(&there)) {
        tracing::warn!(file = %path.display(), "any user of this machine can read or change this file with a secret: take their rights from it ('chmod o= FILE')");
    }
}

/// Reads a key file. Fails if other users can read or change it, because orders and reports can be forged with the
/// keys.
#[cfg(feature = "service")]
pub(super) fn keys(path: &Path) -> io::Result<Zeroizing<String>> {
    let file = File::open(path)?;
    if private_files::is_accessible_to_others(&file.metadata()?) {
        let told = "any user of this machine can read or change it: 'chmod 600' it, and replace the keys if they may have been read";
        return Err(io::Error::new(ErrorKind::PermissionDenied, told));
    }
    let mut text = Zeroizing::new(String::with_capacity(MAX_SECRET_BYTES as usize + 1));
    file.take(MAX_SECRET_BYTES + 1).read_to_string(&mut text)?;
    if text.len() as u64 > MAX_SECRET_BYTES {
        return Err(io::Error::new(
            ErrorKind::InvalidData,
            format!("it is larger than {MAX_SECRET_BYTES} bytes"),
        ));
    }
    Ok(text)
}

/// Reads the first line unchanged. Fails with [`ErrorKind::InvalidData`] if the file is too large or not text.
pub(super) fn first_line(path: &Path) -> io::Result<Zeroizing<String>> {
    let file = File::open(path)?;
    warn_if_shared(path);
    // Allocated at full size, because growing would leave copies behind.
    let mut bytes = Zeroizing::new(Vec::with_capacity(MAX_SECRET_BYTES as usize + 1));
    file.take(MAX_SECRET_BYTES + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_SECRET_BYTES {
        return Err(io::Error::new(
            ErrorKind::InvalidData,
            format!("it is larger than {MAX_SECRET_BYTES} bytes"),
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

/// Reads the first line without surrounding white space. Fails if it is empty.
#[cfg(feature = "service")]
pub(super) fn trimmed_line(path: &Path) -> io::Result<Zeroizing<String>> {
    let line = first_line(path)?;
    let word = line.trim();
    if word.is_empty() {
        return Err(io::Error::other("it is empty"));
    }
    Ok(Zeroizing::new(word.to_owned()))
}
