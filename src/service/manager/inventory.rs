//! The nodes and sessions according to the latest heartbeats, cached so that the queue is queried at most once per
//! second for all callers.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use axum::extract::State as Extracted;
use serde::Deserialize;
use tokio::sync::Mutex;
use utoipa::IntoParams;

use super::access::Reach;
use super::api::{NodeView, Nodes, SessionEndView, SessionView, Sessions, Which};
use super::auth::Caller;
use super::extract::QueryParams;
use super::names::{session_name, suggested_name, suggested_tag};
use super::paging::{Listed, MAX_LIMIT, PageQuery, cut, limit};
use super::refusal::Refusal;
use super::time::rfc3339;
use super::{App, autosave, end_wishes};
use crate::common::pod;
use crate::service::job::{JobId, Node, Session, now_ms};
use crate::service::queue::{self, HEARTBEAT_LOST, Queue};

const CACHE_TTL: Duration = Duration::from_secs(1);
/// Minimum interval between two warnings about duplicates.
const WARN_EVERY: Duration = Duration::from_secs(300);
/// How long a node may be absent before it loses its status as the first node of a session.
const FIRST_SEEN_TTL: Duration = Duration::from_secs(24 * 3600);
/// Maximum number of sessions whose first node is remembered.
const MAX_FIRST_SEEN: usize = 100_000;
/// Minimum length of an ID prefix. A shorter one could match another user's session tomorrow.
const MIN_PREFIX: usize = 12;
/// Cached sessions and nodes.
#[derive(Default)]
pub(super) struct Inventory {
    sessions: Mutex<Option<(Instant, Arc<Vec<Session>>)>>,
    nodes: Mutex<Option<(Instant, Arc<Vec<NodeStatus>>)>>,
    duplicates: std::sync::Mutex<Duplicates>,
}

/// State for the detection of sessions that a node copied from another one.
#[derive(Default)]
struct Duplicates {
    first: FirstSeen,
    warned: Option<Instant>,
}

/// The node that reported each session first, and when it last did.
type FirstSeen = HashMap<String, (String, Instant)>;

/// Removes sessions that a node reports although another node reported them first and still does. IDs cannot be
/// guessed, so a node can copy a session of another node only after that one was seen here.
fn without_duplicates(mut told: Vec<Session>, first: &mut FirstSeen, now: Instant) -> Vec<Session> {
    first.retain(|_, (_, at)| now.duration_since(*at) < FIRST_SEEN_TTL);
    let mut nodes_of = HashMap::<String, Vec<String>>::new();
    for session in &told {
        let nodes = nodes_of.entry(session.id.clone()).or_default();
        nodes.push(session.node.clone());
    }
    for (id, nodes) in &nodes_of {
        let room = first.len() < MAX_FIRST_SEEN;
        match (first.get_mut(id), nodes.as_slice()) {
            (Some((node, at)), nodes) if nodes.contains(node) => *at = now,
            (None, [node]) if room => {
                first.insert(id.clone(), (node.clone(), now));
            }
            _ => {}
        }
    }
    told.retain(|session| {
        let has_it = |node: &String| {
            let nodes = nodes_of.get(&session.id);
            nodes.is_some_and(|nodes| nodes.contains(node))
        };
        let first = first.get(&session.id);
        first.is_none_or(|(node, _)| *node == session.node || !has_it(node))
    });
    told
}

/// A node and the time since its last heartbeat.
pub(super) struct NodeStatus {
    pub(super) node: Node,
    /// Measured by the queue's clock, because the node's clock may be wrong.
    since_heartbeat: Duration,
    /// By how much the node's clock is behind the manager's, in milliseconds.
    behind_ms: i64,
}

impl NodeStatus {
    /// Returns whether the last heartbeat is recent.
    pub(super) fn is_alive(&self) -> bool {
        self.since_heartbeat < HEARTBEAT_LOST
    }
}

