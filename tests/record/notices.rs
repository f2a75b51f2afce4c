//! The outbox of notices: one for each event and receiver, until it is delivered, and none that holds up others.

use std::time::Duration;

use upperdeck::service::job::{Session, Update};
use upperdeck::service::record::{
    Audience, Language, MAILS_PER_DAY, Receiver, Record, Save, SaveEvent,
};

use crate::{Outcomes, POLICY, accept, done, on_both, report, save};

fn receiver(address: &str, events: &[SaveEvent]) -> Receiver {
    Receiver::webhook(address, events)
}

fn notified(user: &str, session: &str, tag: &str, address: &str) -> Save {
    Save {
        notify: vec![receiver(address, &SaveEvent::ENDS)],
        ..save(user, session, tag)
    }
}

#[test]
fn each_event_is_kept_for_each_receiver_until_it_has_it() -> Outcomes {
    on_both(async |place: String| {
        let site = receiver("https://site.example/", &SaveEvent::ALL);
        let record = Record::open(&place).await?.with_receivers(vec![site]);
        let asked = notified("alice", "s1", "v1", "https://alice.example/");
        accept(&record, &asked).await?;
        record
            .apply_reports(
                &[
                    report(asked.id, 1, 1, 0, Update::Assigned),
                    report(asked.id, 1, 1, 1, Update::Started),
                    report(asked.id, 1, 1, 2, done()),
                ],
                &POLICY,
            )
            .await?;
        record.close().await;
        // Another manager, after a restart, without the receivers of the first.
        let record = Record::open(&place).await?;
        assert_eq!(record.notices_waiting().await?, (3, 1));
        let taken = record.take_notices("m", Audience::Site, 10, 5).await?;
        let told: Vec<_> = taken
            .iter()
            .map(|notice| (notice.event, notice.address.as_str(), notice.site))
            .collect();
        let at = "https://site.example/";
        assert_eq!(
            told,
            [
                (SaveEvent::Queued, at, true),
                (SaveEvent::Started, at, true),
                (SaveEvent::Succeeded, at, true)
            ]
        );
        assert_eq!(taken[0].save.id, asked.id);
        assert_eq!(record.take_notices("n", Audience::Site, 10, 5).await?, []);
        // What failed comes again under the same ID; what is done does not.
        record.notice_done("m", &taken[0]).await?;
        record.notice_done("m", &taken[1]).await?;
        record
            .notice_failed("m", &taken[2], Duration::from_secs(3600))
            .await?;
        assert_eq!(record.take_notices("n", Audience::Site, 10, 5).await?, []);
        assert_eq!(record.notices_waiting().await?, (1, 1));
        let own = record.take_notices("m", Audience::Users, 10, 5).await?;
        assert_eq!(own.len(), 1);
        assert_eq!(own[0].event, SaveEvent::Succeeded);
        record.notice_failed("m", &own[0], Duration::ZERO).await?;
        let again = record.take_notices("n", Audience::Users, 10, 5).await?;
        assert_eq!(
            (again[0].id.as_str(), again[0].tries),
            (own[0].id.as_str(), 1)
        );
        // The first manager has lost it.
        record.notice_done("m", &own[0]).await?;
        assert_eq!(record.notices_waiting().await?, (1, 1));
        record.notice_done("n", &again[0]).await?;
        assert_eq!(record.notices_waiting().await?, (1, 0));
        Ok(())
    })
}

#[test]
fn a_user_whose_receivers_hang_holds_up_no_other() -> Outcomes {
    on_both(async |place: String| {
        let record = Record::open(&place).await?;
        for n in 0..4 {
            let (session, tag) = (format!("s{n}"), format!("v{n}"));
            let asked = notified("alice", &session, &tag, &format!("https://{n}.example/"));
            accept(&record, &asked).await?;
            record
                .apply_reports(&[report(asked.id, 1, 1, 0, done())], &POLICY)
                .await?;
        }
        let bobs = notified("bob", "s9", "v9", "https://bob.example/");
        accept(&record, &bobs).await?;
        record
            .apply_reports(&[report(bobs.id, 1, 1, 0, done())], &POLICY)
            .await?;
        let taken = record.take_notices("m", Audience::Users, 10, 2).await?;
        let users: Vec<_> = taken
            .iter()
            .map(|notice| notice.save.user.clone())
            .collect();
        assert_eq!(users, ["alice", "alice", "bob"]);
        // Alice has two under way, so her others wait, for other managers, too.
        record.notice_done("m", &taken[2]).await?;
        assert_eq!(record.take_notices("n", Audience::Users, 10, 2).await?, []);
        record.notice_done("m", &taken[0]).await?;
        record.notice_done("m", &taken[1]).await?;
        assert_eq!(
            record
                .take_notices("n", Audience::Users, 10, 2)
                .await?
                .len(),
            2
        );
        Ok(())
    })
}

