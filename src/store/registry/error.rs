//! Errors of registry access. They carry what callers need to decide on retries and exit codes, and advice for the
//! user.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use oci_client::errors::{OciEnvelope, OciErrorCode};

use crate::common::digest::Digest;
use crate::common::message;
use crate::common::reference::ReferenceError;

/// The purpose of a request. The same status means different things at different steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// `GET /v2/`.
    Ping,
    /// Request to the token service named by the registry.
    Token,
    /// Reading a manifest.
    ReadManifest,
    /// Reading a blob, or checking for its existence.
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

/// Method and URL of a request, without the query, which can carry signatures and upload state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    method: String,
    url: String,
}

impl Request {
    /// Creates the printable form of a request: without query, fragment, user and password.
    pub(crate) fn new(method: &http::Method, url: &reqwest::Url) -> Self {
        let mut url = url.clone();
        url.set_query(None);
        url.set_fragment(None);
        // Neither fails for http URLs, and a URL without a host has no user either.
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

/// An answer with an error status.
#[derive(Clone, Debug)]
pub struct Reply {
    /// The request that was answered.
    pub request: Request,
    /// The purpose of the request.
    pub step: Step,
    /// HTTP status.
    pub status: u16,
    /// The registry's error code (`DENIED`, `BLOB_UPLOAD_UNKNOWN`, ...), bounded and escaped.
    pub code: Option<String>,
    /// The registry's error message, bounded and escaped.
    pub message: Option<String>,
    /// Value of `Retry-After`, given in seconds or as a date.
    pub retry_after: Option<Duration>,
    /// The tag that was to be written.
    pub tag: Option<String>,
    /// The credentials that were used, or why there were none; set for errors of permission.
    pub credentials: Option<String>,
    /// Whether bytes of this upload were already sent from a stream that cannot be read again, so that only the whole
    /// blob can be retried.
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
                "pushing is not permitted: no right to push{}, a proxy-cache project, a read-only registry, or no quota left",
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

/// An error of registry access.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The image reference is invalid.
    #[error(transparent)]
    Reference(#[from] ReferenceError),
    /// The connection could not be made, or broke.
    #[error(
        "{request}: {reason}: the registry cannot be reached; check its name, the network and the proxy variables"
    )]
    Unreachable {
        /// The request.
        request: Request,
        /// The chain of causes.
        reason: String,
    },
    /// The server's certificate is not trusted, or the server rejected the client's.
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
    /// The server answered the TLS handshake with something else.
    #[error(
        "{request}: {reason}: the server does not speak TLS; if this registry has plain HTTP only, say --tls-verify=false"
    )]
    NoTls {
        /// The request.
        request: Request,
        /// The chain of causes.
        reason: String,
    },
    /// No data was transferred for too long.
    #[error("{request}: no data was transferred for {}: try again later", crate::common::message::count(after.as_secs(), "second", "seconds"))]
    Stalled {
        /// The request.
        request: Request,
        /// The timeout.
        after: Duration,
    },
    /// The save exceeded its deadline.
    #[error(
        "{request}: the time limit of {} for transfers is reached (--deadline)", crate::common::message::count(after.as_secs(), "second", "seconds")
    )]
    Deadline {
        /// The request that was in progress.
        request: Request,
        /// The deadline, measured from the start of the save.
        after: Duration,
    },
    /// The registry received other bytes of a blob than were sent.
    #[error("{request}: the received part of the blob is corrupt: it has to be sent again")]
    CorruptUpload {
        /// The request whose answer showed it.
        request: Request,
    },
    /// The registry or its token service answered with an error status.
    #[error("{0}")]
    Reply(Box<Reply>),
    /// The answer violates the protocol.
    #[error("{request}: {reason}: this is not a registry's response")]
    ProtocolViolation {
        /// The request.
        request: Request,
        /// What was expected and what was found.
        reason: String,
    },
    /// A document was damaged in transit, or was sent by a proxy in place of the registry.
    #[error("{request}: {reason}: damaged in transit, or not from the registry; try again later")]
    InvalidDocument {
        /// The request.
        request: Request,
        /// What was expected.
        reason: String,
    },
    /// A realm, `Location` or redirect leads to a URL that is not permitted.
    #[error("{request}: the response points to {to:?}: refused, {why}")]
    ForbiddenUrl {
        /// The request.
        request: Request,
        /// The URL, without query.
        to: String,
        /// The rule that forbids it.
        why: &'static str,
    },
    /// The registry requires credentials and none were found.
    #[error("{request}: the registry wants credentials: {why}")]
    NoCredentials {
        /// The request.
        request: Request,
        /// Where credentials were searched for.
        why: String,
    },
    /// A file with credentials or certificates cannot be used.
    #[error("{}: {reason}", path.display())]
    File {
        /// Path of the file.
        path: PathBuf,
        /// What is wrong with it and what was expected.
        reason: String,
        /// Whether permission to read it was denied.
        denied: bool,
    },
    /// The content does not match its digest.
    #[error(
        "{what} from {from}: expected {expected}, found {found}: the registry's copy is damaged, or was changed in transit"
    )]
    Digest {
        /// `manifest` or `blob`.
        what: &'static str,
        /// Host and repository.
        from: String,
        /// The digest that was requested.
        expected: Digest,
        /// The digest of the content received.
        found: Digest,
    },
    /// The number of bytes differs from what was declared.
    #[error("{what}: expected {expected} bytes, found {found}")]
    Size {
        /// What was read or written.
        what: String,
        /// Expected number of bytes.
        expected: u64,
        /// Actual number of bytes.
        found: u64,
    },
    /// The object is larger than the limit for what is read into memory.
    #[error("{what} is larger than {limit} bytes: refused")]
    TooLarge {
        /// What was read.
        what: String,
        /// The limit in bytes.
        limit: u64,
    },
    /// The writer was dropped, or its runtime was shut down.
    #[error("the upload was abandoned")]
    Abandoned,
    /// The HTTP client could not be set up.
    #[error("cannot set up a client for {host}: {reason}")]
    Setup {
        /// The host.
        host: String,
        /// The chain of causes.
        reason: String,
    },
}

