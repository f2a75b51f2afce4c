//! Signing in with a browser: what the cookie permits, to whom, where and until when.

use reqwest::{Method, RequestBuilder, StatusCode};
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::time::Duration;
use upperdeck::service::manager::auth::{Claims, Jwt, Keys, Proxies, Tokens};

use crate::access::Provider;
use crate::site::{Outcomes, PATIENCE, Site, Who, http, id, session, submit};

type Fallible<T> = Result<T, Box<dyn std::error::Error>>;

/// What a browser stores of a sign-in.
struct Browser {
    at: SocketAddr,
    /// Name and value.
    cookie: String,
    key: String,
    set: String,
}

fn sign_in(at: SocketAddr, token: &str, body: &Value) -> Fallible<RequestBuilder> {
    Ok(http()?
        .post(format!("http://{at}/api/v1/signin"))
        .bearer_auth(token)
        .header("Upperdeck-Request", "1")
        .json(body))
}

impl Browser {
    async fn new(at: SocketAddr, token: &str) -> Fallible<Self> {
        let answer = sign_in(at, token, &json!({}))?.send().await?;
        if answer.status() != StatusCode::OK {
            return Err(format!("{} {}", answer.status(), answer.text().await?).into());
        }
        let set = answer.headers()["set-cookie"].to_str()?.to_owned();
        let body: Value = answer.json().await?;
        Ok(Self {
            at,
            cookie: set.split(';').next().unwrap_or_default().to_owned(),
            key: body["key"].as_str().unwrap_or_default().to_owned(),
            set,
        })
    }

    fn value(&self) -> &str {
        self.cookie.split_once('=').map_or("", |(_, value)| value)
    }

    fn ask(&self, method: Method, path: &str) -> Fallible<RequestBuilder> {
        let request = http()?.request(method, format!("http://{}{path}", self.at));
        Ok(request
            .header("Cookie", &self.cookie)
            .header("Upperdeck-Page", &self.key))
    }

    async fn me(&self) -> Fallible<u16> {
        let answer = self.ask(Method::GET, "/api/v1/me")?.send().await?;
        Ok(answer.status().as_u16())
    }
}

