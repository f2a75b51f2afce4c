//! Examines a node or a manager's machine, and reports what is missing or weak with advice for each finding.
//!
//! Each check gathers facts in one function and judges them in another one, which does no I/O. The checks run in
//! parallel, each in its own thread and with a time limit: a check that hangs (a dead mount, an unresponsive server)
//! becomes a finding and does not delay the others. A check leaves nothing behind.

mod cgroup;
mod clock;
mod cpu;
mod files;
mod kernel;
mod network;
mod rights;
mod runtimes;

use std::path::PathBuf;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::node::confine::Role;
use crate::node::container::Roots;
use crate::store::registry::Access;

/// The role that the machine is examined for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Purpose {
    /// Saves started by hand.
    Commit,
    /// The agent of a node.
    Agent,
    /// An image manager.
    Manager,
}

impl Purpose {
    /// Returns the name of the subcommand.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Commit => "commit",
            Self::Agent => "agent",
            Self::Manager => "manager",
        }
    }

    fn role(self) -> Role {
        match self {
            Self::Commit => Role::Commit,
            Self::Agent => Role::Agent,
            Self::Manager => Role::Manager,
        }
    }

    /// Returns whether this role reads containers.
    fn builds(self) -> bool {
        self != Self::Manager
    }
}

/// Severity of a finding, ordered from best to worst.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum State {
    /// As expected.
    Ok,
    /// Not checked, or not relevant here.
    Skipped,
    /// Works, but less well or less safely than it could.
    Warning,
    /// Does not work.
    Failed,
}

/// One result of a check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Finding {
    /// Stable name of the check, e.g. `capabilities`.
    pub(crate) check: &'static str,
    /// Severity.
    pub(crate) state: State,
    /// Description of what was found.
    pub(crate) found: String,
    /// What to do about it; `None` if there is nothing to do.
    pub(crate) advice: Option<String>,
}

impl Finding {
    fn new(check: &'static str, state: State, found: impl Into<String>, advice: &str) -> Self {
        Self {
            check,
            state,
            found: found.into(),
            advice: (!advice.is_empty()).then(|| advice.to_owned()),
        }
    }

    fn ok(check: &'static str, found: impl Into<String>) -> Self {
        Self::new(check, State::Ok, found, "")
    }

    fn skipped(check: &'static str, found: impl Into<String>) -> Self {
        Self::new(check, State::Skipped, found, "")
    }

    fn warning(check: &'static str, found: impl Into<String>, advice: &str) -> Self {
        Self::new(check, State::Warning, found, advice)
    }

    fn failed(check: &'static str, found: impl Into<String>, advice: &str) -> Self {
        Self::new(check, State::Failed, found, advice)
    }
}

/// A file that holds a secret or that decides access rights.
#[derive(Clone, Debug)]
pub(crate) struct Secret {
    /// Name of the setting that holds the path.
    pub(crate) setting: &'static str,
    /// Path of the file.
    pub(crate) path: PathBuf,
}

/// Input of the examination.
#[derive(Clone, Debug)]
pub(crate) struct Options {
    /// Role to examine the machine for.
    pub(crate) purpose: Purpose,
    /// Directories in which the runtimes keep their state.
    pub(crate) roots: Roots,
    /// Names of settings that the role requires and that are not set.
    pub(crate) missing: Vec<String>,
    /// Why the role would refuse its settings.
    pub(crate) refused: Option<String>,
    /// Directories for state, each with the name of its setting. They are created on demand, so a missing one is not a
    /// failure.
    pub(crate) directories: Vec<(&'static str, PathBuf)>,
    /// Files that only their owner should be able to read.
    pub(crate) secrets: Vec<Secret>,
    /// URL of Redis, including the password.
    pub(crate) redis: Option<zeroize::Zeroizing<String>>,
    /// Address of the record's database, including the password.
    pub(crate) record: Option<zeroize::Zeroizing<String>>,
    /// Repositories that are pushed to, as `HOST/REPOSITORY`.
    pub(crate) registries: Vec<String>,
    /// How the registries are accessed.
    pub(crate) access: Access,
    /// Time limit of one check.
    pub(crate) timeout: Duration,
}

/// Result of an examination.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Report {
    /// `commit`, `agent` or `manager`.
    pub(crate) purpose: &'static str,
    /// The worst state of all findings.
    pub(crate) state: State,
    /// Findings in the order of the checks.
    pub(crate) findings: Vec<Finding>,
}

type Check = (
    &'static str,
    Box<dyn FnOnce(&Options) -> Vec<Finding> + Send>,
);

