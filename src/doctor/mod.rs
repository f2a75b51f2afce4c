//! What is missing or weak on a node, and what to do about it.
//!
//! Each check gathers facts in one function and judges them in another one, which asks nothing of the machine. They run
//! side by side, each in a thread of its own with a bound: one that hangs (a dead mount, a silent server) is a finding like
//! any other and holds up nothing. No check leaves anything behind.

mod cgroup;
mod clock;
mod files;
mod kernel;
mod network;
mod rights;
mod runtimes;

use std::path::PathBuf;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use serde::Serialize;

use crate::confine::Role;
use crate::container::Roots;
use crate::registry::Access;

/// What the node is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Purpose {
    /// Saves by hand.
    Commit,
    /// A node's agent.
    Agent,
    /// An image manager.
    Manager,
}

impl Purpose {
    /// As its verb.
    pub fn name(self) -> &'static str {
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

    /// Whether containers are read by it.
    fn builds(self) -> bool {
        self != Self::Manager
    }
}

/// How it stands with one thing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// As it should be.
    Ok,
    /// Could not be looked at, or does not matter here.
    Skipped,
    /// It works, and less well or less safely than it could.
    Warning,
    /// It does not work.
    Failed,
}

/// What one check found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Stable name, e.g. `capabilities`.
    pub check: &'static str,
    /// How it stands.
    pub state: State,
    /// What was found, in words.
    pub found: String,
    /// What to do about it; none where nothing has to be done.
    pub advice: Option<String>,
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

/// A file with a secret, or that decides who may do what.
#[derive(Clone, Debug)]
pub struct Secret {
    /// The setting that names it.
    pub setting: &'static str,
    /// Where it is.
    pub path: PathBuf,
}

/// What is looked at.
#[derive(Clone, Debug)]
pub struct Options {
    /// What for.
    pub purpose: Purpose,
    /// Where runtimes keep their state.
    pub roots: Roots,
    /// Settings without which the purpose cannot be served, and that are not there.
    pub missing: Vec<String>,
    /// Where something is kept, by the setting that says so; made where it is not there.
    pub directories: Vec<(&'static str, PathBuf)>,
    /// Files that only their owner should read.
    pub secrets: Vec<Secret>,
    /// Redis, with its password.
    pub redis: Option<zeroize::Zeroizing<String>>,
    /// The record, with its password.
    pub record: Option<zeroize::Zeroizing<String>>,
    /// Repositories that are pushed to: `HOST/REPOSITORY`.
    pub registries: Vec<String>,
    /// How they are reached.
    pub access: Access,
    /// How long one check may take.
    pub timeout: Duration,
}

/// All of it.
#[derive(Clone, Debug, Serialize)]
pub struct Report {
    /// For `commit`, `agent` or `manager`.
    pub purpose: &'static str,
    /// The worst of all.
    pub state: State,
    /// In the order of the checks.
    pub findings: Vec<Finding>,
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

/// Runs all checks.
pub fn run(options: &Options) -> Report {
    report(options, checks(options))
}

/// Those of `checks` that are not done in time are findings, too.
fn report(options: &Options, checks: Vec<Check>) -> Report {
    let (tell, told) = mpsc::channel();
    let names: Vec<&'static str> = checks.iter().map(|(name, _)| *name).collect();
    for (number, (_, check)) in checks.into_iter().enumerate() {
        let (tell, options) = (tell.clone(), options.clone());
        // It is not waited for: one that hangs ends with the process.
        let _ = std::thread::Builder::new().spawn(move || tell.send((number, check(&options))));
    }
    drop(tell);
    // The checks have bounds of their own; this one is for what does not keep to any.
    let deadline = Instant::now() + options.timeout + options.timeout / 2;
    let mut by_check: Vec<Option<Vec<Finding>>> = vec![None; names.len()];
    while by_check.iter().any(Option::is_none) {
        let left = deadline.saturating_duration_since(Instant::now());
        // Without a sender all are done, or gone without an answer.
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
