//! Registry client over the distribution API: pushes saved images and reads missing base layers.
//!
//! Requests, tokens and uploads are implemented here on top of reqwest instead of a client crate, because a layer whose
//! digest is unknown until its end has to be sent as one stream, mounts need a token with two scopes, and the
//! registry's answers decide on retries and exit codes.
//!
//! Format: OCI distribution-spec 1.1.

pub(crate) mod api;
mod auth;
mod blob;
mod catalog;
pub(crate) mod credentials;
pub mod denial;
pub(crate) mod error;
mod host;
pub(crate) mod retry;
mod session;
mod tls;
mod trust;
pub(crate) mod upload;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http::header::{ACCEPT, CONTENT_LENGTH, CONTENT_TYPE};
use http::{HeaderMap, HeaderValue, Method, StatusCode};
use reqwest::Url;

use crate::common::digest::Digest;
use crate::common::reference;
pub use crate::common::reference::Reference;
use crate::common::waits::Waits;
use crate::image::manifest::MAX_MANIFEST_BYTES;
use crate::image::manifest::raw::{MANIFEST_TYPES, RawManifest, manifest_type};
pub(crate) use api::Api;
pub use blob::BlobStream;
pub use credentials::Credentials;
pub use denial::Denial;
pub use error::Error;
pub use retry::Retry;
pub(crate) use upload::Writer;

use credentials::{AuthFiles, CredentialLookup};
use error::{Request, Step};
use host::{Call, Host, STALL_TIMEOUT, Scopes, Settings};
use retry::RetryBudget;

/// Number of concurrent uploads. Registries serialise the quota of a project, so more are slower.
pub(crate) const MAX_CONCURRENT_UPLOADS: usize = 4;

/// Default deadline of a save, for transfers that progress slowly: enough for a terabyte at 25 MB/s.
pub(crate) const DEFAULT_DEADLINE: Duration = Duration::from_secs(12 * 3600);

/// Time limit for finding out whether a tag is written although its answer was lost.
const TAG_CHECK_LIMIT: Duration = Duration::from_secs(15);

/// Returns a builder for an HTTP client to a host that is not a registry (a manager, a key set). It uses the machine's
/// certificates and its proxies except for loopback addresses, and follows no redirects, because a token must go to no
/// other host.
pub fn http_client(host: &str) -> reqwest::ClientBuilder {
    tls::install_provider();
    let builder = reqwest::Client::builder()
        .user_agent(concat!("upperdeck/", env!("CARGO_PKG_VERSION")))
        .redirect(reqwest::redirect::Policy::none())
        .referer(false)
        .tls_backend_rustls()
        .tls_certs_only(
            tls::system_roots()
                .iter()
                .filter_map(|der| reqwest::Certificate::from_der(der).ok()),
        );
    if reference::is_loopback(host) {
        builder.no_proxy()
    } else {
        builder
    }
}

/// How registries are reached, and with which credentials.
#[derive(Clone, Debug)]
pub struct Access {
    /// `--authfile`.
    pub authfile: Option<PathBuf>,
    /// `--creds`.
    pub creds: Option<Credentials>,
    /// `--tls-verify`. If false, certificates are not verified, and plain HTTP is tried if there is no TLS.
    pub tls_verify: bool,
    /// `--cert-dir`.
    pub cert_dir: Option<PathBuf>,
    /// The host that `creds`, `tls_verify` and `cert_dir` apply to, as in references. Other hosts (those of base
    /// layers) are reached with the credentials of the auth files and with verified TLS. `None` applies them to all
    /// hosts.
    pub host: Option<String>,
    /// How often repeatable requests are repeated.
    pub retry: Retry,
    /// Timeout without any progress in an answer or an upload.
    pub stall_timeout: Duration,
    /// Deadline for all registry access of a save, measured from [`Registries::new`].
    pub deadline: Duration,
    /// `--create-project`: create a missing Harbor project.
    pub create_project: bool,
    /// `--project-quota`: limit of a project that is created, in bytes. `None` leaves Harbor's default.
    pub project_quota: Option<u64>,
}

