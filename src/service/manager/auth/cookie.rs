//! The cookie of the page: its name, its scope and its value.
//!
//! Browsers send a cookie to all ports of a host. So its value is meaningful only to this manager, and only together
//! with the key that the page stores: pages and servers on other ports can obtain one of the two, never both.

use axum::http::{HeaderMap, header};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use sha2::{Digest as _, Sha256};

/// Length of a value in characters: 32 random bytes.
const LENGTH: usize = 43;
/// Maximum number of values in one request that are checked.
const MOST: usize = 4;

/// Name and scope of the cookie.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in super::super) struct Cookie {
    name: String,
    path: String,
    secure: bool,
    same_site: &'static str,
}

impl Cookie {
    /// `public_url` is the URL by which browsers reach the page, `port` the TCP port that the manager listens on, if
    /// any.
    pub(in super::super) fn new(public_url: Option<&str>, port: Option<u16>) -> Self {
        let url = public_url.and_then(|url| reqwest::Url::parse(url).ok());
        let secure = url.as_ref().is_some_and(|url| url.scheme() == "https");
        let path = url.as_ref().map_or("/", |url| url.path());
        // The scope is the page's own directory. A path with characters that a cookie cannot hold is replaced by `/`.
        let path = path.rfind('/').map_or("/", |end| &path[..=end]);
        let path = if path.contains([';', ',']) { "/" } else { path };
        let port = match &url {
            Some(url) => url.port(),
            None => port,
        };
        let port = port.map(|port| format!("-{port}")).unwrap_or_default();
        // `__Host-` requires the path `/`, which would extend the cookie of a page under a prefix to the whole host.
        let prefix = match (secure, path) {
            (true, "/") => "__Host-",
            (true, _) => "__Secure-",
            (false, _) => "",
        };
        Self {
            name: format!("{prefix}upperdeck{port}"),
            path: path.to_owned(),
            secure,
            same_site: "Strict",
        }
    }

    /// Returns the cookie that binds a sign-in in progress to the browser.
    pub(in super::super) fn of_sign_in(&self) -> Self {
        Self {
            name: format!("{}-signin", self.name),
            same_site: "Lax",
            ..self.clone()
        }
    }

    /// Returns the well-formed values with our name in a request. Other ports and paths of the host may have set
    /// further ones, and browsers do not tell where a cookie comes from.
    pub(in super::super) fn all_of<'a>(&self, headers: &'a HeaderMap) -> Vec<&'a str> {
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

    /// Returns the `Set-Cookie` header for a value that is valid for `seconds`; 0 deletes the cookie.
    pub(in super::super) fn set(&self, value: &str, seconds: i64) -> String {
        let secure = if self.secure { "; Secure" } else { "" };
        format!(
            "{}={value}; HttpOnly; SameSite={}; Path={}; Max-Age={seconds}{secure}",
            self.name, self.same_site, self.path
        )
    }
}

/// Returns a random value that cannot be guessed.
pub(in super::super) fn secret() -> zeroize::Zeroizing<String> {
    zeroize::Zeroizing::new(URL_SAFE_NO_PAD.encode(rand::random::<[u8; 32]>()))
}

/// Returns the digest of a value, as the record stores it.
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
