//! Client for Harbor's own API: projects and quotas, listing with details, and deletion that respects shared tags.
//!
//! Format: Harbor's API description, version 2.0 (`api/v2.0/swagger.yaml` in its sources).

mod push;

use std::collections::BTreeMap;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde::{Deserialize, Deserializer};
use serde_json::json;

use crate::common::digest::Digest;
use crate::store::registry::api::ApiResponse;
use crate::store::registry::{self, Api, Registries};

pub use push::{QuotaUsage, check_push, check_quota, explain};

/// Base path of the API.
const BASE: &str = "/api/v2.0";
/// Maximum page size; Harbor refuses larger ones.
pub(crate) const MAX_PAGE_SIZE: u32 = 100;
/// Characters that are escaped in a path or a query.
const ESCAPED: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'.')
    .remove(b'_')
    .remove(b'~');

/// An error of Harbor's API.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An error of the underlying registry access.
    #[error(transparent)]
    Registry(#[from] registry::Error),
    /// The project does not exist or is not visible with these credentials.
    #[error(
        "{host} has no project {project:?}, or these credentials do not see it: check the name, or say --create-project"
    )]
    NoProject {
        /// `HOST[:PORT]`.
        host: String,
        /// Name of the project.
        project: String,
    },
    /// The project is a proxy cache, which holds copies of another registry's images.
    #[error(
        "the project {project:?} on {host} is a proxy cache: nobody can push there; name another project"
    )]
    ProxyCache {
        /// `HOST[:PORT]`.
        host: String,
        /// Name of the project.
        project: String,
    },
    /// The storage quota of the project is used up, or too small for what is to be saved.
    #[error(
        "the quota of project {project:?} on {host} does not suffice: {} of {} are used, {} are free{}; \
         delete images there (upperdeck image rm; space comes back with Harbor's garbage collection) or ask for more",
        size(usage.used), size(usage.limit), size(usage.free()), needed_text(*needed)
    )]
    Quota {
        /// `HOST[:PORT]`.
        host: String,
        /// Name of the project.
        project: String,
        /// Quota and usage.
        usage: QuotaUsage,
        /// Number of bytes needed, as far as known.
        needed: u64,
    },
    /// The registry refused a push because of the quota.
    #[error("{source}; the project has {} of {} in use, {} free", size(usage.used), size(usage.limit), size(usage.free()))]
    PushOverQuota {
        /// The registry's answer.
        source: registry::Error,
        /// Quota and usage.
        usage: QuotaUsage,
    },
    /// A search term with characters that are special in Harbor's query language.
    #[error("{0:?} cannot be searched for: letters, digits and . _ - / only")]
    Search(String),
}

fn size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let unit = (bytes.max(1).ilog2() / 10).min(4);
    if unit == 0 {
        return format!("{bytes} B");
    }
    let value = bytes as f64 / (1_u64 << (10 * unit)) as f64;
    format!("{value:.1} {}", UNITS[unit as usize])
}

fn needed_text(needed: u64) -> String {
    if needed == 0 {
        String::new()
    } else {
        format!(", and the base alone needs {}", size(needed))
    }
}

impl Error {
    /// Returns whether a later attempt may succeed (exit code 75).
    pub(crate) fn retryable(&self) -> bool {
        matches!(self, Self::Registry(e) if e.retryable())
    }

    /// Returns whether the cause is a lack of permission: credentials, quota or policy (exit code 77).
    pub(crate) fn not_permitted(&self) -> bool {
        match self {
            Self::Registry(e) => e.not_permitted(),
            Self::Search(_) => false,
            _ => true,
        }
    }
}

/// Filter, order and page of a list.
#[derive(Clone, Debug, Default)]
pub struct Query {
    /// Only entries whose name contains this text.
    pub search: Option<String>,
    /// Field to sort by; `-` in front reverses the order.
    pub sort: Option<&'static str>,
    /// Number of the page, starting at 1.
    pub page: u32,
    /// Entries per page, at most [`MAX_PAGE_SIZE`].
    pub page_size: u32,
}

impl Query {
    fn text(&self, field: &str) -> Result<String, Error> {
        let (page, size) = (self.page.max(1), self.page_size.clamp(1, MAX_PAGE_SIZE));
        let mut text = format!("page={page}&page_size={size}");
        if let Some(sort) = self.sort {
            text.push_str(&format!("&sort={sort}"));
        }
        if let Some(search) = &self.search {
            // Other characters have a meaning in the query language.
            let plain = |b: u8| b.is_ascii_alphanumeric() || b"._-/".contains(&b);
            if !search.bytes().all(plain) || search.is_empty() {
                return Err(Error::Search(search.chars().take(100).collect()));
            }
            text.push_str(&format!("&q={}", escaped(&format!("{field}=~{search}"))));
        }
        Ok(text)
    }
}

