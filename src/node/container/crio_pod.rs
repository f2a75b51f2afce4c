//! Labels and annotations of a pod, as CRI-O recorded them in the spec of the pod's sandbox.
//!
//! CRI-O keeps both as JSON in annotations of the spec (`io.kubernetes.cri-o.Labels` and `.Annotations`), and then copies
//! the pod's own annotations and labels over them, one by one (`server/sandbox_run_linux.go`). So a pod can replace either
//! text by an annotation of that name. It cannot know what the kubelet adds to both when the pod is created: the pod's
//! UID, and the time at which the kubelet saw it. A text without that is not the kubelet's.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::Pod;
use super::bundle::{Bundle, bounded};

const LABELS: &str = "io.kubernetes.cri-o.Labels";
const ANNOTATIONS: &str = "io.kubernetes.cri-o.Annotations";
/// Label with the pod's UID, added by the kubelet.
const UID: &str = "io.kubernetes.pod.uid";
/// Annotation with the time at which the kubelet saw the pod, in nanoseconds, added by the kubelet.
const SEEN: &str = "kubernetes.io/config.seen";

/// Adds the labels and annotations from the first of the sandbox's `directories` that has a spec. What is not certainly
/// the kubelet's is left out.
pub(super) fn add_texts(pod: &mut Pod, directories: &[PathBuf]) {
    let mut specs = directories
        .iter()
        .map(|dir| Bundle::read(&dir.join("config.json")));
    let Some(sandbox) = specs.find_map(Result::ok) else {
        return;
    };
    let kept = |key: &str| -> Option<BTreeMap<String, String>> {
        bounded(serde_json::from_str(sandbox.annotation(key)?).ok())
    };
    let copied = |key: &str, value: &str| sandbox.annotation(key) == Some(value);
    if let Some(labels) = kept(LABELS)
        && pod.uid.is_some()
        && labels.get(UID) == pod.uid.as_ref()
    {
        // A label is copied last, so that nothing has replaced the copy.
        pod.labels = labels;
        pod.labels.retain(|key, value| copied(key, value));
    }
    if let Some(annotations) = kept(ANNOTATIONS)
        && annotations.get(SEEN).is_some_and(|seen| copied(SEEN, seen))
    {
        pod.annotations = annotations;
        pod.annotations.retain(|key, value| copied(key, value));
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde_json::json;

    use super::*;

    /// What CRI-O writes down of a pod's labels and annotations.
    fn spec(labels: &[(&str, &str)], annotations: &[(&str, &str)]) -> serde_json::Value {
        let map = |texts: &[(&str, &str)]| -> BTreeMap<String, String> {
            let texts = texts.iter();
            texts
                .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
                .collect()
        };
        let (labels, annotations) = (map(labels), map(annotations));
        let mut spec = BTreeMap::from([
            (LABELS.to_owned(), json!(labels).to_string()),
            (ANNOTATIONS.to_owned(), json!(annotations).to_string()),
        ]);
        spec.extend(annotations);
        spec.extend(labels);
        json!({ "annotations": spec })
    }

    fn read(labels: &[(&str, &str)], annotations: &[(&str, &str)]) -> Pod {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("config.json");
        std::fs::write(file, spec(labels, annotations).to_string()).unwrap();
        let mut pod = Pod {
            uid: Some("u-1".to_owned()),
            ..Pod::default()
        };
        add_texts(&mut pod, &[dir.path().join("none"), dir.path().to_owned()]);
        pod
    }

    #[test]
    fn labels_and_annotations_are_the_kubelets() {
        let pod = read(
            &[(UID, "u-1"), ("owner", "alice")],
            &[
                (SEEN, "2026-11-30T12:00:00.123456789Z"),
                ("owner-mail", "alice@x"),
            ],
        );
        assert_eq!(pod.labels["owner"], "alice");
        assert_eq!(pod.annotations["owner-mail"], "alice@x");
        assert_eq!(
            read(&[], &[]),
            Pod {
                uid: Some("u-1".to_owned()),
                ..Pod::default()
            }
        );
    }

    #[test]
    fn a_pods_annotation_does_not_stand_in_for_what_cri_o_recorded() {
        let forged = json!({ "owner": "bob" }).to_string();
        let seen = (SEEN, "2026-11-30T12:00:00.123456789Z");
        let uid = (UID, "u-1");
        // In place of the labels, and in place of the annotations.
        let pod = read(&[uid, ("owner", "alice")], &[seen, (LABELS, &forged)]);
        assert_eq!(pod.labels.get("owner"), None);
        let pod = read(&[uid], &[seen, ("owner", "alice"), (ANNOTATIONS, &forged)]);
        assert_eq!(pod.annotations.get("owner"), None);
        // A label of another pod's UID, and a label of an annotation's name.
        let other = json!({ "owner": "bob", UID: "u-2" }).to_string();
        let pod = read(&[uid, ("owner", "alice")], &[seen, (LABELS, &other)]);
        assert_eq!(pod.labels.get("owner"), None);
        let pod = read(&[uid, ("owner", "bob")], &[seen, ("owner", "alice")]);
        assert_eq!(pod.annotations.get("owner"), None);
        assert_eq!(pod.labels["owner"], "bob");
    }
}
