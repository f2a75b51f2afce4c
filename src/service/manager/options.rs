//! The configuration of a manager. Everything but the listen address and the image template has a default.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use reqwest::Url;

use super::auth::{Addresses, Groups, Jwt, Kubernetes, Oidc, Proxies, Tokens};
use super::cors::WebOrigin;
use super::mail::Mail;
use super::target::{AUTOSAVE_TAG, ENDED_TAG, Template};
use super::webhooks::Webhooks;
use crate::common::reference::check_tag;
use crate::service::connections::ConnectionLimits;
use crate::store::registry::Access;

/// Address on which a manager listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Listen {
    /// `IP:PORT`; port 0 selects any free port.
    Tcp(SocketAddr),
    /// `unix:PATH`, or a path with a slash: a socket file with mode 0660. A file that a dead manager left is replaced.
    Unix(PathBuf),
}

impl FromStr for Listen {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(path) = text.strip_prefix("unix:") {
            return Ok(Self::Unix(path.into()));
        }
        if text.contains('/') {
            return Ok(Self::Unix(text.into()));
        }
        text.parse().map(Self::Tcp).map_err(|_| {
            format!("{text:?} is no address to listen on: write IP:PORT, [IPV6]:PORT or unix:PATH")
        })
    }
}

/// Checks a template for the link that starts a session from an image: an http or https URL with `{reference}`.
pub fn check_start_url(text: &str) -> Result<String, String> {
    let web = text.starts_with("https://") || text.starts_with("http://");
    let plain = text.chars().all(|c| c.is_ascii_graphic());
    if web && plain && text.matches("{reference}").count() == 1 {
        return Ok(text.to_owned());
    }
    Err("expected an http or https URL with {reference}, e.g. https://hub.example.org/hub/spawn?image={reference}".to_owned())
}

/// Checks the URL of a webhook of the site.
pub fn check_webhook(text: &str) -> Result<Url, String> {
    let url = Url::parse(text).ok();
    let web = url.filter(|url| matches!(url.scheme(), "http" | "https") && url.has_host());
    web.filter(|url| url.username().is_empty() && url.password().is_none())
        .ok_or_else(|| "expected an http or https URL without a user name".to_owned())
}

/// Checks the sender of e-mails: an address, or a name with an address in angle brackets.
pub fn check_sender(text: &str) -> Result<String, String> {
    let sender = text.parse::<lettre::message::Mailbox>();
    let plain = text.is_ascii() && !text.chars().any(char::is_control);
    match sender {
        Ok(_) if plain => Ok(text.to_owned()),
        _ => Err(
            "expected an e-mail address in ASCII, e.g. 'upperdeck <save@example.org>'".to_owned(),
        ),
    }
}

/// Limit on the rate of a caller's requests.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rate {
    /// Sustained requests per second.
    pub per_second: f64,
    /// Maximum burst of requests after a pause.
    pub burst: f64,
}

/// Settings for `Save` resources.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Resources {
    /// The kubeconfig; `None`: the service account of the manager's pod.
    pub kubeconfig: Option<PathBuf>,
}

/// Checks a tag that is reserved: a tag, or with `*` at its end the beginning of tags. One that matches tags of the service
/// itself is refused, as is `*` alone, which would leave no tag for saves.
pub fn check_reserved_tag(text: &str) -> Result<String, String> {
    let start = text.strip_suffix('*');
    check_tag(start.unwrap_or(text)).map_err(|_| {
        "expected a tag, or the beginning of one and '*': 1 to 128 letters, digits and . _ -, the first none of . and -".to_owned()
    })?;
    let matches =
        |tag: &str| start.is_some_and(|start| start.starts_with(tag) || tag.starts_with(start));
    if matches(AUTOSAVE_TAG) || text.starts_with(AUTOSAVE_TAG) || matches(ENDED_TAG) {
        return Err(format!(
            "it would match the tags of autosaves ({AUTOSAVE_TAG}…) or of saves of sessions that ended ({ENDED_TAG}…)"
        ));
    }
    Ok(text.to_owned())
}

/// Shortest time between autosaves that an administrator can set.
pub const LEAST_AUTOSAVE: Duration = Duration::from_secs(1);
/// Longest time between autosaves.
pub const MOST_AUTOSAVE: Duration = Duration::from_secs(7 * 24 * 3600);

/// Autosaves, as the administrator sets them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AutosaveDefaults {
    /// Time from the end of a save to the next one, if something changed; `None`: there are none unless a user or a pod
    /// wants them.
    pub every: Option<Duration>,
    /// Number of the latest autosaves of a session that are kept, 1 to 100.
    pub keep: u32,
    /// The shortest such time; shorter ones are raised to it.
    pub least: Duration,
}

impl Default for AutosaveDefaults {
    fn default() -> Self {
        Self {
            every: None,
            keep: 12,
            least: Duration::from_secs(5 * 60),
        }
    }
}

