//! Notices the ends of known processes at once, by their descriptors (pidfd) instead of by looking again and again.

use std::collections::{HashMap, HashSet};

use rustix::fd::OwnedFd;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::task::{AbortHandle, JoinSet};

use crate::node::container::process_start;

/// Maximum number of processes that are watched; each takes a descriptor. The end of another is seen with the next listing.
const MAX_WATCHED: usize = 500;

/// A process: PID, and start time in clock ticks since boot.
pub(super) type Process = (u32, u64);

/// The processes that are watched.
#[derive(Default)]
pub(super) struct Watch {
    tasks: JoinSet<Process>,
    watched: HashMap<Process, AbortHandle>,
    /// Those that cannot be watched: the kernel is too old, or they are not in the PID namespace of this process.
    unwatched: HashSet<Process>,
}

impl Watch {
    /// Watches these processes, and no others any more.
    pub(super) fn set(&mut self, processes: &HashSet<Process>) {
        self.unwatched.retain(|process| processes.contains(process));
        self.watched.retain(|process, task| {
            let wanted = processes.contains(process);
            if !wanted {
                task.abort();
            }
            wanted
        });
        for &process in processes {
            let known = self.watched.contains_key(&process) || self.unwatched.contains(&process);
            if known || self.watched.len() >= MAX_WATCHED {
                continue;
            }
            match open(process) {
                Some(descriptor) => {
                    let task = self.tasks.spawn(async move {
                        // An error means that the descriptor cannot be waited for; the process is looked at then.
                        let _ = descriptor.readable().await;
                        process
                    });
                    self.watched.insert(process, task);
                }
                None => {
                    self.unwatched.insert(process);
                }
            }
        }
    }

    /// Waits until one of the processes has ended. May be cancelled.
    pub(super) async fn ended(&mut self) {
        loop {
            match self.tasks.join_next().await {
                Some(Ok(process)) => {
                    self.watched.remove(&process);
                    self.unwatched.insert(process);
                    return;
                }
                // It is not watched any more.
                Some(Err(_)) => {}
                None => std::future::pending().await,
            }
        }
    }
}

/// Opens a process. Returns `None` if it is another one by now, or this is not possible.
fn open((pid, start): Process) -> Option<AsyncFd<OwnedFd>> {
    let raw = Pid::from_raw(i32::try_from(pid).ok()?)?;
    let descriptor = pidfd_open(raw, PidfdFlags::NONBLOCK).ok()?;
    // After the descriptor was opened: the number may be that of another process.
    if process_start(pid) != Some(start) {
        return None;
    }
    register(descriptor).ok()
}

#[allow(
    deprecated,
    reason = "it asks types with another descriptor each time not to be given; an OwnedFd keeps its own"
)]
fn register(descriptor: OwnedFd) -> std::io::Result<AsyncFd<OwnedFd>> {
    AsyncFd::with_interest(descriptor, Interest::READABLE)
}

#[cfg(test)]
mod tests {
    use std::process::Command;
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn an_end_is_noticed_and_only_of_what_is_watched() -> std::io::Result<()> {
        let mut children = Vec::new();
        for _ in 0..2 {
            children.push(Command::new("sleep").arg("600").spawn()?);
        }
        let process = |pid: u32| (pid, process_start(pid).unwrap_or(0));
        let [one, two] = [children[0].id(), children[1].id()].map(process);
        let mut watch = Watch::default();
        watch.set(&[one, two, (one.0, one.1 + 1)].into());
        assert_eq!((watch.watched.len(), watch.unwatched.len()), (2, 1));
        watch.set(&[two].into());
        children[0].kill()?;
        children[0].wait()?;
        let soon = Duration::from_millis(200);
        let ended = tokio::time::timeout(soon, watch.ended()).await;
        assert!(ended.is_err(), "it is not watched any more");
        children[1].kill()?;
        watch.ended().await;
        children[1].wait()?;
        assert!(watch.watched.is_empty());
        // It is not waited for once more, even while it is listed.
        watch.set(&[two].into());
        assert!(watch.watched.is_empty() && watch.tasks.is_empty());
        Ok(())
    }
}
