//! What is on this machine: overlay mounts, the containers of its runtimes, the freezer, and the rights and the share of
//! the processor that this process has itself.

pub(crate) mod background;
pub(crate) mod cgroups;
pub(crate) mod confine;
pub mod container;
pub mod freeze;
pub mod overlay;
pub mod procfs;
