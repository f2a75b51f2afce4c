//! DNS resolver that keeps host names chosen by a registry from leading to this machine.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::Arc;

use reqwest::Url;

use crate::common::reference::authority;
use crate::store::registry::auth::is_local_address;
use crate::store::registry::credentials::environment;

/// Resolves names and drops loopback and link-local addresses, so that a name chosen by a registry cannot lead to this
/// machine. Address literals are not resolved here and are checked by
/// [`check_url`](crate::store::registry::auth::Origin::check_url).
pub(super) struct GuardedResolver {
    pub(super) exempt: Arc<HashSet<String>>,
}

impl reqwest::dns::Resolve for GuardedResolver {
    fn resolve(&self, name: reqwest::dns::Name) -> reqwest::dns::Resolving {
        let exempt = Arc::clone(&self.exempt);
        Box::pin(async move {
            let name = name.as_str();
            let found: Vec<SocketAddr> = tokio::net::lookup_host((name, 0)).await?.collect();
            let allowed: Vec<SocketAddr> = found
                .into_iter()
                .filter(|a| exempt.contains(name) || !is_local_address(a.ip()))
                .collect();
            if allowed.is_empty() {
                return Err(format!(
                    "{name} has no address but of this machine or its link: refused"
                )
                .into());
            }
            Ok(Box::new(allowed.into_iter()) as reqwest::dns::Addrs)
        })
    }
}

pub(super) fn host_of(name: &str) -> &str {
    let name = authority(name);
    match name.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => host,
        _ => name,
    }
}

/// Returns the host names of the proxies that the environment names. They may be on this machine, whatever the target.
pub(super) fn proxy_hosts() -> impl Iterator<Item = String> {
    [
        "http_proxy",
        "https_proxy",
        "all_proxy",
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "ALL_PROXY",
    ]
    .into_iter()
    .filter_map(|name| {
        let value = environment(name)?.into_string().ok()?;
        let url = Url::parse(&value)
            .ok()
            .filter(Url::has_host)
            .or_else(|| Url::parse(&format!("http://{value}")).ok())?;
        url.host_str().map(str::to_owned)
    })
}
