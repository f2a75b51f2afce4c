//! Webhooks: signed HTTP requests about events of saves, to receivers of the site and to those that users name for their own
//! saves. Where users may have requests sent is limited, because a manager reaches what they do not.

mod guard;
mod sign;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use reqwest::{StatusCode, Url, header};

pub use self::sign::Secrets;

use self::guard::{GuardedResolver, Networks};
use super::api::SaveNotice;
use super::auth::Range;
use super::cors::WebOrigin;
use super::refusal::Refusal;
use crate::service::record::{Notice, Receiver, SaveEvent};
use crate::store::registry::http_client;

/// Maximum length of a URL that a user names.
const MAX_URL: usize = 2000;
/// Time limit of one delivery. Notices are held for longer than that.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Settings of webhooks.
#[derive(Clone, Debug)]
pub struct Webhooks {
    /// Receivers that are told about every save.
    pub site: Vec<Url>,
    /// Keys of signatures; without any, no webhook is sent.
    pub secrets: Secrets,
    /// Origins of the URLs that users may name for their saves; none: they may not.
    pub user_origins: Vec<WebOrigin>,
    /// Networks besides the public ones in which the hosts of those URLs may be.
    pub user_networks: Vec<Range>,
    /// Maximum number of deliveries of one notice.
    pub attempts: u32,
    /// Delay before the second delivery. It doubles with each further one, and each is shortened at random by up to a half.
    pub backoff: Duration,
    /// Maximum delay between deliveries.
    pub backoff_most: Duration,
    /// Time after the event at which a notice is given up.
    pub expiry: Duration,
}

impl Default for Webhooks {
    fn default() -> Self {
        Self {
            site: Vec::new(),
            secrets: Secrets::default(),
            user_origins: Vec::new(),
            user_networks: Vec::new(),
            attempts: 14,
            backoff: Duration::from_secs(5),
            backoff_most: Duration::from_secs(4 * 3600),
            expiry: Duration::from_secs(24 * 3600),
        }
    }
}

impl Webhooks {
    /// Returns the receivers of the site.
    pub(super) fn receivers(&self) -> Vec<Receiver> {
        let of = |url: &Url| Receiver::webhook(url.as_str(), &SaveEvent::ALL);
        self.site.iter().map(of).collect()
    }

    /// Returns the delay after this number of failed deliveries; `None` if the notice is given up.
    pub(super) fn pause(&self, tries: u32, age: Duration, chance: f64) -> Option<Duration> {
        if tries >= self.attempts || age >= self.expiry {
            return None;
        }
        let doubled = self
            .backoff
            .saturating_mul(1 << tries.saturating_sub(1).min(30));
        let pause = doubled.min(self.backoff_most);
        Some(pause.mul_f64(1.0 - chance.clamp(0.0, 1.0) / 2.0))
    }

    /// Returns the URL that a user names, if it is permitted.
    fn user_url(&self, text: &str) -> Result<Url, String> {
        let url = Url::parse(text).map_err(|error| format!("it is no URL: {error}"))?;
        if text.len() > MAX_URL {
            return Err(format!("it is longer than {MAX_URL} bytes"));
        }
        if !url.username().is_empty() || url.password().is_some() || url.fragment().is_some() {
            return Err("it has neither a user name, a password nor a fragment".to_owned());
        }
        let origin = url.origin().ascii_serialization();
        if !self
            .user_origins
            .iter()
            .any(|one| one.to_string() == origin)
        {
            return Err(format!(
                "the administrators of the service do not permit {origin}"
            ));
        }
        if self.networks().refuse(&url) {
            return Err("its address is not a public one".to_owned());
        }
        Ok(url)
    }

    fn networks(&self) -> Networks {
        Networks(self.user_networks.clone())
    }

    /// Returns the receiver that a request for a save names; without `events`, it is told about those that end a save.
    pub(super) fn receiver(
        &self,
        url: &str,
        events: Option<&[SaveEvent]>,
    ) -> Result<Receiver, Refusal> {
        if self.user_origins.is_empty() || self.secrets.is_empty() {
            return Err(Refusal::invalid(
                "notify",
                "the administrators of the service do not permit users to name receivers",
            ));
        }
        let url = self
            .user_url(url)
            .map_err(|reason| Refusal::invalid("notify.url", reason))?;
        let events = match events {
            None => SaveEvent::ENDS.as_slice(),
            Some(events) if events.is_empty() || events.len() > SaveEvent::ALL.len() => {
                return Err(Refusal::invalid("notify.events", "these are 1 to 5 events"));
            }
            Some(events) => events,
        };
        Ok(Receiver::webhook(url, events))
    }
}

/// Result of a delivery.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Delivery {
    /// The receiver has it.
    Done,
    /// It may succeed later, not before this time if the receiver has said one.
    Failed(String, Option<Duration>),
    /// It will not succeed.
    Refused(String),
}

/// Sends webhooks.
pub(super) struct Sender {
    settings: Webhooks,
    /// Clients of the site's receivers by URL.
    site: HashMap<String, reqwest::Client>,
    user: Option<reqwest::Client>,
}

