//! The API's part about one repository: artifacts, tags, accessories, labels, and what goes with a deletion.

use serde_json::{Value, json};

use super::pages::page;
use super::{Artifact, Repository, State, errors, missing};
use crate::http::{Request, Response};

/// Returns an artifact's name as in Harbor's messages.
pub fn shown(repository: &str, reference: &str) -> String {
    let sign = if reference.contains(':') { '@' } else { ':' };
    format!("{repository}{sign}{reference}")
}

fn fixed(tag: &str) -> Response {
    let said = format!("the tag {tag} configured as immutable, cannot be deleted");
    errors(412, "PRECONDITION", &said)
}

impl Artifact {
    /// Returns the kind of accessory that Harbor takes it for.
    pub fn accessory_type(&self) -> &'static str {
        let by_tag = |(_, tag, _): &(u64, String, u64)| tag.rsplit('.').next() == Some("sig");
        let layers = self.manifest()["layers"][0]["mediaType"].clone();
        if self.tags.iter().any(by_tag)
            || layers == "application/vnd.dev.cosign.simplesigning.v1+json"
        {
            "signature.cosign"
        } else if self.manifest()["artifactType"] == "application/vnd.goharbor.harbor.sbom.v1" {
            "sbom.harbor"
        } else {
            "subject.accessory"
        }
    }
}

impl Repository {
    /// Returns whether an artifact is listed: neither an accessory nor, without being asked for, the untagged child of
    /// an index.
    fn lists(&self, artifact: &Artifact, all: bool) -> bool {
        let subject = artifact.subject.as_ref();
        if subject.is_some_and(|s| self.artifacts.iter().any(|a| a.digest == *s)) {
            return false;
        }
        all || !artifact.tags.is_empty() || !self.is_child(&artifact.digest)
    }

    fn is_child(&self, digest: &str) -> bool {
        let all = self.artifacts.iter();
        all.flat_map(Artifact::children)
            .any(|child| child == digest)
    }

    pub fn count(&self) -> usize {
        let all = self.artifacts.iter();
        all.filter(|a| self.lists(a, false)).count()
    }

    fn find(&self, reference: &str) -> Option<&Artifact> {
        self.artifacts.iter().find(|a| a.is(reference))
    }

    /// Removes an artifact with its accessories, and the untagged children of an index.
    fn take(&mut self, digest: &str, gone: &mut Vec<Artifact>) {
        let Some(at) = self.artifacts.iter().position(|a| a.digest == digest) else {
            return;
        };
        let taken = self.artifacts.remove(at);
        let subjects = self.artifacts.iter();
        let with = subjects.filter(|a| a.subject.as_deref() == Some(digest));
        let mut next: Vec<String> = with.map(|a| a.digest.clone()).collect();
        for child in taken.children() {
            let untagged = self.find(&child).is_some_and(|c| c.tags.is_empty());
            if untagged && !self.is_child(&child) {
                next.push(child);
            }
        }
        gone.push(taken);
        for digest in next {
            self.take(&digest, gone);
        }
    }
}

impl State {
    pub fn delete_artifact(&mut self, repository: &str, reference: &str) -> Response {
        let (project, name) = super::split(repository);
        let at = self.id();
        let Some(held) = self.projects.get_mut(project) else {
            return missing("project");
        };
        let immutable: Vec<String> = held
            .repositories
            .get(name)
            .and_then(|found| found.find(reference))
            .map(|a| a.tags.iter().map(|(_, tag, _)| tag.clone()).collect())
            .unwrap_or_default();
        if let Some(tag) = immutable.iter().find(|tag| held.is_immutable(tag)) {
            return fixed(tag);
        }
        let Some(found) = held.repositories.get_mut(name) else {
            return missing(&format!("artifact {}", shown(repository, reference)));
        };
        let Some(digest) = found.find(reference).map(|a| a.digest.clone()) else {
            return missing(&format!("artifact {}", shown(repository, reference)));
        };
        if found.is_child(&digest) {
            let said = "the deleting artifact is referenced by others";
            return errors(412, "VIOLATE_FOREIGN_KEY_CONSTRAINT", said);
        }
        let mut gone = Vec::new();
        found.take(&digest, &mut gone);
        found.updated = at;
        for artifact in &gone {
            held.release(artifact);
        }
        Response::new(200)
    }

    fn delete_repository(&mut self, project: &str, name: &str) -> Response {
        let Some(held) = self.projects.get_mut(project) else {
            return missing("project");
        };
        let found = held.repositories.get(name);
        let tags = found
            .iter()
            .flat_map(|r| &r.artifacts)
            .flat_map(|a| &a.tags);
        let tags: Vec<String> = tags.map(|(_, tag, _)| tag.clone()).collect();
        if let Some(tag) = tags.iter().find(|tag| held.is_immutable(tag)) {
            return fixed(tag);
        }
        let Some(gone) = held.repositories.remove(name) else {
            return missing(&format!("repository {project}/{name}"));
        };
        for artifact in &gone.artifacts {
            held.release(artifact);
        }
        // The registry behind Harbor keeps the blobs.
        let kept = Repository {
            links: gone.links,
            ..Repository::default()
        };
        held.repositories.insert(name.to_owned(), kept);
        Response::new(200)
    }

