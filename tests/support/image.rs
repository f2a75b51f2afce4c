//! A small image with one layer, for tests that push, list and delete.

use bytes::Bytes;
use serde_json::{Value, json};
use upperdeck::common::digest::Digest;

pub const MANIFEST_TYPE: &str = "application/vnd.oci.image.manifest.v1+json";

pub struct Image {
    pub layer: Bytes,
    pub config: Bytes,
    pub manifest: Bytes,
}

impl Image {
    /// Creates an image. The layer is added to `config`.
    pub fn new(layer: Bytes, mut config: Value, annotations: &Value) -> Self {
        config["rootfs"] = json!({"type": "layers", "diff_ids": [Digest::of(&layer)]});
        let config = config.to_string();
        let manifest = json!({
            "schemaVersion": 2, "mediaType": MANIFEST_TYPE,
            "config": {
                "mediaType": "application/vnd.oci.image.config.v1+json",
                "digest": Digest::of(&config), "size": config.len(),
            },
            "layers": [{
                "mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": Digest::of(&layer), "size": layer.len(),
            }],
            "annotations": annotations,
        })
        .to_string();
        Self {
            layer,
            config: config.into(),
            manifest: manifest.into(),
        }
    }

    pub fn digest(&self) -> Digest {
        Digest::of(&self.manifest)
    }

    /// Returns the total size of its blobs in bytes.
    pub fn size(&self) -> u64 {
        (self.layer.len() + self.config.len() + self.manifest.len()) as u64
    }
}
