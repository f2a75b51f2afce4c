//! Authentication and permissions: each kind of caller with each call, and the ways to authenticate.

use base64::Engine as _;
use reqwest::Method;
use serde_json::{Value, json};
use upperdeck::service::manager::auth::{Claims, Jwt, Keys, Proxies, Tokens};

use crate::site::{Outcomes, Site, Who, ask, get, http, id, request, session, submit, until};

const CALLERS: [Who; 7] = [
    Who::Alice,
    Who::Bob,
    Who::PortalFor("alice"),
    Who::PortalFor("bob"),
    Who::Portal,
    Who::Administrator,
    Who::Anonymous,
];

/// Method, path, body, and the expected status for each of `CALLERS`. ALICE stands for an open save of alice, DONE for
/// a failed one.
#[rustfmt::skip]
const TABLE: [(&str, &str, &str, [u16; 7]); 28] = [
    ("GET", "/api/v1/me", "", [200, 200, 200, 200, 403, 200, 401]),
    ("GET", "/api/v1/sessions", "", [200, 200, 200, 200, 403, 200, 401]),
    ("POST", "/api/v1/saves", "session", [409, 404, 409, 404, 403, 409, 401]),
    ("GET", "/api/v1/saves", "", [200, 200, 200, 200, 403, 200, 401]),
    ("GET", "/api/v1/saves?user=alice", "", [200, 403, 200, 403, 403, 200, 401]),
    ("GET", "/api/v1/saves/ALICE", "", [200, 404, 200, 404, 403, 200, 401]),
    ("GET", "/api/v1/saves/ALICE/events", "", [200, 404, 200, 404, 403, 200, 401]),
    ("GET", "/api/v1/events", "", [200, 200, 200, 200, 403, 200, 401]),
    ("GET", "/api/v1/events?user=alice", "", [200, 403, 200, 403, 403, 200, 401]),
    ("GET", "/api/v1/saves/ALICE/audit", "", [403, 403, 403, 403, 403, 200, 401]),
    ("POST", "/api/v1/saves/ALICE/requeue", "", [403, 403, 403, 403, 403, 409, 401]),
    ("DELETE", "/api/v1/saves/DONE", "", [409, 404, 409, 404, 403, 409, 401]),
    ("GET", "/api/v1/images", "", [200, 200, 200, 200, 403, 200, 401]),
    ("GET", "/api/v1/images?user=alice", "", [200, 403, 200, 403, 403, 200, 401]),
    ("DELETE", "/api/v1/images/none/tags/v1", "", [404, 404, 404, 404, 403, 422, 401]),
    ("DELETE", "/api/v1/images/none/tags/v1?user=alice", "", [404, 403, 404, 403, 403, 404, 401]),
    ("DELETE", "/api/v1/images/torch/tags/v1?user=alice", "", [409, 403, 409, 403, 403, 409, 401]),
    ("GET", "/api/v1/quota", "", [200, 200, 200, 200, 403, 422, 401]),
    ("GET", "/api/v1/quota?user=alice", "", [200, 403, 200, 403, 403, 200, 401]),
    ("GET", "/api/v1/nodes", "", [403, 403, 403, 403, 403, 200, 401]),
    ("GET", "/api/v1/dead", "", [403, 403, 403, 403, 403, 200, 401]),
    ("GET", "/healthz", "", [200; 7]),
    ("GET", "/readyz", "", [200; 7]),
    ("GET", "/metrics", "", [200; 7]),
    ("GET", "/openapi.json", "", [200; 7]),
    ("GET", "/", "", [200; 7]),
    ("GET", "/nothing/here", "", [404; 7]),
    ("PUT", "/api/v1/saves", "", [405; 7]),
];

