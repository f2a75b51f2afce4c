//! Challenges and tokens: parses what a registry and its token service answer, and decides where credentials may be
//! sent.
//!
//! Format: RFC 9110 section 11 (challenges); distribution's "Token Authentication Specification" and its OAuth2 form.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::{Duration, Instant};

use reqwest::Url;
use serde_json::Value;

use super::credentials::Secret;

/// A token younger than this cannot have expired, so a 401 for it means that the request is not permitted.
const FRESH_TOKEN_AGE: Duration = Duration::from_secs(5);
/// Lifetime that the token specification gives to a token without `expires_in`.
const DEFAULT_LIFETIME: Duration = Duration::from_secs(60);
/// Upper bound on the lifetime of a token. No token service issues longer ones on purpose.
const MAX_LIFETIME: Duration = Duration::from_secs(24 * 3600);
/// Upper bound on the margin by which tokens are renewed before they expire, which is otherwise a quarter of their
/// lifetime. A token has to be still valid when a request that was queued with it is processed.
const MAX_RENEWAL_MARGIN: Duration = Duration::from_secs(120);

/// The kind of authentication that a registry requires.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Challenge {
    /// User and password with each request.
    Basic,
    /// A token from the registry's token service.
    Bearer {
        /// URL of the token service, as the registry wrote it.
        realm: String,
        /// Name by which the token service knows the registry.
        service: Option<String>,
    },
}

/// Selects the challenge to follow from the `WWW-Authenticate` headers of an answer. Bearer is preferred, because a
/// password costs the registry a key derivation for each request.
pub(super) fn read_challenge<'a>(headers: impl Iterator<Item = &'a str>) -> Option<Challenge> {
    let mut basic = false;
    for header in headers {
        for (scheme, parameters) in parse_challenges(header) {
            let value = |name: &str| {
                parameters
                    .iter()
                    .find(|(n, _)| n.eq_ignore_ascii_case(name))
                    .map(|(_, v)| v.clone())
            };
            if scheme.eq_ignore_ascii_case("bearer")
                && let Some(realm) = value("realm")
            {
                return Some(Challenge::Bearer {
                    realm,
                    service: value("service"),
                });
            }
            basic |= scheme.eq_ignore_ascii_case("basic");
        }
    }
    basic.then_some(Challenge::Basic)
}

type Parsed = (String, Vec<(String, String)>);

/// Parses `scheme name=value, name="value", scheme2 ...`. A word before `=` is a parameter, any other word starts a
/// challenge.
fn parse_challenges(header: &str) -> Vec<Parsed> {
    let mut found: Vec<Parsed> = Vec::new();
    let mut rest = header;
    loop {
        rest = rest.trim_start_matches([' ', '\t', ',']);
        let end = rest.find([' ', '\t', ',', '=', '"']).unwrap_or(rest.len());
        if end == 0 {
            return found;
        }
        let (word, after) = rest.split_at(end);
        let after_space = after.trim_start_matches([' ', '\t']);
        let Some(value) = after_space.strip_prefix('=') else {
            found.push((word.to_owned(), Vec::new()));
            rest = after;
            continue;
        };
        let (value, after) = parse_value(value.trim_start_matches([' ', '\t']));
        if let Some((_, parameters)) = found.last_mut() {
            parameters.push((word.to_owned(), value));
        }
        rest = after;
    }
}

fn parse_value(text: &str) -> (String, &str) {
    let Some(quoted) = text.strip_prefix('"') else {
        let end = text.find([' ', '\t', ',']).unwrap_or(text.len());
        return (text[..end].to_owned(), &text[end..]);
    };
    let mut value = String::new();
    let mut chars = quoted.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return (value, &quoted[at + 1..]),
            '\\' => value.extend(chars.next().map(|(_, escaped)| escaped)),
            c => value.push(c),
        }
    }
    (value, "")
}

/// A token and its lifetime.
pub(super) struct Token {
    pub(super) value: Secret,
    fetched: Instant,
    life: Duration,
}

