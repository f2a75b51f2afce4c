//! Signing in with an identity provider: a provider that says what the test specifies, and what must not be believed.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::routing::{get, post};
use axum::{Form, Json, Router};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use upperdeck::service::manager::auth::{Claims, Oidc, Tokens};

use crate::access::Provider as Key;
use crate::site::{Manager, Outcomes, Site, http};

type Fallible<T> = Result<T, Box<dyn std::error::Error>>;

/// A client's page has this URL, whatever the port of the manager is: no request follows it.
const PAGE: &str = "https://save.example.org/";
const CLIENT: &str = "upperdeck";
const SECRET: &str = "s3cret";

/// What the provider says.
struct Said {
    issuer: String,
    /// The one in the description, which is to be that of the settings.
    described: String,
    /// Whether its description says that every answer names the issuer.
    names_itself: bool,
    key: Key,
    kid: String,
    /// Codes with their PKCE challenge and claims.
    codes: BTreeMap<String, (String, Value)>,
    /// Changes the ID token after it was signed.
    forge: fn(String) -> String,
    userinfo: Value,
    down: bool,
    fetched: u32,
    /// How often a code was to be redeemed.
    redeemed: u32,
}

#[derive(Clone)]
struct Idp(Arc<Mutex<Said>>);

impl Idp {
    /// Starts a provider on `at`, or any free port.
    async fn start(at: SocketAddr) -> Fallible<Self> {
        let listener = tokio::net::TcpListener::bind(at).await?;
        let issuer = format!("http://{}", listener.local_addr()?);
        let idp = Self(Arc::new(Mutex::new(Said {
            described: issuer.clone(),
            names_itself: false,
            issuer,
            key: Key::new("k1")?,
            kid: "k1".to_owned(),
            codes: BTreeMap::new(),
            forge: |token| token,
            userinfo: json!({}),
            down: false,
            fetched: 0,
            redeemed: 0,
        })));
        let router = Router::new()
            .route("/.well-known/openid-configuration", get(describe))
            .route("/keys", get(keys))
            .route("/token", post(token))
            .route("/userinfo", get(userinfo))
            .with_state(idp.clone());
        tokio::spawn(async move { axum::serve(listener, router).await });
        Ok(idp)
    }

