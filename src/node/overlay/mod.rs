//! Overlay mounts: reads their options, opens their directories safely, and interprets the marks in them.
//!
//! Source: kernel `Documentation/filesystems/overlayfs.rst` and `fs/overlayfs/`.

pub(crate) mod flush;
pub mod id_map;
pub mod identity;
pub(crate) mod lower;
pub mod mount;
pub(crate) mod root;
pub mod volume;
pub mod xattr;
