//! `Save`, a resource of a Kubernetes cluster that asks for the save of a pod.

#![allow(
    clippy::duplicated_attributes,
    reason = "columns of a table have types in common"
)]

use kube::{CustomResource, CustomResourceExt as _, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Seconds for which an ended `Save` stays, if it does not say so itself.
pub(crate) const TTL_S: i32 = 7 * 24 * 3600;

/// What is to be saved. It never changes: another save is another resource.
#[derive(
    Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, CustomResource, KubeSchema,
)]
#[kube(
    group = "upperdeck.io",
    version = "v1alpha1",
    kind = "Save",
    plural = "saves",
    namespaced,
    status = "SaveStatus",
    doc = "Asks for a pod of its namespace to be saved as an image. Whoever may create one may have any pod of the namespace saved.",
    printcolumn(name = "Pod", type_ = "string", json_path = ".spec.pod"),
    printcolumn(name = "Phase", type_ = "string", json_path = ".status.phase"),
    printcolumn(name = "Percent", type_ = "integer", json_path = ".status.percent"),
    printcolumn(name = "Image", type_ = "string", json_path = ".status.image"),
    printcolumn(
        name = "Age",
        type_ = "date",
        json_path = ".metadata.creationTimestamp"
    )
)]
#[x_kube(validation = ("self == oldSelf", "the spec of a Save cannot be changed: create another one"))]
#[serde(rename_all = "camelCase")]
pub struct SaveSpec {
    /// Name of the pod.
    #[schemars(length(min = 1, max = 253))]
    pub pod: String,
    /// Container, if the pod has several.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 63))]
    pub container: Option<String>,
    /// `NAME[:TAG]` or `:TAG` of the image, without registry and project. If absent, both are made from the pod and the time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 257))]
    pub image: Option<String>,
    /// Description of the image.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1000))]
    pub message: Option<String>,
    /// Whether the tag may be taken from an image that an earlier save of the same container made.
    #[serde(default, skip_serializing_if = "is_false")]
    pub replace_own: bool,
    /// Seconds after its end when this resource is deleted; a week if absent. The image stays.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 2_147_483_647))]
    pub ttl_seconds_after_finished: Option<i32>,
}

#[allow(
    clippy::trivially_copy_pass_by_ref,
    reason = "serde passes a reference"
)]
fn is_false(value: &bool) -> bool {
    !value
}

/// How far a save is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Phase {
    /// It has not begun.
    #[default]
    Pending,
    /// Its agent is at work.
    Running,
    /// The image is in the registry.
    Succeeded,
    /// There is no image.
    Failed,
    /// It was cancelled; there is no image.
    Cancelled,
}

impl Phase {
    /// Returns whether nothing follows.
    pub(crate) fn is_final(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed | Self::Cancelled)
    }
}

/// What became of a save.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct SaveStatus {
    /// How far it is.
    pub phase: Phase,
    /// Part of the bytes that are done, from 0 to 100.
    #[schemars(range(min = 0, max = 100))]
    pub percent: i32,
    /// ID of the save at the manager.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub save: Option<String>,
    /// Reference of the image, with its tag.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    /// Digest of the image.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
    /// When it ended (RFC 3339).
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("format" = "date-time"))]
    pub finished: Option<String>,
    /// `Complete` and `Failed`, of which one becomes true, as those of a Job.
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
}

/// A condition, in the form that all resources have.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Condition {
    /// `Complete` or `Failed`.
    #[serde(rename = "type")]
    pub kind: String,
    /// `True` or `False`.
    pub status: String,
    /// Code of the reason, in camel case.
    pub reason: String,
    /// Explanation for people.
    pub message: String,
    /// When the status changed (RFC 3339).
    #[schemars(extend("format" = "date-time"))]
    pub last_transition_time: String,
}

/// Returns the definition of the resource for the API server, as JSON.
pub fn definition() -> Result<String, serde_json::Error> {
    let mut definition = serde_json::to_value(Save::crd())?;
    // The conversion of the crate leaves the name of the whole out.
    definition["metadata"]["labels"] = serde_json::json!({"app.kubernetes.io/name": "upperdeck"});
    Ok(serde_json::to_string_pretty(&definition)? + "\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_definition_keeps_the_spec_as_it_was_created() -> Result<(), serde_json::Error> {
        let definition: serde_json::Value = serde_json::from_str(&definition()?)?;
        assert_eq!(definition["metadata"]["name"], "saves.upperdeck.io");
        let version = &definition["spec"]["versions"][0];
        let schema = &version["schema"]["openAPIV3Schema"];
        let spec = &schema["properties"]["spec"];
        assert_eq!(
            spec["x-kubernetes-validations"][0]["rule"],
            "self == oldSelf"
        );
        assert_eq!(spec["properties"]["pod"]["maxLength"], 253);
        // Otherwise the rule could be avoided by leaving the spec out.
        assert_eq!(schema["required"], serde_json::json!(["spec"]));
        assert!(version["subresources"]["status"].is_object());
        Ok(())
    }
}