/// One page of a list, and the length of the whole list.
#[derive(Clone, Debug)]
pub struct Page<T> {
    /// Entries of this page.
    pub items: Vec<T>,
    /// Number of entries on all pages.
    pub total: u64,
}

/// A project.
#[derive(Clone, Debug, Deserialize)]
pub struct Project {
    /// Name of the project.
    pub name: String,
    /// ID of the registry that it caches, if it is a proxy cache.
    pub registry_id: Option<i64>,
    /// Number of repositories.
    #[serde(default)]
    pub repo_count: u64,
}

impl Project {
    /// Returns whether the project is a proxy cache, which cannot be pushed to.
    pub fn is_proxy_cache(&self) -> bool {
        self.registry_id.is_some_and(|id| id != 0)
    }
}

/// Summary of a project.
#[derive(Clone, Debug, Deserialize)]
pub struct Summary {
    /// Number of repositories.
    #[serde(default)]
    pub repo_count: u64,
    #[serde(default)]
    quota: Option<Quota>,
}

#[derive(Clone, Debug, Deserialize)]
struct Quota {
    #[serde(default)]
    hard: BTreeMap<String, i64>,
    #[serde(default)]
    used: BTreeMap<String, i64>,
}

impl Summary {
    /// Returns quota and usage. Returns `None` if there is no limit (-1) or it is not visible.
    pub(crate) fn quota_usage(&self) -> Option<QuotaUsage> {
        let quota = self.quota.as_ref()?;
        let limit = u64::try_from(*quota.hard.get("storage")?).ok()?;
        let used = quota.used.get("storage").copied().unwrap_or(0);
        let used = u64::try_from(used).unwrap_or(0);
        Some(QuotaUsage { limit, used })
    }
}

/// A repository.
#[derive(Clone, Debug, Deserialize)]
pub struct Repository {
    /// Name, including that of the project.
    pub name: String,
    /// Number of artifacts.
    #[serde(default)]
    pub artifact_count: u64,
    /// Number of pulls of all artifacts.
    #[serde(default)]
    pub pull_count: u64,
    /// Time of the last update, RFC 3339.
    #[serde(default, deserialize_with = "time")]
    pub update_time: Option<String>,
}

/// A tag.
#[derive(Clone, Debug, Deserialize)]
pub struct Tag {
    /// Name of the tag.
    pub name: String,
    /// Whether a rule forbids moving or deleting the tag. Returned only on request.
    #[serde(default)]
    pub immutable: bool,
}

/// A label that a user has attached to an artifact in Harbor.
#[derive(Clone, Debug, Deserialize)]
pub struct Label {
    /// Name of the label.
    pub name: String,
}

/// An object attached to an artifact, such as a signature or an SBOM.
#[derive(Clone, Debug, Deserialize)]
pub struct Accessory {
    /// Digest of its manifest.
    pub digest: String,
    /// `signature.cosign`, `subject.accessory`, ...
    #[serde(rename = "type")]
    pub kind: String,
}

/// An image, or any other content that a manifest describes.
#[derive(Clone, Debug, Deserialize)]
pub struct Artifact {
    /// Digest of the manifest.
    pub digest: Digest,
    /// Total size of manifest, config and all layers, compressed, in bytes.
    #[serde(default)]
    pub size: u64,
    /// Tags; null if there are none.
    pub tags: Option<Vec<Tag>>,
    /// Labels; null if there are none.
    pub labels: Option<Vec<Label>>,
    /// Annotations of the manifest.
    pub annotations: Option<BTreeMap<String, String>>,
    /// Attributes that Harbor has extracted from the config: `architecture`, `config`, `created`, `os`.
    #[serde(default)]
    pub extra_attrs: Option<serde_json::Value>,
    /// Accessories; null if there are none or they were not requested.
    pub accessories: Option<Vec<Accessory>>,
    /// Time of the push, RFC 3339.
    #[serde(default, deserialize_with = "time")]
    pub push_time: Option<String>,
    /// Time of the last pull, RFC 3339; `None` if never pulled.
    #[serde(default, deserialize_with = "time")]
    pub pull_time: Option<String>,
    /// Kind of artifact: `IMAGE`, ...
    #[serde(default, rename = "type")]
    pub kind: Option<String>,
    /// Media type of the manifest.
    #[serde(default)]
    pub manifest_media_type: Option<String>,
}

