//! The options of a save.

use std::path::PathBuf;
use std::time::Duration;

use super::{Gate, LayerSize, Member, Rules};
use crate::common::private_files::FileMode;
use crate::layer::Compression;
use crate::node::background::{Background, NormalPriority};
use crate::node::container::{Attempt, VolumeRules};
use crate::store::destination::Replaceable;

/// What happens to the container while its files are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Pause {
    /// Frozen for an instant, to take what changed while the rest was read and delivered.
    Live,
    /// Frozen while the layer is read.
    Full,
    /// Not frozen: files that change while they are read are reported.
    None,
}

/// The options of `upperdeck commit`, resolved from the flags.
#[derive(Clone, Debug)]
pub(crate) struct Options {
    /// CONTAINER as the user wrote it.
    pub(crate) container: String,
    /// Which run of the container is meant.
    pub(crate) attempt: Attempt,
    /// DESTINATION as the user wrote it.
    pub(crate) destination: String,
    /// Author for the history entry and the config.
    pub(crate) author: Option<String>,
    /// Message, for the history comment.
    pub(crate) message: Option<String>,
    /// Texts of `--change`, in order.
    pub(crate) changes: Vec<String>,
    /// The image that the tag may be taken from. `None`: any.
    pub(crate) replaceable: Option<Replaceable>,
    /// Whether the image that the tag moves away from is deleted in Harbor, if nothing needs it.
    pub(crate) delete_replaced: bool,
    /// Labels of the project in Harbor that the image gets.
    pub(crate) harbor_labels: Vec<String>,
    /// `--label` K=V.
    pub(crate) labels: Vec<(String, String)>,
    /// `--annotation` K=V, on the manifest.
    pub(crate) annotations: Vec<(String, String)>,
    /// Whether to freeze the container.
    pub(crate) pause: Pause,
    /// The longest time for which the container may be frozen. `None` or zero means no limit.
    pub(crate) max_pause: Option<Duration>,
    /// Maximum bytes of changes that may be kept in memory while the container runs.
    pub(crate) live_limit: u64,
    /// Directory for what the next save needs. `None` means that nothing is kept.
    pub(crate) state_dir: Option<PathBuf>,
    /// Maximum number of layers above the base, those of a full save counted as one. Beyond it, everything is saved anew.
    pub(crate) max_layers: usize,
    /// Save everything anew in any case.
    pub(crate) full: bool,
    /// The codec.
    pub(crate) compression: Compression,
    /// Level of the codec, within [`Compression::levels`].
    pub(crate) level: u32,
    /// Number of threads. `None` means all cores.
    pub(crate) jobs: Option<usize>,
    /// When another layer is begun. `None` means only if the change set is large, in the same way on every machine.
    pub(crate) layer_size: Option<LayerSize>,
    /// What goes into the layer.
    pub(crate) rules: Rules,
    /// `--include-volume`: mount points of the volumes that are saved too.
    pub(crate) volumes: Vec<PathBuf>,
    /// `--allow-volume`, `--volume-identity`: which of them may be saved, and with whose rights they are read.
    pub(crate) volume_rules: VolumeRules,
    /// `--base` IMAGE, for `pid:N`: `oci:DIR[:TAG]`, `oci-archive:FILE[:TAG]` or a registry reference.
    pub(crate) base: Option<String>,
    /// Maximum for all times, in seconds since the epoch; also the value of `created`.
    pub(crate) timestamp: Option<i64>,
    /// Path of a JSON file for all figures.
    pub(crate) metadata_file: Option<PathBuf>,
    /// Mode of the files that are created: layout, archive, metadata, digest. `None` means readable by the owner alone,
    /// or the mode of an existing layout.
    pub(crate) output_mode: Option<FileMode>,
    /// `--share-blobs`: directory with layouts whose blobs a layout as destination gets by hard links.
    pub(crate) share_blobs: Option<PathBuf>,
    /// Path of a file for the manifest's digest.
    pub(crate) digestfile: Option<PathBuf>,
    /// The gate that must open before the tag is set.
    pub(crate) gate: Option<Gate>,
    /// A file that exists while the container may be frozen by this save ([`crate::node::freeze::Options::mark`]).
    pub(crate) freeze_mark: Option<PathBuf>,
    /// The group of saves at one instant that this one belongs to.
    pub(crate) together: Option<Member>,
    /// The background priority, which is left while the container is frozen.
    pub(crate) background: Option<Background>,
}

impl Options {
    /// Returns to the usual priority while another program waits for the save.
    pub(super) fn normal_priority(&self) -> Option<NormalPriority> {
        self.background.as_ref().map(Background::normal_priority)
    }
}
