//! Authentication by a proxy, which is trusted only if it connects from a configured address.

use std::net::IpAddr;

use axum::http::{HeaderMap, HeaderName};

use super::AuthError;
use super::claims::known_groups;
use super::email::is_address;

/// A range of addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Range {
    /// Peers on a socket file.
    Unix,
    /// An address and the length of its network prefix in bits.
    Net(IpAddr, u8),
}

impl std::str::FromStr for Range {
    type Err = AuthError;

    fn from_str(text: &str) -> Result<Self, AuthError> {
        let wrong = || AuthError::Range(text.chars().take(100).collect());
        if text == "unix" {
            return Ok(Self::Unix);
        }
        let (address, bits) = match text.split_once('/') {
            Some((address, bits)) => (address, Some(bits)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().map_err(|_| wrong())?;
        let all = if address.is_ipv4() { 32 } else { 128 };
        let bits = match bits {
            Some(bits) => bits.parse().map_err(|_| wrong())?,
            None => all,
        };
        if bits > all {
            return Err(wrong());
        }
        Ok(Self::Net(address, bits))
    }
}

impl Range {
    /// Returns whether the range contains `peer`; `None` is a peer on a socket file.
    pub(in super::super) fn holds(self, peer: Option<IpAddr>) -> bool {
        match (self, peer) {
            (Self::Unix, None) => true,
            (Self::Net(net, bits), Some(peer)) => match (net, peer.to_canonical()) {
                (IpAddr::V4(net), IpAddr::V4(peer)) => {
                    let shift = 32 - u32::from(bits);
                    let cut = |ip: u32| ip.checked_shr(shift).unwrap_or(0);
                    cut(net.to_bits()) == cut(peer.to_bits())
                }
                (IpAddr::V6(net), IpAddr::V6(peer)) => {
                    let shift = 128 - u32::from(bits);
                    let cut = |ip: u128| ip.checked_shr(shift).unwrap_or(0);
                    cut(net.to_bits()) == cut(peer.to_bits())
                }
                _ => false,
            },
            _ => false,
        }
    }
}

/// Proxies that authenticate users and pass the name in a header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Proxies {
    /// Header with the user's name, e.g. `X-Forwarded-User`. The proxy must remove it from incoming requests.
    pub header: HeaderName,
    /// Addresses of trusted proxies.
    pub from: Vec<Range>,
    /// Header with the names of the user's groups, separated by commas, e.g. `X-Forwarded-Groups`. The proxy must remove
    /// it from incoming requests.
    pub groups_header: Option<HeaderName>,
    /// Header with the user's e-mail address, e.g. `X-Forwarded-Email`. The proxy must remove it from incoming requests.
    pub email_header: Option<HeaderName>,
    /// Users who are administrators.
    pub administrators: Vec<String>,
}

impl Proxies {
    /// Parses the settings from the text in flags and files.
    ///
    /// Fails if the header's name or a range is invalid.
    pub fn new(
        header: &str,
        from: &[String],
        administrators: Vec<String>,
    ) -> Result<Self, AuthError> {
        let name = header
            .parse()
            .map_err(|_| AuthError::Header(header.to_owned()))?;
        let from = from
            .iter()
            .map(|range| range.parse())
            .collect::<Result<_, _>>()?;
        Ok(Self {
            header: name,
            from,
            groups_header: None,
            email_header: None,
            administrators,
        })
    }

    /// Also accepts the names of the user's groups in this header.
    ///
    /// Fails if the header's name is invalid.
    pub fn with_groups(mut self, header: &str) -> Result<Self, AuthError> {
        let name = header.parse();
        self.groups_header = Some(name.map_err(|_| AuthError::Header(header.to_owned()))?);
        Ok(self)
    }

    /// Also accepts the user's e-mail address in this header.
    ///
    /// Fails if the header's name is invalid.
    pub fn with_email(mut self, header: &str) -> Result<Self, AuthError> {
        let name = header.parse();
        self.email_header = Some(name.map_err(|_| AuthError::Header(header.to_owned()))?);
        Ok(self)
    }

    /// Returns the e-mail address that the proxy states, if it is one.
    pub(super) fn email_of(&self, headers: &HeaderMap) -> Option<String> {
        let mut said = headers.get_all(self.email_header.as_ref()?).iter();
        let email = said.next()?.to_str().ok()?;
        let alone = said.next().is_none();
        (alone && is_address(email)).then(|| email.to_owned())
    }

    /// Returns the groups that the proxy states.
    pub(super) fn groups_of(&self, headers: &HeaderMap) -> Vec<String> {
        let Some(name) = &self.groups_header else {
            return Vec::new();
        };
        let said = headers.get_all(name).iter();
        let said = said.filter_map(|value| std::str::from_utf8(value.as_bytes()).ok());
        known_groups(said.flat_map(|value| value.split(',')).map(str::trim))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_hold_what_is_in_them() {
        let cases = [
            ("127.0.0.1", "127.0.0.1", true),
            ("127.0.0.1", "127.0.0.2", false),
            ("10.0.0.0/8", "10.255.1.2", true),
            ("10.0.0.0/8", "11.0.0.0", false),
            ("0.0.0.0/0", "8.8.8.8", true),
            ("0.0.0.0/0", "::1", false),
            ("10.0.0.0/8", "::ffff:10.1.1.1", true),
            ("fd00::/8", "fd12::1", true),
            ("fd00::/8", "fe80::1", false),
        ];
        for (range, peer, holds) in cases {
            let range: Range = range.parse().unwrap();
            assert_eq!(range.holds(Some(peer.parse().unwrap())), holds, "{peer}");
            assert!(!range.holds(None));
        }
        assert!(Range::Unix.holds(None));
        for bad in ["", "x", "10.0.0.0/33", "10.0.0.0/-1", "10.0.0.0/8/8"] {
            assert!(bad.parse::<Range>().is_err(), "{bad}");
        }
    }
}
