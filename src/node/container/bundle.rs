//! The OCI runtime spec of a container (`config.json`), and which of its mounts hold user data.
//!
//! Format: runtime-spec `config.md`. Unknown fields are ignored, because a runtime may be newer than this program.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::path::{Component, Path, PathBuf};

use serde::Deserialize;

use super::error::Error;
use super::process::Process;
use super::roots::read_json;
use super::{IdMapping, MountPoint, Spec};
use crate::node::procfs::MountInfo;

/// Maximum size of a config.json in bytes, sufficient for large environments and thousands of mounts.
const CONFIG_CAP: u64 = 8 << 20;
/// Maximum number of variables, arguments or annotations of one container, and maximum size of each kind in bytes.
/// Kubernetes permits 256 KiB of annotations; the kernel limits arguments and variables together to 2 MiB with the
/// default stack size.
const MAX_METADATA: (usize, usize) = (4096, 1 << 20);

/// The fields of a config.json that a save needs.
#[derive(Clone, Debug, Default, Deserialize)]
pub(super) struct Bundle {
    #[serde(default)]
    pub(super) annotations: Option<BTreeMap<String, String>>,
    #[serde(default)]
    mounts: Option<Vec<SpecMount>>,
    #[serde(default)]
    root: Option<SpecRoot>,
    #[serde(default)]
    process: Option<SpecProcess>,
    #[serde(default)]
    linux: Option<SpecLinux>,
    #[serde(default)]
    hooks: Option<BTreeMap<String, Option<Vec<SpecHook>>>>,
}

#[derive(Clone, Debug, Deserialize)]
struct SpecProcess {
    #[serde(default)]
    args: Option<Vec<String>>,
    #[serde(default)]
    env: Option<Vec<String>>,
}

#[derive(Clone, Debug, Deserialize)]
struct SpecLinux {
    #[serde(default)]
    devices: Option<Vec<SpecDevice>>,
    #[serde(default)]
    resources: Option<SpecResources>,
    #[serde(default)]
    namespaces: Option<Vec<SpecNamespace>>,
    #[serde(default, rename = "uidMappings")]
    uid_mappings: Option<Vec<SpecIdMapping>>,
    #[serde(default, rename = "gidMappings")]
    gid_mappings: Option<Vec<SpecIdMapping>>,
}

#[derive(Clone, Debug, Deserialize)]
struct SpecNamespace {
    #[serde(rename = "type")]
    kind: String,
}

#[derive(Clone, Debug, Deserialize)]
struct SpecIdMapping {
    #[serde(rename = "containerID")]
    inside: u32,
    #[serde(rename = "hostID")]
    outside: u32,
    #[serde(rename = "size")]
    count: u32,
}

#[derive(Clone, Debug, Deserialize)]
struct SpecDevice {
    path: PathBuf,
}

#[derive(Clone, Debug, Deserialize)]
struct SpecResources {
    #[serde(default)]
    devices: Option<Vec<SpecAccess>>,
}

#[derive(Clone, Debug, Deserialize)]
struct SpecAccess {
    #[serde(default)]
    allow: bool,
    #[serde(default)]
    major: Option<i64>,
}

#[derive(Clone, Debug, Deserialize)]
struct SpecHook {
    #[serde(default)]
    path: PathBuf,
}

#[derive(Clone, Debug, Deserialize)]
struct SpecMount {
    destination: PathBuf,
    #[serde(default, rename = "type")]
    kind: Option<String>,
    #[serde(default)]
    source: Option<String>,
    #[serde(default)]
    options: Option<Vec<String>>,
}

#[derive(Clone, Debug, Deserialize)]
struct SpecRoot {
    path: PathBuf,
}

fn too_much(count: usize, bytes: usize) -> bool {
    count > MAX_METADATA.0 || bytes > MAX_METADATA.1
}

/// Returns labels or annotations unless they exceed the limits.
pub(super) fn bounded(texts: Option<BTreeMap<String, String>>) -> Option<BTreeMap<String, String>> {
    texts.filter(|texts| {
        let bytes = texts.iter().map(|(key, value)| key.len() + value.len());
        !too_much(texts.len(), bytes.sum())
    })
}

