//! The portal's page with the real service: a pod in containerd, an agent, Redis, a manager and a registry, each in a
//! process of its own.

use std::net::TcpListener;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use crate::browser::{Browser, BrowserOptions, Outcome, missing};
use crate::host::containerd::{Containerd, Pod, PodOptions};
use crate::host::image::{Base, Format, base};
use crate::host::redis::Redis;
use crate::host::registry::Registry;
use crate::host::{Daemon, Roots, Scratch, wait_until};
use crate::lab::needs;
use crate::support::{ignore, ignored};

const TOKEN: &str = "a-token-for-tests-of-the-portal";

/// Returns the hash as in a tokens file.
fn sha256(text: &str) -> String {
    use sha2::Digest as _;
    hex::encode(sha2::Sha256::digest(text))
}

/// Returns a port that was free a moment ago.
fn port() -> Outcome<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

/// Fields are dropped in this order: clients before servers, the directories last.
struct ServiceLab {
    agent: Daemon,
    manager: Daemon,
    _redis: Redis,
    containerd: Containerd,
    registry: Registry,
    manager_port: u16,
    redis_url: String,
    image: String,
    scratch: Scratch,
}

fn upperdeck(verb: &str) -> Command {
    let mut command = Command::new(crate::support::program());
    command.arg(verb);
    command
}

impl ServiceLab {
    fn open() -> Outcome<Option<Self>> {
        if ignored(&needs(&["containerd", "runc", "redis-server"])) {
            return Ok(None);
        }
        if let Some(reason) = missing() {
            ignore(reason);
            return Ok(None);
        }
        let scratch = Scratch::new()?;
        let registry = Registry::start(&scratch)?;
        registry.push(&base(Base::Pause, Format::Oci)?, "pause:1")?;
        let image = registry.push(&base(Base::Small, Format::Oci)?, "bases/notebook:1")?;
        let containerd = Containerd::start(&scratch, &registry)?;
        let roots = containerd.roots(&scratch);

        let redis = Redis::start(&scratch)?;
        let redis_url = redis.url();

        crate::host::service::write_keys(scratch.path())?;
        std::fs::write(
            scratch.path().join("tokens.toml"),
            format!(
                "[[token]]\nname = \"minji\"\nrole = \"administrator\"\nuser = \"minji\"\nsha256 = \"{}\"\n",
                sha256(TOKEN)
            ),
        )?;
        let manager_port = port()?;
        let manager = Self::manager(&scratch, &registry, &redis_url, manager_port)?;
        let agent = Self::agent(&scratch, &registry, &redis_url, &roots)?;
        let mut centre = Self {
            agent,
            manager,
            _redis: redis,
            containerd,
            registry,
            manager_port,
            redis_url,
            image,
            scratch,
        };
        centre.wait_for_manager()?;
        Ok(Some(centre))
    }

    fn target(registry: &Registry) -> String {
        registry.reference("people/{user}/{name}:{tag}")
    }

    fn manager(
        scratch: &Scratch,
        registry: &Registry,
        redis_url: &str,
        port: u16,
    ) -> Outcome<Daemon> {
        let command = &mut upperdeck("manager");
        command
            .args([
                "--redis",
                redis_url,
                "--tls-verify=false",
                "--target",
                &Self::target(registry),
            ])
            .arg(format!("--listen=127.0.0.1:{port}"))
            .arg(format!(
                "--record=sqlite:{}",
                scratch.path().join("manager.db").display()
            ))
            .arg("--key-file")
            .arg(scratch.path().join("key"))
            .arg("--tokens-file")
            .arg(scratch.path().join("tokens.toml"));
        Ok(Daemon::start(command, scratch.path().join("manager.log"))?)
    }

    fn agent(
        scratch: &Scratch,
        registry: &Registry,
        redis_url: &str,
        roots: &Roots,
    ) -> Outcome<Daemon> {
        let command = &mut upperdeck("agent");
        command
            .args([
                "--redis",
                redis_url,
                "--tls-verify=false",
                "--node",
                "node-1",
                "--owner",
                "fixed:minji",
            ])
            .arg(format!("--allow={}", registry.reference("people")))
            .arg("--key-file")
            .arg(scratch.path().join("node-key"))
            .arg("--state-dir")
            .arg(scratch.dir("state")?)
            .arg("--spool-dir")
            .arg(scratch.dir("spool")?)
            .args(roots.flags());
        Ok(Daemon::start(command, scratch.path().join("agent.log"))?)
    }

