//! Checks the kernel: features that a save requires, and features that make it safer or cheaper.

use std::fs;

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};
use rustix::process::PidfdFlags;

use super::{Finding, Options, Purpose};

/// First version with `openat2`.
const MIN_KERNEL: (u32, u32) = (5, 6);
/// First version with `cpu.idle` of cgroups.
const IDLE: (u32, u32) = (5, 15);
/// First version with `statmount`, which reads a mount by its ID, and with `FICLONE` alongside readers on XFS.
const STATMOUNT: (u32, u32) = (6, 8);

/// Facts that the check reads from the running kernel.
struct Facts {
    release: String,
    /// Content of `/proc/filesystems`.
    filesystems: String,
    openat2: bool,
    pidfd: bool,
    /// Whether `/proc/pressure/cpu` can be opened.
    pressure: bool,
    /// Value of `/proc/sys/user/max_user_namespaces`, if the file exists.
    user_namespaces: Option<u64>,
}

fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

pub(super) fn check(options: &Options) -> Vec<Finding> {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let opened = rustix::fs::openat2(CWD, "/", flags, Mode::empty(), ResolveFlags::NO_SYMLINKS);
    let own = rustix::process::getpid();
    let facts = Facts {
        release: read("/proc/sys/kernel/osrelease").trim().to_owned(),
        filesystems: read("/proc/filesystems"),
        openat2: opened.is_ok(),
        pidfd: rustix::process::pidfd_open(own, PidfdFlags::empty()).is_ok(),
        pressure: fs::File::open("/proc/pressure/cpu").is_ok(),
        user_namespaces: read("/proc/sys/user/max_user_namespaces")
            .trim()
            .parse()
            .ok(),
    };
    judge(&facts, options.purpose)
}

fn judge(facts: &Facts, purpose: Purpose) -> Vec<Finding> {
    let release = &facts.release;
    let mut found = Vec::new();
    found.push(match version(release) {
        Some(version) if version < MIN_KERNEL => Finding::failed(
            "kernel",
            format!("Linux {release}"),
            "update to Linux 5.6 or later: openat2(2) keeps reads inside the container's tree",
        ),
        Some(version) if version < IDLE => Finding::warning(
            "kernel",
            format!("Linux {release}"),
            "from Linux 5.15 on saves run on what is left over of the cores (cpu.idle)",
        ),
        Some(version) if version < STATMOUNT => Finding::ok(
            "kernel",
            format!("Linux {release}; without statmount(2) mounts are read from mountinfo"),
        ),
        Some(_) => Finding::ok("kernel", format!("Linux {release}")),
        None => Finding::skipped("kernel", format!("Linux {release:?}")),
    });
    found.push(if facts.openat2 {
        Finding::ok("openat2", "works")
    } else {
        Finding::failed(
            "openat2",
            "refused",
            "a kernel before 5.6, a seccomp profile that does not know it, or RestrictSUIDSGID of a systemd unit: nothing can \
             be read safely without it",
        )
    });
    let mut types = facts
        .filesystems
        .lines()
        .filter_map(|line| line.split_whitespace().last());
    found.push(if types.any(|name| name == "overlay") {
        Finding::ok("overlay", "the kernel has overlayfs")
    } else {
        Finding::warning(
            "overlay",
            "overlayfs is not loaded",
            "no container on an overlay runs here; runtimes load it ('modprobe overlay')",
        )
    });
    found.push(if facts.pidfd {
        Finding::ok("pidfd", "works")
    } else {
        Finding::warning(
            "pidfd",
            "refused",
            "Linux 5.3, and a seccomp profile that knows pidfd_open",
        )
    });
    if purpose == Purpose::Agent {
        found.push(if facts.pressure {
            Finding::ok("pressure", "/proc/pressure says how busy the node is")
        } else {
            Finding::warning(
                "pressure",
                "/proc/pressure cannot be read",
                "start the kernel with psi=1: without it the agent goes by the load alone",
            )
        });
    }
    found.push(match facts.user_namespaces {
        Some(0) => Finding::ok(
            "user-namespaces",
            "off: containers with user namespaces do not run here",
        ),
        Some(_) => Finding::ok("user-namespaces", "on"),
        None => Finding::skipped("user-namespaces", "not told"),
    });
    found
}

#[cfg(test)]
mod tests {
    use super::super::State;
    use super::*;

    type Spoil = fn(&mut Facts);

    fn facts() -> Facts {
        Facts {
            release: "6.18.44-generic".to_owned(),
            filesystems: "nodev\tsysfs\n\text4\nnodev\toverlay\n".to_owned(),
            openat2: true,
            pidfd: true,
            pressure: true,
            user_namespaces: Some(100),
        }
    }

    fn state(facts: &Facts, check: &str) -> Option<State> {
        let found = judge(facts, Purpose::Agent);
        found
            .iter()
            .find(|f| f.check == check)
            .map(|finding| finding.state)
    }

    #[test]
    fn each_missing_feature_has_its_finding() {
        assert!(
            judge(&facts(), Purpose::Agent)
                .iter()
                .all(|finding| finding.state == State::Ok)
        );
        let cases: [(&str, Spoil, State); 7] = [
            (
                "kernel",
                |f| f.release = "4.18.0-553.el8".into(),
                State::Failed,
            ),
            (
                "kernel",
                |f| f.release = "5.10.0-8-amd64".into(),
                State::Warning,
            ),
            ("kernel", |f| f.release = "strange".into(), State::Skipped),
            ("openat2", |f| f.openat2 = false, State::Failed),
            (
                "overlay",
                |f| f.filesystems = "\tfuse.overlay2\n".into(),
                State::Warning,
            ),
            ("pidfd", |f| f.pidfd = false, State::Warning),
            ("pressure", |f| f.pressure = false, State::Warning),
        ];
        for (check, spoil, expected) in cases {
            let mut facts = facts();
            spoil(&mut facts);
            assert_eq!(state(&facts, check), Some(expected), "{check}");
        }
    }
}
