//! Where images are kept: registries, Harbor's own API, OCI layouts on disk, and the names of all of them.

pub mod destination;
pub mod harbor;
pub mod images;
pub mod layout;
pub mod registry;
