//! The program against real registries and real container runtimes.

#[path = "../support/mod.rs"]
mod support;

mod host;
mod hosts;
