//! Renaming images, and sharing them with groups.

use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use upperdeck::common::digest::Digest;
use upperdeck::service::manager::auth::{Groups, Proxies};

use crate::site::{Outcomes, Site, Who, ask, get, request, session};
use crate::store::{push, save_as};

type Fallible<T> = Result<T, Box<dyn std::error::Error>>;

async fn rename(
    at: std::net::SocketAddr,
    who: Who,
    tag: &str,
    body: Value,
) -> Fallible<(StatusCode, Value)> {
    let path = format!("/api/v1/images/torch/tags/{tag}");
    ask(at, who, Method::POST, &path, Some(body)).await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_gets_another_tag_by_its_owner_and_takes_none_by_accident() -> Outcomes {
    let (site, manager, agent) = Site::at_work(&[session(1, Some("alice"))]).await?;
    let at = manager.address;
    let digest = push(&site, "alice", "torch", "v1", "one")?;
    let saved = save_as(&site, at, &agent, 1, "v1", &digest).await?;
    let other = push(&site, "alice", "torch", "v2", "two")?;
    let tags = async || -> Fallible<Vec<(String, String)>> {
        let listed = get(at, Who::Alice, "/api/v1/images").await?;
        let mut tags = Vec::new();
        for image in listed["images"].as_array().ok_or("no images")? {
            for tag in image["tags"].as_array().ok_or("no tags")? {
                let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
                tags.push((text(&tag["name"]), text(&image["digest"])));
            }
        }
        tags.sort();
        Ok(tags)
    };
    let has = |tag: &str, digest: &Digest| (tag.to_owned(), digest.to_string());
    // What is not the caller's, not there, or no tag.
    for (who, tag, body, status) in [
        (Who::Bob, "v1", json!({"tag": "x"}), 404),
        (Who::Alice, "v9", json!({"tag": "x"}), 404),
        (Who::Alice, "v1", json!({"tag": "latest"}), 422),
        (Who::Alice, "v1", json!({"tag": "v1"}), 422),
        (Who::Alice, "v1", json!({"tag": "../x"}), 422),
        (Who::Alice, "v1", json!({"tag": "a@sha256:b"}), 422),
        (Who::Anonymous, "v1", json!({"tag": "x"}), 401),
        (Who::Alice, "v1", json!({"tag": "v2"}), 409),
        (
            Who::Alice,
            "v1",
            json!({"tag": "v2", "replace": digest.to_string()}),
            409,
        ),
    ] {
        let (found, said) = rename(at, who, tag, body.clone()).await?;
        assert_eq!(found, status, "{who:?} {tag} {body}: {said}");
        if status == 409 {
            assert_eq!(
                (&said["code"], &said["existing"]["digest"]),
                (&json!("tag_exists"), &json!(other.to_string()))
            );
        }
    }
    assert_eq!(tags().await?, [has("v1", &digest), has("v2", &other)]);
    // Beside the old tag, and then in its place.
    let (status, said) =
        rename(at, Who::Alice, "v1", json!({"tag": "paper", "keep": true})).await?;
    assert_eq!(
        (status.as_u16(), &said["digest"]),
        (200, &json!(digest.to_string())),
        "{said}"
    );
    assert_eq!(
        tags().await?,
        [has("paper", &digest), has("v1", &digest), has("v2", &other)]
    );
    let (status, said) = rename(
        at,
        Who::Alice,
        "v1",
        json!({"tag": "v2", "replace": other.to_string()}),
    )
    .await?;
    assert_eq!(
        (status.as_u16(), &said["kept"]),
        (200, &Value::Null),
        "{said}"
    );
    assert_eq!(tags().await?, [has("paper", &digest), has("v2", &digest)]);
    // The history says so.
    let history = get(at, Who::Alice, "/api/v1/saves").await?;
    let found = &history["saves"][0];
    assert_eq!(found["id"], saved.to_string());
    assert_eq!(
        (
            &found["image"]["state"],
            &found["image"]["renamed_to"],
            &found["image"]["caller"]
        ),
        (&json!("renamed"), &json!("v2"), &json!("token:alice"))
    );
    // A pinned image keeps its tag, and may get another.
    let path = format!("/api/v1/images/torch/digests/{digest}");
    ask(
        at,
        Who::Alice,
        Method::PATCH,
        &path,
        Some(json!({"pinned": true})),
    )
    .await?;
    let (status, said) = rename(at, Who::Alice, "paper", json!({"tag": "x"})).await?;
    assert_eq!(
        (status.as_u16(), &said["code"]),
        (409, &json!("image_pinned"))
    );
    let (status, _) = rename(at, Who::Alice, "paper", json!({"tag": "x", "keep": true})).await?;
    assert_eq!(status, 200);
    // What is back under its first name has it again in the history.
    ask(
        at,
        Who::Alice,
        Method::PATCH,
        &path,
        Some(json!({"pinned": false})),
    )
    .await?;
    let (status, _) = rename(at, Who::Alice, "v2", json!({"tag": "v1"})).await?;
    assert_eq!(status, 200);
    let history = get(at, Who::Alice, "/api/v1/saves").await?;
    assert_eq!(history["saves"][0]["image"]["state"], "tagged");
    manager.stop().await
}

#[tokio::test(flavor = "multi_thread")]
async fn members_of_a_group_see_what_is_shared_with_it_and_change_nothing() -> Outcomes {
    let site = Site::new()?;
    let mut options = site.options()?;
    options.groups = Groups::parse("[groups]\nstaff = ['bob', 'alice']\n")?;
    let proxies = Proxies::new("X-User", &["127.0.0.1".to_owned()], vec![])?;
    options.proxies = Some(proxies.with_groups("X-Groups")?);
    let manager = site.manager_with(options).await?;
    let at = manager.address;
    let digest = push(&site, "alice", "torch", "v1", "one")?;
    let path = format!("/api/v1/images/torch/digests/{digest}");
    let share = async |body: Value| ask(at, Who::Alice, Method::PATCH, &path, Some(body)).await;
    for bad in [
        json!([""]),
        json!(["a\nb"]),
        json!(vec!["g"; 51]),
        json!("staff"),
    ] {
        let (status, _) = share(json!({"shared_groups": bad})).await?;
        assert_eq!(status, 422, "{bad}");
    }
    let (status, view) = share(json!({"shared_groups": ["staff", "gpu users", "staff"]})).await?;
    assert_eq!(
        (status.as_u16(), &view["shared_groups"]),
        (200, &json!(["gpu users", "staff"]))
    );
    // By the file, for tokens and for a portal's users alike; not who is in no group.
    for (who, seen) in [
        (Who::Bob, 1),
        (Who::PortalFor("bob"), 1),
        (Who::PortalFor("carol"), 0),
        (Who::Alice, 0),
        (Who::Administrator, 0),
    ] {
        let shared = get(at, who, "/api/v1/shared").await?;
        assert_eq!(
            shared["images"].as_array().map(Vec::len),
            Some(seen),
            "{who:?}"
        );
        if seen == 1 {
            // With whom else it is shared is the owner's business.
            assert_eq!(shared["images"][0]["shared_groups"], json!([]));
        }
    }
    let me = get(at, Who::Bob, "/api/v1/me").await?;
    assert_eq!(me["groups"], json!(["staff"]));
    // By the header of the proxy; a caller with a token cannot add to its groups.
    let through = async |groups: &str, token: Option<&str>| -> Fallible<Value> {
        let mut asked = request(at, Who::Anonymous, Method::GET, "/api/v1/shared")?
            .header("X-User", "carol")
            .header("X-Groups", groups);
        if let Some(token) = token {
            asked = asked.bearer_auth(token);
        }
        Ok(asked.send().await?.json().await?)
    };
    for (groups, seen) in [
        ("gpu users, other", 1),
        ("gpu", 0),
        ("", 0),
        ("GPU users", 0),
    ] {
        assert_eq!(
            through(groups, None).await?["images"]
                .as_array()
                .map(Vec::len),
            Some(seen),
            "{groups}"
        );
    }
    let other = through("gpu users", Some("token-portal")).await?;
    assert_eq!(other["status"], 403, "a portal names its user");
    for (method, path) in [
        (Method::PATCH, path.as_str()),
        (Method::POST, "/api/v1/images/torch/tags/v1"),
        (Method::DELETE, "/api/v1/images/torch/tags/v1"),
    ] {
        let body = match method {
            Method::PATCH => Some(json!({"pinned": true})),
            Method::POST => Some(json!({"tag": "mine"})),
            _ => None,
        };
        let (status, _) = ask(at, Who::Bob, method.clone(), path, body.clone()).await?;
        assert_eq!(status, 404, "{method} {path}");
        let (status, _) = ask(
            at,
            Who::Bob,
            method.clone(),
            &format!("{path}?user=alice"),
            body,
        )
        .await?;
        assert_eq!(status, 403, "{method} {path}");
    }
    let (status, view) = share(json!({"shared_groups": []})).await?;
    assert_eq!((status.as_u16(), &view["shared_groups"]), (200, &json!([])));
    let shared = get(at, Who::Bob, "/api/v1/shared").await?;
    assert_eq!(shared["images"], json!([]));
    manager.stop().await
}
