//! Tests of manifest and config: compares them with the results of Docker and Podman for the same input, and checks
//! malformed input.

#![allow(
    clippy::unwrap_used,
    reason = "helpers of tests, in which a panic is the verdict"
)]

use std::collections::{BTreeMap, HashMap};

use oci_spec::image::{Descriptor, MediaType};
use proptest::prelude::*;
use serde_json::{Map, Value, json};
use upperdeck::common::digest::{DiffId, Digest};
use upperdeck::image::manifest::{
    BaseManifest, CONFIG, DOCKER_LIST, DOCKER_MANIFEST, Error, Image, Input, Layer, MANIFEST,
    NewLayer, assemble, change,
};

type Outcome = Result<(), Box<dyn std::error::Error>>;

/// Recorded with Docker 20.10.24: a container of `base`, `docker commit --change … `, then the image's Config.
/// `changed` has the fields that differ from a commit without `--change` (null: removed).
const DOCKER: &str = include_str!("manifest/docker-20.10.24.jsonl");
/// Recorded likewise with `podman commit` 4.3.1, from a base built with buildah 1.28.2. Cases in which Podman's parser
/// is simpler than Docker's are left out: it supports no quotes, no variables, only one `ENV` pair per change and no
/// `HEALTHCHECK`; ENTRYPOINT keeps CMD.
const PODMAN: &str = include_str!("manifest/podman-4.3.1.jsonl");

fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(map) => map,
        other => panic!("not an object: {other}"),
    }
}

/// Drops empty values: absent, null and empty have the same meaning for every engine.
fn meaning(config: &Map<String, Value>) -> BTreeMap<String, Value> {
    let empty = |value: &Value| {
        *value == json!(null) || *value == json!([]) || *value == json!({}) || *value == json!("")
    };
    config
        .iter()
        .filter(|(_, value)| !empty(value))
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect()
}

fn applied(base: &Value, changes: &[&str]) -> Result<Map<String, Value>, change::Error> {
    let mut config = object(base.clone());
    let changes: Vec<String> = changes.iter().map(ToString::to_string).collect();
    change::apply(&mut config, &changes)?;
    Ok(config)
}

/// A case of a table: the changes, the tool's result, and ours (`None` for an error).
type Compared = (
    String,
    Option<BTreeMap<String, Value>>,
    Option<BTreeMap<String, Value>>,
);

fn compare(table: &str) -> Result<Vec<Compared>, serde_json::Error> {
    let mut bases = HashMap::new();
    let mut compared = Vec::new();
    for line in table.lines() {
        let case: Value = serde_json::from_str(line)?;
        let base = case["base"].as_str().unwrap_or_default().to_owned();
        if case.get("config").is_some() {
            bases.insert(base, case["config"].clone());
            continue;
        }
        let changes: Vec<&str> = case["changes"]
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(Value::as_str)
            .collect();
        let theirs = case.get("changed").map(|changed| {
            let mut config = object(bases[&base].clone());
            config.extend(object(changed.clone()));
            meaning(&config)
        });
        let ours = applied(&bases[&base], &changes)
            .ok()
            .map(|config| meaning(&config));
        compared.push((changes.join(" | "), theirs, ours));
    }
    Ok(compared)
}

#[test]
fn changes_mean_what_they_mean_to_docker() -> Outcome {
    // The deliberate differences. There must be no others.
    let on_purpose = [
        // Docker silently restores the base's command.
        "CMD []",
        "ENTRYPOINT []",
        // The image could not be started: `sh -c` without a command.
        "CMD",
        "ENTRYPOINT",
        // Not supported by 20.10, but by Docker 24 and later.
        "ENV P=${EMPTY-d}",
        "ENV P=${NOPE+y}",
        "HEALTHCHECK --interval=0 CMD x",
        "HEALTHCHECK --interval=0s CMD x",
        "HEALTHCHECK --retries=0 CMD x",
        "HEALTHCHECK --start-interval=2s CMD x",
        "STOPSIGNAL SIGTERM",
        // The user cannot exist or is empty: refused instead of dropped.
        "USER a b",
        "USER \"a b\"",
        "USER $NOPE",
        // Refused instead of dropped or truncated.
        "EXPOSE $NOPE",
        "EXPOSE 80/tcp/udp",
        // Only the backslash is supported as escape character.
        "# escape=`\nENV P=a`\nb",
    ];
    let mut differ: Vec<String> = Vec::new();
    let compared = compare(DOCKER)?;
    assert!(compared.len() > 250, "{}", compared.len());
    for (changes, theirs, ours) in compared {
        if theirs != ours && !differ.contains(&changes) {
            if !on_purpose.contains(&changes.as_str()) {
                eprintln!("{changes}\n  docker: {theirs:?}\n  ours:   {ours:?}");
            }
            differ.push(changes);
        }
    }
    differ.sort_unstable();
    let mut expected = on_purpose;
    expected.sort_unstable();
    assert_eq!(differ, expected);
    Ok(())
}