    fn wait_for_manager(&mut self) -> Outcome {
        let port = self.manager_port;
        self.manager.wait_for(|_| {
            std::net::TcpStream::connect(("127.0.0.1", port))
                .ok()
                .map(drop)
        })?;
        Ok(())
    }

    /// Kills and restarts the manager, as after a crash.
    fn restart_manager(&mut self) -> Outcome {
        self.manager.kill()?;
        self.manager = Self::manager(
            &self.scratch,
            &self.registry,
            &self.redis_url,
            self.manager_port,
        )?;
        self.wait_for_manager()
    }

    fn session(&self, megabytes: u32) -> Outcome<Pod> {
        let pod = self
            .containerd
            .run_pod(&self.image, &PodOptions::default())?;
        let work = format!(
            "mkdir -p /opt/env && dd if=/dev/urandom of=/opt/env/weights bs=1048576 count={megabytes} 2>/dev/null && \
             echo 'pip install torch' > /opt/env/done"
        );
        self.containerd.shell(&pod, &work)?;
        Ok(pod)
    }

    fn url(&self) -> String {
        format!("http://127.0.0.1:{}/", self.manager_port)
    }

    fn logs(&self) -> String {
        format!(
            "manager:\n{}\nagent:\n{}",
            self.manager.log(),
            self.agent.log()
        )
    }

    /// Signs in with the token's link and waits for the session.
    fn enter(&self, browser: &Browser, pod: &Pod) -> Outcome {
        browser.go(&format!("{}?token={TOKEN}", self.url()))?;
        browser.click("#enter")?;
        browser.until(
            "the page",
            "return document.getElementById('leave')",
            json!([]),
        )?;
        browser.see("minji")?;
        let address = browser.run("return location.href", json!([]))?;
        assert!(
            address
                .as_str()
                .is_some_and(|address| !address.contains(TOKEN)),
            "{address}"
        );
        let cookie = browser.run("return document.cookie", json!([]))?;
        assert_eq!(cookie, "", "scripts can read the cookie");
        browser
            .see(&pod.name)
            .map_err(|error| format!("{error}\n{}", self.logs()))?;
        Ok(())
    }
}

fn keep(browser: &Browser, name: &str) -> Outcome {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/portal-screenshots");
    browser.whole_page(&dir.join(format!("real-{name}.png")))
}

/// Records the values of the progress bar, from the next click on.
const RECORD_BAR: &str = "window.values = []; new MutationObserver(() => {
        const bar = document.querySelector('progress');
        if (bar && bar.position >= 0 && values.at(-1) !== bar.value) values.push(bar.value);
    }).observe(document.body, { subtree: true, childList: true, attributes: true })";