    pub fn in_repository(
        &mut self,
        request: &Request,
        project: &str,
        name: &str,
        rest: &[&str],
    ) -> Response {
        let full = format!("{project}/{name}");
        let there = |found: &&Repository| found.id != 0;
        let held = &self.projects[project];
        let found = held.repositories.get(name).filter(there);
        let method = request.method.as_str();
        let Some(found) = found else {
            return match (method, rest) {
                ("GET", ["artifacts"]) => page(request, Vec::new(), &[]),
                (_, ["artifacts", reference, ..]) => {
                    missing(&format!("artifact {}", shown(&full, reference)))
                }
                _ => missing(&format!("repository {full}")),
            };
        };
        match (method, rest) {
            ("GET", []) => Response::json(200, &found.document(project, name, held.id)),
            ("DELETE", []) => self.delete_repository(project, name),
            ("GET", ["artifacts"]) => self.list_artifacts(request, project, name),
            (_, ["artifacts", reference, rest @ ..]) => {
                if found.find(reference).is_none() {
                    return missing(&format!("artifact {}", shown(&full, reference)));
                }
                self.in_artifact(request, project, name, reference, rest)
            }
            _ => missing("it"),
        }
    }

    fn list_artifacts(&self, request: &Request, project: &str, name: &str) -> Response {
        let held = &self.projects[project];
        let found = &held.repositories[name];
        let query = request.one("q").unwrap_or_default();
        let all = query == "base=*";
        let listed = found.artifacts.iter().filter(|a| found.lists(a, all));
        let all = listed.map(|a| self.document(request, project, name, a));
        let keys = ["push_time", "pull_time", "size", "type", "digest", "id"];
        page(request, all.collect(), &keys)
    }

    fn in_artifact(
        &mut self,
        request: &Request,
        project: &str,
        name: &str,
        reference: &str,
        rest: &[&str],
    ) -> Response {
        let repository = format!("{project}/{name}");
        let held = &self.projects[project];
        let found = &held.repositories[name];
        let Some(artifact) = found.find(reference) else {
            return missing("artifact");
        };
        match (request.method.as_str(), rest) {
            ("GET", []) => Response::json(200, &self.document(request, project, name, artifact)),
            ("DELETE", []) => self.delete_artifact(&repository, reference),
            ("GET", ["accessories"]) => {
                let mut request = request.clone();
                // The oldest comes first.
                if request.one("sort").is_none() {
                    request.query.push_str("&sort=id");
                }
                page(
                    &request,
                    found.accessories(project, name, artifact),
                    &["size", "id"],
                )
            }
            ("GET", ["tags"]) => page(
                request,
                self.tag_documents(request, project, name, artifact),
                &[],
            ),
            ("POST", ["tags"]) => {
                let body: Value = serde_json::from_slice(&request.body).unwrap_or_default();
                let tag = body["name"].as_str().unwrap_or_default();
                let said = format!("tag {tag} already exists under the repository {}", found.id);
                errors(409, "CONFLICT", &said)
            }
            ("DELETE", ["tags", tag]) => {
                if held.is_immutable(tag) {
                    return fixed(tag);
                }
                self.delete_tag(project, name, reference, tag)
            }
            ("POST", ["labels"]) => self.add_label(request, project, name, reference),
            ("DELETE", ["labels", label]) => {
                let id = label.parse::<u64>().unwrap_or_default();
                self.remove_label(project, name, reference, id)
            }
            _ => missing("it"),
        }
    }

    fn delete_tag(&mut self, project: &str, name: &str, reference: &str, tag: &str) -> Response {
        let at = self.id();
        let Some(artifact) = self.artifact_mut(project, name, reference) else {
            return missing("artifact");
        };
        let before = artifact.tags.len();
        artifact.tags.retain(|(_, name, _)| name != tag);
        if artifact.tags.len() == before {
            return missing(&format!("tag {tag}"));
        }
        let held = self.projects.get_mut(project);
        if let Some(found) = held.and_then(|p| p.repositories.get_mut(name)) {
            found.updated = at;
        }
        Response::new(200)
    }

    fn artifact_mut(
        &mut self,
        project: &str,
        name: &str,
        reference: &str,
    ) -> Option<&mut Artifact> {
        let found = self.projects.get_mut(project)?.repositories.get_mut(name)?;
        found.artifacts.iter_mut().find(|a| a.is(reference))
    }

    fn add_label(
        &mut self,
        request: &Request,
        project: &str,
        name: &str,
        reference: &str,
    ) -> Response {
        let body: Value = serde_json::from_slice(&request.body).unwrap_or_default();
        let id = body["id"].as_u64().unwrap_or_default();
        if !self.labels.contains_key(&id) {
            return missing(&format!("label {id}"));
        }
        let Some(artifact) = self.artifact_mut(project, name, reference) else {
            return missing("artifact");
        };
        if artifact.labels.contains(&id) {
            let said = format!(
                "label {id} is already added to the artifact {}",
                artifact.id
            );
            return errors(409, "CONFLICT", &said);
        }
        artifact.labels.push(id);
        Response::new(200)
    }

    fn remove_label(&mut self, project: &str, name: &str, reference: &str, id: u64) -> Response {
        let Some(artifact) = self.artifact_mut(project, name, reference) else {
            return missing("artifact");
        };
        let before = artifact.labels.len();
        artifact.labels.retain(|label| *label != id);
        if artifact.labels.len() == before {
            let artifact = artifact.id;
            return missing(&format!(
                "reference with label {id} and artifact {artifact}"
            ));
        }
        Response::new(200)
    }

    /// Returns the tags of an artifact as JSON.
    fn tag_documents(
        &self,
        request: &Request,
        project: &str,
        name: &str,
        artifact: &Artifact,
    ) -> Vec<Value> {
        let document = self.document(request, project, name, artifact);
        document["tags"].as_array().cloned().unwrap_or_else(|| {
            let none: Vec<Value> = Vec::new();
            json!(none).as_array().cloned().unwrap_or_default()
        })
    }
}
