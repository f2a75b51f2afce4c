//! Error responses: every reason to refuse a request, as a problem.

use std::collections::BTreeMap;

use axum::extract::rejection::{JsonRejection, PathRejection, QueryRejection};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use utoipa::openapi::{ContentBuilder, Ref, RefOr, ResponseBuilder};

use super::auth::Rejected;
use super::problem::{ExistingImage, MEDIA_TYPE, Problem};
use super::target::Refused;
use crate::service::job::JobId;
use crate::{service::queue, service::record, store::images};

/// Seconds after which a request that failed for a temporary reason should be repeated.
const RETRY_AFTER_S: u64 = 5;

/// An error response.
#[derive(Clone, Debug)]
pub(super) struct Refusal {
    status: StatusCode,
    problem: Box<Problem>,
    retry_after_s: Option<u64>,
}

impl Refusal {
    pub(super) fn new(status: StatusCode, code: &str, message: impl Into<String>) -> Self {
        Self {
            status,
            problem: Box::new(Problem::new(status.as_u16(), code, message)),
            retry_after_s: None,
        }
    }

    /// Returns the response for an invalid field of the request.
    pub(super) fn invalid(field: &str, message: impl Into<String>) -> Self {
        let mut refusal = Self::new(StatusCode::UNPROCESSABLE_ENTITY, "invalid", message);
        refusal.problem.field = Some(field.to_owned());
        refusal
    }

    pub(super) fn not_found(what: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, "not_found", what)
    }

    pub(super) fn forbidden(message: impl Into<String>) -> Self {
        Self::new(StatusCode::FORBIDDEN, "not_permitted", message)
    }

    pub(super) fn conflict(message: impl Into<String>, save: Option<JobId>) -> Self {
        let mut refusal = Self::new(StatusCode::CONFLICT, "conflict", message);
        refusal.problem.save = save;
        refusal.problem.retryable = save.is_some();
        refusal
    }

    /// Returns the body of the response.
    pub(super) fn problem(&self) -> &Problem {
        &self.problem
    }

    /// Returns the status of the response.
    pub(super) fn status(&self) -> StatusCode {
        self.status
    }

    /// Returns the message for the caller.
    pub(super) fn message(&self) -> &str {
        &self.problem.detail
    }

    /// Adds the image that has the tag.
    pub(super) fn with_existing(mut self, existing: ExistingImage) -> Self {
        self.problem.existing = Some(Box::new(existing));
        self
    }

    pub(super) fn too_many(message: impl Into<String>, after_s: u64) -> Self {
        Self::new(StatusCode::TOO_MANY_REQUESTS, "too_many", message).later(after_s)
    }

    pub(super) fn unavailable(message: impl Into<String>) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "unavailable", message).later(RETRY_AFTER_S)
    }

    fn later(mut self, after_s: u64) -> Self {
        self.problem.retryable = true;
        self.retry_after_s = Some(after_s.max(1));
        self
    }

    /// Logs an internal error. The caller gets only a general message.
    pub(super) fn internal(error: &dyn std::error::Error) -> Self {
        tracing::error!(error = %error, "a request could not be answered");
        Self::new(
            StatusCode::INTERNAL_SERVER_ERROR,
            "internal",
            "something went wrong in the manager; its log says what, under the X-Request-Id of this answer",
        )
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        // The problem consists of plain data types, so serialization cannot fail.
        let body = serde_json::to_string(&*self.problem).unwrap_or_default();
        let kind = [(header::CONTENT_TYPE, MEDIA_TYPE)];
        let mut response = (self.status, kind, body).into_response();
        let headers = response.headers_mut();
        if let Some(seconds) = self.retry_after_s {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            let scheme = HeaderValue::from_static("Bearer realm=\"upperdeck\"");
            headers.insert(header::WWW_AUTHENTICATE, scheme);
        }
        // For `addressed`, which knows the service's address.
        response.extensions_mut().insert(self.problem);
        response
    }
}

