//! Agents, managers and Redis die at random, in a sequence of steps that a seed determines. Every job ends once, no
//! fence is issued twice, live claims never exceed a limit, and nothing is lost.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use rand::seq::IndexedRandom as _;
use rand::{RngExt as _, SeedableRng as _};
use upperdeck::service::job::{Code, JobId, Order, Outcome as Ending, Report, Update};
use upperdeck::service::queue::{
    Claim, ClaimState, Error, Limits, Local, Queue, Settings, Withdrawn,
};

use crate::record::{Record, Where};
use crate::server::Server;
use crate::support::note;
use crate::world::{NOW, Outcome, ended, order, report, settings, succeeded};

const LIMITS: Limits = Limits {
    user: 2,
    node: 2,
    registry: 3,
};
const USERS: [&str; 3] = ["ada", "bob", "cyd"];
const NODES: [&str; 2] = ["n1", "n2"];

/// The failure of the queue itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum QueueFailure {
    None,
    /// FLUSHALL.
    Flush,
    /// SIGKILL and a restart with the data on disk: everything with an append-only file, nothing without.
    Kill,
}

struct Chaos {
    queue: Queue,
    settings: Settings,
    server: Option<Server>,
    failure: QueueFailure,
    rng: SmallRng,
    record: Record,
    agents: Vec<Agent>,
    managers: [Manager; 2],
    /// The greatest fence issued for each job.
    fences: BTreeMap<JobId, u64>,
    /// How often the tag of each job was set.
    tags: BTreeMap<JobId, u32>,
    /// How often the queue accepted a final report of success for each job.
    wins: BTreeMap<JobId, u32>,
    /// Jobs for which it was unknown whether the tag was set when they were cancelled, because an agent died or failed
    /// while setting it.
    doubtful: BTreeSet<JobId>,
    /// How far this test has advanced the clock.
    now: Duration,
    started: Instant,
    born: u32,
}

struct Agent {
    name: String,
    node: &'static str,
    work: Vec<Work>,
}

/// A claim and the progress of its agent.
#[derive(Clone)]
struct Work {
    claim: Claim,
    /// When its lease ends if it is not renewed.
    until: Duration,
    seq: u64,
    stage: Stage,
    /// Its agent is dead or not aware that it lost the claim. It may still send reports.
    lost: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd)]
enum Stage {
    Claimed,
    Cancelled,
    Confirmed,
    Tagged,
}

#[derive(Default)]
struct Manager {
    /// Jobs that the queue did not know when it was queried.
    unknown: Vec<JobId>,
    read: Vec<(String, Report)>,
}

impl Chaos {
    fn new(
        queue: Queue,
        settings: Settings,
        server: Option<Server>,
        failure: QueueFailure,
        seed: u64,
    ) -> Self {
        let agents = [("a", "n1"), ("b", "n1"), ("c", "n2")];
        Self {
            queue,
            settings,
            server,
            failure,
            rng: SmallRng::seed_from_u64(seed),
            record: Record::default(),
            agents: agents
                .map(|(name, node)| Agent {
                    name: name.to_owned(),
                    node,
                    work: Vec::new(),
                })
                .into(),
            managers: Default::default(),
            fences: BTreeMap::new(),
            tags: BTreeMap::new(),
            wins: BTreeMap::new(),
            doubtful: BTreeSet::new(),
            now: Duration::ZERO,
            started: Instant::now(),
            born: 0,
        }
    }

    fn now(&self) -> Duration {
        self.now + self.started.elapsed()
    }

    fn pass(&mut self, time: Duration) {
        self.settings.clock.advance(time);
        self.now += time;
    }

    /// Records a new claim: the previous one has ended, and the fence must be new.
    fn given(&mut self, at: usize, claim: Claim) {
        let job = claim.order.job;
        let before = self.fences.insert(job, claim.fence).unwrap_or(0);
        assert!(claim.fence > before, "{job}: {} again", claim.fence);
        assert_eq!(claim.order.node, self.agents[at].node);
        for agent in &mut self.agents {
            for work in &mut agent.work {
                work.lost |= work.claim.order.job == job;
            }
        }
        let until = self.now() + self.settings.lease;
        self.agents[at].work.push(Work {
            claim,
            until,
            seq: 0,
            stage: Stage::Claimed,
            lost: false,
        });
    }

    /// Counts live claims. Claims that end within seconds do not count, because this clock and the queue's differ
    /// slightly.
    fn check_limits(&self) {
        let soon = self.now() + Duration::from_secs(20);
        let live: Vec<&Order> = self
            .agents
            .iter()
            .flat_map(|agent| &agent.work)
            .filter(|work| !work.lost && work.until > soon)
            .map(|work| &work.claim.order)
            .collect();
        let count = |same: &dyn Fn(&Order) -> bool| live.iter().filter(|one| same(one)).count();
        for user in USERS {
            assert!(count(&|one| one.owner == user) <= 2, "of {user}");
        }
        for node in NODES {
            assert!(count(&|one| one.node == node) <= 2, "on {node}");
        }
        for host in ["r1", "r2"] {
            let into = count(&|one| one.destination.starts_with(host));
            assert!(into <= 3, "into {host}");
        }
    }

