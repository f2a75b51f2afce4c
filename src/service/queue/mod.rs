//! Between the managers and the nodes: orders go out, reports come back, leases say who works on what.
//!
//! The record is the truth, this is the delivery: it may lose everything, and the managers put back what is not done.
//! Delivery is at least once; the fence of a claim makes the effect once. A job waits in its user's list of its node
//! until it is admitted, so that who queues fifty does not stand in front of who queues one.

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
pub use self::redis::{Examined, Redis, examine};

/// A claim that is not renewed for so long is lost.
pub const LEASE: Duration = Duration::from_secs(30);
/// How often a claim is renewed.
pub const RENEW_EVERY: Duration = Duration::from_secs(10);
/// How often an agent says that it is there.
pub const HEARTBEAT_EVERY: Duration = Duration::from_secs(5);
/// An agent that has not been heard of for so long is not there.
pub const HEARTBEAT_LOST: Duration = Duration::from_secs(20);
/// For so long a node is remembered after its last heartbeat.
const DAY: Duration = Duration::from_secs(24 * 60 * 60);
/// For so many leases after the end of one under which the tag was being put on, nobody can say whether it is on.
const TAG_DOUBT: u32 = 4;

/// What is the same everywhere but in tests. The default is what serves.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Before every key in Redis. What stands in braces keeps the keys of one queue in one place of a cluster.
    pub prefix: String,
    /// A claim that is not renewed for so long is lost.
    pub lease: Duration,
    /// A report that a manager has not taken for so long goes to another one.
    pub patience: Duration,
    /// What time it is.
    pub clock: Clock,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            prefix: "{upperdeck}:".to_owned(),
            lease: LEASE,
            patience: LEASE,
            clock: Clock::default(),
        }
    }
}

/// The time of a queue: that of this process or of Redis, and so far ahead of it as somebody put it. Clones are the same
/// one.
#[derive(Clone, Debug, Default)]
pub struct Clock(Arc<AtomicU64>);

impl Clock {
    /// Puts it forward, for tests that do not want to wait. Who waits already does not notice.
    pub fn advance(&self, time: Duration) {
        self.0.fetch_add(time.as_millis() as u64, Ordering::SeqCst);
    }

    fn ahead(&self) -> Duration {
        Duration::from_millis(self.0.load(Ordering::SeqCst))
    }
}

/// How many saves may run at once. A limit of 0 is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Of one user, on all nodes.
    pub user: u32,
    /// On one node; an agent may take fewer.
    pub node: u32,
    /// Into one registry (the host of the destination), from all nodes.
    pub registry: u32,
}

/// An order that an agent holds.
#[derive(Clone, Debug)]
pub struct Claim {
    /// What to do. Its signature, node and expiry have been checked.
    pub order: Order,
    /// The fencing token: greater than that of any earlier claim of this job.
    pub fence: u64,
}

/// What is left of a claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hold {
    /// It is ours for another [`LEASE`].
    Held,
    /// It is ours, and the job is not wanted any more: stop, then [`Queue::complete`] it as cancelled.
    Cancelled,
    /// Somebody else has it, or nobody knows it any more: stop, and say nothing.
    Lost,
}

/// What became of an offer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Offered {
    /// It waits now.
    New,
    /// It was there already, waiting or held.
    Known,
}

/// What became of a withdrawal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Withdrawn {
    /// Nobody had it, and nobody will.
    Taken,
    /// An agent has it and is told.
    Told,
    /// The agent is putting the tag on, or its last word is on its way: it will succeed, or fail by itself.
    TooLate,
    /// The queue does not know it.
    Unknown,
}

/// Where a job is in the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// So many saves are before it on its node, counted as they will be admitted.
    Waiting(u64),
    /// An agent has it; the lease ends after this many milliseconds.
    Held {
        /// Milliseconds; 0: it has ended, and nobody took the job over yet, or the last word about it is among the
        /// reports.
        lease_ms: u64,
    },
}

