//! Denies system calls that no process of this program makes after its start. They fail with `EPERM` instead of raising
//! a signal, so that a library that tries one continues as on a kernel that does not permit it.
//!
//! This is a list of denied calls rather than of allowed ones, because the calls of the C library, the resolver, TLS
//! and threads differ between versions and between glibc and musl. Denied are the calls that would turn a vulnerability
//! into control over the host: executing programs, memory of other processes, mounts, namespaces, kernel code, raw
//! sockets, the clock.

use std::collections::BTreeMap;
use std::io;

use libc::c_long;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

use super::Role;

/// Calls that no role makes.
const ALWAYS_DENIED: &[c_long] = &[
    // Memory and descriptors of other processes.
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_process_madvise,
    libc::SYS_pidfd_getfd,
    libc::SYS_kcmp,
    // Mounts and root directories.
    libc::SYS_mount,
    libc::SYS_umount2,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_move_mount,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_mount_setattr,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_quotactl,
    // File handles can refer to files outside any root.
    libc::SYS_open_by_handle_at,
    libc::SYS_mknodat,
    libc::SYS_fanotify_init,
    // Namespaces.
    libc::SYS_setns,
    // The kernel and its code.
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_reboot,
    libc::SYS_syslog,
    libc::SYS_acct,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    // Keys.
    libc::SYS_keyctl,
    libc::SYS_add_key,
    libc::SYS_request_key,
    // Clock, host name and personality.
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_clock_adjtime,
    libc::SYS_adjtimex,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
    libc::SYS_personality,
    libc::SYS_vhangup,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_mknod,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_iopl,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_ioperm,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_modify_ldt,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_kexec_file_load,
];
/// Only an agent executes programs.
const EXEC_CALLS: &[c_long] = &[libc::SYS_execve, libc::SYS_execveat];
/// Only a manager, and an agent that serves its health, accept connections.
const LISTEN_CALLS: &[c_long] = &[libc::SYS_listen, libc::SYS_accept, libc::SYS_accept4];
/// A watchdog communicates only through its pipes.
const SOCKET_CALLS: &[c_long] = &[libc::SYS_socket, libc::SYS_connect, libc::SYS_bind];

/// Address families that registries, Redis, databases and the resolver need (netlink provides the addresses of this
/// machine).
const ADDRESS_FAMILIES: [i32; 4] = [
    libc::AF_UNIX,
    libc::AF_INET,
    libc::AF_INET6,
    libc::AF_NETLINK,
];
/// Flags of `unshare` and `clone` that create namespaces.
const NAMESPACE_FLAGS: [i32; 7] = [
    libc::CLONE_NEWNS,
    libc::CLONE_NEWUSER,
    libc::CLONE_NEWPID,
    libc::CLONE_NEWNET,
    libc::CLONE_NEWIPC,
    libc::CLONE_NEWUTS,
    libc::CLONE_NEWCGROUP,
];
/// `ioctl`s that inject input into a terminal: `TIOCSTI` and `TIOCLINUX`.
const TERMINAL_INJECTION: [u64; 2] = [0x5412, 0x541c];

/// Rules by system call number. An empty list denies the call regardless of its arguments.
type Rules = BTreeMap<i64, Vec<SeccompRule>>;

fn invalid_filter(error: impl std::fmt::Display) -> io::Error {
    io::Error::new(io::ErrorKind::Unsupported, error.to_string())
}

fn condition(
    argument: u8,
    operator: SeccompCmpOp,
    value: u64,
) -> Result<SeccompCondition, seccompiler::BackendError> {
    SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value)
}

/// Returns the calls that fail with `EPERM`.
fn rules(role: Role) -> Result<Rules, seccompiler::BackendError> {
    let mut denied: Vec<c_long> = ALWAYS_DENIED.to_vec();
    if !matches!(role, Role::Agent | Role::ServingAgent | Role::Up) {
        denied.extend(EXEC_CALLS);
    }
    if !matches!(
        role,
        Role::Manager | Role::PrivilegedManager | Role::ServingAgent | Role::Up
    ) {
        denied.extend(LISTEN_CALLS);
    }
    if role == Role::Watchdog {
        denied.extend(SOCKET_CALLS);
    }
    let mut rules: Rules = denied.into_iter().map(|call| (call, Vec::new())).collect();
    let mut with = |call: c_long, conditions: Vec<SeccompCondition>| {
        let rule = SeccompRule::new(conditions)?;
        rules.entry(call).or_default().push(rule);
        Ok::<(), seccompiler::BackendError>(())
    };
    if role != Role::Watchdog {
        let other = ADDRESS_FAMILIES
            .iter()
            .map(|family| condition(0, SeccompCmpOp::Ne, *family as u64));
        with(libc::SYS_socket, other.collect::<Result<_, _>>()?)?;
    }
    for flag in NAMESPACE_FLAGS {
        let flag = u64::from(flag as u32);
        for call in [libc::SYS_unshare, libc::SYS_clone] {
            with(
                call,
                vec![condition(0, SeccompCmpOp::MaskedEq(flag), flag)?],
            )?;
        }
    }
    for request in TERMINAL_INJECTION {
        with(
            libc::SYS_ioctl,
            vec![condition(1, SeccompCmpOp::Eq, request)?],
        )?;
    }
    Ok(rules)
}

