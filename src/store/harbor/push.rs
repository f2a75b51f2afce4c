//! Checks a Harbor project before a push, and explains why a push failed.

use super::{BASE, Error, Harbor, split};
use crate::common::digest::Digest;
use crate::store::registry::denial::Exceeded;
use crate::store::registry::{self, Denial, NewProject, Repository};

/// Storage quota and usage of a project, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct QuotaUsage {
    /// The quota. `None` means that there is no limit.
    pub limit: Option<u64>,
    /// Bytes in use, including pushed blobs that no manifest refers to.
    pub used: u64,
}

impl QuotaUsage {
    /// Returns the bytes left, or `None` if there is no limit.
    pub fn free(&self) -> Option<u64> {
        Some(self.limit?.saturating_sub(self.used))
    }
}

/// How much room a save needs, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Needed {
    /// The layers of the base and of earlier saves that have to be added.
    Base(u64),
    /// An estimate before the data is compressed.
    About(u64),
    /// The exact number.
    Exactly(u64),
}

/// Checks whether `repository` can be pushed to: its registry, and for Harbor also its project.
///
/// A missing project is created if `create_project` is given.
pub async fn check_push(
    repository: &Repository,
    create_project: Option<NewProject>,
) -> Result<(), Error> {
    let Some((harbor, project)) = harbor_of(repository).await? else {
        return Ok(repository.check_push().await?);
    };
    if let Some(new) = create_project
        && !harbor.project_exists(project).await?
    {
        let made = harbor.create_project(project, new.limit).await?;
        tracing::info!(harbor.project = project, harbor.made = made, "project");
        // Harbor ignores the limit of all but its administrators without a word.
        let seen = quota_usage(&harbor, project).await;
        if made && new.limit.is_some() && seen.is_some_and(|seen| seen.limit != new.limit) {
            tracing::warn!(
                harbor.project = project,
                "the quota of the new project is not set: Harbor lets only its administrators set it"
            );
        }
    }
    if let Err(error) = repository.check_push().await {
        return Err(explain(repository, error).await);
    }
    // The size of the image is not known yet, so only a full project is detected here.
    check_quota(repository).await
}

/// Checks whether `tag` may be written: an immutable tag that exists may not. Nothing is refused if the account may not
/// see it.
pub async fn check_tag(repository: &Repository, tag: &str) -> Result<(), Error> {
    let (Some((harbor, project)), Some((_, name))) =
        (harbor_of(repository).await?, split(repository.path()))
    else {
        return Ok(());
    };
    let found = match harbor.artifact(project, name, tag).await {
        Ok(found) => found,
        Err(error) => {
            tracing::debug!(registry.error = %error, "whether the tag is immutable is not told");
            return Ok(());
        }
    };
    let mut tags = found.iter().flat_map(|found| found.tags.iter().flatten());
    if tags.any(|found| found.name == tag && found.immutable) {
        return Err(Error::Immutable {
            host: harbor.host().to_owned(),
            repository: repository.path().to_owned(),
            tag: tag.to_owned(),
        });
    }
    Ok(())
}

/// Returns the digest of the image that has the tag. Returns `None` if there is none, or it cannot be seen.
pub async fn tagged(repository: &Repository, tag: &str) -> Option<Digest> {
    let (harbor, project) = harbor_of(repository).await.ok()??;
    let (_, name) = split(repository.path())?;
    let found = harbor.artifact(project, name, tag).await.ok()?;
    Some(found?.digest)
}

/// Deletes an image that has no tag any more, if it is no index, no index needs it, and nothing, such as a signature, is
/// attached to it.
/// Returns whether it did.
pub async fn delete_replaced(repository: &Repository, digest: &Digest) -> Result<bool, Error> {
    let (Some((harbor, project)), Some((_, name))) =
        (harbor_of(repository).await?, split(repository.path()))
    else {
        return Ok(false);
    };
    let found = harbor.artifact(project, name, &digest.to_string()).await?;
    let Some(found) = found.filter(|found| found.tag_names().is_empty()) else {
        return Ok(false);
    };
    // An index takes its untagged images along, with whatever is attached to those.
    let attached = found.accessories.iter().flatten().next().is_some();
    if attached || found.references.iter().flatten().next().is_some() {
        return Ok(false);
    }
    // Harbor refuses the deletion of what an index needs.
    match harbor.delete_artifact(project, name, digest).await {
        Err(Error::Registry(error)) if Denial::of(&error) == Some(Denial::Needed) => Ok(false),
        deleted => deleted,
    }
}

