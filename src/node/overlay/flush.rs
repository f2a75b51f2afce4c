//! Writes the dirty pages of one file to disk, without those of any other file.
//!
//! `syncfs` would write all pages of the file system, possibly gigabytes of other containers, and `fdatasync` commits a
//! journal that waits for theirs. `sync_file_range` writes this file's pages and waits for them. It touches neither
//! metadata nor the journal, which is sufficient because nothing has to survive a crash: the pages only have to be
//! clean, so that the next write to them through a mapping faults and updates the file's time stamps.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Writes all pages of the file that are dirty now and waits until they are written.
#[allow(unsafe_code, reason = "neither rustix nor nix has this call")]
pub(crate) fn flush(file: BorrowedFd<'_>) -> io::Result<()> {
    let how = libc::SYNC_FILE_RANGE_WAIT_BEFORE
        | libc::SYNC_FILE_RANGE_WRITE
        | libc::SYNC_FILE_RANGE_WAIT_AFTER;
    loop {
        // SAFETY: the descriptor is open for as long as it is borrowed, and the call touches no memory of ours.
        let result = unsafe { libc::sync_file_range(file.as_raw_fd(), 0, 0, how) };
        if result == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}
