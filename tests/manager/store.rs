//! LIST and DEL with layout directories: images are listed with the data in the record, and users can delete only their
//! own.

use bytes::Bytes;
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use upperdeck::common::digest::Digest;
use upperdeck::image::packages::Packages;
use upperdeck::service::job::{JobId, Outcome, Saved, Update};
use upperdeck::store::layout::Directory;

use crate::site::{Agent, Outcomes, Site, Who, ask, get, id, session, succeeded, until};

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";

#[tokio::test(flavor = "multi_thread")]
async fn an_image_without_a_tag_is_deleted_by_its_owner() -> Outcomes {
    let (site, manager, _) = Site::at_work(&[session(1, Some("alice"))]).await?;
    let at = manager.address;
    let old = push(&site, "alice", "torch", "old", "one")?;
    let new = push(&site, "alice", "torch", "v1", "two")?;
    // As a registry keeps it: in a layout, an image goes with its last tag.
    let index = site.images().join("alice/torch/index.json");
    let mut entries: serde_json::Value = serde_json::from_slice(&std::fs::read(&index)?)?;
    let all = entries["manifests"].as_array_mut().ok_or("no manifests")?;
    let entry = all
        .iter_mut()
        .find(|entry| entry["digest"] == old.to_string());
    entry.ok_or("no entry")?["annotations"] = json!({});
    std::fs::write(&index, entries.to_string())?;
    let path = |digest: &Digest| format!("/api/v1/images/torch/digests/{digest}");
    let delete = async |who, path: String| ask(at, who, Method::DELETE, &path, None).await;
    let listed = get(at, Who::Alice, "/api/v1/images").await?;
    let untagged = |listed: &serde_json::Value| {
        let images = listed["images"].as_array().cloned().unwrap_or_default();
        images
            .iter()
            .any(|image| image["digest"] == old.to_string())
    };
    assert!(untagged(&listed), "{listed}");
    // Another user's images are below another path, and the administrator names the user.
    let (status, body) = delete(Who::Bob, path(&old)).await?;
    assert_eq!(status, StatusCode::NOT_FOUND, "{body}");
    let (status, body) = delete(Who::Bob, path(&old) + "?user=alice").await?;
    assert_eq!(status, StatusCode::FORBIDDEN, "{body}");
    // One that has a tag goes by its tag, so that it is clear what becomes of it.
    let (status, body) = delete(Who::Alice, path(&new)).await?;
    assert_eq!(status, StatusCode::CONFLICT, "{body}");
    let (status, body) = delete(Who::Alice, path(&old)).await?;
    assert_eq!(
        (status, &body["image_deleted"]),
        (StatusCode::OK, &json!(true)),
        "{body}"
    );
    let (status, _) = delete(Who::Alice, path(&old)).await?;
    assert_eq!(status, StatusCode::NOT_FOUND);
    let listed = get(at, Who::Alice, "/api/v1/images").await?;
    assert!(!untagged(&listed) && listed["total"] == 1, "{listed}");
    manager.stop().await
}

/// Stores an image without layers under a tag, as a save would.
pub fn push(
    site: &Site,
    user: &str,
    name: &str,
    tag: &str,
    text: &str,
) -> Result<Digest, Box<dyn std::error::Error>> {
    let dir = site.images().join(user).join(name);
    std::fs::create_dir_all(&dir)?;
    let directory = Directory::new(dir);
    directory.check()?;
    let config = json!({"architecture": "amd64", "os": "linux", "created": "2026-01-01T00:00:00Z",
        "config": {"Labels": {"text": text}}, "rootfs": {"type": "layers", "diff_ids": []}});
    let config = Bytes::from(config.to_string());
    let config_digest = Digest::of(&config);
    directory.put_blob(&config, &config_digest)?;
    let manifest = json!({"schemaVersion": 2, "mediaType": MANIFEST, "layers": [],
        "config": {"mediaType": CONFIG, "digest": config_digest.to_string(), "size": config.len()}});
    let manifest = Bytes::from(manifest.to_string());
    directory.put_manifest(&manifest, MANIFEST, tag)?;
    Ok(Digest::of(&manifest))
}

