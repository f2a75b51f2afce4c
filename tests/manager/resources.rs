//! `Save` resources: a manager acts for them, against a stand-in for the API server.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use upperdeck::service::manager::{Options, Resources};

use crate::kubernetes::{LAB, at_work, recorded, sessions};
use crate::kubernetes_api::ApiServer;
use crate::site::{Agent, Manager, Outcomes, PATIENCE, Site, Who, ask, http, succeeded};

const EXCHANGES: &str = include_str!("../../fixtures/kubernetes/saves.jsonl");

type Fallible<T> = Result<T, Box<dyn std::error::Error>>;

struct Setup {
    site: Site,
    server: ApiServer,
    manager: Manager,
    agent: Agent,
}

fn options(site: &Site, server: &ApiServer) -> Fallible<Options> {
    let kubeconfig = server.kubeconfig(site.dir.path(), "TOKEN-manager")?;
    let mut options = site.options()?;
    options.resources = Some(Resources {
        kubeconfig: Some(kubeconfig),
    });
    Ok(options)
}

impl Setup {
    async fn new() -> Fallible<Self> {
        let server = ApiServer::start(recorded()?).await?;
        let site = Site::new()?;
        let (manager, agent) = at_work(&site, options(&site, &server)?, &sessions(LAB)).await?;
        Ok(Self {
            site,
            server,
            manager,
            agent,
        })
    }

    fn create(&self, name: &str, spec: &Value) {
        self.server
            .with(|cluster| cluster.saves.create(LAB, name, spec, None));
    }

    /// Waits until the status of a resource satisfies `is`.
    async fn until(&self, name: &str, is: impl Fn(&Value) -> bool) -> Fallible<Value> {
        let begun = Instant::now();
        loop {
            let status = self.server.with(|cluster| cluster.saves.status(LAB, name));
            if is(&status) {
                return Ok(status);
            }
            if begun.elapsed() > PATIENCE {
                return Err(format!("the status of {name} stays {status}").into());
            }
            tokio::time::sleep(Duration::from_millis(30)).await;
        }
    }
}

/// What is compared of an object: the rest is the server's own.
fn of_object(object: &Value) -> [&Value; 4] {
    [
        &object["kind"],
        &object["metadata"]["name"],
        &object["spec"],
        &object["status"],
    ]
}

