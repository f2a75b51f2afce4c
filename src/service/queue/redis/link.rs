//! Connections to Redis: one that all calls share and that reconnects by itself, and one for each blocking call, so
//! that no call has to wait behind a blocking one. Error messages do not contain the secrets of the URL.
//!
//! A server that accepts connections and does not answer (stopped, or swapping) costs one call its time limit: until it
//! answers again, one call at a time tries it, and all others fail at once.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use redis::aio::{ConnectionManager, ConnectionManagerConfig, MultiplexedConnection};
use redis::{
    AsyncConnectionConfig, Client, Cmd, ConnectionAddr, ErrorKind, FromRedisValue, RedisError,
    ScriptInvocation, Value,
};
use tokio::sync::OnceCell;
use zeroize::Zeroizing;

use super::Error;

/// Time limit for establishing a connection.
const CONNECT: Duration = Duration::from_secs(5);
/// Time limit for a response, in addition to the time that the call blocks.
const ANSWER: Duration = Duration::from_secs(5);
/// Time between two calls that try whether a silent server answers again.
const RETRY: Duration = Duration::from_secs(1);
/// Maximum number of idle connections that are kept for blocking calls.
const IDLE: usize = 256;

#[derive(Clone)]
pub(super) struct Connection(Arc<Inner>);

struct Inner {
    client: Client,
    /// Host and port, or the path of the socket.
    at: String,
    /// Prefix of every key.
    prefix: String,
    password: Option<Zeroizing<String>>,
    shared: OnceCell<ConnectionManager>,
    idle: Mutex<Vec<MultiplexedConnection>>,
    silence: Mutex<Silence>,
}

/// What is known of a server that does not answer.
#[derive(Default)]
struct Silence {
    /// When a call last ran into its time limit, with none answered since.
    at: Option<Instant>,
    /// Whether a call is trying whether it answers again.
    tried: bool,
}

/// The call that tries whether a silent server answers again.
struct Trial<'a>(&'a Mutex<Silence>);

impl Drop for Trial<'_> {
    fn drop(&mut self) {
        held(self.0).tried = false;
    }
}

fn held<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Connection {
    pub(super) fn new(url: &str, prefix: &str) -> Result<Self, Error> {
        // The parser's message may contain the part of the URL that it could not parse.
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
                // If two TLS providers are built in, one has to be selected. The first call wins.
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
            silence: Mutex::default(),
        })))
    }

    /// Returns host and port, or the path of the socket.
    pub(super) fn at(&self) -> &str {
        &self.0.at
    }

    /// Returns the address of the server.
    pub(super) fn address(&self) -> &ConnectionAddr {
        self.0.client.get_connection_info().addr()
    }

    /// Returns whether the client logs in with a password.
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

    /// Makes a call, unless the server is silent and another call tries it already.
    async fn unless_silent<T>(
        &self,
        call: impl Future<Output = Result<T, RedisError>>,
    ) -> Result<T, RedisError> {
        let silence = &self.0.silence;
        let trial = {
            let mut silence = held(silence);
            match silence.at {
                None => None,
                Some(at) if !silence.tried && at.elapsed() >= RETRY => {
                    silence.tried = true;
                    Some(Trial(&self.0.silence))
                }
                Some(_) => {
                    let reason = "it does not answer";
                    return Err(io::Error::new(io::ErrorKind::TimedOut, reason).into());
                }
            }
        };
        let answer = call.await;
        let silent = answer.as_ref().is_err_and(RedisError::is_timeout);
        held(silence).at = silent.then(Instant::now);
        drop(trial);
        answer
    }

    /// Runs a script and returns its result.
    pub(super) async fn run<T: FromRedisValue>(
        &self,
        call: &ScriptInvocation<'_>,
    ) -> Result<T, Error> {
        let invoke = || {
            self.unless_silent(async {
                let mut shared = self.shared().await?;
                call.invoke_async(&mut shared).await
            })
        };
        let answer = match invoke().await {
            Err(error) if is_wrong_kind(&error) => match self.reset_wrong_types().await {
                Ok(()) => invoke().await,
                Err(error) => Err(error),
            },
            answer => answer,
        };
        answer.map_err(|error| self.to_error(&error))
    }

    /// Runs a command and returns its response.
    pub(super) async fn ask<T: FromRedisValue>(&self, command: &Cmd) -> Result<T, Error> {
        self.send(command)
            .await
            .map_err(|error| self.to_error(&error))
    }

    /// Does the same as [`Connection::ask`], but returns the client's error.
    pub(super) async fn send<T: FromRedisValue>(&self, command: &Cmd) -> Result<T, RedisError> {
        let query = || {
            self.unless_silent(async {
                let mut shared = self.shared().await?;
                command.query_async(&mut shared).await
            })
        };
        match query().await {
            Err(error) if is_wrong_kind(&error) => {
                self.reset_wrong_types().await?;
                query().await
            }
            answer => answer,
        }
    }

    /// Runs a command that blocks up to `wait` and returns its response.
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
        // If the caller drops the future, the connection is dropped too, with any response that is still under way.
        let answer = command.query_async(&mut connection).await;
        match &answer {
            Err(error) if is_wrong_kind(error) => self.reset_wrong_types().await?,
            // An idle connection may have been closed by a restart of the server. The next attempt opens a new one.
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

    fn idle(&self) -> MutexGuard<'_, Vec<MultiplexedConnection>> {
        held(&self.0.idle)
    }

    /// Deletes keys of the queue that have another type than the queue gives them, because no command could use them.
    async fn reset_wrong_types(&self) -> Result<(), RedisError> {
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

    /// Converts an error of the client: adds the host, and removes secrets from the message.
    pub(super) fn to_error(&self, error: &RedisError) -> Error {
        let mut reason = error.to_string();
        // Redis quotes arguments that it does not understand, and those may include the password.
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

/// Returns the Redis type of the key with this name (without the prefix); see common.lua.
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

/// Returns whether the stream or its consumer group no longer exists, e.g. because the server lost its data. The caller
/// creates it again.
pub(super) fn is_gone(error: &RedisError) -> bool {
    matches!(error.code(), Some("NOGROUP" | "UNBLOCKED" | "WRONGTYPE"))
}

/// Returns whether a key of the queue has an unexpected type. Up to Redis 6.2 an error in a script has no code of its
/// own; the code is part of the message.
fn is_wrong_kind(error: &RedisError) -> bool {
    error.code() == Some("WRONGTYPE") || error.to_string().contains("WRONGTYPE")
}
