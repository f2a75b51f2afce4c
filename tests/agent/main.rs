//! A node's agent with real child processes and a real container: how it reacts when any process dies, and that it
//! refuses unauthorized requests.

#[path = "../support/mod.rs"]
#[allow(dead_code, reason = "other tests use the rest of it")]
mod support;

mod background;
mod ended;
mod gate;
mod health;
mod jobs;
mod modes;
mod node;
mod recovery;
mod redis;
mod replay;
mod volumes;
