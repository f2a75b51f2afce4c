//! The agent of a node: claims orders from the queue, runs `upperdeck commit` as a child process for each, reports the
//! child's events, and makes sure that no container stays frozen if a process dies.

mod autosave;
mod child;
mod ended;
mod final_event;
mod health;
mod inspect;
mod inventory;
mod kind;
mod load;
mod metadata;
mod options;
mod owner;
mod refusal;
mod reporter;
mod save_ended;
mod session;
mod spool;
mod stuck;
mod user_values;
mod watch;
mod work;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use tokio::task::JoinSet;

use crate::common::message::count;
use crate::node::background::cpu_limit;
use crate::service::job::{JobId, Load, Node, Order, Session, now_ms};
use crate::service::queue::{self, Claim, Queue};
use crate::service::ready;

use inventory::{Inspection, Inventory};
use reporter::{CALL_TIMEOUT, call};
use spool::Spool;
use stuck::StuckProcesses;
use tokio_util::sync::CancellationToken;
use watch::Watch;

pub use crate::service::job::SaveEnded;
pub(crate) use options::host_name;
pub use options::{Allowed, AllowedError, Options, Registry};
pub use owner::{OwnerRule, RuleError};

/// Why an agent does not start. A running agent ends only on request.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A required directory cannot be created or written to.
    #[error("{path}: {source}; the agent needs it to continue after a restart")]
    Directory {
        /// Path of the directory.
        path: String,
        /// Error of the operating system.
        source: std::io::Error,
    },
    /// An option has an invalid value.
    #[error("{0}")]
    Options(String),
    /// The address for its health cannot be used.
    #[error("cannot listen for health and metrics: {0}")]
    Listen(std::io::Error),
    /// Another agent uses the same spool.
    #[error(
        "another agent of this node uses {path}: end it first, or give this one a spool of its own"
    )]
    Locked {
        /// Path of the spool.
        path: String,
    },
    /// The queue cannot be used at all.
    #[error(transparent)]
    Queue(#[from] queue::Error),
}

/// How long one call for orders blocks. This is also the longest time until the agent notices that it has to end.
const CLAIM_WAIT: Duration = Duration::from_secs(2);
/// Delay between attempts to reach the queue: the first one and the maximum.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(10));
/// Maximum interval between two lists of sessions, even if they have not changed, because the queue may lose all its
/// data.
const SESSIONS_EVERY: Duration = Duration::from_secs(30);
/// Interval at which the capacity is checked again while all slots are taken.
const FREE_SLOT_POLL: Duration = Duration::from_secs(1);

/// Shortest interval between two listings of the node's containers. A runtime takes about as long to record an end.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

/// Time for the first list of the node's containers, after which the agent counts as started in any case.
const FIRST_LISTING: Duration = Duration::from_secs(30);

/// Time for answers about the agent's health that are in progress when it ends.
const LAST_ANSWERS: Duration = Duration::from_secs(1);

/// State that the parts of an agent share.
struct Agent {
    options: Options,
    queue: Queue,
    /// Consumer name of this process, which no other process has ever used.
    name: String,
    spool: Spool,
    inventory: Inventory,
    stuck: StuckProcesses,
    started_ms: i64,
    /// Set when the agent has to end.
    cancel: CancellationToken,
    /// Set when the time for draining is over and running jobs have to be returned.
    drain_over: CancellationToken,
    running: Mutex<HashMap<JobId, Running>>,
    /// Set once the node's containers have been listed.
    listed: CancellationToken,
    /// Notified when a heartbeat should not wait for its time.
    news: Notify,
    /// Set once the queue has taken a heartbeat.
    heard: CancellationToken,
    findings: health::Findings,
    metrics: health::Metrics,
}

/// A job that is being worked on.
struct Running {
    threads: u32,
    /// Set when another consumer holds the claim.
    lost: CancellationToken,
    /// Set when nothing of the job is left.
    ended: CancellationToken,
}

/// Warns if the saves' processes have a limit on processor time that they cannot leave while a container is frozen.
fn warn_of_cpu_limit(options: &Options) {
    let limit = cpu_limit(options.roots.host_root.as_deref());
    if let Some(limit) = limit.filter(|limit| options.background.is_none() || !limit.can_be_left) {
        tracing::warn!(
            "{limit}: this limit makes the time longer for which containers are frozen; set no CPU limit on the agent's pod"
        );
    }
}

