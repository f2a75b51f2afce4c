//! A stand-in for the parts of Harbor 2.15 that upperdeck uses. It is verified against the published description of the
//! API and against recorded answers of a running Harbor (see `observed` and `replay`).

mod api;
mod artifacts;
mod documents;
mod pages;
mod registry;
mod who;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::{Value, json};
use upperdeck::common::digest::Digest;

use crate::http::{Request, Response, Server, Slow, unescape};

/// The address configured in Harbor, which may differ from the one that it is reached at.
const EXTERNAL: &str = "http://harbor.example";
pub const ADMIN: (&str, &str) = ("admin", "Harbor12345");
/// Go's zero time, which stands for "never".
const NEVER: &str = "0001-01-01T00:00:00.000Z";

pub struct StandIn {
    pub server: Server,
    pub state: Arc<Mutex<State>>,
}

#[derive(Default)]
pub struct State {
    projects: BTreeMap<String, Project>,
    users: BTreeMap<String, User>,
    robots: BTreeMap<String, who::Robot>,
    tokens: BTreeMap<String, who::Token>,
    labels: BTreeMap<u64, Value>,
    uploads: BTreeMap<String, Upload>,
    blobs: BTreeMap<String, Blob>,
    next: u64,
    /// All exchanges with the API, for validation against its description.
    pub seen: Vec<(Request, Response)>,
    pub read_only: bool,
    /// A user for whom a wrong password is being checked at the moment: the right one is refused meanwhile.
    pub locked_out: Option<String>,
    /// A garbage collection takes place before the next manifest is written.
    pub collect_before_manifest: bool,
    /// Number of manifests that are answered with 500 before one is accepted.
    pub fail_manifests: u32,
    /// Requests with this method and this text in the path are answered slowly.
    pub slow: Option<(&'static str, &'static str, Slow)>,
    /// Number of requests that were answered slowly.
    pub slowed: u32,
}

struct User {
    id: u64,
    password: String,
}

#[derive(Default)]
struct Project {
    id: u64,
    owner: (u64, String),
    metadata: BTreeMap<String, String>,
    limit: Option<u64>,
    quota: u64,
    registry: Option<i64>,
    /// Blobs and manifests that count towards the quota, with their sizes.
    holds: BTreeMap<String, u64>,
    repositories: BTreeMap<String, Repository>,
    immutable: Vec<(u64, Value)>,
}

#[derive(Default)]
struct Repository {
    id: u64,
    artifacts: Vec<Artifact>,
    /// Blobs that the registry behind Harbor has under this name. They stay until a garbage collection.
    links: BTreeSet<String>,
    updated: u64,
    pulls: u64,
}

pub struct Artifact {
    id: u64,
    digest: String,
    bytes: Vec<u8>,
    media_type: String,
    tags: Vec<(u64, String, u64)>,
    labels: Vec<u64>,
    pushed: u64,
    subject: Option<String>,
}

struct Upload {
    repository: String,
    bytes: Vec<u8>,
}

/// A blob. Only the size is known if it existed before the test.
struct Blob {
    size: u64,
    content: Option<Vec<u8>>,
}

fn errors(status: u16, code: &str, message: &str) -> Response {
    let body = json!({"errors": [{"code": code, "message": message}]});
    Response::new(status)
        .with("Content-Type", "application/json; charset=utf-8")
        .body(format!("{body}\n"))
}

fn missing(what: &str) -> Response {
    errors(404, "NOT_FOUND", &format!("{what} not found"))
}

/// Formats a size like go-units.
fn human(bytes: u64) -> String {
    let (mut value, mut unit) = (bytes as f64, 0);
    while value >= 1024.0 {
        (value, unit) = (value / 1024.0, unit + 1);
    }
    let unit = ["B", "KiB", "MiB", "GiB", "TiB"][unit];
    if unit == "B" {
        format!("{bytes} B")
    } else {
        format!("{value:.1} {unit}")
    }
}

fn stamp(n: u64) -> String {
    format!(
        "2026-11-23T{:02}:{:02}:{:02}.{:03}Z",
        8 + n / 3_600_000,
        n / 60_000 % 60,
        n / 1000 % 60,
        n % 1000
    )
}

