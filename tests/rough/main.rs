//! Pushes in the rough world: docker-registry with real tokens, behind a proxy that cuts, delays and lies.
//!
//! `UPPERDECK_TEST_REGISTRY` names another registry program than docker-registry (distribution 3 can go on with uploads),
//! `UPPERDECK_TEST_SAVES` sets the number of saves of the mix, `UPPERDECK_TEST_LAYER_MB` the size of the layer that is cut
//! three times, `UPPERDECK_TEST_RATE` its line in bytes a second.
// What a test's helpers unwrap fails the test, as it should.
#![allow(clippy::unwrap_used, clippy::print_stderr)]

#[path = "../support/http.rs"]
mod http;
mod proxy;
#[path = "../support/mod.rs"]
#[allow(dead_code)]
mod support;
mod tokens;
mod ways;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::Bytes;
use rand::rngs::SmallRng;
use rand::{RngExt as _, SeedableRng as _};
use serde_json::json;
use support::{Need, ignored};
use tokio::runtime::Handle;
use upperdeck::common::digest::Digest;
use upperdeck::store::destination::{Destination, Error, Target};
use upperdeck::store::registry::{Access, Registries, Retry};

use http::{Response, Server};
use proxy::{Fault, Proxy};
use tokens::{Tokens, USER};

type Outcome = Result<(), Box<dyn std::error::Error>>;

const MANIFEST_TYPE: &str = "application/vnd.oci.image.manifest.v1+json";
const PIECE: usize = 64 << 10;

/// docker-registry, which can be ended and started again over the same storage.
struct Registry {
    child: Option<Child>,
    address: SocketAddr,
    config: std::path::PathBuf,
    _dir: tempfile::TempDir,
}

impl Drop for Registry {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Registry {
    fn start(more: &str) -> Result<Self, Box<dyn std::error::Error>> {
        let dir = tempfile::tempdir()?;
        let port = std::net::TcpListener::bind("127.0.0.1:0")?
            .local_addr()?
            .port();
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        let root = dir.path().display();
        let config = dir.path().join("config.yml");
        let text = format!(
            "version: 0.1\nlog: {{level: error}}\nstorage:\n  filesystem: {{rootdirectory: {root}/data}}\n  \
             delete: {{enabled: true}}\nhttp: {{addr: \"{address}\"}}\n{more}"
        );
        std::fs::write(&config, text)?;
        let mut registry = Self {
            child: None,
            address,
            config,
            _dir: dir,
        };
        registry.go()?;
        Ok(registry)
    }

