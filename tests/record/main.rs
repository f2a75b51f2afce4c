//! The record with SQLite and PostgreSQL, with the same behavior: whatever is written is stored exactly once, even by
//! concurrent writers.

mod autosave;
mod images;
mod notices;
mod packages;
#[path = "../support/postgres.rs"]
mod postgres;
#[allow(dead_code, reason = "each test program uses its part")]
#[path = "../support/mod.rs"]
mod support;
mod timeline;

use std::collections::BTreeSet;
use std::future::Future;
use std::time::Duration;

use upperdeck::service::job::{
    Category, Code, Event, JobId, Kind, Outcome, Phase, Report, Saved, State, Update,
};
use upperdeck::service::record::{
    Error, Filter, OutboxAction, Policy, Progress, Record, Request, Save, SignIn, Submitted,
    UserLimits,
};

type Outcomes = Result<(), Box<dyn std::error::Error>>;

const POLICY: Policy = Policy {
    attempts: 3,
    backoff_ms: 1,
    backoff_most_ms: 1,
};

/// Runs a test with both databases. `place` allows opening the same record again, as another manager would.
fn on_both<F: Future<Output = Outcomes>>(test: impl Fn(String) -> F) -> Outcomes {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(4)
        .enable_all()
        .build()?;
    let dir = tempfile::tempdir()?;
    let sqlite = format!("sqlite:{}", dir.path().join("record.db").display());
    runtime.block_on(test(sqlite))?;
    match postgres::database() {
        Ok(url) => runtime.block_on(test(url))?,
        Err(reason) => support::ignore(&reason),
    }
    Ok(())
}

fn save(user: &str, session: &str, tag: &str) -> Save {
    let now = upperdeck::service::job::now_ms();
    Save {
        id: JobId::new(),
        session: session.to_owned(),
        session_name: format!("ns/{session}"),
        node: "n1".into(),
        user: user.to_owned(),
        owner: user.to_owned(),
        name: "torch".into(),
        tag: tag.to_owned(),
        destination: format!("h.example/{user}/torch:{tag}"),
        message: Some("it's \"quoted\" — 한글 \u{1F600} $1 ' -- ;".into()),
        kind: Kind::Jupyter,
        category: Category::Gpu,
        base: Some("h.example/base:1".into()),
        attempt: 1,
        version: 1,
        caller: "token:test".into(),
        created_ms: now,
        queued_ms: now,
        not_before_ms: now,
        ..Save::default()
    }
}

fn saved() -> Saved {
    Saved {
        reference: "h.example/alice/torch@sha256:0".into(),
        digest: "sha256:0".into(),
        layer_bytes: 1,
        image_bytes: 2,
        sent_bytes: 1,
        entries: 1,
        pause_ms: Some(0.25),
        seconds: 1.5,
        ..Saved::default()
    }
}

fn report(job: JobId, attempt: u32, fence: u64, seq: u64, update: Update) -> Report {
    Report {
        job,
        node: "n1".into(),
        attempt,
        fence,
        seq,
        at_ms: 1000,
        update,
    }
}

fn warning(text: &str) -> Update {
    Update::Event {
        event: Event::Warning {
            code: "note".into(),
            message: text.to_owned(),
        },
    }
}

fn done() -> Update {
    Update::Ended {
        outcome: Outcome::Succeeded { saved: saved() },
    }
}

fn failed(retryable: bool) -> Update {
    Update::Ended {
        outcome: Outcome::Failed {
            code: Code::RegistryUnavailable,
            message: "503".into(),
            retryable,
        },
    }
}

async fn accept(record: &Record, save: &Save) -> Outcomes {
    match record.submit(save, None, UserLimits::default()).await? {
        Submitted::New(_) => Ok(()),
        other => Err(format!("{other:?}").into()),
    }
}

/// Checks that the audit log is a chain of permitted transitions, and that the versions for watchers have no gap.
async fn check_story(record: &Record, id: JobId) -> Result<Save, Box<dyn std::error::Error>> {
    let save = record.save(id).await?.ok_or("gone")?;
    let mut at = None;
    for line in record.audit(id).await? {
        assert_eq!(line.from, at, "a gap in the audit of {id}");
        match line.from {
            None => assert_eq!(line.to, State::Queued),
            Some(from) => assert!(from == line.to || from.can_become(line.to)),
        }
        at = Some(line.to);
    }
    assert_eq!(at, Some(save.state));
    let versions: Vec<u64> = record
        .changes(id, 0)
        .await?
        .iter()
        .map(|save| save.version)
        .collect();
    assert_eq!(versions, (1..=save.version).collect::<Vec<_>>());
    Ok(save)
}

