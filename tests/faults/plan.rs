//! The list of possible faults, the selection that is tested, and the results.

use std::collections::BTreeMap;

use nix::errno::Errno;

use crate::calls;
use crate::tracer::{Fault, Order, Report, Target};

/// Number of faults tested per save unless all are.
const FEW: usize = 20;

/// Returns the faults of the calls of a run: `all`, those of the one wanted call, or a few of each.
pub fn faults(report: &Report, order: &Order, wanted: Option<&str>) -> Vec<Target> {
    let mut found = Vec::new();
    // Calls of one name on one object differ only in their position in the run: of many, the first and the last are
    // taken.
    let mut groups: BTreeMap<(&str, String), Vec<u64>> = BTreeMap::new();
    for seen in &report.calls {
        groups
            .entry((&seen.call, order.plain(&seen.about)))
            .or_default()
            .push(seen.length);
    }
    for ((name, about), lengths) in &groups {
        let mut ends = vec![0, lengths.len() - 1];
        ends.dedup();
        for nth in ends {
            for fault in ways(name, about, lengths[nth]) {
                found.push(Target {
                    call: (*name).to_owned(),
                    about: about.clone(),
                    nth,
                    fault,
                });
            }
        }
    }
    match wanted {
        Some("all") => found,
        Some(call) => found
            .into_iter()
            .filter(|target| target.call == call)
            .collect(),
        None => few(&found),
    }
}

/// Selects a few, always the same: evenly over the list ordered by name, so that each name has its share.
fn few(found: &[Target]) -> Vec<Target> {
    let step = (found.len() as f64 / FEW as f64).max(1.0);
    let at = |n: usize| found.get((n as f64 * step) as usize).cloned();
    (0..FEW).map_while(at).collect()
}

/// Returns the faults that a call can have.
fn ways(name: &str, about: &str, length: u64) -> Vec<Fault> {
    let Some(call) = calls::CALLS.iter().find(|call| call.name == name) else {
        return Vec::new();
    };
    let stream = about.starts_with("socket:") || about.starts_with("pipe:");
    let errors: &[Errno] = match name {
        // A counter in memory cannot fail.
        _ if about.starts_with("anon_inode:") => return Vec::new(),
        "read" | "readv" | "recvfrom" | "recvmsg" if about.starts_with("socket:") => {
            &[Errno::ECONNRESET, Errno::ETIMEDOUT, Errno::EINTR]
        }
        "write" | "writev" | "sendto" | "sendmsg" if about.starts_with("socket:") => {
            &[Errno::ECONNRESET, Errno::EPIPE, Errno::EINTR]
        }
        "read" if stream => &[Errno::EINTR],
        "write" if stream => &[Errno::EPIPE, Errno::EINTR],
        _ => call.errors,
    };
    let mut ways: Vec<Fault> = errors
        .iter()
        .map(|&error| Fault::Fails(error as i32))
        .collect();
    // A disk that is full or broken remains so, and so does a process without free descriptors.
    let lasting = [Errno::EIO, Errno::ENOSPC, Errno::EMFILE];
    // But a cgroup that can be frozen can be thawed: a lasting failure there would be the kernel's fault.
    let thaws = about.starts_with("/sys/fs/cgroup") && name.contains("write");
    let lasting = errors
        .iter()
        .filter(|&error| lasting.contains(error) && !thaws);
    ways.extend(lasting.map(|&error| Fault::FailsFrom(error as i32)));
    // Files of a cgroup and of the kernel accept a write as a whole.
    let whole = about.starts_with("/sys/") || about.starts_with("/proc/") && name.contains("write");
    if call.length.is_some() && length > 1 && !whole {
        // Directory entries must fit into the buffer.
        if name != "getdents64" {
            ways.push(Fault::One);
        }
        if length > 2 {
            ways.push(Fault::Half);
        }
    }
    ways
}
