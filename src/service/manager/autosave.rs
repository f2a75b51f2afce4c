//! When sessions are saved without being asked for: what their users, their pods and the administrator say, and the state
//! of that which is not in the record. The calls that set it are in `autosave_settings`.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;

use super::App;
use super::api::{AutosaveFrom, AutosaveInForce, AutosavePolicy, SessionAutosave};
use super::names::suggested_name;
use super::options::{AutosaveDefaults, MOST_AUTOSAVE};
use super::refusal::Refusal;
use super::time::rfc3339;
use crate::service::job::{AutosaveWish, Session};
use crate::service::record::{self, AutosaveSetting};

/// Maximum number of the latest autosaves that are kept.
pub(super) const MAX_KEEP: u32 = 100;

/// State of the autosaves that every manager finds out for itself.
#[derive(Default)]
pub(super) struct Autosaves {
    /// Why the next autosave of a session is not made though it is due.
    waits: Mutex<HashMap<String, String>>,
    /// Users of whom autosaves have been made since theirs were thinned.
    saved: Mutex<BTreeSet<String>>,
    wake: Notify,
}

impl Autosaves {
    fn waits(&self) -> MutexGuard<'_, HashMap<String, String>> {
        self.waits.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records why the next autosave of a session is not made though it is due, or that there is no reason.
    pub(super) fn set_wait(&self, session: &str, why: Option<String>) {
        match why {
            Some(why) => self.waits().insert(session.to_owned(), why),
            None => self.waits().remove(session),
        };
    }

    /// Forgets the sessions that have no autosaves.
    pub(super) fn retain(&self, is_wanted: impl Fn(&str) -> bool) {
        self.waits().retain(|session, _| is_wanted(session));
    }

    /// Records that an autosave of this user was made.
    pub(super) fn made(&self, user: &str) {
        let mut saved = self.saved.lock().unwrap_or_else(PoisonError::into_inner);
        saved.insert(user.to_owned());
        self.wake.notify_one();
    }

    /// Waits until autosaves were made, and returns their users.
    pub(super) async fn users(&self) -> BTreeSet<String> {
        self.wake.notified().await;
        let mut saved = self.saved.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut *saved)
    }
}

/// The autosaves of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Policy {
    /// Time from the end of a save to the next one.
    pub(super) every: Duration,
    /// Number of the latest ones that are kept.
    pub(super) keep: u32,
}

/// What users have set, by user and name of the session.
pub(super) type Settings = BTreeMap<(String, String), AutosaveSetting>;

/// Returns what the owners of these sessions have set.
pub(super) async fn settings_of<'a>(
    app: &App,
    sessions: impl Iterator<Item = &'a Session>,
) -> Result<Settings, record::Error> {
    let owners: BTreeSet<&str> = sessions
        .filter_map(|session| session.owner.as_deref())
        .collect();
    let owners: Vec<&str> = owners.into_iter().collect();
    app.record.autosave_settings(&owners).await
}

/// Returns the autosaves of a session; `None` if there are none.
pub(super) fn policy(
    defaults: &AutosaveDefaults,
    settings: &Settings,
    session: &Session,
) -> Option<Policy> {
    decided(defaults, settings, session)?.0
}

/// Returns the autosaves of a session, if there are any, and who decided so; `None` if there cannot be any.
fn decided(
    defaults: &AutosaveDefaults,
    settings: &Settings,
    session: &Session,
) -> Option<(Option<Policy>, AutosaveFrom)> {
    let owner = session.owner.as_ref()?;
    if session.ended.is_some() || session.auxiliary {
        return None;
    }
    let set = |name: String| settings.get(&(owner.clone(), name));
    let minutes = |minutes: u32| Duration::from_secs(u64::from(minutes) * 60);
    let of_user = |set: &AutosaveSetting| (set.every_minutes.map(minutes), set.keep);
    let ((every, keep), from) = if let Some(set) = set(suggested_name(session)) {
        (of_user(set), AutosaveFrom::Session)
    } else if let Some(wish) = session.autosave {
        let wish = match wish {
            AutosaveWish::Off => (None, None),
            AutosaveWish::Every {
                minutes: every,
                keep,
            } => (Some(minutes(every)), keep),
        };
        (wish, AutosaveFrom::Pod)
    } else if let Some(set) = set(String::new()) {
        (of_user(set), AutosaveFrom::User)
    } else {
        ((defaults.every, None), AutosaveFrom::Administrator)
    };
    let policy = every.map(|every| bounded(defaults, every, keep));
    Some((policy, from))
}

/// Returns what an administrator set as the default; `None` if there are none.
pub(super) fn default_policy(defaults: &AutosaveDefaults) -> Option<AutosavePolicy> {
    Some(bounded(defaults, defaults.every?, None).view())
}

fn bounded(defaults: &AutosaveDefaults, every: Duration, keep: Option<u32>) -> Policy {
    Policy {
        every: every.min(MOST_AUTOSAVE).max(defaults.least),
        keep: keep.unwrap_or(defaults.keep).clamp(1, MAX_KEEP),
    }
}

pub(super) fn in_minutes(time: Duration) -> u32 {
    u32::try_from(time.as_secs().div_ceil(60)).unwrap_or(u32::MAX)
}

