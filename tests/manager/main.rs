//! The manager as its callers see it, over a real record and the queue inside one process; the agent is a stand-in that
//! speaks the queue's language.

mod access;
mod doors;
mod events;
mod fuzz;
mod jobs;
#[path = "../support/postgres.rs"]
mod postgres;
mod signin;
mod site;
mod store;
#[allow(dead_code, reason = "each test program uses its part")]
#[path = "../support/mod.rs"]
mod support;
mod watchers;
