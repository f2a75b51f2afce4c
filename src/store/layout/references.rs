//! Finds the blobs that images need, from the entries of `index.json` down to layers.
//!
//! Every object with a `digest` and a `size` or `mediaType` counts as a reference, wherever in a document it is. So
//! `subject`, artifacts and media types that this program does not know keep what they name. A document that cannot be
//! read is an error, because blobs that only it names would look unneeded.

use std::collections::HashSet;

use serde_json::Value;

use super::Error;
use super::blobs::{BlobName, Blobs, Document};

/// Media types of documents that refer to blobs.
const DOCUMENTS: [&str; 7] = [
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.oci.artifact.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
    "application/vnd.docker.distribution.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v1+prettyjws",
];
/// Beginnings of media types of blobs that refer to none.
const LEAVES: [&str; 5] = [
    "application/vnd.oci.image.layer.",
    "application/vnd.oci.image.config.v1+json",
    "application/vnd.oci.empty.v1+json",
    "application/vnd.docker.image.rootfs.",
    "application/vnd.docker.container.image.v1+json",
];

/// What is known of a blob's content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Content {
    /// It has to be read.
    Document,
    /// It is read if it is a small JSON object.
    Unknown,
    /// It names no other blob.
    Leaf,
}

impl Content {
    fn of(media_type: Option<&str>) -> Self {
        match media_type {
            Some(known) if DOCUMENTS.contains(&known) => Self::Document,
            Some(known) if LEAVES.iter().any(|leaf| known.starts_with(leaf)) => Self::Leaf,
            _ => Self::Unknown,
        }
    }
}

/// A reference to a blob.
#[derive(Clone, Debug)]
pub(super) struct Reference {
    pub(super) name: BlobName,
    /// Size in bytes, if given.
    pub(super) size: Option<u64>,
    /// Whether the content may lie elsewhere (`urls` of non-distributable layers).
    pub(super) elsewhere: bool,
    content: Content,
    /// Whether `index.json` itself names it.
    listed: bool,
}

impl Reference {
    /// Refers to a manifest or index.
    pub(super) fn to_document(name: BlobName) -> Self {
        Self {
            name,
            size: None,
            elsewhere: false,
            content: Content::Document,
            listed: false,
        }
    }
}

/// Returns all references in a document.
pub(super) fn references(document: &Value) -> Vec<Reference> {
    let mut found = Vec::new();
    // The parser limits the depth.
    collect(document, &mut found);
    found
}

fn collect(value: &Value, found: &mut Vec<Reference>) {
    let object = match value {
        Value::Object(object) => object,
        Value::Array(all) => return all.iter().for_each(|one| collect(one, found)),
        _ => return,
    };
    let text = |key: &str| object.get(key).and_then(Value::as_str);
    let (media_type, size) = (
        text("mediaType"),
        object.get("size").and_then(Value::as_u64),
    );
    let named = text("digest").filter(|_| media_type.is_some() || object.contains_key("size"));
    if let Some(name) = named.and_then(BlobName::parse) {
        found.push(Reference {
            name,
            size,
            elsewhere: object.contains_key("urls"),
            content: Content::of(media_type),
            listed: false,
        });
    }
    // Docker's first schema.
    if let Some(name) = text("blobSum").and_then(BlobName::parse) {
        found.push(Reference {
            content: Content::Leaf,
            ..Reference::to_document(name)
        });
    }
    for one in object.values() {
        collect(one, found);
    }
}

/// Returns the references of `index.json`.
///
/// Fails with a reason if it is no image index.
pub(super) fn of_index(bytes: &[u8]) -> Result<Vec<Reference>, String> {
    let index: Value = serde_json::from_slice(bytes)
        .map_err(|e| format!("index.json: expected an image index: {e}"))?;
    let manifests = index.get("manifests").and_then(Value::as_array);
    let mut found = references(&index);
    for entry in manifests.ok_or("index.json: expected a list of manifests")? {
        let text = |key: &str| entry.get(key).and_then(Value::as_str);
        let Some(name) = text("digest").and_then(BlobName::parse) else {
            return Err("index.json: an entry has no digest".to_owned());
        };
        found.retain(|other| other.name != name);
        found.push(Reference {
            content: Content::of(text("mediaType")),
            listed: true,
            ..Reference::to_document(name)
        });
    }
    Ok(found)
}

