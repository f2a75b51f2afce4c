//! `Save` resources of a Kubernetes cluster, which this manager acts for if it holds the Lease.
//!
//! Each is a request like any other, with the resource's UID as its idempotency key; its status follows the save in the
//! record. Who may create a `Save` is decided by the cluster when it is created, so that no other permission is looked at.

mod followed;
mod lease;

use std::time::Duration;

use axum::http::{HeaderMap, HeaderValue};
use futures_util::StreamExt as _;
use kube::api::{Api, ApiResource, DeleteParams, DynamicObject, Patch, PatchParams, Preconditions};
use kube::runtime::WatchStreamExt as _;
use kube::runtime::watcher::{self, watcher};
use kube::{Client, ResourceExt as _};

use self::followed::{Followed, MOST, has_lived, is_being_deleted, is_requested};
use super::App;
use super::accept::accept;
use super::access::Reach;
use super::api::{ImageName, Replace, SaveRequest, Which};
use super::auth::{Caller, Via};
use super::cancel;
use super::options::Resources;
use super::refusal::Refusal;
use super::time::rfc3339;
use crate::service::job::{JobId, SaveOptions, State, now_ms};
use crate::service::kubernetes::crd::{Condition, Phase, Save, SaveStatus};
use crate::service::kubernetes::{self};
use crate::service::record;

/// How often the states of saves are written to their resources.
const EVERY: Duration = Duration::from_secs(2);
/// How long a pod that no agent has told of is waited for, in milliseconds: agents tell of new ones every few seconds.
const APPEARS_MS: i64 = 60_000;
/// Time after which no further resource is begun with in a round, so that the Lease is renewed in time.
const ROUND: Duration = Duration::from_secs(3);
/// Maximum number of resources that are acted for at the same time.
const AT_ONCE: usize = 8;
/// Age from which on an open save is cancelled if its resource does not exist, in milliseconds. A resource that has just
/// been created may not have been told of yet.
const ORPHAN_MS: i64 = 60_000;

/// A client of the cluster.
pub(super) struct Controller {
    client: Client,
    namespace: String,
}

impl Controller {
    /// Prepares the client. Fails if its settings cannot be read.
    pub(super) async fn new(settings: &Resources) -> Result<Self, kubernetes::Error> {
        let config = kubernetes::server_config(settings.kubeconfig.as_deref()).await?;
        Ok(Self {
            namespace: config.default_namespace.clone(),
            client: kubernetes::client(config)?,
        })
    }

    /// Acts for the resources whenever this manager holds the Lease, until the manager ends.
    pub(super) async fn run(&self, app: &App) {
        let leases = Api::namespaced(self.client.clone(), &self.namespace);
        let mut leader = lease::Leader::new(leases, &app.name);
        let watch = || {
            // Not as `Save`: one that this version cannot read would end the list of all.
            let kind = ApiResource::erase::<Save>(&());
            let all: Api<DynamicObject> = Api::all_with(self.client.clone(), &kind);
            let events = watcher(all, watcher::Config::default());
            events.default_backoff().boxed()
        };
        let mut events = watch();
        let mut followed = Followed::default();
        let mut led = false;
        let mut leases = tokio::time::interval(lease::EVERY);
        let mut states = tokio::time::interval(EVERY);
        for interval in [&mut leases, &mut states] {
            interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        }
        loop {
            tokio::select! {
                () = app.cancel.cancelled() => break,
                _ = leases.tick() => {
                    if let Err(error) = leader.attempt().await {
                        tracing::warn!(kubernetes.error = crate::common::message::of(&error), "the lease for Save resources cannot be renewed");
                    }
                }
                event = events.next() => match event {
                    Some(Ok(event)) => {
                        let gone = followed.apply(event);
                        if let Some(gone) = gone.filter(|_| leader.leads()) {
                            cancel(app, &gone).await;
                        }
                    }
                    // The stream begins anew by itself.
                    Some(Err(error)) => tracing::warn!(kubernetes.error = crate::common::message::of(&error), "Save resources cannot be watched"),
                    None => break,
                },
                _ = states.tick() => {
                    if followed.more && followed.saves.len() < MOST / 2 {
                        followed.more = false;
                        events = watch();
                    }
                    if !leader.leads() {
                        led = false;
                        continue;
                    }
                    // Deletions between two lists, or two leaders, were told to none.
                    if std::mem::take(&mut followed.complete) || !std::mem::replace(&mut led, true) {
                        cancel_orphans(app, &followed).await;
                    }
                    self.round(app, &leader, &mut followed).await;
                }
            }
        }
        leader.release().await;
    }

