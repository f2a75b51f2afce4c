//! Client for Harbor's own API: projects and quotas, listing with details, and deletion that respects shared tags.
//!
//! Format: Harbor's API description, version 2.0 (`api/v2.0/swagger.yaml` in its sources).

mod budget;
mod labels;
mod push;
pub mod rights;

use std::collections::BTreeMap;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde::{Deserialize, Deserializer};
use serde_json::json;

use crate::common::digest::Digest;
use crate::store::registry::api::ApiResponse;
use crate::store::registry::{self, Api, Denial, Registries};

pub use budget::Budget;
pub(crate) use labels::add_labels;
pub use push::{Needed, QuotaUsage, check_push, check_tag, explain};
pub(crate) use push::{delete_replaced, tagged};

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
        "the project {project:?} on {host} is a proxy cache, which cannot be pushed to; name another project"
    )]
    ProxyCache {
        /// `HOST[:PORT]`.
        host: String,
        /// Name of the project.
        project: String,
    },
    /// The storage quota of the project is used up, or too small for what is to be saved.
    #[error(
        "the quota of project {project:?} on {host} is too small: {}{}; delete images there (upperdeck image rm, \
         which frees space at once) or ask for more",
        used(*usage), needed_text(*needed)
    )]
    Quota {
        /// `HOST[:PORT]`.
        host: String,
        /// Name of the project.
        project: String,
        /// Quota and usage; `None` if neither Harbor's API nor its reply tells.
        usage: Option<QuotaUsage>,
        /// What the save needs, as far as known.
        needed: Option<Needed>,
    },
    /// Harbor is in read-only mode.
    #[error(
        "{host} is in read-only mode, in which nothing can be saved or deleted: its administrator ends that; \
         deleting images would not help"
    )]
    ReadOnly {
        /// `HOST[:PORT]`.
        host: String,
    },
    /// A rule of the project makes the tag immutable.
    #[error(
        "the tag {tag} of {host}/{repository} is immutable: a rule of the project forbids moving and deleting it; \
         save under another tag"
    )]
    Immutable {
        /// `HOST[:PORT]`.
        host: String,
        /// Name of the repository, with the project.
        repository: String,
        /// The tag.
        tag: String,
    },
    /// The project hands out only signed images, and this one is not signed.
    #[error(
        "{host}/{repository} hands out only signed images (content trust of its project), and this one is not: have it \
         signed, or use another base"
    )]
    NotSigned {
        /// `HOST[:PORT]`.
        host: String,
        /// Name of the repository, with the project.
        repository: String,
    },
    /// The user name or password is wrong, or the account is not usable.
    #[error("{host} does not accept the account {user:?}: {}", account(user))]
    Account {
        /// `HOST[:PORT]`.
        host: String,
        /// Name of the user or robot.
        user: String,
    },
    /// A label cannot be found, although it exists or was created.
    #[error("{host} does not list the label {label:?} of the project")]
    NoLabel {
        /// `HOST[:PORT]`.
        host: String,
        /// Name of the label.
        label: String,
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

fn used(usage: Option<QuotaUsage>) -> String {
    let Some(QuotaUsage {
        limit: Some(limit),
        used,
    }) = usage
    else {
        return "Harbor refuses what is to be added".to_owned();
    };
    let free = limit.saturating_sub(used);
    format!(
        "{} of {} are used, {} are free",
        size(used),
        size(limit),
        size(free)
    )
}

fn needed_text(needed: Option<Needed>) -> String {
    match needed {
        None => String::new(),
        Some(Needed::Base(bytes)) => format!(
            ", and the layers below the new ones alone need {}",
            size(bytes)
        ),
        Some(Needed::About(bytes)) => format!(", and about {} are needed", size(bytes)),
        Some(Needed::Exactly(bytes)) => format!(", and {} are needed", size(bytes)),
    }
}

/// Returns whether an account is a robot of Harbor, by its usual prefix.
fn is_robot(user: &str) -> bool {
    user.starts_with("robot$")
}

fn account(user: &str) -> &'static str {
    if is_robot(user) {
        "the robot is disabled, expired or deleted, or its secret is wrong"
    } else {
        "the user does not exist or the password is wrong"
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
            Self::Search(_) | Self::NoLabel { .. } => false,
            _ => true,
        }
    }

    /// Returns a stable name of the cause in snake case, if it has one of its own.
    pub fn code(&self) -> Option<&'static str> {
        match self {
            Self::Registry(error) => Denial::of(error).map(Denial::code),
            Self::Quota { .. } => Some(Denial::Quota(None).code()),
            Self::ReadOnly { .. } => Some(Denial::ReadOnly.code()),
            Self::Immutable { .. } => Some(Denial::Immutable.code()),
            Self::NotSigned { .. } => Some(Denial::NotSigned.code()),
            Self::Account { user, .. } if is_robot(user) => Some("robot_refused"),
            Self::Account { .. } => Some("credentials_refused"),
            Self::NoProject { .. }
            | Self::ProxyCache { .. }
            | Self::NoLabel { .. }
            | Self::Search(_) => None,
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
    /// ID of the project.
    #[serde(default)]
    pub project_id: u64,
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
    /// Returns quota and usage. Returns `None` if they are not visible (a robot needs `quota:read`).
    pub(crate) fn quota_usage(&self) -> Option<QuotaUsage> {
        let quota = self.quota.as_ref()?;
        let storage = |of: &BTreeMap<String, i64>| u64::try_from(*of.get("storage")?).ok();
        Some(QuotaUsage {
            // -1 stands for no limit.
            limit: storage(&quota.hard),
            used: storage(&quota.used).unwrap_or(0),
        })
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

/// An image that an index names.
#[derive(Clone, Debug, Deserialize)]
pub struct Child {
    /// Digest of its manifest.
    pub child_digest: String,
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
    /// Images that an index names; null for other artifacts.
    pub references: Option<Vec<Child>>,
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

    /// Returns the user or robot that requests are made as.
    pub fn user(&self) -> Option<String> {
        self.api.user()
    }

    /// Returns whether Harbor knows the account and accepts its password. A robot has no user, which Harbor says only
    /// to one that it accepts.
    pub async fn accepts_account(&self) -> Result<bool, Error> {
        let path = format!("{BASE}/users/current");
        let answer = self.api.get(&path, &[401, 403, 412]).await?;
        Ok(answer.status != 401)
    }

    /// Tells a refused account (401) and the read-only mode from a missing right (403).
    fn cause(&self, error: registry::Error) -> Error {
        let host = self.host().to_owned();
        match (&error, self.user()) {
            (registry::Error::Reply(reply), Some(user)) if reply.status == 401 => {
                Error::Account { host, user }
            }
            _ if Denial::of(&error) == Some(Denial::ReadOnly) => Error::ReadOnly { host },
            _ => error.into(),
        }
    }

    /// Returns whether a project of this name exists. Every user may query this for any project.
    pub async fn project_exists(&self, name: &str) -> Result<bool, Error> {
        let path = format!("{BASE}/projects?project_name={}", escaped(name));
        let answer = self.api.head(&path, &[404]).await;
        Ok(answer.map_err(|error| self.cause(error))?.status != 404)
    }

    /// Returns a project, or `None` if it does not exist or is not visible with these credentials.
    pub async fn project(&self, name: &str) -> Result<Option<Project>, Error> {
        let path = format!("{BASE}/projects/{}", escaped(name));
        let answer = self.api.get(&path, &[401, 403, 404]).await?;
        read_if_found(&answer)
    }

    /// Creates a private project with a quota in bytes, or with Harbor's default. Returns false if it existed already.
    pub async fn create_project(&self, name: &str, limit: Option<u64>) -> Result<bool, Error> {
        let mut document = json!({"project_name": name, "metadata": {"public": "false"}});
        if let Some(limit) = limit {
            document["storage_limit"] = json!(limit);
        }
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
            "{}/artifacts/{}?with_tag=true&with_label=true&with_accessory=true&with_immutable_status=true",
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
        let answer = self.api.delete(path, &[404]).await;
        let answer = answer.map_err(|error| self.cause(error))?;
        Ok(answer.status != 404 || answer.failed > 0)
    }

    async fn page<T: serde::de::DeserializeOwned>(&self, path: &str) -> Result<Page<T>, Error> {
        let answer = self.api.get(path, &[]).await;
        let answer = answer.map_err(|error| self.cause(error))?;
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
        let usage = of(
            r#"{"quota":{"hard":{"storage":1048576},"used":{"storage":700000}},"repo_count":0}"#,
        );
        assert_eq!(usage.and_then(|r| r.free()), Some(348_576));
        let unlimited = of(r#"{"quota":{"hard":{"storage":-1},"used":{"storage":7}}}"#);
        assert_eq!(
            unlimited.map(|r| (r.limit, r.used, r.free())),
            Some((None, 7, None))
        );
        assert_eq!(of(r#"{"repo_count":1}"#), None);
        let over = of(r#"{"quota":{"hard":{"storage":5},"used":{"storage":7}}}"#);
        assert_eq!(over.and_then(|r| r.free()), Some(0));
        let text = Error::Quota {
            host: "h".into(),
            project: "tiny".into(),
            usage,
            needed: Some(Needed::Base(3 << 20)),
        }
        .to_string();
        assert!(
            text.contains("683.6 KiB of 1.0 MiB are used") && text.contains("need 3.0 MiB"),
            "{text}"
        );
    }
}
