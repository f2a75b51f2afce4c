//! Builds manifest and config of the saved image by editing the base's own JSON, so that unknown fields of the base are
//! kept.
//!
//! The functions are pure: nothing from the running environment enters. The result always has OCI media types, whatever
//! the base has, because consumers refuse a mixture (skopeo: "unsupported docker v2s2 media type").
//!
//! Source: image-spec `manifest.md`, `config.md`, `descriptor.md`, `image-index.md`, `annotations.md`; Docker's "Image
//! Manifest Version 2, Schema 2" for its media types.

pub mod change;
mod config;
mod error;
mod expand;
mod json;
pub mod platform;
pub mod raw;
pub mod squash;

use oci_client::annotations::{
    ORG_OPENCONTAINERS_IMAGE_BASE_DIGEST as BASE_DIGEST,
    ORG_OPENCONTAINERS_IMAGE_BASE_NAME as BASE_NAME,
    ORG_OPENCONTAINERS_IMAGE_CREATED as ANNOTATION_CREATED,
};
use oci_client::manifest::{
    IMAGE_DOCKER_CONFIG_MEDIA_TYPE as DOCKER_CONFIG, IMAGE_DOCKER_LAYER_GZIP_MEDIA_TYPE,
    IMAGE_DOCKER_LAYER_TAR_MEDIA_TYPE, IMAGE_LAYER_GZIP_MEDIA_TYPE, IMAGE_LAYER_MEDIA_TYPE,
    IMAGE_LAYER_NONDISTRIBUTABLE_GZIP_MEDIA_TYPE, IMAGE_LAYER_NONDISTRIBUTABLE_MEDIA_TYPE,
};
use oci_spec::image::Descriptor;
use serde_json::{Map, Value, json};

use crate::common::digest::{DiffId, Digest};

use config::{BASE_CONFIG, change_config, config};
pub use error::{Error, Warning};
use json::{Kind, drop_nulls, expect, parse_object, to_bytes, unexpected_type};
pub use platform::Platform;

/// Media type of all configs built here.
pub use oci_client::manifest::IMAGE_CONFIG_MEDIA_TYPE as CONFIG;
/// Media type of Docker's manifest list, its counterpart of an index.
pub use oci_client::manifest::IMAGE_MANIFEST_LIST_MEDIA_TYPE as DOCKER_LIST;
/// Media type of Docker's manifest, which is accepted for a base.
pub use oci_client::manifest::IMAGE_MANIFEST_MEDIA_TYPE as DOCKER_MANIFEST;
/// Media type of an OCI index.
pub(crate) use oci_client::manifest::OCI_IMAGE_INDEX_MEDIA_TYPE as INDEX;
/// Media type of all manifests built here.
pub use oci_client::manifest::OCI_IMAGE_MEDIA_TYPE as MANIFEST;

/// Maximum number of layers that container engines support (moby#20298).
pub(crate) const MAX_LAYERS: usize = 127;
/// Maximum size of a manifest that registries accept, in bytes (413 beyond it).
pub(crate) const MAX_MANIFEST_BYTES: usize = 4 << 20;

/// Media type of a layer compressed with zstd.
pub const IMAGE_LAYER_ZSTD: &str = "application/vnd.oci.image.layer.v1.tar+zstd";

/// Docker's layer types and their OCI counterparts. Non-distributable layers (Docker's foreign ones, and those of OCI,
/// which image-spec 1.1 deprecates) become ordinary ones, because their blobs are stored at the destination like all
/// others.
const LAYER_TYPES: [(&str, &str); 9] = [
    (
        IMAGE_LAYER_NONDISTRIBUTABLE_MEDIA_TYPE,
        IMAGE_LAYER_MEDIA_TYPE,
    ),
    (
        IMAGE_LAYER_NONDISTRIBUTABLE_GZIP_MEDIA_TYPE,
        IMAGE_LAYER_GZIP_MEDIA_TYPE,
    ),
    (
        "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd",
        IMAGE_LAYER_ZSTD,
    ),
    (IMAGE_DOCKER_LAYER_TAR_MEDIA_TYPE, IMAGE_LAYER_MEDIA_TYPE),
    (
        IMAGE_DOCKER_LAYER_GZIP_MEDIA_TYPE,
        IMAGE_LAYER_GZIP_MEDIA_TYPE,
    ),
    (
        "application/vnd.docker.image.rootfs.diff.tar.zstd",
        IMAGE_LAYER_ZSTD,
    ),
    (
        "application/vnd.docker.image.rootfs.foreign.diff.tar",
        IMAGE_LAYER_MEDIA_TYPE,
    ),
    (
        "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
        IMAGE_LAYER_GZIP_MEDIA_TYPE,
    ),
    (
        "application/vnd.docker.image.rootfs.foreign.diff.tar.zstd",
        IMAGE_LAYER_ZSTD,
    ),
];

