//! What every test that needs privilege or a foreign program asks first, so that nothing is skipped unseen:
//! in CI (`CI=true`) a test that cannot run is a failure, elsewhere it says `ignored: REASON` and passes.

use std::env;
use std::path::PathBuf;

/// What a test cannot do without.
#[derive(Clone, Copy, Debug)]
pub enum Need<'a> {
    /// Effective user id 0, for mounts, cgroups and other people's processes.
    Root,
    /// A program that must be found in `PATH` or in the sbin directories.
    Program(&'a str),
}

/// Where `PATH` (or an administrator's `PATH`) finds `name`.
pub fn find_program(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin", "/usr/local/sbin"].map(PathBuf::from))
        .map(|dir| dir.join(name))
        .find(|file| file.is_file())
}

/// True where something that the test needs is missing: the caller returns at once. Panics instead when `CI=true`.
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

/// Says why a test does not run; fails in CI.
pub fn ignore(reason: &str) {
    assert!(
        env::var_os("CI").is_none_or(|ci| ci != "true"),
        "a test may not be skipped in CI: {reason}"
    );
    // Past the harness's capture, which hides the output of a test that passes.
    let line = format!(
        "ignored: {}: {reason}\n",
        std::thread::current().name().unwrap_or("a test")
    );
    let _ = std::io::Write::write_all(&mut std::io::stderr(), line.as_bytes());
}

/// Says something that a reader of the log should know, past the capture.
pub fn note(text: &str) {
    let line = format!(
        "note: {}: {text}\n",
        std::thread::current().name().unwrap_or("a test")
    );
    let _ = std::io::Write::write_all(&mut std::io::stderr(), line.as_bytes());
}
