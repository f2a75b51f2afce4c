//! Docker's containers that have ended.
//!
//! Docker makes the runtime's spec at each start and does not keep it, so the mounts are those of the container's own
//! configuration (`MountPoints` of `config.v2.json`, `hostconfig.json`) and those that Docker adds to every container
//! (moby `oci/defaults.go`, `daemon/oci_linux.go`, `daemon/container_operations_unix.go`; 20.10 to 28).

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::super::bundle::{self, IdMaps};
use super::super::docker::{
    CONFIG_CAP, Config2, data_roots, names, record as root_record, remapped,
};
use super::super::error::Error;
use super::super::roots::{Roots, read_dir, read_file, read_json};
use super::super::{IdMapping, MountPoint, Runtime, Spec};
use super::{End, EndedRecord, go_time, runtime_mount};
use crate::node::overlay::mount::OverlayMount;
use crate::node::overlay::root::Root;

/// Mounts of every container, with their types.
const DEFAULT_MOUNTS: [(&str, &str); 10] = [
    ("/proc", "proc"),
    ("/dev", "tmpfs"),
    ("/dev/pts", "devpts"),
    ("/dev/shm", "tmpfs"),
    ("/dev/mqueue", "mqueue"),
    ("/sys", "sysfs"),
    ("/sys/fs/cgroup", "cgroup"),
    ("/etc/resolv.conf", "bind"),
    ("/etc/hostname", "bind"),
    ("/etc/hosts", "bind"),
];
/// Where `--init` mounts its program.
const INIT: &str = "/sbin/docker-init";
/// Maximum size in bytes of `/etc/subuid` and `/etc/subgid`.
const SUBIDS_CAP: u64 = 4 << 20;
/// Number of IDs that `adduser` gives to each user, assumed where no list says more.
const SUBIDS: u32 = 65_536;

/// The fields of `hostconfig.json` that a save needs.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct HostConfig {
    #[serde(rename = "UsernsMode")]
    userns_mode: String,
    #[serde(rename = "Tmpfs")]
    tmpfs: Option<BTreeMap<PathBuf, String>>,
    #[serde(rename = "Mounts")]
    mounts: Option<Vec<HostMount>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct HostMount {
    #[serde(rename = "Target")]
    target: PathBuf,
    #[serde(rename = "Type")]
    kind: String,
}

/// Lists the containers of all data roots. What cannot be read is left out.
pub(super) fn records(roots: &Roots) -> Vec<EndedRecord> {
    let mut records = Vec::new();
    for root in data_roots(roots, &mut Vec::new()) {
        let containers = roots.path(&root.join("containers"));
        for id in read_dir(&containers).unwrap_or_default() {
            let directory = containers.join(id);
            let state = directory.join("config.v2.json");
            if let Ok(config) = read_json::<Config2>(&state, CONFIG_CAP) {
                records.push(record(roots, &root, &directory, config));
            }
        }
    }
    records
}

fn record(roots: &Roots, root: &Path, directory: &Path, config: Config2) -> EndedRecord {
    let host: Result<HostConfig, Error> = read_json(&directory.join("hostconfig.json"), CONFIG_CAP);
    let ids = match (&host, root.file_name().and_then(remapped)) {
        (Err(error), _) => Err(format!("its settings cannot be read: {error}")),
        (Ok(host), Some((uid, gid))) if host.userns_mode == "host" => Err(format!(
            "the store of its runtime keeps root's files as {uid}:{gid} (userns-remap), and the container had other ids \
             (--userns=host): files of the base and its own would come out with owners of two kinds"
        )),
        (Ok(_), Some((uid, gid))) => Ok(IdMaps {
            uids: subordinate(roots, "/etc/subuid", uid),
            gids: subordinate(roots, "/etc/subgid", gid),
        }),
        (Ok(_), None) => Ok(IdMaps::default()),
    };
    let state = &config.state;
    let at = go_time(&state.finished_at);
    let started = state.pid != 0 || at.is_some();
    let end = End {
        exit_code: at.filter(|_| state.pid == 0).map(|_| state.exit_code),
        out_of_memory: state.oom_killed && state.pid == 0,
        at: at.filter(|_| state.pid == 0),
        started: go_time(&state.started_at),
        never_started: !started,
        unnoticed: Some(state.pid).filter(|&pid| pid != 0),
    };
    EndedRecord {
        runtime: Runtime::Docker,
        names: names(&config),
        namespace: None,
        pod: None,
        attempt: 0,
        sandbox: false,
        end,
        pid: Some(state.pid).filter(|&pid| pid != 0),
        removing: state.dead || state.removal_in_progress,
        state: directory.join("config.v2.json"),
        root: if config.driver == "overlay2" {
            root_record(roots, root, &config.id).map_err(|error| error.to_string())
        } else {
            Err(format!(
                "of its storage driver {:?}, the directories are only known while it runs",
                config.driver
            ))
        },
        id_mapped: Vec::new(),
        ids,
        mounts: mounts(&config, &host.unwrap_or_default()),
        image_name: Some(config.config.image).filter(|image| !image.is_empty()),
        runtime_root_mode: None,
        // What the engine adds at a start is not on record.
        spec: Spec {
            args: [config.path.clone()]
                .into_iter()
                .filter(|path| !path.is_empty())
                .chain(config.args.clone().unwrap_or_default())
                .collect(),
            env: config.config.env.clone().unwrap_or_default(),
            ..Spec::default()
        },
        id: config.id,
    }
}

