//! What an overlay mount is made of, and what the marks in its directories mean.
//!
//! Source: kernel `Documentation/filesystems/overlayfs.rst` and `fs/overlayfs/`.

pub mod flush;
pub mod identity;
pub mod lower;
pub mod mount;
pub mod owner;
pub mod root;
pub mod volume;
pub mod xattr;
