//! Tests of the registry client: a scripted registry for failures and protocol violations, and docker-registry for
//! regular use.
// A panic in a helper fails the test, as intended.
#![allow(clippy::unwrap_used, clippy::print_stderr)]

#[allow(dead_code, reason = "each test program uses its part")]
#[path = "support/mod.rs"]
mod support;

use std::collections::HashMap;
use std::io::Write as _;
use std::net::TcpListener as StdListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::{Handle, Runtime};
use upperdeck::common::digest::Digest;
use upperdeck::store::destination::{BlobWriter, Destination, Error, Target};
use upperdeck::store::registry::{self, Access, Registries, Repository, Retry};

const MANIFEST_TYPE: &str = "application/vnd.oci.image.manifest.v1+json";

// ---------------------------------------------------------------- a scripted registry

/// A request received by the scripted registry.
#[derive(Clone, Debug)]
struct Seen {
    method: String,
    target: String,
    headers: HashMap<String, String>,
    body: Vec<u8>,
}

impl Seen {
    fn is(&self, method: &str, path: &str) -> bool {
        self.method == method && self.target.split('?').next() == Some(path)
    }

    fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }
}

/// The scripted registry's reaction to a request.
struct Answer {
    status: u16,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
    /// Close the connection without an answer after this many bytes of the request's body.
    drop_request_at: Option<usize>,
    /// Close the connection after this many bytes of the answer's body.
    drop_answer_at: Option<usize>,
    wait: Duration,
}

fn answer(status: u16) -> Answer {
    Answer {
        status,
        headers: Vec::new(),
        body: Vec::new(),
        drop_request_at: None,
        drop_answer_at: None,
        wait: Duration::ZERO,
    }
}

impl Answer {
    fn with(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }

    fn body(mut self, body: impl Into<Vec<u8>>) -> Self {
        self.body = body.into();
        self
    }

    fn denied(self, code: &str, message: &str) -> Self {
        self.body(format!(
            r#"{{"errors":[{{"code":"{code}","message":"{message}"}}]}}"#
        ))
    }
}

type Script = dyn Fn(&Seen, usize) -> Answer + Send + Sync;

struct Fake {
    address: String,
    seen: Arc<Mutex<Vec<Seen>>>,
}

impl Fake {
    /// Starts the registry. `script` is called with the head of each request and the number of earlier requests with
    /// the same method and path.
    async fn start(script: impl Fn(&Seen, usize) -> Answer + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (script, log): (Arc<Script>, _) = (Arc::new(script), Arc::clone(&seen));
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(stream, Arc::clone(&script), Arc::clone(&log)));
            }
        });
        Self { address, seen }
    }

    /// Starts a registry that answers `status` to every `method`, and regularly to all else.
    async fn always(method: &'static str, status: u16) -> Self {
        Self::start(move |seen, _| {
            if seen.method == method {
                answer(status)
            } else {
                lenient(seen)
            }
        })
        .await
    }

    fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }

    fn count(&self, method: &str, path: &str) -> usize {
        self.seen().iter().filter(|s| s.is(method, path)).count()
    }

    fn repository(&self, access: Access, name: &str) -> Repository {
        Registries::new(access)
            .push_to(&format!("{}/{name}", self.address).parse().unwrap())
            .unwrap()
    }
}

async fn serve(
    mut stream: TcpStream,
    script: Arc<Script>,
    log: Arc<Mutex<Vec<Seen>>>,
) -> Option<()> {
    let mut buffer = Vec::new();
    loop {
        let end = loop {
            if let Some(at) = buffer.windows(4).position(|w| w == b"\r\n\r\n") {
                break at + 4;
            }
            // A TLS handshake starts with 0x16; this server has no TLS.
            if buffer.first() == Some(&0x16) || stream.read_buf(&mut buffer).await.ok()? == 0 {
                return None;
            }
        };
        let head = String::from_utf8(buffer.drain(..end).collect()).unwrap();
        let mut lines = head.lines();
        let mut first = lines.next()?.split(' ');
        let (method, target) = (first.next()?.to_owned(), first.next()?.to_owned());
        let headers: HashMap<_, _> = lines
            .filter_map(|l| l.split_once(':'))
            .map(|(n, v)| (n.to_ascii_lowercase(), v.trim().to_owned()))
            .collect();
        let mut seen = Seen {
            method,
            target,
            headers,
            body: Vec::new(),
        };
        let before = {
            let path = seen.target.split('?').next().unwrap();
            log.lock()
                .unwrap()
                .iter()
                .filter(|s| s.is(&seen.method, path))
                .count()
        };
        let answer = script(&seen, before);
        let chunked = seen.header("transfer-encoding").is_some();
        let length: usize = seen
            .header("content-length")
            .and_then(|n| n.parse().ok())
            .unwrap_or(0);
        loop {
            if answer.drop_request_at.is_some_and(|at| buffer.len() >= at) {
                log.lock().unwrap().push(seen);
                return None;
            }
            let end = if chunked {
                chunked_end(&buffer)
            } else {
                (buffer.len() >= length).then_some(length)
            };
            if let Some(end) = end {
                let raw: Vec<u8> = buffer.drain(..end).collect();
                seen.body = if chunked { unchunk(&raw) } else { raw };
                break;
            }
            if stream.read_buf(&mut buffer).await.ok()? == 0 {
                log.lock().unwrap().push(seen);
                return None;
            }
        }
        let is_head = seen.method == "HEAD";
        log.lock().unwrap().push(seen);
        tokio::time::sleep(answer.wait).await;
        let mut text = format!("HTTP/1.1 {} x\r\n", answer.status);
        for (name, value) in &answer.headers {
            text.extend([name, ": ", value, "\r\n"]);
        }
        if !(is_head && text.to_ascii_lowercase().contains("content-length")) {
            text.extend(["Content-Length: ", &answer.body.len().to_string(), "\r\n"]);
        }
        text.push_str("\r\n");
        let mut bytes = text.into_bytes();
        if !is_head {
            bytes.extend_from_slice(
                &answer.body[..answer.drop_answer_at.unwrap_or(answer.body.len())],
            );
        }
        stream.write_all(&bytes).await.ok()?;
        if answer.drop_answer_at.is_some() {
            return None;
        }
    }
}

/// Returns where a chunked body ends, if it is complete.
fn chunked_end(buffer: &[u8]) -> Option<usize> {
    let mut at = 0;
    loop {
        let line = at + buffer[at..].windows(2).position(|w| w == b"\r\n")?;
        let size =
            usize::from_str_radix(std::str::from_utf8(&buffer[at..line]).unwrap(), 16).unwrap();
        at = line + 2 + size + 2;
        if at > buffer.len() {
            return None;
        }
        if size == 0 {
            return Some(at);
        }
    }
}

fn unchunk(mut raw: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    loop {
        let line = raw.windows(2).position(|w| w == b"\r\n").unwrap();
        let size = usize::from_str_radix(std::str::from_utf8(&raw[..line]).unwrap(), 16).unwrap();
        if size == 0 {
            return out;
        }
        out.extend_from_slice(&raw[line + 2..line + 2 + size]);
        raw = &raw[line + 2 + size + 2..];
    }
}

fn quick() -> Access {
    Access {
        authfile: Some(no_credentials()),
        retry: Retry {
            max_attempts: 5,
            first_pause: Duration::from_millis(10),
            ..Retry::default()
        },
        ..Access::default()
    }
}

fn with_password() -> Access {
    Access {
        creds: Some("user:hunter2".parse().unwrap()),
        ..quick()
    }
}

/// Returns an empty auth file, so that tests are independent of the machine's credentials.
fn no_credentials() -> PathBuf {
    static FILE: std::sync::OnceLock<tempfile::NamedTempFile> = std::sync::OnceLock::new();
    FILE.get_or_init(|| {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(b"{}").unwrap();
        file
    })
    .path()
    .to_path_buf()
}

/// Answers like a registry that accepts everything without authentication.
fn lenient(seen: &Seen) -> Answer {
    match (seen.method.as_str(), seen.target.split('?').next().unwrap()) {
        ("GET", "/v2/") => answer(200),
        ("POST", "/v2/a/b/blobs/uploads/") => {
            answer(202).with("Location", "/v2/a/b/blobs/uploads/1?_state=s1&x=%2F")
        }
        ("PATCH", "/v2/a/b/blobs/uploads/1") => {
            answer(202).with("Location", "/v2/a/b/blobs/uploads/1?_state=s2&x=%2F")
        }
        ("PUT", _) => answer(201),
        ("DELETE", _) => answer(204),
        _ => answer(404),
    }
}

