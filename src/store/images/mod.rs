//! Lists and deletes saved images, in the same way on Harbor, plain registries and layout directories.
//!
//! One trait has three implementations. Without Harbor, only quotas and pull counts are missing.

mod harbor;
mod layout;
mod plain;
pub(crate) mod prune;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::str::FromStr;

use futures_util::future::BoxFuture;
use serde::Serialize;

use crate::common::digest::Digest;
use crate::common::reference::{ReferenceError, check_tag};
use crate::store::harbor::{self as harbor_api, Harbor, QuotaUsage};
use crate::store::layout::{self as on_disk, Directory};
use crate::store::registry::{self, Denial, Reference, Registries};

pub(crate) use harbor::HarborImages;
pub(crate) use layout::LayoutImages;
pub(crate) use plain::PlainImages;

/// Default number of images per page.
pub(crate) const PAGE_SIZE: u32 = 50;
/// Maximum number of images per page, which is that of Harbor.
pub(crate) const MAX_PAGE_SIZE: u32 = harbor_api::MAX_PAGE_SIZE;

/// An error while listing or deleting images.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Access to a registry failed.
    #[error(transparent)]
    Registry(#[from] registry::Error),
    /// Access to Harbor failed.
    #[error(transparent)]
    Harbor(harbor_api::Error),
    /// Access to a layout failed.
    #[error(transparent)]
    Layout(#[from] on_disk::Error),
    /// The text does not name a place for images.
    #[error(
        "{text:?} names no images: {reason}; write HOST[:PORT][/PATH], HOST/REPOSITORY:TAG or oci:DIRECTORY[:TAG]"
    )]
    Place {
        /// The text as written.
        text: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The image or repository does not exist.
    #[error("{0} is not there")]
    NotFound(String),
    /// The image was named by its digest but has tags.
    #[error("{image} is not deleted: it is tagged {}; delete the tags, or say --all-tags", tags.join(", "))]
    Tagged {
        /// The image, by its digest.
        image: String,
        /// All its tags.
        tags: Vec<String>,
    },
    /// One of several tags was named on a registry that can delete only whole images.
    #[error(
        "{image} is not deleted: this registry deletes images and no single tags, and the image is also tagged {}; \
         say --all-tags to delete it with all of them",
        others.join(", ")
    )]
    SharedTag {
        /// The image, by the tag.
        image: String,
        /// The other tags.
        others: Vec<String>,
    },
    /// An index refers to the image.
    #[error("{image} is not deleted: the index under {index} needs it; delete that first")]
    Needed {
        /// The image, by its digest.
        image: String,
        /// A tag of the index, or its digest if it has none.
        index: String,
    },
    /// The account may remove tags but not images, so the last tag of an image is not removed either.
    #[error(
        "{0} is not deleted: these credentials may not delete images (a robot needs artifact:delete), and the tag is its \
         last one"
    )]
    MayNotDelete(String),
    /// The runtime was shut down.
    #[error("ended while a file was being read")]
    RuntimeStopped,
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
    /// Returns whether a later attempt may succeed (exit code 75).
    pub(crate) fn retryable(&self) -> bool {
        match self {
            Self::Registry(e) => e.retryable(),
            Self::Harbor(e) => e.retryable(),
            Self::Layout(e) => e.retryable(),
            _ => false,
        }
    }

    /// Returns whether the cause is a lack of permission (exit code 77).
    pub fn not_permitted(&self) -> bool {
        match self {
            Self::Registry(e) => e.not_permitted(),
            Self::Harbor(e) => e.not_permitted(),
            Self::Layout(e) => e.not_permitted(),
            Self::MayNotDelete(_) => true,
            _ => false,
        }
    }

    /// Returns a stable name of the cause in snake case, if it has one of its own.
    pub fn code(&self) -> Option<&'static str> {
        match self {
            Self::Registry(e) => Denial::of(e).map(Denial::code),
            Self::Harbor(e) => e.code(),
            Self::Needed { .. } => Some(Denial::Needed.code()),
            _ => None,
        }
    }

    /// Returns whether the command line is invalid (exit code 2).
    pub(crate) fn is_usage(&self) -> bool {
        matches!(
            self,
            Self::Place { .. }
                | Self::Harbor(harbor_api::Error::Search(_))
                | Self::Registry(registry::Error::Reference(_))
        )
    }
}

/// The order of a list.
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

/// Filter, order and page of a list.
#[derive(Clone, Debug)]
pub struct Query {
    /// Only entries whose name, or one of whose tags, contains this text.
    pub search: Option<String>,
    /// Order of the entries.
    pub sort: Sort,
    /// Number of the page, starting at 1.
    pub page: u32,
    /// Entries per page, 1 to [`MAX_PAGE_SIZE`].
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
    /// Returns this page of a complete list.
    fn paginate<T>(&self, all: Vec<T>) -> Listed<T> {
        let total = all.len() as u64;
        let size = self.page_size.max(1) as usize;
        let first = size * (self.page.max(1) as usize - 1);
        Listed {
            items: all.into_iter().skip(first).take(size).collect(),
            total,
        }
    }

