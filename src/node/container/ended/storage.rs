//! Podman's and CRI-O's containers that have ended.
//!
//! Formats: libpod `boltdb_state_internal.go` (`libpod/bolt_state.db`: bucket `ctr`, a bucket for each ID, the key `state`
//! with JSON; Podman before 5) and `define/containerstate.go`; CRI-O `internal/oci/container.go` (`state.json`).
//! Observed with Podman 4.3.1.

use std::collections::HashMap;

use serde::Deserialize;

use super::super::bolt;
use super::super::bundle::{Bundle, IdMaps};
use super::super::error::Error;
use super::super::recorded::RecordedRoot;
use super::super::roots::{Roots, StorageRoot, pid_file, read_file, read_json};
use super::super::storage::{
    ROOT_MODE, StoredContainer, StoredLayer, below, chain, containers, is_id, layers, metadata,
    pod, userdata_of,
};
use super::super::{IdMapping, Runtime};
use super::{End, EndedRecord, go_time};

/// Maximum size of a state file in bytes; CRI-O's repeats the annotations.
const STATE_CAP: u64 = 8 << 20;
/// Podman's states before the first start (`configured`, `created`).
const NEVER_STARTED: [i64; 2] = [1, 2];
/// Podman's state of a container that is being removed.
const REMOVING: i64 = 7;

/// A container's state in Podman's database.
#[derive(Debug, Deserialize)]
#[serde(default, rename_all = "camelCase")]
#[derive(Default)]
struct PodmanState {
    state: i64,
    exit_code: i64,
    started_time: String,
    finished_time: String,
    oom_killed: bool,
    pid: i64,
}

/// CRI-O's `state.json`.
#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct CrioState {
    started: String,
    finished: String,
    exit_code: Option<i64>,
    oom_killed: bool,
}

/// Lists the containers of all stores. What cannot be read is left out.
pub(super) fn records(roots: &Roots) -> Vec<EndedRecord> {
    let mut records = Vec::new();
    for storage in &roots.storage {
        let containers = containers(roots, storage).unwrap_or_default();
        if containers.is_empty() {
            continue;
        }
        let layers = layers(roots, storage).unwrap_or_default();
        let by_id: HashMap<&str, &StoredContainer> =
            containers.iter().map(|c| (c.id.as_str(), c)).collect();
        let podman = podman_states(roots, storage);
        let usable = |c: &&StoredContainer| is_id(&c.id) && (c.layer.is_empty() || is_id(&c.layer));
        let mut seen = std::collections::HashSet::new();
        for container in containers.iter().filter(usable) {
            if seen.insert(container.id.as_str()) {
                let store = Store {
                    roots,
                    storage,
                    layers: &layers,
                    by_id: &by_id,
                    podman: podman.get(&container.id),
                };
                records.push(store.record(container));
            }
        }
    }
    records
}

/// Reads Podman's database; an empty map if there is none, or it cannot be read.
fn podman_states(roots: &Roots, storage: &StorageRoot) -> HashMap<String, PodmanState> {
    let path = storage.root.join("libpod/bolt_state.db");
    let Ok(path) = roots.locate(&path) else {
        return HashMap::new();
    };
    let states = bolt::read(&path, |db| {
        let mut states = HashMap::new();
        let Some(all) = db.bucket(&[b"ctr"])? else {
            return Ok::<_, Error>(states);
        };
        for (id, _) in all.entries()? {
            let state = all.bucket(&id)?.map(|one| one.get(b"state")).transpose()?;
            let state = state
                .flatten()
                .and_then(|state| serde_json::from_slice(&state).ok());
            if let (Ok(id), Some(state)) = (String::from_utf8(id), state) {
                states.insert(id, state);
            }
        }
        Ok(states)
    });
    states.unwrap_or_default()
}

