//! Makes the config of an image from that of its base.

use serde_json::{Map, Value, json};

use super::json::{Kind, drop_nulls, expect, parse_object, to_bytes, unexpected_type};
use super::{Error, Input, NewLayer, Platform, Warning, change};
use crate::common::digest::DiffId;

/// Fields that Docker adds to the image-spec's, about the container that an image was committed from or for Docker's
/// first image format. They are wrong for the new image; `docker commit` and buildah refresh or drop them, too.
pub(super) const STALE_FIELDS: [&str; 7] = [
    "id",
    "parent",
    "comment",
    "container",
    "container_config",
    "docker_version",
    "throwaway",
];

/// Such fields within `config`: names of the container that the base was committed from.
pub(super) const STALE_CONFIG_FIELDS: [&str; 4] = ["Hostname", "Domainname", "Image", "MacAddress"];

pub(super) const BASE_CONFIG: &str = "the base config";

pub(super) fn config(
    input: &Input<'_>,
    created: &str,
    warnings: &mut Vec<Warning>,
) -> Result<Vec<u8>, Error> {
    let mut root = parse_object(BASE_CONFIG, input.base_config)?;
    for key in STALE_FIELDS {
        root.shift_remove(key);
    }
    // The author of the base did not make this image.
    if input.author.is_none() {
        root.shift_remove("author");
    }
    // Go treats null as absent, the JSON schema does not allow it.
    drop_nulls(&mut root);
    for key in ["author", "created", "variant", "os.version"] {
        expect(BASE_CONFIG, "", &root, key, Kind::Text)?;
    }
    expect(BASE_CONFIG, "", &root, "os.features", Kind::Texts)?;
    let host = Platform::host();
    for (key, assumed) in [
        ("architecture", host.architecture.as_str()),
        ("os", "linux"),
    ] {
        expect(BASE_CONFIG, "", &root, key, Kind::Text)?;
        if root
            .get(key)
            .and_then(Value::as_str)
            .unwrap_or_default()
            .is_empty()
        {
            warnings.push(Warning {
                code: "base_platform_missing",
                message: format!("the base config does not say its {key}; {assumed} was written"),
            });
            root.insert(key.to_owned(), json!(assumed));
        }
    }
    root.insert("created".to_owned(), json!(created));
    if let Some(author) = input.author {
        root.insert("author".to_owned(), json!(author));
    }

    let mut inner = match root.get_mut("config").map(Value::take) {
        None => Map::new(),
        Some(Value::Object(map)) => map,
        Some(other) => return Err(unexpected_type(BASE_CONFIG, "config", "an object", &other)),
    };
    run_config(&mut inner, input)?;
    root.insert("config".to_owned(), Value::Object(inner));

    let mut rootfs = match root.get_mut("rootfs").map(Value::take) {
        Some(Value::Object(map)) => map,
        other => {
            return Err(unexpected_type(
                BASE_CONFIG,
                "rootfs",
                "an object",
                &other.unwrap_or_default(),
            ));
        }
    };
    match rootfs.get("diff_ids") {
        // The base has no layers: Go writes an empty list as null.
        None | Some(Value::Null) if input.base_layers.is_empty() => {}
        Some(Value::Array(ids)) if ids.len() == input.base_layers.len() => {}
        Some(Value::Array(ids)) => {
            return Err(Error::LayerCount {
                config: ids.len(),
                given: input.base_layers.len(),
            });
        }
        other => {
            return Err(unexpected_type(
                BASE_CONFIG,
                "rootfs.diff_ids",
                "a list",
                other.unwrap_or(&Value::Null),
            ));
        }
    }
    let new = input.layers.iter().map(|new| &new.layer);
    let diff_ids: Vec<DiffId> = input
        .base_layers
        .iter()
        .chain(new)
        .map(|layer| layer.diff_id)
        .collect();
    rootfs.insert("type".to_owned(), json!("layers"));
    rootfs.insert("diff_ids".to_owned(), json!(diff_ids));
    root.insert("rootfs".to_owned(), Value::Object(rootfs));

    let mut history = match root.get_mut("history").map(Value::take) {
        None => Vec::new(),
        Some(Value::Array(entries)) => entries,
        Some(other) => return Err(unexpected_type(BASE_CONFIG, "history", "a list", &other)),
    };
    repair_history(&mut history, input.base_layers.len(), warnings)?;
    history.extend(new_history(input, created));
    root.insert("history".to_owned(), Value::Array(history));
    Ok(to_bytes(&root))
}