#[test]
fn changes_mean_what_they_mean_to_podman() -> Outcome {
    let compared = compare(PODMAN)?;
    assert_eq!(compared.len(), 56);
    for (changes, theirs, ours) in compared {
        assert_eq!(theirs, ours, "{changes}");
    }
    Ok(())
}

/// The check without the image accepts everything that the image would accept, and does not guess variables.
#[test]
fn changes_are_checked_before_there_is_an_image() {
    for (change, right) in [
        ("CMD x", true),
        ("USER $WHO", true),
        ("EXPOSE ${PORT}/tcp", true),
        ("ENV A=${B:?none}", true),
        ("CMDD x", false),
        ("USER a b", false),
        ("EXPOSE x", false),
        ("LABEL =x", false),
        ("WORKDIR", false),
        ("CMD --flag $X", true),
    ] {
        let changes = [change.to_owned()];
        assert_eq!(change::check(&changes).is_ok(), right, "{change}");
        if !right {
            assert!(applied(&json!({}), &[change]).is_err(), "{change}");
        }
    }
    let config = json!({"config": {"Env": ["PORT=x"]}}).to_string();
    for (change, right) in [("EXPOSE $PORT", false), ("EXPOSE 80", true)] {
        let checked =
            upperdeck::image::manifest::check_changes(config.as_bytes(), &[change.to_owned()]);
        assert_eq!(checked.is_ok(), right, "{change}");
    }
}

#[test]
fn clearing_clears() -> Outcome {
    let base = json!({"Entrypoint": ["/init"], "Cmd": ["run"]});
    for (changes, expected) in [
        (vec!["CMD []"], json!({"Entrypoint": ["/init"]})),
        (vec!["ENTRYPOINT []"], json!({})),
        (vec!["ENTRYPOINT []", "CMD [\"a\"]"], json!({"Cmd": ["a"]})),
        (vec!["CMD [\"a\"]", "ENTRYPOINT []"], json!({"Cmd": ["a"]})),
        // A cleared CMD is not restored, and one that was set is kept.
        (
            vec!["CMD a", "ENTRYPOINT b"],
            json!({"Entrypoint": ["/bin/sh", "-c", "b"], "Cmd": ["/bin/sh", "-c", "a"]}),
        ),
    ] {
        assert_eq!(
            Value::Object(applied(&base, &changes)?),
            expected,
            "{changes:?}"
        );
    }
    Ok(())
}

#[test]
fn what_docker_commit_loses_stays() -> Outcome {
    let base = json!({"Shell": ["/bin/bash", "-eo", "pipefail", "-c"], "OnBuild": ["RUN a"]});
    let config = applied(
        &base,
        &[
            "CMD x | y",
            "ENTRYPOINT z",
            "ONBUILD RUN b",
            "HEALTHCHECK CMD c",
        ],
    )?;
    let expected = json!({
        "Shell": ["/bin/bash", "-eo", "pipefail", "-c"],
        "OnBuild": ["RUN a", "RUN b"],
        "Cmd": ["/bin/bash", "-eo", "pipefail", "-c", "x | y"],
        "Entrypoint": ["/bin/bash", "-eo", "pipefail", "-c", "z"],
        // The engine, not the image, selects the shell of CMD-SHELL.
        "Healthcheck": {"Test": ["CMD-SHELL", "c"]},
    });
    assert_eq!(Value::Object(config), expected);
    Ok(())
}