    fn go(&mut self) -> Outcome {
        let program =
            std::env::var("UPPERDECK_TEST_REGISTRY").unwrap_or("docker-registry".to_owned());
        let child = Command::new(&program)
            .arg("serve")
            .arg(&self.config)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        self.child = Some(child);
        let until = Instant::now() + Duration::from_secs(20);
        while std::net::TcpStream::connect(self.address).is_err() {
            assert!(Instant::now() < until, "{program} does not listen");
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    fn stop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn access(creds: Option<(&str, &str)>) -> Access {
    Access {
        authfile: Some("/dev/null".into()),
        creds: creds.map(|(user, password)| format!("{user}:{password}").parse().unwrap()),
        retry: Retry {
            first_pause: Duration::from_millis(10),
            ..Retry::default()
        },
        ..Access::default()
    }
}

fn open(address: SocketAddr, path: &str, access: Access) -> Destination {
    let target = Target::for_saving(&format!("{address}/{path}")).unwrap();
    Destination::open(&target, &Registries::new(access)).unwrap()
}

/// Bytes that do not repeat.
fn noise(seed: u64, size: usize) -> Bytes {
    let mut bytes = vec![0; size];
    SmallRng::seed_from_u64(seed).fill(&mut bytes[..]);
    bytes.into()
}

/// Writes a blob as a save does: from a thread, in pieces; again from its start where that is worth it.
async fn deliver(destination: &Destination, blob: &Bytes) -> Result<u32, Error> {
    let (digest, size) = (Digest::of(blob), blob.len() as u64);
    let mut writer = destination.begin_blob(Handle::current())?;
    let mut again = 0;
    loop {
        let mut rest = blob.clone();
        let (mut written, failed) = tokio::task::spawn_blocking(move || {
            while !rest.is_empty() {
                if let Err(error) = writer.write(rest.split_to(rest.len().min(PIECE))) {
                    return (writer, Some(error));
                }
            }
            (writer, None)
        })
        .await
        .unwrap();
        let error = match failed {
            Some(error) => error,
            None => match written.try_finish(&digest, size).await {
                Ok(()) => return Ok(again),
                Err(error) => error,
            },
        };
        if !error.retryable() {
            return Err(error);
        }
        writer = written.retry(error).await?;
        again += 1;
    }
}

struct Image {
    layers: Vec<Bytes>,
    config: Bytes,
    manifest: Bytes,
}

fn image(layers: Vec<Bytes>, name: &str) -> Image {
    let config = json!({"architecture": "amd64", "os": "linux", "author": name, "rootfs": {
        "type": "layers", "diff_ids": layers.iter().map(Digest::of).collect::<Vec<_>>(),
    }})
    .to_string();
    let described = layers.iter().map(|layer| {
        json!({
            "mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": Digest::of(layer), "size": layer.len(),
        })
    });
    let manifest = json!({
        "schemaVersion": 2, "mediaType": MANIFEST_TYPE,
        "config": {
            "mediaType": "application/vnd.oci.image.config.v1+json",
            "digest": Digest::of(&config), "size": config.len(),
        },
        "layers": described.collect::<Vec<_>>(),
    })
    .to_string();
    Image {
        layers,
        config: config.into(),
        manifest: manifest.into(),
    }
}

/// As `commit` does it.
async fn save(destination: &Destination, image: &Image, tag: &str) -> Result<Digest, Error> {
    destination.check().await?;
    for layer in &image.layers {
        let (digest, size) = (Digest::of(layer), layer.len() as u64);
        if destination.has_blob(&digest, Some(size)).await?.is_none() {
            deliver(destination, layer).await?;
        }
    }
    destination
        .put_blob(image.config.clone(), &Digest::of(&image.config))
        .await?;
    destination
        .put_manifest(image.manifest.clone(), MANIFEST_TYPE, tag)
        .await
}

/// What stands under a tag is, if there is anything, the image with every byte of it.
async fn verify(address: SocketAddr, path: &str, tag: &str, image: &Image) -> Result<bool, String> {
    let registries = Registries::new(access(Some(USER)));
    let repository = registries
        .repository(&format!("{address}/{path}"))
        .map_err(|e| e.to_string())?;
    let manifest = match repository.manifest(tag).await {
        Ok(manifest) => manifest,
        Err(error) if error.not_found() => return Ok(false),
        Err(error) => return Err(error.to_string()),
    };
    if manifest.bytes != image.manifest {
        return Err("another manifest".to_owned());
    }
    for blob in image.layers.iter().chain([&image.config]) {
        let mut stream = repository
            .blob_stream(&Digest::of(blob), Some(blob.len() as u64))
            .await
            .map_err(|e| e.to_string())?;
        while stream.next().await.map_err(|e| e.to_string())?.is_some() {}
    }
    Ok(true)
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_that_the_registry_verifies() -> Outcome {
    if ignored(&[Need::Program("docker-registry"), Need::Program("openssl")]) {
        return Ok(());
    }
    let tokens = Tokens::start()?.ok_or("openssl does not make a key")?;
    let realm = format!("http://{}/token", tokens.server.address);
    let registry = Registry::start(&tokens.config(&realm))?;
    let base = image(vec![noise(1, 200_000)], "base");
    let access_ = || access(Some(USER));
    save(&open(registry.address, "team/base", access_()), &base, "1").await?;
    assert!(verify(registry.address, "team/base", "1", &base).await?);
    // One token does for all that a save asks of one repository.
    assert!(tokens.given.load(Ordering::SeqCst) <= 4);

    // A mount asks for both repositories in one token.
    let destination = open(registry.address, "team/saved", access_());
    let layer = Digest::of(&base.layers[0]);
    assert!(
        destination
            .mount_blob(&layer, &format!("{}/team/base", registry.address))
            .await?
    );
    let scopes = tokens
        .scopes
        .lock()
        .unwrap()
        .last()
        .cloned()
        .unwrap_or_default();
    assert_eq!(
        scopes,
        [
            "repository:team/saved:pull,push",
            "repository:team/base:pull"
        ]
    );
    assert_eq!(destination.has_blob(&layer, None).await?, Some(200_000));

    // A token that has ended while a slow blob went up: the PUT after it has a new one.
    tokens.life.store(2, Ordering::SeqCst);
    let slow = Proxy::start(registry.address, |method, _, _| match method {
        "PATCH" => Fault::Slow(100_000),
        _ => Fault::None,
    })?;
    let before = tokens.given.load(Ordering::SeqCst);
    let again = deliver(
        &open(slow.address, "team/slow", access_()),
        &noise(2, 350_000),
    )
    .await?;
    assert_eq!(again, 0);
    assert!(
        tokens.given.load(Ordering::SeqCst) >= before + 2,
        "one for the POST, another for the PUT"
    );

    let error = open(registry.address, "team/x", access(Some(("user", "wrong"))))
        .check()
        .await
        .unwrap_err();
    let text = error.to_string();
    assert!(
        error.not_permitted() && text.contains("wrong password") && text.contains("token service"),
        "{text}"
    );
    tokens.fails.store(true, Ordering::SeqCst);
    tokens.life.store(300, Ordering::SeqCst);
    save(&open(registry.address, "team/y", access_()), &base, "1").await?;
    Ok(())
}

/// A layer with one file.
fn layer(name: &str, content: &[u8]) -> Bytes {
    let mut tar = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_ustar();
    header.set_size(content.len() as u64);
    header.set_mode(0o644);
    tar.append_data(&mut header, name, content).unwrap();
    tar.into_inner().unwrap().into()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_squashed_layer_is_sent_again_after_errors_that_pass() -> Outcome {
    if ignored(&[Need::Program("docker-registry")]) {
        return Ok(());
    }
    let registry = Registry::start("")?;
    let destination = open(registry.address, "a/image", access(None));
    let layers = ["base", "one", "two"].map(|name| layer(name, &noise(1, 300_000)));
    save(&destination, &image(layers[..1].to_vec(), "base"), "base").await?;
    save(&destination, &image(layers.to_vec(), "all"), "all").await?;
    let sends = AtomicU64::new(0);
    let proxy = Proxy::start(registry.address, move |method, _, _| {
        if method != "PATCH" {
            return Fault::None;
        }
        match sends.fetch_add(1, Ordering::SeqCst) {
            0 => Fault::Say(503, String::new()),
            1 => Fault::CutRequest(100_000),
            _ => Fault::None,
        }
    })?;
    let of = |tag| format!("{}/a/image:{tag}", proxy.address);
    let squash = Command::new(support::program())
        .args(["image", "squash", "--tls-verify=false", "--base"])
        .args([of("base"), of("all"), of("squashed")])
        .env("REGISTRY_AUTH_FILE", "/dev/null")
        .output()?;
    let said = String::from_utf8_lossy(&squash.stderr);
    assert!(squash.status.success(), "{said}");
    let faults = proxy.seen().into_iter().map(|seen| seen.fault);
    assert_eq!(faults.filter(|fault| *fault != Fault::None).count(), 2);
    let made =
        Registries::new(access(None)).repository(&format!("{}/a/image", registry.address))?;
    let manifest: serde_json::Value =
        serde_json::from_slice(&made.manifest("squashed").await?.bytes)?;
    let layers = manifest["layers"].as_array().ok_or("layers")?;
    assert_eq!(layers.len(), 2);
    let digest: Digest = layers[1]["digest"].as_str().ok_or("digest")?.parse()?;
    let mut stream = made
        .blob_stream(&digest, layers[1]["size"].as_u64())
        .await?;
    while stream.next().await?.is_some() {}
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_that_the_registry_has_is_sent() -> Outcome {
    if ignored(&[Need::Program("docker-registry")]) {
        return Ok(());
    }
    let registry = Registry::start("")?;
    let counted = Proxy::start(registry.address, |_, _, _| Fault::None)?;
    let sent = || counted.seen().iter().map(|seen| seen.bytes).sum::<u64>();
    let (base, one, two) = (noise(1, 3_000_000), noise(2, 500_000), noise(3, 200_000));
    let destination = open(counted.address, "a/one", access(None));
    let first = image(vec![base.clone(), one.clone()], "first");
    save(&destination, &first, "1").await?;
    let content = |image: &Image| (image.config.len() + image.manifest.len()) as u64;
    assert_eq!(sent(), 3_500_000 + content(&first));
    // The same again: its manifest and nothing else.
    let before = sent();
    save(&destination, &first, "2").await?;
    assert_eq!(sent() - before, first.manifest.len() as u64);
    // One layer more: that layer, a config, a manifest.
    let before = sent();
    let second = image(vec![base.clone(), one.clone(), two.clone()], "second");
    save(&destination, &second, "3").await?;
    assert_eq!(sent() - before, 200_000 + content(&second));
    // Another repository: mounted, not one byte.
    let before = sent();
    let other = open(counted.address, "b/two", access(None));
    assert!(
        other
            .mount_blob(&Digest::of(&base), &format!("{}/a/one", counted.address))
            .await?
    );
    assert_eq!(
        other.has_blob(&Digest::of(&base), Some(3_000_000)).await?,
        Some(3_000_000)
    );
    assert_eq!(sent(), before);
    Ok(())
}

fn number(variable: &str, usual: u64) -> u64 {
    std::env::var(variable)
        .ok()
        .and_then(|n| n.parse().ok())
        .unwrap_or(usual)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_arrives_over_a_line_that_breaks_three_times() -> Outcome {
    if ignored(&[Need::Program("docker-registry")]) {
        return Ok(());
    }
    let registry = Registry::start("")?;
    let size = number("UPPERDECK_TEST_LAYER_MB", 24) << 20;
    let rate = number("UPPERDECK_TEST_RATE", 200_000_000);
    let cuts = AtomicU64::new(0);
    let line = Proxy::start(registry.address, move |method, _, _| match method {
        "PATCH" => match cuts.fetch_add(1, Ordering::SeqCst) {
            n @ 0..3 => Fault::CutRequest(size * (n + 1) / 5),
            _ => Fault::Slow(rate),
        },
        _ => Fault::None,
    })?;
    let destination = open(line.address, "a/large", access(None));
    destination.check().await?;
    let before = peak();
    let mut writer = destination.begin_blob(Handle::current())?;
    let started = Instant::now();
    let mut again = 0;
    let digest = loop {
        let (mut written, failed, digest) = tokio::task::spawn_blocking(move || {
            use sha2::Digest as _;
            let mut hasher = sha2::Sha256::new();
            let mut random = SmallRng::seed_from_u64(7);
            let mut left = size as usize;
            // Made as it is sent, as a layer is: nowhere is all of it.
            while left > 0 {
                let mut piece = vec![0; left.min(1 << 20)];
                random.fill(&mut piece[..]);
                left -= piece.len();
                hasher.update(&piece);
                if let Err(error) = writer.write(piece.into()) {
                    return (writer, Some(error), None);
                }
            }
            let digest = Digest::from_hex(&hex::encode(hasher.finalize())).unwrap();
            (writer, None, Some(digest))
        })
        .await?;
        let error = match (failed, digest) {
            (None, Some(digest)) => match written.try_finish(&digest, size).await {
                Ok(()) => break digest,
                Err(error) => error,
            },
            (failed, _) => failed.unwrap(),
        };
        assert!(error.retryable(), "{error}");
        writer = written.retry(error).await?;
        again += 1;
    };
    assert_eq!(again, 3);
    assert_eq!(destination.has_blob(&digest, Some(size)).await?, Some(size));
    let grown = peak().saturating_sub(before);
    let sent: u64 = line.seen().iter().map(|seen| seen.bytes).sum();
    support::note(&format!(
        "{} MiB ({} MiB sent) at {} MB/s with three cuts: {:.1} s, memory grew by {} MiB",
        size >> 20,
        sent >> 20,
        rate / 1_000_000,
        started.elapsed().as_secs_f64(),
        grown >> 20
    ));
    assert!(grown < 256 << 20, "memory grew by {grown} bytes");
    Ok(())
}

/// The most memory that this process has had, in bytes.
fn peak() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status
        .lines()
        .find(|line| line.starts_with("VmHWM:"))
        .unwrap();
    line.split_whitespace()
        .nth(1)
        .unwrap()
        .parse::<u64>()
        .unwrap()
        << 10
}

/// Every save of a random mix of troubles ends in an image that is right, or in an error that is in the table.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn no_trouble_makes_a_wrong_image() -> Outcome {
    if ignored(&[Need::Program("docker-registry"), Need::Program("openssl")]) {
        return Ok(());
    }
    let saves = number("UPPERDECK_TEST_SAVES", 60);
    let tokens = Tokens::start()?.ok_or("openssl does not make a key")?;
    tokens.life.store(2, Ordering::SeqCst);
    // Tokens come through the spoiling proxy, too.
    let to_tokens = Arc::new(Mutex::new(SmallRng::seed_from_u64(4)));
    let token_line = Proxy::start(tokens.server.address, move |_, _, _| {
        let mut random = to_tokens.lock().unwrap();
        match random.random_range(0..20) {
            0 => Fault::Say(503, String::new()),
            1 => Fault::CutAnswer(random.random_range(0..900)),
            2 => Fault::ShortBody,
            _ => Fault::None,
        }
    })?;
    let realm = format!("http://{}/token", token_line.address);
    let registry = Arc::new(Mutex::new(Registry::start(&tokens.config(&realm))?));
    let address = registry.lock().unwrap().address;

    let stray = Arc::new(Mutex::new(Vec::<String>::new()));
    let log = Arc::clone(&stray);
    let elsewhere = Server::start(move |request| {
        if let Some(value) = request.headers.get("authorization") {
            log.lock().unwrap().push(value.clone());
        }
        Response::new(404)
    })?;
    let away = elsewhere.address;
    let seed = number("UPPERDECK_TEST_SEED", 11);
    let random = Arc::new(Mutex::new(SmallRng::seed_from_u64(seed)));
    let calm = Arc::new(AtomicBool::new(false));
    let quiet = Arc::clone(&calm);
    let restarted = Arc::clone(&registry);
    let line = Proxy::start(address, move |method, target, _| {
        if quiet.load(Ordering::SeqCst) {
            return Fault::None;
        }
        let mut random = random.lock().unwrap();
        match random.random_range(0..120) {
            0..4 => Fault::CutRequest(random.random_range(0..300_000)),
            4..8 => Fault::CutAnswer(random.random_range(0..600)),
            8..10 => Fault::Say(
                429,
                format!("Retry-After: {}\r\n", random.random_range(0..2)),
            ),
            10..14 => {
                let statuses = [500, 502, 503, 504, 408, 499, 522];
                Fault::Say(
                    statuses[random.random_range(0..statuses.len())],
                    String::new(),
                )
            }
            14 => Fault::BlackHole,
            15..19 => Fault::Slow(random.random_range(500_000..5_000_000)),
            19 => Fault::Say(307, format!("Location: http://{away}{target}\r\n")),
            20 => Fault::WrongDigest,
            21..23 => Fault::ShortBody,
            23 if method == "PATCH" => {
                drop(random);
                let mut registry = restarted.lock().unwrap();
                registry.stop();
                registry.go().unwrap();
                Fault::CutRequest(1000)
            }
            _ => Fault::None,
        }
    })?;

    let mut ends = BTreeMap::<String, u64>::new();
    let mut right = 0;
    let base = noise(99, 400_000);
    for n in 0..saves {
        let layer = noise(1000 + n, 50_000 + (n as usize * 7919) % 400_000);
        let image = image(vec![base.clone(), layer], &format!("save {n}"));
        let (path, tag) = (format!("rough/r{}", n % 5), format!("t{n}"));
        let access = Access {
            stall_timeout: Duration::from_millis(1500),
            ..access(Some(USER))
        };
        let saved = save(&open(line.address, &path, access), &image, &tag).await;
        let end = match &saved {
            Ok(digest) => {
                assert_eq!(*digest, Digest::of(&image.manifest));
                "saved".to_owned()
            }
            Err(error) => {
                let text = error.to_string();
                assert!(
                    !text.contains(USER.1) && !text.contains("eyJ"),
                    "a secret shows: {text}"
                );
                let exit = match (error.not_permitted(), error.retryable()) {
                    (true, _) => 77,
                    (_, true) => 75,
                    _ => 1,
                };
                support::note(&format!("save {n}: exit {exit}: {text}"));
                format!("exit {exit}")
            }
        };
        *ends.entry(end).or_default() += 1;
        // Looked at from behind the trouble.
        calm.store(true, Ordering::SeqCst);
        let there = verify_patiently(address, &path, &tag, &image).await;
        calm.store(false, Ordering::SeqCst);
        match there {
            Ok(there) => {
                assert!(
                    there || saved.is_err(),
                    "save {n} said that it was done, and there is nothing"
                );
                right += u64::from(there);
            }
            Err(wrong) => panic!("save {n}: a wrong image: {wrong}"),
        }
    }
    let met = line
        .seen()
        .iter()
        .filter(|seen| seen.fault != Fault::None)
        .count();
    support::note(&format!(
        "{saves} saves, {met} troubles: {ends:?}; {right} images, all right"
    ));
    assert!(
        stray.lock().unwrap().is_empty(),
        "credentials at another host: {stray:?}"
    );
    assert!(met as u64 > saves / 2, "only {met} troubles");
    assert!(ends["saved"] * 10 >= saves * 7, "{ends:?}");
    // Passwords went to the token service alone, and tokens to the registry alone.
    assert!(line.seen().iter().all(|seen| {
        !seen
            .headers
            .get("authorization")
            .is_some_and(|a| a.starts_with("Basic"))
    }));
    assert!(token_line.seen().iter().all(|seen| {
        seen.headers
            .get("authorization")
            .is_some_and(|a| a.starts_with("Basic"))
    }));
    Ok(())
}

/// The token service is behind trouble here, too, so it may take more than one look.
async fn verify_patiently(
    address: SocketAddr,
    path: &str,
    tag: &str,
    image: &Image,
) -> Result<bool, String> {
    let mut last = String::new();
    for _ in 0..4 {
        match verify(address, path, tag, image).await {
            Ok(there) => return Ok(there),
            Err(error) => last = error,
        }
    }
    Err(last)
}