/// Applies the changes to the inner `config`, which holds the settings of containers created from the image.
pub(super) fn change_config(
    config: &mut Map<String, Value>,
    changes: &[String],
) -> Result<(), Error> {
    for key in STALE_CONFIG_FIELDS {
        config.shift_remove(key);
    }
    drop_nulls(config);
    for key in ["User", "WorkingDir", "StopSignal"] {
        expect(BASE_CONFIG, "config.", config, key, Kind::Text)?;
    }
    for key in ["Env", "Entrypoint", "Cmd", "OnBuild", "Shell"] {
        expect(BASE_CONFIG, "config.", config, key, Kind::Texts)?;
    }
    expect(BASE_CONFIG, "config.", config, "Labels", Kind::TextMap)?;
    for key in ["ExposedPorts", "Volumes", "Healthcheck"] {
        expect(BASE_CONFIG, "config.", config, key, Kind::Object)?;
    }
    change::apply(config, changes)?;
    Ok(())
}

pub(super) fn run_config(config: &mut Map<String, Value>, input: &Input<'_>) -> Result<(), Error> {
    change_config(config, input.changes)?;
    if !input.labels.is_empty() {
        let mut labels = match config.get_mut("Labels").map(Value::take) {
            Some(Value::Object(map)) => map,
            _ => Map::new(),
        };
        labels.extend(
            input
                .labels
                .iter()
                .map(|(key, value)| (key.clone(), json!(value))),
        );
        config.insert("Labels".to_owned(), Value::Object(labels));
    }
    Ok(())
}

/// Adjusts the history so that its non-empty entries are as many as the layers. Consumers that pair them would fail.
pub(super) fn repair_history(
    history: &mut Vec<Value>,
    layers: usize,
    warnings: &mut Vec<Warning>,
) -> Result<(), Error> {
    let mut with_layer = 0;
    for (i, entry) in history.iter_mut().enumerate() {
        let Value::Object(entry) = entry else {
            return Err(unexpected_type(
                BASE_CONFIG,
                format!("history[{i}]"),
                "an object",
                entry,
            ));
        };
        drop_nulls(entry);
        let at = format!("history[{i}].");
        for key in ["created", "author", "created_by", "comment"] {
            expect(BASE_CONFIG, &at, entry, key, Kind::Text)?;
        }
        expect(BASE_CONFIG, &at, entry, "empty_layer", Kind::Bool)?;
        with_layer += usize::from(!is_empty_layer(entry));
    }
    if with_layer == layers {
        return Ok(());
    }
    warnings.push(Warning {
        code: "base_history_repaired",
        message: format!(
            "the base's history tells of {}, there are {layers}; it was made to match",
            crate::common::message::count(with_layer, "layer", "layers")
        ),
    });
    if with_layer < layers {
        let filler =
            json!({ "comment": "a layer of the base image that its history does not mention" });
        history.extend(std::iter::repeat_n(filler, layers - with_layer));
    }
    // Which of the surplus entries are wrong is unknown, so the last ones are marked.
    let mut surplus = with_layer.saturating_sub(layers);
    for entry in history.iter_mut().rev().filter_map(Value::as_object_mut) {
        if surplus == 0 {
            break;
        }
        if !is_empty_layer(entry) {
            entry.insert("empty_layer".to_owned(), json!(true));
            surplus -= 1;
        }
    }
    Ok(())
}

pub(super) fn is_empty_layer(entry: &Map<String, Value>) -> bool {
    entry.get("empty_layer") == Some(&Value::Bool(true))
}

/// Returns one entry per layer, or a single one with `empty_layer` if there is no layer.
pub(super) fn new_history(input: &Input<'_>, created: &str) -> Vec<Value> {
    let entry = |created_by: &str| {
        let mut entry = Map::new();
        entry.insert("created".to_owned(), json!(created));
        entry.insert("created_by".to_owned(), json!(created_by));
        if let Some(author) = input.author {
            entry.insert("author".to_owned(), json!(author));
        }
        entry
    };
    let by = |new: &NewLayer| entry(new.created_by.as_deref().unwrap_or(input.created_by));
    let mut entries: Vec<Map<String, Value>> = input.layers.iter().map(by).collect();
    if entries.is_empty() {
        let mut empty = entry(input.created_by);
        empty.insert("empty_layer".to_owned(), json!(true));
        entries.push(empty);
    }
    if let (Some(top), Some(message)) = (entries.last_mut(), input.message) {
        top.insert("comment".to_owned(), json!(message));
    }
    entries.into_iter().map(Value::Object).collect()
}
