//! Keeps the sessions in the record, so that saves are accepted while the queue does not answer, whichever manager was
//! restarted meanwhile.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use sha2::{Digest as _, Sha256};

use super::App;
use crate::service::job::{Session, now_ms};
use crate::service::record;

/// Interval at which a list that has not changed is written again, so that it counts as seen.
const REFRESH: Duration = Duration::from_secs(300);

/// What was written last of each node: a digest of its sessions' identities, and when.
#[derive(Default)]
pub(super) struct KeptSessions(Mutex<HashMap<String, ([u8; 32], Instant)>>);

/// A digest of what a save needs to know of sessions; their sizes change all the time.
fn digest(sessions: &[Session]) -> [u8; 32] {
    let mut hash = Sha256::new();
    for session in sessions {
        hash.update(&session.id);
        hash.update([0]);
        hash.update(session.owner.as_deref().unwrap_or_default());
        hash.update([0, u8::from(session.ended.is_some())]);
    }
    hash.finalize().into()
}

impl KeptSessions {
    /// Returns the nodes whose sessions have to be written.
    fn due<'a>(&self, nodes: &HashMap<&'a str, Vec<Session>>) -> Vec<&'a str> {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        last.retain(|node, _| nodes.contains_key(node.as_str()));
        let mut due = Vec::new();
        for (node, sessions) in nodes {
            let now = digest(sessions);
            let known = last
                .get(*node)
                .is_some_and(|(was, at)| *was == now && at.elapsed() < REFRESH);
            if !known {
                last.insert((*node).to_owned(), (now, Instant::now()));
                due.push(*node);
            }
        }
        due
    }

    fn forget(&self, node: &str) {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        last.remove(node);
    }
}

/// Writes the sessions of all nodes whose lists have changed.
pub(super) async fn keep(app: &App, sessions: &[Session]) -> Result<(), record::Error> {
    let mut nodes = HashMap::<&str, Vec<Session>>::new();
    for session in sessions {
        let of_node = nodes.entry(&session.node).or_default();
        of_node.push(session.clone());
    }
    for node in app.kept.due(&nodes) {
        let sessions = nodes.get(node).map(Vec::as_slice).unwrap_or_default();
        if let Err(error) = app.record.keep_sessions(node, sessions).await {
            app.kept.forget(node);
            return Err(error);
        }
    }
    Ok(())
}

/// Returns the sessions that count while the queue does not answer: those seen within the time for which an order may wait.
pub(super) async fn kept(app: &App) -> Result<Vec<Session>, record::Error> {
    app.record.kept_sessions(earliest(app)).await
}

/// Deletes the sessions that do not count any more.
pub(super) async fn forget(app: &App) -> Result<(), record::Error> {
    app.record.forget_sessions(earliest(app)).await
}

fn earliest(app: &App) -> i64 {
    let age = app.options.order_expiry.as_millis();
    now_ms() - i64::try_from(age).unwrap_or(i64::MAX / 4)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_is_written_when_it_changes() {
        let session = |id: &str, bytes| Session {
            id: id.to_owned(),
            node: "n1".into(),
            owner: Some("alice".into()),
            upper_bytes: Some(bytes),
            ..Session::default()
        };
        let kept = KeptSessions::default();
        let due = |sessions: &[Session]| kept.due(&[("n1", sessions.to_vec())].into());
        assert_eq!(due(&[session("a", 1)]), ["n1"]);
        assert!(due(&[session("a", 2)]).is_empty());
        assert_eq!(due(&[session("a", 2), session("b", 1)]), ["n1"]);
        kept.forget("n1");
        assert_eq!(due(&[session("a", 2), session("b", 1)]), ["n1"]);
    }
}