    /// Does what is due, for as long as a round may last.
    async fn round(&self, app: &App, leader: &lease::Leader, followed: &mut Followed) {
        let mut acted = futures_util::stream::iter(followed.due())
            .take_until(tokio::time::sleep(ROUND))
            .take_while(|_| std::future::ready(leader.leads() && !app.cancel.is_cancelled()))
            .map(async |(uid, save)| {
                let done = self.act(app, &save).await;
                (uid, save, done)
            })
            .buffer_unordered(AT_ONCE)
            .boxed();
        while let Some((uid, save, done)) = acted.next().await {
            let mut now = &save;
            match &done {
                Ok(Some(changed)) => now = changed,
                Ok(None) => {}
                Err(error) => tracing::warn!(
                    save = save.name_any(),
                    namespace = save.namespace(),
                    kubernetes.error = crate::common::message::of(error),
                    "a Save resource is tried again"
                ),
            }
            followed.acted(&uid, is_requested(now));
            if let Ok(Some(changed)) = done {
                followed.put(changed);
            }
        }
    }

    /// Does what is due for a resource, and returns it as it is then if it has changed.
    async fn act(&self, app: &App, save: &Save) -> Result<Option<Save>, Failed> {
        let own: Api<Save> =
            Api::namespaced(self.client.clone(), &save.namespace().unwrap_or_default());
        let before = save.status.clone().unwrap_or_default();
        if before.phase.is_final() {
            if has_lived(save, &before) {
                let same = Preconditions {
                    uid: save.uid(),
                    ..Preconditions::default()
                };
                let params = DeleteParams::default().preconditions(same);
                match own.delete(&save.name_any(), &params).await {
                    Ok(_) => {}
                    // It has gone, or another one of its name has come.
                    Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            return Ok(None);
        }
        if is_being_deleted(save) {
            cancel(app, save).await;
        }
        let now = status(app, save, before.clone()).await?;
        if now == before && (save.status.is_some() || is_being_deleted(save)) {
            return Ok(None);
        }
        let patch = serde_json::json!({ "status": now });
        match own
            .patch_status(
                &save.name_any(),
                &PatchParams::default(),
                &Patch::Merge(&patch),
            )
            .await
        {
            Ok(changed) => Ok(Some(changed)),
            Err(kube::Error::Api(status)) if status.code == 404 => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

/// Why a resource is tried again.
#[derive(Debug, thiserror::Error)]
enum Failed {
    /// The API server refuses, or does not answer.
    #[error(transparent)]
    Cluster(#[from] kube::Error),
    /// The record does not answer.
    #[error(transparent)]
    Record(#[from] record::Error),
}

/// What the names of all callers begin with that are resources.
const CALLER: &str = "resource:";

/// The caller that a resource stands for.
fn caller(save: &Save) -> Caller {
    Caller {
        name: format!(
            "{CALLER}{}/{}",
            save.namespace().unwrap_or_default(),
            save.name_any()
        ),
        user: None,
        administrator: false,
        via: Via::Token,
        groups: Vec::new(),
        email: None,
        subject: None,
    }
}

/// Returns whether a resource of this name asked for a save.
fn is_of(found: &record::Save, save: &Save) -> bool {
    found.caller == caller(save).name
}

/// Returns what a resource asks for.
fn request(save: &Save) -> SaveRequest {
    let spec = &save.spec;
    let image = spec
        .image
        .as_deref()
        .map(|text| text.split_once(':').unwrap_or((text, "")));
    let some = |text: &str| (!text.is_empty()).then(|| text.to_owned());
    SaveRequest {
        session: Which::Pod {
            namespace: save.namespace().unwrap_or_default(),
            pod: spec.pod.clone(),
            container: spec.container.clone(),
        },
        image: image.map_or_else(ImageName::default, |(name, tag)| ImageName {
            name: some(name),
            tag: some(tag),
        }),
        message: spec.message.clone(),
        options: SaveOptions::default(),
        replace: if spec.replace_own {
            Replace::Own
        } else {
            Replace::Never
        },
        notify: None,
    }
}

/// Returns the save that was accepted for a resource. Its status may not tell of it yet.
async fn of_resource(app: &App, save: &Save) -> Result<Option<record::Save>, record::Error> {
    let status = save.status.as_ref();
    let id = status.and_then(|status| status.save.as_deref()?.parse::<JobId>().ok());
    if is_requested(save) {
        let found = match id {
            Some(id) => app.record.save(id).await?,
            None => None,
        };
        // Whoever may write the status names no save of another.
        return Ok(found.filter(|found| is_of(found, save)));
    }
    let uid = save.uid().unwrap_or_default();
    app.record.save_of_key(&caller(save).name, &uid).await
}

/// Returns the status that a resource should have now. Requests the save if it has not been.
async fn status(app: &App, save: &Save, before: SaveStatus) -> Result<SaveStatus, Failed> {
    let found = match (is_requested(save), is_being_deleted(save)) {
        (false, false) => None,
        _ => of_resource(app, save).await?,
    };
    let found = match found {
        Some(found) => found,
        None if is_requested(save) => {
            return Ok(failed(
                before,
                "Forgotten",
                "the manager's record does not have the save any more",
            ));
        }
        None if is_being_deleted(save) => return Ok(before),
        None => {
            let (namespace, uid) = (
                save.namespace().unwrap_or_default(),
                save.uid().unwrap_or_default(),
            );
            let reach = Reach::namespace(&namespace);
            let mut headers = HeaderMap::new();
            if let Ok(key) = HeaderValue::from_str(&uid) {
                headers.insert("idempotency-key", key);
            }
            let caller = caller(save);
            let accepted = accept(app, &caller, Some(&reach), &headers, request(save));
            match Box::pin(accepted).await {
                Ok(found) => found,
                Err(refusal) => return Ok(refused(save, before, &refusal)),
            }
        }
    };
    Ok(of_record(&found, before))
}

/// Returns the status of a resource whose request is refused: it waits if that may pass.
fn refused(save: &Save, before: SaveStatus, refusal: &Refusal) -> SaveStatus {
    let problem = refusal.problem();
    let created = save.metadata.creation_timestamp.as_ref();
    let age = created.map_or(i64::MAX, |created| now_ms() - created.0.as_millisecond());
    let may_appear = problem.status == 404 && age < APPEARS_MS;
    if problem.retryable || may_appear {
        return with_condition(
            before,
            "Failed",
            "False",
            &camel(&problem.code),
            &problem.detail,
        );
    }
    failed(before, &camel(&problem.code), &problem.detail)
}

fn failed(before: SaveStatus, reason: &str, message: &str) -> SaveStatus {
    let mut now = with_condition(before, "Failed", "True", reason, message);
    now.phase = Phase::Failed;
    now.finished = Some(rfc3339(now_ms()));
    now
}

/// Returns the status of a resource whose save is in the record.
fn of_record(found: &record::Save, before: SaveStatus) -> SaveStatus {
    let mut now = before;
    now.save = Some(found.id.to_string());
    now.phase = match found.state {
        State::Queued => Phase::Pending,
        State::Assigned | State::Running => Phase::Running,
        State::Succeeded => Phase::Succeeded,
        State::Failed => Phase::Failed,
        State::Cancelled => Phase::Cancelled,
    };
    let part = found
        .progress
        .filter(|progress| progress.bytes_total > 0)
        .map_or(0.0, |progress| {
            progress.bytes_done as f64 / progress.bytes_total as f64
        });
    now.percent = match found.state {
        State::Succeeded => 100,
        // A hundred is what a save has that succeeded.
        _ => (part * 100.0).clamp(0.0, 99.0) as i32,
    };
    if found.state.is_final() {
        now.finished = Some(rfc3339(found.finished_ms.unwrap_or_else(now_ms)));
    }
    if let Some(result) = &found.result {
        now.digest = Some(result.digest.clone());
        now.image = Some(found.destination.clone());
        return with_condition(now, "Complete", "True", "Saved", &result.reference);
    }
    match (&found.error, found.state) {
        (Some(error), _) => with_condition(
            now,
            "Failed",
            "True",
            &camel(error.code.name()),
            &error.message,
        ),
        (None, State::Cancelled) => {
            with_condition(now, "Failed", "True", "Cancelled", "it was cancelled")
        }
        // What made it wait before it was accepted does not hold any more.
        _ => {
            now.conditions.clear();
            now
        }
    }
}

/// Returns `status` with this as its only condition. The time of a condition that has the same status stays.
fn with_condition(
    mut status: SaveStatus,
    kind: &str,
    value: &str,
    reason: &str,
    message: &str,
) -> SaveStatus {
    let old = status
        .conditions
        .iter()
        .find(|old| old.kind == kind && old.status == value);
    let since = old.map_or_else(|| rfc3339(now_ms()), |old| old.last_transition_time.clone());
    status.conditions = vec![Condition {
        kind: kind.to_owned(),
        status: value.to_owned(),
        reason: reason.to_owned(),
        message: crate::common::escape::limited(message, 1000),
        last_transition_time: since,
    }];
    status
}

/// `tag_exists` as reasons of conditions are written: `TagExists`.
fn camel(code: &str) -> String {
    let words = code.split('_').filter(|word| !word.is_empty());
    words
        .map(|word| word[..1].to_uppercase() + &word[1..])
        .collect()
}

/// Cancels the save of a resource that is deleted before it has ended.
async fn cancel(app: &App, save: &Save) {
    let status = save.status.as_ref();
    if status.is_some_and(|status| status.phase.is_final()) {
        return;
    }
    match of_resource(app, save).await {
        Ok(Some(found)) => cancel_save(app, found).await,
        Ok(None) => {}
        Err(error) => {
            tracing::warn!(save = save.name_any(), %error, "the save of a deleted resource is not cancelled");
        }
    }
}

async fn cancel_save(app: &App, save: record::Save) {
    if save.state.is_final() {
        return;
    }
    let (id, caller) = (save.id, save.caller.clone());
    let cancelled = Box::pin(cancel::cancel_save(app, &caller, save));
    if let Err(refusal) = cancelled.await {
        tracing::debug!(job = %id, problem = refusal.problem().code, "the save of a deleted resource is not cancelled");
    }
}

/// Cancels the open saves whose resources do not exist any more.
async fn cancel_orphans(app: &App, followed: &Followed) {
    // Without all resources at hand, it is not known which one is missing.
    if followed.more {
        return;
    }
    let open = match app.record.open_saves_of_keys(CALLER).await {
        Ok(open) => open,
        Err(error) => {
            tracing::warn!(%error, "saves of deleted resources may go on");
            return;
        }
    };
    for (save, uid) in open {
        if !followed.saves.contains_key(&uid) && now_ms() - save.created_ms > ORPHAN_MS {
            cancel_save(app, save).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::service::kubernetes::crd::SaveSpec;

    fn resource(image: Option<&str>) -> Save {
        let mut save = Save::new(
            "s",
            SaveSpec {
                pod: "nb".to_owned(),
                image: image.map(str::to_owned),
                ..SaveSpec::default()
            },
        );
        save.metadata.namespace = Some("lab".to_owned());
        save.metadata.uid = Some("u-1".to_owned());
        save
    }

    #[test]
    fn a_resource_asks_for_a_pod_of_its_own_namespace() {
        let asked = request(&resource(Some("lab:v1")));
        let Which::Pod {
            namespace,
            pod,
            container,
        } = asked.session
        else {
            panic!("no pod");
        };
        assert_eq!(
            (namespace.as_str(), pod.as_str(), container),
            ("lab", "nb", None)
        );
        let names = |text| {
            let image = request(&resource(text)).image;
            (image.name, image.tag)
        };
        let some = |text: &str| Some(text.to_owned());
        assert_eq!(names(Some("lab:v1")), (some("lab"), some("v1")));
        assert_eq!(names(Some(":v1")), (None, some("v1")));
        assert_eq!(names(Some("lab")), (some("lab"), None));
        assert_eq!(names(None), (None, None));
    }

    #[test]
    fn conditions_keep_their_time_and_reasons_are_in_camel_case() {
        let first = with_condition(SaveStatus::default(), "Failed", "False", "NotFound", "a");
        let mut old = first.clone();
        old.conditions[0].last_transition_time = "2026-11-30T00:00:00Z".to_owned();
        let same = with_condition(old.clone(), "Failed", "False", "NotFound", "b");
        assert_eq!(
            same.conditions[0].last_transition_time,
            "2026-11-30T00:00:00Z"
        );
        let other = with_condition(old, "Failed", "True", "NotFound", "b");
        assert_ne!(
            other.conditions[0].last_transition_time,
            "2026-11-30T00:00:00Z"
        );
        assert_eq!(camel("tag_exists"), "TagExists");
        assert_eq!(camel("_"), "");
    }
}
