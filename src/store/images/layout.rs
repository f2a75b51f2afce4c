//! Implements [`Store`] for a layout directory.

use serde_json::Value;

use super::plain::describe;
use super::{
    Error, ImageEntry, ImageSelector, Listed, Query, Removed, RepositoryEntry, Store, sort,
};
use crate::common::digest::Digest;
use crate::common::message;
use crate::store::layout::{self, Directory, Freed, Listing, Reader};

/// The images of a layout directory.
pub(crate) struct LayoutImages {
    directory: Directory,
}

impl LayoutImages {
    /// Creates the store. No file is touched before the first call.
    pub(crate) fn new(directory: Directory) -> Self {
        Self { directory }
    }

    fn display_name(&self, which: &ImageSelector) -> String {
        let dir = self.directory.path().display();
        match which {
            ImageSelector::Tag(tag) => format!("oci:{dir}:{tag}"),
            ImageSelector::Digest(digest) => format!("oci:{dir}@{digest}"),
        }
    }
}

/// Runs file operations on the runtime's blocking threads.
async fn blocking<T: Send + 'static>(
    directory: &Directory,
    work: impl FnOnce(&Directory) -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    let directory = directory.clone();
    tokio::task::spawn_blocking(move || work(&directory))
        .await
        .map_err(|_| Error::RuntimeStopped)?
}

fn read(reader: &Reader, listing: Listing) -> Result<ImageEntry, Error> {
    let mut entry = ImageEntry::new(listing.digest);
    entry.tags = listing.tags;
    let manifest = reader.manifest_of(&listing.digest, &listing.media_type)?;
    if let Some(config) = describe(&mut entry, &manifest) {
        let bytes = reader.blob(&config)?;
        entry.read_config(&serde_json::from_slice(&bytes).unwrap_or_default());
    }
    Ok(entry)
}

/// Returns a tag or the digest of an index in the layout that refers to `needed`, or `None` if there is none.
fn index_that_needs(reader: &Reader, all: &[Listing], needed: &Digest) -> Option<String> {
    let mut others = all.iter().filter(|other| other.digest != *needed);
    let found = others.find(|other| {
        let read = reader.manifest_of(&other.digest, &other.media_type);
        read.is_ok_and(|found| {
            found.is_index() && String::from_utf8_lossy(&found.bytes).contains(&needed.hex())
        })
    })?;
    let tag = found.tags.first().cloned();
    Some(tag.unwrap_or_else(|| found.digest.to_string()))
}

impl Store for LayoutImages {
    fn is_group(&self, _: &str) -> bool {
        false
    }

    async fn repositories(&self, _: &str, query: &Query) -> Result<Listed<RepositoryEntry>, Error> {
        let entry = blocking(&self.directory, |directory| {
            let images = Reader::directory(directory.path())?.list()?.len() as u64;
            Ok(RepositoryEntry {
                name: directory.path().display().to_string(),
                images: Some(images),
                pulls: None,
                updated: None,
            })
        })
        .await?;
        Ok(query.paginate(vec![entry]))
    }

    async fn images(&self, _: &str, query: &Query) -> Result<Listed<ImageEntry>, Error> {
        let asked = query.clone();
        let mut entries = blocking(&self.directory, move |directory| {
            let reader = Reader::directory(directory.path())?;
            let mut all = reader.list()?;
            all.retain(|listing| {
                asked.search.is_none() || listing.tags.iter().any(|tag| asked.matches(tag))
            });
            all.into_iter()
                .map(|listing| read(&reader, listing))
                .collect::<Result<Vec<_>, _>>()
        })
        .await?;
        sort(&mut entries, query.sort);
        Ok(query.paginate(entries))
    }

