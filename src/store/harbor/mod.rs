//! Harbor's own API: projects and their quotas, what users have in them, and deleting with knowledge of what tags share.
//!
//! Format: Harbor's API description, version 2.0 (`api/v2.0/swagger.yaml` in its sources).

mod push;

use std::collections::BTreeMap;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde::{Deserialize, Deserializer};
use serde_json::json;

use crate::common::digest::Digest;
use crate::store::registry::api::Answer;
use crate::store::registry::{self, Api, Registries};

pub use push::{Room, check_push, check_room, explain};

/// Where the API begins.
const BASE: &str = "/api/v2.0";
/// Harbor refuses larger pages.
pub const MAX_PAGE_SIZE: u32 = 100;
/// What stays as it is in a path or a query.
const PLAIN: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'.')
    .remove(b'_')
    .remove(b'~');

/// What can go wrong beyond what a registry says.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The registry's answer, or none.
    #[error(transparent)]
    Registry(#[from] registry::Error),
    /// There is no such project, or these credentials do not see it.
    #[error(
        "{host} has no project {project:?}, or these credentials do not see it: check the name, or say --create-project"
    )]
    NoProject {
        /// `HOST[:PORT]`.
        host: String,
        /// Its name.
        project: String,
    },
    /// A project that holds copies of another registry's images.
    #[error(
        "the project {project:?} on {host} is a proxy cache: nobody can push there; name another project"
    )]
    ProxyCache {
        /// `HOST[:PORT]`.
        host: String,
        /// Its name.
        project: String,
    },
    /// The project's storage is used up, or what is to be saved does not fit into the rest.
    #[error(
        "the quota of project {project:?} on {host} does not suffice: {} of {} are used, {} are free{}; \
         delete images there (upperdeck image rm; space comes back with Harbor's garbage collection) or ask for more",
        size(room.used), size(room.limit), size(room.free()), needs(*needed)
    )]
    Quota {
        /// `HOST[:PORT]`.
        host: String,
        /// Its name.
        project: String,
        /// What there is.
        room: Room,
        /// Bytes that would be needed, as far as they are known.
        needed: u64,
    },
    /// The same, as the registry said it in mid-push.
    #[error("{source}; the project has {} of {} in use, {} free", size(room.used), size(room.limit), size(room.free()))]
    NoRoom {
        /// What the registry said.
        source: registry::Error,
        /// What there is.
        room: Room,
    },
    /// A name that the API would read as something else.
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

fn needs(needed: u64) -> String {
    if needed == 0 {
        String::new()
    } else {
        format!(", and the base alone needs {}", size(needed))
    }
}

impl Error {
    /// Whether doing the same again later may succeed (exit code 75).
    pub fn retryable(&self) -> bool {
        matches!(self, Self::Registry(e) if e.retryable())
    }

    /// Whether it is a matter of permission: credentials, quota, policy (exit code 77).
    pub fn not_permitted(&self) -> bool {
        match self {
            Self::Registry(e) => e.not_permitted(),
            Self::Search(_) => false,
            _ => true,
        }
    }
}

/// What to list, and in which order.
#[derive(Clone, Debug, Default)]
pub struct Query {
    /// Only what has this in its name.
    pub search: Option<String>,
    /// A field; with `-` before it, downwards.
    pub sort: Option<&'static str>,
    /// From 1.
    pub page: u32,
    /// At most [`MAX_PAGE_SIZE`].
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
            // The rest is the query language's own.
            let plain = |b: u8| b.is_ascii_alphanumeric() || b"._-/".contains(&b);
            if !search.bytes().all(plain) || search.is_empty() {
                return Err(Error::Search(search.chars().take(100).collect()));
            }
            text.push_str(&format!("&q={}", escaped(&format!("{field}=~{search}"))));
        }
        Ok(text)
    }
}

/// A part of a list, and how long all of it is.
#[derive(Clone, Debug)]
pub struct Page<T> {
    /// This page's.
    pub items: Vec<T>,
    /// In all pages.
    pub total: u64,
}

