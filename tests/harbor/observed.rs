//! Compares the stand-in with recorded exchanges of a running Harbor 2.15.2, in their order.
//!
//! Tokens, upload IDs and the content of blobs were not recorded and are replaced by those of the test. All else has to
//! be equal: status, relevant headers, and bodies except for numbers and times that a server chooses.

use std::collections::BTreeMap;
use std::io::Write as _;

use serde_json::Value;
use upperdeck::common::digest::Digest;

use crate::description::{Description, shared};
use crate::http::{Request, Response};
use crate::stand_in::{ADMIN, StandIn};
use crate::support;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

pub struct Exchange {
    pub method: String,
    pub url: String,
    pub auth: String,
    pub content_type: Option<String>,
    pub body: Option<String>,
    pub status: u16,
    pub headers: BTreeMap<String, String>,
    pub answer: String,
}

pub fn exchanges(text: &str) -> Result<Vec<Exchange>> {
    let text_of = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    text.lines()
        .map(|line| {
            let line: Value = serde_json::from_str(line)?;
            let (request, response) = (&line["request"], &line["response"]);
            let headers = response["headers"].as_object().into_iter().flatten();
            Ok(Exchange {
                method: text_of(&request["method"]),
                url: text_of(&request["url"]).replace("http://harbor.example", ""),
                auth: text_of(&request["auth"]),
                content_type: request["content_type"].as_str().map(str::to_owned),
                body: request["body"].as_str().map(str::to_owned),
                status: response["status"].as_u64().unwrap_or_default() as u16,
                headers: headers.map(|(k, v)| (k.clone(), text_of(v))).collect(),
                answer: text_of(&response["body"]),
            })
        })
        .collect()
}

pub fn upload_id(url: &str) -> Option<&str> {
    let rest = url.split("/blobs/uploads/").nth(1)?;
    rest.split('?').next().filter(|id| !id.is_empty())
}

pub fn parameter<'a>(url: &'a str, name: &str) -> Option<&'a str> {
    url.split(['?', '&'])
        .find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='))
}

/// Returns content for a blob of which only digest and size are known.
pub fn content(digest: &str, size: usize) -> Vec<u8> {
    match size {
        2 => b"{}".to_vec(),
        100 => format!(
            "{:<100}",
            r#"{"architecture":"amd64","os":"linux","config":{}}"#
        )
        .into_bytes(),
        _ => digest.bytes().cycle().skip(7).take(size).collect(),
    }
}

