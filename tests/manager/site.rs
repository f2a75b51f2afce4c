//! A complete service in one process with a stand-in for the agent: managers with a record and a queue, callers with
//! tokens, and nodes that report what the test specifies.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use futures_util::StreamExt as _;
use reqwest::{Method, RequestBuilder, StatusCode};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use upperdeck::service::job::{
    Category, Event, JobId, Kind, Load, Node, Outcome, Phase, Report, Saved, Session, Update,
};
use upperdeck::service::manager::auth::{Role, Tokens};
use upperdeck::service::manager::{Listen, Options, Server};
use upperdeck::service::queue::{Claim, ClaimState, Limits, Local, Queue, Settings};
use upperdeck::service::record::Record;

pub type Outcomes = Result<(), Box<dyn std::error::Error>>;
type Fallible<T> = Result<T, Box<dyn std::error::Error>>;

/// Time after which an expected event counts as missing; far longer than anything in these tests takes.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Who {
    Alice,
    Bob,
    PortalFor(&'static str),
    Portal,
    Administrator,
    Anonymous,
}

/// A running manager.
pub struct Manager {
    pub address: SocketAddr,
    cancel: CancellationToken,
    task: JoinHandle<Result<(), upperdeck::service::manager::Error>>,
}

impl Manager {
    pub async fn stop(self) -> Outcomes {
        self.cancel.cancel();
        self.task.await??;
        Ok(())
    }
}

pub struct Site {
    pub dir: TempDir,
    pub place: String,
    pub queue: Queue,
}

pub fn empty_queue() -> Queue {
    let limits = Limits {
        user: 0,
        node: 0,
        registry: 0,
    };
    let settings = Settings {
        lease: Duration::from_secs(2),
        ack_timeout: Duration::from_secs(2),
        ..Settings::default()
    };
    Queue::Local(Local::with(limits, settings))
}

impl Site {
    pub fn new() -> Fallible<Self> {
        let dir = tempfile::tempdir()?;
        let place = format!("sqlite:{}", dir.path().join("record.db").display());
        Ok(Self {
            dir,
            place,
            queue: empty_queue(),
        })
    }

    /// The setup of most tests: a manager, and a node on which `sessions` run.
    pub async fn at_work(sessions: &[Session]) -> Fallible<(Self, Manager, Agent)> {
        let site = Self::new()?;
        let manager = site.manager().await?;
        let agent = Agent::new(&site.queue, "a");
        agent.heartbeat(sessions).await?;
        Ok((site, manager, agent))
    }

    /// Uses a PostgreSQL database.
    pub fn on(place: String) -> Fallible<Self> {
        Ok(Self {
            dir: tempfile::tempdir()?,
            place,
            queue: empty_queue(),
        })
    }

    pub fn images(&self) -> PathBuf {
        self.dir.path().join("images")
    }

    pub fn options(&self) -> Fallible<Options> {
        let template = format!("oci:{}/{{user}}/{{name}}:{{tag}}", self.images().display());
        let mut options = Options::new(Listen::Tcp(([127, 0, 0, 1], 0).into()), template.parse()?);
        options.tokens = Tokens::default()
            .with("alice", Role::User, Some("alice"), "token-alice")?
            .with("bob", Role::User, Some("bob"), "token-bob")?
            .with("portal", Role::Portal, None, "token-portal")?
            .with("root", Role::Administrator, None, "token-root")?;
        options.attempts = 3;
        options.backoff = Duration::from_millis(20);
        options.backoff_most = Duration::from_millis(50);
        options.reconcile_every = Duration::from_millis(200);
        options.watch_every = Duration::from_millis(100);
        options.grace = Duration::from_secs(5);
        options.rate = None;
        options.reserved_tags = vec!["latest".into()];
        Ok(options)
    }

    pub async fn manager(&self) -> Fallible<Manager> {
        self.manager_with(self.options()?).await
    }

    pub async fn manager_with(&self, options: Options) -> Fallible<Manager> {
        Box::pin(self.manager_on(options, self.queue.clone())).await
    }

    pub async fn manager_on(&self, options: Options, queue: Queue) -> Fallible<Manager> {
        let record = Record::open(&self.place).await?;
        let server = Server::bind(options, queue, record).await?;
        let address = server.address().unwrap_or(([127, 0, 0, 1], 1).into());
        let cancel = CancellationToken::new();
        let task = tokio::spawn(server.run(cancel.clone()));
        Ok(Manager {
            address,
            cancel,
            task,
        })
    }
}

pub fn http() -> Fallible<reqwest::Client> {
    Ok(upperdeck::store::registry::http_client("127.0.0.1").build()?)
}

