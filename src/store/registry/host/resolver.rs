//! Names that a registry chose must not lead to this machine by way of DNS.

use std::collections::HashSet;
use std::net::SocketAddr;
use std::sync::Arc;

use reqwest::Url;

use crate::store::registry::auth::is_local_address;
use crate::store::registry::credentials::environment;
use crate::store::registry::reference::authority;

/// Resolves names, and keeps back addresses of this machine and its link: a name that a registry chose must not lead
/// here by way of DNS. Addresses written as such do not come by here, see [`may_visit`](crate::store::registry::auth::Origin::may_visit).
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

/// Host names of the proxies that the environment names: they may be on this machine, whoever we go to.
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
