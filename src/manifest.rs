//! Manifest and config.
