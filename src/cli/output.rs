//! Files that a verb writes: complete, or not there.

use std::fs::File;
use std::path::Path;

use anyhow::Context;

use crate::common::private_files::FileMode;

/// Lets `make` write to a temporary file beside `output` and renames it, so that `output` is always complete. A device
/// or FIFO is written to directly.
pub(super) fn write<T>(
    output: &Path,
    mode: FileMode,
    make: impl FnOnce(&mut File) -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let cannot_write = || format!("cannot write {}", super::text::path(output));
    if std::fs::metadata(output).is_ok_and(|there| !there.is_file()) {
        let mut file = File::options()
            .write(true)
            .open(output)
            .with_context(cannot_write)?;
        return make(&mut file);
    }
    let dir = output
        .parent()
        .filter(|dir| !dir.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    let mut file = tempfile::NamedTempFile::new_in(dir).with_context(cannot_write)?;
    let made = make(file.as_file_mut())?;
    file.as_file().sync_all().with_context(cannot_write)?;
    mode.set(file.as_file()).with_context(cannot_write)?;
    file.persist(output)
        .map_err(|e| e.error)
        .with_context(cannot_write)?;
    Ok(made)
}
