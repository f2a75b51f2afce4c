//! Connections to Redis: one that all calls share and that comes back by itself, and one for each that waits, so that no
//! call waits behind a wait. What goes wrong is told without what a URL holds.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use redis::aio::{ConnectionManager, ConnectionManagerConfig, MultiplexedConnection};
use redis::{
    AsyncConnectionConfig, Client, Cmd, ConnectionAddr, ErrorKind, FromRedisValue, RedisError,
    ScriptInvocation, Value,
};
use tokio::sync::OnceCell;
use zeroize::Zeroizing;

use super::Error;

/// A connection that is not made in this time is none.
const CONNECT: Duration = Duration::from_secs(5);
/// A call that is not answered in this time, beyond what it was to wait, is not answered.
const ANSWER: Duration = Duration::from_secs(10);
/// Idle connections kept for those that wait.
const IDLE: usize = 256;

#[derive(Clone)]
pub(super) struct Link(Arc<Inner>);

struct Inner {
    client: Client,
    /// Host and port, or the socket.
    at: String,
    /// Before every key.
    prefix: String,
    password: Option<Zeroizing<String>>,
    shared: OnceCell<ConnectionManager>,
    idle: Mutex<Vec<MultiplexedConnection>>,
}

impl Link {
    pub(super) fn new(url: &str, prefix: &str) -> Result<Self, Error> {
        // What the parser says may hold what it could not parse.
        let client = Client::open(url).map_err(|_| {
            Error::Unusable(
                "the queue's URL cannot be used: it is redis://[USER:PASSWORD@]HOST[:PORT][/DB], rediss://… with TLS, or \
                 redis+unix:///SOCKET, with what is special in a password percent-encoded"
                    .to_owned(),
            )
        })?;
        let info = client.get_connection_info();
        let at = match info.addr() {
            ConnectionAddr::Tcp(host, port) => format!("{host}:{port}"),
            ConnectionAddr::TcpTls { host, port, .. } => {
                // Where two are built in, TLS wants to be told which; the first to say so wins.
                let _ = rustls::crypto::ring::default_provider().install_default();
                format!("{host}:{port} (TLS)")
            }
            ConnectionAddr::Unix(path) => path.display().to_string(),
            _ => "an address of another kind".to_owned(),
        };
        let password = info
            .redis_settings()
            .password()
            .filter(|password| !password.is_empty())
            .map(|password| Zeroizing::new(password.to_owned()));
        Ok(Self(Arc::new(Inner {
            client,
            at,
            prefix: prefix.to_owned(),
            password,
            shared: OnceCell::new(),
            idle: Mutex::default(),
        })))
    }

    /// Host and port, or the socket.
    pub(super) fn at(&self) -> &str {
        &self.0.at
    }

    /// How it is reached.
    pub(super) fn address(&self) -> &ConnectionAddr {
        self.0.client.get_connection_info().addr()
    }

    /// Whether we log in.
    pub(super) fn has_password(&self) -> bool {
        self.0.password.is_some()
    }

    async fn shared(&self) -> Result<ConnectionManager, RedisError> {
        let make = || async {
            let config = ConnectionManagerConfig::new()
                .set_connection_timeout(Some(CONNECT))
                .set_response_timeout(Some(ANSWER))
                .set_number_of_retries(2)
                .set_min_delay(Duration::from_millis(50))
                .set_max_delay(Duration::from_secs(1))
                .set_pipeline_buffer_size(1000);
            self.0.client.get_connection_manager_lazy(config)
        };
        self.0.shared.get_or_try_init(make).await.cloned()
    }

    /// The answer to a script.
    pub(super) async fn run<T: FromRedisValue>(
        &self,
        call: &ScriptInvocation<'_>,
    ) -> Result<T, Error> {
        let answer = async {
            let mut shared = self.shared().await?;
            call.invoke_async(&mut shared).await
        };
        match answer.await {
            Err(error) if is_wrong_kind(&error) => {
                self.mend().await.map_err(|error| self.fault(&error))?;
                let again = async {
                    let mut shared = self.shared().await?;
                    call.invoke_async(&mut shared).await
                };
                again.await.map_err(|error| self.fault(&error))
            }
            answer => answer.map_err(|error| self.fault(&error)),
        }
    }

    /// The answer to a command.
    pub(super) async fn ask<T: FromRedisValue>(&self, command: &Cmd) -> Result<T, Error> {
        self.send(command).await.map_err(|error| self.fault(&error))
    }

    /// As [`Link::ask`], for a caller who looks at errors.
    pub(super) async fn send<T: FromRedisValue>(&self, command: &Cmd) -> Result<T, RedisError> {
        let mut shared = self.shared().await?;
        let answer = command.query_async(&mut shared).await;
        if let Err(error) = &answer
            && is_wrong_kind(error)
        {
            self.mend().await?;
            return command.query_async(&mut shared).await;
        }
        answer
    }

