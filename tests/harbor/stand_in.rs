//! A stand-in for the parts of Harbor 2.15 that upperdeck uses. It is verified against the published description of the
//! API and against recorded answers of a running Harbor (see `observed`).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};

use percent_encoding::percent_decode_str;
use serde_json::{Value, json};
use upperdeck::common::digest::Digest;

use crate::http::{Request, Response, Server, unescape};

/// The address configured in Harbor, which may differ from the one that it is reached at.
const EXTERNAL: &str = "http://harbor.example";
pub const ADMIN: (&str, &str) = ("admin", "Harbor12345");
const NEVER: &str = "0001-01-01T00:00:00.000Z";

pub struct StandIn {
    pub server: Server,
    pub state: Arc<Mutex<State>>,
}

#[derive(Default)]
pub struct State {
    projects: BTreeMap<String, Project>,
    robots: BTreeMap<String, Robot>,
    tokens: BTreeMap<String, Token>,
    uploads: BTreeMap<String, Upload>,
    blobs: BTreeMap<String, Blob>,
    next: u64,
    /// All exchanges with the API, for validation against its description.
    pub seen: Vec<(Request, Response)>,
    pub read_only: bool,
}

#[derive(Default)]
struct Project {
    id: u64,
    public: bool,
    limit: Option<i64>,
    registry: Option<i64>,
    /// Blobs and manifests that count towards the quota, with their sizes.
    holds: BTreeMap<String, u64>,
    repositories: BTreeMap<String, Repository>,
    immutable: Vec<String>,
}

#[derive(Default)]
struct Repository {
    id: u64,
    artifacts: Vec<Artifact>,
    updated: u64,
}

struct Artifact {
    id: u64,
    digest: String,
    bytes: Vec<u8>,
    media_type: String,
    tags: Vec<(u64, String, u64)>,
    pushed: u64,
    subject: Option<String>,
}

struct Robot {
    secret: String,
    project: String,
    access: BTreeSet<(String, String)>,
}