    async fn step(&mut self) -> Result<(), Error> {
        match self.rng.random_range(0..100) {
            0..12 => self.accept().await,
            12..30 => self.claim().await,
            30..34 => self.reclaim().await,
            34..64 => self.work().await,
            64..68 => {
                self.die();
                Ok(())
            }
            68..72 => {
                // A claim that is not renewed meanwhile may be over.
                let part = self.rng.random_range(1..12);
                let time = self.settings.lease * part / 10;
                self.pass(time);
                Ok(())
            }
            72..82 => self.read().await,
            82..88 => self.write().await,
            88..93 => self.look().await,
            93..97 => self.offer().await,
            97..99 => self.cancel().await,
            _ => self.inject_failure().await,
        }
    }

    async fn accept(&mut self) -> Result<(), Error> {
        if self.record.rows.len() >= 60 {
            return Ok(());
        }
        let node = NODES.choose(&mut self.rng).unwrap();
        let user = USERS.choose(&mut self.rng).unwrap();
        let host = ["r1", "r2"].choose(&mut self.rng).unwrap();
        let order = Order {
            destination: format!("{host}/{user}/x:y"),
            expires_ms: i64::MAX,
            autosave: self.rng.random_bool(0.3),
            ..order(node, user)
        };
        self.record.accept(&order);
        // Some managers die between the record and the queue.
        if self.rng.random_bool(0.8) {
            self.queue.offer(&order).await?;
        }
        Ok(())
    }

    async fn claim(&mut self) -> Result<(), Error> {
        let at = self.rng.random_range(0..self.agents.len());
        let most = self.rng.random_range(1..3);
        let agent = &self.agents[at];
        for claim in self.queue.claim(agent.node, &agent.name, most, NOW).await? {
            // What it still works on is lost with this.
            self.given(at, claim);
        }
        Ok(())
    }

    async fn reclaim(&mut self) -> Result<(), Error> {
        let at = self.rng.random_range(0..self.agents.len());
        let agent = &self.agents[at];
        for claim in self.queue.reclaim(agent.node, &agent.name).await? {
            self.given(at, claim);
        }
        Ok(())
    }

    /// Continues one claim of one agent, which may be dead without being aware of it.
    async fn work(&mut self) -> Result<(), Error> {
        let at = self.rng.random_range(0..self.agents.len());
        if self.agents[at].work.is_empty() {
            return Ok(());
        }
        let which = self.rng.random_range(0..self.agents[at].work.len());
        let work = self.agents[at].work[which].clone();
        let (claim, job) = (&work.claim, work.claim.order.job);
        let seq = work.seq + 1;
        let mut stage = work.stage;
        let hold = match self.rng.random_range(0..6) {
            0 => self.queue.renew(claim).await?,
            1 => {
                let said = report(claim, seq, Update::Started);
                self.queue.report(claim, &said).await?
            }
            2 if work.stage == Stage::Claimed => {
                let hold = self.queue.confirm(claim).await?;
                if hold == ClaimState::Held {
                    stage = Stage::Confirmed;
                }
                hold
            }
            3 if work.stage == Stage::Confirmed => {
                *self.tags.entry(job).or_default() += 1;
                stage = Stage::Tagged;
                self.agents[at].work[which].stage = stage;
                return Ok(());
            }
            _ => {
                let last = match work.stage {
                    Stage::Tagged => succeeded(claim),
                    Stage::Cancelled => ended(claim, Ending::Cancelled),
                    Stage::Claimed if self.rng.random_bool(0.3) => ended(
                        claim,
                        Ending::Failed {
                            code: Code::RegistryUnavailable,
                            message: "503".to_owned(),
                            retryable: true,
                        },
                    ),
                    Stage::Claimed if self.rng.random_bool(0.3) => {
                        let reason = "drains".to_owned();
                        report(claim, seq, Update::GivenBack { reason })
                    }
                    Stage::Claimed | Stage::Confirmed => return Ok(()),
                };
                let hold = self.queue.complete(claim, &last).await?;
                if hold == ClaimState::Held {
                    assert!(
                        !work.lost || self.failure != QueueFailure::None,
                        "{job}: by who lost it"
                    );
                    if work.stage == Stage::Tagged {
                        *self.wins.entry(job).or_default() += 1;
                    }
                    self.agents[at].work.remove(which);
                    return Ok(());
                }
                hold
            }
        };
        let (until, newest) = (self.now() + self.settings.lease, self.fences[&job]);
        if hold == ClaimState::Lost {
            self.agents[at].work.remove(which);
            return Ok(());
        }
        assert_eq!(claim.fence, newest, "{job}: an older claim lives");
        let work = &mut self.agents[at].work[which];
        work.lost = false;
        work.until = until;
        work.seq = seq;
        work.stage = if hold == ClaimState::Cancelled {
            Stage::Cancelled
        } else {
            stage
        };
        Ok(())
    }