/// A project.
#[derive(Clone, Debug, Deserialize)]
pub struct Project {
    /// Its name.
    pub name: String,
    /// The registry that it caches, where it is a proxy.
    pub registry_id: Option<i64>,
    /// Repositories in it.
    #[serde(default)]
    pub repo_count: u64,
}

impl Project {
    /// Whether it holds copies of another registry's images and takes no others.
    pub fn is_proxy_cache(&self) -> bool {
        self.registry_id.is_some_and(|id| id != 0)
    }
}

/// A project's figures.
#[derive(Clone, Debug, Deserialize)]
pub struct Summary {
    /// Repositories in it.
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
    /// What may be stored and what is; none without a limit (-1), or where it is not shown.
    pub fn room(&self) -> Option<Room> {
        let quota = self.quota.as_ref()?;
        let limit = u64::try_from(*quota.hard.get("storage")?).ok()?;
        let used = quota.used.get("storage").copied().unwrap_or(0);
        let used = u64::try_from(used).unwrap_or(0);
        Some(Room { limit, used })
    }
}

/// A repository.
#[derive(Clone, Debug, Deserialize)]
pub struct Repository {
    /// With the project's name before it.
    pub name: String,
    /// Artifacts in it.
    #[serde(default)]
    pub artifact_count: u64,
    /// Pulls of all of them.
    #[serde(default)]
    pub pull_count: u64,
    /// RFC 3339.
    #[serde(default, deserialize_with = "time")]
    pub update_time: Option<String>,
}

/// A tag.
#[derive(Clone, Debug, Deserialize)]
pub struct Tag {
    /// Its name.
    pub name: String,
    /// Whether a rule forbids to move or delete it; shown only when asked for.
    #[serde(default)]
    pub immutable: bool,
}

/// A label that somebody put on an artifact in Harbor.
#[derive(Clone, Debug, Deserialize)]
pub struct Label {
    /// Its name.
    pub name: String,
}

/// What refers to an artifact: a signature, a bill of materials.
#[derive(Clone, Debug, Deserialize)]
pub struct Accessory {
    /// Of its manifest.
    pub digest: String,
    /// `signature.cosign`, `subject.accessory`, ...
    #[serde(rename = "type")]
    pub kind: String,
}

/// An image, or what else a manifest describes.
#[derive(Clone, Debug, Deserialize)]
pub struct Artifact {
    /// Of its manifest.
    pub digest: Digest,
    /// Compressed bytes of manifest, config and all layers.
    #[serde(default)]
    pub size: u64,
    /// Null when there are none.
    pub tags: Option<Vec<Tag>>,
    /// Null when there are none.
    pub labels: Option<Vec<Label>>,
    /// Of the manifest.
    pub annotations: Option<BTreeMap<String, String>>,
    /// What Harbor has read in the config: `architecture`, `config`, `created`, `os`.
    #[serde(default)]
    pub extra_attrs: Option<serde_json::Value>,
    /// Null when there are none, or when they were not asked for.
    pub accessories: Option<Vec<Accessory>>,
    /// RFC 3339.
    #[serde(default, deserialize_with = "time")]
    pub push_time: Option<String>,
    /// RFC 3339; none when never.
    #[serde(default, deserialize_with = "time")]
    pub pull_time: Option<String>,
    /// `IMAGE`, ...
    #[serde(default, rename = "type")]
    pub kind: Option<String>,
    /// Of the manifest.
    #[serde(default)]
    pub manifest_media_type: Option<String>,
}

impl Artifact {
    /// The names of its tags.
    pub fn tag_names(&self) -> Vec<String> {
        let tags = self.tags.iter().flatten();
        tags.map(|tag| tag.name.clone()).collect()
    }
}

/// Go's zero time means never.
fn time<'de, D: Deserializer<'de>>(from: D) -> Result<Option<String>, D::Error> {
    let text: Option<String> = Option::deserialize(from)?;
    Ok(text.filter(|t| !t.starts_with("0001-") && !t.is_empty()))
}

fn escaped(text: &str) -> String {
    utf8_percent_encode(text, PLAIN).to_string()
}

/// `PROJECT/REPOSITORY` as the API's paths have them: the slashes within the repository are escaped twice, which works
/// with and without a proxy before Harbor.
fn repository_path(project: &str, repository: &str) -> String {
    format!(
        "{BASE}/projects/{}/repositories/{}",
        escaped(project),
        escaped(&escaped(repository))
    )
}

