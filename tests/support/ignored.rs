//! Decides what it means that a test cannot run here, for all test programs: it is reported as ignored, and in CI
//! (`CI=true`) it fails unless `.ci/ignored.txt` lists it. `tests/run` compares what was ignored in CI with that list.

const LISTED: &str = include_str!("../../.ci/ignored.txt");

fn is_listed(name: &str) -> bool {
    LISTED
        .lines()
        .any(|line| line.strip_prefix("? ").unwrap_or(line) == name)
}

/// Returns an error if the test `name` must not be ignored here.
pub fn may_be_ignored(name: &str, reason: &str) -> Result<(), String> {
    let ci = std::env::var_os("CI").is_some_and(|ci| ci == "true");
    if ci && !is_listed(name) {
        return Err(format!(
            "{name} cannot run here, and .ci/ignored.txt does not list it: {reason}"
        ));
    }
    Ok(())
}

/// Reports that the test `name` does not run here. Panics if CI does not allow that.
pub fn report(name: &str, reason: &str) {
    if let Err(refused) = may_be_ignored(name, reason) {
        panic!("{refused}");
    }
    // Written directly to stderr, because the harness hides captured output of tests that pass.
    let line = format!("ignored: {name}: {}\n", reason.trim_end());
    let _ = std::io::Write::write_all(&mut std::io::stderr(), line.as_bytes());
}

/// Reports that the test of this thread does not run here. Panics if CI does not allow that.
pub fn ignore(reason: &str) {
    report(std::thread::current().name().unwrap_or("unnamed"), reason);
}