/// A store, and what is known of one container in it.
struct Store<'a> {
    roots: &'a Roots,
    storage: &'a StorageRoot,
    layers: &'a HashMap<String, StoredLayer>,
    by_id: &'a HashMap<&'a str, &'a StoredContainer>,
    podman: Option<&'a PodmanState>,
}

impl Store<'_> {
    fn record(&self, container: &StoredContainer) -> EndedRecord {
        let bundle = self.bundle(&container.id);
        let known = bundle.as_ref().ok().and_then(Option::as_ref);
        let annotation = |key: &str| known.and_then(|bundle| bundle.annotation(key));
        let own = metadata(container);
        let pod = pod(&own, self.by_id).filter(|pod| !pod.name.is_empty());
        let crio = pod.is_some() || annotation("io.container.manager") == Some("cri-o");
        let chain = chain(self.layers, &container.layer);
        let (top, below_it) = match chain.as_deref() {
            Ok([top, below_it @ ..]) => (Some(*top), below_it),
            _ => (None, [].as_slice()),
        };
        let names = container.names.clone().unwrap_or_default();
        let ids = match (&bundle, known) {
            (Err(error), _) => Err(error.clone()),
            (Ok(_), Some(bundle)) => bundle.id_maps(),
            // It was never started, so all of its files are of its layer's owners.
            (Ok(_), None) => Ok(top.map(StoredLayer::ids).unwrap_or_default()),
        };
        let mapped = ids.as_ref().is_ok_and(|ids| *ids != IdMaps::default());
        EndedRecord {
            runtime: if crio { Runtime::Crio } else { Runtime::Podman },
            id: container.id.clone(),
            namespace: None,
            pod,
            attempt: if crio { attempt(&names) } else { 0 },
            names,
            sandbox: own.pod || annotation("io.kubernetes.cri-o.ContainerType") == Some("sandbox"),
            end: if crio {
                self.crio_end(&container.id)
            } else {
                self.podman_end()
            },
            pid: self.pid(&container.id),
            removing: top.is_some_and(StoredLayer::is_incomplete)
                || self.podman.is_some_and(|podman| podman.state == REMOVING),
            state: self
                .roots
                .path(&self.storage.root.join("overlay-containers")),
            image_name: Some(own.image_name).filter(|name| !name.is_empty()),
            runtime_root_mode: Some(ROOT_MODE),
            root: self.root(container, &chain),
            // A layer is unpacked once, with the IDs of the image, and mounted with those of each container; where the
            // kernel cannot do that, a copy with other owners is recorded with its map.
            id_mapped: below_it
                .iter()
                .filter(|layer| mapped && layer.ids() == IdMaps::default())
                .map(|layer| below(&layer.id))
                .collect(),
            ids,
            mounts: known.map(Bundle::mount_points).unwrap_or_default(),
            spec: known.map(Bundle::spec).unwrap_or_default(),
        }
    }

    fn root(
        &self,
        container: &StoredContainer,
        chain: &Result<Vec<&StoredLayer>, String>,
    ) -> Result<RecordedRoot, String> {
        if container.layer.is_empty() {
            return Err("it has no layer: its root is not of an image".to_owned());
        }
        let chain = chain.as_ref().map_err(Clone::clone)?;
        let overlay = self.storage.root.join("overlay");
        let program = self.roots.path(&overlay.join(".has-mount-program"));
        if read_file(&program, 16).is_ok_and(|text| text.starts_with(b"true")) {
            return Err(
                "its store is mounted by a program (mount_program), which marks deletions in its own way"
                    .to_owned(),
            );
        }
        for layer in chain {
            let composed = overlay.join(&layer.id).join("composefs-data");
            if self.roots.locate(&composed).is_ok() {
                return Err(format!(
                    "its layer {} is a composefs, which is not mounted",
                    layer.id
                ));
            }
        }
        Ok(RecordedRoot {
            store: overlay,
            upper: below(&container.layer),
            lowers: Some(chain.iter().skip(1).map(|layer| below(&layer.id)).collect()),
            id_mapped: false,
        })
    }

    /// Reads the spec, which is written when a container is first started. Podman keeps it with the data, CRI-O in both
    /// places. Fails if it is missing of a container that was started.
    fn bundle(&self, id: &str) -> Result<Option<Bundle>, String> {
        for root in [&self.storage.root, &self.storage.runroot] {
            let path = userdata_of(root, id).join("config.json");
            match Bundle::read(&self.roots.path(&path)) {
                Ok(bundle) if bundle.mount_points().is_empty() => {
                    return Err(format!("its spec, {}, names no mounts", path.display()));
                }
                Ok(bundle) => return Ok(Some(bundle)),
                Err(error) if error.is_not_found() => {}
                Err(error) => return Err(format!("its spec cannot be read: {error}")),
            }
        }
        match self.podman {
            Some(podman) if !NEVER_STARTED.contains(&podman.state) => {
                Err("it was started, and its spec (config.json) is missing".to_owned())
            }
            _ => Ok(None),
        }
    }

    fn pid(&self, id: &str) -> Option<u32> {
        let path = userdata_of(&self.storage.runroot, id).join("pidfile");
        pid_file(&self.roots.path(&path)).ok()
    }

    fn podman_end(&self) -> End {
        let Some(podman) = self.podman else {
            return End::default();
        };
        if NEVER_STARTED.contains(&podman.state) {
            return End {
                never_started: true,
                ..End::default()
            };
        }
        let unnoticed = u32::try_from(podman.pid).ok().filter(|&pid| pid != 0);
        let at = go_time(&podman.finished_time).filter(|_| unnoticed.is_none());
        End {
            exit_code: at.map(|_| podman.exit_code),
            out_of_memory: podman.oom_killed,
            at,
            started: go_time(&podman.started_time),
            unnoticed,
            ..End::default()
        }
    }

    fn crio_end(&self, id: &str) -> End {
        let path = userdata_of(&self.storage.root, id).join("state.json");
        let state: CrioState = read_json(&self.roots.path(&path), STATE_CAP).unwrap_or_default();
        let at = go_time(&state.finished);
        End {
            exit_code: state.exit_code.filter(|_| at.is_some()),
            out_of_memory: state.oom_killed,
            at,
            started: go_time(&state.started),
            ..End::default()
        }
    }
}

