//! The image manager: an HTTP service with the REST operations SAVE, CHK, LIST and DEL for portals and people, based on
//! the record and the queue.
//!
//! A manager keeps no state that another manager or its successor would need: an accepted request is in the record
//! before it is answered, and everything else follows from the record.

mod accept;
mod access;
pub mod api;
pub mod auth;
mod autosave;
mod autosave_settings;
mod cancel;
mod conditional;
mod cors;
mod deletion;
mod describe;
mod docs;
mod end_wishes;
mod events;
mod extract;
mod feed;
mod hurry;
mod images;
mod inventory;
mod kept;
mod mail;
mod metrics;
mod names;
mod notes;
mod notify;
mod oidc;
mod options;
mod packages;
mod paging;
mod problem;
mod refusal;
mod rename;
mod replace;
mod resources;
mod routes;
mod saves;
mod sharing;
mod signin;
mod standing;
mod status;
pub mod target;
mod time;
mod timeline;
mod views;
mod webhooks;
mod work;

use std::net::SocketAddr;
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::path::Path;
use std::sync::Arc;

use tokio::net::{TcpListener, UnixListener};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::service::log_limit::LogLimit;
use crate::service::queue::{self, Queue};
use crate::service::ready;
use crate::service::record::{self, Policy, Record};

use crate::service::connections::{self, Bound};

pub use self::cors::WebOrigin;
pub use self::mail::{Encryption, Mail, MailError, SmtpServer};
pub use self::options::{
    AutosaveDefaults, LEAST_AUTOSAVE, Listen, MOST_AUTOSAVE, Options, Rate, Resources,
    check_reserved_tag, check_sender, check_start_url, check_webhook,
};
pub use self::routes::description;
pub use self::webhooks::{Secrets, Webhooks};
pub use crate::service::connections::{ConnectionLimits, raise_open_files};

