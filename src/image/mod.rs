//! Images as data: manifests, indexes and configs, and the comparison of file trees with layers.

pub mod difference;
pub mod extract;
pub mod manifest;
pub mod packages;
pub(crate) mod prove;
pub mod verify;
