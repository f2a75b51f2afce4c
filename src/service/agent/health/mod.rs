//! The health of an agent over HTTP, where an address is set for it: `/healthz`, `/readyz` and `/metrics`.
//!
//! Callers are not authenticated there, so a request costs no more than writing its answer: what it says was found by
//! the heartbeats and the listings that the agent makes anyway.

mod metrics;

use std::net::TcpListener;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::State as Extracted;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse as _, Response};
use axum::routing::get;
use tokio_util::sync::CancellationToken;

use super::Agent;
use crate::common::escape;
use crate::service::connections::{self, Bound, ConnectionLimits, ConnectionTable};
use crate::service::doctor;
use crate::service::health;
use crate::service::queue::HEARTBEAT_LOST;

pub(super) use metrics::{End, Metrics};

/// Maximum number of connections, and of those from one address: probes and a few collectors of metrics.
const CONNECTIONS: usize = 64;
const CONNECTIONS_PER_PEER: usize = 16;
/// Time without a finished listing, beyond the interval between two, after which the node's directories count as not
/// readable: a file system that hangs.
const LISTING_LATE: Duration = Duration::from_secs(60);
/// Time without a round of heartbeats, successful or not, after which the process counts as dead.
const HEARTBEATS_STOPPED: Duration = Duration::from_secs(120);
/// Maximum length of a reason in the log, in characters.
const MAX_REASON: usize = 300;

/// What the loops of an agent have found.
#[derive(Debug)]
pub(super) struct Findings(Mutex<Latest>);

#[derive(Debug)]
struct Latest {
    /// The last round of heartbeats, and whether the queue took it.
    round: (Instant, bool),
    /// Time of the last heartbeat that the queue took.
    heard: Option<Instant>,
    /// The last listing, and what keeps the agent from saving as of then.
    listed: Option<(Instant, Vec<&'static str>)>,
    started: Instant,
}

impl Default for Findings {
    fn default() -> Self {
        let started = Instant::now();
        Self(Mutex::new(Latest {
            round: (started, false),
            heard: None,
            listed: None,
            started,
        }))
    }
}

impl Findings {
    fn latest(&self) -> MutexGuard<'_, Latest> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records whether the queue took a heartbeat.
    pub(super) fn heartbeat(&self, taken: bool) {
        let mut latest = self.latest();
        let now = Instant::now();
        latest.round = (now, taken);
        if taken {
            latest.heard = Some(now);
        }
    }

    /// Records a listing and what keeps the agent from saving. Reasons are logged when they change.
    fn listed(&self, obstacles: &[doctor::Finding]) {
        let mut names: Vec<&'static str> = obstacles.iter().map(|finding| finding.check).collect();
        names.sort_unstable();
        names.dedup();
        let mut latest = self.latest();
        let known = latest.listed.as_ref().map(|(_, names)| names);
        if known.map_or(!names.is_empty(), |known| *known != names) {
            for obstacle in obstacles {
                let found = escape::limited(&obstacle.found, MAX_REASON);
                tracing::warn!(
                    check = obstacle.check,
                    found,
                    advice = obstacle.advice,
                    "not ready"
                );
            }
            if names.is_empty() {
                tracing::info!("rights and directories of runtimes are as needed again");
            }
        }
        latest.listed = Some((Instant::now(), names));
    }

    /// Returns whether the queue took the last heartbeat, and the seconds since it took one, or since the start.
    fn queue(&self) -> (bool, f64) {
        let latest = self.latest();
        let since = latest.heard.unwrap_or(latest.started);
        (latest.round.1, since.elapsed().as_secs_f64())
    }

    /// Returns the time since the last round of heartbeats.
    fn silence(&self) -> Duration {
        self.latest().round.0.elapsed()
    }

    fn missing(&self, listings_every: Duration) -> Vec<String> {
        self.latest().missing(listings_every)
    }
}

impl Latest {
    /// Returns what is missing. `listings_every` is the interval between two listings.
    fn missing(&self, listings_every: Duration) -> Vec<String> {
        let mut missing = Vec::new();
        let (at, taken) = self.round;
        if !taken || at.elapsed() > HEARTBEAT_LOST {
            missing.push("queue: it cannot be reached, see the log".to_owned());
        }
        match &self.listed {
            None => missing.push("containers: they have not been listed yet".to_owned()),
            Some((at, _)) if at.elapsed() > listings_every + LISTING_LATE => {
                missing.push("containers: listing them does not end".to_owned());
            }
            Some((_, names)) => {
                let refused = |name: &&str| format!("{name}: not as needed, see the log");
                missing.extend(names.iter().map(refused));
            }
        }
        missing
    }
}

/// Looks at what an agent needs to save. Reads directories, and waits for them.
pub(super) fn look(agent: &Agent) {
    let obstacles = doctor::obstacles(&agent.options.roots, saves_live(&agent.options.flags));
    agent.findings.listed(&obstacles);
    if agent.options.health.is_some() {
        agent.metrics.kept(agent.options.state_dir.as_deref());
    }
}

/// Returns whether containers are saved while they run on, according to the administrator's flags of `commit`.
fn saves_live(flags: &[String]) -> bool {
    let separate = flags.windows(2).any(|two| two == ["--pause", "none"]);
    !separate && !flags.iter().any(|flag| flag == "--pause=none")
}

#[derive(Clone)]
struct Server(Arc<Inner>);

struct Inner {
    agent: Arc<Agent>,
    connections: ConnectionTable,
    cancel: CancellationToken,
}

impl connections::Served for Server {
    fn connections(&self) -> &ConnectionTable {
        &self.0.connections
    }

