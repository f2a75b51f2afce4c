//! Chromium through ChromeDriver: the part of the WebDriver protocol that the tests need. It also records violations of
//! the page's content security policy and script errors.

#![allow(
    clippy::needless_pass_by_value,
    reason = "arguments are written down as json!() where they are passed"
)]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use base64::Engine as _;
use serde_json::{Value, json};

pub type Outcome<T = ()> = Result<T, Box<dyn std::error::Error>>;

/// Far longer than anything takes, even on a busy machine.
const PATIENCE: Duration = Duration::from_secs(90);

/// Script that runs before any script of the page and records forbidden events where a test can read them.
const WATCH: &str = "
    window.wrong = [];
    document.addEventListener('securitypolicyviolation', (e) => wrong.push(`policy: ${e.violatedDirective} ${e.blockedURI} ${e.sample}`));
    window.addEventListener('error', (e) => wrong.push(`error: ${e.message} ${e.filename}:${e.lineno}`));
    window.addEventListener('unhandledrejection', (e) => wrong.push(`rejection: ${e.reason?.stack ?? e.reason}`));
";

/// Settings with which a browser is started.
pub struct BrowserOptions {
    pub language: &'static str,
    pub dark: bool,
    pub width: u32,
    pub height: u32,
}

impl Default for BrowserOptions {
    fn default() -> Self {
        Self {
            language: "en-GB",
            dark: false,
            width: 1100,
            height: 850,
        }
    }
}

/// A browser with one window; it is ended on drop.
pub struct Browser {
    driver: Child,
    port: u16,
    session: String,
    profile: tempfile::TempDir,
}

fn program(names: &[&str]) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    names.iter().find_map(|name| {
        std::env::split_paths(&path)
            .map(|dir| dir.join(name))
            .find(|file| file.is_file())
    })
}

/// Returns why there is no browser, if there is none.
pub fn missing() -> Option<&'static str> {
    let there =
        program(&["chromedriver"]).is_some() && program(&["chromium", "google-chrome"]).is_some();
    (!there).then_some("chromium and chromedriver are not installed")
}

