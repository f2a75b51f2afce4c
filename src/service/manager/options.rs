//! What an administrator decides about a manager. Everything but where to listen and where images go has a default.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use super::auth::{Jwt, Proxies, Tokens};
use super::door::Doors;
use super::target::Template;
use crate::store::registry::Access;

/// Where a manager listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Listen {
    /// `IP:PORT`; port 0: any that is free.
    Tcp(SocketAddr),
    /// `unix:PATH`, or a path with a slash: a socket file, made with mode 0660; one that a dead manager left is replaced.
    Unix(PathBuf),
}

impl FromStr for Listen {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(path) = text.strip_prefix("unix:") {
            return Ok(Self::Unix(path.into()));
        }
        if text.contains('/') {
            return Ok(Self::Unix(text.into()));
        }
        text.parse().map(Self::Tcp).map_err(|_| {
            format!("{text:?} is no address to listen on: write IP:PORT, [IPV6]:PORT or unix:PATH")
        })
    }
}

/// How much of a caller's requests is answered.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rate {
    /// Requests a second, in the long run.
    pub per_second: f64,
    /// Requests at once after a pause.
    pub burst: f64,
}

/// The settings of a manager.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where it listens.
    pub listen: Listen,
    /// How browsers reach it, e.g. `https://save.example.org/`: the origin that a page's requests must come from, the
    /// path of the cookie, and whether that is for TLS only. None: what the `Host` header says, over plain HTTP.
    pub public_url: Option<String>,
    /// Where images go.
    pub target: Template,
    /// API tokens.
    pub tokens: Tokens,
    /// Users by JSON Web Tokens of an identity provider. None: there are none.
    pub jwt: Option<Jwt>,
    /// Users by a header of a proxy that has asked who they are. None: such a header says nothing.
    pub proxies: Option<Proxies>,
    /// Saves of one user that may be open (waiting or running) at once; 0: no bound. How many *run* at once is the
    /// queue's to say, see [`crate::service::queue::Limits`].
    pub open_per_user: u32,
    /// How often a save is tried in all before it stays failed.
    pub attempts: u32,
    /// The pause before the second attempt; each further one is twice as long, each shortened by chance by up to a half.
    pub backoff: Duration,
    /// No pause between attempts is longer.
    pub backoff_most: Duration,
    /// The longest that one attempt may run.
    pub timeout: Duration,
    /// A node whose agent has not been heard of for so long is lost, and with it the saves of its sessions.
    pub node_lost: Duration,
    /// A save that has waited for so long fails, and no agent acts on its order any more.
    pub order_expiry: Duration,
    /// How long saves that are done stay in the history. None: for ever.
    pub retention: Option<Duration>,
    /// How registries are reached to list, to delete and to ask for the quota. Agents push with credentials of their own.
    pub access: Access,
    /// Tags that no save may take, besides those that registries use themselves (`sha256-…`). A `*` at the end stands for
    /// anything.
    pub reserved_tags: Vec<String>,
    /// The largest body of a request, in bytes.
    pub body_bytes: usize,
    /// A bound for each caller. None: no bound.
    pub rate: Option<Rate>,
    /// Bounds for connections and requests under way.
    pub doors: Doors,
    /// Saves that one user may ask for in 24 hours; 0: no bound.
    pub saves_per_day: u32,
    /// How often the record is compared with the queue.
    pub reconcile_every: Duration,
    /// How often other managers' changes are looked for while somebody watches.
    pub watch_every: Duration,
    /// Requests under way get so long when the manager is told to end.
    pub grace: Duration,
    /// This manager's name among others, in the queue and in the record. None: one made of the host's name and chance.
    pub name: Option<String>,
}

impl Options {
    /// With the defaults for the rest: nobody can log in before `tokens`, `jwt` or `proxies` say who.
    pub fn new(listen: Listen, target: Template) -> Self {
        Self {
            listen,
            public_url: None,
            target,
            tokens: Tokens::default(),
            jwt: None,
            proxies: None,
            open_per_user: 100,
            attempts: 4,
            backoff: Duration::from_secs(10),
            backoff_most: Duration::from_secs(600),
            timeout: Duration::from_secs(4 * 3600),
            node_lost: Duration::from_secs(300),
            order_expiry: Duration::from_secs(24 * 3600),
            retention: Some(Duration::from_secs(365 * 24 * 3600)),
            access: Access::default(),
            reserved_tags: Vec::new(),
            body_bytes: 64 << 10,
            rate: Some(Rate {
                per_second: 50.0,
                burst: 500.0,
            }),
            doors: Doors::default(),
            saves_per_day: 1000,
            reconcile_every: Duration::from_secs(3),
            watch_every: Duration::from_secs(1),
            grace: Duration::from_secs(20),
            name: None,
        }
    }
}