/// Runs the agent until `cancel` is set, then drains: running jobs may finish within [`Options::drain`], the others are
/// returned to the queue.
///
/// Fails with [`Error`] if the agent cannot start.
pub async fn run(options: Options, queue: Queue, cancel: CancellationToken) -> Result<(), Error> {
    if options.node.is_empty() {
        return Err(Error::Options("a node has a name".to_owned()));
    }
    if options.allowed.is_empty() {
        tracing::warn!("no destination is allowed: every save will be refused");
    }
    warn_of_cpu_limit(&options);
    let spool = Spool::open(&options.spool_dir)?;
    let agent = Arc::new(Agent {
        name: format!("{}-{}", options.node, JobId::new()),
        spool,
        inventory: Inventory::default(),
        stuck: StuckProcesses::default(),
        started_ms: now_ms(),
        drain_over: CancellationToken::new(),
        running: Mutex::default(),
        listed: CancellationToken::new(),
        news: Notify::new(),
        heard: CancellationToken::new(),
        findings: health::Findings::default(),
        metrics: health::Metrics::new(&options.node),
        options,
        queue,
        cancel,
    });
    let over = CancellationToken::new();
    // It goes on while running saves are finished.
    let over_on_return = over.clone().drop_guard();
    let mut health_task = None;
    if let Some(listener) = agent.options.health.clone() {
        let serving = health::serve(Arc::clone(&agent), &listener, over);
        health_task = Some(tokio::spawn(serving.map_err(Error::Listen)?));
    }
    // Before the first claim, because a child of a predecessor must not run at the same time as its successor.
    agent.end_leftovers().await;
    let heartbeat_task = tokio::spawn(Arc::clone(&agent).heartbeat_loop());
    let inventory_task = tokio::spawn(Arc::clone(&agent).inventory_loop());
    let inspection_task = tokio::spawn(Arc::clone(&agent).inspection_loop());
    let ready_task = tokio::spawn(Arc::clone(&agent).say_when_ready());
    let mut jobs = JoinSet::new();
    agent.serve(&mut jobs).await;
    ready_task.abort();
    ready::say_stopping("running saves may finish, no new ones begin");
    agent.drain(&mut jobs).await;
    inventory_task.abort();
    inspection_task.abort();
    heartbeat_task.abort();
    // A manager otherwise notices by the silence.
    let (sessions, _) = agent.inventory.snapshot();
    let _ = agent.send_heartbeat(true, &sessions, false).await;
    drop(over_on_return);
    if let Some(task) = health_task {
        let _ = tokio::time::timeout(LAST_ANSWERS, task).await;
    }
    Ok(())
}

impl Agent {
    fn running(&self) -> MutexGuard<'_, HashMap<JobId, Running>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the time limit of a save.
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

    /// Returns the number of threads for a job that starts now, and records it so that the job counts from now on.
    fn threads_for(&self, job: JobId) -> u32 {
        let mut measured = self.measure();
        // The job itself is already counted as running.
        measured.own_jobs = measured.own_jobs.saturating_sub(1);
        let (_, threads) = load::capacity(&measured, self.bounds());
        if let Some(running) = self.running().get_mut(&job) {
            running.threads = threads;
        }
        threads
    }

    /// Cleans up after an agent that died: ends children that still run, and thaws containers that are still frozen.
    async fn end_leftovers(&self) {
        for (job, note) in self.spool.leftovers() {
            if let Some(note) = note {
                tracing::warn!(job.id = %job, session.id = note.session, child.pid = note.pid, "a former agent died during this save");
                child::end_leftover(note.pid, note.pid_start).await;
            }
            if work::ensure_thawed(self, job).await {
                self.spool.end(job);
            }
        }
        self.spool.tidy(now_ms());
    }

