//! LIST: the images of users, from the registry and from the record.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Json;
use axum::extract::State as Extracted;
use futures_util::{StreamExt as _, TryStreamExt as _};
use oci_client::annotations::ORG_OPENCONTAINERS_IMAGE_BASE_NAME;
use serde::Deserialize;
use tokio::sync::Mutex;
use utoipa::{IntoParams, ToSchema};

use super::App;
use super::api::{ImageTag, ImageView, Images as Shown, Quota};
use super::auth::Caller;
use super::extract::QueryParams;
use super::notes::annotate;
use super::packages::{retain_with, saves_with};
use super::paging::{LIMIT, Listed, cut, limit};
use super::refusal::Refusal;
use super::target::Template;
use super::time::rfc3339;
use crate::common::digest::{Digest, DigestError};
use crate::service::job::Category;
use crate::service::record::Save;
use crate::store::harbor::{Harbor, QuotaUsage, rights};
use crate::store::images::{
    self, ImageEntry, ImageSelector, Images, LayoutImages, MAX_PAGE_SIZE, Query, Sort, all_images,
};
use crate::store::layout::Directory;
use crate::store::registry::{Access, Registries};

/// How long a registry client is used, with its connections, tokens and retry budget.
const CLIENT_TTL: Duration = Duration::from_secs(600);
/// Maximum age of a cached list, so that turning pages does not query the registry again.
const LIST_TTL: Duration = Duration::from_secs(5);
/// The part of a quota that autosaves leave to saves by hand: one of so many.
const RESERVE: u64 = 10;
const QUOTA_TTL: Duration = Duration::from_secs(15);
/// Time limit of a quota query. A slower registry must not delay the acceptance of a save.
const QUOTA_TIMEOUT: Duration = Duration::from_secs(3);
/// Time limit for listing images.
const LIST_TIMEOUT: Duration = Duration::from_secs(30);
const MAX_LISTS: usize = 1000;
/// Number of repositories that are read in parallel.
const CONCURRENCY: usize = 4;
/// Maximum number of repositories that are listed; no user has as many.
const MAX_REPOSITORIES: usize = 2000;
const MAX_SEARCH: usize = 100;

type Lists = HashMap<Option<String>, (Instant, Arc<Vec<ListedImage>>)>;

/// The place that images are saved to.
pub(super) struct ImageStore {
    template: Template,
    pub(super) access: Access,
    opened: Mutex<Option<(Instant, Arc<dyn Images>)>>,
    lists: Mutex<Lists>,
    rooms: Mutex<HashMap<String, (Instant, Option<QuotaUsage>)>>,
}

/// A listed image.
struct ListedImage {
    user: String,
    name: String,
    repository: String,
    pulls: Option<u64>,
    entry: ImageEntry,
}

impl ImageStore {
    pub(super) fn new(template: Template, access: Access) -> Self {
        Self {
            template,
            access,
            opened: Mutex::default(),
            lists: Mutex::default(),
            rooms: Mutex::default(),
        }
    }

    async fn registry(&self) -> Result<Arc<dyn Images>, images::Error> {
        let mut opened = self.opened.lock().await;
        if let Some((at, images)) = &*opened
            && at.elapsed() < CLIENT_TTL
        {
            return Ok(images.clone());
        }
        let registries = Registries::new(self.access.clone());
        let place = self.template.place(None);
        let images: Arc<dyn Images> = place.open(&registries).await?.into();
        *opened = Some((Instant::now(), images.clone()));
        Ok(images)
    }

    /// Logs which calls will fail because the account lacks a right. Only a template with a fixed project can be checked
    /// before a user saves.
    pub(super) async fn tell_missing_rights(&self) {
        let (Some(host), Some(project)) = (self.template.host(), self.template.project()) else {
            return;
        };
        let registries = Registries::new(self.access.clone());
        let path = format!("{project}/x");
        let asked = async {
            match Harbor::find(&registries, host, &path).await? {
                Some(harbor) => harbor.missing_rights(project).await,
                None => Ok(Vec::new()),
            }
        };
        match tokio::time::timeout(LIST_TIMEOUT, asked).await {
            Ok(Ok(missing)) if missing.is_empty() => {}
            Ok(Ok(missing)) => tracing::warn!(
                registry.missing = rights::describe(&missing),
                "the account of the registry lacks rights: calls will fail"
            ),
            Ok(Err(error)) => {
                tracing::warn!(error = %error, "the rights of the registry's account cannot be checked");
            }
            Err(_) => tracing::warn!("the registry takes too long to check the account's rights"),
        }
    }

