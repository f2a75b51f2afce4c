//! Which layers of an image saves made, by the history in its config.

use crate::common::digest::DiffId;

/// `created_by` of layers that a save made.
pub(crate) const CREATED_BY: &str = "upperdeck commit";

/// Returns the number of topmost layers that saves made, by the history in the config.
pub(crate) fn saved_layers(config: &[u8]) -> usize {
    #[derive(serde::Deserialize)]
    struct Config {
        #[serde(default)]
        history: Vec<History>,
    }
    #[derive(serde::Deserialize)]
    struct History {
        #[serde(default)]
        created_by: String,
        #[serde(default)]
        empty_layer: bool,
    }
    let Ok(config) = serde_json::from_slice::<Config>(config) else {
        return 0;
    };
    let layers = config
        .history
        .iter()
        .rev()
        .filter(|entry| !entry.empty_layer);
    layers
        .take_while(|entry| entry.created_by == CREATED_BY)
        .count()
}

/// Returns the diff IDs of the layers in a config, bottom first.
pub(crate) fn diff_ids(config: &[u8]) -> Result<Vec<DiffId>, String> {
    #[derive(serde::Deserialize)]
    struct RootFs {
        diff_ids: Vec<DiffId>,
    }
    #[derive(serde::Deserialize)]
    struct Config {
        rootfs: RootFs,
    }
    let config: Config = serde_json::from_slice(config).map_err(|e| format!("its config: {e}"))?;
    Ok(config.rootfs.diff_ids)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn saved_layers_are_those_on_top() {
        let config = |history: &str| format!(r#"{{"history":[{history}]}}"#);
        let of_base = r#"{"created_by":"RUN x"}"#;
        let save = r#"{"created_by":"upperdeck commit"}"#;
        let empty = r#"{"created_by":"CMD","empty_layer":true}"#;
        for (history, count) in [
            (of_base.to_owned(), 0),
            (format!("{of_base},{save},{save}"), 2),
            (format!("{save},{of_base},{empty},{save}"), 1),
            (String::new(), 0),
        ] {
            assert_eq!(
                saved_layers(config(&history).as_bytes()),
                count,
                "{history}"
            );
        }
        assert_eq!(saved_layers(b"no json"), 0);
    }
}
