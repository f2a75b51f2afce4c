//! Fuzz targets for all parsers of untrusted input: from a tenant, a registry, another node, or the maker of an image.
//! Each target is a function of bytes that checks its parsers' guarantees; none may panic, or take much memory or time.
//!
//! As a test it runs every file of `fixtures/fuzz/TARGET/`, and mutations of them that are the same in each run.
//! `tests/fuzz/run` builds it with coverage and libFuzzer, to run for a minute or for days.

// Test programs without libtest print their results themselves.
#![allow(clippy::print_stdout, clippy::print_stderr)]

mod archives;
mod database;
mod deflate;
mod errors;
mod files;
#[allow(
    dead_code,
    reason = "shared by several test programs, each of which needs some of it"
)]
#[path = "../harness/mod.rs"]
mod harness;
mod images;
mod jobs;
mod kernel;
#[cfg(fuzzing)]
mod libfuzzer;
mod memory;
mod mutate;
mod nodes;
mod packages;
mod registries;
mod states;
mod words;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use harness::{Outcome, Test};

/// A fuzz target.
struct Target {
    /// Name of the target and of its corpus.
    name: &'static str,
    run: fn(&[u8]),
    /// Maximum length of an input in bytes.
    longest: usize,
    /// Mutations per file of the corpus in a test run.
    mutations: u32,
}

const TARGETS: [Target; 11] = [
    target("archives", archives::run, 64 << 10, 300),
    target("database", database::run, 64 << 10, 200),
    target("deflate", deflate::run, 64 << 10, 30),
    target("images", images::run, 16 << 10, 300),
    target("jobs", jobs::run, 8 << 10, 300),
    target("kernel", kernel::run, 8 << 10, 500),
    target("nodes", nodes::run, 64 << 10, 30),
    target("packages", packages::run, 64 << 10, 200),
    target("registries", registries::run, 16 << 10, 30),
    target("states", states::run, 16 << 10, 500),
    target("words", words::run, 4 << 10, 200),
];

const fn target(name: &'static str, run: fn(&[u8]), longest: usize, mutations: u32) -> Target {
    Target {
        name,
        run,
        longest,
        mutations,
    }
}

impl Target {
    fn corpus(&self) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("fixtures/fuzz")
            .join(self.name)
    }

    fn try_input(&self, input: &[u8]) {
        memory::bounded(|| (self.run)(input));
    }

    /// Runs the corpus and its mutations.
    fn replay(&self) -> Outcome {
        let mut files: Vec<PathBuf> = std::fs::read_dir(self.corpus())?
            .map(|entry| entry.map(|entry| entry.path()))
            .collect::<Result<_, _>>()?;
        files.sort();
        if files.is_empty() {
            return Err(anyhow::anyhow!("{} is empty", self.corpus().display()).into());
        }
        let inputs = files.iter().map(std::fs::read);
        let inputs: Vec<Vec<u8>> = inputs.collect::<Result<_, _>>()?;
        for (number, (file, input)) in files.iter().zip(&inputs).enumerate() {
            let alone = std::panic::AssertUnwindSafe(|| self.try_input(input));
            if std::panic::catch_unwind(alone).is_err() {
                return Err(anyhow::anyhow!("it is {} that fails", file.display()).into());
            }
            for round in 0..self.mutations {
                let seed = ((number as u64) << 32) | u64::from(round);
                let mutated = mutate::mutated(input, &inputs, seed, self.longest);
                let alone = std::panic::AssertUnwindSafe(|| self.try_input(&mutated));
                if std::panic::catch_unwind(alone).is_err() {
                    let kept = std::env::temp_dir().join(format!("upperdeck-fuzz-{}", self.name));
                    std::fs::write(&kept, &mutated)?;
                    return Err(anyhow::anyhow!(
                        "mutation {round} of {} fails; it is in {}",
                        file.display(),
                        kept.display()
                    )
                    .into());
                }
            }
        }
        Ok(())
    }
}

fn main() -> ExitCode {
    #[cfg(fuzzing)]
    if let Some(code) = libfuzzer::main(&TARGETS) {
        return code;
    }
    let tests: Vec<Test> = TARGETS
        .iter()
        .map(|target| Test::new(target.name, || target.replay()))
        .collect();
    harness::main(&tests)
}