/// A layer as listed in the new manifest.
#[derive(Clone, Debug)]
pub struct Layer {
    /// Descriptor of the blob: media type (Docker's are translated), digest and compressed size in bytes.
    pub descriptor: Descriptor,
    /// Digest of the uncompressed tar.
    pub diff_id: DiffId,
}

/// A layer created by this save.
#[derive(Clone, Debug)]
pub struct NewLayer {
    /// The layer.
    pub layer: Layer,
    /// `created_by` of its history entry; if `None`, that of the save.
    pub created_by: Option<String>,
}

/// The manifest of the base, as stored.
#[derive(Clone, Copy, Debug)]
pub struct BaseManifest<'a> {
    /// The bytes.
    pub bytes: &'a [u8],
    /// The media type under which it was stored. If empty, the manifest's own is used.
    pub media_type: &'a str,
    /// Its digest, for the annotation.
    pub digest: Digest,
}

/// Everything that an image is built from.
#[derive(Clone, Debug)]
pub struct Input<'a> {
    /// Manifest of the base; `None` if the runtime keeps none (Docker).
    pub base_manifest: Option<BaseManifest<'a>>,
    /// The base's config, byte for byte.
    pub base_config: &'a [u8],
    /// Reference by which the base was pulled.
    pub base_name: Option<&'a str>,
    /// The base's layers, bottom first, as they are or will be stored at the destination. Their number is that of the
    /// base; a recreated layer has another digest and diff ID. If a layer has the digest from the base manifest, its
    /// descriptor is copied from there with all fields.
    pub base_layers: Vec<Layer>,
    /// New layers, bottom first. Empty if nothing changed; the result is then the base with new metadata.
    pub layers: Vec<NewLayer>,
    /// `--change` texts.
    pub changes: &'a [String],
    /// `--label`, applied after the changes. The last of several with the same key wins.
    pub labels: &'a [(String, String)],
    /// `--annotation`, for the manifest. The last of several with the same key wins.
    pub annotations: &'a [(String, String)],
    /// Author for history, config and annotations. That of the base is left out in any case.
    pub author: Option<&'a str>,
    /// Comment of the topmost history entry.
    pub message: Option<&'a str>,
    /// Time of creation in seconds since the epoch.
    pub created: i64,
    /// `created_by` of the history entries.
    pub created_by: &'a str,
}

/// A document with its media type and digest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Blob {
    /// [`MANIFEST`] or [`CONFIG`].
    pub media_type: &'static str,
    /// Digest of `bytes`.
    pub digest: Digest,
    /// The JSON document.
    pub bytes: Vec<u8>,
}

impl Blob {
    fn new(media_type: &'static str, bytes: Vec<u8>) -> Self {
        Self {
            media_type,
            digest: Digest::of(&bytes),
            bytes,
        }
    }
}

/// The result of [`assemble`].
#[derive(Clone, Debug)]
pub struct Image {
    /// The manifest.
    pub manifest: Blob,
    /// The config that it refers to.
    pub config: Blob,
    /// The layers that it refers to, bottom first, with OCI media types.
    pub layers: Vec<Descriptor>,
    /// Repairs that were made.
    pub warnings: Vec<Warning>,
}

/// Builds config and manifest. Deterministic: equal inputs give equal bytes.
pub fn assemble(input: &Input<'_>) -> Result<Image, Error> {
    let total = input.base_layers.len() + input.layers.len();
    if total > MAX_LAYERS {
        return Err(Error::TooManyLayers(total));
    }
    check_pairs("--label", input.labels)?;
    check_pairs("--annotation", input.annotations)?;
    let mut warnings = Vec::new();
    let created = rfc3339(input.created)?;
    let config = Blob::new(CONFIG, config(input, &created, &mut warnings)?);
    let (manifest, layers) = manifest(input, &created, &config)?;
    if manifest.len() > MAX_MANIFEST_BYTES {
        return Err(Error::ManifestSize(manifest.len()));
    }
    Ok(Image {
        manifest: Blob::new(MANIFEST, manifest),
        config,
        layers,
        warnings,
    })
}

