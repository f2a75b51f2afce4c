//! One registry host: its clients, its settings, and what was learned of it.
//!
//! `reach` finds out how it is reached, `token` who we are there, `request` sends what survives passing trouble, `resolver`
//! keeps names that it chose from leading to this machine.

mod reach;
mod request;
mod resolver;
mod scopes;
mod token;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use reqwest::Client;

pub(super) use request::Call;
pub(super) use scopes::Scopes;
pub(super) use token::CredentialSource;

use resolver::{GuardedResolver, host_of, proxy_hosts};

use super::auth::{Challenge, Origin, Token};
use super::credentials::{Found, environment};
use super::error::{Error, causes};
use super::reference::is_loopback;
use super::retry::{Budget, Retry};
use super::tls;

/// For a TCP and TLS connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long an answer, or the next bytes of one, may take.
pub(super) const SILENCE: Duration = Duration::from_secs(60);

/// Settings of a [`Host`].
pub(super) struct Settings {
    /// As in references.
    pub(super) name: String,
    pub(super) tls_verify: bool,
    pub(super) cert_dir: Option<PathBuf>,
    pub(super) retry: Retry,
    pub(super) silence: Duration,
    pub(super) budget: Arc<Budget>,
    /// Credentials by repository.
    pub(super) credentials: CredentialSource,
}

/// A registry host. Shared by all repositories on it, so that its tokens and connections are.
pub(super) struct Host {
    settings: Settings,
    loopback: bool,
    /// For the registry itself.
    own: Client,
    /// For where it sends us: no client certificate, no way to this machine.
    other: Client,
    origin: tokio::sync::OnceCell<Origin>,
    challenge: Mutex<Option<Challenge>>,
    tokens: tokio::sync::Mutex<HashMap<String, Token>>,
    found: Mutex<HashMap<String, Found>>,
    /// It takes no body whose length is not told beforehand.
    wants_lengths: AtomicBool,
    /// The smallest piece of a blob that it takes, but for the last.
    least_chunk: AtomicU64,
}

impl Host {
    pub(super) fn new(settings: Settings) -> Result<Self, Error> {
        tls::install_provider();
        let loopback = is_loopback(&settings.name);
        let usual = match settings.cert_dir {
            Some(_) => Vec::new(),
            None => tls::usual_directories(&settings.name, environment),
        };
        let certificates = tls::read(settings.cert_dir.as_deref(), &usual)?;
        let setup = |reason| Error::Setup {
            host: settings.name.clone(),
            reason,
        };
        let builder = |as_itself| {
            let config = certificates.client_config(as_itself, settings.tls_verify);
            let config = config.map_err(|e| setup(e.to_string()))?;
            let builder = Client::builder()
                .user_agent(concat!("upperdeck/", env!("CARGO_PKG_VERSION")))
                .redirect(reqwest::redirect::Policy::none())
                .referer(false)
                .connect_timeout(CONNECT_TIMEOUT)
                // Uploads run beside each other: each has its own connection and its own flow control.
                .http1_only()
                .tls_backend_preconfigured(config);
            // A proxy cannot know what this machine calls itself.
            Ok::<_, Error>(if loopback {
                builder.no_proxy()
            } else {
                builder
            })
        };
        let built = |client: reqwest::ClientBuilder| {
            let client = client.build();
            client.map_err(|e| setup(causes(&e).0))
        };
        let own = built(builder(true)?)?;
        let mut other = builder(false)?;
        if !loopback {
            let exempt = proxy_hosts()
                .chain([host_of(&settings.name).to_owned()])
                .collect();
            other = other.dns_resolver(Arc::new(GuardedResolver {
                exempt: Arc::new(exempt),
            }));
        }
        let other = built(other)?;
        Ok(Self {
            settings,
            loopback,
            own,
            other,
            origin: tokio::sync::OnceCell::new(),
            challenge: Mutex::new(None),
            tokens: tokio::sync::Mutex::new(HashMap::new()),
            found: Mutex::new(HashMap::new()),
            wants_lengths: AtomicBool::new(false),
            least_chunk: AtomicU64::new(0),
        })
    }

    /// The host's name as in references.
    pub(super) fn name(&self) -> &str {
        &self.settings.name
    }

    pub(super) fn retry(&self) -> Retry {
        self.settings.retry
    }

    pub(super) fn silence(&self) -> Duration {
        self.settings.silence
    }

    /// Whether the registry has refused a stream of unknown length (411).
    pub(super) fn wants_lengths(&self) -> bool {
        self.wants_lengths.load(Ordering::Relaxed)
    }

    pub(super) fn note_wants_lengths(&self) {
        self.wants_lengths.store(true, Ordering::Relaxed);
    }

    /// `OCI-Chunk-Min-Length`, in bytes; 0 where it was not said.
    pub(super) fn least_chunk(&self) -> u64 {
        self.least_chunk.load(Ordering::Relaxed)
    }

    pub(super) fn note_least_chunk(&self, bytes: u64) {
        self.least_chunk.store(bytes, Ordering::Relaxed);
    }

    /// The client for requests to the registry itself that the other methods cannot make: streamed ones.
    pub(super) fn client(&self) -> &Client {
        &self.own
    }
}
