//! Signatures of webhooks according to Standard Webhooks: HMAC-SHA256 over ID, timestamp and body.

use std::fmt;
use std::str::FromStr;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;
use zeroize::Zeroizing;

/// Beginning of a secret in text form.
const PREFIX: &str = "whsec_";
/// Permitted lengths of a secret in bytes.
const LENGTHS: std::ops::RangeInclusive<usize> = 24..=64;
/// Maximum number of secrets.
const MAX_SECRETS: usize = 4;
/// Label from which the secrets of users are derived.
const USER: &str = "upperdeck webhook of user";

type Key = Zeroizing<Vec<u8>>;

/// Secrets. Every message has a signature by each, so that receivers can change from one to the next.
#[derive(Clone, Default)]
pub struct Secrets(Vec<Key>);

impl fmt::Debug for Secrets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Secrets({})", self.0.len())
    }
}

impl FromStr for Secrets {
    type Err = String;

    /// Parses one secret per line: `whsec_` and base64 of 24 to 64 bytes. Errors do not include the text.
    fn from_str(text: &str) -> Result<Self, String> {
        let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
        let of = |line: &str| {
            let bytes = line
                .strip_prefix(PREFIX)
                .and_then(|text| BASE64_STANDARD.decode(text).ok())
                .map(Zeroizing::new);
            bytes.filter(|bytes| LENGTHS.contains(&bytes.len()))
        };
        let keys: Option<Vec<Key>> = lines.map(of).collect();
        match keys {
            Some(keys) if (1..=MAX_SECRETS).contains(&keys.len()) => Ok(Self(keys)),
            _ => Err(format!(
                "expected 1 to {MAX_SECRETS} lines of {PREFIX} and base64 of 24 to 64 bytes: \
                 echo \"{PREFIX}$(openssl rand -base64 32)\""
            )),
        }
    }
}

fn mac(key: &[u8], parts: &[&[u8]]) -> Key {
    // HMAC takes keys of any length.
    let Ok(mut mac) = Hmac::<Sha256>::new_from_slice(key) else {
        return Key::default();
    };
    for part in parts {
        mac.update(part);
    }
    Zeroizing::new(mac.finalize().into_bytes().to_vec())
}

impl Secrets {
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns the secrets of a user, which reveal nothing about those of others.
    fn of_user(&self, user: &str) -> Vec<Key> {
        let derived = |key: &Key| mac(key, &[USER.as_bytes(), b"\0", user.as_bytes()]);
        self.0.iter().map(derived).collect()
    }

    /// Returns the secret with which a user verifies messages to the receivers that the user names.
    pub(in crate::service::manager) fn user_text(&self, user: &str) -> Option<Zeroizing<String>> {
        let keys = self.of_user(user);
        let text = BASE64_STANDARD.encode(keys.first()?);
        Some(Zeroizing::new(format!("{PREFIX}{text}")))
    }

    /// Returns the value of `webhook-signature` for a message to a receiver of the site, or of `user`.
    pub(super) fn sign(&self, user: Option<&str>, id: &str, timestamp: i64, body: &[u8]) -> String {
        let keys = user.map_or_else(|| self.0.clone(), |user| self.of_user(user));
        let head = format!("{id}.{timestamp}.");
        let all: Vec<String> = keys
            .iter()
            .map(|key| {
                let made = mac(key, &[head.as_bytes(), body]);
                format!("v1,{}", BASE64_STANDARD.encode(&*made))
            })
            .collect();
        all.join(" ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signatures_are_those_of_the_specification() {
        // The example of the specification's libraries.
        let secrets: Secrets = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw".parse().unwrap();
        let id = "msg_p5jXN8AQM9LWM0D4loKWxJek";
        assert_eq!(
            secrets.sign(None, id, 1_614_265_330, b"{\"test\": 2432232314}"),
            "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
        );
    }

    #[test]
    fn each_user_has_a_secret_and_each_line_signs() {
        let one = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
        let both: Secrets = format!("whsec_{}\n{one}\n", BASE64_STANDARD.encode([7; 32]))
            .parse()
            .unwrap();
        let signed = both.sign(Some("alice"), "i", 1, b"x");
        assert_eq!(signed.split(' ').count(), 2);
        assert_ne!(signed, both.sign(Some("bob"), "i", 1, b"x"));
        assert_ne!(signed, both.sign(None, "i", 1, b"x"));
        let alice: Secrets = both.user_text("alice").unwrap().parse().unwrap();
        assert!(signed.contains(&alice.sign(None, "i", 1, b"x")));
        for wrong in [
            "",
            "whsec_",
            "whsec_eA==",
            "x",
            "MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
        ] {
            assert!(wrong.parse::<Secrets>().is_err(), "{wrong}");
        }
        assert!(!format!("{both:?}").contains("MfKQ"));
    }
}
