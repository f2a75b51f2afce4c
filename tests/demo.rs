//! Tests that the demonstration does what it prints, as the user who runs the tests, and leaves nothing behind.

#[allow(dead_code, reason = "each test program uses its part")]
#[path = "support/mod.rs"]
mod support;

use std::process::{Command, Output};

type Result = std::result::Result<(), Box<dyn std::error::Error>>;

/// Runs it in a temporary directory of its own. Returns `None` if this machine does not allow a container to be
/// created.
fn demo(wrapper: &[&str]) -> std::result::Result<Option<Output>, Box<dyn std::error::Error>> {
    let dir = tempfile::tempdir()?;
    std::os::unix::fs::chown(dir.path(), Some(65534), Some(65534)).or_else(|error| {
        if wrapper.is_empty() {
            Ok(())
        } else {
            Err(error)
        }
    })?;
    // Other users may not enter the build directory. The copy is made by a separate process: a child that another test
    // forks meanwhile would inherit the descriptor that is written to, and a program that is open for writing cannot be
    // started.
    let program = dir.path().join("upperdeck");
    let copied = Command::new("cp")
        .args([
            env!("CARGO_BIN_EXE_upperdeck").as_ref(),
            program.as_os_str(),
        ])
        .status()?;
    assert!(copied.success());
    let (first, rest) = wrapper
        .split_first()
        .map_or((program.to_str(), &[][..]), |(first, rest)| {
            (Some(*first), rest)
        });
    let mut command = Command::new(first.ok_or("path")?);
    command.args(rest);
    if !wrapper.is_empty() {
        command.arg(&program);
    }
    let output = command.arg("demo").env("TMPDIR", dir.path()).output()?;
    if output.status.code() == Some(77) {
        let reason = String::from_utf8_lossy(&output.stderr).into_owned();
        support::ignore(&reason.replace('\n', " "));
        return Ok(None);
    }
    let left: Vec<_> = std::fs::read_dir(dir.path())?
        .filter_map(|e| Some(e.ok()?.file_name()))
        .collect();
    assert_eq!(left, ["upperdeck"], "left behind");
    Ok(Some(output))
}

fn assert_tells_it_all(output: &Output) {
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success(),
        "{text}\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert_eq!(text.matches("no difference").count(), 2, "{text}");
    if text.contains("was frozen for") {
        assert!(
            text.contains("only what changed since the save before, on top of 1 layer"),
            "the second save is on top of the first: {text}"
        );
    }
    assert!(
        text.contains("/root/"),
        "credentials and caches are told: {text}"
    );
}

#[test]
fn as_the_user_who_tests() -> Result {
    if let Some(output) = demo(&[])? {
        assert_tells_it_all(&output);
    }
    Ok(())
}

#[test]
fn in_a_user_namespace() -> Result {
    // Without root, the other test is the one in a user namespace.
    if support::ignored(&[support::Need::Root]) {
        return Ok(());
    }
    if let Some(output) = demo(&[
        "setpriv",
        "--reuid=65534",
        "--regid=65534",
        "--clear-groups",
    ])? {
        assert_tells_it_all(&output);
        assert!(String::from_utf8_lossy(&output.stdout).contains("user, mount and PID namespaces"));
    }
    Ok(())
}
