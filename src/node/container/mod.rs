//! Finds containers from the runtimes' state on disk alone, and proves the image that a container is based on.
//!
//! Each runtime's module drafts containers from its files. `discovery` compares the drafts with the kernel's view of their
//! processes; what both agree on becomes a [`Container`].

use std::collections::BTreeMap;
use std::path::PathBuf;

use oci_spec::image::Descriptor;

use crate::common::digest::{ChainId, DiffId, Digest};
pub(crate) use crate::node::overlay::id_map::IdMapping;
use crate::node::overlay::mount::OverlayMount;

pub mod bolt;
mod bundle;
mod containerd;
mod crio_pod;
mod discovery;
mod docker;
mod ended;
mod error;
mod image;
mod layer_check;
mod listing;
mod mount_tables;
mod pattern;
mod process;
mod recorded;
mod records;
mod root_mount;
mod roots;
mod storage;
mod table;
mod volume;

pub use discovery::{Attempt, find, find_any, of_pod, recheck};
pub use ended::{End, Ended};
pub use error::{Error, Problem};
pub use listing::{EndedListing, Listing, list, list_ended};
pub use pattern::{Pattern, PatternError};
pub use records::is_initial_user_namespace;
pub use roots::{ContainerdRoot, Roots, StorageRoot};
pub use table::{RootMount, TableSource};
pub(crate) use volume::{Volume, VolumeRules, recheck_volume, volume};

/// The runtime of a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Runtime {
    /// containerd: Kubernetes' CRI, nerdctl, ctr.
    Containerd,
    /// Docker with the overlay2 graph driver.
    Docker,
    /// Podman, on containers/storage.
    Podman,
    /// CRI-O, on containers/storage.
    Crio,
    /// Any process whose root is an overlay (`pid:N`).
    Process,
}

impl Runtime {
    /// Returns its name in JSON.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Containerd => "containerd",
            Self::Docker => "docker",
            Self::Podman => "podman",
            Self::Crio => "crio",
            Self::Process => "process",
        }
    }
}

/// The pod of a container, as recorded by the runtime rather than by the pod.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Pod {
    /// Kubernetes namespace.
    pub namespace: String,
    /// Pod name.
    pub name: String,
    /// Name of the container within the pod.
    pub container: String,
    /// Pod UID, if the runtime recorded it.
    pub uid: Option<String>,
    /// Labels that the pod had when its sandbox was created; empty if the runtime recorded none, or too many.
    #[serde(skip)]
    pub labels: BTreeMap<String, String>,
    /// Annotations that the pod had when its sandbox was created; empty if the runtime recorded none, or too many.
    #[serde(skip)]
    pub annotations: BTreeMap<String, String>,
}

impl Pod {
    /// Returns the name of the pod's default container, according to the annotation of the pod that the runtime recorded.
    pub fn default_container(&self) -> Option<&String> {
        self.annotations.get(crate::common::pod::DEFAULT_CONTAINER)
    }

    /// Returns what an annotation of the pod says, or else the label with the same name.
    #[cfg(feature = "service")]
    pub(crate) fn said(&self, key: &str) -> Option<&str> {
        let annotated = self.annotations.get(key);
        let said = annotated.or_else(|| self.labels.get(key));
        said.map(String::as_str)
    }

    /// Returns whether this is the same container of the same pod, whatever is known of its labels.
    fn is_same(&self, other: &Self) -> bool {
        (&self.namespace, &self.name, &self.container, &self.uid)
            == (&other.namespace, &other.name, &other.container, &other.uid)
    }
}

/// A mount in the container other than its root. Nothing at or below `destination` belongs to the image.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct MountPoint {
    /// Absolute path in the container.
    pub destination: PathBuf,
    /// File system type (`bind`, `tmpfs`, `proc`, ...).
    pub kind: String,
    /// Source according to the runtime or the kernel.
    pub source: String,
    /// Whether this is a volume with user data, as opposed to a mount of the runtime (`/proc`, `/etc/hosts`, ...).
    pub volume: bool,
}