#[test]
fn start_interval_and_zeroes() -> Outcome {
    let base =
        json!({"Healthcheck": {"Test": ["CMD", "a"], "Interval": 5, "Retries": 4, "Unknown": 1}});
    let config = applied(
        &base,
        &["HEALTHCHECK --start-interval=2s --interval=0 --retries=0 CMD b"],
    )?;
    let expected = json!({"Healthcheck": {
        "Test": ["CMD-SHELL", "b"], "Interval": 5, "Retries": 4, "Unknown": 1, "StartInterval": 2_000_000_000,
    }});
    assert_eq!(Value::Object(config), expected);
    Ok(())
}

#[test]
fn stop_signals() -> Outcome {
    let base = json!({"Env": ["S=SIGINT"]});
    for (change, expected) in [
        ("STOPSIGNAL SIGTERM", "SIGTERM"),
        ("STOPSIGNAL term", "term"),
        ("STOPSIGNAL 9", "9"),
        ("STOPSIGNAL SIGRTMIN+3", "SIGRTMIN+3"),
        ("STOPSIGNAL $S", "SIGINT"),
        ("STOPSIGNAL \"SIGQUIT\"", "SIGQUIT"),
    ] {
        assert_eq!(
            applied(&base, &[change])?["StopSignal"],
            expected,
            "{change}"
        );
    }
    for change in [
        "STOPSIGNAL bogus",
        "STOPSIGNAL 0",
        "STOPSIGNAL 9 9",
        "STOPSIGNAL $NOPE",
        "STOPSIGNAL",
    ] {
        assert!(applied(&base, &[change]).is_err(), "{change}");
    }
    Ok(())
}

#[test]
fn unknown_directives_are_told_the_eleven() {
    for (change, directive) in [
        ("RUN x", "RUN"),
        ("SHELL [\"x\"]", "SHELL"),
        ("cmd=x", "cmd=x"),
        ("USER a\nfrom b", "from"),
    ] {
        let error = applied(&json!({}), &[change]).unwrap_err();
        assert_eq!(
            error,
            change::Error::Unknown {
                change: change.to_owned(),
                directive: directive.to_owned()
            }
        );
        let text = error.to_string();
        for known in [
            "CMD",
            "ENTRYPOINT",
            "ENV",
            "EXPOSE",
            "HEALTHCHECK",
            "LABEL",
            "ONBUILD",
            "STOPSIGNAL",
            "USER",
            "VOLUME",
            "WORKDIR",
        ] {
            assert!(text.contains(known), "{text}");
        }
    }
}

#[test]
fn messages_escape_what_would_reach_the_terminal() {
    let error = applied(&json!({}), &["USER \u{1b}[2J x"])
        .unwrap_err()
        .to_string();
    assert!(!error.contains('\u{1b}'), "{error:?}");
}

// ---- assembling

const GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

fn digest(seed: &str) -> Digest {
    Digest::of(seed)
}

fn layer(media_type: &str, blob: &str, diff: &str) -> Layer {
    let digest: oci_spec::image::Digest = digest(blob).to_string().parse().unwrap();
    Layer {
        descriptor: Descriptor::new(MediaType::from(media_type), 7, digest),
        diff_id: DiffId(Digest::of(diff)),
    }
}

fn base_config() -> Value {
    json!({
        "created": "2020-01-01T00:00:00Z",
        "author": "base author",
        "architecture": "arm64",
        "variant": "v8",
        "os": "linux",
        "config": {"Env": ["A=1"], "Labels": {"l": "1"}, "Healthcheck": {"Test": ["CMD", "true"]}, "Shell": ["/bin/bash", "-c"],
            "OnBuild": ["RUN x"], "Cmd": ["sh"], "X-Unknown": {"deep": [1, 2.5, u64::MAX, i64::MIN]}},
        "rootfs": {"type": "layers", "diff_ids": [DiffId(digest("d0"))]},
        "history": [{"created_by": "base"}],
        "x.unknown": 0.1,
    })
}

fn base_manifest() -> Value {
    json!({
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": {"mediaType": CONFIG, "digest": digest("config"), "size": 1, "annotations": {"c": "1"}, "data": "e30="},
        "layers": [{"mediaType": GZIP, "digest": digest("b0"), "size": 7, "annotations": {"kept": "yes"}, "x": [1]}],
        "annotations": {"org.opencontainers.image.title": "t", "org.opencontainers.image.base.name": "older"},
        "unknown": {"a": 1},
    })
}