    fn cancel(&self) -> &CancellationToken {
        &self.0.cancel
    }
}

impl Server {
    fn missing(&self) -> Vec<String> {
        let agent = &self.0.agent;
        let mut missing = agent.findings.missing(agent.options.inventory_every);
        if agent.cancel.is_cancelled() {
            missing.push("agent: it is about to end".to_owned());
        }
        missing
    }
}

/// Serves on `listener` until `cancel` is set.
///
/// Fails with the error of the operating system if the socket cannot be used.
pub(super) fn serve(
    agent: Arc<Agent>,
    listener: &TcpListener,
    cancel: CancellationToken,
) -> std::io::Result<impl Future<Output = ()> + use<>> {
    let listener = listener.try_clone()?;
    listener.set_nonblocking(true)?;
    let bound = Bound::Tcp(tokio::net::TcpListener::from_std(listener)?);
    let limits = ConnectionLimits {
        connections: CONNECTIONS,
        connections_per_peer: CONNECTIONS_PER_PEER,
        ..ConnectionLimits::default()
    };
    let connections = ConnectionTable::new(limits, connections::open_files());
    let server = Server(Arc::new(Inner {
        agent,
        connections,
        cancel,
    }));
    let router = Router::new()
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz))
        .route("/metrics", get(exposition))
        .fallback(async || StatusCode::NOT_FOUND)
        .with_state(server.clone());
    Ok(connections::serve(bound, router, server))
}

/// Reports that the process works: its heartbeats go on, whether the queue takes them or not.
async fn healthz(Extracted(server): Extracted<Server>) -> Response {
    let mut missing = Vec::new();
    if server.0.agent.findings.silence() > HEARTBEATS_STOPPED {
        missing.push("heartbeat: it has stopped".to_owned());
    }
    health::Health::answer(missing).into_response()
}

/// Reports whether saves can be made, and what is missing.
async fn readyz(Extracted(server): Extracted<Server>) -> Response {
    health::Health::answer(server.missing()).into_response()
}

async fn exposition(Extracted(server): Extracted<Server>, headers: HeaderMap) -> Response {
    let agent = &server.0.agent;
    let (queue_up, lag) = agent.findings.queue();
    agent.metrics.state(&metrics::State {
        ready: server.missing().is_empty(),
        queue_up,
        lag,
        running: agent.running().len(),
        sessions: agent.inventory.counts(),
    });
    health::metrics(&headers, agent.metrics.text())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn obstacle(check: &'static str) -> doctor::Finding {
        doctor::Finding {
            check,
            state: doctor::State::Failed,
            found: "nothing".to_owned(),
            advice: None,
        }
    }

    #[test]
    fn an_agent_is_ready_when_queue_and_node_are_there() {
        let findings = Findings::default();
        let missing = || findings.missing(Duration::from_secs(10));
        assert_eq!(missing().len(), 2, "{:?}", missing());
        findings.heartbeat(true);
        findings.listed(&[]);
        assert_eq!(missing(), [""; 0]);
        findings.listed(&[
            obstacle("capabilities"),
            obstacle("capabilities"),
            obstacle("proc"),
        ]);
        assert_eq!(
            missing(),
            [
                "capabilities: not as needed, see the log",
                "proc: not as needed, see the log"
            ]
        );
        findings.listed(&[]);
        findings.heartbeat(false);
        assert_eq!(missing(), ["queue: it cannot be reached, see the log"]);
        findings.heartbeat(true);
        let ago = |seconds| Instant::now().checked_sub(Duration::from_secs(seconds));
        findings.latest().round.0 = ago(30).unwrap();
        findings.latest().listed = ago(80).map(|at| (at, Vec::new()));
        assert_eq!(
            missing(),
            [
                "queue: it cannot be reached, see the log",
                "containers: listing them does not end"
            ]
        );
    }

    #[test]
    fn saves_without_a_pause_need_fewer_rights() {
        let flags =
            |flags: &[&str]| -> Vec<String> { flags.iter().map(|f| (*f).to_owned()).collect() };
        assert!(saves_live(&flags(&["--pause", "live", "none"])));
        assert!(!saves_live(&flags(&["--quiet", "--pause", "none"])));
        assert!(!saves_live(&flags(&["--pause=none"])));
        assert!(saves_live(&[]));
    }
}
