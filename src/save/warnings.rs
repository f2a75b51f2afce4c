//! Warnings about a finished save: a few lines each, with more examples in the metadata file.

use std::os::unix::ffi::OsStrExt;

use super::{CapturedTrees, Context, outcome};
use crate::common::escape::limited;
use crate::common::message::count;
use crate::layer::content::Instability;
use crate::layer::scan::{Reason, Sample};
use crate::node::container::{Container, Volume};

/// Maximum number of characters of a path in a warning.
const MAX_PATH_CHARS: usize = 200;
/// Maximum number of files that are named individually in warnings of one kind.
const MAX_NAMED_FILES: usize = 10;

pub(super) fn emit(
    context: &Context,
    container: &Container,
    saved: &[Volume],
    taken: &CapturedTrees,
) {
    emit_volumes(context, container, saved);
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
    emit_limited(context, "unstable_file", 0, unstable);
    let each = |code: &str, of: &Sample<String>, what: &str| {
        let messages = of.examples().iter().map(|path| format!("/{path} {what}"));
        emit_limited(context, code, of.more(), messages);
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
        let sockets = count(report.sockets.count(), "socket is", "sockets are");
        context.warn(
            "sockets",
            format!("{sockets} left out, as no image can have one, e.g. /{first}"),
        );
    }
    if !report.unreadable.is_empty() {
        let examples = report.unreadable.examples().iter().take(3);
        let shown: Vec<String> = examples.map(|path| format!("/{path}")).collect();
        let what = format!(
            "left out of volumes, as the container itself may not read them: {}, e.g. {}",
            count(
                report.unreadable.count(),
                "file or directory",
                "files or directories"
            ),
            shown.join(", ")
        );
        context.warn("unreadable", what);
    }
    let dropped = report.dropped_xattrs.iter().map(|(name, number)| {
        let entries = count(number, "entry", "entries");
        if name.ends_with(".overlay.protattr") {
            format!("{entries} immutable or append-only (chattr +i, +a): no image can say so")
        } else if name.contains('=') {
            format!(
                "the attribute {name} of {entries} is left out: no layer can have a name with ="
            )
        } else {
            format!("the attribute {name} of {entries} belongs to the host and is left out")
        }
    });
    emit_limited(context, "xattrs", 0, dropped);
    if let Some(first) = report.empty_xattrs.examples().first() {
        let entries = count(report.empty_xattrs.count(), "entry has", "entries have");
        context.warn(
            "xattrs",
            format!(
                "{entries} an attribute without a value, which umoci and Podman leave out, e.g. /{first}"
            ),
        );
    }
    for (reason, why) in [
        (
            Reason::PathTooLong,
            "has a path too long to be unpacked into a directory (over 3840 bytes)",
        ),
        (
            Reason::ReservedName,
            "would be a deletion in a layer, as .wh. is in front of its name",
        ),
    ] {
        if let Some(of_kind) = report.excluded.get(reason.kind()) {
            let messages = of_kind.examples().iter();
            let messages = messages.map(|e| {
                format!(
                    "/{} is left out: it {why}",
                    limited(&e.path, MAX_PATH_CHARS)
                )
            });
            emit_limited(context, reason.kind(), of_kind.more(), messages);
        }
    }
    let kept_out = [Reason::Credential, Reason::Cache];
    let excluded = kept_out
        .iter()
        .filter_map(|reason| report.excluded.get(reason.kind()));
    let number: u64 = excluded.clone().map(Sample::count).sum();
    let first = excluded.filter_map(|of_kind| of_kind.examples().first());
    if let Some(first) = first.min() {
        let flags = "--include-credentials, --include-caches";
        let what = format!(
            "{} left out, e.g. /{} ({flags})",
            count(
                number,
                "path with credentials or caches is",
                "paths with credentials or caches are"
            ),
            first.path
        );
        context.warn("excluded", what);
    }
}

/// Warns of volumes that are mounted and therefore not in the image, which is the most common surprise.
fn emit_volumes(context: &Context, container: &Container, saved: &[Volume]) {
    let left_out = outcome::volumes_left_out(container, saved);
    let Some(first) = left_out.first() else {
        return;
    };
    let paths = left_out
        .iter()
        .take(MAX_NAMED_FILES)
        .map(|mount| crate::common::escape::path(mount.destination.as_os_str().as_bytes()));
    let paths: Vec<_> = paths.collect();
    let more = match left_out.len() - paths.len() {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    if container.ended().is_some() {
        let what = format!(
            "what was mounted at {}{more} is not in the image",
            paths.join(", ")
        );
        return context.warn("volumes", what);
    }
    let flag = crate::common::escape::path(first.destination.as_os_str().as_bytes());
    context.warn(
        "volumes",
        format!(
            "what is mounted at {}{more} is not in the image (--include-volume {flag})",
            paths.join(", ")
        ),
    );
}

/// Issues the first few messages, and the number of the rest. `more` is the number of those without a message.
fn emit_limited(context: &Context, code: &str, more: u64, messages: impl Iterator<Item = String>) {
    let mut messages = messages.fuse();
    for message in messages.by_ref().take(MAX_NAMED_FILES) {
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
