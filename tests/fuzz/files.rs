//! Files for the targets, in memory and with a path that a parser can open.

use std::fs::File;
use std::io::Write as _;
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};

use rustix::fs::MemfdFlags;
use tempfile::TempDir;

/// Creates a file with these bytes; the path is valid as long as the file is open.
pub fn file(bytes: &[u8]) -> (File, PathBuf) {
    let made = rustix::fs::memfd_create("fuzz", MemfdFlags::CLOEXEC);
    let mut file = File::from(made.expect("a file in memory"));
    file.write_all(bytes).expect("memory to write to");
    let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    (file, path)
}

/// Creates a directory, in memory where the system provides that.
pub fn directory() -> TempDir {
    let memory = Path::new("/dev/shm");
    let made = tempfile::Builder::new()
        .prefix("upperdeck-fuzz")
        .tempdir_in(memory)
        .or_else(|_| tempfile::tempdir());
    made.expect("a place for files")
}

/// Splits off the first byte, which selects the use of the rest.
pub fn selected(input: &[u8]) -> (u8, &[u8]) {
    input
        .split_first()
        .map_or((0, input), |(first, rest)| (*first, rest))
}