pub async fn save_as(
    site: &Site,
    at: std::net::SocketAddr,
    agent: &Agent,
    n: usize,
    tag: &str,
    digest: &Digest,
) -> Result<JobId, Box<dyn std::error::Error>> {
    save_with(site, at, agent, (n, tag), digest, None).await
}

/// Saves session `n` as `torch:TAG`. The agent tells of the packages, if there are any.
pub async fn save_with(
    site: &Site,
    at: std::net::SocketAddr,
    agent: &Agent,
    (n, tag): (usize, &str),
    digest: &Digest,
    packages: Option<Packages>,
) -> Result<JobId, Box<dyn std::error::Error>> {
    // The image is there already, as after the save that is played here.
    let body = json!({"session": id(n), "image": {"name": "torch", "tag": tag}, "message": "m", "replace": "any"});
    let (status, body) = ask(at, Who::Alice, Method::POST, "/api/v1/saves", Some(body)).await?;
    assert_eq!(status, StatusCode::ACCEPTED, "{body}");
    let job: JobId = body["id"].as_str().ok_or("no id")?.parse()?;
    let claim = agent.claim().await?;
    agent.begin(&claim).await?;
    if let Some(packages) = packages {
        let told = Update::Packages { packages };
        agent.send_update(&claim, 2, told).await?;
    }
    let Outcome::Succeeded { saved } = succeeded() else {
        return Err("no success".into());
    };
    let saved = Saved {
        digest: digest.to_string(),
        reference: format!("oci:{}/alice/torch@{digest}", site.images().display()),
        base_name: Some("h.example/scipy:1".into()),
        ..saved
    };
    agent.end(&claim, 3, Outcome::Succeeded { saved }).await?;
    let path = format!("/api/v1/saves/{job}");
    until(at, Who::Alice, &path, |save| save["state"] == "succeeded").await?;
    Ok(job)
}

