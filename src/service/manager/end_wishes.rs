//! Which sessions are saved because they ended: as their pod says, else as their user set it, else as the administrator of
//! their node did.

use std::collections::{BTreeSet, HashMap};

use super::App;
use super::api::{AutosaveFrom, SessionAtEnd};
use crate::service::job::Session;
use crate::service::record::{self, EndSetting};

/// What users have set.
pub(super) type EndWishes = HashMap<String, EndSetting>;

/// Returns what the owners of `sessions` have set.
pub(super) async fn of<'a>(
    app: &App,
    sessions: impl Iterator<Item = &'a Session>,
) -> Result<EndWishes, record::Error> {
    let owners: BTreeSet<&str> = sessions
        .filter_map(|session| session.owner.as_deref())
        .collect();
    let owners: Vec<&str> = owners.into_iter().collect();
    app.record.end_settings(&owners).await
}

/// Returns whether a session is to be saved because it ended. What a user set applies to what ends after that.
pub(super) fn is_wanted(wishes: &EndWishes, session: &Session) -> bool {
    let Some(end) = &session.ended else {
        return false;
    };
    let wish = session.owner.as_ref().and_then(|owner| wishes.get(owner));
    let applies =
        |wish: &&EndSetting| !end.by_pod && end.at_ms.is_some_and(|at_ms| at_ms >= wish.since_ms);
    match wish.filter(applies) {
        None => end.save,
        Some(wish) => {
            let wanted = wish.wanted.wants(end.exit_code, end.out_of_memory);
            wanted && end.settled && !session.auxiliary
        }
    }
}

/// Returns whether a session that runs is to be saved when it ends, and who decided so; `None` if it is not saved by itself
/// whatever anyone says, or if its node does not say what its administrator wants.
pub(super) fn view(wishes: &EndWishes, session: &Session) -> Option<SessionAtEnd> {
    let owner = session.owner.as_ref()?;
    if session.ended.is_some() || session.auxiliary {
        return None;
    }
    let of_node = session.at_end?;
    let (when, from) = match wishes.get(owner) {
        _ if of_node.by_pod => (of_node.wanted, AutosaveFrom::Pod),
        Some(set) => (set.wanted, AutosaveFrom::User),
        None => (of_node.wanted, AutosaveFrom::Administrator),
    };
    Some(SessionAtEnd { when, from })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::service::job::{EndWish, SaveEnded, SessionEnd};

    #[test]
    fn who_decides_about_the_end_of_a_session_that_runs_is_said() {
        let session = |by_pod| Session {
            owner: Some("alice".into()),
            at_end: Some(EndWish {
                wanted: SaveEnded::Failure,
                by_pod,
            }),
            ..Session::default()
        };
        let (wanted, since_ms) = (SaveEnded::Always, 0);
        let set = EndWishes::from([("alice".to_owned(), EndSetting { wanted, since_ms })]);
        let none = EndWishes::new();
        let found = |wishes: &EndWishes, session: &Session| {
            view(wishes, session).map(|view| (view.when, view.from))
        };
        for (wishes, by_pod, expected) in [
            (
                &none,
                false,
                (SaveEnded::Failure, AutosaveFrom::Administrator),
            ),
            (&none, true, (SaveEnded::Failure, AutosaveFrom::Pod)),
            (&set, false, (SaveEnded::Always, AutosaveFrom::User)),
            (&set, true, (SaveEnded::Failure, AutosaveFrom::Pod)),
        ] {
            assert_eq!(found(wishes, &session(by_pod)), Some(expected));
        }
        let proxy = Session {
            auxiliary: true,
            ..session(true)
        };
        let ended = Session {
            ended: Some(SessionEnd::default()),
            ..session(true)
        };
        let of_older_agent = Session {
            at_end: None,
            ..session(true)
        };
        for session in [proxy, ended, of_older_agent, Session::default()] {
            assert_eq!(found(&set, &session), None);
        }
    }

    #[test]
    fn a_pod_goes_before_its_user_and_the_user_before_the_administrator() {
        let session = |by_pod, save, at_ms| Session {
            owner: Some("alice".into()),
            ended: Some(SessionEnd {
                at_ms: Some(at_ms),
                exit_code: Some(0),
                save,
                by_pod,
                settled: true,
                ..SessionEnd::default()
            }),
            ..Session::default()
        };
        let wish = |wanted| {
            let since_ms = 100;
            EndWishes::from([("alice".to_owned(), EndSetting { wanted, since_ms })])
        };
        let none = EndWishes::new();
        for save in [false, true] {
            assert_eq!(is_wanted(&none, &session(false, save, 100)), save);
            for wanted in [SaveEnded::Never, SaveEnded::Failure, SaveEnded::Always] {
                let wish = wish(wanted);
                assert_eq!(is_wanted(&wish, &session(true, save, 100)), save);
                let expected = wanted == SaveEnded::Always;
                assert_eq!(is_wanted(&wish, &session(false, save, 100)), expected);
                // It ended before.
                assert_eq!(is_wanted(&wish, &session(false, save, 99)), save);
            }
        }
        let always = wish(SaveEnded::Always);
        let mut unsettled = session(false, false, 100);
        unsettled.ended = unsettled.ended.map(|end| SessionEnd {
            settled: false,
            ..end
        });
        let proxy = Session {
            auxiliary: true,
            ..session(false, false, 100)
        };
        assert!(!is_wanted(&always, &unsettled) && !is_wanted(&always, &proxy));
        assert!(!is_wanted(&always, &Session::default()), "it runs");
    }
}
