//! The timeline of a session in the API.

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use upperdeck::image::packages::Packages;
use upperdeck::service::job::{
    ChangedFile, Changes, JobId, Outcome, Saved, Session, SessionEnd, Since, Update, now_ms,
};
use upperdeck::service::record::{ImageKey, NoteChange, Record};

use crate::packages::added;
use crate::site::{Agent, Outcomes, Site, Who, ask, get, id, session, succeeded, until};

type Fallible<T> = Result<T, Box<dyn std::error::Error>>;

/// What the agent says of a save.
#[derive(Default)]
struct Told {
    changes: Option<Changes>,
    packages: Option<Packages>,
    base: &'static str,
}

/// Finishes the save that was asked for last, as a node would.
async fn finish(
    site: &Site,
    at: std::net::SocketAddr,
    agent: &Agent,
    told: Told,
) -> Fallible<JobId> {
    let claim = agent.claim().await?;
    agent.begin(&claim).await?;
    if let Some(packages) = told.packages {
        let update = Update::Packages { packages };
        agent.send_update(&claim, 2, update).await?;
    }
    let Outcome::Succeeded { saved } = succeeded() else {
        return Err("no success".into());
    };
    let job = claim.order.job;
    let digest = format!("sha256:{:0>64}", job.to_string().replace('-', ""));
    let saved = Saved {
        reference: format!("{}@{digest}", site.images().display()),
        digest,
        base_name: Some(told.base.to_owned()),
        changes: told.changes,
        ..saved
    };
    agent.end(&claim, 3, Outcome::Succeeded { saved }).await?;
    let path = format!("/api/v1/saves/{job}");
    until(at, Who::Administrator, &path, |save| {
        save["state"] == "succeeded"
    })
    .await?;
    Ok(job)
}

/// Saves session `n` for `who` as `NAME:TAG`.
async fn save(
    (site, at, agent): (&Site, std::net::SocketAddr, &Agent),
    (who, n): (Who, usize),
    (name, tag): (&str, &str),
    told: Told,
) -> Fallible<JobId> {
    let body = json!({"session": id(n), "image": {"name": name, "tag": tag}, "message": "m"});
    let (status, body) = ask(at, who, Method::POST, "/api/v1/saves", Some(body)).await?;
    assert_eq!(status, StatusCode::ACCEPTED, "{body}");
    finish(site, at, agent, told).await
}

fn tags(shown: &Value) -> Vec<&str> {
    let entries = shown["entries"].as_array();
    let entries = entries.into_iter().flatten();
    entries
        .map(|entry| entry["tag"].as_str().unwrap_or_default())
        .collect()
}

fn timeline(n: usize, query: &str) -> String {
    format!("/api/v1/sessions/{}/timeline{query}", id(n))
}

