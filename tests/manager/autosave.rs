//! Sessions that are saved without being asked for while they run: when, by whom, and what becomes of the images.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::TcpListener;
use upperdeck::service::job::{
    AutosaveWish, Code, JobId, Look, NextSave, Outcome, Replaces, Saved, Session, SessionEnd,
    now_ms,
};
use upperdeck::service::manager::{AutosaveDefaults, Options};
use upperdeck::service::queue::{Claim, ClaimState};

use crate::site::{
    Agent, Manager, Outcomes, Site, Who, ask, empty_queue, get, id, session, submit, until,
};
use crate::store::push;

type Fallible<T> = Result<T, Box<dyn std::error::Error>>;

/// By how much the node's clock is behind.
const BEHIND_MS: i64 = 3_600_000;
/// Long after any save of a test.
const HOUR: Duration = Duration::from_secs(3600);

/// A session of alice in which so many entries changed, according to a look now.
fn changed(n: usize, entries: u64, after: Option<JobId>) -> Session {
    Session {
        next: Some(NextSave {
            delta: true,
            bytes: Some(0),
            entries: Some(entries),
            times_only: false,
            last_seconds: None,
        }),
        look: Some(Look {
            at_ms: now_ms() - BEHIND_MS,
            after,
        }),
        ..session(n, Some("alice"))
    }
}

/// Options of a manager that saves sessions by default.
fn options(site: &Site, every: Duration) -> Fallible<Options> {
    let mut options = site.options()?;
    options.autosave = AutosaveDefaults {
        every: Some(every),
        keep: 1,
        least: Duration::from_millis(1),
    };
    Ok(options)
}

async fn at_work(every: Duration, sessions: &[Session]) -> Fallible<(Site, Manager, Agent)> {
    let site = Site::new()?;
    let manager = site.manager_with(options(&site, every)?).await?;
    let agent = Agent::new(&site.queue, "a");
    agent.heartbeat(sessions).await?;
    Ok((site, manager, agent))
}

/// Claims an order while the node reports a session again and again: the queue forgets one of which it hears nothing.
async fn claim_of(agent: &Agent, session: impl Fn() -> Session) -> Fallible<Claim> {
    for _ in 0..120 {
        agent.heartbeat(&[session()]).await?;
        if let Some(claim) = agent.claim_now(Duration::from_millis(500)).await? {
            return Ok(claim);
        }
    }
    Err("no order".into())
}

