//! Compares the stand-in with the second record of a running Harbor 2.15.2: rights, read-only, quota, immutable tags,
//! accessories, indexes, sorting. An index names the user and the step of each exchange.

use std::collections::BTreeMap;

use serde_json::Value;
use upperdeck::common::digest::Digest;

use crate::description::shared;
use crate::observed::{self, Exchange};
use crate::stand_in::{ADMIN, StandIn};
use crate::support;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Exchanges that the stand-in does not model: additions of artifacts, which upperdeck does not use; and the order by
/// the time of the last pull, which Harbor writes later.
const NOT_MODELLED: [u32; 9] = [655, 656, 657, 658, 659, 660, 661, 662, 802];

struct Step {
    line: u32,
    user: String,
    bearer: bool,
    name: String,
}

fn steps(text: &str) -> Result<Vec<Step>> {
    text.lines()
        .map(|line| {
            let mut fields = line.split('\t');
            let mut next = || fields.next().ok_or("a short line in the index");
            let (line, _, user, name) = (next()?, next()?, next()?, next()?);
            let (user, bearer) = user
                .strip_suffix(" (bearer)")
                .map_or((user, false), |user| (user, true));
            Ok(Step {
                line: line.parse()?,
                user: user.to_owned(),
                bearer,
                name: name.to_owned(),
            })
        })
        .collect()
}

/// What the record calls differently from the stand-in.
#[derive(Default)]
struct World {
    /// Hexadecimal digests.
    digests: BTreeMap<String, String>,
    /// IDs in paths, queries and bodies, by what they are of.
    ids: BTreeMap<(&'static str, String), String>,
    locations: BTreeMap<String, String>,
    secrets: BTreeMap<String, String>,
    /// User, scopes, token.
    tokens: Vec<(String, String, String)>,
}

impl World {
    fn translate(&self, text: &str) -> String {
        let pairs = self.digests.iter();
        pairs.fold(text.to_owned(), |text, (theirs, own)| {
            text.replace(theirs, own)
        })
    }

    fn learn(&mut self, theirs: &str, own: &str) {
        let hex = |digest: &str| digest.trim_start_matches("sha256:").to_owned();
        self.digests.insert(hex(theirs), hex(own));
    }

    /// Replaces an ID that follows `before`, up to the next character that is no digit.
    fn id(&self, text: &str, before: &str, kind: &'static str) -> String {
        let Some(at) = text.find(before) else {
            return text.to_owned();
        };
        let start = at + before.len();
        let digits = text[start..].bytes().take_while(u8::is_ascii_digit).count();
        let (theirs, rest) = text[start..].split_at(digits);
        match self.ids.get(&(kind, theirs.to_owned())) {
            Some(own) => format!("{}{own}{rest}", &text[..start]),
            None => text.to_owned(),
        }
    }

    fn ids_in(&self, text: &str) -> String {
        [
            ("/robots/", "robot"),
            ("reference_id=", "project"),
            ("/quotas/", "quota"),
            ("project_id=", "project"),
            ("\"project_id\": ", "project"),
            ("/labels/", "label"),
            ("{\"id\": ", "label"),
            ("q=labels%3D%28", "label"),
            ("%28", "label"),
            ("%20", "label"),
        ]
        .into_iter()
        .fold(text.to_owned(), |text, (before, kind)| {
            self.id(&text, before, kind)
        })
    }

    /// Learns what the two servers call the same thing.
    fn compare(&mut self, url: &str, theirs: &Exchange, location: &str, own: &Value) {
        let last = |text: &str| text.rsplit('/').next().unwrap_or_default().to_owned();
        let their_location = theirs.headers.get("Location").map(|l| last(l));
        let kinds = [
            ("/api/v2.0/projects", "project"),
            ("/api/v2.0/robots", "robot"),
            ("/api/v2.0/labels", "label"),
        ];
        for (path, kind) in kinds {
            if let (true, Some(id)) = (url == path && theirs.method == "POST", &their_location) {
                self.ids.insert((kind, id.clone()), last(location));
            }
        }
        if url.starts_with("/api/v2.0/quotas?") {
            let document: Value = serde_json::from_str(&theirs.answer).unwrap_or_default();
            let (id, own) = (&document[0]["id"], &own[0]["id"]);
            self.ids.insert(("quota", id.to_string()), own.to_string());
        }
    }

