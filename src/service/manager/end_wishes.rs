//! Which sessions are saved because they ended: as their pod says, else as their user set it, else as the administrator of
//! their node did.

use std::collections::{BTreeSet, HashMap};

use super::App;
use crate::service::job::Session;
use crate::service::record::{self, EndSetting};

/// What users have set.
pub(super) type EndWishes = HashMap<String, EndSetting>;

/// Returns what the owners of those of `sessions` have set that have ended.
pub(super) async fn of<'a>(
    app: &App,
    sessions: impl Iterator<Item = &'a Session>,
) -> Result<EndWishes, record::Error> {
    let owners: BTreeSet<&str> = sessions
        .filter(|session| session.ended.is_some())
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::service::job::{SaveEnded, SessionEnd};

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