    /// Claims and starts orders while there are free slots, until the agent has to end.
    async fn serve(self: &Arc<Self>, jobs: &mut JoinSet<()>) {
        let mut reclaimed = false;
        let mut pause = BACKOFF.0;
        while !self.cancel.is_cancelled() {
            while let Some(ended) = jobs.try_join_next() {
                log_panic(&ended);
            }
            let node = &self.options.node;
            let claims = if reclaimed {
                let (slots, _) = load::capacity(&self.measure(), self.bounds());
                let free = (slots as usize).saturating_sub(jobs.len());
                if free == 0 {
                    tokio::select! {
                        Some(ended) = jobs.join_next() => log_panic(&ended),
                        () = tokio::time::sleep(FREE_SLOT_POLL) => {}
                        () = self.cancel.cancelled() => {}
                    }
                    continue;
                }
                let claim = self.queue.claim(node, &self.name, free, CLAIM_WAIT);
                call(&self.queue, claim, CLAIM_WAIT + CALL_TIMEOUT).await
            } else {
                call(
                    &self.queue,
                    self.queue.reclaim(node, &self.name),
                    CALL_TIMEOUT,
                )
                .await
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
                        () = self.cancel.cancelled() => {}
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
            let (lost, ended) = (CancellationToken::new(), CancellationToken::new());
            // A claim for a job that is still running here means that the earlier claim is lost.
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
            let _gone = JobGuard {
                agent: Arc::clone(&agent),
                job,
                ended,
            };
            work::work(agent, claim, lost).await;
        });
    }

    /// Lets running jobs finish within the time for draining, then returns the others.
    async fn drain(&self, jobs: &mut JoinSet<()>) {
        let all = async {
            while let Some(ended) = jobs.join_next().await {
                log_panic(&ended);
            }
        };
        if tokio::time::timeout(self.options.drain, all).await.is_err() {
            self.drain_over.cancel();
            while let Some(ended) = jobs.join_next().await {
                log_panic(&ended);
            }
        }
    }

    /// Says that the agent is ready when the containers have been listed and the queue answers. A queue that is down for
    /// a while does not keep the unit from starting.
    async fn say_when_ready(self: Arc<Self>) {
        let listed = tokio::time::timeout(FIRST_LISTING, self.listed.cancelled());
        if listed.await.is_err() {
            // A file system that hangs must not keep the unit from starting.
            ready::say_started("lists the node's containers");
            self.listed.cancelled().await;
        }
        if !self.heard.is_cancelled() {
            ready::say_started(&format!("waits for the queue at {}", self.queue.address()));
        }
        self.heard.cancelled().await;
        let (sessions, problems) = self.inventory.snapshot();
        let problems = match problems.len() {
            0 => String::new(),
            found => format!(", {} in listing them", count(found, "problem", "problems")),
        };
        ready::say(&format!(
            "the agent is ready: node {}, queue at {}, {}{problems}",
            self.options.node,
            self.queue.address(),
            count(sessions.len(), "container", "containers")
        ));
    }

    /// Sends heartbeats until the task is aborted.
    async fn heartbeat_loop(self: Arc<Self>) {
        let mut told: Option<(Vec<Session>, Instant)> = None;
        let mut failed = false;
        // The first heartbeat would otherwise be without the sessions.
        let _ = tokio::time::timeout(CALL_TIMEOUT, self.listed.cancelled()).await;
        loop {
            let (sessions, _) = self.inventory.snapshot();
            let changed = told
                .as_ref()
                .is_none_or(|(last, at)| *last != sessions || at.elapsed() >= SESSIONS_EVERY);
            let begun = Instant::now();
            let sent = self
                .send_heartbeat(self.cancel.is_cancelled(), &sessions, changed)
                .await;
            self.findings.heartbeat(sent.is_ok());
            self.metrics.heartbeat(begun.elapsed());
            match &sent {
                Ok(()) => {
                    self.heard.cancel();
                    if changed {
                        told = Some((sessions, Instant::now()));
                    }
                    if failed {
                        let at = self.queue.address();
                        tracing::info!(queue = at, "the queue answers again");
                        ready::say_status(&format!("ready, queue at {at}"));
                    }
                }
                Err(error) => {
                    told = None;
                    if !failed {
                        tracing::warn!(%error, "the queue does not hear that this agent is there");
                        ready::say_status(&error.to_string());
                    }
                }
            }
            failed = sent.is_err();
            let _ = tokio::time::timeout(self.options.heartbeat_every, self.news.notified()).await;
        }
    }

