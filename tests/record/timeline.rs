//! The timeline of a session, and the times of saves.

use std::time::Duration;

use upperdeck::service::job::JobId;
use upperdeck::service::record::{Record, Save, TimelineFilter};

use super::{Outcomes, POLICY, accept, done, on_both, report, save};

async fn succeed(record: &Record, save: &Save) -> Outcomes {
    accept(record, save).await?;
    let report = report(save.id, 1, 1, 1, done());
    record.apply_reports(&[report], &POLICY).await?;
    // The IDs of later saves sort after it.
    tokio::time::sleep(Duration::from_millis(2)).await;
    Ok(())
}

async fn found(
    record: &Record,
    filter: &TimelineFilter,
    most: u32,
) -> Result<Vec<String>, upperdeck::service::record::Error> {
    let saves = record.timeline(filter, most).await?;
    Ok(saves.into_iter().map(|save| save.tag).collect())
}

#[test]
fn a_timeline_is_that_of_the_session_and_of_what_went_to_its_repository() -> Outcomes {
    on_both(async |place: String| {
        let record = Record::open(&place).await?;
        let repository = "h.example/alice/torch";
        let other_name = Save {
            name: "else".into(),
            destination: "h.example/alice/else:v3".into(),
            ..save("alice", "s2", "v3")
        };
        let longer = Save {
            destination: "h.example/alice/torch-2:v4".into(),
            ..save("alice", "s1", "v4")
        };
        let by_alice = Save {
            caller: "kubernetes:alice".into(),
            ..save("alice", "s2", "v5")
        };
        let mut all = [
            save("alice", "s1", "v1"),
            save("alice", "s2", "v2"),
            other_name,
            longer,
            by_alice,
            save("bob", "s3", "v6"),
        ];
        for save in &mut all {
            save.id = JobId::new();
            succeed(&record, save).await?;
        }
        // What is open has no place in it.
        accept(&record, &save("alice", "s2", "open")).await?;
        let of_session = TimelineFilter {
            session: "s2".into(),
            ..TimelineFilter::default()
        };
        assert_eq!(found(&record, &of_session, 9).await?, ["v5", "v3", "v2"]);
        let asked_for = TimelineFilter {
            caller: Some("kubernetes:alice".into()),
            ..of_session.clone()
        };
        assert_eq!(found(&record, &asked_for, 9).await?, ["v5"]);
        let of_user = TimelineFilter {
            user: Some("alice".into()),
            ..of_session.clone()
        };
        assert_eq!(found(&record, &of_user, 9).await?, ["v5", "v3", "v2"]);
        let with_earlier = TimelineFilter {
            repository: Some(repository.into()),
            ..of_user.clone()
        };
        assert_eq!(
            found(&record, &with_earlier, 9).await?,
            ["v5", "v3", "v2", "v1"]
        );
        assert_eq!(found(&record, &with_earlier, 2).await?, ["v5", "v3"]);
        let after = TimelineFilter {
            after: Some(all[2].id),
            ..with_earlier.clone()
        };
        assert_eq!(found(&record, &after, 9).await?, ["v2", "v1"]);
        let beside = TimelineFilter {
            others: (0..150).map(|n| format!("s{}", n % 2)).collect(),
            ..with_earlier.clone()
        };
        assert_eq!(found(&record, &beside, 9).await?, ["v5", "v3", "v2"]);
        // What the service deleted is left out, what a user deleted is not.
        for (n, by) in [(1, "upperdeck:auto"), (2, "token:alice")] {
            record
                .removed("alice", &all[n].destination, "sha256:0", by)
                .await?;
        }
        let not_removed = TimelineFilter {
            not_removed_by: Some("upperdeck:auto".into()),
            ..with_earlier
        };
        assert_eq!(found(&record, &not_removed, 9).await?, ["v5", "v3", "v1"]);
        let of_bob = TimelineFilter {
            session: "s2".into(),
            user: Some("bob".into()),
            repository: Some(repository.into()),
            ..TimelineFilter::default()
        };
        assert!(found(&record, &of_bob, 9).await?.is_empty());
        Ok(())
    })
}

#[test]
fn times_of_saves_are_one_for_each_period() -> Outcomes {
    on_both(async |place: String| {
        let record = Record::open(&place).await?;
        assert!(record.save_times().await?.is_empty());
        let at = |ms: u64| {
            let id = uuid::Builder::from_unix_timestamp_millis(ms, &[7; 10]).into_uuid();
            JobId(id)
        };
        let begin = 1_764_000_000_000_u64 >> 24 << 24;
        let day = 24 * 3_600_000;
        for (n, ms) in [begin, begin + 5000, begin + day, begin + 40 * day]
            .into_iter()
            .enumerate()
        {
            let save = Save {
                id: at(ms),
                ..save("alice", &format!("s{n}"), &format!("v{n}"))
            };
            succeed(&record, &save).await?;
        }
        // One that did not succeed says nothing.
        let open = Save {
            id: at(begin + 50 * day),
            ..save("alice", "s9", "v9")
        };
        accept(&record, &open).await?;
        let expected = [5000, day, 40 * day].map(|after| (begin + after) as i64);
        assert_eq!(record.save_times().await?, expected);
        Ok(())
    })
}
