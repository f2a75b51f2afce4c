//! The verbs of the service: `manager`, `agent`, `up`, `setup`, `key` and `doctor`, and `job` and `kubectl`, which talk to
//! a manager.

mod autosave;
mod callers;
mod client;
mod doctor;
pub(super) mod images;
mod job;
mod kubectl;
mod notices;
mod renewed;
mod setup;
mod timeline;
mod verbs;
mod words;

use super::args::service::Verb;
use super::exit::Exit;
use crate::node::confine::Role;
use crate::node::container::Roots;
use crate::service::{agent, queue, record};

/// Runs a verb.
pub(super) fn run(verb: Verb, roots: &Roots, verbose: bool) -> anyhow::Result<()> {
    match verb {
        Verb::Doctor(args) => doctor::doctor(roots.clone(), &args),
        Verb::Job(args) => job::run(args, verbose),
        Verb::Kubectl(args) => kubectl::run(*args, verbose),
        Verb::Crd => verbs::crd(),
        Verb::Up(args) => verbs::up(roots.clone(), *args),
        Verb::Manager(args) => verbs::manager(&args),
        Verb::Agent(args) => verbs::agent(roots.clone(), &args),
        Verb::Setup(args) => setup::setup(&args),
        Verb::Key(args) => verbs::key(&args),
    }
}

/// Returns the confinement role of a verb's process, or `None` for verbs that read no untrusted input.
pub(super) fn role(verb: &Verb) -> Option<Role> {
    match verb {
        Verb::Agent(args) if args.health_listen.is_some() => Some(Role::ServingAgent),
        Verb::Agent(_) => Some(Role::Agent),
        Verb::Up(_) => Some(Role::Up),
        Verb::Manager(args) if verbs::reads_files_of_others(args) => Some(Role::PrivilegedManager),
        Verb::Manager(_) => Some(Role::Manager),
        Verb::Doctor(_)
        | Verb::Job(_)
        | Verb::Kubectl(_)
        | Verb::Crd
        | Verb::Setup(_)
        | Verb::Key(_) => None,
    }
}

/// Returns the exit code of a service error and its name in snake case, or `None` for any other error.
pub(super) fn failure(cause: &(dyn std::error::Error + 'static)) -> Option<(Exit, &'static str)> {
    if let Some(error) = cause.downcast_ref::<client::Error>() {
        let code = match error {
            client::Error::Save { code, .. } => code.name(),
            client::Error::Unreachable { .. } => "manager_unreachable",
            client::Error::Refused { .. } | client::Error::InvalidResponse { .. } => "refused",
        };
        return Some((error.exit(), code));
    }
    if let Some(error) = cause.downcast_ref::<kube::Error>() {
        return Some(match error {
            kube::Error::Api(said) if matches!(said.code, 401 | 403) => {
                (Exit::NotPermitted, "kubernetes")
            }
            kube::Error::Api(said) if said.code < 429 => (Exit::Failed, "kubernetes"),
            _ => (Exit::Retry, "kubernetes_unavailable"),
        });
    }
    if let Some(error) = cause.downcast_ref::<queue::Error>() {
        return Some(match error {
            queue::Error::Unusable(_) => (Exit::Usage, "usage"),
            queue::Error::Unreachable { .. } | queue::Error::Refused { .. } => {
                (Exit::Retry, "queue_unavailable")
            }
        });
    }
    if let Some(agent::Error::Options(_)) = cause.downcast_ref::<agent::Error>() {
        return Some((Exit::Usage, "usage"));
    }
    if let Some(error) = cause.downcast_ref::<record::Error>() {
        return Some(match error {
            record::Error::Place(_) => (Exit::Usage, "usage"),
            _ => (Exit::Retry, "record_unavailable"),
        });
    }
    None
}
