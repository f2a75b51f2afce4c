//! What holds for all calls: problems, pages, conditional requests, other origins, and the pages of the documentation.

use reqwest::header::{self, HeaderMap};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::site::{Agent, Outcomes, Site, Who, ask, get, id, request, session, submit, until};
use crate::store;

fn text<'a>(headers: &'a HeaderMap, name: &str) -> &'a str {
    let value = headers.get(name).and_then(|value| value.to_str().ok());
    value.unwrap_or_default()
}

#[tokio::test]
async fn every_error_is_a_problem_that_leads_to_its_explanation() -> Outcomes {
    let (_site, manager, _agent) = Site::at_work(&[session(1, Some("alice"))]).await?;
    let at = manager.address;
    let errors = request(at, Who::Anonymous, Method::GET, "/docs/errors")?;
    let errors = errors.send().await?.text().await?;
    let saves = "/api/v1/saves";
    let long = "x".repeat(100 << 10);
    for (who, method, path, kind, body, expected, code) in [
        (
            Who::Anonymous,
            Method::GET,
            saves,
            "",
            "",
            401,
            "unauthenticated",
        ),
        (
            Who::Alice,
            Method::GET,
            "/api/v1/nodes",
            "",
            "",
            403,
            "not_permitted",
        ),
        (
            Who::Alice,
            Method::GET,
            "/api/v1/saves/x",
            "",
            "",
            404,
            "not_found",
        ),
        (
            Who::Alice,
            Method::GET,
            "/nothing",
            "",
            "",
            404,
            "not_found",
        ),
        (
            Who::Alice,
            Method::GET,
            "/portal/x/nothing",
            "",
            "",
            404,
            "not_found",
        ),
        (Who::Alice, Method::PUT, saves, "", "", 405, "invalid"),
        (Who::Alice, Method::POST, "/docs", "", "", 405, "invalid"),
        (
            Who::Alice,
            Method::POST,
            saves,
            "application/json",
            long.as_str(),
            413,
            "invalid",
        ),
        (
            Who::Alice,
            Method::POST,
            saves,
            "text/plain",
            "{}",
            415,
            "invalid",
        ),
        (
            Who::Alice,
            Method::POST,
            saves,
            "application/json",
            "{",
            400,
            "invalid",
        ),
        (
            Who::Alice,
            Method::POST,
            saves,
            "application/json",
            "{}",
            422,
            "invalid",
        ),
        (
            Who::Alice,
            Method::GET,
            "/api/v1/saves?limit=0",
            "",
            "",
            422,
            "invalid",
        ),
    ] {
        let mut request = request(at, who, method.clone(), path)?;
        if !kind.is_empty() {
            request = request
                .header(header::CONTENT_TYPE, kind)
                .body(body.to_owned());
        }
        let answer = request.send().await?;
        let (status, headers) = (answer.status().as_u16(), answer.headers().clone());
        let said = format!("{method} {path} {kind}");
        assert_eq!(status, expected, "{said}");
        assert_eq!(
            text(&headers, "content-type"),
            "application/problem+json",
            "{said}"
        );
        let problem: Value = answer.json().await?;
        assert_eq!(problem["code"], code, "{said}");
        assert_eq!(problem["status"], expected, "{said}");
        assert_eq!(problem["type"], format!("/docs/errors#{code}"), "{said}");
        for member in ["title", "detail"] {
            assert!(
                problem[member]
                    .as_str()
                    .is_some_and(|text| !text.is_empty()),
                "{problem}"
            );
        }
        assert!(errors.contains(&format!("id=\"{code}\"")), "{code}");
    }
    manager.stop().await
}

#[tokio::test]
async fn what_is_accepted_says_where_its_state_is() -> Outcomes {
    let site = Site::new()?;
    let mut options = site.options()?;
    options.public_url = Some("https://save.example.org/up/".into());
    let outside = site.manager_with(options).await?;
    let inside = site.manager().await?;
    let agent = Agent::new(&site.queue, "a");
    agent
        .heartbeat(&[session(1, Some("alice")), session(2, Some("alice"))])
        .await?;
    for (n, manager, root) in [
        (1, &inside, ""),
        (2, &outside, "https://save.example.org/up"),
    ] {
        let body = json!({"session": id(n), "image": {"name": "torch", "tag": format!("v{n}")}});
        let asked = request(manager.address, Who::Alice, Method::POST, "/api/v1/saves")?;
        let answer = asked.json(&body).send().await?;
        assert_eq!(answer.status(), StatusCode::ACCEPTED);
        let location = text(answer.headers(), "location").to_owned();
        let save: Value = answer.json().await?;
        let path = format!("/api/v1/saves/{}", save["id"].as_str().unwrap_or_default());
        assert_eq!(location, format!("{root}{path}"));
        let (_, problem) = ask(manager.address, Who::Alice, Method::GET, "/none", None).await?;
        assert_eq!(problem["type"], format!("{root}/docs/errors#not_found"));
        assert_eq!(
            get(manager.address, Who::Alice, &path).await?["id"],
            save["id"]
        );
    }
    outside.stop().await?;
    inside.stop().await
}

