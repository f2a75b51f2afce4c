//! Saves with failing system calls: every save gives the right image or the right error, whatever a call returns.
//!
//! A first run counts the relevant calls, then each of them fails in a run of its own. `UPPERDECK_FAULTS=all` does that
//! for all of them (hours); otherwise a few of each kind are selected, always the same.

// Test programs without libtest print their results themselves.
#![allow(clippy::print_stdout)]
#![allow(
    clippy::duplicate_mod,
    reason = "the harness and the support share the rule of what may be ignored"
)]

#[path = "../harness/mod.rs"]
mod harness;

#[allow(dead_code, reason = "the parts that faults need")]
#[path = "../support/mod.rs"]
mod support;

#[allow(dead_code, reason = "the parts that faults need")]
#[path = "../support/disk.rs"]
mod disk;

#[cfg(target_arch = "x86_64")]
mod calls;
#[cfg(target_arch = "x86_64")]
mod case;
#[cfg(target_arch = "x86_64")]
mod clock;
#[cfg(target_arch = "x86_64")]
mod plan;
#[cfg(target_arch = "x86_64")]
mod registry;
#[cfg(target_arch = "x86_64")]
mod saves;
#[cfg(target_arch = "x86_64")]
mod tracer;
#[cfg(target_arch = "x86_64")]
mod world;

use std::process::ExitCode;

#[cfg(target_arch = "x86_64")]
fn main() -> ExitCode {
    tracer::entry().unwrap_or_else(|| harness::main(&saves::tests()))
}

#[cfg(not(target_arch = "x86_64"))]
fn main() -> ExitCode {
    let ignored = || {
        Err(harness::Stop::Ignored(
            "registers of x86_64 are changed".to_owned(),
        ))
    };
    harness::main(&[harness::Test::new("a_call_that_fails", ignored)])
}
