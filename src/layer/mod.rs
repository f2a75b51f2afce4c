//! From a scan to a layer.

pub mod exclude;