impl Artifact {
    /// Returns the names of its tags.
    pub(crate) fn tag_names(&self) -> Vec<String> {
        let tags = self.tags.iter().flatten();
        tags.map(|tag| tag.name.clone()).collect()
    }
}

/// Deserializes a time. Go's zero time means never.
fn time<'de, D: Deserializer<'de>>(from: D) -> Result<Option<String>, D::Error> {
    let text: Option<String> = Option::deserialize(from)?;
    Ok(text.filter(|t| !t.starts_with("0001-") && !t.is_empty()))
}

fn escaped(text: &str) -> String {
    utf8_percent_encode(text, ESCAPED).to_string()
}

/// Returns the API path of `PROJECT/REPOSITORY`. Slashes within the repository are escaped twice, which works with and
/// without a proxy in front of Harbor.
fn repository_path(project: &str, repository: &str) -> String {
    format!(
        "{BASE}/projects/{}/repositories/{}",
        escaped(project),
        escaped(&escaped(repository))
    )
}

/// Splits a path within a host (`PROJECT/REPOSITORY`) at the first slash.
pub(crate) fn split(path: &str) -> Option<(&str, &str)> {
    path.split_once('/')
}

/// A Harbor instance, accessed with the credentials of one user.
#[derive(Clone)]
pub struct Harbor {
    api: Api,
}

impl Harbor {
    /// Returns the Harbor at `host`, or `None` if the host is not a Harbor. `path` selects the credentials.
    pub async fn find(
        registries: &Registries,
        host: &str,
        path: &str,
    ) -> Result<Option<Self>, Error> {
        Self::detect(registries.api(host, path)?).await
    }

    /// Returns the Harbor behind a host's API, or `None` if the host is not a Harbor.
    pub(crate) async fn detect(api: Api) -> Result<Option<Self>, Error> {
        if !api.has_harbor_token_service().await? {
            return Ok(None);
        }
        Ok(Some(Self { api }))
    }

    /// Returns `HOST[:PORT]`.
    pub(crate) fn host(&self) -> &str {
        self.api.host()
    }

    /// Returns whether a project of this name exists. Every user may query this for any project.
    pub async fn project_exists(&self, name: &str) -> Result<bool, Error> {
        let path = format!("{BASE}/projects?project_name={}", escaped(name));
        Ok(self.api.head(&path, &[404]).await?.status != 404)
    }

    /// Returns a project, or `None` if it does not exist or is not visible with these credentials.
    pub async fn project(&self, name: &str) -> Result<Option<Project>, Error> {
        let path = format!("{BASE}/projects/{}", escaped(name));
        let answer = self.api.get(&path, &[401, 403, 404]).await?;
        read_if_found(&answer)
    }

    /// Creates a private project. Returns false if it existed already.
    pub async fn create_project(&self, name: &str) -> Result<bool, Error> {
        let document = json!({"project_name": name, "metadata": {"public": "false"}});
        let answer = self
            .api
            .post(&format!("{BASE}/projects"), &document, &[409])
            .await?;
        // After a failed attempt, a conflict may mean that the earlier request succeeded and its answer was lost.
        Ok(answer.status != 409 || answer.failed > 0)
    }

    /// Returns the summary of a project, or `None` if it is not visible with these credentials.
    pub async fn summary(&self, name: &str) -> Result<Option<Summary>, Error> {
        let path = format!("{BASE}/projects/{}/summary", escaped(name));
        let answer = self.api.get(&path, &[401, 403, 404]).await?;
        read_if_found(&answer)
    }

    /// Lists the projects that are visible with these credentials.
    pub async fn projects(&self, query: &Query) -> Result<Page<Project>, Error> {
        let path = format!("{BASE}/projects?{}", query.text("name")?);
        self.page(&path).await
    }

    /// Lists the repositories of a project, or of all projects.
    pub async fn repositories(
        &self,
        project: Option<&str>,
        query: &Query,
    ) -> Result<Page<Repository>, Error> {
        let query = query.text("name")?;
        let path = match project {
            Some(project) => format!("{BASE}/projects/{}/repositories?{query}", escaped(project)),
            None => format!("{BASE}/repositories?{query}"),
        };
        self.page(&path).await
    }

    /// Returns whether a repository exists and is visible with these credentials. The list of a missing one is just
    /// empty.
    pub(crate) async fn repository_exists(
        &self,
        project: &str,
        repository: &str,
    ) -> Result<bool, Error> {
        let path = repository_path(project, repository);
        Ok(self.api.get(&path, &[404]).await?.status != 404)
    }

