//! What a project's quota has left, and which blobs it has been charged for. Harbor charges a project for a blob when it
//! is completed or mounted. A blob of a deleted image is still in the registry behind Harbor, but is charged again with
//! the next manifest that names it.

use std::collections::{BTreeMap, BTreeSet};
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

    /// Returns the bytes that a manifest with `blobs`, which the registry behind Harbor has, costs at least. Blobs that
    /// images of the project have cost nothing, and neither do those that were pushed for no image yet: Harbor charges
    /// them when they are completed. It does not name these, but what it has charged beyond the images is theirs,
    /// except for `own` bytes, which the save itself has completed.
    ///
    /// The images of the destination's repository are looked at first. If the project has more images than are looked
    /// at, or one of them cannot be read, all blobs count as charged for: the registry then decides.
    pub async fn uncharged(&self, blobs: &BTreeMap<Digest, u64>, own: u64) -> Result<u64, Error> {
        let (mut held, mut left) = (BTreeMap::new(), blobs.clone());
        let mut room = MAX_MANIFESTS;
        let Some(names) = self.repositories().await? else {
            return Ok(0);
        };
        for name in names {
            let images = self.images(&name).await?;
            let Some(rest) = images.and_then(|i| Some((room.checked_sub(i.len())?, i))) else {
                return Ok(0);
            };
            let images;
            (room, images) = rest;
            let repository = self.repository.beside(&format!("{}/{name}", self.project));
            let reading = images.into_iter().map(|digest| {
                let repository = repository.clone();
                async move { named(&repository, digest).await }
            });
            let reading = futures_util::stream::iter(reading).buffer_unordered(AT_ONCE);
            let found: Vec<Option<BTreeMap<Digest, u64>>> = reading.collect().await;
            for found in found {
                let Some(found) = found else { return Ok(0) };
                left.retain(|digest, _| !found.contains_key(digest));
                held.extend(found);
            }
            if left.is_empty() {
                return Ok(0);
            }
        }
        let of_images = held.values().fold(own, |sum, n| sum.saturating_add(*n));
        let of_none = self.quota_usage().used.saturating_sub(of_images);
        let left = left.values().fold(0_u64, |sum, n| sum.saturating_add(*n));
        Ok(left.saturating_sub(of_none))
    }

    /// Returns the names of the project's repositories, that of the destination first. Returns `None` if there are too
    /// many.
    async fn repositories(&self) -> Result<Option<Vec<String>>, Error> {
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
        if page.total > u64::from(MAX_PAGE_SIZE) {
            return Ok(None);
        }
        let own = split(self.repository.path()).map_or("", |(_, name)| name);
        let names = page.items.into_iter().filter(|r| r.artifact_count > 0);
        let names = names.filter_map(|r| Some(split(&r.name)?.1.to_owned()));
        let mut names: Vec<String> = names.collect();
        names.sort_by_key(|name| name != own);
        Ok(Some(names))
    }

    /// Returns the images of a repository with what is attached to them, or `None` if there are too many.
    async fn images(&self, name: &str) -> Result<Option<BTreeSet<Digest>>, Error> {
        let query = Query {
            sort: Some("-push_time"),
            page: 1,
            page_size: MAX_PAGE_SIZE,
            ..Query::default()
        };
        let page = self.harbor.artifacts(&self.project, name, &query).await?;
        if page.total > u64::from(MAX_PAGE_SIZE) {
            return Ok(None);
        }
        let all = page.items.into_iter().flat_map(|artifact| {
            let attached = artifact.accessories.into_iter().flatten();
            let attached = attached.filter_map(|accessory| accessory.digest.parse().ok());
            std::iter::once(artifact.digest).chain(attached)
        });
        Ok(Some(all.collect()))
    }
}

/// Returns what Harbor charges for an image, with sizes in bytes: the manifest and the blobs that it names, without
/// layers that are not to be distributed. An image deleted meanwhile has none. Returns `None` for one that cannot be
/// read, for example by content trust, and for an index, whose images Harbor does not list.
async fn named(repository: &Repository, digest: Digest) -> Option<BTreeMap<Digest, u64>> {
    let manifest = match repository.manifest(&digest.to_string()).await {
        Ok(manifest) if manifest.is_index() => return None,
        Ok(manifest) => manifest,
        Err(error) if error.not_found() => return Some(BTreeMap::new()),
        Err(_) => return None,
    };
    let document: serde_json::Value = serde_json::from_slice(&manifest.bytes).unwrap_or_default();
    let layers = document["layers"].as_array().into_iter().flatten();
    let charged = layers.chain([&document["config"]]).filter(|d| {
        let kind = d["mediaType"].as_str().unwrap_or_default();
        !kind.contains("foreign") && !kind.contains("nondistributable")
    });
    let sizes =
        charged.filter_map(|d| Some((d["digest"].as_str()?.parse().ok()?, d["size"].as_u64()?)));
    Some(
        sizes
            .chain([(digest, manifest.bytes.len() as u64)])
            .collect(),
    )
}