fn input<'a>(manifest: Option<&'a [u8]>, config: &'a [u8]) -> Input<'a> {
    Input {
        base_manifest: manifest.map(|bytes| BaseManifest {
            bytes,
            media_type: MANIFEST,
            digest: Digest::of(bytes),
        }),
        base_config: config,
        base_name: Some("registry.example/base:1"),
        base_layers: vec![layer(GZIP, "b0", "d0")],
        layers: vec![NewLayer {
            layer: layer(GZIP, "b1", "d1"),
            created_by: None,
        }],
        changes: &[],
        labels: &[],
        annotations: &[],
        author: None,
        message: None,
        created: 1_700_000_000,
        created_by: "upperdeck commit",
    }
}

fn json_of(bytes: &[u8]) -> Value {
    serde_json::from_slice(bytes).unwrap()
}

fn image(manifest: &Value, config: &Value) -> Result<Image, Error> {
    let (manifest, config) = (manifest.to_string(), config.to_string());
    assemble(&input(Some(manifest.as_bytes()), config.as_bytes()))
}

/// Checks the requirements of `oci-schema/*.json` and of consumers that pair history entries with layers.
fn assert_valid(image: &Image) {
    let (manifest, config) = (json_of(&image.manifest.bytes), json_of(&image.config.bytes));
    assert_eq!(image.manifest.digest, Digest::of(&image.manifest.bytes));
    assert_eq!(manifest["mediaType"], MANIFEST);
    assert_eq!(manifest["schemaVersion"], 2);
    assert_eq!(manifest["config"]["mediaType"], CONFIG);
    assert_eq!(
        manifest["config"]["digest"],
        image.config.digest.to_string()
    );
    assert_eq!(manifest["config"]["size"], image.config.bytes.len());
    let layers = manifest["layers"].as_array().unwrap();
    assert!(
        layers
            .iter()
            .all(|layer| !layer["mediaType"].as_str().unwrap().contains("docker"))
    );
    assert_eq!(layers.len(), image.layers.len());
    let diff_ids = config["rootfs"]["diff_ids"].as_array().unwrap();
    assert_eq!(diff_ids.len(), layers.len());
    let history = config["history"].as_array().unwrap();
    assert_eq!(
        history
            .iter()
            .filter(|entry| entry["empty_layer"] != json!(true))
            .count(),
        layers.len()
    );
    assert!(config["architecture"].is_string() && config["os"].is_string());
    oci_spec::image::ImageManifest::from_reader(image.manifest.bytes.as_slice()).unwrap();
    oci_spec::image::ImageConfiguration::from_reader(image.config.bytes.as_slice()).unwrap();
}

#[test]
fn everything_that_the_base_says_stays() -> Outcome {
    let image = image(&base_manifest(), &base_config())?;
    assert_valid(&image);
    assert_eq!(image.warnings, []);
    let mut expected = base_config();
    expected["created"] = json!("2023-11-14T22:13:20Z");
    // The author of the base did not make this image.
    expected.as_object_mut().unwrap().remove("author");
    expected["rootfs"]["diff_ids"] = json!([digest("d0"), digest("d1")]);
    expected["history"] = json!([{"created_by": "base"}, {"created": "2023-11-14T22:13:20Z", "created_by": "upperdeck commit"}]);
    assert_eq!(json_of(&image.config.bytes), expected);
    let expected = json!({
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": {"mediaType": CONFIG, "digest": image.config.digest, "size": image.config.bytes.len(), "annotations": {"c": "1"}},
        "layers": [
            {"mediaType": GZIP, "digest": digest("b0"), "size": 7, "annotations": {"kept": "yes"}, "x": [1]},
            {"mediaType": GZIP, "digest": digest("b1"), "size": 7},
        ],
        "unknown": {"a": 1},
        "annotations": {
            "org.opencontainers.image.base.name": "registry.example/base:1",
            "org.opencontainers.image.base.digest": Digest::of(base_manifest().to_string()),
            "org.opencontainers.image.created": "2023-11-14T22:13:20Z",
        },
    });
    assert_eq!(json_of(&image.manifest.bytes), expected);
    // The order of the keys is kept, so that two saves differ only where their content does.
    let text = String::from_utf8(image.config.bytes)?;
    let at = |key: &str| text.find(key).unwrap_or_else(|| panic!("{key} in {text}"));
    assert!(
        at("\"created\"") < at("\"architecture\"")
            && at("\"variant\"") < at("\"os\"")
            && at("\"history\"") < at("\"x.unknown\"")
    );
    Ok(())
}