impl Default for Access {
    fn default() -> Self {
        Self {
            authfile: None,
            creds: None,
            tls_verify: true,
            cert_dir: None,
            host: None,
            retry: Retry::default(),
            stall_timeout: STALL_TIMEOUT,
            deadline: DEFAULT_DEADLINE,
            create_project: false,
            project_quota: None,
        }
    }
}

/// Returns what a response header and a body parse to, independent of any request: realm and service of a challenge,
/// the text of an error. Used only by the fuzz targets.
#[doc(hidden)]
pub fn parse_untrusted(header: &str, body: &[u8]) -> Vec<String> {
    let now = std::time::Instant::now();
    if let Ok(token) = auth::Token::read(body, now) {
        token.needs_renewal(now);
        token.age().is_expired(now);
    }
    auth::read_challenge(header.lines());
    retry::read_retry_after(header, jiff::Timestamp::UNIX_EPOCH);
    let (code, message) = error::read_error_body(body);
    code.into_iter().chain(message).collect()
}

/// The registries of a save. Repositories on one host share connections and tokens. Clones share the same state.
#[derive(Clone)]
pub struct Registries {
    access: Arc<Access>,
    budget: Arc<RetryBudget>,
    hosts: Arc<Mutex<HashMap<String, Arc<Host>>>>,
}

/// How a missing project of Harbor is created.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NewProject {
    /// Its quota in bytes. `None` leaves Harbor's default.
    pub limit: Option<u64>,
}

impl Registries {
    /// Creates the client. No request is sent yet.
    pub fn new(access: Access) -> Self {
        Self {
            budget: Arc::new(RetryBudget::new(access.retry, access.deadline)),
            access: Arc::new(access),
            hosts: Arc::default(),
        }
    }

    /// Returns what the save waits for: pauses before requests are sent again, and what others count there.
    pub(crate) fn waits(&self) -> Arc<Waits> {
        self.budget.waits()
    }

    /// Returns whether missing projects are to be created.
    pub(crate) fn creates_projects(&self) -> Option<NewProject> {
        let limit = self.access.project_quota;
        let wanted = self.access.create_project;
        wanted.then_some(NewProject { limit })
    }

    /// Opens a repository for reading. `name` is `HOST/REPOSITORY`.
    pub fn repository(&self, name: &str) -> Result<Repository, Error> {
        let reference: Reference = name.parse()?;
        self.open(&reference, "pull")
    }

    /// Opens the repository of `reference` for pushing.
    pub fn push_to(&self, reference: &Reference) -> Result<Repository, Error> {
        self.open(reference, "pull,push")
    }

    /// Opens the repository of `reference` for reading.
    pub fn pull_from(&self, reference: &Reference) -> Result<Repository, Error> {
        self.open(reference, "pull")
    }

    fn open(&self, reference: &Reference, actions: &'static str) -> Result<Repository, Error> {
        Ok(Repository {
            host: self.host(&reference.host)?,
            name: reference.repository.clone(),
            actions,
        })
    }

    fn host(&self, name: &str) -> Result<Arc<Host>, Error> {
        let mut hosts = self.hosts.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(host) = hosts.get(name) {
            return Ok(Arc::clone(host));
        }
        let host = Arc::new(Host::new(self.settings(name))?);
        hosts.insert(name.to_owned(), Arc::clone(&host));
        Ok(host)
    }

