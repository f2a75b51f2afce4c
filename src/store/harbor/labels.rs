//! Harbor's labels: coloured words that its portal shows with an image and can filter by.

use serde::Deserialize;
use serde_json::json;

use super::{BASE, Error, Harbor, MAX_PAGE_SIZE, escaped, push, repository_path, split};
use crate::common::digest::Digest;
use crate::store::registry::Repository;

/// Maximum number of pages of labels that contain a word. A project with more has them from a program that went wrong.
const MAX_PAGES: u32 = 50;

/// A label of a project.
#[derive(Deserialize)]
struct ProjectLabel {
    id: u64,
    name: String,
}

/// Puts labels of its project on an image, and creates those that the project lacks. All are tried; fails with the
/// error of the first that is not there. Does nothing if the registry is not a Harbor. Needs the rights `label:list`, `label:create` and `artifact-label:create`.
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
    let mut failed = None;
    for wanted in names {
        if let Err(error) = harbor.put_label(id, wanted, &labels).await {
            // The others are tried all the same.
            failed.get_or_insert(error);
        }
    }
    failed.map_or(Ok(()), Err)
}

impl Harbor {
    /// Puts a label of a project on the image whose labels are at the path `labels`.
    async fn put_label(&self, project: u64, name: &str, labels: &str) -> Result<(), Error> {
        let label = json!({"id": self.label(project, name).await?});
        // A conflict means that the image has the label.
        self.api.post(labels, &label, &[409]).await?;
        Ok(())
    }

    /// Returns the ID of a project's label, which is created if it does not exist.
    async fn label(&self, project: u64, name: &str) -> Result<u64, Error> {
        if let Some(id) = self.find_label(project, name).await? {
            return Ok(id);
        }
        let label = json!({"name": name, "scope": "p", "project_id": project});
        // A conflict means that another save has created it meanwhile.
        let path = format!("{BASE}/labels");
        self.api.post(&path, &label, &[409]).await?;
        let found = self.find_label(project, name).await?;
        found.ok_or_else(|| Error::NoLabel {
            host: self.host().to_owned(),
            label: name.to_owned(),
        })
    }

    /// Returns the ID of a project's label, or `None` if there is none.
    async fn find_label(&self, project: u64, name: &str) -> Result<Option<u64>, Error> {
        for page in 1..=MAX_PAGES {
            let path = format!(
                "{BASE}/labels?scope=p&project_id={project}&name={}&page={page}&page_size={MAX_PAGE_SIZE}",
                escaped(name)
            );
            // The search also finds names that only contain the word.
            let found = self.page::<ProjectLabel>(&path).await?.items;
            if let Some(label) = found.iter().find(|label| label.name == name) {
                return Ok(Some(label.id));
            }
            if found.len() < MAX_PAGE_SIZE as usize {
                break;
            }
        }
        Ok(None)
    }
}
