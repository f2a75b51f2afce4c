//! How a manager tells users and programs about saves: its settings for webhooks and e-mails.

use std::path::Path;

use super::callers::secret;
use crate::cli::args::service::Serve;
use crate::cli::exit::Usage;
use crate::cli::text;
use crate::service::manager;
use crate::service::manager::auth::Addresses;

fn wrong(flag: &str, file: &Path, reason: impl std::fmt::Display) -> Usage {
    Usage(format!("--{flag} {}: {reason}", text::path(file)))
}

/// Sets who is told about saves.
pub(super) fn apply(serve: &Serve, options: &mut manager::Options) -> Result<(), Usage> {
    options.webhooks = webhooks(serve)?;
    options.mail = mail(serve)?;
    options.addresses = addresses(serve)?;
    Ok(())
}

/// Returns the settings of webhooks.
fn webhooks(serve: &Serve) -> Result<manager::Webhooks, Usage> {
    let mut webhooks = manager::Webhooks {
        site: serve.webhook.clone(),
        user_origins: serve.notify_origin.clone(),
        user_networks: serve.notify_network.clone(),
        ..manager::Webhooks::default()
    };
    if let Some(file) = &serve.webhook_secret_file {
        let flag = "webhook-secret-file";
        let content = crate::cli::secret::keys(file).map_err(|error| wrong(flag, file, error))?;
        webhooks.secrets = content
            .parse()
            .map_err(|reason: String| wrong(flag, file, reason))?;
    }
    Ok(webhooks)
}

/// Returns the settings of e-mails; `None`: none are sent.
fn mail(serve: &Serve) -> Result<Option<manager::Mail>, Usage> {
    let mail = &serve.mail;
    let Some(server) = &mail.smtp_url else {
        return Ok(None);
    };
    let from = mail.smtp_from.as_deref().unwrap_or_default();
    let password = mail.smtp_password_file.as_deref();
    let ca = mail.smtp_ca_file.as_deref();
    let read = |file| std::fs::read(file).map_err(|error| wrong("smtp-ca-file", file, error));
    Ok(Some(manager::Mail {
        server: server.clone(),
        from: from
            .parse()
            .map_err(|error| Usage(format!("--smtp-from: {error}")))?,
        password: password
            .map(|file| secret("smtp-password-file", file))
            .transpose()?,
        ca: ca.map(read).transpose()?,
    }))
}

/// Reads the addresses of users.
fn addresses(serve: &Serve) -> Result<Addresses, Usage> {
    let flag = "addresses-file";
    let mut addresses = Addresses::default();
    if let Some(file) = &serve.mail.addresses_file {
        let content = std::fs::read_to_string(file).map_err(|error| wrong(flag, file, error))?;
        addresses = Addresses::parse(&content).map_err(|error| wrong(flag, file, error))?;
    }
    match &serve.mail.address_domain {
        Some(domain) => addresses
            .with_domain(domain)
            .map_err(|error| Usage(format!("--address-domain: {error}"))),
        None => Ok(addresses),
    }
}
