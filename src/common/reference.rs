//! Parses names of images in registries. They are checked against the grammar before any of them becomes part of a URL.
//!
//! The grammar is that of [`oci_client::Reference`]; this module adds what it lacks (IPv6 addresses) or allows (host names
//! that are none, tags beyond ASCII, other digests than SHA-256, the missing tag as `latest`).

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::str::FromStr;

use super::digest::{Digest, DigestError};

/// A host for names that are parsed without theirs; it cannot exist (RFC 2606).
const STAND_IN: &str = "host.invalid";

/// Docker Hub's name in references. Its API has another host name, see [`authority`].
pub(crate) const DOCKER_HUB: &str = "docker.io";

/// `HOST[:PORT]/REPOSITORY[:TAG][@DIGEST]`.
///
/// Grammar: distribution-spec (`<name>` and `<reference>` of "Pulling manifests") for repository and tag; the host is
/// a DNS name, an IPv4 address or a bracketed IPv6 address.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Reference {
    /// `HOST[:PORT]`, lower case.
    pub host: String,
    /// Repository within the host, at most 255 bytes.
    pub repository: String,
    /// Tag as written, or `None` if there was none.
    pub tag: Option<String>,
    /// Digest as written, or `None` if there was none.
    pub digest: Option<Digest>,
}

/// A text that is not an image reference.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ReferenceError {
    /// There is no registry host before the first slash.
    #[error(
        "{0:?} names no registry: write HOST[:PORT]/REPOSITORY[:TAG], for Docker Hub docker.io/USER/NAME"
    )]
    NoHost(String),
    /// The host is invalid.
    #[error("{0:?} is not a registry's HOST[:PORT]")]
    Host(String),
    /// The repository violates the grammar.
    #[error(
        "{0:?} is not a repository name: lower-case letters, digits and single . _ - between them, parts separated by /, \
         255 bytes at most"
    )]
    Repository(String),
    /// The tag violates the grammar.
    #[error("{0:?} is not a tag: letters, digits, _ . - (not first), 128 bytes at most")]
    Tag(String),
    /// The digest is malformed or uses an unsupported algorithm.
    #[error(transparent)]
    Digest(#[from] DigestError),
}

impl Reference {
    /// Parses a reference as runtimes and `--base` write it, where Docker Hub may be omitted: `debian:12` is
    /// `docker.io/library/debian:12`.
    pub fn parse_with_default_host(text: &str) -> Result<Self, ReferenceError> {
        let text = text.strip_prefix("docker://").unwrap_or(text);
        match text.split_once('/') {
            Some((host, _)) if looks_like_host(host) => text.parse(),
            _ => format!("{DOCKER_HUB}/{text}").parse(),
        }
    }

    /// Returns `HOST/REPOSITORY`.
    pub(crate) fn name(&self) -> String {
        format!("{}/{}", self.host, self.repository)
    }
}

/// Returns whether the part before the first slash is a host, by the rule that all container tools share.
fn looks_like_host(text: &str) -> bool {
    text == "localhost" || text.contains(['.', ':'])
}

impl FromStr for Reference {
    type Err = ReferenceError;

    /// Parses `[docker://]HOST[:PORT]/REPOSITORY[:TAG][@DIGEST]`. The host is required.
    fn from_str(text: &str) -> Result<Self, ReferenceError> {
        let rest = text.strip_prefix("docker://").unwrap_or(text);
        let (host, path) = match rest.split_once('/') {
            Some((host, path)) if looks_like_host(host) => (check_host(host)?, path),
            _ => return Err(ReferenceError::NoHost(shorten(text))),
        };
        let (host, domain) = match host.as_str() {
            "registry-1.docker.io" => (DOCKER_HUB, DOCKER_HUB),
            // The grammar of the library has no IPv6 addresses.
            address if address.starts_with('[') => (address, STAND_IN),
            name => (name, name),
        };
        let parsed: oci_client::Reference = format!("{domain}/{path}")
            .parse()
            .map_err(|_| reason(path))?;
        let host = if domain == STAND_IN {
            host
        } else {
            parsed.registry()
        };
        // The library adds the tag `latest` where there is neither tag nor digest.
        let tag = parsed
            .tag()
            .filter(|tag| parsed.digest().is_some() || path.ends_with(&format!(":{tag}")));
        Ok(Self {
            host: host.to_owned(),
            repository: parsed.repository().to_owned(),
            tag: tag.map(check_tag).transpose()?.map(str::to_owned),
            digest: parsed.digest().map(str::parse).transpose()?,
        })
    }
}

