//! One registry host: its HTTP clients, its settings, and what is known about it.
//!
//! `connect` determines how the host is reached, `token` handles authentication, `request` sends requests with retries,
//! and `resolver` keeps names chosen by a registry from resolving to this machine.

mod connect;
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

pub(super) use request::{Call, SILENCE};
pub(super) use scopes::Scopes;
pub(super) use token::CredentialSource;

use resolver::{GuardedResolver, host_of, proxy_hosts};

use super::auth::{Challenge, Origin, Token};
use super::credentials::{CredentialLookup, environment};
use super::error::{Error, causes};
use super::retry::{Retry, RetryBudget};
use super::tls;
use crate::common::reference::is_loopback;

/// Timeout for establishing a TCP and TLS connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Default timeout for an answer, and for the next bytes of a body.
pub(super) const STALL_TIMEOUT: Duration = Duration::from_secs(60);

/// Settings of a [`Host`].
pub(super) struct Settings {
    /// Name as in references.
    pub(super) name: String,
    pub(super) tls_verify: bool,
    pub(super) cert_dir: Option<PathBuf>,
    pub(super) retry: Retry,
    pub(super) stall_timeout: Duration,
    pub(super) budget: Arc<RetryBudget>,
    /// Looks up the credentials for a repository.
    pub(super) credentials: CredentialSource,
}

/// A registry host. It is shared by all repositories on it, so that they share tokens and connections.
pub(super) struct Host {
    settings: Settings,
    loopback: bool,
    /// Client for the registry itself.
    registry_client: Client,
    /// Client for redirects and token services on other hosts: without a client certificate, and unable to connect to
    /// this machine.
    external_client: Client,
    origin: tokio::sync::OnceCell<Origin>,
    challenge: Mutex<Option<Challenge>>,
    tokens: tokio::sync::Mutex<HashMap<String, Token>>,
    found: Mutex<HashMap<String, CredentialLookup>>,
    /// Whether the registry requires `Content-Length` for request bodies.
    requires_content_length: AtomicBool,
    /// Smallest chunk of a blob that the registry accepts, except for the last, in bytes.
    min_chunk_size: AtomicU64,
}

impl Host {
    pub(super) fn new(settings: Settings) -> Result<Self, Error> {
        tls::install_provider();
        let loopback = is_loopback(&settings.name);
        let usual = match settings.cert_dir {
            Some(_) => Vec::new(),
            None => tls::default_directories(&settings.name, environment),
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
                // Concurrent uploads each get their own connection, with their own flow control.
                .http1_only()
                .tls_backend_preconfigured(config);
            // To a proxy, loopback names would mean the proxy's own machine.
            Ok::<_, Error>(if loopback {
                builder.no_proxy()
            } else {
                builder
            })
        };
        let built = |client: reqwest::ClientBuilder| {
            let client = client.build();
            client.map_err(|e| setup(causes(&e)))
        };
        let registry_client = built(builder(true)?)?;
        let mut external_client = builder(false)?;
        if !loopback {
            let exempt = proxy_hosts()
                .chain([host_of(&settings.name).to_owned()])
                .collect();
            external_client = external_client.dns_resolver(Arc::new(GuardedResolver {
                exempt: Arc::new(exempt),
            }));
        }
        let external_client = built(external_client)?;
        Ok(Self {
            settings,
            loopback,
            registry_client,
            external_client,
            origin: tokio::sync::OnceCell::new(),
            challenge: Mutex::new(None),
            tokens: tokio::sync::Mutex::new(HashMap::new()),
            found: Mutex::new(HashMap::new()),
            requires_content_length: AtomicBool::new(false),
            min_chunk_size: AtomicU64::new(0),
        })
    }

    /// Returns the host's name as in references.
    pub(super) fn name(&self) -> &str {
        &self.settings.name
    }

    pub(super) fn retry(&self) -> Retry {
        self.settings.retry
    }

    pub(super) fn stall_timeout(&self) -> Duration {
        self.settings.stall_timeout
    }

    /// Returns whether the registry has refused a body of unknown length (411).
    pub(super) fn requires_content_length(&self) -> bool {
        self.requires_content_length.load(Ordering::Relaxed)
    }

    pub(super) fn set_requires_content_length(&self) {
        self.requires_content_length.store(true, Ordering::Relaxed);
    }

    /// Returns the value of `OCI-Chunk-Min-Length` in bytes, or 0 if the registry sent none.
    pub(super) fn min_chunk_size(&self) -> u64 {
        self.min_chunk_size.load(Ordering::Relaxed)
    }

    pub(super) fn set_min_chunk_size(&self, bytes: u64) {
        self.min_chunk_size.store(bytes, Ordering::Relaxed);
    }

    /// Returns the client for requests to the registry itself that [`Host::call`] cannot make: those with a streamed
    /// body.
    pub(super) fn client(&self) -> &Client {
        &self.registry_client
    }
}
