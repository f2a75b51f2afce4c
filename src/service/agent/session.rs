//! Describes a session for heartbeats.

use std::collections::HashSet;

use super::kind;
use super::options::Options;
use crate::common::escape;
use crate::node::container::{Container, MountPoint};
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
        problem: container.mounts_cut.then(|| {
            "more is mounted in it than is listed; a save is refused where it is more than a save can take".to_owned()
        }),
    }
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
