//! Requirements of tests on privileges and programs. If one is not met, the test fails in CI (`CI=true`); elsewhere it
//! prints `ignored: REASON` and passes.

use std::env;
use std::path::PathBuf;

/// A requirement of a test.
#[derive(Clone, Copy, Debug)]
pub enum Need<'a> {
    /// Effective user ID 0, for mounts, cgroups and processes of other users.
    Root,
    /// A program in `PATH` or in the sbin directories.
    Program(&'a str),
}

/// Finds `name` in `PATH` or in the sbin directories.
pub fn find_program(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin", "/usr/local/sbin"].map(PathBuf::from))
        .map(|dir| dir.join(name))
        .find(|file| file.is_file())
}

/// Returns true if a requirement is not met; the caller has to return then. Panics instead if `CI=true`.
#[must_use]
pub fn ignored(needs: &[Need<'_>]) -> bool {
    let missing: Vec<String> = needs
        .iter()
        .filter_map(|need| match need {
            Need::Root => (!nix::unistd::geteuid().is_root()).then(|| "root".to_owned()),
            Need::Program(name) => find_program(name)
                .is_none()
                .then(|| format!("the program {name}")),
        })
        .collect();
    if missing.is_empty() {
        return false;
    }
    ignore(&format!("needs {}", missing.join(", ")));
    true
}

/// Reports why a test does not run. Fails in CI.
pub fn ignore(reason: &str) {
    assert!(
        env::var_os("CI").is_none_or(|ci| ci != "true"),
        "a test may not be skipped in CI: {reason}"
    );
    // Written directly to stderr, because the harness hides captured output of tests that pass.
    let line = format!(
        "ignored: {}: {reason}\n",
        std::thread::current().name().unwrap_or("a test")
    );
    let _ = std::io::Write::write_all(&mut std::io::stderr(), line.as_bytes());
}

/// Prints a note to stderr, not captured by the harness.
pub fn note(text: &str) {
    let line = format!(
        "note: {}: {text}\n",
        std::thread::current().name().unwrap_or("a test")
    );
    let _ = std::io::Write::write_all(&mut std::io::stderr(), line.as_bytes());
}
