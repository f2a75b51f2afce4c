//! Tests of the manager through its API, with a real record and the in-process queue. The agent is a stand-in that uses
//! the queue's interface.

mod access;
mod autosave;
mod doors;
mod ended;
mod events;
mod fuzz;
mod http;
mod jobs;
mod kubectl;
mod kubernetes;
#[path = "../support/kubernetes.rs"]
mod kubernetes_api;
mod mail;
mod metrics;
mod oidc;
mod openapi;
mod outage;
mod packages;
#[path = "../support/postgres.rs"]
mod postgres;
mod renaming;
mod replace;
mod resources;
mod signin;
mod site;
mod smtp;
mod store;
#[allow(dead_code, reason = "each test program uses its part")]
#[path = "../support/mod.rs"]
mod support;
mod timeline;
mod watchers;
mod webhooks;
