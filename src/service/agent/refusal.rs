//! Why an attempt made no image, from how its child ended.

use std::process::ExitStatus;

use crate::common::escape;
use crate::save::event::Event;
use crate::service::job::{Code, Outcome};

/// Maximum length in characters of a message for people.
const MAX_MESSAGE: usize = 2000;

/// Why there is no image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Refusal {
    pub(super) code: Code,
    pub(super) message: String,
    pub(super) retryable: bool,
}

impl Refusal {
    pub(super) fn of(code: Code, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            retryable: false,
        }
    }

    pub(super) fn transient(code: Code, message: impl Into<String>) -> Self {
        Self {
            retryable: true,
            ..Self::of(code, message)
        }
    }

    pub(super) fn outcome(self) -> Outcome {
        Outcome::Failed {
            code: self.code,
            message: escape::limited(&self.message, MAX_MESSAGE),
            retryable: self.retryable,
        }
    }
}

/// Returns the refusal for a save that exceeded its memory limit. It is not retryable, because another attempt would
/// need as much memory.
pub(super) fn too_much_memory(bound: Option<u64>) -> Refusal {
    let bytes = bound.unwrap_or_default();
    let why = format!(
        "the save needs more memory than a save may take on this node ({bytes} bytes): an administrator may raise it with \
         --save-memory"
    );
    Refusal::of(Code::Policy, why)
}

/// Returns why a child that the agent did not stop ended without an image.
pub(super) fn refusal_of(
    status: std::io::Result<ExitStatus>,
    failed: Option<(String, String, bool)>,
    words: &str,
) -> Refusal {
    let status = match status {
        Ok(status) => status,
        Err(error) => {
            return Refusal::transient(Code::Internal, format!("waiting for the save: {error}"));
        }
    };
    if let Some((code, message, retryable)) = failed {
        return match code.as_str() {
            "cancelled" => Refusal::transient(Code::Internal, "the save was ended on the node"),
            code => {
                let code = job_code(code);
                Refusal {
                    code,
                    message: for_users(code, message),
                    retryable,
                }
            }
        };
    }
    let words = words.strip_prefix("upperdeck: ").unwrap_or(words);
    match status.code() {
        // Errors of the command line occur before the first event. The flags come from the agent and the administrator,
        // and the user's values have been checked.
        Some(2) => Refusal::of(Code::Internal, format!("the save was not begun: {words}")),
        Some(66) => Refusal::of(Code::ContainerGone, words),
        Some(69) => Refusal::of(Code::BaseUnproven, words),
        Some(75) => Refusal::transient(Code::RegistryUnavailable, words),
        Some(77) => Refusal::of(
            Code::NotPermitted,
            for_users(Code::NotPermitted, words.to_owned()),
        ),
        Some(130) => Refusal::transient(Code::Internal, "the save was ended on the node"),
        _ => Refusal::transient(
            Code::Internal,
            format!("the save ended with {status} and no word: {words}"),
        ),
    }
}

/// Returns the message that the user gets. What a registry refused or failed at is in the log of the node: it names
/// internal addresses and the service's account.
pub(super) fn for_users(code: Code, message: String) -> String {
    let text = match code {
        Code::RegistryUnavailable => {
            "the registry cannot be reached or does not work; the node's log has the details"
        }
        Code::RegistryReadOnly => {
            "the registry is in read-only mode, in which nothing can be saved or deleted"
        }
        Code::CredentialsRefused | Code::RobotRefused => {
            "the registry does not accept the service's account; the node's log has the details"
        }
        Code::Internal if message.contains("://") => {
            "the registry failed at this; the node's log has the details"
        }
        _ if message.contains("://") => {
            "the registry does not let the service do this; the node's log has the details"
        }
        _ => return message,
    };
    tracing::warn!(
        save.code = code.name(),
        save.error = message,
        "a save was refused by its registry"
    );
    text.to_owned()
}

/// Returns an event as users get it: a warning that has a registry's address is logged, and told without it. Missing
/// labels concern the administrator alone, so they are only logged.
pub(super) fn event_for_users(event: Event) -> Option<Event> {
    Some(match event {
        Event::Warning { code, message } if code == "labels_missing" => {
            tracing::info!(save.code = code, save.warning = message, "a save goes on");
            return None;
        }
        Event::Warning { code, message } if message.contains("://") => {
            tracing::warn!(save.code = code, save.warning = message, "a save goes on");
            let message = "the registry did not do a part of this; the node's log has the details";
            let message = message.to_owned();
            Event::Warning { code, message }
        }
        event => event,
    })
}

/// Translates an error code of the child into one of the job.
pub(super) fn job_code(code: &str) -> Code {
    match code {
        // Caused by a value that the user chose, such as an invalid pattern.
        "usage" => Code::Policy,
        "permission_denied" => Code::NotPermitted,
        "container_not_found" | "container_stopped" => Code::ContainerGone,
        "foreign_root" => Code::BaseUnproven,
        code => Code::from_name(code).unwrap_or(Code::Internal),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_container_that_is_not_there_or_stopped_is_gone() {
        for code in ["container_gone", "container_not_found", "container_stopped"] {
            assert_eq!(job_code(code), Code::ContainerGone, "{code}");
        }
    }

    #[test]
    fn users_see_no_addresses_of_registries() {
        let text =
            "DELETE http://harbor.internal/api: 403 (credentials: \"robot$p+name\" from --creds)";
        let warning = |message: &str| Event::Warning {
            code: "replaced_kept".to_owned(),
            message: message.to_owned(),
        };
        let seen = |event| match event_for_users(event) {
            Some(Event::Warning { message, .. }) => message,
            other => format!("{other:?}"),
        };
        assert!(!seen(warning(text)).contains("harbor.internal"));
        assert_eq!(seen(warning("a file changed")), "a file changed");
        let labels = Event::Warning {
            code: "labels_missing".to_owned(),
            message: text.to_owned(),
        };
        assert_eq!(event_for_users(labels), None);
        for code in [Code::Internal, Code::Policy, Code::NotPermitted] {
            let message = for_users(code, text.to_owned());
            assert!(
                !message.contains("internal/") && !message.contains("robot$"),
                "{message}"
            );
        }
        // An error of the registry is not a refusal.
        let failed = for_users(Code::Internal, text.to_owned());
        assert!(failed.contains("the registry failed"), "{failed}");
        assert_eq!(for_users(Code::Policy, "too large".to_owned()), "too large");
    }
}
