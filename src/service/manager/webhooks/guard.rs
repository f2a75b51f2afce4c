//! Keeps requests to receivers that users name away from this machine and from private networks. A manager often stands
//! where services trust whoever reaches them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use reqwest::Url;

use crate::service::manager::auth::Range;

/// Networks besides the public ones that may be reached.
#[derive(Clone)]
pub(super) struct Networks(pub(super) Vec<Range>);

impl Networks {
    fn permit(&self, address: IpAddr) -> bool {
        is_public(address) || self.0.iter().any(|range| range.holds(Some(address)))
    }

    /// Returns whether the host of `url` is an address that must not be reached. Names are checked when they are resolved.
    pub(super) fn refuse(&self, url: &Url) -> bool {
        let host = url.host_str().unwrap_or_default();
        let bare = host.trim_start_matches('[').trim_end_matches(']');
        bare.parse().is_ok_and(|address| !self.permit(address))
    }
}

fn is_public_v4(address: Ipv4Addr) -> bool {
    let [a, b, c, _] = address.octets();
    !(address.is_loopback()
        || address.is_private()
        || address.is_link_local()
        || address.is_multicast()
        || address.is_documentation()
        || a == 0
        || a >= 240
        || (a == 100 && (64..128).contains(&b))
        || (a == 192 && b == 0 && c == 0)
        || (a == 192 && b == 88 && c == 99)
        || (a == 198 && (b == 18 || b == 19)))
}

/// Only global unicast (2000::/3), without the blocks in it that are not: those for protocols (2001::/23), documentation
/// and 6to4, which contains an IPv4 address.
fn is_public_v6(address: Ipv6Addr) -> bool {
    let [a, b, ..] = address.segments();
    a & 0xe000 == 0x2000
        && !(a == 0x2001 && (b < 0x200 || b == 0xdb8))
        && a != 0x2002
        && !(a == 0x3fff && b < 0x1000)
}

fn is_public(address: IpAddr) -> bool {
    match address.to_canonical() {
        IpAddr::V4(address) => is_public_v4(address),
        IpAddr::V6(address) => is_public_v6(address),
    }
}

/// Resolves names, and drops the addresses that must not be reached. The connection is made to an address that was
/// checked, so that a name cannot be checked with one address and used with another.
pub(super) struct GuardedResolver {
    pub(super) networks: Networks,
}

impl reqwest::dns::Resolve for GuardedResolver {
    fn resolve(&self, name: reqwest::dns::Name) -> reqwest::dns::Resolving {
        let networks = self.networks.clone();
        Box::pin(async move {
            let name = name.as_str();
            let found = tokio::net::lookup_host((name, 0)).await?;
            let permitted: Vec<SocketAddr> = found.filter(|at| networks.permit(at.ip())).collect();
            if permitted.is_empty() {
                return Err(format!("{name} has no public address: refused").into());
            }
            Ok(Box::new(permitted.into_iter()) as reqwest::dns::Addrs)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_public_addresses_are_reached() {
        for text in [
            "1.1.1.1",
            "172.32.0.1",
            "100.63.0.1",
            "2606:4700::1",
            "::ffff:1.1.1.1",
        ] {
            assert!(is_public(text.parse().unwrap()), "{text}");
        }
        for text in [
            "127.0.0.1",
            "127.9.9.9",
            "0.0.0.0",
            "0.1.2.3",
            "10.1.2.3",
            "172.16.0.1",
            "192.168.1.1",
            "169.254.169.254",
            "100.64.0.1",
            "198.18.0.1",
            "224.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "::ffff:127.0.0.1",
            "::ffff:10.0.0.1",
            "::127.0.0.1",
            "64:ff9b::7f00:1",
            "64:ff9b:1::1",
            "2002:7f00:1::",
            "2001::1",
            "2001:db8::1",
            "fe80::1",
            "fec0::1",
            "fc00::1",
            "fd00:ec2::254",
            "ff02::1",
        ] {
            assert!(!is_public(text.parse().unwrap()), "{text}");
        }
    }

    #[tokio::test]
    async fn a_name_of_this_machine_is_refused_unless_its_network_is_permitted() {
        use reqwest::dns::Resolve as _;
        for (ranges, found) in [(vec![], false), (vec!["127.0.0.0/8", "::1"], true)] {
            let ranges = ranges.into_iter().map(|text| text.parse().unwrap());
            let networks = Networks(ranges.collect());
            let url = Url::parse("http://127.0.0.1:80/").unwrap();
            assert_eq!(networks.refuse(&url), !found);
            let url = Url::parse("http://[::1]/").unwrap();
            assert_eq!(networks.refuse(&url), !found);
            let resolver = GuardedResolver { networks };
            let name = "localhost".parse().unwrap();
            assert_eq!(resolver.resolve(name).await.is_ok(), found);
        }
    }
}
