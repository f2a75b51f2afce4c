//! What was saved and where: listing and deleting, the same over Harbor, over a plain registry and over a layout directory.
//!
//! One trait, three implementations: a site without Harbor loses quotas and pull counts, and nothing else.

mod harbor;
mod layout;
mod plain;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::str::FromStr;

use futures_util::future::BoxFuture;
use serde::Serialize;

use crate::common::digest::Digest;
use crate::store::harbor::{self as harbor_api, Harbor, Room};
use crate::store::layout::{self as on_disk, Directory};
use crate::store::registry::reference::{ReferenceError, check_tag};
use crate::store::registry::{self, Reference, Registries};

pub use harbor::HarborImages;
pub use layout::LayoutImages;
pub use plain::PlainImages;

/// Images on a page when nobody says.
pub const PAGE_SIZE: u32 = 50;
/// Most images on a page: what Harbor bears.
pub const MAX_PAGE_SIZE: u32 = harbor_api::MAX_PAGE_SIZE;

/// What can go wrong with listing and deleting.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A registry.
    #[error(transparent)]
    Registry(#[from] registry::Error),
    /// Harbor.
    #[error(transparent)]
    Harbor(harbor_api::Error),
    /// A layout.
    #[error(transparent)]
    Layout(#[from] on_disk::Error),
    /// Not a place for images.
    #[error(
        "{text:?} names no images: {reason}; write HOST[:PORT][/PATH], HOST/REPOSITORY:TAG or oci:DIRECTORY[:TAG]"
    )]
    Place {
        /// As written.
        text: String,
        /// What is wrong with it.
        reason: String,
    },
    /// It is not there.
    #[error("{0} is not there")]
    NotThere(String),
    /// An image that has tags was named by its digest.
    #[error("{image} is not deleted: it is tagged {}; delete the tags, or say --all-tags", tags.join(", "))]
    Tagged {
        /// By its digest.
        image: String,
        /// All its tags.
        tags: Vec<String>,
    },
    /// A registry that deletes only images, of which one tag of several was named.
    #[error(
        "{image} is not deleted: this registry deletes images and no single tags, and the image is also tagged {}; \
         say --all-tags to delete it with all of them",
        others.join(", ")
    )]
    SharedTag {
        /// By the tag.
        image: String,
        /// The other tags.
        others: Vec<String>,
    },
    /// An image that an index names.
    #[error("{image} is not deleted: the index under {index} needs it; delete that first")]
    Needed {
        /// By its digest.
        image: String,
        /// A tag of the index.
        index: String,
    },
    /// The runtime went away.
    #[error("ended while a file was being read")]
    Ended,
}

impl From<harbor_api::Error> for Error {
    fn from(error: harbor_api::Error) -> Self {
        match error {
            harbor_api::Error::Registry(error) => Self::Registry(error),
            error => Self::Harbor(error),
        }
    }
}

impl From<ReferenceError> for Error {
    fn from(error: ReferenceError) -> Self {
        Self::Registry(error.into())
    }
}

impl Error {
    /// Whether doing the same again later may succeed (exit code 75).
    pub fn retryable(&self) -> bool {
        match self {
            Self::Registry(e) => e.retryable(),
            Self::Harbor(e) => e.retryable(),
            Self::Layout(e) => e.retryable(),
            _ => false,
        }
    }

    /// Whether it is a matter of permission (exit code 77).
    pub fn not_permitted(&self) -> bool {
        match self {
            Self::Registry(e) => e.not_permitted(),
            Self::Harbor(e) => e.not_permitted(),
            Self::Layout(e) => e.not_permitted(),
            _ => false,
        }
    }

    /// Whether the command line is wrong (exit code 2).
    pub fn is_usage(&self) -> bool {
        matches!(
            self,
            Self::Place { .. }
                | Self::Harbor(harbor_api::Error::Search(_))
                | Self::Registry(registry::Error::Reference(_))
        )
    }
}

/// In which order.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Sort {
    /// The newest first
    #[default]
    Updated,
    /// By name, or by tag
    Name,
    /// The largest first (images), or those with the most images
    Size,
}

/// Which part of a list.
#[derive(Clone, Debug)]
pub struct Query {
    /// Only what has this in its name, or in one of its tags.
    pub search: Option<String>,
    /// Order.
    pub sort: Sort,
    /// From 1.
    pub page: u32,
    /// 1 to [`MAX_PAGE_SIZE`].
    pub page_size: u32,
}

