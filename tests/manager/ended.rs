//! Sessions that have ended: shown with the reason, saved by request, and by themselves where that is wanted.

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use upperdeck::service::job::{EndWish, SaveEnded, Session, SessionEnd, now_ms};

use crate::site::{Agent, Outcomes, Site, Who, ask, get, id, session, until};

/// A session that ended a minute ago, with `save` to be saved without being asked for.
fn ended(n: usize, owner: Option<&str>, save: bool) -> Session {
    let end = SessionEnd {
        at_ms: Some(now_ms() - 60_000),
        exit_code: Some(137),
        out_of_memory: true,
        save,
        ..SessionEnd::default()
    };
    Session {
        ended: Some(end),
        ..session(n, owner)
    }
}

/// The runs of one container of a pod.
fn runs(mut sessions: Vec<Session>) -> Vec<Session> {
    for session in &mut sessions {
        session.pod = Some("nb".to_owned());
    }
    sessions
}

#[tokio::test(flavor = "multi_thread")]
async fn what_ended_is_shown_after_what_runs_and_saved_by_request() -> Outcomes {
    let mut first = ended(1, Some("alice"), false);
    first.ended = first.ended.map(|end| SessionEnd {
        at_ms: Some(now_ms() - 3_600_000),
        ..end
    });
    let last = ended(2, Some("alice"), false);
    let running = session(3, Some("alice"));
    let all = runs(vec![first, running, last.clone()]);
    let (_site, manager, agent) = Site::at_work(&all).await?;
    let at = manager.address;
    let shown = get(at, Who::Alice, "/api/v1/sessions").await?;
    let ids = |shown: &Value| -> Vec<Value> {
        let sessions = shown["sessions"].as_array();
        sessions
            .into_iter()
            .flatten()
            .map(|session| session["id"].clone())
            .collect()
    };
    assert_eq!(ids(&shown), [id(3), id(2), id(1)]);
    assert_eq!(shown["sessions"][0]["ended"], Value::Null);
    let end = &shown["sessions"][1]["ended"];
    assert_eq!(
        (&end["out_of_memory"], &end["exit_code"], &end["save"]),
        (&json!(true), &json!(137), &json!(false))
    );
    let shown = get(at, Who::Alice, "/api/v1/sessions?ended=false").await?;
    assert_eq!(ids(&shown), [id(3)]);
    let shown = get(at, Who::Alice, "/api/v1/sessions?ended=true").await?;
    assert_eq!(ids(&shown), [id(2), id(1)]);
    assert_eq!(ids(&get(at, Who::Bob, "/api/v1/sessions").await?).len(), 0);
    let nodes = get(at, Who::Administrator, "/api/v1/nodes").await?;
    assert_eq!(nodes["nodes"][0]["sessions"], 1);

    let of = |session: Value| {
        let body = json!({"session": session});
        ask(at, Who::Alice, Method::POST, "/api/v1/saves", Some(body))
    };
    // By the name of its pod the running one is meant, by its ID any of them.
    let pod = json!({"namespace": "jupyter", "pod": "nb", "container": null});
    let (status, save) = of(pod.clone()).await?;
    assert_eq!(
        (status, &save["session"]),
        (StatusCode::ACCEPTED, &json!(id(3)))
    );
    let (status, save) = of(json!(id(1))).await?;
    assert_eq!(
        (status, &save["session"]),
        (StatusCode::ACCEPTED, &json!(id(1)))
    );
    let body = json!({"session": id(2)});
    let (status, _) = ask(at, Who::Bob, Method::POST, "/api/v1/saves", Some(body)).await?;
    assert_eq!(status, StatusCode::NOT_FOUND);
    // If none runs, the one that ended last.
    agent
        .heartbeat(&runs(vec![ended(4, Some("bob"), false), last]))
        .await?;
    until(at, Who::Alice, "/api/v1/sessions", |shown| {
        ids(shown) == [id(2)]
    })
    .await?;
    let (status, save) = of(pod).await?;
    assert_eq!(
        (status, &save["session"]),
        (StatusCode::ACCEPTED, &json!(id(2)))
    );
    manager.stop().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_is_saved_by_itself_once_for_each_end() -> Outcomes {
    let site = Site::new()?;
    let manager = site.manager().await?;
    let agent = Agent::new(&site.queue, "a");
    let mut old = ended(4, Some("alice"), true);
    old.ended = old.ended.map(|end| SessionEnd {
        at_ms: Some(now_ms() - 25 * 3_600_000),
        ..end
    });
    let mine = ended(1, Some("alice"), true);
    let others = [
        ended(2, Some("alice"), false),
        ended(3, None, true),
        old,
        session(5, Some("alice")),
    ];
    let with = |one: &Session| [std::slice::from_ref(one), &others[..]].concat();
    agent.heartbeat(&with(&mine)).await?;
    let at = manager.address;
    let all = |n: usize| {
        move |shown: &Value| {
            shown["saves"]
                .as_array()
                .is_some_and(|saves| saves.len() == n)
        }
    };
    let saves = until(at, Who::Administrator, "/api/v1/saves", all(1)).await?;
    let save = &saves["saves"][0];
    assert_eq!(
        (&save["session"], &save["user"]),
        (&json!(id(1)), &json!("alice"))
    );
    let tag = save["tag"].as_str().unwrap_or_default();
    assert!(tag.starts_with("ended-20"), "{save}");
    assert_eq!(save["name"], "pod-1");
    assert_eq!(
        save["message"],
        "saved because the session ended: out of memory"
    );
    let claim = agent.claim().await?;
    assert_eq!(
        claim.order.replaces,
        upperdeck::service::job::Replaces::Nothing
    );
    agent.work(&claim).await?;
    until(at, Who::Alice, "/api/v1/saves?state=succeeded", all(1)).await?;
    let audit = format!("/api/v1/saves/{}/audit", claim.order.job);
    let audit = get(at, Who::Administrator, &audit).await?;
    assert_eq!(audit["transitions"][0]["actor"], "upperdeck:ended");
    // Another manager knows of it. One that is started again ends anew, and its next end is saved, too; so is one that had
    // to wait because it was being saved.
    manager.stop().await?;
    let manager = site.manager().await?;
    let at = manager.address;
    let again = Session {
        started_ms: mine.started_ms + 1,
        ..mine
    };
    crate::site::submit(at, Who::Alice, &again.id, "by-hand").await?;
    agent.heartbeat(&with(&again)).await?;
    let by_hand = agent.claim().await?;
    agent.work(&by_hand).await?;
    let claim = agent.claim().await?;
    assert!(
        claim.order.destination.contains(":ended-20"),
        "{:?}",
        claim.order
    );
    agent.work(&claim).await?;
    until(at, Who::Alice, "/api/v1/saves?state=succeeded", all(3)).await?;
    let saves = get(at, Who::Administrator, "/api/v1/saves").await?;
    assert!(all(3)(&saves), "{saves}");
    manager.stop().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_decides_what_is_saved_when_it_ends_unless_the_pod_says_so() -> Outcomes {
    let running = |by_pod| Session {
        at_end: Some(EndWish {
            wanted: SaveEnded::Never,
            by_pod,
        }),
        ..session(1, Some("alice"))
    };
    let (_site, manager, agent) = Site::at_work(&[running(false)]).await?;
    let at = manager.address;
    let in_force = |when: &str, from: &str| {
        let expected = json!({"when": when, "from": from});
        move |shown: &Value| shown["sessions"][0]["save_on_end"] == expected
    };
    let sessions = "/api/v1/sessions";
    until(at, Who::Alice, sessions, in_force("never", "administrator")).await?;
    let path = "/api/v1/autosave";
    let put = async |who, body: Value| ask(at, who, Method::PUT, path, Some(body)).await;
    let (status, body) = put(Who::Alice, json!({"save_on_end": "failure"})).await?;
    assert_eq!(
        (status, &body["own"]),
        (StatusCode::OK, &json!({"save_on_end": "failure"}))
    );
    until(at, Who::Alice, sessions, in_force("failure", "user")).await?;
    agent.heartbeat(&[running(true)]).await?;
    until(at, Who::Alice, sessions, in_force("never", "pod")).await?;
    let (_, body) = put(Who::Bob, json!({"off": true, "save_on_end": "never"})).await?;
    assert_eq!(body["own"], json!({"off": true, "save_on_end": "never"}));
    let of_session = format!("/api/v1/sessions/{}/autosave", id(1));
    let body = json!({"off": true, "save_on_end": "always"});
    let (status, problem) = ask(at, Who::Alice, Method::PUT, &of_session, Some(body)).await?;
    assert_eq!(
        (status, &problem["field"]),
        (StatusCode::UNPROCESSABLE_ENTITY, &json!("save_on_end"))
    );
    let (status, _) = put(Who::Alice, json!({"save_on_end": "perhaps"})).await?;
    assert!(status.is_client_error(), "{status}");

    let now = |n, owner, save, by_pod, exit_code| {
        let end = SessionEnd {
            at_ms: Some(now_ms() + 1000),
            exit_code: Some(exit_code),
            save,
            by_pod,
            settled: true,
            ..SessionEnd::default()
        };
        Session {
            ended: Some(end),
            ..session(n, Some(owner))
        }
    };
    let before = ended(2, Some("alice"), false);
    let all = [
        before,
        now(3, "alice", false, false, 1),
        now(4, "alice", false, false, 0),
        now(5, "alice", false, true, 1),
        now(6, "bob", true, false, 1),
        now(7, "bob", true, true, 1),
    ];
    agent.heartbeat(&all).await?;
    let both = |shown: &Value| {
        let saves = shown["saves"].as_array().into_iter().flatten();
        let mut of: Vec<&str> = saves.filter_map(|save| save["session"].as_str()).collect();
        of.sort_unstable();
        of == [id(3), id(7)]
    };
    let saves = until(at, Who::Administrator, "/api/v1/saves", both).await?;
    assert_eq!(saves["saves"][0]["made_by"], "end");
    let shown = get(at, Who::Administrator, "/api/v1/sessions").await?;
    for session in shown["sessions"].as_array().into_iter().flatten() {
        let saved = session["id"] == id(3) || session["id"] == id(7);
        assert_eq!(session["ended"]["save"], saved, "{session}");
    }
    // Once, and nothing else in the rounds after that: the one that ended now is the last.
    let later = [&all[..], &[now(8, "alice", false, false, 1)]].concat();
    agent.heartbeat(&later).await?;
    until(at, Who::Administrator, "/api/v1/saves", |shown| {
        let saves = shown["saves"].as_array();
        saves.is_some_and(|saves| saves.iter().any(|save| save["session"] == id(8)))
    })
    .await?;
    let saves = get(at, Who::Administrator, "/api/v1/saves").await?;
    assert_eq!(saves["saves"].as_array().map(Vec::len), Some(3), "{saves}");
    manager.stop().await
}
