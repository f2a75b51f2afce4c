//! Outages: Redis loses all data, is killed and restarted, while several agents and managers are running.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use redis::{Value, cmd};
use rustix::process::Signal;
use upperdeck::service::job::{JobId, Update};
use upperdeck::service::queue::{ClaimState, Error, Limits, Offered, Queue};

use crate::server::Server;
use crate::world::{
    LONG, NO_LIMITS, NOW, Outcome, World, node, order, report, session, settings, succeeded,
};

/// Repeats `call` until it succeeds, because a connection notices an outage of Redis only on its next use.
async fn again<T, F: Future<Output = Result<T, Error>>>(call: impl Fn() -> F) -> Result<T, Error> {
    let end = Instant::now() + Duration::from_secs(60);
    loop {
        match call().await {
            Err(_) if Instant::now() < end => tokio::time::sleep(Duration::from_millis(50)).await,
            done => return done,
        }
    }
}

#[tokio::test]
async fn everything_is_lost_in_the_middle_of_work() -> Outcome {
    let Some(server) = Server::start(&[]) else {
        return Ok(());
    };
    let queue = server.queue(NO_LIMITS, &settings());
    let mut redis = server.connection().await;
    let held = order("n1", "ada");
    let waiting = order("n1", "ada");
    queue.offer(&held).await?;
    let claim = queue.claim("n1", "a", 1, NOW).await?.remove(0);
    queue.offer(&waiting).await?;
    queue
        .report(&claim, &report(&claim, 0, Update::Started))
        .await?;
    queue
        .heartbeat(&node("n1"), Some(&[session("n1", "aa")]))
        .await?;

    let other = queue.clone();
    let agent = tokio::spawn(async move { other.claim("n2", "b", 1, LONG).await });
    let other = queue.clone();
    queue.reports("m", 10, NOW).await?;
    let manager = tokio::spawn(async move { other.reports("m", 10, LONG).await });
    tokio::time::sleep(Duration::from_millis(100)).await;
    let _: Value = cmd("FLUSHALL").query_async(&mut redis).await?;
    let _: Value = cmd("SCRIPT").arg("FLUSH").query_async(&mut redis).await?;

    assert_eq!(queue.places(&[held.job, waiting.job]).await?, [None, None]);
    assert_eq!(queue.renew(&claim).await?, ClaimState::Lost);
    assert_eq!(
        queue.complete(&claim, &succeeded(&claim)).await?,
        ClaimState::Lost
    );
    // The record knows nothing of the claim: its fence is new all the same.
    assert_eq!(queue.offer(&held).await?, Offered::New);
    let anew = queue.claim("n1", "a", 1, NOW).await?.remove(0);
    assert!(anew.fence > claim.fence);
    assert_eq!(queue.renew(&claim).await?, ClaimState::Lost);

    // Who waited waits on, and is woken.
    queue.offer(&order("n2", "bob")).await?;
    assert_eq!(agent.await??.len(), 1);
    queue.complete(&anew, &succeeded(&anew)).await?;
    assert_eq!(manager.await??.len(), 1);

    // What an agent said before it says again without being asked.
    assert!(queue.sessions().await?.is_empty());
    queue.heartbeat(&node("n1"), None).await?;
    assert_eq!(queue.sessions().await?, [session("n1", "aa")]);
    Ok(())
}

async fn killed(more: &[&str], remembers: bool) -> Outcome {
    let Some(mut server) = Server::start(more) else {
        return Ok(());
    };
    let queue = server.queue(NO_LIMITS, &settings());
    let (held, waiting) = (order("n1", "ada"), order("n1", "ada"));
    queue.offer(&held).await?;
    let claim = queue.claim("n1", "a", 1, NOW).await?.remove(0);
    queue.offer(&waiting).await?;
    let other = queue.clone();
    let agent = tokio::spawn(async move { again(|| other.claim("n2", "b", 1, LONG)).await });
    tokio::time::sleep(Duration::from_millis(100)).await;
    server.kill();
    let error = queue.renew(&claim).await.err().ok_or("it answered")?;
    assert!(matches!(error, Error::Unreachable { .. }), "{error}");
    server.run();
    let hold = again(|| queue.renew(&claim)).await?;
    let both = [held.job, waiting.job];
    let places = again(|| queue.places(&both)).await?;
    assert_eq!(hold == ClaimState::Held, remembers);
    assert_eq!(places.iter().all(Option::is_some), remembers);
    assert_eq!(places.iter().all(Option::is_none), !remembers);
    for order in [&held, &waiting, &order("n2", "bob")] {
        again(|| queue.offer(order)).await?;
    }
    assert_eq!(agent.await??.len(), 1);
    let got = again(|| queue.claim("n1", "a", 10, NOW)).await?;
    assert_eq!(got.len(), if remembers { 1 } else { 2 });
    assert!(got.iter().all(|later| later.fence > claim.fence));
    Ok(())
}

#[tokio::test]
async fn redis_is_killed_and_remembers() -> Outcome {
    killed(&["--appendonly", "yes", "--appendfsync", "always"], true).await
}