/// Returns the credentials of an exchange, which the record does not include.
fn credentials(n: usize, robot: &(String, String)) -> (String, String) {
    match n {
        22 => (ADMIN.0.to_owned(), "wrong".to_owned()),
        65..=70 => robot.clone(),
        _ => (ADMIN.0.to_owned(), ADMIN.1.to_owned()),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_stand_in_answers_as_harbor_did() -> Result<()> {
    let Some(path) = shared("observed.jsonl") else {
        support::ignore("needs ../shared/harbor/observed.jsonl");
        return Ok(());
    };
    let mut description = Description::load()?.ok_or("no description beside the record")?;
    let exchanges = exchanges(&std::fs::read_to_string(path)?)?;
    assert_eq!(exchanges.len(), 84);
    let stand_in = StandIn::start()?;
    let base = format!("http://{}", stand_in.server.address);
    {
        let mut state = stand_in.state.lock().unwrap();
        state.project("bob", false, Some(1 << 30));
        let manifest = exchanges[9].answer.as_bytes();
        let document: Value = serde_json::from_slice(manifest)?;
        for layer in document["layers"].as_array().into_iter().flatten() {
            let digest = layer["digest"].as_str().unwrap_or_default();
            state.seed(
                "library/pybase",
                digest,
                layer["size"].as_u64().unwrap_or_default(),
            );
        }
        state.seed_manifest("library/pybase", "1", manifest);
    }
    // Maps values of the recorded server to those of the stand-in.
    let mut ours = BTreeMap::<String, String>::new();
    let mut locations = BTreeMap::<String, String>::new();
    let mut tokens = Vec::<(usize, String, String)>::new();
    let mut robot = (String::new(), String::new());
    let translate = |text: &str, ours: &BTreeMap<String, String>| {
        ours.iter().fold(text.to_owned(), |text, (theirs, own)| {
            text.replace(theirs, own)
        })
    };
    let client = reqwest_client();
    let mut wrong = Vec::new();
    for (n, exchange) in exchanges.iter().enumerate() {
        let mut body = match exchange.body.as_deref() {
            Some("<stream>") => {
                let id = upload_id(&exchange.url).ok_or("a stream without an upload")?;
                let range = exchange.headers["Range"].trim_start_matches("0-");
                let closing = exchanges[n..]
                    .iter()
                    .find(|e| e.method == "PUT" && e.url.contains(id));
                let digest = parameter(
                    &closing.ok_or("an upload that is not closed")?.url,
                    "digest",
                );
                content(digest.unwrap_or_default(), range.parse::<usize>()? + 1)
            }
            Some("<3000000 bytes>") => content(
                parameter(&exchange.url, "digest").unwrap_or_default(),
                3_000_000,
            ),
            Some(text) => translate(text, &ours).into_bytes(),
            None => Vec::new(),
        };
        if let Some(theirs) = exchange
            .body
            .as_ref()
            .and_then(|_| exchange.headers.get("Docker-Content-Digest"))
        {
            ours.insert(theirs.clone(), Digest::of(&body).to_string());
        }
        let mut url = translate(&exchange.url, &ours);
        if let Some(id) = upload_id(&exchange.url) {
            url.clone_from(&locations[id]);
            if let Some(theirs) = parameter(&exchange.url, "digest") {
                let previous = exchanges[..n]
                    .iter()
                    .rev()
                    .find(|e| e.method == "PATCH" && e.url.contains(id));
                if body.is_empty()
                    && let Some(range) = previous.and_then(|e| e.headers.get("Range"))
                {
                    let size = range.trim_start_matches("0-").parse::<usize>()? + 1;
                    let own = Digest::of(content(theirs, size)).to_string();
                    ours.insert(theirs.to_owned(), own);
                } else {
                    ours.insert(theirs.to_owned(), Digest::of(&body).to_string());
                }
                url = format!("{url}&digest={}", ours[theirs]);
            }
        }
        if n == 82 {
            // The record does not include the aborted PATCH between the two requests.
            let mut cut = std::net::TcpStream::connect(stand_in.server.address)?;
            let with_push = tokens
                .iter()
                .rev()
                .find(|(_, scopes, _)| scopes.contains("repository:bob/x:pull,push"));
            let (_, _, token) = with_push.ok_or("no token")?;
            write!(
                cut,
                "PATCH {url} HTTP/1.1\r\nHost: harbor.example\r\nAuthorization: Bearer {token}\r\n\
                 Transfer-Encoding: chunked\r\n\r\nffff\r\nbeginning"
            )?;
            drop(cut);
            std::thread::sleep(std::time::Duration::from_millis(200));
        }
        let mut sending = client
            .request(exchange.method.parse()?, format!("{base}{url}"))
            .header("Host", "harbor.example");
        match exchange.auth.as_str() {
            "basic" => {
                let (user, password) = credentials(n, &robot);
                sending = sending.basic_auth(user, Some(password));
            }
            "bearer" => {
                let named = exchange
                    .url
                    .trim_start_matches("/v2/")
                    .split('?')
                    .next()
                    .unwrap_or_default();
                let fits = |scopes: &str| {
                    scopes.split("repository:").any(|s| {
                        let name = s.split(':').next().unwrap_or_default();
                        !name.is_empty() && named.starts_with(&format!("{name}/"))
                    })
                };
                // These exchanges show the effect of a token with insufficient scope.
                let only = match n {
                    11 | 16 => Some(1),
                    12..=15 => Some(7),
                    _ => None,
                };
                let token = tokens
                    .iter()
                    .rev()
                    .find(|(at, scopes, _)| only.map_or_else(|| fits(scopes), |n| *at == n));
                sending = sending.bearer_auth(&token.ok_or_else(|| format!("{n}: no token"))?.2);
            }
            _ => {}
        }
        if let Some(content_type) = &exchange.content_type {
            sending = sending.header("Content-Type", content_type);
        }
        let sent = std::mem::take(&mut body);
        let answer = sending.body(sent.clone()).send().await?;
        let status = answer.status().as_u16();
        let headers = answer.headers().clone();
        let header = |name: &str| {
            headers
                .get(name)
                .and_then(|v| v.to_str().ok())
                .unwrap_or_default()
                .to_owned()
        };
        let bytes = answer.bytes().await?;
        let said = String::from_utf8_lossy(&bytes).into_owned();
        let shown = format!("{n}: {} {}", exchange.method, exchange.url);
        if status != exchange.status {
            wrong.push(format!(
                "{shown}: {status} and not {}: {said}",
                exchange.status
            ));
            continue;
        }
        if exchange.url.starts_with("/service/token") {
            let token: Value = serde_json::from_slice(&bytes)?;
            let scopes = crate::http::unescape(&exchange.url);
            tokens.push((
                n,
                scopes,
                token["token"].as_str().unwrap_or_default().to_owned(),
            ));
        }
        if let Some(id) = exchange.headers.get("Docker-Upload-Uuid") {
            let location = header("location").replace("http://harbor.example", "");
            locations.insert(id.clone(), location);
        }
        if n == 64 {
            let made: Value = serde_json::from_slice(&bytes)?;
            let text = |name: &str| made[name].as_str().unwrap_or_default().to_owned();
            robot = (text("name"), text("secret"));
        }
        for (name, theirs) in &exchange.headers {
            if name == "Content-Length" || name == "Docker-Upload-Uuid" {
                continue;
            }
            let (theirs, own) = (translate(theirs, &ours), header(name));
            let same = if name == "Location" {
                shape(&theirs) == shape(&own)
            } else {
                theirs == own
            };
            if !same {
                wrong.push(format!("{shown}: {name}: {own:?} and not {theirs:?}"));
            }
        }
        let expected = translate(&exchange.answer, &ours);
        if exchange.method != "HEAD" {
            match (
                serde_json::from_str::<Value>(&expected),
                serde_json::from_slice::<Value>(&bytes),
            ) {
                (Ok(theirs), Ok(own)) => differences(&shown, "", &theirs, &own, &mut wrong),
                _ if expected.trim() == said.trim() => {}
                _ => wrong.push(format!("{shown}: {said:?} and not {expected:?}")),
            }
        }
        if exchange.url.starts_with("/api/") {
            // Both are validated against the description; the recorded answer first, as it shows what the description
            // omits.
            let (path, query) = exchange.url.split_once('?').unwrap_or((&exchange.url, ""));
            let request = Request {
                method: exchange.method.clone(),
                path: path.to_owned(),
                query: query.to_owned(),
                body: sent,
                ..Request::default()
            };
            description.allow(&exchange.method, path, exchange.status);
            for body in [exchange.answer.as_bytes(), &bytes] {
                let response = Response::new(exchange.status).body(body);
                if !(body.is_empty() && exchange.status < 400) {
                    wrong.extend(description.judge(&request, &response)?);
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}

/// Returns a `Location` without the parts that the server chooses.
pub fn shape(location: &str) -> String {
    let path = location.split('?').next().unwrap_or_default();
    let (start, last) = path.rsplit_once('/').unwrap_or(("", path));
    let query = if location.contains("?_state=") {
        "?_state"
    } else {
        ""
    };
    if last.starts_with("sha256:") {
        format!("{path}{query}")
    } else {
        format!("{start}/*{query}")
    }
}

/// Returns whether the server chooses the value of a field.
fn is_chosen(key: &str) -> bool {
    key == "id"
        || key.ends_with("_id")
        || key.ends_with("_time")
        || matches!(
            key,
            "token" | "issued_at" | "secret" | "icon" | "pull_count" | "expires_at"
        )
}

pub fn differences(shown: &str, at: &str, theirs: &Value, own: &Value, wrong: &mut Vec<String>) {
    match (theirs, own) {
        (Value::Object(a), Value::Object(b)) => {
            for key in a.keys().chain(b.keys().filter(|key| !a.contains_key(*key))) {
                let (left, right) = (a.get(key), b.get(key));
                match (left, right) {
                    (Some(left), Some(right)) if is_chosen(key) => {
                        if std::mem::discriminant(left) != std::mem::discriminant(right) {
                            wrong.push(format!("{shown}: {at}.{key}: {right} and not {left}"));
                        }
                    }
                    (Some(left), Some(right)) => {
                        differences(shown, &format!("{at}.{key}"), left, right, wrong);
                    }
                    _ => wrong.push(format!("{shown}: {at}.{key}: {right:?} and not {left:?}")),
                }
            }
        }
        (Value::Array(a), Value::Array(b)) if a.len() == b.len() => {
            for (i, (a, b)) in a.iter().zip(b).enumerate() {
                differences(shown, &format!("{at}[{i}]"), a, b, wrong);
            }
        }
        (a, b) if a == b => {}
        (a, b) => wrong.push(format!("{shown}: {at}: {b} and not {a}")),
    }
}

pub fn reqwest_client() -> reqwest::Client {
    let _ = rustls::crypto::ring::default_provider().install_default();
    reqwest::Client::builder().no_proxy().build().unwrap()
}
