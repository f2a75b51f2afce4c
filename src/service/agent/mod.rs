//! One a node: takes orders from the queue, runs `upperdeck commit` as a child for each, tells what the child says, and
//! sees to it that no container stays frozen, whoever dies.

mod child;
mod inventory;
mod kind;
mod load;
mod made;
mod options;
mod owner;
mod spool;
mod stuck;
mod telling;
mod work;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::task::JoinSet;

use crate::common::cancel::Cancel;
use crate::service::job::{JobId, Node, Order, now_ms};
use crate::service::queue::{self, Claim, Queue};

use inventory::{Inside, Inventory};
use spool::Spool;
use stuck::Stuck;
use telling::{CALL, call};

pub use options::{Allowed, AllowedError, Options, Registry};
pub use owner::{OwnerRule, RuleError};

/// Why an agent does not start. Once it runs, nothing ends it but a request to.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A directory that it needs cannot be made or written to.
    #[error("{path}: {source}; the agent needs it to survive its own death")]
    Directory {
        /// Which one.
        path: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// Something in the options that cannot be meant.
    #[error("{0}")]
    Options(String),
    /// Another agent works from the same spool.
    #[error(
        "another agent of this node uses {path}: end it first, or give this one a spool of its own"
    )]
    Taken {
        /// The spool.
        path: String,
    },
    /// The queue cannot be used at all.
    #[error(transparent)]
    Queue(#[from] queue::Error),
}

/// How long a call for orders waits; so long an agent takes at most to notice that it is to end.
const CLAIM_WAIT: Duration = Duration::from_secs(2);
/// Between two tries at a queue that cannot be reached: from and to.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(10));
/// Sessions are told at least as often, whether or not they changed: a queue may lose everything.
const SESSIONS_EVERY: Duration = Duration::from_secs(30);
/// Between two looks at whether there is room for another save, while there is none.
const ROOM_EVERY: Duration = Duration::from_secs(1);

/// What the parts of an agent share.
struct Agent {
    options: Options,
    queue: Queue,
    /// This process' own, which no other ever had.
    name: String,
    spool: Spool,
    inventory: Inventory,
    stuck: Stuck,
    started_ms: i64,
    /// It is to end.
    cancel: Cancel,
    /// What still runs is given back.
    drain_over: Cancel,
    running: Mutex<HashMap<JobId, Running>>,
}

/// A job at work.
struct Running {
    threads: u32,
    /// Its claim is somebody else's.
    lost: Cancel,
    /// Nothing of it is left.
    ended: Cancel,
}

/// Works until `cancel`, then drains: what runs may finish within [`Options::drain`], the rest is given back.
pub async fn run(options: Options, queue: Queue, cancel: Cancel) -> Result<(), Error> {
    if options.node.is_empty() {
        return Err(Error::Options("a node has a name".to_owned()));
    }
    if options.allowed.is_empty() {
        tracing::warn!("no destination is allowed: every save will be refused");
    }
    let spool = Spool::open(&options.spool_dir)?;
    let agent = Arc::new(Agent {
        name: format!("{}-{}", options.node, JobId::new()),
        spool,
        inventory: Inventory::default(),
        stuck: Stuck::default(),
        started_ms: now_ms(),
        drain_over: Cancel::default(),
        running: Mutex::default(),
        options,
        queue,
        cancel,
    });
    // Before anything is claimed: a predecessor's child must not work beside its successor.
    agent.end_leftovers().await;
    let heart = tokio::spawn(Arc::clone(&agent).beat());
    let looker = tokio::spawn(Arc::clone(&agent).look());
    let reader = tokio::spawn(Arc::clone(&agent).look_into());
    let mut jobs = JoinSet::new();
    agent.serve(&mut jobs).await;
    agent.drain(&mut jobs).await;
    looker.abort();
    reader.abort();
    heart.abort();
    agent.say(true, false).await;
    Ok(())
}

impl Agent {
    fn running(&self) -> MutexGuard<'_, HashMap<JobId, Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The longest that a save may take.
    fn bound(&self, order: &Order) -> Duration {
        match order.timeout_s {
            0 => self.options.max_time,
            seconds => Duration::from_secs(seconds).min(self.options.max_time),
        }
    }

