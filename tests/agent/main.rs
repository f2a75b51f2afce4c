//! A node's agent with real children and a real container: what it does, whoever dies, and what it does not do, whoever
//! asks.

#[path = "../support/mod.rs"]
mod support;

mod gate;
mod jobs;
mod node;
mod recovery;
mod redis;
