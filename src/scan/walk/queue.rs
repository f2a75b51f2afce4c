//! The queue of directories that the threads share: what is found below one is for whoever is free.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::sched::{CloneFlags, unshare};

use super::flat::Walked;
use super::{Task, Walk, Walker};
use crate::scan::Error;
use crate::scan::rows::Shelf;

#[derive(Default)]
pub(super) struct Queue {
    tasks: Vec<Task>,
    outputs: Vec<Walked>,
    /// What the threads that are done collected, by number.
    shelves: BTreeMap<u32, Shelf>,
    working: usize,
    next_id: u32,
    failed: Option<Error>,
}

impl Walker<'_> {
    /// Walks the directories of `tasks` and what is to be walked below them.
    pub(in crate::scan) fn run(&self, mut tasks: Vec<Task>) -> Result<Walk, Error> {
        {
            let mut queue = lock(&self.queue);
            for (id, task) in tasks.iter_mut().enumerate() {
                task.id = id as u32;
            }
            queue.next_id = tasks.len() as u32;
            queue.tasks = tasks;
        }
        std::thread::scope(|scope| {
            for _ in 0..self.options.jobs.max(1) {
                scope.spawn(|| {
                    let mut shelves = BTreeMap::new();
                    self.work(&mut shelves);
                    lock(&self.queue).shelves.append(&mut shelves);
                });
            }
        });
        let mut queue = lock(&self.queue);
        if let Some(error) = queue.failed.take() {
            return Err(error);
        }
        Ok(Walk {
            outputs: std::mem::take(&mut queue.outputs),
            count: queue.next_id,
            shelves: std::mem::take(&mut queue.shelves).into_values().collect(),
            report: std::mem::take(&mut *lock(&self.report)),
        })
    }

    fn work(&self, shelves: &mut BTreeMap<u32, Shelf>) {
        // A working directory of this thread's own: attributes can only be asked for by path, and a name alone is the
        // shortest. Where that is not granted the way leads through /proc, which takes twice as long.
        let own_cwd = unshare(CloneFlags::CLONE_FS).is_ok();
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
            let result = if self.options.cancel.load(Ordering::Relaxed) {
                Err(Error::Cancelled)
            } else {
                self.directory(&task, own_cwd)
            };
            let result = result.map(|(output, tasks)| {
                let mut last = shelves.last_entry().filter(|last| !last.get().is_full());
                let walked = match &mut last {
                    Some(last) => output.finish(*last.key(), last.get_mut(), &tasks),
                    None => {
                        let number = self.next_shelf.fetch_add(1, Ordering::Relaxed);
                        output.finish(number, shelves.entry(number).or_default(), &tasks)
                    }
                };
                (walked, tasks)
            });
            let mut queue = lock(&self.queue);
            queue.working -= 1;
            match result {
                Ok((mut walked, tasks)) => {
                    // Subdirectories get the numbers of their outputs here, where the counter is.
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
            self.changed.notify_all();
        }
    }
}

/// A panicked thread leaves nothing half done here: every change under the lock is a whole one.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
