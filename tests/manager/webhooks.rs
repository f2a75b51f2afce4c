//! Webhooks: signed, sent again until they are taken, to permitted receivers only, and none that holds up others.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::body::Bytes;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use reqwest::Method;
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt as _;
use upperdeck::service::manager::{Options, Webhooks};

use crate::openapi::tool;
use crate::postgres;
use crate::site::{
    Agent, Outcomes, PATIENCE, Site, Who, ask, get, id, request, session, succeeded,
};
use crate::support;

const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";

/// A request as it was received.
#[derive(Clone)]
struct Received {
    path: String,
    id: String,
    timestamp: String,
    signature: String,
    body: Vec<u8>,
}

impl Received {
    fn event(&self) -> String {
        self.json()["type"].as_str().unwrap_or_default().to_owned()
    }

    fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_default()
    }

    /// Verifies the signature as the specification says, with another implementation of HMAC.
    fn verify(&self, secret: &str) -> Result<(), Box<dyn std::error::Error>> {
        let key = BASE64_STANDARD.decode(secret.trim_start_matches("whsec_"))?;
        let key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, &key);
        let signed = [
            self.id.as_bytes(),
            b".",
            self.timestamp.as_bytes(),
            b".",
            &self.body,
        ]
        .concat();
        let found = self.signature.split(' ').any(|one| {
            let one = one.strip_prefix("v1,").unwrap_or_default();
            let mac = BASE64_STANDARD.decode(one).unwrap_or_default();
            ring::hmac::verify(&key, &signed, &mac).is_ok()
        });
        found
            .then_some(())
            .ok_or_else(|| "the signature is wrong".into())
    }
}

/// A receiver that answers what its paths say.
#[derive(Clone, Default)]
struct Receiver {
    received: Arc<Mutex<Vec<Received>>>,
    seen: Arc<Mutex<HashMap<String, u32>>>,
}

async fn hook(
    State(to): State<Receiver>,
    Path(path): Path<String>,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    let text = |name: &str| {
        let value = headers.get(name).and_then(|value| value.to_str().ok());
        value.unwrap_or_default().to_owned()
    };
    let received = Received {
        path: path.clone(),
        id: text("webhook-id"),
        timestamp: text("webhook-timestamp"),
        signature: text("webhook-signature"),
        body: body.to_vec(),
    };
    let times = {
        let mut seen = to.seen.lock().expect("no test panics while it holds this");
        let times = seen.entry(received.id.clone()).or_default();
        *times += 1;
        *times
    };
    to.received
        .lock()
        .expect("no test panics while it holds this")
        .push(received);
    match path.as_str() {
        "hangs" => std::future::pending().await,
        "gone" => StatusCode::GONE.into_response(),
        "twice" if times < 3 => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
        "moved" => (
            StatusCode::TEMPORARY_REDIRECT,
            [(header::LOCATION, "/elsewhere")],
        )
            .into_response(),
        _ => StatusCode::NO_CONTENT.into_response(),
    }
}

impl Receiver {
    async fn start() -> Result<(Self, SocketAddr), Box<dyn std::error::Error>> {
        let receiver = Self::default();
        let listener = tokio::net::TcpListener::bind(("127.0.0.1", 0)).await?;
        let at = listener.local_addr()?;
        let router = Router::new()
            .route("/{path}", post(hook))
            .with_state(receiver.clone());
        tokio::spawn(async move { axum::serve(listener, router).await });
        Ok((receiver, at))
    }

    fn at(&self, path: &str) -> Vec<Received> {
        let all = self
            .received
            .lock()
            .expect("no test panics while it holds this");
        all.iter().filter(|one| one.path == path).cloned().collect()
    }

    /// Waits until so many requests have come to a path.
    async fn until(
        &self,
        path: &str,
        count: usize,
    ) -> Result<Vec<Received>, Box<dyn std::error::Error>> {
        let begun = std::time::Instant::now();
        loop {
            let found = self.at(path);
            if found.len() >= count {
                return Ok(found);
            }
            if begun.elapsed() > PATIENCE {
                return Err(format!("{path}: {} of {count}", found.len()).into());
            }
            tokio::time::sleep(Duration::from_millis(30)).await;
        }
    }
}

fn webhooks(options: &mut Options, at: SocketAddr, paths: &[&str]) -> Outcomes {
    options.webhooks = Webhooks {
        site: paths
            .iter()
            .map(|path| format!("http://{at}/{path}").parse())
            .collect::<Result<_, _>>()?,
        secrets: SECRET.parse()?,
        user_origins: vec![format!("http://{at}").parse()?],
        user_networks: vec!["127.0.0.0/8".parse()?],
        attempts: 4,
        backoff: Duration::from_millis(20),
        backoff_most: Duration::from_millis(50),
        ..Webhooks::default()
    };
    Ok(())
}