fn list<'a>(shown: &'a Value, of: &str) -> &'a [Value] {
    shown[of].as_array().map(Vec::as_slice).unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_changed_is_saved_once_whichever_managers_run() -> Outcomes {
    let site = Site::new()?;
    let mut options = options(&site, Duration::from_millis(1))?;
    // Autosaves do not count for these.
    options.open_per_user = 1;
    options.saves_per_day = 1;
    let manager = site.manager_with(options.clone()).await?;
    let other = site.manager_with(options).await?;
    let at = manager.address;
    let agent = Agent::new(&site.queue, "a");
    let others = [
        changed(2, 0, None),
        session(3, Some("alice")),
        Session {
            ended: Some(SessionEnd::default()),
            ..changed(4, 1, None)
        },
        Session {
            owner: None,
            ..changed(5, 1, None)
        },
        Session {
            auxiliary: true,
            ..changed(6, 1, None)
        },
        Session {
            autosave: Some(AutosaveWish::Off),
            ..changed(7, 1, None)
        },
    ];
    let with = |some: &[Session]| [some, &others[..]].concat();
    let first = changed(1, 1, None);
    agent.heartbeat(&with(std::slice::from_ref(&first))).await?;
    let claim = agent.claim().await?;
    let order = &claim.order;
    assert!(order.autosave);
    assert_eq!(
        (&order.session, &order.replaces),
        (&id(1), &Replaces::Nothing)
    );
    assert!(
        order.destination.contains("/alice/pod-1:auto-20"),
        "{order:?}"
    );
    let save = get(at, Who::Alice, &format!("/api/v1/saves/{}", order.job)).await?;
    assert_eq!(save["made_by"], "autosave", "{save}");
    assert_eq!(save["message"], "autosave");
    agent.work(&claim).await?;
    until(at, Who::Alice, "/api/v1/saves?state=succeeded", |shown| {
        list(shown, "saves").len() == 1
    })
    .await?;
    // A look from before the end of the save says nothing, another session is saved meanwhile.
    let second = changed(8, 1, None);
    agent.heartbeat(&with(&[first, second])).await?;
    let another = agent.claim().await?;
    assert_eq!(another.order.session, id(8));
    agent.work(&another).await?;
    // The look after it does, though the node's clock is slow.
    let again = changed(1, 1, Some(claim.order.job));
    agent.heartbeat(&with(&[again])).await?;
    let third = agent.claim().await?;
    assert_eq!(third.order.session, id(1));
    agent.work(&third).await?;
    agent.heartbeat(&with(&[])).await?;
    let done = |shown: &Value| list(shown, "saves").len() == 3;
    until(at, Who::Alice, "/api/v1/saves?state=succeeded", done).await?;
    let all = get(at, Who::Administrator, "/api/v1/saves").await?;
    assert!(done(&all), "{all}");
    manager.stop().await?;
    other.stop().await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_was_started_again_with_a_slow_clock_delays_no_autosave() -> Outcomes {
    let (_site, manager, agent) = at_work(Duration::from_millis(1), &[changed(1, 1, None)]).await?;
    let first = agent.claim().await?;
    agent.work(&first).await?;
    let path = format!("/api/v1/saves/{}", first.order.job);
    until(manager.address, Who::Alice, &path, |save| {
        save["state"] == "succeeded"
    })
    .await?;
    // It does not know of the save, and its look is an hour earlier than that by its own clock.
    let second = claim_of(&agent, || changed(1, 1, None)).await?;
    assert_eq!(second.order.session, id(1));
    assert_ne!(second.order.job, first.order.job);
    manager.stop().await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_open_autosave_survives_the_manager_and_the_queue() -> Outcomes {
    let (site, manager, _) = at_work(HOUR, &[changed(1, 1, None)]).await?;
    let is_open = |shown: &Value| list(shown, "saves").len() == 1;
    until(
        manager.address,
        Who::Alice,
        "/api/v1/saves?state=open",
        is_open,
    )
    .await?;
    manager.stop().await?;
    let queue = empty_queue();
    let options = options(&site, HOUR)?;
    let manager = Box::pin(site.manager_on(options, queue.clone())).await?;
    let agent = Agent::new(&queue, "a");
    agent.heartbeat(&[changed(1, 1, None)]).await?;
    let claim = agent.claim().await?;
    assert!(claim.order.autosave);
    agent.work(&claim).await?;
    until(
        manager.address,
        Who::Alice,
        "/api/v1/saves?state=succeeded",
        is_open,
    )
    .await?;
    let all = get(manager.address, Who::Alice, "/api/v1/saves").await?;
    assert!(is_open(&all), "{all}");
    manager.stop().await
}

#[tokio::test(flavor = "multi_thread")]
async fn one_that_fails_is_shown_and_tried_again_when_the_next_is_due() -> Outcomes {
    let (_site, manager, agent) = at_work(HOUR, &[changed(1, 1, None)]).await?;
    let at = manager.address;
    let claim = agent.claim().await?;
    agent.begin(&claim).await?;
    let failed = Outcome::Failed {
        code: Code::RegistryUnavailable,
        message: "the registry refuses".to_owned(),
        retryable: false,
    };
    agent.end(&claim, 2, failed).await?;
    let shown = until(at, Who::Alice, "/api/v1/sessions", |shown| {
        shown["sessions"][0]["autosave"]["waits_for"].is_string()
    })
    .await?;
    let autosave = &shown["sessions"][0]["autosave"];
    assert_eq!(
        autosave["waits_for"], "the last one failed: the registry refuses",
        "{autosave}"
    );
    assert_eq!(
        (&autosave["every_minutes"], &autosave["keep"]),
        (&json!(60), &json!(1))
    );
    assert_eq!(
        (&autosave["from"], &autosave["last"]),
        (&json!("administrator"), &Value::Null)
    );
    manager.stop().await
}

/// Returns the lines of a save's audit log as actor and detail.
async fn audit(manager: &Manager, job: JobId) -> Fallible<Vec<(String, String)>> {
    let path = format!("/api/v1/saves/{job}/audit");
    let shown = get(manager.address, Who::Administrator, &path).await?;
    let text = |line: &Value, field: &str| line[field].as_str().unwrap_or_default().to_owned();
    let lines = list(&shown, "transitions").iter();
    Ok(lines
        .map(|line| (text(line, "actor"), text(line, "detail")))
        .collect())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_save_by_hand_goes_before_an_autosave_of_the_session() -> Outcomes {
    let (_site, manager, agent) =
        at_work(HOUR, &[changed(1, 1, None), changed(2, 1, None)]).await?;
    let at = manager.address;
    let two = |shown: &Value| list(shown, "saves").len() == 2;
    until(at, Who::Alice, "/api/v1/saves?state=open", two).await?;
    let sessions = get(at, Who::Alice, "/api/v1/sessions").await?;
    for session in list(&sessions, "sessions") {
        assert_eq!(
            session["save"],
            Value::Null,
            "nothing is in the way of a save"
        );
    }
    // One runs, the other one waits.
    let running = agent.claim().await?;
    agent.begin(&running).await?;
    let waiting = if running.order.session == id(1) { 2 } else { 1 };
    submit(at, Who::Alice, &id(waiting), "by-hand").await?;
    let session = running.order.session.clone();
    let by_hand = tokio::spawn(async move {
        let asked = submit(at, Who::Alice, &session, "by-hand-2").await;
        asked.map_err(|error| error.to_string())
    });
    while agent.renew(&running).await? != ClaimState::Cancelled {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(!by_hand.is_finished());
    agent.end(&running, 9, Outcome::Cancelled).await?;
    by_hand.await??;
    let lines = audit(&manager, running.order.job).await?;
    let why = "it makes way for a save that token:alice asked for";
    assert!(
        lines.contains(&("upperdeck:auto".to_owned(), why.to_owned())),
        "{lines:?}"
    );
    let cancelled = get(at, Who::Alice, "/api/v1/saves?state=cancelled").await?;
    assert!(two(&cancelled), "{cancelled}");
    for _ in 0..2 {
        let claim = agent.claim().await?;
        assert!(!claim.order.autosave);
        agent.work(&claim).await?;
    }
    manager.stop().await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_autosave_whose_tag_is_being_set_is_waited_for() -> Outcomes {
    let (_site, manager, agent) = at_work(HOUR, &[changed(1, 1, None)]).await?;
    let at = manager.address;
    let claim = agent.claim().await?;
    agent.begin(&claim).await?;
    agent.confirm(&claim).await?;
    let by_hand = tokio::spawn(async move {
        let asked = submit(at, Who::Alice, &id(1), "by-hand").await;
        asked.map_err(|error| error.to_string())
    });
    until(
        at,
        Who::Administrator,
        &format!("/api/v1/saves/{}/audit", claim.order.job),
        |shown| {
            let lines = list(shown, "transitions");
            lines
                .iter()
                .any(|line| line["actor"] == "upperdeck:auto" && line["from"] == "running")
        },
    )
    .await?;
    agent.end(&claim, 9, crate::site::succeeded()).await?;
    by_hand.await??;
    let done = get(
        at,
        Who::Alice,
        &format!("/api/v1/saves/{}", claim.order.job),
    )
    .await?;
    assert_eq!(done["state"], "succeeded");
    manager.stop().await
}

#[tokio::test(flavor = "multi_thread")]
async fn tags_of_autosaves_are_reserved() -> Outcomes {
    let (site, manager, _) = Site::at_work(&[session(1, Some("alice"))]).await?;
    let at = manager.address;
    let body = json!({"session": id(1), "image": {"name": "torch", "tag": "auto-1"}});
    let (status, problem) = ask(at, Who::Alice, Method::POST, "/api/v1/saves", Some(body)).await?;
    assert_eq!(
        (status, &problem["code"], &problem["field"]),
        (
            StatusCode::UNPROCESSABLE_ENTITY,
            &json!("invalid"),
            &json!("image.tag")
        )
    );
    push(&site, "alice", "torch", "v1", "one")?;
    let path = "/api/v1/images/torch/tags/v1";
    for keep in [false, true] {
        let body = json!({"tag": "auto-1", "keep": keep});
        let (status, problem) = ask(at, Who::Alice, Method::POST, path, Some(body)).await?;
        assert_eq!(
            (status, &problem["field"]),
            (StatusCode::UNPROCESSABLE_ENTITY, &json!("tag"))
        );
    }
    // What autosave made can get another tag.
    push(&site, "alice", "torch", "auto-2", "two")?;
    let path = "/api/v1/images/torch/tags/auto-2";
    let body = json!({"tag": "good", "keep": true});
    let (status, renamed) = ask(at, Who::Alice, Method::POST, path, Some(body)).await?;
    assert_eq!(status, StatusCode::OK, "{renamed}");
    manager.stop().await
}

#[tokio::test(flavor = "multi_thread")]
async fn users_set_what_applies_to_their_sessions() -> Outcomes {
    let (_site, manager, agent) = Site::at_work(&[session(1, Some("alice"))]).await?;
    let at = manager.address;
    let own = "/api/v1/autosave";
    let of_session = format!("/api/v1/sessions/{}/autosave", id(1));
    assert_eq!(
        get(at, Who::Alice, own).await?,
        json!({"default": null, "own": null, "min_minutes": 5})
    );
    let put =
        async |who, path: &str, body: Value| ask(at, who, Method::PUT, path, Some(body)).await;
    let shown = async || -> Fallible<Value> {
        let shown = get(at, Who::Alice, "/api/v1/sessions").await?;
        Ok(shown["sessions"][0]["autosave"].clone())
    };
    assert_eq!(shown().await?, Value::Null);
    let from = get(at, Who::Alice, "/api/v1/sessions").await?;
    assert_eq!(from["sessions"][0]["autosave_from"], "administrator");
    let (status, body) = put(Who::Alice, own, json!({"every_minutes": 30, "keep": 5})).await?;
    assert_eq!(
        (status, &body["own"]),
        (StatusCode::OK, &json!({"every_minutes": 30, "keep": 5}))
    );
    let policy = |minutes: u32, keep: u32, from: &str| json!({"every_minutes": minutes, "keep": keep, "from": from, "last": null, "waits_for": null});
    assert_eq!(shown().await?, policy(30, 5, "user"));
    // What a pod says goes before that, and what is set for the session before both; less than may be is raised.
    let of_pod = Session {
        autosave: Some(AutosaveWish::Every {
            minutes: 20,
            keep: None,
        }),
        ..session(1, Some("alice"))
    };
    agent.heartbeat(&[of_pod]).await?;
    until(at, Who::Alice, "/api/v1/sessions", |shown| {
        shown["sessions"][0]["autosave"] == policy(20, 12, "pod")
    })
    .await?;
    let (status, body) = put(Who::Alice, &of_session, json!({"every_minutes": 1})).await?;
    assert_eq!(
        (status, body),
        (
            StatusCode::OK,
            json!({"autosave": policy(5, 12, "session"), "from": "session"})
        )
    );
    let (_, body) = put(Who::Administrator, &of_session, json!({"off": true})).await?;
    assert_eq!(body, json!({"autosave": null, "from": "session"}));
    let listed = get(at, Who::Alice, "/api/v1/sessions").await?;
    assert_eq!(listed["sessions"][0]["autosave_from"], "session");
    let delete = async |path: &str| ask(at, Who::Alice, Method::DELETE, path, None).await;
    let (status, body) = delete(&of_session).await?;
    assert_eq!(
        (status, body),
        (
            StatusCode::OK,
            json!({"autosave": policy(20, 12, "pod"), "from": "pod"})
        )
    );
    let (_, body) = put(Who::Alice, own, json!({"off": true})).await?;
    assert_eq!(body["own"], json!({"off": true}));
    let (status, body) = delete(own).await?;
    assert_eq!((status, &body["own"]), (StatusCode::OK, &Value::Null));
    for (body, field) in [
        (json!({}), "every_minutes"),
        (json!({"every_minutes": 0}), "every_minutes"),
        (json!({"every_minutes": 10081}), "every_minutes"),
        (json!({"every_minutes": 30, "keep": 0}), "keep"),
        (json!({"every_minutes": 30, "keep": 101}), "keep"),
        (json!({"every_minutes": 30, "off": true}), "off"),
    ] {
        for path in [own, &of_session] {
            let (status, problem) = put(Who::Alice, path, body.clone()).await?;
            assert_eq!(
                (status, &problem["field"]),
                (StatusCode::UNPROCESSABLE_ENTITY, &json!(field)),
                "{path} {body}"
            );
        }
    }
    let (status, _) = put(Who::Bob, &of_session, json!({"off": true})).await?;
    assert_eq!(status, StatusCode::NOT_FOUND);
    let (status, _) = put(Who::Portal, own, json!({"off": true})).await?;
    assert!(status.is_client_error(), "{status}");
    manager.stop().await
}

/// Makes an autosave of the session, whose image has `text` in it. Returns its save and tag.
async fn make(
    site: &Site,
    manager: &Manager,
    agent: &Agent,
    before: Option<JobId>,
    text: &str,
) -> Fallible<(JobId, String)> {
    let claim = claim_of(agent, || changed(1, 1, before)).await?;
    let tag = claim
        .order
        .destination
        .rsplit(':')
        .next()
        .unwrap_or_default();
    let digest = push(site, "alice", "pod-1", tag, text)?;
    agent.begin(&claim).await?;
    agent.confirm(&claim).await?;
    let saved = Saved {
        digest: digest.to_string(),
        ..Saved::default()
    };
    agent.end(&claim, 9, Outcome::Succeeded { saved }).await?;
    let path = format!("/api/v1/saves/{}", claim.order.job);
    until(manager.address, Who::Alice, &path, |save| {
        save["state"] == "succeeded"
    })
    .await?;
    Ok((claim.order.job, tag.to_owned()))
}

#[tokio::test(flavor = "multi_thread")]
async fn images_that_are_not_needed_any_more_are_deleted_unless_their_owner_holds_on_to_them()
-> Outcomes {
    let hour = || now_ms() / 3_600_000;
    let begun = hour();
    let (site, manager, agent) = at_work(Duration::from_millis(1), &[]).await?;
    let at = manager.address;
    let fate = async |job: JobId| -> Fallible<Value> {
        let path = format!("/api/v1/saves/{job}");
        Ok(get(at, Who::Alice, &path).await?["image"].clone())
    };
    let (first, _) = make(&site, &manager, &agent, None, "one").await?;
    let (second, tag) = make(&site, &manager, &agent, Some(first), "two").await?;
    let path = format!("/api/v1/saves/{first}");
    let gone = |save: &Value| save["image"]["state"] == "deleted";
    // In another hour it would be the last one of its hour.
    if hour() != begun {
        return manager.stop().await;
    }
    let save = until(at, Who::Alice, &path, gone).await?;
    assert_eq!(save["image"]["caller"], "upperdeck:auto", "{save}");
    let pin = |digest: &Value| {
        format!(
            "/api/v1/images/pod-1/digests/{}",
            digest.as_str().unwrap_or_default()
        )
    };
    let shown = get(at, Who::Alice, &format!("/api/v1/saves/{second}")).await?;
    let path = pin(&shown["result"]["digest"]);
    let (status, body) = ask(
        at,
        Who::Alice,
        Method::PATCH,
        &path,
        Some(json!({"pinned": true})),
    )
    .await?;
    assert_eq!(status, StatusCode::OK, "{body}");
    // The tag of the third one names another image afterwards, which is not its own.
    let (third, third_tag) = make(&site, &manager, &agent, Some(second), "three").await?;
    push(&site, "alice", "pod-1", &third_tag, "by another tool")?;
    let (fourth, _) = make(&site, &manager, &agent, Some(third), "four").await?;
    let (_fifth, last_tag) = make(&site, &manager, &agent, Some(fourth), "five").await?;
    if hour() != begun {
        return manager.stop().await;
    }
    until(at, Who::Alice, &format!("/api/v1/saves/{fourth}"), gone).await?;
    assert_eq!(fate(second).await?["state"], "tagged");
    let replaced = until(at, Who::Alice, &format!("/api/v1/saves/{third}"), gone).await?;
    assert_eq!(replaced["image"]["caller"], Value::Null);
    let images = until(at, Who::Alice, "/api/v1/images", |shown| {
        shown["total"] == 3
    })
    .await?;
    let mut tags: Vec<&str> = list(&images, "images")
        .iter()
        .flat_map(|image| list(image, "tags"))
        .filter_map(|tag| tag["name"].as_str())
        .collect();
    tags.sort_unstable();
    let mut expected = [tag.as_str(), third_tag.as_str(), last_tag.as_str()];
    expected.sort_unstable();
    assert_eq!(tags, expected);
    manager.stop().await
}

/// A registry that says that it is one, and answers nothing else. Counts the requests that wait, and keeps the maximum.
async fn hanging_registry(most: Arc<AtomicUsize>) -> Fallible<SocketAddr> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let at = listener.local_addr()?;
    let waiting = Arc::new(AtomicUsize::new(0));
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (waiting, most) = (waiting.clone(), most.clone());
            tokio::spawn(async move {
                let mut stream = BufReader::new(stream);
                let mut first = String::new();
                while stream.read_line(&mut first).await.is_ok_and(|n| n > 0) {
                    if !first.contains(" /v2/ ") {
                        let now = waiting.fetch_add(1, Ordering::SeqCst) + 1;
                        most.fetch_max(now, Ordering::SeqCst);
                        // Until the client gives up.
                        let mut rest = Vec::new();
                        let _ = stream.read_to_end(&mut rest).await;
                        waiting.fetch_sub(1, Ordering::SeqCst);
                        return;
                    }
                    let mut line = String::new();
                    while stream.read_line(&mut line).await.is_ok_and(|n| n > 2) {
                        line.clear();
                    }
                    let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n";
                    if stream.get_mut().write_all(answer).await.is_err() {
                        return;
                    }
                    first.clear();
                }
            });
        }
    });
    Ok(at)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_hangs_is_asked_about_several_sessions_at_a_time() -> Outcomes {
    let most = Arc::new(AtomicUsize::new(0));
    let registry = hanging_registry(most.clone()).await?;
    let site = Site::new()?;
    let mut options = options(&site, HOUR)?;
    options.target = format!("{registry}/p/{{user}}/{{name}}:{{tag}}").parse()?;
    options.access.tls_verify = false;
    let manager = site.manager_with(options).await?;
    let agent = Agent::new(&site.queue, "a");
    let all: Vec<Session> = (1..=16).map(|n| changed(n, 1, None)).collect();
    agent.heartbeat(&all).await?;
    // They are accepted though the registry does not say which tags there are; their agents look again.
    let open = "/api/v1/saves?state=open&limit=500";
    until(manager.address, Who::Alice, open, |shown| {
        list(shown, "saves").len() == all.len()
    })
    .await?;
    let most = most.load(Ordering::SeqCst);
    assert!(most >= 4, "{most} at a time");
    manager.stop().await
}