impl Inventory {
    pub(super) async fn sessions(&self, queue: &Queue) -> Result<Arc<Vec<Session>>, queue::Error> {
        let mut held = self.sessions.lock().await;
        // An empty list is asked for again: the first agent's session is to be found at once.
        if let Some((at, sessions)) = &*held
            && at.elapsed() < CACHE_TTL
            && !sessions.is_empty()
        {
            return Ok(sessions.clone());
        }
        self.read_sessions(queue, &mut held).await
    }

    /// Returns the sessions as the queue has them now.
    pub(super) async fn sessions_now(
        &self,
        queue: &Queue,
    ) -> Result<Arc<Vec<Session>>, queue::Error> {
        let mut held = self.sessions.lock().await;
        self.read_sessions(queue, &mut held).await
    }

    async fn read_sessions(
        &self,
        queue: &Queue,
        held: &mut Option<(Instant, Arc<Vec<Session>>)>,
    ) -> Result<Arc<Vec<Session>>, queue::Error> {
        let told = queue.sessions().await?;
        let mut sessions = self.without_duplicates(told);
        sessions.sort_by(|a, b| latest(a).cmp(&latest(b)).then(a.id.cmp(&b.id)));
        let sessions = Arc::new(sessions);
        *held = Some((Instant::now(), sessions.clone()));
        Ok(sessions)
    }

    fn without_duplicates(&self, told: Vec<Session>) -> Vec<Session> {
        let (all, now) = (told.len(), Instant::now());
        let mut duplicates = self
            .duplicates
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let kept = without_duplicates(told, &mut duplicates.first, now);
        let warned = duplicates
            .warned
            .is_some_and(|at| at.elapsed() < WARN_EVERY);
        if kept.len() < all && !warned {
            duplicates.warned = Some(now);
            tracing::warn!(
                sessions = all - kept.len(),
                "nodes tell of sessions that other nodes have: two agents look at one runtime, or a node does not tell the truth"
            );
        }
        kept
    }

    pub(super) async fn nodes(&self, queue: &Queue) -> Result<Arc<Vec<NodeStatus>>, queue::Error> {
        let mut held = self.nodes.lock().await;
        if let Some((at, nodes)) = &*held
            && at.elapsed() < CACHE_TTL
        {
            return Ok(nodes.clone());
        }
        let (mut nodes, silences) = (queue.nodes().await?, queue.heartbeat_ages().await?);
        nodes.sort_by(|a, b| a.name.cmp(&b.name));
        // A node that the queue no longer knows has been silent for very long.
        let since_heartbeat =
            |node: &Node| silences.get(&node.name).copied().unwrap_or(Duration::MAX);
        let now = now_ms();
        let heard = nodes.into_iter().map(|node| {
            let since_heartbeat = since_heartbeat(&node);
            let since_ms = i64::try_from(since_heartbeat.as_millis()).unwrap_or(i64::MAX);
            NodeStatus {
                since_heartbeat,
                behind_ms: now.saturating_sub(since_ms).saturating_sub(node.at_ms),
                node,
            }
        });
        let nodes = Arc::new(heard.collect::<Vec<_>>());
        *held = Some((Instant::now(), nodes.clone()));
        Ok(nodes)
    }

    /// Returns by how much the clock of each node that is heard of is behind the manager's, in milliseconds.
    pub(super) async fn clocks(&self, queue: &Queue) -> Result<HashMap<String, i64>, queue::Error> {
        let nodes = self.nodes(queue).await?;
        let alive = nodes.iter().filter(|node| node.is_alive());
        Ok(alive
            .map(|node| (node.node.name.clone(), node.behind_ms))
            .collect())
    }
}

/// Returns the place of a session in lists: those that run by their start, then those that have ended by their end, the
/// latest first.
fn latest(session: &Session) -> (bool, Reverse<i64>, Reverse<i64>) {
    let ended = session.ended.as_ref();
    let at_ms = ended.map_or(0, |end| end.at_ms.unwrap_or(0));
    (ended.is_some(), Reverse(at_ms), Reverse(session.started_ms))
}