    fn said<T>(&self, with: impl FnOnce(&mut Said) -> T) -> T {
        with(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn options(&self, site: &Site) -> Fallible<upperdeck::service::manager::Options> {
        let mut options = site.options()?;
        options.tokens = Tokens::default();
        options.oidc = Some(Oidc {
            issuer: self.said(|said| said.issuer.clone()),
            name: "Example University".to_owned(),
            client_id: CLIENT.to_owned(),
            client_secret: Some(zeroize::Zeroizing::new(SECRET.to_owned())),
            scopes: vec!["profile".to_owned()],
            claims: Claims {
                user: "preferred_username".to_owned(),
                groups: Some("groups".to_owned()),
                email: None,
                administrator: Some(("groups".to_owned(), "admins".to_owned())),
                administrators: Vec::new(),
            },
            redirect: PAGE.to_owned(),
            lifetime: Duration::from_secs(3600),
        });
        Ok(options)
    }
}

async fn describe(State(idp): State<Idp>) -> (StatusCode, Json<Value>) {
    idp.said(|said| {
        said.fetched += 1;
        let at = &said.issuer;
        let status = if said.down {
            StatusCode::BAD_GATEWAY
        } else {
            StatusCode::OK
        };
        let described = json!({
            "issuer": said.described,
            "authorization_endpoint": format!("{at}/authorize?tenant=1"),
            "token_endpoint": format!("{at}/token"),
            "userinfo_endpoint": format!("{at}/userinfo"),
            "end_session_endpoint": format!("{at}/logout"),
            "jwks_uri": format!("{at}/keys"),
            "authorization_response_iss_parameter_supported": said.names_itself,
            "response_types_supported": ["code"],
            "subject_types_supported": ["public"],
            // HS256 and none are offered as well: they must not be taken.
            "id_token_signing_alg_values_supported": ["RS256", "EdDSA", "HS256", "none"],
        });
        (status, Json(described))
    })
}

async fn keys(State(idp): State<Idp>) -> Json<Value> {
    Json(idp.said(|said| serde_json::from_str(&said.key.set).unwrap_or_default()))
}

async fn token(
    State(idp): State<Idp>,
    headers: HeaderMap,
    Form(asked): Form<BTreeMap<String, String>>,
) -> (StatusCode, Json<Value>) {
    let wrong = |error: &str| {
        let text = "<b>no</b>\u{202e}\n".to_owned() + &"x".repeat(1000);
        let body = json!({"error": error, "error_description": text});
        (StatusCode::BAD_REQUEST, Json(body))
    };
    let basic = base64::engine::general_purpose::STANDARD.encode(format!("{CLIENT}:{SECRET}"));
    let given = headers
        .get("authorization")
        .and_then(|value| value.to_str().ok());
    if given != Some(&format!("Basic {basic}")) || asked["redirect_uri"] != PAGE {
        return wrong("invalid_client");
    }
    let verifier = asked["code_verifier"].as_bytes();
    let challenge = URL_SAFE_NO_PAD.encode(Sha256::digest(verifier));
    idp.said(|said| {
        said.redeemed += 1;
        // A provider that lets a code be used twice: the manager must not rely on it.
        let Some((expected, claims)) = said.codes.get(&asked["code"]) else {
            return wrong("invalid_grant");
        };
        if *expected != challenge {
            return wrong("invalid_grant");
        }
        let token = said.key.token(&said.kid, claims).unwrap_or_default();
        let token = (said.forge)(token);
        let body = json!({"access_token": "at", "token_type": "Bearer", "id_token": token});
        (StatusCode::OK, Json(body))
    })
}

async fn userinfo(State(idp): State<Idp>) -> Json<Value> {
    Json(idp.said(|said| said.userinfo.clone()))
}

/// A browser with the page.
#[derive(Clone)]
struct Browser {
    at: SocketAddr,
    cookie: String,
    key: String,
    query: BTreeMap<String, String>,
    url: String,
}

impl Browser {
    async fn begin(at: SocketAddr) -> Fallible<Self> {
        let answer = http()?
            .post(format!("http://{at}/api/v1/signin/oidc"))
            .header("Upperdeck-Request", "1")
            .send()
            .await?;
        if answer.status() != 200 {
            return Err(format!("{}: {}", answer.status(), answer.text().await?).into());
        }
        let set = answer.headers()["set-cookie"].to_str()?.to_owned();
        for part in ["; HttpOnly", "; SameSite=Lax", "; Max-Age=600", "; Secure"] {
            assert!(set.contains(part), "{set}");
        }
        let body: Value = answer.json().await?;
        let url = body["url"].as_str().unwrap_or_default().to_owned();
        let parsed = reqwest::Url::parse(&url)?;
        Ok(Self {
            at,
            cookie: set.split(';').next().unwrap_or_default().to_owned(),
            key: body["key"].as_str().unwrap_or_default().to_owned(),
            query: parsed.query_pairs().into_owned().collect(),
            url,
        })
    }

    /// Claims that are right.
    fn claims(&self, idp: &Idp) -> Value {
        let now = upperdeck::service::job::now_ms() / 1000;
        json!({
            "iss": idp.said(|said| said.issuer.clone()), "aud": CLIENT, "sub": "0815",
            "iat": now, "exp": now + 300, "nonce": self.query["nonce"],
            "preferred_username": "alice", "groups": ["staff"],
        })
    }

    /// The provider signs the user in with these claims; returns what it adds to the address.
    fn user_signs_in(&self, idp: &Idp, claims: Value) -> Value {
        let challenge = self.query["code_challenge"].clone();
        let code = idp.said(|said| {
            let code = format!("code-{}", said.codes.len());
            said.codes.insert(code.clone(), (challenge, claims));
            code
        });
        json!({"state": self.query["state"], "code": code})
    }

    async fn complete(&self, answer: &Value) -> Fallible<reqwest::Response> {
        let mut body = answer.clone();
        body["key"] = json!(self.key);
        let request = http()?
            .post(format!("http://{}/api/v1/signin/oidc/answer", self.at))
            .header("Cookie", &self.cookie)
            .json(&body);
        Ok(request.send().await?)
    }

    /// Returns the status and the code and message of the refusal.
    async fn refusal(&self, answer: &Value) -> Fallible<(u16, String, String)> {
        let answer = self.complete(answer).await?;
        let status = answer.status().as_u16();
        assert_eq!(answer.headers().get("location"), None);
        let body: Value = answer.json().await?;
        let of = |name: &str| {
            let found = body.get(name).or_else(|| body["error"].get(name));
            found.and_then(Value::as_str).unwrap_or_default().to_owned()
        };
        let message = if body["error"].is_object() {
            of("message")
        } else {
            of("detail")
        };
        Ok((status, of("code"), message))
    }
}

async fn at_work() -> Fallible<(Site, Idp, Manager)> {
    let (site, idp) = (Site::new()?, Idp::start(([127, 0, 0, 1], 0).into()).await?);
    let mut options = idp.options(&site)?;
    options.public_url = Some(PAGE.to_owned());
    let manager = site.manager_with(options).await?;
    Ok((site, idp, manager))
}

/// Cookie and key of a completed sign-in.
async fn signed_in(answer: reqwest::Response) -> Fallible<(String, String)> {
    assert_eq!(answer.status(), 200);
    let set = answer.headers().get_all("set-cookie").iter();
    let set: Vec<String> = set
        .filter_map(|value| Some(value.to_str().ok()?.to_owned()))
        .collect();
    let session = set
        .iter()
        .find(|set| set.starts_with("__Host-upperdeck="))
        .ok_or("no cookie")?;
    assert!(
        session.contains("; HttpOnly; SameSite=Strict; "),
        "{session}"
    );
    // The cookie of the sign-in is deleted.
    assert!(
        set.iter()
            .any(|set| set.starts_with("__Host-upperdeck-signin=;")),
        "{set:?}"
    );
    let cookie = session.split(';').next().unwrap_or_default().to_owned();
    let body: Value = answer.json().await?;
    Ok((cookie, body["key"].as_str().unwrap_or_default().to_owned()))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_signs_in_and_out_with_the_provider() -> Outcomes {
    let (site, idp, manager) = at_work().await?;
    let at = manager.address;
    let ways: Value = http()?
        .get(format!("http://{at}/api/v1/signin/ways"))
        .send()
        .await?
        .json()
        .await?;
    assert_eq!(
        ways,
        json!({"token": false, "provider": "Example University"})
    );
    let browser = Browser::begin(at).await?;
    for (name, value) in [
        ("client_id", CLIENT),
        ("redirect_uri", PAGE),
        ("response_type", "code"),
        ("scope", "openid profile"),
        ("code_challenge_method", "S256"),
        ("tenant", "1"),
    ] {
        assert_eq!(browser.query[name], value, "{}", browser.url);
    }
    let answer = browser.user_signs_in(&idp, browser.claims(&idp));
    let (cookie, key) = signed_in(browser.complete(&answer).await?).await?;
    let me = async || -> Fallible<Value> {
        let request = http()?
            .get(format!("http://{at}/api/v1/me"))
            .header("Cookie", &cookie)
            .header("Upperdeck-Page", &key);
        Ok(request.send().await?.json().await?)
    };
    let found = me().await?;
    assert_eq!(
        (&found["user"], &found["via"]),
        (&json!("alice"), &json!("sign_in"))
    );
    assert_eq!(found["administrator"], false);
    // What ends the provider's session is in the record, and not to be read there.
    for file in ["record.db", "record.db-wal"] {
        let bytes = std::fs::read(site.dir.path().join(file)).unwrap_or_default();
        let text = String::from_utf8_lossy(&bytes);
        assert!(!text.contains("eyJ"), "{file} has a token");
    }
    let left = http()?
        .delete(format!("http://{at}/api/v1/signin"))
        .header("Cookie", &cookie)
        .header("Upperdeck-Page", &key)
        .header("Upperdeck-Request", "1")
        .send()
        .await?;
    let left: Value = left.json().await?;
    let url = reqwest::Url::parse(left["provider"].as_str().unwrap_or_default())?;
    let query: BTreeMap<_, _> = url.query_pairs().into_owned().collect();
    assert_eq!(url.path(), "/logout");
    assert_eq!(query["post_logout_redirect_uri"], PAGE);
    assert!(query["id_token_hint"].starts_with("eyJ"), "{url}");
    assert_eq!(me().await?["user"], Value::Null);
    manager.stop().await
}

#[tokio::test(flavor = "multi_thread")]
async fn no_other_browser_and_no_second_answer_completes_a_sign_in() -> Outcomes {
    let (_site, idp, manager) = at_work().await?;
    let at = manager.address;
    let (own, other) = (Browser::begin(at).await?, Browser::begin(at).await?);
    let answer = own.user_signs_in(&idp, own.claims(&idp));
    let mut state = answer.clone();
    state["state"] = json!(other.query["state"]);
    let with = |cookie: &str, key: &str| Browser {
        cookie: cookie.to_owned(),
        key: key.to_owned(),
        ..own.clone()
    };
    for (browser, answer) in [
        (with(&own.cookie, &own.key), state),
        (with(&other.cookie, &other.key), answer.clone()),
        (with(&other.cookie, &own.key), answer.clone()),
        (with(&own.cookie, &other.key), answer.clone()),
        (with("", &own.key), answer.clone()),
        (with(&own.cookie, ""), answer.clone()),
        (
            with(&own.cookie, &own.key),
            json!({"state": "", "code": answer["code"]}),
        ),
    ] {
        let (status, code, _) = browser.refusal(&answer).await?;
        assert_eq!((status, code.as_str()), (403, "signin_expired"));
    }
    signed_in(own.complete(&answer).await?).await?;
    // The provider would give tokens again.
    let (status, code, _) = own.refusal(&answer).await?;
    assert_eq!((status, code.as_str()), (403, "signin_expired"));
    // Nor does it see the code again: it would revoke what it gave for it.
    let browser = Browser::begin(at).await?;
    let answer = browser.user_signs_in(&idp, browser.claims(&idp));
    let redeemed = idp.said(|said| said.redeemed);
    let both = tokio::join!(browser.complete(&answer), browser.complete(&answer));
    let mut statuses = [both.0?.status().as_u16(), both.1?.status().as_u16()];
    statuses.sort_unstable();
    assert_eq!(statuses, [200, 403]);
    assert_eq!(idp.said(|said| said.redeemed), redeemed + 1);
    // A page elsewhere completes none.
    let foreign = http()?
        .post(format!("http://{at}/api/v1/signin/oidc/answer"))
        .header("Origin", "https://evil.example")
        .header("Cookie", &other.cookie)
        .json(&json!({"key": other.key, "state": other.query["state"], "code": "x"}));
    assert_eq!(foreign.send().await?.status(), 403);
    manager.stop().await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_old_sign_in_is_not_completed() -> Outcomes {
    let (_site, idp, manager) = at_work().await?;
    let mut browser = Browser::begin(manager.address).await?;
    let answer = browser.user_signs_in(&idp, browser.claims(&idp));
    // The time in the cookie cannot be changed: state, nonce and verifier depend on it.
    let (name, value) = browser.cookie.split_once('=').ok_or("no cookie")?;
    let mut bytes = URL_SAFE_NO_PAD.decode(value)?;
    let begun = i64::from_be_bytes(*bytes.first_chunk().ok_or("short")?);
    bytes[..8].copy_from_slice(&(begun + 1).to_be_bytes());
    browser.cookie = format!("{name}={}", URL_SAFE_NO_PAD.encode(&bytes));
    let (status, code, _) = browser.refusal(&answer).await?;
    assert_eq!((status, code.as_str()), (403, "signin_expired"));
    manager.stop().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_provider_that_names_itself_in_its_answers_has_to() -> Outcomes {
    let site = Site::new()?;
    let idp = Idp::start(([127, 0, 0, 1], 0).into()).await?;
    idp.said(|said| said.names_itself = true);
    let mut options = idp.options(&site)?;
    options.public_url = Some(PAGE.to_owned());
    let manager = site.manager_with(options).await?;
    let browser = Browser::begin(manager.address).await?;
    let answer = browser.user_signs_in(&idp, browser.claims(&idp));
    let (_, code, message) = browser.refusal(&answer).await?;
    assert_eq!(code, "signin_refused");
    assert!(message.contains("does not name its issuer"), "{message}");
    assert_eq!(idp.said(|said| said.redeemed), 0);
    let browser = Browser::begin(manager.address).await?;
    let mut answer = browser.user_signs_in(&idp, browser.claims(&idp));
    answer["iss"] = json!(idp.said(|said| said.issuer.clone()));
    assert_eq!(browser.complete(&answer).await?.status(), 200);
    manager.stop().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_is_believed_only_if_it_is_the_providers_for_this_sign_in() -> Outcomes {
    let (_site, idp, manager) = at_work().await?;
    let at = manager.address;
    let now = upperdeck::service::job::now_ms() / 1000;
    let wrong = [
        ("iss", json!("https://other.example")),
        ("aud", json!("another-client")),
        ("aud", json!([CLIENT, "another-client"])),
        ("exp", json!(now - 10)),
        ("nbf", json!(now + 300)),
        ("nonce", json!("another")),
        ("nonce", Value::Null),
        ("preferred_username", json!("a\nb")),
        ("preferred_username", json!("alice ")),
        ("preferred_username", json!("\u{202e}alice")),
        ("preferred_username", json!("x".repeat(65))),
        ("preferred_username", json!(7)),
        ("groups", json!(vec!["x".repeat(100); 300])),
    ];
    for (name, value) in wrong {
        let browser = Browser::begin(at).await?;
        let mut claims = browser.claims(&idp);
        claims[name] = value.clone();
        idp.said(|said| said.userinfo = json!({"sub": "0815"}));
        let answer = browser.user_signs_in(&idp, claims);
        let (status, code, message) = browser.refusal(&answer).await?;
        assert_eq!(
            (status, code.as_str()),
            (403, "signin_refused"),
            "{name} {value}: {message}"
        );
    }
    let forgeries: [fn(String) -> String; 4] = [
        // Without a signature.
        |token| {
            let body = token.split('.').nth(1).unwrap_or_default();
            format!("{}.{body}.", URL_SAFE_NO_PAD.encode(r#"{"alg":"none"}"#))
        },
        // Signed with the client's secret, or the public key, in place of the provider's key.
        |token| by_secret(&token, SECRET),
        |token| by_secret(&token, ""),
        // Changed after it was signed.
        |token| {
            let parts: Vec<&str> = token.split('.').collect();
            let body = URL_SAFE_NO_PAD.decode(parts[1]).unwrap_or_default();
            let body = String::from_utf8_lossy(&body).replace("alice", "admin");
            format!("{}.{}.{}", parts[0], URL_SAFE_NO_PAD.encode(body), parts[2])
        },
    ];
    for forge in forgeries {
        idp.said(|said| said.forge = forge);
        let browser = Browser::begin(at).await?;
        let answer = browser.user_signs_in(&idp, browser.claims(&idp));
        let (status, code, message) = browser.refusal(&answer).await?;
        assert_eq!(
            (status, code.as_str()),
            (403, "signin_refused"),
            "{message}"
        );
    }
    idp.said(|said| said.forge = |token| token);
    // Claims that are not in the token come from the provider, and not those of another user.
    for (subject, status) in [("0815", 200), ("4711", 403)] {
        idp.said(|said| {
            said.userinfo = json!({"sub": subject, "preferred_username": "bob", "groups": []});
        });
        let browser = Browser::begin(at).await?;
        let mut claims = browser.claims(&idp);
        claims
            .as_object_mut()
            .ok_or("no object")?
            .remove("preferred_username");
        let answer = browser.user_signs_in(&idp, claims);
        let answer = browser.complete(&answer).await?;
        assert_eq!(answer.status(), status, "{subject}");
        if status == 200 {
            let body: Value = answer.json().await?;
            assert_eq!(body["user"], "bob");
        }
    }
    // Another issuer's answer, and one that refuses: its text is shown as text, and not all of it.
    let browser = Browser::begin(at).await?;
    let mut answer = browser.user_signs_in(&idp, browser.claims(&idp));
    answer["iss"] = json!("https://other.example");
    assert_eq!(browser.refusal(&answer).await?.1, "signin_refused");
    let refusal = json!({"state": browser.query["state"], "error": "access_denied", "error_description": "no\u{202e}\n<b>"});
    let (_, code, message) = browser.refusal(&refusal).await?;
    assert_eq!(code, "signin_refused");
    assert!(
        message.contains("no\\u{202e}\\n<b> (access_denied)"),
        "{message}"
    );
    let browser = Browser::begin(at).await?;
    let unknown = json!({"state": browser.query["state"], "code": "guessed"});
    let (_, code, message) = browser.refusal(&unknown).await?;
    assert_eq!(code, "signin_refused");
    assert!(
        message.len() < 600 && message.contains("<b>no</b>\\u{202e}"),
        "{message}"
    );
    manager.stop().await
}

fn by_secret(token: &str, secret: &str) -> String {
    let body = token.split('.').nth(1).unwrap_or_default();
    let claims = URL_SAFE_NO_PAD.decode(body).unwrap_or_default();
    let claims: Value = serde_json::from_slice(&claims).unwrap_or_default();
    let header = jsonwebtoken::Header::new(jsonwebtoken::Algorithm::HS256);
    let key = jsonwebtoken::EncodingKey::from_secret(secret.as_bytes());
    key.and_then(|key| jsonwebtoken::encode(&header, &claims, &key))
        .unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread")]
async fn new_keys_are_fetched_and_administrators_known() -> Outcomes {
    let (_site, idp, manager) = at_work().await?;
    let at = manager.address;
    let first = Browser::begin(at).await?;
    let answer = first.user_signs_in(&idp, first.claims(&idp));
    signed_in(first.complete(&answer).await?).await?;
    // Keys are fetched at most every ten seconds, so that no token makes the manager a load for the provider.
    tokio::time::sleep(Duration::from_secs(11)).await;
    let key = Key::new("k2")?;
    idp.said(|said| (said.key, said.kid) = (key, "k2".to_owned()));
    let browser = Browser::begin(at).await?;
    let mut claims = browser.claims(&idp);
    claims["groups"] = json!(["staff", "admins"]);
    let answer = browser.user_signs_in(&idp, claims);
    let answer = browser.complete(&answer).await?;
    assert_eq!(answer.status(), 200);
    let body: Value = answer.json().await?;
    assert_eq!(body["administrator"], true);
    manager.stop().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_provider_that_is_down_or_another_one_keeps_no_manager_from_starting() -> Outcomes {
    let (site, idp) = (Site::new()?, Idp::start(([127, 0, 0, 1], 0).into()).await?);
    idp.said(|said| said.down = true);
    let mut options = idp.options(&site)?;
    options.public_url = Some(PAGE.to_owned());
    let manager = site.manager_with(options).await?;
    let at = manager.address;
    let begin = || -> Fallible<_> {
        let request = http()?.post(format!("http://{at}/api/v1/signin/oidc"));
        Ok(request.header("Upperdeck-Request", "1").send())
    };
    let answer = begin()?.await?;
    assert_eq!(answer.status(), 503);
    assert!(
        answer
            .text()
            .await?
            .contains("the identity provider does not answer")
    );
    // What describes itself as another issuer is not the provider.
    idp.said(|said| (said.down, said.described) = (false, "https://other.example".to_owned()));
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(begin()?.await?.status(), 503);
    idp.said(|said| said.described.clone_from(&said.issuer));
    for n in 0.. {
        let status = begin()?.await?.status();
        if status == 200 {
            break;
        }
        assert!(status == 503 && n < 600, "{status}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    manager.stop().await
}
