//! Heartbeats and sessions of the nodes. Each session is a separate record under its node with a signature of its own,
//! so that a malformed session of one tenant does not affect the sessions of others.

use std::collections::HashMap;
use std::sync::PoisonError;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{DAY, Error, HEARTBEAT_LOST, Redis};
use crate::service::job::{Message, Node, Session, now_ms};
use crate::service::log_limit::warn_limited;
use crate::service::queue::{MAX_RECORD, truncated_session};

/// Maximum age of a session's record. A node sends its sessions every half minute, so an older record was replayed, or
/// a clock is wrong by as much.
const INVENTORY_TTL: Duration = Duration::from_secs(10 * 60);
/// Number of nodes per request.
const NODES: usize = 16;
/// Maximum number of sessions per node that are read. A node has some hundreds.
const SESSIONS: usize = 10_000;

/// Sealed sessions by ID.
pub(super) type Records = Vec<(String, Vec<u8>)>;

/// The signed record of a session. It includes the node and the time, so that an old record or one of another node is
/// rejected.
#[derive(Serialize, Deserialize)]
struct Record {
    node: String,
    at_ms: i64,
    session: Session,
}

impl Redis {
    /// Returns the nodes that sent a heartbeat within `within`.
    async fn seen_nodes(&self, within: Duration) -> Result<Vec<String>, Error> {
        let mut call = self.call(&self.scripts.heard);
        call.arg(within.as_millis() as u64)
            .arg(DAY.as_millis() as u64);
        let names: Vec<Vec<u8>> = self.link.run(&call).await?;
        Ok(names
            .into_iter()
            .filter_map(|name| String::from_utf8(name).ok())
            .collect())
    }

    pub(in crate::service::queue) async fn nodes(&self) -> Result<Vec<Node>, Error> {
        let mut nodes = Vec::new();
        for some in self.seen_nodes(DAY).await?.chunks(64) {
            let mut command = redis::cmd("MGET");
            for name in some {
                command.arg(self.key(&format!("beat:{name}")));
            }
            let beats: Vec<Option<Vec<u8>>> = self.link.ask(&command).await?;
            for (name, sealed) in some.iter().zip(beats) {
                let Some(sealed) = sealed else { continue };
                match self.open::<Node>(Message::Heartbeat, name, &sealed) {
                    Ok(node) if node.name == *name && self.is_recent(node.at_ms) => {
                        nodes.push(node);
                    }
                    Ok(_) => {
                        warn_limited!(self.local.log_limit, node.name = %name.escape_debug(), "an old or another node's heartbeat is not believed");
                    }
                    Err(reason) => {
                        warn_limited!(self.local.log_limit, node.name = %name.escape_debug(), %reason, "a heartbeat is not believed");
                    }
                }
            }
        }
        Ok(nodes)
    }

    pub(in crate::service::queue) async fn sessions(&self) -> Result<Vec<Session>, Error> {
        let mut sessions = Vec::new();
        for names in self.seen_nodes(HEARTBEAT_LOST).await?.chunks(NODES) {
            let mut call = self.call(&self.scripts.inventories);
            call.arg(SESSIONS).arg(MAX_RECORD + super::MAC);
            for name in names {
                call.arg(name);
            }
            // For each node its records, as pairs of session ID and sealed record.
            let found: Vec<Vec<Vec<u8>>> = self.link.run(&call).await?;
            for (name, records) in names.iter().zip(found) {
                for record in records.chunks_exact(2) {
                    sessions.extend(self.session(name, &record[0], &record[1]));
                }
            }
        }
        // Redis returns the fields of a hash in an arbitrary order.
        sessions.sort_unstable_by(|a: &Session, b| (&a.node, &a.id).cmp(&(&b.node, &b.id)));
        Ok(sessions)
    }

    /// Returns the session of a record stored under `id` of `node`, if that node signed it.
    fn session(&self, node: &str, id: &[u8], sealed: &[u8]) -> Option<Session> {
        let why = match self.open::<Record>(Message::Inventory, node, sealed) {
            Ok(record)
                if record.node == node
                    && record.session.node == node
                    && record.session.id.as_bytes() == id
                    && is_fresh(record.at_ms) =>
            {
                return Some(record.session);
            }
            Ok(_) => "it is another session's, or an old one: put back into Redis, or of a node with a wrong clock".to_owned(),
            Err(reason) => reason,
        };
        warn_limited!(self.local.log_limit, node.name = %node.escape_debug(), session.id = %id.escape_ascii(), reason = why, "a session is not believed");
        None
    }

    pub(in crate::service::queue) async fn heartbeat(
        &self,
        node: &Node,
        sessions: Option<&[Session]>,
    ) -> Result<(), Error> {
        let beat = self.seal(Message::Heartbeat, &node.name, node)?;
        if let Some(sessions) = sessions {
            let records = self.records(node, sessions)?;
            self.send_heartbeat(&node.name, &beat, Some(&records))
                .await?;
            self.inventories().insert(node.name.clone(), records);
            return Ok(());
        }
        if self.send_heartbeat(&node.name, &beat, None).await? {
            return Ok(());
        }
        let kept = self.inventories().get(&node.name).cloned();
        if let Some(kept) = kept {
            self.send_heartbeat(&node.name, &beat, Some(&kept)).await?;
        }
        Ok(())
    }

    fn records(&self, node: &Node, sessions: &[Session]) -> Result<Records, Error> {
        let seal = |session: &Session| {
            let record = Record {
                node: node.name.clone(),
                at_ms: node.at_ms,
                session: truncated_session(session).into_owned(),
            };
            let sealed = self.seal(Message::Inventory, &node.name, &record)?;
            Ok((record.session.id, sealed))
        };
        sessions.iter().map(seal).collect()
    }

    fn inventories(&self) -> std::sync::MutexGuard<'_, HashMap<String, Records>> {
        self.local
            .inventories
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Stores a heartbeat. Returns `false` if the server no longer has the node's sessions.
    async fn send_heartbeat(
        &self,
        node: &str,
        beat: &[u8],
        records: Option<&Records>,
    ) -> Result<bool, Error> {
        let mut call = self.call(&self.scripts.heartbeat);
        call.arg(node)
            .arg(beat)
            .arg(DAY.as_millis() as u64)
            // The script that lists nodes checks the time exactly; this expiry only removes stale keys.
            .arg(HEARTBEAT_LOST.as_millis() as u64 * 3)
            .arg(u8::from(records.is_some()));
        for (id, sealed) in records.into_iter().flatten() {
            call.arg(id).arg(sealed);
        }
        Ok(self.link.run::<i64>(&call).await? == 1)
    }
}

fn is_fresh(at_ms: i64) -> bool {
    now_ms().saturating_sub(at_ms) <= INVENTORY_TTL.as_millis() as i64
}
