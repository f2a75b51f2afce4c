//! Signing in and out at a real OpenID provider, in a browser.

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::json;
use upperdeck::service::manager::auth::{Claims, Oidc, Tokens};

use crate::browser::{Browser, BrowserOptions, Outcome, missing};
use crate::signin::{Manager, signed_in_as};

struct Provider(Child);

impl Drop for Provider {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Where tests/run has installed the provider.
fn installed() -> Option<PathBuf> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/oidc-provider");
    let there = dir.join("node_modules/oidc-provider").is_dir();
    (there && crate::support::find_program("node").is_some()).then_some(dir)
}

fn free_port() -> Outcome<u16> {
    let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
    Ok(listener.local_addr()?.port())
}

/// Starts the provider, and returns it with its issuer.
fn start(dir: &Path, page: &str) -> Outcome<(Provider, String)> {
    // Modules are found from the place of the script.
    let script = dir.join("provider.mjs");
    std::fs::write(&script, include_str!("provider.mjs"))?;
    let port = free_port()?;
    let mut child = Command::new("node")
        .arg(script)
        .args([&port.to_string(), page])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let stdout = child.stdout.take().ok_or("no stdout")?;
    let provider = Provider(child);
    let mut lines = BufReader::new(stdout).lines();
    if !lines
        .by_ref()
        .any(|line| line.is_ok_and(|line| line == "ready"))
    {
        return Err("the provider does not start".into());
    }
    // What it says is read to its end: it would end when its output is closed.
    std::thread::spawn(move || lines.for_each(drop));
    Ok((provider, format!("http://127.0.0.1:{port}")))
}

#[test]
fn a_user_signs_in_and_out_at_a_real_provider() -> Outcome {
    if let Some(reason) = missing() {
        crate::support::ignore(reason);
        return Ok(());
    }
    let Some(dir) = installed() else {
        crate::support::ignore("needs oidc-provider, which tests/run fetches");
        return Ok(());
    };
    let port = free_port()?;
    let page = format!("http://127.0.0.1:{port}/");
    let (_provider, issuer) = start(&dir, &page)?;
    let manager = Manager::start_on(port, |options| {
        options.tokens = Tokens::default();
        options.public_url = Some(page.clone());
        options.oidc = Some(Oidc {
            issuer,
            name: "Example <b>University</b>".to_owned(),
            client_id: "upperdeck".to_owned(),
            client_secret: Some("a-secret-of-the-client".to_owned().into()),
            scopes: vec!["profile".to_owned(), "groups".to_owned()],
            claims: Claims {
                user: "preferred_username".to_owned(),
                groups: Some("groups".to_owned()),
                email: None,
                administrator: None,
                administrators: Vec::new(),
            },
            redirect: page.clone(),
            lifetime: Duration::from_secs(3600),
        });
    })?;
    let browser = Browser::start(&BrowserOptions::default())?;
    browser.go(&manager.url("#/images"))?;
    browser.see("Sign in with Example <b>University</b>")?;
    // There are no tokens here, so no field for one.
    assert_eq!(
        browser.run("return document.getElementById('token')", json!([]))?,
        json!(null)
    );
    browser.click("#provider")?;
    let form = "return Boolean(document.querySelector('input[name=login]'))";
    browser.until("the provider's form", form, json!([]))?;
    let fill = "document.querySelector('input[name=login]').value = 'minji';
        document.querySelector('input[name=password]').value = 'x';
        document.querySelector('form').submit()";
    browser.run(fill, json!([]))?;
    let consent = "return Boolean(document.querySelector('input[name=prompt][value=consent]'))";
    browser.until("the provider's question", consent, json!([]))?;
    browser.run("document.querySelector('form').submit()", json!([]))?;
    signed_in_as(&browser, "minji")?;
    // Back in the view where it began, and nothing of the answer is left in the address.
    let at = browser.run("return location.href", json!([]))?;
    assert_eq!(at, format!("{page}#/images"));
    browser.assert_clean()?;
    let groups = "return document.querySelector('.who').innerText.length > 0";
    assert_eq!(browser.run(groups, json!([]))?, true);
    // It stays so when the page is loaded again, and ends at both.
    browser.reload()?;
    signed_in_as(&browser, "minji")?;
    browser.click("#leave")?;
    let asked = "return Boolean(document.querySelector('button[name=logout]'))";
    browser.until("the provider's question", asked, json!([]))?;
    browser.click("button[name=logout]")?;
    browser.see("Sign in with Example")?;
    browser.click("#provider")?;
    browser.until("the provider has forgotten the user", form, json!([]))?;
    // An answer that was not begun here, and one that is an error, sign no user in.
    browser.go(&manager.url("?code=x&state=y#/images"))?;
    browser.see("This sign-in is not valid any more")?;
    let at = browser.run("return location.href", json!([]))?;
    assert_eq!(at, format!("{page}#/images"));
    browser
        .go(&manager
            .url("?error=<img src=x onerror=alert(1)>&state=y&return=https://evil.example/"))?;
    browser.see("This sign-in is not valid any more")?;
    browser.assert_clean()
}