/// Gives the type of a problem the address at which callers reach the service, if that is known: `of` returns it for a
/// path.
pub(super) fn addressed(mut response: Response, of: impl FnOnce(&str) -> String) -> Response {
    let Some(mut problem) = response.extensions_mut().remove::<Box<Problem>>() else {
        return response;
    };
    problem.kind = of(problem.kind.trim_start_matches('/'));
    let body = serde_json::to_string(&*problem).unwrap_or_default();
    response.headers_mut().remove(header::CONTENT_LENGTH);
    *response.body_mut() = body.into();
    response
}

impl utoipa::IntoResponses for Refusal {
    fn responses() -> BTreeMap<String, RefOr<utoipa::openapi::Response>> {
        let of = |description: &str| {
            let content = ContentBuilder::new()
                .schema(Some(Ref::from_schema_name("Problem")))
                .build();
            let response = ResponseBuilder::new()
                .description(description)
                .content(MEDIA_TYPE, content)
                .build();
            RefOr::T(response)
        };
        [
            ("400", "What cannot be read: `invalid`"),
            ("401", "The caller is not authenticated: `unauthenticated`"),
            (
                "403",
                "Not this caller's, or not the service's: `not_permitted`, `quota_exceeded`, `registry_read_only`, \
                 `credentials_refused`, `robot_refused`, `signin_refused`, `signin_expired`",
            ),
            (
                "404",
                "It is not there, or is not shown to this caller: `not_found`",
            ),
            ("408", "The body did not come in time: `timed_out`"),
            ("405", "Not with this method: `invalid`"),
            (
                "409",
                "Something is in the way: `conflict` (with the save), `tag_exists` (with the image), `image_pinned`, `too_late`, `tag_immutable`, `image_in_use`",
            ),
            ("413", "The body is too large: `invalid`"),
            ("414", "The address is too long: `invalid`"),
            ("431", "The head is too long: `invalid`"),
            ("415", "The body is no JSON: `invalid`"),
            ("422", "A field is wrong: `invalid`, with its name"),
            ("429", "Too much at once: `too_many`"),
            ("500", "A defect: `internal`"),
            (
                "503",
                "The record, the queue or the registry is away: `unavailable`",
            ),
        ]
        .into_iter()
        .map(|(status, description)| (status.to_owned(), of(description)))
        .collect()
    }
}

impl From<record::Error> for Refusal {
    fn from(error: record::Error) -> Self {
        match error {
            record::Error::Conflict(save) => Self::conflict(
                format!("save {save} of the same session or to the same tag is open"),
                Some(save),
            ),
            record::Error::Row { .. } | record::Error::Newer { .. } => Self::internal(&error),
            record::Error::Contended(_) => {
                tracing::warn!(error = %error, "a change was given up");
                Self::unavailable("others change the same save at this moment; try again")
            }
            _ => {
                tracing::error!(error = %error, "the record does not answer");
                Self::unavailable("the record does not answer; try again in a moment")
            }
        }
    }
}

impl From<queue::Error> for Refusal {
    fn from(error: queue::Error) -> Self {
        tracing::warn!(error = %error, "the queue does not answer");
        Self::unavailable("the queue does not answer; try again in a moment")
    }
}

impl From<images::Error> for Refusal {
    /// Callers learn the cause, and neither the registry's address nor the name of the service's account, which are in
    /// the log.
    fn from(error: images::Error) -> Self {
        let message = crate::common::message::of(&error);
        let coded =
            |status, text: &str| Self::new(status, error.code().unwrap_or("conflict"), text);
        match error.code() {
            Some("tag_immutable") => {
                return coded(
                    StatusCode::CONFLICT,
                    "the tag is immutable: a rule of the registry forbids to change or delete it",
                );
            }
            Some("image_in_use") => {
                return coded(
                    StatusCode::CONFLICT,
                    "an index of images needs this image; delete the index first",
                );
            }
            Some("registry_read_only") => {
                return coded(
                    StatusCode::FORBIDDEN,
                    "the registry is in read-only mode, in which nothing can be saved or deleted; its administrator ends \
                     that",
                );
            }
            Some("credentials_refused" | "robot_refused") => {
                tracing::error!(error = %message, "the registry refuses the service's account");
                return coded(
                    StatusCode::FORBIDDEN,
                    "the registry does not accept the service's account; tell your administrators",
                );
            }
            _ => {}
        }
        match &error {
            images::Error::NotFound(_) => Self::not_found(message),
            images::Error::SharedTag { .. } | images::Error::Tagged { .. } => {
                Self::conflict(message, None)
            }
            images::Error::Registry(error) if error.not_found() => {
                Self::not_found("the registry does not have it")
            }
            images::Error::Harbor(crate::store::harbor::Error::Search(_)) => {
                Self::invalid("search", message)
            }
            _ => {
                tracing::warn!(error = %message, "the registry does not do it");
                if error.not_permitted() {
                    return Self::forbidden(
                        "the registry does not let the service do this: a right is missing; tell your administrators",
                    );
                }
                Self::unavailable(
                    "the registry does not answer as it should; try again in a moment",
                )
            }
        }
    }
}