    /// The answer to a command that waits up to `wait`.
    pub(super) async fn wait<T: FromRedisValue>(
        &self,
        command: &Cmd,
        wait: Duration,
    ) -> Result<T, RedisError> {
        let free = self.idle().pop();
        let mut connection = match free {
            Some(connection) => connection,
            None => self.connect(wait).await?,
        };
        // Dropped on the way, with all that still arrives on it, when the caller does not wait for the end.
        let answer = command.query_async(&mut connection).await;
        match &answer {
            Err(error) if is_wrong_kind(error) => self.mend().await?,
            // One that was idle when Redis went away is no reason to complain: the next attempt makes another one.
            Err(error) if error.is_unrecoverable_error() || error.is_timeout() => {
                self.idle().clear();
                return answer;
            }
            _ => {}
        }
        let mut idle = self.idle();
        if idle.len() < IDLE {
            idle.push(connection);
        }
        drop(idle);
        answer
    }

    async fn connect(&self, wait: Duration) -> Result<MultiplexedConnection, RedisError> {
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(CONNECT))
            .set_response_timeout(Some(super::POLL.max(wait) + ANSWER));
        self.0
            .client
            .get_multiplexed_async_connection_with_config(&config)
            .await
    }

    fn idle(&self) -> std::sync::MutexGuard<'_, Vec<MultiplexedConnection>> {
        self.0.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Throws away our keys that are of another kind than we make them: nothing could ever be done with them.
    async fn mend(&self) -> Result<(), RedisError> {
        let mut shared = self.shared().await?;
        let mut cursor = 0u64;
        loop {
            let mut scan = redis::cmd("SCAN");
            scan.arg(cursor)
                .arg("MATCH")
                .arg(format!("{}*", self.0.prefix))
                .arg("COUNT")
                .arg(1000);
            let (next, keys): (u64, Vec<Vec<u8>>) = scan.query_async(&mut shared).await?;
            for key in keys {
                let name = String::from_utf8_lossy(&key);
                let Some(expected) = kind_of(name.strip_prefix(&self.0.prefix).unwrap_or_default())
                else {
                    continue;
                };
                let kind: String = redis::cmd("TYPE")
                    .arg(&key)
                    .query_async(&mut shared)
                    .await?;
                if kind != expected && kind != "none" {
                    tracing::warn!(queue.key = %name.escape_debug(), queue.kind = %kind, "a key of the queue is of another kind than it can be and is thrown away");
                    redis::cmd("DEL")
                        .arg(&key)
                        .query_async::<Value>(&mut shared)
                        .await?;
                }
            }
            if next == 0 {
                return Ok(());
            }
            cursor = next;
        }
    }

    /// Our error for Redis': with the host, without what only its owner may know.
    pub(super) fn fault(&self, error: &RedisError) -> Error {
        let mut reason = error.to_string();
        // Redis repeats what it does not understand, and that may be what it was sent as a password.
        if let Some(at) = reason.find("with args") {
            reason.truncate(at);
        }
        if let Some(password) = &self.0.password {
            reason = reason.replace(password.as_str(), "…");
        }
        let plain = |c: char| if c.is_control() { ' ' } else { c };
        let reason: String = reason.chars().map(plain).take(300).collect();
        let at = self.0.at.clone();
        match error.kind() {
            ErrorKind::Io => Error::Unreachable { at, reason },
            _ => Error::Refused { at, reason },
        }
    }
}

/// What TYPE says of the key of that name, without the prefix; see ground.lua.
fn kind_of(name: &str) -> Option<&'static str> {
    Some(match name.split(':').next()? {
        "reports" | "stream" => "stream",
        "nodes" | "held" | "later" | "users" | "agents" | "user" | "into" => "zset",
        "busy" | "blocked" => "set",
        "job" | "desk" | "sessions" => "hash",
        "order" | "beat" => "string",
        "list" | "asks" | "answer" => "list",
        _ => return None,
    })
}

/// The stream or its group went away, as when everything is lost: whoever needs it makes it again.
pub(super) fn is_gone(error: &RedisError) -> bool {
    matches!(error.code(), Some("NOGROUP" | "UNBLOCKED" | "WRONGTYPE"))
}

/// Somebody put something of another kind under one of our keys. Up to 6.2 a script's error has no code of its own: it
/// is inside the sentence.
fn is_wrong_kind(error: &RedisError) -> bool {
    error.code() == Some("WRONGTYPE") || error.to_string().contains("WRONGTYPE")
}
