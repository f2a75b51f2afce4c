//! The `Save` resources that are followed, and which of them are due.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::{Duration, Instant};

use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt as _;
use kube::api::DynamicObject;
use kube::runtime::watcher::Event;

use crate::service::kubernetes::crd::{Save, SaveStatus, TTL_S};

/// Time until a save that was refused for a reason that may pass is requested again; twice as long after each further
/// refusal, up to [`AGAIN_MOST`].
const AGAIN: Duration = Duration::from_secs(10);
const AGAIN_MOST: Duration = Duration::from_secs(320);
/// Maximum number of resources that are followed at the same time. Of more, the others are listed again when half of them
/// have gone.
pub(super) const MOST: usize = 10_000;

/// The resources that have not ended, or are to be deleted, by UID.
#[derive(Default)]
pub(super) struct Followed {
    pub(super) saves: HashMap<String, Save>,
    /// What was done for them last.
    turns: HashMap<String, Turn>,
    /// Whether there are more than [`MOST`].
    pub(super) more: bool,
    /// Those of a list that is still being read.
    listed: Vec<String>,
    /// Whether a list was read to its end since open saves were last compared with it.
    pub(super) complete: bool,
}

/// The last time that something was done for a resource.
#[derive(Clone, Copy, Debug)]
struct Turn {
    at: Instant,
    /// How often its save was requested and refused.
    refused: u32,
}

impl Turn {
    /// Returns whether a refused save may be requested again.
    fn is_over(&self) -> bool {
        let pause = AGAIN * 2_u32.saturating_pow(self.refused.saturating_sub(1));
        self.at.elapsed() >= pause.min(AGAIN_MOST)
    }
}

impl Followed {
    /// Returns the resources for which something may have to be done now, those of all namespaces in turn, and of one
    /// namespace first those that have waited longest.
    pub(super) fn due(&mut self) -> Vec<(String, Save)> {
        let (saves, turns) = (&self.saves, &mut self.turns);
        turns.retain(|uid, _| saves.contains_key(uid));
        let is_due = |uid: &str, save: &Save| match &save.status {
            Some(status) if status.phase.is_final() => {
                !is_being_deleted(save) && has_lived(save, status)
            }
            _ => is_requested(save) || turns.get(uid).is_none_or(Turn::is_over),
        };
        let mut by_namespace = BTreeMap::<String, Vec<_>>::new();
        for (uid, save) in saves.iter().filter(|(uid, save)| is_due(uid, save)) {
            let of_namespace = by_namespace.entry(save.namespace().unwrap_or_default());
            let last = turns.get(uid).map(|turn| turn.at);
            of_namespace.or_default().push((last, uid, save));
        }
        let mut due = Vec::new();
        for mut of_namespace in by_namespace.into_values() {
            of_namespace.sort_by_key(|(last, uid, _)| (*last, *uid));
            due.extend(of_namespace.into_iter().enumerate());
        }
        due.sort_by_key(|(place, _)| *place);
        due.into_iter()
            .map(|(_, (_, uid, save))| (uid.clone(), save.clone()))
            .collect()
    }

    /// Notes that something was done for a resource, whose save may not have been accepted.
    pub(super) fn acted(&mut self, uid: &str, requested: bool) {
        let refused = self.turns.get(uid).map_or(0, |turn| turn.refused);
        let turn = Turn {
            at: Instant::now(),
            refused: if requested { 0 } else { refused + 1 },
        };
        self.turns.insert(uid.to_owned(), turn);
    }

    /// Takes in what the cluster tells. Returns a resource that was deleted.
    pub(super) fn apply(&mut self, event: Event<DynamicObject>) -> Option<Save> {
        match event {
            Event::Init => self.listed.clear(),
            Event::InitApply(object) => {
                self.listed.extend(object.uid());
                self.put(read(object)?);
            }
            Event::InitDone => {
                let listed: HashSet<_> = self.listed.drain(..).collect();
                self.saves.retain(|uid, _| listed.contains(uid));
                self.complete = true;
            }
            Event::Apply(object) => self.put(read(object)?),
            Event::Delete(object) => {
                self.saves.remove(&object.uid()?);
                return read(object);
            }
        }
        None
    }

    pub(super) fn put(&mut self, save: Save) {
        let Some(uid) = save.uid() else { return };
        if self.saves.len() < MOST || self.saves.contains_key(&uid) {
            self.saves.insert(uid, save);
        } else if !self.more {
            self.more = true;
            tracing::warn!(
                most = MOST,
                "there are more Save resources than are followed at once"
            );
        }
    }
}

/// Reads a resource. One that this version does not know is left alone: a newer one may have written it.
fn read(object: DynamicObject) -> Option<Save> {
    let (namespace, name) = (object.namespace(), object.name_any());
    match object.try_parse::<Save>() {
        Ok(save) => Some(save),
        Err(error) => {
            let error = crate::common::escape::limited(&error.to_string(), 500);
            tracing::warn!(
                save = name,
                namespace,
                error,
                "a Save resource cannot be read and is left alone"
            );
            None
        }
    }
}

