//! Processes that were killed but do not exit: they wait in the kernel for a response that never comes, from a file
//! system that a tenant mounted, or from a failed disk or server. They cannot be ended, so the agent gives them up and
//! reports them.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::node::procfs::Stat;

/// The known stuck processes by session.
#[derive(Debug, Default)]
pub(super) struct StuckProcesses(Mutex<HashMap<String, Vec<Process>>>);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Process {
    pid: u32,
    /// Start time in ticks since boot.
    start: u64,
}

impl StuckProcesses {
    fn all(&self) -> MutexGuard<'_, HashMap<String, Vec<Process>>> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|_, processes| {
            processes.retain(|process| start_of(process.pid) == Some(process.start));
            !processes.is_empty()
        });
        all
    }

    /// Adds a process that worked on `session` and does not exit.
    pub(super) fn add(&self, session: &str, pid: u32) {
        let Some(start) = start_of(pid) else {
            return;
        };
        tracing::error!(
            session.id = session,
            child.pid = pid,
            "a child was killed and does not end: it waits in the kernel; its slot is free again"
        );
        let process = Process { pid, start };
        self.all()
            .entry(session.to_owned())
            .or_default()
            .push(process);
    }

    /// Returns the PID of a process that is still stuck on `session`.
    pub(super) fn pid_of(&self, session: &str) -> Option<u32> {
        self.all().get(session)?.first().map(|process| process.pid)
    }

    /// Returns the number of processes that are stuck.
    pub(super) fn count(&self) -> usize {
        self.all().values().map(Vec::len).sum()
    }

    /// Returns a sentence per session for the administrator of the node.
    pub(super) fn problems(&self) -> Vec<String> {
        let all = self.all();
        let mut told: Vec<String> = all
            .iter()
            .map(|(session, processes)| {
                let pids: Vec<String> = processes.iter().map(|p| p.pid.to_string()).collect();
                format!(
                    "process {} of a save of session {session} was killed and waits in the kernel: a file system does not answer",
                    pids.join(", ")
                )
            })
            .collect();
        told.sort();
        told
    }
}

/// Returns field 22 of `/proc/PID/stat` (start time in ticks), also for a process of which only some threads have
/// exited.
fn start_of(pid: u32) -> Option<u64> {
    let stat = std::fs::read(format!("/proc/{pid}/stat")).ok()?;
    Some(Stat::parse(&stat)?.start)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn what_ended_after_all_is_forgotten() -> std::io::Result<()> {
        let stuck = StuckProcesses::default();
        let mut child = Command::new("sleep").arg("600").spawn()?;
        stuck.add("a", child.id());
        assert_eq!(stuck.pid_of("a"), Some(child.id()));
        assert_eq!(stuck.pid_of("b"), None);
        assert!(
            stuck.problems()[0].contains("session a"),
            "{:?}",
            stuck.problems()
        );
        child.kill()?;
        child.wait()?;
        assert_eq!(stuck.pid_of("a"), None);
        assert!(stuck.problems().is_empty());
        Ok(())
    }
}
