//! Checks the privileges that a save has given up while it reads untrusted data, as the kernel shows them for every
//! thread.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::os::fd::AsRawFd as _;
use std::path::Path;
use std::process::Stdio;

use anyhow::{Context, Result, ensure};

use crate::host::process::{Mount, Process};
use crate::host::{Roots, Scratch};
use crate::save::upperdeck_itself;
use crate::support::{Need, ignored};

/// SYS_ADMIN, DAC_READ_SEARCH, SYS_PTRACE, DAC_OVERRIDE, FOWNER, SETUID, SETGID, SYS_NICE, SYS_RESOURCE, LEASE.
const OF_A_SAVE: u64 =
    1 << 21 | 1 << 2 | 1 << 19 | 1 << 1 | 1 << 3 | 1 << 7 | 1 << 6 | 1 << 23 | 1 << 24 | 1 << 28;
/// DAC_OVERRIDE.
const OF_A_WATCHDOG: u64 = 1 << 1;

/// Returns the fields of `/proc/PID/task/TID/status`.
fn status(file: &Path) -> Result<BTreeMap<String, String>> {
    let text = fs::read_to_string(file).with_context(|| file.display().to_string())?;
    let fields = text.lines().filter_map(|line| line.split_once(':'));
    Ok(fields
        .map(|(name, value)| (name.to_owned(), value.trim().to_owned()))
        .collect())
}

fn assert_confined(pid: u32, allowed: u64) -> Result<usize> {
    let mut threads = 0;
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        let fields = status(&task?.path().join("status"))?;
        let name = &fields["Name"];
        for set in ["CapInh", "CapAmb", "CapPrm", "CapEff", "CapBnd"] {
            let has = u64::from_str_radix(&fields[set], 16)?;
            let may = if matches!(set, "CapInh" | "CapAmb") {
                0
            } else {
                allowed
            };
            ensure!(has & !may == 0, "{name}: {set} {has:x}, allowed {may:x}");
        }
        assert_eq!(fields["NoNewPrivs"], "1", "{name}");
        assert_eq!(fields["Seccomp"], "2", "{name}");
        threads += 1;
    }
    let limits = fs::read_to_string(format!("/proc/{pid}/limits"))?;
    let core = limits.lines().find(|line| line.starts_with("Max core"));
    let fields: Vec<&str> = core.unwrap_or_default().split_whitespace().collect();
    assert_eq!(fields.get(4..6), Some(&["0", "0"][..]), "{limits}");
    Ok(threads)
}

#[test]
fn a_save_that_waits_has_no_more_rights_than_it_needs_in_any_thread() -> Result<()> {
    let mut needs = ["buildah", "skopeo", "busybox", "python3", "unshare"]
        .map(Need::Program)
        .to_vec();
    needs.push(Need::Root);
    if ignored(&needs) {
        return Ok(());
    }
    let scratch = Scratch::new()?;
    let process = Process::start(&scratch, &Mount::default())?;
    process.shell("echo work > /work.txt")?;
    let layout = scratch.path().join("saved");
    let destination = format!("oci:{}:saved", layout.display());
    // Descriptors that the caller left open by mistake, and one that is passed on purpose.
    let stray = fs::File::open("/etc/hostname")?;
    rustix::io::fcntl_setfd(&stray, rustix::io::FdFlags::empty())?;
    let mut child = upperdeck_itself("commit", &Roots::none(&scratch))
        .args(["--progress", "json", "--gate-fd", "0"])
        .args(["--base", &process.base])
        .args([format!("pid:{}", process.pid), destination])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut answer = child.stdin.take().context("stdin")?;
    let mut events = BufReader::new(child.stdout.take().context("stdout")?);
    let mut said = String::new();
    while !said.contains("\"ready\"") {
        let read = events.read_line(&mut said)?;
        ensure!(read > 0, "it ended before it was ready: {said}");
    }
    let pid = child.id();
    let threads = assert_confined(pid, OF_A_SAVE)?;
    ensure!(threads > 2, "{threads} threads");
    let open = format!("/proc/{pid}/fd/{}", stray.as_raw_fd());
    let leads_to = fs::read_link(open).unwrap_or_default();
    assert_ne!(leads_to, Path::new("/etc/hostname"));
    // The watchdog on standby, with fewer privileges.
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))?;
    let watchdogs: Vec<u32> = children
        .split_whitespace()
        .map(str::parse)
        .collect::<Result<_, _>>()?;
    assert_eq!(watchdogs.len(), 1, "{children}");
    assert_eq!(assert_confined(watchdogs[0], OF_A_WATCHDOG)?, 1);

    answer.write_all(b"y")?;
    let mut rest = String::new();
    while events.read_line(&mut rest)? > 0 {}
    ensure!(child.wait()?.success(), "{said}{rest}");
    ensure!(rest.contains("\"saved\""), "{rest}");
    ensure!(
        !Path::new(&format!("/proc/{}", watchdogs[0])).exists(),
        "the watchdog did not end with the save"
    );
    Ok(())
}
