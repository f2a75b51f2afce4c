//! The queue in Redis or Valkey, 6.2 or later.
//!
//! Changes that belong together happen in one Lua script; see the files in this directory. Data from Redis are not
//! trusted: messages that cause an action are signed, and invalid ones are deleted with a warning, so that they block
//! no others. If a genuine order is lost with them, its manager offers it again, like everything that Redis loses.

mod examine;
mod inventory;
mod link;
mod questions;
mod read;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use redis::{Script, Value};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::time::Instant;

use super::{
    Claim, ClaimState, DAY, Delivered, Depth, Error, HEARTBEAT_LOST, Limits, Offered, Place,
    Settings, TAG_DOUBT, Withdrawn, registry_of,
};
use crate::service::job::{Event, JobId, Keys, Message, Order, Report, Sealed, Update, now_ms};
use crate::service::log_limit::{LogLimit, warn_limited};
pub use examine::{ServerInfo, examine};
use link::Connection;
use read::{Entry, entries, is_entry_id};

/// Interval at which a blocked call polls again even without a notification, because notifications can be lost.
const POLL: Duration = Duration::from_secs(5);
/// Maximum number of jobs per call, so that no script blocks Redis for long.
const BATCH: usize = 500;
/// Length of the signature at the start of a message: SHA-256 in hexadecimal.
const MAC: usize = 64;

/// The queue in Redis. Clones share their connections.
#[derive(Clone)]
pub struct Redis {
    link: Connection,
    keys: Keys,
    limits: Limits,
    settings: Settings,
    scripts: Arc<Scripts>,
    local: Arc<LocalState>,
}

/// State that this process keeps for the queue.
#[derive(Default)]
struct LocalState {
    /// Sealed inventories by node, to send again to a server that lost them.
    inventories: Mutex<HashMap<String, inventory::Records>>,
    /// Rate limit of log lines about rejected messages; otherwise a third party with write access to Redis could fill
    /// the log.
    log_limit: LogLimit,
    /// Cursor of the search for reports that other managers left unacknowledged.
    cursor: Mutex<Option<String>>,
}

macro_rules! scripts {
    ($($name:ident)*) => {
        struct Scripts { $($name: Script,)* }

        impl Scripts {
            fn new() -> Self {
                let common = include_str!("common.lua");
                Self {
                    $($name: Script::new(&format!("{common}\n{}", include_str!(concat!(stringify!($name), ".lua")))),)*
                }
            }
        }
    };
}
scripts!(offer claim renew confirm report complete taken withdraw hurry drop places heartbeat heard silence inventories depth ask answer);

/// Result of the claim script: job, fence, sealed order.
type ClaimReply = (Vec<u8>, Vec<u8>, Vec<u8>);

impl Redis {
    /// Creates the queue for the server at `url`: `redis://[USER:PASSWORD@]HOST[:PORT][/DB]`, `rediss://` with TLS (the
    /// system's root certificates), or `redis+unix:///SOCKET[?db=DB&user=USER&pass=PASSWORD]`. The connection is
    /// established on first use, and again whenever it breaks; [`super::Queue::ping`] checks whether that works.
    ///
    /// Fails only if the URL is invalid.
    #[allow(clippy::unused_async)]
    pub async fn connect(url: &str, keys: Keys, limits: Limits) -> Result<Self, Error> {
        Self::with(url, keys, limits, Settings::default())
    }

    /// Creates the queue with settings that differ from the default.
    ///
    /// Fails if the URL or the prefix of the keys is invalid.
    pub fn with(url: &str, keys: Keys, limits: Limits, settings: Settings) -> Result<Self, Error> {
        let plain = |c: char| c.is_ascii_alphanumeric() || "{}:._-".contains(c);
        if settings.prefix.is_empty() || !settings.prefix.chars().all(plain) {
            return Err(Error::Unusable(
                "a prefix of keys has letters, digits and {}:._- only".to_owned(),
            ));
        }
        Ok(Self {
            link: Connection::new(url, &settings.prefix)?,
            keys,
            limits,
            settings,
            scripts: Arc::new(Scripts::new()),
            local: Arc::default(),
        })
    }

    /// Returns host and port, or the path of the socket.
    pub(super) fn address(&self) -> &str {
        self.link.at()
    }

    fn now_ms(&self) -> i64 {
        now_ms() + self.settings.clock.offset().as_millis() as i64
    }

