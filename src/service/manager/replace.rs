//! Which image a save may replace: decided when it is accepted, so that a tag is never taken from another save by
//! accident, and checked again by the agent immediately before it writes the tag.

use std::time::Duration;

use axum::http::StatusCode;

use super::App;
use super::api::Replace;
use super::names::{other_tag, suggested_tag};
use super::problem::ExistingImage;
use super::refusal::Refusal;
use super::target::is_reserved;
use super::time::rfc3339;
use crate::common::digest::Digest;
use crate::service::job::{Replaces, Session};
use crate::service::record::{ImageKey, Save};
use crate::store::destination::Replaceable;
use crate::store::images;

/// Time limit for looking at a tag. A slower registry must not delay the acceptance of a save; the agent looks again.
const TAG_TIMEOUT: Duration = Duration::from_secs(3);

const UNSEEN: &str = "the registry does not say which image has this tag now, so whether that is pinned is not known; try again";

/// What a save is of, and whose image it makes.
pub(super) struct Image<'a> {
    pub(super) session: &'a Session,
    pub(super) user: &'a str,
    pub(super) name: &'a str,
    /// Whether it is an autosave, to which some tags are reserved.
    pub(super) autosave: bool,
}

/// Returns the tag of a save, its destination, and the image that it may replace. A suggested tag that exists gets
/// another end.
pub(super) async fn choose_tag(
    app: &App,
    of: &Image<'_>,
    asked: Option<String>,
    replace: &Replace,
    now_ms: i64,
) -> Result<(String, String, Replaces), Refusal> {
    let fill = |tag: &str| app.options.target.fill(of.user, of.name, tag);
    let given = asked.is_some();
    let tag = asked.unwrap_or_else(|| suggested_tag(of.session, now_ms));
    let destination = fill(&tag)?;
    if is_reserved(&tag, &app.options.reserved_tags, of.autosave) {
        return Err(Refusal::invalid(
            "image.tag",
            "this tag is reserved; take another one",
        ));
    }
    let place = Place {
        user: of.user,
        name: of.name,
        session: Some(&of.session.id),
        tag: &tag,
        destination: &destination,
    };
    match replaces(app, &place, replace).await {
        Ok(replaces) => Ok((tag, destination, replaces)),
        Err(_) if !given => {
            let tag = other_tag(now_ms);
            let destination = fill(&tag)?;
            Ok((tag, destination, Replaces::Nothing))
        }
        Err(refusal) => Err(refusal),
    }
}

/// A tag that is to name an image.
pub(super) struct Place<'a> {
    pub(super) user: &'a str,
    pub(super) name: &'a str,
    /// The session whose save writes it, if it is one.
    pub(super) session: Option<&'a str>,
    pub(super) tag: &'a str,
    pub(super) destination: &'a str,
}

/// Returns the image that a tag names, and which image it may be taken from when an image is renamed.
///
/// Fails as a save with the same tag does.
pub(super) async fn replaceable(
    app: &App,
    place: &Place<'_>,
    asked: &Replace,
) -> Result<(Option<Digest>, Replaceable), Refusal> {
    let found = app.store.digest_of(place.destination).await;
    let found = found.map_err(images::Error::from)?;
    let digest = match allowed(app, place, asked, found).await? {
        Replaces::Any => found,
        Replaces::Image(digest) => Some(digest),
        Replaces::Nothing => None,
    };
    Ok((found, Replaceable { digest, save: None }))
}

/// Returns the response for a tag that another image has got meanwhile.
pub(super) async fn exists_now(
    app: &App,
    place: &Place<'_>,
    found: Digest,
) -> Result<Refusal, Refusal> {
    let by = app
        .record
        .saved_as(place.destination, &found.to_string())
        .await?;
    Ok(exists(place, found, by.as_ref()))
}

/// Returns which image the save may replace when it writes its tag. Fails as [`allowed`] does.
async fn replaces(app: &App, place: &Place<'_>, asked: &Replace) -> Result<Replaces, Refusal> {
    let looked = app.store.digest_of(place.destination);
    match tokio::time::timeout(TAG_TIMEOUT, looked).await {
        Ok(Ok(found)) => allowed(app, place, asked, found).await,
        // The registry does not answer now. The agent decides by what it finds.
        _ => unseen(app, place, asked).await,
    }
}

