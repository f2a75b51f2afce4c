//! Content digests and the identities built from them: diff IDs and chain IDs.
//!
//! Format: image-spec `descriptor.md` (digests) and `config.md` (diff ID, chain ID).

use std::fmt;
use std::io::{self, Write};
use std::str::FromStr;

use sha2::{Digest as _, Sha256};

/// A SHA-256 content digest, written `sha256:<64 lower-case hex digits>`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Digest([u8; 32]);

/// A digest that cannot be parsed or is not supported.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum DigestError {
    /// The text is not `algorithm:hex`.
    #[error("{0:?} is not a digest: expected sha256:<64 hex digits>")]
    Malformed(String),
    /// The text is well-formed, but names an algorithm that this program does not compute.
    #[error("digest algorithm {0:?} is not supported, only sha256 is")]
    Algorithm(String),
}

impl Digest {
    /// Returns the digest of `bytes`.
    pub fn of(bytes: impl AsRef<[u8]>) -> Self {
        Self(Sha256::digest(bytes.as_ref()).into())
    }

    /// Returns the digest of everything that was fed to `hasher`.
    pub(crate) fn finish(hasher: Sha256) -> Self {
        Self(hasher.finalize().into())
    }

    /// Returns the 32 raw bytes.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// Returns the digest that these 32 bytes are.
    pub(crate) fn from_raw(raw: &[u8]) -> Option<Self> {
        Some(Self(raw.try_into().ok()?))
    }

    /// Returns the 64 hex digits without the algorithm.
    pub fn hex(&self) -> String {
        hex::encode(self.0)
    }

    /// Parses 64 lower-case hex digits without the algorithm, as containers/storage and Docker write some digests.
    pub fn from_hex(hex: &str) -> Result<Self, DigestError> {
        let mut raw = [0; 32];
        let lower = hex
            .bytes()
            .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
        if !lower || hex::decode_to_slice(hex, &mut raw).is_err() {
            return Err(DigestError::Malformed(hex.to_owned()));
        }
        Ok(Self(raw))
    }
}

impl FromStr for Digest {
    type Err = DigestError;

    fn from_str(text: &str) -> Result<Self, DigestError> {
        match text.split_once(':') {
            Some(("sha256", hex)) => {
                Self::from_hex(hex).map_err(|_| DigestError::Malformed(text.to_owned()))
            }
            Some((algorithm, hex)) if !algorithm.is_empty() && !hex.is_empty() => {
                Err(DigestError::Algorithm(algorithm.to_owned()))
            }
            _ => Err(DigestError::Malformed(text.to_owned())),
        }
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl serde::Serialize for Digest {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for Digest {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = std::borrow::Cow::<str>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// The digest of a layer's *uncompressed* tar, as listed in `rootfs.diff_ids` of an image config.
#[derive(
    Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, serde::Serialize, serde::Deserialize,
)]
#[serde(transparent)]
pub struct DiffId(pub Digest);

impl fmt::Display for DiffId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The identity of a *stack* of layers. Snapshotters key their directories by it.
#[derive(
    Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, serde::Serialize, serde::Deserialize,
)]
#[serde(transparent)]
pub struct ChainId(pub Digest);

impl fmt::Display for ChainId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl ChainId {
    /// Returns the chain ID of a single layer, which equals its diff ID.
    pub(crate) fn bottom(diff_id: DiffId) -> Self {
        Self(diff_id.0)
    }

    /// Returns the chain ID of this stack with `diff_id` on top.
    #[must_use]
    pub(crate) fn child(self, diff_id: DiffId) -> Self {
        Self(Digest::of(format!("{self} {diff_id}")))
    }

    /// Returns the chain ID of every prefix of a stack, given bottom first: one for each layer.
    pub fn chain(diff_ids: &[DiffId]) -> Vec<Self> {
        let mut chain: Vec<Self> = Vec::with_capacity(diff_ids.len());
        for &diff_id in diff_ids {
            chain.push(match chain.last() {
                Some(below) => below.child(diff_id),
                None => Self::bottom(diff_id),
            });
        }
        chain
    }
}

/// A writer that counts and hashes what is written through it. The digest exists only after
/// [`HashingWriter::complete`].
pub(crate) struct HashingWriter<W> {
    inner: W,
    hasher: Sha256,
    written: u64,
}

impl<W: Write> HashingWriter<W> {
    /// Wraps `inner`.
    pub(crate) fn new(inner: W) -> Self {
        Self {
            inner,
            hasher: Sha256::new(),
            written: 0,
        }
    }

    /// Consumes the writer and returns the inner writer, the digest and the number of bytes written.
    pub(crate) fn complete(self) -> (W, Digest, u64) {
        (self.inner, Digest::finish(self.hasher), self.written)
    }
}

impl<W: Write> Write for HashingWriter<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.inner.write(bytes)?;
        self.hasher.update(&bytes[..n]);
        self.written += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digest_reads_only_what_it_writes() {
        let digest = Digest::of("");
        let text = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(digest.to_string(), text);
        assert_eq!(text.parse(), Ok(digest));
        assert!(
            matches!("sha512:00".parse::<Digest>(), Err(DigestError::Algorithm(a)) if a == "sha512")
        );
        for bad in [
            "",
            "sha256",
            "sha256:",
            ":00",
            "sha256:E3B0",
            &text.to_uppercase(),
            &format!("{text}0"),
        ] {
            assert!(bad.parse::<Digest>().is_err(), "{bad}");
        }
    }

    #[test]
    fn chain_is_defined_by_the_image_spec() {
        let a = DiffId(Digest::of("a"));
        let b = DiffId(Digest::of("b"));
        let chain = ChainId::chain(&[a, b]);
        assert_eq!(chain[0].0, a.0);
        assert_eq!(chain[1].0, Digest::of(format!("{} {}", a.0, b.0)));
        assert!(ChainId::chain(&[]).is_empty());
    }

    #[test]
    fn hashing_writer_counts_only_what_was_taken() -> io::Result<()> {
        let mut writer = HashingWriter::new(Vec::new());
        writer.write_all(b"abc")?;
        let (inner, digest, written) = writer.complete();
        assert_eq!((inner.as_slice(), written), (b"abc".as_slice(), 3));
        assert_eq!(digest, Digest::of("abc"));
        Ok(())
    }
}