#[test]
fn numbers_are_not_rounded() -> Outcome {
    let config = r#"{"architecture":"amd64","os":"linux","rootfs":{"diff_ids":["x"]},
        "n":[0.1,1.7976931348623157e+308,5e-324,123456789.12345679,9007199254740993,18446744073709551615,-9223372036854775808]}"#;
    let image = assemble(&input(None, config.as_bytes()))?;
    let text = String::from_utf8(image.config.bytes)?;
    let numbers = "[0.1,1.7976931348623157e+308,5e-324,123456789.12345679,9007199254740993,18446744073709551615,-9223372036854775808]";
    assert!(text.contains(&format!("\"n\":{numbers}")), "{text}");
    Ok(())
}

#[test]
fn a_docker_base_becomes_oci_throughout() -> Outcome {
    let types = [
        (
            "application/vnd.docker.image.rootfs.diff.tar.gzip",
            "application/vnd.oci.image.layer.v1.tar+gzip",
        ),
        (
            "application/vnd.docker.image.rootfs.diff.tar",
            "application/vnd.oci.image.layer.v1.tar",
        ),
        (
            "application/vnd.docker.image.rootfs.diff.tar.zstd",
            "application/vnd.oci.image.layer.v1.tar+zstd",
        ),
        (
            "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
            "application/vnd.oci.image.layer.v1.tar+gzip",
        ),
        (
            "application/vnd.oci.image.layer.nondistributable.v1.tar+zstd",
            "application/vnd.oci.image.layer.v1.tar+zstd",
        ),
        (
            "application/vnd.oci.image.layer.v1.tar+gzip+encrypted",
            "application/vnd.oci.image.layer.v1.tar+gzip+encrypted",
        ),
    ];
    let blob = |i: usize| format!("b{i}");
    let listed = |(i, (docker, _)): (usize, &(&str, &str))| json!({"mediaType": docker, "digest": digest(&blob(i)), "size": 7, "urls": ["https://x/y"]});
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": DOCKER_MANIFEST,
        "config": {"mediaType": "application/vnd.docker.container.image.v1+json", "digest": digest("c"), "size": 2},
        "layers": types.iter().enumerate().map(listed).collect::<Vec<_>>(),
    })
    .to_string();
    let mut config = base_config();
    config["rootfs"]["diff_ids"] = json!(vec!["sha256:x"; types.len()]);
    config["history"] = json!(vec![json!({"created_by": "b"}); types.len()]);
    for (key, value) in [
        ("container", "c0ffee"),
        ("docker_version", "20.10"),
        ("id", "x"),
        ("parent", "y"),
        ("comment", "z"),
    ] {
        config[key] = json!(value);
    }
    config["container_config"] = json!({"Hostname": "c0ffee"});
    config["config"]["Hostname"] = json!("c0ffee");
    config["config"]["Image"] = json!("sha256:00");
    config["config"]["AttachStdin"] = json!(false);
    config["config"]["Volumes"] = json!(null);
    config["config"]["Entrypoint"] = json!(null);
    let config = config.to_string();
    let mut input = input(None, config.as_bytes());
    let base = BaseManifest {
        bytes: manifest.as_bytes(),
        media_type: DOCKER_MANIFEST,
        digest: digest("m"),
    };
    input.base_manifest = Some(base);
    input.base_layers = types
        .iter()
        .enumerate()
        .map(|(i, (docker, _))| layer(docker, &blob(i), "d"))
        .collect();
    let image = assemble(&input)?;
    assert_valid(&image);
    let manifest = json_of(&image.manifest.bytes);
    for (i, (docker, oci)) in types.iter().enumerate() {
        assert_eq!(manifest["layers"][i]["mediaType"], *oci, "{docker}");
        assert_eq!(manifest["layers"][i].get("urls"), None);
    }
    let config = json_of(&image.config.bytes);
    for gone in [
        "container",
        "container_config",
        "docker_version",
        "id",
        "parent",
        "comment",
    ] {
        assert_eq!(config.get(gone), None, "{gone}");
    }
    for gone in ["Hostname", "Image", "Volumes", "Entrypoint"] {
        assert_eq!(config["config"].get(gone), None, "{gone}");
    }
    assert_eq!(config["config"]["AttachStdin"], false);
    Ok(())
}