/// The maps of a user namespace, for users and groups. Both are empty without one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct IdMaps {
    pub(super) uids: Vec<IdMapping>,
    pub(super) gids: Vec<IdMapping>,
}

impl Bundle {
    pub(super) fn read(path: &Path) -> Result<Self, Error> {
        let mut bundle: Self = read_json(path, CONFIG_CAP)?;
        bundle.drop_oversized();
        Ok(bundle)
    }

    /// Parses a spec that a runtime keeps elsewhere than in a `config.json`.
    pub(super) fn parse(json: &[u8]) -> Result<Self, serde_json::Error> {
        let mut bundle: Self = serde_json::from_slice(json)?;
        bundle.drop_oversized();
        Ok(bundle)
    }

    /// Returns the maps of the container's user namespace. Fails with the reason if they are not in the spec, because
    /// the container joined a namespace of another one.
    pub(super) fn id_maps(&self) -> Result<IdMaps, String> {
        let linux = self.linux.as_ref();
        let mut namespaces = linux.iter().filter_map(|linux| linux.namespaces.as_ref());
        if !namespaces.any(|all| all.iter().any(|namespace| namespace.kind == "user")) {
            return Ok(IdMaps::default());
        }
        let map = |of: fn(&SpecLinux) -> &Option<Vec<SpecIdMapping>>| {
            let ranges = linux
                .and_then(|linux| of(linux).as_ref())
                .into_iter()
                .flatten();
            let range = |range: &SpecIdMapping| IdMapping {
                inside: range.inside,
                outside: range.outside,
                count: range.count,
            };
            ranges.map(range).collect::<Vec<_>>()
        };
        let maps = IdMaps {
            uids: map(|linux| &linux.uid_mappings),
            gids: map(|linux| &linux.gid_mappings),
        };
        if maps.uids.is_empty() || maps.gids.is_empty() {
            return Err(
                "it was in a user namespace of another container, whose map is not in its own record"
                    .to_owned(),
            );
        }
        Ok(maps)
    }

    /// Drops variables, arguments or annotations that exceed the limits. They are dropped as a whole, because they
    /// identify the owner of a session and one that is left out could be the second of its name.
    fn drop_oversized(&mut self) {
        let length = |texts: &[String]| texts.iter().map(String::len).sum();
        if let Some(process) = &mut self.process {
            for texts in [&mut process.env, &mut process.args] {
                if texts
                    .as_ref()
                    .is_some_and(|texts| too_much(texts.len(), length(texts)))
                {
                    *texts = None;
                }
            }
        }
        self.annotations = bounded(self.annotations.take());
    }

    pub(super) fn annotation(&self, key: &str) -> Option<&str> {
        self.annotations.as_ref()?.get(key).map(String::as_str)
    }

    /// Returns where the runtime mounted the root on the node. A relative path is relative to the bundle's directory.
    pub(super) fn root_path(&self, directory: &Path) -> Option<PathBuf> {
        self.root.as_ref().map(|root| directory.join(&root.path))
    }

    /// Returns the fields that identify a session's purpose and owner.
    pub(super) fn spec(&self) -> Spec {
        let process = self.process.as_ref();
        let linux = self.linux.as_ref();
        let resources = linux.and_then(|linux| linux.resources.as_ref());
        let access = resources.and_then(|resources| resources.devices.as_ref());
        let hooks = self.hooks.iter().flat_map(BTreeMap::values).flatten();
        Spec {
            args: process.and_then(|p| p.args.clone()).unwrap_or_default(),
            env: process.and_then(|p| p.env.clone()).unwrap_or_default(),
            annotations: self.annotations.clone().unwrap_or_default(),
            devices: linux
                .and_then(|linux| linux.devices.as_ref())
                .into_iter()
                .flatten()
                .map(|device| device.path.clone())
                .collect(),
            majors: access
                .into_iter()
                .flatten()
                .filter(|access| access.allow)
                .filter_map(|access| access.major)
                .collect(),
            hooks: hooks.flatten().map(|hook| hook.path.clone()).collect(),
        }
    }

