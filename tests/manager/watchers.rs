//! Measures the cost of a thousand watchers. It is a measurement and no test, so it runs only on request (`cargo test
//! --release --test manager watchers -- --ignored --nocapture`).

use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;
use upperdeck::service::manager::{Server, raise_open_files};
use upperdeck::service::record::Record;

use crate::site::{Agent, Outcomes, Site, Who, id, progress, session, submit};

const WATCHERS: usize = 1000;
const JOBS: usize = 100;
const STRETCH: Duration = Duration::from_secs(10);

/// Returns the CPU seconds of this program's threads with a certain name, and of SQLite's worker.
fn cpu_seconds() -> f64 {
    let tasks = std::fs::read_dir("/proc/self/task")
        .into_iter()
        .flatten()
        .flatten();
    let ticks: u64 = tasks
        .filter_map(|task| {
            let text = std::fs::read_to_string(task.path().join("stat")).ok()?;
            let (name, rest) = text.rsplit_once(')')?;
            if !name.contains("(the-manager") && !name.contains("(sqlx-sqlite") {
                return None;
            }
            let fields: Vec<&str> = rest.split_whitespace().collect();
            Some(fields.get(11)?.parse::<u64>().ok()? + fields.get(12)?.parse::<u64>().ok()?)
        })
        .sum();
    ticks as f64 / 100.0
}

#[test]
#[ignore = "a measurement: it takes a minute"]
fn a_thousand_watchers_cost_little() -> Outcomes {
    raise_open_files()?;
    let site = Site::new()?;
    let cancel = CancellationToken::new();
    let (told, address) = std::sync::mpsc::channel();
    let manager = {
        let (options, queue, place, cancel) = (
            site.options()?,
            site.queue.clone(),
            site.place.clone(),
            cancel.clone(),
        );
        std::thread::Builder::new()
            .name("the-manager".into())
            .spawn(move || {
                let runtime = tokio::runtime::Builder::new_multi_thread()
                    .worker_threads(2)
                    .thread_name("the-manager")
                    .enable_all()
                    .build()
                    .map_err(|error| error.to_string())?;
                runtime.block_on(async {
                    let record = Record::open(&place).await.map_err(|e| e.to_string())?;
                    let mut options = options;
                    options.watch_every = Duration::from_secs(1);
                    options.reconcile_every = Duration::from_secs(3);
                    // All of them are one user's, and come from one address.
                    options.connections.connections_per_peer = WATCHERS + JOBS;
                    options.connections.streams_per_user = WATCHERS;
                    let server = Server::bind(options, queue, record)
                        .await
                        .map_err(|e| e.to_string())?;
                    let _ = told.send(server.address());
                    server.run(cancel).await.map_err(|e| e.to_string())
                })
            })?
    };
    let at = address.recv()?.ok_or("no address")?;
    let runtime = tokio::runtime::Runtime::new()?;
    runtime.block_on(async {
        let agent = Agent::new(&site.queue, "a");
        let sessions: Vec<_> = (0..JOBS).map(|n| session(n, Some("alice"))).collect();
        agent.heartbeat(&sessions).await?;
        let mut jobs = Vec::new();
        let mut claims = Vec::new();
        for n in 0..JOBS {
            jobs.push(submit(at, Who::Alice, &id(n), &format!("v{n}")).await?);
            let claim = agent.claim().await?;
            agent.begin(&claim).await?;
            claims.push(claim);
        }
        let begun = cpu_seconds();
        tokio::time::sleep(STRETCH).await;
        let alone = cpu_seconds() - begun;
        let heard = std::sync::Arc::new(std::sync::atomic::AtomicU64::new(0));
        for n in 0..WATCHERS {
            let mut stream = TcpStream::connect(at).await?;
            let text = format!(
                "GET /api/v1/saves/{}/events HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer token-alice\r\n\r\n",
                jobs[n % JOBS]
            );
            stream.write_all(text.as_bytes()).await?;
            let heard = heard.clone();
            let mut buffer = vec![0; 16 << 10];
            let read = stream.read(&mut buffer).await?;
            let answer = String::from_utf8_lossy(&buffer[..read]).into_owned();
            if !answer.starts_with("HTTP/1.1 200 ") {
                return Err(format!("stream {n}: {answer}").into());
            }
            tokio::spawn(async move {
                while let Ok(read) = stream.read(&mut buffer).await {
                    if read == 0 {
                        break;
                    }
                    let events = String::from_utf8_lossy(&buffer[..read]).matches("event:").count();
                    heard.fetch_add(events as u64, std::sync::atomic::Ordering::Relaxed);
                }
            });
        }
        tokio::time::sleep(Duration::from_secs(3)).await;
        let mut seq = 2;
        let mut stretch = async |moving: bool| -> Result<(f64, u64), Box<dyn std::error::Error>> {
            let (cpu, events) = (cpu_seconds(), heard.load(std::sync::atomic::Ordering::Relaxed));
            let until = std::time::Instant::now() + STRETCH;
            while std::time::Instant::now() < until {
                for claim in &claims {
                    if moving {
                        agent.send_update(claim, seq, progress(seq % 100)).await?;
                    }
                    agent.renew(claim).await?;
                }
                seq += 1;
                tokio::time::sleep(Duration::from_millis(500)).await;
            }
            let events = heard.load(std::sync::atomic::Ordering::Relaxed) - events;
            Ok((cpu_seconds() - cpu, events))
        };
        let (idle, _) = stretch(false).await?;
        let (moving, events) = stretch(true).await?;
        let share = |cpu: f64| cpu / STRETCH.as_secs_f64() * 100.0;
        println!(
            "{JOBS} jobs, no watcher: {:.1} % of a core; {WATCHERS} watch, nothing moves: {:.1} %; each job says \
             progress twice a second: {:.1} %, {:.0} events a second",
            share(alone),
            share(idle),
            share(moving),
            events as f64 / STRETCH.as_secs_f64()
        );
        assert!(events > 0);
        Ok::<_, Box<dyn std::error::Error>>(())
    })?;
    cancel.cancel();
    drop(runtime);
    manager.join().map_err(|_| "the manager panicked")??;
    Ok(())
}