impl Default for Query {
    fn default() -> Self {
        Self {
            search: None,
            sort: Sort::default(),
            page: 1,
            page_size: PAGE_SIZE,
        }
    }
}

impl Query {
    /// This page of a list that is at hand as a whole.
    fn cut<T>(&self, all: Vec<T>) -> Listed<T> {
        let total = all.len() as u64;
        let size = self.page_size.max(1) as usize;
        let first = size * (self.page.max(1) as usize - 1);
        Listed {
            items: all.into_iter().skip(first).take(size).collect(),
            total,
        }
    }

    fn finds(&self, name: &str) -> bool {
        self.search
            .as_ref()
            .is_none_or(|s| name.contains(s.as_str()))
    }
}

/// A page, and how many there are in all.
#[derive(Clone, Debug)]
pub struct Listed<T> {
    /// On this page.
    pub items: Vec<T>,
    /// On all.
    pub total: u64,
}

/// A repository. What a place does not know is none.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RepositoryEntry {
    /// Within its host; the directory of a layout.
    pub name: String,
    /// How many.
    pub images: Option<u64>,
    /// Of all its images.
    pub pulls: Option<u64>,
    /// RFC 3339.
    pub updated: Option<String>,
}

/// An image. What a place does not know is none.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ImageEntry {
    /// Of its manifest.
    pub digest: Digest,
    /// Sorted.
    pub tags: Vec<String>,
    /// Those of them that the place forbids to move or delete.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub immutable: Vec<String>,
    /// Compressed bytes of manifest, config and all layers.
    pub size: Option<u64>,
    /// Media type of the manifest.
    pub media_type: Option<String>,
    /// `amd64`, ...; none for an index.
    pub architecture: Option<String>,
    /// What the config says, RFC 3339.
    pub created: Option<String>,
    /// RFC 3339.
    pub pushed: Option<String>,
    /// When it was last pulled, RFC 3339.
    pub pulled: Option<String>,
    /// Of the config.
    pub labels: BTreeMap<String, String>,
    /// Of the manifest.
    pub annotations: BTreeMap<String, String>,
    /// What people put on it in Harbor.
    pub marks: Vec<String>,
    /// What refers to it (signatures, bills of materials), by kind.
    pub accessories: Vec<String>,
}

impl ImageEntry {
    fn new(digest: Digest) -> Self {
        Self {
            digest,
            tags: Vec::new(),
            immutable: Vec::new(),
            size: None,
            media_type: None,
            architecture: None,
            created: None,
            pushed: None,
            pulled: None,
            labels: BTreeMap::new(),
            annotations: BTreeMap::new(),
            marks: Vec::new(),
            accessories: Vec::new(),
        }
    }

    /// Takes in what an image's config says.
    fn read_config(&mut self, config: &serde_json::Value) {
        let text =
            |value: &serde_json::Value| value.as_str().filter(|t| !t.is_empty()).map(str::to_owned);
        self.architecture = text(&config["architecture"]);
        self.created = text(&config["created"]);
        let labels = config["config"]["Labels"].as_object();
        self.labels = labels
            .into_iter()
            .flatten()
            .filter_map(|(k, v)| Some((k.clone(), v.as_str()?.to_owned())))
            .collect();
    }

    /// By what "newest" is judged.
    fn time(&self) -> Option<&str> {
        self.pushed.as_deref().or(self.created.as_deref())
    }
}

fn sort(images: &mut [ImageEntry], by: Sort) {
    match by {
        // RFC 3339 in UTC sorts as text.
        Sort::Updated => images.sort_by(|a, b| b.time().cmp(&a.time()).then(a.tags.cmp(&b.tags))),
        Sort::Name => images.sort_by(|a, b| {
            a.tags
                .is_empty()
                .cmp(&b.tags.is_empty())
                .then(a.tags.cmp(&b.tags))
        }),
        Sort::Size => images.sort_by_key(|image| std::cmp::Reverse(image.size)),
    }
}

/// What to delete.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Which {
    /// A tag; and the image, when it has no other.
    Tag(String),
    /// An image.
    Digest(Digest),
}

/// What was deleted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Removed {
    /// Tags that are gone.
    pub tags: Vec<String>,
    /// The image that the tag was on.
    pub digest: Digest,
    /// Whether the image is gone, too.
    pub image_deleted: bool,
    /// Tags that it keeps.
    pub kept: Vec<String>,
    /// What becomes of the space, in words.
    pub space: &'static str,
}

/// A place that holds images.
pub trait Images: Send + Sync {
    /// Whether `path` (within the place) stands for repositories and not for one.
    fn is_group(&self, path: &str) -> bool;