impl Token {
    /// Parses the answer of a token service: `token` or `access_token`, either of which may be empty (Harbor), and
    /// `expires_in` in seconds. `fetched` is the time of the request.
    pub(super) fn read(body: &[u8], fetched: Instant) -> Result<Self, &'static str> {
        let document: Value =
            serde_json::from_slice(body).map_err(|_| "the token service's answer is not JSON")?;
        let text = |name: &str| {
            document
                .get(name)
                .and_then(Value::as_str)
                .filter(|t| !t.is_empty())
        };
        let value = text("token")
            .or_else(|| text("access_token"))
            .ok_or("the token service's answer has no token")?;
        let seconds = document
            .get("expires_in")
            .and_then(Value::as_f64)
            .filter(|&s| s >= 1.0);
        let life = seconds
            .map_or(DEFAULT_LIFETIME, |s| Duration::from_secs(s.min(1e9) as u64))
            .min(MAX_LIFETIME);
        Ok(Self {
            value: Secret::new(value.to_owned()),
            fetched,
            life,
        })
    }

    /// Returns whether the token is due for renewal.
    pub(super) fn needs_renewal(&self, now: Instant) -> bool {
        let margin = (self.life / 4).min(MAX_RENEWAL_MARGIN);
        now.saturating_duration_since(self.fetched) >= self.life.saturating_sub(margin)
    }

    /// Returns the time of the token's request and its lifetime.
    pub(super) fn age(&self) -> TokenAge {
        TokenAge {
            fetched: self.fetched,
            life: self.life,
        }
    }
}

/// The age of a token that was sent with a request, evaluated when the answer arrives.
#[derive(Clone, Copy, Debug)]
pub(super) struct TokenAge {
    fetched: Instant,
    life: Duration,
}

impl TokenAge {
    /// Returns whether the token is too young for a 401 to be caused by its expiry.
    pub(super) fn is_fresh(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.fetched) < FRESH_TOKEN_AGE.min(self.life / 4)
    }

    /// Returns whether the token has expired.
    pub(super) fn is_expired(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.fetched) >= self.life
    }
}

/// Where a registry was reached, as far as trust depends on it.
#[derive(Clone, Debug)]
pub(super) struct Origin {
    /// Scheme, host and port.
    pub(super) url: Url,
    /// Whether the connection used TLS with a verified certificate.
    pub(super) verified: bool,
    /// Whether the user named a loopback host.
    pub(super) loopback: bool,
}

impl Origin {
    /// Returns whether `url` has the same scheme, host and port.
    pub(super) fn is_same(&self, url: &Url) -> bool {
        self.url.origin() == url.origin()
    }

    fn same_host(&self, url: &Url) -> bool {
        self.url.host_str().is_some() && self.url.host_str() == url.host_str()
    }

    /// Decides whether a URL that the registry returned (realm, redirect) may be requested at all.
    ///
    /// Answers of a registry are untrusted input, and this program may reach hosts that the registry cannot. Therefore
    /// no URL may lead from a remote registry to this machine or to link-local addresses (where cloud metadata services
    /// are), and none from TLS to plain HTTP.
    pub(super) fn check_url(&self, url: &Url) -> Result<(), &'static str> {
        match url.scheme() {
            "https" => {}
            "http" if self.url.scheme() == "http" => {}
            "http" => return Err("it leaves TLS"),
            _ => return Err("it is not an http address"),
        }
        if !url.username().is_empty() || url.password().is_some() {
            return Err("it carries a user name");
        }
        if !self.same_host(url) && !self.loopback && url.host_str().is_none_or(is_local_name) {
            return Err("a registry on another machine may not send us to this one or to its link");
        }
        Ok(())
    }

    /// Decides whether the user's credentials for this registry may be sent to a token service at `url`.
    ///
    /// They may if the token service is on the registry's host. They may be sent to another host only if the registry
    /// named it over TLS with a verified certificate, so that no third party can have inserted it, and it is reached by
    /// TLS as well; Docker Hub and GitLab need this. Between ports and names of the loopback host they may always be
    /// sent.
    pub(super) fn check_credentials_url(&self, url: &Url) -> Result<(), &'static str> {
        self.check_url(url)?;
        let both_here = self.loopback && url.host_str().is_some_and(is_local_name);
        if self.same_host(url) || both_here || (self.verified && url.scheme() == "https") {
            Ok(())
        } else {
            Err(
                "credentials go to a token service on another host only when the registry names it over TLS with a \
                 certificate that is checked: use https and --cert-dir",
            )
        }
    }
}

