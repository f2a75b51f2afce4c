//! E-mails at the end of saves: to whom the service knows, as each user has set, and sent again until they are taken.

use std::net::SocketAddr;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use reqwest::Method;
use serde_json::{Value, json};
use upperdeck::service::job::{Code, Outcome};
use upperdeck::service::manager::auth::{Addresses, Proxies};
use upperdeck::service::manager::{Mail, Options, SmtpServer};

use crate::site::{Agent, Outcomes, Site, Who, ask, get, id, request, session, succeeded};
use crate::smtp::Smtp;
use crate::support;

/// Returns the settings of a manager that sends e-mails through the server at `at`.
fn options(site: &Site, at: SocketAddr) -> Result<Options, Box<dyn std::error::Error>> {
    let mut options = site.options()?;
    options.mail = Some(Mail {
        server: format!("smtp://{at}?tls=none").parse()?,
        from: "upperdeck <save@example.org>".parse()?,
        password: None,
        ca: None,
    });
    options.public_url = Some("https://save.example.org/".to_owned());
    options.addresses = Addresses::parse("[addresses]\nalice = 'alice@example.org'\n")?;
    options.webhooks.backoff = Duration::from_millis(20);
    options.webhooks.backoff_most = Duration::from_millis(50);
    Ok(options)
}

/// Asks for a save of session `n` and ends it.
async fn save(at: SocketAddr, agent: &Agent, n: usize, notify: Value, how: Outcome) -> Outcomes {
    let who = if n == 9 { Who::Bob } else { Who::Alice };
    let tag = format!("v{n}");
    let mut body = json!({"session": id(n), "image": {"name": "torch", "tag": tag}});
    if !notify.is_null() {
        body["notify"] = notify;
    }
    let (status, save) = ask(at, who, Method::POST, "/api/v1/saves", Some(body)).await?;
    assert_eq!(status, 202, "{save}");
    let claim = agent.claim().await?;
    agent.begin(&claim).await?;
    agent.end(&claim, 2, how).await?;
    Ok(())
}

fn failed(message: &str) -> Outcome {
    Outcome::Failed {
        code: Code::QuotaExceeded,
        message: message.to_owned(),
        retryable: false,
    }
}

