//! `Save` resources: a manager acts for them, against a stand-in for the API server.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use upperdeck::service::manager::{Options, Resources};

use crate::kubernetes::{LAB, at_work, recorded, sessions};
use crate::kubernetes_api::ApiServer;
use crate::site::{Agent, Manager, Outcomes, PATIENCE, Site, Who, ask, succeeded};

type Fallible<T> = Result<T, Box<dyn std::error::Error>>;

struct Desk {
    site: Site,
    server: ApiServer,
    manager: Manager,
    agent: Agent,
}

fn options(site: &Site, server: &ApiServer) -> Fallible<Options> {
    let kubeconfig = site.dir.path().join("kubeconfig");
    server.write_kubeconfig(&kubeconfig, "TOKEN-manager")?;
    let mut options = site.options()?;
    options.resources = Some(Resources {
        kubeconfig: Some(kubeconfig),
    });
    Ok(options)
}

impl Desk {
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

    fn create(&self, name: &str, spec: Value) {
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

#[tokio::test(flavor = "multi_thread")]
async fn the_pod_of_a_resource_is_saved() -> Outcomes {
    let desk = Desk::new().await?;
    let spec =
        json!({"pod": "nb", "image": "lab:monday", "message": "m", "ttlSecondsAfterFinished": 0});
    desk.create("monday", spec);
    let claim = desk.agent.claim().await?;
    let pending = desk
        .until("monday", |status| status["save"].is_string())
        .await?;
    let path = format!(
        "/api/v1/saves/{}",
        pending["save"].as_str().ok_or("no save")?
    );
    let (_, save) = ask(
        desk.manager.address,
        Who::Alice,
        reqwest::Method::GET,
        &path,
        None,
    )
    .await?;
    assert_eq!(
        [&save["name"], &save["tag"], &save["message"]],
        [&json!("lab"), &json!("monday"), &json!("m")]
    );
    desk.agent.begin(&claim).await?;
    desk.until("monday", |status| status["phase"] == "Running")
        .await?;
    // It is deleted at once after its end, so the end is looked at in another one.
    desk.create("tuesday", json!({"pod": "nb3", "image": "lab:tuesday"}));
    let other = desk.agent.claim().await?;
    desk.agent.begin(&other).await?;
    desk.agent.end(&claim, 2, succeeded()).await?;
    desk.agent.end(&other, 2, succeeded()).await?;
    let ended = desk
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
        desk.server
            .with(|cluster| !cluster.saves.has(LAB, "monday"))
    };
    desk.until("monday", |_| gone()).await?;
    assert!(
        desk.server
            .with(|cluster| cluster.saves.has(LAB, "tuesday"))
    );
    desk.manager.stop().await?;
    // The lease is given up at the end.
    assert_eq!(desk.server.with(|cluster| cluster.saves.holder()), None);
    drop(desk.site);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_saved_fails_and_names_the_reason() -> Outcomes {
    let desk = Desk::new().await?;
    desk.create("none", json!({"pod": "none"}));
    desk.create("unowned", json!({"pod": "nb2"}));
    desk.create("reserved", json!({"pod": "nb", "image": "x:latest"}));
    // The pod of this name in another namespace is not meant, nor is the save of another.
    let other =
        json!({"session": {"namespace": LAB, "pod": "nb3"}, "image": {"name": "n", "tag": "t"}});
    let (status, other) = ask(
        desk.manager.address,
        Who::Administrator,
        reqwest::Method::POST,
        "/api/v1/saves",
        Some(other),
    )
    .await?;
    assert_eq!(status, 202, "{other}");
    let forged = json!({"phase": "Pending", "percent": 0, "save": other["id"], "conditions": []});
    desk.server.with(|cluster| {
        cluster
            .saves
            .create(LAB, "forged", json!({"pod": "nb3"}), Some(forged))
    });
    for (name, reason) in [
        ("none", "NotFound"),
        ("unowned", "NotPermitted"),
        ("reserved", "Invalid"),
        ("forged", "Forgotten"),
    ] {
        let status = desk
            .until(name, |status| status["phase"] == "Failed")
            .await?;
        let condition = &status["conditions"][0];
        assert_eq!(
            [&condition["type"], &condition["reason"]],
            ["Failed", reason],
            "{status}"
        );
    }
    desk.server
        .with(|cluster| cluster.saves.delete(LAB, "forged"));
    let path = format!("/api/v1/saves/{}", other["id"].as_str().ok_or("no id")?);
    let (_, other) = ask(
        desk.manager.address,
        Who::Administrator,
        reqwest::Method::GET,
        &path,
        None,
    )
    .await?;
    assert_ne!(other["state"], "cancelled");
    desk.manager.stop().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_resource_that_is_deleted_cancels_its_save() -> Outcomes {
    let desk = Desk::new().await?;
    desk.create("monday", json!({"pod": "nb"}));
    let pending = desk
        .until("monday", |status| status["save"].is_string())
        .await?;
    desk.server
        .with(|cluster| cluster.saves.delete(LAB, "monday"));
    let path = format!(
        "/api/v1/saves/{}",
        pending["save"].as_str().ok_or("no save")?
    );
    crate::site::until(desk.manager.address, Who::Administrator, &path, |save| {
        save["state"] == "cancelled" || save["cancelling"] == true
    })
    .await?;
    desk.manager.stop().await
}
