//! The distribution API below `/v2/`, with the checks that Harbor makes before the registry behind it.

use std::collections::BTreeSet;

use serde_json::{Value, json};
use upperdeck::common::digest::Digest;

use super::{Artifact, Blob, EXTERNAL, State, Upload, errors, human, missing, named, split};
use crate::http::{Request, Response};

fn unauthorized(challenge: &str, message: &str) -> Response {
    errors(401, "UNAUTHORIZED", &format!("{message}: {message}"))
        .with("Www-Authenticate", challenge)
}

/// Answers like the registry behind Harbor, which adds details.
fn unknown_blobs(blobs: &[String]) -> Response {
    let each = blobs.iter().map(|blob| {
        json!({"code": "MANIFEST_BLOB_UNKNOWN", "message": "blob unknown to registry", "detail": blob})
    });
    let body = json!({"errors": each.collect::<Vec<_>>()});
    Response::new(400)
        .with("Content-Type", "application/json; charset=utf-8")
        .body(format!("{body}\n"))
}

fn internal_error() -> Response {
    let body = json!({"errors": [{"code": "UNKNOWN", "message": "unknown error", "detail": {}}]});
    Response::new(500)
        .with("Content-Type", "application/json; charset=utf-8")
        .body(format!("{body}\n"))
}

/// Splits a path into repository, kind and the rest.
fn parts(path: &str) -> Option<(&str, &'static str, &str)> {
    let kinds = [
        "/blobs/uploads/",
        "/blobs/",
        "/manifests/",
        "/tags/",
        "/referrers/",
    ];
    kinds.into_iter().find_map(|kind| {
        let at = path.rfind(kind)?;
        Some((&path[..at], kind, &path[at + kind.len()..]))
    })
}

impl State {
    pub fn v2(&mut self, request: &Request, path: &str) -> Response {
        let challenge = format!(
            "Bearer realm=\"http://{}/service/token\",service=\"harbor-registry\"",
            request.header("host")
        );
        if path.is_empty() {
            return self.ping(request, &challenge);
        }
        let Some((repository, kind, rest)) = parts(path) else {
            return missing("it");
        };
        let project = split(repository).0;
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
        let mount = request.one("mount").zip(request.one("from"));
        if let Some(refused) = self.refuses(request, &challenge, repository, action, mount.as_ref())
        {
            return refused;
        }
        if writes && request.method != "GET" && self.projects[project].registry.is_some() {
            let said = format!("can not push artifact to a proxy project: {project}");
            return errors(403, "DENIED", &said);
        }
        match kind {
            "/blobs/uploads/" => self.upload(request, repository, rest, mount),
            "/blobs/" => self.blob(request, repository, rest),
            "/manifests/" => self.manifest(request, repository, rest),
            "/tags/" => self.tags(request, repository),
            _ => self.referrers(request, repository, rest),
        }
    }

    fn ping(&self, request: &Request, challenge: &str) -> Response {
        let known = request
            .bearer()
            .map(|token| self.tokens.get(token).is_some_and(|t| t.user.is_some()));
        if known.unwrap_or_else(|| self.user(request).is_some()) {
            return Response::new(200)
                .with("Content-Type", "application/json; charset=utf-8")
                .body("{}");
        }
        let challenge = if request.header("authorization").is_empty() {
            challenge
        } else {
            "Basic realm=\"harbor\""
        };
        errors(401, "UNAUTHORIZED", "unauthorized: unauthorized")
            .with("Www-Authenticate", challenge)
    }

    /// Checks the rights for a request, and those on the source of a mount.
    fn refuses(
        &self,
        request: &Request,
        challenge: &str,
        repository: &str,
        action: &'static str,
        mount: Option<&(String, String)>,
    ) -> Option<Response> {
        let mut needed = vec![(repository.to_owned(), action)];
        if let Some((_, from)) = mount {
            if !from.contains('/') {
                let said = format!("bad request: invalid repository name: {from}");
                return Some(errors(400, "BAD_REQUEST", &said));
            }
            if !self.projects.contains_key(split(from).0) {
                let said = format!("unauthorized to access repository: {repository}, action: push");
                return Some(unauthorized("Basic realm=\"harbor\"", &said));
            }
            needed.push((from.clone(), "pull"));
        }
        for (name, action) in needed {
            if !self.granted(request, &name, action) {
                let said = format!("unauthorized to access repository: {name}, action: {action}");
                let challenge = if request.header("authorization").is_empty() {
                    challenge
                } else {
                    "Basic realm=\"harbor\""
                };
                return Some(unauthorized(challenge, &said));
            }
        }
        None
    }