/// Returns whether a resource's save was accepted.
pub(super) fn is_requested(save: &Save) -> bool {
    let status = save.status.as_ref();
    status.is_some_and(|status| status.save.is_some())
}

/// Returns whether a resource is to go, and only its finalizers keep it.
pub(super) fn is_being_deleted(save: &Save) -> bool {
    save.metadata.deletion_timestamp.is_some()
}

/// Returns whether a resource has ended long enough ago to be deleted.
pub(super) fn has_lived(save: &Save, status: &SaveStatus) -> bool {
    let ttl = save.spec.ttl_seconds_after_finished.unwrap_or(TTL_S);
    let ended = status
        .finished
        .as_deref()
        .and_then(|text| text.parse::<Timestamp>().ok());
    ended.is_some_and(|ended| Timestamp::now().duration_since(ended).as_secs() >= i64::from(ttl))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::service::job::now_ms;
    use crate::service::kubernetes::crd::{Phase, SaveSpec};
    use crate::service::manager::time::rfc3339;

    fn resource() -> Save {
        let mut save = Save::new("s", SaveSpec::default());
        save.metadata.namespace = Some("lab".to_owned());
        save.metadata.uid = Some("u-1".to_owned());
        save
    }

    #[test]
    fn a_resource_lives_for_its_time_after_the_end() {
        let mut save = resource();
        let ended = |seconds: i64| SaveStatus {
            phase: Phase::Succeeded,
            finished: Some(rfc3339(now_ms() - seconds * 1000)),
            ..SaveStatus::default()
        };
        assert!(!has_lived(&save, &ended(60)));
        assert!(has_lived(&save, &ended(8 * 24 * 3600)));
        save.spec.ttl_seconds_after_finished = Some(0);
        assert!(has_lived(&save, &ended(0)));
        assert!(!has_lived(&save, &SaveStatus::default()));
    }

    fn object(save: &Save) -> DynamicObject {
        serde_json::from_value(serde_json::to_value(save).unwrap()).unwrap()
    }

    #[test]
    fn what_is_not_listed_again_has_gone() {
        let of = || object(&resource());
        let mut followed = Followed::default();
        followed.apply(Event::Apply(of()));
        followed.apply(Event::Init);
        assert_eq!(followed.saves.len(), 1);
        followed.apply(Event::InitDone);
        assert_eq!(followed.saves.len(), 0);
        followed.apply(Event::InitApply(of()));
        followed.apply(Event::InitDone);
        assert_eq!(followed.saves.len(), 1);
        assert!(followed.apply(Event::Delete(of())).is_some());
        assert_eq!(followed.saves.len(), 0);
    }

    #[test]
    fn what_another_version_wrote_keeps_nothing_else_from_being_read() {
        let mut unknown = object(&resource());
        unknown.data["status"] = serde_json::json!({"phase": "Paused"});
        let mut followed = Followed::default();
        followed.apply(Event::InitApply(unknown));
        let mut other = resource();
        other.metadata.uid = Some("u-2".to_owned());
        followed.apply(Event::InitApply(object(&other)));
        followed.apply(Event::InitDone);
        assert_eq!(followed.saves.keys().collect::<Vec<_>>(), ["u-2"]);
    }

    #[test]
    fn namespaces_take_turns_and_refused_ones_wait() {
        let mut followed = Followed::default();
        for (namespace, uid) in [("a", "a1"), ("a", "a2"), ("a", "a3"), ("b", "b1")] {
            let mut save = resource();
            save.metadata.namespace = Some(namespace.to_owned());
            save.metadata.uid = Some(uid.to_owned());
            followed.put(save);
        }
        let uids = |followed: &mut Followed| -> Vec<String> {
            followed.due().into_iter().map(|(uid, _)| uid).collect()
        };
        assert_eq!(uids(&mut followed), ["a1", "b1", "a2", "a3"]);
        followed.acted("a1", false);
        assert_eq!(uids(&mut followed), ["a2", "b1", "a3"]);
        let turn = |seconds, refused| Turn {
            at: Instant::now()
                .checked_sub(Duration::from_secs(seconds))
                .unwrap(),
            refused,
        };
        assert!(turn(10, 1).is_over() && !turn(9, 1).is_over());
        assert!(turn(40, 3).is_over() && !turn(39, 3).is_over());
        assert!(turn(320, 99).is_over() && !turn(319, 99).is_over());
        followed.turns.insert("a1".to_owned(), turn(10, 1));
        assert_eq!(uids(&mut followed), ["a2", "b1", "a3", "a1"]);
    }

    #[test]
    fn what_is_being_deleted_is_not_deleted_again() {
        let mut save = resource();
        save.spec.ttl_seconds_after_finished = Some(0);
        save.status = Some(SaveStatus {
            phase: Phase::Succeeded,
            finished: Some(rfc3339(now_ms())),
            ..SaveStatus::default()
        });
        let mut followed = Followed::default();
        followed.put(save.clone());
        assert_eq!(followed.due().len(), 1);
        let time = k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(Timestamp::now());
        save.metadata.deletion_timestamp = Some(time);
        followed.put(save);
        assert_eq!(followed.due().len(), 0);
    }
}
