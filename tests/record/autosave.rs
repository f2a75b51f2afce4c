//! What users set about autosaves, and the saves that autosave made.

use std::time::Duration;

use upperdeck::service::job::{SaveEnded, State};
use upperdeck::service::record::{AutosaveSetting, MadeBy, Record, Save, Submitted, UserLimits};

use super::{Outcomes, POLICY, accept, done, failed, on_both, report, save};

fn auto(session: &str, tag: &str) -> Save {
    Save {
        caller: "upperdeck:auto".into(),
        keep: Some(7),
        ..save("alice", session, &format!("auto-{tag}"))
    }
}

async fn end(record: &Record, save: &Save, update: upperdeck::service::job::Update) -> Outcomes {
    let report = report(save.id, 1, 1, 1, update);
    let changed = record.apply_reports(&[report], &POLICY).await?;
    assert_eq!(changed.len(), 1);
    // Saves that end later have a later end.
    tokio::time::sleep(Duration::from_millis(3)).await;
    Ok(())
}

#[test]
fn settings_are_kept_by_user_and_session() -> Outcomes {
    on_both(async |place: String| {
        let record = Record::open(&place).await?;
        let set = |every_minutes, keep| AutosaveSetting {
            every_minutes,
            keep,
        };
        let own = set(Some(30), None);
        record.set_autosave("alice", "", Some(&own)).await?;
        let lab = set(Some(60), Some(3));
        record.set_autosave("alice", "lab", Some(&lab)).await?;
        record
            .set_autosave("bob", "lab", Some(&set(None, None)))
            .await?;
        let found = record.autosave_settings(&["alice"]).await?;
        let key = |user: &str, name: &str| (user.to_owned(), name.to_owned());
        assert_eq!(found.len(), 2);
        assert_eq!(found.get(&key("alice", "")), Some(&own));
        assert_eq!(found.get(&key("alice", "lab")), Some(&lab));
        record.set_autosave("alice", "lab", Some(&own)).await?;
        record.set_autosave("alice", "", None).await?;
        let found = record.autosave_settings(&["alice", "bob", "carol"]).await?;
        assert_eq!(found.get(&key("alice", "lab")), Some(&own));
        assert_eq!(found.get(&key("bob", "lab")), Some(&set(None, None)));
        assert_eq!(found.len(), 2);
        assert!(record.autosave_settings(&[]).await?.is_empty());
        Ok(())
    })
}

#[test]
fn settings_of_a_user_are_bounded_and_that_for_all_sessions_stays() -> Outcomes {
    on_both(async |place: String| {
        let record = Record::open(&place).await?;
        let set = AutosaveSetting {
            every_minutes: Some(30),
            keep: None,
        };
        record.set_autosave("alice", "", Some(&set)).await?;
        for n in 0..1005 {
            record
                .set_autosave("alice", &format!("s{n}"), Some(&set))
                .await?;
        }
        let found = record.autosave_settings(&["alice"]).await?;
        assert_eq!(found.len(), 1001);
        let has = |name: &str| found.contains_key(&("alice".to_owned(), name.to_owned()));
        assert!(has("") && has("s1004"));
        Ok(())
    })
}

#[test]
fn autosaves_do_not_count_for_the_limits_of_their_user() -> Outcomes {
    on_both(async |place: String| {
        let record = Record::open(&place).await?;
        for n in 0..3 {
            accept(&record, &auto(&format!("s{n}"), &n.to_string())).await?;
        }
        let one = UserLimits { open: 1, day: 1 };
        let by_hand = save("alice", "s9", "v9");
        let submitted = record.submit(&by_hand, None, one).await?;
        assert!(matches!(submitted, Submitted::New(_)), "{submitted:?}");
        let again = save("alice", "s8", "v8");
        let submitted = record.submit(&again, None, one).await?;
        assert_eq!(submitted, Submitted::TooMany(1));
        // An autosave is not ended for a save that cannot be accepted.
        let of_same = save("alice", "s0", "v0");
        let submitted = record.submit(&of_same, None, one).await?;
        assert_eq!(submitted, Submitted::TooMany(1));
        let no_more_today = UserLimits { open: 0, day: 1 };
        let submitted = record.submit(&again, None, no_more_today).await?;
        assert_eq!(submitted, Submitted::TooManyToday(1));
        Ok(())
    })
}