    /// Kills an agent and starts another one in its place. The dead agent's claims may be kept, because a process that
    /// was only suspended could still send reports.
    fn die(&mut self) {
        self.born += 1;
        let at = self.rng.random_range(0..3);
        let ghost = self.rng.random_bool(0.5);
        let (node, work) = (
            self.agents[at].node,
            std::mem::take(&mut self.agents[at].work),
        );
        let name = std::mem::replace(&mut self.agents[at].name, format!("z{}", self.born));
        if ghost && self.agents.len() < 8 {
            self.agents.push(Agent { name, node, work });
        }
    }

    async fn read(&mut self) -> Result<(), Error> {
        let which = self.rng.random_range(0..2);
        // What it had read and not written down, it forgets now and then.
        if self.rng.random_bool(0.2) {
            self.managers[which].read.clear();
        }
        let most = self.rng.random_range(1..20);
        let got = self.queue.reports(&format!("m{which}"), most, NOW).await?;
        let got = got.into_iter().map(|one| (one.entry, one.report));
        self.managers[which].read.extend(got);
        Ok(())
    }

    async fn write(&mut self) -> Result<(), Error> {
        let which = self.rng.random_range(0..2);
        let read = std::mem::take(&mut self.managers[which].read);
        let mut zombies = Vec::new();
        for (_, report) in &read {
            let before = self.record.open();
            if self.record.apply(report) {
                zombies.push(report.job);
            }
            let over = self.record.rows[&report.job].at == Where::Cancelled;
            if over && before.contains(&report.job) {
                self.note_doubt(report.job);
            }
        }
        // It may die between the record and the queue.
        if self.rng.random_bool(0.9) {
            let entries: Vec<_> = read.into_iter().map(|(entry, _)| entry).collect();
            self.queue.acknowledge(&entries).await?;
        }
        for job in zombies {
            self.queue.withdraw(job).await?;
        }
        Ok(())
    }

    async fn look(&mut self) -> Result<(), Error> {
        let which = self.rng.random_range(0..2);
        let open = self.record.open();
        let places = self.queue.places(&open).await?;
        self.managers[which].unknown = open
            .into_iter()
            .zip(places)
            .filter(|(_, place)| place.is_none())
            .map(|(job, _)| job)
            .collect();
        Ok(())
    }

    async fn offer(&mut self) -> Result<(), Error> {
        let which = self.rng.random_range(0..2);
        for job in std::mem::take(&mut self.managers[which].unknown) {
            let row = &self.record.rows[&job];
            if !row.is_over() {
                self.queue.offer(&row.order.clone()).await?;
            }
        }
        Ok(())
    }

    async fn cancel(&mut self) -> Result<(), Error> {
        let open = self.record.open();
        let Some(job) = open.choose(&mut self.rng).copied() else {
            return Ok(());
        };
        let row = self
            .record
            .rows
            .get_mut(&job)
            .ok_or_else(|| Error::Unusable(String::new()))?;
        row.unwanted = true;
        if self.queue.withdraw(job).await? == Withdrawn::Removed {
            row.end(Where::Cancelled);
            self.note_doubt(job);
            for work in self.agents.iter_mut().flat_map(|agent| &mut agent.work) {
                work.lost |= work.claim.order.job == job;
            }
        }
        Ok(())
    }

    fn note_doubt(&mut self, job: JobId) {
        let mut all = self.agents.iter().flat_map(|agent| &agent.work);
        let begun = all.any(|work| work.claim.order.job == job && work.stage >= Stage::Confirmed);
        if begun || self.tags.contains_key(&job) {
            self.doubtful.insert(job);
        }
    }

    async fn inject_failure(&mut self) -> Result<(), Error> {
        let Some(server) = &mut self.server else {
            return Ok(());
        };
        match self.failure {
            QueueFailure::None => return Ok(()),
            QueueFailure::Flush => {
                let mut connection = server.connection().await;
                let _: () = redis::cmd("FLUSHALL")
                    .query_async(&mut connection)
                    .await
                    .map_err(|error| Error::Unusable(error.to_string()))?;
            }
            QueueFailure::Kill => {
                server.kill();
                server.run();
            }
        }
        // A claim that Redis forgot is none.
        for work in self.agents.iter_mut().flat_map(|agent| &mut agent.work) {
            work.lost = true;
        }
        Ok(())
    }