    /// Sends one heartbeat about `sessions`, which it contains if they have `changed`.
    async fn send_heartbeat(
        &self,
        draining: bool,
        sessions: &[Session],
        changed: bool,
    ) -> Result<(), queue::Error> {
        let (_, mut problems) = self.inventory.snapshot();
        problems.splice(0..0, self.stuck.problems());
        let mut running: Vec<JobId> = self.running().keys().copied().collect();
        running.sort_unstable();
        let load = Load {
            background: self.options.background.is_some(),
            hurry: self.options.may_hurry(),
            ..load::to_load(&self.measure(), self.bounds())
        };
        let stuck = self.stuck.count();
        self.metrics.load(&load, self.options.slots, stuck);
        let node = Node {
            name: self.options.node.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            started_ms: self.started_ms,
            at_ms: now_ms(),
            draining,
            running,
            load,
            problems,
            ended_more: self.inventory.ended_more(),
            to_save: ended::mark(sessions),
        };
        let sessions = changed.then_some(sessions);
        call(
            &self.queue,
            self.queue.heartbeat(&node, sessions),
            CALL_TIMEOUT,
        )
        .await
    }

    /// Lists the node's containers at regular intervals and when one has ended, and thaws what may have been left frozen.
    async fn inventory_loop(self: Arc<Self>) {
        let mut watch = Watch::default();
        loop {
            let begun = Instant::now();
            let agent = Arc::clone(&self);
            let looked = tokio::task::spawn_blocking(move || {
                let changed = agent.inventory.refresh(&agent.options);
                health::look(&agent);
                agent.spool.tidy(now_ms());
                changed
            });
            match looked.await {
                Ok(true) => self.news.notify_one(),
                Ok(false) => {}
                Err(_) => tracing::error!(
                    "looking at the node's containers: a thread died; this is a defect of upperdeck"
                ),
            }
            watch.set(&self.inventory.processes());
            self.listed.cancel();
            for (job, _) in self.spool.leftovers() {
                let at_work = self.running().contains_key(&job);
                if !at_work && work::ensure_thawed(&self, job).await {
                    self.spool.end(job);
                }
            }
            let every = self.options.inventory_every;
            let pause = if self.inventory.is_settling() {
                every.min(LOOK_AGAIN)
            } else {
                every
            };
            let _ = tokio::time::timeout(pause, watch.ended()).await;
            // However many end, one after another.
            tokio::time::sleep(every.min(LOOK_AGAIN).saturating_sub(begun.elapsed())).await;
        }
    }
}

impl Agent {
    /// Inspects the sessions one after another, each in a child process, because their trees are untrusted and large.
    async fn inspection_loop(self: Arc<Self>) {
        loop {
            for session in self.inventory.due(self.options.sizes_every) {
                if self.cancel.is_cancelled() {
                    return;
                }
                // A new child would get stuck in the same place as the earlier one.
                if self.stuck.pid_of(&session).is_some() {
                    let look = self.inventory.begin_look(&session);
                    self.inventory
                        .set_inspection(&session, look, Inspection::default());
                    continue;
                }
                let look = self.inventory.begin_look(&session);
                let found = inspect::inspect(&self.options, &self.stuck, &session).await;
                let inside = found.and_then(|json| serde_json::from_slice(&json).ok());
                self.inventory
                    .set_inspection(&session, look, inside.unwrap_or_default());
            }
            tokio::time::sleep(self.options.inventory_every).await;
        }
    }
}

/// Marks a job as ended when it is dropped, however it ended.
struct JobGuard {
    agent: Arc<Agent>,
    job: JobId,
    ended: CancellationToken,
}

impl Drop for JobGuard {
    fn drop(&mut self) {
        self.agent.running().remove(&self.job);
        self.ended.cancel();
    }
}

fn log_panic(ended: &Result<(), tokio::task::JoinError>) {
    if ended.is_err() {
        tracing::error!("a job's task died; this is a defect of upperdeck, and its lease will end");
    }
}
