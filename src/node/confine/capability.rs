//! The capabilities that each role keeps, and their purpose. `doctor` compares a process with this table.

use std::io;

use rustix::io::Errno;
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, capability_is_in_bounding_set,
    clear_ambient_capability_set, remove_capability_from_bounding_set, set_capabilities,
};

use super::Role;

/// A capability that a role uses.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RequiredCapability {
    /// Its bit.
    pub(crate) capability: CapabilitySet,
    /// Its name without `CAP_`.
    pub(crate) name: &'static str,
    /// What it is used for.
    pub(crate) purpose: &'static str,
    /// Whether the role cannot work without it. If false, `purpose` names what does not work.
    pub(crate) required: bool,
}

const fn capability(
    capability: CapabilitySet,
    name: &'static str,
    required: bool,
    purpose: &'static str,
) -> RequiredCapability {
    RequiredCapability {
        capability,
        name,
        purpose,
        required,
    }
}

const SYS_ADMIN: RequiredCapability = capability(
    CapabilitySet::SYS_ADMIN,
    "SYS_ADMIN",
    true,
    "to read trusted.overlay.* attributes",
);
const DAC_READ_SEARCH: RequiredCapability = capability(
    CapabilitySet::DAC_READ_SEARCH,
    "DAC_READ_SEARCH",
    true,
    "to read files and directories whatever their mode",
);
const SYS_PTRACE: RequiredCapability = capability(
    CapabilitySet::SYS_PTRACE,
    "SYS_PTRACE",
    true,
    "to look at /proc/PID/root and /proc/PID/maps of a running container",
);
const DAC_OVERRIDE: RequiredCapability = capability(
    CapabilitySet::DAC_OVERRIDE,
    "DAC_OVERRIDE",
    false,
    "to freeze containers whose cgroup belongs to a user, and to write into directories of other users",
);
const FOWNER: RequiredCapability = capability(
    CapabilitySet::FOWNER,
    "FOWNER",
    false,
    "to read without changing access times",
);
const LEASE: RequiredCapability = capability(
    CapabilitySet::LEASE,
    "LEASE",
    false,
    "to learn at once that no process is writing to a file; else every file changed of late is waited for",
);
const SETUID: RequiredCapability = capability(
    CapabilitySet::SETUID,
    "SETUID",
    false,
    "to read volumes as the container's user",
);
const SETGID: RequiredCapability = capability(
    CapabilitySet::SETGID,
    "SETGID",
    false,
    "to read volumes as the container's groups",
);
const SYS_NICE: RequiredCapability = capability(
    CapabilitySet::SYS_NICE,
    "SYS_NICE",
    false,
    "to leave the lowest priority while a container stands still",
);
const SYS_RESOURCE: RequiredCapability = capability(
    CapabilitySet::SYS_RESOURCE,
    "SYS_RESOURCE",
    false,
    "to be the last that is ended when memory runs out, as the freeze watchdog",
);
const NET_BIND_SERVICE: RequiredCapability = capability(
    CapabilitySet::NET_BIND_SERVICE,
    "NET_BIND_SERVICE",
    false,
    "to listen on a port below 1024",
);

const INSPECT: &[RequiredCapability] = &[
    SYS_ADMIN,
    DAC_READ_SEARCH,
    SYS_PTRACE,
    FOWNER,
    SETUID,
    SETGID,
];
const LAYER: &[RequiredCapability] = &[SYS_ADMIN, DAC_READ_SEARCH, DAC_OVERRIDE, FOWNER, LEASE];
const COMMIT: &[RequiredCapability] = &[
    SYS_ADMIN,
    DAC_READ_SEARCH,
    SYS_PTRACE,
    DAC_OVERRIDE,
    FOWNER,
    LEASE,
    SETUID,
    SETGID,
    SYS_NICE,
    SYS_RESOURCE,
];
/// The union of manager and agent: the capabilities of the agent, and the one for a privileged port.
const UP: &[RequiredCapability] = &[
    SYS_ADMIN,
    DAC_READ_SEARCH,
    SYS_PTRACE,
    DAC_OVERRIDE,
    FOWNER,
    LEASE,
    SETUID,
    SETGID,
    SYS_NICE,
    SYS_RESOURCE,
    NET_BIND_SERVICE,
];
const MANAGER: &[RequiredCapability] = &[NET_BIND_SERVICE];
const PRIVILEGED_MANAGER: &[RequiredCapability] = &[NET_BIND_SERVICE, DAC_OVERRIDE];
const WATCHDOG: &[RequiredCapability] = &[DAC_OVERRIDE];

