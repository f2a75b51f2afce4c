//! Messages between managers and agents are signed: who can write to Redis can make nobody act.
//!
//! HMAC-SHA256 (RFC 2104) over the purpose, a zero byte and the body. The purpose keeps a report from being shown as an
//! order. Of several keys the first signs and all are accepted, so that keys can be rotated without a gap.

use hmac::{Hmac, KeyInit, Mac};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sha2::Sha256;
use zeroize::Zeroizing;

/// Shorter keys can be guessed.
const MIN_KEY: usize = 16;
/// What is larger is none of ours: an inventory of a thousand sessions is far smaller.
const MAX_BODY: usize = 16 << 20;

/// The keys that managers and agents share.
#[derive(Clone)]
pub struct Keys(Vec<Zeroizing<Vec<u8>>>);

/// A signed message, as it lies in the queue.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sealed {
    /// JSON.
    pub body: String,
    /// Lower-case hexadecimal.
    pub mac: String,
}

/// Why a message is not acted on, or keys cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SealError {
    /// Keys that are no keys.
    #[error("the key has {0} bytes; {MIN_KEY} are the least (openssl rand -hex 32 makes one)")]
    ShortKey(usize),
    /// None at all.
    #[error("there is no key")]
    NoKey,
    /// Not signed by any of them.
    #[error("a message for {0} is not signed with our keys")]
    Forged(&'static str),
    /// Signed, and not understood: another version's.
    #[error("a message for {purpose} cannot be read: {reason}")]
    Unreadable {
        /// What it was for.
        purpose: &'static str,
        /// What the parser says.
        reason: String,
    },
}

impl Keys {
    /// From text: one key a line, the first one signs; empty lines and lines with `#` in front do not count.
    pub fn parse(text: &str) -> Result<Self, SealError> {
        let keys: Vec<_> = text
            .lines()
            .map(str::trim)
            .filter(|line| !line.is_empty() && !line.starts_with('#'))
            .map(|line| Zeroizing::new(line.as_bytes().to_vec()))
            .collect();
        if let Some(short) = keys.iter().find(|key| key.len() < MIN_KEY) {
            return Err(SealError::ShortKey(short.len()));
        }
        if keys.is_empty() {
            return Err(SealError::NoKey);
        }
        Ok(Self(keys))
    }

    /// A new key that nobody else knows: for a manager and an agent in one process.
    pub fn random() -> Self {
        let key: [u8; 32] = rand::random();
        Self(vec![Zeroizing::new(key.to_vec())])
    }

    fn mac(key: &[u8], purpose: &str, body: &str) -> Hmac<Sha256> {
        // HMAC takes keys of any length.
        #[allow(
            clippy::expect_used,
            reason = "the error exists for fixed-length MACs only"
        )]
        let mut mac = Hmac::<Sha256>::new_from_slice(key).expect("any length");
        mac.update(purpose.as_bytes());
        mac.update(&[0]);
        mac.update(body.as_bytes());
        mac
    }

    /// Signs `message` for `purpose`.
    pub fn seal<T: Serialize>(
        &self,
        purpose: &'static str,
        message: &T,
    ) -> Result<Sealed, SealError> {
        let body = serde_json::to_string(message).map_err(|error| SealError::Unreadable {
            purpose,
            reason: error.to_string(),
        })?;
        let mac = Self::mac(&self.0[0], purpose, &body);
        let mac = hex::encode(mac.finalize().into_bytes());
        Ok(Sealed { body, mac })
    }

    /// The message, if one of the keys signed it for `purpose`.
    pub fn open<T: DeserializeOwned>(
        &self,
        purpose: &'static str,
        sealed: &Sealed,
    ) -> Result<T, SealError> {
        let given = hex::decode(&sealed.mac).unwrap_or_default();
        let genuine = sealed.body.len() <= MAX_BODY
            && self.0.iter().any(|key| {
                Self::mac(key, purpose, &sealed.body)
                    .verify_slice(&given)
                    .is_ok()
            });
        if !genuine {
            return Err(SealError::Forged(purpose));
        }
        serde_json::from_str(&sealed.body).map_err(|error| SealError::Unreadable {
            purpose,
            reason: error.to_string(),
        })
    }
}

impl std::fmt::Debug for Keys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Keys({})", self.0.len())
    }
}

#[cfg(test)]
mod tests {
    use super::{Keys, SealError, Sealed};

    const OLD: &str = "an old key of enough bytes";
    const NEW: &str = "# rotated\n\na new key of enough bytes\nan old key of enough bytes\n";

    #[test]
    fn only_what_our_keys_signed_for_this_purpose_is_opened() -> Result<(), SealError> {
        let (old, new) = (Keys::parse(OLD)?, Keys::parse(NEW)?);
        let sealed = old.seal("order", &7)?;
        assert_eq!(new.open::<u32>("order", &sealed)?, 7);
        assert_eq!(
            new.open::<u32>("report", &sealed),
            Err(SealError::Forged("report"))
        );
        assert_eq!(
            old.open::<u32>("order", &new.seal("order", &7)?),
            Err(SealError::Forged("order"))
        );
        let changed = Sealed {
            body: "8".to_owned(),
            ..sealed.clone()
        };
        assert_eq!(
            old.open::<u32>("order", &changed),
            Err(SealError::Forged("order"))
        );
        let cut = Sealed {
            mac: sealed.mac[..32].to_owned(),
            ..sealed
        };
        assert_eq!(
            old.open::<u32>("order", &cut),
            Err(SealError::Forged("order"))
        );
        Ok(())
    }

    #[test]
    fn a_short_key_and_no_key_are_refused() {
        assert_eq!(Keys::parse("abc").err(), Some(SealError::ShortKey(3)));
        assert_eq!(Keys::parse("# none\n").err(), Some(SealError::NoKey));
    }
}