#[test]
fn without_a_manifest_layers_come_from_the_descriptors() -> Outcome {
    let config = base_config().to_string();
    let mut input = input(None, config.as_bytes());
    let annotations: HashMap<String, String> =
        (0..9).map(|i| (format!("k{i}"), "v".to_owned())).collect();
    input.base_layers[0]
        .descriptor
        .set_annotations(Some(annotations));
    let one = assemble(&input)?;
    assert_valid(&one);
    // The descriptor's annotations are a hash map, whose order differs each time.
    for _ in 0..8 {
        let again: HashMap<String, String> =
            (0..9).map(|i| (format!("k{i}"), "v".to_owned())).collect();
        input.base_layers[0].descriptor.set_annotations(Some(again));
        assert_eq!(assemble(&input)?.manifest, one.manifest);
    }
    let manifest = json_of(&one.manifest.bytes);
    assert_eq!(
        manifest["annotations"],
        json!({
            "org.opencontainers.image.base.name": "registry.example/base:1",
            "org.opencontainers.image.created": "2023-11-14T22:13:20Z",
        })
    );
    Ok(())
}

#[test]
fn a_layer_made_again_drops_what_was_said_of_the_old_blob() -> Outcome {
    let (manifest, config) = (base_manifest().to_string(), base_config().to_string());
    let mut input = input(Some(manifest.as_bytes()), config.as_bytes());
    input.base_layers = vec![layer(GZIP, "again", "other diff")];
    let image = assemble(&input)?;
    assert_valid(&image);
    assert_eq!(
        json_of(&image.manifest.bytes)["layers"][0],
        json!({"mediaType": GZIP, "digest": digest("again"), "size": 7})
    );
    assert_eq!(
        json_of(&image.config.bytes)["rootfs"]["diff_ids"],
        json!([digest("other diff"), digest("d1")])
    );
    Ok(())
}

#[test]
fn nothing_changed_is_an_empty_history_entry() -> Outcome {
    let (manifest, config) = (base_manifest().to_string(), base_config().to_string());
    let mut input = input(Some(manifest.as_bytes()), config.as_bytes());
    input.layers.clear();
    input.message = Some("only metadata");
    input.author = Some("me");
    let image = assemble(&input)?;
    assert_valid(&image);
    let config = json_of(&image.config.bytes);
    assert_eq!(config["author"], "me");
    assert_eq!(
        config["history"][1],
        json!({"created": "2023-11-14T22:13:20Z", "created_by": "upperdeck commit", "author": "me", "empty_layer": true, "comment": "only metadata"})
    );
    Ok(())
}

#[test]
fn one_history_entry_a_layer() -> Outcome {
    let (manifest, config) = (base_manifest().to_string(), base_config().to_string());
    let mut input = input(Some(manifest.as_bytes()), config.as_bytes());
    input.layers.push(NewLayer {
        layer: layer(GZIP, "b2", "d2"),
        created_by: Some("while it was saved".to_owned()),
    });
    input.message = Some("hello");
    let image = assemble(&input)?;
    assert_valid(&image);
    let history = &json_of(&image.config.bytes)["history"];
    assert_eq!(history.as_array().map(Vec::len), Some(3));
    assert_eq!(history[1].get("comment"), None);
    assert_eq!(
        (&history[2]["created_by"], &history[2]["comment"]),
        (&json!("while it was saved"), &json!("hello"))
    );
    Ok(())
}

#[test]
fn a_history_that_does_not_match_is_repaired_and_told() -> Outcome {
    let entry = json!({"created_by": "x"});
    let empty = json!({"created_by": "x", "empty_layer": true});
    for (history, warned) in [
        (json!(null), true),
        (json!([]), true),
        (json!([empty]), true),
        (json!([entry, empty]), false),
        (json!([entry, entry, empty, entry]), true),
        (json!([{"created_by": null, "empty_layer": false}]), false),
    ] {
        let mut config = base_config();
        config["history"] = history.clone();
        let image = image(&base_manifest(), &config)?;
        assert_valid(&image);
        let codes: Vec<&str> = image.warnings.iter().map(|warning| warning.code).collect();
        assert_eq!(
            codes,
            if warned {
                vec!["base_history_repaired"]
            } else {
                vec![]
            },
            "{history}"
        );
    }
    Ok(())
}

