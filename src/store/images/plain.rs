//! Implements [`Store`] for registries with only the distribution API: what Harbor would return is read from the
//! manifests and configs.

use std::collections::BTreeMap;

use futures_util::{StreamExt as _, TryStreamExt as _};
use serde_json::Value;

use super::{
    Error, ImageEntry, ImageSelector, Listed, Query, Removed, RepositoryEntry, Sort, Store, sort,
};
use crate::common::digest::Digest;
use crate::image::manifest::raw::RawManifest;
use crate::store::registry::error::Step;
use crate::store::registry::{self, Reference, Registries, Repository};

/// Number of concurrent requests.
const MAX_CONCURRENT_REQUESTS: usize = 8;
const SPACE_NOTE: &str = "the space comes back with the registry's garbage collection (registry garbage-collect), \
                     which its administrator runs";

/// The images of a registry with only the distribution API.
pub(crate) struct PlainImages {
    registries: Registries,
    host: String,
}

impl PlainImages {
    /// Creates the store for `HOST[:PORT]`.
    pub(crate) fn new(registries: Registries, host: String) -> Self {
        Self { registries, host }
    }

    fn reference(&self, repository: &str) -> Result<Reference, Error> {
        Ok(format!("{}/{repository}", self.host).parse()?)
    }

    fn display_name(&self, repository: &str, which: &ImageSelector) -> String {
        match which {
            ImageSelector::Tag(tag) => format!("{}/{repository}:{tag}", self.host),
            ImageSelector::Digest(digest) => format!("{}/{repository}@{digest}", self.host),
        }
    }

    async fn is_in_index(
        &self,
        repository: &Repository,
        candidate: &Digest,
        needed: &Digest,
    ) -> Result<bool, Error> {
        let found = repository.manifest(&candidate.to_string()).await?;
        if !found.is_index() {
            return Ok(false);
        }
        let index: Value = serde_json::from_slice(&found.bytes).unwrap_or_default();
        let named = index["manifests"].as_array().into_iter().flatten();
        let needed = needed.to_string();
        Ok(named
            .filter_map(|m| m["digest"].as_str())
            .any(|d| d == needed))
    }
}

/// Returns whether the registry does not support the deletion, as opposed to not permitting it.
fn is_unsupported(error: &registry::Error) -> bool {
    matches!(error, registry::Error::Reply(reply)
        if reply.step == Step::Delete && matches!(reply.status, 400 | 405))
}

/// Groups tags by the digest of their image. A tag that is deleted meanwhile is left out.
async fn digests(
    repository: &Repository,
    tags: Vec<String>,
) -> Result<BTreeMap<Digest, Vec<String>>, Error> {
    let heads = tags.into_iter().map(|tag| async move {
        let found = repository.head_manifest(&tag).await?;
        Ok::<_, Error>(found.map(|found| (tag, found.digest)))
    });
    let heads: Vec<_> = futures_util::stream::iter(heads)
        .buffer_unordered(MAX_CONCURRENT_REQUESTS)
        .try_collect()
        .await?;
    let mut found = BTreeMap::<Digest, Vec<String>>::new();
    for (tag, digest) in heads.into_iter().flatten() {
        found.entry(digest).or_default().push(tag);
    }
    for tags in found.values_mut() {
        tags.sort();
    }
    Ok(found)
}

async fn read_all(
    repository: &Repository,
    entries: Vec<ImageEntry>,
) -> Result<Vec<ImageEntry>, Error> {
    let read = entries.into_iter().map(|entry| read(repository, entry));
    futures_util::stream::iter(read)
        .buffered(MAX_CONCURRENT_REQUESTS)
        .try_collect()
        .await
}