#[test]
fn what_is_accepted_is_read_as_it_was_written() -> Outcomes {
    on_both(async |place: String| {
        let save = save("alice", "s1", "v1");
        let record = Record::open(&place).await?;
        accept(&record, &save).await?;
        record.close().await;
        let record = Record::open(&place).await?;
        assert_eq!(record.save(save.id).await?.as_ref(), Some(&save));
        assert_eq!(record.open_save_to(&save.destination).await?, Some(save.id));
        assert_eq!(record.save(JobId::new()).await?, None);
        record.ping().await?;
        Ok(())
    })
}

#[test]
fn a_session_and_a_tag_have_one_open_save_and_a_user_so_many() -> Outcomes {
    on_both(async |place: String| {
        let record = Record::open(&place).await?;
        let first = save("alice", "s1", "v1");
        accept(&record, &first).await?;
        let one_open = UserLimits { open: 1, day: 0 };
        assert_eq!(
            record
                .submit(&save("alice", "s1", "v2"), None, UserLimits::default())
                .await?,
            Submitted::Busy(first.id)
        );
        assert_eq!(
            record
                .submit(&save("alice", "s2", "v1"), None, UserLimits::default())
                .await?,
            Submitted::TagBusy(first.id)
        );
        assert_eq!(
            record
                .submit(&save("alice", "s2", "v2"), None, one_open)
                .await?,
            Submitted::TooMany(1)
        );
        assert_eq!(
            record
                .submit(&save("alice", "s1", "v2"), None, one_open)
                .await?,
            Submitted::Busy(first.id)
        );
        let other = save("bob", "s2", "v1");
        assert!(matches!(
            record.submit(&other, None, one_open).await?,
            Submitted::New(_)
        ));
        record
            .apply_reports(&[report(first.id, 1, 1, 0, done())], &POLICY)
            .await?;
        accept(&record, &save("alice", "s1", "v1")).await?;
        // Two in a day, whatever became of the first.
        let two_a_day = UserLimits { open: 0, day: 2 };
        assert_eq!(
            record
                .submit(&save("alice", "s3", "v3"), None, two_a_day)
                .await?,
            Submitted::TooManyToday(2)
        );
        assert!(matches!(
            record
                .submit(&save("bob", "s3", "v3"), None, two_a_day)
                .await?,
            Submitted::New(_)
        ));
        Ok(())
    })
}

#[test]
fn a_sign_in_is_known_to_all_managers_until_it_ends() -> Outcomes {
    on_both(async |place: String| {
        let (one, two) = (Record::open(&place).await?, Record::open(&place).await?);
        let made = |n: u32, caller: &str, ends| SignIn {
            cookie: format!("{n:064}"),
            page: format!("{:064}", n + 1000),
            caller: caller.to_owned(),
            basis: "token:x".to_owned(),
            user: "alice".to_owned(),
            administrator: n == 1,
            groups: String::new(),
            email: None,
            hint: String::new(),
            expires_ms: ends,
        };
        let now = upperdeck::service::job::now_ms();
        let (first, other) = (made(1, "a", now + 9000), made(2, "b", now + 9000));
        one.sign_in(&first, now, 3).await?;
        one.sign_in(&other, now, 3).await?;
        assert_eq!(
            two.signed_in(&first.cookie, now).await?,
            Some(first.clone())
        );
        assert_eq!(two.signed_in(&first.cookie, first.expires_ms).await?, None);
        assert_eq!(two.signed_in(&first.page, now).await?, None);
        // Of each caller the latest stay.
        for n in 3..6 {
            one.sign_in(&made(n, "a", now + 9000), now + i64::from(n), 3)
                .await?;
        }
        assert_eq!(two.signed_in(&first.cookie, now).await?, None);
        for n in 2..6 {
            assert!(
                two.signed_in(&format!("{n:064}"), now).await?.is_some(),
                "{n}"
            );
        }
        two.sign_out(&other.cookie).await?;
        assert_eq!(one.signed_in(&other.cookie, now).await?, None);
        one.sign_in(&made(9, "c", now - 1), now - 2, 3).await?;
        one.forget(None).await?;
        assert_eq!(one.signed_in(&format!("{:064}", 9), now - 2).await?, None);
        Ok(())
    })
}