fn checks(options: &Options) -> Vec<Check> {
    let mut checks: Vec<Check> = vec![("settings", Box::new(settings))];
    if options.purpose.builds() {
        checks.push(("kernel", Box::new(kernel::check)));
        checks.push(("cgroup", Box::new(cgroup::check)));
        checks.push(("cpu", Box::new(cpu::check)));
        checks.push(("proc", Box::new(runtimes::proc_check)));
        checks.push(("runtimes", Box::new(runtimes::check)));
    }
    checks.push(("capabilities", Box::new(rights::check)));
    checks.push(("confinement", Box::new(rights::confinement)));
    checks.push(("limits", Box::new(files::limits)));
    checks.push(("secrets", Box::new(files::secrets)));
    checks.push(("directories", Box::new(files::directories)));
    for repository in options.registries.clone() {
        checks.push((
            "registry",
            Box::new(move |options| network::registry(options, &repository)),
        ));
    }
    if options.redis.is_some() {
        checks.push(("redis", Box::new(network::redis)));
    }
    if options.record.is_some() {
        checks.push(("record", Box::new(network::record)));
    }
    checks
}

fn settings(options: &Options) -> Vec<Finding> {
    if let Some(refused) = &options.refused {
        let advice = "correct it; --print-config shows all settings with their origins";
        return vec![Finding::failed("settings", refused.clone(), advice)];
    }
    if options.missing.is_empty() {
        return vec![Finding::ok("settings", "all that is needed is set")];
    }
    let failed = |setting: &String| {
        Finding::failed(
            "settings",
            format!("--{setting} is not set"),
            "set it as a flag, in the environment or in the settings file",
        )
    };
    options.missing.iter().map(failed).collect()
}

/// Returns what keeps an agent from saving: directories of runtimes that cannot be read, capabilities and process numbers
/// that are missing. `live` is whether containers are saved while they run on, which needs more rights. Nothing is tried
/// out or connected to, so this can be repeated every few seconds.
pub(crate) fn obstacles(roots: &Roots, live: bool) -> Vec<Finding> {
    let mut found = runtimes::unreadable(roots);
    let mut rights = rights::of_agent(live);
    if live {
        rights.push(runtimes::proc_of_agent(roots));
    }
    found.extend(rights.into_iter().filter(|f| f.state == State::Failed));
    found
}

/// Runs all checks for the role and returns their findings.
pub(crate) fn run(options: &Options) -> Report {
    report(options, checks(options))
}

/// Runs `checks` in parallel. A check that does not finish in time yields a finding of its own.
fn report(options: &Options, checks: Vec<Check>) -> Report {
    let (tell, told) = mpsc::channel();
    let names: Vec<&'static str> = checks.iter().map(|(name, _)| *name).collect();
    for (number, (_, check)) in checks.into_iter().enumerate() {
        let (tell, options) = (tell.clone(), options.clone());
        // It is not waited for: one that hangs ends with the process.
        let _ = std::thread::Builder::new().spawn(move || tell.send((number, check(&options))));
    }
    drop(tell);
    // The checks have time limits of their own; this one covers checks that do not keep to them.
    let deadline = Instant::now() + options.timeout + options.timeout / 2;
    let mut by_check: Vec<Option<Vec<Finding>>> = vec![None; names.len()];
    while by_check.iter().any(Option::is_none) {
        let left = deadline.saturating_duration_since(Instant::now());
        // All senders are gone when every check has finished or panicked.
        let Ok((number, findings)) = told.recv_timeout(left) else {
            break;
        };
        by_check[number] = Some(findings);
    }
    let findings: Vec<Finding> = names
        .into_iter()
        .zip(by_check)
        .flat_map(|(name, findings)| {
            findings.unwrap_or_else(|| vec![no_answer(name, options.timeout)])
        })
        .collect();
    Report {
        purpose: options.purpose.name(),
        state: findings
            .iter()
            .map(|finding| finding.state)
            .max()
            .unwrap_or(State::Ok),
        findings,
    }
}

fn no_answer(check: &'static str, after: Duration) -> Finding {
    Finding::failed(
        check,
        format!("no answer within {} s", after.as_secs()),
        "something that does not answer is in the way: look at mounts and servers of that name; --check-timeout waits longer",
    )
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn options(purpose: Purpose) -> Options {
        Options {
            purpose,
            roots: Roots::default(),
            missing: Vec::new(),
            refused: None,
            directories: Vec::new(),
            secrets: Vec::new(),
            redis: None,
            record: None,
            registries: Vec::new(),
            access: Access::default(),
            timeout: Duration::from_millis(200),
        }
    }

    #[test]
    fn a_check_that_hangs_is_a_finding_and_holds_up_nothing() {
        let checks: Vec<Check> = vec![
            (
                "silent",
                Box::new(|_: &Options| {
                    loop {
                        std::thread::park();
                    }
                }),
            ),
            (
                "quick",
                Box::new(|_: &Options| vec![Finding::ok("quick", "done")]),
            ),
        ];
        let report = report(&options(Purpose::Commit), checks);
        let states: Vec<_> = report.findings.iter().map(|f| (f.check, f.state)).collect();
        assert_eq!(states, [("silent", State::Failed), ("quick", State::Ok)]);
        assert_eq!(report.state, State::Failed);
    }

    #[test]
    fn what_is_not_set_is_named() {
        let mut options = options(Purpose::Agent);
        options.missing = vec!["owner".to_owned()];
        let found = settings(&options);
        assert_eq!(found[0].state, State::Failed);
        assert_eq!(found[0].found, "--owner is not set");
    }
}