    fn matches(&self, name: &str) -> bool {
        self.search
            .as_ref()
            .is_none_or(|s| name.contains(s.as_str()))
    }
}

/// One page of a list, and the length of the whole list.
#[derive(Clone, Debug)]
pub struct Listed<T> {
    /// Entries of this page.
    pub items: Vec<T>,
    /// Number of entries on all pages.
    pub total: u64,
}

/// A repository. Fields that the store does not know are `None`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RepositoryEntry {
    /// Name within the host, or the directory of a layout.
    pub name: String,
    /// Number of images.
    pub images: Option<u64>,
    /// Number of pulls of all images.
    pub pulls: Option<u64>,
    /// Time of the last update, RFC 3339.
    pub updated: Option<String>,
}

/// An image. Fields that the store does not know are `None`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ImageEntry {
    /// Digest of the manifest.
    pub digest: Digest,
    /// Tags, sorted.
    pub tags: Vec<String>,
    /// Those of its tags that may not be moved or deleted.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub immutable: Vec<String>,
    /// Total size of manifest, config and all layers, compressed, in bytes.
    pub size: Option<u64>,
    /// Media type of the manifest.
    pub media_type: Option<String>,
    /// Architecture (`amd64`, ...); `None` for an index.
    pub architecture: Option<String>,
    /// Time of creation according to the config, RFC 3339.
    pub created: Option<String>,
    /// Time of the push, RFC 3339.
    pub pushed: Option<String>,
    /// Time of the last pull, RFC 3339.
    pub pulled: Option<String>,
    /// Labels of the config.
    pub labels: BTreeMap<String, String>,
    /// Annotations of the manifest.
    pub annotations: BTreeMap<String, String>,
    /// Labels that users have attached in Harbor.
    pub marks: Vec<String>,
    /// Kinds of the objects attached to it (signatures, SBOMs).
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

    /// Fills in the fields that come from the image config.
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

    /// Returns the time to sort by: that of the push, or else that of the creation.
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
pub enum ImageSelector {
    /// A tag, and the image if it has no other tag.
    Tag(String),
    /// An image by the digest of its manifest.
    Digest(Digest),
}

/// The result of a deletion.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Removed {
    /// Deleted tags.
    pub tags: Vec<String>,
    /// Digest of the image that the tag referred to.
    pub digest: Digest,
    /// Whether the image itself was deleted.
    pub image_deleted: bool,
    /// Tags that the image still has.
    pub kept: Vec<String>,
    /// Kinds of the accessories (signatures, SBOMs) that were deleted with the image.
    pub accessories: Vec<String>,
    /// Bytes that were freed at once; `None` if the registry frees them later, or nothing could be freed.
    pub freed: Option<u64>,
    /// What happens to the space, as a text for users.
    pub space: String,
}

impl From<crate::store::destination::Error> for Error {
    fn from(error: crate::store::destination::Error) -> Self {
        use crate::store::destination::Error as Of;
        match error {
            Of::Registry(error) => Self::Registry(error),
            Of::Harbor(error) => Self::Harbor(error),
            Of::Layout(error) => Self::Layout(error),
            Of::TagExists { tag, .. } | Of::TagMoved { tag, .. } => {
                Self::NotFound(format!("an image to take {tag} from"))
            }
            Of::FileExists { ref path } => Self::Place {
                text: path.display().to_string(),
                reason: error.to_string(),
            },
            Of::RuntimeStopped => Self::RuntimeStopped,
        }
    }
}

/// A place that holds images.
pub trait Images: Send + Sync {
    /// Returns whether `path` (within the place) is a group of repositories rather than a single one.
    fn is_group(&self, path: &str) -> bool;

    /// Lists the repositories below `path`, or all if it is empty.
    fn repositories<'a>(
        &'a self,
        path: &'a str,
        query: &'a Query,
    ) -> BoxFuture<'a, Result<Listed<RepositoryEntry>, Error>>;

    /// Lists the images of a repository.
    fn images<'a>(
        &'a self,
        repository: &'a str,
        query: &'a Query,
    ) -> BoxFuture<'a, Result<Listed<ImageEntry>, Error>>;

    /// Deletes a tag or an image. An image is deleted with its last tag; one that has other tags only if `all_tags` is
    /// set.
    fn remove<'a>(
        &'a self,
        repository: &'a str,
        which: &'a ImageSelector,
        all_tags: bool,
    ) -> BoxFuture<'a, Result<Removed, Error>>;

    /// Returns quota and usage for `path`, or `None` if there is no limit or it is not visible.
    fn quota_usage<'a>(&'a self, path: &'a str)
    -> BoxFuture<'a, Result<Option<QuotaUsage>, Error>>;
}