async fn status(request: RequestBuilder) -> Fallible<u16> {
    Ok(request.send().await?.status().as_u16())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cookie_is_no_token_and_a_token_no_cookie() -> Outcomes {
    let site = Site::new()?;
    let manager = site.manager().await?;
    let at = manager.address;
    let browser = Browser::new(at, "token-alice").await?;
    let name = format!("upperdeck-{}=", at.port());
    assert!(browser.set.starts_with(&name), "{}", browser.set);
    for part in ["; HttpOnly", "; SameSite=Strict", "; Path=/;"] {
        assert!(browser.set.contains(part), "{}", browser.set);
    }
    assert!(!browser.set.contains("token-alice"));
    let me: Value = browser
        .ask(Method::GET, "/api/v1/me")?
        .send()
        .await?
        .json()
        .await?;
    assert_eq!(
        me,
        json!({"user": "alice", "administrator": false, "via": "sign_in"})
    );
    let me = format!("http://{at}/api/v1/me");
    let http = http()?;
    for bearer in [
        browser.value(),
        browser.key.as_str(),
        browser.cookie.as_str(),
    ] {
        assert_eq!(status(http.get(&me).bearer_auth(bearer)).await?, 401);
    }
    for cookie in [
        format!("{name}token-alice"),
        "upperdeck_token=token-alice".to_owned(),
        format!("{name}{}", browser.key),
        format!("upperdeck={}", browser.value()),
    ] {
        let request = http
            .get(&me)
            .header("Cookie", &cookie)
            .header("Upperdeck-Page", &browser.key);
        assert_eq!(status(request).await?, 401, "{cookie}");
    }
    // The record has neither.
    let file = site.dir.path().join("record.db");
    for file in [file.clone(), file.with_extension("db-wal")] {
        let bytes = std::fs::read(&file).unwrap_or_default();
        for secret in [browser.value(), browser.key.as_str()] {
            assert!(
                !bytes
                    .windows(secret.len())
                    .any(|part| part == secret.as_bytes())
            );
        }
    }
    manager.stop().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cookie_that_another_port_plants_beside_ours_keeps_nobody_out() -> Outcomes {
    let site = Site::new()?;
    let manager = site.manager().await?;
    let at = manager.address;
    let browser = Browser::new(at, "token-alice").await?;
    let planted = Browser::new(at, "token-bob").await?;
    let name = planted.cookie.split('=').next().unwrap_or_default();
    let unknown = format!("{name}={}", "x".repeat(43));
    let http = http()?;
    for cookies in [
        format!("{}; {}", planted.cookie, browser.cookie),
        format!("{unknown}; {}; {}", planted.cookie, browser.cookie),
        format!("{}; {}", browser.cookie, planted.cookie),
    ] {
        let asked = http
            .get(format!("http://{at}/api/v1/me"))
            .header("Cookie", &cookies)
            .header("Upperdeck-Page", &browser.key);
        let answer = asked.send().await?;
        assert_eq!(answer.status(), 200, "{cookies}");
        assert_eq!(answer.json::<Value>().await?["user"], "alice");
    }
    // However many: not each of them is looked for.
    let many = format!("{}{}", format!("{unknown}; ").repeat(50), browser.cookie);
    let asked = http
        .get(format!("http://{at}/api/v1/me"))
        .header("Cookie", &many)
        .header("Upperdeck-Page", &browser.key);
    assert_eq!(status(asked).await?, 401);
    // The page signs itself out, and not whom the other cookie is of.
    let both = format!("{}; {}", planted.cookie, browser.cookie);
    let out = http
        .delete(format!("http://{at}/api/v1/signin"))
        .header("Cookie", &both)
        .header("Upperdeck-Request", "1")
        .header("Upperdeck-Page", &browser.key);
    assert_eq!(status(out).await?, 204);
    assert_eq!((browser.me().await?, planted.me().await?), (401, 200));
    manager.stop().await
}

#[tokio::test(flavor = "multi_thread")]
async fn another_port_that_gets_the_cookie_cannot_use_it() -> Outcomes {
    let (_site, manager, _agent) = Site::at_work(&[session(1, Some("alice"))]).await?;
    let at = manager.address;
    let save = submit(at, Who::Alice, &id(1), "v1").await?;
    let browser = Browser::new(at, "token-alice").await?;
    let other = Browser::new(at, "token-bob").await?;
    let http = http()?;
    for path in [
        "me",
        "sessions",
        "saves",
        "images",
        "quota",
        &format!("saves/{save}"),
    ] {
        let stolen = http
            .get(format!("http://{at}/api/v1/{path}"))
            .header("Cookie", &browser.cookie);
        assert_eq!(status(stolen).await?, 401, "{path}");
    }
    for key in ["", "1", other.key.as_str(), browser.value()] {
        let stolen = http
            .delete(format!("http://{at}/api/v1/saves/{save}"))
            .header("Cookie", &browser.cookie)
            .header("Upperdeck-Request", "1")
            .header("Upperdeck-Page", key);
        assert_eq!(status(stolen).await?, 401, "{key}");
    }
    // A cookie that another port has set does not take the page's place: the key is of another sign-in.
    let planted = http
        .get(format!("http://{at}/api/v1/me"))
        .header("Cookie", &other.cookie)
        .header("Upperdeck-Page", &browser.key);
    assert_eq!(status(planted).await?, 401);
    // Browsers send no header for an event stream: it is of a save whose ID has to be known.
    let events = http
        .get(format!("http://{at}/api/v1/saves/{save}/events"))
        .header("Cookie", &browser.cookie);
    assert_eq!(status(events).await?, 200);
    // The address of the stream of all saves is no secret: it needs the page's key.
    let all = |key: Option<&str>| {
        let request = http
            .get(format!("http://{at}/api/v1/events"))
            .header("Cookie", &browser.cookie);
        match key {
            Some(key) => request.header("Upperdeck-Page", key),
            None => request,
        }
    };
    assert_eq!(status(all(None)).await?, 401);
    assert_eq!(status(all(Some(&browser.key))).await?, 200);
    assert_eq!(browser.me().await?, 200);
    manager.stop().await
}

#[tokio::test(flavor = "multi_thread")]
async fn streams_end_soon_after_the_sign_in_ends() -> Outcomes {
    let site = Site::new()?;
    let mut options = site.options()?;
    options.recheck_every = Duration::from_millis(100);
    let manager = site.manager_with(options).await?;
    let at = manager.address;
    let open = async |browser: &Browser| -> Fallible<_> {
        let stream = http()?
            .get(format!("http://{at}/api/v1/events"))
            .header("Cookie", &browser.cookie)
            .header("Upperdeck-Page", &browser.key)
            .send()
            .await?;
        assert_eq!(stream.status(), 200);
        Ok(stream)
    };
    let (ends, stays) = (
        Browser::new(at, "token-alice").await?,
        Browser::new(at, "token-alice").await?,
    );
    let (mut ended, mut goes_on) = (open(&ends).await?, open(&stays).await?);
    let out = http()?
        .delete(format!("http://{at}/api/v1/signin"))
        .header("Cookie", &ends.cookie)
        .header("Upperdeck-Request", "1")
        .header("Upperdeck-Page", &ends.key);
    assert_eq!(status(out).await?, 204);
    let whole = async {
        while ended.chunk().await?.is_some() {}
        Fallible::Ok(())
    };
    tokio::time::timeout(PATIENCE, whole).await??;
    // One event comes at once, the next one after the other stream had ended.
    for _ in 0..2 {
        assert!(goes_on.chunk().await?.is_some());
    }
    manager.stop().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_changes_nothing_for_other_pages() -> Outcomes {
    let site = Site::new()?;
    let manager = site.manager().await?;
    let at = manager.address;
    let browser = Browser::new(at, "token-alice").await?;
    let origin = format!("http://{at}");
    let json = ("Content-Type", "application/json");
    for (headers, expected) in [
        (vec![], 403),
        (vec![("Content-Type", "text/plain")], 403),
        (
            vec![("Content-Type", "text/plain"), ("Origin", origin.as_str())],
            403,
        ),
        (vec![json, ("Origin", "https://evil.example")], 403),
        (vec![json, ("Origin", "http://127.0.0.1:1")], 403),
        (vec![json, ("Origin", "null")], 403),
        (vec![json, ("Sec-Fetch-Site", "cross-site")], 403),
        (
            vec![("Upperdeck-Request", "1"), ("Sec-Fetch-Site", "same-site")],
            403,
        ),
        // As the page sends it: it gets as far as the body.
        (vec![json, ("Origin", origin.as_str())], 422),
        (vec![json, ("Upperdeck-Request", "1")], 422),
    ] {
        let mut request = browser.ask(Method::POST, "/api/v1/saves")?.body("{}");
        for (name, value) in &headers {
            request = request.header(*name, *value);
        }
        assert_eq!(status(request).await?, expected, "{headers:?}");
    }
    let forged = browser.ask(Method::DELETE, "/api/v1/images/x/tags/y")?;
    assert_eq!(status(forged).await?, 403);
    let forged = browser.ask(Method::DELETE, "/api/v1/signin")?;
    assert_eq!(status(forged).await?, 403);
    assert_eq!(browser.me().await?, 200);
    // And no page of another site shows ours, or is run by it.
    let page = http()?.get(format!("http://{at}/")).send().await?;
    let policy = page.headers()["content-security-policy"].to_str()?;
    assert!(
        policy.contains("script-src 'self'") && !policy.contains("unsafe"),
        "{policy}"
    );
    assert!(policy.contains("frame-ancestors 'none'"));
    let api = http()?.get(format!("http://{at}/healthz")).send().await?;
    assert_eq!(api.headers()["x-content-type-options"], "nosniff");
    assert!(api.headers().contains_key("x-request-id"));
    manager.stop().await
}

#[tokio::test(flavor = "multi_thread")]
async fn no_link_signs_anyone_in_and_nobody_is_replaced_unasked() -> Outcomes {
    let site = Site::new()?;
    let manager = site.manager().await?;
    let at = manager.address;
    let link = http()?
        .get(format!("http://{at}/?token=token-alice"))
        .send()
        .await?;
    assert_eq!(link.status(), 200);
    assert!(!link.headers().contains_key("set-cookie"));
    assert_eq!(link.headers()["referrer-policy"], "no-referrer");
    let get = http()?
        .get(format!("http://{at}/api/v1/signin"))
        .bearer_auth("token-alice");
    assert_eq!(status(get).await?, 405);
    for (token, expected) in [("nonsense", 401), ("token-portal", 403)] {
        let answer = sign_in(at, token, &json!({}))?.send().await?;
        assert_eq!(answer.status().as_u16(), expected, "{token}");
        assert!(!answer.headers().contains_key("set-cookie"));
    }
    let foreign = sign_in(at, "token-alice", &json!({}))?.header("Origin", "https://evil.example");
    assert_eq!(status(foreign).await?, 403);
    let alice = Browser::new(at, "token-alice").await?;
    let with = |token: &str, body: Value| -> Fallible<RequestBuilder> {
        Ok(sign_in(at, token, &body)?.header("Cookie", &alice.cookie))
    };
    let answer = with("token-bob", json!({}))?.send().await?;
    assert_eq!(answer.status(), 409);
    assert!(!answer.headers().contains_key("set-cookie"));
    let body: Value = answer.json().await?;
    let message = body["detail"].as_str().unwrap_or_default();
    assert!(message.contains("alice"), "{message}");
    assert_eq!(alice.me().await?, 200);
    let replaced = with("token-bob", json!({"replace": true}))?;
    assert_eq!(status(replaced).await?, 200);
    // Who was replaced is signed out.
    assert_eq!(alice.me().await?, 401);
    let alice = Browser::new(at, "token-alice").await?;
    let again = sign_in(at, "token-alice", &json!({}))?.header("Cookie", &alice.cookie);
    assert_eq!(status(again).await?, 200);
    assert_eq!(alice.me().await?, 401);
    manager.stop().await
}

#[tokio::test(flavor = "multi_thread")]
async fn two_managers_know_a_sign_in_and_each_ends_it() -> Outcomes {
    let site = Site::new()?;
    let mut options = site.options()?;
    options.public_url = Some("https://save.example.org/portal/".into());
    let one = site.manager_with(options.clone()).await?;
    let two = site.manager_with(options.clone()).await?;
    let mut browser = Browser::new(one.address, "token-alice").await?;
    assert!(
        browser.set.starts_with("__Secure-upperdeck=")
            && browser.set.contains("; Path=/portal/;")
            && browser.set.ends_with("; Secure"),
        "{}",
        browser.set
    );
    browser.at = two.address;
    assert_eq!(browser.me().await?, 200);
    let out = browser
        .ask(Method::DELETE, "/api/v1/signin")?
        .header("Upperdeck-Request", "1")
        .send()
        .await?;
    assert_eq!(out.status(), 204);
    let set = out.headers()["set-cookie"].to_str()?;
    assert!(
        set.starts_with("__Secure-upperdeck=;") && set.contains("Max-Age=0"),
        "{set}"
    );
    browser.at = one.address;
    assert_eq!(browser.me().await?, 401);
    two.stop().await?;
    // A token that is taken back, or made anew under the same name, ends what rests on it.
    let browser = Browser::new(one.address, "token-alice").await?;
    one.stop().await?;
    options.tokens = Tokens::default().with(
        "alice",
        upperdeck::service::manager::auth::Role::User,
        Some("alice"),
        "another",
    )?;
    let one = site.manager_with(options).await?;
    let browser = Browser {
        at: one.address,
        ..browser
    };
    assert_eq!(browser.me().await?, 401);
    one.stop().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_goes_before_any_cookie() -> Outcomes {
    let site = Site::new()?;
    let mut options = site.options()?;
    let plain = site.manager_with(options.clone()).await?;
    let alice = Browser::new(plain.address, "token-alice").await?;
    let port = plain.address.port();
    plain.stop().await?;
    // The same cookie's name at another port.
    options.public_url = Some(format!("http://127.0.0.1:{port}/"));
    options.proxies = Some(Proxies::new("X-User", &["127.0.0.1".to_owned()], vec![])?);
    let manager = site.manager_with(options).await?;
    let alice = Browser {
        at: manager.address,
        ..alice
    };
    assert_eq!(alice.me().await?, 200);
    let both = alice
        .ask(Method::GET, "/api/v1/me")?
        .header("X-User", "bob");
    let me: Value = both.send().await?.json().await?;
    assert_eq!((&me["user"], &me["via"]), (&json!("bob"), &json!("proxy")));
    let signing =
        sign_in(manager.address, "token-alice", &json!({"replace": true}))?.header("X-User", "bob");
    assert_eq!(status(signing).await?, 409);
    manager.stop().await
}

/// An identity provider that answers only when the test permits it.
async fn slow_provider(
    set: String,
) -> Fallible<(
    SocketAddr,
    std::sync::Arc<tokio::sync::Semaphore>,
    std::sync::Arc<std::sync::atomic::AtomicUsize>,
)> {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    let at = listener.local_addr()?;
    let answers = std::sync::Arc::new(tokio::sync::Semaphore::new(1));
    let asked = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let (permits, count) = (answers.clone(), asked.clone());
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            count.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
            let (permits, set) = (permits.clone(), set.clone());
            tokio::spawn(async move {
                let _ = stream.read(&mut [0; 4096]).await;
                if let Ok(permit) = permits.acquire().await {
                    permit.forget();
                }
                let head = format!(
                    "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
                    set.len()
                );
                let _ = stream.write_all((head + &set).as_bytes()).await;
            });
        }
    });
    Ok((at, answers, asked))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_is_fetched_holds_up_nobody_else() -> Outcomes {
    let provider = Provider::new("k1")?;
    let (idp, answers, asked) = slow_provider(provider.set.clone()).await?;
    let site = Site::new()?;
    let mut options = site.options()?;
    options.jwt = Some(Jwt {
        keys: Keys::Url(format!("http://{idp}/jwks")),
        issuer: "https://id.example".into(),
        audience: "upperdeck".into(),
        claims: Claims {
            user: "sub".into(),
            groups: None,
            email: None,
            administrator: None,
            administrators: vec![],
        },
    });
    options.connections.requests_per_user = 1000;
    let manager = site.manager_with(options).await?;
    let me = format!("http://{}/api/v1/me", manager.address);
    let now = upperdeck::service::job::now_ms() / 1000;
    let claims =
        json!({"iss": "https://id.example", "aud": "upperdeck", "exp": now + 600, "sub": "alice"});
    let good = provider.token("k1", &claims)?;
    let http = http()?;
    // The keys were fetched at the start; the next fetch may come ten seconds later, and hangs.
    tokio::time::sleep(std::time::Duration::from_millis(10_500)).await;
    let unknown: Vec<_> = (0..100)
        .map(|n| {
            let token = provider.token(&format!("unknown-{n}"), &claims);
            let request = token.map(|token| http.get(&me).bearer_auth(token));
            tokio::spawn(async move { request.ok()?.send().await.ok() })
        })
        .collect();
    while asked.load(std::sync::atomic::Ordering::SeqCst) < 2 {
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    for _ in 0..20 {
        assert_eq!(status(http.get(&me).bearer_auth(&good)).await?, 200);
    }
    // Still none has answered: what was just seen did not wait for it.
    assert_eq!(answers.available_permits(), 0);
    answers.add_permits(1);
    let mut statuses = std::collections::BTreeMap::<u16, usize>::new();
    for task in unknown {
        let answer = task.await?.ok_or("no answer")?;
        *statuses.entry(answer.status().as_u16()).or_default() += 1;
    }
    // A few waited, the others were asked to come again.
    assert!(
        statuses.keys().all(|status| [401, 503].contains(status)),
        "{statuses:?}"
    );
    assert!(statuses[&401] <= 33, "{statuses:?}");
    let unknown = provider.token("unknown", &claims)?;
    assert_eq!(status(http.get(&me).bearer_auth(&unknown)).await?, 401);
    assert_eq!(asked.load(std::sync::atomic::Ordering::SeqCst), 2);
    // A sign-in with such a token ends with it.
    let browser = Browser::new(manager.address, &good).await?;
    let age: i64 = browser
        .set
        .split("Max-Age=")
        .nth(1)
        .and_then(|rest| rest.split(';').next())
        .ok_or("no age")?
        .parse()?;
    assert!((1..=600).contains(&age), "{age}");
    assert_eq!(browser.me().await?, 200);
    manager.stop().await
}