/// Checks the options `--change`, `--label`, `--annotation` and `--timestamp` (seconds since the epoch) without a
/// container or base. Changes that use variables of the image are only checked as far as possible.
pub fn check(
    changes: &[String],
    labels: &[(String, String)],
    annotations: &[(String, String)],
    created: Option<i64>,
) -> Result<(), Error> {
    check_pairs("--label", labels)?;
    check_pairs("--annotation", annotations)?;
    rfc3339(created.unwrap_or(0))?;
    Ok(change::check(changes)?)
}

/// Checks whether `changes` can be applied to a base with this config.
pub fn check_changes(base_config: &[u8], changes: &[String]) -> Result<(), Error> {
    if changes.is_empty() {
        return Ok(());
    }
    changed_config(base_config, changes).map(|_| ())
}

/// How containers of an image are started unless a runtime says otherwise.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Start {
    /// `USER[:GROUP]`, each a name or a number; empty for root.
    pub(crate) user: String,
    /// Entrypoint and arguments.
    pub(crate) command: Vec<String>,
}

impl Start {
    /// Returns how an image is started that has the config of its base with `changes`.
    pub(crate) fn of(base_config: &[u8], changes: &[String]) -> Result<Self, Error> {
        let config = changed_config(base_config, changes)?;
        let user = config.get("User").and_then(Value::as_str);
        let words = ["Entrypoint", "Cmd"].into_iter();
        let words = words.filter_map(|key| config.get(key)?.as_array());
        let words = words.flatten().filter_map(Value::as_str);
        Ok(Self {
            user: user.unwrap_or_default().to_owned(),
            command: words.map(str::to_owned).collect(),
        })
    }
}

/// Returns the settings of containers of a base with this config, with `changes` applied.
fn changed_config(base_config: &[u8], changes: &[String]) -> Result<Map<String, Value>, Error> {
    let mut root = parse_object(BASE_CONFIG, base_config)?;
    let mut inner = match root.get_mut("config").map(Value::take) {
        None | Some(Value::Null) => Map::new(),
        Some(Value::Object(map)) => map,
        Some(other) => return Err(unexpected_type(BASE_CONFIG, "config", "an object", &other)),
    };
    change_config(&mut inner, changes)?;
    Ok(inner)
}

/// Translates a layer's media type from Docker's name to that of OCI. Other types are returned unchanged. Returns
/// `None` for a Docker type without an OCI counterpart.
pub(crate) fn oci_layer_type(media_type: &str) -> Option<&str> {
    match LAYER_TYPES.iter().find(|(docker, _)| *docker == media_type) {
        Some((_, oci)) => Some(oci),
        None if media_type.starts_with("application/vnd.docker.") => None,
        None => Some(media_type),
    }
}

fn check_pairs(flag: &'static str, pairs: &[(String, String)]) -> Result<(), Error> {
    for (key, value) in pairs {
        let reason = if key.is_empty() {
            "the key is empty, expected KEY=VALUE"
        } else if key.contains('\0') || value.contains('\0') {
            "a NUL byte cannot be part of it"
        } else {
            continue;
        };
        return Err(Error::Pair {
            flag,
            key: key.clone(),
            reason,
        });
    }
    Ok(())
}

fn rfc3339(seconds: i64) -> Result<String, Error> {
    let time = jiff::Timestamp::from_second(seconds).map_err(|_| Error::Time(seconds))?;
    let text = time.to_string();
    // Years before 0 and after 9999 are written with a sign.
    if text.starts_with(|c: char| c.is_ascii_digit()) {
        Ok(text)
    } else {
        Err(Error::Time(seconds))
    }
}

const TITLE: &str = "org.opencontainers.image.title";
const DESCRIPTION: &str = "org.opencontainers.image.description";
const AUTHORS: &str = "org.opencontainers.image.authors";
const VENDOR: &str = "org.opencontainers.image.vendor";

const BASE_MANIFEST: &str = "the base manifest";

