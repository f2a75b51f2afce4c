//! The cookie of the page: its name, its bounds, and what is in it.
//!
//! Browsers send a cookie to every port of a host. So it holds a value that means something here only, and with the key that
//! the page keeps for itself: pages and servers of other ports have the one or the other, never both.

use axum::http::{HeaderMap, header};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use sha2::{Digest as _, Sha256};

/// Characters of a value: 32 bytes of chance.
const LENGTH: usize = 43;
/// Values of one request that are looked at.
const MOST: usize = 4;

/// How the cookie is called, and where browsers send it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in super::super) struct Cookie {
    name: String,
    path: String,
    secure: bool,
}

impl Cookie {
    /// `public_url`: how browsers reach the page; `port`: where the manager listens, if it does on one.
    pub(in super::super) fn new(public_url: Option<&str>, port: Option<u16>) -> Self {
        let url = public_url.and_then(|url| reqwest::Url::parse(url).ok());
        let secure = url.as_ref().is_some_and(|url| url.scheme() == "https");
        let path = url.as_ref().map_or("/", |url| url.path());
        // Up to the page's own directory; what a cookie cannot hold is no path of ours.
        let path = path.rfind('/').map_or("/", |end| &path[..=end]);
        let path = if path.contains([';', ',']) { "/" } else { path };
        let port = match &url {
            Some(url) => url.port(),
            None => port,
        };
        let port = port.map(|port| format!("-{port}")).unwrap_or_default();
        // `__Host-` is for / only: below a prefix that would give the cookie to all that the host has.
        let prefix = match (secure, path) {
            (true, "/") => "__Host-",
            (true, _) => "__Secure-",
            (false, _) => "",
        };
        Self {
            name: format!("{prefix}upperdeck{port}"),
            path: path.to_owned(),
            secure,
        }
    }

    /// The values that a request has under our name, as far as they can be ones: other ports and paths of the host may
    /// have set more of them beside ours, and browsers do not say which is whose.
    pub(super) fn all_of<'a>(&self, headers: &'a HeaderMap) -> Vec<&'a str> {
        headers
            .get_all(header::COOKIE)
            .iter()
            .filter_map(|value| value.to_str().ok())
            .flat_map(|value| value.split(';'))
            .filter_map(|pair| pair.trim().strip_prefix(&self.name)?.strip_prefix('='))
            .filter(|value| {
                let plain = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'_';
                value.len() == LENGTH && value.bytes().all(plain)
            })
            .take(MOST)
            .collect()
    }

    /// `Set-Cookie` for a value that holds for so many seconds; 0 takes it away.
    pub(in super::super) fn set(&self, value: &str, seconds: i64) -> String {
        let secure = if self.secure { "; Secure" } else { "" };
        format!(
            "{}={value}; HttpOnly; SameSite=Strict; Path={}; Max-Age={seconds}{secure}",
            self.name, self.path
        )
    }
}

/// A value that is found by chance only.
pub(in super::super) fn secret() -> zeroize::Zeroizing<String> {
    zeroize::Zeroizing::new(URL_SAFE_NO_PAD.encode(rand::random::<[u8; 32]>()))
}

/// What the record has of a value.
pub(in super::super) fn digest(value: &str) -> String {
    hex::encode(Sha256::digest(value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_paths_follow_the_address() {
        for (url, port, start, end) in [
            (None, Some(8787), "upperdeck-8787=v;", "Path=/; Max-Age=9"),
            (None, None, "upperdeck=v;", "Path=/; Max-Age=9"),
            (
                Some("https://save.example.org/"),
                Some(8787),
                "__Host-upperdeck=v;",
                "Path=/; Max-Age=9; Secure",
            ),
            (
                Some("https://example.org:8443/save/"),
                None,
                "__Secure-upperdeck-8443=v;",
                "Path=/save/; Max-Age=9; Secure",
            ),
            (
                Some("http://example.org/save/x"),
                None,
                "upperdeck=v;",
                "Path=/save/; Max-Age=9",
            ),
        ] {
            let set = Cookie::new(url, port).set("v", 9);
            assert!(set.starts_with(start) && set.ends_with(end), "{set}");
            assert!(set.contains("; HttpOnly; SameSite=Strict; "), "{set}");
        }
    }

    #[test]
    fn only_values_of_ours_are_looked_at() {
        let cookie = Cookie::new(None, Some(1));
        let value = secret();
        let of = |text: String| {
            let mut headers = HeaderMap::new();
            headers.insert(header::COOKIE, text.parse().unwrap());
            cookie
                .all_of(&headers)
                .first()
                .map(|value| (*value).to_owned())
        };
        assert_eq!(
            of(format!("a=b; upperdeck-1={}", *value)).as_ref(),
            Some(&*value)
        );
        for text in [
            format!("upperdeck-2={}", *value),
            format!("upperdeck-1x={}", *value),
            "upperdeck-1=".to_owned(),
            format!("upperdeck-1={}x", *value),
            "upperdeck-1=token-alice".to_owned(),
        ] {
            assert_eq!(of(text.clone()), None, "{text}");
        }
    }
}