    fn settings(&self, host: &str) -> Settings {
        let access = &self.access;
        let meant = access.host.as_deref().is_none_or(|h| h == host);
        let creds = access.creds.clone().filter(|_| meant);
        let authfile = access.authfile.clone();
        let name = host.to_owned();
        Settings {
            name: host.to_owned(),
            tls_verify: access.tls_verify || !meant,
            cert_dir: access.cert_dir.clone().filter(|_| meant),
            retry: access.retry,
            stall_timeout: access.stall_timeout,
            budget: Arc::clone(&self.budget),
            credentials: Box::new(move |repository| {
                if let Some(credentials) = &creds {
                    Ok(CredentialLookup::Credentials {
                        credentials: credentials.clone(),
                        source: "--creds".to_owned(),
                    })
                } else {
                    let uid = rustix::process::getuid().as_raw();
                    AuthFiles::find(authfile.as_deref(), credentials::environment, uid)
                        .search(&name, repository)
                }
            }),
        }
    }
}

/// One repository on one host. Clones share the same state.
#[derive(Clone)]
pub struct Repository {
    host: Arc<Host>,
    name: String,
    actions: &'static str,
}

impl Repository {
    /// Returns `HOST/REPOSITORY`.
    pub(crate) fn name(&self) -> String {
        format!("{}/{}", self.host.name(), self.name)
    }

    /// Returns another repository of the same host, for reading.
    #[must_use]
    pub fn beside(&self, name: &str) -> Self {
        Self {
            host: Arc::clone(&self.host),
            name: name.to_owned(),
            actions: "pull",
        }
    }

    /// Returns `HOST[:PORT]`.
    pub fn host(&self) -> &str {
        self.host.name()
    }

    /// Returns the name within the host.
    pub(crate) fn path(&self) -> &str {
        &self.name
    }

    async fn url(&self, rest: &str) -> Result<Url, Error> {
        self.host.url(&format!("/v2/{}/{rest}", self.name)).await
    }

    fn call(&self, step: Step, method: Method, url: Url) -> Call {
        let retry = self.host.retry();
        Call {
            step,
            method,
            url,
            scopes: Scopes::new(&self.name, self.actions),
            headers: HeaderMap::new(),
            body: Bytes::new(),
            wait: self.host.stall_timeout(),
            max_attempts: retry.max_attempts,
            max_attempts_at_500: retry.max_attempts,
            accept: &[],
            tag: None,
        }
    }

    /// Reads the manifest or index of a tag or digest, byte for byte. For a digest, the content is verified.
    pub async fn manifest(&self, tag_or_digest: &str) -> Result<RawManifest, Error> {
        let wanted: Option<Digest> = if tag_or_digest.contains(':') {
            Some(
                tag_or_digest
                    .parse()
                    .map_err(reference::ReferenceError::from)?,
            )
        } else {
            reference::check_tag(tag_or_digest)?;
            None
        };
        let url = self.url(&format!("manifests/{tag_or_digest}")).await?;
        let mut call = self.call(Step::ReadManifest, Method::GET, url);
        for media_type in MANIFEST_TYPES {
            call.headers
                .append(ACCEPT, HeaderValue::from_static(media_type));
        }
        let response = self.host.call(&call).await?;
        let request = Request::new(&call.method, &call.url);
        let said = header_text(response.headers(), &CONTENT_TYPE);
        let bytes = self
            .host
            .read_body(
                &request,
                "the manifest",
                response,
                MAX_MANIFEST_BYTES as u64,
            )
            .await?;
        let digest = Digest::of(&bytes);
        if let Some(expected) = wanted.filter(|&w| w != digest) {
            return Err(Error::Digest {
                what: "manifest",
                from: self.name(),
                expected,
                found: digest,
            });
        }
        let media_type = manifest_type(said.as_deref(), &bytes)
            .map_err(|reason| Error::ProtocolViolation { request, reason })?;
        Ok(RawManifest {
            bytes,
            media_type,
            digest,
        })
    }

