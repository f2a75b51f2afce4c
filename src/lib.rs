//! upperdeck saves a *running* container as an OCI image, without a container daemon.
//!
//! The modules stand in the order in which a save needs them: each may import those above it, and `tests/imports.rs` says
//! which of them it does.
//!
//! How a save flows: [`node`] finds the container, its upper and lower directories, and freezes it; [`layer`] scans the
//! upper directory and makes the diff layer; [`image`] makes the new manifest and config from the base's; [`store`] sends
//! blobs and manifest to a registry or a layout. [`save`] is the whole of it, and what is kept for the next save of the same
//! container. [`service`] runs saves for the users of a cluster: agent, queue, manager, portal.

// Apart from each other, because rustfmt sorts what stands together.
pub mod common;

pub mod node;

pub mod layer;

pub mod image;

pub mod store;

pub mod save;

#[cfg(feature = "service")]
pub mod service;

pub mod bench;

pub mod demo;

pub mod cli;
