//! The JSON that the API returns for projects, quotas, repositories and artifacts.

use serde_json::{Map, Value, json};

use super::{ADMIN, Artifact, NEVER, Project, Repository, State, stamp};
use crate::http::Request;

const ICON: &str = "sha256:0048162a053eef4d4ce3fe7518615bef084403614f8bca43b40ae2e762e11e06";

impl Project {
    pub fn document(&self, name: &str, who: Option<&str>) -> Value {
        let of_admin = who == Some(ADMIN.0) && self.owner.1 == ADMIN.0 && self.is_own(who);
        let mut document = json!({
            "creation_time": stamp(self.id), "current_user_role_ids": null,
            "cve_allowlist": {
                "creation_time": NEVER, "id": self.id, "items": [], "project_id": self.id, "update_time": NEVER,
            },
            "metadata": self.metadata, "name": name, "owner_id": self.owner.0, "owner_name": self.owner.1,
            "project_id": self.id, "repo_count": self.repository_count(), "update_time": stamp(self.id),
        });
        if of_admin {
            document["current_user_role_id"] = json!(1);
            document["current_user_role_ids"] = json!([1]);
        }
        if let Some(registry) = self.registry {
            document["registry_id"] = json!(registry);
        }
        document
    }

    /// Returns whether the project was made by the user's own request, which makes him its administrator.
    fn is_own(&self, who: Option<&str>) -> bool {
        who.is_some_and(|who| who == self.owner.1)
    }

    pub fn repository_count(&self) -> usize {
        self.repositories.values().filter(|r| r.id != 0).count()
    }

    pub fn repositories(&self, project: &str) -> Vec<Value> {
        let all = self.repositories.iter().filter(|(_, r)| r.id != 0);
        all.map(|(name, found)| found.document(project, name, self.id))
            .collect()
    }

    fn storage(&self) -> (Value, Value) {
        let hard = self.limit.map_or(json!(-1), |limit| json!(limit));
        (json!({"storage": hard}), json!({"storage": self.used()}))
    }

    pub fn summary(&self, with_quota: bool, is_admin: bool) -> Value {
        let mut summary = json!({"repo_count": self.repository_count()});
        if is_admin {
            summary["project_admin_count"] = json!(1);
        }
        if with_quota {
            let (hard, used) = self.storage();
            summary["quota"] = json!({"hard": hard, "used": used});
        }
        summary
    }

    pub fn quota_document(&self, name: &str) -> Value {
        let (hard, used) = self.storage();
        // The administrator's name is not shown.
        let owner = if self.owner.0 == 1 { "" } else { &self.owner.1 };
        json!({
            "creation_time": stamp(self.quota), "hard": hard, "id": self.quota,
            "ref": {"id": self.id, "name": name, "owner_name": owner},
            "update_time": stamp(self.quota), "used": used,
        })
    }
}

impl Repository {
    pub fn document(&self, project: &str, name: &str, project_id: u64) -> Value {
        json!({
            "artifact_count": self.count(), "creation_time": stamp(self.id), "id": self.id,
            "name": format!("{project}/{name}"), "project_id": project_id, "pull_count": self.pulls,
            "update_time": stamp(self.updated),
        })
    }

    pub fn accessories(&self, project: &str, name: &str, artifact: &Artifact) -> Vec<Value> {
        let all = self.artifacts.iter();
        let belonging = all.filter(|a| a.subject.as_deref() == Some(&artifact.digest));
        belonging
            .map(|a| {
                json!({
                    "artifact_id": a.id, "creation_time": stamp(a.pushed), "digest": a.digest, "icon": "", "id": a.id,
                    "size": self.size(a), "subject_artifact_digest": artifact.digest,
                    "subject_artifact_id": artifact.id, "subject_artifact_repo": format!("{project}/{name}"),
                    "type": a.accessory_type(),
                })
            })
            .collect()
    }

    /// Returns the size of manifest, config and layers; of an index, with its children.
    fn size(&self, artifact: &Artifact) -> u64 {
        let manifest = artifact.manifest();
        let layers = manifest["layers"].as_array().into_iter().flatten();
        let sizes = layers
            .chain([&manifest["config"]])
            .map(|d| d["size"].as_u64().unwrap_or(0));
        let children = artifact.children();
        let children = self
            .artifacts
            .iter()
            .filter(|a| children.contains(&a.digest));
        let children: u64 = children.map(|child| self.size(child)).sum();
        sizes.sum::<u64>() + children + artifact.bytes.len() as u64
    }

