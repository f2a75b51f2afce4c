//! Describes a session for heartbeats.

use std::collections::HashSet;

use super::options::Options;
use super::{autosave, kind, save_ended};
use crate::common::{escape, pod};
use crate::node::container::{self, Container, MountPoint};
use crate::service::job::{Session, Unsaved};

/// Maximum number of mounts that are listed per session, and of bytes in all their names.
const MAX_MOUNTS: usize = 64;
const MAX_MOUNT_BYTES: usize = 16 << 10;
/// Maximum length of a name in characters.
const MAX_NAME: usize = 256;

/// Describes a container. How it ended is not part of that.
pub(super) fn session(options: &Options, container: &Container) -> Session {
    let pod = container.pod.as_ref();
    let (unsaved, more) = unsaved(&container.mounts);
    let name = |text: &String| escape::limited(text, MAX_NAME);
    Session {
        id: container.id.clone(),
        node: options.node.clone(),
        owner: options.owner.owner(container),
        namespace: pod.map(|pod| name(&pod.namespace)),
        pod: pod.map(|pod| name(&pod.name)),
        container: pod
            .map(|pod| &pod.container)
            .or_else(|| container.names.first())
            .map(name),
        default_container: container.pod.as_ref().and_then(|pod| pod.default_container()).map(name),
        runtime: container.runtime.name().to_owned(),
        kind: kind::kind(container),
        category: kind::category(container),
        image: container.image_name.as_ref().map(name),
        started_ms: container.started_ms(&options.roots).unwrap_or(0),
        ended: None,
        upper_bytes: None,
        upper_entries: None,
        next: None,
        packages: None,
        unsaved,
        unsaved_more: more,
        look: None,
        autosave: autosave::wish(container),
        at_end: Some(save_ended::wish(options, container)),
        auxiliary: !is_meant(container),
        problem: container.mounts_cut.then(|| {
            "more is mounted in it than is listed; a save is refused where it is more than a save can take".to_owned()
        }),
    }
}

/// Returns whether a container is the one of its pod that is meant by the pod's name, as far as the pod says: init
/// containers end, too.
fn is_meant(container: &Container) -> bool {
    let pod = container.pod.as_ref();
    let default = pod.and_then(container::Pod::default_container);
    let of_pod = |pod: &container::Pod| match default {
        Some(default) => pod.container == *default,
        None => !pod::is_proxy(&pod.container),
    };
    pod.is_none_or(of_pod)
}

/// Returns each mount point once, up to the limits, and the number of the others. Mounts that the runtime creates for
/// itself are included under their own type.
fn unsaved(mounts: &[MountPoint]) -> (Vec<Unsaved>, u64) {
    let mut told = HashSet::new();
    let mut unsaved: Vec<Unsaved> = mounts
        .iter()
        .map(|mount| Unsaved {
            path: escape::text(&mount.destination.to_string_lossy()),
            kind: escape::limited(&mount.kind, MAX_NAME),
            data: mount.volume,
        })
        // Mounts below /proc, /sys and /dev belong to the kernel, so one entry for each of the three is enough.
        .filter(|mount| {
            !["/proc/", "/sys/", "/dev/"]
                .iter()
                .any(|own| mount.path.starts_with(own))
                || mount.data
        })
        .filter(|mount| told.insert(mount.path.clone()))
        .collect();
    unsaved.sort_by(|a, b| (!a.data, &a.path).cmp(&(!b.data, &b.path)));
    let mut bytes = 0;
    let fits = unsaved.iter().take_while(|mount| {
        bytes += mount.path.len() + mount.kind.len();
        bytes <= MAX_MOUNT_BYTES
    });
    let fits = fits.count().min(MAX_MOUNTS);
    let more = unsaved.len() - fits;
    unsaved.truncate(fits);
    (unsaved, more as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::container::Pod;
    use crate::service::agent::kind::tests::container;

    #[test]
    fn of_a_pod_only_the_container_that_is_meant_is_saved_by_itself() {
        let mut it = container();
        let pod = |name: &str, default: Option<&str>| {
            let default = default.map(|name| (pod::DEFAULT_CONTAINER.to_owned(), name.to_owned()));
            Some(Pod {
                container: name.to_owned(),
                annotations: default.into_iter().collect(),
                ..Pod::default()
            })
        };
        for (pod, expected) in [
            (None, true),
            (pod("main", None), true),
            (pod("istio-proxy", None), false),
            (pod("main", Some("main")), true),
            (pod("init", Some("main")), false),
        ] {
            it.pod = pod;
            assert_eq!(is_meant(&it), expected, "{:?}", it.pod);
        }
    }
}
