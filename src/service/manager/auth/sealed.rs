//! Encryption of a text with a browser's secret, so that the record alone does not reveal it.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use ring::aead::{Aad, CHACHA20_POLY1305, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use sha2::{Digest as _, Sha256};

/// Returns the key. A secret encrypts one text only, so the nonce can be constant.
fn key(secret: &str) -> Option<LessSafeKey> {
    let bytes = Sha256::new_with_prefix("upperdeck sealed\0")
        .chain_update(secret)
        .finalize();
    UnboundKey::new(&CHACHA20_POLY1305, &bytes)
        .ok()
        .map(LessSafeKey::new)
}

fn nonce() -> Nonce {
    Nonce::assume_unique_for_key([0; NONCE_LEN])
}

/// Encrypts `text` with a random secret that encrypts nothing else. Returns an empty text if that fails.
pub(in super::super) fn seal(secret: &str, text: &str) -> String {
    let mut bytes = text.as_bytes().to_vec();
    let sealed = key(secret).and_then(|key| {
        key.seal_in_place_append_tag(nonce(), Aad::empty(), &mut bytes)
            .ok()
    });
    sealed.map_or_else(String::new, |()| URL_SAFE_NO_PAD.encode(bytes))
}

/// Decrypts what [`seal`] has encrypted with the same secret.
pub(in super::super) fn open(secret: &str, sealed: &str) -> Option<String> {
    let mut bytes = URL_SAFE_NO_PAD.decode(sealed).ok()?;
    let text = key(secret)?
        .open_in_place(nonce(), Aad::empty(), &mut bytes)
        .ok()?;
    String::from_utf8(text.to_vec()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_secret_opens_what_it_sealed() {
        let sealed = seal("one", "a token");
        assert!(!sealed.is_empty() && !sealed.contains("token"));
        assert_eq!(open("one", &sealed).as_deref(), Some("a token"));
        for (secret, text) in [
            ("two", sealed.as_str()),
            ("one", ""),
            ("one", "AAAA"),
            ("one", "!"),
        ] {
            assert_eq!(open(secret, text), None, "{secret} {text}");
        }
        assert_eq!(open("one", &sealed[1..]), None);
    }
}