/// Configuration of a manager.
#[derive(Clone, Debug)]
pub struct Options {
    /// Address on which it listens.
    pub listen: Listen,
    /// URL by which browsers reach the manager, e.g. `https://save.example.org/`. It determines the origin that
    /// requests of the page must have, the path of the cookie, and whether the cookie is restricted to TLS. `None`: the
    /// `Host` header over plain HTTP.
    pub public_url: Option<String>,
    /// URL at which a session is started from an image, with `{reference}`; see [`check_start_url`].
    pub start_url: Option<String>,
    /// Origins whose pages may call the API with a token.
    pub cors_origins: Vec<WebOrigin>,
    /// Whom requests tell about saves.
    pub webhooks: Webhooks,
    /// How e-mails about saves are sent; `None`: none are.
    pub mail: Option<Mail>,
    /// Template for the destination of images.
    pub target: Template,
    /// API tokens.
    pub tokens: Tokens,
    /// Authentication by JSON Web Tokens of an identity provider; `None` disables it.
    pub jwt: Option<Jwt>,
    /// Sign-in of browsers with an identity provider; `None` disables it.
    pub oidc: Option<Oidc>,
    /// Authentication and permissions by a Kubernetes cluster; `None` disables it.
    pub kubernetes: Option<Kubernetes>,
    /// Acting for `Save` resources of a Kubernetes cluster; `None` disables it.
    pub resources: Option<Resources>,
    /// Groups of users, in addition to those that the identity provider or the proxy states.
    pub groups: Groups,
    /// E-mail addresses of users, in addition to those that the identity provider or the proxy states.
    pub addresses: Addresses,
    /// Authentication by a header that a trusted proxy sets after it has authenticated the user; `None`: the header is
    /// ignored.
    pub proxies: Option<Proxies>,
    /// Maximum number of open saves (queued or running) of one user; 0 means no limit. The queue limits how many *run*
    /// at the same time, see [`crate::service::queue::Limits`].
    pub open_per_user: u32,
    /// Total number of attempts before a save stays failed.
    pub attempts: u32,
    /// Delay before the second attempt. It doubles with each further one, and each is shortened at random by up to a
    /// half.
    pub backoff: Duration,
    /// Maximum delay between attempts.
    pub backoff_most: Duration,
    /// Time limit of one attempt.
    pub timeout: Duration,
    /// Time since the last heartbeat after which a node counts as lost. The saves of its sessions then fail.
    pub node_lost: Duration,
    /// Time after which a queued save fails. Agents do not act on its order any more.
    pub order_expiry: Duration,
    /// How long ended saves stay in the history; `None` means forever.
    pub retention: Option<Duration>,
    /// How registries are accessed for listing, deletion and quotas. Agents push with their own credentials.
    pub access: Access,
    /// Tags that saves must not use, in addition to those that registries use themselves (`sha256-…`). A trailing `*`
    /// matches any text.
    pub reserved_tags: Vec<String>,
    /// Maximum size of a request body in bytes.
    pub body_bytes: usize,
    /// Rate limit per caller; `None` means no limit.
    pub rate: Option<Rate>,
    /// Limits on connections and requests in progress.
    pub connections: ConnectionLimits,
    /// Maximum number of saves that one user can request in 24 hours; 0 means no limit.
    pub saves_per_day: u32,
    /// Autosaves of sessions of which neither their users nor their pods say anything, and bounds.
    pub autosave: AutosaveDefaults,
    /// Interval at which the record is compared with the queue.
    pub reconcile_every: Duration,
    /// Interval at which changes by other managers are looked for while there are watchers.
    pub watch_every: Duration,
    /// Interval at which the credentials of event streams are checked again.
    pub recheck_every: Duration,
    /// How long requests in progress may take when the manager has to end.
    pub grace: Duration,
    /// Name of this manager in the queue and in the record; unique among managers. `None`: the host name with a random
    /// suffix.
    pub name: Option<String>,
}

impl Options {
    /// Returns the address of `path` for callers: below the public URL, if there is one.
    pub(super) fn at(&self, path: &str) -> String {
        let root = self.public_url.as_deref().unwrap_or_default();
        format!("{}/{path}", root.trim_end_matches('/'))
    }

    /// Returns the defaults. Without `tokens`, `jwt` or `proxies` all requests are unauthenticated.
    pub fn new(listen: Listen, target: Template) -> Self {
        Self {
            listen,
            public_url: None,
            start_url: None,
            cors_origins: Vec::new(),
            webhooks: Webhooks::default(),
            mail: None,
            target,
            tokens: Tokens::default(),
            jwt: None,
            oidc: None,
            kubernetes: None,
            resources: None,
            groups: Groups::default(),
            addresses: Addresses::default(),
            proxies: None,
            open_per_user: 100,
            attempts: 4,
            backoff: Duration::from_secs(10),
            backoff_most: Duration::from_secs(600),
            timeout: Duration::from_secs(4 * 3600),
            node_lost: Duration::from_secs(300),
            order_expiry: Duration::from_secs(24 * 3600),
            retention: Some(Duration::from_secs(365 * 24 * 3600)),
            access: Access::default(),
            reserved_tags: Vec::new(),
            body_bytes: 64 << 10,
            rate: Some(Rate {
                per_second: 50.0,
                burst: 500.0,
            }),
            connections: ConnectionLimits::default(),
            saves_per_day: 1000,
            autosave: AutosaveDefaults::default(),
            reconcile_every: Duration::from_secs(3),
            watch_every: Duration::from_secs(1),
            recheck_every: Duration::from_secs(60),
            grace: Duration::from_secs(20),
            name: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reserved_tags_are_tags_that_saves_could_have() {
        let longest = "a".repeat(128);
        for good in [
            "latest",
            "release-*",
            "v1.*",
            "_x",
            "au",
            "automatic",
            &longest,
        ] {
            assert_eq!(check_reserved_tag(good), Ok(good.to_owned()));
        }
        let too_long = "a".repeat(129);
        for bad in [
            "",
            "*",
            "a*b",
            "**",
            "a b",
            "-x",
            ".x*",
            "a/b",
            "a:b",
            "\u{e4}",
            "auto-",
            "auto-*",
            "auto*",
            "a*",
            "auto-2026*",
            "auto-x",
            &too_long,
        ] {
            assert!(check_reserved_tag(bad).is_err(), "{bad}");
        }
    }
}