    /// Reads a small blob (a config) into memory and verifies its digest.
    pub async fn blob(&self, digest: &Digest) -> Result<Bytes, Error> {
        let url = self.url(&format!("blobs/{digest}")).await?;
        let call = self.call(Step::ReadBlob, Method::GET, url);
        let response = self.host.call(&call).await?;
        let request = Request::new(&call.method, &call.url);
        let bytes = self
            .host
            .read_body(&request, "the config", response, MAX_MANIFEST_BYTES as u64)
            .await?;
        let found = Digest::of(&bytes);
        if found != *digest {
            return Err(Error::Digest {
                what: "blob",
                from: self.name(),
                expected: *digest,
                found,
            });
        }
        Ok(bytes)
    }

    /// Returns the size in bytes of a blob, or `None` if it does not exist. An account that may push but not pull gets
    /// an error here and has to upload the blob, so refusals count as absence.
    pub async fn head_blob(&self, digest: &Digest) -> Result<Option<u64>, Error> {
        let url = self.url(&format!("blobs/{digest}")).await?;
        let mut call = self.call(Step::ReadBlob, Method::HEAD, url);
        call.accept = &[400, 401, 403, 404, 405];
        let response = self.host.call(&call).await?;
        if !response.status().is_success() {
            return Ok(None);
        }
        // reqwest's `content_length` is that of the body, which the answer to a HEAD request does not have.
        Ok(header_text(response.headers(), &CONTENT_LENGTH).and_then(|n| n.parse().ok()))
    }

    /// Checks the permission to push by opening an upload and cancelling it.
    pub async fn check_push(&self) -> Result<(), Error> {
        session::probe(self).await
    }

    /// Mounts a blob of another repository (`HOST/REPOSITORY`) into this one. Returns false if the registry cannot or
    /// will not mount it, in which case the blob has to be uploaded. Fails only if an upload would fail as well.
    pub async fn mount_blob(&self, digest: &Digest, from: &str) -> Result<bool, Error> {
        let Ok(source) = from.parse::<Reference>() else {
            return Ok(false);
        };
        if source.host != self.host.name() || source.repository == self.name {
            return Ok(false);
        }
        let url = self
            .url(&format!(
                "blobs/uploads/?mount={digest}&from={}",
                source.repository
            ))
            .await?;
        let mut call = self.call(Step::Mount, Method::POST, url);
        call.scopes = call.scopes.and_pull(&source.repository);
        // At most two attempts: uploading is always possible, so a mount is not worth a long wait.
        call.max_attempts = call.max_attempts.min(2);
        let response = match self.host.call(&call).await {
            Ok(response) => response,
            // An upload would be refused for the same reason, after all its bytes.
            Err(e) if matches!(Denial::of(&e), Some(Denial::Quota(_) | Denial::ReadOnly)) => {
                return Err(e);
            }
            // Depending on the registry, an unknown or unreadable source is 400, 401, 403 or 404; a token service may
            // refuse it, too.
            Err(
                e
                @ (Error::Reply(_) | Error::ProtocolViolation { .. } | Error::ForbiddenUrl { .. }),
            ) => {
                tracing::debug!(registry.error = %e, "not mounted");
                return Ok(false);
            }
            Err(e) => return Err(e),
        };
        if response.status() == StatusCode::CREATED {
            return Ok(true);
        }
        // 202: the registry has opened an upload instead. It is cancelled, so that all uploads take the same path.
        let request = Request::new(&call.method, &call.url);
        if let Ok(url) = self
            .host
            .resolve_location(&request, &call.url, response.headers())
            .await
        {
            session::cancel_at(self, url).await;
        }
        Ok(false)
    }

    /// Uploads a blob from memory, unless it exists already.
    pub async fn put_blob(&self, bytes: Bytes, digest: &Digest) -> Result<(), Error> {
        if self.head_blob(digest).await? == Some(bytes.len() as u64) {
            return Ok(());
        }
        upload::send_bytes(self, bytes, digest).await
    }

    /// Starts the upload of a blob whose digest is known only at its end. The requests run on the runtime of `handle`.
    pub fn begin_blob(&self, handle: tokio::runtime::Handle) -> Writer {
        Writer::begin(self.clone(), handle)
    }

