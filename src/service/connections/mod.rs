//! Connections of a manager, and of an agent that tells its health, and their limits: how many connections there are in total and per peer, and how long each may stay
//! open without sending a request. All of this is decided before a request is parsed.
//!
//! Every connection has a [`Slot`]. If all slots of a peer (or all slots) are taken, a new connection replaces the one
//! that has waited longest without a complete request, or with a response that it does not read. So a peer that only
//! holds connections open loses them, while one that sends requests is served.

mod range;
mod serve;
mod slot;

use std::collections::HashMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

pub use self::range::{Range, RangeError};
pub(super) use self::serve::{Bound, Served, serve};
pub(super) use self::slot::Slot;

/// File descriptors reserved for the record, the queue, registries and files.
const RESERVE: u64 = 128;

/// Limits for connections and requests.
#[derive(Clone, Debug)]
pub struct ConnectionLimits {
    /// Maximum number of connections of all peers; lower if the limit of open files requires it.
    pub connections: usize,
    /// Maximum number of connections of one address (of one /64 network for IPv6).
    pub connections_per_peer: usize,
    /// Reverse proxies, which carry connections of many users and are exempt from `connections_per_peer`. Peers on a
    /// socket file are always exempt.
    pub proxies: Vec<Range>,
    /// Maximum number of event streams of one user.
    pub streams_per_user: usize,
    /// Maximum number of concurrent requests of one caller, without event streams.
    pub requests_per_user: usize,
    /// Time limit for the head of a request, measured from its first byte; for the first request, from the start of the
    /// connection.
    pub head: Duration,
    /// Time limit for the complete body of a request.
    pub body: Duration,
    /// Time limit between two requests. It is longer than the 60 s after which proxies close idle connections
    /// themselves.
    pub idle: Duration,
    /// Time limit for a peer that reads nothing of a response.
    pub write: Duration,
}

impl Default for ConnectionLimits {
    fn default() -> Self {
        Self {
            connections: 4096,
            connections_per_peer: 512,
            proxies: Vec::new(),
            streams_per_user: 32,
            requests_per_user: 64,
            head: Duration::from_secs(10),
            body: Duration::from_secs(30),
            idle: Duration::from_secs(75),
            write: Duration::from_secs(30),
        }
    }
}

/// Why a connection was closed or refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Closed {
    /// The head of a request did not arrive in time.
    Head,
    /// There was no further request in time.
    Idle,
    /// The peer did not read the response.
    Write,
    /// Another connection needed the slot.
    Replaced,
    /// There was no slot, because all other connections are being served.
    Full,
}

impl Closed {
    /// All reasons.
    pub(super) const ALL: [Self; 5] = [
        Self::Head,
        Self::Idle,
        Self::Write,
        Self::Replaced,
        Self::Full,
    ];

    /// Returns the label in metrics.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Head => "head",
            Self::Idle => "idle",
            Self::Write => "write",
            Self::Replaced => "replaced",
            Self::Full => "full",
        }
    }
}

/// Address that connections are counted by; `None` for proxies and socket files.
type Group = Option<IpAddr>;

/// Address of the peer; `None` for a socket file.
#[derive(Clone, Copy, Debug)]
pub(super) struct Peer(pub(super) Option<IpAddr>);

/// The slots of all connections.
pub(super) struct ConnectionTable {
    limits: ConnectionLimits,
    most: usize,
    slots: Mutex<Slots>,
}

#[derive(Default)]
struct Slots {
    next: u64,
    taken: HashMap<u64, Arc<Slot>>,
    of: HashMap<Group, usize>,
}

impl Slots {
    fn remove(&mut self, number: u64) -> Option<Arc<Slot>> {
        let slot = self.taken.remove(&number)?;
        if let Some(count) = self.of.get_mut(&slot.group) {
            *count -= 1;
            if *count == 0 {
                self.of.remove(&slot.group);
            }
        }
        Some(slot)
    }

    /// Returns the slot that has waited longest, in `group` or in total.
    fn longest(&self, group: Option<Group>) -> Option<u64> {
        self.taken
            .values()
            .filter(|slot| group.is_none_or(|group| group == slot.group))
            .filter_map(|slot| Some((slot.idle_since()?, slot.number)))
            .min()
            .map(|(_, number)| number)
    }

    /// Frees the slot that has waited longest. Returns `false` if all are being served.
    fn make_room(&mut self, group: Option<Group>) -> bool {
        let Some(slot) = self.longest(group).and_then(|number| self.remove(number)) else {
            return false;
        };
        slot.end(Closed::Replaced);
        true
    }
}