/// Splits `PROJECT/REPOSITORY`.
fn split(path: &str) -> (&str, &str) {
    path.split_once('/').unwrap_or((path, ""))
}

impl StandIn {
    pub fn start() -> std::io::Result<Self> {
        let state = Arc::new(Mutex::new(State::default()));
        {
            let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
            state.project("library", true, None);
        }
        let shared = Arc::clone(&state);
        let server = Server::start(move |request| {
            let mut state = shared.lock().unwrap_or_else(PoisonError::into_inner);
            let mut answer = state.answer(&request);
            if let Some((method, part, slow)) = state.slow
                && request.method == method
                && request.path.contains(part)
            {
                answer.slow = Some(slow);
                state.slowed += 1;
            }
            if request.path.starts_with("/api/") {
                state.seen.push((request, answer.clone()));
            }
            answer
        })?;
        Ok(Self { server, state })
    }
}

impl State {
    fn id(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// Adds a project of the administrator. A negative limit stands for none.
    pub fn project(&mut self, name: &str, public: bool, limit: Option<i64>) -> u64 {
        let (id, quota) = (self.id(), self.id());
        let limit = limit.and_then(|l| u64::try_from(l).ok());
        let project = Project {
            id,
            owner: (1, ADMIN.0.to_owned()),
            metadata: BTreeMap::from([("public".to_owned(), public.to_string())]),
            limit: limit.filter(|&l| l > 0),
            quota,
            ..Project::default()
        };
        self.projects.insert(name.to_owned(), project);
        id
    }

    pub fn add_user(&mut self, name: &str, password: &str) {
        let (id, password) = (self.id(), password.to_owned());
        self.users.insert(name.to_owned(), User { id, password });
    }

    /// Adds a proxy cache project.
    pub fn proxy(&mut self, name: &str) {
        self.project(name, true, None);
        if let Some(project) = self.projects.get_mut(name) {
            project.registry = Some(1);
        }
    }

    /// Adds a blob without content that exists before the test.
    pub fn seed(&mut self, repository: &str, digest: &str, size: u64) {
        let content = None;
        self.blobs.insert(digest.to_owned(), Blob { size, content });
        self.link(repository, digest);
        if let Some(project) = self.projects.get_mut(split(repository).0) {
            project.holds.insert(digest.to_owned(), size);
        }
    }

    pub fn seed_manifest(&mut self, repository: &str, tag: &str, bytes: &[u8]) {
        let (artifact, tag_id, at) = (self.id(), self.id(), self.id());
        let (project, name) = split(repository);
        let entry = self.projects.entry(project.to_owned()).or_default();
        let repository = entry.repositories.entry(name.to_owned()).or_default();
        repository.id = artifact;
        repository.artifacts.push(Artifact {
            id: artifact,
            digest: Digest::of(bytes).to_string(),
            bytes: bytes.to_vec(),
            media_type: "application/vnd.oci.image.manifest.v1+json".to_owned(),
            tags: vec![(tag_id, tag.to_owned(), at)],
            labels: Vec::new(),
            pushed: at,
            subject: None,
        });
    }

    /// Returns whether all blobs of a tagged image are there.
    pub fn is_whole(&self, repository: &str, tag: &str) -> bool {
        let (project, name) = split(repository);
        let found = self.projects[project].repositories.get(name);
        let image = found.and_then(|r| r.artifacts.iter().find(|a| a.is(tag)));
        image.is_some_and(|image| {
            let mut named = named(&image.manifest()).into_iter();
            named.all(|digest| {
                self.has_link(repository, &digest) && self.blobs.contains_key(&digest)
            })
        })
    }

    /// Returns whether the registry behind Harbor has a blob under the name of the repository.
    pub fn has_link(&self, repository: &str, digest: &str) -> bool {
        let (project, name) = split(repository);
        let found = self.projects.get(project);
        found
            .and_then(|p| p.repositories.get(name))
            .is_some_and(|r| r.links.contains(digest))
    }

    fn link(&mut self, repository: &str, digest: &str) {
        let (project, name) = split(repository);
        if let Some(project) = self.projects.get_mut(project) {
            let entry = project.repositories.entry(name.to_owned()).or_default();
            entry.links.insert(digest.to_owned());
        }
    }

    /// Removes all blobs that belong to no image, as Harbor's garbage collection does without its time window.
    pub fn collect_garbage(&mut self) {
        let mut needed = BTreeSet::new();
        for project in self.projects.values_mut() {
            let mut held = BTreeSet::new();
            for repository in project.repositories.values_mut() {
                let names = repository.artifacts.iter().flat_map(Artifact::content);
                let names: BTreeSet<String> = names.collect();
                repository.links.retain(|link| names.contains(link));
                held.extend(names);
            }
            project.holds.retain(|digest, _| held.contains(digest));
            needed.extend(held);
        }
        self.blobs.retain(|digest, _| needed.contains(digest));
    }

    fn answer(&mut self, request: &Request) -> Response {
        if request.path == "/service/token" {
            return self.token(request);
        }
        let writes = !matches!(request.method.as_str(), "GET" | "HEAD");
        let settings = request.path == "/api/v2.0/configurations";
        if self.read_only && writes && !settings && !request.path.contains("/robots") {
            let said = "The system is in read only mode. Any modification is prohibited.";
            return errors(403, "DENIED", said);
        }
        if let Some(path) = request.path.strip_prefix("/api/v2.0") {
            return self.api(request, path);
        }
        if let Some(path) = request.path.strip_prefix("/v2/") {
            let answer = self.v2(request, &unescape(path));
            return answer.with("Docker-Distribution-Api-Version", "registry/2.0");
        }
        missing("it")
    }
}

impl Project {
    fn is_public(&self) -> bool {
        self.metadata.get("public").is_some_and(|p| p == "true")
    }

