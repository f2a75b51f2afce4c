//! Determines what the next save of a container would be without making it: a full save or a delta, and its size.
//! Nothing is frozen or written, and only this node is queried.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use super::earlier::{self, ContentOptions, LastSave};
use super::{Error, Rules, trees};
use crate::layer::Plan;
use crate::layer::scan::{self, Scan};
use crate::node::container::{self, Base, Container, VolumeRules};
use crate::save::state_store::Store;

/// The options of a save that determine what it would be.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NextSaveOptions<'a> {
    /// The rules for what goes into the layers.
    pub(crate) rules: &'a Rules,
    /// Mount points of the volumes that would be saved too.
    pub(crate) volumes: &'a [PathBuf],
    /// As [`super::Options::volume_rules`].
    pub(crate) volume_rules: &'a VolumeRules,
    /// As [`super::Options::timestamp`].
    pub(crate) timestamp: Option<i64>,
    /// Directory in which the last save is kept. `None` means that nothing is kept.
    pub(crate) state_dir: Option<&'a Path>,
    /// As [`super::Options::max_layers`].
    pub(crate) max_layers: usize,
    /// Save everything anew in any case.
    pub(crate) full: bool,
    /// Number of threads.
    pub(crate) jobs: usize,
}

/// The kind of a save.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Kind {
    /// What changed since the last save, on top of its image.
    Delta,
    /// Everything, on top of the base.
    Full,
}

/// The next save, as far as this node can determine it: whether the destination still has the layers of the last one is
/// unknown until it is asked.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub(crate) struct NextSave {
    /// The kind of the save.
    pub(crate) kind: Kind,
    /// The reason for this kind.
    pub(crate) reason: String,
    /// Number of entries of the layers to be made.
    pub(crate) entries: u64,
    /// Size of these layers before compression, in bytes.
    pub(crate) bytes: u64,
    /// Number of layers above the base that the image would have (more if `--layer-size` divides them).
    pub(crate) layers: usize,
    /// Whether only times of directories have changed since the last save, as where temporary files came and went.
    pub(crate) times_only: bool,
}

/// Examines the container as it is now, and returns the scans of its trees, too. A delta needs the status of every entry, a full save a complete walk.
///
/// Fails as a save would if the contents cannot be read.
pub(crate) fn next_save(
    roots: &container::Roots,
    container: &Container,
    base: &Base,
    question: &NextSaveOptions<'_>,
    cancel: &CancellationToken,
) -> Result<(NextSave, Vec<Arc<Scan>>), Error> {
    let volumes = trees::open(roots, container, question.volumes, question.volume_rules)?;
    let look = |earlier: Option<&[Arc<Scan>]>| {
        let scans = trees::scan_all(
            question.rules,
            container,
            &volumes,
            earlier,
            question.jobs,
            cancel,
        );
        Ok::<_, Error>(trees::limit_trust(scans?, &volumes, None))
    };
    let granted = ContentOptions {
        rules: question.rules,
        timestamp: question.timestamp,
    };
    let upper = earlier::inode_of(container)?;
    let fingerprint = earlier::fingerprint(&granted, container, &volumes, base, upper)?;
    let last = match question.state_dir {
        _ if question.full => LastSave::NotUsed("everything is asked for".to_owned()),
        None => LastSave::NotUsed("nothing is kept of saves".to_owned()),
        Some(dir) => LastSave::of(
            &Store::new(dir),
            container,
            base,
            fingerprint,
            question.max_layers,
        ),
    };
    let reason = match last {
        LastSave::Nothing => "there is no state of an earlier save".to_owned(),
        LastSave::NotUsed(reason) => reason,
        LastSave::Save(kept) => {
            let below = kept.description.layers.len();
            let known = earlier::baselines_of_stored(kept.stored);
            let now = look(Some(&trees::scans(&known)))?;
            if let Some(changes) = trees::changes(&known, &now) {
                let only_directories = |scan: &Arc<Scan>| {
                    let mut emitted = scan.emitted();
                    emitted.all(|at| scan.entry(at).kind == scan::Kind::Dir)
                };
                let times_only = changes.iter().all(only_directories)
                    && trees::differ_only_in_times(&known, &now);
                let plans = trees::split_plans(trees::plans(changes, question.timestamp), None);
                let layers = below + plans.len();
                let reason = "the last save's image can be built on".to_owned();
                let next = NextSave {
                    times_only,
                    ..sum(Kind::Delta, reason, &plans, layers)
                };
                return Ok((next, now));
            }
            "what changed cannot be said on top of the last save".to_owned()
        }
    };
    let now = look(None)?;
    let plans = trees::split_plans(trees::plans(now.clone(), question.timestamp), None);
    let layers = plans.len();
    Ok((sum(Kind::Full, reason, &plans, layers), now))
}

fn sum(kind: Kind, reason: String, plans: &[Plan], layers: usize) -> NextSave {
    NextSave {
        kind,
        reason,
        entries: plans.iter().map(|plan| plan.len() as u64).sum(),
        bytes: plans.iter().map(Plan::tar_size).sum(),
        layers,
        times_only: false,
    }
}