#[test]
fn a_user_has_so_many_open_saves_though_they_are_asked_for_at_once() -> Outcomes {
    on_both(async |place: String| {
        let (one, two) = (Record::open(&place).await?, Record::open(&place).await?);
        for round in 0..20 {
            let user = format!("user{round}");
            let sent = (0..12).map(|n| {
                let record = if n % 2 == 0 { one.clone() } else { two.clone() };
                let save = save(&user, &format!("s{round}-{n}"), &format!("v{n}"));
                tokio::spawn(async move {
                    record
                        .submit(&save, None, UserLimits { open: 2, day: 0 })
                        .await
                })
            });
            let mut new = 0;
            for answer in futures_util::future::join_all(sent.collect::<Vec<_>>()).await {
                match answer?? {
                    Submitted::New(_) => new += 1,
                    Submitted::TooMany(open) => assert_eq!(open, 2),
                    other => return Err(format!("{other:?}").into()),
                }
            }
            assert_eq!(new, 2, "{user}");
        }
        Ok(())
    })
}

#[test]
fn a_key_means_one_request_though_it_is_sent_many_times_at_once() -> Outcomes {
    on_both(async |place: String| {
        let (one, two) = (Record::open(&place).await?, Record::open(&place).await?);
        let request = |hash: &str| Request {
            caller: "token:p".into(),
            key: "k".into(),
            hash: hash.into(),
        };
        let sent = (0..10).map(|n| {
            let record = if n % 2 == 0 { one.clone() } else { two.clone() };
            let (request, save) = (
                request("h"),
                save("alice", &format!("s{n}"), &format!("v{n}")),
            );
            tokio::spawn(async move {
                record
                    .submit(&save, Some(&request), UserLimits::default())
                    .await
            })
        });
        let mut ids = BTreeSet::new();
        let mut new = 0;
        for answer in futures_util::future::join_all(sent.collect::<Vec<_>>()).await {
            match answer?? {
                Submitted::New(save) => {
                    new += 1;
                    ids.insert(save.id);
                }
                Submitted::Repeated(save) => {
                    ids.insert(save.id);
                }
                other => return Err(format!("{other:?}").into()),
            }
        }
        assert_eq!((new, ids.len()), (1, 1));
        let other = save("alice", "s99", "v99");
        assert_eq!(
            one.submit(&other, Some(&request("another")), UserLimits::default())
                .await?,
            Submitted::OtherRequest
        );
        let others = Request {
            caller: "token:q".into(),
            ..request("another")
        };
        assert!(matches!(
            one.submit(&other, Some(&others), UserLimits::default())
                .await?,
            Submitted::New(_)
        ));
        // A request that is refused does not use its key up.
        let busy = Request {
            key: "k2".into(),
            ..request("h")
        };
        assert!(matches!(
            one.submit(&other, Some(&busy), UserLimits::default())
                .await?,
            Submitted::Busy(_)
        ));
        let free = save("alice", "s100", "v100");
        assert!(matches!(
            one.submit(&free, Some(&busy), UserLimits::default())
                .await?,
            Submitted::New(_)
        ));
        Ok(())
    })
}

#[test]
fn of_two_managers_that_race_for_the_outbox_one_has_each_errand() -> Outcomes {
    on_both(async |place: String| {
        let (one, two) = (Record::open(&place).await?, Record::open(&place).await?);
        let mut all = BTreeSet::new();
        for n in 0..120 {
            let save = save("alice", &format!("s{n}"), &format!("v{n}"));
            accept(&one, &save).await?;
            all.insert(save.id);
        }
        let race = [
            ("one", &one),
            ("two", &two),
            ("three", &one),
            ("four", &two),
        ];
        let racers = race.map(|(name, record)| {
            let record = record.clone();
            tokio::spawn(async move {
                let mut taken = Vec::new();
                // Who loses a row to another one comes again, as managers do.
                let mut empty = 0;
                while empty < 3 {
                    let more = record.take_outbox(name, 7).await?;
                    empty = if more.is_empty() { empty + 1 } else { 0 };
                    taken.extend(more);
                }
                Ok::<_, Error>(taken)
            })
        });
        let mut won = BTreeSet::new();
        let mut count = 0;
        for racer in futures_util::future::join_all(racers).await {
            for taken in racer?? {
                assert_eq!(taken.action, OutboxAction::Offer);
                won.insert(taken.save);
                count += 1;
            }
        }
        assert_eq!((count, won), (120, all));
        Ok(())
    })
}

