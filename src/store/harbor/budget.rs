//! What a project's quota has left, and which blobs it has been charged for. Harbor charges a project for the blobs of
//! its images. A blob of a deleted image is still in the registry behind Harbor, but is charged again with the next
//! manifest that names it.

use std::collections::BTreeSet;
use std::sync::Mutex;
use std::sync::PoisonError;

use futures_util::StreamExt as _;

use super::{Error, Harbor, MAX_PAGE_SIZE, Needed, Query, QuotaUsage, split};
use crate::common::digest::Digest;
use crate::store::registry::Repository;

/// Number of manifests that are read to find out what a project has been charged for.
const MAX_MANIFESTS: usize = 64;
/// Number of concurrent requests.
const AT_ONCE: usize = 8;

/// A project with a limited quota that the account can see.
pub struct Budget {
    harbor: Harbor,
    project: String,
    repository: Repository,
    usage: Mutex<QuotaUsage>,
}

impl Budget {
    /// Returns the budget of the repository's project, or `None` if the registry is not a Harbor, the project has no
    /// limit, or the account may not see it.
    pub async fn of(repository: &Repository) -> Result<Option<Self>, Error> {
        let Some((harbor, project)) = super::push::harbor_of(repository).await? else {
            return Ok(None);
        };
        let project = project.to_owned();
        let usage = super::push::quota_usage(&harbor, &project).await;
        let limited = usage.filter(|usage| usage.limit.is_some());
        Ok(limited.map(|usage| Self {
            harbor,
            project,
            repository: repository.clone(),
            usage: Mutex::new(usage),
        }))
    }

    fn quota_usage(&self) -> QuotaUsage {
        *self.usage.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the bytes left, as last asked for.
    pub fn free(&self) -> u64 {
        self.quota_usage().free().unwrap_or(u64::MAX)
    }

    /// Asks for the quota again and returns the bytes left. Returns `None` if it cannot be read now.
    pub async fn ask_again(&self) -> Option<u64> {
        let usage = super::push::quota_usage(&self.harbor, &self.project).await?;
        *self.usage.lock().unwrap_or_else(PoisonError::into_inner) = usage;
        Some(usage.free().unwrap_or(u64::MAX))
    }

    /// Returns the error for a save that needs more than is left.
    pub fn exceeded(&self, needed: Needed) -> Error {
        Error::Quota {
            host: self.harbor.host().to_owned(),
            project: self.project.clone(),
            usage: Some(self.quota_usage()),
            needed: Some(needed),
        }
    }

    /// Returns those of `blobs` that belong to no image of the project. The images of the destination's repository are
    /// looked at first. If the project has more images than are looked at, or one of them cannot be read, the remaining
    /// blobs count as charged for: the registry then decides.
    pub async fn not_held(&self, blobs: BTreeSet<Digest>) -> Result<BTreeSet<Digest>, Error> {
        let mut left = blobs;
        let (mut looked_at, mut unread) = (0, false);
        for name in self.repositories().await? {
            let images = self.images(&name).await?;
            let room = MAX_MANIFESTS.saturating_sub(looked_at);
            let whole = images.len() <= room;
            looked_at += images.len().min(room);
            let repository = self.repository.beside(&format!("{}/{name}", self.project));
            let reading = images.into_iter().take(room).map(|digest| {
                let repository = repository.clone();
                async move { named(&repository, &digest).await }
            });
            let named: Vec<Option<BTreeSet<Digest>>> = futures_util::stream::iter(reading)
                .buffer_unordered(AT_ONCE)
                .collect()
                .await;
            unread |= named.iter().any(Option::is_none);
            for found in named.into_iter().flatten() {
                left.retain(|digest| !found.contains(digest));
            }
            if left.is_empty() || !whole {
                return Ok(if whole { left } else { BTreeSet::new() });
            }
        }
        Ok(if unread { BTreeSet::new() } else { left })
    }

    /// Returns the names of the project's repositories, that of the destination first.
    async fn repositories(&self) -> Result<Vec<String>, Error> {
        let query = Query {
            sort: Some("-update_time"),
            page: 1,
            page_size: MAX_PAGE_SIZE,
            ..Query::default()
        };
        let page = self
            .harbor
            .repositories(Some(&self.project), &query)
            .await?;
        let own = split(self.repository.path()).map_or("", |(_, name)| name);
        let names = page.items.into_iter().filter(|r| r.artifact_count > 0);
        let names = names.filter_map(|r| Some(split(&r.name)?.1.to_owned()));
        let mut names: Vec<String> = names.collect();
        names.sort_by_key(|name| name != own);
        Ok(names)
    }

    async fn images(&self, name: &str) -> Result<Vec<Digest>, Error> {
        let query = Query {
            sort: Some("-push_time"),
            page: 1,
            page_size: MAX_PAGE_SIZE,
            ..Query::default()
        };
        let page = self.harbor.artifacts(&self.project, name, &query).await?;
        Ok(page
            .items
            .into_iter()
            .map(|artifact| artifact.digest)
            .collect())
    }
}

/// Returns the blobs that a manifest names; that of an image deleted meanwhile names none. Returns `None` for one that
/// cannot be read, for example by content trust, and for an index, whose images Harbor does not list.
async fn named(repository: &Repository, digest: &Digest) -> Option<BTreeSet<Digest>> {
    let manifest = match repository.manifest(&digest.to_string()).await {
        Ok(manifest) if manifest.is_index() => return None,
        Ok(manifest) => manifest,
        Err(error) if error.not_found() => return Some(BTreeSet::new()),
        Err(_) => return None,
    };
    let document: serde_json::Value = serde_json::from_slice(&manifest.bytes).unwrap_or_default();
    let layers = document["layers"].as_array().into_iter().flatten();
    let all = layers.chain([&document["config"]]);
    let digests = all.filter_map(|d| d["digest"].as_str()?.parse().ok());
    Some(digests.collect())
}