fn exchange(port: u16, method: &str, path: &str, body: &Value) -> Outcome<Value> {
    let mut stream = TcpStream::connect(("127.0.0.1", port))?;
    stream.set_read_timeout(Some(PATIENCE * 2))?;
    let body = if method == "POST" {
        body.to_string()
    } else {
        String::new()
    };
    write!(
        stream,
        "{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    )?;
    let mut reader = BufReader::new(stream);
    let mut length = 0;
    loop {
        let mut line = String::new();
        reader.read_line(&mut line)?;
        if line.trim().is_empty() {
            break;
        }
        if let Some((name, value)) = line.split_once(':')
            && name.eq_ignore_ascii_case("content-length")
        {
            length = value.trim().parse()?;
        }
    }
    let mut text = vec![0; length];
    reader.read_exact(&mut text)?;
    let answer: Value = serde_json::from_slice(&text)?;
    let value = answer["value"].clone();
    if value.get("error").is_some() {
        return Err(format!("{method} {path}: {} {}", value["error"], value["message"]).into());
    }
    Ok(value)
}

impl Browser {
    pub fn start(look: &BrowserOptions) -> Outcome<Self> {
        let profile = tempfile::tempdir()?;
        let mut driver = Command::new(program(&["chromedriver"]).ok_or("no chromedriver")?)
            .arg("--port=0")
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()?;
        let mut said = BufReader::new(driver.stdout.take().ok_or("no output")?);
        let mut port = None;
        let mut line = String::new();
        while port.is_none() && said.read_line(&mut line)? > 0 {
            port = line
                .split_once("started successfully on port ")
                .and_then(|(_, rest)| rest.trim().trim_end_matches('.').parse().ok());
            line.clear();
        }
        std::thread::spawn(move || std::io::copy(&mut said, &mut std::io::sink()));
        let port = port.ok_or("chromedriver does not say its port")?;
        let mut browser = Self {
            driver,
            port,
            session: String::new(),
            profile,
        };
        let options = json!({
            "binary": program(&["chromium", "google-chrome"]),
            "args": [
                "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-extensions",
                "--no-first-run", "--disable-background-networking", "--hide-scrollbars",
                format!("--user-data-dir={}", browser.profile.path().display()),
                format!("--window-size={},{}", look.width, look.height),
            ],
            "prefs": { "intl.accept_languages": look.language },
        });
        let wanted =
            json!({ "capabilities": { "alwaysMatch": { "goog:chromeOptions": options } } });
        let begun = exchange(port, "POST", "/session", &wanted)?;
        begun["sessionId"]
            .as_str()
            .ok_or("no session")?
            .clone_into(&mut browser.session);
        browser.prepare(look)?;
        Ok(browser)
    }

    fn prepare(&self, look: &BrowserOptions) -> Outcome {
        self.cdp("Page.enable", json!({}))?;
        self.cdp(
            "Page.addScriptToEvaluateOnNewDocument",
            json!({ "source": WATCH }),
        )?;
        self.emulate(look)
    }

    /// Changes the color scheme and the size without reloading the page.
    pub fn emulate(&self, look: &BrowserOptions) -> Outcome {
        let scheme = if look.dark { "dark" } else { "light" };
        let features = json!([{ "name": "prefers-color-scheme", "value": scheme }]);
        self.cdp(
            "Emulation.setEmulatedMedia",
            json!({ "features": features }),
        )?;
        let metrics = json!({
            "width": look.width, "height": look.height, "deviceScaleFactor": 1, "mobile": look.width < 600,
        });
        self.cdp("Emulation.setDeviceMetricsOverride", metrics)?;
        Ok(())
    }

    fn post(&self, path: &str, body: &Value) -> Outcome<Value> {
        let path = format!("/session/{}/{path}", self.session);
        exchange(self.port, "POST", &path, body)
    }

    pub fn cdp(&self, command: &str, params: Value) -> Outcome<Value> {
        self.post(
            "goog/cdp/execute",
            &json!({ "cmd": command, "params": params }),
        )
    }

    pub fn go(&self, url: &str) -> Outcome {
        self.post("url", &json!({ "url": url })).map(drop)
    }

    pub fn reload(&self) -> Outcome {
        self.post("refresh", &json!({})).map(drop)
    }

    /// Runs a script with `arguments` and returns its result.
    pub fn run(&self, script: &str, arguments: Value) -> Outcome<Value> {
        self.post(
            "execute/sync",
            &json!({ "script": script, "args": arguments }),
        )
    }

    /// Waits until a script returns a truthy value, and returns that value.
    pub fn until(&self, what: &str, script: &str, arguments: Value) -> Outcome<Value> {
        let begun = Instant::now();
        loop {
            let value = self.run(script, arguments.clone())?;
            if !matches!(&value, Value::Null | Value::Bool(false)) && value != "" {
                return Ok(value);
            }
            if begun.elapsed() > PATIENCE {
                let text = self.run("return document.body.innerText", json!([]))?;
                let shot = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("portal-waiting.png");
                self.screenshot(&shot)?;
                return Err(format!(
                    "waited for {what} ({}):\n{}",
                    shot.display(),
                    text.as_str().unwrap_or_default()
                )
                .into());
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Waits until the page shows a text.
    pub fn see(&self, text: &str) -> Outcome {
        let script = "return document.body.innerText.replace(/[\\u2068\\u2069]/g, '').includes(arguments[0])";
        self.until(text, script, json!([text])).map(drop)
    }

    pub fn shows(&self, text: &str) -> Outcome<bool> {
        let script = "return document.body.innerText.replace(/[\\u2068\\u2069]/g, '').includes(arguments[0])";
        Ok(self.run(script, json!([text]))? == true)
    }

    /// Waits for an element, and clicks on its center as a user would.
    pub fn click(&self, selector: &str) -> Outcome {
        let visible = "const e = document.querySelector(arguments[0]); return e && e.checkVisibility() && !e.disabled";
        self.until(selector, visible, json!([selector]))?;
        let found = self.post(
            "element",
            &json!({ "using": "css selector", "value": selector }),
        )?;
        let id = found
            .as_object()
            .and_then(|object| object.values().next())
            .and_then(Value::as_str)
            .ok_or("no element")?;
        self.post(&format!("element/{id}/click"), &json!({}))
            .map(drop)
    }

    /// Sends keys to the focused element: text, or `\u{e004}` (Tab), `\u{e007}` (Enter), `\u{e00d}` (Space), …
    pub fn keys(&self, text: &str) -> Outcome {
        let actions: Vec<_> = text
            .chars()
            .flat_map(|key| {
                let key = key.to_string();
                [
                    json!({ "type": "keyDown", "value": key }),
                    json!({ "type": "keyUp", "value": key }),
                ]
            })
            .collect();
        let keyboard = json!([{ "type": "key", "id": "keyboard", "actions": actions }]);
        self.post("actions", &json!({ "actions": keyboard }))
            .map(drop)
    }

    /// Opens another tab and switches to it. Returns the handles of both tabs.
    pub fn tab(&self) -> Outcome<(String, String)> {
        let path = format!("/session/{}/window", self.session);
        let old = exchange(self.port, "GET", &path, &Value::Null)?;
        let new = self.post("window/new", &json!({ "type": "tab" }))?;
        let (old, new) = (
            old.as_str().ok_or("no handle")?.to_owned(),
            new["handle"].as_str().ok_or("no handle")?.to_owned(),
        );
        self.switch(&new)?;
        self.prepare(&BrowserOptions::default())?;
        Ok((old, new))
    }

    pub fn switch(&self, handle: &str) -> Outcome {
        self.post("window", &json!({ "handle": handle })).map(drop)
    }

    pub fn screenshot(&self, file: &Path) -> Outcome {
        let shot = self.cdp("Page.captureScreenshot", json!({ "format": "png" }))?;
        self.keep(&shot["data"], file)
    }

    /// Takes a screenshot of the whole page.
    pub fn whole_page(&self, file: &Path) -> Outcome {
        let size = self.cdp("Page.getLayoutMetrics", json!({}))?;
        let clip = json!({
            "x": 0, "y": 0, "scale": 1,
            "width": size["cssContentSize"]["width"], "height": size["cssContentSize"]["height"],
        });
        let shot = self.cdp(
            "Page.captureScreenshot",
            json!({ "format": "png", "captureBeyondViewport": true, "clip": clip }),
        )?;
        self.keep(&shot["data"], file)
    }

    #[allow(clippy::unused_self, reason = "it belongs to the two above")]
    fn keep(&self, data: &Value, file: &Path) -> Outcome {
        let bytes =
            base64::engine::general_purpose::STANDARD.decode(data.as_str().ok_or("no picture")?)?;
        if let Some(dir) = file.parent() {
            std::fs::create_dir_all(dir)?;
        }
        Ok(std::fs::write(file, bytes)?)
    }

    /// Fails if a forbidden event has occurred since the page was loaded.
    pub fn assert_clean(&self) -> Outcome {
        let wrong = self.run("return window.wrong", json!([]))?;
        assert_eq!(
            wrong,
            json!([]),
            "violations of the policy and errors of scripts"
        );
        Ok(())
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        let path = format!("/session/{}", self.session);
        drop(exchange(self.port, "DELETE", &path, &Value::Null));
        drop(self.driver.kill());
        drop(self.driver.wait());
    }
}
