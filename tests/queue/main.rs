//! The queue between managers and nodes, in one process and on a real Redis: the same scenarios on both.
//!
//! `UPPERDECK_TEST_REDIS` names another server program than redis-server (valkey-server, another version);
//! `UPPERDECK_SOAK` lengthens the random ones, in seconds.
// What a test's helpers unwrap fails the test, as it should.
#![allow(clippy::unwrap_used)]

mod chaos;
mod hostile;
mod outages;
mod record;
mod scenarios;
mod server;
mod storm;
#[path = "../support/mod.rs"]
#[allow(dead_code)]
mod support;
mod tls;
mod world;