    /// Prepares a call of a script with the arguments that all scripts share.
    fn call<'a>(&self, script: &'a Script) -> redis::ScriptInvocation<'a> {
        let mut call = script.key(self.settings.prefix.as_str());
        call.arg(self.settings.clock.offset().as_millis() as u64)
            .arg(self.settings.lease.as_millis() as u64);
        call
    }

    /// Prepares a call of a script about a claim.
    fn claim_call<'a>(&self, script: &'a Script, claim: &Claim) -> redis::ScriptInvocation<'a> {
        let mut call = self.call(script);
        call.arg(claim.order.job.to_string()).arg(claim.fence);
        call
    }

    fn with_limits<'a, 'b>(
        &self,
        call: &'b mut redis::ScriptInvocation<'a>,
    ) -> &'b mut redis::ScriptInvocation<'a> {
        call.arg(self.limits.user)
            .arg(self.limits.node)
            .arg(self.limits.registry)
    }

    fn key(&self, name: &str) -> String {
        format!("{}{name}", self.settings.prefix)
    }

    /// Signs a message to or from `node`.
    fn seal<T: Serialize>(
        &self,
        message: Message,
        node: &str,
        content: &T,
    ) -> Result<Vec<u8>, Error> {
        let sealed = self
            .keys
            .seal(message, node, content)
            .map_err(|error| Error::Unusable(error.to_string()))?;
        Ok([sealed.mac.into_bytes(), sealed.body.into_bytes()].concat())
    }

    /// Returns the message in `bytes` if it was signed as one to or from `node`. Fails with the reason otherwise.
    fn open<T: DeserializeOwned>(
        &self,
        message: Message,
        node: &str,
        bytes: &[u8],
    ) -> Result<T, String> {
        let (mac, body) = bytes.split_at_checked(MAC).ok_or("it is too short")?;
        let text = |part: &[u8]| {
            std::str::from_utf8(part)
                .map(str::to_owned)
                .map_err(|_| "it is no text".to_owned())
        };
        let sealed = Sealed {
            mac: text(mac)?,
            body: text(body)?,
        };
        self.keys
            .open(message, node, &sealed)
            .map_err(|error| error.to_string())
    }

    pub(super) async fn offer(&self, order: &Order) -> Result<Offered, Error> {
        let mut call = self.call(&self.scripts.offer);
        call.arg(order.job.to_string())
            .arg(&order.node)
            .arg(&order.owner)
            .arg(registry_of(&order.destination))
            .arg(order.fence_after)
            .arg(order.not_before_ms)
            .arg(order.expires_ms)
            .arg(order.attempt);
        self.with_limits(&mut call)
            .arg(u8::from(order.autosave))
            .arg(self.seal(Message::Order, &order.node, order)?);
        let new: i64 = self.link.run(&call).await?;
        Ok(if new == 1 {
            Offered::New
        } else {
            Offered::Known
        })
    }

    pub(super) async fn withdraw(&self, job: JobId) -> Result<Withdrawn, Error> {
        let mut call = self.call(&self.scripts.withdraw);
        call.arg(job.to_string()).arg(TAG_DOUBT);
        Ok(match self.link.run::<i64>(&call).await? {
            1 => Withdrawn::Removed,
            2 => Withdrawn::CancelRequested,
            3 => Withdrawn::TooLate,
            _ => Withdrawn::Unknown,
        })
    }

    pub(super) async fn hurry(&self, job: JobId) -> Result<bool, Error> {
        let mut call = self.call(&self.scripts.hurry);
        call.arg(job.to_string());
        Ok(self.link.run::<i64>(&call).await? == 1)
    }

    pub(super) async fn places(&self, jobs: &[JobId]) -> Result<Vec<Option<Place>>, Error> {
        let mut found = Vec::with_capacity(jobs.len());
        for some in jobs.chunks(BATCH) {
            let mut call = self.call(&self.scripts.places);
            for job in some {
                call.arg(job.to_string());
            }
            let numbers: Vec<i64> = self.link.run(&call).await?;
            let places = numbers.chunks_exact(2).map(|two| {
                let value = u64::try_from(two[1]).unwrap_or(0);
                match two[0] {
                    0 => Some(Place::Waiting(value)),
                    1 => Some(Place::Held { lease_ms: value }),
                    _ => None,
                }
            });
            found.extend(places.chain(std::iter::repeat(None)).take(some.len()));
        }
        Ok(found)
    }

    pub(super) async fn reports(
        &self,
        manager: &str,
        most: usize,
        wait: Duration,
    ) -> Result<Vec<Delivered>, Error> {
        let end = Instant::now() + wait.min(DAY);
        loop {
            let mut got = self.claim_abandoned_reports(manager, most).await?;
            if got.len() < most {
                let left = if got.is_empty() {
                    end.saturating_duration_since(Instant::now())
                        .min(POLL)
                        .min(self.settings.ack_timeout)
                } else {
                    Duration::ZERO
                };
                got.extend(self.new_reports(manager, most - got.len(), left).await?);
            }
            let good = self.verified_reports(got).await?;
            if !good.is_empty() || Instant::now() >= end {
                return Ok(good);
            }
        }
    }

    /// Claims reports that another manager received but did not acknowledge in time.
    async fn claim_abandoned_reports(
        &self,
        manager: &str,
        most: usize,
    ) -> Result<Vec<Entry>, Error> {
        let cursor = {
            let mut cursor = self
                .local
                .cursor
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            cursor.take().unwrap_or_else(|| "0-0".to_owned())
        };
        let mut command = redis::cmd("XAUTOCLAIM");
        command
            .arg(self.key("reports"))
            .arg("managers")
            .arg(manager)
            .arg(self.settings.ack_timeout.as_millis() as u64)
            .arg(&cursor)
            .arg("COUNT")
            .arg(most);
        let Some(Value::Array(answer)) = self.read_reports(&command, None).await? else {
            return Ok(Vec::new());
        };
        let mut answer = answer.into_iter();
        if let Some(Value::BulkString(next)) = answer.next()
            && let Ok(next) = String::from_utf8(next)
            && is_entry_id(&next)
        {
            *self
                .local
                .cursor
                .lock()
                .unwrap_or_else(PoisonError::into_inner) = Some(next);
        }
        Ok(answer.next().map(entries).unwrap_or_default())
    }

    async fn new_reports(
        &self,
        manager: &str,
        most: usize,
        wait: Duration,
    ) -> Result<Vec<Entry>, Error> {
        let mut command = redis::cmd("XREADGROUP");
        command
            .arg("GROUP")
            .arg("managers")
            .arg(manager)
            .arg("COUNT")
            .arg(most);
        let wait = (wait >= Duration::from_millis(1)).then_some(wait);
        if let Some(wait) = wait {
            command.arg("BLOCK").arg(wait.as_millis() as u64);
        }
        command.arg("STREAMS").arg(self.key("reports")).arg(">");
        let answer = self.read_reports(&command, wait).await?;
        Ok(answer.map(read::of_one_stream).unwrap_or_default())
    }

    /// Sends `command`, on a separate connection if it blocks. If the stream or its consumer group does not exist, e.g.
    /// after the server lost its data, creates it and returns `None`.
    async fn read_reports(
        &self,
        command: &redis::Cmd,
        wait: Option<Duration>,
    ) -> Result<Option<Value>, Error> {
        let answer = match wait {
            Some(wait) => self.link.wait(command, wait).await,
            None => self.link.send(command).await,
        };
        let error = match answer {
            Ok(value) => return Ok(Some(value)),
            Err(error) => error,
        };
        if !link::is_gone(&error) {
            return Err(self.link.to_error(&error));
        }
        let mut group = redis::cmd("XGROUP");
        group
            .arg("CREATE")
            .arg(self.key("reports"))
            .arg("managers")
            .arg("0")
            .arg("MKSTREAM");
        match self.link.send::<Value>(&group).await {
            // BUSYGROUP means that another manager has created it meanwhile.
            Err(error) if error.code() != Some("BUSYGROUP") => Err(self.link.to_error(&error)),
            _ => Ok(None),
        }
    }

    async fn verified_reports(&self, got: Vec<Entry>) -> Result<Vec<Delivered>, Error> {
        let (mut good, mut bad) = (Vec::new(), Vec::new());
        for entry in got {
            match self.verify_report(&entry) {
                Ok(report) => good.push(Delivered {
                    entry: entry.id,
                    report,
                }),
                Err(reason) => {
                    warn_limited!(self.local.log_limit, queue.entry = %entry.id, %reason, "a report that is not believed is thrown away");
                    bad.push(entry.id);
                }
            }
        }
        self.acknowledge(&bad).await?;
        Ok(good)
    }

    /// Returns the report if it was signed by the node that the entry names. No other node has that node's key.
    fn verify_report(&self, entry: &Entry) -> Result<Report, String> {
        let field = |name: &[u8]| entry.fields.get(name).ok_or("it has no message or no node");
        let node = std::str::from_utf8(field(b"n")?).map_err(|_| "its node is no text")?;
        let report: Report = self.open(Message::Report, node, field(b"m")?)?;
        if report.node != node {
            return Err("it speaks for another node than signed it".to_owned());
        }
        Ok(report)
    }

    pub(super) async fn acknowledge(&self, entries: &[String]) -> Result<(), Error> {
        let ours: Vec<_> = entries.iter().filter(|entry| is_entry_id(entry)).collect();
        for some in ours.chunks(BATCH) {
            let mut call = self.call(&self.scripts.taken);
            for entry in some {
                call.arg(entry.as_str());
            }
            self.link.run::<i64>(&call).await?;
        }
        Ok(())
    }

    pub(super) async fn heartbeat_ages(&self) -> Result<HashMap<String, Duration>, Error> {
        let mut call = self.call(&self.scripts.silence);
        call.arg(DAY.as_millis() as u64);
        let answers: Vec<(Vec<u8>, i64)> = self.link.run(&call).await?;
        let silence = |(name, ms): (Vec<u8>, i64)| {
            let silence = Duration::from_millis(ms.try_into().unwrap_or(0));
            Some((String::from_utf8(name).ok()?, silence))
        };
        Ok(answers.into_iter().filter_map(silence).collect())
    }

    /// Returns whether a heartbeat is recent. The margin allows for clocks that differ, and for tests that advance
    /// theirs.
    fn is_recent(&self, at_ms: i64) -> bool {
        self.now_ms().saturating_sub(at_ms) <= 2 * DAY.as_millis() as i64
    }

    pub(super) async fn depth(&self) -> Result<Depth, Error> {
        let call = self.call(&self.scripts.depth);
        let (waiting, held, reports) = self.link.run(&call).await?;
        Ok(Depth {
            waiting,
            held,
            reports,
        })
    }

    pub(super) async fn ping(&self) -> Result<(), Error> {
        self.link.ask::<Value>(&redis::cmd("PING")).await?;
        Ok(())
    }

    pub(super) async fn reclaim(&self, node: &str, agent: &str) -> Result<Vec<Claim>, Error> {
        Ok(self.take(node, agent, BATCH, true, false).await?.0)
    }

    pub(super) async fn claim(
        &self,
        node: &str,
        agent: &str,
        most: usize,
        wait: Duration,
    ) -> Result<Vec<Claim>, Error> {
        let end = Instant::now() + wait.min(DAY);
        loop {
            let left = end.saturating_duration_since(Instant::now());
            let waits = !left.is_zero();
            let (claims, next) = self.take(node, agent, most, false, waits).await?;
            if !claims.is_empty() || !waits {
                return Ok(claims);
            }
            let pause = left.min(next).min(POLL).max(Duration::from_millis(1));
            self.wait_for_wakeup(node, agent, pause).await?;
        }
    }

    /// Claims orders and checks them. Also returns the delay until the next attempt.
    async fn take(
        &self,
        node: &str,
        agent: &str,
        most: usize,
        reclaim: bool,
        waits: bool,
    ) -> Result<(Vec<Claim>, Duration), Error> {
        let mut call = self.call(&self.scripts.claim);
        call.arg(node).arg(agent).arg(most.min(BATCH));
        self.with_limits(&mut call)
            .arg(u8::from(reclaim))
            .arg(u8::from(waits));
        let (given, dropped, next_ms): (Vec<ClaimReply>, Vec<Vec<u8>>, i64) =
            self.link.run(&call).await?;
        for job in dropped {
            let job = String::from_utf8_lossy(&job);
            warn_limited!(self.local.log_limit, job.id = %job.escape_debug(), job.node = node, "an order has expired; its manager has to offer it again");
        }
        let mut claims = Vec::with_capacity(given.len());
        for (job, fence, sealed) in given {
            match self.check(node, &job, &fence, &sealed) {
                Ok(claim) => claims.push(claim),
                Err(reason) => {
                    let name = String::from_utf8_lossy(&job);
                    warn_limited!(self.local.log_limit, job.id = %name.escape_debug(), job.node = node, %reason, "an order that is not believed is thrown away");
                    let mut call = self.call(&self.scripts.drop);
                    call.arg(job).arg(fence);
                    self.link.run::<i64>(&call).await?;
                }
            }
        }
        Ok((claims, Duration::from_millis(next_ms.max(1) as u64)))
    }

    /// Checks whether a delivered message is an order for this node, signed by a manager, not expired, stored under its
    /// own job ID, and with a plausible fence.
    fn check(&self, node: &str, job: &[u8], fence: &[u8], sealed: &[u8]) -> Result<Claim, String> {
        let order: Order = self.open(Message::Order, node, sealed)?;
        if order.node != node {
            return Err(format!("it is for {}", order.node.escape_debug()));
        }
        if order.job.to_string().as_bytes() != job {
            return Err(format!("it is that of {}", order.job));
        }
        if order.expires_ms <= self.now_ms() {
            return Err("it has expired".to_owned());
        }
        let fence: u64 = std::str::from_utf8(fence)
            .ok()
            .and_then(|fence| fence.parse().ok())
            .ok_or("its fence is no number")?;
        // A fence is the current time in microseconds or the previous fence plus one. One far in the future would shut
        // out all later claims.
        let now_us = self.now_ms().max(0) as u64 * 1000;
        let most = order.fence_after.max(now_us) + DAY.as_micros() as u64;
        if fence <= order.fence_after || fence > most {
            return Err(format!("its fence {fence} cannot be"));
        }
        Ok(Claim { order, fence })
    }

    /// Blocks until an entry arrives in the node's stream. Claims are never in it, because the claim script returns
    /// them itself.
    async fn wait_for_wakeup(&self, node: &str, agent: &str, pause: Duration) -> Result<(), Error> {
        let stream = self.key(&format!("stream:{node}"));
        let mut command = redis::cmd("XREADGROUP");
        command
            .arg("GROUP")
            .arg("agents")
            .arg(agent)
            .arg("COUNT")
            .arg(64)
            .arg("BLOCK")
            .arg(pause.as_millis() as u64)
            .arg("NOACK")
            .arg("STREAMS")
            .arg(&stream)
            .arg(">");
        match self.link.wait::<Value>(&command, pause).await {
            Ok(answer) => {
                let heard = read::of_one_stream(answer);
                if !heard.is_empty() {
                    let mut command = redis::cmd("XDEL");
                    command.arg(&stream);
                    for entry in heard {
                        command.arg(entry.id);
                    }
                    self.link.ask::<Value>(&command).await?;
                }
                Ok(())
            }
            // The next attempt creates it again.
            Err(error) if link::is_gone(&error) => Ok(()),
            Err(error) => Err(self.link.to_error(&error)),
        }
    }

    pub(super) async fn renew(&self, claim: &Claim) -> Result<ClaimState, Error> {
        let mut call = self.claim_call(&self.scripts.renew, claim);
        self.with_limits(&mut call);
        self.link.run(&call).await.map(hold)
    }

    pub(super) async fn confirm(&self, claim: &Claim) -> Result<ClaimState, Error> {
        let mut call = self.claim_call(&self.scripts.confirm, claim);
        self.with_limits(&mut call);
        self.link.run(&call).await.map(hold)
    }

    pub(super) async fn report(&self, claim: &Claim, report: &Report) -> Result<ClaimState, Error> {
        let passing = matches!(
            report.update,
            Update::Event {
                event: Event::Progress { .. } | Event::BaseProgress { .. }
            }
        );
        let mut call = self.claim_call(&self.scripts.report, claim);
        self.with_limits(&mut call)
            .arg(self.seal(Message::Report, &report.node, report)?)
            .arg(u8::from(passing))
            .arg(&report.node);
        self.link.run(&call).await.map(hold)
    }

    pub(super) async fn complete(
        &self,
        claim: &Claim,
        report: &Report,
    ) -> Result<ClaimState, Error> {
        let mut call = self.claim_call(&self.scripts.complete, claim);
        call.arg(self.seal(Message::Report, &report.node, report)?)
            .arg(&report.node);
        self.link.run(&call).await.map(hold)
    }
}

fn hold(answer: i64) -> ClaimState {
    match answer {
        1 => ClaimState::Held,
        2 => ClaimState::Cancelled,
        3 => ClaimState::Hurried,
        _ => ClaimState::Lost,
    }
}
