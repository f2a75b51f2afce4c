//! Least privilege: what a process drops before it reads the first untrusted byte.
//!
//! A process calls [`apply`] once, while it has a single thread: capabilities, `no_new_privs` and system call filters
//! belong to a thread and are inherited by those that it creates later. What cannot be dropped (the process is not
//! root, the kernel has no seccomp) is left unchanged and returned by [`apply`]. A process with fewer rights than it
//! needs continues, and the operation that needs them reports the error.
//!
//! Landlock is not used: its `ptrace_access_check` hook denies `/proc/PID/root`, `maps` and `cwd` of every process
//! outside the sandbox regardless of capabilities, and a live save needs those of the container.
//!
//! Sources: `capabilities(7)`, `seccomp(2)`, kernel `Documentation/userspace-api/no_new_privs.rst`,
//! `security/landlock/task.c`.

mod capability;
mod descriptors;
mod seccomp;

use std::io;

use rustix::process::{DumpableBehavior, Resource, Rlimit, setrlimit};

#[cfg(feature = "service")]
pub(crate) use capability::of_this_thread;
pub(crate) use capability::required_capabilities;
pub(crate) use descriptors::from_path as descriptor_from_path;

/// The purpose of a process, which determines the rights that it keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(not(feature = "service"), allow(dead_code))]
pub(crate) enum Role {
    /// `ps`, `inspect`, `diff`: reads a container and prints.
    Inspect,
    /// `layer`: reads directories and writes a file.
    Layer,
    /// `commit`, `bench`: reads and freezes a container, writes files, accesses registries.
    Commit,
    /// `agent`: starts builders.
    Agent,
    /// An `agent` that serves its health.
    ServingAgent,
    /// `up`: an agent and a manager.
    Up,
    /// `manager`: serves the API.
    Manager,
    /// A `manager` that runs as root on files of other users.
    PrivilegedManager,
    /// The freeze watchdog: writes to one cgroup.
    Watchdog,
}

impl Role {
    /// All roles, with the names of their verbs.
    #[cfg(test)]
    pub(crate) const ALL: [(Self, &'static str); 9] = [
        (Self::Inspect, "inspect"),
        (Self::Layer, "layer"),
        (Self::Commit, "commit"),
        (Self::Agent, "agent"),
        (Self::ServingAgent, "agent, with its health"),
        (Self::Up, "up"),
        (Self::Manager, "manager"),
        (Self::PrivilegedManager, "manager, of others' files"),
        (Self::Watchdog, "watchdog"),
    ];
}

/// The result of [`apply`].
#[derive(Debug, Default)]
pub(crate) struct Confinement {
    /// What could not be dropped, and why.
    pub(crate) not_dropped: Vec<(&'static str, io::Error)>,
}

impl Confinement {
    fn note(&mut self, what: &'static str, result: io::Result<()>) {
        if let Err(error) = result {
            self.not_dropped.push((what, error));
        }
    }
}

/// Closes all descriptors above 2 except `kept`. Has to be called before this program opens any itself.
pub(crate) fn close_inherited(kept: &[u32]) {
    if let Err(error) = descriptors::close(kept) {
        tracing::debug!(%error, "inherited descriptors are not closed");
    }
}

/// Drops what `role` does not need, for this thread and those that it creates later.
pub(crate) fn apply(role: Role) -> Confinement {
    let mut applied = Confinement::default();
    apply_to_thread(role, &mut applied);
    // Keeps credentials in memory from core files and from other processes of the same user.
    let none = Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    applied.note(
        "the limit of core files",
        setrlimit(Resource::Core, none).map_err(Into::into),
    );
    let hidden = rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable);
    applied.note("PR_SET_DUMPABLE", hidden.map_err(Into::into));
    for (what, error) in &applied.not_dropped {
        tracing::debug!(?role, what, %error, "not given up");
    }
    applied
}

/// The part of [`apply`] that affects a single thread. Called in a thread of its own, it shows what can be dropped on
/// this machine.
pub(crate) fn apply_to_thread(role: Role, applied: &mut Confinement) {
    applied.note("capabilities", capability::retain(role));
    let fixed = rustix::thread::set_no_new_privs(true);
    applied.note("no_new_privs", fixed.map_err(Into::into));
    applied.note("system calls", seccomp::install_filter(role));
}