    fn tags(&self, request: &Request, repository: &str) -> Response {
        let (project, name) = split(repository);
        let found = self.projects[project].repositories.get(name);
        let Some(found) = found.filter(|found| found.id != 0) else {
            return missing(&format!("repository {repository}"));
        };
        let all = found.artifacts.iter().flat_map(|a| &a.tags);
        let all: BTreeSet<_> = all.map(|(_, name, _)| name.clone()).collect();
        let last = request.one("last").unwrap_or_default();
        let number = request.one("n").and_then(|n| n.parse::<usize>().ok());
        let tags = all.into_iter().filter(|tag| *tag > last);
        let mut tags: Vec<String> = tags.collect();
        let more = number.is_some_and(|n| n < tags.len());
        tags.truncate(number.unwrap_or(tags.len()));
        let answer = Response::json(200, &json!({"name": repository, "tags": tags}));
        match (number, tags.last()) {
            (Some(n), Some(last)) if more => {
                let next = format!("</v2/{repository}/tags/list?last={last}&n={n}>; rel=\"next\"");
                answer.with("Link", next)
            }
            _ => answer,
        }
    }

    fn referrers(&self, request: &Request, repository: &str, subject: &str) -> Response {
        let (project, name) = split(repository);
        let found = self.projects[project].repositories.get(name);
        let all = found.into_iter().flat_map(|found| &found.artifacts);
        let all = all.filter(|artifact| artifact.subject.as_deref() == Some(subject));
        let all: Vec<Value> = all
            .map(|artifact| {
                let manifest = artifact.manifest();
                let mut kind = manifest["artifactType"].clone();
                if kind.is_null() {
                    kind = manifest["config"]["mediaType"].clone();
                }
                let mut entry = json!({
                    "mediaType": artifact.media_type, "digest": artifact.digest,
                    "size": artifact.bytes.len(), "artifactType": kind,
                });
                if !manifest["annotations"].is_null() {
                    entry["annotations"] = manifest["annotations"].clone();
                }
                entry
            })
            .collect();
        let total = all.len().to_string();
        let wanted = request.one("artifactType");
        let kept = all
            .into_iter()
            .filter(|entry| wanted.as_ref().is_none_or(|w| entry["artifactType"] == **w));
        let index = json!({
            "schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json",
            "manifests": kept.collect::<Vec<_>>(),
        });
        let answer = Response::new(200)
            .with("Content-Type", "application/vnd.oci.image.index.v1+json")
            .with("X-Total-Count", total)
            .body(index.to_string());
        if wanted.is_some() {
            return answer.with("Oci-Filters-Applied", "artifactType");
        }
        answer
    }

    fn upload(
        &mut self,
        request: &Request,
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
        let project = split(repository).0.to_owned();
        if request.method == "POST" {
            if let Some(answer) = self.mount(&project, repository, mount) {
                return answer;
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
                self.close(request, repository, id, bytes)
            }
        }
    }

    /// Mounts a blob, or refuses it over the quota. Returns `None` if an upload has to be opened instead.
    fn mount(
        &mut self,
        project: &str,
        repository: &str,
        mount: Option<(String, String)>,
    ) -> Option<Response> {
        let Some((digest, from)) = mount else {
            // Harbor asks for zero bytes, which do not fit if the limit was lowered.
            let project = &self.projects[project];
            let (used, limit) = (project.used(), project.limit?);
            return (used > limit).then(|| exceeded("subtracting", 0, used, limit));
        };
        let size = self.blobs.get(&digest)?.size;
        if let Err(answer) = self.fits(project, &[(digest.clone(), size)]) {
            return Some(answer);
        }
        if !self.has_link(&from, &digest) {
            return None;
        }
        self.hold(project, &digest, size);
        self.link(repository, &digest);
        let location = format!("{EXTERNAL}/v2/{repository}/blobs/{digest}");
        Some(
            Response::new(201)
                .with("Docker-Content-Digest", &digest)
                .with("Location", location),
        )
    }