impl Sender {
    pub(super) fn new(settings: Webhooks) -> Self {
        let built = |builder: reqwest::ClientBuilder| {
            let client = builder.timeout(TIMEOUT).pool_max_idle_per_host(1).build();
            client
                .inspect_err(|error| tracing::error!(error = %error, "webhooks cannot be sent"))
                .ok()
        };
        let site = settings.site.iter().filter_map(|url| {
            let client = built(http_client(url.host_str().unwrap_or_default()))?;
            Some((url.to_string(), client))
        });
        // Without a proxy, because a proxy would resolve the names. Every request connects anew, to a checked address.
        let guarded = || {
            let networks = settings.networks();
            let builder = http_client("localhost").no_proxy();
            built(builder.dns_resolver(Arc::new(GuardedResolver { networks })))
        };
        Self {
            site: site.collect(),
            user: (!settings.user_origins.is_empty()).then(guarded).flatten(),
            settings,
        }
    }

    /// Sends a notice once.
    pub(super) async fn send(&self, notice: &Notice, message: &SaveNotice) -> Delivery {
        let (client, url) = if notice.site {
            (
                self.site.get(&notice.address),
                Url::parse(&notice.address).map_err(|e| e.to_string()),
            )
        } else {
            (self.user.as_ref(), self.settings.user_url(&notice.address))
        };
        let (client, url) = match (client, url) {
            (Some(client), Ok(url)) => (client, url),
            (_, Err(reason)) => return Delivery::Refused(reason),
            (None, _) => return Delivery::Refused("it is no receiver any more".to_owned()),
        };
        let of_user = (!notice.site).then_some(notice.save.user.as_str());
        let body = serde_json::to_vec(message).unwrap_or_default();
        let now = Timestamp::now().as_second();
        let signature = self.settings.secrets.sign(of_user, &notice.id, now, &body);
        let sent = client
            .post(url)
            .header(header::CONTENT_TYPE, "application/json")
            .header("webhook-id", &notice.id)
            .header("webhook-timestamp", now)
            .header("webhook-signature", signature)
            .body(body)
            .send()
            .await;
        match sent {
            Ok(answer) => judged(&answer),
            // The message contains the URL, which may contain a secret of the user.
            Err(error) => Delivery::Failed(crate::common::message::of(&error.without_url()), None),
        }
    }
}

/// Judges a response by its head; its body is not read.
fn judged(answer: &reqwest::Response) -> Delivery {
    let status = answer.status();
    if status.is_success() {
        return Delivery::Done;
    }
    if status == StatusCode::GONE {
        return Delivery::Refused(status.to_string());
    }
    let seconds = answer.headers().get(header::RETRY_AFTER);
    let seconds = seconds.and_then(|value| value.to_str().ok()?.parse().ok());
    Delivery::Failed(status.to_string(), seconds.map(Duration::from_secs))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings() -> Webhooks {
        Webhooks {
            secrets: "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw".parse().unwrap(),
            user_origins: vec![
                "https://hooks.example".parse().unwrap(),
                "http://127.0.0.1:9000".parse().unwrap(),
                "https://10.0.0.1".parse().unwrap(),
            ],
            user_networks: vec!["10.0.0.0/8".parse().unwrap()],
            ..Webhooks::default()
        }
    }

    #[test]
    fn users_name_only_what_is_permitted() {
        for text in ["https://hooks.example/a?b=c", "https://10.0.0.1/"] {
            assert!(settings().user_url(text).is_ok(), "{text}");
        }
        for text in [
            "http://hooks.example/",
            "https://hooks.example:444/",
            "https://hooks.example.evil.example/",
            "https://evil.example/https://hooks.example/",
            "https://hooks.example@evil.example/",
            "https://u:p@hooks.example/",
            "https://hooks.example/#x",
            "http://127.0.0.1:9000/",
            "file:///etc/passwd",
            "x",
            "",
        ] {
            assert!(settings().user_url(text).is_err(), "{text}");
        }
        let long = format!("https://hooks.example/{}", "x".repeat(MAX_URL));
        assert!(settings().user_url(&long).is_err());
        let asked = "https://hooks.example/";
        assert!(settings().receiver(asked, None).is_ok());
        assert!(Webhooks::default().receiver(asked, None).is_err());
    }

    #[test]
    fn deliveries_pause_longer_each_time_and_end() {
        let of = settings();
        let young = Duration::ZERO;
        assert_eq!(of.pause(1, young, 0.0), Some(Duration::from_secs(5)));
        assert_eq!(of.pause(2, young, 0.0), Some(Duration::from_secs(10)));
        assert_eq!(of.pause(2, young, 1.0), Some(Duration::from_secs(5)));
        assert_eq!(of.pause(13, young, 0.0), Some(of.backoff_most));
        assert_eq!(of.pause(14, young, 0.0), None);
        assert_eq!(of.pause(1, of.expiry, 0.0), None);
    }
}
