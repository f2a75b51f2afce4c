//! Deletes what no image needs, in one layout or in all layouts of a directory, and lets these share equal blobs.

use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::store::layout::{
    self, Directory, Merged, PruneOptions, PruneProgress, Pruned, layouts_below,
};

/// The result of [`prune`].
#[derive(Debug, Serialize)]
pub(crate) struct PruneReport {
    /// Whether nothing was deleted, and this is what would be.
    pub(crate) dry_run: bool,
    /// The layouts that could be pruned, sorted by path.
    pub(crate) layouts: Vec<PrunedLayout>,
    /// Those that could not, with the reason.
    pub(crate) failed: Vec<FailedLayout>,
    /// Blobs that became hard links of one file; `None` for a single layout.
    pub(crate) merged: Option<Merged>,
    /// Bytes that are free again, in all.
    pub(crate) freed: u64,
    /// Whether the work was ended early.
    pub(crate) cancelled: bool,
}

/// A layout and what was deleted there.
#[derive(Debug, Serialize)]
pub(crate) struct PrunedLayout {
    /// Its directory.
    pub(crate) layout: PathBuf,
    #[serde(flatten)]
    pub(crate) pruned: Pruned,
}

/// A layout in which nothing was deleted, or not everything.
#[derive(Debug, Serialize)]
pub(crate) struct FailedLayout {
    /// Its directory.
    pub(crate) layout: PathBuf,
    /// The reason.
    pub(crate) error: String,
    /// The error itself.
    #[serde(skip)]
    pub(crate) source: layout::Error,
}

/// What is being done.
pub(crate) enum Progress<'p> {
    /// A layout is being pruned.
    Layout(&'p Path, PruneProgress),
    /// This many of that many bytes are verified, which layouts are going to share.
    Merging(u64, u64),
}

/// Prunes the layout at `dir`, or all layouts below it. A layout that cannot be read does not keep others from being
/// pruned. `seen` is called now and then; if it returns false, the work ends early.
///
/// Fails if there is no layout at all.
pub(crate) fn prune(
    dir: &Path,
    options: PruneOptions,
    seen: &mut dyn FnMut(Progress<'_>) -> bool,
) -> Result<PruneReport, layout::Error> {
    let mut report = PruneReport {
        dry_run: options.dry_run,
        layouts: Vec::new(),
        failed: Vec::new(),
        merged: None,
        freed: 0,
        cancelled: false,
    };
    let layouts = layouts_below(dir)?;
    let single = layouts.is_empty() || layouts == [dir];
    let all = if single {
        vec![dir.to_path_buf()]
    } else {
        layouts
    };
    let mut sound = Vec::new();
    for layout in all {
        let mut go_on = true;
        let pruned = Directory::new(&layout).prune(options, &mut |at| {
            go_on = go_on && seen(Progress::Layout(&layout, at));
            go_on
        });
        match pruned {
            Ok(pruned) => {
                report.freed += pruned.freed;
                sound.push(layout.clone());
                report.layouts.push(PrunedLayout { layout, pruned });
            }
            // What is no layout is the caller's mistake.
            Err(error) if single => return Err(error),
            Err(source) => report.failed.push(FailedLayout {
                layout,
                error: source.to_string(),
                source,
            }),
        }
        if !go_on {
            report.cancelled = true;
            return Ok(report);
        }
    }
    if !single {
        let merged = layout::merge(&sound, options.dry_run, &mut |done, total| {
            let go_on = seen(Progress::Merging(done, total));
            report.cancelled |= !go_on;
            go_on
        })?;
        report.freed += merged.freed;
        report.merged = Some(merged);
    }
    Ok(report)
}