/// How full it is, for metrics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Depth {
    /// Orders that wait.
    pub waiting: u64,
    /// Orders that agents hold.
    pub held: u64,
    /// Reports that no manager has taken yet.
    pub reports: u64,
}

/// A report with the queue's name for it.
#[derive(Clone, Debug)]
pub struct Delivered {
    /// What to say to [`Queue::taken`].
    pub entry: String,
    /// What the agent said. Its signature has been checked; the fence is the record's to check.
    pub report: Report,
}

/// Why the queue cannot be used. All of it may pass.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not there, or it breaks off.
    #[error("the queue at {at} cannot be reached: {reason}")]
    Unreachable {
        /// Host and port, no credentials.
        at: String,
        /// What the client says.
        reason: String,
    },
    /// It answers what it should not.
    #[error("the queue at {at} refuses: {reason}")]
    Refused {
        /// Host and port, no credentials.
        at: String,
        /// Its words.
        reason: String,
    },
    /// A URL or key that cannot be used.
    #[error("{0}")]
    Unusable(String),
}

/// The longest record of one session, in bytes of JSON. An agent tells far less of each.
const MAX_RECORD: usize = 64 << 10;

/// The session, with no more said of it than a record holds: one tenant's mounts and names do not become everyone's load.
fn fitting(session: &Session) -> Cow<'_, Session> {
    let length =
        |session: &Session| serde_json::to_vec(session).map_or(usize::MAX, |json| json.len());
    // Some room for what is signed with it.
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
        upper_bytes: session.upper_bytes,
        upper_entries: session.upper_entries,
        next: session.next.clone(),
    })
}

/// The host into which `destination` goes, with its port; `oci` for what lies in files.
fn registry_of(destination: &str) -> &str {
    let rest = destination.strip_prefix("docker://").unwrap_or(destination);
    if rest.starts_with("oci:") || rest.starts_with("oci-archive:") {
        return "oci";
    }
    rest.split('/').next().unwrap_or_default()
}

/// The queue. Clones are the same one.
#[derive(Clone)]
pub enum Queue {
    /// In this process.
    Local(Local),
    /// Redis or Valkey, 6.2 and later.
    Redis(Redis),
}

/// Calls the same on whichever it is.
macro_rules! on {
    ($queue:expr, $call:ident ( $($argument:expr),* )) => {
        match $queue {
            Queue::Local(queue) => queue.$call($($argument),*).await,
            Queue::Redis(queue) => queue.$call($($argument),*).await,
        }
    };
}

/// For managers.
impl Queue {
    /// Lets `order` wait for its node, unless the job is there already. A second time it does nothing but replace what
    /// waits, which keeps its place: so an order is renewed before it expires. A job whose last word no manager has
    /// [`Queue::taken`] yet is there too, for any but a later attempt.
    pub async fn offer(&self, order: &Order) -> Result<Offered, Error> {
        on!(self, offer(order))
    }

    /// Takes a job back, whoever has it. A claim of which the lease has ended is nobody's.
    pub async fn withdraw(&self, job: JobId) -> Result<Withdrawn, Error> {
        on!(self, withdraw(job))
    }

    /// Where each of `jobs` is; none: the queue does not know it, and the manager has to offer it again. It reads the
    /// record in between: what ended meanwhile is in there before the queue forgets it.
    pub async fn places(&self, jobs: &[JobId]) -> Result<Vec<Option<Place>>, Error> {
        on!(self, places(jobs))
    }

    /// The next reports, at most `most`; waits up to `wait` for the first. Each goes to one manager, and to another one
    /// if that does not say [`Queue::taken`].
    pub async fn reports(
        &self,
        manager: &str,
        most: usize,
        wait: Duration,
    ) -> Result<Vec<Delivered>, Error> {
        on!(self, reports(manager, most, wait))
    }

