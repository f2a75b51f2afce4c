//! Which faults there are, which of them are tried, and what became of them.

use std::collections::BTreeMap;

use nix::errno::Errno;

use crate::calls;
use crate::case::plain;
use crate::tracer::{Fault, Report, Target};

/// All faults of the calls that a run made. `all`: else a few of each kind, `wanted` in all.
pub fn faults(report: &Report, home: &str, all: bool, wanted: usize) -> Vec<Target> {
    let mut found = Vec::new();
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    // Calls of one name on one thing differ in nothing but when they come: of many, the first and the last.
    let mut groups: BTreeMap<(&str, String), Vec<(usize, u64)>> = BTreeMap::new();
    for seen in &report.calls {
        let nth = counts.entry(&seen.call).or_default();
        let about = plain(&seen.about.replace(home, ""));
        let group = groups.entry((&seen.call, about)).or_default();
        group.push((*nth, seen.length));
        *nth += 1;
    }
    for ((name, about), members) in &groups {
        let ends = [members.first(), members.get(members.len() / 2), members.last()];
        let mut ends: Vec<_> = ends.into_iter().flatten().copied().collect();
        ends.dedup();
        for (nth, length) in ends {
            for fault in ways(name, about, length) {
                found.push(Target { call: (*name).to_owned(), nth, fault });
            }
        }
    }
    if all || found.len() <= wanted {
        return found;
    }
    // In the order of the names, so that each has its share; the step is the same in every run.
    let step = found.len() as f64 / wanted as f64;
    (0..wanted).filter_map(|n| found.get((n as f64 * step) as usize).cloned()).collect()
}

/// What can happen to a call.
fn ways(name: &str, about: &str, length: u64) -> Vec<Fault> {
    let Some(call) = calls::CALLS.iter().find(|call| call.name == name) else {
        return Vec::new();
    };
    let stream = about.starts_with("socket:") || about.starts_with("pipe:");
    let errors: &[Errno] = match name {
        _ if about.starts_with("anon_inode:") && call.length.is_some() => &[Errno::EINTR],
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
    let mut ways: Vec<Fault> = errors.iter().map(|&error| Fault::Fails(error as i32)).collect();
    // A disk that is full or broken stays so, and so does a process that has no descriptors left.
    let lasting = [Errno::EIO, Errno::ENOSPC, Errno::EMFILE];
    let lasting = errors.iter().filter(|&error| lasting.contains(error));
    ways.extend(lasting.map(|&error| Fault::FailsFrom(error as i32)));
    // A cgroup's or the kernel's own file takes what is written at once; an eventfd is eight bytes.
    let whole = about.starts_with("anon_inode:") || about.starts_with("/sys/");
    if call.length.is_some() && length > 1 && !whole {
        // A directory's entries have to fit.
        if name != "getdents64" {
            ways.push(Fault::One);
        }
        if length > 2 {
            ways.push(Fault::Half);
        }
    }
    ways
}
