//! `image prune`: deletes what no image of a layout needs.

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use indicatif::ProgressBar;
use tokio_util::sync::CancellationToken;

use super::args::ImagePrune;
use super::exit::Usage;
use super::print::print;
use super::{signals, text};
use crate::common::cancel::Cancelled;
use crate::common::escape;
use crate::common::message::{count, size};
use crate::store::images::prune::{Progress, PruneReport, PrunedLayout, prune};
use crate::store::images::{Error, ImageLocation};
use crate::store::layout::{PruneOptions, PruneProgress};

/// Where `up` keeps its images.
const UP_IMAGES: &str = "/var/lib/upperdeck/images";

pub(super) fn run(args: &ImagePrune) -> anyhow::Result<()> {
    let dir = directory(args)?;
    let cancel = CancellationToken::new();
    signals::cancel_on_signals(&cancel).context("cannot listen for SIGINT and SIGTERM")?;
    let options = PruneOptions {
        older_than: args.older_than,
        dry_run: args.dry_run,
    };
    // Draws only if stderr is a terminal.
    let bar = ProgressBar::new_spinner();
    let report = prune(&dir, options, &mut |at| {
        bar.set_message(doing(&at));
        bar.tick();
        !cancel.is_cancelled()
    });
    bar.finish_and_clear();
    let mut report = report.map_err(Error::Layout)?;
    print(args.format, &report, |report| table(report, args))?;
    if report.cancelled {
        return Err(Cancelled.into());
    }
    match report.failed.pop() {
        None => Ok(()),
        Some(failed) => Err(Error::Layout(failed.source).into()),
    }
}

/// Returns the directory of layouts.
fn directory(args: &ImagePrune) -> anyhow::Result<PathBuf> {
    let Some(place) = &args.place else {
        if Path::new(UP_IMAGES).is_dir() {
            return Ok(UP_IMAGES.into());
        }
        let why = format!("there is no {UP_IMAGES} here: name the directory, oci:DIRECTORY");
        return Err(Usage(why).into());
    };
    match place.parse::<ImageLocation>()? {
        ImageLocation::Layout { dir, which: None } => Ok(dir),
        ImageLocation::Layout { .. } => {
            let why = format!(
                "{place:?} names one image: 'image rm' deletes it and frees what it alone needs; name a directory to prune"
            );
            Err(Usage(why).into())
        }
        ImageLocation::Registry { .. } => Err(Usage(format!(
            "{place:?} is on a registry, which collects blobs itself: Harbor in its garbage collection (Administration, \
             Clean Up), docker-registry with 'registry garbage-collect'; delete images with 'image rm' before. Only \
             oci:DIRECTORY is pruned here"
        ))
        .into()),
    }
}

fn doing(at: &Progress<'_>) -> String {
    match at {
        Progress::Layout(layout, PruneProgress::Reading) => {
            format!("reading {}", text::path(layout))
        }
        Progress::Layout(layout, PruneProgress::Deleting(done, total)) => {
            format!("deleting in {}: {done} of {total}", text::path(layout))
        }
        Progress::Merging(done, total) => {
            format!("comparing layouts: {} of {}", size(*done), size(*total))
        }
    }
}

fn table(report: &PruneReport, args: &ImagePrune) -> String {
    let mut out = String::new();
    for layout in &report.layouts {
        out.push_str(&of_layout(layout, report.dry_run, args));
    }
    for failed in &report.failed {
        let error = escape::message(&failed.error);
        out.push_str(&format!("not pruned: {error}\n"));
    }
    if let Some(merged) = report.merged.filter(|merged| merged.links > 0) {
        let done = if report.dry_run {
            "would become"
        } else {
            "are now"
        };
        out.push_str(&format!(
            "{} {done} hard links, which frees {}\n",
            count(merged.links, "equal blob", "equal blobs"),
            size(merged.freed)
        ));
    }
    let freed = if report.dry_run {
        "would be freed"
    } else {
        "freed"
    };
    out.push_str(&format!("{freed}: {}\n", size(report.freed)));
    out
}

fn of_layout(layout: &PrunedLayout, dry_run: bool, args: &ImagePrune) -> String {
    let PrunedLayout { layout, pruned } = layout;
    let shown = text::path(layout);
    let deleted = if dry_run { "would delete" } else { "deleted" };
    let mut out = String::new();
    for blob in &pruned.deleted {
        out.push_str(&format!("{deleted} {} {}\n", blob.digest, size(blob.size)));
    }
    if pruned.temporary > 0 {
        let files = count(pruned.temporary, "unfinished file", "unfinished files");
        out.push_str(&format!("{deleted} {files} of saves that were killed\n"));
    }
    out.push_str(&format!(
        "{shown}: {} of {} needed",
        count(pruned.needed.blobs, "blob", "blobs"),
        size(pruned.needed.bytes)
    ));
    if pruned.in_use.blobs > 0 {
        out.push_str(&format!(", {} of running saves", pruned.in_use.blobs));
    }
    out.push('\n');
    if pruned.young.blobs > 0 {
        out.push_str(&format!(
            "note: {} of {} younger than {} kept, as another tool may be about to name them (--older-than)\n",
            count(pruned.young.blobs, "unneeded blob", "unneeded blobs"),
            size(pruned.young.bytes),
            jiff::SignedDuration::try_from(args.older_than).unwrap_or_default(),
        ));
    }
    for path in &pruned.left {
        out.push_str(&format!(
            "left alone, not part of a layout: {}\n",
            escape::text(path)
        ));
    }
    let more = pruned.left_count - pruned.left.len() as u64;
    if more > 0 {
        out.push_str(&format!(
            "left alone: {}\n",
            count(more, "more file", "more files")
        ));
    }
    out
}