/// A path within a host (`PROJECT/REPOSITORY`) in its parts.
pub fn split(path: &str) -> Option<(&str, &str)> {
    path.split_once('/')
}

/// A Harbor, as one user.
#[derive(Clone)]
pub struct Harbor {
    api: Api,
}

impl Harbor {
    /// The Harbor at `host`, if it is one. `path` chooses the credentials.
    pub async fn find(
        registries: &Registries,
        host: &str,
        path: &str,
    ) -> Result<Option<Self>, Error> {
        Self::behind(registries.api(host, path)?).await
    }

    /// The Harbor behind a host's API, if there is one.
    pub async fn behind(api: Api) -> Result<Option<Self>, Error> {
        if !api.asks_like_harbor().await? {
            return Ok(None);
        }
        Ok(Some(Self { api }))
    }

    /// `HOST[:PORT]`.
    pub fn host(&self) -> &str {
        self.api.host()
    }

    /// Whether there is a project of this name. Every user may ask, of any.
    pub async fn project_exists(&self, name: &str) -> Result<bool, Error> {
        let path = format!("{BASE}/projects?project_name={}", escaped(name));
        Ok(self.api.head(&path, &[404]).await?.status != 404)
    }

    /// A project, if it is there and these credentials may see it.
    pub async fn project(&self, name: &str) -> Result<Option<Project>, Error> {
        let path = format!("{BASE}/projects/{}", escaped(name));
        let answer = self.api.get(&path, &[401, 403, 404]).await?;
        read_if_there(&answer)
    }

    /// Makes a private project. False: there was one.
    pub async fn create_project(&self, name: &str) -> Result<bool, Error> {
        let document = json!({"project_name": name, "metadata": {"public": "false"}});
        let answer = self
            .api
            .post(&format!("{BASE}/projects"), &document, &[409])
            .await?;
        // A conflict with a request of ours whose answer was lost is what was wanted.
        Ok(answer.status != 409 || answer.failed > 0)
    }

    /// A project's figures, if these credentials may see them.
    pub async fn summary(&self, name: &str) -> Result<Option<Summary>, Error> {
        let path = format!("{BASE}/projects/{}/summary", escaped(name));
        let answer = self.api.get(&path, &[401, 403, 404]).await?;
        read_if_there(&answer)
    }

    /// Projects that these credentials see.
    pub async fn projects(&self, query: &Query) -> Result<Page<Project>, Error> {
        let path = format!("{BASE}/projects?{}", query.text("name")?);
        self.page(&path).await
    }

    /// Repositories of a project, or of all.
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

    /// Whether there is such a repository, for these credentials: to a list, what is not there is merely empty.
    pub async fn repository_exists(&self, project: &str, repository: &str) -> Result<bool, Error> {
        let path = repository_path(project, repository);
        Ok(self.api.get(&path, &[404]).await?.status != 404)
    }

    /// Artifacts of a repository, with tags, labels and accessories.
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

    /// One artifact, by tag or digest.
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
        read_if_there(&self.api.get(&path, &[404]).await?)
    }

    /// Takes one tag off an artifact, which stays. False: it was not there.
    pub async fn delete_tag(
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

    /// Deletes an artifact with all its tags and accessories. False: it was not there.
    pub async fn delete_artifact(
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
        // Null where there is nothing.
        let items: Vec<T> = answer.read::<Option<Vec<T>>>()?.unwrap_or_default();
        let total = answer.total.unwrap_or(items.len() as u64);
        Ok(Page { items, total })
    }
}

fn read_if_there<T: serde::de::DeserializeOwned>(answer: &Answer) -> Result<Option<T>, Error> {
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
        let of = |text: &str| serde_json::from_str::<Summary>(text).unwrap().room();
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
            room: room.unwrap(),
            needed: 3 << 20,
        }
        .to_string();
        assert!(
            text.contains("683.6 KiB of 1.0 MiB are used") && text.contains("needs 3.0 MiB"),
            "{text}"
        );
    }
}
