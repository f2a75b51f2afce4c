//! What an agent says of its health: to probes and to Prometheus.

use std::net::{SocketAddr, TcpListener};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use upperdeck::node::container::Roots;
use upperdeck::service::agent::{Options, OwnerRule};
use upperdeck::service::job::Outcome;

use crate::node::{Node, Service, local, wait};
use crate::redis::Server;
use crate::support::{Need, find_program, ignored};

/// Adds an address for the health, and shortens the intervals.
fn listening(mut options: Options) -> Result<(Options, SocketAddr)> {
    let listener = TcpListener::bind(("127.0.0.1", 0))?;
    let address = listener.local_addr()?;
    options.health = Some(Arc::new(listener));
    options.heartbeat_every = Duration::from_millis(100);
    options.inventory_every = Duration::from_millis(100);
    Ok((options, address))
}

/// Returns the status and the body of an answer.
async fn get(address: SocketAddr, path: &str) -> Result<(u16, String)> {
    let answered = tokio::time::timeout(Duration::from_secs(60), exchange(address, path)).await;
    answered.with_context(|| format!("{path}: no answer"))?
}

async fn exchange(address: SocketAddr, path: &str) -> Result<(u16, String)> {
    let mut stream = tokio::net::TcpStream::connect(address).await?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    let (head, body) = answer.split_once("\r\n\r\n").context("a head")?;
    let status = head.split(' ').nth(1).context("a status")?;
    Ok((status.parse()?, body.to_owned()))
}

/// Waits until `/readyz` has `status` and names `part`.
async fn ready(address: SocketAddr, status: u16, part: &str) -> Result<()> {
    let mut last = (0, String::new());
    for _ in 0..1200 {
        last = get(address, "/readyz").await?;
        if last.0 == status && last.1.contains(part) {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    anyhow::bail!("expected {status} {part}, found {last:?}")
}

/// Returns the value of a series in `/metrics`.
fn value<'a>(text: &'a str, series: &str) -> Option<&'a str> {
    text.lines().find_map(|line| line.strip_prefix(series))
}

fn promtool(text: &str) -> Result<()> {
    if ignored(&[Need::Program("promtool")]) {
        return Ok(());
    }
    let program = find_program("promtool").context("promtool")?;
    let mut file = tempfile::tempfile()?;
    std::io::Write::write_all(&mut file, text.as_bytes())?;
    std::io::Seek::rewind(&mut file)?;
    let checked = Command::new(program)
        .args(["check", "metrics"])
        .stdin(Stdio::from(file))
        .output()?;
    let told = String::from_utf8_lossy(&checked.stdout) + String::from_utf8_lossy(&checked.stderr);
    ensure!(checked.status.success(), "promtool: {told}\n{text}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_save_is_counted_where_prometheus_reads() -> Result<()> {
    let Some(node) = Node::new().await? else {
        return Ok(());
    };
    let (options, address) = listening(node.options())?;
    let service = Service::start(options, local());
    ready(address, 200, "[]").await?;
    assert_eq!(get(address, "/healthz").await?.0, 200);
    assert_eq!(get(address, "/").await?.0, 404);
    let order = node.order();
    service.queue.offer(&order).await?;
    let Outcome::Succeeded { saved } = service.outcome(order.job).await? else {
        anyhow::bail!("not saved");
    };
    let mut text = String::new();
    for _ in 0..1200 {
        text = get(address, "/metrics").await?.1;
        // Counted before the report, and the kept state with the next listing.
        if value(&text, "upperdeck_agent_kept_sessions ") == Some("1") {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let of = |series: &str| value(&text, series).with_context(|| format!("{series}\n{text}"));
    let succeeded = "upperdeck_agent_saves_ended_total{end=\"succeeded\",code=\"\"} ";
    assert_eq!(of(succeeded)?, "1");
    let failed = "upperdeck_agent_saves_ended_total{end=\"failed\",code=\"internal\"} ";
    assert_eq!(of(failed)?, "0");
    assert_eq!(
        of("upperdeck_agent_layer_bytes_total ")?,
        saved.layer_bytes.to_string()
    );
    assert_eq!(of("upperdeck_agent_pause_seconds_count ")?, "1");
    let pause = saved.pause_ms.context("a pause")? / 1000.0;
    let told: f64 = of("upperdeck_agent_pause_seconds_sum ")?.parse()?;
    assert!((told - pause).abs() < 0.001, "{told} {pause}");
    assert_eq!(of("upperdeck_agent_slots{state=\"configured\"} ")?, "4");
    assert_eq!(of("upperdeck_agent_sessions ")?, "1");
    assert_eq!(of("upperdeck_agent_ready ")?, "1");
    assert_eq!(of("upperdeck_agent_queue_up ")?, "1");
    let kept: u64 = std::fs::read_dir(node.path("state"))?
        .flatten()
        .filter(|entry| entry.path().extension().is_some_and(|end| end == "state"))
        .map(|entry| entry.metadata().map_or(0, |meta| meta.len()))
        .sum();
    assert_eq!(of("upperdeck_agent_kept_bytes ")?, kept.to_string());
    promtool(&text)?;
    service.end().await?;
    assert!(get(address, "/healthz").await.is_err(), "it has ended");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_without_its_queue_is_alive_and_not_ready() -> Result<()> {
    if ignored(&[Need::Root]) {
        return Ok(());
    }
    let Some(mut server) = Server::start().await? else {
        return Ok(());
    };
    let dir = tempfile::tempdir()?;
    let mut options = Options::new(OwnerRule::Namespace(None));
    options.node = crate::node::NODE.to_owned();
    options.spool_dir = dir.path().join("spool");
    options.state_dir = None;
    let (mut options, address) = listening(options)?;
    options.roots = Roots {
        docker: vec![dir.path().to_owned()],
        containerd: Vec::new(),
        storage: Vec::new(),
        ..Roots::default()
    };
    let service = Service::over(options, server.node_queue().await?, server.queue().await?);
    ready(address, 200, "[]").await?;
    server.kill()?;
    ready(address, 503, "queue: ").await?;
    assert_eq!(get(address, "/healthz").await?.0, 200);
    let (_, text) = get(address, "/metrics").await?;
    assert_eq!(value(&text, "upperdeck_agent_queue_up "), Some("0"));
    assert_eq!(value(&text, "upperdeck_agent_ready "), Some("0"));
    server.again().await?;
    ready(address, 200, "[]").await?;
    service.end().await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_finds_no_runtime_is_not_ready() -> Result<()> {
    if ignored(&[Need::Root]) {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let mut options = Options::new(OwnerRule::Namespace(None));
    options.spool_dir = dir.path().join("spool");
    options.state_dir = None;
    options.roots = Roots {
        docker: vec![dir.path().join("docker")],
        containerd: Vec::new(),
        storage: Vec::new(),
        ..Roots::default()
    };
    let (options, address) = listening(options)?;
    let service = Service::start(options, local());
    wait("an answer", || std::net::TcpStream::connect(address).ok()).await?;
    ready(address, 503, "runtimes: ").await?;
    std::fs::create_dir(dir.path().join("docker"))?;
    ready(address, 200, "[]").await?;
    service.end().await?;
    Ok(())
}