impl Error {
    /// Returns whether a later attempt may succeed (exit code 75). Repeatable requests have been repeated within the
    /// call already.
    pub fn retryable(&self) -> bool {
        match self {
            Self::Unreachable { .. }
            | Self::Stalled { .. }
            | Self::Deadline { .. }
            | Self::CorruptUpload { .. }
            | Self::InvalidDocument { .. } => true,
            // The manifest was retried already, and a registry that cannot parse it now never will.
            Self::Reply(reply) if (reply.status, reply.step) == (500, Step::WriteManifest) => false,
            Self::Reply(reply) => {
                matches!(reply.status, 408 | 429 | 499 | 500 | 502..=504 | 506..=599)
                    || (reply.mid_upload && matches!(reply.status, 401 | 404 | 411 | 416))
            }
            // The download was damaged; another attempt may get an intact copy.
            Self::Digest { what, .. } => *what == "blob",
            _ => false,
        }
    }

    /// Returns whether the cause is a lack of permission: credentials, quota or policy (exit code 77).
    pub fn not_permitted(&self) -> bool {
        match self {
            Self::Reply(reply) => match reply.status {
                401 => !reply.mid_upload,
                402 | 403 => true,
                405 => matches!(reply.step, Step::BeginUpload | Step::Delete),
                412 => matches!(
                    reply.step,
                    Step::WriteManifest | Step::ReadManifest | Step::Api
                ),
                _ => false,
            },
            Self::NoCredentials { .. } => true,
            Self::File { denied, .. } => *denied,
            _ => false,
        }
    }

    /// Returns whether the registry answered that the object does not exist.
    pub fn not_found(&self) -> bool {
        matches!(self, Self::Reply(reply) if reply.status == 404)
    }

    /// Returns whether the single request is worth repeating after a pause. This is stricter than [`Error::retryable`].
    pub(super) fn is_transient(&self) -> bool {
        match self {
            Self::Unreachable { .. } | Self::Stalled { .. } | Self::InvalidDocument { .. } => true,
            Self::Reply(reply) => {
                matches!(reply.status, 408 | 429 | 499 | 500 | 502 | 503 | 504 | 522)
            }
            _ => false,
        }
    }

    /// Returns whether the blob is worth sending again now, from its start or from the offset that the registry
    /// confirmed.
    pub(super) fn can_resend(&self) -> bool {
        self.retryable() && !matches!(self, Self::Deadline { .. })
    }

    pub(super) fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Reply(reply) => reply.retry_after,
            _ => None,
        }
    }

    /// Marks the error as one of an upload whose bytes came from a stream and cannot be sent again here.
    pub(super) fn in_mid_upload(mut self) -> Self {
        if let Self::Reply(reply) = &mut self {
            reply.mid_upload = true;
        }
        self
    }

    /// Converts a transport error of reqwest. Only its causes are used, because its own text contains the whole URL.
    pub(super) fn transport(request: Request, error: &(dyn std::error::Error + 'static)) -> Self {
        let reason = causes(error);
        match message::chain(error).find_map(tls_failure) {
            Some(TlsFailure::Certificate) => Self::Certificate { request, reason },
            Some(TlsFailure::OtherProtocol) => Self::NoTls { request, reason },
            None => Self::Unreachable { request, reason },
        }
    }
}

/// A failure of TLS that another attempt does not mend.
#[derive(Clone, Copy, PartialEq, Eq)]
enum TlsFailure {
    /// One side does not accept the other's certificate.
    Certificate,
    /// The server does not speak TLS.
    OtherProtocol,
}