impl From<Rejected> for Refusal {
    fn from(rejected: Rejected) -> Self {
        match rejected {
            Rejected::Unknown(message) => {
                Self::new(StatusCode::UNAUTHORIZED, "unauthenticated", message)
            }
            Rejected::Forbidden(message) => Self::forbidden(message),
            // Logged where it occurs, not for each request.
            Rejected::Unavailable(_) => Self::unavailable(
                "the identity provider's keys are being fetched; try again in a moment",
            ),
            // Logged with its cause by the authenticator, at a limited rate.
            Rejected::Cluster => Self::unavailable(
                "the Kubernetes API server does not say who you are and what you may do; try again in a moment",
            ),
            Rejected::Busy => Self::too_many("too many unknown tokens come from this address", 1),
            Rejected::Record(message) => {
                // The background work logs the failure; logging it here would add a line for each request.
                tracing::debug!(error = %message, "the record does not answer");
                Self::unavailable("the record does not answer; try again in a moment")
            }
        }
    }
}

impl From<Refused> for Refusal {
    fn from(refused: Refused) -> Self {
        match refused {
            Refused::User(message) => Self::forbidden(message),
            Refused::Name(message) => Self::invalid("image.name", message),
            Refused::Tag(message) => Self::invalid("image.tag", message),
        }
    }
}

impl From<JsonRejection> for Refusal {
    fn from(rejection: JsonRejection) -> Self {
        let status = rejection.status();
        let text = rejection.body_text();
        match rejection {
            JsonRejection::JsonDataError(_) => {
                let text = text
                    .strip_prefix("Failed to deserialize the JSON body into the target type: ")
                    .unwrap_or(&text);
                let field = text
                    .split_once(": ")
                    .map(|(field, _)| field)
                    .filter(|field| !field.contains(' '));
                Self::invalid(field.unwrap_or("body"), text)
            }
            JsonRejection::JsonSyntaxError(_) => {
                let mut refusal = Self::new(StatusCode::BAD_REQUEST, "invalid", text);
                refusal.problem.field = Some("body".to_owned());
                refusal
            }
            JsonRejection::MissingJsonContentType(_) => Self::new(
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
                "invalid",
                "the body has to be JSON: Content-Type: application/json",
            ),
            _ if status == StatusCode::PAYLOAD_TOO_LARGE => {
                Self::new(status, "invalid", "the body is too large")
            }
            _ => Self::new(
                StatusCode::BAD_REQUEST,
                "invalid",
                "the body cannot be read",
            ),
        }
    }
}

impl From<PathRejection> for Refusal {
    fn from(rejection: PathRejection) -> Self {
        Self::new(rejection.status(), "invalid", rejection.body_text())
    }
}

impl From<QueryRejection> for Refusal {
    fn from(rejection: QueryRejection) -> Self {
        let text = rejection.body_text();
        let text = text
            .strip_prefix("Failed to deserialize query string: ")
            .unwrap_or(&text);
        let field = text
            .split_once(": ")
            .map(|(field, _)| field)
            .filter(|field| !field.contains(' '));
        Self::invalid(field.unwrap_or("query"), text)
    }
}