pub async fn metric(at: SocketAddr, line: &str) -> Result<Option<u64>, Box<dyn std::error::Error>> {
    let text = request(at, Who::Anonymous, Method::GET, "/metrics")?;
    let text = text.send().await?.text().await?;
    let found = text
        .lines()
        .find_map(|one| one.strip_prefix(line)?.trim().parse().ok());
    Ok(found)
}

/// Verifies a request with the library of Standard Webhooks.
async fn verify_with_library(received: &Received) -> Outcomes {
    let Some(python) = tool("python3") else {
        return Ok(());
    };
    let message = json!({
        "secret": SECRET,
        "body": String::from_utf8(received.body.clone())?,
        "headers": {
            "webhook-id": received.id,
            "webhook-timestamp": received.timestamp,
            "webhook-signature": received.signature,
        },
    });
    let script = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/manager/verify.py");
    let mut child = tokio::process::Command::new(python)
        .arg(script)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut stdin = child.stdin.take().ok_or("no stdin")?;
    stdin.write_all(message.to_string().as_bytes()).await?;
    drop(stdin);
    let output = child.wait_with_output().await?;
    let said = String::from_utf8(output.stdout)?;
    assert_eq!(
        (output.status.success(), said.trim()),
        (true, received.event().as_str())
    );
    Ok(())
}

