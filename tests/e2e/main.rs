//! The program against real registries and real container runtimes.

#[path = "../support/mod.rs"]
mod support;

mod bad_input;
mod base_lost;
mod consumers;
mod cri;
mod engines;
mod host;
mod hosts;
mod kill;
mod lab;
mod live;
mod overlay;
mod save;
mod service;