/// Returns all blobs that the references need, directly and through documents, including themselves.
///
/// Fails if a document cannot be read, or is missing although `index.json` names it. One that only another index names
/// may be missing: copies of some platforms of an image are like that.
pub(super) fn reachable(
    blobs: &Blobs,
    from: impl IntoIterator<Item = Reference>,
) -> Result<HashSet<BlobName>, Error> {
    let mut open: Vec<Reference> = from.into_iter().collect();
    let (mut needed, mut read) = (HashSet::new(), HashSet::new());
    while let Some(next) = open.pop() {
        needed.insert(next.name.clone());
        // The same blob may be named with another media type.
        if next.content == Content::Leaf || read.contains(&next.name) {
            continue;
        }
        let name = &next.name;
        let document = match (blobs.read(name)?, next.content) {
            (Document::Read(bytes), Content::Document) => {
                serde_json::from_slice(&bytes).map_err(|error| {
                    blobs.unreadable(format!("{name}: expected a manifest or index: {error}"))
                })?
            }
            // A text or an archive with a type of its own.
            (Document::Read(bytes), _) => serde_json::from_slice(&bytes).unwrap_or_default(),
            (Document::Large, Content::Document) => {
                return Err(
                    blobs.unreadable(format!("{name} is too large for a manifest or index"))
                );
            }
            (Document::Missing, Content::Document) if next.listed => {
                return Err(blobs.unreadable(format!(
                    "{name}, which index.json names, is not there, and what it needs is unknown"
                )));
            }
            (Document::Large | Document::Missing, _) => Value::Null,
        };
        read.insert(next.name);
        open.extend(references(&document));
    }
    Ok(needed)
}

/// Returns whether a blob is a document about one of `needed` (its `subject`). Such a blob need not be listed anywhere:
/// registries find it by what it says.
pub(super) fn is_about(
    blobs: &Blobs,
    name: &BlobName,
    needed: &HashSet<BlobName>,
) -> Result<bool, Error> {
    let document = blobs.json_object(name)?.unwrap_or_default();
    let subject = document.pointer("/subject/digest").and_then(Value::as_str);
    Ok(subject
        .and_then(BlobName::parse)
        .is_some_and(|subject| needed.contains(&subject)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn names(document: &Value) -> Vec<String> {
        references(document)
            .iter()
            .map(|found| found.name.to_string())
            .collect()
    }

    #[test]
    fn descriptors_are_found_wherever_they_are_and_texts_are_none() {
        let document = json!({
            "config": {"digest": "sha256:c0", "size": 1},
            "layers": [{"digest": "sha256:1a", "mediaType": "x/y"}],
            "subject": {"digest": "sha256:5b", "size": 2},
            "x-unknown": {"deep": [{"digest": "sha256:d0", "size": 3}]},
            "fsLayers": [{"blobSum": "sha256:f5"}],
            "annotations": {"org.opencontainers.image.base.digest": "sha256:ba"},
            "note": {"digest": "sha256:aa"},
            "bad": {"digest": "../x", "size": 1},
        });
        let mut found = names(&document);
        found.sort();
        assert_eq!(
            found,
            [
                "sha256:1a",
                "sha256:5b",
                "sha256:c0",
                "sha256:d0",
                "sha256:f5"
            ]
        );
    }

    #[test]
    fn an_index_whose_entries_are_unknown_is_refused() {
        for bad in [
            "",
            "{}",
            r#"{"manifests":7}"#,
            r#"{"manifests":[{"size":1}]}"#,
            r#"{"manifests":[{"digest":"x"}]}"#,
        ] {
            assert!(of_index(bad.as_bytes()).is_err(), "{bad}");
        }
        assert!(of_index(br#"{"manifests":[]}"#).is_ok_and(|found| found.is_empty()));
        // Without size and media type, an entry still counts.
        let bare = of_index(br#"{"manifests":[{"digest":"sha256:ab"}]}"#);
        assert!(bare.is_ok_and(|found| found.len() == 1));
    }
}
