//! Overlay mounts: reads their options, opens their directories safely, and interprets the marks in them.
//!
//! Source: kernel `Documentation/filesystems/overlayfs.rst` and `fs/overlayfs/`.

pub(crate) mod flush;
pub mod identity;
pub(crate) mod lower;
pub mod mount;
pub mod owner;
pub(crate) mod root;
pub mod volume;
pub mod xattr;
