//! The queue between managers and nodes. It delivers orders to agents and reports to managers, and its leases determine
//! which agent works on which job.
//!
//! The record is authoritative and the queue only delivers: it may lose all its data, in which case the managers offer
//! the unfinished jobs again. Delivery is at least once; the fence of a claim makes the effect happen once. A job waits
//! in the list of its user on its node until it is admitted, so that a user with fifty jobs does not delay a user with
//! one. Autosaves are a class of their own, in which users take turns, too: one is admitted only while no other order waits
//! on its node.

mod local;
mod redis;

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::common::escape;
use crate::service::job::{Answer, JobId, Node, Order, Question, Report, Session};

pub use self::local::Local;
pub use self::redis::{Redis, ServerInfo, examine};

/// Duration of a lease. A claim that is not renewed within it is lost.
pub(crate) const LEASE: Duration = Duration::from_secs(30);
/// Interval at which an agent renews a claim.
pub const RENEW_EVERY: Duration = Duration::from_secs(10);
/// Interval at which an agent sends a heartbeat.
pub const HEARTBEAT_EVERY: Duration = Duration::from_secs(5);
/// Time since the last heartbeat after which an agent counts as lost.
pub const HEARTBEAT_LOST: Duration = Duration::from_secs(20);
/// How long a node is remembered after its last heartbeat.
const DAY: Duration = Duration::from_secs(24 * 60 * 60);
/// Number of leases, after the end of one under which the tag was being set, during which it is unknown whether the tag
/// was set.
const TAG_DOUBT: u32 = 4;

/// Settings that differ from the default only in tests.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Prefix of every key in Redis. The part in braces is the hash tag that keeps the keys of one queue in one slot of
    /// a cluster.
    pub prefix: String,
    /// Duration of a lease.
    pub lease: Duration,
    /// Time after which a report that a manager has not acknowledged is delivered to another manager.
    pub ack_timeout: Duration,
    /// Clock of the queue.
    pub clock: Clock,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            prefix: "{upperdeck}:".to_owned(),
            lease: LEASE,
            ack_timeout: LEASE,
            clock: Clock::default(),
        }
    }
}

/// The clock of a queue: that of this process or of Redis, plus an offset for tests. Clones share the offset.
#[derive(Clone, Debug, Default)]
pub struct Clock(Arc<AtomicU64>);

impl Clock {
    /// Advances the clock, so that tests need not wait. Calls that are already blocked do not notice.
    pub fn advance(&self, time: Duration) {
        self.0.fetch_add(time.as_millis() as u64, Ordering::SeqCst);
    }

    fn offset(&self) -> Duration {
        Duration::from_millis(self.0.load(Ordering::SeqCst))
    }
}

/// Maximum number of concurrent saves. 0 means no limit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Saves of one user, on all nodes.
    pub user: u32,
    /// Saves on one node; an agent may run fewer.
    pub node: u32,
    /// Saves into one registry (the host of the destination), from all nodes.
    pub registry: u32,
}

impl Limits {
    /// Returns the limits for an order: autosaves leave one place of each limit above 1 to other saves.
    fn of(self, order: &Order) -> Self {
        let left = |limit: u32| {
            if order.autosave && limit > 1 {
                limit - 1
            } else {
                limit
            }
        };
        Self {
            user: left(self.user),
            node: left(self.node),
            registry: left(self.registry),
        }
    }
}

/// An order that an agent holds.
#[derive(Clone, Debug)]
pub struct Claim {
    /// The order. Its signature, node and expiry have been checked.
    pub order: Order,
    /// Fencing token, greater than that of any earlier claim of this job.
    pub fence: u64,
}

/// State of a claim after a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ClaimState {
    /// The claim is held for another [`LEASE`].
    Held,
    /// The claim is held, but the job was cancelled: the agent has to stop it and call [`Queue::complete`] with the
    /// outcome cancelled.
    Cancelled,
    /// The claim is held, and the save was asked to hurry. The queue's word alone is no reason to raise its priority: the
    /// agent asks a manager.
    Hurried,
    /// Another consumer holds the job, or the queue no longer knows it: the agent has to stop it and report nothing.
    Lost,
}

/// Result of [`Queue::offer`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Offered {
    /// The job was added.
    New,
    /// The queue already had the job, waiting or held.
    Known,
}

/// Result of [`Queue::withdraw`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Withdrawn {
    /// The job was removed before an agent claimed it.
    Removed,
    /// An agent holds the job and will be notified.
    CancelRequested,
    /// The agent is setting the tag, or its final report is on the way: the job will succeed or fail by itself.
    TooLate,
    /// The queue does not know the job.
    Unknown,
}

/// Position of a job in the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Number of saves that will be admitted before it on its node.
    Waiting(u64),
    /// An agent holds the job.
    Held {
        /// Remaining time of the lease in milliseconds. 0 if the lease has ended and the job has not been taken over
        /// yet, or if the final report has not been acknowledged yet.
        lease_ms: u64,
    },
}

