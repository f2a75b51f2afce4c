//! What can go wrong with a registry, in a form from which callers choose a retry and an exit code, and people what to do.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use serde::Deserialize;

use super::reference::ReferenceError;
use crate::digest::Digest;
use crate::message;

/// What a request was for: the same status means different things at different steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// `GET /v2/`.
    Ping,
    /// The token service named by the registry.
    Token,
    /// Reading a manifest.
    ReadManifest,
    /// Reading a blob, or asking whether it is there.
    ReadBlob,
    /// Opening an upload.
    BeginUpload,
    /// Sending a blob's bytes.
    SendBlob,
    /// Closing an upload with its digest.
    FinishBlob,
    /// Mounting a blob from another repository.
    Mount,
    /// Writing a manifest under a tag.
    WriteManifest,
    /// Listing repositories or tags.
    List,
    /// Deleting a manifest or a tag.
    Delete,
    /// Harbor's own API.
    Api,
}

/// A request as it may be shown: without query, which can carry signatures and upload state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    method: String,
    url: String,
}

impl Request {
    /// Takes what may be shown of a request.
    pub fn new(method: &http::Method, url: &reqwest::Url) -> Self {
        let mut url = url.clone();
        url.set_query(None);
        url.set_fragment(None);
        // Neither can fail on http URLs, and what has no host has no user either.
        let _ = url.set_password(None);
        let _ = url.set_username("");
        Self {
            method: method.to_string(),
            url: url.to_string(),
        }
    }
}

impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.method, self.url)
    }
}

/// An answer that says no.
#[derive(Clone, Debug)]
pub struct Reply {
    /// The request it answers.
    pub request: Request,
    /// What it was for.
    pub step: Step,
    /// HTTP status.
    pub status: u16,
    /// The registry's own error code (`DENIED`, `BLOB_UPLOAD_UNKNOWN`, ...), bounded and escaped.
    pub code: Option<String>,
    /// The registry's own words, bounded and escaped.
    pub message: Option<String>,
    /// `Retry-After`, if it was given in seconds or as a date.
    pub retry_after: Option<Duration>,
    /// The tag that was to be written.
    pub tag: Option<String>,
    /// Which credentials were used, or why none; for answers about permission.
    pub credentials: Option<String>,
    /// Bytes of this upload were already sent from a stream that is gone: only the whole blob can be tried again.
    pub mid_upload: bool,
}

impl Reply {
    fn advice(&self) -> String {
        let credentials = || {
            self.credentials
                .as_ref()
                .map(|c| format!(" ({c})"))
                .unwrap_or_default()
        };
        match (self.status, self.step) {
            (401, Step::Token) => {
                format!("the token service does not accept the credentials{}", credentials())
            }
            (401, _) => format!(
                "not permitted: check the credentials{}, that the project exists and that they may do this there",
                credentials()
            ),
            (403, Step::FinishBlob | Step::WriteManifest | Step::SendBlob) => {
                "refused after upload: a quota is used up, or a policy of the project forbids it".to_owned()
            }
            (403, Step::Api | Step::Delete | Step::List) => {
                format!("these credentials may not do this{}", credentials())
            }
            (400 | 405, Step::Delete) => {
                "this registry does not delete: its administrator has to allow it (storage.delete.enabled)".to_owned()
            }
            (412, Step::Api) => "a rule of the project forbids it: the tag is immutable, or something refers to it".to_owned(),
            (403 | 405, Step::BeginUpload) => format!(
                "one cannot push there: no right to push{}, a proxy-cache project, a read-only registry, or no quota left",
                credentials()
            ),
            (403, _) => format!("not permitted{}", credentials()),
            (404, Step::BeginUpload) => "the repository does not exist and this registry does not create it by a push".to_owned(),
            (404, Step::Ping) => "this is not a container registry, or its API is elsewhere".to_owned(),
            (404, Step::SendBlob | Step::FinishBlob) => {
                "the registry has lost the upload; the blob has to be sent again".to_owned()
            }
            (404, _) => "not there".to_owned(),
            (412, Step::WriteManifest) => format!(
                "the tag {} cannot be overwritten (immutable): save under another tag",
                self.tag.as_deref().unwrap_or("given")
            ),
            (413, Step::WriteManifest) => "the manifest is too large for this registry".to_owned(),
            (413, _) => {
                "too large for this registry or the proxy before it: raise its limit on request bodies".to_owned()
            }
            (429, _) => "the registry asks for fewer requests: try again later".to_owned(),
            (500, Step::WriteManifest) => {
                "the registry fails at this manifest, several times over: its log says why".to_owned()
            }
            (408 | 499 | 500..=599, _) => "the registry has a problem of its own: try again later".to_owned(),
            (300..=399, _) => "the answer leads elsewhere, and this request must not be sent there".to_owned(),
            _ => "the registry does not accept this request".to_owned(),
        }
    }
}

