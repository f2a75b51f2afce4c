//! The first command of the README runs as printed. The others are in the end-to-end tests (`e2e/readme.rs`).

use std::error::Error;
use std::process::{Command, Stdio};

#[path = "support/readme.rs"]
mod readme;
#[allow(dead_code, reason = "each test program uses its part")]
mod support;

use support::Need;

#[test]
fn the_first_command_builds_and_runs_the_demonstration() -> Result<(), Box<dyn Error>> {
    if support::ignored(&[Need::Program("cargo"), Need::Program("sh")]) {
        return Ok(());
    }
    let commands = readme::commands(include_str!("../README.md"), "Two commands");
    let [first, second] = &commands[..] else {
        return Err(format!("{commands:?}").into());
    };
    assert!(first.starts_with("cargo run "), "{first}");
    assert_eq!(second, "tests/run", "what runs this test");
    let mut shell = Command::new("sh");
    shell
        .args(["-c", first])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .stdin(Stdio::null());
    // A reader's shell has none of what Cargo tells its tests.
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        let own = ["CARGO_HOME", "CARGO_TARGET_DIR", "CARGO_BUILD_JOBS"];
        if text.starts_with("CARGO") && !own.contains(&&*text) {
            shell.env_remove(&name);
        }
    }
    let output = shell.output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let said = String::from_utf8_lossy(&output.stderr);
    if output.status.code() == Some(77) {
        support::ignore("needs root, or permission to create a user namespace");
        return Ok(());
    }
    assert!(output.status.success(), "{text}\n{said}");
    assert_eq!(text.matches("no difference").count(), 2, "{text}");
    Ok(())
}
