//! Parses the JSON of base images as far as the proof needs it: a config's layers, a manifest's descriptors, an index's
//! manifests, and the repository of a reference.
//!
//! Format: image-spec `config.md`, `manifest.md`, `image-index.md`; Docker's image manifest v2 schema 2.

use oci_client::manifest::{
    IMAGE_DOCKER_CONFIG_MEDIA_TYPE, IMAGE_MANIFEST_MEDIA_TYPE, OCI_IMAGE_MEDIA_TYPE,
};
use oci_spec::image::Descriptor;
use serde::Deserialize;
use serde_json::Value;

use super::RawManifest;
use crate::common::digest::{ChainId, DiffId, Digest};
use crate::common::reference::Reference;

/// Maximum size of a document in bytes. Registries accept manifests up to 4 MiB (distribution-spec); configs are
/// similar.
pub(super) const BLOB_CAP: u64 = 4 << 20;

/// An image config with its layers.
#[derive(Clone, Debug)]
pub(super) struct Config {
    pub(super) digest: Digest,
    pub(super) bytes: Vec<u8>,
    pub(super) diff_ids: Vec<DiffId>,
    /// Chain IDs, one per layer.
    pub(super) chain: Vec<ChainId>,
}

impl Config {
    /// Parses an image config; its digest is computed from the bytes.
    pub(super) fn parse(bytes: Vec<u8>) -> Result<Self, String> {
        #[derive(Deserialize)]
        struct Image {
            rootfs: RootFs,
        }
        #[derive(Deserialize)]
        struct RootFs {
            diff_ids: Vec<DiffId>,
        }
        let image: Image = serde_json::from_slice(&bytes).map_err(|e| e.to_string())?;
        let diff_ids = image.rootfs.diff_ids;
        Ok(Self {
            digest: Digest::of(&bytes),
            chain: ChainId::chain(&diff_ids),
            diff_ids,
            bytes,
        })
    }
}

/// An image manifest with its descriptors.
#[derive(Clone, Debug)]
pub(super) struct Manifest {
    pub(super) raw: RawManifest,
    pub(super) config: Digest,
    /// Layers, bottom first.
    pub(super) layers: Vec<Descriptor>,
}

/// The kinds of blobs that an image record can refer to.
#[derive(Clone, Debug)]
pub(super) enum Document {
    Manifest(Manifest),
    /// Digests of the manifests of an index.
    Index(Vec<Digest>),
    /// Any other blob.
    Other,
}

impl Document {
    /// Parses a blob. `media_type` is that of the descriptor; the document's own takes precedence.
    pub(super) fn parse(bytes: Vec<u8>, media_type: Option<&str>) -> Self {
        let Ok(Value::Object(json)) = serde_json::from_slice::<Value>(&bytes) else {
            return Self::Other;
        };
        if let Some(Value::Array(manifests)) = json.get("manifests") {
            let digests = manifests
                .iter()
                .filter_map(|m| m.get("digest")?.as_str()?.parse().ok());
            return Self::Index(digests.collect());
        }
        let digest_of = |descriptor: &Value| descriptor.get("digest")?.as_str()?.parse().ok();
        let (Some(config), Some(layers)) =
            (json.get("config").and_then(digest_of), json.get("layers"))
        else {
            return Self::Other;
        };
        let Ok(layers) = serde_json::from_value::<Vec<Descriptor>>(layers.clone()) else {
            return Self::Other;
        };
        let own = json.get("mediaType").and_then(Value::as_str);
        let docker = json["config"].get("mediaType").and_then(Value::as_str)
            == Some(IMAGE_DOCKER_CONFIG_MEDIA_TYPE);
        let inferred = if docker {
            IMAGE_MANIFEST_MEDIA_TYPE
        } else {
            OCI_IMAGE_MEDIA_TYPE
        };
        let media_type = own.or(media_type).unwrap_or(inferred).to_owned();
        let digest = Digest::of(&bytes);
        Self::Manifest(Manifest {
            raw: RawManifest {
                bytes,
                media_type,
                digest,
            },
            config,
            layers,
        })
    }
}

/// Returns `HOST/REPOSITORY` of an image's name in a runtime's record, or `None` for what names no repository: names that
/// are local (`localhost/x`), digests, IDs, and texts that are no reference.
pub(super) fn repository(name: &str) -> Option<String> {
    let is_id = name.len() == 64 && name.bytes().all(|b| b.is_ascii_hexdigit());
    if is_id || name.starts_with("sha256:") {
        return None;
    }
    let reference = Reference::parse_with_default_host(name).ok()?;
    (reference.host != "localhost").then(|| reference.name())
}

/// Appends the repositories that are not in the list yet.
pub(super) fn add_repositories(to: &mut Vec<String>, more: impl IntoIterator<Item = String>) {
    for repository in more {
        if !to.contains(&repository) {
            to.push(repository);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reference_names_its_repository() {
        let cases = [
            (
                "127.0.0.1:5000/library/pybase:1",
                Some("127.0.0.1:5000/library/pybase"),
            ),
            ("localhost:5000/a", Some("localhost:5000/a")),
            ("localhost/two:1", None),
            (
                "docker.io/library/busybox:latest",
                Some("docker.io/library/busybox"),
            ),
            ("busybox", Some("docker.io/library/busybox")),
            ("jupyter/base:1", Some("docker.io/jupyter/base")),
            (
                "quay.io/a/b/c@sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
                Some("quay.io/a/b/c"),
            ),
            (
                "quay.io/a:1@sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
                Some("quay.io/a"),
            ),
            ("quay.io/a@sha256:00", None),
            ("Quay.io/A", None),
            ("index.docker.io/busybox", Some("docker.io/library/busybox")),
            ("[::1]:5000/a", Some("[::1]:5000/a")),
            ("sha256:00", None),
            (
                "8a021f01bcd97a2ec4c4b4d0ec9f274135517d907ccb9068bec99f328ed85ecb",
                None,
            ),
            ("", None),
            (":", None),
            ("host.x/", None),
        ];
        for (reference, expected) in cases {
            assert_eq!(repository(reference).as_deref(), expected, "{reference}");
        }
    }

    #[test]
    fn garbage_is_neither_config_nor_manifest() {
        for bad in [
            "",
            "{",
            "[]",
            "{}",
            r#"{"rootfs":{"diff_ids":["sha256:x"]}}"#,
            r#"{"config":{"digest":"x"},"layers":[]}"#,
        ] {
            assert!(Config::parse(bad.into()).is_err(), "{bad}");
            assert!(
                matches!(Document::parse(bad.into(), None), Document::Other),
                "{bad}"
            );
        }
    }
}