/// Returns the capabilities that `role` uses. An agent needs exactly those of the builders that it starts, because a
/// process that runs as root cannot pass on a capability that it has dropped.
pub(crate) fn required_capabilities(role: Role) -> &'static [RequiredCapability] {
    match role {
        Role::Inspect => INSPECT,
        Role::Layer => LAYER,
        Role::Commit | Role::Agent | Role::ServingAgent => COMMIT,
        Role::Up => UP,
        Role::Manager => MANAGER,
        Role::PrivilegedManager => PRIVILEGED_MANAGER,
        Role::Watchdog => WATCHDOG,
    }
}

/// Capabilities that the agent itself uses. The others are only passed on to its children, so they are permitted but
/// not effective.
const AGENT_EFFECTIVE: &[RequiredCapability] =
    &[DAC_READ_SEARCH, SYS_PTRACE, DAC_OVERRIDE, SYS_RESOURCE];

fn union(needs: &[RequiredCapability]) -> CapabilitySet {
    needs
        .iter()
        .fold(CapabilitySet::empty(), |all, need| all | need.capability)
}

/// Returns the capabilities of this thread.
#[cfg(feature = "service")]
pub(crate) fn of_this_thread() -> io::Result<CapabilitySets> {
    Ok(capabilities(None)?)
}

/// Drops all capabilities that `role` does not use from every set of this thread.
pub(super) fn retain(role: Role) -> io::Result<()> {
    let kept = union(required_capabilities(role));
    let mut failed = None;
    // The bounding set first, because changing it requires a capability that is dropped afterwards. In some containers
    // not even root may change it; then the other sets are decisive.
    for number in 0..64 {
        let bit = CapabilitySet::from_bits_retain(1 << number);
        if kept.contains(bit) {
            continue;
        }
        match capability_is_in_bounding_set(bit) {
            Ok(false) => continue,
            Ok(true) => {}
            // There is no capability with this number.
            Err(_) => break,
        }
        match remove_capability_from_bounding_set(bit) {
            Ok(()) => {}
            Err(error) => failed = Some(error),
        }
    }
    // Kernels before 4.3 have no ambient set.
    if let Err(error) = clear_ambient_capability_set()
        && error != Errno::INVAL
    {
        failed = Some(error);
    }
    let had = capabilities(None)?;
    let in_effect = match role {
        Role::Agent | Role::ServingAgent => union(AGENT_EFFECTIVE),
        _ => kept,
    };
    set_capabilities(
        None,
        CapabilitySets {
            effective: had.effective & in_effect,
            permitted: had.permitted & kept,
            inheritable: CapabilitySet::empty(),
        },
    )?;
    failed.map_or(Ok(()), |error| Err(error.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_agent_is_permitted_all_that_its_builders_need_and_uses_less() {
        let builders = union(required_capabilities(Role::Commit))
            | union(required_capabilities(Role::Inspect));
        assert!(union(required_capabilities(Role::Agent)).contains(builders));
        assert!(union(required_capabilities(Role::Up)).contains(builders));
        assert!(!union(AGENT_EFFECTIVE).contains(CapabilitySet::SYS_ADMIN));
        assert!(union(required_capabilities(Role::Agent)).contains(union(AGENT_EFFECTIVE)));
    }

    #[test]
    fn what_would_make_a_process_the_machines_master_is_kept_by_none() {
        let never = CapabilitySet::SYS_MODULE
            | CapabilitySet::SYS_RAWIO
            | CapabilitySet::SYS_BOOT
            | CapabilitySet::BPF
            | CapabilitySet::MKNOD
            | CapabilitySet::NET_ADMIN
            | CapabilitySet::SETPCAP
            | CapabilitySet::SETFCAP;
        for (role, name) in Role::ALL {
            assert!(
                !union(required_capabilities(role)).intersects(never),
                "{name}"
            );
        }
    }
}