#[test]
fn an_errand_is_done_once_and_comes_back_when_it_was_not() -> Outcomes {
    on_both(async |place: String| {
        let record = Record::open(&place).await?;
        let save = save("alice", "s1", "v1");
        accept(&record, &save).await?;
        let taken = record.take_outbox("one", 9).await?;
        assert_eq!(taken.len(), 1);
        assert!(record.take_outbox("two", 9).await?.is_empty());
        record
            .outbox_failed("one", &taken[0], Duration::ZERO)
            .await?;
        let again = record.take_outbox("two", 9).await?;
        assert_eq!(again.len(), 1);
        // Sent anew while it is being done: what is done is the old one.
        record
            .change(save.id, "t", |draft| draft.offer_again("lost"))
            .await?;
        record.outbox_done("two", &again[0]).await?;
        let anew = record.take_outbox("two", 9).await?;
        assert_eq!(anew.len(), 1);
        record.outbox_done("two", &anew[0]).await?;
        assert!(record.take_outbox("two", 9).await?.is_empty());
        Ok(())
    })
}

#[test]
fn a_report_is_heard_once_whoever_brings_it() -> Outcomes {
    on_both(async |place: String| {
        let (one, two) = (Record::open(&place).await?, Record::open(&place).await?);
        let save = save("alice", "s1", "v1");
        accept(&one, &save).await?;
        let reports: Vec<Report> = (0..40)
            .map(|seq| report(save.id, 1, 5, seq + 2, warning(&format!("w{seq}"))))
            .chain([
                report(save.id, 1, 5, 0, Update::Assigned),
                report(save.id, 1, 5, 1, Update::Started),
                report(save.id, 1, 5, 50, failed(true)),
            ])
            .collect();
        // Both managers get all of them, in pieces and in another order.
        let mut work = Vec::new();
        for (at, piece) in reports.chunks(5).chain(reports.chunks(7)).enumerate() {
            let record = if at % 2 == 0 {
                one.clone()
            } else {
                two.clone()
            };
            let piece = piece.to_vec();
            work.push(tokio::spawn(async move {
                record.apply_reports(&piece, &POLICY).await
            }));
        }
        for done in futures_util::future::join_all(work).await {
            done??;
        }
        let heard = check_story(&one, save.id).await?;
        assert_eq!(
            (heard.state, heard.attempt, heard.failures),
            (State::Queued, 2, 1)
        );
        let texts: BTreeSet<_> = heard.warnings.iter().map(|w| w.message.clone()).collect();
        // Those, and that it was tried before; what came after the end of its attempt is still a remark.
        assert_eq!(texts.len(), 41, "{texts:?}");
        assert!(one.apply_reports(&reports, &POLICY).await?.is_empty());
        Ok(())
    })
}

#[test]
fn a_node_does_not_use_up_the_reports_of_anothers_job() -> Outcomes {
    on_both(async |place: String| {
        let record = Record::open(&place).await?;
        let save = save("alice", "s1", "v1");
        accept(&record, &save).await?;
        // The job, its fence and its numbers are to be seen in the queue; the node signs for itself.
        let forged: Vec<Report> = (0..8)
            .map(|seq| Report {
                node: "n2".into(),
                ..report(save.id, 1, 7, seq, warning("x"))
            })
            .collect();
        assert!(record.apply_reports(&forged, &POLICY).await?.is_empty());
        let own = [
            report(save.id, 1, 7, 0, Update::Assigned),
            report(save.id, 1, 7, 1, Update::Started),
            report(save.id, 1, 7, 2, done()),
        ];
        record.apply_reports(&own, &POLICY).await?;
        let heard = check_story(&record, save.id).await?;
        assert_eq!((heard.state, heard.fence), (State::Succeeded, 7));
        assert!(heard.warnings.is_empty());
        Ok(())
    })
}

