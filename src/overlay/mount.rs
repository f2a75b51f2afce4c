//! The options of an overlay mount, as `/proc/PID/mountinfo` shows them: upper and lowers.

use std::path::PathBuf;

use super::xattr::Namespace;

/// One overlay mount. Paths are the node's, a `--host-root` prefix already in front of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OverlayMount {
    /// The upper directory.
    pub upper: PathBuf,
    /// The lower directories that are merged, topmost first (as the kernel lists them).
    pub lowers: Vec<PathBuf>,
    /// Data-only lowers (`::`, `datadir+`), topmost first: they are never merged, only metacopy files point into them.
    pub data_only: Vec<PathBuf>,
    /// Where the kernel keeps its marks: `trusted.overlay.*`, or `user.overlay.*` with `userxattr`.
    pub namespace: Namespace,
    /// `index=on`: hard links of lower files survive copy-up.
    pub index: bool,
}
