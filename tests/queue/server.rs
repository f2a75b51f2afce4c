//! A private Redis server: it listens on a socket in its own temporary directory and ends with the test.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use upperdeck::service::job::Keys;
use upperdeck::service::queue::{Limits, Queue, Redis, Settings};

use crate::support::{Need, ignored};
use crate::world::{World, settings};

pub const KEY: &str = "a key of the tests, long enough";

pub struct Server {
    child: Option<Child>,
    directory: tempfile::TempDir,
    more: Vec<String>,
}

fn program() -> String {
    std::env::var("UPPERDECK_TEST_REDIS").unwrap_or_else(|_| "redis-server".to_owned())
}

impl Server {
    /// Returns `None` if there is no server program; the test is then reported as ignored.
    pub fn start(more: &[&str]) -> Option<Self> {
        let name = program();
        if !Path::new(&name).is_file() && ignored(&[Need::Program(&name)]) {
            return None;
        }
        let mut server = Self {
            child: None,
            directory: tempfile::tempdir().unwrap(),
            more: more.iter().map(|&word| word.to_owned()).collect(),
        };
        server.run();
        Some(server)
    }

    pub fn socket(&self) -> PathBuf {
        self.directory.path().join("redis.sock")
    }

    pub fn url(&self) -> String {
        format!("redis+unix://{}", self.socket().display())
    }

    /// Starts the server, also again in the same directory after [`Server::kill`].
    pub fn run(&mut self) {
        let _ = std::fs::remove_file(self.socket());
        let child = Command::new(program())
            .args(["--port", "0", "--save", "", "--unixsocket"])
            .arg(self.socket())
            .arg("--dir")
            .arg(self.directory.path())
            .arg("--logfile")
            .arg(self.directory.path().join("log"))
            .args(&self.more)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        self.child = Some(child);
        let end = Instant::now() + Duration::from_secs(60);
        while std::os::unix::net::UnixStream::connect(self.socket()).is_err() {
            assert!(Instant::now() < end, "the server does not come up");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Stops or continues the server's process.
    pub fn signal(&self, signal: rustix::process::Signal) {
        let pid = self
            .child
            .as_ref()
            .map(rustix::process::Pid::from_child)
            .unwrap();
        rustix::process::kill_process(pid, signal).unwrap();
    }

    /// Kills the server without warning, as a power failure would.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    /// Opens a direct connection, to inspect or corrupt the data.
    pub async fn connection(&self) -> redis::aio::MultiplexedConnection {
        let client = redis::Client::open(self.url()).unwrap();
        client.get_multiplexed_async_connection().await.unwrap()
    }

    pub fn queue(&self, limits: Limits, settings: &Settings) -> Queue {
        let keys = Keys::parse(KEY).unwrap();
        Queue::Redis(Redis::with(&self.url(), keys, limits, settings.clone()).unwrap())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}

impl World {
    /// Returns `None` if there is no server program.
    pub fn redis(limits: Limits) -> Option<Self> {
        let server = Server::start(&[])?;
        let settings = settings();
        let queue = server.queue(limits, &settings);
        Some(Self::of(queue, settings, Box::new(server)))
    }
}
