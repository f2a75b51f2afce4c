//! Implements [`Store`] for Harbor.

use super::{
    Error, ImageEntry, ImageSelector, Listed, Query, Removed, RepositoryEntry, Sort, Store, sort,
};
use crate::store::harbor::{self, Artifact, Harbor, MAX_PAGE_SIZE, QuotaUsage, split};
use crate::store::registry;

/// What happens to the space of deleted images; shown to users.
const SPACE_NOTE: &str = "the project's quota is freed at once, by what no other image of the project shares; the disk is \
                     freed by Harbor's next garbage collection";

/// The images of a Harbor.
pub(crate) struct HarborImages {
    harbor: Harbor,
}

impl HarborImages {
    /// Creates the store on a Harbor client.
    pub(crate) fn new(harbor: Harbor) -> Self {
        Self { harbor }
    }

    fn query(query: &Query, by: [Option<&'static str>; 3]) -> harbor::Query {
        let [updated, name, size] = by;
        harbor::Query {
            search: query.search.clone(),
            sort: match query.sort {
                Sort::Updated => updated,
                Sort::Name => name,
                Sort::Size => size,
            },
            page: query.page,
            page_size: query.page_size,
        }
    }

    fn parts<'a>(&self, repository: &'a str) -> Result<(&'a str, &'a str), Error> {
        split(repository).ok_or_else(|| Error::Place {
            text: format!("{}/{repository}", self.harbor.host()),
            reason: "a repository in Harbor is PROJECT/NAME".to_owned(),
        })
    }

    fn display_name(&self, repository: &str, which: &ImageSelector) -> String {
        let host = self.harbor.host();
        match which {
            ImageSelector::Tag(tag) => format!("{host}/{repository}:{tag}"),
            ImageSelector::Digest(digest) => format!("{host}/{repository}@{digest}"),
        }
    }

    /// Returns whether a project is missing, for which Harbor answers 403 to all but its administrators, as if a right
    /// were missing.
    async fn no_project(&self, project: &str, error: &harbor::Error) -> bool {
        let harbor::Error::Registry(registry::Error::Reply(reply)) = error else {
            return false;
        };
        matches!(reply.status, 403 | 404)
            && matches!(self.harbor.project_exists(project).await, Ok(false))
    }

    /// Returns one page of repositories. That of a missing project is empty.
    async fn page_of_repositories(
        &self,
        project: Option<&str>,
        query: &harbor::Query,
    ) -> Result<harbor::Page<harbor::Repository>, Error> {
        match (self.harbor.repositories(project, query).await, project) {
            (Err(error), Some(project)) if self.no_project(project, &error).await => {
                Ok(harbor::Page {
                    items: Vec::new(),
                    total: 0,
                })
            }
            (page, _) => Ok(page?),
        }
    }

    /// Returns one page of artifacts. That of a missing repository or project is empty.
    async fn page(
        &self,
        project: &str,
        name: &str,
        query: &harbor::Query,
    ) -> Result<harbor::Page<Artifact>, Error> {
        match self.harbor.artifacts(project, name, query).await {
            Err(error) if self.no_project(project, &error).await => Ok(harbor::Page {
                items: Vec::new(),
                total: 0,
            }),
            page => Ok(page?),
        }
    }

    /// Returns all artifacts of a repository.
    async fn all(&self, project: &str, name: &str) -> Result<Vec<Artifact>, Error> {
        let mut all = Vec::new();
        let mut part = harbor::Query {
            page: 1,
            page_size: MAX_PAGE_SIZE,
            ..harbor::Query::default()
        };
        loop {
            let page = self.page(project, name, &part).await?;
            let last = page.items.len() < MAX_PAGE_SIZE as usize;
            all.extend(page.items);
            if last {
                return Ok(all);
            }
            part.page += 1;
        }
    }

