//! The environment of a scenario: a queue of either implementation, and a clock that the test can advance.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use upperdeck::service::job::{
    JobId, Kind, Node, Order, Outcome as Ending, Report, Saved, Session, Update, now_ms,
};
use upperdeck::service::queue::{Claim, ClaimState, Clock, Limits, Local, Queue, Settings};

/// Runs each scenario with both implementations.
macro_rules! on_both {
    ($($scenario:ident: $limits:expr;)*) => {
        mod local {
            use super::*;
            $(#[tokio::test]
            async fn $scenario() -> super::Outcome {
                super::$scenario(World::local($limits)).await
            })*
        }
        mod redis {
            use super::*;
            $(#[tokio::test]
            async fn $scenario() -> super::Outcome {
                match World::redis($limits) {
                    Some(world) => super::$scenario(world).await,
                    None => Ok(()),
                }
            })*
        }
    };
}

pub type Outcome = Result<(), Box<dyn std::error::Error>>;

/// No limits.
pub const NO_LIMITS: Limits = Limits {
    user: 0,
    node: 0,
    registry: 0,
};
/// Does not wait.
pub const NOW: Duration = Duration::ZERO;
/// Longer than any test takes.
pub const LONG: Duration = Duration::from_secs(300);

pub struct World {
    pub queue: Queue,
    /// Duration of a lease.
    pub lease: Duration,
    /// How long a manager may leave a report unacknowledged.
    pub ack_timeout: Duration,
    pub clock: Clock,
    /// Resources that have to outlive the queue.
    pub _kept: Box<dyn std::any::Any + Send>,
}

impl World {
    pub fn local(limits: Limits) -> Self {
        let settings = settings();
        let queue = Queue::Local(Local::with(limits, settings.clone()));
        Self::of(queue, settings, Box::new(()))
    }

    pub fn of(queue: Queue, settings: Settings, kept: Box<dyn std::any::Any + Send>) -> Self {
        Self {
            queue,
            lease: settings.lease,
            ack_timeout: settings.ack_timeout,
            clock: settings.clock,
            _kept: kept,
        }
    }

    pub fn pass(&self, time: Duration) {
        self.clock.advance(time);
    }

    /// Advances the clock beyond the end of every lease that is not renewed.
    pub fn pass_lease(&self) {
        self.pass(self.lease + Duration::from_secs(1));
    }

    /// Offers an order of `user` for `node`.
    pub async fn offer(&self, node: &str, user: &str) -> Result<Order, Box<dyn std::error::Error>> {
        let order = order(node, user);
        self.queue.offer(&order).await?;
        Ok(order)
    }

    /// Offers an autosave of `user` for `node`.
    pub async fn offer_autosave(
        &self,
        node: &str,
        user: &str,
    ) -> Result<Order, Box<dyn std::error::Error>> {
        let order = Order {
            autosave: true,
            ..order(node, user)
        };
        self.queue.offer(&order).await?;
        Ok(order)
    }

    /// Claims at most one order for `agent` of `node` without waiting.
    pub async fn claim(
        &self,
        node: &str,
        agent: &str,
    ) -> Result<Option<Claim>, Box<dyn std::error::Error>> {
        let mut got = self.queue.claim(node, agent, 1, NOW).await?;
        assert!(got.len() <= 1);
        Ok(got.pop())
    }

    /// Claims as [`World::claim`] does. Fails if there is no order.
    pub async fn get(&self, node: &str, agent: &str) -> Result<Claim, Box<dyn std::error::Error>> {
        Ok(self.claim(node, agent).await?.ok_or("no order")?)
    }

    /// Completes `claim` successfully, and lets the managers acknowledge the report.
    pub async fn finish(&self, claim: &Claim) -> Outcome {
        let hold = self.queue.complete(claim, &succeeded(claim)).await?;
        assert_eq!(hold, ClaimState::Held);
        self.take_all().await.map(drop)
    }

    /// Returns and acknowledges all unread reports, as a manager would.
    pub async fn take_all(&self) -> Result<Vec<Report>, Box<dyn std::error::Error>> {
        let got = self.queue.reports("m", 10_000, NOW).await?;
        let entries: Vec<_> = got.iter().map(|one| one.entry.clone()).collect();
        self.queue.acknowledge(&entries).await?;
        Ok(got.into_iter().map(|one| one.report).collect())
    }
}

/// Returns settings with a lease that does not end even on a slow machine, and a short time until a manager counts as
/// dead.
pub fn settings() -> Settings {
    Settings {
        lease: Duration::from_secs(600),
        ack_timeout: Duration::from_millis(400),
        ..Settings::default()
    }
}

/// Returns an order that is valid for a day.
pub fn order(node: &str, user: &str) -> Order {
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

pub fn report(claim: &Claim, seq: u64, update: Update) -> Report {
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

pub fn ended(claim: &Claim, outcome: Ending) -> Report {
    static SEQ: AtomicU64 = AtomicU64::new(1000);
    let seq = SEQ.fetch_add(1, Ordering::Relaxed);
    report(claim, seq, Update::Ended { outcome })
}

pub fn succeeded(claim: &Claim) -> Report {
    let saved = Saved {
        reference: format!("{}@sha256:{:064x}", claim.order.destination, 7),
        digest: format!("sha256:{:064x}", 7),
        layer_bytes: 1,
        image_bytes: 2,
        sent_bytes: 1,
        entries: 1,
        pause_ms: Some(1.5),
        seconds: 2.25,
        ..Saved::default()
    };
    ended(claim, Ending::Succeeded { saved })
}

pub fn node(name: &str) -> Node {
    Node {
        name: name.to_owned(),
        version: "0.1.0".to_owned(),
        started_ms: now_ms(),
        at_ms: now_ms(),
        ..Node::default()
    }
}

pub fn session(node: &str, id: &str) -> Session {
    Session {
        id: id.to_owned(),
        node: node.to_owned(),
        owner: Some("ada".to_owned()),
        runtime: "containerd".to_owned(),
        kind: Kind::Jupyter,
        ..Session::default()
    }
}