/// Returns the sessions for accepting a save: those of the queue or, while it does not answer, those that were kept in the
/// record. The record keeps the save until the queue is back, and the agent looks for the session and its owner again.
pub(super) async fn sessions_to_save(app: &App) -> Result<Arc<Vec<Session>>, Refusal> {
    let error = match app.inventory.sessions(&app.queue).await {
        Ok(sessions) => return Ok(sessions),
        Err(error) => error,
    };
    let kept = super::kept::kept(app).await?;
    if kept.is_empty() {
        return Err(error.into());
    }
    tracing::warn!(%error, "the queue does not answer: a save is accepted by the last list of sessions");
    Ok(Arc::new(kept))
}

/// Returns the one session that `which` selects among those that `caller` may save.
pub(super) async fn find<'a>(
    app: &App,
    sessions: &'a [Session],
    caller: &Caller,
    which: &Which,
) -> Result<&'a Session, Refusal> {
    let may_be = sessions.iter().filter(|session| match which {
        Which::Id(id) => {
            let prefix = id.len() >= MIN_PREFIX && session.id.starts_with(id.as_str());
            session.id == *id || prefix || session.container.as_ref() == Some(id)
        }
        Which::Pod { namespace, .. } => session.namespace.as_ref() == Some(namespace),
    });
    let reach = Reach::of(app, caller, may_be).await?;
    find_within(sessions, caller, &reach, which)
}

/// Returns the one session that `which` selects among those that `caller` may save, according to `reach`.
pub(super) fn find_within<'a>(
    sessions: &'a [Session],
    caller: &Caller,
    reach: &Reach,
    which: &Which,
) -> Result<&'a Session, Refusal> {
    let mine = |session: &&Session| reach.covers(caller, session);
    let found: Vec<&Session> = match which {
        Which::Id(id) => {
            if id.is_empty() || id.len() > 128 || !id.bytes().all(|b| b.is_ascii_graphic()) {
                return Err(Refusal::invalid(
                    "session",
                    "expected an ID, its beginning, or the name of a container",
                ));
            }
            let matching = |is: &dyn Fn(&Session) -> bool| -> Vec<&Session> {
                sessions.iter().filter(mine).filter(|s| is(s)).collect()
            };
            // An ID first, so that a name that looks like another session's ID does not hide it.
            let mut found = matching(&|s| s.id == *id);
            if found.is_empty() {
                let named = matching(&|s| s.pod.is_none() && s.container.as_ref() == Some(id));
                found = current(named);
            }
            if found.is_empty() && id.len() >= MIN_PREFIX {
                found = matching(&|s| s.id.starts_with(id.as_str()));
            }
            found
        }
        Which::Pod {
            namespace,
            pod,
            container,
        } => {
            let is = |s: &&Session| {
                s.namespace.as_ref() == Some(namespace)
                    && s.pod.as_ref() == Some(pod)
                    && (container.is_none() || s.container == *container)
            };
            let found = current(sessions.iter().filter(mine).filter(is).collect());
            if container.is_none() {
                meant(found)?
            } else {
                found
            }
        }
    };
    match found.as_slice() {
        [one] => Ok(one),
        [] => Err(Refusal::not_found(format!(
            "there is no such session that you may save (of an ID, give at least {MIN_PREFIX} characters)"
        ))),
        _ => {
            let names: Vec<_> = found.iter().map(|s| session_name(s)).collect();
            Err(Refusal::invalid(
                "session",
                format!("it means several: {}", names.join(", ")),
            ))
        }
    }
}

/// Keeps those that run, or if none does, the last run of each container.
fn current(mut found: Vec<&Session>) -> Vec<&Session> {
    if found.iter().any(|session| session.ended.is_none()) {
        found.retain(|session| session.ended.is_none());
        return found;
    }
    found.sort_by_key(|session| latest(session));
    let mut seen = HashSet::new();
    found.retain(|session| session.pod.is_none() || seen.insert(&session.container));
    found
}