/// Adds the same calls by their numbers in the x32 ABI. A kernel that supports it accepts them from any program.
#[cfg(target_arch = "x86_64")]
fn with_x32_numbers(rules: Rules) -> Rules {
    const X32: i64 = 0x4000_0000;
    let other: Rules = rules
        .iter()
        .map(|(call, rules)| (call | X32, rules.clone()))
        .collect();
    rules.into_iter().chain(other).collect()
}

#[cfg(not(target_arch = "x86_64"))]
fn with_x32_numbers(rules: Rules) -> Rules {
    rules
}

fn program(rules: Rules, errno: i32) -> io::Result<BpfProgram> {
    let arch = TargetArch::try_from(std::env::consts::ARCH).map_err(invalid_filter)?;
    let denied = SeccompAction::Errno(errno as u32);
    SeccompFilter::new(with_x32_numbers(rules), SeccompAction::Allow, denied, arch)
        .and_then(TryInto::try_into)
        .map_err(invalid_filter)
}

/// Installs the filter for this thread, the threads that it creates later, and the programs that they execute.
pub(super) fn install_filter(role: Role) -> io::Result<()> {
    let apply = |program: BpfProgram| {
        seccompiler::apply_filter(&program).map_err(|error| match error {
            seccompiler::Error::Prctl(error) | seccompiler::Error::Seccomp(error) => error,
            error => invalid_filter(error),
        })
    };
    // The arguments of clone3 are in memory and cannot be filtered. With ENOSYS, C libraries fall back to clone.
    let unknown = Rules::from([(libc::SYS_clone3, Vec::new())]);
    apply(program(unknown, libc::ENOSYS)?)?;
    apply(program(rules(role).map_err(invalid_filter)?, libc::EPERM)?)
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;

    use super::*;

    /// Runs `test` in a thread of its own, because a filter stays with its thread and would affect other tests.
    fn confined<T: Send + 'static>(
        role: Role,
        test: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Box<dyn std::error::Error>> {
        let thread = std::thread::spawn(move || install_filter(role).map(|()| test()));
        Ok(thread.join().map_err(|_| "the thread panicked")??)
    }

    fn refused<T>(result: nix::Result<T>) -> bool {
        result.err() == Some(nix::errno::Errno::EPERM)
    }

    #[test]
    fn mounts_namespaces_and_programs_are_refused_and_threads_and_sockets_are_not()
    -> Result<(), Box<dyn std::error::Error>> {
        let seen = confined(Role::Commit, || {
            use nix::sched::{CloneFlags, unshare};
            let mount = nix::mount::umount2("/nowhere-at-all", nix::mount::MntFlags::MNT_DETACH);
            let program = std::process::Command::new("/bin/true").status();
            let joined = std::thread::spawn(|| UdpSocket::bind("127.0.0.1:0").is_ok()).join();
            [
                ("umount", refused(mount)),
                (
                    "user namespace",
                    refused(unshare(CloneFlags::CLONE_NEWUSER)),
                ),
                ("mount namespace", refused(unshare(CloneFlags::CLONE_NEWNS))),
                (
                    "a program",
                    program.is_err_and(|e| e.raw_os_error() == Some(libc::EPERM)),
                ),
                (
                    "a listening socket",
                    std::net::TcpListener::bind("127.0.0.1:0")
                        .is_err_and(|e| e.raw_os_error() == Some(libc::EPERM)),
                ),
                ("own directory", unshare(CloneFlags::CLONE_FS).is_ok()),
                ("threads and sockets", joined.unwrap_or(false)),
                (
                    "names",
                    std::net::ToSocketAddrs::to_socket_addrs("localhost:80").is_ok(),
                ),
            ]
        })?;
        for (what, right) in seen {
            assert!(right, "{what}");
        }
        Ok(())
    }

    #[test]
    fn an_agent_starts_programs_and_a_manager_listens() -> Result<(), Box<dyn std::error::Error>> {
        let started = confined(Role::Agent, || {
            std::process::Command::new("/bin/true").status()
        })??;
        assert!(started.success());
        confined(Role::Manager, || std::net::TcpListener::bind("127.0.0.1:0"))??;
        Ok(())
    }

    #[test]
    fn raw_and_kernel_sockets_are_refused() -> Result<(), Box<dyn std::error::Error>> {
        // No dependency creates such sockets, so the rule itself is checked.
        let rules = rules(Role::Commit)?;
        assert_eq!(rules[&libc::SYS_socket].len(), 1);
        assert_eq!(rules[&libc::SYS_ptrace].len(), 0);
        assert!(!rules.contains_key(&libc::SYS_clone3));
        assert_eq!(rules[&libc::SYS_clone].len(), NAMESPACE_FLAGS.len());
        Ok(())
    }
}
