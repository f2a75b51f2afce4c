//! Reads containerd's metadata database: container records, image records, and the sources of blobs.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use oci_spec::image::Descriptor;

use super::cri::{CriConfig, CriContainer, CriSandbox, extension};
use super::protobuf::text;
use crate::common::digest::Digest;
use crate::node::container::bolt::{Bucket, Snapshot, Value};
use crate::node::container::error::Error;

/// A container record of `meta.db`.
#[derive(Clone, Debug, Default)]
pub(super) struct Record {
    pub(super) image: Option<String>,
    pub(super) snapshotter: String,
    /// Key in the snapshotter's own database.
    pub(super) snapshot: Option<String>,
    pub(super) labels: BTreeMap<String, String>,
    /// CRI data of the container, if it belongs to a pod.
    pub(super) cri: Option<CriContainer>,
    /// Whether it is the sandbox of a pod.
    pub(super) sandbox: bool,
    /// CRI data of the pod's sandbox.
    pub(super) pod: Option<CriConfig>,
}

/// An image record: a name and its target.
#[derive(Clone, Debug)]
pub(super) struct ImageRecord {
    pub(super) name: String,
    pub(super) target: Digest,
    pub(super) media_type: Option<String>,
}

/// Returns the record of a container, or `None` if it does not exist.
pub(super) fn record(
    db: &Snapshot<'_>,
    path: &Path,
    namespace: &str,
    id: &str,
) -> Result<Option<Record>, Error> {
    let Some(containers) = db.bucket(&[b"v1", namespace.as_bytes(), b"containers"])? else {
        return Ok(None);
    };
    let Some(container) = containers.bucket(id.as_bytes())? else {
        return Ok(None);
    };
    let string = |key: &[u8]| Ok::<_, Error>(container.get(key)?.map(|value| text(&value)));
    let snapshotter = string(b"snapshotter")?.unwrap_or_default();
    let key = string(b"snapshotKey")?.unwrap_or_default();
    let snapshot = match db.bucket(&[
        b"v1",
        namespace.as_bytes(),
        b"snapshots",
        snapshotter.as_bytes(),
        key.as_bytes(),
    ])? {
        Some(snapshot) => snapshot.get(b"name")?.map(|name| text(&name)),
        None => None,
    };
    let cri: Option<CriContainer> =
        extension(&container, path, "io.cri-containerd.container.metadata")?;
    let pod = match &cri {
        Some(cri) => match containers.bucket(cri.sandbox_id.as_bytes())? {
            Some(sandbox) => {
                extension::<CriSandbox>(&sandbox, path, "io.cri-containerd.sandbox.metadata")?
            }
            None => None,
        },
        None => None,
    };
    let sandbox = match container.bucket(b"extensions")? {
        Some(extensions) => extensions
            .get(b"io.cri-containerd.sandbox.metadata")?
            .is_some(),
        None => false,
    };
    Ok(Some(Record {
        image: string(b"image")?,
        snapshotter,
        snapshot,
        labels: labels(&container)?,
        cri,
        sandbox,
        pod: pod.map(|pod| pod.config),
    }))
}

/// Lists all containers in all namespaces, as namespace and ID.
pub(super) fn container_ids(db: &Snapshot<'_>) -> Result<Vec<(String, String)>, Error> {
    let mut ids = Vec::new();
    let Some(namespaces) = db.bucket(&[b"v1"])? else {
        return Ok(ids);
    };
    for (namespace, value) in namespaces.entries()? {
        let Value::Bucket(namespace_bucket) = value else {
            continue;
        };
        let Some(containers) = namespace_bucket.bucket(b"containers")? else {
            continue;
        };
        for (id, _) in containers.entries()? {
            ids.push((text(&namespace), text(&id)));
        }
    }
    Ok(ids)
}

pub(super) fn labels(of: &Bucket<'_>) -> Result<BTreeMap<String, String>, Error> {
    let Some(labels) = of.bucket(b"labels")? else {
        return Ok(BTreeMap::new());
    };
    let entries = labels.entries()?.into_iter();
    Ok(entries
        .filter_map(|(key, value)| match value {
            Value::Bytes(value) => Some((text(&key), text(&value))),
            Value::Bucket(_) => None,
        })
        .collect())
}

pub(super) fn images(db: &Snapshot<'_>, namespace: &str) -> Result<Vec<ImageRecord>, Error> {
    let Some(images) = db.bucket(&[b"v1", namespace.as_bytes(), b"images"])? else {
        return Ok(Vec::new());
    };
    let mut records = Vec::new();
    for (name, value) in images.entries()? {
        let Value::Bucket(image) = value else {
            continue;
        };
        let Some(target) = image.bucket(b"target")? else {
            continue;
        };
        let digest = target
            .get(b"digest")?
            .and_then(|digest| text(&digest).parse().ok());
        let Some(digest) = digest else { continue };
        let media_type = target
            .get(b"mediatype")?
            .map(|media_type| text(&media_type));
        records.push(ImageRecord {
            name: text(&name),
            target: digest,
            media_type,
        });
    }
    Ok(records)
}

/// Returns the repositories that a blob was pulled from according to the content store. The labels omit the ports of
/// hosts; if images of this namespace use the same host with a port, that one is assumed.
pub(super) fn sources(
    db: &Snapshot<'_>,
    namespace: &str,
    layer: &Descriptor,
    hosts: &BTreeSet<String>,
) -> Result<Vec<String>, Error> {
    let digest = layer.digest().to_string();
    let Some(blob) = db.bucket(&[
        b"v1",
        namespace.as_bytes(),
        b"content",
        b"blob",
        digest.as_bytes(),
    ])?
    else {
        return Ok(Vec::new());
    };
    let mut repositories = Vec::new();
    for (key, value) in labels(&blob)? {
        let Some(host) = key.strip_prefix("containerd.io/distribution.source.") else {
            continue;
        };
        let mut meant: Vec<&str> = hosts
            .iter()
            .map(String::as_str)
            .filter(|h| without_port(h) == host)
            .collect();
        if meant.is_empty() {
            meant.push(host);
        }
        for path in value.split(',').filter(|path| !path.is_empty()) {
            repositories.extend(meant.iter().map(|host| format!("{host}/{path}")));
        }
    }
    Ok(repositories)
}

/// Removes the port: `[::1]:5000` becomes `[::1]`.
fn without_port(host: &str) -> &str {
    match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) => name,
        _ => host,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_is_told_from_an_address() {
        for (host, expected) in [
            ("a:5000", "a"),
            ("a", "a"),
            ("[::1]:5000", "[::1]"),
            ("[::1]", "[::1]"),
        ] {
            assert_eq!(without_port(host), expected);
        }
    }
}
