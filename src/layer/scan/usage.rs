//! Measures the disk usage of a tree for listings: a quick walk that reads no attributes and follows no links.

use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use rustix::fs::FileType;

use crate::node::overlay::lower::join;
use crate::node::overlay::root::{Root, is_absent, names, stat_at};

/// Maximum size in bytes of the paths of directories still to be counted.
const MAX_PENDING_BYTES: usize = 128 << 20;

/// Size of a tree.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub(crate) struct Usage {
    /// Entries below the root.
    pub(crate) entries: u64,
    /// Allocated bytes.
    pub(crate) bytes: u64,
}

/// Counts the tree at `path`. Entries that vanish during the walk are not counted.
///
/// Fails if the tree cannot be read, or if the pending directories with their paths would take more memory than a
/// statistic is worth.
pub(crate) fn usage(path: &Path) -> io::Result<Usage> {
    let root = Root::open(path)?;
    let mut usage = Usage::default();
    let mut todo = vec![Vec::new()];
    let mut waiting = 0usize;
    while let Some(path) = todo.pop() {
        waiting = waiting.saturating_sub(path.len() + size_of::<Vec<u8>>());
        let dir = match root.open_dir(&path) {
            Ok(dir) => dir,
            Err(error) if is_absent(&error) => continue,
            Err(error) => return Err(error),
        };
        for name in names(dir.as_fd()) {
            let name = name?;
            let Some(stat) = stat_at(dir.as_fd(), &name)? else {
                continue;
            };
            usage.entries += 1;
            usage.bytes += stat.st_blocks as u64 * 512;
            if FileType::from_raw_mode(stat.st_mode).is_dir() {
                let below = join(&path, &name);
                waiting += below.len() + size_of::<Vec<u8>>();
                if waiting > MAX_PENDING_BYTES {
                    return Err(io::Error::other("there are too many directories to count"));
                }
                todo.push(below);
            }
        }
    }
    Ok(usage)
}
