//! The life of a save in the service: submission, repetition, cancellation, loss and recovery.

use std::time::Duration;

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use upperdeck::service::job::{
    Code, Event, Load, NextStep, Outcome, Question, Update, Verdict, WaitReason,
};
use upperdeck::service::queue::ClaimState;

use crate::site::{
    Agent, Events, Outcomes, PATIENCE, Site, Who, ask, empty_queue, get, id, request, session,
    submit, succeeded, until,
};

fn failed(retryable: bool) -> Outcome {
    Outcome::Failed {
        code: Code::RegistryUnavailable,
        message: "the registry answers 503 <script>alert(1)</script>".into(),
        retryable,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_request_is_one_save() -> Outcomes {
    let (_site, manager, agent) =
        Site::at_work(&[session(1, Some("alice")), session(2, Some("alice"))]).await?;
    let at = manager.address;
    let post = |session: usize, tag: &str, key: &str| {
        let body = json!({"session": id(session), "image": {"name": "torch", "tag": tag}});
        request(at, Who::Alice, Method::POST, "/api/v1/saves").map(|request| {
            request
                .header("Idempotency-Key", key.to_owned())
                .json(&body)
        })
    };
    let first = post(1, "v1", "key")?.send().await?;
    assert_eq!(first.status(), StatusCode::ACCEPTED);
    let first: Value = first.json().await?;
    for _ in 0..3 {
        let again = post(1, "v1", "key")?.send().await?;
        assert_eq!(again.status(), StatusCode::ACCEPTED);
        assert_eq!(again.json::<Value>().await?["id"], first["id"]);
    }
    let other = post(1, "v2", "key")?.send().await?;
    assert_eq!(other.status(), StatusCode::UNPROCESSABLE_ENTITY);
    assert_eq!(other.json::<Value>().await?["field"], "Idempotency-Key");
    // Without the key, or with another one, the session is busy, and the answer names the save.
    let busy = post(1, "v2", "other")?.send().await?;
    assert_eq!(busy.status(), StatusCode::CONFLICT);
    let busy: Value = busy.json().await?;
    assert_eq!(
        (&busy["code"], &busy["save"]),
        (&json!("conflict"), &first["id"])
    );
    let taken = post(2, "v1", "third")?.send().await?;
    assert_eq!(taken.status(), StatusCode::CONFLICT);
    assert_eq!(taken.json::<Value>().await?["save"], first["id"]);
    let sessions = get(at, Who::Alice, "/api/v1/sessions").await?;
    let marked = |n: usize| {
        let all = sessions["sessions"].as_array();
        all.and_then(|all| {
            all.iter()
                .find(|s| s["id"] == id(n))
                .map(|s| s["save"].clone())
        })
    };
    assert_eq!(
        (marked(1), marked(2)),
        (Some(first["id"].clone()), Some(json!(null)))
    );
    // The key survives the session.
    agent.heartbeat(&[]).await?;
    tokio::time::sleep(Duration::from_millis(1100)).await;
    assert_eq!(
        post(1, "v1", "key")?.send().await?.status(),
        StatusCode::ACCEPTED
    );
    manager.stop().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_has_so_many_open_saves() -> Outcomes {
    let site = Site::new()?;
    let mut options = site.options()?;
    options.open_per_user = 2;
    let manager = site.manager_with(options).await?;
    let at = manager.address;
    let agent = Agent::new(&site.queue, "a");
    let sessions: Vec<_> = (0..3).map(|n| session(n, Some("alice"))).collect();
    agent.heartbeat(&sessions).await?;
    submit(at, Who::Alice, &id(0), "v0").await?;
    submit(at, Who::Alice, &id(1), "v1").await?;
    let body = json!({"session": id(2), "image": {"name": "torch", "tag": "v2"}});
    let (status, body) = ask(at, Who::Alice, Method::POST, "/api/v1/saves", Some(body)).await?;
    assert_eq!(status, StatusCode::TOO_MANY_REQUESTS);
    assert_eq!(body["code"], "too_many");
    // Places are told to those who wait.
    until(at, Who::Alice, "/api/v1/saves", |saves| {
        saves["saves"][0]["place"] == 1 && saves["saves"][1]["place"] == 0
    })
    .await?;
    manager.stop().await
}

#[tokio::test(flavor = "multi_thread")]
async fn names_that_would_reach_elsewhere_are_refused_with_their_field() -> Outcomes {
    let (site, manager, agent) = Site::at_work(&[session(1, Some("alice"))]).await?;
    let at = manager.address;
    let long = "a".repeat(200);
    let hostile = [
        json!({"image": {"name": "../bob/torch"}}),
        json!({"image": {"name": "evil.example/x"}}),
        json!({"image": {"name": "a/b"}}),
        json!({"image": {"name": "UPPER"}}),
        json!({"image": {"name": ""}}),
        json!({"image": {"name": "a\u{0}"}}),
        json!({"image": {"name": long}}),
        json!({"image": {"name": "<img src=x>"}}),
        json!({"image": {"tag": "a/b"}}),
        json!({"image": {"tag": "a@sha256:b"}}),
        json!({"image": {"tag": "a:b"}}),
        json!({"image": {"tag": ""}}),
        json!({"image": {"tag": "-x"}}),
        json!({"image": {"tag": "latest"}}),
        json!({"image": {"tag": "sha256-abc"}}),
        json!({"image": {"tag": long}}),
        json!({"image": {"name": "x", "host": "evil.example"}}),
        json!({"message": "m".repeat(1001)}),
        json!({"message": "bell \u{7}"}),
        json!({"options": {"compression": "xz; rm -rf /"}}),
        json!({"options": {"exclude": ["--authfile=/etc/shadow"]}}),
        json!({"options": {"exclude": ["a\u{0}b"]}}),
        json!({"options": {"include_volumes": ["relative"]}}),
        json!({"options": {"labels": {"--x": "y"}}}),
        json!({"options": {"command": "id"}}),
        json!({"destination": "evil.example/x:1"}),
    ];
    for change in hostile {
        let mut body = json!({"session": id(1), "image": {"name": "torch", "tag": "v1"}});
        for (key, value) in change.as_object().ok_or("no object")? {
            match (
                body.get_mut(key).and_then(Value::as_object_mut),
                value.as_object(),
            ) {
                (Some(there), Some(more)) => there.extend(more.clone()),
                _ => body[key] = value.clone(),
            }
        }
        let (status, answer) =
            ask(at, Who::Alice, Method::POST, "/api/v1/saves", Some(body)).await?;
        assert_eq!(
            status,
            StatusCode::UNPROCESSABLE_ENTITY,
            "{change}: {answer}"
        );
        assert!(answer["field"].is_string(), "{change}: {answer}");
    }
    for which in [
        json!(""),
        json!({"namespace": "jupyter"}),
        json!(7),
        json!(null),
    ] {
        let body = json!({"session": which});
        let (status, answer) =
            ask(at, Who::Alice, Method::POST, "/api/v1/saves", Some(body)).await?;
        assert_eq!(
            status,
            StatusCode::UNPROCESSABLE_ENTITY,
            "{which}: {answer}"
        );
    }
    for path in [
        "/api/v1/saves/x",
        "/api/v1/saves/..%2f..",
        "/api/v1/images/..%2fbob/tags/v1",
    ] {
        let (status, _) = ask(at, Who::Alice, Method::DELETE, path, None).await?;
        assert!(matches!(status.as_u16(), 404 | 422), "{path}: {status}");
    }
    let saves = get(at, Who::Administrator, "/api/v1/saves").await?;
    assert_eq!(saves["saves"], json!([]));
    // The pod's name does as well as an ID, and what is not said is suggested.
    let body = json!({"session": {"namespace": "jupyter", "pod": "pod-1"}});
    let (status, answer) = ask(at, Who::Alice, Method::POST, "/api/v1/saves", Some(body)).await?;
    assert_eq!(status, StatusCode::ACCEPTED, "{answer}");
    assert_eq!(answer["name"], "pod-1");
    let order = agent.claim().await?.order;
    assert!(
        order
            .destination
            .starts_with(&format!("oci:{}/alice/pod-1:", site.images().display()))
    );
    assert_eq!((order.owner.as_str(), order.session), ("alice", id(1)));
    manager.stop().await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unwanted_save_ends_wherever_it_is() -> Outcomes {
    let (_site, manager, agent) = Site::at_work(&[session(1, Some("alice"))]).await?;
    let at = manager.address;
    // Waiting: at once.
    let job = submit(at, Who::Alice, &id(1), "v1").await?;
    let path = format!("/api/v1/saves/{job}");
    let (status, save) = ask(at, Who::Alice, Method::DELETE, &path, None).await?;
    assert_eq!(
        (status, &save["state"]),
        (StatusCode::OK, &json!("cancelled"))
    );
    assert!(agent.claim_now(Duration::from_millis(100)).await?.is_none());
    let (status, _) = ask(at, Who::Alice, Method::DELETE, &path, None).await?;
    assert_eq!(status, StatusCode::OK);
    // Running: the agent is told, and says when it is over.
    let job = submit(at, Who::Alice, &id(1), "v1").await?;
    let path = format!("/api/v1/saves/{job}");
    let claim = agent.claim().await?;
    agent.begin(&claim).await?;
    until(at, Who::Alice, &path, |save| save["state"] == "running").await?;
    let (status, save) = ask(at, Who::Alice, Method::DELETE, &path, None).await?;
    assert_eq!(
        (status, &save["cancelling"]),
        (StatusCode::ACCEPTED, &json!(true))
    );
    assert_eq!(agent.renew(&claim).await?, ClaimState::Cancelled);
    agent.end(&claim, 2, Outcome::Cancelled).await?;
    until(at, Who::Alice, &path, |save| save["state"] == "cancelled").await?;
    // Putting on its tag: too late.
    let job = submit(at, Who::Alice, &id(1), "v1").await?;
    let path = format!("/api/v1/saves/{job}");
    let claim = agent.claim().await?;
    agent.begin(&claim).await?;
    until(at, Who::Alice, &path, |save| save["state"] == "running").await?;
    assert_eq!(agent.confirm(&claim).await?, ClaimState::Held);
    let (status, error) = ask(at, Who::Alice, Method::DELETE, &path, None).await?;
    assert_eq!(
        (status, &error["code"]),
        (StatusCode::CONFLICT, &json!("too_late"))
    );
    agent.end(&claim, 2, succeeded()).await?;
    let save = until(at, Who::Alice, &path, |save| save["state"] == "succeeded").await?;
    assert_eq!(save["cancelling"], false);
    manager.stop().await
}

#[tokio::test(flavor = "multi_thread")]
async fn what_may_pass_is_tried_again_and_what_does_not_is_a_dead_letter() -> Outcomes {
    let (_site, manager, agent) = Site::at_work(&[session(1, Some("alice"))]).await?;
    let at = manager.address;
    let job = submit(at, Who::Alice, &id(1), "v1").await?;
    let path = format!("/api/v1/saves/{job}");
    let mut fence = 0;
    for attempt in 1..=3 {
        let claim = agent.claim().await?;
        assert_eq!(claim.order.attempt, attempt);
        assert!(claim.fence > fence);
        fence = claim.fence;
        agent.begin(&claim).await?;
        agent.end(&claim, 2, failed(true)).await?;
    }
    let save = until(at, Who::Alice, &path, |save| save["state"] == "failed").await?;
    assert_eq!(save["error"]["code"], "registry_unavailable");
    assert_eq!(save["error"]["retryable"], true);
    let dead = get(at, Who::Administrator, "/api/v1/dead").await?;
    assert_eq!(dead["saves"][0]["id"], job.to_string());
    let again = format!("{path}/requeue");
    let (status, _) = ask(at, Who::Administrator, Method::POST, &again, None).await?;
    assert_eq!(status, StatusCode::ACCEPTED);
    let claim = agent.claim().await?;
    assert!(claim.fence > fence);
    agent.work(&claim).await?;
    until(at, Who::Alice, &path, |save| save["state"] == "succeeded").await?;
    let dead = get(at, Who::Administrator, "/api/v1/dead").await?;
    assert_eq!(dead["saves"], json!([]));
    let audit = get(at, Who::Administrator, &format!("{path}/audit")).await?;
    let actors: Vec<_> = audit["transitions"]
        .as_array()
        .ok_or("none")?
        .iter()
        .map(|line| line["actor"].as_str().unwrap_or_default())
        .collect();
    assert!(
        actors.contains(&"token:alice")
            && actors.contains(&"node:n1")
            && actors.contains(&"token:root")
    );
    // A drained agent gives back: no failure.
    agent.heartbeat(&[session(2, Some("alice"))]).await?;
    tokio::time::sleep(Duration::from_millis(1100)).await;
    let job = submit(at, Who::Alice, &id(2), "v2").await?;
    let path = format!("/api/v1/saves/{job}");
    for _ in 0..5 {
        let claim = agent.claim().await?;
        agent.send_update(&claim, 0, Update::Assigned).await?;
        agent.give_back(&claim, 1).await?;
    }
    let claim = agent.claim().await?;
    agent.work(&claim).await?;
    until(at, Who::Alice, &path, |save| save["state"] == "succeeded").await?;
    manager.stop().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_queue_that_forgot_everything_gets_it_back_from_the_record() -> Outcomes {
    let sessions: Vec<_> = (0..30).map(|n| session(n, Some("alice"))).collect();
    let (site, manager, agent) = Site::at_work(&sessions).await?;
    let at = manager.address;
    let mut jobs = Vec::new();
    for (n, session) in sessions.iter().enumerate() {
        jobs.push(submit(at, Who::Alice, &session.id, &format!("v{n}")).await?);
    }
    // Ten are running, one has just been given to its agent, the others wait.
    let mut fences = std::collections::HashMap::new();
    for n in 0..11 {
        let claim = agent.claim().await?;
        if n < 10 {
            agent.begin(&claim).await?;
        }
        fences.insert(claim.order.job, claim.fence);
    }
    until(
        at,
        Who::Alice,
        "/api/v1/saves?state=running&limit=100",
        |saves| saves["saves"].as_array().is_some_and(|all| all.len() == 10),
    )
    .await?;
    manager.stop().await?;
    let empty = empty_queue();
    let manager = site.manager_on(site.options()?, empty.clone()).await?;
    let at = manager.address;
    let agent = Agent::new(&empty, "b");
    agent.heartbeat(&sessions).await?;
    let mut done = std::collections::BTreeSet::new();
    for _ in 0..30 {
        let claim = agent.claim().await?;
        let before = fences.get(&claim.order.job).copied();
        // What never said a word is not in the record; what did has a greater fence now.
        if claim.order.attempt > 1 {
            assert!(
                Some(claim.fence) > before,
                "{} after {before:?}",
                claim.fence
            );
        }
        assert!(done.insert(claim.order.job), "offered twice");
        agent.work(&claim).await?;
    }
    assert_eq!(done, jobs.into_iter().collect());
    until(
        at,
        Who::Alice,
        "/api/v1/saves?state=succeeded&limit=100",
        |saves| saves["saves"].as_array().is_some_and(|all| all.len() == 30),
    )
    .await?;
    assert!(agent.claim_now(Duration::from_millis(500)).await?.is_none());
    manager.stop().await
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_stays_running_without_a_lease() -> Outcomes {
    let (site, manager, agent) = Site::at_work(&[session(1, Some("alice"))]).await?;
    let at = manager.address;
    let job = submit(at, Who::Alice, &id(1), "v1").await?;
    let path = format!("/api/v1/saves/{job}");
    let claim = agent.claim().await?;
    agent.begin(&claim).await?;
    until(at, Who::Alice, &path, |save| save["state"] == "running").await?;
    // The agent is killed: its lease ends.
    let save = until(at, Who::Alice, &path, |save| save["state"] == "queued").await?;
    assert_eq!(save["started"], json!(null));
    // It is started again and takes back what it held.
    let again = Agent::new(&site.queue, "a2");
    let claims = site.queue.reclaim("n1", "a2").await?;
    assert_eq!(claims.len(), 1);
    assert!(claims[0].fence > claim.fence);
    // A word of the dead one is not heard any more.
    assert_eq!(
        agent.send_update(&claim, 2, Update::Started).await?,
        ClaimState::Lost
    );
    again.work(&claims[0]).await?;
    until(at, Who::Alice, &path, |save| save["state"] == "succeeded").await?;
    manager.stop().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_node_ends_its_saves_and_a_save_that_waits_too_long_ends() -> Outcomes {
    let site = Site::new()?;
    let mut options = site.options()?;
    options.node_lost = Duration::from_millis(1500);
    let manager = site.manager_with(options).await?;
    let at = manager.address;
    let agent = Agent::new(&site.queue, "a");
    agent
        .heartbeat(&[session(1, Some("alice")), session(2, Some("alice"))])
        .await?;
    let running = submit(at, Who::Alice, &id(1), "v1").await?;
    let claim = agent.claim().await?;
    agent.begin(&claim).await?;
    let waiting = submit(at, Who::Alice, &id(2), "v2").await?;
    for job in [running, waiting] {
        let path = format!("/api/v1/saves/{job}");
        let save = until(at, Who::Alice, &path, |save| save["state"] == "failed").await?;
        assert_eq!(save["error"]["code"], "node_lost");
    }
    // The queue has forgotten the one that waited: no agent begins it later.
    assert!(agent.claim_now(Duration::from_millis(300)).await?.is_none());
    manager.stop().await?;
    let site = Site::new()?;
    let mut options = site.options()?;
    options.order_expiry = Duration::from_millis(500);
    let manager = site.manager_with(options).await?;
    let at = manager.address;
    Agent::new(&site.queue, "a")
        .heartbeat(&[session(1, Some("alice"))])
        .await?;
    let job = submit(at, Who::Alice, &id(1), "v1").await?;
    let path = format!("/api/v1/saves/{job}");
    let save = until(at, Who::Alice, &path, |save| save["state"] == "failed").await?;
    assert_eq!(save["error"]["code"], "timed_out");
    manager.stop().await
}

#[tokio::test(flavor = "multi_thread")]
async fn figures_and_readiness_are_told() -> Outcomes {
    let (_site, manager, agent) = Site::at_work(&[session(1, Some("alice"))]).await?;
    let at = manager.address;
    let job = submit(at, Who::Alice, &id(1), "v1").await?;
    let claim = agent.claim().await?;
    agent.work(&claim).await?;
    let path = format!("/api/v1/saves/{job}");
    until(at, Who::Alice, &path, |save| save["state"] == "succeeded").await?;
    // The record is a moment ahead of the figures.
    let begun = std::time::Instant::now();
    let mut text = String::new();
    while !text.contains("upperdeck_save_pause_seconds_count 1") && begun.elapsed() < PATIENCE {
        let answer = request(at, Who::Anonymous, Method::GET, "/metrics")?
            .send()
            .await?;
        text = answer.text().await?;
    }
    for line in [
        "upperdeck_saves_accepted_total 1",
        "upperdeck_saves_ended_total{state=\"succeeded\",code=\"\"} 1",
        "upperdeck_save_pause_seconds_count 1",
        "upperdeck_save_layer_bytes_total 1",
        "upperdeck_http_requests_total{method=\"POST\",path=\"/api/v1/saves\",status=\"202\"} 1",
        "upperdeck_build_info{",
        "upperdeck_watchers 0",
    ] {
        assert!(text.contains(line), "{line} is not in\n{text}");
    }
    let ready = get(at, Who::Anonymous, "/readyz").await?;
    assert_eq!(ready, json!({"ready": true, "missing": []}));
    let nodes = get(at, Who::Administrator, "/api/v1/nodes").await?;
    assert_eq!(
        (&nodes["nodes"][0]["name"], &nodes["nodes"][0]["alive"]),
        (&json!("n1"), &json!(true))
    );
    manager.stop().await
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_running_save_waits_for_is_shown_and_told_until_it_is_over() -> Outcomes {
    let sessions = [session(1, Some("alice"))];
    let (_site, manager, agent) = Site::at_work(&sessions).await?;
    let at = manager.address;
    let busy = Load {
        cores: 4,
        cpu_pressure: Some(90.0),
        background: true,
        ..Load::default()
    };
    agent.heartbeat_with(&sessions, busy).await?;
    let job = submit(at, Who::Alice, &id(1), "v1").await?;
    let path = format!("/api/v1/saves/{job}");
    let claim = agent.claim().await?;
    agent.begin(&claim).await?;
    let mut events = Events::of(at, Who::Alice, job, None).await?;
    let says = |reason, seconds| Update::Event {
        event: Event::Waiting { reason, seconds },
    };
    let mut seq = 1;
    for (reason, seconds, shown) in [
        (Some(WaitReason::Writers), None, "writers"),
        (Some(WaitReason::Registry), Some(600.0), "registry"),
        (Some(WaitReason::OtherSave), None, "other_save"),
        // What follows from the node's load again.
        (None, None, "cores"),
    ] {
        seq += 1;
        agent
            .send_update(&claim, seq, says(reason, seconds))
            .await?;
        let save = until(at, Who::Alice, &path, |save| {
            save["waiting"]["reason"] == shown
        })
        .await?;
        assert_eq!(
            (&save["waiting"]["node"], &save["state"]),
            (&json!("n1"), &json!("running"))
        );
        assert_eq!(
            save["waiting"]["until"].is_string(),
            seconds.is_some(),
            "{save}"
        );
        while events.next().await?.ok_or("the stream has ended")?.data["waiting"]["reason"] != shown
        {
        }
    }
    // A pause that is over without a word of it is not shown for ever.
    agent
        .send_update(
            &claim,
            seq + 1,
            says(Some(WaitReason::Registry), Some(0.001)),
        )
        .await?;
    until(at, Who::Alice, &path, |save| {
        save["waiting"]["reason"] == "cores"
    })
    .await?;
    agent
        .send_update(&claim, seq + 2, says(Some(WaitReason::Writers), None))
        .await?;
    agent.end(&claim, seq + 3, succeeded()).await?;
    let save = until(at, Who::Alice, &path, |save| save["state"] == "succeeded").await?;
    assert_eq!(save["waiting"], json!(null));
    manager.stop().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_save_is_hurried_by_its_owner_where_the_node_allows_it() -> Outcomes {
    let sessions = [session(1, Some("alice"))];
    let (site, manager, agent) = Site::at_work(&sessions).await?;
    let at = manager.address;
    let job = submit(at, Who::Alice, &id(1), "v1").await?;
    let path = format!("/api/v1/saves/{job}");
    let hurry = format!("{path}/hurry");
    let claim = agent.claim().await?;
    agent.begin(&claim).await?;
    let save = until(at, Who::Alice, &path, |save| save["state"] == "running").await?;
    assert_eq!(
        (&save["can_hurry"], &save["hurried"]),
        (&json!(false), &json!(false))
    );
    let (status, error) = ask(at, Who::Alice, Method::POST, &hurry, None).await?;
    assert_eq!(
        (status, &error["code"]),
        (StatusCode::FORBIDDEN, &json!("not_permitted"))
    );
    assert_eq!(agent.renew(&claim).await?, ClaimState::Held);

    let busy = Load {
        cores: 4,
        cpu_pressure: Some(90.0),
        background: true,
        hurry: true,
        ..Load::default()
    };
    agent.heartbeat_with(&sessions, busy).await?;
    let save = until(at, Who::Alice, &path, |save| save["can_hurry"] == true).await?;
    assert_eq!(save["waiting"]["reason"], "cores");
    // Not by others.
    let (status, _) = ask(at, Who::Bob, Method::POST, &hurry, None).await?;
    assert_eq!(status, StatusCode::NOT_FOUND);
    assert_eq!(agent.renew(&claim).await?, ClaimState::Held);
    for _ in 0..2 {
        let (status, save) = ask(at, Who::Alice, Method::POST, &hurry, None).await?;
        assert_eq!(
            (status, &save["hurried"]),
            (StatusCode::ACCEPTED, &json!(true))
        );
        assert_eq!(
            (&save["can_hurry"], &save["waiting"]),
            (&json!(false), &json!(null))
        );
    }
    let begun = std::time::Instant::now();
    while agent.renew(&claim).await? != ClaimState::Hurried {
        assert!(
            begun.elapsed() < Duration::from_secs(60),
            "the agent is not told"
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    // The managers' answer is from the record, and so is the next attempt.
    let ask_manager = |before| {
        let question = Question::new(job, "n1", 1, claim.fence, before);
        let queue = agent.queue.clone();
        async move { queue.ask(&question, Duration::from_secs(30)).await }
    };
    let answer = ask_manager(NextStep::Hurry).await?.ok_or("no answer")?;
    assert_eq!(answer.verdict, Verdict::Wanted);
    agent.give_back(&claim, 2).await?;
    let claim = agent.claim().await?;
    while agent.renew(&claim).await? != ClaimState::Hurried {
        assert!(
            begun.elapsed() < Duration::from_secs(90),
            "the next attempt is not told"
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    agent.end(&claim, 3, succeeded()).await?;
    until(at, Who::Alice, &path, |save| save["state"] == "succeeded").await?;
    let (status, error) = ask(at, Who::Alice, Method::POST, &hurry, None).await?;
    assert_eq!(
        (status, &error["code"]),
        (StatusCode::CONFLICT, &json!("too_late"))
    );
    drop(site);
    manager.stop().await
}