    /// Drops the client, because a failure may have used up its retry budget.
    async fn forget_registry(&self) {
        *self.opened.lock().await = None;
    }

    async fn list(&self, user: Option<&str>) -> Result<Arc<Vec<ListedImage>>, Refusal> {
        let key = user.map(str::to_owned);
        if let Some((at, found)) = self.lists.lock().await.get(&key)
            && at.elapsed() < LIST_TTL
        {
            return Ok(found.clone());
        }
        let reading = async {
            if self.template.is_layout() {
                self.list_layouts(user).await
            } else {
                self.list_registry(user).await
            }
        };
        let found = match tokio::time::timeout(LIST_TIMEOUT, reading).await {
            Ok(Ok(found)) => Arc::new(found),
            Ok(Err(error)) => {
                self.forget_registry().await;
                return Err(error.into());
            }
            Err(_) => {
                self.forget_registry().await;
                return Err(Refusal::unavailable(
                    "the registry takes too long to list its images",
                ));
            }
        };
        let mut lists = self.lists.lock().await;
        if lists.len() >= MAX_LISTS {
            lists.clear();
        }
        lists.insert(key, (Instant::now(), found.clone()));
        Ok(found)
    }

    async fn list_layouts(&self, user: Option<&str>) -> Result<Vec<ListedImage>, images::Error> {
        let (template, user) = (self.template.clone(), user.map(str::to_owned));
        let layouts = tokio::task::spawn_blocking(move || template.layouts(user.as_deref()))
            .await
            .map_err(|_| images::Error::RuntimeStopped)?
            .map_err(|error| images::Error::Place {
                text: self.template.to_string(),
                reason: error.to_string(),
            })?;
        let (mut found, mut failed) = (Vec::new(), None);
        for (dir, user, name) in layouts {
            let read = all_images(&LayoutImages::new(Directory::new(&dir)), "").await;
            let entries = match read {
                Ok(entries) => entries,
                // One damaged layout does not hide the images of the others.
                Err(error) => {
                    tracing::warn!(layout = %dir.display(), %error, "the images of a layout cannot be listed");
                    failed.get_or_insert(error);
                    continue;
                }
            };
            let repository = format!("oci:{}", dir.display());
            found.extend(entries.into_iter().map(|entry| ListedImage {
                user: user.clone(),
                name: name.clone(),
                repository: repository.clone(),
                pulls: None,
                entry,
            }));
        }
        match failed {
            Some(error) if found.is_empty() => Err(error),
            _ => Ok(found),
        }
    }

    async fn list_registry(&self, user: Option<&str>) -> Result<Vec<ListedImage>, images::Error> {
        let images = self.registry().await?;
        let Ok(prefix) = self.template.prefix(user) else {
            return Ok(Vec::new());
        };
        let mut repositories = Vec::new();
        let mut query = Query {
            sort: Sort::Name,
            page_size: MAX_PAGE_SIZE,
            ..Query::default()
        };
        loop {
            let page = match images.repositories(&prefix, &query).await {
                Ok(page) => page,
                // The project does not exist until its user saves the first image.
                Err(images::Error::NotFound(_)) => break,
                Err(error) => return Err(error),
            };
            let read = page.items.len();
            repositories.extend(page.items.into_iter().filter_map(|entry| {
                let (of, name) = self.template.parse_path(&entry.name)?;
                (user.is_none() || user == Some(of.as_str())).then_some((of, name, entry))
            }));
            if read < MAX_PAGE_SIZE as usize || repositories.len() >= MAX_REPOSITORIES {
                break;
            }
            query.page += 1;
        }
        let host = self.template.host().unwrap_or_default();
        let reading = repositories.into_iter().map(|(user, name, repository)| {
            let images = images.clone();
            async move {
                let entries = match all_images(&*images, &repository.name).await {
                    Ok(entries) => entries,
                    // The repository was deleted after the listing.
                    Err(images::Error::NotFound(_)) => Vec::new(),
                    Err(error) => return Err(error),
                };
                let found = entries.into_iter().map(|entry| ListedImage {
                    user: user.clone(),
                    name: name.clone(),
                    repository: format!("{host}/{}", repository.name),
                    pulls: repository.pulls,
                    entry,
                });
                Ok(found.collect::<Vec<_>>())
            }
        });
        let found: Vec<Vec<ListedImage>> = futures_util::stream::iter(reading.collect::<Vec<_>>())
            .buffered(CONCURRENCY)
            .try_collect()
            .await?;
        Ok(found.into_iter().flatten().collect())
    }

