//! Connection limits: neither unauthenticated peers nor users with a token can block the manager by holding
//! connections.

use std::net::SocketAddr;
use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};

use crate::site::{Agent, Outcomes, PATIENCE, Site, Who, ask, get, id, session, submit};

type Fallible<T> = Result<T, Box<dyn std::error::Error>>;

const FLOOD: usize = 1100;

async fn connect(at: SocketAddr, text: &str) -> Fallible<TcpStream> {
    let mut stream = TcpStream::connect(at).await?;
    stream.write_all(text.as_bytes()).await?;
    Ok(stream)
}

/// Reads until the manager closes the connection or the response head is complete.
async fn head(stream: &mut TcpStream) -> Fallible<String> {
    let mut text = Vec::new();
    let mut buffer = [0; 4096];
    let reading = async {
        while !text.windows(4).any(|part| part == b"\r\n\r\n") {
            match stream.read(&mut buffer).await {
                Ok(0) | Err(_) => break,
                Ok(read) => text.extend_from_slice(&buffer[..read]),
            }
        }
    };
    tokio::time::timeout(PATIENCE, reading).await?;
    Ok(String::from_utf8_lossy(&text).into_owned())
}

async fn figure(at: SocketAddr, line: &str) -> Fallible<u64> {
    let text = crate::site::http()?
        .get(format!("http://{at}/metrics"))
        .send()
        .await?
        .text()
        .await?;
    let found = text.lines().find_map(|found| found.strip_prefix(line));
    Ok(found.unwrap_or(" 0").trim().parse()?)
}

