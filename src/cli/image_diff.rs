//! `image diff`: what differs between two images.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::Serialize;

use super::args::ImageDiff;
use super::print::print;
use super::reading::{self, Layers};
use crate::common::digest::Digest;
use crate::common::escape;
use crate::common::message::{count, size};
use crate::image::difference::{self, Change, Changed, OwnLayers};
use crate::image::packages::Packages;
use crate::image::verify::archive::ArchiveError;
use crate::image::verify::layers::Layers as Stack;
use crate::image::verify::tree::{Kind, Node};
use crate::save;
use crate::store::destination::Target;

/// Output of `image diff`.
#[derive(Serialize)]
struct DiffView {
    a: Digest,
    b: Digest,
    common_layers: usize,
    full: bool,
    changes: Vec<ChangeView>,
    packages: Option<Packages>,
    bytes_read: u64,
}

#[derive(Serialize)]
struct ChangeView {
    change: Change,
    path: String,
    before: Option<NodeView>,
    after: Option<NodeView>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    link: bool,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    opaque: bool,
}

#[derive(Serialize)]
struct NodeView {
    r#type: Kind,
    mode: String,
    uid: u32,
    gid: u32,
    size: u64,
}

impl From<Node> for NodeView {
    fn from(node: Node) -> Self {
        Self {
            r#type: node.kind,
            mode: format!("{:04o}", node.mode),
            uid: node.uid,
            gid: node.gid,
            size: node.size,
        }
    }
}

impl From<Changed> for ChangeView {
    fn from(changed: Changed) -> Self {
        Self {
            change: changed.change,
            path: format!("/{}", escape::path(&changed.path)),
            before: changed.before.map(Into::into),
            after: changed.after.map(Into::into),
            link: changed.link,
            opaque: changed.opaque,
        }
    }
}

/// The letters of `diff`, and W.
fn of(change: Change) -> &'static str {
    match change {
        Change::Added => "A",
        Change::Changed => "C",
        Change::Deleted => "D",
        Change::Written => "W",
    }
}

pub(super) fn run(args: &ImageDiff) -> anyhow::Result<()> {
    let a: Target = args.before.parse().map_err(save::Error::from)?;
    let b: Target = args.after.parse().map_err(save::Error::from)?;
    let full = args.full || args.packages;
    let view = reading::run(&args.registry, Some(&b), async |registries, cancel| {
        let a = Arc::new(reading::open(a.clone(), registries, &args.before).await?);
        let b = Arc::new(reading::open(b.clone(), registries, &args.after).await?);
        let common = a.common_layers(&b);
        let list_packages = args.packages;
        let (digest_a, digest_b) = (a.manifest.digest, b.manifest.digest);
        let (a, b) = (Layers::new(a, cancel), Layers::new(b, cancel));
        reading::blocking(move || {
            let changes = if full {
                of_trees(&a, &b, common)?
            } else {
                of_own_layers(&a, &b, common)?
            };
            let packages = list_packages.then(|| packages(&a, &b, common));
            Ok(DiffView {
                a: digest_a,
                b: digest_b,
                common_layers: common,
                full,
                changes: changes.into_iter().map(Into::into).collect(),
                packages: packages.transpose()?,
                bytes_read: a.bytes_read() + b.bytes_read(),
            })
        })
        .await
    })?;
    print(args.format, &view, table)
}

fn packages(a: &Layers, b: &Layers, common: usize) -> Result<Packages, ArchiveError> {
    let below = (0..common).map(|layer| a.open(layer)).collect();
    let own = |of: &Layers| (common..of.len()).map(|layer| of.open(layer)).collect();
    save::packages::image::of_layers(below, own(a), own(b))
}

fn of_trees(a: &Layers, b: &Layers, common: usize) -> Result<Vec<Changed>, ArchiveError> {
    let failed = |source| ArchiveError::Io { offset: 0, source };
    let mut stack = Stack::new();
    for layer in 0..common {
        stack.apply(a.open(layer).map_err(failed)?)?;
    }
    let below = stack.into_tree();
    let whole = |layers: &Layers| {
        let mut stack = Stack::on_top_of(below.clone());
        for layer in common..layers.len() {
            stack.apply(layers.open(layer).map_err(failed)?)?;
        }
        Ok::<_, ArchiveError>(stack.into_tree())
    };
    Ok(difference::of_trees(&whole(a)?, &whole(b)?))
}

fn of_own_layers(a: &Layers, b: &Layers, common: usize) -> Result<Vec<Changed>, ArchiveError> {
    let failed = |source| ArchiveError::Io { offset: 0, source };
    let own = |layers: &Layers| {
        let mut own = OwnLayers::default();
        for layer in common..layers.len() {
            own.apply(layers.open(layer).map_err(failed)?)?;
        }
        Ok::<_, ArchiveError>(own)
    };
    Ok(difference::of_own_layers(&own(a)?, &own(b)?))
}

fn table(view: &DiffView) -> String {
    let mut out = String::new();
    let mut counts: BTreeMap<&str, u64> = BTreeMap::new();
    for change in &view.changes {
        *counts.entry(of(change.change)).or_default() += 1;
        out.push_str(&format!("{} {}", of(change.change), change.path));
        out.push_str(&details(change));
        if change.link {
            out.push_str(" (hard links)");
        }
        if change.opaque {
            out.push_str(" (hides what is below it in common layers)");
        }
        out.push('\n');
    }
    if let Some(packages) = &view.packages {
        out.push('\n');
        out.push_str(&super::packages::table(packages));
    }
    if view.changes.iter().any(|change| change.opaque) {
        out.push_str("note: --full lists what is hidden\n");
    }
    if counts.contains_key("W") {
        out.push_str(&format!(
            "note: W: written by one image's own layers; --full also reads {} and says A or C\n",
            count(view.common_layers, "common layer", "common layers")
        ));
    }
    out
}

/// Returns modes, owners and sizes as far as they are known, what differs as `BEFORE -> AFTER`.
fn details(change: &ChangeView) -> String {
    let field = |of: &dyn Fn(&NodeView) -> String| match (&change.before, &change.after) {
        (Some(a), Some(b)) if of(a) != of(b) => format!(" {} -> {}", of(a), of(b)),
        (_, Some(node)) | (Some(node), None) => format!(" {}", of(node)),
        (None, None) => String::new(),
    };
    let mut out = field(&|node| node.mode.clone());
    out.push_str(&field(&|node| format!("{}:{}", node.uid, node.gid)));
    let is_file = |node: &Option<NodeView>| node.as_ref().is_some_and(|n| n.r#type == Kind::File);
    if is_file(&change.before) || is_file(&change.after) {
        out.push_str(&field(&|node| size(node.size)));
    }
    out
}