    /// Returns the mounts of the spec.
    pub(super) fn mount_points(&self) -> Vec<MountPoint> {
        let mounts = self.mounts.iter().flatten();
        mounts
            .map(|mount| {
                let destination = absolute(&mount.destination);
                let bind = mount
                    .options
                    .iter()
                    .flatten()
                    .any(|o| o == "bind" || o == "rbind");
                let kind = if bind {
                    "bind".to_owned()
                } else {
                    mount.kind.clone().unwrap_or_default()
                };
                let source = mount.source.clone().unwrap_or_default();
                let volume =
                    kind == "bind" && !made_by_runtime(&destination) && !made_by_kubelet(&source);
                MountPoint {
                    destination,
                    kind,
                    source,
                    volume,
                }
            })
            .collect()
    }
}

/// Merges the mounts of the spec with those in mountinfo, each destination once, sorted.
///
/// The spec tells what a mount is for, and the kernel what it became: hooks (GPU) mount more than the spec lists, and a
/// destination that is a symbolic link appears under its real path.
pub(super) fn merge_mounts(bundle: Option<&Bundle>, process: &Process) -> Vec<MountPoint> {
    let root = process.root().map(|root| root.id);
    let kernel: HashMap<&Path, &MountInfo> = process
        .mounts
        .iter()
        .filter(|m| Some(m.id) != root)
        .map(|m| (m.mount_point.as_path(), m))
        .collect();
    let mut united: BTreeMap<PathBuf, MountPoint> = BTreeMap::new();
    for mut mount in bundle.map(Bundle::mount_points).unwrap_or_default() {
        // The mount is also listed under its real path, so it is reported only once.
        let moved = !kernel.contains_key(mount.destination.as_path())
            && kernel.values().any(|m| {
                m.mount_point.file_name() == mount.destination.file_name()
                    && m.root != Path::new("/")
                    && Path::new(&mount.source)
                        .ends_with(m.root.strip_prefix("/").unwrap_or(&m.root))
            });
        mount.volume &= !moved;
        united.insert(mount.destination.clone(), mount);
    }
    for (destination, mount) in kernel {
        united
            .entry(destination.to_path_buf())
            .or_insert_with(|| from_mountinfo(destination, mount));
    }
    // The root itself is not a mount within the root.
    united.remove(Path::new("/"));
    united.into_values().collect()
}

/// Describes a mount that is not in the spec: made by a hook or in the container.
fn from_mountinfo(destination: &Path, mount: &MountInfo) -> MountPoint {
    let whole = mount.root == Path::new("/");
    let source = if whole {
        mount.source.to_string_lossy()
    } else {
        mount.root.to_string_lossy()
    };
    let volume = !is_virtual(&mount.fs_type)
        && !made_by_runtime(destination)
        && !made_by_kubelet(&source)
        && !HOOK_DIRECTORIES
            .iter()
            .any(|system| destination.starts_with(system));
    MountPoint {
        destination: destination.to_path_buf(),
        kind: if whole {
            mount.fs_type.clone()
        } else {
            "bind".to_owned()
        },
        source: source.into_owned(),
        volume,
    }
}

/// Directories into which hooks mount drivers and helpers of the node.
const HOOK_DIRECTORIES: [&str; 9] = [
    "/bin", "/etc", "/lib", "/lib32", "/lib64", "/run", "/sbin", "/usr", "/var/run",
];

/// Paths that runtimes mount by themselves, including everything below them.
const RUNTIME_MOUNTS: [&str; 11] = [
    "/dev",
    "/proc",
    "/sys",
    "/etc/hostname",
    "/etc/hosts",
    "/etc/mtab",
    "/etc/resolv.conf",
    "/run/.containerenv",
    "/run/secrets",
    "/var/run/secrets",
    "/.dockerenv",
];

pub(super) fn made_by_runtime(destination: &Path) -> bool {
    RUNTIME_MOUNTS
        .iter()
        .any(|own| destination.starts_with(own))
}