    async fn remove(
        &self,
        _: &str,
        which: &ImageSelector,
        all_tags: bool,
    ) -> Result<Removed, Error> {
        let (asked, shown) = (which.clone(), self.display_name(which));
        blocking(&self.directory, move |directory| {
            let (mut removed, freed) = directory.remove(|| {
                let reader = Reader::directory(directory.path())?;
                choose(&reader, &asked, all_tags, shown)
            })?;
            removed.freed = freed.as_ref().ok().map(|freed| freed.bytes);
            removed.space = space(freed);
            Ok(removed)
        })
        .await
    }
}

/// What is removed from the index, and the answer to the caller.
type Chosen = (Vec<(Digest, Option<String>)>, Removed);

/// Chooses the entries of the index that go with a tag or an image.
fn choose(
    reader: &Reader,
    asked: &ImageSelector,
    all_tags: bool,
    shown: String,
) -> Result<Chosen, Error> {
    let all = reader.list()?;
    let is_it = |listing: &&Listing| match asked {
        ImageSelector::Tag(tag) => listing.tags.contains(tag),
        ImageSelector::Digest(digest) => listing.digest == *digest,
    };
    let found = all
        .iter()
        .find(is_it)
        .ok_or_else(|| Error::NotFound(shown.clone()))?;
    let removed = |tags, kept| Removed {
        tags,
        digest: found.digest,
        image_deleted: false,
        kept,
        accessories: Vec::new(),
        freed: None,
        space: String::new(),
    };
    if let (ImageSelector::Tag(tag), false) = (asked, all_tags) {
        let kept: Vec<_> = found.tags.iter().filter(|t| *t != tag).cloned().collect();
        let removed = removed(vec![tag.clone()], kept);
        if !removed.kept.is_empty() {
            return Ok((vec![(found.digest, Some(tag.clone()))], removed));
        }
        return Ok(whole(reader, &all, removed));
    }
    if !found.tags.is_empty() && !all_tags {
        let tags = found.tags.clone();
        return Err(Error::Tagged { image: shown, tags });
    }
    if let Some(index) = index_that_needs(reader, &all, &found.digest) {
        return Err(Error::Needed {
            image: shown,
            index,
        });
    }
    Ok(whole(reader, &all, removed(found.tags.clone(), Vec::new())))
}

/// Chooses all entries of an image, and what is attached to it (`subject`) and has no tag of its own.
fn whole(reader: &Reader, all: &[Listing], mut removed: Removed) -> Chosen {
    let mut gone = vec![removed.digest];
    let mut at = 0;
    while let Some(subject) = gone.get(at).copied() {
        at += 1;
        for listing in all.iter().filter(|listing| listing.tags.is_empty()) {
            if gone.contains(&listing.digest) {
                continue;
            }
            if let Some(kind) = attached_kind(reader, listing, &subject) {
                removed.accessories.push(kind);
                gone.push(listing.digest);
            }
        }
    }
    removed.image_deleted = true;
    (
        gone.into_iter().map(|digest| (digest, None)).collect(),
        removed,
    )
}

/// Returns the kind of an object that is attached to an image.
fn attached_kind(reader: &Reader, listing: &Listing, subject: &Digest) -> Option<String> {
    let manifest = reader
        .manifest_of(&listing.digest, &listing.media_type)
        .ok()?;
    let manifest: Value = serde_json::from_slice(&manifest.bytes).ok()?;
    let text = |at: &str| manifest.pointer(at).and_then(Value::as_str);
    (text("/subject/digest") == Some(&subject.to_string())).then(|| {
        let kind = text("/artifactType").or_else(|| text("/config/mediaType"));
        kind.unwrap_or("unknown").to_owned()
    })
}

fn space(freed: Result<Freed, layout::Error>) -> String {
    match freed {
        Ok(Freed { blobs: 0, .. }) => "nothing is freed: other images need all of it".to_owned(),
        Ok(freed) => format!(
            "{} are free again; what other images share stays",
            message::size(freed.bytes)
        ),
        Err(error) => format!("nothing is freed: {error}"),
    }
}