/// Builds a request of a caller.
pub fn request(at: SocketAddr, who: Who, method: Method, path: &str) -> Fallible<RequestBuilder> {
    let request = http()?.request(method, format!("http://{at}{path}"));
    Ok(match who {
        Who::Alice => request.bearer_auth("token-alice"),
        Who::Bob => request.bearer_auth("token-bob"),
        Who::Administrator => request.bearer_auth("token-root"),
        Who::Portal => request.bearer_auth("token-portal"),
        Who::PortalFor(user) => request
            .bearer_auth("token-portal")
            .header("Upperdeck-User", user),
        Who::Anonymous => request,
    })
}

pub async fn ask(
    at: SocketAddr,
    who: Who,
    method: Method,
    path: &str,
    body: Option<Value>,
) -> Fallible<(StatusCode, Value)> {
    let mut request = request(at, who, method, path)?;
    if let Some(body) = body {
        request = request.json(&body);
    }
    let answer = request.send().await?;
    let status = answer.status();
    let text = answer.text().await?;
    Ok((status, serde_json::from_str(&text).unwrap_or(Value::Null)))
}

pub async fn get(at: SocketAddr, who: Who, path: &str) -> Fallible<Value> {
    let (status, body) = ask(at, who, Method::GET, path, None).await?;
    if !status.is_success() {
        return Err(format!("{path}: {status} {body}").into());
    }
    Ok(body)
}

/// Repeats a request until its response satisfies `is`.
pub async fn until(
    at: SocketAddr,
    who: Who,
    path: &str,
    is: impl Fn(&Value) -> bool,
) -> Fallible<Value> {
    let begun = std::time::Instant::now();
    loop {
        let body = get(at, who, path).await?;
        if is(&body) {
            return Ok(body);
        }
        if begun.elapsed() > PATIENCE {
            return Err(format!("{path} stays {body}").into());
        }
        tokio::time::sleep(Duration::from_millis(30)).await;
    }
}

pub async fn submit(at: SocketAddr, who: Who, session: &str, tag: &str) -> Fallible<JobId> {
    let body = json!({"session": session, "image": {"name": "torch", "tag": tag}, "message": "m"});
    let (status, body) = ask(at, who, Method::POST, "/api/v1/saves", Some(body)).await?;
    if status != StatusCode::ACCEPTED {
        return Err(format!("{status} {body}").into());
    }
    Ok(body["id"].as_str().ok_or("no id")?.parse()?)
}

/// Returns a session ID in the format of runtimes.
pub fn id(n: usize) -> String {
    format!("{n:064x}")
}

pub fn session(n: usize, owner: Option<&str>) -> Session {
    Session {
        id: id(n),
        node: "n1".into(),
        owner: owner.map(str::to_owned),
        namespace: Some("jupyter".into()),
        pod: Some(format!("pod-{n}")),
        container: Some("notebook".into()),
        runtime: "containerd".into(),
        kind: Kind::Jupyter,
        category: Category::Gpu,
        image: Some("h.example/scipy:1".into()),
        started_ms: 1_764_000_000_000 + n as i64,
        upper_bytes: Some(1000),
        upper_entries: Some(10),
        ..Session::default()
    }
}

/// The stand-in for the agent of node `n1`.
#[derive(Clone)]
pub struct Agent {
    pub queue: Queue,
    name: String,
}

impl Agent {
    pub fn new(queue: &Queue, name: &str) -> Self {
        Self {
            queue: queue.clone(),
            name: name.to_owned(),
        }
    }

    pub async fn heartbeat(&self, sessions: &[Session]) -> Outcomes {
        self.heartbeat_with(sessions, Load::default()).await
    }

    pub async fn heartbeat_with(&self, sessions: &[Session], load: Load) -> Outcomes {
        let node = Node {
            name: "n1".into(),
            version: "0".into(),
            started_ms: 0,
            // Its clock is an hour behind.
            at_ms: upperdeck::service::job::now_ms() - 3_600_000,
            draining: false,
            running: Vec::new(),
            load,
            problems: Vec::new(),
            to_save: sessions
                .iter()
                .filter(|session| session.ended.as_ref().is_some_and(|end| end.save))
                .map(|session| session.started_ms as u64)
                .reduce(u64::wrapping_add),
            ..Node::default()
        };
        self.queue.heartbeat(&node, Some(sessions)).await?;
        Ok(())
    }

    /// Claims the next order.
    pub async fn claim(&self) -> Fallible<Claim> {
        let found = self.queue.claim("n1", &self.name, 1, PATIENCE).await?;
        found.into_iter().next().ok_or_else(|| "no order".into())
    }

    pub async fn claim_now(&self, wait: Duration) -> Fallible<Option<Claim>> {
        Ok(self
            .queue
            .claim("n1", &self.name, 1, wait)
            .await?
            .into_iter()
            .next())
    }

    pub async fn send_update(
        &self,
        claim: &Claim,
        seq: u64,
        update: Update,
    ) -> Fallible<ClaimState> {
        Ok(self
            .queue
            .report(claim, &report(claim, seq, update))
            .await?)
    }

    pub async fn renew(&self, claim: &Claim) -> Fallible<ClaimState> {
        Ok(self.queue.renew(claim).await?)
    }