    /// Writes a manifest under a tag. Returns its digest, compared with the one that the registry returned, if any.
    pub async fn put_manifest(
        &self,
        bytes: Bytes,
        media_type: &str,
        tag: &str,
    ) -> Result<Digest, Error> {
        reference::check_tag(tag)?;
        let digest = Digest::of(&bytes);
        if bytes.len() as u64 > MAX_MANIFEST_BYTES as u64 {
            return Err(Error::TooLarge {
                what: "the manifest".to_owned(),
                limit: MAX_MANIFEST_BYTES as u64,
            });
        }
        let url = self.url(&format!("manifests/{tag}")).await?;
        let mut call = self.call(Step::WriteManifest, Method::PUT, url);
        let media_type =
            HeaderValue::from_str(media_type).map_err(|_| Error::ProtocolViolation {
                request: Request::new(&call.method, &call.url),
                reason: "the manifest's media type is no header value".to_owned(),
            })?;
        call.headers.insert(CONTENT_TYPE, media_type);
        call.body = bytes;
        call.tag = Some(tag.to_owned());
        // Harbor answers 500 for a manifest that it cannot parse, however often it is repeated.
        call.max_attempts_at_500 = 2;
        let response = match self.host.call(&call).await {
            Ok(response) => response,
            Err(error) => return self.written_all_the_same(tag, digest, error).await,
        };
        let Err(error) = check_digest_header(&call, response.headers(), &digest) else {
            return Ok(digest);
        };
        // If the registry returned another digest, the manifest that the tag now refers to decides.
        match self.manifest(tag).await {
            Ok(found) if found.digest == digest => Ok(digest),
            _ => Err(error),
        }
    }

    /// Decides about a manifest whose write failed with `error`: a proxy may have lost the answer, or replaced it by one of
    /// its own, after the registry had stored the manifest. If the tag names it, it is written.
    async fn written_all_the_same(
        &self,
        tag: &str,
        digest: Digest,
        error: Error,
    ) -> Result<Digest, Error> {
        match tokio::time::timeout(TAG_CHECK_LIMIT, self.manifest(tag)).await {
            Ok(Ok(found)) if found.digest == digest => {
                tracing::warn!(
                    registry.error = %error, tag,
                    "the registry has stored the image, although its answer was lost or an error"
                );
                Ok(digest)
            }
            _ => Err(error),
        }
    }
}

fn header_text(headers: &HeaderMap, name: &http::HeaderName) -> Option<String> {
    headers
        .get(name)
        .and_then(|v| v.to_str().ok())
        .map(str::to_owned)
}

/// Checks that the digest that the registry stored, if it returns one, is the expected one.
fn check_digest_header(call: &Call, headers: &HeaderMap, expected: &Digest) -> Result<(), Error> {
    match headers
        .get("docker-content-digest")
        .and_then(|v| v.to_str().ok()?.parse::<Digest>().ok())
    {
        Some(found) if found != *expected => Err(Error::ProtocolViolation {
            request: Request::new(&call.method, &call.url),
            reason: format!("expected to store {expected}, the registry has stored {found}"),
        }),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_meant_for_one_host_stays_there() {
        let access = Access {
            creds: Some("u:p".parse().unwrap()),
            tls_verify: false,
            cert_dir: Some("/nonexistent".into()),
            authfile: Some("/nonexistent".into()),
            host: Some("r.example".to_owned()),
            ..Access::default()
        };
        let registries = Registries::new(access);
        let meant = registries.settings("r.example");
        assert!(!meant.tls_verify && meant.cert_dir.is_some() && (meant.credentials)("x").is_ok());
        let other = registries.settings("s.example");
        assert!(other.tls_verify && other.cert_dir.is_none() && (other.credentials)("x").is_err());
    }
}
