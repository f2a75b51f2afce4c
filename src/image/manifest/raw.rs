//! Manifests and indexes as they are stored, and how to tell which is which.

use bytes::Bytes;

use crate::common::digest::Digest;

/// Media types of what a tag can name.
pub const MANIFEST_TYPES: [&str; 4] = [
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
];

/// A manifest, an index or any other JSON document as a registry or a layout has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RawManifest {
    /// The bytes that the digest is over.
    pub bytes: Bytes,
    /// Its media type.
    pub media_type: String,
    /// Its digest.
    pub digest: Digest,
}

impl RawManifest {
    /// Whether it lists manifests instead of layers.
    pub fn is_index(&self) -> bool {
        self.media_type == MANIFEST_TYPES[1] || self.media_type == MANIFEST_TYPES[3]
    }
}

/// The media type of a manifest: the document's own word where it has one, else the header's, else its form.
pub fn manifest_type(header: Option<&str>, bytes: &[u8]) -> Result<String, String> {
    #[derive(serde::Deserialize)]
    struct Shape {
        #[serde(rename = "mediaType")]
        media_type: Option<String>,
        #[serde(rename = "schemaVersion")]
        schema_version: Option<u64>,
        manifests: Option<serde::de::IgnoredAny>,
        layers: Option<serde::de::IgnoredAny>,
    }
    let shape: Shape = serde_json::from_slice(bytes).map_err(|e| format!("not a manifest: {e}"))?;
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
        (None, true, false) => Ok(MANIFEST_TYPES[1].to_owned()),
        (None, false, true) => Ok(MANIFEST_TYPES[0].to_owned()),
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
        let [manifest, index, docker, _] = MANIFEST_TYPES.map(str::to_owned);
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
