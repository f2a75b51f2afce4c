//! Which extended attributes are the kernel's, which are the host's, and which belong to the image: one table.

/// Where an overlay keeps its marks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Namespace {
    /// `trusted.overlay.*`, the default; readable with CAP_SYS_ADMIN only.
    Trusted,
    /// `user.overlay.*`, mounts with `userxattr`.
    User,
}
