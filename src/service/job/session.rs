//! What an agent reports about its node: the containers that run or have ended, and the state of the agent itself.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{JobId, SaveEnded};
use crate::image::packages::Packages;

/// Kind of application that a session runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// A Jupyter server.
    Jupyter,
    /// An RStudio server.
    Rstudio,
    /// Anything else.
    #[default]
    Other,
}

/// Whether a session uses an accelerator.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Category {
    /// No accelerator.
    #[default]
    Cpu,
    /// An accelerator is present, according to a device or the environment in the runtime's spec.
    Gpu,
}

/// How a session ended whose container is still on disk.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct SessionEnd {
    /// When it ended: milliseconds since the epoch, UTC. If its runtime has not recorded it, when the agent noticed it;
    /// absent if that is not known either.
    pub at_ms: Option<i64>,
    /// Exit code of its first process, 128 and the number of a signal if one ended it; absent if its runtime has not
    /// recorded it.
    pub exit_code: Option<i64>,
    /// Whether it ended because its memory was used up, according to its runtime.
    pub out_of_memory: bool,
    /// Whether it is to be saved without being asked for, as its pod or else its node's administrator says.
    #[serde(default)]
    pub save: bool,
    /// Whether the pod said so, which goes before what its user wants.
    #[serde(default)]
    pub by_pod: bool,
    /// Whether no more will be known about its end.
    #[serde(default)]
    pub settled: bool,
}

/// A container that can be saved, with the properties that its node has verified.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Session {
    /// Full ID of the container.
    pub id: String,
    /// The node it runs on, or has run on.
    pub node: String,
    /// Owner by the site's ownership rule. If absent, the session has no owner and only administrators see it.
    pub owner: Option<String>,
    /// Namespace of the pod, if there is one.
    pub namespace: Option<String>,
    /// Name of the pod, if there is one.
    pub pod: Option<String>,
    /// Name of the container in its pod, or its own name.
    pub container: Option<String>,
    /// Name of the default container of its pod, if the pod has one by annotation.
    #[serde(default)]
    pub default_container: Option<String>,
    /// Runtime: `containerd`, `crio`, `podman`, `docker`, `process`.
    pub runtime: String,
    /// Kind of application.
    pub kind: Kind,
    /// Accelerator category.
    pub category: Category,
    /// Name of the image that the container was started from.
    pub image: Option<String>,
    /// Start time: milliseconds since the epoch, UTC; 0 if it is not known.
    pub started_ms: i64,
    /// How it ended; absent while it runs.
    #[serde(default)]
    pub ended: Option<SessionEnd>,
    /// Allocated size of the upper directory, in bytes.
    pub upper_bytes: Option<u64>,
    /// Number of entries in the upper directory.
    pub upper_entries: Option<u64>,
    /// Forecast of the next save.
    pub next: Option<NextSave>,
    /// Mounts that will not be saved.
    pub unsaved: Vec<Unsaved>,
    /// Number of mounts that are left out of `unsaved` because there are too many. A lower bound.
    #[serde(default)]
    pub unsaved_more: u64,
    /// The packages that differ from those of the base, shortened; absent if the session has not been looked at yet.
    #[serde(default)]
    pub packages: Option<Packages>,
    /// Why the data are incomplete, or why the session cannot be saved.
    #[serde(default)]
    pub problem: Option<String>,
    /// The inspection that sizes, forecast and packages are from; absent if there was none since the last save.
    #[serde(default)]
    pub look: Option<Look>,
    /// What its pod says about autosaves.
    #[serde(default)]
    pub autosave: Option<AutosaveWish>,
    /// What its pod or else its node's administrator says about its end; absent if the agent is of an earlier version.
    #[serde(default)]
    pub at_end: Option<EndWish>,
    /// Whether it is another container of its pod than the one that the pod's name means: a proxy, or not the default one.
    #[serde(default)]
    pub auxiliary: bool,
}

/// An inspection of a session: its node looked at all files, without freezing it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Look {
    /// When it began, by the node's clock: milliseconds since the epoch, UTC.
    pub at_ms: i64,
    /// The last save of the session that had ended by then; absent if there was none since the agent was started.
    pub after: Option<JobId>,
}

/// What the pod of a session says about its autosaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum AutosaveWish {
    /// There are none.
    Off,
    /// There is one after so much time, if something changed.
    Every {
        /// Minutes from the end of a save to the next one.
        minutes: u32,
        /// Number of the latest ones that are kept, if the pod says one.
        keep: Option<u32>,
    },
}

/// Whether a session is saved when it ends, as far as its node knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct EndWish {
    /// After which ends.
    pub wanted: SaveEnded,
    /// Whether its pod says so, which goes before what its user wants; else its node's administrator does.
    pub by_pod: bool,
}

/// Forecast of the next save of a session.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct NextSave {
    /// Whether it will be a delta on top of an earlier save.
    pub delta: bool,
    /// Bytes of content that it will read; absent if unknown.
    pub bytes: Option<u64>,
    /// Number of entries that it will have: for a delta those that changed since the last save, with those that were
    /// removed; absent if unknown.
    #[serde(default)]
    pub entries: Option<u64>,
    /// Whether only times of directories have changed since the last save, as where temporary files came and went.
    #[serde(default)]
    pub times_only: bool,
    /// Duration of the last save of this session, in seconds; absent if there was none.
    pub last_seconds: Option<f64>,
}

/// A mount whose content is not part of the image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Unsaved {
    /// Mount point inside the container.
    pub path: String,
    /// Type of file system or volume.
    pub kind: String,
    /// Whether it holds user data, as a home or project directory does (unlike `/proc`, `/dev` and secrets).
    pub data: bool,
}

/// How busy a node is.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Load {
    /// Number of cores.
    pub cores: u32,
    /// Share of the last ten seconds in which some task waited for a CPU, in percent; absent if the kernel does not
    /// report it.
    pub cpu_pressure: Option<f64>,
    /// The same for I/O.
    pub io_pressure: Option<f64>,
    /// Load average over the last minute.
    pub load1: f64,
    /// Number of jobs that the agent would run at present.
    pub slots: u32,
    /// Number of threads that the agent would give to a job at present.
    pub threads: u32,
    /// Whether jobs run in the background: they get what others leave.
    #[serde(default)]
    pub background: bool,
    /// Whether the owner of a save may have it run at normal priority instead.
    #[serde(default)]
    pub hurry: bool,
}

/// An agent's heartbeat.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Node {
    /// Name of the node; unique.
    pub name: String,
    /// Version of the program.
    pub version: String,
    /// Start time of the agent: milliseconds since the epoch, UTC.
    pub started_ms: i64,
    /// Time of the heartbeat: milliseconds since the epoch, UTC.
    pub at_ms: i64,
    /// Whether the agent is draining, i.e. takes no more jobs.
    pub draining: bool,
    /// Jobs that the agent holds.
    pub running: Vec<JobId>,
    /// How busy the node is.
    pub load: Load,
    /// Problems with reading the node's containers, as sentences.
    pub problems: Vec<String>,
    /// Number of containers that have ended and are not among the sessions, because those ended later.
    #[serde(default)]
    pub ended_more: u64,
    /// Changes whenever there are other sessions that are to be saved without being asked for; absent if there are none.
    #[serde(default)]
    pub to_save: Option<u64>,
}