/// Returns the IDs on the node of a user namespace whose first ID is `first`: the ranges of the user to whom this one
/// belongs.
fn subordinate(roots: &Roots, list: &str, first: u32) -> Vec<IdMapping> {
    let text = read_file(&roots.path(Path::new(list)), SUBIDS_CAP).unwrap_or_default();
    let mut inside = 0_u32;
    let mut map = Vec::new();
    for (outside, count) in ranges_from(&String::from_utf8_lossy(&text), first) {
        map.push(IdMapping {
            inside,
            outside,
            count,
        });
        inside = inside.saturating_add(count);
    }
    map
}

/// Returns the ranges of the user whose first range starts at `first`, in the order of the list.
fn ranges_from(text: &str, first: u32) -> Vec<(u32, u32)> {
    let line = |line: &str| {
        let mut parts = line.trim().split(':');
        let (user, start, count) = (parts.next()?, parts.next()?, parts.next()?);
        Some((user.to_owned(), start.parse().ok()?, count.parse().ok()?))
    };
    let lines: Vec<(String, u32, u32)> = text.lines().filter_map(line).collect();
    let mut users = std::collections::HashSet::new();
    let mut firsts = lines.iter().filter(|(user, ..)| users.insert(user.clone()));
    let Some((user, ..)) = firsts.find(|(_, start, _)| *start == first) else {
        return vec![(first, SUBIDS)];
    };
    let own = lines.iter().filter(|(of, ..)| of == user);
    own.map(|(_, start, count)| (*start, *count)).collect()
}

fn mounts(config: &Config2, host: &HostConfig) -> Vec<MountPoint> {
    let mut all: Vec<MountPoint> = DEFAULT_MOUNTS
        .iter()
        .map(|(destination, kind)| runtime_mount(destination, kind))
        .collect();
    for (destination, point) in config.mount_points.iter().flatten() {
        // A `tmpfs` is in the list, too, and holds no files by now.
        let bind = point.kind != "tmpfs";
        let destination = bundle::absolute(destination);
        all.push(MountPoint {
            volume: bind && !bundle::made_by_runtime(&destination),
            kind: if bind { "bind" } else { "tmpfs" }.to_owned(),
            source: point.source.clone(),
            destination,
        });
    }
    let tmpfs = host.tmpfs.iter().flat_map(BTreeMap::keys);
    let others = host.mounts.iter().flatten();
    let others = others
        .filter(|mount| mount.kind == "tmpfs")
        .map(|mount| &mount.target);
    all.extend(
        tmpfs
            .chain(others)
            .map(|at| runtime_mount(bundle::absolute(at), "tmpfs")),
    );
    all
}

/// Returns the mount of the program of `--init`, if an empty file is in its place. Whether it was mounted can be a
/// setting of the engine, which is not in the record of the container.
pub(super) fn init_stub(
    record: &EndedRecord,
    overlay: &OverlayMount,
) -> Result<Option<MountPoint>, Error> {
    if record.runtime != Runtime::Docker {
        return Ok(None);
    }
    let failed = |source| Error::io(&overlay.upper, source);
    let root = Root::open(&overlay.upper).map_err(failed)?;
    let path = OsStr::new(INIT).as_encoded_bytes();
    let stat = match root.stat(path.strip_prefix(b"/").unwrap_or(path)) {
        Ok(stat) => stat,
        // A symbolic link of the container is on the way.
        Err(error) if error.raw_os_error() == Some(rustix::io::Errno::LOOP.raw_os_error()) => None,
        Err(error) => return Err(failed(error)),
    };
    let empty = stat.is_some_and(|stat| {
        stat.st_size == 0 && rustix::fs::FileType::from_raw_mode(stat.st_mode).is_file()
    });
    Ok(empty.then(|| runtime_mount(INIT, "bind")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ids_of_a_remapped_store_are_those_of_its_user() {
        let text =
            "ada:200000:65536\ndockremap:100000:1000\nada:300000:5\ndockremap:500000:7\n#x\n";
        assert_eq!(ranges_from(text, 100_000), [(100_000, 1000), (500_000, 7)]);
        assert_eq!(
            ranges_from(text, 200_000),
            [(200_000, 65_536), (300_000, 5)]
        );
        // Not the first range of its user, or of nobody on the list.
        assert_eq!(ranges_from(text, 300_000), [(300_000, SUBIDS)]);
        assert_eq!(ranges_from("", 7), [(7, SUBIDS)]);
    }
}