/// Returns which part of `REPOSITORY[:TAG][@DIGEST]` violates the grammar; the library does not say.
fn reason(path: &str) -> ReferenceError {
    let (name, digest) = match path.split_once('@') {
        Some((name, digest)) => (name, digest.parse::<Digest>().err()),
        None => (path, None),
    };
    let tag = name
        .rsplit_once(':')
        .and_then(|(_, tag)| check_tag(tag).err());
    digest
        .map(ReferenceError::Digest)
        .or(tag)
        .unwrap_or_else(|| ReferenceError::Repository(shorten(path)))
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.host, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

/// Returns the `HOST[:PORT]` of a host's API. It differs from `host` only for Docker Hub.
pub(crate) fn authority(host: &str) -> &str {
    if host == DOCKER_HUB {
        "registry-1.docker.io"
    } else {
        host
    }
}

/// Returns whether `host` (with or without a port) is this machine by definition: `localhost`, 127.0.0.0/8, `[::1]`.
/// Names that merely resolve to such an address do not count, because their DNS records may be controlled by others.
pub(crate) fn is_loopback(host: &str) -> bool {
    let name = without_port(host);
    if name == "localhost" || name.ends_with(".localhost") {
        return true;
    }
    name.trim_start_matches('[')
        .trim_end_matches(']')
        .parse::<IpAddr>()
        .is_ok_and(|ip| ip.is_loopback())
}

fn without_port(host: &str) -> &str {
    match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) && !name.ends_with(':') => {
            name
        }
        _ => host,
    }
}

fn check_host(host: &str) -> Result<String, ReferenceError> {
    let bad = || ReferenceError::Host(shorten(host));
    let (name, port) = match host.strip_prefix('[') {
        Some(rest) => {
            let (address, after) = rest.split_once(']').ok_or_else(bad)?;
            address.parse::<Ipv6Addr>().map_err(|_| bad())?;
            (
                &host[..address.len() + 2],
                (!after.is_empty()).then_some(after),
            )
        }
        None => match host.find(':') {
            Some(at) => (&host[..at], Some(&host[at..])),
            None => (host, None),
        },
    };
    if let Some(port) = port {
        let digits = port.strip_prefix(':').ok_or_else(bad)?;
        let number: u16 = digits.parse().map_err(|_| bad())?;
        if number == 0 || !digits.bytes().all(|b| b.is_ascii_digit()) {
            return Err(bad());
        }
    }
    if !name.starts_with('[') {
        let label = |l: &str| {
            (1..=63).contains(&l.len())
                && l.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
                && !l.starts_with('-')
                && !l.ends_with('-')
        };
        if name.len() > 253 || !name.split('.').all(label) {
            return Err(bad());
        }
    }
    Ok(host.to_ascii_lowercase())
}

/// Checks a repository name (without host) against the grammar of the distribution-spec.
pub fn check_repository(name: &str) -> Result<&str, ReferenceError> {
    let parsed = format!("{STAND_IN}/{name}").parse::<oci_client::Reference>();
    // A name with a tag or digest is a reference, too.
    if parsed.is_ok_and(|parsed| parsed.repository() == name) {
        Ok(name)
    } else {
        Err(ReferenceError::Repository(shorten(name)))
    }
}

