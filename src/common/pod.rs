//! Which container of a pod is meant if only the pod is named.

/// The annotation of a pod that names its default container, as `kubectl` uses it.
pub const DEFAULT_CONTAINER: &str = "kubectl.kubernetes.io/default-container";

/// Containers that service meshes add to pods, under names that are fixed in their sources: Istio (`ProxyContainerName`)
/// and Linkerd. Runtimes do not record which containers are sidecars (`restartPolicy: Always`).
const PROXIES: [&str; 2] = ["istio-proxy", "linkerd-proxy"];

/// Returns whether a container of this name is the proxy of a service mesh.
pub fn is_proxy(name: &str) -> bool {
    PROXIES.contains(&name)
}

/// Returns the index of the container that is meant, among the names of a pod's containers: the default one;
/// without a default, the only one, or the only one that is not a proxy. Returns `None` if the user has to say.
pub fn meant(running: &[&str], default: Option<&str>) -> Option<usize> {
    let only = |is: &dyn Fn(&str) -> bool| {
        let mut found = (0..running.len()).filter(|&at| is(running[at]));
        let first = found.next();
        first.filter(|_| found.next().is_none())
    };
    match default {
        Some(default) => only(&|name| name == default),
        None => only(&|_| true).or_else(|| only(&|name| !is_proxy(name))),
    }
}

#[cfg(test)]
mod tests {
    use super::meant;

    #[test]
    fn the_default_then_the_only_one_then_the_only_one_that_is_no_proxy() {
        for (running, default, expected) in [
            (&["main", "log"][..], Some("log"), Some(1)),
            (&["main", "log"], None, None),
            // The default does not run: none of the others is meant.
            (&["main"], Some("gone"), None),
            (&["istio-proxy"], Some("main"), None),
            (&["main"], None, Some(0)),
            (&["istio-proxy"], None, Some(0)),
            (&["istio-proxy", "main"], None, Some(1)),
            (&["istio-proxy", "main"], Some("istio-proxy"), Some(0)),
            (&["istio-proxy", "linkerd-proxy"], None, None),
            (&["istio-proxy", "main", "log"], None, None),
            (&["main", "main"], Some("main"), None),
            (&[], None, None),
        ] {
            assert_eq!(meant(running, default), expected, "{running:?} {default:?}");
        }
    }
}