    /// Drops the cached data of a user whose images may have changed.
    pub(super) async fn forget(&self, user: &str) {
        let mut lists = self.lists.lock().await;
        lists.remove(&Some(user.to_owned()));
        lists.remove(&None);
        drop(lists);
        self.rooms.lock().await.clear();
    }

    pub(super) async fn remove(
        &self,
        user: &str,
        name: &str,
        which: &ImageSelector,
    ) -> Result<images::Removed, Refusal> {
        let path = self.template.path(user, name)?;
        let removed = if self.template.is_layout() {
            let dir = PathBuf::from(format!("/{path}"));
            if !dir.join("index.json").exists() {
                return Err(Refusal::not_found(format!("{name} is not there")));
            }
            let images = LayoutImages::new(Directory::new(dir));
            images.remove("", which, false).await
        } else {
            match self.registry().await {
                Ok(images) => images.remove(&path, which, false).await,
                Err(error) => Err(error),
            }
        };
        if removed.as_ref().is_err_and(images::Error::retryable) {
            self.forget_registry().await;
        }
        Ok(removed?)
    }

    /// Returns the scope of a user's quota and the quota, if there is one.
    async fn quota_usage(&self, user: &str) -> Result<(String, Option<QuotaUsage>), Refusal> {
        let path = self.template.path(user, "x")?;
        let scope = match (self.template.host(), path.split('/').next()) {
            (Some(host), Some(project)) => format!("{host}/{project}"),
            _ => self
                .template
                .prefix(None)
                .map_or_else(|_| "the directory".to_owned(), |dir| format!("oci:{dir}")),
        };
        if self.template.is_layout() {
            return Ok((scope, None));
        }
        if let Some((at, room)) = self.rooms.lock().await.get(&scope)
            && at.elapsed() < QUOTA_TTL
        {
            return Ok((scope, *room));
        }
        let room = match self.registry().await {
            Ok(images) => images.quota_usage(&path).await,
            Err(error) => Err(error),
        };
        if room.is_err() {
            self.forget_registry().await;
        }
        let room = room?;
        let mut rooms = self.rooms.lock().await;
        if rooms.len() >= MAX_LISTS {
            rooms.clear();
        }
        rooms.insert(scope.clone(), (Instant::now(), room));
        Ok((scope, room))
    }

    /// Refuses a save that cannot fit, if the registry reports the quota in time. An autosave leaves a tenth of the quota to
    /// saves by hand.
    pub(super) async fn check_quota(&self, user: &str, autosave: bool) -> Result<(), Refusal> {
        let asked = tokio::time::timeout(QUOTA_TIMEOUT, self.quota_usage(user)).await;
        let Ok(Ok((scope, Some(room)))) = asked else {
            return Ok(());
        };
        let (Some(free), Some(limit)) = (room.free(), room.limit) else {
            return Ok(());
        };
        let Some(full) = fullness(free, limit, autosave) else {
            return Ok(());
        };
        Err(Refusal::new(
            axum::http::StatusCode::FORBIDDEN,
            "quota_exceeded",
            format!(
                "{scope} {full}: {} of {limit} bytes are used; delete images that are not needed any more",
                room.used
            ),
        ))
    }
}

/// Returns how a quota of `limit` bytes, of which `free` are left, is too full for a save, if it is.
fn fullness(free: u64, limit: u64, autosave: bool) -> Option<&'static str> {
    match free {
        0 => Some("is full"),
        _ if autosave && free < limit / RESERVE => Some("is almost full"),
        _ => None,
    }
}

