//! The timeline of a session: what was saved of it when, and what each save changed.

use std::collections::{BTreeMap, HashMap};

use axum::extract::State as Extracted;
use axum::http::StatusCode;
use serde::Deserialize;
use utoipa::IntoParams;

use super::App;
use super::api::{PackageSummary, Timeline, TimelineEntry, Which};
use super::auth::Caller;
use super::extract::{Path, QueryParams};
use super::inventory;
use super::names::suggested_name;
use super::paging::{Listed, limit};
use super::refusal::Refusal;
use super::saves::after;
use super::time::rfc3339;
use super::views::shown_fate;
use crate::common::escape;
use crate::image::packages::{ChangeKind, PackageChange, Packages};
use crate::service::job::{JobId, Session};
use crate::service::record::{AUTOSAVE, Fate, ImageKey, Note, Save, TimelineFilter};

/// Default number of entries per page. Each is compared with the one before it.
const LIMIT: u32 = 20;
/// Maximum number of packages that are named, and of characters of a name and of a version.
const MAX_SOME: usize = 5;
const MAX_TEXT: usize = 64;

/// Selects a part of a timeline.
#[derive(Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct TimelineQuery {
    /// Whether saves are listed, too, whose images the service deleted because there were newer ones.
    removed: Option<bool>,
    /// Maximum number of entries, 1 to 500; the default is 20.
    #[param(minimum = 1, maximum = 500)]
    limit: Option<u32>,
    /// The value of `next` in the previous page.
    cursor: Option<String>,
}

/// Returns the succeeded saves of a session, and of earlier sessions of the same user with the same name, the latest first,
/// each with what it changed.
///
/// Of a session that has been removed, its own saves are listed, as long as there are any; it is named by its complete ID.
#[utoipa::path(
    get, path = "/api/v1/sessions/{id}/timeline", tag = "sessions",
    params(("id" = String, Path, description = "The session's ID"), TimelineQuery),
    responses((status = 200, body = Timeline, description = "The saves of this page"), Refusal)
)]
pub(super) async fn timeline(
    Extracted(app): Extracted<App>,
    caller: Caller,
    Path(id): Path<String>,
    QueryParams(asked): QueryParams<TimelineQuery>,
) -> Result<Listed<Timeline>, Refusal> {
    let limit = limit(asked.limit, LIMIT)?;
    if !caller.administrator {
        caller.require_user()?;
    }
    let all = app.inventory.sessions(&app.queue).await?;
    let of_session = match inventory::find(&app, &all, &caller, &Which::Id(id.clone())).await {
        Ok(session) => filter(&app, &caller, session, &all)?,
        Err(refusal) if refusal.status() == StatusCode::NOT_FOUND => {
            let removed = filter_of_removed(&app, &caller, &id).await?;
            removed.ok_or(refusal)?
        }
        Err(refusal) => return Err(refusal),
    };
    let filter = TimelineFilter {
        after: after(asked.cursor.as_deref())?,
        not_removed_by: (asked.removed != Some(true)).then(|| AUTOSAVE.to_owned()),
        ..of_session
    };
    // The one after the page is what its last entry is compared with.
    let saves = app.record.timeline(&filter, limit + 1).await?;
    let page = &saves[..saves.len().min(limit as usize)];
    let next = page
        .last()
        .filter(|_| page.len() < saves.len())
        .map(|save| save.id.to_string());
    let fates = app.record.fates(page).await?;
    let notes = match page.first() {
        Some(_) => app.record.notes(filter.user.as_deref()).await?,
        None => BTreeMap::new(),
    };
    let mut packages = packages_since(&app, &saves, page.len()).await?;
    let entries = page.iter().filter_map(|save| {
        let packages = packages.remove(&save.id);
        entry(save, fates.get(&save.id), &notes, packages)
    });
    let page = Timeline {
        entries: entries.collect(),
        next: next.clone(),
    };
    Ok(Listed(page, next))
}

/// Returns which saves belong to the timeline of a session, of those that `caller` may see.
fn filter(
    app: &App,
    caller: &Caller,
    session: &Session,
    all: &[Session],
) -> Result<TimelineFilter, Refusal> {
    let user = session.owner.clone().or_else(|| caller.user.clone());
    let name = suggested_name(session);
    // Saves of another session that runs under the same name are not this one's past.
    let beside = all.iter().filter(|other| {
        other.id != session.id
            && other.ended.is_none()
            && other.owner == session.owner
            && suggested_name(other) == name
    });
    let sees_all = user.as_ref().is_none_or(|user| caller.may_access(user));
    Ok(TimelineFilter {
        session: session.id.clone(),
        others: beside.map(|other| other.id.clone()).collect(),
        repository: match &user {
            Some(user) => Some(app.options.target.repository(user, &name)?),
            None => None,
        },
        user,
        caller: (!sees_all).then(|| caller.name.clone()),
        ..TimelineFilter::default()
    })
}

