//! What the user should hear of a save without asking: a few lines here, all of it in the metadata file.

use super::{Context, Taken};
use crate::layer::block::Instability;
use crate::scan::Reason;

/// Files named one by one in warnings of one kind.
const NAMED: usize = 10;

pub(super) fn tell(context: &Context, taken: &Taken) {
    let unstable = taken
        .layers
        .iter()
        .flat_map(|layer| &layer.unstable)
        .map(|file| {
            let what = match file.what {
                Instability::Changed => "was written to while it was read",
                Instability::Shrank => "became shorter while it was read; the rest is zeros",
                Instability::Grew => {
                    "became longer while it was read; what was added is not in the image"
                }
                Instability::Unsettled => "may have been in the middle of a write when it was read",
                Instability::Vanished => "vanished before it was read; its content is zeros",
            };
            format!("/{} {what}", file.path)
        });
    let report = &taken.report;
    let vanished = report
        .vanished
        .iter()
        .map(|path| format!("/{path} vanished while the tree was walked"));
    some(context, "unstable_file", unstable.chain(vanished));
    let privileged = report.privileged.iter().map(|path| {
        format!("/{path} is setuid, setgid or has file capabilities, which the base does not have")
    });
    some(context, "privileged_file", privileged);
    let split = report.split_links.iter().map(|path| {
        format!("/{path} has hard links outside the renamed directory it is in, and is a file of its own in the image")
    });
    some(context, "split_links", split);
    if let Some(first) = report.sockets.first() {
        let count = report.sockets.len();
        context.warn(
            "sockets",
            format!("{count} sockets cannot be in an image and are left out, e.g. /{first}"),
        );
    }
    if report.unreadable.count > 0 {
        let examples: Vec<_> = report.unreadable.examples.iter().take(3).collect();
        let shown: Vec<String> = examples.iter().map(|path| format!("/{path}")).collect();
        let what = format!(
            "{} files or directories in volumes may not be read by the container itself and are left out, e.g. {}",
            report.unreadable.count,
            shown.join(", ")
        );
        context.warn("unreadable", what);
    }
    for (name, count) in &report.dropped_xattrs {
        context.warn(
            "xattrs",
            format!("the attribute {name} of {count} entries belongs to the host and is left out"),
        );
    }
    let kept_out = |reason: &Reason| matches!(reason, Reason::Credential | Reason::Cache);
    let excluded: Vec<_> = report
        .excluded
        .iter()
        .filter(|e| kept_out(&e.reason))
        .collect();
    if let Some(first) = excluded.first() {
        let count = excluded.len();
        let flags = "--include-credentials, --include-caches";
        let what = format!(
            "{count} paths with credentials or caches are left out, e.g. /{} ({flags})",
            first.path
        );
        context.warn("excluded", what);
    }
}

/// The first few, and how many more there are.
fn some(context: &Context, code: &str, messages: impl Iterator<Item = String>) {
    let mut messages = messages.fuse();
    for message in messages.by_ref().take(NAMED) {
        context.warn(code, message);
    }
    let more = messages.count();
    if more > 0 {
        context.warn(
            code,
            format!("and {more} more, all listed in --metadata-file"),
        );
    }
}