/// Number of items in the queue, for metrics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Depth {
    /// Orders that wait.
    pub waiting: u64,
    /// Orders that agents hold.
    pub held: u64,
    /// Reports that no manager has acknowledged yet.
    pub reports: u64,
}

/// A report and its identifier in the queue.
#[derive(Clone, Debug)]
pub struct Delivered {
    /// Identifier to pass to [`Queue::acknowledge`].
    pub entry: String,
    /// The agent's report. Its signature has been checked; the fence has to be checked against the record.
    pub report: Report,
}

/// Why the queue cannot be used. Every error may be temporary.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The server cannot be reached, or the connection broke.
    #[error("the queue at {at} cannot be reached: {reason}")]
    Unreachable {
        /// Host and port, without credentials.
        at: String,
        /// Error of the client.
        reason: String,
    },
    /// The server returned an error.
    #[error("the queue at {at} refuses: {reason}")]
    Refused {
        /// Host and port, without credentials.
        at: String,
        /// Error message of the server.
        reason: String,
    },
    /// The URL or a key is invalid.
    #[error("{0}")]
    Unusable(String),
}

/// Maximum size of the record of one session in bytes of JSON. An agent sends far less per session.
const MAX_RECORD: usize = 64 << 10;

/// Returns the session, shortened to the maximum size of a record if necessary, so that the mounts and names of one
/// tenant do not burden all others.
fn truncated_session(session: &Session) -> Cow<'_, Session> {
    let length =
        |session: &Session| serde_json::to_vec(session).map_or(usize::MAX, |json| json.len());
    // The difference leaves space for the signed envelope.
    if length(session) <= MAX_RECORD - 1024 {
        return Cow::Borrowed(session);
    }
    let short = |text: &Option<String>| text.as_deref().map(|text| escape::limited(text, 256));
    Cow::Owned(Session {
        id: session.id.clone(),
        node: session.node.clone(),
        owner: session.owner.clone().filter(|owner| owner.len() <= 1024),
        namespace: short(&session.namespace),
        pod: short(&session.pod),
        container: short(&session.container),
        default_container: short(&session.default_container),
        runtime: session.runtime.clone(),
        image: short(&session.image),
        unsaved: Vec::new(),
        unsaved_more: session.unsaved_more + session.unsaved.len() as u64,
        problem: Some(
            "more is mounted in it, or its names are longer, than is told here".to_owned(),
        ),
        kind: session.kind,
        category: session.category,
        started_ms: session.started_ms,
        ended: session.ended.clone(),
        upper_bytes: session.upper_bytes,
        upper_entries: session.upper_entries,
        next: session.next.clone(),
        packages: session.packages.clone().map(|list| list.limited(0, 0)),
        look: session.look,
        autosave: session.autosave,
        at_end: session.at_end,
        auxiliary: session.auxiliary,
    })
}

/// Returns the host and port of the registry in `destination`; `oci` for destinations in the file system.
pub(crate) fn registry_of(destination: &str) -> &str {
    let rest = destination.strip_prefix("docker://").unwrap_or(destination);
    if rest.starts_with("oci:") || rest.starts_with("oci-archive:") {
        return "oci";
    }
    rest.split('/').next().unwrap_or_default()
}

/// The queue. Clones refer to the same queue.
#[derive(Clone)]
pub enum Queue {
    /// A queue in this process.
    Local(Local),
    /// A queue in Redis or Valkey, 6.2 or later.
    Redis(Redis),
}

/// Dispatches a call to the implementation.
macro_rules! dispatch {
    ($queue:expr, $call:ident ( $($argument:expr),* )) => {
        match $queue {
            Queue::Local(queue) => queue.$call($($argument),*).await,
            Queue::Redis(queue) => queue.$call($($argument),*).await,
        }
    };
}

/// Calls for managers.
impl Queue {
    /// Returns where the queue is, without credentials: host and port or the path of a socket.
    pub(crate) fn address(&self) -> &str {
        match self {
            Self::Redis(redis) => redis.address(),
            Self::Local(_) => "this process",
        }
    }

    /// Adds `order` to the queue of its node, unless the queue already has the job. A repeated call only replaces a
    /// waiting order, which keeps its position; managers use this to renew an order before it expires. A job whose
    /// final report no manager has acknowledged with [`Queue::acknowledge`] still counts as known, except for a later
    /// attempt.
    pub async fn offer(&self, order: &Order) -> Result<Offered, Error> {
        dispatch!(self, offer(order))
    }

    /// Withdraws a job, whether it waits or an agent holds it. A claim whose lease has ended counts as not held.
    pub async fn withdraw(&self, job: JobId) -> Result<Withdrawn, Error> {
        dispatch!(self, withdraw(job))
    }

    /// Marks a job as in a hurry, whether it waits or an agent holds it. Returns `false` if the queue does not know it.
    pub async fn hurry(&self, job: JobId) -> Result<bool, Error> {
        dispatch!(self, hurry(job))
    }

    /// Returns the position of each of `jobs`; `None` if the queue does not know the job, in which case the manager has
    /// to offer it again. The manager must read the record in between: the outcome of a job is recorded before the
    /// queue forgets it.
    pub async fn places(&self, jobs: &[JobId]) -> Result<Vec<Option<Place>>, Error> {
        dispatch!(self, places(jobs))
    }