/// Checks whether anything fits into the project, if it is Harbor's and its quota is visible.
async fn check_quota(repository: &Repository) -> Result<(), Error> {
    let Some((harbor, project)) = harbor_of(repository).await? else {
        return Ok(());
    };
    let usage = quota_usage(&harbor, project).await;
    match usage.and_then(|usage| usage.free()) {
        Some(0) => Err(Error::Quota {
            host: harbor.host().to_owned(),
            project: project.to_owned(),
            usage,
            needed: None,
        }),
        _ => Ok(()),
    }
}

/// Returns the cause of a failed request, as the reply and Harbor's API tell it. Returns the error unchanged if they
/// tell no more.
pub async fn explain(repository: &Repository, error: registry::Error) -> Error {
    let (status, tag) = match &error {
        registry::Error::Reply(reply) => (reply.status, reply.tag.clone()),
        _ => return error.into(),
    };
    let host = || repository.host().to_owned();
    let path = || repository.path().to_owned();
    match Denial::of(&error) {
        Some(Denial::Quota(told)) => return over_quota(repository, told).await,
        Some(Denial::ReadOnly) => return Error::ReadOnly { host: host() },
        Some(Denial::Immutable) => {
            return Error::Immutable {
                host: host(),
                repository: path(),
                tag: tag.unwrap_or_default(),
            };
        }
        Some(Denial::NotSigned) => {
            return Error::NotSigned {
                host: host(),
                repository: path(),
            };
        }
        Some(Denial::ProxyCache | Denial::Policy | Denial::Needed) | None => {}
    }
    if !matches!(status, 401 | 403 | 404 | 405) {
        return error.into();
    }
    match harbor_of(repository).await {
        Ok(Some((harbor, project))) => refused(&harbor, project, status, error).await,
        _ => error.into(),
    }
}

/// Finds out whether the account, the project or a right is missing.
async fn refused(harbor: &Harbor, project: &str, status: u16, error: registry::Error) -> Error {
    let (host, project) = (harbor.host().to_owned(), project.to_owned());
    if status == 401
        && let (Ok(false), Some(user)) = (harbor.accepts_account().await, harbor.user())
    {
        return Error::Account { host, user };
    }
    if status != 403 && matches!(harbor.project_exists(&project).await, Ok(false)) {
        return Error::NoProject { host, project };
    }
    match harbor.project(&project).await {
        Ok(Some(found)) if found.is_proxy_cache() => Error::ProxyCache { host, project },
        _ => error.into(),
    }
}

/// Returns the error for an exceeded quota, with the exact sizes if Harbor's API shows them, or else those of the reply.
async fn over_quota(repository: &Repository, told: Option<Exceeded>) -> Error {
    let mut exact = None;
    if let Ok(Some((harbor, project))) = harbor_of(repository).await {
        exact = quota_usage(&harbor, project).await;
    }
    let rounded = told.map(|told| QuotaUsage {
        limit: Some(told.limit),
        used: told.used,
    });
    let project = split(repository.path()).map_or(repository.path(), |(project, _)| project);
    let adding = told.map(|told| told.adding).filter(|&adding| adding > 0);
    Error::Quota {
        host: repository.host().to_owned(),
        project: project.to_owned(),
        usage: exact.filter(|usage| usage.limit.is_some()).or(rounded),
        needed: adding.map(Needed::About),
    }
}

/// Returns the Harbor that a repository is on, with its project, or `None` if it is not on a Harbor.
pub(super) async fn harbor_of(repository: &Repository) -> Result<Option<(Harbor, &str)>, Error> {
    let Some((project, _)) = split(repository.path()) else {
        return Ok(None);
    };
    let harbor = Harbor::detect(repository.api()).await?;
    Ok(harbor.map(|harbor| (harbor, project)))
}

/// Returns quota and usage, or `None` if they cannot be read, which is not a reason to refuse a save.
pub(super) async fn quota_usage(harbor: &Harbor, project: &str) -> Option<QuotaUsage> {
    match harbor.summary(project).await {
        Ok(summary) => summary?.quota_usage(),
        Err(error) => {
            tracing::debug!(registry.error = %error, "{BASE}: the project's quota is not told");
            None
        }
    }
}
