//! From a scan to a layer.
