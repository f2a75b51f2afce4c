//! What Harbor can say about a push before it begins, and about why it failed: a bare 403 has four meanings.

use super::{BASE, Error, Harbor, split};
use crate::store::registry::{self, Repository};

/// A project's storage, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Room {
    /// What it may hold.
    pub limit: u64,
    /// What it holds. Blobs that were pushed and are in no manifest count.
    pub used: u64,
}

impl Room {
    /// What is left.
    pub fn free(&self) -> u64 {
        self.limit.saturating_sub(self.used)
    }
}

/// Whether one can push into `repository`: the registry is asked, and where it is Harbor, its project, too.
///
/// A project that is not there is made when `create_project` says so.
pub async fn check_push(repository: &Repository, create_project: bool) -> Result<(), Error> {
    let Some((harbor, project)) = of(repository).await? else {
        return Ok(repository.check_push().await?);
    };
    if create_project && !harbor.project_exists(project).await? {
        let made = harbor.create_project(project).await?;
        tracing::info!(harbor.project = project, harbor.made = made, "project");
    }
    if let Err(error) = repository.check_push().await {
        return Err(explain(repository, error).await);
    }
    // Full is full, whatever comes; how much will come is not known yet.
    check_room(repository, 0).await
}

/// Whether `needed` bytes more fit into the project, where it is Harbor's and tells.
pub async fn check_room(repository: &Repository, needed: u64) -> Result<(), Error> {
    let Some((harbor, project)) = of(repository).await? else {
        return Ok(());
    };
    match room(&harbor, project).await {
        Some(room) if room.free() == 0 || room.free() < needed => Err(Error::Quota {
            host: harbor.host().to_owned(),
            project: project.to_owned(),
            room,
            needed,
        }),
        _ => Ok(()),
    }
}

/// Says what an answer of Harbor's means, where Harbor itself can be asked for it. What it cannot add to, it leaves.
pub async fn explain(repository: &Repository, error: registry::Error) -> Error {
    let status = match &error {
        registry::Error::Reply(reply) => reply.status,
        _ => 0,
    };
    if !matches!(status, 401 | 403 | 404 | 405) {
        return error.into();
    }
    let Ok(Some((harbor, project))) = of(repository).await else {
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
    match room(&harbor, project).await {
        Some(room) => Error::NoRoom {
            source: error,
            room,
        },
        None => error.into(),
    }
}

/// The Harbor that a repository is on, and its project there.
async fn of(repository: &Repository) -> Result<Option<(Harbor, &str)>, Error> {
    let Some((project, _)) = split(repository.path()) else {
        return Ok(None);
    };
    let harbor = Harbor::behind(repository.api()).await?;
    Ok(harbor.map(|harbor| (harbor, project)))
}

/// None where there is no limit, or nobody says. Not being told is no reason not to save.
async fn room(harbor: &Harbor, project: &str) -> Option<Room> {
    match harbor.summary(project).await {
        Ok(summary) => summary?.room(),
        Err(error) => {
            tracing::debug!(registry.error = %error, "{BASE}: the project's quota is not told");
            None
        }
    }
}