/// Sort order.
#[derive(Clone, Copy, Debug, Default, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum Order {
    /// The latest first.
    #[default]
    Updated,
    /// By name.
    Name,
    /// The largest first.
    Size,
}

/// A category, or any, which the empty value of a form's field means, too.
#[derive(Clone, Copy, Debug, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum CategoryOrAny {
    Cpu,
    Gpu,
    #[serde(alias = "")]
    Any,
}

/// Selects a part of the images.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct ImagesQuery {
    /// For administrators: only images of this user.
    user: Option<String>,
    /// Only images with this text in the name, a tag or the message, and those with a package that is called so, as with
    /// `package`; at most 100 characters.
    search: Option<String>,
    /// Only images with this package, as `NAME` or `NAME==VERSION`, that their bases do not have in this version.
    package: Option<String>,
    #[param(inline)]
    sort: Option<Order>,
    /// Only images of sessions in this category.
    #[param(inline)]
    category: Option<CategoryOrAny>,
    /// The value of `next` in the previous page, whose other parameters were the same.
    cursor: Option<String>,
    /// 1 to 500; the default is 50.
    #[param(minimum = 1, maximum = 500)]
    limit: Option<u32>,
}

fn view(found: &ListedImage, saves: &HashMap<(&str, &str, String), &Save>) -> ImageView {
    let entry = &found.entry;
    let digest = entry.digest.to_string();
    let save = saves
        .get(&(found.user.as_str(), found.name.as_str(), digest.clone()))
        .copied();
    let result = save.and_then(|save| save.result.as_ref());
    let label = |name: &str| {
        entry
            .annotations
            .get(name)
            .or_else(|| entry.labels.get(name))
            .cloned()
    };
    let saved = save.and_then(|save| save.finished_ms).map(rfc3339);
    ImageView {
        user: found.user.clone(),
        name: found.name.clone(),
        tags: entry
            .tags
            .iter()
            .map(|tag| ImageTag {
                name: tag.clone(),
                reference: format!("{}:{tag}", found.repository),
                immutable: entry.immutable.contains(tag),
            })
            .collect(),
        repository: found.repository.clone(),
        size: entry.size,
        category: save.map(|save| save.category),
        kind: save.map(|save| save.kind),
        base: result
            .and_then(|saved| saved.base_name.clone())
            .or_else(|| label(ORG_OPENCONTAINERS_IMAGE_BASE_NAME)),
        pulls: found.pulls,
        changed: entry
            .pushed
            .clone()
            .or(saved)
            .or_else(|| entry.created.clone()),
        message: save.and_then(|save| save.message.clone()),
        session_name: save.map(|save| save.session_name.clone()),
        save: save.map(|save| save.id),
        pinned: false,
        shared: Vec::new(),
        shared_groups: Vec::new(),
        digest,
    }
}

/// Returns the images of a user, or of all users, with their data in the record.
pub(super) async fn list_views(app: &App, user: Option<&str>) -> Result<Vec<ImageView>, Refusal> {
    let found = app.store.list(user).await?;
    let saved = app.record.saved(user).await?;
    let mut saves = HashMap::new();
    // The latest save comes first, so if several made the same image, the oldest one describes it.
    for save in &saved {
        if let Some(result) = &save.result {
            saves.insert(
                (
                    save.user.as_str(),
                    save.name.as_str(),
                    result.digest.clone(),
                ),
                save,
            );
        }
    }
    let mut views: Vec<ImageView> = found.iter().map(|found| view(found, &saves)).collect();
    annotate(&mut views, &app.record.notes(user).await?);
    Ok(views)
}