#[tokio::test]
async fn all_lists_are_read_page_by_page() -> Outcomes {
    let sessions: Vec<_> = (1..6).map(|n| session(n, Some("alice"))).collect();
    let (site, manager, _agent) = Site::at_work(&sessions).await?;
    let at = manager.address;
    for n in 1..6 {
        submit(at, Who::Alice, &id(n), &format!("v{n}")).await?;
        store::push(
            &site,
            "alice",
            "torch",
            &format!("p{n}"),
            &format!("made {n}"),
        )?;
    }
    for (path, name, key) in [
        ("/api/v1/sessions", "sessions", "id"),
        ("/api/v1/saves?state=open", "saves", "id"),
        ("/api/v1/images?sort=name", "images", "digest"),
    ] {
        let whole = get(at, Who::Alice, path).await?;
        let whole: Vec<Value> = whole[name].as_array().ok_or("no list")?.clone();
        assert_eq!(whole.len(), 5, "{path}");
        let joint = if path.contains('?') { '&' } else { '?' };
        let mut next = Some(format!("{path}{joint}limit=2"));
        let mut read = Vec::new();
        while let Some(path) = next.take() {
            let answer = request(at, Who::Alice, Method::GET, &path)?.send().await?;
            let (url, link) = (
                answer.url().clone(),
                text(answer.headers(), "link").to_owned(),
            );
            let page: Value = answer.json().await?;
            assert_eq!(link.is_empty(), page["next"].is_null(), "{link} {page}");
            if let Some((target, rel)) = link.split_once(">; ") {
                assert_eq!(rel, "rel=\"next\"");
                let target = url.join(target.trim_start_matches('<'))?;
                next = Some(format!(
                    "{}?{}",
                    target.path(),
                    target.query().unwrap_or_default()
                ));
            }
            read.extend(
                page[name]
                    .as_array()
                    .ok_or("no list")?
                    .iter()
                    .map(|one| one[key].clone()),
            );
        }
        let expected: Vec<Value> = whole.iter().map(|one| one[key].clone()).collect();
        assert_eq!(read, expected, "{path}");
    }
    for path in ["sessions", "saves", "images", "shared"] {
        let path = format!("/api/v1/{path}?cursor=nonsense");
        let (status, problem) = ask(at, Who::Alice, Method::GET, &path, None).await?;
        assert_eq!(
            (status.as_u16(), &problem["field"]),
            (422, &json!("cursor")),
            "{path}"
        );
    }
    manager.stop().await
}

#[tokio::test]
async fn what_has_not_changed_is_not_sent_again_and_changes_may_depend_on_it() -> Outcomes {
    let (site, manager, _agent) = Site::at_work(&[session(1, Some("alice"))]).await?;
    let at = manager.address;
    let job = submit(at, Who::Alice, &id(1), "v1").await?;
    let path = format!("/api/v1/saves/{job}");
    until(at, Who::Alice, &path, |save| save["place"] == 0).await?;
    let digest = store::push(&site, "alice", "torch", "v0", "made")?;
    let image = format!("/api/v1/images/torch/digests/{digest}");
    for path in [
        format!("/api/v1/saves/{job}"),
        "/api/v1/saves".to_owned(),
        "/api/v1/images".to_owned(),
        "/api/v1/me".to_owned(),
        "/docs".to_owned(),
        image.clone(),
    ] {
        let answer = request(at, Who::Alice, Method::GET, &path)?.send().await?;
        let tag = text(answer.headers(), "etag").to_owned();
        assert!(tag.starts_with('"') && tag.len() > 20, "{path}: {tag}");
        for (sent, expected) in [(tag.as_str(), 304), ("\"other\"", 200)] {
            let asked = request(at, Who::Alice, Method::GET, &path)?;
            let answer = asked.header(header::IF_NONE_MATCH, sent).send().await?;
            assert_eq!(answer.status().as_u16(), expected, "{path}");
            assert_eq!(text(answer.headers(), "etag"), tag, "{path}");
            assert_eq!(answer.bytes().await?.is_empty(), expected == 304, "{path}");
        }
    }
    let answer = request(at, Who::Alice, Method::GET, &image)?.send().await?;
    let tag = text(answer.headers(), "etag").to_owned();
    for (description, expected) in [("first", 200), ("second", 412)] {
        let change = request(at, Who::Alice, Method::PATCH, &image)?;
        let change = change.header(header::IF_MATCH, &tag);
        let answer = change
            .json(&json!({"description": description}))
            .send()
            .await?;
        assert_eq!(answer.status().as_u16(), expected, "{description}");
    }
    assert_eq!(get(at, Who::Alice, &image).await?["message"], "first");
    manager.stop().await
}