/// The exchanges of a manager with a real API server about one resource, from its creation to its deletion.
#[tokio::test]
async fn the_stand_in_tells_of_a_resource_as_a_real_api_server_did() -> Outcomes {
    let server = ApiServer::start(recorded()?).await?;
    let exchanges: Vec<Value> = EXCHANGES
        .lines()
        .map(serde_json::from_str)
        .collect::<Result<_, _>>()?;
    let of = |path: &str| format!("http://{}{path}", server.address);
    let watched = exchanges
        .iter()
        .find(|exchange| exchange["response"].is_array());
    let told = watched
        .and_then(|exchange| exchange["response"].as_array())
        .ok_or("no watch")?;
    let mut lines = http()?
        .get(of("/apis/upperdeck.io/v1alpha1/saves?watch=true"))
        .send()
        .await?;
    let spec = &told[0]["object"]["spec"];
    server.with(|cluster| cluster.saves.create(LAB, "monday", spec, None));
    let mut compared = 0;
    for exchange in &exchanges {
        let path = exchange["path"].as_str().ok_or("no path")?;
        let path = path.replace("/namespaces/lab/leases", "/namespaces/default/leases");
        if path.contains("watch=true") || path.ends_with("saves?&limit=500") {
            continue;
        }
        let method: reqwest::Method = exchange["method"].as_str().ok_or("no method")?.parse()?;
        let mut request = exchange["request"].clone();
        if method == reqwest::Method::PUT {
            // The version is the server's own.
            let now: Value = http()?.get(of(&path)).send().await?.json().await?;
            request["metadata"]["resourceVersion"] = now["metadata"]["resourceVersion"].clone();
        }
        let sent = http()?.request(method, of(&path));
        let sent = if request.is_null() {
            sent
        } else {
            sent.json(&request)
        };
        let answer = sent.send().await?;
        assert_eq!(
            json!(answer.status().as_u16()),
            exchange["status"],
            "{path}"
        );
        let body: Value = answer.json().await?;
        let expected = &exchange["response"];
        if path.contains("/saves/") {
            assert_eq!(of_object(&body)[2..], of_object(expected)[2..], "{path}");
        } else {
            assert_eq!(
                body["spec"]["holderIdentity"],
                expected["spec"]["holderIdentity"]
            );
        }
        compared += 1;
    }
    assert!(compared >= 6, "{compared}");
    let mut text = String::new();
    for expected in told {
        while !text.contains('\n') {
            text.push_str(std::str::from_utf8(
                &lines.chunk().await?.ok_or("the watch ended")?,
            )?);
        }
        let (line, rest) = text.split_once('\n').ok_or("no line")?;
        let event: Value = serde_json::from_str(line)?;
        assert_eq!(event["type"], expected["type"]);
        assert_eq!(of_object(&event["object"]), of_object(&expected["object"]));
        text = rest.to_owned();
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_pod_of_a_resource_is_saved() -> Outcomes {
    let setup = Setup::new().await?;
    let spec =
        json!({"pod": "nb", "image": "lab:monday", "message": "m", "ttlSecondsAfterFinished": 0});
    setup.create("monday", &spec);
    // The first is deleted at once after its end, so the end is looked at in another one.
    setup.create("tuesday", &json!({"pod": "nb3", "image": "lab:tuesday"}));
    let requested = |status: &Value| status["save"].is_string();
    let pending = setup.until("monday", requested).await?;
    setup.until("tuesday", requested).await?;
    let path = format!(
        "/api/v1/saves/{}",
        pending["save"].as_str().ok_or("no save")?
    );
    let at = setup.manager.address;
    let (_, save) = ask(at, Who::Alice, reqwest::Method::GET, &path, None).await?;
    assert_eq!(
        [&save["name"], &save["tag"], &save["message"]],
        [&json!("lab"), &json!("monday"), &json!("m")]
    );
    for _ in 0..2 {
        let claim = setup.agent.claim().await?;
        setup.agent.begin(&claim).await?;
        setup.agent.end(&claim, 2, succeeded()).await?;
    }
    let ended = setup
        .until("tuesday", |status| status["phase"] == "Succeeded")
        .await?;
    assert_eq!(
        [&ended["percent"], &ended["digest"]],
        [&json!(100), &json!("sha256:0")]
    );
    let condition = &ended["conditions"][0];
    assert_eq!(
        [
            &condition["type"],
            &condition["status"],
            &condition["reason"]
        ],
        ["Complete", "True", "Saved"]
    );
    let gone = || {
        setup
            .server
            .with(|cluster| !cluster.saves.has(LAB, "monday"))
    };
    setup.until("monday", |_| gone()).await?;
    assert!(
        setup
            .server
            .with(|cluster| cluster.saves.has(LAB, "tuesday"))
    );
    setup.manager.stop().await?;
    // The lease is given up at the end.
    assert_eq!(setup.server.with(|cluster| cluster.saves.holder()), None);
    drop(setup.site);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_saved_fails_and_names_the_reason() -> Outcomes {
    let setup = Setup::new().await?;
    setup.create("none", &json!({"pod": "none"}));
    setup.create("unowned", &json!({"pod": "nb2"}));
    setup.create("reserved", &json!({"pod": "nb", "image": "x:latest"}));
    // The pod of this name in another namespace is not meant, nor is the save of another.
    let other =
        json!({"session": {"namespace": LAB, "pod": "nb3"}, "image": {"name": "n", "tag": "t"}});
    let (status, other) = ask(
        setup.manager.address,
        Who::Administrator,
        reqwest::Method::POST,
        "/api/v1/saves",
        Some(other),
    )
    .await?;
    assert_eq!(status, 202, "{other}");
    let forged = json!({"phase": "Pending", "percent": 0, "save": other["id"], "conditions": []});
    setup.server.with(|cluster| {
        cluster
            .saves
            .create(LAB, "forged", &json!({"pod": "nb3"}), Some(forged));
    });
    for (name, reason) in [
        ("none", "NotFound"),
        ("unowned", "NotPermitted"),
        ("reserved", "Invalid"),
        ("forged", "Forgotten"),
    ] {
        let status = setup
            .until(name, |status| status["phase"] == "Failed")
            .await?;
        let condition = &status["conditions"][0];
        assert_eq!(
            [&condition["type"], &condition["reason"]],
            ["Failed", reason],
            "{status}"
        );
    }
    setup
        .server
        .with(|cluster| cluster.saves.delete(LAB, "forged"));
    let path = format!("/api/v1/saves/{}", other["id"].as_str().ok_or("no id")?);
    let (_, other) = ask(
        setup.manager.address,
        Who::Administrator,
        reqwest::Method::GET,
        &path,
        None,
    )
    .await?;
    assert_ne!(other["state"], "cancelled");
    setup.manager.stop().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_resource_that_is_deleted_cancels_its_save() -> Outcomes {
    let setup = Setup::new().await?;
    let saves = |change: &dyn Fn(&mut crate::kubernetes_api::Resources)| {
        setup.server.with(|cluster| change(&mut cluster.saves));
    };
    // Deleted, deleted before its status told of the save, and kept by a finalizer.
    for name in ["gone", "untold", "kept"] {
        setup.create(name, &json!({"pod": "nb"}));
        let pending = setup
            .until(name, |status| status["save"].is_string())
            .await?;
        match name {
            "gone" => saves(&|saves| saves.delete(LAB, name)),
            "untold" => saves(&|saves| {
                saves.change(LAB, name, |object| object["status"] = Value::Null);
                saves.delete(LAB, name);
            }),
            _ => saves(&|saves| saves.change(LAB, name, to_be_deleted)),
        }
        let path = format!(
            "/api/v1/saves/{}",
            pending["save"].as_str().ok_or("no save")?
        );
        crate::site::until(setup.manager.address, Who::Administrator, &path, |save| {
            save["state"] == "cancelled" || save["cancelling"] == true
        })
        .await?;
    }
    setup
        .until("kept", |status| status["phase"] == "Cancelled")
        .await?;
    setup.manager.stop().await
}

/// What the API server does to an object with finalizers that a user deletes.
fn to_be_deleted(object: &mut Value) {
    object["metadata"]["finalizers"] = json!(["example.org/kept"]);
    object["metadata"]["deletionTimestamp"] = json!("2026-11-30T12:00:00Z");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_to_be_deleted_or_cannot_be_read_is_left_alone() -> Outcomes {
    let setup = Setup::new().await?;
    let spec = json!({"pod": "nb"});
    setup.server.with(|cluster| {
        let saves = &mut cluster.saves;
        saves.create(LAB, "newer", &spec, Some(json!({"phase": "Paused"})));
        saves.create(LAB, "kept", &spec, None);
        saves.change(LAB, "kept", to_be_deleted);
        saves.create(LAB, "last", &spec, None);
    });
    // A list has them from its beginning, too.
    setup.manager.stop().await?;
    let options = options(&setup.site, &setup.server)?;
    let setup = Setup {
        manager: setup.site.manager_with(options).await?,
        ..setup
    };
    setup
        .until("last", |status| status["save"].is_string())
        .await?;
    let status = |name| setup.server.with(|cluster| cluster.saves.status(LAB, name));
    assert_eq!(status("newer"), json!({"phase": "Paused"}));
    assert_eq!(status("kept"), Value::Null);
    setup.manager.stop().await
}
