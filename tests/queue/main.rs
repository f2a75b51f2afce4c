//! The queue between managers and nodes: the same scenarios with the in-process queue and with a real Redis.
//!
//! `UPPERDECK_TEST_REDIS` selects another server program than redis-server (e.g. valkey-server or another version).
//! `UPPERDECK_SOAK` sets the duration of the randomized tests in seconds.
// What a test's helpers unwrap fails the test, as it should.
#![allow(clippy::unwrap_used)]

#[macro_use]
mod world;

mod autosaves;
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
