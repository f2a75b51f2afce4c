//! Where images are stored: registries, Harbor's own API, OCI layouts on disk, and how each of them is named.

pub mod destination;
pub mod harbor;
pub mod images;
pub mod layout;
pub mod registry;