#[tokio::test]
async fn redis_is_killed_and_forgets() -> Outcome {
    killed(&[], false).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn agents_and_managers_at_the_same_time() -> Outcome {
    const JOBS: usize = 200;
    let Some(server) = Server::start(&[]) else {
        return Ok(());
    };
    let limits = Limits {
        node: 7,
        user: 5,
        ..NO_LIMITS
    };
    let settings = settings();
    let first = server.queue(limits, &settings);
    for at in 0..JOBS {
        first
            .offer(&order("n1", ["ada", "bob", "cyd"][at % 3]))
            .await?;
    }
    let mut agents = Vec::new();
    for name in ["a", "b", "c", "d"] {
        // Each as a process of its own, with connections of its own.
        let queue = server.queue(limits, &settings);
        agents.push(tokio::spawn(async move {
            let mut done = Vec::new();
            loop {
                let got = queue
                    .claim("n1", name, 3, Duration::from_millis(300))
                    .await?;
                if got.is_empty() && queue.depth().await?.waiting == 0 {
                    return Ok::<_, Error>(done);
                }
                for claim in got {
                    assert_eq!(queue.confirm(&claim).await?, ClaimState::Held);
                    assert_eq!(
                        queue.complete(&claim, &succeeded(&claim)).await?,
                        ClaimState::Held
                    );
                    done.push(claim.order.job);
                }
            }
        }));
    }
    let mut managers = Vec::new();
    for name in ["m1", "m2"] {
        let queue = server.queue(limits, &settings);
        managers.push(tokio::spawn(async move { read(&queue, name).await }));
    }
    let mut done = Vec::new();
    for agent in agents {
        done.extend(agent.await??);
    }
    assert_eq!(done.len(), JOBS);
    assert_eq!(done.iter().collect::<BTreeSet<_>>().len(), JOBS);
    let mut heard = Vec::new();
    for manager in managers {
        heard.extend(manager.await??);
    }
    // A slow machine may have had one manager take the other for dead; nothing is missing.
    assert_eq!(heard.iter().collect::<BTreeSet<_>>().len(), JOBS);
    let depth = first.depth().await?;
    assert_eq!((depth.waiting, depth.held, depth.reports), (0, 0, 0));
    // Redis keeps nothing of jobs that are over.
    let mut redis = server.connection().await;
    for kind in ["job", "order", "list"] {
        let left: Vec<String> = cmd("KEYS")
            .arg(format!("*{kind}:*"))
            .query_async(&mut redis)
            .await?;
        assert!(left.is_empty(), "{left:?}");
    }
    Ok(())
}

/// Reads reports until there are none for some time.
async fn read(queue: &Queue, name: &str) -> Result<Vec<JobId>, Error> {
    let mut heard = Vec::new();
    let mut quiet = 0;
    while quiet < 5 {
        let got = queue.reports(name, 7, Duration::from_millis(500)).await?;
        quiet = if got.is_empty() { quiet + 1 } else { 0 };
        let entries: Vec<String> = got.iter().map(|one| one.entry.clone()).collect();
        heard.extend(got.into_iter().map(|one| one.report.job));
        queue.acknowledge(&entries).await?;
    }
    Ok(heard)
}

/// Data of agents that no longer exist do not accumulate.
#[tokio::test]
async fn many_restarts_leave_nothing_behind() -> Outcome {
    let Some(server) = Server::start(&[]) else {
        return Ok(());
    };
    let settings = settings();
    let queue = server.queue(NO_LIMITS, &settings);
    let mut redis = server.connection().await;
    let world = World::of(queue, settings, Box::new(server));
    for at in 0..60 {
        let order = world.offer("n1", "ada").await?;
        let name = format!("agent-{at}");
        let claim = world.get("n1", &name).await?;
        assert_eq!(claim.order.job, order.job);
        world.finish(&claim).await?;
    }
    let consumers: Vec<Value> = cmd("XINFO")
        .arg("CONSUMERS")
        .arg("{upperdeck}:stream:n1")
        .arg("agents")
        .query_async(&mut redis)
        .await?;
    assert!(consumers.len() <= 17, "{}", consumers.len());
    let entries: u64 = cmd("XLEN")
        .arg("{upperdeck}:stream:n1")
        .query_async(&mut redis)
        .await?;
    assert_eq!(entries, 0);
    Ok(())
}

/// A server that is stopped accepts connections and does not answer. It costs one call its time limit, not each.
#[tokio::test]
async fn a_server_that_hangs_holds_up_one_call_at_a_time() -> Outcome {
    let Some(server) = Server::start(&[]) else {
        return Ok(());
    };
    let queue = server.queue(NO_LIMITS, &settings());
    queue
        .heartbeat(&node("n1"), Some(&[session("n1", "aa")]))
        .await?;
    server.signal(Signal::STOP);
    assert!(queue.sessions().await.is_err());
    // Each would take five seconds by itself.
    let many = async {
        for _ in 0..200 {
            assert!(queue.sessions().await.is_err());
            assert!(queue.places(&[JobId::new()]).await.is_err());
        }
    };
    let in_time = tokio::time::timeout(Duration::from_secs(300), many).await;
    server.signal(Signal::CONT);
    in_time?;
    assert_eq!(
        again(|| queue.sessions()).await?,
        [session("n1", "aa")],
        "it answers again"
    );
    Ok(())
}