/// Checks a tag against `[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}`. The library allows letters beyond ASCII.
pub fn check_tag(tag: &str) -> Result<&str, ReferenceError> {
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    let fine = tag.len() <= 128
        && tag.bytes().next().is_some_and(word)
        && tag.bytes().all(|b| word(b) || b == b'.' || b == b'-');
    if fine {
        Ok(tag)
    } else {
        Err(ReferenceError::Tag(shorten(tag)))
    }
}

/// Shortens a text of arbitrary length for an error message.
fn shorten(text: &str) -> String {
    if text.chars().count() <= 200 {
        text.to_owned()
    } else {
        text.chars().take(200).chain(['…']).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_that_are() {
        let digest = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        for (text, host, repository, tag) in [
            ("127.0.0.1:5000/a", "127.0.0.1:5000", "a", None),
            (
                "docker://Reg.Example/a/b-c/d__e:1.0",
                "reg.example",
                "a/b-c/d__e",
                Some("1.0"),
            ),
            ("localhost/x:_t", "localhost", "x", Some("_t")),
            ("[::1]:5000/x--y", "[::1]:5000", "x--y", None),
            ("docker.io/debian", "docker.io", "library/debian", None),
            (
                "index.docker.io/u/debian:12",
                "docker.io",
                "u/debian",
                Some("12"),
            ),
        ] {
            let parsed: Reference = text.parse().unwrap();
            assert_eq!(
                (
                    parsed.host.as_str(),
                    parsed.repository.as_str(),
                    parsed.tag.as_deref()
                ),
                (host, repository, tag),
                "{text}"
            );
        }
        let parsed: Reference = format!("a.b/c:t@{digest}").parse().unwrap();
        assert_eq!(parsed.digest.unwrap().to_string(), digest);
        assert_eq!(parsed.to_string(), format!("a.b/c:t@{digest}"));
    }

    #[test]
    fn references_that_are_not() {
        for text in [
            "",
            "debian",
            "user/debian",
            "http://a.b/c",
            "a.b/",
            "a.b//c",
            "a.b/C",
            "a.b/c/../d",
            "a.b/c..d",
            "a.b/.c",
            "a.b/c-",
            "a.b/c___d",
            "a.b/c:",
            "a.b/c:-t",
            "a.b/c:t t",
            "a.b/c:tä", // `\w` of a Unicode regex would match
            "a.b/c@sha256:00",
            "a.b/c@x@y",
            "a.b:0/c",
            "a.b:+1/c",
            "a.b:99999/c",
            "a.b:/c",
            "user@a.b/c",
            "-a.b/c",
            "a..b/c",
            "[::1/c",
            "[::1]x/c",
            "a.b/c?x=y",
            "a.b/c#d",
            "a.b/c%2e",
            "a.b/c\nd",
            &format!("a.b/{}", "x".repeat(256)),
            &format!("a.b/c:{}", "x".repeat(129)),
        ] {
            assert!(text.parse::<Reference>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn docker_hub_is_the_default_only_where_it_is_asked_for() {
        let of = |t| Reference::parse_with_default_host(t).unwrap().to_string();
        assert_eq!(of("debian:12"), "docker.io/library/debian:12");
        assert_eq!(of("user/x"), "docker.io/user/x");
        assert_eq!(of("localhost:1/x"), "localhost:1/x");
        assert_eq!(
            "debian:12".parse::<Reference>(),
            Err(ReferenceError::NoHost("debian:12".to_owned()))
        );
    }

    #[test]
    fn loopback_is_a_matter_of_the_name() {
        for yes in [
            "localhost",
            "localhost:5000",
            "127.0.0.1",
            "127.9.9.9:1",
            "[::1]",
            "[::1]:5000",
            "x.localhost",
        ] {
            assert!(is_loopback(yes), "{yes}");
        }
        for no in [
            "localhost.example",
            "128.0.0.1:1",
            "example:127",
            "[::2]:1",
            "127.0.0.1.example",
        ] {
            assert!(!is_loopback(no), "{no}");
        }
    }
}