    fn wants_signatures(&self) -> bool {
        let wanted = self.metadata.get("enable_content_trust_cosign");
        wanted.is_some_and(|wanted| wanted == "true")
    }

    fn used(&self) -> u64 {
        self.holds.values().sum()
    }

    fn is_immutable(&self, tag: &str) -> bool {
        self.immutable.iter().any(|(_, rule)| {
            let pattern = rule["tag_selectors"][0]["pattern"].as_str();
            pattern.is_some_and(|pattern| pattern == tag || pattern == "**")
        })
    }

    /// Removes what no artifact of the project needs any more of what one needed that is gone.
    fn release(&mut self, gone: &Artifact) {
        let kept = self.repositories.values().flat_map(|r| &r.artifacts);
        let kept: BTreeSet<String> = kept.flat_map(Artifact::content).collect();
        for digest in gone.content() {
            if !kept.contains(&digest) {
                self.holds.remove(&digest);
            }
        }
    }
}

impl Artifact {
    fn is(&self, reference: &str) -> bool {
        self.digest == reference || self.tags.iter().any(|(_, tag, _)| tag == reference)
    }

    fn manifest(&self) -> Value {
        serde_json::from_slice(&self.bytes).unwrap_or_default()
    }

    fn children(&self) -> Vec<String> {
        let manifest = self.manifest();
        let named = manifest["manifests"].as_array().into_iter().flatten();
        let named = named.filter_map(|m| m["digest"].as_str().map(str::to_owned));
        named.collect()
    }

    /// Returns the digests of config, layers and manifest.
    fn content(&self) -> Vec<String> {
        let manifest = self.manifest();
        let mut all = named(&manifest);
        all.push(self.digest.clone());
        all
    }
}

/// Returns the digests that a manifest names, the config first.
fn named(manifest: &Value) -> Vec<String> {
    let layers = manifest["layers"].as_array().into_iter().flatten();
    let children = manifest["manifests"].as_array().into_iter().flatten();
    let all = [&manifest["config"]]
        .into_iter()
        .chain(layers)
        .chain(children);
    let digests = all.filter_map(|d| d["digest"].as_str().map(str::to_owned));
    digests.collect()
}
