//! The queue of directories that all threads share: any free thread takes the subdirectories found.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::sched::{CloneFlags, unshare};

use super::flatten::WalkedDirectory;
use super::{Output, Task, Walk, Walker};
use crate::layer::scan::Error;
use crate::layer::scan::memory::Reservation;
use crate::layer::scan::rows::FactBuffer;

/// Result of one directory: its entries, the subdirectories to be walked with the indices of their entries, and the
/// memory of both.
pub(super) type Collected = (Output, Vec<(u32, Task)>, Reservation);

#[derive(Default)]
pub(super) struct Queue {
    tasks: Vec<Task>,
    outputs: Vec<WalkedDirectory>,
    /// Buffers of the threads that have ended, by number.
    buffers: BTreeMap<u32, FactBuffer>,
    working: usize,
    next_id: u32,
    failed: Option<Error>,
}

impl Walker<'_> {
    /// Walks the directories of `tasks` and their subdirectories.
    ///
    /// Fails with the first error of any thread.
    pub(in crate::layer::scan) fn run(&self, tasks: Vec<Task>) -> Result<Walk, Error> {
        self.run_with(tasks, &|task, own_cwd| self.directory(task, own_cwd))
    }

    fn run_with(
        &self,
        mut tasks: Vec<Task>,
        directory: &(dyn Fn(&Task, bool) -> Result<Collected, Error> + Sync),
    ) -> Result<Walk, Error> {
        {
            let mut reservation = self.memory.reservation();
            for task in &tasks {
                reservation.reserve_for_scan(task.weight())?;
            }
            let mut queue = lock(&self.queue);
            for (id, task) in tasks.iter_mut().enumerate() {
                task.id = id as u32;
            }
            queue.next_id = tasks.len() as u32;
            queue.tasks = tasks;
        }
        std::thread::scope(|scope| {
            let work = || {
                let mut buffers = BTreeMap::new();
                self.work(&mut buffers, directory);
                lock(&self.queue).buffers.append(&mut buffers);
            };
            let (mut threads, mut refused) = (Vec::new(), None);
            for _ in 0..self.options.jobs.max(1) {
                match std::thread::Builder::new().spawn_scoped(scope, work) {
                    Ok(thread) => threads.push(thread),
                    Err(error) => refused = Some(error),
                }
            }
            // With fewer threads it is slower. The current thread cannot do the work: it would lose its working
            // directory and its access rights.
            if let (true, Some(error)) = (threads.is_empty(), refused) {
                lock(&self.queue).failed = Some(Error::Thread(error));
            }
            for thread in threads {
                // A thread that panicked has recorded that in the queue.
                let _ = thread.join();
            }
        });
        let mut queue = lock(&self.queue);
        if let Some(error) = queue.failed.take() {
            return Err(error);
        }
        Ok(Walk {
            outputs: std::mem::take(&mut queue.outputs),
            count: queue.next_id,
            buffers: std::mem::take(&mut queue.buffers).into_values().collect(),
            report: std::mem::take(&mut *lock(&self.report)),
        })
    }

    fn work(
        &self,
        buffers: &mut BTreeMap<u32, FactBuffer>,
        directory: &(dyn Fn(&Task, bool) -> Result<Collected, Error> + Sync),
    ) {
        // A working directory for this thread alone: attributes can only be read by path, and a bare name is the
        // shortest. Where that is not permitted, the path leads through /proc, which takes twice as long.
        let own_cwd = unshare(CloneFlags::CLONE_FS).is_ok();
        let rights = self.upper.enter();
        loop {
            let mut queue = lock(&self.queue);
            let task = loop {
                if queue.failed.is_some() {
                    return;
                }
                if let Some(task) = queue.tasks.pop() {
                    queue.working += 1;
                    break task;
                }
                if queue.working == 0 {
                    return;
                }
                queue = self
                    .changed
                    .wait(queue)
                    .unwrap_or_else(PoisonError::into_inner);
            };
            drop(queue);
            let working = Working(self);
            let result = if self.options.cancel.is_cancelled() {
                Err(Error::Cancelled)
            } else if let Err(error) = &rights {
                let error = io::Error::other(error.to_string());
                Err(self.read_error(&task.path, error))
            } else {
                directory(&task, own_cwd)
            };
            let result = result.map(|(output, tasks, reservation)| {
                let mut last = buffers.last_entry().filter(|last| !last.get().is_full());
                let walked = match &mut last {
                    Some(last) => output.finish(*last.key(), last.get_mut(), &tasks),
                    None => {
                        let number = self.next_buffer.fetch_add(1, Ordering::Relaxed);
                        output.finish(number, buffers.entry(number).or_default(), &tasks)
                    }
                };
                drop(reservation);
                self.memory.release(task.weight());
                (walked, tasks)
            });
            let mut queue = lock(&self.queue);
            match result {
                Ok((mut walked, tasks)) => {
                    // The output numbers of subdirectories are assigned here, where the counter is.
                    walked.number(queue.next_id..);
                    for (_, mut task) in tasks {
                        task.id = queue.next_id;
                        queue.next_id += 1;
                        queue.tasks.push(task);
                    }
                    queue.outputs.push(walked);
                }
                Err(error) => queue.failed = Some(error),
            }
            drop(queue);
            drop(working);
        }
    }
}

/// A guard for a thread that works on a directory. The other threads wait for its subdirectories, so it must report its
/// end in any case, also on a panic.
struct Working<'w, 'a>(&'w Walker<'a>);

impl Drop for Working<'_, '_> {
    fn drop(&mut self) {
        let mut queue = lock(&self.0.queue);
        queue.working -= 1;
        if std::thread::panicking() {
            queue.failed = Some(Error::Worker);
        }
        drop(queue);
        self.0.changed.notify_all();
    }
}

/// Locks a mutex and ignores poisoning: every change under the lock is complete in itself, so a panic leaves no
/// inconsistent state.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::layer::scan::{Caps, Exclusions, Options, Roots, Rules};
    use crate::node::overlay::xattr::Namespace;

    #[test]
    fn a_thread_that_panics_ends_the_walk() {
        let dir = tempfile::tempdir().unwrap();
        let roots = Roots {
            upper: dir.path().to_owned(),
            lowers: Vec::new(),
            data_only: Vec::new(),
            id_mapped: Vec::new(),
            lowers_known: true,
            namespace: Namespace::User,
            volume: None,
        };
        let (exclusions, cancel) = (
            Exclusions::new(Rules::default()).unwrap(),
            CancellationToken::new(),
        );
        let options = Options {
            jobs: 3,
            uid_map: &[],
            gid_map: &[],
            exclusions: &exclusions,
            caps: Caps::default(),
            runtime_root_mode: None,
            cancel: &cancel,
        };
        let (upper, lowers) = super::super::open(&roots).unwrap();
        let walker = Walker::new(&upper, &lowers, &roots, &options, None);
        // The other threads wait for the subdirectories of this one.
        let ended = walker.run_with(vec![walker.root_task().unwrap()], &|_, _| {
            std::thread::sleep(std::time::Duration::from_millis(50));
            panic!("a defect, for the test");
        });
        assert!(matches!(ended, Err(Error::Worker)), "{:?}", ended.err());
    }
}
