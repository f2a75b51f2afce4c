//! How the queue fares under load: 10,000 jobs over 1,000 agents on a real Redis, in one process, with the queue's own
//! code and a stand-in for the builder that sleeps. Figures and what they mean: benches/README.md.
//!
//! `UPPERDECK_TEST_REDIS` names the server program. Arguments: `--jobs N --agents N`.
// A measurement ends where it cannot measure.
#![allow(clippy::unwrap_used, clippy::print_stdout, missing_docs)]

use std::collections::HashMap;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use redis::aio::MultiplexedConnection;
use upperdeck::service::job::{
    Event, JobId, Keys, Load, Node, Order, Outcome, Report, Saved, Update, now_ms,
};
use upperdeck::service::queue::{
    Claim, ClaimState, HEARTBEAT_EVERY, Limits, Queue, RENEW_EVERY, Redis, Settings,
};

const USERS: usize = 500;
/// Handles to Redis that the agents share, as connections of so many processes would be too many for one machine; each
/// agent that waits has a connection of its own all the same.
const HANDLES: usize = 16;

struct Server {
    child: Child,
    directory: tempfile::TempDir,
}

impl Server {
    fn start() -> Self {
        let program =
            std::env::var("UPPERDECK_TEST_REDIS").unwrap_or_else(|_| "redis-server".to_owned());
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("redis.sock");
        let child = Command::new(&program)
            .args(["--port", "0", "--save", "", "--unixsocket"])
            .arg(&socket)
            .arg("--dir")
            .arg(directory.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        while std::os::unix::net::UnixStream::connect(&socket).is_err() {
            std::thread::sleep(Duration::from_millis(10));
        }
        Self { child, directory }
    }

    fn url(&self) -> String {
        format!(
            "redis+unix://{}/redis.sock",
            self.directory.path().display()
        )
    }

    fn queue(&self, limits: Limits) -> Queue {
        let keys = Keys::parse("a key of the measurement").unwrap();
        Queue::Redis(Redis::with(&self.url(), keys, limits, Settings::default()).unwrap())
    }

    async fn stats(&self) -> ServerStats {
        let client = redis::Client::open(self.url()).unwrap();
        let mut connection = client.get_multiplexed_async_connection().await.unwrap();
        ServerStats::now(&mut connection).await
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What Redis and this process have used so far.
struct ServerStats {
    memory: u64,
    redis_cpu: f64,
    calls: f64,
    own_cpu: f64,
    at: Instant,
}

impl ServerStats {
    async fn now(connection: &mut MultiplexedConnection) -> Self {
        let info: String = redis::cmd("INFO")
            .arg("everything")
            .query_async(connection)
            .await
            .unwrap();
        let field = |name: &str| -> f64 {
            let line = info
                .lines()
                .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            line.and_then(|value| value.trim().parse().ok())
                .unwrap_or(0.0)
        };
        let usage =
            nix::sys::resource::getrusage(nix::sys::resource::UsageWho::RUSAGE_SELF).unwrap();
        let seconds =
            |time: nix::sys::time::TimeVal| time.tv_sec() as f64 + time.tv_usec() as f64 / 1e6;
        Self {
            memory: field("used_memory") as u64,
            redis_cpu: field("used_cpu_sys") + field("used_cpu_user"),
            calls: field("total_commands_processed"),
            own_cpu: seconds(usage.user_time()) + seconds(usage.system_time()),
            at: Instant::now(),
        }
    }

    fn since(&self, before: &Self) -> String {
        let wall = (self.at - before.at).as_secs_f64();
        format!(
            "{:.0} commands/s in Redis, with those inside scripts, which is {:.0} % of a core busy; this process {:.0} %",
            (self.calls - before.calls) / wall,
            100.0 * (self.redis_cpu - before.redis_cpu) / wall,
            100.0 * (self.own_cpu - before.own_cpu) / wall,
        )
    }
}

fn order(node: &str, user: &str) -> Order {
    Order {
        job: JobId::new(),
        node: node.to_owned(),
        session: format!("{:064x}", rand::random::<u128>()),
        owner: user.to_owned(),
        destination: format!("registry.example.org/research/{user}/session:2026-11-24"),
        message: Some("before the upgrade of numpy".to_owned()),
        attempt: 1,
        issued_ms: now_ms(),
        expires_ms: now_ms() + 86_400_000,
        timeout_s: 3600,
        ..Order::default()
    }
}

fn report(claim: &Claim, seq: u64, update: Update) -> Report {
    Report {
        job: claim.order.job,
        node: claim.order.node.clone(),
        attempt: claim.order.attempt,
        fence: claim.fence,
        seq,
        at_ms: now_ms(),
        update,
    }
}

/// What everybody here sees.
struct Run {
    offered: Mutex<HashMap<JobId, Instant>>,
    /// From the offer to the claim.
    waits: Mutex<Vec<Duration>>,
    ended: AtomicUsize,
    heard: AtomicUsize,
    renewed: AtomicU64,
    child: Duration,
}

impl Run {
    fn new(child: Duration) -> Arc<Self> {
        Arc::new(Self {
            offered: Mutex::default(),
            waits: Mutex::default(),
            ended: AtomicUsize::new(0),
            heard: AtomicUsize::new(0),
            renewed: AtomicU64::new(0),
            child,
        })
    }

    fn claimed(&self, claim: &Claim) {
        if let Some(offered) = self.offered.lock().unwrap().remove(&claim.order.job) {
            self.waits.lock().unwrap().push(offered.elapsed());
        }
    }
}

/// One save as an agent sees it: seven reports, of which the last ends it.
async fn save(queue: &Queue, claim: &Claim, run: &Run) {
    let mut seq = 0;
    let mut say = async |update: Update| {
        seq += 1;
        assert_eq!(
            queue
                .report(claim, &report(claim, seq, update))
                .await
                .unwrap(),
            ClaimState::Held
        );
    };
    say(Update::Assigned).await;
    say(Update::Started).await;
    let steps = 4;
    for done in 1..=steps {
        let mut left = run.child / steps;
        while !left.is_zero() {
            let some = left.min(RENEW_EVERY);
            tokio::time::sleep(some).await;
            left -= some;
            if !left.is_zero() {
                queue.renew(claim).await.unwrap();
                run.renewed.fetch_add(1, Ordering::Relaxed);
            }
        }
        let event = Event::Progress {
            bytes_done: u64::from(done) * 100_000_000,
            bytes_total: 400_000_000,
            bytes_sent: u64::from(done) * 30_000_000,
            entries_total: 30_000,
            base_done: 0,
            base_total: 0,
        };
        say(Update::Event { event }).await;
    }
    assert_eq!(queue.confirm(claim).await.unwrap(), ClaimState::Held);
    let saved = Saved {
        reference: format!("{}@sha256:{:064x}", claim.order.destination, 7),
        digest: format!("sha256:{:064x}", 7),
        layer_bytes: 120_000_000,
        image_bytes: 900_000_000,
        sent_bytes: 120_000_000,
        entries: 30_000,
        delta: false,
        base_name: Some("docker.io/jupyter/scipy-notebook:latest".to_owned()),
        base_digest: Some(format!("sha256:{:064x}", 9)),
        pause_ms: Some(12.5),
        seconds: 4.2,
        changes: None,
    };
    let last = Update::Ended {
        outcome: Outcome::Succeeded { saved },
    };
    let hold = queue
        .complete(claim, &report(claim, 100, last))
        .await
        .unwrap();
    assert_eq!(hold, ClaimState::Held);
    run.ended.fetch_add(1, Ordering::Relaxed);
}

/// Two saves at a time, a heartbeat every five seconds, and for the rest it waits.
async fn agent(queue: Queue, name: String, run: Arc<Run>) {
    let beating = {
        let (queue, name) = (queue.clone(), name.clone());
        async move {
            // Not all in the same instant.
            tokio::time::sleep(HEARTBEAT_EVERY.mul_f64(rand::random::<f64>())).await;
            loop {
                let node = Node {
                    name: name.clone(),
                    version: "0.1.0".to_owned(),
                    started_ms: 0,
                    at_ms: now_ms(),
                    draining: false,
                    running: Vec::new(),
                    load: Load::default(),
                    problems: Vec::new(),
                    ..Node::default()
                };
                queue.heartbeat(&node, Some(&[])).await.unwrap();
                tokio::time::sleep(HEARTBEAT_EVERY).await;
            }
        }
    };
    let slot = || async {
        // All at once they would not find room in the queue of the socket.
        tokio::time::sleep(Duration::from_secs(2).mul_f64(rand::random::<f64>())).await;
        loop {
            let Ok(claims) = queue
                .claim(&name, "agent", 1, Duration::from_secs(30))
                .await
            else {
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            };
            for claim in claims {
                run.claimed(&claim);
                save(&queue, &claim, &run).await;
            }
        }
    };
    tokio::join!(beating, slot(), slot());
}

async fn manager(queue: Queue, name: &'static str, run: Arc<Run>) {
    loop {
        let got = queue
            .reports(name, 500, Duration::from_secs(5))
            .await
            .unwrap();
        run.heard.fetch_add(got.len(), Ordering::Relaxed);
        let entries: Vec<String> = got.into_iter().map(|one| one.entry).collect();
        queue.acknowledge(&entries).await.unwrap();
    }
}

/// Offers all of `orders`, `pace` a second (none: as fast as it goes).
async fn offer(queue: &Queue, orders: Vec<Order>, run: &Arc<Run>, pace: Option<f64>) {
    let started = Instant::now();
    let mut under_way = tokio::task::JoinSet::new();
    for (at, order) in orders.into_iter().enumerate() {
        if let Some(pace) = pace {
            let due = started + Duration::from_secs_f64(at as f64 / pace);
            tokio::time::sleep_until(due.into()).await;
        }
        if under_way.len() >= 64 {
            under_way.join_next().await.unwrap().unwrap();
        }
        let (queue, run) = (queue.clone(), run.clone());
        under_way.spawn(async move {
            run.offered
                .lock()
                .unwrap()
                .insert(order.job, Instant::now());
            queue.offer(&order).await.unwrap();
        });
    }
    while let Some(done) = under_way.join_next().await {
        done.unwrap();
    }
}

fn orders(jobs: usize, agents: usize) -> Vec<Order> {
    (0..jobs)
        .map(|at| {
            order(
                &format!("node-{:04}", (at * 7919) % agents),
                &format!("user-{:03}", at % USERS),
            )
        })
        .collect()
}

fn percentiles(mut waits: Vec<Duration>) -> String {
    waits.sort_unstable();
    let at = |share: f64| {
        let index = ((waits.len() as f64 * share) as usize).min(waits.len().saturating_sub(1));
        waits
            .get(index)
            .map_or(0.0, |wait| wait.as_secs_f64() * 1000.0)
    };
    format!(
        "p50 {:.1} ms, p99 {:.1} ms, longest {:.1} ms",
        at(0.5),
        at(0.99),
        at(1.0)
    )
}

async fn until(run: &Run, ended: usize) {
    while run.ended.load(Ordering::Relaxed) < ended {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn start_agents(
    server: &Server,
    agents: usize,
    limits: Limits,
    run: &Arc<Run>,
) -> tokio::task::JoinSet<()> {
    let handles: Vec<Queue> = (0..HANDLES).map(|_| server.queue(limits)).collect();
    let mut all = tokio::task::JoinSet::new();
    for at in 0..agents {
        all.spawn(agent(
            handles[at % HANDLES].clone(),
            format!("node-{at:04}"),
            run.clone(),
        ));
    }
    all
}

const LIMITS: Limits = Limits {
    user: 20,
    node: 2,
    registry: 0,
};

/// All jobs are there before the first agent comes.
async fn backlog(jobs: usize, agents: usize) {
    let server = Server::start();
    let queue = server.queue(LIMITS);
    let run = Run::new(Duration::ZERO);
    queue.ping().await.unwrap();
    let empty = server.stats().await;
    offer(&queue, orders(jobs, agents), &run, None).await;
    let full = server.stats().await;
    let wall = (full.at - empty.at).as_secs_f64();
    println!(
        "\n## A backlog: {jobs} jobs wait before the first of {agents} agents starts; the stand-in takes no time\n"
    );
    println!(
        "- offered: {:.0} jobs/s; {}",
        jobs as f64 / wall,
        full.since(&empty)
    );
    println!(
        "- memory of Redis for a job that waits: {} bytes",
        (full.memory - empty.memory) / jobs as u64
    );
    let places = Instant::now();
    let ids: Vec<JobId> = run.offered.lock().unwrap().keys().copied().collect();
    assert!(
        queue
            .places(&ids)
            .await
            .unwrap()
            .iter()
            .all(Option::is_some)
    );
    println!(
        "- the places of all of them: {:.0} ms",
        places.elapsed().as_secs_f64() * 1000.0
    );

    let managers = [
        tokio::spawn(manager(server.queue(LIMITS), "m1", run.clone())),
        tokio::spawn(manager(server.queue(LIMITS), "m2", run.clone())),
    ];
    let before = server.stats().await;
    let all = start_agents(&server, agents, LIMITS, &run);
    until(&run, jobs).await;
    let after = server.stats().await;
    let wall = (after.at - before.at).as_secs_f64();
    println!(
        "- done: {:.0} jobs/s with 7 reports each, all in {wall:.1} s; {}",
        jobs as f64 / wall,
        after.since(&before)
    );
    while queue.depth().await.unwrap().reports > 0 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let idle = server.stats().await;
    println!(
        "- words that two managers took: {} of {}; the others were of passing progress, left out while more than 10,000 waited",
        run.heard.load(Ordering::Relaxed),
        jobs * 7
    );
    tokio::time::sleep(Duration::from_secs(10)).await;
    let later = server.stats().await;
    println!("- with nothing to do: {}", later.since(&idle));
    drop(all);
    managers.iter().for_each(tokio::task::JoinHandle::abort);
}

/// Jobs come one after the other to agents that wait.
async fn stream(jobs: usize, agents: usize, pace: f64) {
    let server = Server::start();
    let queue = server.queue(LIMITS);
    let run = Run::new(Duration::from_secs(2));
    let managers = [
        tokio::spawn(manager(server.queue(LIMITS), "m1", run.clone())),
        tokio::spawn(manager(server.queue(LIMITS), "m2", run.clone())),
    ];
    let all = start_agents(&server, agents, LIMITS, &run);
    tokio::time::sleep(Duration::from_secs(5)).await;
    let before = server.stats().await;
    offer(&queue, orders(jobs, agents), &run, Some(pace)).await;
    let after = server.stats().await;
    until(&run, jobs).await;
    println!(
        "\n## A stream: {jobs} jobs, {pace:.0} a second, to {agents} agents that wait; the stand-in takes 2 s\n"
    );
    println!(
        "- from offer to claim: {}",
        percentiles(run.waits.lock().unwrap().clone())
    );
    println!("- meanwhile: {}", after.since(&before));
    drop(all);
    managers.iter().for_each(tokio::task::JoinHandle::abort);
}

/// One user queues 5,000 on one node, another one now and then a single save.
async fn neighbours() {
    let length = Duration::from_millis(200);
    let server = Server::start();
    let limits = Limits { node: 1, ..LIMITS };
    let queue = server.queue(limits);
    let run = Run::new(length);
    let many = (0..5000).map(|_| order("node-0000", "many")).collect();
    offer(&queue, many, &run, None).await;
    let manager = tokio::spawn(manager(server.queue(limits), "m", run.clone()));
    let all = start_agents(&server, 1, limits, &run);
    until(&run, 5).await;
    let mut waits = Vec::new();
    for _ in 0..25 {
        // Not in step with the others' ends.
        tokio::time::sleep(length.mul_f64(2.0 + rand::random::<f64>())).await;
        let single = order("node-0000", "single");
        let offered = Instant::now();
        run.offered.lock().unwrap().insert(single.job, offered);
        queue.offer(&single).await.unwrap();
        while run.offered.lock().unwrap().contains_key(&single.job) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        waits.push(offered.elapsed());
    }
    println!(
        "\n## A neighbour: one user has 5,000 jobs of 200 ms before a node that runs one at a time, another one saves once\n"
    );
    println!("- the single save waits: {}", percentiles(waits));
    drop(all);
    manager.abort();
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let number = |name: &str, otherwise: usize| -> usize {
        let at = arguments.iter().position(|argument| argument == name);
        at.and_then(|at| arguments.get(at + 1)?.parse().ok())
            .unwrap_or(otherwise)
    };
    let (jobs, agents) = (number("--jobs", 10_000), number("--agents", 1000));
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        backlog(jobs, agents).await;
        stream(jobs, agents, 200.0).await;
        neighbours().await;
    });
}