async fn read(repository: &Repository, mut entry: ImageEntry) -> Result<ImageEntry, Error> {
    let manifest = repository.manifest(&entry.digest.to_string()).await?;
    if let Some(config) = describe(&mut entry, &manifest) {
        // An image whose config is missing is listed without labels.
        match repository.blob(&config).await {
            Ok(bytes) => entry.read_config(&serde_json::from_slice(&bytes).unwrap_or_default()),
            Err(error) if error.not_found() => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(entry)
}

/// Fills in the fields that come from the manifest. Returns the digest of the config, or `None` for an index.
pub(super) fn describe(entry: &mut ImageEntry, manifest: &RawManifest) -> Option<Digest> {
    entry.media_type = Some(manifest.media_type.clone());
    let document: Value = serde_json::from_slice(&manifest.bytes).unwrap_or_default();
    let annotations = document["annotations"].as_object();
    entry.annotations = annotations
        .into_iter()
        .flatten()
        .filter_map(|(k, v)| Some((k.clone(), v.as_str()?.to_owned())))
        .collect();
    if manifest.is_index() {
        return None;
    }
    let layers = document["layers"].as_array().into_iter().flatten();
    let sizes = layers
        .chain([&document["config"]])
        .map(|d| d["size"].as_u64().unwrap_or(0));
    let content: u64 = sizes.fold(0, u64::saturating_add);
    entry.size = Some(content.saturating_add(manifest.bytes.len() as u64));
    document["config"]["digest"].as_str()?.parse().ok()
}

impl Store for PlainImages {
    fn is_group(&self, path: &str) -> bool {
        path.is_empty() || path.ends_with('/')
    }

    async fn repositories(
        &self,
        path: &str,
        query: &Query,
    ) -> Result<Listed<RepositoryEntry>, Error> {
        let mut names = self.registries.catalog(&self.host).await?;
        let prefix = path.trim_end_matches('/');
        names.retain(|name| {
            let inside = prefix.is_empty()
                || name
                    .strip_prefix(prefix)
                    .is_some_and(|rest| rest.starts_with('/'));
            inside && query.matches(name)
        });
        names.sort();
        let entries = names.into_iter().map(|name| RepositoryEntry {
            name,
            images: None,
            pulls: None,
            updated: None,
        });
        Ok(query.paginate(entries.collect()))
    }

    async fn images(&self, name: &str, query: &Query) -> Result<Listed<ImageEntry>, Error> {
        let repository = self.registries.pull_from(&self.reference(name)?)?;
        let tags = repository.tags().await?;
        let tags = tags.ok_or_else(|| Error::NotFound(format!("{}/{name}", self.host)))?;
        let by_digest = digests(&repository, tags).await?;
        let mut entries = Vec::new();
        for (digest, tags) in by_digest {
            if tags.iter().any(|tag| query.matches(tag)) {
                let mut entry = ImageEntry::new(digest);
                entry.tags = tags;
                entries.push(entry);
            }
        }
        // Sorted by name, only the entries of this page have to be read.
        if query.sort == Sort::Name {
            sort(&mut entries, Sort::Name);
            let mut cut = query.paginate(entries);
            cut.items = read_all(&repository, cut.items).await?;
            return Ok(cut);
        }
        let mut entries = read_all(&repository, entries).await?;
        sort(&mut entries, query.sort);
        Ok(query.paginate(entries))
    }

    async fn remove(
        &self,
        name: &str,
        which: &ImageSelector,
        all_tags: bool,
    ) -> Result<Removed, Error> {
        let repository = self.registries.delete_from(&self.reference(name)?)?;
        let not_there = || Error::NotFound(self.display_name(name, which));
        let reference = match which {
            ImageSelector::Tag(tag) => tag.clone(),
            ImageSelector::Digest(digest) => digest.to_string(),
        };
        let found = repository.head_manifest(&reference).await?;
        let digest = found.ok_or_else(not_there)?.digest;
        let tags = repository.tags().await?.unwrap_or_default();
        let by_digest = digests(&repository, tags).await?;
        let tags = by_digest.get(&digest).cloned().unwrap_or_default();
        let removed = |tags, image_deleted, kept| Removed {
            tags,
            digest,
            image_deleted,
            kept,
            accessories: Vec::new(),
            freed: None,
            space: SPACE_NOTE.to_owned(),
        };
        match which {
            ImageSelector::Tag(tag) if tags.len() > 1 && !all_tags => {
                let others: Vec<_> = tags.iter().filter(|t| *t != tag).cloned().collect();
                return match repository.delete_manifest(tag).await {
                    Ok(true) => Ok(removed(vec![tag.clone()], false, others)),
                    Ok(false) => Err(not_there()),
                    // Distribution 2.8 cannot delete one of several tags; deletion by digest would remove all of them.
                    Err(error) if is_unsupported(&error) => Err(Error::SharedTag {
                        image: self.display_name(name, which),
                        others,
                    }),
                    Err(error) => Err(error.into()),
                };
            }
            ImageSelector::Digest(_) if !tags.is_empty() && !all_tags => {
                return Err(Error::Tagged {
                    image: self.display_name(name, which),
                    tags,
                });
            }
            _ => {}
        }
        for (other, names) in by_digest.iter().filter(|(other, _)| **other != digest) {
            if self.is_in_index(&repository, other, &digest).await? {
                return Err(Error::Needed {
                    image: self.display_name(name, which),
                    index: self.display_name(
                        name,
                        &ImageSelector::Tag(names.first().cloned().unwrap_or_default()),
                    ),
                });
            }
        }
        if !repository.delete_manifest(&digest.to_string()).await? {
            return Err(not_there());
        }
        Ok(removed(tags, true, Vec::new()))
    }
}