/// LIST: returns the caller's images. Administrators see all.
#[utoipa::path(
    get, path = "/api/v1/images", tag = "images", params(ImagesQuery),
    responses((status = 200, body = Shown, description = "The images of this page"), Refusal)
)]
pub(super) async fn images(
    Extracted(app): Extracted<App>,
    caller: Caller,
    QueryParams(asked): QueryParams<ImagesQuery>,
) -> Result<Listed<Shown>, Refusal> {
    let limit = limit(asked.limit, LIMIT)?;
    let search = asked
        .search
        .as_deref()
        .unwrap_or_default()
        .trim()
        .to_lowercase();
    if search.chars().count() > MAX_SEARCH {
        return Err(Refusal::invalid(
            "search",
            format!("at most {MAX_SEARCH} characters are searched for"),
        ));
    }
    let user = caller.listed_user(asked.user.as_deref())?;
    if let Some(user) = &user {
        super::target::component(user)?;
    }
    let mut views = list_views(&app, user.as_deref()).await?;
    if let Some(text) = &asked.package {
        retain_with(&app, user.as_deref(), text, &mut views).await?;
    }
    let category = match asked.category {
        Some(CategoryOrAny::Cpu) => Some(Category::Cpu),
        Some(CategoryOrAny::Gpu) => Some(Category::Gpu),
        _ => None,
    };
    let asked_text = asked.search.as_deref().unwrap_or_default();
    let with_package = saves_with(&app, user.as_deref(), asked_text).await?;
    views.retain(|view| {
        let has = |text: &str| text.to_lowercase().contains(&search);
        let text = search.is_empty()
            || view.save.is_some_and(|save| with_package.contains(&save))
            || has(&view.name)
            || view.tags.iter().any(|tag| has(&tag.name))
            || view.message.as_deref().is_some_and(has);
        text && (category.is_none() || view.category == category)
    });
    match asked.sort.unwrap_or_default() {
        Order::Updated => views.sort_by(|a, b| b.changed.cmp(&a.changed).then(a.name.cmp(&b.name))),
        Order::Name => views.sort_by(|a, b| {
            let key = |view: &ImageView| (view.name.clone(), view.user.clone());
            key(a).cmp(&key(b)).then(b.changed.cmp(&a.changed))
        }),
        Order::Size => views.sort_by_key(|view| std::cmp::Reverse(view.size)),
    }
    let total = views.len() as u64;
    let cursor = asked.cursor.as_deref();
    let (images, next) = cut(views, cursor, limit, ImageView::id)?;
    let page = Shown {
        images,
        total,
        next: next.clone(),
    };
    Ok(Listed(page, next))
}

/// Selects the owner of an image.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct UserQuery {
    /// For administrators: the user, if it is not the caller.
    pub(super) user: Option<String>,
}

pub(super) fn owner(caller: &Caller, asked: Option<&str>) -> Result<String, Refusal> {
    match caller.listed_user(asked)? {
        Some(user) => Ok(user),
        None => caller
            .require_user()
            .map(str::to_owned)
            .map_err(|_| Refusal::invalid("user", "whose? say ?user=NAME")),
    }
}

pub(super) fn parse_digest(text: &str) -> Result<Digest, Refusal> {
    text.parse()
        .map_err(|error: DigestError| Refusal::invalid("digest", error.to_string()))
}

/// Fails if a save is writing to a destination.
pub(super) async fn check_no_save(app: &App, destination: &str) -> Result<(), Refusal> {
    match app.record.open_save_to(destination).await? {
        Some(save) => Err(Refusal::conflict(
            format!("save {save} is writing to this name and tag"),
            Some(save),
        )),
        None => Ok(()),
    }
}

/// Returns the quota and the usage of the place for the caller's images.
#[utoipa::path(
    get, path = "/api/v1/quota", tag = "images", params(UserQuery),
    responses((status = 200, body = Quota, description = "The quota of the user's images"), Refusal)
)]
pub(super) async fn quota(
    Extracted(app): Extracted<App>,
    caller: Caller,
    QueryParams(asked): QueryParams<UserQuery>,
) -> Result<Json<Quota>, Refusal> {
    let user = owner(&caller, asked.user.as_deref())?;
    let (scope, room) = app.store.quota_usage(&user).await?;
    Ok(Json(Quota {
        used: room.map(|room| room.used),
        hard: room.and_then(|room| room.limit),
        scope,
    }))
}

#[cfg(test)]
mod tests {
    use super::fullness;

    #[test]
    fn an_autosave_leaves_a_tenth_of_the_quota() {
        for (free, by_hand, autosave) in [
            (0, true, true),
            (1, false, true),
            (99, false, true),
            (100, false, false),
            (1000, false, false),
        ] {
            assert_eq!(fullness(free, 1000, false).is_some(), by_hand, "{free}");
            assert_eq!(fullness(free, 1000, true).is_some(), autosave, "{free}");
        }
    }
}
