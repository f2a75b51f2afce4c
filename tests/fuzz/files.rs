//! Where targets put what is read from files: memory, under a name that a parser can open.

use std::fs::File;
use std::io::Write as _;
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};

use rustix::fs::MemfdFlags;
use tempfile::TempDir;

/// A file with these bytes, and its name for as long as it is held.
pub fn file(bytes: &[u8]) -> (File, PathBuf) {
    let made = rustix::fs::memfd_create("fuzz", MemfdFlags::CLOEXEC);
    let mut file = File::from(made.expect("a file in memory"));
    file.write_all(bytes).expect("memory to write to");
    let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    (file, path)
}

/// A new directory, in memory where the system has such a place.
pub fn directory() -> TempDir {
    let memory = Path::new("/dev/shm");
    let made = tempfile::Builder::new()
        .prefix("upperdeck-fuzz")
        .tempdir_in(memory)
        .or_else(|_| tempfile::tempdir());
    made.expect("a place for files")
}

/// The first byte, which says what the rest is for, and the rest.
pub fn selected(input: &[u8]) -> (u8, &[u8]) {
    input
        .split_first()
        .map_or((0, input), |(first, rest)| (*first, rest))
}