#[tokio::test]
async fn the_end_of_a_save_is_told_by_e_mail_to_the_address_that_is_known() -> Outcomes {
    let smtp = Smtp::start(None)?;
    let site = Site::new()?;
    let manager = site.manager_with(options(&site, smtp.at)?).await?;
    let (at, agent) = (manager.address, Agent::new(&site.queue, "a"));
    let mut all: Vec<_> = (1..5).map(|n| session(n, Some("alice"))).collect();
    all[1].pod = Some("pod\r\nBcc: x@evil.example".to_owned());
    all.push(session(9, Some("bob")));
    agent.heartbeat(&all).await?;

    save(at, &agent, 1, json!({"email": true}), succeeded()).await?;
    let told = smtp.until(1).await?;
    assert_eq!(told[0].to, ["TO:<alice@example.org>"]);
    assert_eq!(told[0].field("subject"), "Saved: torch:v1");
    assert_eq!(
        told[0].field("from"),
        "upperdeck <save@example.org>",
        "{}",
        told[0].text
    );
    assert_eq!(told[0].field("auto-submitted"), "auto-generated");
    let body = told[0].body();
    for part in [
        "The session was saved: jupyter/pod-1/notebook",
        "/alice/torch:v1",
        "https://save.example.org/#/images",
        "0:00:01",
    ] {
        assert!(body.contains(part), "{body}");
    }

    // What was not taken is sent again under its ID. What tenants wrote cannot add a line or a field.
    smtp.answer(&["451 later", "451 later"]);
    let hostile = failed("no room\r\n.\r\nMAIL FROM:<x@evil.example>\r\nBcc: y@evil.example");
    save(
        at,
        &agent,
        2,
        json!({"email": true, "language": "ko"}),
        hostile,
    )
    .await?;
    let told = smtp.until(2).await?;
    assert_eq!(smtp.asked(), 4);
    assert_eq!(told[1].to, ["TO:<alice@example.org>"]);
    let head = told[1].text.split("\r\n\r\n").next().unwrap_or_default();
    assert!(!head.contains("evil"), "{head}");
    assert!(
        told[1].field("subject").starts_with("=?utf-8?"),
        "{}",
        told[1].text
    );
    assert_ne!(told[1].field("message-id"), told[0].field("message-id"));
    let body = told[1].body();
    for part in [
        "세션을 저장하지 못했습니다",
        "no room\\r\\n.\\r\\nMAIL FROM",
        "(quota_exceeded)",
        "/#/history",
        "pod\\r\\nBcc",
    ] {
        assert!(body.contains(part), "{body}");
    }

    // A user whose address is not known, and one who wants none.
    let (status, problem) = ask(
        at,
        Who::Bob,
        Method::POST,
        "/api/v1/saves",
        Some(json!({"session": id(9), "notify": {"email": true}})),
    )
    .await?;
    assert_eq!(
        (status.as_u16(), &problem["field"]),
        (422, &json!("notify.email"))
    );
    assert!(
        get(at, Who::Bob, "/api/v1/me")
            .await?
            .get("email")
            .is_none()
    );
    // Refused for good: not sent again, and the next one is not held up.
    smtp.answer(&["550 no such user"]);
    save(at, &agent, 3, json!({"email": true}), succeeded()).await?;
    // Two e-mails at the same time have no order.
    while smtp.asked() < 5 {
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    save(at, &agent, 4, json!({"email": true}), succeeded()).await?;
    let told = smtp.until(3).await?;
    assert_eq!(told[2].field("subject"), "Saved: torch:v4");
    assert_eq!(smtp.asked(), 6);
    manager.stop().await
}

#[tokio::test]
async fn which_saves_are_told_about_is_set_once_for_all() -> Outcomes {
    let smtp = Smtp::start(None)?;
    let site = Site::new()?;
    let manager = site.manager_with(options(&site, smtp.at)?).await?;
    let (at, agent) = (manager.address, Agent::new(&site.queue, "a"));
    let all: Vec<_> = (1..6).map(|n| session(n, Some("alice"))).collect();
    agent.heartbeat(&all).await?;
    let set = async |who, body: Value| {
        ask(at, who, Method::PUT, "/api/v1/notify/email", Some(body)).await
    };
    assert_eq!(
        get(at, Who::Alice, "/api/v1/me").await?["email"],
        json!({"address": "alice@example.org"})
    );
    let (status, now) = set(Who::Alice, json!({"over_seconds": 3600})).await?;
    assert_eq!((status.as_u16(), &now["over_seconds"]), (200, &json!(3600)));
    // It took less than an hour; and an own word about one save counts more.
    save(at, &agent, 1, Value::Null, succeeded()).await?;
    save(at, &agent, 2, json!({"email": true}), succeeded()).await?;
    let told = smtp.until(1).await?;
    assert_eq!(told[0].field("subject"), "Saved: torch:v2");
    let (status, _) = set(Who::Alice, json!({"over_seconds": 0, "language": "ko"})).await?;
    assert_eq!(status, 200);
    assert_eq!(
        get(at, Who::Alice, "/api/v1/me").await?["email"]["over_seconds"],
        json!(0)
    );
    save(at, &agent, 3, json!({"email": false}), succeeded()).await?;
    // A portal's request for this user: the address and the language are those that were set.
    let (status, _) = ask(
        at,
        Who::PortalFor("alice"),
        Method::POST,
        "/api/v1/saves",
        Some(json!({"session": id(4), "image": {"name": "torch", "tag": "v4"}})),
    )
    .await?;
    assert_eq!(status, 202);
    let claim = agent.claim().await?;
    agent.begin(&claim).await?;
    agent.end(&claim, 2, succeeded()).await?;
    let told = smtp.until(2).await?;
    assert!(told[1].body().contains("torch:v4"), "{}", told[1].body());
    assert!(
        told[1].body().contains("세션을 저장했습니다"),
        "{}",
        told[1].body()
    );
    let (status, _) = set(Who::Alice, json!({"over_seconds": null})).await?;
    assert_eq!(status, 200);
    save(at, &agent, 5, Value::Null, succeeded()).await?;
    for (who, body, field) in [
        (Who::Alice, json!({"over_seconds": 700_000}), "over_seconds"),
        (Who::Bob, json!({"over_seconds": 0}), "over_seconds"),
    ] {
        let (status, problem) = set(who, body).await?;
        assert_eq!(
            (status.as_u16(), &problem["field"]),
            (422, &json!(field)),
            "{who:?}"
        );
    }
    assert_eq!(smtp.asked(), 2);
    manager.stop().await
}

#[tokio::test]
async fn addresses_come_from_the_proxy_and_from_no_other_header() -> Outcomes {
    let smtp = Smtp::start(None)?;
    let site = Site::new()?;
    let mut options = options(&site, smtp.at)?;
    let proxies = Proxies::new("X-User", &["127.0.0.1".to_owned()], vec![])?;
    options.proxies = Some(proxies.with_email("X-Email")?);
    let manager = site.manager_with(options).await?;
    let me = async |who: Who, user: Option<&str>, email: &str| {
        let mut asked = request(manager.address, who, Method::GET, "/api/v1/me")?;
        if let Some(user) = user {
            asked = asked.header("X-User", user);
        }
        let answer = asked.header("X-Email", email).send().await?;
        let me: Value = serde_json::from_str(&answer.text().await?)?;
        Ok::<_, Box<dyn std::error::Error>>(me["email"]["address"].clone())
    };
    let known = me(Who::Anonymous, Some("carol"), "carol@example.org").await?;
    assert_eq!(known, "carol@example.org");
    for wrong in ["carol", "a@b.example, c@d.example", "<a@b.example>"] {
        assert!(
            me(Who::Anonymous, Some("carol"), wrong).await?.is_null(),
            "{wrong}"
        );
    }
    // The administrator's file comes first; a token's caller has no address by a header.
    let known = me(Who::Anonymous, Some("alice"), "x@evil.example").await?;
    assert_eq!(known, "alice@example.org");
    assert!(me(Who::Bob, None, "x@evil.example").await?.is_null());
    manager.stop().await
}

/// Makes a certificate for `localhost`. Returns it with the configuration of a server that has it.
fn certificate(
    dir: &std::path::Path,
) -> Result<(Vec<u8>, Arc<rustls::ServerConfig>), Box<dyn std::error::Error>> {
    use rustls::pki_types::pem::PemObject as _;
    use rustls::pki_types::{CertificateDer, PrivateKeyDer};

    let (key, cert) = (dir.join("key.pem"), dir.join("cert.pem"));
    let made = Command::new("openssl")
        .args(["req", "-x509", "-newkey", "ec", "-pkeyopt"])
        .args(["ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"])
        .args(["-subj", "/CN=localhost", "-addext"])
        .args(["subjectAltName=DNS:localhost", "-addext"])
        .args(["basicConstraints=critical,CA:FALSE", "-keyout"])
        .arg(&key)
        .arg("-out")
        .arg(&cert)
        .output()?;
    if !made.status.success() {
        return Err(String::from_utf8_lossy(&made.stderr).into());
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(
            vec![CertificateDer::from_pem_file(&cert)?],
            PrivateKeyDer::from_pem_file(&key)?,
        )?;
    Ok((std::fs::read(&cert)?, Arc::new(config)))
}

#[tokio::test]
async fn nothing_is_sent_without_tls_and_the_password_only_to_the_certificates_owner() -> Outcomes {
    if Command::new("openssl").arg("version").output().is_err() {
        support::ignore("needs openssl");
        return Ok(());
    }
    let site = Site::new()?;
    let (ca, config) = certificate(site.dir.path())?;
    let smtp = Smtp::start(Some(config))?;
    let mut options = options(&site, smtp.at)?;
    let server: SmtpServer = format!("smtp://save%40x@localhost:{}", smtp.at.port()).parse()?;
    let settings = |ca| Mail {
        server: server.clone(),
        from: "save@example.org".parse().unwrap(),
        password: Some("secret".to_owned().into()),
        ca,
    };
    options.webhooks.attempts = 2;
    options.mail = Some(settings(None));
    let agent = Agent::new(&site.queue, "a");
    agent
        .heartbeat(&[session(1, Some("alice")), session(2, Some("alice"))])
        .await?;
    let stranger = site.manager_with(options.clone()).await?;
    save(
        stranger.address,
        &agent,
        1,
        json!({"email": true}),
        succeeded(),
    )
    .await?;
    // Its certificate is signed by a CA that the machine does not know.
    let given_up = "upperdeck_notices_total{receiver=\"user\",outcome=\"given_up\"}";
    let begun = std::time::Instant::now();
    while crate::webhooks::metric(stranger.address, given_up).await? != Some(1) {
        assert!(
            begun.elapsed() < crate::site::PATIENCE,
            "it is not given up"
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(smtp.asked(), 0);
    stranger.stop().await?;
    options.mail = Some(settings(Some(ca)));
    let manager = site.manager_with(options).await?;
    save(
        manager.address,
        &agent,
        2,
        json!({"email": true}),
        succeeded(),
    )
    .await?;
    let told = smtp.until(1).await?;
    assert!(told[0].encrypted);
    assert_eq!(told[0].login.as_deref(), Some("save@x:secret"));
    manager.stop().await
}