#[tokio::test(flavor = "multi_thread")]
async fn images_are_listed_with_their_story_searched_sorted_and_turned() -> Outcomes {
    let (site, manager, agent) =
        Site::at_work(&[session(1, Some("alice")), session(2, Some("alice"))]).await?;
    let at = manager.address;
    assert_eq!(get(at, Who::Alice, "/api/v1/images").await?["total"], 0);
    let one = push(&site, "alice", "torch", "v1", "one")?;
    push(
        &site,
        "alice",
        "other",
        "x",
        "a longer text than the other one has",
    )?;
    push(&site, "bob", "torch", "v1", "bob's")?;
    std::fs::create_dir_all(site.images().join("alice/.hidden"))?;
    std::os::unix::fs::symlink(
        site.images().join("bob/torch"),
        site.images().join("alice/stolen"),
    )?;
    let job = save_as(&site, at, &agent, 1, "v1", &one).await?;
    let found = get(at, Who::Alice, "/api/v1/images?sort=name").await?;
    assert_eq!(found["total"], 2, "{found}");
    let torch = &found["images"][1];
    assert_eq!(
        (&torch["name"], &torch["user"], &torch["tags"][0]["name"]),
        (&json!("torch"), &json!("alice"), &json!("v1"))
    );
    assert_eq!(torch["save"], job.to_string());
    assert_eq!(torch["message"], "m");
    assert_eq!(
        (&torch["category"], &torch["kind"]),
        (&json!("gpu"), &json!("jupyter"))
    );
    assert_eq!(torch["base"], "h.example/scipy:1");
    assert_eq!(torch["session_name"], "jupyter/pod-1/notebook");
    assert_eq!(found["images"][0]["save"], json!(null));
    let count = |body: &Value| body["images"].as_array().map_or(0, Vec::len);
    for (query, who, images) in [
        ("search=TOR", Who::Alice, 1),
        ("search=x", Who::Alice, 1),
        ("search=nothing", Who::Alice, 0),
        ("category=gpu", Who::Alice, 1),
        ("category=", Who::Alice, 2),
        ("limit=1", Who::Alice, 1),
        ("limit=2", Who::Alice, 2),
        ("sort=size", Who::Bob, 1),
        ("", Who::Administrator, 3),
        ("user=bob", Who::Administrator, 1),
    ] {
        let found = get(at, who, &format!("/api/v1/images?{query}")).await?;
        assert_eq!(count(&found), images, "{query}");
    }
    let by_size = get(at, Who::Alice, "/api/v1/images?sort=size").await?;
    assert_eq!(by_size["images"][0]["name"], "other");
    for query in [
        "limit=0",
        "limit=501",
        "cursor=x",
        "sort=colour",
        "category=tpu",
        "page=1",
        "unknown=1",
    ] {
        let (status, body) = ask(
            at,
            Who::Alice,
            Method::GET,
            &format!("/api/v1/images?{query}"),
            None,
        )
        .await?;
        assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY, "{query}: {body}");
    }
    let quota = get(at, Who::Alice, "/api/v1/quota").await?;
    assert_eq!(
        (&quota["used"], &quota["hard"]),
        (&json!(null), &json!(null))
    );
    manager.stop().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tag_is_deleted_alone_and_never_anothers() -> Outcomes {
    let (site, manager, _) = Site::at_work(&[session(1, Some("alice"))]).await?;
    let at = manager.address;
    let digest = push(&site, "alice", "torch", "v1", "one")?;
    push(&site, "alice", "torch", "v2", "one")?;
    push(&site, "bob", "torch", "v1", "one")?;
    let delete = |who, path: &'static str| ask(at, who, Method::DELETE, path, None);
    // While a save writes to it, it stays.
    let body = json!({"session": id(1), "image": {"name": "torch", "tag": "v1"}, "replace": "any"});
    let (status, body) = ask(at, Who::Alice, Method::POST, "/api/v1/saves", Some(body)).await?;
    assert_eq!(status, StatusCode::ACCEPTED, "{body}");
    let job: JobId = body["id"].as_str().ok_or("no id")?.parse()?;
    let (status, body) = delete(Who::Alice, "/api/v1/images/torch/tags/v1").await?;
    assert_eq!(
        (status, &body["save"]),
        (StatusCode::CONFLICT, &json!(job.to_string()))
    );
    ask(
        at,
        Who::Alice,
        Method::DELETE,
        &format!("/api/v1/saves/{job}"),
        None,
    )
    .await?;
    let (status, body) = delete(Who::Alice, "/api/v1/images/torch/tags/v1").await?;
    assert_eq!(status, StatusCode::OK, "{body}");
    assert_eq!(
        (
            &body["tags"],
            &body["kept"],
            &body["image_deleted"],
            &body["digest"]
        ),
        (
            &json!(["v1"]),
            &json!(["v2"]),
            &json!(false),
            &json!(digest.to_string())
        )
    );
    let (status, _) = delete(Who::Alice, "/api/v1/images/torch/tags/v1").await?;
    assert_eq!(status, StatusCode::NOT_FOUND);
    let (status, body) = delete(Who::Alice, "/api/v1/images/torch/tags/v2").await?;
    assert_eq!(
        (status, &body["image_deleted"]),
        (StatusCode::OK, &json!(true))
    );
    assert_eq!(get(at, Who::Alice, "/api/v1/images").await?["total"], 0);
    assert_eq!(get(at, Who::Bob, "/api/v1/images").await?["total"], 1);
    let (status, _) = delete(Who::Administrator, "/api/v1/images/torch/tags/v1?user=bob").await?;
    assert_eq!(status, StatusCode::OK);
    manager.stop().await
}
