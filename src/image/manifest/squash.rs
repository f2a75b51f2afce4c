//! Manifest and config of an image whose upper layers were rewritten into one: all else stays as it was.

use serde_json::{Map, Value, json};

use super::json::{parse_object, to_bytes, unexpected_type};
use super::{Blob, CONFIG, Error, Image, Layer, MANIFEST, layer_descriptor};
use crate::common::message;

const WHAT: &str = "the image's config";
const WHAT_MANIFEST: &str = "the image's manifest";

/// Replaces all layers above the lowest `keep` by `layer`. `created_by` is that of the new history entry; entries without
/// a layer stay, above it. A history that does not list the layers is left out. Annotations named in `without` are removed.
///
/// Deterministic: equal inputs give equal bytes.
pub fn squash(
    manifest: &[u8],
    config: &[u8],
    keep: usize,
    layer: &Layer,
    created_by: &str,
    without: &[&str],
) -> Result<Image, Error> {
    let config = Blob::new(CONFIG, squashed_config(config, keep, layer, created_by)?);
    let mut root = parse_object(WHAT_MANIFEST, manifest)?;
    let Some(Value::Array(old)) = root.get_mut("layers").map(Value::take) else {
        return Err(unexpected_type(
            WHAT_MANIFEST,
            "layers",
            "a list",
            &Value::Null,
        ));
    };
    let mut layers = Vec::with_capacity(keep + 1);
    for (index, old) in old.iter().take(keep).enumerate() {
        let descriptor = serde_json::from_value(old.clone()).map_err(|error| {
            let found = error.to_string();
            descriptor_expected(index, found)
        })?;
        let kept = Layer {
            descriptor,
            diff_id: layer.diff_id,
        };
        layers.push(layer_descriptor(index, &kept, Some(old))?);
    }
    layers.push(layer_descriptor(keep, layer, None)?);
    let parsed = layers.iter().enumerate().map(|(index, layer)| {
        serde_json::from_value(layer.clone())
            .map_err(|error| descriptor_expected(index, error.to_string()))
    });
    let parsed = parsed.collect::<Result<Vec<_>, Error>>()?;
    root.insert("mediaType".to_owned(), json!(MANIFEST));
    root.insert("layers".to_owned(), Value::Array(layers));
    root.insert(
        "config".to_owned(),
        json!({"mediaType": CONFIG, "digest": config.digest, "size": config.bytes.len()}),
    );
    if let Some(Value::Object(annotations)) = root.get_mut("annotations") {
        annotations.retain(|key, _| !without.contains(&key.as_str()));
    }
    Ok(Image {
        manifest: Blob::new(MANIFEST, to_bytes(&root)),
        config,
        layers: parsed,
        warnings: Vec::new(),
    })
}

fn descriptor_expected(index: usize, found: String) -> Error {
    Error::UnexpectedType {
        what: WHAT_MANIFEST,
        field: format!("layers[{index}]"),
        expected: "a descriptor",
        found,
    }
}

fn squashed_config(
    config: &[u8],
    keep: usize,
    layer: &Layer,
    created_by: &str,
) -> Result<Vec<u8>, Error> {
    let mut root = parse_object(WHAT, config)?;
    let ids = root
        .get_mut("rootfs")
        .and_then(|rootfs| rootfs.get_mut("diff_ids"));
    let Some(Value::Array(ids)) = ids else {
        let found = root.get("rootfs").unwrap_or(&Value::Null);
        return Err(unexpected_type(WHAT, "rootfs.diff_ids", "a list", found));
    };
    let count = ids.len();
    ids.truncate(keep);
    ids.push(json!(layer.diff_id));
    let history = match root.shift_remove("history") {
        Some(Value::Array(history)) => history,
        _ => Vec::new(),
    };
    if let Some(history) = squashed_history(history, keep, count, created_by) {
        // Where the field was is of no meaning.
        root.insert("history".to_owned(), Value::Array(history));
    }
    Ok(to_bytes(&root))
}

/// Returns the history with one entry for all layers above `keep`, or `None` if it is not that of `count` layers.
fn squashed_history(
    history: Vec<Value>,
    keep: usize,
    count: usize,
    created_by: &str,
) -> Option<Vec<Value>> {
    let is_layer = |entry: &Value| entry["empty_layer"] != json!(true);
    if history.iter().filter(|entry| is_layer(entry)).count() != count {
        return None;
    }
    let (mut below, mut above, mut squashed) = (Vec::new(), Vec::new(), Vec::new());
    let mut layers = 0;
    for entry in history {
        if !is_layer(&entry) {
            // A setting that was made between two layers of the base stays there.
            let to = if layers <= keep && squashed.is_empty() {
                &mut below
            } else {
                &mut above
            };
            to.push(entry);
            continue;
        }
        layers += 1;
        if layers <= keep {
            below.push(entry);
        } else {
            squashed.push(entry);
        }
    }
    let last = squashed.last()?;
    let mut entry = Map::new();
    for key in ["created", "author"] {
        if let Some(value) = last.get(key) {
            entry.insert(key.to_owned(), value.clone());
        }
    }
    entry.insert("created_by".to_owned(), json!(created_by));
    let comment = match squashed.len() {
        1 => "1 layer, rewritten".to_owned(),
        layers => format!("{}, squashed", message::count(layers, "layer", "layers")),
    };
    let said = last["comment"].as_str().filter(|said| !said.is_empty());
    let comment = said.map_or(comment.clone(), |said| format!("{said} ({comment})"));
    entry.insert("comment".to_owned(), json!(comment));
    below.push(Value::Object(entry));
    below.append(&mut above);
    Some(below)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_entry_stands_for_all_layers_above_the_base() {
        let base = json!({"created_by": "RUN a"});
        let empty = json!({"created_by": "CMD", "empty_layer": true});
        let save = |at: &str| json!({"created": at, "created_by": "upperdeck commit"});
        let history = vec![
            base.clone(),
            empty.clone(),
            save("1"),
            empty.clone(),
            save("2"),
        ];
        let squashed = squashed_history(history.clone(), 1, 3, "upperdeck commit");
        let one = json!({"created": "2", "created_by": "upperdeck commit", "comment": "2 layers, squashed"});
        assert_eq!(squashed, Some(vec![base, empty.clone(), one, empty]));
        assert_eq!(squashed_history(history, 1, 4, "x"), None);
        assert_eq!(squashed_history(Vec::new(), 0, 1, "x"), None);
    }
}
