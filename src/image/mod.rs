//! Images as data: manifests, indexes and configs, and the comparison of file trees with layers.

pub mod manifest;
pub mod packages;
pub(crate) mod prove;
pub mod verify;