    /// Lets all processes run without failures until every job has ended.
    async fn settle(&mut self) -> Outcome {
        let end = Instant::now() + Duration::from_secs(120);
        while !self.record.open().is_empty() {
            assert!(Instant::now() < end, "not over: {:?}", self.record.open());
            for at in 0..self.agents.len() {
                let (node, name) = (self.agents[at].node, self.agents[at].name.clone());
                for claim in self
                    .queue
                    .claim(node, &name, 2, NOW)
                    .await
                    .unwrap_or_default()
                {
                    self.given(at, claim);
                }
                self.check_limits();
                for _ in 0..30 {
                    let _ = self.work().await;
                }
            }
            for _ in 0..4 {
                let _ = self.read().await;
                let _ = self.write().await;
                let _ = self.look().await;
                let _ = self.offer().await;
            }
            self.pass(self.settings.lease / 3);
            // What a manager forgot to write down comes again.
            tokio::time::sleep(self.settings.ack_timeout / 20).await;
        }
        Ok(())
    }

    async fn play(mut self, steps: u32) -> Outcome {
        for _ in 0..steps {
            match self.step().await {
                // Redis was away just now, and the connection has noticed.
                Err(Error::Unreachable { .. } | Error::Refused { .. })
                    if self.failure == QueueFailure::Kill => {}
                done => done?,
            }
            self.check_limits();
        }
        let blown = self.failure != QueueFailure::None;
        self.settle().await?;
        for (job, row) in &self.record.rows {
            let tags = self.tags.get(job).copied().unwrap_or(0);
            assert_eq!(row.ends, 1, "{job} ended {} times", row.ends);
            if row.at == Where::Succeeded {
                assert!(tags > 0, "{job} has no tag");
            }
            if !blown {
                let wins = self.wins.get(job).copied().unwrap_or(0);
                assert_eq!(wins, u32::from(row.at == Where::Succeeded), "{job}");
                assert!(
                    tags == 0 || row.at == Where::Succeeded || self.doubtful.contains(job),
                    "{job} is {:?} and has a tag",
                    row.at
                );
            }
        }
        Ok(())
    }
}

/// Runs the test with random seeds, and prints the seed of a failure. A few in the normal suite, or as many as fit into
/// `UPPERDECK_SOAK` seconds.
async fn play(
    failure: QueueFailure,
    make: impl Fn(&Settings) -> Option<(Queue, Option<Server>)>,
) -> Outcome {
    let soak: Option<u64> = std::env::var("UPPERDECK_SOAK")
        .ok()
        .and_then(|text| text.parse().ok());
    let one: Option<u64> = std::env::var("UPPERDECK_TEST_SEED")
        .ok()
        .and_then(|text| text.parse().ok());
    let end = Instant::now() + Duration::from_secs(soak.unwrap_or(0));
    let mut played = 0;
    loop {
        let seed = one.unwrap_or_else(rand::random);
        let settings = settings();
        let Some((queue, server)) = make(&settings) else {
            return Ok(());
        };
        let shown = SeedNote(seed, failure);
        Chaos::new(queue, settings, server, failure, seed)
            .play(1500)
            .await?;
        std::mem::forget(shown);
        played += 1;
        if one.is_some() || (played >= 3 && Instant::now() >= end) {
            if soak.is_some() {
                note(&format!("{failure:?}: {played} seeds"));
            }
            return Ok(());
        }
    }
}

/// Prints the seed if the test fails.
struct SeedNote(u64, QueueFailure);

impl Drop for SeedNote {
    fn drop(&mut self) {
        note(&format!("UPPERDECK_TEST_SEED={} ({:?})", self.0, self.1));
    }
}

#[tokio::test]
async fn in_one_process() -> Outcome {
    play(QueueFailure::None, |settings| {
        Some((Queue::Local(Local::with(LIMITS, settings.clone())), None))
    })
    .await
}

fn on_redis(settings: &Settings, more: &[&str]) -> Option<(Queue, Option<Server>)> {
    let server = Server::start(more)?;
    Some((server.queue(LIMITS, settings), Some(server)))
}

#[tokio::test]
async fn on_a_redis_that_lives() -> Outcome {
    play(QueueFailure::None, |settings| on_redis(settings, &[])).await
}

#[tokio::test]
async fn on_a_redis_that_is_flushed() -> Outcome {
    play(QueueFailure::Flush, |settings| on_redis(settings, &[])).await
}

#[tokio::test]
async fn on_a_redis_that_is_killed_and_remembers() -> Outcome {
    let more = ["--appendonly", "yes", "--appendfsync", "always"];
    play(QueueFailure::Kill, |settings| on_redis(settings, &more)).await
}

#[tokio::test]
async fn on_a_redis_that_is_killed_and_forgets() -> Outcome {
    play(QueueFailure::Kill, |settings| on_redis(settings, &[])).await
}
