//! Reads the description of a saved image from the metadata file that the child wrote.

use std::path::Path;
use std::time::Duration;

use serde::Deserialize;

use crate::common::regular_file;
use crate::image::packages::Packages;
use crate::service::job::{Changes, Saved};

/// Maximum size of the metadata file in bytes; a larger one was not written by `commit`.
const MAX_METADATA: u64 = 64 << 20;

/// The part of `commit --metadata-file` that goes to the record. Unknown and most missing fields are tolerated, because
/// the child may be of a newer version than this program.
#[derive(Deserialize)]
struct Metadata {
    reference: String,
    digest: String,
    #[serde(default)]
    size_bytes: u64,
    #[serde(default)]
    config_size_bytes: u64,
    base: Base,
    #[serde(default)]
    layers: Vec<Layer>,
    #[serde(default)]
    layers_above_base: usize,
    pause_ms: Option<f64>,
    seconds: f64,
    #[serde(default)]
    changes: Option<Changes>,
}

#[derive(Deserialize)]
struct Base {
    name: Option<String>,
    digest: Option<String>,
    #[serde(default)]
    layers: Vec<BaseLayer>,
}

#[derive(Deserialize)]
struct BaseLayer {
    #[serde(default)]
    size: u64,
    #[serde(default)]
    from: String,
}

#[derive(Deserialize)]
struct Layer {
    #[serde(default)]
    size_bytes: u64,
    #[serde(default)]
    entries: u64,
}

impl Metadata {
    fn saved(self) -> Saved {
        let layer_bytes = self.layers.iter().map(|layer| layer.size_bytes).sum();
        // Layers that the destination already had, or mounted from another repository, were not sent.
        let sent = |layer: &&BaseLayer| !matches!(layer.from.as_str(), "present" | "mounted");
        let base_bytes: u64 = self.base.layers.iter().filter(sent).map(|l| l.size).sum();
        Saved {
            reference: self.reference,
            digest: self.digest,
            layer_bytes,
            image_bytes: self.size_bytes + self.config_size_bytes,
            sent_bytes: layer_bytes + base_bytes + self.config_size_bytes,
            entries: self.layers.iter().map(|layer| layer.entries).sum(),
            delta: self.layers_above_base > self.layers.len(),
            base_name: self.base.name,
            base_digest: self.base.digest,
            pause_ms: self.pause_ms,
            seconds: self.seconds,
            changes: self.changes.map(Changes::sanitised),
        }
    }
}

/// Reads the list of packages from the metadata file; `None` if it has none.
pub(super) fn read_packages(path: &Path) -> Option<Packages> {
    #[derive(Deserialize)]
    struct Listed {
        packages: Packages,
    }
    let listed: Listed = serde_json::from_slice(&bounded(path)?).ok()?;
    Some(listed.packages)
}

/// Reads a file that is not larger than a metadata file can be.
fn bounded(path: &Path) -> Option<Vec<u8>> {
    regular_file::read(path, MAX_METADATA).ok()
}

/// Reads the metadata file. If that is not possible, falls back to the child's final event, without sizes.
pub(super) fn read_saved(
    path: &Path,
    told: Option<(String, String)>,
    took: Duration,
) -> Option<Saved> {
    let read = || serde_json::from_slice::<Metadata>(&bounded(path)?).ok();
    if let Some(metadata) = read() {
        return Some(metadata.saved());
    }
    let (reference, digest) = told?;
    Some(Saved {
        reference,
        digest,
        layer_bytes: 0,
        image_bytes: 0,
        sent_bytes: 0,
        entries: 0,
        delta: false,
        base_name: None,
        base_digest: None,
        pause_ms: None,
        seconds: took.as_secs_f64(),
        changes: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_come_from_the_metadata() -> Result<(), serde_json::Error> {
        let json = serde_json::json!({
            "version": 2, "reference": "r/x@sha256:1", "digest": "sha256:1", "size_bytes": 100, "config_size_bytes": 5,
            "base": {"name": "b:1", "digest": null, "proof": "x", "layers": [
                {"digest": "d", "size": 50, "from": "present"},
                {"digest": "d", "size": 7, "from": "mounted", "repository": "r/y"},
                {"digest": "d", "size": 20, "from": "local"}]},
            "layers": [{"size_bytes": 10, "entries": 3}, {"size_bytes": 1, "entries": 1}],
            "layers_above_base": 3, "pause_ms": 2.5, "seconds": 1.5, "new_field": [],
            "changes": {"since": "previous", "entries": 4, "files": 3, "removed": 1, "bytes": 9, "largest": [
                {"path": "/a", "bytes": 8}]},
        });
        let saved = serde_json::from_value::<Metadata>(json)?.saved();
        assert_eq!(
            (saved.layer_bytes, saved.image_bytes, saved.sent_bytes),
            (11, 105, 36)
        );
        assert_eq!(
            (saved.entries, saved.delta, saved.pause_ms),
            (4, true, Some(2.5))
        );
        assert_eq!(
            (saved.base_name.as_deref(), saved.base_digest),
            (Some("b:1"), None)
        );
        let changes = saved.changes.unwrap_or_default();
        assert_eq!((changes.files, changes.largest.len()), (3, 1));
        Ok(())
    }
}