/// A session in the pod that JupyterHub gives alice every day.
fn of_alice(n: usize) -> Session {
    Session {
        pod: Some("jupyter-alice".to_owned()),
        ..session(n, Some("alice"))
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn saves_are_listed_with_what_changed_and_what_became_of_them() -> Outcomes {
    let all = [of_alice(1), session(2, Some("bob"))];
    let (site, manager, agent) = Site::at_work(&all).await?;
    let (at, work) = (manager.address, (&site, manager.address, &agent));
    assert_eq!(
        get(at, Who::Alice, &timeline(1, "")).await?,
        json!({"entries": []})
    );
    let largest = |path: &str| ChangedFile {
        path: path.to_owned(),
        bytes: 7,
    };
    let told = Told {
        packages: Some(added(&[("numpy", "2.0"), ("rich", "13")])),
        base: "scipy:1",
        ..Told::default()
    };
    let first = save(work, (Who::Alice, 1), ("mine", "v1"), told).await?;
    let changes = Changes {
        since: Since::Previous,
        entries: 14,
        files: 12,
        removed: 3,
        bytes: 4_100_000,
        largest: vec![largest("/home/a\u{1b}[31m"); 1000],
    };
    let told = Told {
        packages: Some(added(&[("numpy", "2.1"), ("httpx", "0.27")])),
        changes: Some(changes),
        base: "scipy:1",
    };
    let second = save(work, (Who::Alice, 1), ("mine", "v2"), told).await?;
    // Of another base, whose packages are not comparable.
    let told = Told {
        packages: Some(added(&[("numpy", "2.1")])),
        base: "scipy:2",
        ..Told::default()
    };
    save(work, (Who::Alice, 1), ("mine", "v3"), told).await?;
    save(work, (Who::Alice, 1), ("mine", "v4"), Told::default()).await?;
    let shown = get(at, Who::Alice, &timeline(1, "")).await?;
    assert_eq!(tags(&shown), ["v4", "v3", "v2", "v1"]);
    let entry = &shown["entries"][2];
    assert_eq!(entry["save"], json!(second));
    assert_eq!(
        (&entry["made_by"], &entry["session"], &entry["user"]),
        (&json!("user"), &json!(id(1)), &json!("alice"))
    );
    assert_eq!(entry["fate"]["state"], "tagged");
    assert_eq!(entry["message"], "m");
    assert_eq!(
        entry["reference"],
        format!("oci:{}/alice/mine:v2", site.images().display())
    );
    // What the node sent is bounded and escaped.
    let file = json!({"path": "/home/a\\u{1b}[31m", "bytes": 7});
    assert_eq!(
        entry["changes"],
        json!({"since": "previous", "entries": 14, "files": 12, "removed": 3, "bytes": 4_100_000,
            "largest": [file, file, file, file, file]})
    );
    assert_eq!(
        entry["packages"],
        json!({"added": 1, "removed": 1, "changed": 1, "some": ["+httpx 0.27", "numpy 2.0 → 2.1", "-rich 13"]})
    );
    for other in [0, 1, 3] {
        assert_eq!(shown["entries"][other]["packages"], Value::Null, "{other}");
    }
    assert_eq!(shown["entries"][3]["save"], json!(first));
    assert_eq!(shown["entries"][3]["changes"], Value::Null);

    // In pages, each compared with what is on the next.
    let page = get(at, Who::Alice, &timeline(1, "?limit=3")).await?;
    assert_eq!(tags(&page), ["v4", "v3", "v2"]);
    assert_eq!(page["entries"][2]["packages"]["added"], 1);
    let next = page["next"].as_str().ok_or("no next page")?;
    let query = format!("?limit=3&cursor={next}");
    let page = get(at, Who::Alice, &timeline(1, &query)).await?;
    assert_eq!((tags(&page), &page["next"]), (vec!["v1"], &Value::Null));
    for wrong in ["?limit=0", "?cursor=x", "?limit=501"] {
        let (status, _) = ask(at, Who::Alice, Method::GET, &timeline(1, wrong), None).await?;
        assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY, "{wrong}");
    }
    // Only who may see the session and its owner's saves.
    for (who, n, expected) in [
        (Who::Bob, 1, StatusCode::NOT_FOUND),
        (Who::Alice, 2, StatusCode::NOT_FOUND),
        (Who::Alice, 3, StatusCode::NOT_FOUND),
        (Who::Portal, 1, StatusCode::FORBIDDEN),
        (Who::Anonymous, 1, StatusCode::UNAUTHORIZED),
        (Who::Administrator, 1, StatusCode::OK),
        (Who::PortalFor("alice"), 1, StatusCode::OK),
    ] {
        let (status, body) = ask(at, who, Method::GET, &timeline(n, ""), None).await?;
        assert_eq!(status, expected, "{who:?} {n}: {body}");
    }
    // Its saves stay when it is removed, for those who may see them.
    agent.heartbeat(&[session(2, Some("bob"))]).await?;
    until(at, Who::Alice, "/api/v1/sessions", |shown| {
        shown["sessions"] == json!([])
    })
    .await?;
    for who in [Who::Alice, Who::Administrator, Who::PortalFor("alice")] {
        let shown = get(at, who, &timeline(1, "?limit=3")).await?;
        assert_eq!(tags(&shown), ["v4", "v3", "v2"], "{who:?}");
        let next = shown["next"].as_str().ok_or("no next page")?;
        let shown = get(at, who, &timeline(1, &format!("?cursor={next}"))).await?;
        assert_eq!(tags(&shown), ["v1"], "{who:?}");
    }
    for (who, n) in [(Who::Bob, 1), (Who::Alice, 3), (Who::Administrator, 3)] {
        let (status, body) = ask(at, who, Method::GET, &timeline(n, ""), None).await?;
        assert_eq!(status, StatusCode::NOT_FOUND, "{who:?} {n}: {body}");
    }
    manager.stop().await
}

#[tokio::test(flavor = "multi_thread")]
async fn yesterdays_session_of_the_same_name_is_part_of_it() -> Outcomes {
    let bobs = Session {
        owner: Some("bob".to_owned()),
        ..of_alice(3)
    };
    let other = session(4, Some("alice"));
    let all = [of_alice(1), bobs.clone(), other.clone()];
    let (site, manager, agent) = Site::at_work(&all).await?;
    let (at, work) = (manager.address, (&site, manager.address, &agent));
    let name = "jupyter-alice";
    save(work, (Who::Alice, 1), (name, "monday"), Told::default()).await?;
    save(work, (Who::Bob, 3), (name, "bobs"), Told::default()).await?;
    save(work, (Who::Alice, 4), ("pod-4", "else"), Told::default()).await?;
    // A repository whose name only begins in the same way.
    let longer = format!("{name}-2");
    save(work, (Who::Alice, 4), (&longer, "longer"), Told::default()).await?;
    let today = [of_alice(2), bobs.clone(), other.clone()];
    agent.heartbeat(&today).await?;
    until(at, Who::Alice, "/api/v1/sessions", |shown| {
        shown["sessions"].to_string().contains(&id(2))
    })
    .await?;
    let shown = get(at, Who::Alice, &timeline(2, "")).await?;
    assert_eq!(tags(&shown), ["monday"]);
    save(
        work,
        (Who::Alice, 2),
        ("chosen", "tuesday"),
        Told::default(),
    )
    .await?;
    let shown = get(at, Who::Alice, &timeline(2, "")).await?;
    assert_eq!(tags(&shown), ["tuesday", "monday"]);
    assert_eq!(tags(&get(at, Who::Bob, &timeline(3, "")).await?), ["bobs"]);
    // While both run, neither is the other's past; what has ended is.
    for (first, expected) in [
        (of_alice(1), vec!["tuesday"]),
        (
            Session {
                ended: Some(SessionEnd {
                    at_ms: Some(now_ms()),
                    ..SessionEnd::default()
                }),
                ..of_alice(1)
            },
            vec!["tuesday", "monday"],
        ),
    ] {
        let all = [first, of_alice(2), bobs.clone(), other.clone()];
        agent.heartbeat(&all).await?;
        until(at, Who::Alice, &timeline(2, ""), |shown| {
            tags(shown) == expected
        })
        .await?;
    }
    manager.stop().await
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_service_made_and_removed_itself_is_told_apart() -> Outcomes {
    let end = SessionEnd {
        at_ms: Some(now_ms() - 60_000),
        save: true,
        ..SessionEnd::default()
    };
    let ended = Session {
        ended: Some(end),
        ..of_alice(1)
    };
    let (site, manager, agent) = Site::at_work(&[ended]).await?;
    let (at, work) = (manager.address, (&site, manager.address, &agent));
    finish(&site, at, &agent, Told::default()).await?;
    save(work, (Who::Alice, 1), ("mine", "kept"), Told::default()).await?;
    save(work, (Who::Alice, 1), ("mine", "gone"), Told::default()).await?;
    save(work, (Who::Alice, 1), ("mine", "thinned"), Told::default()).await?;
    let shown = get(at, Who::Alice, &timeline(1, "")).await?;
    let made: Vec<_> = (0..4).map(|n| &shown["entries"][n]["made_by"]).collect();
    assert_eq!(made, ["user", "user", "user", "end"]);
    let record = Record::open(&site.place).await?;
    for (n, by) in [(0, "upperdeck:auto"), (1, "token:alice")] {
        let entry = &shown["entries"][n];
        let of = |field: &str| entry[field].as_str().unwrap_or_default().to_owned();
        record
            .removed("alice", &of("reference"), &of("digest"), by)
            .await?;
    }
    let digest = shown["entries"][2]["digest"].as_str().unwrap_or_default();
    let change = NoteChange {
        description: Some("the good one".to_owned()),
        pinned: Some(true),
        ..NoteChange::default()
    };
    let key = ImageKey::new("alice", "mine", digest);
    record.change_note(&key, &change, None).await?;
    let shown = get(at, Who::Alice, &timeline(1, "")).await?;
    assert_eq!(tags(&shown)[..2], ["gone", "kept"]);
    assert_eq!(shown["entries"][0]["fate"]["state"], "deleted");
    assert_eq!(
        (
            &shown["entries"][1]["pinned"],
            &shown["entries"][1]["message"]
        ),
        (&json!(true), &json!("the good one"))
    );
    let shown = get(at, Who::Alice, &timeline(1, "?removed=true")).await?;
    assert_eq!(tags(&shown)[..3], ["thinned", "gone", "kept"]);
    assert_eq!(shown["entries"][0]["fate"]["caller"], "upperdeck:auto");
    manager.stop().await
}
