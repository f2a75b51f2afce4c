//! What a layout directory keeps and frees: deletions, saves that fail or are killed, pruning, shared blobs.
// A panic in a helper fails the test, as intended.
#![allow(clippy::unwrap_used)]

mod deletion;
mod foreign;
mod hostile;
mod killed;
mod pruning;
mod shared;
#[allow(dead_code, reason = "each test program uses its part")]
#[path = "../support/mod.rs"]
mod support;

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::{Command, Output};
use std::time::Duration;

use bytes::Bytes;
use serde_json::{Value, json};
use upperdeck::common::digest::Digest;
use upperdeck::store::layout::{Directory, Error, PruneOptions, Pruned};

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
const DAY: Duration = Duration::from_secs(86_400);

fn descriptor(media_type: &str, content: &[u8]) -> Value {
    json!({"mediaType": media_type, "digest": Digest::of(content), "size": content.len()})
}

/// The config of an image with these layers.
fn config(layers: &[&[u8]]) -> Bytes {
    let diff_ids: Vec<_> = layers.iter().map(Digest::of).collect();
    json!({"architecture": "amd64", "os": "linux", "config": {}, "rootfs": {"type": "layers", "diff_ids": diff_ids}})
        .to_string()
        .into()
}

fn manifest(layers: &[&[u8]]) -> Bytes {
    let config = config(layers);
    let layers: Vec<_> = layers.iter().map(|l| descriptor(LAYER, l)).collect();
    json!({"schemaVersion": 2, "mediaType": MANIFEST, "config": descriptor(CONFIG, &config), "layers": layers})
        .to_string()
        .into()
}

/// Saves an image, as a save does: layers that are there are not written again.
fn save(layout: &Directory, layers: &[&[u8]], tag: &str) -> Result<Digest, Error> {
    layout.check()?;
    for layer in layers {
        let digest = Digest::of(layer);
        if layout
            .has_blob(&digest, Some(layer.len() as u64))?
            .is_none()
        {
            layout.put_blob(&Bytes::copy_from_slice(layer), &digest)?;
        }
    }
    let config = config(layers);
    layout.put_blob(&config, &Digest::of(&config))?;
    layout.put_manifest(&manifest(layers), MANIFEST, tag)
}

/// The sizes of the config and the manifest of an image with these layers.
fn documents(layers: &[&[u8]]) -> u64 {
    (config(layers).len() + manifest(layers).len()) as u64
}

/// The names of all files below `blobs/sha256`.
fn blobs(layout: &Path) -> BTreeSet<String> {
    match fs::read_dir(layout.join("blobs/sha256")) {
        Ok(found) => found
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect(),
        Err(_) => BTreeSet::new(),
    }
}

fn names(contents: &[&[u8]]) -> BTreeSet<String> {
    contents.iter().map(|c| Digest::of(c).hex()).collect()
}

/// The names of all blobs of images with these layers.
fn of_images(images: &[&[&[u8]]]) -> BTreeSet<String> {
    let mut all = BTreeSet::new();
    for layers in images {
        all.extend(names(layers));
        all.extend(names(&[&config(layers), &manifest(layers)]));
    }
    all
}

/// Writes a blob without the knowledge of upperdeck.
fn plant(layout: &Path, content: &[u8]) -> String {
    let name = Digest::of(content).hex();
    fs::write(layout.join("blobs/sha256").join(&name), content).unwrap();
    name
}

/// Adds an entry to `index.json`.
fn list(layout: &Path, entry: Value) {
    let file = layout.join("index.json");
    let mut index: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    index["manifests"].as_array_mut().unwrap().push(entry);
    fs::write(file, index.to_string()).unwrap();
}

fn prune(layout: &Path, older_than: Duration) -> Result<Pruned, Error> {
    let options = PruneOptions {
        older_than,
        dry_run: false,
    };
    Directory::new(layout).prune(options, &mut |_| true)
}

fn image(arguments: &[&str]) -> Output {
    let program = env!("CARGO_BIN_EXE_upperdeck");
    let mut command = Command::new(program);
    command.arg("image").args(arguments).output().unwrap()
}

/// Runs `image` with `--format json`, which has to succeed.
fn image_json(arguments: &[&str]) -> Value {
    let output = image(&[arguments, &["--format", "json"]].concat());
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {said}");
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Names in the layout's directory that belong to no layout.
fn remains(layout: &Path) -> Vec<String> {
    let names = fs::read_dir(layout).unwrap();
    names
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| !["oci-layout", "index.json", "blobs"].contains(&name.as_str()))
        .collect()
}
