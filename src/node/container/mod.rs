//! Finding a container from the runtime's state on disk alone, and proving the image it stands on.
//!
//! Each runtime's module drafts what its files say of every container; `survey` holds the drafts against what the
//! kernel says of their processes; what both agree on is a [`Container`].

use std::collections::BTreeMap;
use std::path::PathBuf;

use oci_spec::image::Descriptor;

use crate::common::digest::{ChainId, DiffId, Digest};
use crate::node::overlay::mount::OverlayMount;
pub use crate::node::overlay::owner::IdMapping;

pub mod bolt;
mod bundle;
mod containerd;
mod docker;
mod draft;
mod error;
mod image;
mod mounted;
mod pattern;
mod placed;
mod process;
mod roots;
mod storage;
mod survey;
mod table;
mod volume;
mod witness;

pub use error::{Error, Problem};
pub use pattern::{Pattern, PatternError};
pub use roots::{ContainerdRoot, Roots, StorageRoot};
pub use survey::{Listing, find, list, recheck};
pub use table::{RootMount, Witness};
pub use volume::{Volume, VolumeRules, recheck_volume, volume};

/// Who runs a container.
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
    /// Its word in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Containerd => "containerd",
            Self::Docker => "docker",
            Self::Podman => "podman",
            Self::Crio => "crio",
            Self::Process => "process",
        }
    }
}

/// The pod that a container belongs to, as the runtime (not the pod) wrote it down.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Pod {
    /// Kubernetes namespace.
    pub namespace: String,
    /// Pod name.
    pub name: String,
    /// Name of the container within the pod.
    pub container: String,
    /// Pod UID where the runtime recorded it.
    pub uid: Option<String>,
}

/// A mount inside the container other than its root: nothing at or below `destination` belongs to the image.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct MountPoint {
    /// Absolute path inside the container.
    pub destination: PathBuf,
    /// File system type (`bind`, `tmpfs`, `proc`, ...).
    pub kind: String,
    /// Where it comes from, as the runtime or the kernel says.
    pub source: String,
    /// A volume with somebody's data in it, as opposed to what a runtime mounts by itself (`/proc`, `/etc/hosts`, ...).
    pub volume: bool,
}

/// A running container, as the runtime's state on disk describes it.
#[derive(Clone, Debug)]
pub struct Container {
    /// Who runs it.
    pub runtime: Runtime,
    /// Full ID (for [`Runtime::Process`]: `pid:N`).
    pub id: String,
    /// Human names (Docker, Podman, nerdctl), best first.
    pub names: Vec<String>,
    /// containerd's namespace (`k8s.io`, `default`, ...).
    pub namespace: Option<String>,
    /// Its pod, if it is in one.
    pub pod: Option<Pod>,
    /// Its first process, in the namespace of this program.
    pub pid: u32,
    /// Field 22 of `/proc/PID/stat`, in clock ticks since boot: pids are reused, this pair is not.
    pub pid_start: u64,
    /// Its root, as the kernel numbers it, and who says what it is made of.
    pub root: RootMount,
    /// What its root is made of.
    pub overlay: OverlayMount,
    /// User ids; empty means no user namespace, ids on disk are the container's.
    pub uid_map: Vec<IdMapping>,
    /// Group ids, likewise.
    pub gid_map: Vec<IdMapping>,
    /// Every mount inside it but the root, from the runtime's spec and the kernel's mountinfo together.
    pub mounts: Vec<MountPoint>,
    /// There are more than are listed: only in a list of all containers, never for a save.
    pub mounts_cut: bool,
    /// The image's name as the runtime recorded it (a tag: it may have moved since).
    pub image_name: Option<String>,
    /// The mode that the runtime itself gives the upper's root whatever the base says (CRI-O: 0555).
    pub runtime_root_mode: Option<u32>,
    /// What the runtime started it with; empty where nothing says so.
    pub spec: Spec,
}

/// What a container was started with, from the runtime's spec: nothing that runs in it can change that afterwards.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Spec {
    /// The first process' command line.
    pub args: Vec<String>,
    /// Its environment: `NAME=VALUE`.
    pub env: Vec<String>,
    /// Annotations, those of the runtime itself included.
    pub annotations: BTreeMap<String, String>,
    /// Device nodes that the runtime makes.
    pub devices: Vec<PathBuf>,
    /// Major numbers of devices that it may use.
    pub majors: Vec<i64>,
    /// Programs that run when it starts and ends.
    pub hooks: Vec<PathBuf>,
}

impl Spec {
    /// The value of an environment variable; none when there are several that differ.
    pub fn variable(&self, name: &str) -> Option<&str> {
        let pairs = self.env.iter().filter_map(|line| line.split_once('='));
        let mut values = pairs
            .filter(|(key, _)| *key == name)
            .map(|(_, value)| value);
        let first = values.next()?;
        values.all(|value| value == first).then_some(first)
    }
}

impl Container {
    /// When its first process was started: milliseconds since the epoch, UTC; none where `/proc/stat` does not say when
    /// the node was.
    pub fn started_ms(&self, roots: &Roots) -> Option<i64> {
        process::started_ms(roots, self.pid_start)
    }
}

/// The image that a container stands on, proven against the mounted lowers.
#[derive(Clone, Debug)]
pub struct Base {
    /// Reference under which the base was pulled, for `org.opencontainers.image.base.name` and for fetching layers.
    pub name: Option<String>,
    /// The image manifest, byte for byte, where the runtime keeps it (Docker's graph driver does not).
    pub manifest: Option<RawManifest>,
    /// The image config, byte for byte.
    pub config: Vec<u8>,
    /// Bottom first; exactly the config's `rootfs.diff_ids`.
    pub layers: Vec<BaseLayer>,
    /// How it was proven, in words for `inspect` and the metadata file.
    pub proof: String,
}

/// A manifest as stored: its digest is over exactly these bytes.
#[derive(Clone, Debug)]
pub struct RawManifest {
    /// The bytes.
    pub bytes: Vec<u8>,
    /// Its media type.
    pub media_type: String,
    /// Its digest.
    pub digest: Digest,
}

/// One layer of a base.
#[derive(Clone, Debug)]
pub struct BaseLayer {
    /// Digest of the uncompressed tar.
    pub diff_id: DiffId,
    /// Of the stack up to and including this layer.
    pub chain_id: ChainId,
    /// The mounted directory that holds this layer unpacked (`--host-root` applied); none for image-backed lowers.
    pub lower: Option<PathBuf>,
    /// The compressed blob as the manifest has it. Docker knows digests without sizes: then size is 0 and `size_known` false.
    pub descriptor: Option<Descriptor>,
    /// Whether `descriptor.size` is to be believed.
    pub size_known: bool,
    /// The compressed blob on this node, if it is still there.
    pub local_blob: Option<PathBuf>,
    /// `HOST/REPOSITORY`s that are known to have (had) the blob, best first.
    pub repositories: Vec<String>,
}

/// Proves which image a container stands on: the mounted lower directories give a chain of snapshots, the chain gives
/// chain IDs, and the base is the image whose config's diff IDs give exactly these. A tag is never believed.
///
/// Fails with [`Error::BaseUnproven`] when no image on this node fits, always so for [`Runtime::Process`].
pub fn prove_base(roots: &Roots, container: &Container) -> Result<Base, Error> {
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

/// When a process of this program's own PID namespace was started, in clock ticks since boot; none where there is none, or
/// only its zombie.
pub fn process_start(pid: u32) -> Option<u64> {
    process::start_of(&Roots::default(), pid).ok().flatten()
}