#[test]
fn the_last_save_is_the_last_success_or_autosave() -> Outcomes {
    on_both(async |place: String| {
        let record = Record::open(&place).await?;
        assert!(record.last_saves(&["s"], i64::MAX).await?.is_empty());
        let by_hand = save("alice", "s", "v1");
        accept(&record, &by_hand).await?;
        assert!(record.last_saves(&["s"], i64::MAX).await?.is_empty());
        end(&record, &by_hand, done()).await?;
        let last = |found: &std::collections::HashMap<
            String,
            upperdeck::service::record::LastSave,
        >| { found.get("s").map(|last| (last.id, last.state)) };
        let found = record.last_saves(&["s", "other"], i64::MAX).await?;
        assert_eq!(last(&found), Some((by_hand.id, State::Succeeded)));
        assert!(found["s"].at_ms >= by_hand.created_ms && !found["s"].lost);
        // By a clock that was ahead.
        let before = by_hand.created_ms - 1000;
        assert!(record.last_saves(&["s"], before).await?.is_empty());
        assert!(record.last_autosaves(&["s"]).await?.is_empty());
        // A failure by hand saves nothing; that of an autosave delays the next one.
        let by_hand_again = save("alice", "s", "v2");
        accept(&record, &by_hand_again).await?;
        end(&record, &by_hand_again, failed(false)).await?;
        let found = record.last_saves(&["s"], i64::MAX).await?;
        assert_eq!(last(&found), Some((by_hand.id, State::Succeeded)));
        let first = auto("s", "1");
        accept(&record, &first).await?;
        end(&record, &first, failed(false)).await?;
        let found = record.last_saves(&["s"], i64::MAX).await?;
        assert_eq!(last(&found), Some((first.id, State::Failed)));
        let second = auto("s", "2");
        assert_eq!(second.made_by(), MadeBy::Autosave);
        accept(&record, &second).await?;
        end(&record, &second, done()).await?;
        let found = record.last_saves(&["s"], i64::MAX).await?;
        assert_eq!(last(&found), Some((second.id, State::Succeeded)));
        let at = record.last_autosaves(&["s"]).await?;
        assert_eq!(at.get("s"), Some(&found["s"].at_ms));
        // Its tag is deleted.
        record
            .removed("alice", &second.destination, "sha256:x", "alice")
            .await?;
        assert!(record.last_saves(&["s"], i64::MAX).await?["s"].lost);
        Ok(())
    })
}

#[test]
fn an_autosave_is_known_until_its_tag_is_gone_and_not_for_ever_after_that() -> Outcomes {
    on_both(async |place: String| {
        let record = Record::open(&place).await?;
        let (one, two, three) = (auto("s", "1"), auto("s", "2"), auto("s", "3"));
        let by_hand = save("alice", "s", "v1");
        for (save, update) in [
            (&one, done()),
            (&two, done()),
            (&three, failed(false)),
            (&by_hand, done()),
        ] {
            accept(&record, save).await?;
            end(&record, save, update).await?;
        }
        let known = async || -> Result<Vec<_>, upperdeck::service::record::Error> {
            let found = record.autosaves("alice").await?;
            let mut ids: Vec<_> = found.iter().map(|save| save.id).collect();
            ids.sort();
            Ok(ids)
        };
        assert_eq!(known().await?, [one.id, two.id]);
        let found = record.autosaves("alice").await?;
        for save in &found {
            assert_eq!(save.repository, "h.example/alice/torch");
            assert_eq!((save.session.as_str(), save.keep), ("s", 7));
        }
        assert_eq!(record.users_with_autosaves().await?, ["alice"]);
        record
            .removed("alice", &one.destination, "sha256:0", "upperdeck:auto")
            .await?;
        assert_eq!(known().await?, [two.id]);
        // The history has it for a while.
        assert_eq!(record.forget(None).await?, 0);
        assert!(record.save(one.id).await?.is_some());
        // However short the retention is, what has a tag is known, so that the tag can be deleted.
        tokio::time::sleep(Duration::from_millis(5)).await;
        assert_eq!(record.forget(Some(Duration::ZERO)).await?, 3);
        assert!(record.save(one.id).await?.is_none());
        assert!(record.save(by_hand.id).await?.is_none());
        assert_eq!(known().await?, [two.id]);
        Ok(())
    })
}

#[test]
fn what_a_user_wants_at_the_end_of_sessions_holds_from_when_it_was_set() -> Outcomes {
    on_both(async |place: String| {
        let record = Record::open(&place).await?;
        assert!(record.end_settings(&["alice"]).await?.is_empty());
        let failure = Some(SaveEnded::Failure);
        record.set_own("alice", None, failure).await?;
        let first = record.end_settings(&["alice", "bob"]).await?;
        assert_eq!(first.len(), 1);
        assert_eq!(first["alice"].wanted, SaveEnded::Failure);
        tokio::time::sleep(Duration::from_millis(5)).await;
        // Set again with something else, it holds since then.
        let set = AutosaveSetting {
            every_minutes: Some(30),
            keep: None,
        };
        record.set_own("alice", Some(&set), failure).await?;
        assert_eq!(record.end_settings(&["alice"]).await?, first);
        assert_eq!(record.autosave_settings(&["alice"]).await?.len(), 1);
        let always = Some(SaveEnded::Always);
        record.set_own("alice", None, always).await?;
        let changed = record.end_settings(&["alice"]).await?;
        assert_eq!(changed["alice"].wanted, SaveEnded::Always);
        assert!(changed["alice"].since_ms > first["alice"].since_ms);
        assert!(record.autosave_settings(&["alice"]).await?.is_empty());
        record.set_own("alice", None, None).await?;
        assert!(record.end_settings(&["alice"]).await?.is_empty());
        Ok(())
    })
}