    /// Repositories below `path`; all with an empty one.
    fn repositories<'a>(
        &'a self,
        path: &'a str,
        query: &'a Query,
    ) -> BoxFuture<'a, Result<Listed<RepositoryEntry>, Error>>;

    /// Images of a repository.
    fn images<'a>(
        &'a self,
        repository: &'a str,
        query: &'a Query,
    ) -> BoxFuture<'a, Result<Listed<ImageEntry>, Error>>;

    /// Deletes. An image goes with its last tag; one that has other tags goes only when `all_tags` says so.
    fn remove<'a>(
        &'a self,
        repository: &'a str,
        which: &'a Which,
        all_tags: bool,
    ) -> BoxFuture<'a, Result<Removed, Error>>;

    /// What `path` may hold and holds, where that is limited and told.
    fn room<'a>(&'a self, path: &'a str) -> BoxFuture<'a, Result<Option<Room>, Error>>;
}

/// What each kind of place does; as [`Images`] they are all alike, and may be chosen while the program runs.
trait Store: Send + Sync {
    fn is_group(&self, path: &str) -> bool;

    fn repositories(
        &self,
        path: &str,
        query: &Query,
    ) -> impl Future<Output = Result<Listed<RepositoryEntry>, Error>> + Send;

    fn images(
        &self,
        repository: &str,
        query: &Query,
    ) -> impl Future<Output = Result<Listed<ImageEntry>, Error>> + Send;

    fn remove(
        &self,
        repository: &str,
        which: &Which,
        all_tags: bool,
    ) -> impl Future<Output = Result<Removed, Error>> + Send;

    /// Nowhere but in Harbor is it limited.
    fn room(&self, _: &str) -> impl Future<Output = Result<Option<Room>, Error>> + Send {
        async { Ok(None) }
    }
}

impl<S: Store> Images for S {
    fn is_group(&self, path: &str) -> bool {
        Store::is_group(self, path)
    }

    fn repositories<'a>(
        &'a self,
        path: &'a str,
        query: &'a Query,
    ) -> BoxFuture<'a, Result<Listed<RepositoryEntry>, Error>> {
        Box::pin(Store::repositories(self, path, query))
    }

    fn images<'a>(
        &'a self,
        repository: &'a str,
        query: &'a Query,
    ) -> BoxFuture<'a, Result<Listed<ImageEntry>, Error>> {
        Box::pin(Store::images(self, repository, query))
    }

    fn remove<'a>(
        &'a self,
        repository: &'a str,
        which: &'a Which,
        all_tags: bool,
    ) -> BoxFuture<'a, Result<Removed, Error>> {
        Box::pin(Store::remove(self, repository, which, all_tags))
    }

    fn room<'a>(&'a self, path: &'a str) -> BoxFuture<'a, Result<Option<Room>, Error>> {
        Box::pin(Store::room(self, path))
    }
}

/// A place and what in it is meant, as people write it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// `[docker://]HOST[:PORT][/PATH][:TAG][@DIGEST]`
    Registry {
        /// `HOST[:PORT]`
        host: String,
        /// Project, prefix or repository; a slash at its end says that it is no repository.
        path: String,
        /// As written.
        which: Option<Which>,
    },
    /// `oci:DIRECTORY[:TAG]`
    Layout {
        /// The directory.
        dir: PathBuf,
        /// As written.
        which: Option<Which>,
    },
}

