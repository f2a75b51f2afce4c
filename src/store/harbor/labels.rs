//! Harbor's labels: coloured words that its portal shows with an image and can filter by.

use serde::Deserialize;
use serde_json::json;

use super::{BASE, Error, Harbor, escaped, push, repository_path, split};
use crate::common::digest::Digest;
use crate::store::registry::Repository;

/// A label of a project.
#[derive(Deserialize)]
struct ProjectLabel {
    id: u64,
    name: String,
}

/// Puts labels of its project on an image, and creates those that the project lacks. Does nothing if the registry is
/// not a Harbor. Needs the rights `label:list`, `label:create` and `artifact-label:create`.
pub(crate) async fn add_labels(
    repository: &Repository,
    digest: &Digest,
    names: &[String],
) -> Result<(), Error> {
    let (Some((harbor, project)), Some((_, name))) =
        (push::harbor_of(repository).await?, split(repository.path()))
    else {
        return Ok(());
    };
    let Some(id) = harbor.project(project).await?.map(|found| found.project_id) else {
        let (host, project) = (harbor.host().to_owned(), project.to_owned());
        return Err(Error::NoProject { host, project });
    };
    let labels = format!(
        "{}/artifacts/{}/labels",
        repository_path(project, name),
        escaped(&digest.to_string())
    );
    for wanted in names {
        let label = json!({"id": harbor.label(id, wanted).await?});
        // A conflict means that the image has the label.
        harbor.api.post(&labels, &label, &[409]).await?;
    }
    Ok(())
}

impl Harbor {
    /// Returns the ID of a project's label, which is created if it does not exist.
    async fn label(&self, project: u64, name: &str) -> Result<Option<u64>, Error> {
        if let Some(id) = self.find_label(project, name).await? {
            return Ok(Some(id));
        }
        let label = json!({"name": name, "scope": "p", "project_id": project});
        // A conflict means that another save has created it meanwhile.
        let path = format!("{BASE}/labels");
        self.api.post(&path, &label, &[409]).await?;
        self.find_label(project, name).await
    }

    /// Returns the ID of a project's label, or `None` if there is none.
    async fn find_label(&self, project: u64, name: &str) -> Result<Option<u64>, Error> {
        let path = format!(
            "{BASE}/labels?scope=p&project_id={project}&name={}",
            escaped(name)
        );
        // The search also finds names that only contain the word.
        let found = self.page::<ProjectLabel>(&path).await?.items;
        let label = found.into_iter().find(|label| label.name == name);
        Ok(label.map(|label| label.id))
    }
}