#[tokio::test(flavor = "multi_thread")]
async fn half_requests_and_streams_of_one_user_stop_nobody_else() -> Outcomes {
    // Both ends are in this process.
    let files = upperdeck::service::manager::raise_open_files()?;
    if files < 4 * FLOOD as u64 {
        return Err(format!("only {files} open files: cannot be tried").into());
    }
    let sessions = [session(1, Some("alice")), session(2, Some("bob"))];
    let site = Site::new()?;
    let manager = site.manager().await?;
    let agent = Agent::new(&site.queue, "a");
    agent.heartbeat(&sessions).await?;
    let at = manager.address;
    let save = submit(at, Who::Alice, &id(1), "v1").await?;
    let theirs = submit(at, Who::Bob, &id(2), "v2").await?;
    let mut held = Vec::new();
    for n in 0..FLOOD {
        // Nothing, half a line, half a head, half a body of who has a token.
        let text = [
            "",
            "GET /heal",
            "GET /api/v1/me HTTP/1.1\r\nHost: x\r\nX: ",
            "POST /api/v1/saves HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n",
        ][n % 4];
        held.push(connect(at, text).await?);
        if n % 100 == 99 {
            let (status, _) =
                ask(at, Who::Anonymous, reqwest::Method::GET, "/healthz", None).await?;
            assert_eq!(status, 200, "after {n}");
        }
    }
    // As many streams of one user: some are served, the others refused, and the refused connections hold nothing up.
    let stream = format!(
        "GET /api/v1/saves/{save}/events HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer token-alice\r\n\r\n"
    );
    let (mut served, mut refused) = (Vec::new(), Vec::new());
    for _ in 0..FLOOD {
        let mut connection = connect(at, &stream).await?;
        let answer = head(&mut connection).await?;
        if answer.starts_with("HTTP/1.1 200") {
            served.push(connection);
        } else {
            assert!(answer.starts_with("HTTP/1.1 429"), "{answer}");
            refused.push(connection);
        }
    }
    assert_eq!((served.len(), refused.len()), (32, FLOOD - 32));
    let (status, _) = ask(at, Who::Anonymous, reqwest::Method::GET, "/healthz", None).await?;
    assert_eq!(status, 200);
    let me = get(at, Who::Bob, "/api/v1/me").await?;
    assert_eq!(me["user"], "bob");
    let mut events = crate::site::Events::of(at, Who::Bob, theirs, None).await?;
    assert!(events.next().await?.is_some());
    // Whoever is being answered was never replaced by who only waits.
    for connection in &mut served {
        let more = tokio::time::timeout(PATIENCE, connection.read(&mut [0; 4096])).await??;
        assert!(more > 0, "a stream was closed");
    }
    assert!(figure(at, "upperdeck_connections ").await? <= 512);
    assert!(figure(at, "upperdeck_connections_closed_total{why=\"replaced\"}").await? >= 500);
    // A place that is free again is taken.
    drop(served);
    let begun = std::time::Instant::now();
    loop {
        let mut connection = connect(at, &stream).await?;
        if head(&mut connection).await?.starts_with("HTTP/1.1 200") {
            break;
        }
        assert!(begun.elapsed() < PATIENCE, "no stream is served any more");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    manager.stop().await
}

#[tokio::test(flavor = "multi_thread")]
async fn who_does_not_ask_is_sent_away() -> Outcomes {
    let site = Site::new()?;
    let mut options = site.options()?;
    options.connections.head = Duration::from_millis(600);
    options.connections.idle = Duration::from_millis(1200);
    options.connections.body = Duration::from_millis(600);
    let manager = site.manager_with(options).await?;
    let at = manager.address;
    let mut silent = connect(at, "").await?;
    assert_eq!(head(&mut silent).await?, "");
    // Byte by byte, for ever.
    let mut slow = connect(at, "GET /healthz HTTP/1.1\r\nHost: x\r\n").await?;
    let begun = std::time::Instant::now();
    while slow.write_all(b"X: y\r\n").await.is_ok() {
        assert!(begun.elapsed() < PATIENCE, "it is listened to for ever");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    // After an answer there is some time, and an end of it.
    let ask = "GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n";
    let mut idle = connect(at, ask).await?;
    for _ in 0..2 {
        assert!(head(&mut idle).await?.starts_with("HTTP/1.1 200"));
        idle.write_all(ask.as_bytes()).await?;
    }
    assert!(head(&mut idle).await?.starts_with("HTTP/1.1 200"));
    while tokio::time::timeout(PATIENCE, idle.read(&mut [0; 512])).await?? > 0 {}
    // A body that does not come.
    let mut body = connect(
        at,
        "POST /api/v1/saves HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer token-alice\r\nContent-Type: application/json\r\nContent-Length: 90\r\n\r\n{",
    )
    .await?;
    let answer = head(&mut body).await?;
    assert!(answer.starts_with("HTTP/1.1 408"), "{answer}");
    for why in ["head", "idle"] {
        let line = format!("upperdeck_connections_closed_total{{why=\"{why}\"}}");
        assert!(figure(at, &line).await? >= 1, "{why}");
    }
    manager.stop().await
}

#[tokio::test(flavor = "multi_thread")]
async fn bodies_that_do_not_come_hold_no_place() -> Outcomes {
    let site = Site::new()?;
    let mut options = site.options()?;
    options.connections.connections_per_peer = 6;
    options.connections.body = PATIENCE * 4;
    let manager = site.manager_with(options).await?;
    let at = manager.address;
    let half = |path: &str, token: &str| {
        format!(
            "POST /api/v1/{path} HTTP/1.1\r\nHost: x\r\n{token}Upperdeck-Request: 1\r\nContent-Type: application/json\r\n\
             Content-Length: 90\r\n\r\n{{"
        )
    };
    // No request's body is waited for at all.
    let mut unknown = connect(at, &half("signin", "")).await?;
    let answer = head(&mut unknown).await?;
    assert!(answer.starts_with("HTTP/1.1 401"), "{answer}");
    let mut held = Vec::new();
    for _ in 0..6 {
        let token = "Authorization: Bearer token-alice\r\n";
        held.push(connect(at, &half("saves", token)).await?);
    }
    // Whoever asks gets the place of one that has not said what it wants.
    let begun = std::time::Instant::now();
    loop {
        let mut stream = connect(at, "GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n").await?;
        if head(&mut stream).await?.starts_with("HTTP/1.1 200") {
            break;
        }
        assert!(begun.elapsed() < PATIENCE, "no request is let in");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    manager.stop().await
}

#[tokio::test(flavor = "multi_thread")]
async fn who_does_not_read_is_sent_away() -> Outcomes {
    let site = Site::new()?;
    let mut options = site.options()?;
    options.connections.write = Duration::from_millis(600);
    let manager = site.manager_with(options).await?;
    let at = manager.address;
    let socket = TcpSocket::new_v4()?;
    socket.set_recv_buffer_size(4096)?;
    let mut stream = socket.connect(at).await?;
    let asked = "GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n";
    let begun = std::time::Instant::now();
    // Asks again and again, and reads nothing: what is between the ends is full at some time.
    while figure(at, "upperdeck_connections_closed_total{why=\"write\"}").await? == 0 {
        let _ = stream.try_write(asked.repeat(20).as_bytes());
        assert!(begun.elapsed() < PATIENCE, "it is waited for for ever");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let _ = stream.shutdown().await;
    manager.stop().await
}

#[tokio::test(flavor = "multi_thread")]
async fn figures_and_lists_do_not_grow_with_what_requests_say() -> Outcomes {
    let site = Site::new()?;
    let manager = site.manager().await?;
    let at = manager.address;
    for n in 0..50 {
        let mut stream = connect(
            at,
            &format!("METHOD{n} /path{n} HTTP/1.1\r\nHost: x{n}\r\n\r\n"),
        )
        .await?;
        head(&mut stream).await?;
    }
    let text = crate::site::http()?
        .get(format!("http://{at}/metrics"))
        .send()
        .await?
        .text()
        .await?;
    assert!(
        !text.contains("METHOD") && !text.contains("path1"),
        "{text}"
    );
    assert!(text.contains("method=\"other\""), "{text}");
    // More headers, or longer ones, than a request has.
    for text in [
        format!("GET /healthz HTTP/1.1\r\n{}\r\n", "X: y\r\n".repeat(200)),
        format!(
            "GET /healthz HTTP/1.1\r\nX: {}\r\n\r\n",
            "y".repeat(200_000)
        ),
    ] {
        let mut stream = TcpStream::connect(at).await?;
        let _ = stream.write_all(text.as_bytes()).await;
        let answer = head(&mut stream).await?;
        assert!(
            answer.is_empty() || answer.starts_with("HTTP/1.1 431"),
            "{answer}"
        );
    }
    // HTTP/2 is not spoken: there are no streams and resets to count.
    let mut stream = connect(at, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await?;
    assert!(!head(&mut stream).await?.starts_with("HTTP/2"));
    manager.stop().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_has_so_many_requests_at_once_and_saves_a_day() -> Outcomes {
    let site = Site::new()?;
    let mut options = site.options()?;
    options.connections.requests_per_user = 2;
    options.saves_per_day = 1;
    let manager = site.manager_with(options).await?;
    let agent = Agent::new(&site.queue, "a");
    agent.heartbeat(&[session(1, Some("alice"))]).await?;
    let at = manager.address;
    let save = submit(at, Who::Alice, &id(1), "v1").await?;
    let path = format!("/api/v1/saves/{save}");
    let (status, _) = ask(at, Who::Alice, reqwest::Method::DELETE, &path, None).await?;
    assert_eq!(status, 200);
    let error = submit(at, Who::Alice, &id(1), "v2")
        .await
        .err()
        .ok_or("a second one")?;
    assert!(error.to_string().contains("in 24 hours"), "{error}");
    // Two bodies that are still to come; the third request is refused, another user's answered.
    let half = "POST /api/v1/saves HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer token-alice\r\nContent-Type: application/json\r\nContent-Length: 90\r\n\r\n{";
    let _held = [connect(at, half).await?, connect(at, half).await?];
    let begun = std::time::Instant::now();
    loop {
        let (status, body): (_, Value) =
            ask(at, Who::Alice, reqwest::Method::GET, "/api/v1/me", None).await?;
        if status == 429 {
            assert_eq!(body["code"], "too_many");
            break;
        }
        assert!(begun.elapsed() < PATIENCE, "there is no bound");
    }
    assert_eq!(get(at, Who::Bob, "/api/v1/me").await?["user"], "bob");
    manager.stop().await
}

/// A running `upperdeck up` with a limit on open files, and its log. It is ended on drop.
struct UpProcess {
    child: std::process::Child,
    at: SocketAddr,
    log: std::path::PathBuf,
    _dir: tempfile::TempDir,
}

impl UpProcess {
    fn start(limit: &str) -> Fallible<Self> {
        use std::io::BufRead as _;
        let dir = tempfile::tempdir()?;
        let (host, log) = (dir.path().join("host"), dir.path().join("log"));
        std::fs::create_dir(&host)?;
        let mut child = std::process::Command::new("sh")
            .arg("-c")
            .arg(format!("ulimit {limit}; exec \"$0\" \"$@\""))
            .arg(env!("CARGO_BIN_EXE_upperdeck"))
            .arg("--host-root")
            .arg(&host)
            .args(["up", "--listen", "127.0.0.1:0", "--foreground"])
            .arg("--state-dir")
            .arg(dir.path().join("state"))
            .stdin(std::process::Stdio::null())
            .stdout(std::process::Stdio::piped())
            .stderr(std::fs::File::create(&log)?)
            .spawn()?;
        let mut url = String::new();
        let stdout = child.stdout.take().ok_or("no stdout")?;
        std::io::BufReader::new(stdout).read_line(&mut url)?;
        let at = url
            .strip_prefix("http://")
            .and_then(|rest| rest.split('/').next())
            .and_then(|at| at.parse().ok());
        let Some(at) = at else {
            let _ = child.kill();
            let _ = child.wait();
            return Err(format!("{url:?}: {}", std::fs::read_to_string(&log)?).into());
        };
        Ok(Self {
            child,
            at,
            log,
            _dir: dir,
        })
    }
}

impl Drop for UpProcess {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn up_raises_its_limit_and_bears_a_low_one() -> Outcomes {
    if crate::support::ignored(&[crate::support::Need::Root]) {
        return Ok(());
    }
    let up = UpProcess::start("-S -n 200")?;
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", up.child.id()))?;
    let line = limits
        .lines()
        .find(|line| line.starts_with("Max open files"))
        .ok_or("no line")?;
    let words: Vec<_> = line.split_whitespace().collect();
    assert_eq!(words[3], words[4], "{line}");
    drop(up);
    // Fewer files than the connections that are counted on: accept(2) fails, and who asks is answered all the same.
    let up = UpProcess::start("-n 48")?;
    let mut held = Vec::new();
    for _ in 0..100 {
        held.push(connect(up.at, "GET /healthz HTTP/1.1\r\nHo").await?);
    }
    let (status, _) = ask(
        up.at,
        Who::Anonymous,
        reqwest::Method::GET,
        "/healthz",
        None,
    )
    .await?;
    assert_eq!(status, 200);
    drop(held);
    let (status, _) = ask(
        up.at,
        Who::Anonymous,
        reqwest::Method::GET,
        "/healthz",
        None,
    )
    .await?;
    assert_eq!(status, 200);
    let log = std::fs::read_to_string(&up.log)?;
    assert_eq!(
        log.matches("no connection can be taken in").count(),
        1,
        "{log}"
    );
    Ok(())
}