    fn close(&mut self, request: &Request, repository: &str, id: &str, bytes: Vec<u8>) -> Response {
        let digest = request.one("digest").unwrap_or_default();
        if Digest::of(&bytes).to_string() != digest {
            let said = "provided digest did not match uploaded content";
            return errors(400, "DIGEST_INVALID", said);
        }
        // If the PUT has a body, Harbor takes its length for that of the blob.
        let size = if request.body.is_empty() {
            bytes.len()
        } else {
            request.body.len()
        } as u64;
        let project = split(repository).0.to_owned();
        if let Err(answer) = self.fits(&project, &[(digest.clone(), size)]) {
            return answer;
        }
        self.hold(&project, &digest, size);
        self.uploads.remove(id);
        let blob = Blob {
            size: bytes.len() as u64,
            content: Some(bytes),
        };
        self.blobs.insert(digest.clone(), blob);
        self.link(repository, &digest);
        let location = format!("{EXTERNAL}/v2/{repository}/blobs/{digest}");
        Response::new(201)
            .with("Docker-Content-Digest", &digest)
            .with("Location", location)
    }

    /// Checks whether a project's quota permits blobs or manifests. Those that the project has cost nothing.
    fn fits(&self, project: &str, blobs: &[(String, u64)]) -> Result<(), Response> {
        let Some(project) = self.projects.get(project) else {
            return Ok(());
        };
        let new = blobs.iter().filter(|(d, _)| !project.holds.contains_key(d));
        let new: Vec<u64> = new.map(|(_, size)| *size).collect();
        let (size, used) = (new.iter().sum(), project.used());
        match project.limit {
            Some(limit) if !new.is_empty() && used + size > limit => {
                Err(exceeded("adding", size, used, limit))
            }
            _ => Ok(()),
        }
    }

    fn hold(&mut self, project: &str, digest: &str, size: u64) {
        if let Some(project) = self.projects.get_mut(project) {
            project.holds.entry(digest.to_owned()).or_insert(size);
        }
    }