impl FromStr for Place {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let wrong = |reason: &str| Error::Place {
            text: text.chars().take(400).collect(),
            reason: reason.to_owned(),
        };
        if let Some(rest) = text.strip_prefix("oci:") {
            let (dir, tag) = match rest.split_once(':') {
                Some((dir, tag)) => (dir, Some(tag)),
                None => (rest, None),
            };
            let (dir, which) = match (dir.split_once("@sha256:"), tag) {
                (Some((dir, hex)), None) => {
                    let digest = format!("sha256:{hex}")
                        .parse()
                        .map_err(ReferenceError::from)?;
                    (dir, Some(Which::Digest(digest)))
                }
                (None, Some(tag)) if !tag.is_empty() => (dir, Some(Which::Tag(tag.to_owned()))),
                (None, None) => (dir, None),
                _ => return Err(wrong("an empty tag, or a tag and a digest")),
            };
            // DIRECTORY@sha256:… has its colon in the digest.
            let (dir, which) = match (dir.strip_suffix("@sha256"), which) {
                (Some(dir), Some(Which::Tag(hex))) => {
                    let digest = format!("sha256:{hex}")
                        .parse()
                        .map_err(ReferenceError::from)?;
                    (dir, Some(Which::Digest(digest)))
                }
                (_, which) => (dir, which),
            };
            if dir.is_empty() {
                return Err(wrong("no directory"));
            }
            let dir = dir.into();
            return Ok(Self::Layout { dir, which });
        }
        if text.starts_with("oci-archive:") {
            return Err(wrong("an archive holds one image and is deleted as a file"));
        }
        let rest = text.strip_prefix("docker://").unwrap_or(text);
        if rest.contains("://") {
            return Err(wrong("it is a URL"));
        }
        let (host, path) = rest.split_once('/').unwrap_or((rest, ""));
        let group = path.is_empty() || path.ends_with('/');
        let inside = path.trim_end_matches('/');
        let named = if inside.is_empty() { "x" } else { inside };
        let reference: Reference = format!("{host}/{named}").parse()?;
        let which = match (reference.tag, reference.digest) {
            (None, None) => None,
            (Some(tag), None) if !group => Some(Which::Tag(check_tag(&tag)?.to_owned())),
            (None, Some(digest)) if !group => Some(Which::Digest(digest)),
            _ => {
                return Err(wrong(
                    "a tag and a digest, or one of them and no repository",
                ));
            }
        };
        let mut path = if inside.is_empty() {
            String::new()
        } else {
            reference.repository
        };
        if group && !path.is_empty() {
            path.push('/');
        }
        Ok(Self::Registry {
            host: reference.host,
            path,
            which,
        })
    }
}

impl Place {
    /// Path within the place, and what of it.
    pub fn inside(&self) -> (&str, Option<&Which>) {
        match self {
            Self::Registry { path, which, .. } => (path, which.as_ref()),
            Self::Layout { which, .. } => ("", which.as_ref()),
        }
    }

    /// Finds out what kind of place it is.
    pub async fn open(&self, registries: &Registries) -> Result<Box<dyn Images>, Error> {
        match self {
            Self::Layout { dir, .. } => Ok(Box::new(LayoutImages::new(Directory::new(dir)))),
            Self::Registry { host, path, .. } => {
                let found = Harbor::find(registries, host, path.trim_end_matches('/')).await?;
                Ok(match found {
                    Some(harbor) => Box::new(HarborImages::new(harbor)),
                    None => Box::new(PlainImages::new(registries.clone(), host.clone())),
                })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places() {
        let digest = Digest::of("x");
        let registry = |host: &str, path: &str, which| Place::Registry {
            host: host.into(),
            path: path.into(),
            which,
        };
        for (text, place) in [
            ("h.example", registry("h.example", "", None)),
            ("localhost:5000/", registry("localhost:5000", "", None)),
            ("h.example/alice", registry("h.example", "alice", None)),
            (
                "docker://h.example/alice/",
                registry("h.example", "alice/", None),
            ),
            (
                "h.example/alice/x:1",
                registry("h.example", "alice/x", Some(Which::Tag("1".into()))),
            ),
            (
                &format!("h.example/alice/x@{digest}"),
                registry("h.example", "alice/x", Some(Which::Digest(digest))),
            ),
        ] {
            assert_eq!(text.parse::<Place>().unwrap(), place, "{text}");
        }
        let layout = |which| Place::Layout {
            dir: "/srv/images".into(),
            which,
        };
        assert_eq!("oci:/srv/images".parse::<Place>().unwrap(), layout(None));
        assert_eq!(
            "oci:/srv/images:a".parse::<Place>().unwrap(),
            layout(Some(Which::Tag("a".into())))
        );
        assert_eq!(
            format!("oci:/srv/images@{digest}")
                .parse::<Place>()
                .unwrap(),
            layout(Some(Which::Digest(digest)))
        );
        for bad in [
            "",
            "oci:",
            "oci:x:",
            "oci-archive:x.tar",
            "https://h.example/x",
            "h.example/a/:1",
            "h.example/../x",
            &format!("h.example/a:1@{digest}"),
            "x",
        ] {
            assert!(bad.parse::<Place>().is_err_and(|e| e.is_usage()), "{bad}");
        }
    }

    #[test]
    fn pages_are_cut() {
        let query = Query {
            page: 2,
            page_size: 2,
            ..Query::default()
        };
        let cut = query.cut(vec![1, 2, 3]);
        assert_eq!((cut.items, cut.total), (vec![3], 3));
        let beyond = Query { page: 9, ..query };
        assert!(beyond.cut(vec![1, 2, 3]).items.is_empty());
    }
}
