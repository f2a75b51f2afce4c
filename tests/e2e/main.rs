//! End-to-end tests of the program against real registries and real container runtimes.

#[path = "../support/mod.rs"]
mod support;

#[allow(dead_code, reason = "the page's own tests use all of it")]
#[path = "../portal/browser.rs"]
mod browser;

mod alone;
mod autosave;
mod bad_input;
mod base_lost;
mod consumers;
mod cri;
mod doctor;
mod ended;
mod engines;
mod forged;
mod host;
mod hosts;
mod ids;
mod kill;
mod lab;
mod layouts;
mod live;
mod overlay;
mod placed;
mod portal;
mod privilege;
mod readme;
mod save;
mod service;