#[tokio::test]
async fn pages_of_named_origins_alone_may_read_and_never_with_cookies() -> Outcomes {
    let site = Site::new()?;
    let mut options = site.options()?;
    let portal = "https://portal.example.org";
    options.cors_origins = vec![portal.parse()?];
    let (open, closed) = (site.manager_with(options).await?, site.manager().await?);
    let ask = async |at, method: Method, path: &str, origin: &str| {
        let asked = request(at, Who::Alice, method, path)?.header(header::ORIGIN, origin);
        let asked = asked.header("Access-Control-Request-Method", "POST");
        Ok::<_, Box<dyn std::error::Error>>(asked.send().await?)
    };
    let saves = "/api/v1/saves";
    let answer = ask(open.address, Method::OPTIONS, saves, portal).await?;
    assert_eq!(answer.status(), StatusCode::NO_CONTENT);
    let headers = answer.headers();
    assert_eq!(text(headers, "access-control-allow-origin"), portal);
    assert!(text(headers, "access-control-allow-methods").contains("POST"));
    assert!(text(headers, "access-control-allow-headers").contains("authorization"));
    let answer = ask(open.address, Method::GET, saves, portal).await?;
    assert_eq!(
        text(answer.headers(), "access-control-allow-origin"),
        portal
    );
    assert!(text(answer.headers(), "vary").contains("origin"));
    let none = [
        "access-control-allow-origin",
        "access-control-allow-credentials",
    ];
    assert!(!answer.headers().contains_key(none[1]));
    for (at, path, origin) in [
        (
            open.address,
            saves,
            "https://portal.example.org.evil.example",
        ),
        (open.address, saves, "http://portal.example.org"),
        (open.address, saves, "null"),
        (open.address, "/", portal),
        (open.address, "/metrics", portal),
        (closed.address, saves, portal),
    ] {
        for method in [Method::OPTIONS, Method::GET] {
            let answer = ask(at, method.clone(), path, origin).await?;
            assert_ne!(answer.status(), StatusCode::NO_CONTENT, "{path} {origin}");
            for name in none {
                assert!(
                    !answer.headers().contains_key(name),
                    "{method} {path} {origin}"
                );
            }
        }
    }
    open.stop().await?;
    closed.stop().await
}

#[tokio::test]
async fn the_documentation_is_made_of_the_description_and_runs_no_script() -> Outcomes {
    let (_site, manager, _agent) = Site::at_work(&[]).await?;
    let at = manager.address;
    let document = get(at, Who::Anonymous, "/openapi.json").await?;
    let answer = request(at, Who::Anonymous, Method::GET, "/docs")?
        .send()
        .await?;
    let policy = text(answer.headers(), "content-security-policy").to_owned();
    assert!(
        policy.starts_with("default-src 'none'; style-src 'self';"),
        "{policy}"
    );
    let page = answer.text().await?;
    for forbidden in ["<script", "src=", "style=\"", "http://", "onload"] {
        assert!(!page.contains(forbidden), "{forbidden}");
    }
    for (path, item) in document["paths"].as_object().ok_or("no paths")? {
        for operation in item.as_object().ok_or("no item")?.values() {
            let id = operation["operationId"].as_str().ok_or("no ID")?;
            assert!(page.contains(&format!("<h3 id=\"{id}\">")), "{path} {id}");
        }
    }
    for schema in document["components"]["schemas"]
        .as_object()
        .ok_or("no schemas")?
        .keys()
    {
        assert!(
            page.contains(&format!("id=\"schema-{schema}\"")),
            "{schema}"
        );
    }
    // No link within the page leads nowhere.
    for link in page.split("href=\"#").skip(1) {
        let target = link.split('"').next().unwrap_or_default();
        assert!(page.contains(&format!("id=\"{target}\"")), "{target}");
    }
    let version = get(at, Who::Anonymous, "/version").await?;
    assert_eq!(
        (&version["version"], &version["api"]),
        (&json!(env!("CARGO_PKG_VERSION")), &json!("v1"))
    );
    manager.stop().await
}