/// Writes `blob` from a thread, like the stream of a layer.
async fn upload(repository: &Repository, blob: &'static [u8]) -> Result<(), registry::Error> {
    let mut writer = repository.begin_blob(Handle::current());
    let writer = std::thread::spawn(move || {
        for piece in blob.chunks(1 << 16) {
            writer.write(Bytes::from_static(piece))?;
        }
        Ok::<_, registry::Error>(writer)
    });
    let writer = tokio::task::spawn_blocking(move || writer.join().unwrap())
        .await
        .unwrap()?;
    writer.finish(&Digest::of(blob), blob.len() as u64).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_location_on_another_host_does_not_get_the_upload() {
    let fake = Fake::start(|seen, _| match seen.method.as_str() {
        "POST" => answer(202).with(
            "Location",
            "http://198.51.100.1:81/v2/a/b/blobs/uploads/1?_state=a%3D&b=c",
        ),
        "PATCH" => answer(202).with(
            "Location",
            "https://evil.example/v2/a/b/blobs/uploads/1?_state=d&b=c",
        ),
        _ => lenient(seen),
    })
    .await;
    upload(&fake.repository(quick(), "a/b"), b"content")
        .await
        .unwrap();
    let seen = fake.seen();
    let patch = seen.iter().find(|s| s.method == "PATCH").unwrap();
    assert_eq!(patch.target, "/v2/a/b/blobs/uploads/1?_state=a%3D&b=c");
    assert_eq!(
        (patch.header("transfer-encoding"), patch.body.as_slice()),
        (Some("chunked"), b"content".as_slice())
    );
    let put = seen.iter().find(|s| s.method == "PUT").unwrap();
    let digest = Digest::of("content");
    assert_eq!(
        put.target,
        format!("/v2/a/b/blobs/uploads/1?_state=d&b=c&digest={digest}")
    );
    assert_eq!(
        (
            put.header("content-length"),
            put.header("transfer-encoding")
        ),
        (Some("0"), None)
    );
}

/// Answers like Harbor, which gives a token to everyone, with an empty `access_token` and possibly without any rights.
fn with_tokens(
    address: &'static str,
    then: impl Fn(&Seen, usize) -> Answer,
) -> impl Fn(&Seen, usize) -> Answer {
    move |seen, n| {
        if seen.target.starts_with("/token") {
            return answer(200).body(format!(
                r#"{{"token":"t{n}","access_token":"","expires_in":1800}}"#
            ));
        }
        if seen.header("authorization").is_none() {
            let realm = if address.is_empty() {
                format!("http://{}/token", seen.header("host").unwrap())
            } else {
                address.to_owned()
            };
            return answer(401).with(
                "WWW-Authenticate",
                format!("Bearer realm=\"{realm}\",service=\"fake registry\""),
            );
        }
        then(seen, n)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_401_after_a_fresh_token_is_final() {
    let fake = Fake::start(with_tokens("", |_, _| {
        answer(401)
            .with("WWW-Authenticate", "")
            .denied("UNAUTHORIZED", "project nosuch not found")
    }))
    .await;
    let error = fake
        .repository(with_password(), "a/b")
        .check_push()
        .await
        .unwrap_err();
    assert!(error.not_permitted() && !error.retryable(), "{error}");
    let text = error.to_string();
    assert!(
        text.contains("project nosuch not found") && text.contains("\"user\" from --creds"),
        "{text}"
    );
    assert!(!text.contains("hunter2") && !text.contains("t0"), "{text}");
    assert_eq!(fake.count("POST", "/v2/a/b/blobs/uploads/"), 1);
    let token = fake
        .seen()
        .into_iter()
        .find(|s| s.is("GET", "/token"))
        .unwrap();
    assert_eq!(
        token.target,
        "/token?service=fake%20registry&scope=repository%3Aa%2Fb%3Apull%2Cpush"
    );
    assert_eq!(
        token.header("authorization"),
        Some("Basic dXNlcjpodW50ZXIy")
    );
    assert_eq!(token.header("cookie"), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_old_token_is_replaced_once() {
    // The registry rejects t0 although its lifetime is long.
    let fake = Fake::start(with_tokens("", |seen, n| {
        match seen.header("authorization") {
            Some("Bearer t0") if n > 0 && seen.method == "POST" => answer(401),
            _ => lenient(seen),
        }
    }))
    .await;
    let repository = fake.repository(with_password(), "a/b");
    repository.check_push().await.unwrap();
    tokio::time::sleep(Duration::from_millis(5100)).await;
    repository.check_push().await.unwrap();
    assert_eq!(fake.count("GET", "/token"), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_is_renewed_ahead_of_its_end() {
    let fake = Fake::start(move |seen, n| {
        if seen.target.starts_with("/token") {
            return answer(200).body(format!(r#"{{"access_token":"t{n}","expires_in":1}}"#));
        }
        match seen.header("authorization") {
            None => answer(401).with(
                "WWW-Authenticate",
                format!(
                    "Bearer realm=\"http://{}/token\"",
                    seen.header("host").unwrap()
                ),
            ),
            Some(_) => lenient(seen),
        }
    })
    .await;
    let repository = fake.repository(quick(), "a/b");
    repository.check_push().await.unwrap();
    tokio::time::sleep(Duration::from_millis(800)).await;
    repository.check_push().await.unwrap();
    let used: Vec<_> = fake
        .seen()
        .iter()
        .filter(|s| s.method == "POST")
        .map(|s| s.headers["authorization"].clone())
        .collect();
    assert_eq!(used, ["Bearer t0", "Bearer t1"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_identity_token_is_exchanged() {
    let fake = Fake::start(with_tokens("", |seen, _| lenient(seen))).await;
    let mut file = tempfile::NamedTempFile::new().unwrap();
    write!(
        file,
        r#"{{"auths":{{"{}/a":{{"identitytoken":"hunter2/+"}}}}}}"#,
        fake.address
    )
    .unwrap();
    let access = Access {
        authfile: Some(file.path().to_path_buf()),
        ..quick()
    };
    fake.repository(access, "a/b").check_push().await.unwrap();
    let seen = fake.seen();
    let token = seen.iter().find(|s| s.is("POST", "/token")).unwrap();
    let form = String::from_utf8(token.body.clone()).unwrap();
    assert_eq!(
        form,
        "grant_type=refresh_token&client_id=upperdeck&service=fake%20registry\
         &scope=repository%3Aa%2Fb%3Apull%2Cpush&refresh_token=hunter2%2F%2B"
    );
    assert_eq!(token.header("authorization"), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_service_that_fails_says_so() {
    for (status, tries, retryable, not_permitted) in [
        (503, 5, true, false),
        (401, 1, false, true),
        (400, 1, false, false),
    ] {
        let fake = Fake::start(move |seen, n| {
            if seen.target.starts_with("/token") {
                return answer(status).denied("X", "the directory is down");
            }
            with_tokens("", |seen, _| lenient(seen))(seen, n)
        })
        .await;
        let error = fake
            .repository(with_password(), "a/b")
            .check_push()
            .await
            .unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("/token") && text.contains("the directory is down"),
            "{text}"
        );
        assert_eq!(
            (error.retryable(), error.not_permitted()),
            (retryable, not_permitted),
            "{text}"
        );
        assert_eq!(fake.count("GET", "/token"), tries, "{status}");
        // The request is not sent without credentials instead.
        assert_eq!(fake.count("POST", "/v2/a/b/blobs/uploads/"), 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_wants_a_password_says_so() {
    let script = |seen: &Seen, _: usize| match seen.header("authorization") {
        Some("Basic dXNlcjpodW50ZXIy") => lenient(seen),
        _ => answer(401).with("WWW-Authenticate", "Basic realm=\"x\""),
    };
    let fake = Fake::start(script).await;
    fake.repository(with_password(), "a/b")
        .check_push()
        .await
        .unwrap();
    let error = fake
        .repository(quick(), "a/b")
        .check_push()
        .await
        .unwrap_err();
    assert!(
        error.not_permitted() && error.to_string().contains("--creds"),
        "{error}"
    );
    let mut file = tempfile::NamedTempFile::new().unwrap();
    write!(
        file,
        r#"{{"auths":{{"{}":{{}}}},"credsStore":"desktop"}}"#,
        fake.address
    )
    .unwrap();
    let access = Access {
        authfile: Some(file.path().to_path_buf()),
        ..quick()
    };
    let error = fake
        .repository(access, "a/b")
        .check_push()
        .await
        .unwrap_err();
    assert!(
        error.not_permitted() && error.to_string().contains("docker-credential-desktop"),
        "{error}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_passing_is_waited_for() {
    let fake = Fake::start(|seen, n| match (seen.method.as_str(), n) {
        ("POST", 0) => answer(429).with("Retry-After", "1"),
        ("POST", 1) => answer(503),
        ("POST", 2) => answer(502).with("Retry-After", "nonsense"),
        _ => lenient(seen),
    })
    .await;
    let started = Instant::now();
    fake.repository(quick(), "a/b").check_push().await.unwrap();
    assert!(started.elapsed() >= Duration::from_secs(1));
    assert_eq!(fake.count("POST", "/v2/a/b/blobs/uploads/"), 4);
    assert_eq!(fake.count("DELETE", "/v2/a/b/blobs/uploads/1"), 1);

    let fake = Fake::always("POST", 503).await;
    let error = fake
        .repository(quick(), "a/b")
        .check_push()
        .await
        .unwrap_err();
    assert!(error.retryable() && !error.not_permitted(), "{error}");
    assert_eq!(fake.count("POST", "/v2/a/b/blobs/uploads/"), 5);

    let fake = Fake::always("POST", 403).await;
    let error = fake
        .repository(quick(), "a/b")
        .check_push()
        .await
        .unwrap_err();
    assert!(
        error.not_permitted() && fake.count("POST", "/v2/a/b/blobs/uploads/") == 1,
        "{error}"
    );
}

fn megabytes() -> &'static [u8] {
    static BLOB: std::sync::OnceLock<Vec<u8>> = std::sync::OnceLock::new();
    BLOB.get_or_init(|| {
        (0..8_u32 << 20)
            .map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8)
            .collect()
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broken_stream_is_the_callers_to_repeat() {
    let fake = Fake::start(|seen, n| match (seen.method.as_str(), n) {
        ("PATCH", 0) => Answer {
            drop_request_at: Some(1 << 20),
            ..answer(0)
        },
        ("PATCH", 1) => answer(404).denied("BLOB_UPLOAD_UNKNOWN", "blob upload unknown"),
        _ => lenient(seen),
    })
    .await;
    let repository = fake.repository(quick(), "a/b");
    let error = upload(&repository, megabytes()).await.unwrap_err();
    assert!(error.retryable(), "{error}");
    let error = upload(&repository, megabytes()).await.unwrap_err();
    assert!(
        error.retryable() && error.to_string().contains("BLOB_UPLOAD_UNKNOWN"),
        "{error}"
    );
    upload(&repository, megabytes()).await.unwrap();
    let seen = fake.seen();
    assert!(seen.iter().rfind(|s| s.method == "PATCH").unwrap().body == megabytes());
    assert_eq!(
        fake.count("DELETE", "/v2/a/b/blobs/uploads/1"),
        2,
        "lost uploads are cancelled"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_no_in_mid_stream_reaches_the_writer() {
    // Harbor checks the quota before it reads a body that it will not keep.
    let fake = Fake::start(|seen, _| match seen.method.as_str() {
        "PUT" => answer(403).denied("DENIED", "adding 683.6 KiB of storage resource"),
        _ => lenient(seen),
    })
    .await;
    let error = upload(&fake.repository(quick(), "a/b"), megabytes())
        .await
        .unwrap_err();
    assert!(error.not_permitted() && !error.retryable(), "{error}");
    assert!(error.to_string().contains("adding 683.6 KiB"), "{error}");

    // The POST fails after the writer has handed over bytes.
    let fake = Fake::always("POST", 403).await;
    let error = upload(&fake.repository(quick(), "a/b"), megabytes())
        .await
        .unwrap_err();
    assert!(error.not_permitted(), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_writer_cancels_its_upload() {
    let fake = Fake::start(|seen, _| lenient(seen)).await;
    let repository = fake.repository(quick(), "a/b");
    let mut writer = repository.begin_blob(Handle::current());
    tokio::task::spawn_blocking(move || {
        writer.write(Bytes::from_static(b"some")).unwrap();
        std::thread::sleep(Duration::from_millis(300));
    })
    .await
    .unwrap();
    let until = Instant::now() + Duration::from_secs(5);
    while fake.count("DELETE", "/v2/a/b/blobs/uploads/1") == 0 {
        assert!(Instant::now() < until, "{:?}", fake.seen());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(!fake.seen().iter().any(|s| s.method == "PUT"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_answer_to_the_last_request_is_looked_up() {
    let blob = b"content";
    let digest = Digest::of(blob);
    let path = format!("/v2/a/b/blobs/{digest}");
    let fake = Fake::start(move |seen, n| match seen.method.as_str() {
        "PUT" if n == 0 => Answer {
            drop_request_at: Some(0),
            ..answer(0)
        },
        "PUT" => answer(404).denied("BLOB_UPLOAD_UNKNOWN", "x"),
        "HEAD" if seen.target == path => answer(200).with("Content-Length", "7"),
        _ => lenient(seen),
    })
    .await;
    upload(&fake.repository(quick(), "a/b"), blob)
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn silence_is_an_error() {
    let access = || Access {
        stall_timeout: Duration::from_millis(300),
        retry: Retry {
            max_attempts: 1,
            ..Retry::default()
        },
        ..quick()
    };
    let long = Duration::from_secs(20);
    for silent in ["POST", "PATCH", "GET"] {
        let fake = Fake::start(move |seen, _| match seen.method.as_str() {
            method if method == silent => Answer {
                wait: long,
                ..lenient(seen)
            },
            _ => lenient(seen),
        })
        .await;
        let started = Instant::now();
        let error = upload(&fake.repository(access(), "a/b"), b"content")
            .await
            .unwrap_err();
        assert!(
            error.retryable() && error.to_string().contains("no data was transferred"),
            "{silent}: {error}"
        );
        assert!(started.elapsed() < Duration::from_secs(5), "{silent}");
    }
    // A caller that produces no bytes for a while does not cause a timeout.
    let fake = Fake::start(|seen, _| lenient(seen)).await;
    let mut writer = fake
        .repository(access(), "a/b")
        .begin_blob(Handle::current());
    let writer = tokio::task::spawn_blocking(move || {
        writer.write(Bytes::from_static(b"con")).unwrap();
        std::thread::sleep(Duration::from_millis(900));
        writer.write(Bytes::from_static(b"tent")).unwrap();
        writer
    });
    writer
        .await
        .unwrap()
        .finish(&Digest::of("content"), 7)
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_save_ends_when_its_time_is_over() {
    let access = Access {
        deadline: Duration::from_millis(400),
        ..quick()
    };
    // A missing answer, a stalled stream, and the pauses between attempts.
    for slow in ["POST", "PATCH", "PUT"] {
        let fake = Fake::start(move |seen, _| match seen.method.as_str() {
            method if method == slow => Answer {
                wait: Duration::from_secs(20),
                ..lenient(seen)
            },
            _ => lenient(seen),
        })
        .await;
        let error = upload(&fake.repository(access.clone(), "a/b"), b"content")
            .await
            .unwrap_err();
        assert!(
            matches!(error, registry::Error::Deadline { .. }) && error.retryable(),
            "{slow}: {error}"
        );
        assert!(error.to_string().contains("--deadline"), "{slow}: {error}");
    }
    let fake = Fake::start(|seen, _| match seen.method.as_str() {
        "POST" => answer(503).with("Retry-After", "30"),
        _ => lenient(seen),
    })
    .await;
    let error = fake
        .repository(access, "a/b")
        .check_push()
        .await
        .unwrap_err();
    assert!(error.retryable(), "{error}");
    assert_eq!(fake.count("POST", "/v2/a/b/blobs/uploads/"), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_save_has_only_so_many_tries_in_all() {
    let fake = Fake::start(|seen, _| match seen.method.as_str() {
        "POST" => answer(503),
        _ => lenient(seen),
    })
    .await;
    let access = Access {
        retry: Retry {
            max_retries: 6,
            ..quick().retry
        },
        ..quick()
    };
    let repository = fake.repository(access, "a/b");
    for _ in 0..3 {
        repository.check_push().await.unwrap_err();
    }
    // Five attempts, three that use up the rest of the budget, then one without repetition.
    assert_eq!(fake.count("POST", "/v2/a/b/blobs/uploads/"), 9);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_may_not_look_uploads() {
    for status in [400, 401, 403, 404, 405] {
        let fake = Fake::start(move |seen, _| match seen.method.as_str() {
            "HEAD" => answer(status),
            _ => lenient(seen),
        })
        .await;
        let repository = fake.repository(quick(), "a/b");
        let found = repository.head_blob(&Digest::of("x")).await.unwrap();
        assert_eq!(found, None, "{status}");
        repository
            .put_blob(Bytes::from_static(b"x"), &Digest::of("x"))
            .await
            .unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn mounts_never_fail_a_save() {
    let digest = Digest::of("layer");
    for (status, mounted) in [
        (201, true),
        (202, false),
        (400, false),
        (401, false),
        (403, false),
        (404, false),
        (405, false),
        (500, false),
    ] {
        let fake = Fake::start(with_tokens("", move |seen, _| match seen.method.as_str() {
            "POST" if status == 401 => {
                answer(401).with("WWW-Authenticate", "Basic realm=\"harbor\"")
            }
            "POST" => answer(status).with("Location", "/v2/a/b/blobs/uploads/9?_state=m"),
            _ => lenient(seen),
        }))
        .await;
        let repository = fake.repository(with_password(), "a/b");
        let found = repository
            .mount_blob(&digest, &format!("{}/library/base", fake.address))
            .await
            .unwrap();
        assert_eq!(found, mounted, "{status}");
        let seen = fake.seen();
        let post = seen.iter().find(|s| s.method == "POST").unwrap();
        assert_eq!(
            post.target,
            format!("/v2/a/b/blobs/uploads/?mount={digest}&from=library/base")
        );
        let token = seen.iter().find(|s| s.is("GET", "/token")).unwrap();
        assert!(
            token.target.ends_with(
                "&scope=repository%3Aa%2Fb%3Apull%2Cpush&scope=repository%3Alibrary%2Fbase%3Apull"
            ),
            "{}",
            token.target
        );
        // The upload that a 202 opens is cancelled.
        assert_eq!(
            fake.count("DELETE", "/v2/a/b/blobs/uploads/9"),
            usize::from(status == 202),
            "{status}"
        );
        // After a token without the required rights, no password is sent.
        assert!(
            seen.iter()
                .filter(|s| s.method == "POST")
                .all(|s| s.headers["authorization"].starts_with("Bearer "))
        );
    }
    let fake = Fake::start(|seen, _| lenient(seen)).await;
    let repository = fake.repository(quick(), "a/b");
    assert!(
        !repository
            .mount_blob(&digest, "other.example/library/base")
            .await
            .unwrap()
    );
    assert!(!repository.mount_blob(&digest, "not a name").await.unwrap());
    assert!(fake.seen().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn manifests_are_refused_in_words() {
    for (status, tries, retryable, not_permitted, word) in [
        (412, 1, false, true, "tag v1"),
        (413, 1, false, false, "too large"),
        (500, 2, false, false, "its log says why"),
        (503, 5, true, false, "problem of its own"),
        (403, 1, false, true, "quota"),
        (400, 1, false, false, "MANIFEST_INVALID"),
    ] {
        let fake = Fake::start(move |seen, _| match seen.method.as_str() {
            "PUT" => answer(status).denied("MANIFEST_INVALID", "x"),
            _ => lenient(seen),
        })
        .await;
        let repository = fake.repository(quick(), "a/b");
        let error = repository
            .put_manifest("{}".into(), MANIFEST_TYPE, "v1")
            .await
            .unwrap_err();
        assert_eq!(
            (error.retryable(), error.not_permitted()),
            (retryable, not_permitted),
            "{error}"
        );
        assert!(error.to_string().contains(word), "{error}");
        assert_eq!(fake.count("PUT", "/v2/a/b/manifests/v1"), tries, "{status}");
    }
    // The registry has stored another digest.
    let fake = Fake::start(|seen, _| match seen.method.as_str() {
        "PUT" => answer(201).with("Docker-Content-Digest", Digest::of("other").to_string()),
        _ => lenient(seen),
    })
    .await;
    assert!(
        fake.repository(quick(), "a/b")
            .put_manifest("{}".into(), MANIFEST_TYPE, "v1")
            .await
            .is_err()
    );
}

/// A proxy loses the answer to the tag, or replaces it by its own, after the registry has stored the image.
#[tokio::test(flavor = "multi_thread")]
async fn a_tag_that_is_written_counts_whatever_was_answered() {
    // The connection ends without an answer.
    let dropped = || Answer {
        drop_request_at: Some(0),
        ..answer(0)
    };
    let answers: [fn() -> Answer; 4] = [
        || answer(500),
        || answer(403).denied("DENIED", "x"),
        || answer(503),
        || Answer {
            wait: Duration::from_secs(20),
            ..answer(201)
        },
    ];
    let silent = Access {
        stall_timeout: Duration::from_millis(300),
        ..quick()
    };
    for (case, said) in answers
        .into_iter()
        .chain([dropped as fn() -> Answer])
        .enumerate()
    {
        for (stored, saved) in [("{}", true), (r#"{"other":1}"#, false)] {
            let fake = Fake::start(move |seen, _| match seen.method.as_str() {
                "PUT" => said(),
                "GET" if seen.target.ends_with("/manifests/v1") => {
                    answer(200).with("Content-Type", MANIFEST_TYPE).body(stored)
                }
                _ => lenient(seen),
            })
            .await;
            let put = fake
                .repository(silent.clone(), "a/b")
                .put_manifest("{}".into(), MANIFEST_TYPE, "v1")
                .await;
            assert_eq!(put.is_ok(), saved, "{case}: {put:?}");
            if let Ok(digest) = put {
                assert_eq!(digest, Digest::of("{}"));
            }
        }
    }
}

/// Empty pages, and names that are none, each with a next page: neither time nor memory is without end.
#[tokio::test(flavor = "multi_thread")]
async fn a_list_that_does_not_end_is_an_error() {
    for name in [None, Some("x".repeat(100_000))] {
        let fake = Fake::start(move |seen, _| {
            if !seen.is("GET", "/v2/a/b/tags/list") {
                return lenient(seen);
            }
            let last = seen.target.rsplit('=').next().unwrap_or_default();
            let next = last.parse::<u64>().unwrap_or(0) + 1;
            let tags: Vec<&String> = name.iter().collect();
            answer(200)
                .with(
                    "Link",
                    format!("</v2/a/b/tags/list?last={next}>; rel=\"next\""),
                )
                .body(serde_json::json!({"tags": tags}).to_string())
        })
        .await;
        let error = fake.repository(quick(), "a/b").tags().await.unwrap_err();
        assert!(error.to_string().contains("does not end"), "{error}");
        assert_eq!(fake.count("GET", "/v2/a/b/tags/list"), 2000);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn storage_behind_a_redirect_gets_no_credentials() {
    let blob = b"a blob in a bucket";
    let digest = Digest::of(blob);
    let storage = Fake::start(move |_, _| answer(200).body(blob)).await;
    let signed = format!("http://{}/bucket/x?X-Amz-Signature=abc", storage.address);
    let fake = Fake::start(with_tokens("", move |_, _| {
        answer(307).with("Location", signed.clone())
    }))
    .await;
    let repository = fake.repository(with_password(), "a/b");
    assert_eq!(repository.blob(&digest).await.unwrap(), &blob[..]);
    let mut stream = repository
        .blob_stream(&digest, Some(blob.len() as u64))
        .await
        .unwrap();
    let mut read = Vec::new();
    while let Some(bytes) = stream.next().await.unwrap() {
        read.extend_from_slice(&bytes);
    }
    assert_eq!(read, blob);
    let seen = storage.seen();
    assert_eq!(seen.len(), 2);
    assert!(
        seen.iter()
            .all(|s| s.header("authorization").is_none() && s.target.ends_with("abc")),
        "{seen:?}"
    );
    assert!(
        fake.seen()
            .iter()
            .any(|s| s.headers.contains_key("authorization"))
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_written_is_not_redirected() {
    let other = Fake::start(|seen, _| lenient(seen)).await;
    let to = format!("http://{}/v2/a/b/blobs/uploads/", other.address);
    let fake = Fake::start(move |seen, _| match seen.method.as_str() {
        "POST" => answer(307).with("Location", to.clone()),
        _ => lenient(seen),
    })
    .await;
    let error = fake
        .repository(quick(), "a/b")
        .check_push()
        .await
        .unwrap_err();
    assert!(
        matches!(error, registry::Error::ForbiddenUrl { .. }),
        "{error}"
    );
    assert!(other.seen().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_part_of_a_blob_is_the_part_or_nothing() {
    let blob = megabytes();
    let digest = Digest::of(blob);
    let part = |status: u16, range: &str, bytes: &'static [u8]| {
        answer(status)
            .with("Content-Range", range.to_owned())
            .body(bytes)
    };
    let size = blob.len();
    let right = format!("bytes 1000-2999/{size}");
    // The first answer breaks off, or all are too short.
    for (cut, end) in [(true, 3000), (false, 2000)] {
        let right = right.clone();
        let fake = Fake::start(move |seen, n| match (seen.target.as_str(), n) {
            ("/v2/", _) => answer(200),
            (_, 0..2) if cut => Answer {
                drop_answer_at: Some(100),
                ..part(206, &right, &blob[1000..3000])
            },
            _ => part(206, &right, &blob[1000..end]),
        })
        .await;
        let repository = fake.repository(quick(), "a/b");
        let read = repository.blob_range(&digest, 1000, 2000).await;
        if cut {
            assert!(read.unwrap().as_deref() == Some(&blob[1000..3000]));
        } else {
            assert!(matches!(read, Err(registry::Error::Size { .. })));
        }
        assert_eq!(fake.seen()[1].header("range"), Some("bytes=1000-2999"));
    }
    for (status, range) in [
        (200, right.clone()),
        (206, format!("bytes 0-1999/{size}")),
        (206, String::new()),
        (416, right.clone()),
        (400, right.clone()),
        (501, right),
    ] {
        let range_of = range.clone();
        let fake = Fake::start(move |seen, _| match seen.target.as_str() {
            "/v2/" => answer(200),
            _ => part(status, &range_of, &blob[1000..3000]),
        })
        .await;
        let repository = fake.repository(quick(), "a/b");
        let read = repository.blob_range(&digest, 1000, 2000).await.unwrap();
        assert_eq!(read, None, "{status} {range}");
    }
    let fake = Fake::start(|_, _| answer(404)).await;
    let repository = fake.repository(quick(), "a/b");
    assert!(repository.blob_range(&digest, 0, 1).await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broken_download_goes_on_where_it_broke() {
    let blob = megabytes();
    let digest = Digest::of(blob);
    for ranges in [true, false] {
        let fake = Fake::start(move |seen, n| {
            let from: usize = match seen.header("range") {
                Some(range) if ranges => range["bytes=".len()..]
                    .trim_end_matches('-')
                    .parse()
                    .unwrap(),
                _ => 0,
            };
            let body = blob[from..].to_vec();
            match (seen.target.as_str(), n) {
                ("/v2/", _) => answer(200),
                (_, 0..2) => Answer {
                    drop_answer_at: Some(body.len() / 2),
                    ..answer(if from > 0 { 206 } else { 200 })
                }
                .with(
                    "Content-Range",
                    format!("bytes {from}-{}/{}", blob.len() - 1, blob.len()),
                )
                .body(body),
                _ => answer(206)
                    .with(
                        "Content-Range",
                        format!("bytes {from}-{}/{}", blob.len() - 1, blob.len()),
                    )
                    .body(body),
            }
        })
        .await;
        let mut stream = fake
            .repository(quick(), "a/b")
            .blob_stream(&digest, Some(blob.len() as u64))
            .await
            .unwrap();
        let mut read = Vec::new();
        while let Some(bytes) = stream.next().await.unwrap() {
            read.extend_from_slice(&bytes);
        }
        assert!(read == blob, "ranges: {ranges}");
        assert_eq!(fake.seen().len(), 4);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn damaged_content_is_refused() {
    let fake = Fake::start(|seen, _| match seen.target.as_str() {
        "/v2/" => answer(200),
        _ => answer(200)
            .with("Content-Type", MANIFEST_TYPE)
            .body(r#"{"schemaVersion":2,"layers":[]}"#),
    })
    .await;
    let repository = fake.repository(quick(), "a/b");
    let digest = Digest::of("something else");
    assert!(matches!(
        repository.manifest(&digest.to_string()).await,
        Err(registry::Error::Digest { .. })
    ));
    assert!(matches!(
        repository.blob(&digest).await,
        Err(registry::Error::Digest { .. })
    ));
    let mut stream = repository.blob_stream(&digest, None).await.unwrap();
    assert!(stream.next().await.unwrap().is_some());
    assert!(matches!(
        stream.next().await,
        Err(registry::Error::Digest { .. })
    ));
    assert!(matches!(
        repository.blob_stream(&digest, Some(7)).await,
        Err(registry::Error::Size { .. })
    ));
    assert!(repository.manifest("latest").await.is_ok());
    assert!(repository.manifest("../../x").await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_there_is_worth_a_retry() {
    let port = free_port();
    let registries = Registries::new(quick());
    let repository = registries
        .push_to(&format!("127.0.0.1:{port}/a/b").parse().unwrap())
        .unwrap();
    let error = repository.check_push().await.unwrap_err();
    assert!(error.retryable() && !error.not_permitted(), "{error}");
    assert!(error.to_string().contains("refused"), "{error}");
}

// ---------------------------------------------------------------- a registry on another machine

/// Returns a command that runs [`client_behind_a_proxy`] for a registry on `host`. The caller sets the proxy in its
/// environment.
fn behind_a_proxy(host: &str) -> tokio::process::Command {
    let mut client = tokio::process::Command::new(std::env::current_exe().unwrap());
    client
        .args([
            "--exact",
            "client_behind_a_proxy",
            "--ignored",
            "--nocapture",
        ])
        .env("UPPERDECK_TEST_REGISTRY", host);
    client
}

/// The client's half of the next test, which runs this one in a separate process because the proxy variables are read
/// from the environment. The proxy is the scripted registry, for any host name.
#[test]
#[ignore = "the client's half of a_registry_elsewhere_may_not_lead_here"]
fn client_behind_a_proxy() {
    let Ok(host) = std::env::var("UPPERDECK_TEST_REGISTRY") else {
        return;
    };
    let access = Access {
        tls_verify: std::env::var_os("UPPERDECK_TEST_PLAIN").is_none(),
        retry: Retry {
            max_attempts: 1,
            ..Retry::default()
        },
        ..with_password()
    };
    let result = Runtime::new().unwrap().block_on(async {
        Registries::new(access)
            .push_to(&format!("{host}/a/b").parse().unwrap())
            .unwrap()
            .check_push()
            .await
    });
    match result {
        Ok(()) => println!("RESULT: pushed"),
        Err(e) => println!("RESULT: {e}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_elsewhere_may_not_lead_here() {
    for (realm, expected) in [
        ("http://127.0.0.1:1/token", "may not send us to this one"),
        (
            "http://169.254.169.254/latest/meta-data",
            "may not send us to this one",
        ),
        (
            "http://[::ffff:127.0.0.1]/token",
            "may not send us to this one",
        ),
        ("http://localhost:1/token", "may not send us to this one"),
        ("file:///etc/shadow", "not an http address"),
        // Over plain HTTP, any third party can insert the name of a token service.
        (
            "http://evil.example/token",
            "credentials go to a token service on another host only",
        ),
        ("http://registry.example/token", "pushed"),
    ] {
        let fake = Fake::start(move |seen, n| {
            // Requests to a proxy contain the whole URL.
            let mut plain = seen.clone();
            if let Some(path) = seen.target.strip_prefix("http://registry.example") {
                path.clone_into(&mut plain.target);
            }
            match seen.method.as_str() {
                "CONNECT" => answer(405),
                _ => with_tokens(realm, |seen, _| lenient(seen))(&plain, n),
            }
        })
        .await;
        let proxy = format!("http://{}", fake.address);
        let output = behind_a_proxy("registry.example")
            .env("http_proxy", &proxy)
            .env("https_proxy", &proxy)
            .env_remove("no_proxy")
            .env_remove("NO_PROXY")
            .env("UPPERDECK_TEST_PLAIN", "1")
            .output()
            .await
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(
            text.contains("RESULT: ") && text.contains(expected),
            "{realm}: {text}"
        );
        let asked = fake.seen().iter().any(|s| s.target.contains("token"));
        assert_eq!(asked, expected == "pushed", "{realm}: {:?}", fake.seen());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn plain_http_is_for_those_who_ask() {
    let fake = Fake::start(|seen, _| match seen.method.as_str() {
        "CONNECT" => answer(405),
        _ => lenient(seen),
    })
    .await;
    let proxy = format!("http://{}", fake.address);
    let output = behind_a_proxy("registry.example")
        .env("http_proxy", &proxy)
        .env("https_proxy", &proxy)
        .output()
        .await
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.contains("cannot be reached"), "{text}");
    assert!(
        fake.seen().iter().all(|s| s.method == "CONNECT"),
        "{:?}",
        fake.seen()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn plain_http_without_being_asked_for_is_named() {
    // A tunnel to a server that answers the first message of TLS as HTTP servers do.
    let tunnel = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let proxy = tunnel.local_addr().unwrap();
    tokio::spawn(async move {
        loop {
            let (mut client, _) = tunnel.accept().await.unwrap();
            tokio::spawn(async move {
                let mut head = Vec::new();
                while !head.ends_with(b"\r\n\r\n") {
                    head.push(client.read_u8().await?);
                }
                client.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await?;
                client.read_u8().await?;
                client
                    .write_all(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n")
                    .await
            });
        }
    });
    let output = behind_a_proxy("registry.example")
        .env("https_proxy", format!("http://{proxy}"))
        .output()
        .await
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        text.contains("does not speak TLS") && text.contains("--tls-verify=false"),
        "{text}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn no_proxy_is_obeyed() {
    let fake = Fake::start(|seen, _| match seen.method.as_str() {
        "CONNECT" => answer(405),
        _ => lenient(seen),
    })
    .await;
    for (exempt, through) in [
        ("elsewhere.example", true),
        ("registry.invalid", false),
        (".invalid", false),
        ("*", false),
    ] {
        for variable in ["no_proxy", "NO_PROXY"] {
            let before = fake.seen().len();
            let output = behind_a_proxy("registry.invalid")
                .env_remove("no_proxy")
                .env_remove("NO_PROXY")
                .env("https_proxy", format!("http://{}", fake.address))
                .env(variable, exempt)
                .output()
                .await
                .unwrap();
            let text = String::from_utf8_lossy(&output.stdout).into_owned();
            assert!(text.contains("cannot be reached"), "{exempt}: {text}");
            assert_eq!(
                fake.seen().len() > before,
                through,
                "{variable}={exempt}: {text}"
            );
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_of_today_and_no_other() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).display().to_string();
    let made = Command::new("openssl")
        .args(["req", "-x509", "-newkey", "ec", "-pkeyopt"])
        .args(["ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"])
        .args(["-keyout", &at("key.pem"), "-out", &at("ca.crt")])
        .args(["-subj", "/CN=127.0.0.1", "-addext"])
        .arg("subjectAltName=IP:127.0.0.1")
        .args(["-addext", "basicConstraints=critical,CA:FALSE"])
        .stderr(Stdio::null())
        .status();
    if !made.is_ok_and(|status| status.success()) {
        return support::ignore("openssl cannot make a certificate");
    }
    for (version, spoken) in [("-tls1_1", false), ("-tls1_2", true), ("-tls1_3", true)] {
        let port = free_port();
        let child = Command::new("openssl")
            .args(["s_server", "-www", "-quiet", version])
            .args(["-cipher", "DEFAULT@SECLEVEL=0"])
            .args(["-accept", &format!("127.0.0.1:{port}")])
            .args(["-cert", &at("ca.crt"), "-key", &at("key.pem")])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let _server = Server {
            child,
            port,
            dir: tempfile::tempdir().unwrap(),
        };
        let until = Instant::now() + Duration::from_secs(10);
        while std::net::TcpStream::connect(("127.0.0.1", port)).is_err() {
            assert!(Instant::now() < until, "openssl does not listen");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let access = Access {
            cert_dir: Some(dir.path().to_path_buf()),
            retry: Retry {
                max_attempts: 2,
                ..quick().retry
            },
            ..quick()
        };
        let repository = Registries::new(access)
            .pull_from(&format!("127.0.0.1:{port}/a/b").parse().unwrap())
            .unwrap();
        // The server is not a registry, but it has answered over TLS with a verified certificate.
        let error = repository.manifest("1").await.unwrap_err();
        let answered = matches!(error, registry::Error::ProtocolViolation { .. });
        assert_eq!(answered, spoken, "{version}: {error}");
    }
}

// ---------------------------------------------------------------- docker-registry

fn free_port() -> u16 {
    StdListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port()
}

struct Server {
    child: Child,
    port: u16,
    dir: tempfile::TempDir,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Server {
    /// Starts the server. `more` is YAML at the top level, in which `{dir}` is the server's directory. Returns `None`
    /// if docker-registry is not installed.
    fn start(http: &str, more: &str, files: &[(&str, &[u8])]) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        Self::start_in(dir, http, more, files)
    }

    fn start_in(
        dir: tempfile::TempDir,
        http: &str,
        more: &str,
        files: &[(&str, &[u8])],
    ) -> Option<Self> {
        for (name, content) in files {
            std::fs::write(dir.path().join(name), content).unwrap();
        }
        let port = free_port();
        let root = dir.path().display().to_string();
        let config = format!(
            "version: 0.1\nlog: {{level: error}}\nstorage:\n  filesystem: {{rootdirectory: {root}/data}}\n  \
             delete: {{enabled: true}}\nhttp:\n  addr: 127.0.0.1:{port}\n{http}\n{more}\n"
        )
        .replace("{dir}", &root);
        std::fs::write(dir.path().join("config.yml"), config).unwrap();
        let log = std::fs::File::create(dir.path().join("log")).unwrap();
        let child = Command::new("docker-registry")
            .arg("serve")
            .arg(dir.path().join("config.yml"))
            .stdout(Stdio::null())
            .stderr(log)
            .spawn();
        let child = match child {
            Ok(child) => child,
            Err(e) => {
                support::ignore(&format!(
                    "docker-registry cannot be started ({e}): apt-get install docker-registry"
                ));
                return None;
            }
        };
        let server = Self { child, port, dir };
        let until = Instant::now() + Duration::from_secs(20);
        while std::net::TcpStream::connect(("127.0.0.1", port)).is_err() {
            assert!(Instant::now() < until, "docker-registry does not listen");
            std::thread::sleep(Duration::from_millis(50));
        }
        Some(server)
    }

    fn host(&self) -> String {
        format!("127.0.0.1:{}", self.port)
    }
}

fn run(program: &str, arguments: &[&str]) -> Option<String> {
    let output = match Command::new(program).args(arguments).output() {
        Ok(output) => output,
        Err(e) => {
            support::ignore(&format!("{program} cannot be started ({e})"));
            return None;
        }
    };
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    Some(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// A valid image: one layer with a file, and its config.
struct Image {
    layer: Bytes,
    config: Bytes,
    manifest: Bytes,
}

fn image(content: &[u8]) -> Image {
    let mut tar = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_ustar();
    header.set_size(content.len() as u64);
    header.set_mode(0o644);
    header.set_mtime(1);
    tar.append_data(&mut header, "hello.txt", content).unwrap();
    let tar = tar.into_inner().unwrap();
    let diff_id = Digest::of(&tar);
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&tar).unwrap();
    let layer = gzip.finish().unwrap();
    let config = serde_json::json!({
        "architecture": "amd64", "os": "linux", "config": {},
        "rootfs": {"type": "layers", "diff_ids": [diff_id]},
        "history": [{"created": "2026-01-01T00:00:00Z", "created_by": "test"}],
    })
    .to_string();
    let manifest = serde_json::json!({
        "schemaVersion": 2,
        "mediaType": MANIFEST_TYPE,
        "config": {
            "mediaType": "application/vnd.oci.image.config.v1+json",
            "digest": Digest::of(&config), "size": config.len(),
        },
        "layers": [{
            "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip",
            "digest": Digest::of(&layer), "size": layer.len(),
        }],
    })
    .to_string();
    Image {
        layer: layer.into(),
        config: config.into(),
        manifest: manifest.into(),
    }
}

async fn stream_blob(destination: &Destination, blob: Bytes) -> Result<(), Error> {
    let (digest, size) = (Digest::of(&blob), blob.len() as u64);
    let mut writer = destination.begin_blob(Handle::current())?;
    let writer: BlobWriter = tokio::task::spawn_blocking(move || {
        let mut rest = blob;
        while !rest.is_empty() {
            writer.write(rest.split_to(rest.len().min(256 << 10)))?;
        }
        Ok::<_, Error>(writer)
    })
    .await
    .unwrap()?;
    writer.finish(&digest, size).await
}

async fn save(destination: &Destination, image: &Image, tag: &str) -> Result<Digest, Error> {
    destination.check().await?;
    stream_blob(destination, image.layer.clone()).await?;
    destination
        .put_blob(image.config.clone(), &Digest::of(&image.config))
        .await?;
    destination
        .put_manifest(image.manifest.clone(), MANIFEST_TYPE, tag)
        .await
}

fn open(target: &str, access: Access) -> Destination {
    Destination::open(
        &Target::for_saving(target).unwrap(),
        &Registries::new(access),
    )
    .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_goes_to_docker_registry_and_comes_back() {
    let Some(server) = Server::start("", "", &[]) else {
        return;
    };
    let target = format!("{}/team/saved:v1", server.host());
    let image = image(b"hello from a container");
    let registries = Registries::new(quick());
    let destination =
        Destination::open(&Target::for_saving(&target).unwrap(), &registries).unwrap();
    let digest = save(&destination, &image, "v1").await.unwrap();

    let source = registries
        .repository(&format!("{}/team/saved", server.host()))
        .unwrap();
    let by_tag = source.manifest("v1").await.unwrap();
    assert_eq!((by_tag.digest, &by_tag.bytes), (digest, &image.manifest));
    assert_eq!(source.manifest(&digest.to_string()).await.unwrap(), by_tag);
    assert_eq!(
        source.blob(&Digest::of(&image.config)).await.unwrap(),
        image.config
    );
    assert!(source.manifest("nosuch").await.unwrap_err().not_found());

    // Mounts of an existing blob, of a missing one, and from another registry.
    let layer = Digest::of(&image.layer);
    let second = open(&format!("{}/team/second", server.host()), quick());
    assert_eq!(second.has_blob(&layer, None).await.unwrap(), None);
    assert!(
        second
            .mount_blob(&layer, &format!("{}/team/saved", server.host()))
            .await
            .unwrap()
    );
    assert_eq!(
        second
            .has_blob(&layer, Some(image.layer.len() as u64))
            .await
            .unwrap(),
        Some(image.layer.len() as u64)
    );
    assert_eq!(second.has_blob(&layer, Some(1)).await.unwrap(), None);
    let unknown = Digest::of("unknown");
    assert!(
        !second
            .mount_blob(&unknown, &format!("{}/team/saved", server.host()))
            .await
            .unwrap()
    );
    assert!(
        !second
            .mount_blob(&layer, "elsewhere.example/team/saved")
            .await
            .unwrap()
    );

    // An empty blob is valid, too.
    stream_blob(&second, Bytes::new()).await.unwrap();
    assert_eq!(
        second.has_blob(&Digest::of(""), None).await.unwrap(),
        Some(0)
    );

    // Checks and refused mounts leave no open upload (distribution 2.8 leaves an empty hash state for each).
    let uploads = server
        .dir
        .path()
        .join("data/docker/registry/v2/repositories/team/second/_uploads");
    let open: Vec<_> = std::fs::read_dir(&uploads)
        .into_iter()
        .flatten()
        .map(|e| e.unwrap().path())
        .filter(|upload| upload.join("startedat").exists() || upload.join("data").exists())
        .collect();
    assert_eq!(open, Vec::<PathBuf>::new());

    // Other tools can read what was written.
    let docker = format!("docker://{target}");
    if let Some(shown) = run("skopeo", &["inspect", "--tls-verify=false", &docker]) {
        assert!(shown.contains(&digest.to_string()), "{shown}");
    }
    let copied = format!("oci:{}/copied:v1", server.dir.path().display());
    if run(
        "skopeo",
        &[
            "--insecure-policy",
            "copy",
            "--src-tls-verify=false",
            &docker,
            &copied,
        ],
    )
    .is_some()
    {
        unpack(server.dir.path(), "copied:v1", b"hello from a container");
    }
}

/// Unpacks with umoci and checks the file.
fn unpack(dir: &Path, image: &str, content: &[u8]) {
    let bundle = dir.join(format!("bundle-{}", image.replace(':', "-")));
    let source = format!("{}/{image}", dir.display());
    if run(
        "umoci",
        &["unpack", "--image", &source, &bundle.display().to_string()],
    )
    .is_some()
    {
        assert_eq!(
            std::fs::read(bundle.join("rootfs/hello.txt")).unwrap(),
            content
        );
    }
}

/// The size of the blob can be set for measurements with UPPERDECK_TEST_BLOB_MB.
#[tokio::test(flavor = "multi_thread")]
async fn a_large_blob_streams() {
    let Some(server) = Server::start("", "", &[]) else {
        return;
    };
    let megabytes: usize = std::env::var("UPPERDECK_TEST_BLOB_MB")
        .ok()
        .and_then(|n| n.parse().ok())
        .unwrap_or(32);
    let mut state = 1_u64;
    let blob: Vec<u8> = (0..megabytes << 17)
        .flat_map(|_| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            state.to_le_bytes()
        })
        .collect();
    let blob = Bytes::from(blob);
    let (digest, size) = (Digest::of(&blob), blob.len() as u64);
    let destination = open(&format!("{}/large/blob", server.host()), quick());
    destination.check().await.unwrap();
    let started = Instant::now();
    stream_blob(&destination, blob).await.unwrap();
    let seconds = started.elapsed().as_secs_f64();
    eprintln!(
        "{megabytes} MiB in {seconds:.2} s, digest included: {:.0} MB/s",
        size as f64 / 1e6 / seconds
    );
    assert_eq!(
        destination.has_blob(&digest, Some(size)).await.unwrap(),
        Some(size)
    );
    let source = Registries::new(quick())
        .repository(&format!("{}/large/blob", server.host()))
        .unwrap();
    let mut stream = source.blob_stream(&digest, Some(size)).await.unwrap();
    let mut read = 0;
    let started = Instant::now();
    while let Some(bytes) = stream.next().await.unwrap() {
        read += bytes.len() as u64;
    }
    let seconds = started.elapsed().as_secs_f64();
    eprintln!(
        "read back, checked: {:.0} MB/s",
        size as f64 / 1e6 / seconds
    );
    assert_eq!(read, size);
}

#[tokio::test(flavor = "multi_thread")]
async fn passwords_are_asked_for_and_taken() {
    // bcrypt of "hunter2"
    let users = b"user:$2b$12$1GLM0k/x21SffXYlcz6CaOxebxrLm1x95gldgaN207BLB3UVyVcBe\n";
    let more = "auth:\n  htpasswd: {realm: test, path: {dir}/users}";
    let Some(server) = Server::start("", more, &[("users", users)]) else {
        return;
    };
    let target = format!("{}/team/saved:v1", server.host());
    let image = image(b"with a password");
    save(&open(&target, with_password()), &image, "v1")
        .await
        .unwrap();

    let wrong = Access {
        creds: Some("user:wrong".parse().unwrap()),
        ..quick()
    };
    for access in [wrong, quick()] {
        let error = open(&target, access).check().await.unwrap_err();
        assert!(error.not_permitted() && !error.retryable(), "{error}");
        assert!(!error.to_string().contains("wrong"), "{error}");
    }
    // The same credentials from auth files, as other tools write them.
    let auth = "dXNlcjpodW50ZXIy";
    for file in [
        format!(r#"{{"auths":{{"{}":{{"auth":"{auth}"}}}}}}"#, server.host()),
        format!(
            r#"{{"auths":{{"{}/team":{{"auth":"{auth}"}},"{}":{{"auth":"eDp5"}}}}}}"#,
            server.host(),
            server.host()
        ),
    ] {
        let path = server.dir.path().join("auth.json");
        std::fs::write(&path, file).unwrap();
        let access = Access {
            authfile: Some(path),
            ..quick()
        };
        open(&target, access).check().await.unwrap();
    }
}

/// Uses a self-signed certificate, created as in Docker's documentation.
#[tokio::test(flavor = "multi_thread")]
async fn a_self_signed_certificate_in_its_directory_is_enough() {
    let dir = tempfile::tempdir().unwrap();
    if Command::new("openssl").arg("version").output().is_err() {
        return support::ignore("openssl is not installed");
    }
    let at = |name: &str| dir.path().join(name).display().to_string();
    let make = |name: &str| {
        let (key, cert) = (at(&format!("{name}.key")), at(&format!("{name}.crt")));
        let san = "subjectAltName = IP:127.0.0.1";
        run(
            "openssl",
            &[
                "req",
                "-newkey",
                "rsa:2048",
                "-nodes",
                "-keyout",
                &key,
                "-subj",
                "/CN=localhost",
                "-addext",
                san,
                "-x509",
                "-days",
                "30",
                "-out",
                &cert,
            ],
        );
    };
    make("server");
    make("other");
    let certs = |name: &str| {
        let certs = dir.path().join(format!("certs-{name}"));
        std::fs::create_dir(&certs).unwrap();
        std::fs::copy(at(&format!("{name}.crt")), certs.join("ca.crt")).unwrap();
        certs
    };
    let (right, wrong) = (certs("server"), certs("other"));
    let http = "  tls:\n    certificate: {dir}/server.crt\n    key: {dir}/server.key";
    let Some(server) = Server::start_in(dir, http, "", &[]) else {
        return;
    };
    let target = format!("{}/team/saved:v1", server.host());
    let access = |dir: PathBuf| Access {
        cert_dir: Some(dir),
        ..quick()
    };
    open(&target, access(right)).check().await.unwrap();
    let error = open(&target, access(wrong)).check().await.unwrap_err();
    assert!(
        matches!(&error, Error::Registry(registry::Error::Certificate { .. })),
        "{error}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_is_checked_with_a_private_ca_and_a_client_certificate() {
    let dir = tempfile::tempdir().unwrap();
    if Command::new("openssl").arg("version").output().is_err() {
        return support::ignore("openssl is not installed");
    }
    let at = |name: &str| dir.path().join(name).display().to_string();
    let make = |name: &str, extra: &[&str]| {
        let (key, request, cert) = (
            at(&format!("{name}.key")),
            at(&format!("{name}.csr")),
            at(&format!("{name}.pem")),
        );
        run(
            "openssl",
            &[
                "req",
                "-newkey",
                "ec",
                "-pkeyopt",
                "ec_paramgen_curve:prime256v1",
                "-nodes",
                "-keyout",
                &key,
                "-out",
                &request,
                "-subj",
                &format!("/CN={name}"),
            ],
        );
        let mut arguments = vec![
            "x509",
            "-req",
            "-in",
            &request,
            "-CA",
            "",
            "-CAkey",
            "",
            "-CAcreateserial",
            "-days",
            "2",
            "-out",
            &cert,
        ];
        let (ca, ca_key) = (at("ca.pem"), at("ca.key"));
        (arguments[5], arguments[7]) = (&ca, &ca_key);
        arguments.extend(extra);
        run("openssl", &arguments);
    };
    run(
        "openssl",
        &[
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:prime256v1",
            "-nodes",
            "-keyout",
            &at("ca.key"),
            "-out",
            &at("ca.pem"),
            "-days",
            "2",
            "-subj",
            "/CN=test CA",
        ],
    );
    std::fs::write(
        dir.path().join("san"),
        "subjectAltName=IP:127.0.0.1\nextendedKeyUsage=serverAuth\n",
    )
    .unwrap();
    std::fs::write(dir.path().join("user"), "extendedKeyUsage=clientAuth\n").unwrap();
    make("server", &["-extfile", &at("san")]);
    make("client", &["-extfile", &at("user")]);

    let certs = dir.path().join("certs.d");
    std::fs::create_dir(&certs).unwrap();
    std::fs::copy(at("ca.pem"), certs.join("ca.crt")).unwrap();
    let http = "  tls:\n    certificate: {dir}/server.pem\n    key: {dir}/server.key\n    clientcas: [\"{dir}/ca.pem\"]";
    let Some(server) = Server::start_in(dir, http, "", &[]) else {
        return;
    };
    let target = format!("{}/team/saved:v1", server.host());
    let with_certs = || Access {
        cert_dir: Some(certs.clone()),
        ..quick()
    };

    // The CA is unknown, so there is no connection, not even by plain HTTP or on loopback.
    let error = open(&target, quick()).check().await.unwrap_err();
    assert!(
        matches!(&error, Error::Registry(registry::Error::Certificate { .. })),
        "{error}"
    );
    assert!(
        !error.retryable() && error.to_string().contains("--cert-dir"),
        "{error}"
    );
    // The CA is known, but the server requires a client certificate.
    assert!(open(&target, with_certs()).check().await.is_err());
    std::fs::copy(
        server.dir.path().join("client.pem"),
        certs.join("client.cert"),
    )
    .unwrap();
    std::fs::copy(
        server.dir.path().join("client.key"),
        certs.join("client.key"),
    )
    .unwrap();
    save(&open(&target, with_certs()), &image(b"over tls"), "v1")
        .await
        .unwrap();
    // Without verification, but with the client certificate.
    std::fs::remove_file(certs.join("ca.crt")).unwrap();
    assert!(open(&target, with_certs()).check().await.is_err());
    open(
        &target,
        Access {
            tls_verify: false,
            ..with_certs()
        },
    )
    .check()
    .await
    .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_read_only_registry_is_a_matter_of_permission() {
    let Some(server) = Server::start("", "", &[]) else {
        return;
    };
    drop(server);
    let dir = tempfile::tempdir().unwrap();
    let port = free_port();
    let config = format!(
        "version: 0.1\nlog: {{level: error}}\nstorage:\n  filesystem: {{rootdirectory: {}}}\n  maintenance: {{readonly: \
         {{enabled: true}}}}\nhttp: {{addr: \"127.0.0.1:{port}\"}}\n",
        dir.path().display()
    );
    let path = dir.path().join("config.yml");
    std::fs::write(&path, config).unwrap();
    let child = Command::new("docker-registry")
        .arg("serve")
        .arg(&path)
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let server = Server { child, port, dir };
    // The server is not up yet, so the request has to be retried.
    let access = Access {
        retry: Retry {
            max_attempts: 8,
            first_pause: Duration::from_millis(100),
            ..Retry::default()
        },
        ..quick()
    };
    let error = open(&format!("{}/a/b", server.host()), access)
        .check()
        .await
        .unwrap_err();
    assert!(error.not_permitted(), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn layouts_are_read_by_the_other_tools() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).display().to_string();
    let image = image(b"in a layout");
    let digest = save(
        &open(&format!("oci:{}:v1", at("layout")), quick()),
        &image,
        "v1",
    )
    .await
    .unwrap();
    save(
        &open(&format!("oci-archive:{}:v1", at("archive.tar")), quick()),
        &image,
        "v1",
    )
    .await
    .unwrap();
    for source in [
        format!("oci:{}:v1", at("layout")),
        format!("oci-archive:{}:v1", at("archive.tar")),
    ] {
        if let Some(shown) = run("skopeo", &["inspect", &source]) {
            assert!(shown.contains(&digest.to_string()), "{shown}");
        }
    }
    unpack(dir.path(), "layout:v1", b"in a layout");
    let copied = format!("oci:{}:v1", at("copied"));
    let source = format!("oci-archive:{}:v1", at("archive.tar"));
    if run("skopeo", &["--insecure-policy", "copy", &source, &copied]).is_some() {
        unpack(dir.path(), "copied:v1", b"in a layout");
    }
    // What other tools write can be read.
    let theirs = format!("oci-archive:{}:x/y:1", at("theirs.tar"));
    if run("skopeo", &["--insecure-policy", "copy", &source, &theirs]).is_some() {
        let target: Target = theirs.parse().unwrap();
        let (reader, tag) = target.open_layout().unwrap().unwrap();
        let manifest = reader
            .manifest(tag, &upperdeck::image::manifest::Platform::host())
            .unwrap();
        assert_eq!(manifest.digest, digest);
    }
}