/// Returns whether the host of a URL is this machine or a link-local address, by name or as an address literal.
fn is_local_name(host: &str) -> bool {
    let name = host.trim_end_matches('.').to_ascii_lowercase();
    if name == "localhost" || name.ends_with(".localhost") {
        return true;
    }
    name.trim_start_matches('[')
        .trim_end_matches(']')
        .parse()
        .is_ok_and(is_local_address)
}

/// Returns whether an address is loopback, link-local (169.254.0.0/16, fe80::/10) or unspecified, including IPv4
/// addresses embedded in IPv6.
pub(super) fn is_local_address(address: IpAddr) -> bool {
    let v4 = |a: Ipv4Addr| a.is_loopback() || a.is_link_local() || a.octets()[0] == 0;
    let v6 =
        |a: Ipv6Addr| a.is_loopback() || a.is_unspecified() || (a.segments()[0] & 0xffc0) == 0xfe80;
    match address {
        IpAddr::V4(a) => v4(a),
        IpAddr::V6(a) => v6(a) || a.to_ipv4().is_some_and(v4),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bearer(realm: &str, service: Option<&str>) -> Challenge {
        Challenge::Bearer {
            realm: realm.into(),
            service: service.map(Into::into),
        }
    }

    #[test]
    fn challenges() {
        let of = |headers: &[&'static str]| read_challenge(headers.iter().copied());
        assert_eq!(
            of(&[
                r#"Bearer realm="https://a/t",service="s",scope="repository:x:pull,push",error="invalid_token""#
            ]),
            Some(bearer("https://a/t", Some("s")))
        );
        assert_eq!(
            of(&[r"bearer REALM=https://a/t"]),
            Some(bearer("https://a/t", None))
        );
        assert_eq!(
            of(&[r#"Basic realm="x", Bearer realm="https://a/t" , service = "a \"b\", c""#]),
            Some(bearer("https://a/t", Some("a \"b\", c")))
        );
        assert_eq!(
            of(&["Basic realm=\"r\"", "Bearer realm=\"https://a\""]),
            Some(bearer("https://a", None))
        );
        assert_eq!(of(&["Basic"]), Some(Challenge::Basic));
        assert_eq!(
            of(&["Negotiate abc==, Basic realm=x"]),
            Some(Challenge::Basic)
        );
        // Harbor sends an empty header for a project that does not exist.
        for none in [
            "",
            ",",
            "=",
            "\"",
            "Bearer",
            "Bearer service=\"x\"",
            "Digest realm=x",
            "Bearer realm",
            "= = =",
        ] {
            assert_eq!(of(&[none]), None, "{none}");
        }
        assert_eq!(
            of(&["Bearer realm=\"unterminated"]),
            Some(bearer("unterminated", None))
        );
    }

    #[test]
    fn tokens() {
        let now = Instant::now();
        let read = |body: &str| Token::read(body.as_bytes(), now);
        let harbor = read(r#"{"token":"t","access_token":"","expires_in":1800}"#)
            .unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(harbor.value.expose(), "t");
        let at = |seconds| now + Duration::from_secs(seconds);
        assert!(!harbor.needs_renewal(at(1679)) && harbor.needs_renewal(at(1680)));
        assert!(harbor.age().is_fresh(at(4)) && !harbor.age().is_fresh(at(5)));
        assert!(!harbor.age().is_expired(at(1799)) && harbor.age().is_expired(at(1800)));
        let short = read(r#"{"token":"t","expires_in":2}"#).unwrap_or_else(|e| panic!("{e}"));
        assert!(!short.age().is_fresh(at(1)), "it may have ended on the way");
        let oauth = read(r#"{"token":"","access_token":"a"}"#).unwrap_or_else(|e| panic!("{e}"));
        assert_eq!(oauth.value.expose(), "a");
        assert!(
            !oauth.needs_renewal(at(44)) && oauth.needs_renewal(at(45)),
            "60 s without expires_in"
        );
        for (odd, life) in [
            ("-5", 60),
            ("0", 60),
            ("\"x\"", 60),
            ("1e300", 24 * 3600),
            ("2.5", 2),
        ] {
            let token = read(&format!(r#"{{"token":"t","expires_in":{odd}}}"#))
                .unwrap_or_else(|e| panic!("{e}"));
            assert_eq!(token.life.as_secs(), life, "{odd}");
        }
        for bad in ["", "{}", "[]", r#"{"token":""}"#, r#"{"token":3}"#] {
            assert!(read(bad).is_err(), "{bad}");
        }
    }

    fn origin(url: &str, verified: bool) -> Origin {
        let url: Url = url.parse().unwrap();
        let loopback = crate::common::reference::is_loopback(url.host_str().unwrap());
        Origin {
            url,
            verified,
            loopback,
        }
    }

    #[test]
    fn where_a_registry_may_lead() {
        for (from, verified, to, visit, confide) in [
            (
                "https://r.example",
                true,
                "https://r.example/token",
                true,
                true,
            ),
            (
                "https://r.example",
                true,
                "https://auth.example/token",
                true,
                true,
            ),
            (
                "https://r.example",
                true,
                "http://r.example/token",
                false,
                false,
            ),
            (
                "https://r.example",
                false,
                "https://r.example:8443/token",
                true,
                true,
            ),
            // The certificate of the registry that named this host was not verified.
            (
                "https://r.example",
                false,
                "https://auth.example/token",
                true,
                false,
            ),
            (
                "http://r.example",
                false,
                "http://r.example/token",
                true,
                true,
            ),
            (
                "http://r.example",
                false,
                "http://evil.example/token",
                true,
                false,
            ),
            (
                "http://r.example",
                false,
                "https://evil.example/token",
                true,
                false,
            ),
            (
                "https://r.example",
                true,
                "https://127.0.0.1/token",
                false,
                false,
            ),
            (
                "https://r.example",
                true,
                "https://127.1/token",
                false,
                false,
            ),
            (
                "https://r.example",
                true,
                "https://2130706433/token",
                false,
                false,
            ),
            (
                "https://r.example",
                true,
                "https://localhost:8080/token",
                false,
                false,
            ),
            (
                "https://r.example",
                true,
                "https://LOCALHOST./token",
                false,
                false,
            ),
            (
                "https://r.example",
                true,
                "https://[::1]/token",
                false,
                false,
            ),
            (
                "https://r.example",
                true,
                "https://[::ffff:127.0.0.1]/token",
                false,
                false,
            ),
            (
                "https://r.example",
                true,
                "https://0.0.0.0/token",
                false,
                false,
            ),
            (
                "http://r.example",
                false,
                "http://169.254.169.254/latest/meta-data",
                false,
                false,
            ),
            (
                "https://r.example",
                true,
                "https://[fe80::1]/token",
                false,
                false,
            ),
            (
                "https://r.example",
                true,
                "ftp://r.example/token",
                false,
                false,
            ),
            (
                "https://r.example",
                true,
                "file:///etc/shadow",
                false,
                false,
            ),
            (
                "https://r.example",
                true,
                "https://u:p@r.example/token",
                false,
                false,
            ),
            (
                "https://r.example",
                true,
                "https://10.0.0.1/token",
                true,
                true,
            ),
            (
                "http://127.0.0.1:5000",
                false,
                "http://127.0.0.1:5001/token",
                true,
                true,
            ),
            (
                "http://localhost:5000",
                false,
                "http://127.0.0.1:5001/token",
                true,
                true,
            ),
            (
                "http://localhost:5000",
                false,
                "http://evil.example/token",
                true,
                false,
            ),
        ] {
            let (from_, to_) = (origin(from, verified), to.parse().unwrap());
            assert_eq!(
                (
                    from_.check_url(&to_).is_ok(),
                    from_.check_credentials_url(&to_).is_ok()
                ),
                (visit, confide),
                "{from} -> {to}"
            );
        }
    }
}