    /// Checks that an image can be deleted with its last tag, before anything is deleted: it is not part of an index,
    /// no tag is immutable, and the account has the right.
    async fn may_go(
        &self,
        repository: &str,
        which: &ImageSelector,
        found: &Artifact,
    ) -> Result<(), Error> {
        let (project, name) = self.parts(repository)?;
        self.immutable(repository, found.tags.iter().flatten())?;
        let digest = found.digest.to_string();
        for other in self.all(project, name).await? {
            let mut children = other.references.iter().flatten();
            if children.any(|child| child.child_digest == digest) {
                let index = other.tag_names().into_iter().next().map(ImageSelector::Tag);
                let index = index.unwrap_or(ImageSelector::Digest(other.digest));
                return Err(Error::Needed {
                    image: self.display_name(repository, which),
                    index: self.display_name(repository, &index),
                });
            }
        }
        if self.harbor.may_delete_artifacts(project).await? {
            return Ok(());
        }
        Err(Error::MayNotDelete(self.display_name(repository, which)))
    }

    /// Fails if one of the tags is immutable.
    fn immutable<'a>(
        &self,
        repository: &str,
        mut tags: impl Iterator<Item = &'a harbor::Tag>,
    ) -> Result<(), Error> {
        match tags.find(|tag| tag.immutable) {
            None => Ok(()),
            Some(tag) => Err(Error::Harbor(harbor::Error::Immutable {
                host: self.harbor.host().to_owned(),
                repository: repository.to_owned(),
                tag: tag.name.clone(),
            })),
        }
    }
}

fn entry(artifact: Artifact) -> ImageEntry {
    let mut entry = ImageEntry::new(artifact.digest);
    let accessories = accessories(&artifact);
    if let Some(config) = &artifact.extra_attrs {
        entry.read_config(config);
    }
    entry.tags = artifact.tag_names();
    entry.tags.sort();
    let tags = artifact.tags.iter().flatten();
    let immutable = tags.filter(|tag| tag.immutable);
    entry.immutable = immutable.map(|tag| tag.name.clone()).collect();
    entry.size = Some(artifact.size);
    entry.media_type = artifact.manifest_media_type;
    entry.pushed = artifact.push_time;
    entry.pulled = artifact.pull_time;
    entry.annotations = artifact.annotations.unwrap_or_default();
    let labels = artifact.labels.unwrap_or_default();
    entry.marks = labels.into_iter().map(|label| label.name).collect();
    entry.accessories = accessories;
    entry
}

fn repository_entry(found: harbor::Repository) -> RepositoryEntry {
    RepositoryEntry {
        name: found.name,
        images: Some(found.artifact_count),
        pulls: Some(found.pull_count),
        updated: found.update_time,
    }
}

/// Returns the kinds of the accessories of an artifact.
fn accessories(artifact: &Artifact) -> Vec<String> {
    let all = artifact.accessories.iter().flatten();
    all.map(|accessory| accessory.kind.clone()).collect()
}

impl Store for HarborImages {
    fn is_group(&self, path: &str) -> bool {
        path.ends_with('/') || !path.contains('/')
    }

    async fn repositories(
        &self,
        path: &str,
        query: &Query,
    ) -> Result<Listed<RepositoryEntry>, Error> {
        let path = path.trim_end_matches('/');
        // Harbor has no groups below a project, so the rest of the path is used as a part of repository names.
        let (project, below) = split(path).map_or((path, None), |(p, b)| (p, Some(b)));
        let by = [Some("-update_time"), Some("name"), Some("name")];
        let mut asked = Self::query(query, by);
        if asked.search.is_none() {
            asked.search = below.map(|below| format!("{project}/{below}/"));
        }
        let project = Some(project).filter(|p| !p.is_empty());
        // Harbor knows no size of a repository. Its number of images can be listed but not sorted by.
        if query.sort == Sort::Size {
            let mut all = Vec::new();
            asked.page_size = MAX_PAGE_SIZE;
            asked.page = 1;
            loop {
                let page = self.page_of_repositories(project, &asked).await?;
                let last = page.items.len() < MAX_PAGE_SIZE as usize;
                all.extend(page.items);
                if last {
                    break;
                }
                asked.page += 1;
            }
            all.sort_by(|a, b| {
                let images = b.artifact_count.cmp(&a.artifact_count);
                images.then_with(|| a.name.cmp(&b.name))
            });
            return Ok(query.paginate(all.into_iter().map(repository_entry).collect()));
        }
        let page = self.page_of_repositories(project, &asked).await?;
        Ok(Listed {
            items: page.items.into_iter().map(repository_entry).collect(),
            total: page.total,
        })
    }