    /// Blobs are answered by the registry behind Harbor, which still has those of deleted images.
    fn blob(&mut self, request: &Request, repository: &str, digest: &str) -> Response {
        let there = self.has_link(repository, digest);
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

    fn manifest(&mut self, request: &Request, repository: &str, reference: &str) -> Response {
        if request.method == "PUT" {
            return self.put_manifest(request, repository, reference);
        }
        let (project, name) = split(repository);
        let Some(project) = self.projects.get_mut(project) else {
            return missing("project");
        };
        let signed_only = project.wants_signatures();
        let Some(found) = project.repositories.get_mut(name).filter(|r| r.id != 0) else {
            return missing(&format!("repository {repository}"));
        };
        if request.method == "DELETE" && !reference.contains(':') {
            let said = format!("unsupported digest {reference}: invalid checksum digest format");
            return errors(400, "UNSUPPORTED", &said);
        }
        let shown = super::artifacts::shown(repository, reference);
        let Some(at) = found.artifacts.iter().position(|a| a.is(reference)) else {
            return missing(&format!("artifact {shown}"));
        };
        if request.method == "DELETE" {
            let answer = self.delete_artifact(repository, reference);
            return if answer.status == 200 {
                Response::new(202)
            } else {
                answer
            };
        }
        let artifact = &found.artifacts[at];
        let accessories = found.artifacts.iter();
        let signed = accessories
            .filter(|a| a.subject.as_deref() == Some(&artifact.digest))
            .any(|a| a.accessory_type() == "signature.cosign");
        if signed_only && !signed {
            let said = "The image is not signed by cosign.";
            return errors(412, "PROJECTPOLICYVIOLATION", said);
        }
        if request.method == "GET" {
            found.pulls += 1;
        }
        let artifact = &found.artifacts[at];
        Response::new(200)
            .with("Content-Type", &artifact.media_type)
            .with("Docker-Content-Digest", &artifact.digest)
            .body(artifact.bytes.clone())
            .with("Content-Length", artifact.bytes.len().to_string())
    }

    fn put_manifest(&mut self, request: &Request, repository: &str, reference: &str) -> Response {
        if std::mem::take(&mut self.collect_before_manifest) {
            self.collect_garbage();
        }
        if self.fail_manifests > 0 {
            self.fail_manifests -= 1;
            return internal_error();
        }
        let manifest: Value = serde_json::from_slice(&request.body).unwrap_or_default();
        if manifest["schemaVersion"] != 2 {
            return internal_error();
        }
        let digest = Digest::of(&request.body).to_string();
        let (project, name) = split(repository);
        let (project, name) = (project.to_owned(), name.to_owned());
        let held = self.projects[&project].repositories.get(&name);
        let taken = held.is_some_and(|r| r.artifacts.iter().any(|a| a.is(reference)));
        if taken && self.projects[&project].is_immutable(reference) {
            let said = format!(
                "Failed to process request due to '{name}:{reference}' configured as immutable."
            );
            return errors(412, "PRECONDITION", &said);
        }
        if let Err(answer) = self.fits(&project, &self.charged(&manifest, &digest, request)) {
            return answer;
        }
        let is_there = |named: &String| {
            held.is_some_and(|r| {
                r.links.contains(named) || r.artifacts.iter().any(|a| a.digest == *named)
            })
        };
        let unknown: Vec<String> = named(&manifest)
            .into_iter()
            .filter(|n| !is_there(n))
            .collect();
        if !unknown.is_empty() {
            return unknown_blobs(&unknown);
        }
        if reference.contains(':') && reference != digest {
            let said = "provided digest did not match uploaded content";
            return errors(400, "DIGEST_INVALID", said);
        }
        for (digest, size) in self.charged(&manifest, &digest, request) {
            self.hold(&project, &digest, size);
        }
        self.add_artifact(request, repository, reference, &manifest);
        let answer = Response::new(201)
            .with("Docker-Content-Digest", &digest)
            .with(
                "Location",
                format!("{EXTERNAL}/v2/{repository}/manifests/{digest}"),
            );
        match manifest["subject"]["digest"].as_str() {
            Some(subject) => answer.with("Oci-Subject", subject),
            None => answer,
        }
    }

    /// Returns what a manifest costs at most: itself and what it names, by the sizes that it states.
    fn charged(&self, manifest: &Value, digest: &str, request: &Request) -> Vec<(String, u64)> {
        let layers = manifest["layers"].as_array().into_iter().flatten();
        let children = manifest["manifests"].as_array().into_iter().flatten();
        let all = [&manifest["config"]]
            .into_iter()
            .chain(layers)
            .chain(children);
        let sizes = all.filter_map(|d| {
            let digest = d["digest"].as_str()?;
            let known = self.blobs.get(digest).map(|blob| blob.size);
            Some((digest.to_owned(), known.or(d["size"].as_u64()).unwrap_or(0)))
        });
        let own = (digest.to_owned(), request.body.len() as u64);
        sizes.chain([own]).collect()
    }

    fn add_artifact(
        &mut self,
        request: &Request,
        repository: &str,
        reference: &str,
        manifest: &Value,
    ) {
        let (at, artifact_id, tag_id) = (self.id(), self.id(), self.id());
        let (project, name) = split(repository);
        let digest = Digest::of(&request.body).to_string();
        let Some(project) = self.projects.get_mut(project) else {
            return;
        };
        let found = project.repositories.entry(name.to_owned()).or_default();
        found.id = if found.id == 0 { artifact_id } else { found.id };
        found.updated = at;
        let is_tag = !reference.contains(':');
        if is_tag {
            for artifact in &mut found.artifacts {
                artifact.tags.retain(|(_, tag, _)| tag != reference);
            }
        }
        // Cosign names the signed image in the tag.
        let signed = reference
            .strip_suffix(".sig")
            .and_then(|r| r.strip_prefix("sha256-"))
            .map(|hex| format!("sha256:{hex}"));
        if !found.artifacts.iter().any(|a| a.digest == digest) {
            found.artifacts.push(Artifact {
                id: artifact_id,
                digest: digest.clone(),
                bytes: request.body.clone(),
                media_type: request.header("content-type").to_owned(),
                tags: Vec::new(),
                labels: Vec::new(),
                pushed: at,
                subject: signed.or(manifest["subject"]["digest"].as_str().map(str::to_owned)),
            });
        }
        if let Some(artifact) = found.artifacts.iter_mut().find(|a| a.digest == digest)
            && is_tag
        {
            artifact.tags.insert(0, (tag_id, reference.to_owned(), at));
        }
    }
}

fn exceeded(what: &str, size: u64, used: u64, limit: u64) -> Response {
    let said = format!(
        "{what} {} of storage resource, which when updated to current usage of {} will exceed the configured upper \
         limit of {}.",
        human(size),
        human(used),
        human(limit)
    );
    errors(403, "DENIED", &said)
}