impl fmt::Display for Reply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.request, self.status)?;
        if let Some(code) = &self.code {
            write!(f, " {code}")?;
        }
        if let Some(message) = &self.message {
            write!(f, " \"{message}\"")?;
        }
        write!(f, ": {}", self.advice())
    }
}

/// Everything that can go wrong between this program and a registry.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Not an image reference.
    #[error(transparent)]
    Reference(#[from] ReferenceError),
    /// No connection, or it broke.
    #[error(
        "{request}: {reason}: the registry cannot be reached; check its name, the network and the proxy variables"
    )]
    Unreachable {
        /// The request.
        request: Request,
        /// The chain of causes.
        reason: String,
    },
    /// The server's certificate is not to be trusted, or it does not take ours.
    #[error(
        "{request}: {reason}: TLS does not trust the registry; put its CA into --cert-dir or \
         /etc/containers/certs.d/HOST:PORT/ca.crt, or say --tls-verify=false"
    )]
    Certificate {
        /// The request.
        request: Request,
        /// The chain of causes.
        reason: String,
    },
    /// Nothing moved for too long.
    #[error("{request}: nothing moved for {}: try again later", crate::message::count(after.as_secs(), "second", "seconds"))]
    Silent {
        /// The request.
        request: Request,
        /// How long it was waited for.
        after: Duration,
    },
    /// The save takes longer than it may.
    #[error(
        "{request}: the save has taken the {} that it may take with its registries (--deadline)", crate::message::count(after.as_secs(), "second", "seconds")
    )]
    Deadline {
        /// The request that was under way.
        request: Request,
        /// The bound.
        after: Duration,
    },
    /// The registry has other bytes of a blob than were sent.
    #[error(
        "{request}: what has arrived of the blob is not what was sent: it has to be sent again"
    )]
    Torn {
        /// The request that found it out.
        request: Request,
    },
    /// The registry or its token service said no.
    #[error("{0}")]
    Reply(Box<Reply>),
    /// An answer that makes no sense.
    #[error("{request}: {reason}: this is not how a registry answers")]
    Nonsense {
        /// The request.
        request: Request,
        /// What was expected and found.
        reason: String,
    },
    /// A document that was damaged on the way, or is a proxy's page in the place of the registry's.
    #[error("{request}: {reason}: damaged on the way, or not from the registry; try again later")]
    Garbled {
        /// The request.
        request: Request,
        /// What was expected.
        reason: String,
    },
    /// Realm, Location or a redirect leads where it must not.
    #[error("{request}: the answer leads to {to:?}: refused, {why}")]
    LeadsAway {
        /// The request.
        request: Request,
        /// Where to, without query.
        to: String,
        /// Which rule forbids it.
        why: &'static str,
    },
    /// The registry wants credentials and there are none.
    #[error("{request}: the registry wants credentials: {why}")]
    NoCredentials {
        /// The request.
        request: Request,
        /// What was looked at.
        why: String,
    },
    /// A file with credentials or certificates cannot be used.
    #[error("{}: {reason}", path.display())]
    File {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it and what was expected.
        reason: String,
        /// It may not be read.
        denied: bool,
    },
    /// Bytes that are not what their digest says.
    #[error(
        "{what} from {from}: expected {expected}, found {found}: the registry's copy is damaged or was changed on the way"
    )]
    Digest {
        /// `manifest` or `blob`.
        what: &'static str,
        /// Host and repository.
        from: String,
        /// The digest that was asked for.
        expected: Digest,
        /// The digest of what came.
        found: Digest,
    },
    /// More or fewer bytes than promised.
    #[error("{what}: expected {expected} bytes, found {found}")]
    Size {
        /// What was read or written.
        what: String,
        /// Bytes expected.
        expected: u64,
        /// Bytes found.
        found: u64,
    },
    /// A thing larger than what is read into memory.
    #[error("{what} is larger than {limit} bytes: refused")]
    TooLarge {
        /// What.
        what: String,
        /// The cap in bytes.
        limit: u64,
    },
    /// The writer was dropped, or the runtime it worked on is gone.
    #[error("the upload was abandoned")]
    Abandoned,
    /// A client could not be set up.
    #[error("cannot set up a client for {host}: {reason}")]
    Setup {
        /// Host.
        host: String,
        /// The chain of causes.
        reason: String,
    },
}