/// The operations of each kind of place. All implementations get the object-safe trait [`Images`], because the kind is
/// chosen at run time.
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
        which: &ImageSelector,
        all_tags: bool,
    ) -> impl Future<Output = Result<Removed, Error>> + Send;

    /// Only Harbor has quotas.
    fn quota_usage(
        &self,
        _: &str,
    ) -> impl Future<Output = Result<Option<QuotaUsage>, Error>> + Send {
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
        which: &'a ImageSelector,
        all_tags: bool,
    ) -> BoxFuture<'a, Result<Removed, Error>> {
        Box::pin(Store::remove(self, repository, which, all_tags))
    }

    fn quota_usage<'a>(
        &'a self,
        path: &'a str,
    ) -> BoxFuture<'a, Result<Option<QuotaUsage>, Error>> {
        Box::pin(Store::quota_usage(self, path))
    }
}

/// A place for images and the image within it, as written on the command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ImageLocation {
    /// `[docker://]HOST[:PORT][/PATH][:TAG][@DIGEST]`
    Registry {
        /// `HOST[:PORT]`
        host: String,
        /// Project, prefix or repository. A trailing slash marks a prefix.
        path: String,
        /// Tag or digest.
        which: Option<ImageSelector>,
    },
    /// `oci:DIRECTORY[:TAG]`
    Layout {
        /// The directory.
        dir: PathBuf,
        /// Tag or digest.
        which: Option<ImageSelector>,
    },
}

impl FromStr for ImageLocation {
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
                    (dir, Some(ImageSelector::Digest(digest)))
                }
                (None, Some(tag)) if !tag.is_empty() => {
                    (dir, Some(ImageSelector::Tag(tag.to_owned())))
                }
                (None, None) => (dir, None),
                _ => return Err(wrong("an empty tag, or a tag and a digest")),
            };
            // In `DIRECTORY@sha256:…`, the first colon is that of the digest.
            let (dir, which) = match (dir.strip_suffix("@sha256"), which) {
                (Some(dir), Some(ImageSelector::Tag(hex))) => {
                    let digest = format!("sha256:{hex}")
                        .parse()
                        .map_err(ReferenceError::from)?;
                    (dir, Some(ImageSelector::Digest(digest)))
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
            (Some(tag), None) if !group => Some(ImageSelector::Tag(check_tag(&tag)?.to_owned())),
            (None, Some(digest)) if !group => Some(ImageSelector::Digest(digest)),
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

impl ImageLocation {
    /// Returns the path within the place, and the tag or digest.
    pub(crate) fn path_and_image(&self) -> (&str, Option<&ImageSelector>) {
        match self {
            Self::Registry { path, which, .. } => (path, which.as_ref()),
            Self::Layout { which, .. } => ("", which.as_ref()),
        }
    }

    /// Determines the kind of the place and opens it.
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

/// Returns all images of a repository.
#[cfg(feature = "service")]
pub(crate) async fn all_images(
    images: &dyn Images,
    repository: &str,
) -> Result<Vec<ImageEntry>, Error> {
    let mut all = Vec::new();
    let mut query = Query {
        page_size: MAX_PAGE_SIZE,
        ..Query::default()
    };
    loop {
        let page = images.images(repository, &query).await?;
        let last = page.items.len() < MAX_PAGE_SIZE as usize;
        all.extend(page.items);
        if last {
            return Ok(all);
        }
        query.page += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places() {
        let digest = Digest::of("x");
        let registry = |host: &str, path: &str, which| ImageLocation::Registry {
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
                registry("h.example", "alice/x", Some(ImageSelector::Tag("1".into()))),
            ),
            (
                &format!("h.example/alice/x@{digest}"),
                registry("h.example", "alice/x", Some(ImageSelector::Digest(digest))),
            ),
        ] {
            assert_eq!(text.parse::<ImageLocation>().unwrap(), place, "{text}");
        }
        let layout = |which| ImageLocation::Layout {
            dir: "/srv/images".into(),
            which,
        };
        assert_eq!(
            "oci:/srv/images".parse::<ImageLocation>().unwrap(),
            layout(None)
        );
        assert_eq!(
            "oci:/srv/images:a".parse::<ImageLocation>().unwrap(),
            layout(Some(ImageSelector::Tag("a".into())))
        );
        assert_eq!(
            format!("oci:/srv/images@{digest}")
                .parse::<ImageLocation>()
                .unwrap(),
            layout(Some(ImageSelector::Digest(digest)))
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
            assert!(
                bad.parse::<ImageLocation>().is_err_and(|e| e.is_usage()),
                "{bad}"
            );
        }
    }

    #[test]
    fn pages_are_cut() {
        let query = Query {
            page: 2,
            page_size: 2,
            ..Query::default()
        };
        let cut = query.paginate(vec![1, 2, 3]);
        assert_eq!((cut.items, cut.total), (vec![3], 3));
        let beyond = Query { page: 9, ..query };
        assert!(beyond.paginate(vec![1, 2, 3]).items.is_empty());
    }
}
