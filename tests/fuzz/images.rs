//! Fuzzes manifests, indexes, configs and changes to them, which the maker of a base image and a user control.

use std::path::PathBuf;

use oci_spec::image::{Descriptor, ImageIndex, ImageManifest};
use serde_json::Value;
use tempfile::TempDir;
use upperdeck::common::digest::{DiffId, Digest};
use upperdeck::image::manifest::raw::manifest_type;
use upperdeck::image::manifest::{self, BaseManifest, Image, Input, Layer, NewLayer, Platform};
use upperdeck::store::layout::Reader;

use crate::errors;
use crate::files::{self, selected};

pub fn run(input: &[u8]) {
    let (selector, rest) = selected(input);
    match selector % 4 {
        0 => kind(rest),
        1 => layout(rest),
        2 => changes(rest),
        _ => assembled(rest),
    }
}

fn kind(bytes: &[u8]) {
    for header in [None, Some(manifest::DOCKER_MANIFEST), Some("text/html; x")] {
        if let Ok(kind) = manifest_type(header, bytes) {
            assert!(manifest::raw::MANIFEST_TYPES.contains(&kind.as_str()));
        }
    }
    if let Ok(index) = serde_json::from_slice::<ImageIndex>(bytes) {
        for architecture in ["amd64", "arm", "arm64"] {
            let platform = Platform {
                architecture: architecture.to_owned(),
                variant: None,
            };
            if let Some(chosen) = platform.choose(&index) {
                let of = chosen.platform().as_ref().expect("one that says so");
                assert_eq!(of.architecture().to_string(), architecture);
            }
        }
    }
}

thread_local! {
    static LAYOUT: (TempDir, PathBuf) = {
        let dir = files::directory();
        let index = dir.path().join("index.json");
        std::fs::write(dir.path().join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#)
            .expect("a place for files");
        std::fs::create_dir_all(dir.path().join("blobs/sha256")).expect("a place for files");
        (dir, index)
    };
}

/// Reads an index, and a blob that it may refer to.
fn layout(input: &[u8]) {
    let mut parts = input.splitn(2, |&byte| byte == 0);
    let (index, blob) = (parts.next().unwrap_or_default(), parts.next());
    let blob = blob.unwrap_or_default();
    let digest = Digest::of(blob);
    LAYOUT.with(|(dir, path)| {
        // DIGEST in the index stands for the blob's digest.
        let index = String::from_utf8_lossy(index).replace("DIGEST", &digest.to_string());
        let blob_path = dir.path().join("blobs/sha256").join(digest.hex());
        std::fs::write(path, index).expect("a place for files");
        std::fs::write(&blob_path, blob).expect("a place for files");
        let reader = Reader::directory(dir.path()).expect("a layout");
        for listed in errors::checked(reader.list()).into_iter().flatten() {
            errors::checked(reader.manifest_of(&listed.digest, &listed.media_type));
        }
        for tag in [None, Some("latest")] {
            if let Some(manifest) = errors::checked(reader.manifest(tag, &Platform::host())) {
                assert_eq!(manifest.digest, Digest::of(&manifest.bytes));
                assert!(!manifest.is_index());
            }
        }
        std::fs::remove_file(blob_path).expect("the file just written");
    });
}

/// Applies changes to a config; all are separated by zero bytes.
fn changes(input: &[u8]) {
    let mut parts = input.split(|&byte| byte == 0);
    let config = parts.next().unwrap_or_default();
    let changes: Vec<String> = parts
        .map(|part| String::from_utf8_lossy(part).into_owned())
        .collect();
    let before = errors::checked(manifest::check(&changes, &[], &[], None)).is_some();
    let with_base = errors::checked(manifest::check_changes(config, &changes)).is_some();
    // Changes that are refused without a base are refused with one, too.
    assert!(before || !with_base || changes.is_empty(), "{changes:?}");
}

/// Assembles an image from a base's manifest and config with changes.
fn assembled(input: &[u8]) {
    let mut parts = input.split(|&byte| byte == 0);
    let bytes = parts.next().unwrap_or_default();
    let config = parts.next().unwrap_or_default();
    let changes: Vec<String> = parts
        .map(|part| String::from_utf8_lossy(part).into_owned())
        .collect();
    let base = BaseManifest {
        bytes,
        media_type: "",
        digest: Digest::of(bytes),
    };
    let layers = serde_json::from_slice(bytes).map_or(0, |value: Value| {
        value["layers"].as_array().map_or(0, Vec::len)
    });
    let Some(image) = errors::checked(assemble(Some(base), config, &changes, layers)) else {
        return;
    };
    check(&image, layers + 1);
    // The result is itself a valid base, and keeps everything.
    let base = BaseManifest {
        bytes: &image.manifest.bytes,
        media_type: image.manifest.media_type,
        digest: image.manifest.digest,
    };
    let again = assemble(Some(base), &image.config.bytes, &[], layers + 1);
    let again = errors::checked(again).expect("an image of its own making as a base");
    check(&again, layers + 2);
    let inner = |image: &Image| {
        let config: Value = serde_json::from_slice(&image.config.bytes).expect("JSON");
        config["config"].clone()
    };
    assert_eq!(inner(&again), inner(&image));
}

fn assemble(
    base_manifest: Option<BaseManifest<'_>>,
    base_config: &[u8],
    changes: &[String],
    layers: usize,
) -> Result<Image, manifest::Error> {
    let layer = |number: usize| {
        let digest = Digest::of(number.to_le_bytes());
        let descriptor = serde_json::json!({
            "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip",
            "digest": digest,
            "size": 32,
        });
        Layer {
            descriptor: serde_json::from_value::<Descriptor>(descriptor).expect("a descriptor"),
            diff_id: DiffId(digest),
        }
    };
    manifest::assemble(&Input {
        base_manifest,
        base_config,
        base_name: None,
        base_layers: (0..layers.min(200)).map(layer).collect(),
        layers: vec![NewLayer {
            layer: layer(200),
            created_by: None,
        }],
        changes,
        labels: &[],
        annotations: &[],
        author: None,
        message: None,
        created: 1_000_000_000,
        created_by: "fuzz",
    })
}

fn check(image: &Image, layers: usize) {
    let manifest: ImageManifest =
        serde_json::from_slice(&image.manifest.bytes).expect("a manifest by the specification");
    assert_eq!(manifest.layers().len(), layers);
    assert_eq!(image.layers.len(), layers);
    assert_eq!(image.manifest.digest, Digest::of(&image.manifest.bytes));
    let config = Digest::of(&image.config.bytes);
    assert_eq!(manifest.config().digest().to_string(), config.to_string());
    let config: Value = serde_json::from_slice(&image.config.bytes).expect("a config");
    let diff_ids = config["rootfs"]["diff_ids"].as_array().map(Vec::len);
    assert_eq!(diff_ids, Some(layers));
    let history = config["history"].as_array().into_iter().flatten();
    let filled = history.filter(|entry| entry["empty_layer"] != true).count();
    assert_eq!(filled, layers, "history and layers");
}