impl Error {
    /// Whether doing the same again later may succeed (exit code 75). Within one call, what can be repeated has been.
    pub fn retryable(&self) -> bool {
        match self {
            Self::Unreachable { .. }
            | Self::Silent { .. }
            | Self::Deadline { .. }
            | Self::Torn { .. }
            | Self::Garbled { .. } => true,
            // It has been tried again already, and what a registry cannot take it cannot take tomorrow.
            Self::Reply(reply) if (reply.status, reply.step) == (500, Step::WriteManifest) => false,
            Self::Reply(reply) => {
                matches!(reply.status, 408 | 429 | 499 | 500 | 502..=504 | 506..=599)
                    || (reply.mid_upload && matches!(reply.status, 401 | 404 | 411 | 416))
            }
            // A damaged download: another try may read another copy.
            Self::Digest { what, .. } => *what == "blob",
            _ => false,
        }
    }

    /// Whether it is a matter of permission: credentials, quota, policy (exit code 77).
    pub fn not_permitted(&self) -> bool {
        match self {
            Self::Reply(reply) => match reply.status {
                401 => !reply.mid_upload,
                402 | 403 => true,
                405 => matches!(reply.step, Step::BeginUpload | Step::Delete),
                412 => matches!(reply.step, Step::WriteManifest | Step::Api),
                _ => false,
            },
            Self::NoCredentials { .. } => true,
            Self::File { denied, .. } => *denied,
            _ => false,
        }
    }

    /// Whether the registry says that the thing is not there.
    pub fn not_found(&self) -> bool {
        matches!(self, Self::Reply(reply) if reply.status == 404)
    }

    /// Whether repeating the request at once, after a pause, is worth it: a narrower thing than [`Error::retryable`].
    pub(super) fn passing(&self) -> bool {
        match self {
            Self::Unreachable { .. } | Self::Silent { .. } | Self::Garbled { .. } => true,
            Self::Reply(reply) => {
                matches!(reply.status, 408 | 429 | 499 | 500 | 502 | 503 | 504 | 522)
            }
            _ => false,
        }
    }

    /// Whether sending the blob once more, from its start or from where the registry has it, is worth it now.
    pub(super) fn is_again(&self) -> bool {
        self.retryable() && !matches!(self, Self::Deadline { .. })
    }

    pub(super) fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Reply(reply) => reply.retry_after,
            _ => None,
        }
    }

    /// The same error for bytes that went out of a stream and cannot be sent again by this side.
    pub(super) fn in_mid_upload(mut self) -> Self {
        if let Self::Reply(reply) = &mut self {
            reply.mid_upload = true;
        }
        self
    }

    /// A failed request of reqwest's. Its own text carries the whole URL, so only the causes are taken.
    pub(super) fn transport(request: Request, error: &(dyn std::error::Error + 'static)) -> Self {
        let (reason, certificate) = causes(error);
        if certificate {
            Self::Certificate { request, reason }
        } else {
            Self::Unreachable { request, reason }
        }
    }
}