impl ConnectionTable {
    /// Creates an empty table. `files` is the number of files that the process may have open.
    pub(super) fn new(limits: ConnectionLimits, files: u64) -> Self {
        let room = usize::try_from(files.saturating_sub(RESERVE).max(RESERVE / 2));
        Self {
            most: limits.connections.max(1).min(room.unwrap_or(usize::MAX)),
            limits,
            slots: Mutex::default(),
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Slots> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn group(&self, peer: Option<IpAddr>) -> Group {
        let proxy = self.limits.proxies.iter().any(|range| range.holds(peer));
        peer.filter(|_| !proxy).map(network)
    }

    /// Returns a slot for a connection from `peer` (`None` for a socket file). Returns `None` if there is no free slot
    /// and none can be freed.
    pub(super) fn admit(&self, peer: Option<IpAddr>) -> Option<Arc<Slot>> {
        let group = self.group(peer);
        let mut slots = self.lock();
        let own = slots.of.get(&group).copied().unwrap_or(0);
        if group.is_some()
            && own >= self.limits.connections_per_peer.max(1)
            && !slots.make_room(Some(group))
        {
            return None;
        }
        if slots.taken.len() >= self.most {
            // The group with the most connections has to give one up first.
            let largest = slots.of.iter().max_by_key(|(_, count)| **count);
            let largest = largest.map(|(group, _)| *group);
            if !slots.make_room(largest) && !slots.make_room(None) {
                return None;
            }
        }
        let number = slots.next;
        slots.next += 1;
        let slot = Arc::new(Slot::new(number, group, Instant::now()));
        slots.taken.insert(number, slot.clone());
        *slots.of.entry(group).or_default() += 1;
        Some(slot)
    }

    /// Frees the slot of a connection that has ended.
    pub(super) fn leave(&self, slot: &Slot) {
        self.lock().remove(slot.number);
    }

    /// Frees the slot that has waited longest, because the system is out of resources.
    pub(super) fn evict_one(&self) {
        self.lock().make_room(None);
    }

    /// Closes connections that exceed a time limit.
    pub(super) fn sweep(&self, now: Instant) {
        let mut slots = self.lock();
        let late: Vec<(u64, Closed)> = slots
            .taken
            .values()
            .filter_map(|slot| Some((slot.number, slot.late(&self.limits, now)?)))
            .collect();
        for (number, why) in late {
            if let Some(slot) = slots.remove(number) {
                slot.end(why);
            }
        }
    }

    pub(super) fn count(&self) -> usize {
        self.lock().taken.len()
    }
}

/// A host has one IPv4 address, but can use all addresses of its IPv6 network.
fn network(peer: IpAddr) -> IpAddr {
    match peer.to_canonical() {
        IpAddr::V6(ip) => Ipv6Addr::from_bits(ip.to_bits() & (u128::MAX << 64)).into(),
        ip @ IpAddr::V4(_) => ip,
    }
}

/// Number of items in progress per user. Entries are removed with the user's last item.
#[derive(Default)]
pub(super) struct UserCounter(Mutex<HashMap<String, usize>>);

/// An item of a user, which counts until it is dropped.
pub(super) struct CountGuard {
    counter: Arc<UserCounter>,
    user: String,
}

impl UserCounter {
    /// Adds an item of `user`. Returns `None` if there are `most` already.
    pub(super) fn acquire(self: &Arc<Self>, user: &str, most: usize) -> Option<CountGuard> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let count = all.get(user).copied().unwrap_or(0);
        if count >= most {
            return None;
        }
        all.insert(user.to_owned(), count + 1);
        Some(CountGuard {
            counter: self.clone(),
            user: user.to_owned(),
        })
    }
}

impl Drop for CountGuard {
    fn drop(&mut self) {
        let mut all = self
            .counter
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = all.get_mut(&self.user) {
            *count -= 1;
            if *count == 0 {
                all.remove(&self.user);
            }
        }
    }
}

/// Raises the soft limit of open files to the hard limit. Returns the limit.
///
/// Fails with the error of `setrlimit`.
pub fn raise_open_files() -> std::io::Result<u64> {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current != maximum {
        let raised = Rlimit {
            current: maximum,
            maximum,
        };
        setrlimit(Resource::Nofile, raised)?;
    }
    Ok(maximum.unwrap_or(u64::MAX))
}

/// Returns the maximum number of files that the process may have open.
pub(super) fn open_files() -> u64 {
    rustix::process::getrlimit(rustix::process::Resource::Nofile)
        .current
        .unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(all: usize, each: usize) -> ConnectionTable {
        let limits = ConnectionLimits {
            connections: all,
            connections_per_peer: each,
            proxies: vec!["10.0.0.9".parse().unwrap()],
            ..ConnectionLimits::default()
        };
        ConnectionTable::new(limits, 100_000)
    }

    fn from(table: &ConnectionTable, peer: &str) -> Option<Arc<Slot>> {
        table.admit(Some(peer.parse().unwrap()))
    }

    #[test]
    fn who_waits_longest_gives_way_and_who_is_answered_stays() {
        let table = table(100, 2);
        let first = from(&table, "10.0.0.1").unwrap();
        let second = from(&table, "10.0.0.1").unwrap();
        let answered = first.work();
        let third = from(&table, "10.0.0.1").unwrap();
        assert_eq!(
            (first.ended(), second.ended()),
            (None, Some(Closed::Replaced))
        );
        let _third = third.work();
        assert!(from(&table, "10.0.0.1").is_none());
        assert!(from(&table, "10.0.0.2").is_some());
        drop(answered);
        assert!(from(&table, "10.0.0.1").is_some());
        assert_eq!(first.ended(), Some(Closed::Replaced));
        assert_eq!(table.count(), 3);
    }

    #[test]
    fn one_peer_does_not_take_the_places_of_others() {
        let table = table(4, 4);
        let other = from(&table, "10.0.0.2").unwrap();
        let flood: Vec<_> = (0..10).filter_map(|_| from(&table, "10.0.0.1")).collect();
        assert_eq!(flood.len(), 10);
        assert_eq!(table.count(), 4);
        assert_eq!(other.ended(), None);
    }

    #[test]
    fn a_network_is_one_peer_and_a_proxy_is_none() {
        let table = table(100, 1);
        let one = from(&table, "2001:db8::1").unwrap();
        from(&table, "2001:db8::2").unwrap();
        assert_eq!(one.ended(), Some(Closed::Replaced));
        from(&table, "2001:db8:0:1::1").unwrap();
        let proxied: Vec<_> = (0..5).filter_map(|_| from(&table, "10.0.0.9")).collect();
        let local: Vec<_> = (0..5).filter_map(|_| table.admit(None)).collect();
        assert!(
            proxied
                .iter()
                .chain(&local)
                .all(|slot| slot.ended().is_none())
        );
    }

    #[test]
    fn few_open_files_are_fewer_connections() {
        let table = ConnectionTable::new(ConnectionLimits::default(), 256);
        assert_eq!(table.most, 128);
        assert_eq!(
            ConnectionTable::new(ConnectionLimits::default(), 0).most,
            64
        );
    }

    #[test]
    fn each_wait_has_its_time() {
        let table = table(10, 10);
        let limits = ConnectionLimits::default();
        let slot = from(&table, "10.0.0.1").unwrap();
        let begun = Instant::now();
        assert_eq!(slot.late(&limits, begun), None);
        assert_eq!(slot.late(&limits, begun + limits.head), Some(Closed::Head));
        let answered = slot.work();
        assert_eq!(slot.late(&limits, begun + Duration::from_secs(9000)), None);
        slot.wrote(false, begun);
        assert_eq!(
            slot.late(&limits, begun + limits.write),
            Some(Closed::Write)
        );
        slot.wrote(true, begun);
        drop(answered);
        assert_eq!(slot.late(&limits, begun + limits.head * 2), None);
        assert_eq!(
            slot.late(&limits, begun + limits.idle * 2),
            Some(Closed::Idle)
        );
        slot.read(1, begun);
        assert_eq!(slot.late(&limits, begun + limits.head), Some(Closed::Head));
        table.sweep(begun + limits.head);
        assert_eq!((slot.ended(), table.count()), (Some(Closed::Head), 0));
    }

    #[test]
    fn a_tally_forgets_who_has_nothing() {
        let counter = Arc::new(UserCounter::default());
        let one = counter.acquire("alice", 1);
        assert!(
            one.is_some()
                && counter.acquire("alice", 1).is_none()
                && counter.acquire("bob", 1).is_some()
        );
        drop(one);
        assert!(counter.0.lock().unwrap().is_empty());
    }
}
