//! The packages of sessions and saves in the API.

use reqwest::{Method, StatusCode};
use serde_json::json;
use upperdeck::image::packages::{ChangeKind, Manager, PackageChange, Packages, Program};
use upperdeck::service::job::JobId;

use crate::site::{Agent, Outcomes, Site, Who, ask, get, id, session};
use crate::store::{push, save_with};

/// Returns a list of packages, by name and version, that pip added.
pub fn added(packages: &[(&str, &str)]) -> Packages {
    let added = packages.iter().map(|(name, version)| PackageChange {
        manager: Manager::Pip,
        name: (*name).to_owned(),
        change: ChangeKind::Added,
        version: Some((*version).to_owned()),
        previous: None,
        location: "site-packages".to_owned(),
    });
    Packages {
        packages: added.collect(),
        ..Packages::default()
    }
}

async fn save(
    site: &Site,
    at: std::net::SocketAddr,
    agent: &Agent,
    tag: &str,
    packages: Packages,
) -> Result<JobId, Box<dyn std::error::Error>> {
    let digest = push(site, "alice", "torch", tag, tag)?;
    save_with(site, at, agent, (1, tag), &digest, Some(packages)).await
}

#[tokio::test(flavor = "multi_thread")]
async fn packages_are_listed_compared_and_searched() -> Outcomes {
    let mut one = session(1, Some("alice"));
    one.packages = Some(Packages {
        programs: vec![Program {
            name: "tini".to_owned(),
            path: Some("/usr/bin/tini".to_owned()),
            mounted: false,
            image_only: false,
            interpreter: None,
        }],
        ..added(&[("numpy", "2.1")])
    });
    let (site, manager, agent) = Site::at_work(&[one, session(2, Some("alice"))]).await?;
    let at = manager.address;
    let session = format!("/api/v1/sessions/{}/packages", id(1));
    let told = get(at, Who::Alice, &session).await?;
    assert_eq!(told["packages"][0]["name"], "numpy");
    assert_eq!(told["programs"][0]["path"], "/usr/bin/tini");
    assert_eq!((&told["more"], &told["since"]), (&json!(0), &json!(null)));
    let other = format!("/api/v1/sessions/{}/packages", id(2));
    let (status, _) = ask(at, Who::Alice, Method::GET, &other, None).await?;
    assert_eq!(status, StatusCode::NOT_FOUND, "it was not looked at");
    let (status, _) = ask(at, Who::Bob, Method::GET, &session, None).await?;
    assert_eq!(status, StatusCode::NOT_FOUND, "it is another's");

    let first = save(
        &site,
        at,
        &agent,
        "v1",
        added(&[("numpy", "2.0"), ("rich", "13")]),
    )
    .await?;
    let second = save(
        &site,
        at,
        &agent,
        "v2",
        added(&[("numpy", "2.1"), ("httpx", "0.27")]),
    )
    .await?;
    let path = format!("/api/v1/saves/{second}/packages");
    let told = get(at, Who::Alice, &path).await?;
    assert_eq!(told["base"], "h.example/scipy:1");
    assert_eq!(told["packages"].as_array().map(Vec::len), Some(2));
    let told = get(at, Who::Alice, &format!("{path}?since={first}")).await?;
    assert_eq!(told["since"], json!(first));
    let changes: Vec<_> = told["packages"].as_array().into_iter().flatten().collect();
    let changes: Vec<_> = changes
        .iter()
        .map(|change| {
            json!([
                change["name"],
                change["change"],
                change["previous"],
                change["version"]
            ])
        })
        .collect();
    assert_eq!(
        changes,
        [
            json!(["httpx", "added", null, "0.27"]),
            json!(["numpy", "changed", "2.0", "2.1"]),
            json!(["rich", "removed", "13", null]),
        ]
    );
    let (status, _) = ask(at, Who::Bob, Method::GET, &path, None).await?;
    assert_eq!(status, StatusCode::NOT_FOUND, "it is another's");

    for (search, found) in [
        ("numpy", 2),
        ("NumPy==2.1", 1),
        ("rich", 1),
        ("num", 0),
        ("", 2),
    ] {
        let path = format!("/api/v1/images?package={search}");
        assert_eq!(
            get(at, Who::Alice, &path).await?["total"],
            found,
            "{search}"
        );
    }
    // The text of the page's box may be a package, too.
    for (search, found) in [
        ("NumPy==2.1", 1),
        ("rich", 1),
        ("torch", 2),
        ("v1", 1),
        ("num", 0),
        ("%3D%3D1", 0),
    ] {
        let path = format!("/api/v1/images?search={search}");
        assert_eq!(
            get(at, Who::Alice, &path).await?["total"],
            found,
            "{search}"
        );
    }
    let (status, _) = ask(
        at,
        Who::Alice,
        Method::GET,
        "/api/v1/images?package=%3D%3D1",
        None,
    )
    .await?;
    assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY);
    manager.stop().await
}
