//! Pods with several containers: which one is meant if only the pod is named.

use std::collections::BTreeMap;
use std::error::Error as StdError;
use std::fs;

use upperdeck::common::pod::DEFAULT_CONTAINER;
use upperdeck::node::container::{Attempt, Container, Error, bolt, find, find_any, list};

use super::database::Node as Tree;
use super::{
    CONTAINERD_ID, CRIO, CRIO_ID, META, Node, Outcome, SANDBOX_ID, containerd_node, copy_tree,
    crio_node,
};

/// Adds a second running container to the pod of CRI-O's recording, or renames it. Returns its ID.
pub fn second_container(node: &Node, name: &str) -> Result<String, Box<dyn StdError>> {
    let list_file = format!("{CRIO}/overlay-containers/volatile-containers.json");
    let second = CRIO_ID.replace("61a37d", "61a37e");
    let mut containers: Vec<serde_json::Value> =
        serde_json::from_slice(&fs::read(node.path(&list_file))?)?;
    containers.truncate(2);
    let mut copy = containers[1].clone();
    copy["id"] = second.clone().into();
    copy["names"] = serde_json::json!(["k8s_sidecar"]);
    let metadata = copy["metadata"].as_str().ok_or("metadata")?;
    copy["metadata"] = metadata
        .replace(
            r#""metadata-name":"notebook""#,
            &format!(r#""metadata-name":"{name}""#),
        )
        .into();
    containers.push(copy);
    node.write(&list_file, serde_json::to_vec(&containers)?)?;
    let userdata = |id: &str| format!("run/crio-1.36/overlay-containers/{id}/userdata");
    copy_tree(
        &node.path(&userdata(CRIO_ID)),
        &node.path(&userdata(&second)),
    )?;
    Ok(second)
}

/// Records annotations of the pod with CRI-O's sandbox.
fn annotate_crio(node: &Node, annotations: &str) -> Outcome {
    let sandboxes = list(&node.roots).sandboxes;
    let id = sandboxes.first().map_or_else(
        || "97a645262be70442c09edce68ffd640c694884cff6091201a7ac5fd9e70bd186".to_owned(),
        |sandbox| sandbox.id.clone(),
    );
    let path = format!("run/crio-1.36/overlay-containers/{id}/userdata/config.json");
    let mut config: serde_json::Value = serde_json::from_slice(&fs::read(node.path(&path))?)?;
    config["annotations"]["io.kubernetes.cri-o.Annotations"] = annotations.into();
    // It copies each of them, too.
    let all: Option<BTreeMap<String, String>> = serde_json::from_str(annotations).ok();
    for (key, value) in all.into_iter().flatten() {
        config["annotations"][key] = value.into();
    }
    node.write(&path, config.to_string())?;
    Ok(())
}

#[test]
fn the_default_container_of_a_pod_of_crio_is_meant() -> Outcome {
    let Some(node) = crio_node() else {
        return Ok(());
    };
    let second = second_container(&node, "sidecar")?;
    let pod = "hub/notebook-alice";
    let annotation = |name: &str| {
        let seen = r#""kubernetes.io/config.seen":"2026-11-30T12:00:00.123456789Z""#;
        format!(r#"{{"{DEFAULT_CONTAINER}":"{name}",{seen}}}"#)
    };
    for (name, id) in [("notebook", CRIO_ID), ("sidecar", second.as_str())] {
        annotate_crio(&node, &annotation(name))?;
        let found = find(&node.roots, pod)?;
        let default = found.pod.as_ref().and_then(|pod| pod.default_container());
        assert_eq!(
            (found.id.as_str(), default.map(String::as_str)),
            (id, Some(name))
        );
    }
    // A name of a container goes before the default.
    assert_eq!(find(&node.roots, &format!("{pod}/notebook"))?.id, CRIO_ID);
    annotate_crio(&node, &annotation("ended"))?;
    let error = find(&node.roots, pod).unwrap_err();
    assert!(matches!(error, Error::Stopped { .. }), "{error}");
    assert!(error.to_string().contains(r#""ended""#), "{error}");
    assert!(error.to_string().contains("notebook, sidecar"), "{error}");
    for damaged in ["", "null", "[1]", r#"{"a":1}"#] {
        annotate_crio(&node, damaged)?;
        assert!(
            matches!(find(&node.roots, pod), Err(Error::Ambiguous { .. })),
            "{damaged}"
        );
    }
    // A service mesh's proxy beside the only other container.
    second_container(&node, "istio-proxy")?;
    assert_eq!(find(&node.roots, pod)?.id, CRIO_ID);
    Ok(())
}

/// Of a pod whose program has ended while the proxy of its service mesh runs, the program is meant.
#[test]
fn a_container_that_has_ended_is_meant_as_one_that_runs() -> Outcome {
    let Some(node) = crio_node() else {
        return Ok(());
    };
    let meant = || find_any(&node.roots, "hub/notebook-alice", Attempt::Current);
    second_container(&node, "istio-proxy")?;
    let userdata = format!("run/crio-1.36/overlay-containers/{CRIO_ID}/userdata");
    fs::remove_file(node.path(&format!("{userdata}/pidfile")))?;
    let state = format!("{CRIO}/overlay-containers/{CRIO_ID}/userdata/state.json");
    let recorded: serde_json::Value = serde_json::from_slice(&fs::read(node.path(&state))?)?;
    let end = |at: &str, code: i64| -> Outcome {
        let mut recorded = recorded.clone();
        recorded["finished"] = at.into();
        recorded["exitCode"] = code.into();
        Ok(node.write(&state, recorded.to_string())?)
    };
    node.write("proc/stat", "btime 1700000000\n")?;
    let (before, after) = ("2001-01-01T00:00:00Z", "2999-01-01T00:00:00Z");
    for (at, code) in [(after, 137), (after, 0), (before, 1)] {
        end(at, code)?;
        let found = meant()?;
        assert_eq!(
            (found.id.as_str(), found.ended().is_some()),
            (CRIO_ID, true)
        );
        assert!(matches!(
            find(&node.roots, "hub/notebook-alice"),
            Err(Error::Stopped { .. })
        ));
    }
    // An init container ends well, and before the others start.
    end(before, 0)?;
    assert!(meant()?.running().is_some());

    // Which of two programs is meant has to be said.
    let log = second_container(&node, "log")?;
    assert_eq!(meant()?.id, log);
    end(after, 137)?;
    let error = meant().unwrap_err();
    assert!(matches!(error, Error::Ambiguous { .. }), "{error}");
    Ok(())
}

/// containerd records the pod's annotations with the sandbox, where a container of the pod cannot write.
#[test]
fn the_default_container_of_a_pod_of_containerd_is_recorded() -> Outcome {
    let Some(node) = containerd_node() else {
        return Ok(());
    };
    let default = |found: &Container| {
        found
            .pod
            .as_ref()
            .and_then(|pod| pod.default_container())
            .cloned()
    };
    assert_eq!(default(&find(&node.roots, CONTAINERD_ID)?), None);
    let path = node.path(META);
    let mut tree = bolt::read(&path, |db| Tree::read(&db.root()))?;
    let extensions = [
        b"v1" as &[u8],
        b"k8s.io",
        b"containers",
        SANDBOX_ID.as_bytes(),
        b"extensions",
    ];
    let extensions = tree.bucket(&extensions);
    let key = b"io.cri-containerd.sandbox.metadata".to_vec();
    let Some(Tree::Value(any)) = extensions.get(&key) else {
        panic!("the sandbox's data")
    };
    let start = any.iter().position(|&b| b == b'{').ok_or("JSON")?;
    let mut json: serde_json::Value = serde_json::from_slice(&any[start..])?;
    json["Metadata"]["Config"]["annotations"][DEFAULT_CONTAINER] = "notebook".into();
    let json = json.to_string().into_bytes();
    // An `Any` with field 2 alone.
    let mut changed = vec![0x12];
    let mut length = json.len();
    while length >= 0x80 {
        changed.push(length as u8 | 0x80);
        length >>= 7;
    }
    changed.push(length as u8);
    changed.extend(json);
    extensions.insert(key, Tree::Value(changed));
    fs::write(&path, tree.file())?;
    let found = find(&node.roots, "hub/notebook-alice")?;
    assert_eq!(default(&found).as_deref(), Some("notebook"));
    Ok(())
}
