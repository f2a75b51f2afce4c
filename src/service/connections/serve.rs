//! Accepts connections and serves them over HTTP/1.1 only: proxies and client programs support it, and unlike HTTP/2 it
//! has no streams, header tables or resets that would need limits.

use std::convert::Infallible;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use axum::extract::{ConnectInfo, Request};
use hyper::service::{Service as _, service_fn};
use hyper_util::rt::TokioIo;
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::slot::{RequestBody, ResponseBody, TrackedStream};
use super::{Closed, ConnectionTable, Peer, Slot};

/// Maximum size in bytes of a request's head, and of the read and write buffers.
const BUFFER: usize = 64 << 10;
const MAX_HEADERS: usize = 100;
/// Interval at which connections over a time limit are looked for.
const SWEEP: Duration = Duration::from_millis(500);
/// Delay after an error of the system, e.g. if there are no file descriptors left.
const BACKOFF: Duration = Duration::from_millis(100);
const BACKOFF_MAX: Duration = Duration::from_secs(1);
/// Minimum interval between two log lines about such errors.
const LOG_INTERVAL: Duration = Duration::from_secs(300);

/// The server that connections belong to. Clones refer to the same server.
pub(in super::super) trait Served: Clone + Send + Sync + 'static {
    /// Returns the slots of its connections.
    fn connections(&self) -> &ConnectionTable;
    /// Returns what is set when the server has to end.
    fn cancel(&self) -> &CancellationToken;
    /// Is told now and then how many connections are open.
    fn counted(&self, _open: usize) {}
    /// Is told that a connection was broken off or refused.
    fn closed(&self, _why: Closed) {}
}

/// The listening socket.
pub(in super::super) enum Bound {
    Tcp(TcpListener),
    Unix(UnixListener, PathBuf),
}

/// A connection of either kind.
trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}

impl Bound {
    async fn accept(&self) -> std::io::Result<(Box<dyn Stream>, Option<IpAddr>)> {
        match self {
            Self::Tcp(listener) => {
                let (stream, address) = listener.accept().await?;
                // Events are small and must not be delayed. If setting the option fails, they only take longer.
                let _ = stream.set_nodelay(true);
                Ok((Box::new(stream), Some(address.ip())))
            }
            Self::Unix(listener, _) => {
                let (stream, _) = listener.accept().await?;
                Ok((Box::new(stream), None))
            }
        }
    }
}

/// Returns whether an error was caused by the peer and not by the system.
fn is_peer_error(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset, Interrupted};
    matches!(
        error.kind(),
        ConnectionAborted | ConnectionRefused | ConnectionReset | Interrupted
    )
}

/// Handles errors of the system in accepting connections: waits with increasing delays, and logs them once.
#[derive(Default)]
struct AcceptBackoff {
    pause: Duration,
    until: Option<tokio::time::Instant>,
    logged: Option<Instant>,
}

impl AcceptBackoff {
    fn failed(&mut self, error: &std::io::Error) {
        if self
            .logged
            .is_none_or(|logged| logged.elapsed() >= LOG_INTERVAL)
        {
            self.logged = Some(Instant::now());
            tracing::error!(error = %error, "no connection can be taken in; it is tried again and again");
        }
        self.pause = (self.pause * 2).clamp(BACKOFF, BACKOFF_MAX);
        self.until = Some(tokio::time::Instant::now() + self.pause);
    }

    fn succeeded(&mut self) {
        (self.pause, self.until) = (Duration::ZERO, None);
    }
}

/// Serves until the server ends, and then until requests in progress have been answered.
pub(in super::super) async fn serve(bound: Bound, router: Router, server: impl Served) {
    let mut connections = JoinSet::new();
    let mut clock = tokio::time::interval(SWEEP);
    clock.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut backoff = AcceptBackoff::default();
    loop {
        let accepted = tokio::select! {
            () = server.cancel().cancelled() => break,
            _ = clock.tick() => {
                server.connections().sweep(Instant::now());
                while connections.try_join_next().is_some() {}
                server.counted(server.connections().count());
                continue;
            }
            accepted = async {
                if let Some(until) = backoff.until {
                    tokio::time::sleep_until(until).await;
                }
                bound.accept().await
            } => accepted,
        };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) if is_peer_error(&error) => continue,
            Err(error) => {
                // Closing a waiting connection frees a descriptor for one with a request.
                server.connections().evict_one();
                backoff.failed(&error);
                continue;
            }
        };
        backoff.succeeded();
        let Some(slot) = server.connections().admit(peer) else {
            server.closed(Closed::Full);
            continue;
        };
        connections.spawn(handle_connection(
            server.clone(),
            router.clone(),
            slot,
            stream,
            peer,
        ));
    }
    // No new connections are accepted.
    let path = match bound {
        Bound::Unix(_, path) => Some(path),
        Bound::Tcp(_) => None,
    };
    if let Some(path) = path {
        let _ = std::fs::remove_file(path);
    }
    while !connections.is_empty() {
        tokio::select! {
            _ = connections.join_next() => {}
            _ = clock.tick() => server.connections().sweep(Instant::now()),
        }
    }
}

/// Serves one connection until it ends.
async fn handle_connection(
    server: impl Served,
    router: Router,
    slot: Arc<Slot>,
    stream: Box<dyn Stream>,
    peer: Option<IpAddr>,
) {
    let (taken, router) = (slot.clone(), TowerToHyperService::new(router));
    let service = service_fn(move |request: hyper::Request<hyper::body::Incoming>| {
        let (working, router, slot) = (taken.work(), router.clone(), taken.clone());
        async move {
            let mut request: Request =
                request.map(|body| Body::new(RequestBody::new(Body::new(body), slot)));
            request.extensions_mut().insert(ConnectInfo(Peer(peer)));
            let response = router.call(request).await?;
            Ok::<_, Infallible>(response.map(|body| ResponseBody::new(body, working)))
        }
    });
    let connection = hyper::server::conn::http1::Builder::new()
        // The slot enforces the time limits.
        .header_read_timeout(None)
        .max_buf_size(BUFFER)
        .max_headers(MAX_HEADERS)
        .serve_connection(
            TokioIo::new(TrackedStream::new(stream, slot.clone())),
            service,
        );
    tokio::pin!(connection);
    let mut ending = false;
    loop {
        tokio::select! {
            // An aborted connection or a malformed request is the peer's fault and needs no handling.
            _ = connection.as_mut() => break,
            () = slot.closed() => break,
            () = server.cancel().cancelled(), if !ending => {
                ending = true;
                connection.as_mut().graceful_shutdown();
            }
        }
    }
    if let Some(why) = slot.ended() {
        server.closed(why);
    }
    server.connections().leave(&slot);
}
