//! Requirements of tests on privileges and programs; `ignored.rs` says what follows where one is not met.

use std::env;
use std::path::PathBuf;
use std::sync::LazyLock;

#[path = "ignored.rs"]
pub mod ignoring;
pub use ignoring::ignore;

/// A requirement of a test.
#[derive(Clone, Copy, Debug)]
pub enum Need<'a> {
    /// Effective user ID 0, for mounts, cgroups and processes of other users.
    Root,
    /// A program in `PATH` or in the sbin directories.
    Program(&'a str),
}

/// Returns the path of the program under test: of this build, or what `UPPERDECK_TEST_PROGRAM` names, such as one built
/// for another target.
pub fn program() -> &'static str {
    static PROGRAM: LazyLock<String> = LazyLock::new(|| {
        env::var("UPPERDECK_TEST_PROGRAM")
            .unwrap_or_else(|_| env!("CARGO_BIN_EXE_upperdeck").to_owned())
    });
    &PROGRAM
}

/// Finds `name` in `PATH` or in the sbin directories.
pub fn find_program(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin", "/usr/local/sbin"].map(PathBuf::from))
        .map(|dir| dir.join(name))
        .find(|file| file.is_file())
}

/// Returns true if a requirement is not met; the caller has to return then. Panics instead in CI, unless that is listed.
#[must_use]
pub fn ignored(needs: &[Need<'_>]) -> bool {
    let missing: Vec<String> = needs
        .iter()
        .filter_map(|need| match need {
            Need::Root => (!rustix::process::geteuid().is_root()).then(|| "root".to_owned()),
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

/// Prints a note to stderr, not captured by the harness.
pub fn note(text: &str) {
    let line = format!(
        "note: {}: {text}\n",
        std::thread::current().name().unwrap_or("a test")
    );
    let _ = std::io::Write::write_all(&mut std::io::stderr(), line.as_bytes());
}
