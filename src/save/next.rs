//! What the next save of a container would be, without making it: all of it, or what changed since the last one, and how
//! much that is. Nothing is frozen, nothing is written, nobody is asked but this node.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::earlier::{self, Granted, Last};
use super::{Error, Rules, trees};
use crate::common::cancel::Cancel;
use crate::layer::Plan;
use crate::layer::scan::Scan;
use crate::node::container::{self, Base, Container, VolumeRules};
use crate::save::kept::Store;

/// The options of a save that decide what it would be.
#[derive(Clone, Copy, Debug)]
pub struct Question<'a> {
    /// What would go into the layers.
    pub rules: &'a Rules,
    /// Where the volumes are mounted that would be saved, too.
    pub volumes: &'a [PathBuf],
    /// As [`super::Options::volume_rules`].
    pub volume_rules: &'a VolumeRules,
    /// As [`super::Options::timestamp`].
    pub timestamp: Option<i64>,
    /// Where what the last save left is kept; none: nowhere.
    pub state_dir: Option<&'a Path>,
    /// As [`super::Options::max_layers`].
    pub max_layers: usize,
    /// Save everything anew in any case.
    pub full: bool,
    /// Threads.
    pub jobs: usize,
}

/// What a save would be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// What changed since the last save, on top of its image.
    Delta,
    /// Everything, on top of the base.
    Full,
}

/// The next save, as far as this node can tell: whether the destination still has the layers of the last one is not known
/// before it is asked.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct NextSave {
    /// Which.
    pub kind: Kind,
    /// Why it is not the other one.
    pub reason: String,
    /// Entries of the layers to come.
    pub entries: u64,
    /// Their bytes before they are compressed.
    pub bytes: u64,
    /// Layers above the base that the image would have (more where `--layer-size` cuts them).
    pub layers: usize,
}

/// Looks at the container as it is now. A delta costs a status of every entry, everything costs a walk.
///
/// Fails as a save would that cannot read what there is to save.
pub fn next_save(
    roots: &container::Roots,
    container: &Container,
    base: &Base,
    question: &Question<'_>,
    cancel: &Cancel,
) -> Result<NextSave, Error> {
    let volumes = trees::open(roots, container, question.volumes, question.volume_rules)?;
    let scan = |earlier: Option<&[Arc<Scan>]>| {
        let scans = trees::scan_all(
            question.rules,
            container,
            &volumes,
            earlier,
            question.jobs,
            cancel,
        );
        Ok::<_, Error>(trees::trusted(scans?, &volumes, None))
    };
    let granted = Granted {
        rules: question.rules,
        timestamp: question.timestamp,
    };
    let upper = earlier::inode_of(container)?;
    let fingerprint = earlier::fingerprint(&granted, container, &volumes, base, upper)?;
    let last = match question.state_dir {
        _ if question.full => Last::NotUsed("everything is asked for".to_owned()),
        None => Last::NotUsed("nothing is kept of saves".to_owned()),
        Some(dir) => Last::of(
            &Store::new(dir),
            container,
            base,
            fingerprint,
            question.max_layers,
        ),
    };
    let reason = match last {
        Last::Nothing => "nothing is kept of an earlier save".to_owned(),
        Last::NotUsed(reason) => reason,
        Last::Save(kept) => {
            let below = kept.description.layers.len();
            let known = earlier::restored(kept.stored);
            let now = scan(Some(&trees::scans(&known)))?;
            if let Some(changes) = trees::changes(&known, &now) {
                let plans = trees::cut(trees::plans(changes, question.timestamp), None);
                let layers = below + plans.len();
                let reason = "the last save's image can be built on".to_owned();
                return Ok(sum(Kind::Delta, reason, &plans, layers));
            }
            "what changed cannot be said on top of the last save".to_owned()
        }
    };
    let plans = trees::cut(trees::plans(scan(None)?, question.timestamp), None);
    let layers = plans.len();
    Ok(sum(Kind::Full, reason, &plans, layers))
}

fn sum(kind: Kind, reason: String, plans: &[Plan], layers: usize) -> NextSave {
    NextSave {
        kind,
        reason,
        entries: plans.iter().map(|plan| plan.len() as u64).sum(),
        bytes: plans.iter().map(Plan::tar_size).sum(),
        layers,
    }
}
