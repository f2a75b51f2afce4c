//! What Harbor alone can do with an image besides keeping it.

use super::{Destination, Error, Kind};
use crate::common::digest::Digest;
use crate::store::harbor;

impl Destination {
    /// Returns the digest of the image that has the tag now. Returns `None` if there is none, or the registry is not a
    /// Harbor.
    pub async fn tagged(&self, tag: &str) -> Option<Digest> {
        match &self.0 {
            Kind::Registry { repository, .. } => harbor::tagged(repository, tag).await,
            Kind::Directory(_) | Kind::Archive(_) => None,
        }
    }

    /// Deletes an image that its last tag has moved away from, if nothing else needs it. Returns whether it did.
    pub async fn delete_replaced(&self, digest: &Digest) -> Result<bool, Error> {
        match &self.0 {
            Kind::Registry { repository, .. } => {
                Ok(harbor::delete_replaced(repository, digest).await?)
            }
            Kind::Directory(_) | Kind::Archive(_) => Ok(false),
        }
    }

    /// Puts labels of Harbor on an image, if the registry is a Harbor.
    pub async fn add_labels(&self, digest: &Digest, names: &[String]) -> Result<(), Error> {
        match &self.0 {
            Kind::Registry { repository, .. } => {
                Ok(harbor::add_labels(repository, digest, names).await?)
            }
            Kind::Directory(_) | Kind::Archive(_) => Ok(()),
        }
    }
}
