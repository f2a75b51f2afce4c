//! Checks a Harbor project before a push, and explains why a push failed: a plain 403 has four possible meanings.

use super::{BASE, Error, Harbor, split};
use crate::store::registry::{self, Repository};

/// Storage quota and usage of a project, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct QuotaUsage {
    /// The quota.
    pub limit: u64,
    /// Bytes in use, including pushed blobs that no manifest refers to.
    pub used: u64,
}

impl QuotaUsage {
    /// Returns the bytes left.
    pub fn free(&self) -> u64 {
        self.limit.saturating_sub(self.used)
    }
}

/// Checks whether `repository` can be pushed to: its registry, and for Harbor also its project.
///
/// A missing project is created if `create_project` is set.
pub async fn check_push(repository: &Repository, create_project: bool) -> Result<(), Error> {
    let Some((harbor, project)) = harbor_of(repository).await? else {
        return Ok(repository.check_push().await?);
    };
    if create_project && !harbor.project_exists(project).await? {
        let made = harbor.create_project(project).await?;
        tracing::info!(harbor.project = project, harbor.made = made, "project");
    }
    if let Err(error) = repository.check_push().await {
        return Err(explain(repository, error).await);
    }
    // The size of the image is not known yet, so only a full project is detected here.
    check_quota(repository, 0).await
}

/// Checks whether `needed` more bytes fit into the project, if it is Harbor's and its quota is visible.
pub async fn check_quota(repository: &Repository, needed: u64) -> Result<(), Error> {
    let Some((harbor, project)) = harbor_of(repository).await? else {
        return Ok(());
    };
    match quota_usage(&harbor, project).await {
        Some(room) if room.free() == 0 || room.free() < needed => Err(Error::Quota {
            host: harbor.host().to_owned(),
            project: project.to_owned(),
            usage: room,
            needed,
        }),
        _ => Ok(()),
    }
}

/// Adds the details that Harbor's API has about a failed request. Returns the error unchanged if there are none.
pub async fn explain(repository: &Repository, error: registry::Error) -> Error {
    let status = match &error {
        registry::Error::Reply(reply) => reply.status,
        _ => 0,
    };
    if !matches!(status, 401 | 403 | 404 | 405) {
        return error.into();
    }
    let Ok(Some((harbor, project))) = harbor_of(repository).await else {
        return error.into();
    };
    let named = (harbor.host().to_owned(), project.to_owned());
    if status != 403 {
        let (host, project) = named;
        return match harbor.project_exists(&project).await {
            Ok(false) => Error::NoProject { host, project },
            _ => error.into(),
        };
    }
    if let Ok(Some(found)) = harbor.project(project).await
        && found.is_proxy_cache()
    {
        let (host, project) = named;
        return Error::ProxyCache { host, project };
    }
    match quota_usage(&harbor, project).await {
        Some(room) => Error::PushOverQuota {
            source: error,
            usage: room,
        },
        None => error.into(),
    }
}

/// Returns the Harbor that a repository is on, with its project, or `None` if it is not on a Harbor.
async fn harbor_of(repository: &Repository) -> Result<Option<(Harbor, &str)>, Error> {
    let Some((project, _)) = split(repository.path()) else {
        return Ok(None);
    };
    let harbor = Harbor::detect(repository.api()).await?;
    Ok(harbor.map(|harbor| (harbor, project)))
}

/// Returns quota and usage, or `None` if there is no limit or it cannot be read, which is not a reason to refuse a
/// save.
async fn quota_usage(harbor: &Harbor, project: &str) -> Option<QuotaUsage> {
    match harbor.summary(project).await {
        Ok(summary) => summary?.quota_usage(),
        Err(error) => {
            tracing::debug!(registry.error = %error, "{BASE}: the project's quota is not told");
            None
        }
    }
}