    fn proc(&self) -> PathBuf {
        let root = self.options.roots.host_root.as_deref();
        root.map_or_else(|| PathBuf::from("/proc"), |root| root.join("proc"))
    }

    fn measure(&self) -> load::Measured {
        let (jobs, threads) = {
            let running = self.running();
            let threads = running.values().map(|job| job.threads).sum();
            (running.len() as u32, threads)
        };
        load::measure(&self.proc(), jobs, threads)
    }

    fn bounds(&self) -> load::Bounds {
        load::Bounds {
            slots: self.options.slots,
            threads: self.options.threads,
        }
    }

    /// Threads for a job that begins now; they count from then on.
    fn threads_for(&self, job: JobId) -> u32 {
        let mut measured = self.measure();
        // The job itself is among those that run by now.
        measured.own_jobs = measured.own_jobs.saturating_sub(1);
        let (_, threads) = load::capacity(&measured, self.bounds());
        if let Some(running) = self.running().get_mut(&job) {
            running.threads = threads;
        }
        threads
    }

    /// Ends what a dead predecessor left: children that run on, containers that stand still.
    async fn end_leftovers(&self) {
        for (job, note) in self.spool.left() {
            if let Some(note) = note {
                tracing::warn!(job.id = %job, session.id = note.session, child.pid = note.pid, "a former agent died during this save");
                child::end_leftover(note.pid, note.pid_start).await;
            }
            if work::settle(self, job).await {
                self.spool.end(job);
            }
        }
        self.spool.tidy(now_ms());
    }

    /// Takes orders while there is room, until it is to end.
    async fn serve(self: &Arc<Self>, jobs: &mut JoinSet<()>) {
        let mut reclaimed = false;
        let mut pause = BACKOFF.0;
        while !self.cancel.is_cancelled() {
            while let Some(ended) = jobs.try_join_next() {
                told_of_panic(&ended);
            }
            let node = &self.options.node;
            let claims = if reclaimed {
                let (slots, _) = load::capacity(&self.measure(), self.bounds());
                let free = (slots as usize).saturating_sub(jobs.len());
                if free == 0 {
                    tokio::select! {
                        Some(ended) = jobs.join_next() => told_of_panic(&ended),
                        () = tokio::time::sleep(ROOM_EVERY) => {}
                        _ = self.cancel.cancelled() => {}
                    }
                    continue;
                }
                let claim = self.queue.claim(node, &self.name, free, CLAIM_WAIT);
                call(claim, CLAIM_WAIT + CALL).await
            } else {
                call(self.queue.reclaim(node, &self.name), CALL).await
            };
            match claims {
                Ok(claims) => {
                    reclaimed = true;
                    pause = BACKOFF.0;
                    for claim in claims {
                        self.begin(claim, jobs);
                    }
                }
                Err(error) => {
                    tracing::warn!(%error, "no orders can be had");
                    tokio::select! {
                        () = tokio::time::sleep(pause) => {}
                        _ = self.cancel.cancelled() => {}
                    }
                    pause = (pause * 2).min(BACKOFF.1);
                }
            }
        }
    }

    fn begin(self: &Arc<Self>, claim: Claim, jobs: &mut JoinSet<()>) {
        let agent = Arc::clone(self);
        jobs.spawn(async move {
            let job = claim.order.job;
            let (lost, ended) = (Cancel::default(), Cancel::default());
            // A claim of a job that is still at work here tells that the former one is lost.
            loop {
                let former = {
                    let mut running = agent.running();
                    match running.get(&job) {
                        Some(former) => {
                            former.lost.cancel();
                            former.ended.clone()
                        }
                        None => {
                            let now = Running {
                                threads: 0,
                                lost: lost.clone(),
                                ended: ended.clone(),
                            };
                            running.insert(job, now);
                            break;
                        }
                    }
                };
                former.cancelled().await;
            }
            let _gone = Gone {
                agent: Arc::clone(&agent),
                job,
                ended,
            };
            work::work(agent, claim, lost).await;
        });
    }