/// Reduces the sessions of a pod that was named without a container to the one that is meant, if that is known.
fn meant(found: Vec<&Session>) -> Result<Vec<&Session>, Refusal> {
    let Some(default) = found
        .first()
        .map(|session| session.default_container.as_deref())
    else {
        return Ok(found);
    };
    let names: Vec<&str> = (found.iter())
        .map(|session| session.container.as_deref().unwrap_or_default())
        .collect();
    if let Some(at) = pod::meant(&names, default) {
        return Ok(vec![found[at]]);
    }
    match default {
        Some(default) if !names.contains(&default) => Err(Refusal::invalid(
            "session",
            format!(
                "the default container of this pod, {default:?} ({}), is not among those that you may save; name \
                 another one: {}",
                pod::DEFAULT_CONTAINER,
                names.join(", ")
            ),
        )),
        _ => Ok(found),
    }
}

/// Selects sessions.
#[derive(Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct SessionQuery {
    /// Only those of pods in this namespace.
    namespace: Option<String>,
    /// Only those that run (`false`), or only those that have ended (`true`).
    ended: Option<bool>,
    /// Maximum number of entries, 1 to 500.
    #[param(minimum = 1, maximum = 500)]
    limit: Option<u32>,
    /// The value of `next` in the previous page.
    cursor: Option<String>,
}

/// Returns the containers that the caller may save: those that run, and those that have ended and are still on disk.
/// Administrators see all of them; a user of a Kubernetes cluster, those in the namespaces where the cluster permits it.
#[utoipa::path(
    get, path = "/api/v1/sessions", tag = "sessions", params(SessionQuery),
    responses((status = 200, body = Sessions, description = "The sessions that the caller may save"), Refusal)
)]
pub(super) async fn sessions(
    Extracted(app): Extracted<App>,
    caller: Caller,
    QueryParams(asked): QueryParams<SessionQuery>,
) -> Result<Listed<Sessions>, Refusal> {
    let limit = limit(asked.limit, MAX_LIMIT)?;
    if !caller.administrator {
        caller.require_user()?;
    }
    let all = app.inventory.sessions(&app.queue).await?;
    // What is shown can be saved, even if the queue stops answering.
    super::kept::keep(&app, &all).await?;
    let open: BTreeMap<String, JobId> = app
        .record
        .open_saves()
        .await?
        .into_iter()
        .filter(|open| !open.autosave)
        .map(|open| (open.session, open.id))
        .collect();
    let now = now_ms();
    let asked_for = |session: &&Session| {
        let namespace = asked.namespace.as_ref();
        namespace.is_none_or(|asked| session.namespace.as_ref() == Some(asked))
            && asked
                .ended
                .is_none_or(|ended| session.ended.is_some() == ended)
    };
    let mut all: Vec<&Session> = all.iter().filter(asked_for).collect();
    let reach = Reach::of(&app, &caller, all.iter().copied()).await?;
    all.retain(|session| reach.covers(&caller, session));
    let mut autosaves = autosave::views(&app, &all).await?;
    let end_wishes = end_wishes::of(&app, all.iter().copied()).await?;
    let sessions = all
        .into_iter()
        .map(|session| {
            let in_force = autosaves.remove(&session.id).unwrap_or_default();
            SessionView {
                id: session.id.clone(),
                node: session.node.clone(),
                owner: session.owner.clone(),
                namespace: session.namespace.clone(),
                pod: session.pod.clone(),
                container: session.container.clone(),
                runtime: session.runtime.clone(),
                kind: session.kind,
                category: session.category,
                image: session.image.clone(),
                started: rfc3339(session.started_ms),
                ended: session.ended.as_ref().map(|end| SessionEndView {
                    at: end.at_ms.map(rfc3339),
                    exit_code: end.exit_code,
                    out_of_memory: end.out_of_memory,
                    save: end_wishes::is_wanted(&end_wishes, session),
                }),
                upper_bytes: session.upper_bytes,
                upper_entries: session.upper_entries,
                next: session.next.clone(),
                unsaved: session.unsaved.clone(),
                unsaved_more: session.unsaved_more,
                problem: session.problem.clone(),
                suggested_name: suggested_name(session),
                suggested_tag: suggested_tag(session, now),
                save: open.get(&session.id).copied(),
                autosave: in_force.autosave,
                autosave_from: in_force.from,
                save_on_end: end_wishes::view(&end_wishes, session),
            }
        })
        .collect();
    let (sessions, next) = cut(sessions, asked.cursor.as_deref(), limit, |session| {
        format!("{} {}", session.id, session.node)
    })?;
    let page = Sessions {
        sessions,
        next: next.clone(),
    };
    Ok(Listed(page, next))
}

