//! The body of every error response: a problem according to RFC 9457, with the API's own members. Each code is explained
//! on a page of the documentation, to which the problem's type leads.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::service::job::JobId;

/// Media type of a problem.
pub(super) const MEDIA_TYPE: &str = "application/problem+json";

/// A problem: the body of every error response, according to RFC 9457.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Problem {
    /// Address of the documentation of this kind of problem: `/docs/errors#` and the code, below the service's public URL
    /// if the administrator has set it.
    #[serde(rename = "type", default)]
    #[schema(format = "uri-reference")]
    pub kind: String,
    /// What this kind of problem is; the same for every problem with this code.
    #[serde(default)]
    pub title: String,
    /// The HTTP status.
    #[serde(default)]
    #[schema(minimum = 400, maximum = 599)]
    pub status: u16,
    /// Sentence that says what happened and what to do.
    pub detail: String,
    /// Stable code in snake case: `unauthenticated`, `not_permitted`, `not_found`, `invalid`, `conflict`, `too_many`,
    /// `tag_exists`, `image_pinned`, `precondition_failed`, `too_late`, `timed_out`, `quota_exceeded`,
    /// `registry_read_only`, `tag_immutable`, `image_in_use`, `credentials_refused`, `robot_refused`,
    /// `signin_refused`, `signin_expired`, `unavailable`, `internal`.
    pub code: String,
    /// Whether the same request may succeed later.
    pub retryable: bool,
    /// For `invalid`: the field as a path, e.g. `image.tag`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub field: Option<String>,
    /// For `conflict`: the conflicting job.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub save: Option<JobId>,
    /// For `tag_exists`: the image that has the tag.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    pub existing: Option<Box<ExistingImage>>,
}

impl Problem {
    /// Returns a problem with this code, which is not retryable.
    pub fn new(status: u16, code: &str, detail: impl Into<String>) -> Self {
        Self {
            kind: format!("/docs/errors#{code}"),
            title: explained(code)
                .map_or("A problem", |code| code.title)
                .to_owned(),
            status,
            detail: detail.into(),
            code: code.to_owned(),
            retryable: false,
            field: None,
            save: None,
            existing: None,
        }
    }
}

/// The image that has a tag already.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ExistingImage {
    /// Name, without registry, project and user.
    pub name: String,
    /// The tag.
    pub tag: String,
    /// Digest of the manifest; as `replace` of another request, it allows to replace this image.
    pub digest: String,
    /// Owner of the image.
    pub user: String,
    /// When it was saved; absent if no save in the record made it.
    #[schema(format = DateTime)]
    pub saved: Option<String>,
    /// Session that it was saved from.
    pub session: Option<String>,
    /// Name of that session.
    pub session_name: Option<String>,
    /// The job that saved it.
    pub save: Option<JobId>,
    /// Description by the user.
    pub message: Option<String>,
}

/// The explanation of a code.
pub(super) struct Explained {
    pub(super) code: &'static str,
    /// The statuses that it comes with.
    pub(super) statuses: &'static [u16],
    pub(super) title: &'static str,
    /// What to do.
    pub(super) text: &'static str,
}

fn explained(code: &str) -> Option<&'static Explained> {
    CODES.iter().find(|explained| explained.code == code)
}

const fn code(
    code: &'static str,
    statuses: &'static [u16],
    title: &'static str,
    text: &'static str,
) -> Explained {
    Explained {
        code,
        statuses,
        title,
        text,
    }
}

