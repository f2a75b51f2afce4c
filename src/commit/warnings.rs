//! What the user should hear of a save without asking: a few lines here, more examples in the metadata file.

use super::{Context, Taken};
use crate::layer::block::Instability;
use crate::scan::{Reason, Sample};

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
    some(context, "unstable_file", 0, unstable);
    let each = |code: &str, of: &Sample<String>, what: &str| {
        let messages = of.examples().iter().map(|path| format!("/{path} {what}"));
        some(context, code, of.more(), messages);
    };
    each(
        "unstable_file",
        &report.vanished,
        "vanished while the tree was walked",
    );
    each(
        "privileged_file",
        &report.privileged,
        "is setuid, setgid or has file capabilities, which the base does not have",
    );
    each(
        "split_links",
        &report.split_links,
        "has hard links outside the renamed directory it is in, and is a file of its own in the image",
    );
    if let Some(first) = report.sockets.examples().first() {
        let count = report.sockets.count();
        context.warn(
            "sockets",
            format!("{count} sockets cannot be in an image and are left out, e.g. /{first}"),
        );
    }
    if !report.unreadable.is_empty() {
        let examples = report.unreadable.examples().iter().take(3);
        let shown: Vec<String> = examples.map(|path| format!("/{path}")).collect();
        let what = format!(
            "{} files or directories in volumes may not be read by the container itself and are left out, e.g. {}",
            report.unreadable.count(),
            shown.join(", ")
        );
        context.warn("unreadable", what);
    }
    let dropped = report.dropped_xattrs.iter().map(|(name, count)| {
        format!("the attribute {name} of {count} entries belongs to the host and is left out")
    });
    some(context, "xattrs", 0, dropped);
    let kept_out = [Reason::Credential, Reason::Cache];
    let excluded = kept_out
        .iter()
        .filter_map(|reason| report.excluded.get(reason.kind()));
    let count: u64 = excluded.clone().map(Sample::count).sum();
    let first = excluded.filter_map(|of_kind| of_kind.examples().first());
    if let Some(first) = first.min() {
        let flags = "--include-credentials, --include-caches";
        let what = format!(
            "{count} paths with credentials or caches are left out, e.g. /{} ({flags})",
            first.path
        );
        context.warn("excluded", what);
    }
}

/// The first few, and how many there are besides: `more` of them have no message.
fn some(context: &Context, code: &str, more: u64, messages: impl Iterator<Item = String>) {
    let mut messages = messages.fuse();
    for message in messages.by_ref().take(NAMED) {
        context.warn(code, message);
    }
    let more = more + messages.count() as u64;
    if more > 0 {
        context.warn(
            code,
            format!("and {more} more, counted with examples in --metadata-file"),
        );
    }
}
