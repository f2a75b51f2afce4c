//! Runs tests that can find out only while they run that they cannot: they are reported as ignored, with the reason,
//! and as failed where `CI=true` promises that they can.

use std::process::ExitCode;
use std::time::Instant;

/// Why a test did not pass.
pub enum Stop {
    /// It cannot be run here.
    Ignored(String),
    /// It found something.
    Failed(String),
}

impl<E: Into<anyhow::Error>> From<E> for Stop {
    fn from(error: E) -> Self {
        Self::Failed(format!("{:#}", error.into()))
    }
}

/// What a test returns.
pub type Outcome = Result<(), Stop>;

/// One test.
pub struct Test {
    /// As `cargo test NAME` selects it.
    pub name: String,
    /// What it does.
    pub run: Box<dyn Fn() -> Outcome>,
}

impl Test {
    /// A test called `name`.
    pub fn new(name: impl Into<String>, run: impl Fn() -> Outcome + 'static) -> Self {
        Self {
            name: name.into(),
            run: Box::new(run),
        }
    }
}

/// Ignores the test unless it runs as root, with the capabilities that overlay mounts and devices take.
pub fn need_root() -> Outcome {
    if rustix::process::geteuid().is_root() {
        return Ok(());
    }
    Err(Stop::Ignored(
        "needs root: whiteouts are devices, and trusted.* attributes".to_owned(),
    ))
}

/// Runs what the command line selects, in order; prints and exits as `libtest` does.
pub fn main(tests: Vec<Test>) -> ExitCode {
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
        selected
            .iter()
            .for_each(|test| println!("{}: test", test.name));
        return ExitCode::SUCCESS;
    }
    let ci = std::env::var_os("CI").is_some_and(|value| value == "true");
    let (mut passed, mut ignored, mut failed) = (0, 0, Vec::new());
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
            Err(Stop::Ignored(reason)) if ci => {
                Err(Stop::Failed(format!("not run, and CI=true: {reason}")))
            }
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
                ignored += 1;
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
        "\ntest result: {result}. {passed} passed; {} failed; {ignored} ignored; 0 measured; {filtered} filtered out\n",
        failed.len()
    );
    if failed.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(101)
    }
}
