//! Deletes the images of autosaves that are not needed any more: of a user after each autosave, and hourly of all.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::time::Duration;

use tokio::time::Instant;

use super::thinning::superfluous;
use super::times::Times;
use super::turns::in_turns;
use crate::service::job::{JobId, Session, now_ms};
use crate::service::manager::App;
use crate::service::manager::autosave::{policy, settings_of};
use crate::service::manager::deletion::{Tag, delete_tag};
use crate::service::manager::kept;
use crate::service::manager::refusal::Refusal;
use crate::service::manager::replace::seen;
use crate::service::queue::registry_of;
use crate::service::record::{AUTOSAVE, ImageKey, StoredAutosave};

/// Interval at which the autosaves of all users are thinned.
const ALL_EVERY: Duration = Duration::from_secs(3600);
/// Time from the start to the first time, in which the nodes are heard of.
const FIRST_ALL: Duration = Duration::from_secs(60);
/// Time in which deletions are begun in a round.
const ROUND: Duration = Duration::from_secs(60);

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

/// Images of one user in one registry, which are deleted one after the other.
struct Batch {
    user: String,
    saves: Vec<JobId>,
}

async fn thin(app: &App, users: BTreeSet<String>) -> Result<(), Refusal> {
    // A node that is not heard of at the moment has its sessions still.
    let mut sessions = kept::kept(app).await?;
    sessions.extend(app.inventory.sessions(&app.queue).await?.iter().cloned());
    sessions.retain(|session| session.ended.is_none());
    let now = now_ms();
    let times = match Times::new(&app.record.save_times().await?, now) {
        Ok(times) => times,
        Err(why) => {
            tracing::warn!(%why, "no images of autosaves are deleted");
            app.metrics.error("clock");
            return Ok(());
        }
    };
    let mut waiting = BTreeMap::<String, VecDeque<Batch>>::new();
    for user in users {
        for (registry, saves) in superfluous_of(app, &user, &sessions, &times, now).await? {
            let user = user.clone();
            let batch = Batch { user, saves };
            waiting.entry(registry).or_default().push_back(batch);
        }
    }
    let until = Instant::now() + ROUND;
    let goes_on = || Instant::now() < until && !app.cancel.is_cancelled();
    let (_, left) = in_turns(waiting, goes_on, |batch| delete_all(app, batch)).await;
    // In the next round, which begins at once.
    for batch in left {
        app.autosaves.made(&batch.user);
    }
    Ok(())
}

/// Returns what is superfluous of a user's autosaves, by registry.
async fn superfluous_of(
    app: &App,
    user: &str,
    sessions: &[Session],
    times: &Times,
    now_ms: i64,
) -> Result<BTreeMap<String, Vec<JobId>>, Refusal> {
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
    let saves = times.counted(app.record.autosaves(user).await?);
    let keep_of = |last: &StoredAutosave| {
        let present = keep.get(last.session.as_str()).copied();
        present.unwrap_or(last.keep).max(1)
    };
    let places: HashMap<JobId, &str> = saves
        .iter()
        .map(|save| (save.id, save.repository.as_str()))
        .collect();
    let mut found = BTreeMap::<String, Vec<JobId>>::new();
    for id in superfluous(&saves, now_ms, keep_of, &living) {
        let registry = places.get(&id).map(|place| registry_of(place));
        let of_registry = found.entry(registry.unwrap_or_default().to_owned());
        of_registry.or_default().push(id);
    }
    Ok(found)
}

/// Deletes the images of a batch. What cannot be deleted is tried again in an hour, and so is what follows if the registry
/// does not answer.
async fn delete_all(app: &App, batch: Batch) {
    let (mut left, mut why) = (0, None);
    let mut saves = batch.saves.into_iter();
    for id in saves.by_ref() {
        if app.cancel.is_cancelled() {
            return;
        }
        if let Err(refusal) = delete(app, id).await {
            let is_silent = refusal.problem().status == 503;
            left += 1;
            why = Some(refusal);
            if is_silent {
                break;
            }
        }
    }
    if let Some(refusal) = why {
        tracing::warn!(
            user = batch.user,
            images = left + saves.len(),
            why = refusal.message(),
            "images of autosaves cannot be deleted now"
        );
    }
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