fn manifest(
    input: &Input<'_>,
    created: &str,
    config: &Blob,
) -> Result<(Vec<u8>, Vec<Descriptor>), Error> {
    let mut root = match &input.base_manifest {
        None => Map::new(),
        Some(base) => base_manifest(base)?,
    };
    let old_layers = match root.get_mut("layers").map(Value::take) {
        Some(Value::Array(layers)) => layers,
        _ => Vec::new(),
    };
    let mut out = Map::new();
    out.insert("schemaVersion".to_owned(), json!(2));
    out.insert("mediaType".to_owned(), json!(MANIFEST));
    // Unknown fields keep their order, after these two.
    for (key, value) in root {
        out.entry(key).or_insert(value);
    }

    let mut descriptor = match out.get_mut("config").map(Value::take) {
        Some(Value::Object(map)) => map,
        _ => Map::new(),
    };
    // `data` and `urls` refer to the content of the base's config.
    for key in ["data", "urls"] {
        descriptor.shift_remove(key);
    }
    descriptor.insert("mediaType".to_owned(), json!(CONFIG));
    descriptor.insert("digest".to_owned(), json!(config.digest));
    descriptor.insert("size".to_owned(), json!(config.bytes.len()));
    out.insert("config".to_owned(), Value::Object(descriptor));

    let mut layers = Vec::with_capacity(input.base_layers.len() + input.layers.len());
    for (index, layer) in input.base_layers.iter().enumerate() {
        layers.push(layer_descriptor(index, layer, old_layers.get(index))?);
    }
    for new in &input.layers {
        layers.push(layer_descriptor(layers.len(), &new.layer, None)?);
    }
    let parsed = layers
        .iter()
        .enumerate()
        .map(|(index, layer)| {
            serde_json::from_value(layer.clone()).map_err(|error| Error::UnexpectedType {
                what: BASE_MANIFEST,
                field: format!("layers[{index}]"),
                expected: "a descriptor",
                found: error.to_string(),
            })
        })
        .collect::<Result<Vec<Descriptor>, Error>>()?;
    out.insert("layers".to_owned(), Value::Array(layers));

    let annotations = annotations(&mut out, input, created);
    out.shift_remove("annotations");
    if !annotations.is_empty() {
        out.insert("annotations".to_owned(), Value::Object(annotations));
    }
    Ok((to_bytes(&out), parsed))
}

/// Parses the base's manifest and checks that it is one of an image.
fn base_manifest(base: &BaseManifest<'_>) -> Result<Map<String, Value>, Error> {
    let mut root = parse_object(BASE_MANIFEST, base.bytes)?;
    drop_nulls(&mut root);
    let own = root
        .get("mediaType")
        .and_then(Value::as_str)
        .unwrap_or_default();
    for media_type in [base.media_type, own] {
        let hint = match media_type {
            "" | MANIFEST | DOCKER_MANIFEST => continue,
            INDEX | DOCKER_LIST => ": choose one of its images first",
            _ => "",
        };
        return Err(Error::ManifestType {
            found: media_type.to_owned(),
            hint,
        });
    }
    // A document that is valid both as a manifest and as an index is an attack (CVE-2021-41190).
    if root.contains_key("manifests") {
        return Err(Error::ManifestType {
            found: "an index by its fields".to_owned(),
            hint: "",
        });
    }
    if let Some(version) = root
        .get("schemaVersion")
        .filter(|version| **version != json!(2))
    {
        return Err(Error::ManifestType {
            found: format!("schema version {version}"),
            hint: "",
        });
    }
    let config = match root.get("config") {
        Some(Value::Object(config)) => config,
        other => {
            return Err(unexpected_type(
                BASE_MANIFEST,
                "config",
                "an object",
                other.unwrap_or(&Value::Null),
            ));
        }
    };
    expect(BASE_MANIFEST, "config.", config, "mediaType", Kind::Text)?;
    match config
        .get("mediaType")
        .and_then(Value::as_str)
        .unwrap_or_default()
    {
        CONFIG | DOCKER_CONFIG => {}
        other => return Err(Error::ConfigType(other.to_owned())),
    }
    match root.get("layers") {
        Some(Value::Array(_)) => {}
        other => {
            return Err(unexpected_type(
                BASE_MANIFEST,
                "layers",
                "a list",
                other.unwrap_or(&Value::Null),
            ));
        }
    }
    expect(BASE_MANIFEST, "", &root, "annotations", Kind::TextMap)?;
    // The new image is not a signature of, or attachment to, the base's subject.
    root.shift_remove("subject");
    Ok(root)
}

