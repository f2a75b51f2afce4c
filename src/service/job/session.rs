//! What an agent tells about its node: the containers that run there, and how it fares itself.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::JobId;

/// What a session is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// A Jupyter server.
    Jupyter,
    /// An RStudio server.
    Rstudio,
    /// Anything else.
    Other,
}

/// What it computes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Category {
    /// No accelerator.
    Cpu,
    /// With one: a device or the environment of the runtime's spec says so.
    Gpu,
}

/// A running container that can be saved, as its node proves it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Session {
    /// Full ID of the container.
    pub id: String,
    /// The node it runs on.
    pub node: String,
    /// Who owns it by the centre's rule; none: nobody, only administrators see it.
    pub owner: Option<String>,
    /// Pod's namespace, where there is a pod.
    pub namespace: Option<String>,
    /// Pod's name, where there is a pod.
    pub pod: Option<String>,
    /// The container's name in its pod, or its own.
    pub container: Option<String>,
    /// Runtime: `containerd`, `crio`, `podman`, `docker`, `process`.
    pub runtime: String,
    /// What it is for.
    pub kind: Kind,
    /// What it computes on.
    pub category: Category,
    /// Name of the image that it was started from.
    pub image: Option<String>,
    /// When it was started: milliseconds since the epoch, UTC.
    pub started_ms: i64,
    /// Allocated bytes of the upper directory.
    pub upper_bytes: Option<u64>,
    /// Entries of the upper directory.
    pub upper_entries: Option<u64>,
    /// What the next save would be.
    pub next: Option<NextSave>,
    /// What is mounted and will not be saved.
    pub unsaved: Vec<Unsaved>,
    /// Mounts that are not listed in `unsaved`, for there are too many; at least so many.
    #[serde(default)]
    pub unsaved_more: u64,
    /// What is wrong with it: the reason why not all of it is told, or why it cannot be saved.
    #[serde(default)]
    pub problem: Option<String>,
}

/// What the next save of a session would be.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct NextSave {
    /// Whether it goes on top of an earlier save.
    pub delta: bool,
    /// Bytes of content that it would read; none: not known.
    pub bytes: Option<u64>,
    /// Seconds that the last save of this session took; none: there was none.
    pub last_seconds: Option<f64>,
}

/// A mount whose content is no part of the image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Unsaved {
    /// Where the container sees it.
    pub path: String,
    /// Kind of file system or volume.
    pub kind: String,
    /// Whether it holds somebody's data, as a home or a project directory does (not `/proc`, `/dev`, secrets).
    pub data: bool,
}

/// How busy a node is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Load {
    /// Cores.
    pub cores: u32,
    /// Share of the last ten seconds in which something waited for a core, in percent; none: the kernel does not say.
    pub cpu_pressure: Option<f64>,
    /// The same for I/O.
    pub io_pressure: Option<f64>,
    /// Load average of the last minute.
    pub load1: f64,
    /// Jobs that it would run now.
    pub slots: u32,
    /// Threads that it would give a job now.
    pub threads: u32,
}

/// An agent's heartbeat.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Node {
    /// Its name, unique.
    pub name: String,
    /// Version of the program.
    pub version: String,
    /// When the agent was started: milliseconds since the epoch, UTC.
    pub started_ms: i64,
    /// When it said this: milliseconds since the epoch, UTC.
    pub at_ms: i64,
    /// Whether it takes no more jobs.
    pub draining: bool,
    /// Jobs that it holds.
    pub running: Vec<JobId>,
    /// How busy the node is.
    pub load: Load,
    /// What it cannot read of its node's containers, as sentences.
    pub problems: Vec<String>,
}