#[test]
fn notices_of_a_user_are_bounded_and_the_rest_counted() -> Outcomes {
    on_both(async |place: String| {
        let every = [SaveEvent::Queued];
        let site = (0..300)
            .map(|n| receiver(&format!("https://{n}.example/"), &every))
            .collect();
        let record = Record::open(&place).await?.with_receivers(site);
        for n in 0..4 {
            accept(&record, &save("alice", &format!("s{n}"), &format!("v{n}"))).await?;
        }
        assert_eq!(record.notices_waiting().await?, (1000, 0));
        assert_eq!(record.notices_dropped(), 200);
        accept(&record, &save("bob", "s9", "v9")).await?;
        assert_eq!(record.notices_waiting().await?, (1300, 0));
        assert_eq!(record.notices_dropped(), 200);
        Ok(())
    })
}

#[test]
fn e_mails_are_about_long_saves_if_so_set_and_bounded_by_the_day() -> Outcomes {
    on_both(async |place: String| {
        let record = Record::open(&place).await?;
        let mailed = |n: i64, over_s| Save {
            notify: vec![Receiver::email("a@x.example", Language::Ko, over_s)],
            ..save("alice", &format!("s{n}"), &format!("v{n}"))
        };
        for (n, over_s) in [(0, 0), (1, 3600)] {
            let asked = mailed(n, over_s);
            accept(&record, &asked).await?;
            record
                .apply_reports(&[report(asked.id, 1, 1, 0, done())], &POLICY)
                .await?;
        }
        assert_eq!(record.take_notices("m", Audience::Users, 10, 5).await?, []);
        let taken = record.take_notices("m", Audience::Mail, 10, 5).await?;
        assert_eq!(taken.len(), 1);
        assert_eq!(taken[0].save.notify[0].language, Language::Ko);
        for n in 2..=MAILS_PER_DAY + 2 {
            let asked = mailed(n, 0);
            accept(&record, &asked).await?;
            record
                .apply_reports(&[report(asked.id, 1, 1, 0, done())], &POLICY)
                .await?;
        }
        assert_eq!(record.notices_dropped(), 2);
        assert_eq!(
            record.notices_waiting().await?,
            (0, MAILS_PER_DAY.unsigned_abs())
        );
        Ok(())
    })
}

#[test]
fn the_sessions_seen_last_are_kept_of_each_node() -> Outcomes {
    on_both(async |place: String| {
        let record = Record::open(&place).await?;
        let session = |id: &str, node: &str| Session {
            id: id.to_owned(),
            node: node.to_owned(),
            owner: Some("alice".into()),
            container: Some("nb".into()),
            runtime: "docker".into(),
            started_ms: 1,
            ..Session::default()
        };
        let (a, b, c) = (session("a", "n1"), session("b", "n1"), session("c", "n2"));
        let before = upperdeck::service::job::now_ms();
        record.keep_sessions("n1", &[a, b.clone()]).await?;
        record.keep_sessions("n2", std::slice::from_ref(&c)).await?;
        record.keep_sessions("n1", std::slice::from_ref(&b)).await?;
        record.close().await;
        let record = Record::open(&place).await?;
        let mut kept = record.kept_sessions(before).await?;
        kept.sort_by(|a, b| a.id.cmp(&b.id));
        assert_eq!(kept, [b, c]);
        let later = upperdeck::service::job::now_ms() + 1;
        assert_eq!(record.kept_sessions(later).await?, []);
        record.forget_sessions(later).await?;
        assert_eq!(record.kept_sessions(0).await?, []);
        Ok(())
    })
}
