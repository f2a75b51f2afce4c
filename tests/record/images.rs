//! What the record knows of images after their saves.

use upperdeck::service::job::{Outcome, Saved, Update};
use upperdeck::service::record::{Fate, ImageKey, NoteChange, Record, Save};

use super::{Outcomes, POLICY, accept, failed, on_both, report, save, saved};

#[test]
fn changes_of_an_image_at_the_same_time_keep_each_others() -> Outcomes {
    on_both(async |place: String| {
        let record = Record::open(&place).await?;
        for n in 0..30 {
            let key = ImageKey {
                user: "alice".into(),
                name: "torch".into(),
                digest: format!("sha256:{n}"),
            };
            let pinned = NoteChange {
                pinned: Some(true),
                ..NoteChange::default()
            };
            let description = NoteChange {
                description: Some("for the paper".into()),
                ..NoteChange::default()
            };
            let shared = NoteChange {
                shared: Some(vec!["bob".into()]),
                ..NoteChange::default()
            };
            let change = async |change: NoteChange| record.change_note(&key, &change, None).await;
            let (one, two, three) =
                tokio::join!(change(pinned), change(description), change(shared));
            one.and(two).and(three)?;
            let note = record.note(&key).await?;
            assert!(
                note.pinned && record.is_pinned(&key).await?,
                "{n}: {note:?}"
            );
            assert_eq!(note.description.as_deref(), Some("for the paper"), "{n}");
            assert_eq!(note.shared, ["bob"], "{n}");
            // What is given is changed, and nothing else.
            let unpinned = NoteChange {
                pinned: Some(false),
                description: Some(String::new()),
                ..NoteChange::default()
            };
            change(unpinned).await?;
            let note = record.note(&key).await?;
            assert_eq!((note.pinned, note.description.as_deref()), (false, None));
            assert_eq!(note.shared, ["bob"]);
            // Of changes of the same state only one is made.
            let change = async |text: &str| {
                let change = NoteChange {
                    description: Some(text.into()),
                    ..NoteChange::default()
                };
                record.change_note(&key, &change, Some(&note)).await
            };
            let all = tokio::join!(change("a"), change("b"), change("c"), change("d"));
            let all = [all.0?, all.1?, all.2?, all.3?];
            let made: Vec<_> = all.into_iter().flatten().collect();
            assert_eq!(made, [record.note(&key).await?], "{n}");
        }
        Ok(())
    })
}

/// Ends an attempt of a save with the image of that digest, or with a failure.
async fn end(record: &Record, save: &Save, fence: u64, digest: Option<&str>) -> Outcomes {
    let ended = match digest {
        Some(digest) => Update::Ended {
            outcome: Outcome::Succeeded {
                saved: Saved {
                    digest: digest.to_owned(),
                    ..saved()
                },
            },
        },
        None => failed(false),
    };
    for (seq, update) in [Update::Assigned, Update::Started, ended]
        .into_iter()
        .enumerate()
    {
        let attempt = record.save(save.id).await?.ok_or("gone")?.attempt;
        let report = report(save.id, attempt, fence, seq as u64, update);
        record.apply_reports(&[report], &POLICY).await?;
    }
    Ok(())
}

#[test]
fn the_save_that_ended_last_has_the_tag() -> Outcomes {
    on_both(async |place: String| {
        let record = Record::open(&place).await?;
        let (older, newer) = (save("alice", "s1", "v1"), save("alice", "s2", "v1"));
        accept(&record, &older).await?;
        end(&record, &older, 1, None).await?;
        accept(&record, &newer).await?;
        end(&record, &newer, 1, Some("sha256:new")).await?;
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        record
            .change(older.id, "root", |draft| draft.requeue("root"))
            .await?;
        end(&record, &older, 2, Some("sha256:old")).await?;
        let mut saves = Vec::new();
        for id in [older.id, newer.id] {
            saves.push(record.save(id).await?.ok_or("gone")?);
        }
        let fates = record.fates(&saves).await?;
        assert_eq!(fates.get(&older.id), None, "it has the tag");
        match fates.get(&newer.id) {
            Some(Fate::Replaced(by)) => assert_eq!(by.id, older.id),
            other => panic!("{other:?}"),
        }
        let last = record.last_saved_to(&older.destination).await?;
        assert_eq!(last.map(|save| save.id), Some(older.id));
        Ok(())
    })
}

#[test]
fn what_a_user_declines_is_not_shared_with_that_user_and_with_others_it_is() -> Outcomes {
    on_both(async |place: String| {
        let record = Record::open(&place).await?;
        let key = |name: &str| ImageKey {
            user: "alice".into(),
            name: name.into(),
            digest: "sha256:1".into(),
        };
        let user = NoteChange {
            shared: Some(vec!["bob".into(), "carol".into()]),
            ..NoteChange::default()
        };
        let group = NoteChange {
            groups: Some(vec!["lab".into()]),
            ..NoteChange::default()
        };
        record.change_note(&key("own"), &user, None).await?;
        record.change_note(&key("group"), &group, None).await?;
        for name in ["own", "group", "none"] {
            record.decline(&key(name), "bob").await?;
            record.decline(&key(name), "bob").await?;
        }
        let lab = ["lab".to_owned()];
        assert_eq!(record.shared_with("bob", &lab).await?, []);
        assert_eq!(record.shared_with("carol", &lab).await?.len(), 2);
        assert_eq!(record.note(&key("own")).await?.shared, ["carol"]);
        assert_eq!(record.note(&key("group")).await?.groups, ["lab"]);
        // By name it can be shared again.
        record.change_note(&key("own"), &user, None).await?;
        assert_eq!(record.shared_with("bob", &lab).await?, [key("own")]);
        Ok(())
    })
}

#[test]
fn one_who_shares_very_many_images_does_not_crowd_out_the_others() -> Outcomes {
    on_both(async |place: String| {
        let record = Record::open(&place).await?;
        let share = async |owner: &str, n: usize, with: NoteChange| {
            let key = ImageKey {
                user: owner.into(),
                name: "torch".into(),
                digest: format!("sha256:{n:03}"),
            };
            record.change_note(&key, &with, None).await
        };
        let user = NoteChange {
            shared: Some(vec!["mallory".into()]),
            ..NoteChange::default()
        };
        let group = NoteChange {
            groups: Some(vec!["lab".into()]),
            ..NoteChange::default()
        };
        for n in 0..250 {
            share("alice", n, user.clone()).await?;
            share("alice", n + 250, group.clone()).await?;
        }
        share("bob", 1, user).await?;
        share("carol", 2, group).await?;
        let shared = record.shared_with("mallory", &["lab".into()]).await?;
        let owners = |owner: &str| shared.iter().filter(|key| key.user == owner).count();
        assert_eq!((owners("bob"), owners("carol")), (1, 1));
        assert!((100..500).contains(&owners("alice")), "{}", owners("alice"));
        Ok(())
    })
}
