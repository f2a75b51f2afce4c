//! Ranges of addresses, by which proxies and networks are named in settings.

use std::net::IpAddr;

/// The text is not an address range.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is not an address range: write ADDRESS or ADDRESS/BITS, or unix for those on a socket file"
)]
pub struct RangeError(String);

/// A range of addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Range {
    /// Peers on a socket file.
    Unix,
    /// An address and the length of its network prefix in bits.
    Net(IpAddr, u8),
}

impl std::str::FromStr for Range {
    type Err = RangeError;

    fn from_str(text: &str) -> Result<Self, RangeError> {
        let wrong = || RangeError(text.chars().take(100).collect());
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
    pub(in crate::service) fn holds(self, peer: Option<IpAddr>) -> bool {
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