#[test]
fn a_pod_is_saved_found_and_deleted_and_a_manager_may_die_meanwhile() -> Outcome {
    let Some(mut centre) = ServiceLab::open()? else {
        return Ok(());
    };
    let pod = centre.session(96)?;
    let browser = Browser::start(&BrowserOptions::default())?;
    centre.enter(&browser, &pod)?;
    browser.see("node-1")?;
    browser.click("article .opener")?;
    browser.see("everything you changed")?;
    keep(&browser, "sessions")?;

    browser.run(RECORD_BAR, json!([]))?;
    browser.click("article button.main")?;
    browser
        .see("Session stood still")
        .map_err(|error| format!("{error}\n{}", centre.logs()))?;
    let values: Vec<f64> = serde_json::from_value(browser.run("return values", json!([]))?)?;
    assert!(
        values.last().is_some_and(|last| *last > 0.9),
        "the bar does not reach the end: {values:?}"
    );
    keep(&browser, "saved")?;
    let reference = browser.run(
        "return document.querySelector('.reference code').textContent",
        json!([]),
    )?;
    let reference = reference.as_str().ok_or("no reference")?.to_owned();
    let (repository, tag) = reference
        .split_once('/')
        .and_then(|(_, rest)| rest.rsplit_once(':'))
        .ok_or("no reference")?;
    assert!(
        centre
            .registry
            .tags(repository)
            .iter()
            .any(|one| one == tag),
        "{reference}"
    );
    browser.assert_clean()?;

    // Later changes are saved as a delta; the manager dies during that save.
    centre.containerd.shell(
        &pod,
        "dd if=/dev/urandom of=/opt/env/more bs=1048576 count=160 2>/dev/null",
    )?;
    browser.click("article .field input")?;
    browser.keys("by-hand\u{e004}second")?;
    browser.click("article button.main")?;
    browser.until(
        "the save",
        "return document.querySelector('progress')",
        json!([]),
    )?;
    centre.restart_manager()?;
    browser.reload()?;
    browser
        .see("by-hand:second")
        .map_err(|error| format!("{error}\n{}", centre.logs()))?;
    browser.click("article .opener")?;
    let ended = "return document.querySelector('.state .succeeded') && document.querySelector('.reference code').textContent.endsWith('by-hand:second')";
    browser
        .until("the end", ended, json!([]))
        .map_err(|error| format!("{error}\n{}", centre.logs()))?;
    browser.assert_clean()?;

    browser.go(&format!("{}#/images", centre.url()))?;
    browser.see("2 images")?;
    keep(&browser, "images")?;
    browser.click("#find-image")?;
    browser.keys("by-hand")?;
    browser.see("1 image")?;
    browser.click(".image .danger")?;
    browser.see("Delete by-hand:second?")?;
    browser.click("dialog .danger")?;
    browser
        .see("No image matches.")
        .map_err(|error| format!("{error}\n{}", centre.logs()))?;
    wait_until("the tag to go", || {
        !centre
            .registry
            .tags("people/minji/by-hand")
            .contains(&"second".to_owned())
    })?;
    browser.assert_clean()?;

    browser.go(&format!("{}#/history", centre.url()))?;
    browser.until(
        "the history",
        "return document.querySelectorAll('.entry').length === 2",
        json!([]),
    )?;
    keep(&browser, "history")?;
    browser.go(&format!("{}#/operations", centre.url()))?;
    browser.see("node-1")?;
    keep(&browser, "operations")?;
    browser.assert_clean()?;
    Ok(())
}

#[test]
fn two_tabs_a_reload_a_cancellation_and_a_failure_before_the_real_service() -> Outcome {
    let Some(mut centre) = ServiceLab::open()? else {
        return Ok(());
    };
    let pod = centre.session(400)?;
    let browser = Browser::start(&BrowserOptions::default())?;
    centre.enter(&browser, &pod)?;
    let (first, second) = browser.tab()?;
    browser.go(&centre.url())?;
    browser.see(&pod.name)?;
    browser.click("article button.main")?;
    browser.until(
        "the bar",
        "return document.querySelector('progress')",
        json!([]),
    )?;
    browser.reload()?;
    browser.until(
        "the bar after a reload",
        "return document.querySelector('progress, .state .verdict')",
        json!([]),
    )?;
    browser.switch(&first)?;
    browser.until(
        "the bar in the other tab",
        "return document.querySelector('progress, .state .verdict')",
        json!([]),
    )?;
    // It may have ended already on a fast machine; otherwise it is cancelled from the other tab.
    let running = browser.run(
        "return !!document.querySelector('.running button')",
        json!([]),
    )?;
    if running == true {
        browser.run(
            "document.querySelector('.running button')?.click()",
            json!([]),
        )?;
        browser.run(
            "document.querySelector('dialog .danger')?.click()",
            json!([]),
        )?;
    }
    let verdict = "return document.querySelector('.state .verdict')?.className";
    let here: Value = browser.until("an end", verdict, json!([]))?;
    browser.switch(&second)?;
    let there = browser.until("the same end", verdict, json!([]))?;
    assert_eq!(here, there);
    browser.assert_clean()?;

    // The registry is gone: the save is retried and the page shows the attempt, or it fails with its code.
    centre.registry.kill()?;
    browser.click("article button.main")?;
    let told = "const text = document.body.innerText; return text.includes('attempt 2') || text.includes('The place where images are kept does not answer.')";
    browser
        .until("word of the lost registry", told, json!([]))
        .map_err(|error| format!("{error}\n{}", centre.logs()))?;
    browser.assert_clean()?;
    Ok(())
}