impl Policy {
    fn view(&self) -> AutosavePolicy {
        AutosavePolicy {
            every_minutes: in_minutes(self.every),
            keep: self.keep,
        }
    }
}

/// Returns what applies to sessions, by the ID of the session. Those that there cannot be autosaves of are left out.
pub(super) async fn views(
    app: &App,
    sessions: &[&Session],
) -> Result<HashMap<String, AutosaveInForce>, Refusal> {
    let settings = settings_of(app, sessions.iter().copied()).await?;
    let decided: HashMap<&str, (Option<Policy>, AutosaveFrom)> = sessions
        .iter()
        .filter_map(|session| {
            let decided = decided(&app.options.autosave, &settings, session)?;
            Some((session.id.as_str(), decided))
        })
        .collect();
    let with_policy = decided.iter().filter(|(_, (policy, _))| policy.is_some());
    let ids: Vec<&str> = with_policy.map(|(id, _)| *id).collect();
    let last = app.record.last_autosaves(&ids).await?;
    let waits = app.autosaves.waits();
    let view = |(id, (policy, from)): (&str, (Option<Policy>, AutosaveFrom))| {
        let autosave = policy.map(|policy| SessionAutosave {
            policy: policy.view(),
            from,
            last: last.get(id).copied().map(rfc3339),
            waits_for: waits.get(id).cloned(),
        });
        let from = Some(from);
        (id.to_owned(), AutosaveInForce { autosave, from })
    };
    Ok(decided.into_iter().map(view).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::service::job::SessionEnd;

    fn session() -> Session {
        Session {
            id: "ab".repeat(32),
            owner: Some("alice".into()),
            container: Some("lab".into()),
            ..Session::default()
        }
    }

    fn minutes(minutes: u64) -> Duration {
        Duration::from_secs(minutes * 60)
    }

    #[test]
    fn the_first_that_says_something_counts() {
        let defaults = AutosaveDefaults {
            every: Some(minutes(60)),
            ..AutosaveDefaults::default()
        };
        let set = |every_minutes, keep| AutosaveSetting {
            every_minutes,
            keep,
        };
        let key = |name: &str| ("alice".to_owned(), name.to_owned());
        let mut settings = Settings::new();
        let mut it = session();
        let found = |settings: &Settings, session: &Session| {
            let (policy, from) = decided(&defaults, settings, session)?;
            Some((policy.map(|policy| (policy.every, policy.keep)), from))
        };
        let expected = |every, keep, from| Some((Some((minutes(every), keep)), from));
        let by_default = expected(60, 12, AutosaveFrom::Administrator);
        assert_eq!(found(&settings, &it), by_default);
        settings.insert(("bob".to_owned(), String::new()), set(None, None));
        assert_eq!(found(&settings, &it), by_default);
        settings.insert(key(""), set(Some(30), Some(3)));
        assert_eq!(found(&settings, &it), expected(30, 3, AutosaveFrom::User));
        it.autosave = Some(AutosaveWish::Every {
            minutes: 20,
            keep: None,
        });
        assert_eq!(found(&settings, &it), expected(20, 12, AutosaveFrom::Pod));
        it.autosave = Some(AutosaveWish::Off);
        assert_eq!(found(&settings, &it), Some((None, AutosaveFrom::Pod)));
        settings.insert(key("lab"), set(Some(10), None));
        assert_eq!(
            found(&settings, &it),
            expected(10, 12, AutosaveFrom::Session)
        );
        settings.insert(key("lab"), set(None, None));
        assert_eq!(found(&settings, &it), Some((None, AutosaveFrom::Session)));
        let none = AutosaveDefaults::default();
        let nothing_set = decided(&none, &Settings::new(), &session());
        assert_eq!(nothing_set, Some((None, AutosaveFrom::Administrator)));
    }

    #[test]
    fn what_is_wished_is_bounded() {
        let defaults = AutosaveDefaults::default();
        let wish = |minutes, keep| {
            let it = Session {
                autosave: Some(AutosaveWish::Every { minutes, keep }),
                ..session()
            };
            let found = policy(&defaults, &Settings::new(), &it);
            found.map(|found| (found.every, found.keep))
        };
        assert_eq!(wish(0, Some(0)), Some((minutes(5), 1)));
        let week = minutes(7 * 24 * 60);
        assert_eq!(wish(u32::MAX, Some(u32::MAX)), Some((week, 100)));
    }

    #[test]
    fn only_what_runs_and_belongs_to_someone_is_saved() {
        let defaults = AutosaveDefaults {
            every: Some(minutes(60)),
            ..AutosaveDefaults::default()
        };
        let is_saved = |session: &Session| policy(&defaults, &Settings::new(), session).is_some();
        assert!(is_saved(&session()));
        let without_owner = Session {
            owner: None,
            ..session()
        };
        let ended = Session {
            ended: Some(SessionEnd::default()),
            ..session()
        };
        let proxy = Session {
            auxiliary: true,
            ..session()
        };
        for session in [without_owner, ended, proxy] {
            assert!(!is_saved(&session), "{session:?}");
        }
        let none = AutosaveDefaults::default();
        assert_eq!(policy(&none, &Settings::new(), &session()), None);
    }
}