/// Why a manager cannot start, or had to end.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The manager cannot listen on the address.
    #[error("cannot listen on {at}: {reason}")]
    Listen {
        /// Address or path.
        at: String,
        /// Error of the operating system.
        reason: String,
    },
    /// The settings of e-mails are invalid.
    #[error("e-mail: {0}")]
    Mail(#[from] MailError),
    /// The settings for authentication are invalid.
    #[error(transparent)]
    Auth(#[from] auth::AuthError),
    /// The Kubernetes cluster's `Save` resources cannot be followed.
    #[error("Save resources: {0}")]
    Resources(#[from] crate::service::kubernetes::Error),
    /// The record cannot be used.
    #[error(transparent)]
    Record(#[from] record::Error),
    /// The queue cannot be used.
    #[error(transparent)]
    Queue(#[from] queue::Error),
    /// The background work has failed. The manager ends, because without it reports of agents would go unprocessed
    /// while it appears to work.
    #[error("a background task failed; this is a defect of upperdeck, see its log")]
    Work,
}

/// State that handlers and background work share.
#[derive(Clone)]
struct App(Arc<Inner>);

struct Inner {
    options: Options,
    name: String,
    policy: Policy,
    queue: Queue,
    record: Record,
    authenticator: auth::Authenticator,
    /// The identity provider that signs users in.
    provider: Option<auth::Provider>,
    /// Follows `Save` resources of a Kubernetes cluster.
    controller: Option<resources::Controller>,
    connections: connections::ConnectionTable,
    /// Counts of requests and event streams in progress.
    requests: Arc<connections::UserCounter>,
    streams: Arc<connections::UserCounter>,
    /// Rate limit of log lines about unauthenticated requests.
    log_limit: LogLimit,
    ready: status::Readiness,
    rates: extract::RateLimiter,
    inventory: inventory::Inventory,
    kept: kept::KeptSessions,
    autosaves: autosave::Autosaves,
    store: images::ImageStore,
    hub: events::Hub,
    metrics: metrics::Metrics,
    webhooks: webhooks::Sender,
    /// Sends e-mails; `None`: none are sent.
    mailer: Option<mail::Mailer>,
    /// Notified when the outbox contains a request.
    outbox_wake: Notify,
    cancel: CancellationToken,
}

/// A manager that is bound to its address. It accepts connections at once and answers them after [`Server::run`].
pub struct Server {
    app: App,
    bound: Bound,
    address: Option<SocketAddr>,
}

impl Server {
    /// Binds the address and prepares the manager.
    ///
    /// Fails if the address cannot be bound, or the settings for authentication or of e-mails are invalid.
    pub async fn bind(options: Options, queue: Queue, record: Record) -> Result<Self, Error> {
        let (bound, address) = match &options.listen {
            Listen::Tcp(address) => {
                let wrong = |error: std::io::Error| Error::Listen {
                    at: address.to_string(),
                    reason: error.to_string(),
                };
                let listener = TcpListener::bind(address).await.map_err(wrong)?;
                let address = listener.local_addr().map_err(wrong)?;
                (Bound::Tcp(listener), Some(address))
            }
            Listen::Unix(path) => {
                let listener = listen_on(path).map_err(|error| Error::Listen {
                    at: path.display().to_string(),
                    reason: error.to_string(),
                })?;
                (Bound::Unix(listener, path.clone()), None)
            }
        };
        let cluster = match &options.kubernetes {
            Some(settings) => Some(Box::pin(auth::Cluster::new(settings.clone())).await?),
            None => None,
        };
        let authenticator = auth::Authenticator::new(
            auth::Ways {
                tokens: options.tokens.clone(),
                jwt: options.jwt.clone(),
                oidc: options.oidc.clone(),
                cluster,
                proxies: options.proxies.clone(),
                groups: options.groups.clone(),
                addresses: options.addresses.clone(),
            },
            options.public_url.as_deref(),
            address.map(|address| address.port()),
            record.clone(),
        );
        authenticator.check().await?;
        let record = record.with_receivers(options.webhooks.receivers());
        let provider = options.oidc.clone().map(auth::Provider::new).transpose()?;
        let page = options.public_url.as_deref();
        let mailer = options.mail.as_ref();
        let mailer = mailer
            .map(|mail| mail::Mailer::new(mail, page))
            .transpose()?;
        let controller = match &options.resources {
            Some(settings) => Some(Box::pin(resources::Controller::new(settings)).await?),
            None => None,
        };
        let name = options.name.clone().unwrap_or_else(own_name);
        let ms = |time: std::time::Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let app = App(Arc::new(Inner {
            policy: Policy {
                attempts: options.attempts.max(1),
                backoff_ms: ms(options.backoff),
                backoff_most_ms: ms(options.backoff_most),
            },
            authenticator,
            provider,
            controller,
            connections: connections::ConnectionTable::new(
                options.connections.clone(),
                connections::open_files(),
            ),
            requests: Arc::default(),
            streams: Arc::default(),
            log_limit: LogLimit::default(),
            ready: status::Readiness::default(),
            rates: extract::RateLimiter::new(options.rate),
            inventory: inventory::Inventory::default(),
            kept: kept::KeptSessions::default(),
            autosaves: autosave::Autosaves::default(),
            store: images::ImageStore::new(options.target.clone(), options.access.clone()),
            hub: events::Hub::default(),
            metrics: metrics::Metrics::new(&name),
            webhooks: webhooks::Sender::new(options.webhooks.clone()),
            mailer,
            outbox_wake: Notify::new(),
            cancel: CancellationToken::new(),
            name,
            queue,
            record,
            options,
        }));
        Ok(Self {
            app,
            bound,
            address,
        })
    }

    /// Returns the bound address; `None` for a socket file.
    pub fn address(&self) -> Option<SocketAddr> {
        self.address
    }

    /// Serves requests and runs the background work until `cancel` is set, and then until requests in progress are
    /// finished or [`Options::grace`] has passed.
    ///
    /// Fails with [`Error::Work`] if the background work fails.
    pub async fn run(self, cancel: CancellationToken) -> Result<(), Error> {
        let app = self.app;
        let at = match &self.bound {
            Bound::Tcp(_) => self.address.map(|at| at.to_string()).unwrap_or_default(),
            Bound::Unix(_, path) => path.display().to_string(),
        };
        ready::say(&format!(
            "the manager is ready: listens on {at}, images go to {}, record in {}, queue at {}",
            app.options.target,
            app.record.address(),
            app.queue.address()
        ));
        let router = routes::router(app.clone());
        let mut work = tokio::spawn(work::run(app.clone()));
        let of_rights = app.clone();
        tokio::spawn(async move { of_rights.store.tell_missing_rights().await });
        let of_provider = app.clone();
        tokio::spawn(async move {
            if let Some(provider) = &of_provider.provider {
                provider.keep(of_provider.cancel.clone()).await;
            }
        });
        let of_resources = app.clone();
        let following = tokio::spawn(async move {
            if let Some(controller) = &of_resources.controller {
                Box::pin(controller.run(&of_resources)).await;
            }
        });
        let ending = async {
            cancel.cancelled().await;
            tracing::info!(manager = app.name, "the manager ends");
            ready::say_stopping("requests in progress are finished");
            // Event streams and background work stop; requests in progress are finished.
            app.cancel.cancel();
            tokio::time::sleep(app.options.grace).await;
        };
        let serving = connections::serve(self.bound, router, app.clone());
        tokio::select! {
            () = serving => {}
            () = ending => {}
            error = breakdown(&mut work, &app.cancel) => {
                app.cancel.cancel();
                return Err(error);
            }
        }
        app.cancel.cancel();
        let ended = async { tokio::join!(work, following) };
        let _ = tokio::time::timeout(app.options.grace, ended).await;
        Ok(())
    }
}

impl connections::Served for App {
    fn connections(&self) -> &connections::ConnectionTable {
        &self.0.connections
    }

    fn cancel(&self) -> &CancellationToken {
        &self.0.cancel
    }

    fn counted(&self, open: usize) {
        self.0.metrics.connections(open);
    }

    fn closed(&self, why: connections::Closed) {
        self.0.metrics.closed(why);
    }
}

/// Completes when `work` ends without having been cancelled.
async fn breakdown(work: &mut tokio::task::JoinHandle<()>, cancel: &CancellationToken) -> Error {
    if (&mut *work).await.is_ok() && cancel.is_cancelled() {
        // The task has been joined and must not be awaited again, so it is replaced by one that is done.
        *work = tokio::spawn(async {});
        std::future::pending::<()>().await;
    }
    Error::Work
}

/// Listens on a socket file. A file on which no process listens any more is removed first.
fn listen_on(path: &Path) -> std::io::Result<UnixListener> {
    let is_socket = std::fs::symlink_metadata(path).is_ok_and(|meta| meta.file_type().is_socket());
    if is_socket && std::os::unix::net::UnixStream::connect(path).is_err() {
        std::fs::remove_file(path)?;
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o660))?;
    Ok(listener)
}

/// Returns the host name with a random suffix, so that several managers on one host have different names.
fn own_name() -> String {
    let names = rustix::system::uname();
    let host = names.nodename().to_str().unwrap_or("manager");
    format!("{host}-{:08x}", rand::random::<u32>())
}

/// Binds the address and runs the manager until `cancel` is set. Fails as [`Server::bind`] and [`Server::run`] do.
pub async fn run(
    options: Options,
    queue: Queue,
    record: Record,
    cancel: CancellationToken,
) -> Result<(), Error> {
    Server::bind(options, queue, record)
        .await?
        .run(cancel)
        .await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_manager_ends_when_its_work_breaks_down() {
        let cancel = CancellationToken::new();
        let mut work = tokio::spawn(async { panic!("a defect") });
        assert!(matches!(breakdown(&mut work, &cancel).await, Error::Work));
        let mut work = tokio::spawn(async {});
        assert!(matches!(breakdown(&mut work, &cancel).await, Error::Work));
        cancel.cancel();
        let mut work = tokio::spawn(async {});
        let wait = std::time::Duration::from_millis(50);
        let ended = tokio::time::timeout(wait, breakdown(&mut work, &cancel)).await;
        assert!(ended.is_err(), "that was wanted");
        assert!(work.await.is_ok());
    }
}
