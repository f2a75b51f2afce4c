//! Deletes the images of autosaves that are not needed any more: of a user after each autosave, and hourly of all.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::time::Duration;

use tokio::time::Instant;

use super::thinning::superfluous;
use crate::service::job::{JobId, Session, now_ms};
use crate::service::manager::App;
use crate::service::manager::autosave::{policy, settings_of};
use crate::service::manager::deletion::{Tag, delete_tag};
use crate::service::manager::kept;
use crate::service::manager::refusal::Refusal;
use crate::service::manager::replace::seen;
use crate::service::record::{AUTOSAVE, ImageKey};

/// Interval at which the autosaves of all users are thinned.
const ALL_EVERY: Duration = Duration::from_secs(3600);
/// Time from the start to the first time, in which the nodes are heard of.
const FIRST_ALL: Duration = Duration::from_secs(60);

/// Runs until the manager ends.
pub(super) async fn thin_images(app: &App) {
    let mut all_at = Instant::now() + FIRST_ALL;
    loop {
        let users = tokio::select! {
            () = app.cancel.cancelled() => return,
            users = app.autosaves.users() => Ok(users),
            () = tokio::time::sleep_until(all_at) => {
                all_at = Instant::now() + ALL_EVERY;
                let all = app.record.users_with_autosaves().await;
                all.map(|users| users.into_iter().collect())
            }
        };
        let thinned = match users {
            Ok(users) => thin(app, users).await,
            Err(error) => Err(error.into()),
        };
        if let Err(refusal) = thinned {
            tracing::warn!(
                why = refusal.message(),
                "which autosaves are not needed any more is not known"
            );
            app.metrics.error("thin");
        }
    }
}

async fn thin(app: &App, users: BTreeSet<String>) -> Result<(), Refusal> {
    // A node that is not heard of at the moment has its sessions still.
    let mut sessions = kept::kept(app).await?;
    sessions.extend(app.inventory.sessions(&app.queue).await?.iter().cloned());
    sessions.retain(|session| session.ended.is_none());
    for user in users {
        if app.cancel.is_cancelled() {
            return Ok(());
        }
        thin_user(app, &user, &sessions).await?;
    }
    Ok(())
}

/// Deletes what is superfluous of a user's autosaves. What cannot be deleted is tried again in an hour.
async fn thin_user(app: &App, user: &str, sessions: &[Session]) -> Result<(), Refusal> {
    let is_own = |session: &&Session| session.owner.as_deref() == Some(user);
    let own = || sessions.iter().filter(is_own);
    let settings = settings_of(app, own()).await?;
    // A session that is kept and heard of counts as it is heard of, which comes last.
    let keep: HashMap<&str, u32> = own()
        .filter_map(|session| {
            let policy = policy(&app.options.autosave, &settings, session)?;
            Some((session.id.as_str(), policy.keep))
        })
        .collect();
    let living: HashSet<&str> = own().map(|session| session.id.as_str()).collect();
    let saves = app.record.autosaves(user).await?;
    let keep_of = |last: &crate::service::record::StoredAutosave| {
        let present = keep.get(last.session.as_str()).copied();
        present.unwrap_or(last.keep).max(1)
    };
    let mut failed = 0_u64;
    let mut why = None;
    for id in superfluous(&saves, now_ms(), keep_of, &living) {
        if let Err(refusal) = delete(app, id).await {
            failed += 1;
            why = Some(refusal);
        }
    }
    if let Some(refusal) = why {
        tracing::warn!(
            user,
            images = failed,
            why = refusal.message(),
            "images of autosaves cannot be deleted now"
        );
    }
    Ok(())
}

/// Deletes the image of an autosave, if its tag still names it, and its owner has neither pinned nor shared it.
async fn delete(app: &App, id: JobId) -> Result<(), Refusal> {
    let Some(save) = app.record.save(id).await? else {
        return Ok(());
    };
    let Some(result) = &save.result else {
        return Ok(());
    };
    let key = ImageKey::new(&save.user, &save.name, &result.digest);
    let note = app.record.note(&key).await?;
    if note.pinned || !note.shared.is_empty() || !note.groups.is_empty() {
        return Ok(());
    }
    let found = seen(app, &save.destination).await?;
    if found.is_none_or(|found| found.to_string() != result.digest) {
        // It was deleted or replaced elsewhere.
        let removed = app
            .record
            .removed(&save.user, &save.destination, &result.digest, "");
        return Ok(removed.await?);
    }
    let tag = Tag {
        user: &save.user,
        name: &save.name,
        tag: &save.tag,
        destination: &save.destination,
    };
    match delete_tag(app, &tag, AUTOSAVE).await {
        // Its owner gave it another tag, and the registry cannot delete one of several.
        Err(refusal) if refusal.problem().code == "conflict" => Ok(()),
        deleted => deleted.map(drop),
    }
}
