//! Checks the capabilities of this process against those that its role needs, and whether it can drop the others.

use rustix::thread::CapabilitySet;

use super::{Finding, Options, Purpose};
use crate::node::confine::{self, Confinement};

pub(super) fn check(options: &Options) -> Vec<Finding> {
    match confine::of_this_thread() {
        Ok(sets) => judge(
            sets.permitted,
            rustix::process::geteuid().is_root(),
            options.purpose,
        ),
        Err(error) => vec![Finding::skipped("capabilities", error.to_string())],
    }
}

/// Checks the capabilities of an agent. SYS_PTRACE is needed for containers that are saved while they run on (`live`).
pub(super) fn of_agent(live: bool) -> Vec<Finding> {
    let Ok(sets) = confine::of_this_thread() else {
        return Vec::new();
    };
    let given = if live {
        CapabilitySet::empty()
    } else {
        CapabilitySet::SYS_PTRACE
    };
    judge(sets.permitted | given, true, Purpose::Agent)
}

fn judge(permitted: CapabilitySet, root: bool, purpose: Purpose) -> Vec<Finding> {
    if purpose == Purpose::Manager {
        return vec![if root {
            Finding::warning(
                "capabilities",
                "runs as root",
                "a manager needs no rights: run it as a user of its own (User= in its unit)",
            )
        } else {
            Finding::ok("capabilities", "none are needed")
        }];
    }
    let missing: Vec<_> = confine::required_capabilities(purpose.role())
        .iter()
        .filter(|need| !permitted.contains(need.capability))
        .collect();
    if missing.is_empty() {
        return vec![Finding::ok("capabilities", "all that are used are there")];
    }
    let judged = missing.into_iter().map(|need| {
        let found = format!("CAP_{} is missing: {}", need.name, need.purpose);
        if need.required {
            let advice = "run as root; in a unit add it to CapabilityBoundingSet, in a pod to capabilities.add";
            Finding::failed("capabilities", found, advice)
        } else {
            let advice = "add it where that is wanted; all else works without it";
            Finding::warning("capabilities", found, advice)
        }
    });
    judged.collect()
}

/// Tries the confinement in a separate thread, so that it ends with that thread.
pub(super) fn confinement(options: &Options) -> Vec<Finding> {
    let role = options.purpose.role();
    let tried = std::thread::spawn(move || {
        let mut applied = Confinement::default();
        confine::apply_to_thread(role, &mut applied);
        applied
    });
    let left = match tried.join() {
        Ok(applied) => applied
            .not_dropped
            .into_iter()
            .map(|(what, error)| format!("{what}: {error}"))
            .collect(),
        Err(_) => vec!["the try broke down".to_owned()],
    };
    judge_confinement(&left)
}

fn judge_confinement(left: &[String]) -> Vec<Finding> {
    if left.is_empty() {
        return vec![Finding::ok(
            "confinement",
            "what is not needed can be given up: capabilities, new privileges, system calls",
        )];
    }
    vec![Finding::warning(
        "confinement",
        format!("cannot be given up: {}", left.join("; ")),
        "saves work and keep more rights than they need: CAP_SETPCAP lets the bounding set shrink, a kernel with \
         CONFIG_SECCOMP_FILTER refuses system calls",
    )]
}

#[cfg(test)]
mod tests {
    use super::super::State;
    use super::*;

    #[test]
    fn what_a_pod_needs_is_indispensable_and_the_rest_is_not() {
        let three =
            CapabilitySet::SYS_ADMIN | CapabilitySet::SYS_PTRACE | CapabilitySet::DAC_READ_SEARCH;
        let states = |has: CapabilitySet| -> Vec<State> {
            judge(has, true, Purpose::Agent)
                .iter()
                .map(|f| f.state)
                .collect()
        };
        assert_eq!(states(CapabilitySet::all()), [State::Ok]);
        assert!(states(three).iter().all(|state| *state == State::Warning));
        for one in [
            CapabilitySet::SYS_ADMIN,
            CapabilitySet::SYS_PTRACE,
            CapabilitySet::DAC_READ_SEARCH,
        ] {
            assert!(states(CapabilitySet::all() - one).contains(&State::Failed));
        }
    }

    #[test]
    fn a_manager_needs_no_root() {
        let state = |root| judge(CapabilitySet::empty(), root, Purpose::Manager)[0].state;
        assert_eq!((state(false), state(true)), (State::Ok, State::Warning));
    }

    #[test]
    fn what_cannot_be_given_up_is_named() {
        let found = judge_confinement(&["system calls: no".to_owned()]);
        assert_eq!(found[0].state, State::Warning);
        assert!(found[0].found.contains("system calls: no"));
    }
}