/// Returns the chain of causes on one line.
pub(super) fn causes(error: &(dyn std::error::Error + 'static)) -> String {
    // The error's own text repeats the request, which is reported already.
    let causes = message::chain(error).filter(|cause| !cause.is::<reqwest::Error>());
    let mut reason = message::joined(
        causes.map(|cause| crate::common::escape::limited(&cause.to_string(), 300)),
    );
    if reason.is_empty() {
        "the connection failed".clone_into(&mut reason);
    }
    reason
}

/// Returns the kind of a TLS error that is final.
fn tls_failure(error: &(dyn std::error::Error + 'static)) -> Option<TlsFailure> {
    let of = |tls: &rustls::Error| match tls {
        rustls::Error::InvalidCertificate(_)
        | rustls::Error::NoCertificatesPresented
        | rustls::Error::UnsupportedNameType
        | rustls::Error::AlertReceived(
            rustls::AlertDescription::BadCertificate
            | rustls::AlertDescription::UnknownCA
            | rustls::AlertDescription::CertificateRequired
            | rustls::AlertDescription::CertificateUnknown
            | rustls::AlertDescription::CertificateExpired
            | rustls::AlertDescription::AccessDenied,
        ) => Some(TlsFailure::Certificate),
        // The first bytes of the answer are no TLS record: an HTTP server answers "HTTP/1.1 400".
        rustls::Error::InvalidMessage(rustls::InvalidMessage::InvalidContentType) => {
            Some(TlsFailure::OtherProtocol)
        }
        _ => None,
    };
    if let Some(tls) = error.downcast_ref::<rustls::Error>() {
        return of(tls);
    }
    // `source` of an I/O error skips its inner error and returns that one's source. The inner error, often another I/O
    // error, is reached with `get_ref`.
    error
        .downcast_ref::<std::io::Error>()
        .and_then(std::io::Error::get_ref)
        .and_then(|inner| tls_failure(inner))
}

/// Returns the code as the registry wrote it.
fn code(code: &OciErrorCode) -> Option<String> {
    match serde_json::to_value(code) {
        Ok(serde_json::Value::String(code)) if !code.is_empty() => Some(code),
        _ => None,
    }
}

/// Returns a message without its repetition: Harbor writes some as `TEXT: TEXT`.
fn once(text: &str) -> &str {
    let half = text.len().checked_sub(2).map(|both| both / 2);
    match half.and_then(|half| text.split_at_checked(half)) {
        Some((first, rest)) if rest.strip_prefix(": ") == Some(first) => first,
        _ => text,
    }
}

/// Reads code and message from the body of an error answer (distribution-spec, "Error Codes"), bounded and escaped.
pub(super) fn read_error_body(body: &[u8]) -> (Option<String>, Option<String>) {
    let some = |text: String| (!text.is_empty()).then_some(text);
    if let Ok(envelope) = serde_json::from_slice::<OciEnvelope>(body) {
        return match envelope.errors.into_iter().next() {
            Some(first) => (
                code(&first.code).map(|code| crate::common::escape::limited(&code, 64)),
                some(crate::common::escape::limited(once(&first.message), 512)),
            ),
            None => (None, None),
        };
    }
    let text = String::from_utf8_lossy(body);
    // An HTML page of a proxy adds nothing to the status.
    if text.trim_start().starts_with('<') {
        return (None, None);
    }
    (None, some(crate::common::escape::limited(text.trim(), 200)))
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
    fn a_server_without_tls_is_final() {
        let url = "https://r.example/v2/".parse().unwrap();
        let request = || Request::new(&http::Method::GET, &url);
        let tls = rustls::Error::InvalidMessage(rustls::InvalidMessage::InvalidContentType);
        let error = Error::transport(request(), &std::io::Error::other(tls));
        assert!(matches!(error, Error::NoTls { .. }), "{error}");
        assert!(!error.retryable() && !error.is_transient());
        let broken = std::io::Error::from(std::io::ErrorKind::ConnectionReset);
        assert!(Error::transport(request(), &broken).is_transient());
    }

    #[test]
    fn a_repeated_message_is_shown_once() {
        for (text, shown) in [
            ("no: no", "no"),
            ("a: b: a: b", "a: b"),
            ("no: yes", "no: yes"),
            ("é: é", "é"),
            ("x", "x"),
            ("", ""),
            (": ", ""),
        ] {
            assert_eq!(once(text), shown, "{text:?}");
        }
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
        // A lost upload session is final for the request but not for the blob.
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
        // Codes of the specification and of a registry's own.
        for (code, message) in [
            ("TOOMANYREQUESTS", "slow down"),
            ("PROJECTPOLICYVIOLATION", ""),
        ] {
            let body = format!(r#"{{"errors":[{{"code":"{code}","message":"{message}"}}]}}"#);
            assert_eq!(
                read_error_body(body.as_bytes()),
                (
                    Some(code.into()),
                    (!message.is_empty()).then(|| message.into())
                )
            );
        }
        let own = br#"{"errors":[{"code":"NOT_FOUND"}]}"#;
        assert_eq!(read_error_body(own), (Some("NOT_FOUND".into()), None));
        assert_eq!(
            read_error_body(br#"{"errors":[{"message":"no code"}]}"#),
            (None, Some(r#"{"errors":[{"message":"no code"}]}"#.into()))
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
        assert_eq!(
            crate::common::escape::limited("a\u{202e}b", 9),
            "a\\u{202e}b"
        );
    }
}
