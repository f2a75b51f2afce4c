//! Signing in by a link, with a real manager behind the page: a link asks for confirmation, and does not replace a
//! signed-in user without it.

use std::net::SocketAddr;

use serde_json::json;
use tokio::runtime::Runtime;
use tokio_util::sync::CancellationToken;
use upperdeck::service::manager::auth::{Proxies, Role, Tokens};
use upperdeck::service::manager::{Listen, Options, Server};
use upperdeck::service::queue::{Limits, Local, Queue};
use upperdeck::service::record::Record;

use crate::browser::{Browser, BrowserOptions, Outcome, missing};

pub struct Manager {
    address: SocketAddr,
    cancel: CancellationToken,
    runtime: Runtime,
    _dir: tempfile::TempDir,
}

impl Manager {
    fn start(change: impl FnOnce(&mut Options)) -> Outcome<Self> {
        Self::start_on(0, change)
    }

    pub fn start_on(port: u16, change: impl FnOnce(&mut Options)) -> Outcome<Self> {
        let dir = tempfile::tempdir()?;
        let runtime = Runtime::new()?;
        let template = format!("oci:{}/{{user}}/{{name}}:{{tag}}", dir.path().display());
        let mut options = Options::new(
            Listen::Tcp(([127, 0, 0, 1], port).into()),
            template.parse()?,
        );
        options.tokens = Tokens::default()
            .with("minji", Role::User, Some("minji"), "token-of-minji")?
            .with("mallory", Role::User, Some("mallory"), "token-of-mallory")?;
        options.grace = std::time::Duration::from_secs(1);
        change(&mut options);
        let limits = Limits {
            user: 0,
            node: 0,
            registry: 0,
        };
        let place = format!("sqlite:{}", dir.path().join("record.db").display());
        let cancel = CancellationToken::new();
        let ending = cancel.clone();
        let address = runtime.block_on(async {
            let record = Record::open(&place).await?;
            let server = Server::bind(options, Queue::Local(Local::new(limits)), record).await?;
            let address = server.address().ok_or("no address")?;
            tokio::spawn(server.run(ending));
            Ok::<_, Box<dyn std::error::Error>>(address)
        })?;
        Ok(Self {
            address,
            cancel,
            runtime,
            _dir: dir,
        })
    }

    pub fn url(&self, rest: &str) -> String {
        format!("http://{}/{rest}", self.address)
    }

    /// Returns the status of a request with the browser's cookies, as a server on another port of the host would
    /// receive them.
    fn with_cookies(&self, browser: &Browser) -> Outcome<u16> {
        let found = browser.cdp("Network.getCookies", json!({ "urls": [self.url("")] }))?;
        let cookies: Vec<_> = found["cookies"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|cookie| {
                Some(format!(
                    "{}={}",
                    cookie["name"].as_str()?,
                    cookie["value"].as_str()?
                ))
            })
            .collect();
        assert!(!cookies.is_empty(), "no cookie: {found}");
        let status = self.runtime.block_on(async {
            let answer = upperdeck::store::registry::http_client("127.0.0.1")
                .build()?
                .get(self.url("api/v1/me"))
                .header("Cookie", cookies.join("; "))
                .send()
                .await?;
            Ok::<_, reqwest::Error>(answer.status().as_u16())
        })?;
        Ok(status)
    }
}

impl Drop for Manager {
    fn drop(&mut self) {
        self.cancel.cancel();
    }
}

fn begin() -> Outcome<Option<Browser>> {
    if let Some(reason) = missing() {
        crate::support::ignore(reason);
        return Ok(None);
    }
    Browser::start(&BrowserOptions::default()).map(Some)
}

pub fn signed_in_as(browser: &Browser, user: &str) -> Outcome {
    let script = "return document.getElementById('leave') && document.querySelector('.who').innerText.includes(arguments[0])";
    browser.until(user, script, json!([user])).map(drop)
}

fn nothing_of_the_token(browser: &Browser) -> Outcome {
    let address = browser.run(
        "return location.href + document.referrer + document.cookie",
        json!([]),
    )?;
    let address = address.as_str().unwrap_or_default();
    assert!(!address.contains("token"), "{address}");
    Ok(())
}