/// The first process of a container, and the root that it sees.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Running {
    /// PID of the first process, in the PID namespace of this program.
    pub pid: u32,
    /// Field 22 of `/proc/PID/stat`, in clock ticks since boot. PIDs are reused, but this pair is not.
    pub pid_start: u64,
    /// Its root mount, with its device number and the mount table that is trusted for its directories.
    pub root: RootMount,
}

/// Whether a container has processes.
#[derive(Clone, Debug)]
pub enum Life {
    /// It runs.
    Running(Running),
    /// It has ended, or was never started, and its files are still on disk.
    Ended(Ended),
}

/// A container according to the runtime's state on disk.
#[derive(Clone, Debug)]
pub struct Container {
    /// The runtime.
    pub runtime: Runtime,
    /// Full ID (for [`Runtime::Process`]: `pid:N`).
    pub id: String,
    /// Names (Docker, Podman, nerdctl), the preferred one first.
    pub names: Vec<String>,
    /// containerd's namespace (`k8s.io`, `default`, ...).
    pub namespace: Option<String>,
    /// Its pod, if it is in one.
    pub pod: Option<Pod>,
    /// Its first process, or how it ended.
    pub life: Life,
    /// The directories of its root.
    pub overlay: OverlayMount,
    /// UID map. Empty without a user namespace, when IDs on disk are those of the container.
    pub uid_map: Vec<IdMapping>,
    /// GID map. Empty without a user namespace.
    pub gid_map: Vec<IdMapping>,
    /// Every mount in it except the root, merged from the runtime's spec and mountinfo; of a container that has ended,
    /// from the runtime's records.
    pub mounts: Vec<MountPoint>,
    /// Whether the list of mounts is incomplete. This occurs only in a list of all containers, never for a save.
    pub mounts_cut: bool,
    /// Name of the image as recorded by the runtime. It is a tag and may have been moved since.
    pub image_name: Option<String>,
    /// Mode that the runtime itself sets on the upper directory's root, regardless of the base (CRI-O: 0555).
    pub runtime_root_mode: Option<u32>,
    /// The settings that the runtime started it with; empty if there is no record of them.
    pub spec: Spec,
}

/// The settings that a container was started with, from the runtime's spec. Processes in the container cannot change
/// them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Spec {
    /// Command line of the first process.
    pub args: Vec<String>,
    /// Environment variables as `NAME=VALUE`.
    pub env: Vec<String>,
    /// Annotations, including those of the runtime itself.
    pub annotations: BTreeMap<String, String>,
    /// Device nodes that the runtime creates.
    pub devices: Vec<PathBuf>,
    /// Major numbers of the devices that it may access.
    pub majors: Vec<i64>,
    /// Programs that run when it starts and ends.
    pub hooks: Vec<PathBuf>,
}

impl Spec {
    /// Returns the value of an environment variable, or `None` if it is missing or has several different values.
    #[cfg(feature = "service")]
    pub(crate) fn variable(&self, name: &str) -> Option<&str> {
        let pairs = self.env.iter().filter_map(|line| line.split_once('='));
        let mut values = pairs
            .filter(|(key, _)| *key == name)
            .map(|(_, value)| value);
        let first = values.next()?;
        values.all(|value| value == first).then_some(first)
    }
}

impl Container {
    /// Returns its first process, or `None` if it has ended.
    pub fn running(&self) -> Option<&Running> {
        match &self.life {
            Life::Running(running) => Some(running),
            Life::Ended(_) => None,
        }
    }

    /// Returns how it ended, or `None` if it runs.
    pub fn ended(&self) -> Option<&Ended> {
        match &self.life {
            Life::Running(_) => None,
            Life::Ended(ended) => Some(ended),
        }
    }