    /// These reports are in the record.
    pub async fn taken(&self, entries: &[String]) -> Result<(), Error> {
        on!(self, taken(entries))
    }

    /// What agents ask; waits up to `wait` for the first. Each question comes to one manager, once: who hears no answer
    /// asks anew.
    pub async fn questions(&self, wait: Duration) -> Result<Vec<Question>, Error> {
        on!(self, questions(wait))
    }

    /// Answers a question. Nobody need wait for it any more.
    pub async fn answer(&self, answer: &Answer) -> Result<(), Error> {
        on!(self, answer(answer))
    }

    /// The nodes that were heard of within a day, with their last heartbeats.
    pub async fn nodes(&self) -> Result<Vec<Node>, Error> {
        on!(self, nodes())
    }

    /// For how long each node was not heard of, by the queue's own clock: what an agent says of the time is its own.
    pub async fn silences(&self) -> Result<HashMap<String, Duration>, Error> {
        on!(self, silences())
    }

    /// The sessions of the nodes that were heard of within [`HEARTBEAT_LOST`].
    pub async fn sessions(&self) -> Result<Vec<Session>, Error> {
        on!(self, sessions())
    }

    /// How full it is.
    pub async fn depth(&self) -> Result<Depth, Error> {
        on!(self, depth())
    }

    /// Whether it answers.
    pub async fn ping(&self) -> Result<(), Error> {
        on!(self, ping())
    }
}

/// For agents.
impl Queue {
    /// Takes over what this node's agents held before: claims of which the lease has ended and, for the agent that showed
    /// up last on this node, those of its predecessors at once. So the caller makes sure before that they are dead. As
    /// far as the limits allow; the rest the next time.
    pub async fn reclaim(&self, node: &str, agent: &str) -> Result<Vec<Claim>, Error> {
        on!(self, reclaim(node, agent))
    }

    /// Admits and takes at most `most` orders; waits up to `wait` for the first. `agent` is this process' own name. Claims
    /// of this node of which the lease has ended come first, the caller's own too: one for a job that it still works on
    /// tells it that the former claim is lost.
    pub async fn claim(
        &self,
        node: &str,
        agent: &str,
        most: usize,
        wait: Duration,
    ) -> Result<Vec<Claim>, Error> {
        on!(self, claim(node, agent, most, wait))
    }

    /// Another [`LEASE`]. One that has ended comes back to life while nobody took the job over and the limits allow it.
    pub async fn renew(&self, claim: &Claim) -> Result<Hold, Error> {
        on!(self, renew(claim))
    }

    /// Asks the managers, and waits up to `wait` for one to answer this very question. None: none did. Only what a manager
    /// signed is an answer, so the queue alone can withhold it and not make it up.
    pub async fn ask(&self, question: &Question, wait: Duration) -> Result<Option<Answer>, Error> {
        on!(self, ask(question, wait))
    }

    /// Asked once, when all is delivered but the tag: with [`Hold::Held`] the tag may be put on, and the job can be
    /// cancelled no more.
    pub async fn confirm(&self, claim: &Claim) -> Result<Hold, Error> {
        on!(self, confirm(claim))
    }

    /// Passes on what a child says. Not for the last word.
    pub async fn report(&self, claim: &Claim, report: &Report) -> Result<Hold, Error> {
        on!(self, report(claim, report))
    }

    /// The last word, [`crate::service::job::Said::Ended`] or [`crate::service::job::Said::GivenBack`]: the report goes out and the claim
    /// ends, both or neither. [`Hold::Held`]: that is so; said again, it is not done again.
    pub async fn complete(&self, claim: &Claim, report: &Report) -> Result<Hold, Error> {
        on!(self, complete(claim, report))
    }

    /// The agent is there, and so are these sessions (none: as said before).
    pub async fn heartbeat(&self, node: &Node, sessions: Option<&[Session]>) -> Result<(), Error> {
        on!(self, heartbeat(node, sessions))
    }
}
