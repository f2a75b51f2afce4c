//! E-mails about the ends of saves, through the SMTP server that the administrator names. They go to addresses that the
//! administrator, an identity provider or a proxy states of a user, never to one that a request contains.

mod connection;
mod server;
mod text;

use std::time::Duration;

use lettre::message::Mailbox;
use lettre::message::header::{ContentType, HeaderName, HeaderValue};
use lettre::transport::smtp::Error as SmtpError;
use lettre::transport::smtp::authentication::Credentials;
use lettre::transport::smtp::client::{Certificate, Tls, TlsParameters};
use lettre::{Address, Message};
use zeroize::Zeroizing;

pub use self::server::{Encryption, SmtpServer};

use super::webhooks::Delivery;
use crate::service::record::{Notice, Receiver, ReceiverKind};

/// Time limit of establishing the connection.
const STEP: Duration = Duration::from_secs(10);
/// Time limit of one delivery. Notices are held for longer than that.
const TIMEOUT: Duration = Duration::from_secs(40);

/// Settings of e-mails.
#[derive(Clone, Debug)]
pub struct Mail {
    /// The server.
    pub server: SmtpServer,
    /// Sender of the e-mails.
    pub from: Mailbox,
    /// Password for the server.
    pub password: Option<Zeroizing<String>>,
    /// Certificates (PEM) of CAs that may sign the server's certificate, in addition to those of the machine.
    pub ca: Option<Vec<u8>>,
}

/// Why the settings of e-mails are invalid.
#[derive(Debug, thiserror::Error)]
pub enum MailError {
    /// The password would be sent in plain text, or there is a user without a password, or the reverse.
    #[error("{0}")]
    Credentials(&'static str),
    /// The certificates cannot be used.
    #[error("TLS: {0}")]
    Tls(#[from] SmtpError),
}

/// Sends e-mails.
pub(super) struct Mailer {
    server: SmtpServer,
    tls: Tls,
    credentials: Option<Credentials>,
    from: Mailbox,
    /// Address of the page, if it is known.
    page: Option<String>,
}

impl Mail {
    fn tls(&self) -> Result<Tls, MailError> {
        let server = &self.server;
        if server.encryption == Encryption::None {
            return Ok(Tls::None);
        }
        let mut parameters = TlsParameters::builder(server.host.clone());
        if let Some(ca) = &self.ca {
            parameters = parameters.add_root_certificate(Certificate::from_pem(ca)?);
        }
        let parameters = parameters.build()?;
        Ok(match server.encryption {
            Encryption::Tls => Tls::Wrapper(parameters),
            Encryption::StartTls | Encryption::None => Tls::Required(parameters),
        })
    }

    fn credentials(&self) -> Result<Option<Credentials>, MailError> {
        let wrong = |what| Err(MailError::Credentials(what));
        match (&self.server.user, &self.password) {
            (None, None) => Ok(None),
            (Some(_), Some(_)) if !self.server.keeps_secrets() => wrong(
                "a password is sent to this machine itself or over TLS only: take ?tls=none out of the URL",
            ),
            (Some(user), Some(password)) => Ok(Some(Credentials::new(
                user.clone(),
                password.as_str().to_owned(),
            ))),
            (Some(_), None) => wrong("the URL has a user, whose password is missing"),
            (None, Some(_)) => wrong("there is a password, but the URL has no user"),
        }
    }
}

impl Mailer {
    /// Prepares the client. `page` is the address of the page for links in the text.
    pub(super) fn new(settings: &Mail, page: Option<&str>) -> Result<Self, MailError> {
        Ok(Self {
            server: settings.server.clone(),
            tls: settings.tls()?,
            credentials: settings.credentials()?,
            from: settings.from.clone(),
            page: page.map(|page| page.trim_end_matches('/').to_owned()),
        })
    }

    /// Writes the e-mail of a notice.
    fn message(
        &self,
        notice: &Notice,
        language: crate::service::record::Language,
    ) -> Result<Message, String> {
        let to: Address = notice
            .address
            .parse()
            .map_err(|error| format!("the address is none: {error}"))?;
        // The same however often it is sent, so that servers and readers can tell a repetition.
        let id = format!("<{}@{}>", notice.id, self.from.email.domain());
        // Programs that answer automatically do not answer this (RFC 3834).
        let automatic = HeaderValue::new(
            HeaderName::new_from_ascii_str("Auto-Submitted"),
            "auto-generated".to_owned(),
        );
        Message::builder()
            .from(self.from.clone())
            .to(Mailbox::new(None, to))
            .subject(text::subject(notice, language))
            .message_id(Some(id))
            .date_now()
            .raw_header(automatic)
            .header(ContentType::TEXT_PLAIN)
            .body(text::body(notice, language, self.page.as_deref()))
            .map_err(|error| error.to_string())
    }

    /// Sends a notice once.
    pub(super) async fn send(&self, notice: &Notice) -> Delivery {
        let to = |receiver: &&Receiver| {
            receiver.kind == ReceiverKind::Email && receiver.address == notice.address
        };
        let receiver = notice.save.notify.iter().find(to);
        let language = receiver.map(|receiver| receiver.language);
        let message = match self.message(notice, language.unwrap_or_default()) {
            Ok(message) => message,
            Err(reason) => return Delivery::Refused(reason),
        };
        let content = message.formatted();
        let delivery = connection::deliver(
            (&self.server.host, self.server.port),
            &self.tls,
            self.credentials.as_ref(),
            (message.envelope(), &content),
            STEP,
        );
        match tokio::time::timeout(TIMEOUT, delivery).await {
            Ok(Ok(())) => Delivery::Done,
            Ok(Err(error)) => judged(&error),
            Err(_) => Delivery::Failed("the server took too long".to_owned(), None),
        }
    }
}

/// Judges an error: the server refuses this e-mail for good, or it may take it later.
fn judged(error: &SmtpError) -> Delivery {
    let reason = crate::common::escape::limited(&crate::common::message::of(error), 500);
    // The server's user or password, or TLS: the administrator can mend these meanwhile.
    let of_session = error
        .status()
        .is_some_and(|code| matches!(u16::from(code), 503 | 504 | 521 | 530 | 534 | 535 | 538));
    if error.is_permanent() && !of_session {
        Delivery::Refused(reason)
    } else {
        Delivery::Failed(reason, None)
    }
}
