//! A test harness for tests that may find out at run time that they cannot run. They are reported as ignored with the
//! reason, or as failed in CI.

// A test program without libtest has to print its results.
#![allow(clippy::print_stdout)]

#[allow(dead_code, reason = "the part without libtest")]
#[path = "../support/ignored.rs"]
mod ignored;

use std::process::ExitCode;
use std::time::Instant;

/// Why a test did not pass.
pub enum Stop {
    /// The test cannot run here.
    Ignored(String),
    /// The test failed.
    Failed(String),
}

impl<E: Into<anyhow::Error>> From<E> for Stop {
    fn from(error: E) -> Self {
        Self::Failed(format!("{:#}", error.into()))
    }
}

/// Result of a test.
pub type Outcome = Result<(), Stop>;

/// A test.
pub struct Test {
    /// Name, by which `cargo test NAME` selects it.
    pub name: String,
    /// The test function.
    pub run: Box<dyn Fn() -> Outcome>,
}

impl Test {
    /// Creates a test.
    pub fn new(name: impl Into<String>, run: impl Fn() -> Outcome + 'static) -> Self {
        Self {
            name: name.into(),
            run: Box::new(run),
        }
    }
}

/// Ignores the test unless it runs as root, with the capabilities for overlay mounts and device nodes.
pub fn need_root() -> Outcome {
    if rustix::process::geteuid().is_root() {
        return Ok(());
    }
    Err(Stop::Ignored(
        "needs root: whiteouts are devices, and trusted.* attributes".to_owned(),
    ))
}

/// Runs the tests selected on the command line, in order. Prints and exits like `libtest`.
pub fn main(tests: &[Test]) -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let flag = |name: &str| arguments.iter().any(|argument| argument == name);
    let mut filters: Vec<&String> = Vec::new();
    let mut skips: Vec<&String> = Vec::new();
    let mut words = arguments.iter();
    while let Some(word) = words.next() {
        match word.as_str() {
            "--skip" => skips.extend(words.next()),
            "--test-threads" | "--format" | "--color" | "--logfile" => drop(words.next()),
            _ if word.starts_with('-') => {}
            _ => filters.push(word),
        }
    }
    let exact = flag("--exact");
    let matches = |name: &str, filter: &str| {
        if exact {
            name == filter
        } else {
            name.contains(filter)
        }
    };
    let selected: Vec<&Test> = tests
        .iter()
        .filter(|test| {
            filters.is_empty() || filters.iter().any(|filter| matches(&test.name, filter))
        })
        .filter(|test| !skips.iter().any(|skip| matches(&test.name, skip)))
        .collect();
    if flag("--list") {
        for test in &selected {
            println!("{}: test", test.name);
        }
        return ExitCode::SUCCESS;
    }
    let (mut passed, mut skipped, mut failed) = (0, 0, Vec::new());
    println!("\nrunning {} tests", selected.len());
    for test in &selected {
        let start = Instant::now();
        let run = std::panic::AssertUnwindSafe(|| (test.run)());
        let outcome = std::panic::catch_unwind(run).unwrap_or_else(|_| {
            Err(Stop::Failed(
                "it panicked; the message stands above".to_owned(),
            ))
        });
        let outcome = match outcome {
            Err(Stop::Ignored(reason)) => Err(ignored::may_be_ignored(&test.name, &reason)
                .map_or_else(Stop::Failed, |()| Stop::Ignored(reason))),
            outcome => outcome,
        };
        match outcome {
            Ok(()) => {
                passed += 1;
                println!(
                    "test {} ... ok ({:.2}s)",
                    test.name,
                    start.elapsed().as_secs_f32()
                );
            }
            Err(Stop::Ignored(reason)) => {
                skipped += 1;
                println!("test {} ... ignored, {reason}", test.name);
            }
            Err(Stop::Failed(message)) => {
                println!("test {} ... FAILED", test.name);
                failed.push((&test.name, message));
            }
        }
    }
    for (name, message) in &failed {
        println!("\n---- {name} ----\n{message}");
    }
    let result = if failed.is_empty() { "ok" } else { "FAILED" };
    let filtered = tests.len() - selected.len();
    println!(
        "\ntest result: {result}. {passed} passed; {} failed; {skipped} ignored; 0 measured; {filtered} filtered out\n",
        failed.len()
    );
    if failed.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(101)
    }
}