    pub async fn confirm(&self, claim: &Claim) -> Fallible<ClaimState> {
        Ok(self.queue.confirm(claim).await?)
    }

    pub async fn end(&self, claim: &Claim, seq: u64, outcome: Outcome) -> Fallible<ClaimState> {
        let report = report(claim, seq, Update::Ended { outcome });
        Ok(self.queue.complete(claim, &report).await?)
    }

    pub async fn give_back(&self, claim: &Claim, seq: u64) -> Fallible<ClaimState> {
        let reason = "it drains".to_owned();
        let report = report(claim, seq, Update::GivenBack { reason });
        Ok(self.queue.complete(claim, &report).await?)
    }

    pub async fn begin(&self, claim: &Claim) -> Outcomes {
        self.send_update(claim, 0, Update::Assigned).await?;
        self.send_update(claim, 1, Update::Started).await?;
        Ok(())
    }

    /// Sends all reports of a successful save.
    pub async fn work(&self, claim: &Claim) -> Outcomes {
        self.begin(claim).await?;
        self.send_update(claim, 2, phase(Phase::Streaming)).await?;
        for (seq, done) in [(3, 10), (4, 60), (5, 100)] {
            self.send_update(claim, seq, progress(done)).await?;
        }
        self.send_update(claim, 6, phase(Phase::Finishing)).await?;
        self.confirm(claim).await?;
        self.end(claim, 7, succeeded()).await?;
        Ok(())
    }
}

fn report(claim: &Claim, seq: u64, update: Update) -> Report {
    Report {
        job: claim.order.job,
        node: "n1".into(),
        attempt: claim.order.attempt,
        fence: claim.fence,
        seq,
        at_ms: upperdeck::service::job::now_ms(),
        update,
    }
}

pub fn phase(phase: Phase) -> Update {
    Update::Event {
        event: Event::Phase { phase },
    }
}

pub fn progress(done: u64) -> Update {
    Update::Event {
        event: Event::Progress {
            bytes_done: done,
            bytes_total: 100,
            bytes_sent: done / 2,
            entries_total: 3,
            base_done: 0,
            base_total: 0,
        },
    }
}

pub fn succeeded() -> Outcome {
    Outcome::Succeeded {
        saved: Saved {
            reference: "h.example/x@sha256:0".into(),
            digest: "sha256:0".into(),
            layer_bytes: 1,
            image_bytes: 2,
            sent_bytes: 1,
            entries: 1,
            delta: false,
            base_name: None,
            base_digest: None,
            pause_ms: Some(2.5),
            seconds: 1.0,
            changes: None,
        },
    }
}

/// The event stream of a save, as a browser reads it.
pub struct Events {
    stream: futures_util::stream::BoxStream<'static, reqwest::Result<bytes::Bytes>>,
    rest: String,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Heard {
    pub event: String,
    pub id: Option<u64>,
    pub data: Value,
}

impl Events {
    pub async fn of(at: SocketAddr, who: Who, id: JobId, last: Option<u64>) -> Fallible<Self> {
        let mut request = request(at, who, Method::GET, &format!("/api/v1/saves/{id}/events"))?;
        if let Some(last) = last {
            request = request.header("Last-Event-ID", last);
        }
        let answer = request.send().await?;
        if answer.status() != StatusCode::OK {
            return Err(format!("{}", answer.status()).into());
        }
        Ok(Self {
            stream: answer.bytes_stream().boxed(),
            rest: String::new(),
        })
    }

    /// Opens the stream at a path.
    pub async fn at(at: SocketAddr, who: Who, path: &str) -> Fallible<Self> {
        let answer = request(at, who, Method::GET, path)?.send().await?;
        if answer.status() != StatusCode::OK {
            return Err(format!("{}", answer.status()).into());
        }
        Ok(Self {
            stream: answer.bytes_stream().boxed(),
            rest: String::new(),
        })
    }

    /// Returns the next event; `None` at the end of the stream.
    pub async fn next(&mut self) -> Fallible<Option<Heard>> {
        loop {
            if let Some((event, rest)) = self.rest.split_once("\n\n") {
                let mut fields = BTreeMap::new();
                for line in event.lines() {
                    if let Some((name, value)) = line.split_once(": ") {
                        fields.insert(name.to_owned(), value.to_owned());
                    }
                }
                self.rest = String::from(rest);
                if let (Some(event), Some(data)) = (fields.get("event"), fields.get("data")) {
                    return Ok(Some(Heard {
                        event: event.clone(),
                        id: fields.get("id").map(|id| id.parse()).transpose()?,
                        data: serde_json::from_str(data)?,
                    }));
                }
                continue;
            }
            match tokio::time::timeout(PATIENCE, self.stream.next()).await? {
                Some(Ok(bytes)) => self.rest.push_str(std::str::from_utf8(&bytes)?),
                // A manager that is killed ends its streams in the middle.
                Some(Err(_)) | None => return Ok(None),
            }
        }
    }
}
