//! Writes a manifest under a tag only if the tag names no image that has to stay.

use bytes::Bytes;

use super::{Destination, Error, Kind, blocking};
use crate::common::digest::Digest;
use crate::store::layout::Reader;

/// Annotation of a manifest with the save that made it, by which another attempt of that save recognizes the image.
pub(crate) const SAVE_ANNOTATION: &str = "upperdeck.save";

/// The only image that a save may take its tag from. A tag that names no image may always be written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Replaceable {
    /// Digest of the image; `None`: the tag must not exist.
    pub digest: Option<Digest>,
    /// Value of [`SAVE_ANNOTATION`] of images that an earlier attempt of the same save made.
    pub save: Option<String>,
}

impl Replaceable {
    /// Returns whether the tag may be moved from `found` to `new`. `manifest` reads the manifest of `found`.
    fn allows(
        &self,
        found: Digest,
        new: Option<Digest>,
        manifest: impl FnOnce() -> Option<Bytes>,
    ) -> bool {
        Some(found) == self.digest || Some(found) == new || self.is_own(manifest)
    }

    fn is_own(&self, manifest: impl FnOnce() -> Option<Bytes>) -> bool {
        let Some(save) = &self.save else { return false };
        let read = || serde_json::from_slice::<serde_json::Value>(&manifest()?).ok();
        read().is_some_and(|found| found["annotations"][SAVE_ANNOTATION].as_str() == Some(save))
    }
}

impl Destination {
    /// Returns whether this is an archive, which is replaced as a whole.
    pub(crate) fn is_archive(&self) -> bool {
        matches!(self.0, Kind::Archive(_))
    }

    /// Returns the digest of the image that a tag names now, if there is one; of an archive, that of its only image.
    ///
    /// Fails with [`Error::FileExists`] if an archive's file is there and is anything else.
    pub async fn digest_of(&self, tag: &str) -> Result<Option<Digest>, Error> {
        match &self.0 {
            Kind::Registry { repository, .. } => match repository.head_manifest(tag).await {
                Ok(found) => Ok(found.map(|found| found.digest)),
                Err(error) if error.not_found() => Ok(None),
                Err(error) => Err(error.into()),
            },
            Kind::Directory(directory) => {
                let tag = tag.to_owned();
                blocking(directory.clone(), move |d| d.digest_of(&tag)).await
            }
            // An archive is replaced as a whole, whatever tag its image has.
            Kind::Archive(archive) => {
                let path = archive.path().to_owned();
                let found = blocking(archive.clone(), |archive| {
                    let existing = archive.existing()?;
                    existing.map(|reader| reader.list()).transpose()
                });
                match found.await {
                    Ok(None) => Ok(None),
                    Ok(Some(images)) if images.len() == 1 => Ok(Some(images[0].digest)),
                    Err(error) if error.not_permitted() || error.retryable() => Err(error),
                    Ok(Some(_)) | Err(_) => Err(Error::FileExists { path }),
                }
            }
        }
    }

    /// Checks whether the tag may be taken from the image that it names now.
    ///
    /// Fails with [`Error::TagExists`] if it may not.
    pub async fn check_replaceable(&self, tag: &str, rule: &Replaceable) -> Result<(), Error> {
        let Some(found) = self.digest_of(tag).await? else {
            return Ok(());
        };
        self.check_found(tag, rule, found, None).await
    }

    /// Checks whether the tag may be taken from the image `found`. `new` is the image that is about to get it.
    ///
    /// Fails with [`Error::TagExists`] if it may not.
    pub(crate) async fn check_found(
        &self,
        tag: &str,
        rule: &Replaceable,
        found: Digest,
        new: Option<Digest>,
    ) -> Result<(), Error> {
        let manifest = match &self.0 {
            Kind::Registry { repository, .. } if rule.save.is_some() => {
                let read = repository.manifest(&found.to_string()).await;
                read.ok().map(|manifest| manifest.bytes)
            }
            Kind::Directory(directory) if rule.save.is_some() => {
                blocking(directory.clone(), move |d| Ok(d.small_blob(&found))).await?
            }
            Kind::Archive(archive) if rule.save.is_some() => {
                let read = blocking(archive.clone(), move |archive| {
                    let existing = archive.existing()?;
                    existing.map(|reader| reader.blob(&found)).transpose()
                });
                read.await.ok().flatten()
            }
            _ => None,
        };
        if rule.allows(found, new, || manifest) {
            return Ok(());
        }
        Err(Error::TagExists {
            tag: tag.to_owned(),
            digest: found,
        })
    }

    /// Adds a tag to an image that is here, if `rule` allows to take it from the image that has it.
    ///
    /// Fails with [`Error::TagExists`] if it does not.
    pub async fn add_tag(
        &self,
        digest: &Digest,
        tag: &str,
        rule: &Replaceable,
    ) -> Result<(), Error> {
        let (bytes, media_type) = match &self.0 {
            Kind::Registry { repository, .. } => {
                let found = repository.manifest(&digest.to_string()).await?;
                (found.bytes, found.media_type)
            }
            Kind::Directory(directory) => {
                let digest = *digest;
                let read = blocking(directory.clone(), move |d| {
                    let reader = Reader::directory(d.path())?;
                    let found = reader.list()?.into_iter().find(|one| one.digest == digest);
                    let media_type = found.map(|found| found.media_type).unwrap_or_default();
                    reader.manifest_of(&digest, &media_type)
                });
                let found = read.await?;
                (found.bytes, found.media_type)
            }
            // An archive has one image, and is written as a whole.
            Kind::Archive(_) => {
                return Err(Error::TagExists {
                    tag: tag.to_owned(),
                    digest: *digest,
                });
            }
        };
        self.put_manifest_replacing(bytes, &media_type, tag, rule)
            .await?;
        Ok(())
    }

    /// Like [`Destination::put_manifest`], but only if the tag names no image or one that `rule` allows to replace. A
    /// layout is locked meanwhile. The distribution API has no conditional write, so a registry is asked immediately
    /// before.
    ///
    /// Fails with [`Error::TagExists`] if the tag names another image.
    pub async fn put_manifest_replacing(
        &self,
        bytes: Bytes,
        media_type: &str,
        tag: &str,
        rule: &Replaceable,
    ) -> Result<Digest, Error> {
        let Kind::Directory(directory) = &self.0 else {
            if let Some(found) = self.digest_of(tag).await? {
                let new = Some(Digest::of(&bytes));
                self.check_found(tag, rule, found, new).await?;
            }
            return self.put_manifest(bytes, media_type, tag).await;
        };
        let (media_type, name, rule) = (media_type.to_owned(), tag.to_owned(), rule.clone());
        let put = blocking(directory.clone(), move |d| {
            let new = Some(Digest::of(&bytes));
            let may = |found: Digest| rule.allows(found, new, || d.small_blob(&found));
            d.put_manifest_if(&bytes, &media_type, &name, may)
        });
        put.await?.map_err(|digest| Error::TagExists {
            tag: tag.to_owned(),
            digest,
        })
    }
}
