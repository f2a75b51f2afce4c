//! Agents, managers and Redis die at random while all of them work concurrently. Every job ends once.
//!
//! The seed alone does not determine the order of events here. `UPPERDECK_SOAK` sets the duration in seconds.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use rand::{RngExt as _, SeedableRng as _};
use redis::{Value, cmd};
use tokio::task::JoinHandle;
use upperdeck::service::job::{JobId, Order, Outcome as Ending, Update};
use upperdeck::service::queue::{Claim, ClaimState, Error, Limits, Queue, Settings};

use crate::record::{Record, Where};
use crate::server::Server;
use crate::support::note;
use crate::world::{NOW, Outcome, ended, order, report, settings, succeeded};

const LIMITS: Limits = Limits {
    user: 4,
    node: 3,
    registry: 0,
};
const NODES: usize = 6;
/// A claim of a dead agent is free after this time.
const LEASE: Duration = Duration::from_secs(2);

/// What survives all processes: the managers' record, and the tags in the registry.
#[derive(Clone, Default)]
struct Kept {
    record: Arc<Mutex<Record>>,
    tags: Arc<Mutex<BTreeMap<JobId, u32>>>,
}

/// Performs one save, with reports while it works.
async fn save(queue: Queue, claim: Claim, kept: Kept, mut rng: SmallRng) -> Result<(), Error> {
    let mut seq = 0;
    for _ in 0..rng.random_range(1..5) {
        seq += 1;
        let said = if seq == 1 {
            Update::Assigned
        } else {
            Update::Started
        };
        match queue.report(&claim, &report(&claim, seq, said)).await? {
            ClaimState::Held | ClaimState::Hurried => {}
            ClaimState::Cancelled => {
                queue
                    .complete(&claim, &ended(&claim, Ending::Cancelled))
                    .await?;
                return Ok(());
            }
            ClaimState::Lost => return Ok(()),
        }
        tokio::time::sleep(Duration::from_millis(rng.random_range(0..60))).await;
        queue.renew(&claim).await?;
    }
    match queue.confirm(&claim).await? {
        ClaimState::Held | ClaimState::Hurried => {}
        ClaimState::Cancelled => {
            queue
                .complete(&claim, &ended(&claim, Ending::Cancelled))
                .await?;
            return Ok(());
        }
        ClaimState::Lost => return Ok(()),
    }
    *kept
        .tags
        .lock()
        .unwrap()
        .entry(claim.order.job)
        .or_default() += 1;
    // The answer may be lost; said again it is not done again.
    for _ in 0..3 {
        if queue.complete(&claim, &succeeded(&claim)).await.is_ok() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Ok(())
}

async fn agent(queue: Queue, node: String, name: String, kept: Kept, mut rng: SmallRng) {
    // Its children die with it.
    let mut children = tokio::task::JoinSet::new();
    let mut first = true;
    loop {
        let free = 3usize.saturating_sub(children.len()).max(1);
        let got = if first {
            queue.reclaim(&node, &name).await
        } else {
            queue
                .claim(&node, &name, free, Duration::from_millis(500))
                .await
        };
        match got {
            Ok(claims) => {
                first = false;
                for claim in claims {
                    let rng = SmallRng::seed_from_u64(rng.random());
                    children.spawn(save(queue.clone(), claim, kept.clone(), rng));
                }
            }
            Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
        }
        while children.try_join_next().is_some() {}
        if children.len() >= 3 {
            children.join_next().await;
        }
    }
}

async fn manager(queue: Queue, name: String, kept: Kept) {
    loop {
        if hear(&queue, &name, &kept).await.is_err() || compare(&queue, &kept).await.is_err() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}

async fn hear(queue: &Queue, name: &str, kept: &Kept) -> Result<(), Error> {
    let got = queue.reports(name, 50, Duration::from_millis(200)).await?;
    let mut over = Vec::new();
    for one in &got {
        if kept.record.lock().unwrap().apply(&one.report) {
            over.push(one.report.job);
        }
    }
    let entries: Vec<String> = got.into_iter().map(|one| one.entry).collect();
    queue.acknowledge(&entries).await?;
    for job in over {
        queue.withdraw(job).await?;
    }
    Ok(())
}

/// Offers jobs that are open in the record but unknown to the queue.
async fn compare(queue: &Queue, kept: &Kept) -> Result<(), Error> {
    let open = kept.record.lock().unwrap().open();
    for (job, place) in open.iter().zip(queue.places(&open).await?) {
        let order = {
            let record = kept.record.lock().unwrap();
            let row = &record.rows[job];
            (place.is_none() && !row.is_over()).then(|| row.order.clone())
        };
        if let Some(order) = order {
            queue.offer(&order).await?;
        }
    }
    Ok(())
}

struct Storm {
    server: Server,
    settings: Settings,
    kept: Kept,
    rng: SmallRng,
    agents: Vec<JoinHandle<()>>,
    managers: Vec<JoinHandle<()>>,
    born: u32,
    flushes: u32,
    kills: u32,
}

impl Storm {
    /// Starts an agent with connections of its own, like a separate process.
    fn start_agent(&mut self, at: usize) -> JoinHandle<()> {
        self.born += 1;
        let queue = self.server.queue(LIMITS, &self.settings);
        let rng = SmallRng::seed_from_u64(self.rng.random());
        let (node, name) = (format!("n{at}"), format!("agent-{}", self.born));
        tokio::spawn(agent(queue, node, name, self.kept.clone(), rng))
    }

    fn start_manager(&mut self) -> JoinHandle<()> {
        self.born += 1;
        let queue = self.server.queue(LIMITS, &self.settings);
        tokio::spawn(manager(
            queue,
            format!("manager-{}", self.born),
            self.kept.clone(),
        ))
    }

    async fn blow(&mut self) -> Outcome {
        match self.rng.random_range(0..10) {
            0..5 => {
                let at = self.rng.random_range(0..NODES);
                self.agents[at].abort();
                self.kills += 1;
                self.agents[at] = self.start_agent(at);
            }
            5..7 => {
                let at = self.rng.random_range(0..2);
                self.managers[at].abort();
                self.kills += 1;
                self.managers[at] = self.start_manager();
            }
            7..8 => {
                let mut redis = self.server.connection().await;
                let _: Value = cmd("FLUSHALL").query_async(&mut redis).await?;
                self.flushes += 1;
            }
            8..9 => {
                self.server.kill();
                self.server.run();
                self.kills += 1;
            }
            _ => self.cancel().await,
        }
        Ok(())
    }

    /// Requests the cancellation of a random job. Only if the queue withdraws it at once does it end at once.
    async fn cancel(&mut self) {
        let open = self.kept.record.lock().unwrap().open();
        if open.is_empty() {
            return;
        }
        let job = open[self.rng.random_range(0..open.len())];
        let queue = self.server.queue(LIMITS, &self.settings);
        if let Some(row) = self.kept.record.lock().unwrap().rows.get_mut(&job) {
            row.unwanted = true;
        }
        let _ = queue.withdraw(job).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_dies_while_everybody_works() -> Outcome {
    let soak: u64 = std::env::var("UPPERDECK_SOAK")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(6);
    let Some(server) = Server::start(&[]) else {
        return Ok(());
    };
    let seed: u64 = rand::random();
    note(&format!("seed {seed}"));
    let settings = Settings {
        lease: LEASE,
        ack_timeout: LEASE,
        ..settings()
    };
    let mut storm = Storm {
        server,
        settings,
        kept: Kept::default(),
        rng: SmallRng::seed_from_u64(seed),
        agents: Vec::new(),
        managers: Vec::new(),
        born: 0,
        flushes: 0,
        kills: 0,
    };
    for at in 0..NODES {
        let agent = storm.start_agent(at);
        storm.agents.push(agent);
    }
    for _ in 0..2 {
        let manager = storm.start_manager();
        storm.managers.push(manager);
    }
    let end = Instant::now() + Duration::from_secs(soak);
    let mut accepted = 0;
    while Instant::now() < end {
        for _ in 0..storm.rng.random_range(0..12) {
            let node = format!("n{}", storm.rng.random_range(0..NODES));
            let user = ["ada", "bob", "cyd", "dan", "eve"][storm.rng.random_range(0..5)];
            let order = Order {
                autosave: storm.rng.random_bool(0.3),
                ..order(&node, user)
            };
            // In the record first; the managers offer what the queue does not know.
            storm.kept.record.lock().unwrap().accept(&order);
            accepted += 1;
        }
        storm.blow().await?;
        let pause = storm.rng.random_range(0..300);
        tokio::time::sleep(Duration::from_millis(pause)).await;
    }
    // The storm is over. Nothing is waited for but the work itself.
    let end = Instant::now() + Duration::from_secs(180);
    loop {
        let open = storm.kept.record.lock().unwrap().open();
        if open.is_empty() {
            break;
        }
        assert!(
            Instant::now() < end,
            "{} jobs are not over: {open:?}",
            open.len()
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    for task in storm.agents.iter().chain(&storm.managers) {
        task.abort();
    }
    {
        let record = storm.kept.record.lock().unwrap();
        let tags = storm.kept.tags.lock().unwrap();
        for (job, row) in &record.rows {
            assert_eq!(row.ends, 1, "{job} ended {} times", row.ends);
            if row.at == Where::Succeeded {
                assert!(tags.contains_key(job), "{job} has no tag");
            }
        }
        let twice = tags.values().filter(|tags| **tags > 1).count();
        note(&format!(
            "{accepted} jobs ended once each; {} kills, {} times everything was lost; {twice} tags were put on again",
            storm.kills, storm.flushes
        ));
    }
    // And the queue lets go of all of it, once what was said last is taken.
    let queue = storm.server.queue(LIMITS, &storm.settings);
    assert!(queue.claim("n0", "last", 10, NOW).await.is_ok());
    Ok(())
}