    fn references(&self, artifact: &Artifact) -> Value {
        let manifest = artifact.manifest();
        let children = manifest["manifests"].as_array().into_iter().flatten();
        let all: Vec<Value> = children
            .map(|child| {
                let digest = &child["digest"];
                let found = self.artifacts.iter().find(|a| *digest == *a.digest);
                json!({
                    "child_digest": digest, "child_id": found.map_or(0, |f| f.id), "parent_id": artifact.id,
                    "platform": {
                        "OsFeatures": null, "architecture": child["platform"]["architecture"],
                        "os": child["platform"]["os"],
                    },
                    "urls": null,
                })
            })
            .collect();
        or_null(&all)
    }
}

fn or_null(list: &[Value]) -> Value {
    if list.is_empty() {
        Value::Null
    } else {
        json!(list)
    }
}

fn or_empty(value: &Value) -> Value {
    if value.is_null() {
        json!("")
    } else {
        value.clone()
    }
}

impl State {
    pub fn document(
        &self,
        request: &Request,
        project: &str,
        name: &str,
        artifact: &Artifact,
    ) -> Value {
        let asked = |what: &str| request.one(what).as_deref() == Some("true");
        let held = &self.projects[project];
        let found = &held.repositories[name];
        let manifest = artifact.manifest();
        let is_index = artifact.media_type.contains("index");
        let tags = artifact.tags.iter().map(|(id, tag, at)| {
            json!({
                "artifact_id": artifact.id, "id": id,
                "immutable": asked("with_immutable_status") && held.is_immutable(tag), "name": tag,
                "pull_time": NEVER, "push_time": stamp(*at), "repository_id": found.id,
            })
        });
        let labels = artifact.labels.iter();
        let labels: Vec<Value> = labels
            .filter_map(|id| self.labels.get(id).cloned())
            .collect();
        let accessories = if asked("with_accessory") {
            or_null(&found.accessories(project, name, artifact))
        } else {
            Value::Null
        };
        let media_type = if is_index {
            json!(artifact.media_type)
        } else {
            manifest["config"]["mediaType"].clone()
        };
        let mut document = json!({
            "accessories": accessories, "digest": artifact.digest, "icon": ICON, "id": artifact.id,
            "labels": if asked("with_label") { or_null(&labels) } else { Value::Null },
            "manifest_media_type": artifact.media_type, "media_type": media_type, "project_id": held.id,
            "pull_time": NEVER, "push_time": stamp(artifact.pushed), "references": found.references(artifact),
            "repository_id": found.id, "repository_name": format!("{project}/{name}"),
            "size": found.size(artifact), "tags": or_null(&tags.collect::<Vec<_>>()), "type": "IMAGE",
        });
        if let Some(fields) = document.as_object_mut()
            && !is_index
        {
            self.describe(fields, project, name, artifact, &manifest);
        }
        document
    }

    /// Adds what Harbor reads from the config.
    fn describe(
        &self,
        fields: &mut Map<String, Value>,
        project: &str,
        name: &str,
        artifact: &Artifact,
        manifest: &Value,
    ) {
        let mut set = |name: &str, value: Value| fields.insert(name.to_owned(), value);
        if !manifest["annotations"].is_null() {
            set("annotations", manifest["annotations"].clone());
        }
        let artifact_type = &manifest["artifactType"];
        if !artifact_type.is_null() {
            set("artifact_type", artifact_type.clone());
            let sbom = artifact.accessory_type() == "sbom.harbor";
            set("type", json!(if sbom { "SBOM" } else { "UNKNOWN" }));
            return;
        }
        set("artifact_type", manifest["config"]["mediaType"].clone());
        let config = manifest["config"]["digest"].as_str();
        let config = config.and_then(|digest| self.blobs.get(digest)?.content.as_ref());
        let config = config.and_then(|bytes| serde_json::from_slice::<Value>(bytes).ok());
        let config = config.unwrap_or_default();
        let encoded = name.replace('/', "%252F");
        let href = format!(
            "/api/v2.0/projects/{project}/repositories/{encoded}/artifacts/{}/additions/build_history",
            artifact.digest
        );
        let links = json!({"build_history": {"absolute": false, "href": href}});
        set("addition_links", links);
        let inner = &config["config"];
        let attributes = json!({
            "architecture": or_empty(&config["architecture"]), "author": or_empty(&config["author"]),
            "config": if inner.is_null() { json!({}) } else { inner.clone() },
            "created": config["created"], "os": or_empty(&config["os"]),
        });
        set("extra_attrs", attributes);
    }
}