/// Returns the descriptor of a layer with its OCI media type, based on the one in the base manifest if it is of the
/// same blob.
fn layer_descriptor(index: usize, layer: &Layer, old: Option<&Value>) -> Result<Value, Error> {
    let digest = layer.descriptor.digest().to_string();
    let mut map = match old {
        Some(Value::Object(old)) if old.get("digest").and_then(Value::as_str) == Some(&digest) => {
            old.clone()
        }
        _ => plain_descriptor(&layer.descriptor),
    };
    let media_type = layer.descriptor.media_type().to_string();
    let Some(oci) = oci_layer_type(&media_type) else {
        return Err(Error::LayerType { index, media_type });
    };
    // `urls` names other locations of the blob. Registries refuse it (distribution: "invalid URL on layer") or fetch
    // from there.
    map.shift_remove("urls");
    map.insert("mediaType".to_owned(), json!(oci));
    map.insert("digest".to_owned(), json!(digest));
    map.insert("size".to_owned(), json!(layer.descriptor.size()));
    Ok(Value::Object(map))
}

/// Built field by field: the annotations of `Descriptor` are a hash map, whose order differs from run to run.
fn plain_descriptor(descriptor: &Descriptor) -> Map<String, Value> {
    let mut map = Map::new();
    for key in ["mediaType", "digest", "size"] {
        map.insert(key.to_owned(), Value::Null);
    }
    if let Some(annotations) = descriptor.annotations() {
        let sorted: std::collections::BTreeMap<_, _> = annotations.iter().collect();
        map.insert("annotations".to_owned(), json!(sorted));
    }
    map
}

/// Returns the base's annotations without what it says of itself, with this image's own and the user's added.
fn annotations(
    manifest: &mut Map<String, Value>,
    input: &Input<'_>,
    created: &str,
) -> Map<String, Value> {
    let mut annotations = match manifest.get_mut("annotations").map(Value::take) {
        Some(Value::Object(map)) => map,
        _ => Map::new(),
    };
    // The base image of the base is not that of the new image.
    annotations.shift_remove(BASE_NAME);
    annotations.shift_remove(BASE_DIGEST);
    if let Some(name) = input.base_name {
        annotations.insert(BASE_NAME.to_owned(), json!(name));
    }
    if let Some(base) = &input.base_manifest {
        annotations.insert(BASE_DIGEST.to_owned(), json!(base.digest));
    }
    // What the base says of itself is not true of the new image.
    for key in [TITLE, DESCRIPTION, AUTHORS, VENDOR] {
        annotations.shift_remove(key);
    }
    annotations.insert(ANNOTATION_CREATED.to_owned(), json!(created));
    for (key, own) in [(AUTHORS, input.author), (DESCRIPTION, input.message)] {
        if let Some(own) = own {
            annotations.insert(key.to_owned(), json!(own));
        }
    }
    annotations.extend(
        input
            .annotations
            .iter()
            .map(|(key, value)| (key.clone(), json!(value))),
    );
    annotations
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_starts_as_its_base_unless_changed() -> Result<(), Error> {
        let base = json!({"config": {"User": "jovyan:users", "Entrypoint": ["tini", "--"], "Cmd": ["start.sh"]}});
        let base = base.to_string();
        let start = |changes: &[&str]| {
            let changes: Vec<String> = changes.iter().map(|&change| change.to_owned()).collect();
            let start = Start::of(base.as_bytes(), &changes)?;
            Ok::<_, Error>((start.user, start.command.join(" ")))
        };
        let said = |user: &str, command: &str| (user.to_owned(), command.to_owned());
        assert_eq!(start(&[])?, said("jovyan:users", "tini -- start.sh"));
        let changes = ["USER 1000", "CMD [\"lab\"]"];
        assert_eq!(start(&changes)?, said("1000", "tini -- lab"));
        assert_eq!(Start::of(b"{}", &[])?, Start::default());
        assert_eq!(Start::of(br#"{"config":null}"#, &[])?, Start::default());
        assert!(Start::of(br#"{"config":{"User":1}}"#, &[]).is_err());
        Ok(())
    }
}