/// In a pod's directory on the node, only some volumes hold user data; the others are generated from objects of the API
/// server.
fn made_by_kubelet(source: &str) -> bool {
    const OBJECTS: [&str; 4] = [
        "kubernetes.io~configmap",
        "kubernetes.io~downward-api",
        "kubernetes.io~projected",
        "kubernetes.io~secret",
    ];
    let components: Vec<&OsStr> = Path::new(source)
        .components()
        .map(Component::as_os_str)
        .collect();
    // <kubelet root>/pods/UID/{etc-hosts, containers/NAME/ID, volumes/PLUGIN/NAME, volume-subpaths/...}
    let Some(pods) = components
        .windows(2)
        .position(|pair| pair[0] == "kubelet" && pair[1] == "pods")
    else {
        return false;
    };
    match components.get(pods + 3).and_then(|part| part.to_str()) {
        Some("etc-hosts" | "containers") => true,
        Some("volumes") => components
            .get(pods + 4)
            .is_some_and(|plugin| OBJECTS.iter().any(|o| plugin == o)),
        _ => false,
    }
}

pub(super) fn is_virtual(fs_type: &str) -> bool {
    const VIRTUAL: [&str; 18] = [
        "autofs",
        "binfmt_misc",
        "bpf",
        "cgroup",
        "cgroup2",
        "configfs",
        "debugfs",
        "devpts",
        "devtmpfs",
        "fusectl",
        "hugetlbfs",
        "mqueue",
        "nsfs",
        "proc",
        "pstore",
        "securityfs",
        "sysfs",
        "tmpfs",
    ];
    VIRTUAL.contains(&fs_type)
        || fs_type == "tracefs"
        || fs_type == "ramfs"
        || fs_type == "fuse.lxcfs"
}