/// Returns which image may be replaced if the tag names `found` now.
///
/// Fails with `tag_exists` if `asked` does not allow to replace that image, and with `image_pinned` if its owner has
/// pinned it.
async fn allowed(
    app: &App,
    place: &Place<'_>,
    asked: &Replace,
    found: Option<Digest>,
) -> Result<Replaces, Refusal> {
    let Some(found) = found else {
        return Ok(match asked {
            Replace::Any => Replaces::Any,
            Replace::Image(digest) => Replaces::Image(*digest),
            Replace::Never | Replace::Own => Replaces::Nothing,
        });
    };
    let key = ImageKey::new(place.user, place.name, found.to_string());
    check_replaceable(app, &key, place.tag).await?;
    let by = app.record.saved_as(place.destination, &key.digest).await?;
    match asked {
        Replace::Any => Ok(Replaces::Any),
        Replace::Image(digest) if *digest == found => Ok(Replaces::Image(found)),
        Replace::Own if by.as_ref().is_some_and(|save| is_own(save, place)) => {
            Ok(Replaces::Image(found))
        }
        Replace::Never | Replace::Own | Replace::Image(_) => Err(exists(place, found, by.as_ref())),
    }
}

/// Fails if the image is pinned, which has `tag` and would lose it.
async fn check_replaceable(app: &App, key: &ImageKey, tag: &str) -> Result<(), Refusal> {
    if !app.record.is_pinned(key).await? {
        return Ok(());
    }
    let why = format!(
        "{}:{tag} is pinned: it is not replaced until it is unpinned",
        key.name
    );
    Err(Refusal::new(StatusCode::CONFLICT, "image_pinned", why))
}

/// Returns the image that the tag of a destination names now, before something is done to it.
///
/// Fails with a retryable error if the registry does not say: the image may be pinned.
pub(super) async fn seen(app: &App, destination: &str) -> Result<Option<Digest>, Refusal> {
    match tokio::time::timeout(TAG_TIMEOUT, app.store.digest_of(destination)).await {
        Ok(Ok(found)) => Ok(found),
        Ok(Err(error)) => {
            tracing::warn!(image = destination, %error, "which image has a tag is not known");
            Err(Refusal::unavailable(UNSEEN))
        }
        Err(_) => Err(Refusal::unavailable(UNSEEN)),
    }
}

/// Checks whether a save that is queued again may replace what its tag names now.
pub(super) async fn check_again(app: &App, save: &Save) -> Result<(), Refusal> {
    let Some(found) = seen(app, &save.destination).await? else {
        return Ok(());
    };
    let key = ImageKey::new(&save.user, &save.name, found.to_string());
    check_replaceable(app, &key, &save.tag).await
}

fn is_own(save: &Save, place: &Place<'_>) -> bool {
    place.session == Some(save.session.as_str()) && save.user == place.user
}

async fn unseen(app: &App, place: &Place<'_>, asked: &Replace) -> Result<Replaces, Refusal> {
    Ok(match asked {
        Replace::Any => Replaces::Any,
        Replace::Never => Replaces::Nothing,
        Replace::Image(digest) => Replaces::Image(*digest),
        Replace::Own => {
            let last = app.record.last_saved_to(place.destination).await?;
            let own = last.filter(|save| is_own(save, place));
            let digest = own.and_then(|save| save.result?.digest.parse().ok());
            digest.map_or(Replaces::Nothing, Replaces::Image)
        }
    })
}

/// Returns the response for a tag that exists: who saved it, when, and from which session.
fn exists(place: &Place<'_>, found: Digest, by: Option<&Save>) -> Refusal {
    let saved = by.and_then(|save| save.finished_ms).map(rfc3339);
    let story = match (by, &saved) {
        (Some(save), Some(saved)) => format!(
            ": {} saved it from {} at {saved}",
            save.user, save.session_name
        ),
        _ => String::new(),
    };
    let message = format!(
        "{}:{} exists{story}; take another tag, or say with replace that it may be replaced",
        place.name, place.tag
    );
    Refusal::new(StatusCode::CONFLICT, "tag_exists", message).with_existing(ExistingImage {
        name: place.name.to_owned(),
        tag: place.tag.to_owned(),
        digest: found.to_string(),
        user: place.user.to_owned(),
        saved,
        session: by.map(|save| save.session.clone()),
        session_name: by.map(|save| save.session_name.clone()),
        save: by.map(|save| save.id),
        message: by.and_then(|save| save.message.clone()),
    })
}
