//! Implements [`Store`] for Harbor.

use super::{
    Error, ImageEntry, ImageSelector, Listed, Query, Removed, RepositoryEntry, Sort, Store, sort,
};
use crate::store::harbor::{self, Artifact, Harbor, MAX_PAGE_SIZE, QuotaUsage, split};

/// What happens to the space of deleted images; shown to users.
const SPACE_NOTE: &str = "the quota is relieved at once of what no other image of the project shares; the space on disk \
                     comes back with Harbor's next garbage collection, until when blobs pushed and in no image count too";

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

    /// Fails if the repository does not exist, for which Harbor would return an empty list.
    async fn must_exist(&self, repository: &str) -> Result<(), Error> {
        let (project, name) = self.parts(repository)?;
        let there = self.harbor.project_exists(project).await?
            && self.harbor.repository_exists(project, name).await?;
        if there {
            return Ok(());
        }
        Err(Error::NotFound(format!(
            "{}/{repository}",
            self.harbor.host()
        )))
    }
}

fn entry(artifact: Artifact) -> ImageEntry {
    let mut entry = ImageEntry::new(artifact.digest);
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
    let accessories = artifact.accessories.unwrap_or_default();
    entry.accessories = accessories.into_iter().map(|a| a.kind).collect();
    entry
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
        let by = [Some("-update_time"), Some("name"), Some("-pull_count")];
        let mut asked = Self::query(query, by);
        if asked.search.is_none() {
            asked.search = below.map(|below| format!("{project}/{below}/"));
        }
        let project = Some(project).filter(|p| !p.is_empty());
        let page = match self.harbor.repositories(project, &asked).await {
            Err(harbor::Error::Registry(error)) if error.not_found() => {
                return Err(Error::NotFound(format!("{}/{path}", self.harbor.host())));
            }
            page => page?,
        };
        let items = page.items.into_iter().map(|found| RepositoryEntry {
            name: found.name,
            images: Some(found.artifact_count),
            pulls: Some(found.pull_count),
            updated: found.update_time,
        });
        Ok(Listed {
            items: items.collect(),
            total: page.total,
        })
    }

    async fn images(&self, repository: &str, query: &Query) -> Result<Listed<ImageEntry>, Error> {
        let (project, name) = self.parts(repository)?;
        if query.sort != Sort::Name {
            let by = [Some("-push_time"), None, Some("-size")];
            let page = self
                .harbor
                .artifacts(project, name, &Self::query(query, by))
                .await?;
            if page.total == 0 {
                self.must_exist(repository).await?;
            }
            return Ok(Listed {
                items: page.items.into_iter().map(entry).collect(),
                total: page.total,
            });
        }
        // Harbor cannot sort artifacts by tag, because tags are in another database table.
        let mut all = Vec::new();
        let mut part = harbor::Query {
            page: 1,
            page_size: MAX_PAGE_SIZE,
            ..Self::query(query, [None; 3])
        };
        loop {
            let page = self.harbor.artifacts(project, name, &part).await?;
            let last = page.items.len() < MAX_PAGE_SIZE as usize;
            all.extend(page.items.into_iter().map(entry));
            if last {
                break;
            }
            part.page += 1;
        }
        if all.is_empty() {
            self.must_exist(repository).await?;
        }
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
        let found = self.harbor.artifact(project, name, &reference).await?;
        let found = found.ok_or_else(not_there)?;
        let mut tags = found.tag_names();
        tags.sort();
        let digest = found.digest;
        let removed = |tags, image_deleted, kept| Removed {
            tags,
            digest,
            image_deleted,
            kept,
            space: SPACE_NOTE,
        };
        if let (ImageSelector::Tag(tag), false) = (which, all_tags) {
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
