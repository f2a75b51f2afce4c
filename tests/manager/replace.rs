//! A save never takes the tag of another save unless the request says so.

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use upperdeck::common::digest::Digest;
use upperdeck::service::job::{Code, JobId, NextStep, Outcome, Question, Replaces, Verdict};

use crate::site::{Agent, Outcomes, PATIENCE, Site, Who, ask, get, id, session, until};
use crate::store::{push, save_as};

/// Requests a save of session `n` as `torch:v1`.
async fn request(
    at: std::net::SocketAddr,
    n: usize,
    replace: Option<&str>,
) -> Result<(StatusCode, Value), Box<dyn std::error::Error>> {
    let mut body = json!({"session": id(n), "image": {"name": "torch", "tag": "v1"}});
    if let Some(replace) = replace {
        body["replace"] = json!(replace);
    }
    ask(at, Who::Alice, Method::POST, "/api/v1/saves", Some(body)).await
}

/// Checks what the order of an accepted save says, and cancels the save.
async fn check_order(
    at: std::net::SocketAddr,
    agent: &Agent,
    answer: &Value,
    expected: &Replaces,
) -> Outcomes {
    let claim = agent.claim().await?;
    assert_eq!(claim.order.job.to_string(), answer["id"]);
    assert_eq!(&claim.order.replaces, expected);
    let path = format!("/api/v1/saves/{}", claim.order.job);
    ask(at, Who::Alice, Method::DELETE, &path, None).await?;
    let cancelled = Outcome::Cancelled;
    agent.end(&claim, 2, cancelled).await?;
    until(at, Who::Alice, &path, |save| save["state"] == "cancelled").await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_existing_tag_is_refused_unless_replace_is_said() -> Outcomes {
    let (site, manager, agent) =
        Site::at_work(&[session(1, Some("alice")), session(2, Some("alice"))]).await?;
    let at = manager.address;
    // A free tag needs no word, and the order holds the agent to it.
    let (status, answer) = request(at, 1, None).await?;
    assert_eq!(status, StatusCode::ACCEPTED, "{answer}");
    check_order(at, &agent, &answer, &Replaces::Nothing).await?;
    let digest = push(&site, "alice", "torch", "v1", "one")?;
    let job = save_as(&site, at, &agent, 1, "v1", &digest).await?;
    let other = Digest::of("another").to_string();
    let refused = [
        (1, None),
        (2, None),
        (1, Some("never")),
        (2, Some("own")),
        (1, Some(other.as_str())),
    ];
    for (n, replace) in refused {
        let (status, answer) = request(at, n, replace).await?;
        assert_eq!(status, StatusCode::CONFLICT, "{n} {replace:?}: {answer}");
        let error = &answer;
        assert_eq!(error["code"], "tag_exists");
        let existing = &error["existing"];
        assert_eq!(existing["digest"], digest.to_string());
        assert_eq!(existing["user"], "alice");
        assert_eq!(existing["save"], job.to_string());
        assert_eq!(existing["session"], id(1));
        assert_eq!(existing["session_name"], "jupyter/pod-1/notebook");
        assert!(existing["saved"].is_string(), "{existing}");
    }
    let seen = digest.to_string();
    for (n, replace, expected) in [
        (1, "own", Replaces::Image(digest)),
        (2, seen.as_str(), Replaces::Image(digest)),
        (2, "any", Replaces::Any),
    ] {
        let (status, answer) = request(at, n, Some(replace)).await?;
        assert_eq!(status, StatusCode::ACCEPTED, "{replace}: {answer}");
        check_order(at, &agent, &answer, &expected).await?;
    }
    let (status, answer) = request(at, 1, Some("yes")).await?;
    assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY);
    assert_eq!(answer["field"], "replace", "{answer}");
    manager.stop().await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_that_no_save_made_is_not_replaced_either() -> Outcomes {
    let (site, manager, _agent) = Site::at_work(&[session(1, Some("alice"))]).await?;
    let at = manager.address;
    let digest = push(&site, "alice", "torch", "v1", "by hand")?;
    for replace in [None, Some("own")] {
        let (status, answer) = request(at, 1, replace).await?;
        assert_eq!(status, StatusCode::CONFLICT, "{answer}");
        let existing = &answer["existing"];
        assert_eq!(existing["digest"], digest.to_string());
        assert_eq!(existing["save"], json!(null));
    }
    manager.stop().await
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_of_one_base_and_one_minute_get_names_of_their_own() -> Outcomes {
    let sessions = [session(1, Some("alice")), session(2, Some("alice"))];
    let (site, manager, agent) = Site::at_work(&sessions).await?;
    let at = manager.address;
    let post = async |n: usize| {
        let body = json!({"session": id(n)});
        ask(at, Who::Alice, Method::POST, "/api/v1/saves", Some(body)).await
    };
    let mut targets = Vec::new();
    for n in [1, 2, 1, 1] {
        let (status, save) = post(n).await?;
        assert_eq!(status, StatusCode::ACCEPTED, "{save}");
        let (name, tag) = (save["name"].as_str(), save["tag"].as_str());
        let (name, tag) = (name.ok_or("no name")?, tag.ok_or("no tag")?);
        assert_eq!(name, format!("pod-{n}"));
        targets.push(save["target"].clone());
        let claim = agent.claim().await?;
        assert_eq!(claim.order.replaces, Replaces::Nothing);
        // Its image is there, so the next save of this minute finds the suggestion taken.
        push(&site, "alice", name, tag, "x")?;
        agent.work(&claim).await?;
        let path = format!("/api/v1/saves/{}", claim.order.job);
        until(at, Who::Alice, &path, |save| save["state"] == "succeeded").await?;
    }
    let different: std::collections::BTreeSet<_> = targets.iter().map(Value::to_string).collect();
    assert_eq!(different.len(), targets.len(), "{targets:?}");
    manager.stop().await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_history_says_what_became_of_each_image() -> Outcomes {
    let sessions = [session(1, Some("alice")), session(2, Some("alice"))];
    let (site, manager, agent) = Site::at_work(&sessions).await?;
    let at = manager.address;
    let image = async |job: JobId| {
        let save = get(at, Who::Alice, &format!("/api/v1/saves/{job}")).await?;
        Ok::<_, Box<dyn std::error::Error>>(save["image"].clone())
    };
    let one = push(&site, "alice", "torch", "v1", "one")?;
    let first = save_as(&site, at, &agent, 1, "v1", &one).await?;
    assert_eq!(image(first).await?["state"], "tagged");
    let two = push(&site, "alice", "torch", "v1", "two")?;
    let second = save_as(&site, at, &agent, 2, "v1", &two).await?;
    let fate = image(first).await?;
    assert_eq!(fate["state"], "replaced");
    assert_eq!(fate["save"], second.to_string());
    assert_eq!(fate["session_name"], "jupyter/pod-2/notebook");
    assert!(fate["at"].is_string());
    assert_eq!(image(second).await?["state"], "tagged");
    let tag = "/api/v1/images/torch/tags/v1";
    let (status, _) = ask(at, Who::Alice, Method::DELETE, tag, None).await?;
    assert_eq!(status, StatusCode::OK);
    let fate = image(second).await?;
    assert_eq!(fate["state"], "deleted");
    assert_eq!(fate["caller"], "token:alice");
    let saves = get(at, Who::Alice, "/api/v1/saves").await?;
    assert_eq!(saves["saves"][0]["image"]["state"], "deleted");
    assert_eq!(saves["saves"][1]["image"]["state"], "replaced");
    manager.stop().await
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_pinned_stays_and_what_is_shared_is_seen_and_not_changed() -> Outcomes {
    let (site, manager, agent) = Site::at_work(&[session(1, Some("alice"))]).await?;
    let at = manager.address;
    let digest = push(&site, "alice", "torch", "v1", "one")?;
    save_as(&site, at, &agent, 1, "v1", &digest).await?;
    let path = format!("/api/v1/images/torch/digests/{digest}");
    let change = async |who, body: Value| ask(at, who, Method::PATCH, &path, Some(body)).await;
    let said =
        json!({"description": "for the paper", "pinned": true, "shared": ["bob", "alice", "bob"]});
    let (status, view) = change(Who::Alice, said).await?;
    assert_eq!(status, StatusCode::OK, "{view}");
    for view in [
        view,
        get(at, Who::Alice, "/api/v1/images").await?["images"][0].clone(),
    ] {
        assert_eq!(view["message"], "for the paper");
        assert_eq!(view["pinned"], true);
        assert_eq!(view["shared"], json!(["bob"]));
    }
    // Neither deleted nor replaced, whatever is said.
    let tag = "/api/v1/images/torch/tags/v1";
    for (status, answer) in [
        ask(at, Who::Alice, Method::DELETE, tag, None).await?,
        ask(at, Who::Alice, Method::DELETE, &path, None).await?,
        request(at, 1, Some("any")).await?,
        request(at, 1, Some(&digest.to_string())).await?,
    ] {
        assert_eq!(status, StatusCode::CONFLICT, "{answer}");
        assert_eq!(answer["code"], "image_pinned");
    }
    // The colleague sees it, not with whom else it is shared, and changes nothing.
    let shared = get(at, Who::Bob, "/api/v1/shared").await?;
    let seen = &shared["images"][0];
    assert_eq!(
        (&seen["user"], &seen["digest"], &seen["shared"]),
        (&json!("alice"), &json!(digest.to_string()), &json!([]))
    );
    assert_eq!(seen["tags"][0]["name"], "v1");
    for (path, method) in [(tag, Method::DELETE), (path.as_str(), Method::PATCH)] {
        let body = (method == Method::PATCH).then(|| json!({"pinned": false}));
        let own = ask(at, Who::Bob, method.clone(), path, body.clone()).await?;
        assert_eq!(own.0, StatusCode::NOT_FOUND, "{}", own.1);
        let others = format!("{path}?user=alice");
        let (status, _) = ask(at, Who::Bob, method, &others, body).await?;
        assert_eq!(status, StatusCode::FORBIDDEN);
    }
    let alices = get(at, Who::Alice, "/api/v1/shared").await?;
    assert_eq!(alices["images"], json!([]));
    // The colleague does not want it; only with whom it is shared can say so, and the owner can share it again.
    let declined = format!("/api/v1/shared/alice/torch/digests/{digest}");
    for (who, expected) in [
        (Who::Alice, StatusCode::NOT_FOUND),
        (Who::Bob, StatusCode::NO_CONTENT),
        (Who::Bob, StatusCode::NOT_FOUND),
    ] {
        let (status, answer) = ask(at, who, Method::DELETE, &declined, None).await?;
        assert_eq!(status, expected, "{who:?} {answer}");
    }
    let shared = get(at, Who::Bob, "/api/v1/shared").await?;
    assert_eq!(shared["images"], json!([]));
    let (_, again) = change(Who::Alice, json!({"shared": ["bob"]})).await?;
    assert_eq!(again["shared"], json!(["bob"]), "{again}");
    let shared = get(at, Who::Bob, "/api/v1/shared").await?;
    assert_eq!(shared["images"][0]["digest"], json!(digest.to_string()));
    for wrong in [
        json!({"description": "x".repeat(1001)}),
        json!({"description": "bell \u{7}"}),
        json!({"shared": [""]}),
        json!({"shared": vec!["u"; 51]}),
        json!({"owner": "bob"}),
        json!([]),
    ] {
        let (status, answer) = change(Who::Alice, wrong).await?;
        assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY, "{answer}");
    }
    let (status, _) = change(Who::Alice, json!({"pinned": false, "shared": []})).await?;
    assert_eq!(status, StatusCode::OK);
    let shared = get(at, Who::Bob, "/api/v1/shared").await?;
    assert_eq!(shared["images"], json!([]));
    let (status, _) = ask(at, Who::Alice, Method::DELETE, tag, None).await?;
    assert_eq!(status, StatusCode::OK);
    manager.stop().await
}

/// An image that is pinned after a save was accepted is not replaced by it, nor by another attempt.
#[tokio::test(flavor = "multi_thread")]
async fn a_pin_counts_until_the_tag_is_written() -> Outcomes {
    let (site, manager, agent) = Site::at_work(&[session(1, Some("alice"))]).await?;
    let at = manager.address;
    let digest = push(&site, "alice", "torch", "v1", "one")?;
    save_as(&site, at, &agent, 1, "v1", &digest).await?;
    let pin = async |pinned: bool| {
        let path = format!("/api/v1/images/torch/digests/{digest}");
        let body = json!({"pinned": pinned});
        let (status, answer) = ask(at, Who::Alice, Method::PATCH, &path, Some(body)).await?;
        assert_eq!(status, StatusCode::OK, "{answer}");
        Ok::<_, Box<dyn std::error::Error>>(())
    };
    for replace in ["own", "any"] {
        let (status, answer) = request(at, 1, Some(replace)).await?;
        assert_eq!(status, StatusCode::ACCEPTED, "{answer}");
        let claim = agent.claim().await?;
        agent.begin(&claim).await?;
        let word = async |replaces: Option<Digest>| {
            let (job, attempt) = (claim.order.job, claim.order.attempt);
            let mut question = Question::new(job, "n1", attempt, claim.fence, NextStep::Tag);
            question.replaces = replaces;
            let answer = site.queue.ask(&question, PATIENCE).await?;
            Ok::<_, Box<dyn std::error::Error>>(answer.ok_or("no answer")?.verdict)
        };
        assert_eq!(word(Some(digest)).await?, Verdict::Wanted, "{replace}");
        pin(true).await?;
        assert_eq!(word(Some(digest)).await?, Verdict::Pinned, "{replace}");
        let other = Digest::of("another");
        assert_eq!(word(Some(other)).await?, Verdict::Wanted, "{replace}");
        assert_eq!(word(None).await?, Verdict::Wanted, "{replace}");
        let failed = Outcome::Failed {
            code: Code::ImagePinned,
            message: "pinned".to_owned(),
            retryable: false,
        };
        agent.end(&claim, 2, failed).await?;
        let path = format!("/api/v1/saves/{}", claim.order.job);
        let save = until(at, Who::Alice, &path, |save| save["state"] == "failed").await?;
        assert_eq!(save["error"]["code"], "image_pinned", "{save}");
        let again = format!("{path}/requeue");
        let requeue = async || ask(at, Who::Administrator, Method::POST, &again, None).await;
        let (status, answer) = requeue().await?;
        assert_eq!(status, StatusCode::CONFLICT, "{answer}");
        assert_eq!(answer["code"], "image_pinned");
        pin(false).await?;
        let (status, answer) = requeue().await?;
        assert_eq!(status, StatusCode::ACCEPTED, "{answer}");
        let claim = agent.claim().await?;
        agent.begin(&claim).await?;
        let refused = Outcome::Failed {
            code: Code::Policy,
            message: "no".to_owned(),
            retryable: false,
        };
        agent.end(&claim, 2, refused).await?;
        until(at, Who::Alice, &path, |save| save["state"] == "failed").await?;
    }
    manager.stop().await
}

/// Where it is not known which image has the tag, that may be a pinned one.
#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_seen_is_not_deleted_and_not_replaced_again() -> Outcomes {
    let (site, manager, agent) = Site::at_work(&[session(1, Some("alice"))]).await?;
    let at = manager.address;
    push(&site, "alice", "torch", "v1", "one")?;
    let (status, answer) = request(at, 1, Some("any")).await?;
    assert_eq!(status, StatusCode::ACCEPTED, "{answer}");
    let claim = agent.claim().await?;
    agent.begin(&claim).await?;
    let failed = Outcome::Failed {
        code: Code::Policy,
        message: "no".to_owned(),
        retryable: false,
    };
    agent.end(&claim, 2, failed).await?;
    let path = format!("/api/v1/saves/{}", claim.order.job);
    until(at, Who::Alice, &path, |save| save["state"] == "failed").await?;
    std::fs::write(site.images().join("alice/torch/index.json"), "no index")?;
    let tag = "/api/v1/images/torch/tags/v1";
    for (status, answer) in [
        ask(at, Who::Alice, Method::DELETE, tag, None).await?,
        ask(
            at,
            Who::Administrator,
            Method::POST,
            &format!("{path}/requeue"),
            None,
        )
        .await?,
    ] {
        assert_eq!(status, StatusCode::SERVICE_UNAVAILABLE, "{answer}");
        let text = answer.to_string();
        assert!(text.contains("pinned is not known"), "{text}");
    }
    manager.stop().await
}