#[test]
fn whatever_a_node_says_the_others_are_heard() -> Outcomes {
    on_both(async |place: String| {
        let record = Record::open(&place).await?;
        let (odd, plain) = (save("alice", "s1", "v1"), save("bob", "s2", "v2"));
        accept(&record, &odd).await?;
        accept(&record, &plain).await?;
        let text = "a\0b".repeat(5000);
        let failed = |code| Update::Ended {
            outcome: Outcome::Failed {
                code,
                message: text.clone(),
                retryable: true,
            },
        };
        let mut strange = saved();
        strange.reference.clone_from(&text);
        strange.digest.clone_from(&text);
        strange.base_name = Some(text.clone());
        let succeeded = Update::Ended {
            outcome: Outcome::Succeeded { saved: strange },
        };
        let given_back = Update::GivenBack {
            reason: text.clone(),
        };
        for (attempt, fence, seq, said) in [
            (1, 1, 0, Update::Started),
            (1, 1, 1, given_back),
            (2, 2, 0, warning(&text)),
            (2, 2, u64::MAX, failed(Code::Internal)),
            (u32::MAX, u64::MAX, u64::MAX, failed(Code::Internal)),
            (u32::MAX, u64::MAX, 3, succeeded),
        ] {
            let report = Report {
                at_ms: i64::MIN,
                ..report(odd.id, attempt, fence, seq, said)
            };
            record.apply_reports(&[report], &POLICY).await?;
        }
        let heard = record.save(odd.id).await?.ok_or("it is gone")?;
        assert_eq!(heard.state, State::Succeeded);
        let result = heard.result.ok_or("no result")?;
        for told in [&result.reference, &result.digest] {
            assert!(told.len() < 4000, "{}", told.len());
        }
        assert!(!record.audit(odd.id).await?.is_empty());
        record
            .apply_reports(&[report(plain.id, 1, 7, 2, done())], &POLICY)
            .await?;
        let heard = check_story(&record, plain.id).await?;
        assert_eq!(heard.state, State::Succeeded);
        Ok(())
    })
}

#[test]
fn changes_at_the_same_time_are_all_made() -> Outcomes {
    on_both(async |place: String| {
        let (one, two) = (Record::open(&place).await?, Record::open(&place).await?);
        let save = save("alice", "s1", "v1");
        accept(&one, &save).await?;
        one.apply_reports(&[report(save.id, 1, 1, 0, Update::Started)], &POLICY)
            .await?;
        // Each fence takes the save over: all but the highest may come too late, none may break the chain.
        let work = (2..12).map(|fence| {
            let record = if fence % 2 == 0 {
                one.clone()
            } else {
                two.clone()
            };
            let said = report(save.id, 1, fence, 0, Update::Started);
            tokio::spawn(async move { record.apply_reports(&[said], &POLICY).await })
        });
        for done in futures_util::future::join_all(work.collect::<Vec<_>>()).await {
            done??;
        }
        let heard = check_story(&two, save.id).await?;
        assert_eq!((heard.state, heard.fence), (State::Running, 11));
        let wishes = (0..8).map(|n| {
            let record = if n % 2 == 0 { one.clone() } else { two.clone() };
            tokio::spawn(
                async move { record.change(save.id, "t", |d| d.request_cancel("t")).await },
            )
        });
        for wish in futures_util::future::join_all(wishes.collect::<Vec<_>>()).await {
            assert!(wish??.is_some());
        }
        let wished = check_story(&one, save.id).await?;
        assert_eq!(wished.version, heard.version + 1);
        // A decision about a version that is past is no decision.
        let late = one
            .change_at(save.id, heard.version, "t", |draft| draft.end("t"))
            .await?;
        assert!(late.is_none());
        let in_time = one
            .change_at(save.id, wished.version, "t", |draft| draft.end("t"))
            .await?;
        assert!(in_time.is_some());
        assert_eq!(check_story(&one, save.id).await?.state, State::Cancelled);
        Ok(())
    })
}