/// Normalises a destination: old specs have no leading slash, and `.` and `..` are resolved.
pub(super) fn absolute(destination: &Path) -> PathBuf {
    let mut path = PathBuf::from("/");
    for component in destination.components() {
        match component {
            Component::Normal(name) => path.push(name),
            Component::ParentDir => {
                path.pop();
            }
            _ => {}
        }
    }
    path
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::procfs::parse_mountinfo;

    fn process(mountinfo: &str) -> Process {
        let mounts = parse_mountinfo(mountinfo.as_bytes()).unwrap();
        Process {
            pid: 1,
            start: 1,
            parent: 1,
            root: None,
            mounts,
            mounts_cut: false,
            uid_map: vec![],
            gid_map: vec![],
        }
    }

    #[test]
    fn only_mounts_with_somebodys_data_are_volumes() {
        let bind = |destination: &str, source: &str| {
            format!(
                r#"{{"destination":"{destination}","type":"bind","source":"{source}","options":["rbind","ro"]}}"#
            )
        };
        let pod = "/var/lib/kubelet/pods/0-1";
        let cases = [
            ("/home/alice", "/srv/home/alice", true),
            (
                "/data",
                &format!("{pod}/volumes/kubernetes.io~empty-dir/data"),
                true,
            ),
            (
                "/nfs",
                &format!("{pod}/volumes/kubernetes.io~nfs/data"),
                true,
            ),
            (
                "/sub",
                &format!("{pod}/volume-subpaths/data/notebook/0"),
                true,
            ),
            (
                "/conf",
                &format!("{pod}/volumes/kubernetes.io~configmap/conf"),
                false,
            ),
            (
                "/secret",
                &format!("{pod}/volumes/kubernetes.io~secret/s"),
                false,
            ),
            (
                "/message",
                &format!("{pod}/containers/notebook/0123abcd"),
                false,
            ),
            ("/etc/hosts", &format!("{pod}/etc-hosts"), false),
            ("/etc/hostname", "/x/hostname", false),
            ("/etc/resolv.conf", "/x/resolv.conf", false),
            ("/run/secrets/kubernetes.io/serviceaccount", "/x", false),
            ("/var/run/secrets/kubernetes.io/serviceaccount", "/x", false),
            ("/run/.containerenv", "/x", false),
            ("/dev/shm", "/x/shm", false),
            ("/dev/termination-log", "/x", false),
            ("/etc/hosts.d", "/x", true),
            ("/var/lib/kubelet", "/var/lib/kubelet", true),
        ];
        for (destination, source, volume) in cases {
            let json = format!(r#"{{"mounts":[{}]}}"#, bind(destination, source));
            let bundle: Bundle = serde_json::from_str(&json).unwrap();
            let mounts = merge_mounts(Some(&bundle), &process(""));
            assert_eq!(
                (mounts.len(), mounts[0].volume),
                (1, volume),
                "{destination} from {source}"
            );
        }
    }

    #[test]
    fn the_spec_says_what_a_container_was_started_with() {
        let json = r#"{"process":{"args":["jupyter","lab"],"env":["A=1","B=2","B=3","C=4","C=4","AB=5"]},
            "annotations":{"k":"v"},"hooks":{"prestart":[{"path":"/usr/bin/x"}],"poststop":null},
            "linux":{"devices":[{"path":"/dev/nvidia0","type":"c","major":195,"minor":0}],
            "resources":{"devices":[{"allow":false,"access":"rwm"},{"allow":true,"major":195,"minor":0}]}}}"#;
        let spec = serde_json::from_str::<Bundle>(json).unwrap().spec();
        assert_eq!(spec.args, ["jupyter", "lab"]);
        assert_eq!(spec.variable("A"), Some("1"));
        assert_eq!(spec.variable("C"), Some("4"));
        // Of two variables with the same name, programs differ in which one they use.
        assert_eq!(spec.variable("B"), None);
        assert_eq!(spec.variable("D"), None);
        assert_eq!(spec.devices, [Path::new("/dev/nvidia0")]);
        assert_eq!(spec.majors, [195]);
        assert_eq!(spec.hooks, [Path::new("/usr/bin/x")]);
        assert_eq!(spec.annotations["k"], "v");
        let nothing = serde_json::from_str::<Bundle>("{}").unwrap().spec();
        assert_eq!(nothing, Spec::default());
    }

    #[test]
    fn spec_and_kernel_are_united_and_a_symlinked_destination_is_reported_once() {
        let json = r#"{"mounts":[
            {"destination":"proc","type":"proc","source":"proc"},
            {"destination":"/var/run/data","type":"bind","source":"/srv/data","options":["rbind"]},
            {"destination":"/scratch","type":"tmpfs","source":"tmpfs"}
        ]}"#;
        let bundle: Bundle = serde_json::from_str(json).unwrap();
        let mounts = merge_mounts(
            Some(&bundle),
            &process(
                "305 219 0:108 / / rw - overlay overlay rw,lowerdir=/a,upperdir=/b\n\
                 306 305 0:110 / /proc rw - proc proc rw\n\
                 307 305 254:0 /srv/data /mnt/data rw - ext4 /dev/vda rw\n\
                 308 305 254:0 /usr/lib/libcuda.so.1 /usr/lib/libcuda.so.1 ro - ext4 /dev/vda rw\n\
                 309 305 0:50 / /home/a\\040b rw - nfs4 server:/export rw\n\
                 310 305 0:51 / /tmp rw - tmpfs tmpfs rw\n",
            ),
        );
        let seen: Vec<_> = mounts
            .iter()
            .map(|m| {
                (
                    m.destination.to_str().unwrap(),
                    m.kind.as_str(),
                    m.source.as_str(),
                    m.volume,
                )
            })
            .collect();
        assert_eq!(
            seen,
            [
                ("/home/a b", "nfs4", "server:/export", true),
                ("/mnt/data", "bind", "/srv/data", true),
                ("/proc", "proc", "proc", false),
                ("/scratch", "tmpfs", "tmpfs", false),
                ("/tmp", "tmpfs", "tmpfs", false),
                (
                    "/usr/lib/libcuda.so.1",
                    "bind",
                    "/usr/lib/libcuda.so.1",
                    false
                ),
                ("/var/run/data", "bind", "/srv/data", false),
            ]
        );
    }
}