    fn token_for(&self, step: &Step, before: bool, reads: bool, path: &str) -> Option<&str> {
        let fits = |scopes: &str| {
            scopes.split("repository:").any(|s| {
                let (name, actions) = s.split_once(':').unwrap_or_default();
                let enough = reads || actions.contains("push") || actions.contains("delete");
                !name.is_empty() && enough && path.starts_with(&format!("/v2/{name}/"))
            })
        };
        let mut found = self
            .tokens
            .iter()
            .rev()
            .filter(|(user, scopes, _)| *user == step.user && fits(scopes));
        // The first token of a robot is that from before it was disabled.
        let token = if before {
            found.next_back()
        } else {
            found.next()
        };
        let newest = || {
            self.tokens
                .iter()
                .rev()
                .find(|(user, _, _)| *user == step.user)
        };
        token.or_else(newest).map(|(_, _, token)| token.as_str())
    }
}

/// Returns the password that a step uses.
fn password(step: &Step, world: &World) -> String {
    let wrong = step.name.contains("wrong");
    let secret = world.secrets.get(&step.user);
    match (step.user.as_str(), wrong) {
        (_, true) => "wrong".to_owned(),
        (user, _) if user == ADMIN.0 => ADMIN.1.to_owned(),
        ("bob", _) => "Bob12345".to_owned(),
        _ => secret.cloned().unwrap_or_else(|| "none".to_owned()),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_stand_in_answers_as_harbor_did_on_rights_quotas_and_rules() -> Result<()> {
    let (Some(record), Some(index)) = (shared("observed-2.jsonl"), shared("observed-2.index.tsv"))
    else {
        support::ignore("needs ../shared/harbor/observed-2.jsonl");
        return Ok(());
    };
    let exchanges = observed::exchanges(&std::fs::read_to_string(record)?)?;
    let steps = steps(&std::fs::read_to_string(index)?)?;
    assert_eq!((exchanges.len(), steps.len()), (927, 927));
    let stand_in = StandIn::start()?;
    stand_in.state.lock().unwrap().add_user("bob", "Bob12345");
    let base = format!("http://{}", stand_in.server.address);
    let client = observed::reqwest_client();
    let mut world = World::default();
    let mut wrong = Vec::new();
    for (n, (exchange, step)) in exchanges.iter().zip(&steps).enumerate() {
        prepare(&stand_in, step);
        let (url, body) = request_of(&exchanges, n, &mut world)?;
        let mut sending = client
            .request(exchange.method.parse()?, format!("{base}{url}"))
            .header("Host", "harbor.example");
        let before = step.name.contains("the token from before")
            || step.name.starts_with("robot expired (expires_at");
        let reads = matches!(exchange.method.as_str(), "GET" | "HEAD");
        let last_two = before
            && steps[n..]
                .iter()
                .take(3)
                .filter(|s| s.name == step.name)
                .count()
                < 3;
        if step.bearer {
            let token = world.token_for(step, last_two, reads, &exchange.url);
            let token = token.ok_or_else(|| format!("{}: no token", step.line))?;
            sending = sending.bearer_auth(token);
        } else if exchange.auth == "basic" {
            sending = sending.basic_auth(&step.user, Some(password(step, &world)));
        }
        if let Some(content_type) = &exchange.content_type {
            sending = sending.header("Content-Type", content_type);
        }
        let answer = sending.body(body).send().await?;
        let status = answer.status().as_u16();
        let location = answer.headers().get("location");
        let location = location.and_then(|l| l.to_str().ok()).unwrap_or_default();
        let location = location.replace("http://harbor.example", "");
        let headers: BTreeMap<String, String> = answer
            .headers()
            .iter()
            .filter_map(|(k, v)| Some((k.to_string(), v.to_str().ok()?.to_owned())))
            .collect();
        let bytes = answer.bytes().await?;
        let own: Value = serde_json::from_slice(&bytes).unwrap_or_default();
        if exchange.url.starts_with("/service/token") {
            let token = own["token"].as_str().unwrap_or_default().to_owned();
            let scopes = crate::http::unescape(&exchange.url);
            world.tokens.push((step.user.clone(), scopes, token));
        }
        if let Some(secret) = own["secret"].as_str() {
            let name = own["name"].as_str().unwrap_or_default();
            world.secrets.insert(name.to_owned(), secret.to_owned());
        }
        if let Some(id) = exchange.headers.get("Docker-Upload-Uuid") {
            world.locations.insert(id.clone(), location.clone());
        }
        world.compare(&exchange.url, exchange, &location, &own);
        if NOT_MODELLED.contains(&step.line) {
            continue;
        }
        let shown = format!("{} {} {}", step.line, exchange.method, exchange.url);
        judge(
            &shown, exchange, status, &headers, &bytes, &world, &mut wrong,
        );
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}

/// Does what the record does outside of it: an expiry set in the database, a wrong password in flight.
fn prepare(stand_in: &StandIn, step: &Step) {
    let mut state = stand_in.state.lock().unwrap();
    if let Some(robot) = state.robot("robot$s05-robot+s05-robot") {
        robot.expired = step.name.contains("expired");
    }
    let locked = step.name == "user, right password meanwhile";
    state.locked_out = locked.then(|| step.user.clone());
}

/// Returns path and body of a request in the stand-in's terms.
fn request_of(exchanges: &[Exchange], n: usize, world: &mut World) -> Result<(String, Vec<u8>)> {
    let exchange = &exchanges[n];
    let body = match exchange.body.as_deref() {
        Some("<stream>") => {
            let id = observed::upload_id(&exchange.url).ok_or("a stream without an upload")?;
            let range = exchange.headers.get("Range").map_or("0-9", String::as_str);
            let closing = exchanges[n..]
                .iter()
                .find(|e| e.method == "PUT" && e.url.contains(id));
            let digest = observed::parameter(
                &closing.ok_or("an upload that is not closed")?.url,
                "digest",
            );
            let size = range.trim_start_matches("0-").parse::<usize>()? + 1;
            observed::content(digest.unwrap_or_default(), size)
        }
        Some(text) if text.starts_with('<') && text.ends_with(" bytes>") => {
            let size = text.trim_start_matches('<').trim_end_matches(" bytes>");
            let digest = observed::parameter(&exchange.url, "digest").unwrap_or_default();
            observed::content(digest, size.parse()?)
        }
        Some(text) => world.ids_in(&world.translate(text)).into_bytes(),
        None => Vec::new(),
    };
    if exchange.url.contains("/manifests/") && exchange.method == "PUT" {
        learn_manifest(&body, exchange, world);
    }
    let mut url = world.ids_in(&world.translate(&exchange.url));
    if let Some(id) = observed::upload_id(&exchange.url) {
        url.clone_from(&world.locations[id]);
        if let Some(theirs) = observed::parameter(&exchange.url, "digest") {
            let previous = exchanges[..n]
                .iter()
                .rev()
                .find(|e| e.method == "PATCH" && e.url.contains(id));
            let range = previous.and_then(|e| e.headers.get("Range"));
            let whole = match range {
                Some(range) if body.is_empty() => {
                    let size = range.trim_start_matches("0-").parse::<usize>()? + 1;
                    observed::content(theirs, size)
                }
                _ => body.clone(),
            };
            let own = Digest::of(&whole).to_string();
            world.learn(theirs, &own);
            url = format!("{url}&digest={own}");
        }
    }
    Ok((url, body))
}

/// Learns the digest of a manifest that is about to be written.
fn learn_manifest(body: &[u8], exchange: &Exchange, world: &mut World) {
    if let Some(theirs) = exchange.headers.get("Docker-Content-Digest") {
        world.learn(theirs, &Digest::of(body).to_string());
    }
}

/// Replaces the IDs of labels, artifacts and repositories in a message.
fn without_ids(message: &mut Value) {
    let Some(text) = message.as_str() else { return };
    let mut words: Vec<&str> = text.split(' ').collect();
    for n in 1..words.len() {
        let named = matches!(words[n - 1], "label" | "artifact" | "repository");
        if named && words[n].bytes().all(|b| b.is_ascii_digit()) {
            words[n] = "N";
        }
    }
    *message = words.join(" ").into();
}

fn judge(
    shown: &str,
    exchange: &Exchange,
    status: u16,
    headers: &BTreeMap<String, String>,
    bytes: &[u8],
    world: &World,
    wrong: &mut Vec<String>,
) {
    let said = String::from_utf8_lossy(bytes);
    if status != exchange.status {
        wrong.push(format!(
            "{shown}: {status} and not {}: {said}",
            exchange.status
        ));
        return;
    }
    for (name, theirs) in &exchange.headers {
        if matches!(
            name.as_str(),
            "Content-Length" | "Docker-Upload-Uuid" | "Content-Type"
        ) {
            continue;
        }
        let own = headers.get(&name.to_lowercase());
        let own = own.map_or("", String::as_str);
        let theirs = world.translate(theirs);
        let same = if name == "Location" {
            observed::shape(&theirs) == observed::shape(own)
        } else {
            theirs == own
        };
        if !same {
            wrong.push(format!("{shown}: {name}: {own:?} and not {theirs:?}"));
        }
    }
    if exchange.method == "HEAD" {
        return;
    }
    let expected = world.translate(&exchange.answer);
    let both = (
        serde_json::from_str::<Value>(&expected),
        serde_json::from_str::<Value>(&said),
    );
    match both {
        (Ok(mut theirs), Ok(mut own)) => {
            for document in [&mut theirs, &mut own] {
                if let Some(message) = document.pointer_mut("/errors/0/message") {
                    without_ids(message);
                }
            }
            observed::differences(shown, "", &theirs, &own, wrong);
        }
        _ if expected.trim() == said.trim() => {}
        _ => wrong.push(format!("{shown}: {said:?} and not {expected:?}")),
    }
}