    /// Lists the artifacts of a repository, with tags, labels and accessories.
    pub async fn artifacts(
        &self,
        project: &str,
        repository: &str,
        query: &Query,
    ) -> Result<Page<Artifact>, Error> {
        let query = query.text("tags")?;
        let path = format!(
            "{}/artifacts?with_tag=true&with_label=true&with_accessory=true&with_immutable_status=true&{query}",
            repository_path(project, repository)
        );
        self.page(&path).await
    }

    /// Returns one artifact by tag or digest, or `None` if it does not exist.
    pub async fn artifact(
        &self,
        project: &str,
        repository: &str,
        reference: &str,
    ) -> Result<Option<Artifact>, Error> {
        let path = format!(
            "{}/artifacts/{}?with_tag=true&with_label=true&with_accessory=true",
            repository_path(project, repository),
            escaped(reference)
        );
        read_if_found(&self.api.get(&path, &[404]).await?)
    }

    /// Removes one tag from an artifact, which itself remains. Returns false if the tag did not exist.
    pub(crate) async fn delete_tag(
        &self,
        project: &str,
        repository: &str,
        tag: &str,
    ) -> Result<bool, Error> {
        let path = format!(
            "{}/artifacts/{tag}/tags/{tag}",
            repository_path(project, repository),
            tag = escaped(tag)
        );
        self.delete(&path).await
    }

    /// Deletes an artifact with all its tags and accessories. Returns false if it did not exist.
    pub(crate) async fn delete_artifact(
        &self,
        project: &str,
        repository: &str,
        digest: &Digest,
    ) -> Result<bool, Error> {
        let path = format!(
            "{}/artifacts/{}",
            repository_path(project, repository),
            escaped(&digest.to_string())
        );
        self.delete(&path).await
    }

    async fn delete(&self, path: &str) -> Result<bool, Error> {
        let answer = self.api.delete(path, &[404]).await?;
        Ok(answer.status != 404 || answer.failed > 0)
    }

    async fn page<T: serde::de::DeserializeOwned>(&self, path: &str) -> Result<Page<T>, Error> {
        let answer = self.api.get(path, &[]).await?;
        // Harbor returns null for an empty list.
        let items: Vec<T> = answer.read::<Option<Vec<T>>>()?.unwrap_or_default();
        let total = answer.total.unwrap_or(items.len() as u64);
        Ok(Page { items, total })
    }
}

fn read_if_found<T: serde::de::DeserializeOwned>(answer: &ApiResponse) -> Result<Option<T>, Error> {
    if answer.status >= 300 {
        return Ok(None);
    }
    Ok(Some(answer.read()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slashes_of_a_repository_are_escaped_twice() {
        assert_eq!(
            repository_path("bob", "deep/er"),
            "/api/v2.0/projects/bob/repositories/deep%252Fer"
        );
        assert_eq!(split("bob/deep/er"), Some(("bob", "deep/er")));
    }

    #[test]
    fn pages_and_searches() {
        let query = Query {
            search: Some("deep/er".into()),
            sort: Some("-update_time"),
            page: 0,
            page_size: 500,
        };
        assert_eq!(
            query.text("name").unwrap(),
            "page=1&page_size=100&sort=-update_time&q=name%3D~deep%2Fer"
        );
        for bad in ["", "a,b=c", "x y", "{a b}", "a=b"] {
            let query = Query {
                search: Some(bad.into()),
                ..Query::default()
            };
            assert!(query.text("name").is_err(), "{bad}");
        }
    }

    #[test]
    fn quotas_as_harbor_says_them() {
        let of = |text: &str| serde_json::from_str::<Summary>(text).unwrap().quota_usage();
        let room = of(
            r#"{"quota":{"hard":{"storage":1048576},"used":{"storage":700000}},"repo_count":0}"#,
        );
        assert_eq!(room.map(|r| r.free()), Some(348_576));
        assert_eq!(
            of(r#"{"quota":{"hard":{"storage":-1},"used":{"storage":7}}}"#),
            None
        );
        assert_eq!(of(r#"{"repo_count":1}"#), None);
        let over = of(r#"{"quota":{"hard":{"storage":5},"used":{"storage":7}}}"#);
        assert_eq!(over.map(|r| r.free()), Some(0));
        let text = Error::Quota {
            host: "h".into(),
            project: "tiny".into(),
            usage: room.unwrap(),
            needed: 3 << 20,
        }
        .to_string();
        assert!(
            text.contains("683.6 KiB of 1.0 MiB are used") && text.contains("needs 3.0 MiB"),
            "{text}"
        );
    }
}