/// The chain of causes as one line, and whether certificates are among them.
pub(super) fn causes(error: &(dyn std::error::Error + 'static)) -> (String, bool) {
    let certificate = message::chain(error).any(is_certificate_error);
    // What reqwest says of itself is in the request already.
    let causes = message::chain(error).filter(|cause| !cause.is::<reqwest::Error>());
    let mut reason =
        message::joined(causes.map(|cause| crate::escape::limited(&cause.to_string(), 300)));
    if reason.is_empty() {
        "the connection failed".clone_into(&mut reason);
    }
    (reason, certificate)
}

/// Whether TLS itself works there and the certificates are the problem.
fn is_certificate_error(error: &(dyn std::error::Error + 'static)) -> bool {
    let of = |tls: &rustls::Error| {
        matches!(
            tls,
            rustls::Error::InvalidCertificate(_)
                | rustls::Error::NoCertificatesPresented
                | rustls::Error::UnsupportedNameType
                | rustls::Error::AlertReceived(
                    rustls::AlertDescription::BadCertificate
                        | rustls::AlertDescription::UnknownCA
                        | rustls::AlertDescription::CertificateRequired
                        | rustls::AlertDescription::CertificateUnknown
                        | rustls::AlertDescription::CertificateExpired
                        | rustls::AlertDescription::AccessDenied
                )
        )
    };
    if let Some(tls) = error.downcast_ref::<rustls::Error>() {
        return of(tls);
    }
    // An I/O error's source is its content's source: the content itself, often another I/O error, is reached so.
    error
        .downcast_ref::<std::io::Error>()
        .and_then(std::io::Error::get_ref)
        .is_some_and(|inner| is_certificate_error(inner))
}

/// The error document of the distribution-spec ("Error Codes"), with what Harbor's API and others leave out allowed for.
#[derive(Deserialize)]
struct ErrorDocument {
    errors: Vec<ErrorEntry>,
}

#[derive(Deserialize)]
struct ErrorEntry {
    #[serde(default)]
    code: String,
    #[serde(default)]
    message: String,
}

/// Code and message of an error body, bounded and without control characters.
pub(super) fn read_error_body(body: &[u8]) -> (Option<String>, Option<String>) {
    let some = |text: String| (!text.is_empty()).then_some(text);
    if let Ok(document) = serde_json::from_slice::<ErrorDocument>(body) {
        return match document.errors.into_iter().next() {
            Some(first) => (
                some(crate::escape::limited(&first.code, 64)),
                some(crate::escape::limited(&first.message, 512)),
            ),
            None => (None, None),
        };
    }
    let text = String::from_utf8_lossy(body);
    // A proxy's HTML page says nothing that the status does not.
    if text.trim_start().starts_with('<') {
        return (None, None);
    }
    (None, some(crate::escape::limited(text.trim(), 200)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reply(status: u16, step: Step) -> Error {
        let url = "http://r.example/v2/a/blobs/uploads/1?_state=secret"
            .parse()
            .unwrap();
        Error::Reply(Box::new(Reply {
            request: Request::new(&http::Method::PUT, &url),
            step,
            status,
            code: Some("DENIED".to_owned()),
            message: Some("quota".to_owned()),
            retry_after: None,
            tag: Some("v1".to_owned()),
            credentials: None,
            mid_upload: false,
        }))
    }

    #[test]
    fn replies_mean_what_the_table_says() {
        for (status, step, retryable, not_permitted) in [
            (401, Step::BeginUpload, false, true),
            (403, Step::BeginUpload, false, true),
            (403, Step::FinishBlob, false, true),
            (403, Step::WriteManifest, false, true),
            (405, Step::BeginUpload, false, true),
            (405, Step::WriteManifest, false, false),
            (412, Step::WriteManifest, false, true),
            (413, Step::WriteManifest, false, false),
            (400, Step::WriteManifest, false, false),
            (404, Step::FinishBlob, false, false),
            (408, Step::BeginUpload, true, false),
            (429, Step::BeginUpload, true, false),
            (499, Step::BeginUpload, true, false),
            (500, Step::BeginUpload, true, false),
            (500, Step::WriteManifest, false, false),
            (501, Step::WriteManifest, false, false),
            (502, Step::Token, true, false),
            (503, Step::BeginUpload, true, false),
            (504, Step::BeginUpload, true, false),
            (522, Step::BeginUpload, true, false),
        ] {
            let error = reply(status, step);
            assert_eq!(
                (error.retryable(), error.not_permitted()),
                (retryable, not_permitted),
                "{status} {step:?}"
            );
        }
        // Lost sessions: this request is final, the blob is not.
        assert!(reply(404, Step::FinishBlob).in_mid_upload().retryable());
        assert!(reply(401, Step::SendBlob).in_mid_upload().retryable());
        assert!(!reply(403, Step::FinishBlob).in_mid_upload().retryable());
    }

    #[test]
    fn errors_show_the_tag_and_no_query() {
        let text = reply(412, Step::WriteManifest).to_string();
        assert!(
            text.contains("tag v1") && text.contains("DENIED") && text.contains("\"quota\""),
            "{text}"
        );
        assert!(!text.contains("secret"), "{text}");
    }

    #[test]
    fn error_bodies_are_bounded_and_escaped() {
        let body = br#"{"errors":[{"code":"DENIED","message":"a\u001b[31mb","detail":{}}]}"#;
        assert_eq!(
            read_error_body(body),
            (Some("DENIED".into()), Some("a\\u{1b}[31mb".into()))
        );
        assert_eq!(read_error_body(br#"{"errors":[]}"#), (None, None));
        assert_eq!(read_error_body(b"<html>x"), (None, None));
        assert_eq!(
            read_error_body(b"404 page not found\n"),
            (None, Some("404 page not found".into()))
        );
        assert_eq!(
            read_error_body(b"\xff\x00"),
            (None, Some("\u{fffd}\\u{0}".into()))
        );
        assert_eq!(
            read_error_body("x".repeat(5000).as_bytes())
                .1
                .unwrap()
                .chars()
                .count(),
            201
        );
        assert_eq!(crate::escape::limited("a\u{202e}b", 9), "a\\u{202e}b");
    }
}