/// All codes.
pub(super) const CODES: [Explained; 21] = [
    code(
        "unauthenticated",
        &[401],
        "The caller is not authenticated",
        "Send an API token or a JSON Web Token that the manager accepts and that has not expired: Authorization: Bearer TOKEN. \
         A browser signs in with POST /api/v1/signin.",
    ),
    code(
        "not_permitted",
        &[403],
        "The caller may not do this",
        "It belongs to another user, is for administrators, or the service's account lacks a right in the registry. A \
         portal's token names its user in the Upperdeck-User header.",
    ),
    code(
        "not_found",
        &[404],
        "It is not there",
        "There is nothing under this address or name, or it is not shown to this caller.",
    ),
    code(
        "invalid",
        &[400, 405, 413, 414, 415, 422, 431],
        "The request is not valid",
        "The member field names what is wrong, as a path into the body, or a parameter. A body is JSON with Content-Type: \
         application/json.",
    ),
    code(
        "conflict",
        &[409],
        "Something is in the way",
        "Usually a save of the same session, or to the same name and tag, that has not ended; the member save is its ID. Wait \
         for its end, or cancel it.",
    ),
    code(
        "tag_exists",
        &[409],
        "The tag names another image",
        "The member existing says whose, when it was saved and from which session. Take another tag, or send the request \
         again with replace: own, any, or the digest of that image.",
    ),
    code(
        "image_pinned",
        &[409],
        "The image is pinned",
        "It is neither deleted nor replaced until its owner unpins it.",
    ),
    code(
        "signin_refused",
        &[403],
        "The identity provider's sign-in is not accepted",
        "The provider has refused it, or its answer is not valid for this sign-in; the detail says which. The log of the \
         manager has more.",
    ),
    code(
        "signin_expired",
        &[403],
        "The sign-in was not begun here, or too long ago",
        "A sign-in with the identity provider is completed once, within ten minutes, by the browser that began it. Begin it \
         again.",
    ),
    code(
        "precondition_failed",
        &[412],
        "It has changed meanwhile",
        "The value of If-Match is not the ETag that it has now. Get it again, and decide by what it is now.",
    ),
    code(
        "too_late",
        &[409],
        "It is too late for that",
        "The save has ended, is being cancelled, or its tag is being written at this moment.",
    ),
    code(
        "timed_out",
        &[408],
        "The body did not come in time",
        "Send the request again over a connection that is fast enough.",
    ),
    code(
        "too_many",
        &[429],
        "Too much at once",
        "Requests per second, requests at once, or saves of one user have a limit. Try again after the seconds in the \
         Retry-After header.",
    ),
    code(
        "quota_exceeded",
        &[403],
        "The quota is used up",
        "Delete images that are not needed any more, or ask the administrators for more space.",
    ),
    code(
        "registry_read_only",
        &[403],
        "The registry is in read-only mode",
        "Nothing can be saved or deleted until its administrators end that.",
    ),
    code(
        "tag_immutable",
        &[409],
        "The tag is immutable",
        "A rule of the registry forbids to change or delete it. Take another tag.",
    ),
    code(
        "image_in_use",
        &[409],
        "An index of images needs the image",
        "Delete the index first.",
    ),
    code(
        "credentials_refused",
        &[403],
        "The registry refuses the service's account",
        "This is for the administrators of the service: its credentials for the registry are wrong or have expired.",
    ),
    code(
        "robot_refused",
        &[403],
        "The registry refuses the service's robot account",
        "This is for the administrators of the service: the robot account is disabled or has expired.",
    ),
    code(
        "unavailable",
        &[503],
        "Something that is needed does not answer",
        "The record, the queue, the registry or the identity provider is away. Try again after the seconds in the Retry-After \
         header.",
    ),
    code(
        "internal",
        &[500],
        "A defect of the service",
        "The manager's log says what happened, under the X-Request-Id of the response.",
    ),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_that_is_answered_is_explained() {
        let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src/service/manager");
        let pattern = regex::Regex::new(
            r#"Self::new\(\s*[^,"]+,\s*"([a-z_]+)"|Refusal::new\(\s*[^,"]+,\s*"([a-z_]+)""#,
        );
        let mut found = 0;
        for file in std::fs::read_dir(dir).unwrap() {
            let text = std::fs::read_to_string(file.unwrap().path()).unwrap_or_default();
            for codes in pattern.as_ref().unwrap().captures_iter(&text) {
                let code = codes.get(1).or(codes.get(2)).unwrap().as_str();
                assert!(explained(code).is_some(), "{code}");
                found += 1;
            }
        }
        assert!(found > 10, "{found}");
    }

    #[test]
    fn the_type_leads_to_the_explanation() {
        let problem = Problem::new(409, "tag_exists", "x");
        assert_eq!(problem.kind, "/docs/errors#tag_exists");
        assert_eq!(problem.title, "The tag names another image");
    }
}