#[tokio::test]
async fn a_save_is_told_to_the_site_and_to_whom_its_user_names_and_each_can_verify_it() -> Outcomes
{
    let (receiver, to) = Receiver::start().await?;
    let site = Site::new()?;
    let mut options = site.options()?;
    webhooks(&mut options, to, &["site", "twice", "gone", "moved"])?;
    let manager = site.manager_with(options).await?;
    let at = manager.address;
    let agent = Agent::new(&site.queue, "a");
    agent.heartbeat(&[session(1, Some("alice"))]).await?;
    let body = json!({
        "session": id(1), "image": {"name": "torch", "tag": "v1"}, "notify": {"url": format!("http://{to}/alice?key=x")}
    });
    let (status, save) = ask(at, Who::Alice, Method::POST, "/api/v1/saves", Some(body)).await?;
    assert_eq!(status, 202, "{save}");
    // The URL may contain a secret.
    assert!(!save.to_string().contains("key=x"), "{save}");
    let claim = agent.claim().await?;
    agent.begin(&claim).await?;
    agent.end(&claim, 2, succeeded()).await?;
    let told = receiver.until("site", 3).await?;
    let mut events: Vec<_> = told.iter().map(Received::event).collect();
    events.sort();
    assert_eq!(events, ["save.queued", "save.started", "save.succeeded"]);
    for one in &told {
        one.verify(SECRET)?;
        assert_eq!(one.json()["data"]["id"], save["id"]);
    }
    verify_with_library(&told[0]).await?;
    // Its user is told about the end, and verifies it with a secret that is no other user's.
    let own = receiver.until("alice", 1).await?;
    assert_eq!(own[0].event(), "save.succeeded");
    let settings = get(at, Who::Alice, "/api/v1/notify").await?;
    own[0].verify(settings["secret"].as_str().unwrap_or_default())?;
    assert!(own[0].verify(SECRET).is_err());
    let other = get(at, Who::Bob, "/api/v1/notify").await?;
    assert!(
        own[0]
            .verify(other["secret"].as_str().unwrap_or_default())
            .is_err()
    );
    assert_eq!(settings["origins"], json!([format!("http://{to}")]));
    // What fails comes again under its ID; what is gone does not, and no redirect is followed.
    let twice = receiver.until("twice", 9).await?;
    let ids: std::collections::BTreeSet<_> = twice.iter().map(|one| one.id.clone()).collect();
    assert_eq!(ids.len(), 3);
    receiver.until("moved", 12).await?;
    let waiting = "upperdeck_notices_total{receiver=\"site\",outcome=\"given_up\"}";
    let begun = std::time::Instant::now();
    while metric(at, waiting).await? != Some(6) && begun.elapsed() < PATIENCE {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(metric(at, waiting).await?, Some(6));
    let delivered = "upperdeck_notices_total{receiver=\"site\",outcome=\"delivered\"}";
    assert_eq!(metric(at, delivered).await?, Some(6));
    assert_eq!(receiver.at("gone").len(), 3);
    assert_eq!(receiver.at("moved").len(), 12);
    assert!(receiver.at("elsewhere").is_empty());
    manager.stop().await
}

#[tokio::test]
async fn only_permitted_receivers_can_be_named() -> Outcomes {
    let (receiver, to) = Receiver::start().await?;
    let site = Site::new()?;
    let mut options = site.options()?;
    webhooks(&mut options, to, &[])?;
    // Its name is permitted, its network is not.
    options
        .webhooks
        .user_origins
        .push(format!("http://localhost:{}", to.port()).parse()?);
    options.webhooks.user_networks = vec!["10.0.0.0/8".parse()?];
    let strict = site.manager_with(options).await?;
    let closed = site.manager().await?;
    let agent = Agent::new(&site.queue, "a");
    agent.heartbeat(&[session(1, Some("alice"))]).await?;
    let asked = async |at, notify: Value| {
        let body = json!({"session": id(1), "image": {"name": "torch"}, "notify": notify});
        ask(at, Who::Alice, Method::POST, "/api/v1/saves", Some(body)).await
    };
    let at = strict.address;
    for (url, field) in [
        (format!("http://{to}/x"), "notify.url"),
        (
            "http://169.254.169.254/latest/meta-data".to_owned(),
            "notify.url",
        ),
        ("https://evil.example/".to_owned(), "notify.url"),
        ("file:///etc/shadow".to_owned(), "notify.url"),
    ] {
        let (status, problem) = asked(at, json!({"url": url})).await?;
        assert_eq!(
            (status.as_u16(), &problem["field"]),
            (422, &json!(field)),
            "{url}: {problem}"
        );
    }
    let url = format!("http://localhost:{}/x", to.port());
    let (status, problem) = asked(at, json!({"url": url, "events": []})).await?;
    assert_eq!(
        (status.as_u16(), &problem["field"]),
        (422, &json!("notify.events"))
    );
    let (status, problem) = asked(closed.address, json!({"url": url})).await?;
    assert_eq!(
        (status.as_u16(), &problem["field"]),
        (422, &json!("notify"))
    );
    let (status, _) = ask(
        closed.address,
        Who::Alice,
        Method::GET,
        "/api/v1/notify",
        None,
    )
    .await?;
    assert_eq!(status, 404);
    // Managers of one record share its notices.
    closed.stop().await?;
    // The name passes, and its address is refused when it is resolved.
    let (status, save) = asked(at, json!({"url": url, "events": ["save.queued"]})).await?;
    assert_eq!(status, 202, "{save}");
    let given_up = "upperdeck_notices_total{receiver=\"user\",outcome=\"given_up\"}";
    let begun = std::time::Instant::now();
    while metric(at, given_up).await? != Some(1) && begun.elapsed() < PATIENCE {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(metric(at, given_up).await?, Some(1));
    assert!(receiver.at("x").is_empty());
    strict.stop().await
}

/// Accepts saves, stops the manager before anything is delivered, and starts another one.
async fn restart(site: Site) -> Outcomes {
    let (receiver, to) = Receiver::start().await?;
    let agent = Agent::new(&site.queue, "a");
    agent
        .heartbeat(&[session(1, Some("alice")), session(2, Some("bob"))])
        .await?;
    let mut options = site.options()?;
    // Nothing listens there.
    let free = std::net::TcpListener::bind(("127.0.0.1", 0))?.local_addr()?;
    webhooks(&mut options, free, &["later"])?;
    options.webhooks.attempts = 1000;
    let first = site.manager_with(options.clone()).await?;
    let body = json!({"session": id(1), "image": {"name": "torch", "tag": "v1"}});
    let (status, _) = ask(
        first.address,
        Who::Alice,
        Method::POST,
        "/api/v1/saves",
        Some(body),
    )
    .await?;
    assert_eq!(status, 202);
    first.stop().await?;
    // The receiver is back after the restart.
    let listener = tokio::net::TcpListener::bind(free).await?;
    let router = Router::new()
        .route("/{path}", post(hook))
        .with_state(receiver.clone());
    tokio::spawn(async move { axum::serve(listener, router).await });
    // Another one hangs, and holds up none of the others.
    options
        .webhooks
        .site
        .push(format!("http://{to}/hangs").parse()?);
    let second = site.manager_with(options).await?;
    let told = receiver.until("later", 1).await?;
    assert_eq!(told[0].event(), "save.queued");
    told[0].verify(SECRET)?;
    let url = format!("http://{free}/bob");
    let body = json!({
        "session": id(2), "image": {"name": "torch", "tag": "v2"}, "notify": {"url": url, "events": ["save.queued"]}
    });
    let (status, save) = ask(
        second.address,
        Who::Bob,
        Method::POST,
        "/api/v1/saves",
        Some(body),
    )
    .await?;
    assert_eq!(status, 202, "{save}");
    receiver.until("hangs", 1).await?;
    receiver.until("later", 2).await?;
    receiver.until("bob", 1).await?;
    second.stop().await
}

#[tokio::test]
async fn a_restart_loses_no_notice_and_one_that_hangs_holds_up_none() -> Outcomes {
    restart(Site::new()?).await
}

#[tokio::test]
async fn a_restart_loses_no_notice_with_postgresql() -> Outcomes {
    match postgres::database() {
        Ok(url) => restart(Site::on(url)?).await,
        Err(reason) => {
            support::ignore(&reason);
            Ok(())
        }
    }
}