    /// Lets what runs finish, as long as that may take.
    async fn drain(&self, jobs: &mut JoinSet<()>) {
        let all = async {
            while let Some(ended) = jobs.join_next().await {
                told_of_panic(&ended);
            }
        };
        if tokio::time::timeout(self.options.drain, all).await.is_err() {
            self.drain_over.cancel();
            while let Some(ended) = jobs.join_next().await {
                told_of_panic(&ended);
            }
        }
    }

    /// Tells again and again that the agent is there.
    async fn beat(self: Arc<Self>) {
        let mut told: Option<(Vec<crate::service::job::Session>, Instant)> = None;
        let mut failed = false;
        loop {
            let (sessions, _) = self.inventory.told();
            let changed = told
                .as_ref()
                .is_none_or(|(last, at)| *last != sessions || at.elapsed() >= SESSIONS_EVERY);
            let heard = self.say(self.cancel.is_cancelled(), changed).await;
            if heard && changed {
                told = Some((sessions, Instant::now()));
            } else if !heard {
                told = None;
            }
            if !heard && !failed {
                tracing::warn!("the queue does not hear that this agent is there");
            }
            failed = !heard;
            tokio::time::sleep(self.options.heartbeat_every).await;
        }
    }

    /// One heartbeat. Whether it was heard.
    async fn say(&self, draining: bool, with_sessions: bool) -> bool {
        let (sessions, mut problems) = self.inventory.told();
        problems.splice(0..0, self.stuck.told());
        let mut running: Vec<JobId> = self.running().keys().copied().collect();
        running.sort_unstable();
        let node = Node {
            name: self.options.node.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            started_ms: self.started_ms,
            at_ms: now_ms(),
            draining,
            running,
            load: load::told(&self.measure(), self.bounds()),
            problems,
        };
        let sessions = with_sessions.then_some(sessions.as_slice());
        call(self.queue.heartbeat(&node, sessions), CALL)
            .await
            .is_ok()
    }

    /// Looks again and again at what runs on the node, and at what may have been left frozen.
    async fn look(self: Arc<Self>) {
        loop {
            let agent = Arc::clone(&self);
            let looked = tokio::task::spawn_blocking(move || {
                agent.inventory.look(&agent.options);
                agent.spool.tidy(now_ms());
            });
            if looked.await.is_err() {
                tracing::error!(
                    "looking at the node's containers: a thread died; this is a defect of upperdeck"
                );
            }
            for (job, _) in self.spool.left() {
                let at_work = self.running().contains_key(&job);
                if !at_work && work::settle(&self, job).await {
                    self.spool.end(job);
                }
            }
            tokio::time::sleep(self.options.inventory_every).await;
        }
    }
}

impl Agent {
    /// Looks into sessions, one after another: by children, as trees are strangers' and large.
    async fn look_into(self: Arc<Self>) {
        loop {
            for session in self.inventory.due(self.options.sizes_every) {
                if self.cancel.is_cancelled() {
                    return;
                }
                // Another look would get stuck as the one before did.
                if self.stuck.of(&session).is_some() {
                    self.inventory.looked_into(&session, Inside::default());
                    continue;
                }
                let found = child::inspect(&self.options, &self.stuck, &session).await;
                let inside = found.and_then(|json| serde_json::from_slice(&json).ok());
                self.inventory
                    .looked_into(&session, inside.unwrap_or_default());
            }
            tokio::time::sleep(self.options.inventory_every).await;
        }
    }
}

/// Says that nothing of a job is left, however it ended.
struct Gone {
    agent: Arc<Agent>,
    job: JobId,
    ended: Cancel,
}

impl Drop for Gone {
    fn drop(&mut self) {
        self.agent.running().remove(&self.job);
        self.ended.cancel();
    }
}

fn told_of_panic(ended: &Result<(), tokio::task::JoinError>) {
    if ended.is_err() {
        tracing::error!("a job's task died; this is a defect of upperdeck, and its lease will end");
    }
}