    /// Returns how its directories are known to be on others, for texts about a proof.
    fn stands_on(&self) -> &'static str {
        match self.life {
            Life::Running(_) => "mounted on",
            Life::Ended(_) => "not mounted, on record on",
        }
    }

    /// Returns its first process. Fails with [`Error::Gone`] if it has ended.
    pub(crate) fn require_running(&self) -> Result<&Running, Error> {
        self.running().ok_or_else(|| Error::Gone {
            container: self.id.clone(),
            detail: "it has no process".to_owned(),
        })
    }

    /// Returns the start time of the first process in milliseconds since the epoch (UTC), or `None` if it has ended
    /// or `/proc/stat` does not contain the boot time.
    #[cfg(feature = "service")]
    pub(crate) fn started_ms(&self, roots: &Roots) -> Option<i64> {
        process::started_ms(roots, self.running()?.pid_start)
    }
}

/// The image that a container is based on, proven by the mounted lower directories.
#[derive(Clone, Debug)]
pub struct Base {
    /// Reference by which the base was pulled, for `org.opencontainers.image.base.name` and for fetching layers.
    pub name: Option<String>,
    /// The image manifest, byte for byte, if the runtime keeps it (Docker's graph driver does not).
    pub manifest: Option<RawManifest>,
    /// The image config, byte for byte.
    pub config: Vec<u8>,
    /// Layers, bottom first; they correspond to the config's `rootfs.diff_ids`.
    pub layers: Vec<BaseLayer>,
    /// How it was proven, as a text for `inspect` and the metadata file.
    pub proof: String,
}

/// A manifest as stored.
#[derive(Clone, Debug)]
pub struct RawManifest {
    /// The bytes that the digest covers.
    pub bytes: Vec<u8>,
    /// Media type.
    pub media_type: String,
    /// Digest of the bytes.
    pub digest: Digest,
}

/// A layer of a base.
#[derive(Clone, Debug)]
pub struct BaseLayer {
    /// Digest of the uncompressed tar.
    pub diff_id: DiffId,
    /// Chain ID of the layers up to and including this one.
    pub chain_id: ChainId,
    /// The mounted directory with this layer unpacked (with `--host-root` applied); `None` for a lower that is an
    /// image.
    pub lower: Option<PathBuf>,
    /// Descriptor of the compressed blob from the manifest. Docker records digests without sizes; then the size is 0
    /// and `size_known` is false.
    pub descriptor: Option<Descriptor>,
    /// Whether `descriptor.size` is valid.
    pub size_known: bool,
    /// Path of the compressed blob on this node, if it exists.
    pub local_blob: Option<PathBuf>,
    /// Repositories (`HOST/REPOSITORY`) that are known to have or have had the blob, the preferred one first.
    pub repositories: Vec<String>,
}

/// Proves which image a container is based on. The mounted lower directories identify a chain of snapshots, the
/// snapshots their chain IDs, and the base is the image whose config's diff IDs give exactly these chain IDs. Tags are
/// never trusted.
///
/// Fails with [`Error::BaseUnproven`] if no image on this node matches, and always for [`Runtime::Process`].
pub fn prove_base(roots: &Roots, container: &Container) -> Result<Base, Error> {
    let roots = &roots.believed(&mut Vec::new());
    match container.runtime {
        Runtime::Containerd => containerd::prove(roots, container),
        Runtime::Docker => docker::prove(roots, container),
        Runtime::Podman | Runtime::Crio => storage::prove(roots, container),
        Runtime::Process => Err(Error::BaseUnproven {
            container: container.id.clone(),
            compared: vec![
                "no runtime on this node says what this process was started from".to_owned(),
            ],
        }),
    }
}

/// Returns the start time of a process in this program's PID namespace, in clock ticks since boot, or `None` if it does
/// not exist or is a zombie.
pub fn process_start(pid: u32) -> Option<u64> {
    process::start_of(&Roots::default(), pid).ok().flatten()
}