/// Returns the nodes and their agents. For administrators.
#[utoipa::path(
    get, path = "/api/v1/nodes", tag = "operations", params(PageQuery),
    responses((status = 200, body = Nodes, description = "The nodes that were heard of"), Refusal)
)]
pub(super) async fn nodes(
    Extracted(app): Extracted<App>,
    caller: Caller,
    QueryParams(asked): QueryParams<PageQuery>,
) -> Result<Listed<Nodes>, Refusal> {
    let limit = limit(asked.limit, MAX_LIMIT)?;
    caller.require_administrator()?;
    let nodes = app.inventory.nodes(&app.queue).await?;
    let sessions = app.inventory.sessions(&app.queue).await?;
    let mut sessions_on = BTreeMap::<&str, u64>::new();
    for session in sessions.iter() {
        if session.ended.is_none() {
            *sessions_on.entry(&session.node).or_default() += 1;
        }
    }
    let waiting = app.record.waiting_by_node().await?;
    let ago =
        |since_heartbeat: Duration| i64::try_from(since_heartbeat.as_millis()).unwrap_or(now_ms());
    let nodes = nodes
        .iter()
        .map(|heard| (heard, &heard.node))
        .map(|(heard, node)| NodeView {
            name: node.name.clone(),
            version: node.version.clone(),
            started: rfc3339(node.started_ms),
            heard: rfc3339(now_ms() - ago(heard.since_heartbeat)),
            alive: heard.is_alive(),
            draining: node.draining,
            sessions: sessions_on.get(node.name.as_str()).copied().unwrap_or(0),
            running: node.running.clone(),
            waiting: waiting.get(&node.name).copied().unwrap_or(0),
            load: node.load.clone(),
            problems: node.problems.clone(),
            ended_more: node.ended_more,
        })
        .collect();
    let (nodes, next) = cut(nodes, asked.cursor.as_deref(), limit, |node| {
        node.name.clone()
    })?;
    let page = Nodes {
        nodes,
        next: next.clone(),
    };
    Ok(Listed(page, next))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::service::job::Kind;

    fn session(id: &str, owner: Option<&str>, image: Option<&str>) -> Session {
        Session {
            id: id.repeat(32),
            node: "n".into(),
            owner: owner.map(str::to_owned),
            namespace: Some("ns".into()),
            pod: Some("pod".into()),
            container: Some("nb".into()),
            runtime: "containerd".into(),
            kind: Kind::Jupyter,
            image: image.map(str::to_owned),
            ..Session::default()
        }
    }

    fn caller(user: Option<&str>, administrator: bool) -> Caller {
        Caller {
            name: "x".into(),
            user: user.map(str::to_owned),
            administrator,
            via: super::super::auth::Via::Token,
            groups: Vec::new(),
            email: None,
            subject: None,
        }
    }

    #[test]
    fn a_node_does_not_take_the_place_of_anothers_session() {
        let of = |node: &str, id: &str, owner: &str| Session {
            node: node.into(),
            ..session(id, Some(owner), None)
        };
        let (mut first, now) = (FirstSeen::new(), Instant::now());
        let mut kept = |told: &[(&str, &str, &str)], now| -> Vec<String> {
            let told = told.iter().map(|(node, id, owner)| of(node, id, owner));
            let kept = without_duplicates(told.collect(), &mut first, now);
            kept.into_iter()
                .map(|session| format!("{} {}", session.node, &session.id[..2]))
                .collect()
        };
        let (true_one, copy) = (("n2", "ab", "alice"), ("n1", "ab", "mallory"));
        assert_eq!(kept(&[true_one], now), ["n2 ab"]);
        assert_eq!(
            kept(&[copy, true_one, ("n3", "ab", "alice")], now),
            ["n2 ab"]
        );
        // A node that was absent for a moment keeps its status.
        assert_eq!(kept(&[copy], now), ["n1 ab"]);
        assert_eq!(kept(&[copy, true_one], now + FIRST_SEEN_TTL / 2), ["n2 ab"]);
        // The first node is unknown, so no session is removed.
        let both = [("n1", "ac", "bob"), ("n2", "ac", "bob")];
        assert_eq!(kept(&both, now), ["n1 ac", "n2 ac"]);
        let later = now + FIRST_SEEN_TTL * 2;
        assert_eq!(kept(&[copy], later), ["n1 ab"]);
        assert_eq!(kept(&[copy, true_one], later), ["n1 ab"]);
    }

    #[test]
    fn only_own_sessions_are_found_and_only_when_they_are_meant() {
        let all = [
            session("ab", Some("alice"), None),
            session("ac", Some("bob"), None),
            session("ad", None, None),
        ];
        let id = |text: &str| Which::Id(text.to_owned());
        let alice = caller(Some("alice"), false);
        let nobody = caller(None, false);
        assert!(find_within(&all, &alice, &Reach::Owned, &id(&"ab".repeat(32))).is_ok());
        assert!(find_within(&all, &alice, &Reach::Owned, &id(&"ab".repeat(6))).is_ok());
        for which in [
            id("ababab"),
            id(&"ac".repeat(32)),
            id(&"ad".repeat(32)),
            id(""),
        ] {
            assert!(
                find_within(&all, &alice, &Reach::Owned, &which).is_err(),
                "{which:?}"
            );
            assert!(find_within(&all, &nobody, &Reach::Owned, &which).is_err());
        }
        let named = |session: Session| Session {
            namespace: None,
            pod: None,
            container: Some("lab".into()),
            ..session
        };
        let labs = [
            named(session("ae", Some("alice"), None)),
            named(session("af", Some("bob"), None)),
        ];
        let found =
            find_within(&labs, &alice, &Reach::Owned, &id("lab")).map(|session| session.id.clone());
        assert_eq!(found.ok(), Some("ae".repeat(32)));
        assert!(
            find_within(&labs, &caller(None, true), &Reach::Owned, &id("lab")).is_err(),
            "two"
        );
        assert!(
            find_within(&all, &alice, &Reach::Owned, &id("nb")).is_err(),
            "a container of a pod"
        );
        let pod = Which::Pod {
            namespace: "ns".into(),
            pod: "pod".into(),
            container: None,
        };
        assert!(find_within(&all, &alice, &Reach::Owned, &pod).is_ok());
        assert!(find_within(&all, &nobody, &Reach::Owned, &pod).is_err());
        let admin = caller(None, true);
        assert!(find_within(&all, &admin, &Reach::Owned, &id(&"ad".repeat(32))).is_ok());
        assert!(find_within(&all, &admin, &Reach::Owned, &pod).is_err());
    }

    #[test]
    fn of_a_pod_the_default_container_is_meant_or_the_only_one_beside_a_proxy() {
        let of = |id: &str, container: &str, default: Option<&str>| Session {
            namespace: Some("ns".into()),
            pod: Some("pod".into()),
            container: Some(container.into()),
            default_container: default.map(str::to_owned),
            ..session(id, Some("alice"), None)
        };
        let which = Which::Pod {
            namespace: "ns".into(),
            pod: "pod".into(),
            container: None,
        };
        let alice = caller(Some("alice"), false);
        let found = |all: &[Session]| {
            find_within(all, &alice, &Reach::Owned, &which)
                .map(|session| session.container.clone().unwrap_or_default())
        };
        let default = |name| [of("ab", "main", name), of("ac", "log", name)];
        assert_eq!(found(&default(Some("log"))).ok().as_deref(), Some("log"));
        assert!(found(&default(None)).is_err());
        // The default does not run.
        assert!(found(&default(Some("other"))).is_err());
        assert!(found(&default(Some("log"))[..1]).is_err());
        let beside = [of("ab", "istio-proxy", None), of("ac", "notebook", None)];
        assert_eq!(found(&beside).ok().as_deref(), Some("notebook"));
    }
}
