//! Flags for e-mails about saves.

use std::path::PathBuf;

use clap::{Args, ValueHint};

use super::MAIL;
use crate::service::manager::SmtpServer;

/// Flags of a manager that say how e-mails are sent, and to whom.
#[derive(Debug, Args)]
pub(in crate::cli) struct Mail {
    /// SMTP server for e-mails about the ends of saves, to users who ask for them: smtp://[USER@]HOST[:PORT] with STARTTLS,
    /// smtps:// with TLS from the start, smtp://HOST?tls=none without [default: no e-mails]
    #[arg(long, value_name = "URL", value_hint = ValueHint::Url, requires = "smtp_from", help_heading = MAIL)]
    pub(in crate::cli) smtp_url: Option<SmtpServer>,
    /// Sender of the e-mails, e.g. 'upperdeck <save@example.org>'
    #[arg(long, value_name = "ADDRESS", value_parser = crate::service::manager::check_sender, help_heading = MAIL)]
    pub(in crate::cli) smtp_from: Option<String>,
    /// File with the password of USER (/dev/fd/N for a descriptor)
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, requires = "smtp_url", help_heading = MAIL)]
    pub(in crate::cli) smtp_password_file: Option<PathBuf>,
    /// File with certificates of CAs that may sign the server's, in addition to the machine's
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, requires = "smtp_url", help_heading = MAIL)]
    pub(in crate::cli) smtp_ca_file: Option<PathBuf>,
    /// TOML file with e-mail addresses of users: a table [addresses] with USER = "ADDRESS"
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, help_heading = MAIL)]
    pub(in crate::cli) addresses_file: Option<PathBuf>,
    /// Domain in which users without another address have one: USER@DOMAIN
    #[arg(long, value_name = "DOMAIN", help_heading = MAIL)]
    pub(in crate::cli) address_domain: Option<String>,
}