/// Returns which saves belong to the timeline of a session that is not known any more: its own, of those that `caller` may
/// see; `None` if there are none.
async fn filter_of_removed(
    app: &App,
    caller: &Caller,
    id: &str,
) -> Result<Option<TimelineFilter>, Refusal> {
    let of_session = TimelineFilter {
        session: id.to_owned(),
        ..TimelineFilter::default()
    };
    if caller.administrator {
        let some = app.record.timeline(&of_session, 1).await?;
        return Ok((!some.is_empty()).then_some(of_session));
    }
    let own = caller.user.clone().map(|user| TimelineFilter {
        user: Some(user),
        ..of_session.clone()
    });
    let asked_for = caller.subject.as_ref().map(|_| TimelineFilter {
        caller: Some(caller.name.clone()),
        ..of_session
    });
    for filter in own.into_iter().chain(asked_for) {
        if !app.record.timeline(&filter, 1).await?.is_empty() {
            return Ok(Some(filter));
        }
    }
    Ok(None)
}

fn entry(
    save: &Save,
    fate: Option<&Fate>,
    notes: &BTreeMap<ImageKey, Note>,
    packages: Option<PackageSummary>,
) -> Option<TimelineEntry> {
    let saved = save.result.as_ref()?;
    let note = notes.get(&ImageKey::new(&save.user, &save.name, saved.digest.clone()));
    let description = note.and_then(|note| note.description.clone());
    Some(TimelineEntry {
        save: save.id,
        at: rfc3339(save.finished_ms.unwrap_or(save.created_ms)),
        made_by: save.made_by(),
        session: save.session.clone(),
        session_name: save.session_name.clone(),
        user: save.user.clone(),
        name: save.name.clone(),
        tag: save.tag.clone(),
        digest: saved.digest.clone(),
        reference: save.destination.clone(),
        fate: shown_fate(fate),
        pinned: note.is_some_and(|note| note.pinned),
        layer_bytes: saved.layer_bytes,
        image_bytes: saved.image_bytes,
        message: description.or_else(|| save.message.clone()),
        changes: saved.changes.clone(),
        packages,
    })
}

/// Compares the packages of the first `count` saves, the latest first, each with those of the save after it in the list.
async fn packages_since(
    app: &App,
    saves: &[Save],
    count: usize,
) -> Result<HashMap<JobId, PackageSummary>, Refusal> {
    let base = |save: &Save| {
        let saved = save.result.as_ref();
        saved.map(|saved| (saved.base_digest.clone(), saved.base_name.clone()))
    };
    let mut found = HashMap::new();
    // A list may be long: two are held at a time.
    let mut later: Option<(&Save, Option<Packages>)> = None;
    for save in &saves[..saves.len().min(count + 1)] {
        let list = app.record.packages(save.id).await?;
        if let Some((of, Some(now))) = &later
            && let Some(before) = &list
            && base(of) == base(save)
        {
            found.insert(of.id, summary(&now.since(before)));
        }
        later = Some((save, list));
    }
    Ok(found)
}

fn summary(list: &Packages) -> PackageSummary {
    let count = |kind| {
        list.packages
            .iter()
            .filter(|one| one.change == kind)
            .count() as u64
    };
    PackageSummary {
        added: count(ChangeKind::Added),
        removed: count(ChangeKind::Removed),
        changed: count(ChangeKind::Changed),
        some: list.packages.iter().take(MAX_SOME).map(text).collect(),
    }
}

/// Returns a difference as text: `+NAME VERSION`, `-NAME VERSION`, `NAME VERSION → VERSION`.
fn text(package: &PackageChange) -> String {
    let short = |text: &str| escape::limited(text, MAX_TEXT);
    let version = |version: &Option<String>| short(version.as_deref().unwrap_or_default());
    let name = short(&package.name);
    let (was, is) = (version(&package.previous), version(&package.version));
    match package.change {
        ChangeKind::Added => format!("+{name} {is}"),
        ChangeKind::Removed => format!("-{name} {was}"),
        ChangeKind::Changed => format!("{name} {was} → {is}"),
    }
}
