//! upperdeck saves a *running* container as an OCI image, without a container daemon.
//!
//! The modules stand in the order in which a save flows through them; see `commit` for the flow itself.

pub mod digest;
pub mod overlay;
pub mod container;
pub mod freeze;
pub mod scan;
pub mod layer;
pub mod manifest;
pub mod registry;
pub mod layout;
pub mod destination;
pub mod prove;
pub mod job;
pub mod cancel;
pub mod commit;
pub mod spec;
pub mod demo;
pub mod cli;
