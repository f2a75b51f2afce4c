//! upperdeck saves a *running* container as an OCI image, without a container daemon.
//!
//! The modules stand in the order in which a save flows through them; see `commit` for the flow itself.

pub mod agent;
pub mod background;
pub mod bench;
pub mod cancel;
pub mod cli;
pub mod commit;
pub mod confine;
pub mod container;
pub mod demo;
pub mod destination;
pub mod digest;
pub mod doctor;
pub mod escape;
pub mod freeze;
pub mod harbor;
mod hush;
pub mod images;
pub mod job;
pub mod layer;
pub mod layout;
pub mod manager;
pub mod manifest;
pub mod message;
pub mod overlay;
pub mod portal;
pub mod private;
pub mod prove;
pub mod queue;
pub mod record;
pub mod registry;
pub mod scan;
pub mod spec;
pub mod state;
