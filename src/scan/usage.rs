//! How much a tree takes on disk, for lists: a quick look that reads no attributes and follows nothing.

use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use rustix::fs::FileType;

use crate::overlay::lower::join;
use crate::overlay::root::{Root, is_absent, names, stat_at};

/// Size of a tree.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Usage {
    /// Entries below the root.
    pub entries: u64,
    /// Allocated bytes.
    pub bytes: u64,
}

/// Counts the tree at `path`. What vanishes meanwhile is not counted.
pub fn usage(path: &Path) -> io::Result<Usage> {
    let root = Root::open(path)?;
    let mut usage = Usage::default();
    let mut todo = vec![Vec::new()];
    while let Some(path) = todo.pop() {
        let dir = match root.open_dir(&path) {
            Ok(dir) => dir,
            Err(error) if is_absent(&error) => continue,
            Err(error) => return Err(error),
        };
        for name in names(dir.as_fd())? {
            let Some(stat) = stat_at(dir.as_fd(), &name)? else {
                continue;
            };
            usage.entries += 1;
            usage.bytes += stat.st_blocks as u64 * 512;
            if FileType::from_raw_mode(stat.st_mode).is_dir() {
                todo.push(join(&path, &name));
            }
        }
    }
    Ok(usage)
}