struct Token {
    user: Option<String>,
    /// Granted actions by repository.
    grants: BTreeMap<String, BTreeSet<String>>,
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

fn unauthorized(challenge: &str, message: &str) -> Response {
    errors(401, "UNAUTHORIZED", &format!("{message}: {message}"))
        .with("Www-Authenticate", challenge)
}

/// Formats a size like go-units.
fn human(bytes: u64) -> String {
    let (mut value, mut unit) = (bytes as f64, 0);
    while value >= 1024.0 {
        (value, unit) = (value / 1024.0, unit + 1);
    }
    format!("{value:.1} {}", ["B", "KiB", "MiB", "GiB", "TiB"][unit])
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

impl StandIn {
    pub fn start() -> std::io::Result<Self> {
        let state = Arc::new(Mutex::new(State::default()));
        state
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .project("library", true, None);
        let shared = Arc::clone(&state);
        let server = Server::start(move |request| {
            let mut state = shared.lock().unwrap_or_else(PoisonError::into_inner);
            let answer = state.answer(&request);
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

    pub fn project(&mut self, name: &str, public: bool, limit: Option<i64>) -> u64 {
        let id = self.id();
        let project = Project {
            id,
            public,
            limit: limit.filter(|l| *l >= 0),
            ..Project::default()
        };
        self.projects.insert(name.to_owned(), project);
        id
    }

    /// Adds a blob without content that exists before the test.
    pub fn seed(&mut self, project: &str, digest: &str, size: u64) {
        self.blobs.insert(
            digest.to_owned(),
            Blob {
                size,
                content: None,
            },
        );
        if let Some(project) = self.projects.get_mut(project) {
            project.holds.insert(digest.to_owned(), size);
        }
    }

    /// Adds a proxy cache project.
    pub fn proxy(&mut self, name: &str) {
        self.project(name, true, None);
        if let Some(project) = self.projects.get_mut(name) {
            project.registry = Some(1);
        }
    }

    pub fn seed_manifest(&mut self, repository: &str, tag: &str, bytes: &[u8]) {
        let (project, name) = repository.split_once('/').unwrap_or_default();
        let (artifact, tag_id, at) = (self.id(), self.id(), self.id());
        let entry = self.projects.entry(project.to_owned()).or_default();
        let repository = entry.repositories.entry(name.to_owned()).or_default();
        repository.id = artifact;
        repository.artifacts.push(Artifact {
            id: artifact,
            digest: Digest::of(bytes).to_string(),
            bytes: bytes.to_vec(),
            media_type: "application/vnd.oci.image.manifest.v1+json".to_owned(),
            tags: vec![(tag_id, tag.to_owned(), at)],
            pushed: at,
            subject: None,
        });
    }

    fn answer(&mut self, request: &Request) -> Response {
        if request.path == "/service/token" {
            return self.token(request);
        }
        if let Some(path) = request.path.strip_prefix("/api/v2.0") {
            return self.api(request, path);
        }
        if let Some(path) = request.path.strip_prefix("/v2/") {
            let answer = self.v2(request, &unescape(path));
            return answer.with("Docker-Distribution-Api-Version", "registry/2.0");
        }
        errors(404, "NOT_FOUND", "not found")
    }

    /// Returns the authenticated user. `None` stands for anonymous, also if the password is wrong.
    fn user(&self, request: &Request) -> Option<String> {
        let (user, password) = request.basic()?;
        let right = (user == ADMIN.0 && password == ADMIN.1)
            || self
                .robots
                .get(&user)
                .is_some_and(|robot| robot.secret == password);
        right.then_some(user)
    }

    fn may(&self, user: Option<&str>, project: &str, resource: &str, action: &str) -> bool {
        let Some(found) = self.projects.get(project) else {
            return false;
        };
        let reads = matches!(action, "pull" | "list" | "read");
        match user {
            Some(user) if user == ADMIN.0 => true,
            Some(user) => self.robots.get(user).is_some_and(|robot| {
                let granted = (resource.to_owned(), action.to_owned());
                (robot.project == project && robot.access.contains(&granted))
                    || (found.public && reads)
            }),
            None => found.public && reads,
        }
    }

    /// Issues a token to every client. Missing rights show only when it is used.
    fn token(&mut self, request: &Request) -> Response {
        let user = self.user(request);
        let mut grants = BTreeMap::<String, BTreeSet<String>>::new();
        for scope in request.all("scope") {
            let mut parts = scope.splitn(3, ':');
            if let (Some("repository"), Some(name), Some(actions)) =
                (parts.next(), parts.next(), parts.next())
            {
                let project = name.split('/').next().unwrap_or_default();
                let granted = actions
                    .split(',')
                    .filter(|action| self.may(user.as_deref(), project, "repository", action));
                let granted = granted.map(str::to_owned).collect::<Vec<_>>();
                grants.entry(name.to_owned()).or_default().extend(granted);
            }
        }
        let value = format!("t{}", self.id());
        self.tokens.insert(value.clone(), Token { user, grants });
        let body = json!({
            "token": value, "access_token": "", "expires_in": 1800, "issued_at": "2026-11-23T22:26:20Z",
        });
        Response::new(200)
            .with("Content-Type", "application/json; charset=utf-8")
            .body(body.to_string())
    }

    /// Returns whether the request's token or password permits `action` on `repository`.
    fn granted(&self, request: &Request, repository: &str, action: &str) -> bool {
        let project = repository.split('/').next().unwrap_or_default();
        if let Some(token) = request.bearer() {
            let token = self.tokens.get(token);
            return token.is_some_and(|token| {
                token
                    .grants
                    .get(repository)
                    .is_some_and(|actions| actions.contains(action))
            });
        }
        self.may(self.user(request).as_deref(), project, "repository", action)
    }

    fn v2(&mut self, request: &Request, path: &str) -> Response {
        let challenge = format!(
            "Bearer realm=\"http://{}/service/token\",service=\"harbor-registry\"",
            request.header("host")
        );
        if path.is_empty() {
            let known = request
                .bearer()
                .map(|token| self.tokens.get(token).is_some_and(|t| t.user.is_some()));
            if known.unwrap_or_else(|| self.user(request).is_some()) {
                return Response::new(200);
            }
            return unauthorized(&challenge, "unauthorized").body(
                "{\"errors\":[{\"code\":\"UNAUTHORIZED\",\"message\":\"unauthorized: unauthorized\"}]}\n",
            );
        }
        let split = [
            "/blobs/uploads/",
            "/blobs/",
            "/manifests/",
            "/tags/",
            "/referrers/",
        ]
        .into_iter()
        .find_map(|kind| {
            path.rfind(kind)
                .map(|at| (&path[..at], kind, &path[at + kind.len()..]))
        });
        let Some((repository, kind, rest)) = split else {
            return errors(404, "NOT_FOUND", "no such thing");
        };
        let project = repository.split('/').next().unwrap_or_default();
        if !self.projects.contains_key(project) {
            return unauthorized("", &format!("project {project} not found"));
        }
        let writes =
            !matches!(request.method.as_str(), "GET" | "HEAD") || kind == "/blobs/uploads/";
        let action = if request.method == "DELETE" && kind == "/manifests/" {
            "delete"
        } else if writes {
            "push"
        } else {
            "pull"
        };
        let mut needed = vec![(repository.to_owned(), action)];
        let mount = request.one("mount").zip(request.one("from"));
        if let Some((_, from)) = &mount {
            if !from.contains('/') {
                return errors(
                    400,
                    "BAD_REQUEST",
                    &format!("bad request: invalid repository name: {from}"),
                );
            }
            if !self
                .projects
                .contains_key(from.split('/').next().unwrap_or_default())
            {
                let said = format!("unauthorized to access repository: {repository}, action: push");
                return unauthorized("Basic realm=\"harbor\"", &said);
            }
            needed.push((from.clone(), "pull"));
        }
        for (name, action) in needed {
            if !self.granted(request, &name, action) {
                let said = format!("unauthorized to access repository: {name}, action: {action}");
                let challenge = if request.header("authorization").is_empty() {
                    &challenge
                } else {
                    "Basic realm=\"harbor\""
                };
                return unauthorized(challenge, &said);
            }
        }
        if writes && request.method != "GET" {
            if self.read_only {
                return errors(
                    403,
                    "DENIED",
                    "The system is in read only mode. Any modification is prohibited.",
                );
            }
            if self.projects[project].registry.is_some() {
                return errors(
                    403,
                    "DENIED",
                    &format!("can not push artifact to a proxy project: {project}"),
                );
            }
        }
        match kind {
            "/blobs/uploads/" => self.upload(request, project, repository, rest, mount),
            "/blobs/" => self.blob(request, project, rest),
            "/manifests/" => self.manifest(request, project, repository, rest),
            "/tags/" => {
                let name = repository.split_once('/').map_or("", |(_, name)| name);
                let Some(found) = self.projects[project].repositories.get(name) else {
                    return errors(
                        404,
                        "NOT_FOUND",
                        &format!("repository {repository} not found"),
                    );
                };
                let tags = found
                    .artifacts
                    .iter()
                    .flat_map(|a| &a.tags)
                    .map(|(_, name, _)| name);
                let tags: BTreeSet<_> = tags.collect();
                Response::json(200, &json!({"name": repository, "tags": tags}))
            }
            _ => {
                let name = repository.split_once('/').map_or("", |(_, name)| name);
                let found = self.projects[project].repositories.get(name);
                let referrers: Vec<Value> = found
                    .into_iter()
                    .flat_map(|found| &found.artifacts)
                    .filter(|artifact| artifact.subject.as_deref() == Some(rest))
                    .map(|artifact| {
                        let manifest: Value =
                            serde_json::from_slice(&artifact.bytes).unwrap_or_default();
                        json!({
                            "mediaType": artifact.media_type, "digest": artifact.digest,
                            "size": artifact.bytes.len(), "artifactType": manifest["artifactType"],
                        })
                    })
                    .collect();
                let total = referrers.len().to_string();
                let index = json!({
                    "schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": referrers,
                });
                Response::new(200)
                    .with("Content-Type", "application/vnd.oci.image.index.v1+json")
                    .with("X-Total-Count", total)
                    .body(index.to_string())
            }
        }
    }

    fn upload(
        &mut self,
        request: &Request,
        project: &str,
        repository: &str,
        id: &str,
        mount: Option<(String, String)>,
    ) -> Response {
        let location =
            |id: &str| format!("{EXTERNAL}/v2/{repository}/blobs/uploads/{id}?_state=s{id}%3D");
        let progress = |status, id: &str, length: usize| {
            Response::new(status)
                .with("Docker-Upload-Uuid", id)
                .with("Location", location(id))
                .with("Range", format!("0-{}", length.saturating_sub(1)))
        };
        if request.method == "POST" {
            if let Some((digest, from)) = mount {
                let source = from.split('/').next().unwrap_or_default();
                let size = self
                    .projects
                    .get(source)
                    .and_then(|p| p.holds.get(&digest))
                    .copied();
                if let (Some(size), Some(target)) = (size, self.projects.get_mut(project)) {
                    target.holds.insert(digest.clone(), size);
                    return Response::new(201)
                        .with("Docker-Content-Digest", &digest)
                        .with(
                            "Location",
                            format!("{EXTERNAL}/v2/{repository}/blobs/{digest}"),
                        );
                }
            }
            let id = format!("u{}", self.id());
            let upload = Upload {
                repository: repository.to_owned(),
                bytes: Vec::new(),
            };
            self.uploads.insert(id.clone(), upload);
            return progress(202, &id, 0);
        }
        let lost = || errors(404, "BLOB_UPLOAD_INVALID", "blob upload invalid");
        // Like the registry behind Harbor, it keeps nothing of an aborted request.
        if request.cut {
            self.uploads.remove(id);
            return lost();
        }
        let Some(upload) = self
            .uploads
            .get_mut(id)
            .filter(|u| u.repository == repository)
        else {
            return lost();
        };
        match request.method.as_str() {
            "GET" => progress(204, id, upload.bytes.len()),
            "PATCH" => {
                upload.bytes.extend_from_slice(&request.body);
                let length = upload.bytes.len();
                progress(202, id, length)
            }
            "DELETE" => {
                self.uploads.remove(id);
                Response::new(204)
            }
            _ => {
                let mut bytes = upload.bytes.clone();
                bytes.extend_from_slice(&request.body);
                let digest = request.one("digest").unwrap_or_default();
                if Digest::of(&bytes).to_string() != digest {
                    return errors(
                        400,
                        "DIGEST_INVALID",
                        "provided digest did not match uploaded content",
                    );
                }
                // If the PUT has a body, Harbor takes its length for that of the blob.
                let size = if request.body.is_empty() {
                    bytes.len()
                } else {
                    request.body.len()
                } as u64;
                if let Err(answer) = self.count(project, &digest, size) {
                    return answer;
                }
                self.uploads.remove(id);
                let blob = Blob {
                    size: bytes.len() as u64,
                    content: Some(bytes),
                };
                self.blobs.insert(digest.clone(), blob);
                Response::new(201)
                    .with("Docker-Content-Digest", &digest)
                    .with(
                        "Location",
                        format!("{EXTERNAL}/v2/{repository}/blobs/{digest}"),
                    )
            }
        }
    }

    /// Counts a blob or manifest towards a project's quota, if that permits it.
    fn count(&mut self, project: &str, digest: &str, size: u64) -> Result<(), Response> {
        let Some(project) = self.projects.get_mut(project) else {
            return Ok(());
        };
        if project.holds.contains_key(digest) {
            return Ok(());
        }
        let used: u64 = project.holds.values().sum();
        if let Some(limit) = project.limit.and_then(|limit| u64::try_from(limit).ok())
            && used + size > limit
        {
            let said = format!(
                "adding {} of storage resource, which when updated to current usage of {} will exceed the configured \
                 upper limit of {}.",
                human(size),
                human(used),
                human(limit)
            );
            return Err(errors(403, "DENIED", &said));
        }
        project.holds.insert(digest.to_owned(), size);
        Ok(())
    }

    fn blob(&mut self, request: &Request, project: &str, digest: &str) -> Response {
        let there = self
            .projects
            .get(project)
            .is_some_and(|p| p.holds.contains_key(digest));
        let Some(blob) = self.blobs.get(digest).filter(|_| there) else {
            let missing = errors(404, "BLOB_UNKNOWN", "blob unknown to registry");
            return if request.method == "HEAD" {
                missing.with("Content-Length", "157")
            } else {
                missing
            };
        };
        let content = blob.content.clone().unwrap_or_default();
        Response::new(200)
            .with("Content-Type", "application/octet-stream")
            .with("Docker-Content-Digest", digest)
            .with("Content-Length", blob.size.to_string())
            .body(content)
    }

    fn manifest(
        &mut self,
        request: &Request,
        project: &str,
        repository: &str,
        reference: &str,
    ) -> Response {
        let name = repository
            .split_once('/')
            .map_or("", |(_, name)| name)
            .to_owned();
        if request.method == "PUT" {
            return self.put_manifest(request, project, repository, &name, reference);
        }
        let Some(repository_) = self
            .projects
            .get_mut(project)
            .and_then(|p| p.repositories.get_mut(&name))
        else {
            return errors(
                404,
                "NOT_FOUND",
                &format!("repository {repository} not found"),
            );
        };
        if request.method == "DELETE" {
            if !reference.contains(':') {
                let said =
                    format!("unsupported digest {reference}: invalid checksum digest format");
                return errors(400, "UNSUPPORTED", &said);
            }
            let before = repository_.artifacts.len();
            repository_.artifacts.retain(|a| a.digest != reference);
            return Response::new(if repository_.artifacts.len() < before {
                202
            } else {
                404
            });
        }
        let Some(found) = repository_.artifacts.iter().find(|a| a.is(reference)) else {
            return errors(
                404,
                "NOT_FOUND",
                &format!("artifact {repository}:{reference} not found"),
            );
        };
        Response::new(200)
            .with("Content-Type", &found.media_type)
            .with("Docker-Content-Digest", &found.digest)
            .body(found.bytes.clone())
            .with("Content-Length", found.bytes.len().to_string())
    }

    fn put_manifest(
        &mut self,
        request: &Request,
        project: &str,
        repository: &str,
        name: &str,
        reference: &str,
    ) -> Response {
        let manifest: Value = serde_json::from_slice(&request.body).unwrap_or_default();
        if manifest["schemaVersion"] != 2 {
            let body =
                json!({"errors": [{"code": "UNKNOWN", "message": "unknown error", "detail": {}}]});
            return Response::new(500)
                .with("Content-Type", "application/json; charset=utf-8")
                .body(format!("{body}\n"));
        }
        let digest = Digest::of(&request.body).to_string();
        if self.projects[project]
            .immutable
            .iter()
            .any(|tag| tag == reference)
        {
            let tagged = self.projects[project].repositories.get(name);
            if tagged.is_some_and(|r| r.artifacts.iter().any(|a| a.is(reference))) {
                let said = format!(
                    "Failed to process request due to '{name}:{reference}' configured as immutable."
                );
                return errors(412, "PRECONDITION", &said);
            }
        }
        let layers = manifest["layers"].as_array().into_iter().flatten();
        for descriptor in layers.chain([&manifest["config"]]) {
            let blob = descriptor["digest"].as_str().unwrap_or_default();
            if !self.projects[project].holds.contains_key(blob) {
                let body = json!({"errors": [{
                    "code": "MANIFEST_BLOB_UNKNOWN", "message": "blob unknown to registry", "detail": blob,
                }]});
                return Response::new(400)
                    .with("Content-Type", "application/json; charset=utf-8")
                    .body(format!("{body}\n"));
            }
        }
        if let Err(answer) = self.count(project, &digest, request.body.len() as u64) {
            return answer;
        }
        let (at, artifact_id, tag_id) = (self.id(), self.id(), self.id());
        let Some(project) = self.projects.get_mut(project) else {
            return errors(404, "NOT_FOUND", "no project");
        };
        let found = project.repositories.entry(name.to_owned()).or_default();
        found.id = if found.id == 0 { artifact_id } else { found.id };
        found.updated = at;
        if !reference.contains(':') {
            for artifact in &mut found.artifacts {
                artifact.tags.retain(|(_, tag, _)| tag != reference);
            }
        }
        if !found.artifacts.iter().any(|a| a.digest == digest) {
            found.artifacts.push(Artifact {
                id: artifact_id,
                digest: digest.clone(),
                bytes: request.body.clone(),
                media_type: request.header("content-type").to_owned(),
                tags: Vec::new(),
                pushed: at,
                subject: manifest["subject"]["digest"].as_str().map(str::to_owned),
            });
        }
        if let Some(artifact) = found.artifacts.iter_mut().find(|a| a.digest == digest)
            && !reference.contains(':')
        {
            artifact.tags.insert(0, (tag_id, reference.to_owned(), at));
        }
        Response::new(201)
            .with("Docker-Content-Digest", &digest)
            .with(
                "Location",
                format!("{EXTERNAL}/v2/{repository}/manifests/{digest}"),
            )
    }

    fn api(&mut self, request: &Request, path: &str) -> Response {
        let user = self.user(request);
        // A user with a wrong password is anonymous and may see what is public.
        let who = user.as_deref();
        let parts: Vec<String> = path
            .trim_start_matches('/')
            .split('/')
            .map(|part| percent_decode_str(part).decode_utf8_lossy().into_owned())
            .collect();
        let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
        let no = || errors(401, "UNAUTHORIZED", "unauthorized");
        if let Some(size) = request.one("page_size").and_then(|n| n.parse::<u64>().ok())
            && size > 100
        {
            let said =
                "validation failure list:\npage_size in query should be less than or equal to 100";
            return errors(422, "UNPROCESSABLE_ENTITY", said);
        }
        match (request.method.as_str(), parts.as_slice()) {
            ("HEAD", ["projects"]) if who.is_none() => no(),
            ("HEAD", ["projects"]) => {
                let name = request.one("project_name").unwrap_or_default();
                if self.projects.contains_key(&name) {
                    Response::new(200)
                } else {
                    errors(404, "NOT_FOUND", "project not found")
                }
            }
            ("POST", ["projects"]) => {
                let body: Value = serde_json::from_slice(&request.body).unwrap_or_default();
                let name = body["project_name"].as_str().unwrap_or_default().to_owned();
                match who {
                    Some(user) if user == ADMIN.0 => {}
                    _ => return no(),
                }
                if self.projects.contains_key(&name) {
                    return errors(
                        409,
                        "CONFLICT",
                        &format!("The project named {name} already exists"),
                    );
                }
                let public = body["metadata"]["public"] == "true";
                let id = self.project(&name, public, body["storage_limit"].as_i64());
                Response::new(201).with("Location", format!("/api/v2.0/projects/{id}"))
            }
            ("GET", ["projects"]) => {
                let mut seen: Vec<Value> = self
                    .projects
                    .iter()
                    .filter(|(name, _)| self.may(who, name, "project", "read"))
                    .map(|(name, project)| project.document(name))
                    .collect();
                seen.sort_by_key(|project| project["name"] == "library");
                page(request, seen)
            }
            ("GET", ["repositories"]) => {
                let mut all = Vec::new();
                for (name, project) in &self.projects {
                    if self.may(who, name, "repository", "list") {
                        all.extend(project.repositories(name));
                    }
                }
                page(request, all)
            }
            ("POST", ["robots"]) => self.make_robot(request),
            (method, ["projects", name, rest @ ..]) => {
                let name = (*name).to_owned();
                if !self.projects.contains_key(&name) {
                    if who.is_none() {
                        return no();
                    }
                    // For a missing project, the list of artifacts is empty, while that of repositories is an error.
                    return if method == "GET" && matches!(rest, ["repositories", _, "artifacts"]) {
                        page(request, Vec::new())
                    } else {
                        errors(404, "NOT_FOUND", &format!("project {name} not found"))
                    };
                }
                self.in_project(request, who.map(str::to_owned).as_deref(), &name, rest)
            }
            _ => errors(404, "NOT_FOUND", "no such thing"),
        }
    }

    fn make_robot(&mut self, request: &Request) -> Response {
        let body: Value = serde_json::from_slice(&request.body).unwrap_or_default();
        let project = body["permissions"][0]["namespace"]
            .as_str()
            .unwrap_or_default()
            .to_owned();
        let name = format!(
            "robot${project}+{}",
            body["name"].as_str().unwrap_or_default()
        );
        let access = body["permissions"][0]["access"]
            .as_array()
            .into_iter()
            .flatten();
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let robot = Robot {
            secret: format!("Secret{}", self.id()),
            project,
            access: access
                .map(|a| (text(&a["resource"]), text(&a["action"])))
                .collect(),
        };
        let id = self.id();
        let answer = json!({
            "creation_time": stamp(id), "expires_at": -1, "id": id, "name": name, "secret": robot.secret,
        });
        self.robots.insert(name, robot);
        Response::json(201, &answer).with("Location", format!("/api/v2.0/robots/{id}"))
    }

    fn in_project(
        &mut self,
        request: &Request,
        who: Option<&str>,
        name: &str,
        rest: &[&str],
    ) -> Response {
        let no = |who: Option<&str>| match who {
            None => errors(401, "UNAUTHORIZED", "unauthorized"),
            Some(_) => errors(403, "FORBIDDEN", "forbidden"),
        };
        let id = self.id();
        match (request.method.as_str(), rest) {
            ("GET", []) if self.may(who, name, "project", "read") => {
                Response::json(200, &self.projects[name].document(name))
            }
            ("GET", ["summary"]) if self.may(who, name, "project", "read") => {
                let project = &self.projects[name];
                let used: u64 = project.holds.values().sum();
                let mut summary = json!({"repo_count": project.repositories.len()});
                if who == Some(ADMIN.0) {
                    summary["project_admin_count"] = json!(1);
                }
                if self.may(who, name, "quota", "read") {
                    summary["quota"] = json!({
                        "hard": {"storage": project.limit.unwrap_or(-1)}, "used": {"storage": used},
                    });
                }
                Response::json(200, &summary)
            }
            ("POST", ["immutabletagrules"]) if who == Some(ADMIN.0) => {
                let body: Value = serde_json::from_slice(&request.body).unwrap_or_default();
                let pattern = body["tag_selectors"][0]["pattern"]
                    .as_str()
                    .unwrap_or_default()
                    .to_owned();
                if let Some(project) = self.projects.get_mut(name) {
                    project.immutable.push(pattern);
                }
                Response::new(201).with(
                    "Location",
                    format!("/api/v2.0/projects/{name}/immutabletagrules/{id}"),
                )
            }
            ("DELETE", []) if who == Some(ADMIN.0) => {
                if self.projects[name].repositories.is_empty() {
                    self.projects.remove(name);
                    Response::new(200)
                } else {
                    errors(
                        412,
                        "PRECONDITION",
                        "the project contains repositories, can not be deleted",
                    )
                }
            }
            ("GET", ["repositories"]) if self.may(who, name, "repository", "list") => {
                page(request, self.projects[name].repositories(name))
            }
            (method, ["repositories", repository, rest @ ..]) => {
                // The path is unescaped once already; the description requires a second time.
                let repository = unescape(repository);
                let (resource, action) = match (method, rest) {
                    ("GET", _) => ("artifact", "list"),
                    ("DELETE", [_, _, "tags", _]) => ("tag", "delete"),
                    _ => ("artifact", "delete"),
                };
                if !self.may(who, name, resource, action) {
                    return no(who);
                }
                self.in_repository(request, name, &repository, rest)
            }
            _ => no(who),
        }
    }

    fn in_repository(
        &mut self,
        request: &Request,
        project: &str,
        name: &str,
        rest: &[&str],
    ) -> Response {
        let missing = |what: &str| errors(404, "NOT_FOUND", &format!("{what} not found"));
        let Some(held) = self.projects.get_mut(project) else {
            return missing("project");
        };
        let Some(found) = held.repositories.get_mut(name) else {
            return match (request.method.as_str(), rest) {
                ("GET", ["artifacts"]) => page(request, Vec::new()),
                _ => missing(&format!("repository {project}/{name}")),
            };
        };
        let not_here = |reference: &str| missing(&format!("artifact {project}/{name}:{reference}"));
        let immutable = |tag: &str| {
            errors(
                412,
                "PRECONDITION",
                &format!("the tag {tag} configured as immutable, cannot be deleted"),
            )
        };
        match (request.method.as_str(), rest) {
            ("GET", []) => Response::json(200, &found.document(project, name, held.id)),
            ("DELETE", []) => {
                held.repositories.remove(name);
                Response::new(200)
            }
            ("GET", ["artifacts"]) => {
                let with = request.one("with_accessory").as_deref() == Some("true");
                // An accessory is listed with its subject.
                let listed = found.artifacts.iter().filter(|a| a.subject.is_none());
                let all =
                    listed.map(|a| found.artifact(a, project, name, held.id, with, &self.blobs));
                page(request, all.collect())
            }
            ("GET", ["artifacts", reference]) => {
                match found.artifacts.iter().find(|a| a.is(reference)) {
                    Some(a) => Response::json(
                        200,
                        &found.artifact(a, project, name, held.id, true, &self.blobs),
                    ),
                    None => not_here(reference),
                }
            }
            ("DELETE", ["artifacts", reference, "tags", tag]) => {
                if held.immutable.iter().any(|t| t == tag) {
                    return immutable(tag);
                }
                let Some(artifact) = found.artifacts.iter_mut().find(|a| a.is(reference)) else {
                    return not_here(reference);
                };
                let before = artifact.tags.len();
                artifact.tags.retain(|(_, name, _)| name != tag);
                if artifact.tags.len() < before {
                    Response::new(200)
                } else {
                    missing(&format!("tag {tag}"))
                }
            }
            ("DELETE", ["artifacts", reference]) => {
                let Some(at) = found.artifacts.iter().position(|a| a.is(reference)) else {
                    return not_here(reference);
                };
                let tags = &found.artifacts[at].tags;
                if let Some((_, tag, _)) =
                    tags.iter().find(|(_, tag, _)| held.immutable.contains(tag))
                {
                    return immutable(tag);
                }
                let gone = found.artifacts.remove(at);
                found
                    .artifacts
                    .retain(|a| a.subject.as_deref() != Some(&gone.digest));
                Response::new(200)
            }
            _ => missing("it"),
        }
    }
}

impl Artifact {
    fn is(&self, reference: &str) -> bool {
        self.digest == reference || self.tags.iter().any(|(_, tag, _)| tag == reference)
    }

    fn size(&self) -> u64 {
        let manifest: Value = serde_json::from_slice(&self.bytes).unwrap_or_default();
        let layers = manifest["layers"].as_array().into_iter().flatten();
        let sizes = layers
            .chain([&manifest["config"]])
            .map(|d| d["size"].as_u64().unwrap_or(0));
        sizes.sum::<u64>() + self.bytes.len() as u64
    }
}

impl Project {
    fn document(&self, name: &str) -> Value {
        let mut document = json!({
            "creation_time": stamp(self.id), "current_user_role_ids": null,
            "cve_allowlist": {
                "creation_time": NEVER, "id": self.id, "items": [], "project_id": self.id, "update_time": NEVER,
            },
            "metadata": {"public": self.public.to_string()}, "name": name, "owner_id": 1, "owner_name": "admin",
            "project_id": self.id, "repo_count": self.repositories.len(), "update_time": stamp(self.id),
        });
        if let Some(registry) = self.registry {
            document["registry_id"] = json!(registry);
        }
        document
    }

    fn repositories(&self, project: &str) -> Vec<Value> {
        let all = self.repositories.iter();
        all.map(|(name, found)| found.document(project, name, self.id))
            .collect()
    }
}

impl Repository {
    fn document(&self, project: &str, name: &str, project_id: u64) -> Value {
        json!({
            "artifact_count": self.artifacts.iter().filter(|a| a.subject.is_none()).count(),
            "creation_time": stamp(self.id), "id": self.id, "name": format!("{project}/{name}"),
            "project_id": project_id, "pull_count": 0, "update_time": stamp(self.updated),
        })
    }

    fn artifact(
        &self,
        artifact: &Artifact,
        project: &str,
        name: &str,
        project_id: u64,
        with_accessories: bool,
        blobs: &BTreeMap<String, Blob>,
    ) -> Value {
        let manifest: Value = serde_json::from_slice(&artifact.bytes).unwrap_or_default();
        let config = manifest["config"]["digest"]
            .as_str()
            .and_then(|digest| blobs.get(digest)?.content.as_ref());
        let config: Value = config
            .and_then(|bytes| serde_json::from_slice(bytes).ok())
            .unwrap_or_default();
        let or_empty = |value: &Value| {
            if value.is_null() {
                json!("")
            } else {
                value.clone()
            }
        };
        let encoded = name.replace('/', "%252F");
        let href = format!(
            "/api/v2.0/projects/{project}/repositories/{encoded}/artifacts/{}/additions/build_history",
            artifact.digest
        );
        let tags = artifact.tags.iter().map(|(id, tag, at)| {
            json!({
                "artifact_id": artifact.id, "id": id, "immutable": false, "name": tag, "pull_time": NEVER,
                "push_time": stamp(*at), "repository_id": self.id,
            })
        });
        let tags: Vec<Value> = tags.collect();
        let belonging = self
            .artifacts
            .iter()
            .filter(|a| a.subject.as_deref() == Some(&artifact.digest));
        let accessories: Vec<Value> = belonging
            .map(|a| {
                json!({
                    "artifact_id": a.id, "creation_time": stamp(a.pushed), "digest": a.digest, "icon": "", "id": a.id,
                    "size": a.size(), "subject_artifact_digest": artifact.digest, "subject_artifact_id": artifact.id,
                    "subject_artifact_repo": format!("{project}/{name}"), "type": "subject.accessory",
                })
            })
            .collect();
        let or_null = |list: Vec<Value>| {
            if list.is_empty() {
                Value::Null
            } else {
                json!(list)
            }
        };
        json!({
            "accessories": if with_accessories { or_null(accessories) } else { Value::Null },
            "addition_links": {"build_history": {"absolute": false, "href": href}},
            "annotations": manifest["annotations"], "artifact_type": manifest["config"]["mediaType"],
            "digest": artifact.digest,
            "extra_attrs": {
                "architecture": or_empty(&config["architecture"]), "author": or_empty(&config["author"]),
                "config": if config["config"].is_null() { json!({}) } else { config["config"].clone() },
                "created": config["created"], "os": or_empty(&config["os"]),
            },
            "icon": "sha256:0048162a053eef4d4ce3fe7518615bef084403614f8bca43b40ae2e762e11e06",
            "id": artifact.id, "labels": null, "manifest_media_type": artifact.media_type,
            "media_type": manifest["config"]["mediaType"], "project_id": project_id, "pull_time": NEVER,
            "push_time": stamp(artifact.pushed), "references": null, "repository_id": self.id,
            "repository_name": format!("{project}/{name}"), "size": artifact.size(), "tags": or_null(tags),
            "type": "IMAGE",
        })
    }
}

/// Returns a page of a list, filtered and sorted by the query.
fn page(request: &Request, mut all: Vec<Value>) -> Response {
    let query = request.one("q").unwrap_or_default();
    if let Some((field, text)) = query.split_once("=~") {
        all.retain(|item| match &item[field] {
            Value::Array(tags) => tags
                .iter()
                .any(|t| t["name"].as_str().is_some_and(|n| n.contains(text))),
            Value::String(name) => name.contains(text),
            _ => false,
        });
    }
    if let Some(sort) = request.one("sort") {
        let (field, down) = sort
            .strip_prefix('-')
            .map_or((sort.as_str(), false), |field| (field, true));
        all.sort_by(|a, b| {
            let order = match (a[field].as_u64(), b[field].as_u64()) {
                (Some(a), Some(b)) => a.cmp(&b),
                _ => a[field].as_str().cmp(&b[field].as_str()),
            };
            if down { order.reverse() } else { order }
        });
    }
    let number = |name: &str, usual: usize| {
        request
            .one(name)
            .and_then(|n| n.parse().ok())
            .unwrap_or(usual)
    };
    let (page, size) = (number("page", 1).max(1), number("page_size", 10));
    let total = all.len();
    let items: Vec<Value> = all.into_iter().skip((page - 1) * size).take(size).collect();
    let mut answer =
        Response::json(200, &Value::Array(items)).with("X-Total-Count", total.to_string());
    if page * size < total {
        let next = format!(
            "<{}?page={}&page_size={size}>; rel=\"next\"",
            request.path,
            page + 1
        );
        answer = answer.with("Link", next);
    }
    answer.body.push(b'\n');
    answer
}
