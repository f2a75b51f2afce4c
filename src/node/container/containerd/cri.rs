//! Reads what CRI, the Kubernetes interface of containerd, stores about a container and the sandbox of its pod.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;

use super::protobuf::any_value;
use crate::node::container::bolt::Bucket;
use crate::node::container::error::Error;

#[derive(Clone, Debug, Deserialize)]
pub(super) struct CriContainer {
    #[serde(rename = "SandboxID")]
    pub(super) sandbox_id: String,
    /// Digest of the image's config.
    #[serde(rename = "ImageRef", default)]
    pub(super) image_ref: String,
    #[serde(rename = "Config")]
    pub(super) config: CriConfig,
}

#[derive(Clone, Debug, Deserialize)]
pub(super) struct CriSandbox {
    #[serde(rename = "Config")]
    pub(super) config: CriConfig,
}

#[derive(Clone, Debug, Deserialize)]
pub(super) struct CriConfig {
    pub(super) metadata: CriMetadata,
    /// Labels; in the config of a sandbox, those of the pod.
    #[serde(default)]
    pub(super) labels: Option<BTreeMap<String, String>>,
    /// Annotations; in the config of a sandbox, those of the pod.
    #[serde(default)]
    pub(super) annotations: Option<BTreeMap<String, String>>,
}

/// `ContainerMetadata` or `PodSandboxMetadata` of the CRI, as sent by the kubelet.
#[derive(Clone, Debug, Default, Deserialize)]
pub(super) struct CriMetadata {
    pub(super) name: String,
    #[serde(default)]
    pub(super) namespace: String,
    #[serde(default)]
    pub(super) uid: String,
}

/// Versioned JSON, the format of the extensions.
#[derive(Deserialize)]
struct Versioned<T> {
    #[serde(rename = "Metadata")]
    metadata: T,
}

/// Reads a CRI extension: JSON in a protobuf `Any`.
pub(super) fn extension<T: serde::de::DeserializeOwned>(
    container: &Bucket<'_>,
    path: &Path,
    name: &str,
) -> Result<Option<T>, Error> {
    let Some(extensions) = container.bucket(b"extensions")? else {
        return Ok(None);
    };
    let Some(any) = extensions.get(name.as_bytes())? else {
        return Ok(None);
    };
    let value = any_value(&any)
        .ok_or_else(|| Error::damaged(path, format!("{name} is no protobuf Any")))?;
    let versioned: Versioned<T> =
        serde_json::from_slice(value).map_err(|e| Error::damaged(path, format!("{name}: {e}")))?;
    Ok(Some(versioned.metadata))
}