#[test]
fn progress_is_no_change_and_never_goes_back() -> Outcomes {
    on_both(async |place: String| {
        let record = Record::open(&place).await?;
        let save = save("alice", "s1", "v1");
        accept(&record, &save).await?;
        record
            .apply_reports(&[report(save.id, 1, 3, 1, Update::Started)], &POLICY)
            .await?;
        let at = |bytes_done| Progress {
            bytes_done,
            bytes_total: 100,
            rate: Some(1.5),
            ..Progress::default()
        };
        let said = |fence, seq| report(save.id, 1, fence, seq, Update::Started);
        assert!(record.apply_progress(&said(3, 5), &at(50)).await?);
        assert!(!record.apply_progress(&said(3, 4), &at(40)).await?);
        assert!(!record.apply_progress(&said(2, 9), &at(90)).await?);
        let heads = record.versions(&[save.id, JobId::new()]).await?;
        assert_eq!(heads.len(), 1);
        assert_eq!((heads[0].version, heads[0].heard), (2, (3, 5)));
        assert_eq!(heads[0].progress, Some(at(50)));
        let now = record.save(save.id).await?.ok_or("gone")?;
        assert_eq!(now.progress, Some(at(50)));
        // Another change keeps it, another attempt does not.
        let phase = Update::Event {
            event: Event::Phase {
                phase: Phase::Streaming,
            },
        };
        record
            .apply_reports(&[report(save.id, 1, 3, 6, phase)], &POLICY)
            .await?;
        let now = record.save(save.id).await?.ok_or("gone")?;
        assert_eq!(
            (now.progress, now.phase),
            (Some(at(50)), Some(Phase::Streaming))
        );
        record
            .apply_reports(&[report(save.id, 1, 3, 7, failed(true))], &POLICY)
            .await?;
        let now = record.save(save.id).await?.ok_or("gone")?;
        assert_eq!((now.progress, now.state), (None, State::Queued));
        // Many at once are asked for in pieces.
        let many: Vec<JobId> = (0..1200).map(|_| JobId::new()).chain([save.id]).collect();
        assert_eq!(record.versions(&many).await?.len(), 1);
        Ok(())
    })
}

#[test]
fn the_history_is_filtered_and_turned_page_by_page() -> Outcomes {
    on_both(async |place: String| {
        let record = Record::open(&place).await?;
        let mut ids = Vec::new();
        for n in 0..7 {
            let user = if n % 3 == 0 { "bob" } else { "alice" };
            let save = save(user, &format!("s{n}"), &format!("v{n}"));
            accept(&record, &save).await?;
            ids.push(save.id);
        }
        record
            .apply_reports(&[report(ids[1], 1, 1, 0, done())], &POLICY)
            .await?;
        let all = |filter: Filter| {
            let record = record.clone();
            async move {
                let found = record.history(&filter, 100).await?;
                Ok::<_, Error>(found.iter().map(|save| save.id).collect::<Vec<_>>())
            }
        };
        let newest_first: Vec<_> = ids.iter().rev().copied().collect();
        assert_eq!(all(Filter::default()).await?, newest_first);
        let bob = Filter {
            user: Some("bob".into()),
            ..Filter::default()
        };
        assert_eq!(all(bob).await?, [ids[6], ids[3], ids[0]]);
        let succeeded = Filter {
            state: Some(State::Succeeded),
            ..Filter::default()
        };
        assert_eq!(all(succeeded).await?, [ids[1]]);
        let session = Filter {
            session: Some("s2".into()),
            ..Filter::default()
        };
        assert_eq!(all(session).await?, [ids[2]]);
        let later = Filter {
            after: Some(ids[2]),
            ..Filter::default()
        };
        assert_eq!(all(later).await?, [ids[1], ids[0]]);
        assert_eq!(record.saved(Some("alice")).await?.len(), 1);
        assert_eq!(record.saved(Some("bob")).await?.len(), 0);
        assert_eq!(record.open_saves().await?.len(), 6);
        assert_eq!(record.open_save_states(None, 4).await?.len(), 4);
        assert_eq!(record.open_save_states(Some(ids[5]), 4).await?.len(), 1);
        assert_eq!(record.waiting_by_node().await?.get("n1"), Some(&6));
        let counts = record.counts().await?;
        assert!(counts.contains(&(State::Queued, 6)) && counts.contains(&(State::Succeeded, 1)));
        Ok(())
    })
}