    /// Returns at most `most` reports and waits up to `wait` for the first one. Each report is delivered to one
    /// manager, and to another one if the first does not call [`Queue::acknowledge`].
    pub async fn reports(
        &self,
        manager: &str,
        most: usize,
        wait: Duration,
    ) -> Result<Vec<Delivered>, Error> {
        dispatch!(self, reports(manager, most, wait))
    }

    /// Acknowledges reports, after they have been recorded.
    pub async fn acknowledge(&self, entries: &[String]) -> Result<(), Error> {
        dispatch!(self, acknowledge(entries))
    }

    /// Returns questions of agents and waits up to `wait` for the first one. Each question is delivered to one manager,
    /// once; an agent that receives no answer asks again.
    pub async fn questions(&self, wait: Duration) -> Result<Vec<Question>, Error> {
        dispatch!(self, questions(wait))
    }

    /// Sends the answer to a question. The agent may have stopped waiting for it.
    pub async fn answer(&self, answer: &Answer) -> Result<(), Error> {
        dispatch!(self, answer(answer))
    }

    /// Returns the latest heartbeat of each node that sent one within a day.
    pub async fn nodes(&self) -> Result<Vec<Node>, Error> {
        dispatch!(self, nodes())
    }

    /// Returns the time since the last heartbeat of each node. It is measured by the queue's clock, because an agent's
    /// timestamps are not trusted.
    pub async fn heartbeat_ages(&self) -> Result<HashMap<String, Duration>, Error> {
        dispatch!(self, heartbeat_ages())
    }

    /// Returns the sessions of the nodes that sent a heartbeat within [`HEARTBEAT_LOST`].
    pub async fn sessions(&self) -> Result<Vec<Session>, Error> {
        dispatch!(self, sessions())
    }

    /// Returns the number of items in the queue.
    pub async fn depth(&self) -> Result<Depth, Error> {
        dispatch!(self, depth())
    }

    /// Checks whether the queue responds.
    pub async fn ping(&self) -> Result<(), Error> {
        dispatch!(self, ping())
    }
}

/// Calls for agents.
impl Queue {
    /// Takes over earlier claims of this node: those whose lease has ended and, if `agent` is the consumer that
    /// appeared last on this node, those of its predecessors at once. The caller has to make sure beforehand that the
    /// predecessors' processes have ended. Claims beyond the limits are left for a later call.
    pub async fn reclaim(&self, node: &str, agent: &str) -> Result<Vec<Claim>, Error> {
        dispatch!(self, reclaim(node, agent))
    }

    /// Admits and claims at most `most` orders and waits up to `wait` for the first one. `agent` is the consumer name
    /// of this process. Claims of this node whose lease has ended come first, including the caller's own: a claim for a
    /// job that the caller still works on means that its earlier claim is lost.
    pub async fn claim(
        &self,
        node: &str,
        agent: &str,
        most: usize,
        wait: Duration,
    ) -> Result<Vec<Claim>, Error> {
        dispatch!(self, claim(node, agent, most, wait))
    }

    /// Renews the claim for another [`LEASE`]. A claim whose lease has ended is revived if no other consumer has taken
    /// the job over and the limits permit it.
    pub async fn renew(&self, claim: &Claim) -> Result<ClaimState, Error> {
        dispatch!(self, renew(claim))
    }

    /// Sends a question to the managers and waits up to `wait` for the answer to exactly this question. Returns `None`
    /// if there was none. An answer must be signed by a manager, so the queue can withhold an answer but cannot forge
    /// one.
    pub async fn ask(&self, question: &Question, wait: Duration) -> Result<Option<Answer>, Error> {
        dispatch!(self, ask(question, wait))
    }

    /// Confirms the claim once, when everything but the tag has been delivered. After [`ClaimState::Held`] the agent may set
    /// the tag, and the job can no longer be cancelled.
    pub async fn confirm(&self, claim: &Claim) -> Result<ClaimState, Error> {
        dispatch!(self, confirm(claim))
    }

    /// Sends a report of a running job. The final report goes to [`Queue::complete`].
    pub async fn report(&self, claim: &Claim, report: &Report) -> Result<ClaimState, Error> {
        dispatch!(self, report(claim, report))
    }

    /// Sends the final report, [`Update::Ended`](crate::service::job::Update::Ended) or
    /// [`Update::GivenBack`](crate::service::job::Update::GivenBack), and ends the claim; both happen or neither.
    /// [`ClaimState::Held`] means success; a repeated call has no further effect.
    pub async fn complete(&self, claim: &Claim, report: &Report) -> Result<ClaimState, Error> {
        dispatch!(self, complete(claim, report))
    }

    /// Sends a heartbeat with the node's sessions; `None` if they have not changed.
    pub async fn heartbeat(&self, node: &Node, sessions: Option<&[Session]>) -> Result<(), Error> {
        dispatch!(self, heartbeat(node, sessions))
    }
}