    async fn images(&self, repository: &str, query: &Query) -> Result<Listed<ImageEntry>, Error> {
        let (project, name) = self.parts(repository)?;
        if query.sort != Sort::Name {
            let by = [Some("-push_time"), None, Some("-size")];
            let page = self.page(project, name, &Self::query(query, by)).await?;
            return Ok(Listed {
                items: page.items.into_iter().map(entry).collect(),
                total: page.total,
            });
        }
        // Harbor cannot sort artifacts by tag, because tags are in another database table.
        let all = self.all(project, name).await?;
        let mut all: Vec<ImageEntry> = all.into_iter().map(entry).collect();
        all.retain(|image| {
            query.search.is_none() || image.tags.iter().any(|tag| query.matches(tag))
        });
        sort(&mut all, Sort::Name);
        Ok(query.paginate(all))
    }

    async fn remove(
        &self,
        repository: &str,
        which: &ImageSelector,
        all_tags: bool,
    ) -> Result<Removed, Error> {
        let (project, name) = self.parts(repository)?;
        let reference = match which {
            ImageSelector::Tag(tag) => tag.clone(),
            ImageSelector::Digest(digest) => digest.to_string(),
        };
        let not_there = || Error::NotFound(self.display_name(repository, which));
        let found = self.harbor.artifact(project, name, &reference).await;
        let found = match found {
            Err(error) if self.no_project(project, &error).await => None,
            found => found?,
        };
        let found = found.ok_or_else(not_there)?;
        let mut tags = found.tag_names();
        tags.sort();
        let digest = found.digest;
        let removed = |tags, image_deleted, kept| Removed {
            tags,
            digest,
            image_deleted,
            kept,
            accessories: if image_deleted {
                accessories(&found)
            } else {
                Vec::new()
            },
            freed: None,
            space: SPACE_NOTE.to_owned(),
        };
        if let (ImageSelector::Tag(tag), false) = (which, all_tags) {
            let itself = found.tags.iter().flatten().filter(|t| t.name == *tag);
            self.immutable(repository, itself)?;
            if tags.len() == 1 {
                self.may_go(repository, which, &found).await?;
            }
            if !self.harbor.delete_tag(project, name, tag).await? {
                return Err(not_there());
            }
            // Read again, because another tag may have been added meanwhile and deleting the artifact would delete
            // that, too.
            let rest = self
                .harbor
                .artifact(project, name, &digest.to_string())
                .await?;
            let kept = rest.map(|rest| rest.tag_names()).unwrap_or_default();
            if kept.is_empty() {
                self.harbor.delete_artifact(project, name, &digest).await?;
            }
            return Ok(removed(vec![tag.clone()], kept.is_empty(), kept));
        }
        if !tags.is_empty() && !all_tags {
            return Err(Error::Tagged {
                image: self.display_name(repository, which),
                tags,
            });
        }
        self.may_go(repository, which, &found).await?;
        if !self.harbor.delete_artifact(project, name, &digest).await? {
            return Err(not_there());
        }
        Ok(removed(tags, true, Vec::new()))
    }

    async fn quota_usage(&self, path: &str) -> Result<Option<QuotaUsage>, Error> {
        let project = path.split('/').next().unwrap_or_default();
        if project.is_empty() {
            return Ok(None);
        }
        Ok(self
            .harbor
            .summary(project)
            .await?
            .and_then(|summary| summary.quota_usage()))
    }
}