#[test]
fn users_metadata_goes_on_top() -> Outcome {
    let (manifest, config) = (base_manifest().to_string(), base_config().to_string());
    let mut input = input(Some(manifest.as_bytes()), config.as_bytes());
    let pairs = |list: &[(&str, &str)]| {
        list.iter()
            .map(|(k, v)| (k.to_string(), v.to_string()))
            .collect::<Vec<_>>()
    };
    let (changes, labels, annotations) = (
        vec!["LABEL l=changed m=1".to_owned(), "ENV B=$A".to_owned()],
        pairs(&[("l", "label"), ("n", "")]),
        pairs(&[
            ("org.opencontainers.image.title", "mine"),
            ("z", "1"),
            ("z", "2"),
        ]),
    );
    (input.changes, input.labels, input.annotations) = (&changes, &labels, &annotations);
    let image = assemble(&input)?;
    assert_valid(&image);
    let config = json_of(&image.config.bytes);
    assert_eq!(
        config["config"]["Labels"],
        json!({"l": "label", "m": "1", "n": ""})
    );
    assert_eq!(config["config"]["Env"], json!(["A=1", "B=1"]));
    let annotations = &json_of(&image.manifest.bytes)["annotations"];
    assert_eq!(
        (
            &annotations["org.opencontainers.image.title"],
            &annotations["z"]
        ),
        (&json!("mine"), &json!("2"))
    );
    Ok(())
}

#[test]
fn what_cannot_be_an_image_is_refused() {
    type Edit = fn(&mut Value, &mut Value);
    let cases: &[(&str, Edit, &str)] = &[
        (
            "index",
            |m, _| m["mediaType"] = json!(DOCKER_LIST),
            "choose one of its images first",
        ),
        (
            "both at once",
            |m, _| m["manifests"] = json!([]),
            "index by its fields",
        ),
        (
            "schema 1",
            |m, _| m["schemaVersion"] = json!(1),
            "schema version 1",
        ),
        (
            "artifact",
            |m, _| m["config"]["mediaType"] = json!("application/vnd.cncf.helm.config.v1+json"),
            "other artifact",
        ),
        (
            "no layers",
            |m, _| m["layers"] = json!({}),
            "layers should be a list, found an object",
        ),
        (
            "annotation",
            |m, _| m["annotations"] = json!({"a": 1}),
            "annotations should be a map of texts",
        ),
        (
            "env",
            |_, c| c["config"]["Env"] = json!([1]),
            "config.Env should be a list of texts, found a list",
        ),
        (
            "cmd",
            |_, c| c["config"]["Cmd"] = json!("sh"),
            "config.Cmd should be a list of texts, found a text",
        ),
        (
            "labels",
            |_, c| c["config"]["Labels"] = json!({"a": null}),
            "config.Labels should be a map of texts",
        ),
        (
            "config",
            |_, c| c["config"] = json!([]),
            "config should be an object",
        ),
        (
            "os",
            |_, c| c["os"] = json!(1),
            "os should be a text, found a number",
        ),
        (
            "rootfs",
            |_, c| c["rootfs"] = json!(null),
            "rootfs should be an object, found nothing",
        ),
        (
            "diff ids",
            |_, c| c["rootfs"]["diff_ids"] = json!(["a", "b"]),
            "lists 2 layers, found were 1",
        ),
        (
            "history",
            |_, c| c["history"] = json!({}),
            "history should be a list",
        ),
        (
            "history entry",
            |_, c| c["history"] = json!([1]),
            "history[0] should be an object, found a number",
        ),
        (
            "empty_layer",
            |_, c| c["history"][0]["empty_layer"] = json!("no"),
            "history[0].empty_layer should be true or false",
        ),
        (
            "layer",
            |m, _| m["layers"][0]["annotations"] = json!([1]),
            "layers[0] should be a descriptor",
        ),
    ];
    for (name, edit, expected) in cases {
        let (mut manifest, mut config) = (base_manifest(), base_config());
        edit(&mut manifest, &mut config);
        let error = image(&manifest, &config).unwrap_err();
        assert!(error.is_base() && !error.is_usage(), "{name}: {error:?}");
        assert!(error.to_string().contains(expected), "{name}: {error}");
    }
}