#[test]
fn a_link_asks_and_replaces_nobody_unasked() -> Outcome {
    let Some(browser) = begin()? else {
        return Ok(());
    };
    let manager = Manager::start(|_| ())?;
    browser.go(&manager.url("?token=token-of-minji#/images"))?;
    browser.see("signs you in as minji")?;
    nothing_of_the_token(&browser)?;
    // It signs no user in.
    let me = "return fetch('api/v1/me').then((answer) => answer.status)";
    assert_eq!(browser.run(me, json!([]))?, 401);
    browser.click("#stay")?;
    browser.see("You are not signed in")?;
    browser.go(&manager.url("?token=token-of-minji"))?;
    browser.click("#enter")?;
    signed_in_as(&browser, "minji")?;
    nothing_of_the_token(&browser)?;
    browser.reload()?;
    signed_in_as(&browser, "minji")?;
    assert_eq!(manager.with_cookies(&browser)?, 401);
    // The own link again asks nothing; another's asks, and nothing changes until it is answered.
    browser.go(&manager.url("?token=token-of-minji"))?;
    signed_in_as(&browser, "minji")?;
    browser.go(&manager.url("?token=token-of-mallory"))?;
    browser.see("signs you in as mallory")?;
    browser.see("You are signed in as minji")?;
    nothing_of_the_token(&browser)?;
    browser.click("#stay")?;
    signed_in_as(&browser, "minji")?;
    browser.go(&manager.url("?token=token-of-mallory"))?;
    browser.click("#enter")?;
    signed_in_as(&browser, "mallory")?;
    browser.click("#leave")?;
    browser.see("You are signed out.")?;
    browser.reload()?;
    browser.see("You are not signed in")?;
    // Who was signed in and is not any more is told so.
    browser.go(&manager.url("?token=token-of-minji"))?;
    browser.click("#enter")?;
    signed_in_as(&browser, "minji")?;
    browser.cdp("Network.clearBrowserCookies", json!({}))?;
    browser.click("nav a[href='#/images']")?;
    browser.see("Your sign-in has ended.")?;
    browser.assert_clean()
}

#[test]
fn what_is_wrong_is_said_where_it_was_typed() -> Outcome {
    let Some(browser) = begin()? else {
        return Ok(());
    };
    let manager = Manager::start(|_| ())?;
    browser.go(&manager.url("?token=made-up"))?;
    browser.see("This token is not valid")?;
    nothing_of_the_token(&browser)?;
    browser.go(&manager.url(""))?;
    browser.click("#token")?;
    browser.keys("made-up\u{e007}")?;
    browser.see("This token is not valid")?;
    for wrong in ["한글", "a b", "%00"] {
        let type_it = "document.getElementById('token').value = arguments[0]; document.querySelector('[role=alert]').replaceChildren()";
        browser.run(type_it, json!([wrong]))?;
        browser.click("form .main")?;
        browser.see("This token is not valid")?;
    }
    let type_it = "document.getElementById('token').value = arguments[0]";
    let link = manager.url("?token=token-of-minji#/images");
    browser.run(type_it, json!([link]))?;
    browser.click("form .main")?;
    signed_in_as(&browser, "minji")?;
    browser.assert_clean()
}

#[test]
fn a_gate_says_who_it_is_and_no_link_does() -> Outcome {
    let Some(browser) = begin()? else {
        return Ok(());
    };
    let manager = Manager::start(|options| {
        options.proxies = Proxies::new("X-User", &["127.0.0.1".to_owned()], vec![]).ok();
    })?;
    let headers = json!({ "headers": { "X-User": "minji" } });
    browser.cdp("Network.enable", json!({}))?;
    browser.cdp("Network.setExtraHTTPHeaders", headers)?;
    browser.go(&manager.url("?token=token-of-mallory"))?;
    browser.see("says who you are here")?;
    nothing_of_the_token(&browser)?;
    assert_eq!(
        browser.run("return document.getElementById('enter')", json!([]))?,
        json!(null)
    );
    browser.click("#stay")?;
    browser.see("My sessions")?;
    assert_eq!(
        browser.run("return document.getElementById('leave')", json!([]))?,
        json!(null)
    );
    Ok(())
}