#[test]
fn what_failed_is_tried_again_when_an_administrator_says_so_and_nothing_is_in_the_way() -> Outcomes
{
    on_both(async |place: String| {
        let record = Record::open(&place).await?;
        let first = save("alice", "s1", "v1");
        accept(&record, &first).await?;
        record
            .apply_reports(&[report(first.id, 1, 4, 0, failed(false))], &POLICY)
            .await?;
        let second = save("alice", "s1", "v2");
        accept(&record, &second).await?;
        let blocked = record
            .change(first.id, "root", |draft| draft.requeue("root"))
            .await;
        assert!(matches!(blocked, Err(Error::Conflict(id)) if id == second.id));
        record
            .apply_reports(&[report(second.id, 1, 1, 0, done())], &POLICY)
            .await?;
        let (again, begun) = record
            .change(first.id, "root", |draft| draft.requeue("root"))
            .await?
            .ok_or("gone")?;
        assert!(begun);
        assert_eq!(
            (again.state, again.attempt, again.fence),
            (State::Queued, 2, 4)
        );
        assert_eq!(check_story(&record, first.id).await?.error, None);
        let errands = record.take_outbox("m", 9).await?;
        assert!(
            errands
                .iter()
                .any(|t| t.save == first.id && t.action == OutboxAction::Offer)
        );
        Ok(())
    })
}

#[test]
fn old_saves_are_forgotten_and_open_ones_never() -> Outcomes {
    on_both(async |place: String| {
        let record = Record::open(&place).await?;
        let (old, open) = (save("alice", "s1", "v1"), save("alice", "s2", "v2"));
        accept(&record, &old).await?;
        accept(&record, &open).await?;
        record
            .apply_reports(&[report(old.id, 1, 1, 0, done())], &POLICY)
            .await?;
        assert_eq!(record.forget(None).await?, 0);
        assert_eq!(record.forget(Some(Duration::from_secs(3600))).await?, 0);
        tokio::time::sleep(Duration::from_millis(20)).await;
        assert_eq!(record.forget(Some(Duration::ZERO)).await?, 1);
        assert_eq!(record.save(old.id).await?, None);
        assert!(record.audit(old.id).await?.is_empty());
        assert!(record.save(open.id).await?.is_some());
        check_story(&record, open.id).await?;
        Ok(())
    })
}

#[test]
fn many_managers_make_the_tables_at_once() -> Outcomes {
    on_both(async |place: String| {
        let opening = (0..8).map(|_| {
            let place = place.clone();
            tokio::spawn(async move { Record::open(&place).await })
        });
        let mut records = Vec::new();
        for record in futures_util::future::join_all(opening.collect::<Vec<_>>()).await {
            records.push(record??);
        }
        for (n, record) in records.iter().enumerate() {
            accept(record, &save("alice", &format!("s{n}"), &format!("v{n}"))).await?;
        }
        assert_eq!(records[0].open_saves().await?.len(), 8);
        Ok(())
    })
}

#[test]
fn places_that_are_none_and_records_of_the_future_are_refused() -> Outcomes {
    let runtime = tokio::runtime::Runtime::new()?;
    runtime.block_on(async {
        for place in [
            "",
            "sqlite:",
            "mysql://x/y",
            "sqlite::memory:",
            "a?b",
            "sqlite:a%00",
        ] {
            assert!(
                matches!(Record::open(place).await, Err(Error::Place(_))),
                "{place}"
            );
        }
        let missing = Record::open("/nonexistent/dir/record.db").await;
        assert!(matches!(missing, Err(Error::File { .. })));
        let dir = tempfile::tempdir()?;
        let file = dir.path().join("record.db");
        let place = file.display().to_string();
        Record::open(&place).await?.close().await;
        let mode =
            std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&file)?.permissions());
        assert_eq!(mode & 0o777, 0o600);
        let pool = sqlx::any::AnyPoolOptions::new()
            .connect(&format!("sqlite:{place}"))
            .await?;
        sqlx::query("UPDATE upperdeck_schema SET version = 99")
            .execute(&pool)
            .await?;
        pool.close().await;
        assert!(matches!(
            Record::open(&place).await,
            Err(Error::Newer { found: 99, .. })
        ));
        Ok(())
    })
}
