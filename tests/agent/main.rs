//! A node's agent with real children and a real container: what it does, whoever dies, and what it does not do, whoever
//! asks.

#[path = "../support/mod.rs"]
#[allow(dead_code, reason = "other tests use the rest of it")]
mod support;

mod background;
mod gate;
mod jobs;
mod modes;
mod node;
mod recovery;
mod redis;
mod replay;
mod volumes;