#[test]
fn caps_and_mistakes() {
    let (manifest, config) = (base_manifest().to_string(), base_config().to_string());
    let fresh = || input(Some(manifest.as_bytes()), config.as_bytes());
    let new = || NewLayer {
        layer: layer(GZIP, "b", "d"),
        created_by: None,
    };

    let mut case = fresh();
    case.layers = std::iter::repeat_with(new).take(126).collect();
    assert!(assemble(&case).is_ok());
    case.layers.push(new());
    assert!(matches!(assemble(&case), Err(Error::TooManyLayers(128))));

    let mut case = fresh();
    let big = [("a".to_owned(), "x".repeat(4 << 20))];
    case.annotations = &big;
    let error = assemble(&case).unwrap_err();
    assert!(matches!(error, Error::ManifestSize(_)) && !error.is_usage() && !error.is_base());

    let mut case = fresh();
    case.base_layers = vec![layer("application/vnd.docker.plugin.v1+json", "b0", "d0")];
    assert!(matches!(
        assemble(&case),
        Err(Error::LayerType { index: 0, .. })
    ));

    let mut case = fresh();
    let empty = [(String::new(), "x".to_owned())];
    case.labels = &empty;
    assert!(assemble(&case).unwrap_err().is_usage());

    let mut case = fresh();
    let changes = ["RUN x".to_owned()];
    case.changes = &changes;
    assert!(assemble(&case).unwrap_err().is_usage());

    for (seconds, expected) in [
        (0, Some("1970-01-01T00:00:00Z")),
        (-1, Some("1969-12-31T23:59:59Z")),
        (i64::MAX, None),
        (-70_000_000_000, None),
    ] {
        let mut case = fresh();
        case.created = seconds;
        match (assemble(&case), expected) {
            (Ok(image), Some(text)) => assert_eq!(json_of(&image.config.bytes)["created"], text),
            (Err(error), None) => assert!(error.is_usage(), "{error}"),
            (got, _) => panic!("{seconds}: {got:?}"),
        }
    }
}

#[test]
fn a_config_without_platform_gets_one_and_says_so() -> Outcome {
    let mut config = base_config();
    object(config.clone());
    config["architecture"] = json!(null);
    config["os"] = json!("");
    let image = image(&base_manifest(), &config)?;
    assert_valid(&image);
    assert_eq!(json_of(&image.config.bytes)["os"], "linux");
    assert_eq!(image.warnings.len(), 2);
    Ok(())
}

// ---- platforms

// ---- hostile input

fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        ".*".prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 32, 5, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map(".*", inner, 0..4)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

/// All paths in a document at which an invalid value is inserted.
const FIELDS: [&str; 22] = [
    "/config",
    "/config/Env",
    "/config/Labels",
    "/config/Healthcheck",
    "/config/Shell",
    "/config/Cmd",
    "/rootfs",
    "/rootfs/diff_ids",
    "/history",
    "/history/0",
    "/history/0/empty_layer",
    "/os",
    "/architecture",
    "/layers",
    "/layers/0",
    "/layers/0/digest",
    "/layers/0/annotations",
    "/annotations",
    "/mediaType",
    "/schemaVersion",
    "/config/mediaType",
    "/config/digest",
];

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = assemble(&input(None, &bytes));
        let _ = assemble(&input(Some(&bytes), b"{}"));
    }

    #[test]
    fn odd_fields_are_refused_or_make_a_valid_image(at in prop::sample::select(&FIELDS[..]), value in any_json()) {
        let (mut manifest, mut config) = (base_manifest(), base_config());
        for document in [&mut manifest, &mut config] {
            if let Some(field) = document.pointer_mut(at) {
                *field = value.clone();
            }
        }
        let changes = ["ENV A=b", "LABEL a=$A", "EXPOSE 80", "VOLUME /v", "HEALTHCHECK CMD x", "CMD x", "ONBUILD RUN x", "WORKDIR y"]
            .map(str::to_owned);
        let (manifest, config) = (manifest.to_string(), config.to_string());
        let mut input = input(Some(manifest.as_bytes()), config.as_bytes());
        input.changes = &changes;
        if let Ok(image) = assemble(&input) {
            assert_valid(&image);
        }
    }

    #[test]
    fn changes_never_panic(directive in prop::sample::select(&change::DIRECTIVES[..]), rest in "[ \\[\\]\"'$\\{\\}:\\\\a-c0-9=/\\-+?\n#,.µ]{0,40}") {
        let _ = applied(&json!({"Env": ["a=b"]}), &[&format!("{directive} {rest}")]);
    }
}