/// Returns the number of the attempt, the last part of `k8s_CONTAINER_POD_NAMESPACE_UID_ATTEMPT`.
fn attempt(names: &[String]) -> u32 {
    let name = names.iter().find(|name| name.starts_with("k8s_"));
    let number = name.and_then(|name| name.rsplit('_').next()?.parse().ok());
    number.unwrap_or(0)
}

impl StoredLayer {
    fn ids(&self) -> IdMaps {
        let map = |stored: &Option<Vec<super::super::storage::StoredId>>| {
            let stored = stored.iter().flatten();
            let map: Vec<IdMapping> = stored
                .map(|ids| IdMapping {
                    inside: ids.container_id,
                    outside: ids.host_id,
                    count: ids.size,
                })
                .collect();
            map
        };
        IdMaps {
            uids: map(&self.uidmap),
            gids: map(&self.gidmap),
        }
    }

    /// Returns whether the layer is being made or removed.
    fn is_incomplete(&self) -> bool {
        let flags = self.flags.as_ref();
        flags.is_some_and(|flags| flags.get("incomplete").is_some_and(|flag| flag == true))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_attempt_is_the_last_part_of_crios_name() {
        let name = |text: &str| vec![text.to_owned()];
        assert_eq!(attempt(&name("k8s_notebook_alice_hub_u-1_12")), 12);
        assert_eq!(attempt(&name("k8s_notebook_alice_hub_u-1_x")), 0);
        assert_eq!(attempt(&name("lab_7")), 0);
        assert_eq!(attempt(&[]), 0);
    }
}