#[tokio::test(flavor = "multi_thread")]
async fn every_caller_may_do_what_the_table_says() -> Outcomes {
    let (_site, manager, agent) =
        Site::at_work(&[session(1, Some("alice")), session(2, Some("alice"))]).await?;
    let at = manager.address;
    let done = submit(at, Who::Alice, &id(2), "v2").await?;
    let claim = agent.claim().await?;
    agent.begin(&claim).await?;
    let outcome = upperdeck::service::job::Outcome::Failed {
        code: upperdeck::service::job::Code::Policy,
        message: "no".into(),
        retryable: false,
    };
    agent.end(&claim, 2, outcome).await?;
    let path = format!("/api/v1/saves/{done}");
    until(at, Who::Alice, &path, |save| save["state"] == "failed").await?;
    let alice = submit(at, Who::Alice, &id(1), "v1").await?;
    let mut wrong = Vec::new();
    for (method, path, body, expected) in TABLE {
        let path = path
            .replace("ALICE", &alice.to_string())
            .replace("DONE", &done.to_string());
        for (who, expected) in CALLERS.into_iter().zip(expected) {
            let mut request = request(at, who, method.parse()?, &path)?;
            if body == "session" {
                request =
                    request.json(&json!({"session": id(1), "image": {"name": "n", "tag": "t"}}));
            }
            let answer = request.send().await?;
            let status = answer.status().as_u16();
            if status != expected {
                wrong.push(format!("{who:?} {method} {path}: {status}, not {expected}"));
            }
            if status >= 400 {
                let body: Value = answer.json().await?;
                let code = body["code"].as_str().unwrap_or_default();
                let message = body["detail"].as_str().unwrap_or_default();
                assert!(
                    !code.is_empty() && !message.is_empty(),
                    "{method} {path}: {body}"
                );
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    // What a requeue and an end do for those who may.
    let again = format!("/api/v1/saves/{done}/requeue");
    let (status, _) = ask(at, Who::Administrator, Method::POST, &again, None).await?;
    assert_eq!(status, 202);
    let path = format!("/api/v1/saves/{alice}");
    let (status, save) = ask(at, Who::PortalFor("alice"), Method::DELETE, &path, None).await?;
    assert_eq!(
        (status.as_u16(), &save["state"]),
        (200, &json!("cancelled"))
    );
    manager.stop().await
}

#[tokio::test(flavor = "multi_thread")]
async fn everybody_sees_their_own_and_administrators_all() -> Outcomes {
    let sessions = [
        session(1, Some("alice")),
        session(2, Some("bob")),
        session(3, None),
    ];
    let (_site, manager, _) = Site::at_work(&sessions).await?;
    let at = manager.address;
    submit(at, Who::Alice, &id(1), "v1").await?;
    submit(at, Who::PortalFor("bob"), &id(2), "v1").await?;
    let count = |body: &Value, list: &str| body[list].as_array().map_or(0, Vec::len);
    for (who, sessions, saves) in [
        (Who::Alice, 1, 1),
        (Who::Bob, 1, 1),
        (Who::PortalFor("carol"), 0, 0),
        (Who::Administrator, 3, 2),
    ] {
        let found = get(at, who, "/api/v1/sessions").await?;
        assert_eq!(count(&found, "sessions"), sessions, "{who:?}");
        let found = get(at, who, "/api/v1/saves").await?;
        assert_eq!(count(&found, "saves"), saves, "{who:?}");
    }
    let me = get(at, Who::Administrator, "/api/v1/me").await?;
    assert_eq!(me["administrator"], true);
    // A session without an owner is saved by administrators, who say whose image it becomes.
    let body = json!({"session": id(3), "image": {"name": "x", "tag": "t"}});
    let (status, _) = ask(
        at,
        Who::Administrator,
        Method::POST,
        "/api/v1/saves",
        Some(body),
    )
    .await?;
    assert_eq!(status, 403);
    manager.stop().await
}

/// A signing key of an identity provider, and the key set that verifies its signatures.
pub struct Provider {
    key: jsonwebtoken::EncodingKey,
    pub set: String,
}

impl Provider {
    pub fn new(kid: &str) -> Result<Self, Box<dyn std::error::Error>> {
        use ring::signature::KeyPair as _;
        let pkcs8 =
            ring::signature::Ed25519KeyPair::generate_pkcs8(&ring::rand::SystemRandom::new())
                .map_err(|_| "no key")?;
        let pair =
            ring::signature::Ed25519KeyPair::from_pkcs8(pkcs8.as_ref()).map_err(|_| "no key")?;
        let x = base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(pair.public_key());
        Ok(Self {
            key: jsonwebtoken::EncodingKey::from_ed_der(pkcs8.as_ref()),
            set: json!({"keys": [{"kty": "OKP", "crv": "Ed25519", "use": "sig", "alg": "EdDSA", "kid": kid, "x": x}]})
                .to_string(),
        })
    }

    /// Returns a correctly signed token with an additional header field.
    fn token_with(
        &self,
        kid: &str,
        field: &str,
        value: Value,
        claims: &Value,
    ) -> Result<String, jsonwebtoken::errors::Error> {
        let code = |value: &Value| {
            base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(value.to_string())
        };
        let mut head = json!({"typ": "JWT", "alg": "EdDSA", "kid": kid});
        head[field] = value;
        let signed = format!("{}.{}", code(&head), code(claims));
        let algorithm = jsonwebtoken::Algorithm::EdDSA;
        let signature = jsonwebtoken::crypto::sign(signed.as_bytes(), &self.key, algorithm)?;
        Ok(format!("{signed}.{signature}"))
    }

    pub fn token(&self, kid: &str, claims: &Value) -> Result<String, jsonwebtoken::errors::Error> {
        let mut header = jsonwebtoken::Header::new(jsonwebtoken::Algorithm::EdDSA);
        header.kid = Some(kid.to_owned());
        jsonwebtoken::encode(&header, claims, &self.key)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn users_come_with_tokens_of_the_identity_provider_and_with_no_others() -> Outcomes {
    let site = Site::new()?;
    let file = site.dir.path().join("jwks.json");
    let (ours, others) = (Provider::new("k1")?, Provider::new("k1")?);
    std::fs::write(&file, &ours.set)?;
    let mut options = site.options()?;
    options.jwt = Some(Jwt {
        keys: Keys::File(file),
        issuer: "https://id.example".into(),
        audience: "upperdeck".into(),
        claims: Claims {
            user: "preferred_username".into(),
            groups: None,
            email: None,
            administrator: Some(("realm.roles".into(), "admin".into())),
            administrators: vec!["carol".into()],
        },
    });
    let manager = site.manager_with(options).await?;
    let at = manager.address;
    let now = upperdeck::service::job::now_ms() / 1000;
    let claims = |user: &str| json!({"iss": "https://id.example", "aud": "upperdeck", "exp": now + 600, "preferred_username": user});
    let with = |mut claims: Value, name: &str, value: Value| {
        claims[name] = value;
        claims
    };
    let http = http()?;
    let me = async |token: &str| -> Result<(u16, Value), reqwest::Error> {
        let request = http
            .get(format!("http://{at}/api/v1/me"))
            .bearer_auth(token);
        let answer = request.send().await?;
        Ok((answer.status().as_u16(), answer.json().await?))
    };
    let (status, body) = me(&ours.token("k1", &claims("alice"))?).await?;
    assert_eq!(
        (status, body),
        (
            200,
            json!({"user": "alice", "administrator": false, "via": "token"})
        )
    );
    // A head with more than we ask for is no harm.
    let more = ours.token_with("k1", "x", json!(1), &claims("alice"))?;
    assert_eq!(me(&more).await?.0, 200);
    let (_, body) = me(&ours.token("k1", &claims("carol"))?).await?;
    assert_eq!(body["administrator"], true);
    let roles = with(claims("dave"), "realm", json!({"roles": ["user", "admin"]}));
    let (_, body) = me(&ours.token("k1", &roles)?).await?;
    assert_eq!(body["administrator"], true);
    let alice = ours.token("k1", &claims("alice"))?;
    let mut parts = alice.split('.');
    let (head, body) = (
        parts.next().unwrap_or_default(),
        parts.next().unwrap_or_default(),
    );
    let none =
        base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(r#"{"alg":"none","typ":"JWT"}"#);
    // The public key as an HMAC's secret: the oldest trick.
    let mut header = jsonwebtoken::Header::new(jsonwebtoken::Algorithm::HS256);
    header.kid = Some("k1".into());
    let secret = jsonwebtoken::EncodingKey::from_secret(ours.set.as_bytes())?;
    let bad = [
        others.token("k1", &claims("alice"))?,
        ours.token("k2", &claims("alice"))?,
        ours.token("k1", &with(claims("alice"), "exp", json!(now - 600)))?,
        ours.token("k1", &with(claims("alice"), "nbf", json!(now + 600)))?,
        ours.token(
            "k1",
            &with(claims("alice"), "iss", json!("https://evil.example")),
        )?,
        ours.token("k1", &with(claims("alice"), "aud", json!("another")))?,
        ours.token("k1", &with(claims("alice"), "preferred_username", json!(7)))?,
        ours.token_with("k1", "crit", json!(["exp"]), &claims("alice"))?,
        ours.token_with("k1", "crit", json!([]), &claims("alice"))?,
        ours.token_with("k1", "b64", json!(false), &claims("alice"))?,
        ours.token("k1", &claims(""))?,
        ours.token("k1", &claims("a\nb"))?,
        jsonwebtoken::encode(&header, &claims("alice"), &secret)?,
        format!("{none}.{body}."),
        format!("{head}.{body}."),
        format!("{head}.{body}.AAAA"),
        "a.b.c".to_owned(),
        "..".to_owned(),
    ];
    for token in bad {
        assert_eq!(me(&token).await?.0, 401, "{token}");
    }
    manager.stop().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_header_names_the_user_only_when_a_proxy_says_it() -> Outcomes {
    let site = Site::new()?;
    let at_work = |from: &str| -> Result<_, Box<dyn std::error::Error>> {
        let mut options = site.options()?;
        let from = [from.to_owned()];
        options.proxies = Some(Proxies::new(
            "X-Forwarded-User",
            &from,
            vec!["carol".into()],
        )?);
        Ok(options)
    };
    let named =
        |at, user: &'static str| -> Result<_, Box<dyn std::error::Error>> {
            Ok(request(at, Who::Anonymous, Method::GET, "/api/v1/me")?
                .header("X-Forwarded-User", user))
        };
    let off = site.manager().await?;
    assert_eq!(named(off.address, "alice")?.send().await?.status(), 401);
    off.stop().await?;
    let elsewhere = site.manager_with(at_work("10.0.0.0/8")?).await?;
    assert_eq!(
        named(elsewhere.address, "alice")?.send().await?.status(),
        401
    );
    elsewhere.stop().await?;
    let manager = site.manager_with(at_work("127.0.0.0/8")?).await?;
    let at = manager.address;
    let me: Value = named(at, "alice")?.send().await?.json().await?;
    assert_eq!(
        me,
        json!({"user": "alice", "administrator": false, "via": "proxy"})
    );
    let me: Value = named(at, "carol")?.send().await?.json().await?;
    assert_eq!(me["administrator"], true);
    let twice = named(at, "alice")?.header("X-Forwarded-User", "carol");
    assert_eq!(twice.send().await?.status(), 401);
    // A browser behind the proxy is protected as one with a cookie is.
    let forged = request(
        at,
        Who::Anonymous,
        Method::DELETE,
        "/api/v1/images/x/tags/y",
    )?
    .header("X-Forwarded-User", "alice");
    assert_eq!(forged.send().await?.status(), 403);
    manager.stop().await
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_have_bounds() -> Outcomes {
    let site = Site::new()?;
    let mut options = site.options()?;
    options.body_bytes = 1000;
    options.rate = Some(upperdeck::service::manager::Rate {
        per_second: 0.001,
        burst: 20.0,
    });
    options.tokens = options.tokens.with(
        "dave",
        upperdeck::service::manager::auth::Role::User,
        Some("dave"),
        "token-dave",
    )?;
    let manager = site.manager_with(options).await?;
    let at = manager.address;
    let large = json!({"session": "x".repeat(2000)});
    let (status, body) = ask(at, Who::Alice, Method::POST, "/api/v1/saves", Some(large)).await?;
    assert_eq!((status.as_u16(), &body["code"]), (413, &json!("invalid")));
    let long = format!("/api/v1/images?search={}", "x".repeat(17 << 10));
    let (status, body) = ask(at, Who::Alice, Method::GET, &long, None).await?;
    assert_eq!((status.as_u16(), &body["code"]), (414, &json!("invalid")));
    let refused = request(at, Who::Alice, Method::GET, "/api/v1/me")?
        .header("X-Long", "x".repeat(33 << 10))
        .send()
        .await?;
    assert_eq!(refused.status(), 431);
    let problem: serde_json::Value = refused.json().await?;
    assert_eq!(problem["code"], "invalid", "{problem}");
    let plain = request(at, Who::Alice, Method::POST, "/api/v1/saves")?
        .body("{}")
        .send()
        .await?;
    assert_eq!(plain.status(), 415);
    let broken = request(at, Who::Alice, Method::POST, "/api/v1/saves")?
        .header("Content-Type", "application/json")
        .body("{\"session\":")
        .send()
        .await?;
    assert_eq!(broken.status(), 400);
    let mut last = None;
    for _ in 0..25 {
        last = Some(
            request(at, Who::Alice, Method::GET, "/api/v1/me")?
                .send()
                .await?,
        );
    }
    let last = last.ok_or("none")?;
    assert_eq!(last.status(), 429);
    assert!(last.headers().contains_key("retry-after"));
    // Another caller's bound is another one.
    assert_eq!(
        ask(at, Who::Bob, Method::GET, "/api/v1/me", None).await?.0,
        200
    );
    manager.stop().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_socket_file_serves_and_is_replaced() -> Outcomes {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let site = Site::new()?;
    let path = site.dir.path().join("manager.sock");
    // What a dead manager left.
    drop(std::os::unix::net::UnixListener::bind(&path)?);
    let mut options = site.options()?;
    options.tokens = Tokens::default();
    options.listen = upperdeck::service::manager::Listen::Unix(path.clone());
    options.proxies = Some(Proxies::new("X-User", &["unix".to_owned()], vec![])?);
    let manager = site.manager_with(options).await?;
    let mut stream = tokio::net::UnixStream::connect(&path).await?;
    let text = "GET /api/v1/me HTTP/1.1\r\nHost: x\r\nX-User: alice\r\nConnection: close\r\n\r\n";
    stream.write_all(text.as_bytes()).await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    assert!(
        answer.starts_with("HTTP/1.1 200") && answer.contains("\"alice\""),
        "{answer}"
    );
    manager.stop().await?;
    assert!(!path.exists());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_that_is_no_text_is_refused_like_all_else() -> Outcomes {
    let site = Site::new()?;
    let manager = site.manager().await?;
    for (method, path) in [
        (Method::GET, "/api/v1/saves/%ff"),
        (Method::GET, "/api/v1/saves/%ff/events"),
        (Method::DELETE, "/api/v1/images/%ff/tags/x"),
    ] {
        let (status, body) = ask(manager.address, Who::Alice, method, path, None).await?;
        assert_eq!(
            (status.as_u16(), &body["code"]),
            (400, &json!("invalid")),
            "{path}"
        );
    }
    manager.stop().await
}
