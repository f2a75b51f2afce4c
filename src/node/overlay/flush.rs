//! Writing one file's dirty pages to disk, and no other's.
//!
//! `syncfs` would write all of the file system's, gigabytes of the neighbours' maybe, and `fdatasync` commits a journal
//! that waits for theirs. `sync_file_range` writes this file's pages and waits for them; neither metadata nor journal
//! are touched, as nothing has to survive a crash: what counts is that the pages are clean, so that the next write to
//! them through a mapping faults, and moves the file's time stamps.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Waits until every page that is dirty now was written.
#[allow(unsafe_code, reason = "neither rustix nor nix has this call")]
pub fn flush(file: BorrowedFd<'_>) -> io::Result<()> {
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
