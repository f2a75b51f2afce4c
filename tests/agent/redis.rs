//! The agent with a Redis that starts late, dies and loses its data.

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use upperdeck::service::job::{Keys, Order, Outcome, Update};
use upperdeck::service::queue::{Limits, Offered, Place, Queue, Redis};

use crate::node::{NODE, Node, Service, UPPERDECK, wait};
use crate::support::{Need, ignored};

/// A Redis server on a socket in its own directory, without persistence.
pub struct Server {
    child: Child,
    dir: tempfile::TempDir,
}

const KEY: &str = "a key of the tests, long enough";

fn program() -> String {
    std::env::var("UPPERDECK_TEST_REDIS").unwrap_or_else(|_| "redis-server".to_owned())
}

impl Server {
    pub async fn start() -> Result<Option<Self>> {
        let name = program();
        if !PathBuf::from(&name).is_file() && ignored(&[Need::Program(&name)]) {
            return Ok(None);
        }
        let dir = tempfile::tempdir()?;
        let child = Self::run(&dir)?;
        let server = Self { child, dir };
        server.up().await?;
        Ok(Some(server))
    }

    fn run(dir: &tempfile::TempDir) -> Result<Child> {
        let socket = dir.path().join("redis.sock");
        let _ = fs::remove_file(&socket);
        Ok(Command::new(program())
            .args(["--port", "0", "--save", "", "--unixsocket"])
            .arg(socket)
            .arg("--dir")
            .arg(dir.path())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?)
    }

    async fn up(&self) -> Result<()> {
        let socket = self.dir.path().join("redis.sock");
        wait("Redis", || {
            std::os::unix::net::UnixStream::connect(&socket).ok()
        })
        .await
        .map(drop)
    }

    pub fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    pub async fn again(&mut self) -> Result<()> {
        self.child = Self::run(&self.dir)?;
        self.up().await
    }

    /// Opens a direct connection, to inspect or corrupt the data.
    pub async fn connection(&self) -> Result<redis::aio::MultiplexedConnection> {
        let socket = self.dir.path().join("redis.sock");
        let client = redis::Client::open(format!("redis+unix://{}", socket.display()))?;
        Ok(client.get_multiplexed_async_connection().await?)
    }

    /// Returns a queue with the key of the tests' node.
    pub async fn node_queue(&self) -> Result<Queue> {
        let master = Keys::parse(KEY)?;
        self.with(Keys::parse_node(&master.node_file(NODE)?, NODE)?)
            .await
    }

    pub async fn queue(&self) -> Result<Queue> {
        self.with(Keys::parse(KEY)?).await
    }

    async fn with(&self, keys: Keys) -> Result<Queue> {
        let url = format!(
            "redis+unix://{}",
            self.dir.path().join("redis.sock").display()
        );
        let limits = Limits {
            user: 0,
            node: 0,
            registry: 0,
        };
        Ok(Queue::Redis(Redis::connect(&url, keys, limits).await?))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.kill();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_is_saved() -> Result<()> {
    let (Some(node), Some(server)) = (Node::new().await?, Server::start().await?) else {
        return Ok(());
    };
    let mut options = node.options();
    options.heartbeat_every = Duration::from_millis(100);
    let service = Service::over(options, server.node_queue().await?, server.queue().await?);
    let order = node.order();
    service.queue.offer(&order).await?;
    let outcome = service.outcome(order.job).await?;
    assert!(matches!(outcome, Outcome::Succeeded { .. }), "{outcome:?}");
    ensure!(node.tagged());
    // Told by a later heartbeat than the first.
    while service
        .queue
        .sessions()
        .await?
        .iter()
        .all(|session| session.id != node.id)
    {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    service.end().await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redis_that_dies_under_a_save_and_forgets_it_costs_nothing_but_time() -> Result<()> {
    let (Some(node), Some(mut server)) = (Node::new().await?, Server::start().await?) else {
        return Ok(());
    };
    let go = node.path("go");
    let mut options = node.options();
    options.program = node.program(&format!(
        "while [ ! -e {} ]; do sleep 0.05; done; exec {UPPERDECK} \"$@\"",
        go.display()
    ))?;
    let service = Service::over(options, server.node_queue().await?, server.queue().await?);
    let order = node.order();
    service.queue.offer(&order).await?;
    wait("a child", || node.child(order.job)).await?;
    server.kill()?;
    // All is delivered, and no manager can say whether the tag may be set.
    fs::write(&go, "")?;
    tokio::time::sleep(Duration::from_millis(500)).await;
    ensure!(!node.tagged(), "tagged without being asked");
    server.again().await?;
    // What a manager does about what the queue forgot: it is in the record.
    let again = Order {
        fence_after: 1 << 20,
        ..order.clone()
    };
    let outcome = loop {
        // Asked first: what has ended is forgotten as soon as it is taken.
        let place = service.queue.places(&[order.job]).await.ok();
        let said = service.reports_of(order.job);
        if let Some(Update::Ended { outcome }) = said
            .into_iter()
            .map(|r| r.update)
            .find(|s| matches!(s, Update::Ended { .. }))
        {
            break outcome;
        }
        if place.as_deref() == Some(&[None]) {
            let offered = service.queue.offer(&again).await?;
            ensure!(offered == Offered::New, "{offered:?}");
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    };
    let Outcome::Succeeded { saved } = outcome else {
        bail!("{outcome:?}");
    };
    ensure!(node.tagged() && !node.frozen());
    let index = fs::read_to_string(node.path("images/alice/x/index.json"))?;
    let digest = saved.digest.strip_prefix("sha256:").context("digest")?;
    ensure!(index.contains(digest), "what is tagged is what was told");
    assert_eq!(
        service
            .reports_of(order.job)
            .iter()
            .filter(|r| matches!(r.update, Update::Ended { .. }))
            .count(),
        1
    );
    ensure!(!matches!(
        service.queue.places(&[order.job]).await?[0],
        Some(Place::Waiting(_))
    ));
    service.end().await?;
    Ok(())
}
