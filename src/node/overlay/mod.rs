//! Overlay mounts: reads their options, opens their directories safely, and interprets the marks in them.
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
