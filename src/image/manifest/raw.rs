//! Manifests and indexes as stored, and the detection of their media type.

use bytes::Bytes;

use super::{DOCKER_LIST, DOCKER_MANIFEST, INDEX, MANIFEST};
use crate::common::digest::Digest;

/// Media types of documents that a tag can refer to.
pub const MANIFEST_TYPES: [&str; 4] = [MANIFEST, INDEX, DOCKER_MANIFEST, DOCKER_LIST];

/// A manifest or index as a registry or layout stores it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RawManifest {
    /// The bytes that the digest covers.
    pub bytes: Bytes,
    /// Media type.
    pub media_type: String,
    /// Digest of the bytes.
    pub digest: Digest,
}

impl RawManifest {
    /// Returns whether it lists manifests instead of layers.
    pub fn is_index(&self) -> bool {
        matches!(self.media_type.as_str(), INDEX | DOCKER_LIST)
    }
}

/// Determines the media type of a manifest: from its `mediaType`, else from `header`, else from its fields.
pub fn manifest_type(header: Option<&str>, bytes: &[u8]) -> Result<String, String> {
    #[derive(serde::Deserialize)]
    struct ManifestFields {
        #[serde(rename = "mediaType")]
        media_type: Option<String>,
        #[serde(rename = "schemaVersion")]
        schema_version: Option<u64>,
        manifests: Option<serde::de::IgnoredAny>,
        layers: Option<serde::de::IgnoredAny>,
    }
    let shape: ManifestFields =
        serde_json::from_slice(bytes).map_err(|e| format!("not a manifest: {e}"))?;
    if shape.schema_version == Some(1) {
        return Err(
            "a manifest of schema version 1, which is not supported: pull and push the image again"
                .to_owned(),
        );
    }
    let header = header.map(|h| h.split(';').next().unwrap_or_default().trim().to_owned());
    let said = shape
        .media_type
        .or(header.filter(|h| MANIFEST_TYPES.contains(&h.as_str())));
    match (said, shape.manifests.is_some(), shape.layers.is_some()) {
        (Some(said), _, _) if MANIFEST_TYPES.contains(&said.as_str()) => Ok(said),
        (Some(said), _, _) => Err(format!(
            "expected an image manifest or index, found media type {:?}",
            said.chars().take(100).collect::<String>()
        )),
        (None, true, false) => Ok(INDEX.to_owned()),
        (None, false, true) => Ok(MANIFEST.to_owned()),
        (None, _, _) => Err(
            "expected an image manifest or index, found neither manifests nor layers".to_owned(),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn manifest_types() {
        let of = |header, body: &str| manifest_type(header, body.as_bytes());
        let [manifest, index, docker] = [MANIFEST, INDEX, DOCKER_MANIFEST].map(str::to_owned);
        assert_eq!(
            of(None, r#"{"schemaVersion":2,"layers":[]}"#),
            Ok(manifest.clone())
        );
        assert_eq!(
            of(Some("application/json"), r#"{"manifests":[]}"#),
            Ok(index)
        );
        let header = format!("{docker}; charset=utf-8");
        assert_eq!(of(Some(&header), r#"{"layers":[]}"#), Ok(docker));
        assert_eq!(
            of(
                Some("text/plain"),
                &format!(r#"{{"mediaType":"{manifest}"}}"#)
            ),
            Ok(manifest)
        );
        for bad in [
            r#"{"schemaVersion":1,"fsLayers":[]}"#,
            "{}",
            "[]",
            "",
            r#"{"mediaType":"x/y","layers":[]}"#,
        ] {
            assert!(of(None, bad).is_err(), "{bad}");
        }
    }
}
