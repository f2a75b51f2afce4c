//! Maps errors to exit codes and stable error codes for scripts. This is the only place that does so.

use std::io;

use super::exit::{Exit, Usage};
use crate::bench;
use crate::common::cancel::Cancelled;
use crate::common::message;
use crate::demo;
use crate::image::extract::ExtractError;
use crate::save;
use crate::save::event::Event;
use crate::store::images;
use crate::store::registry;

/// The machine-readable form of an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Failure {
    /// Exit code.
    pub(crate) exit: Exit,
    /// Stable code in snake case, for the `failed` event.
    pub(crate) code: &'static str,
    /// Whether the same call may succeed later.
    pub(crate) retryable: bool,
}

impl Failure {
    const fn new(exit: Exit, code: &'static str) -> Self {
        Self {
            exit,
            code,
            retryable: matches!(exit, Exit::Retry),
        }
    }

    /// Maps `error` by its outermost cause of a known type. A typed error has to be a cause (`?`, `#[source]`); one
    /// that was only attached with `context` is text.
    pub(crate) fn of(error: &anyhow::Error) -> Self {
        error
            .chain()
            .find_map(Self::of_cause)
            .unwrap_or(Self::new(Exit::Failed, "failed"))
    }

    /// Returns the event with which a command that reports events says that it failed.
    pub(super) fn event(error: &anyhow::Error) -> Event {
        let failure = Self::of(error);
        Event::Failed {
            exit: failure.exit.code(),
            code: failure.code.to_owned(),
            message: message::of(error.as_ref()),
            retryable: failure.retryable,
        }
    }

    /// Maps an error of a registry from which a layer was read.
    fn of_registry(error: &registry::Error) -> Option<Self> {
        if error.not_permitted() {
            Some(Self::new(Exit::NotPermitted, "not_permitted"))
        } else if error.retryable() {
            Some(Self::new(Exit::Retry, "registry_unavailable"))
        } else {
            None
        }
    }

    /// Maps a cause by its type and kind, never by its text.
    fn of_cause(cause: &(dyn std::error::Error + 'static)) -> Option<Self> {
        if cause.is::<Cancelled>() {
            return Some(Self::new(Exit::Cancelled, "cancelled"));
        }
        if cause.is::<Usage>() {
            return Some(Self::new(Exit::Usage, "usage"));
        }
        if let Some(error) = cause.downcast_ref::<save::Error>() {
            return Some(Self::new(error.kind().into(), error.code()));
        }
        if let Some(error) = cause.downcast_ref::<images::Error>() {
            return Some(if error.is_usage() {
                Self::new(Exit::Usage, "usage")
            } else if error.not_permitted() {
                Self::new(Exit::NotPermitted, error.code().unwrap_or("not_permitted"))
            } else if error.retryable() {
                Self::new(Exit::Retry, "registry_unavailable")
            } else {
                Self::new(Exit::Failed, error.code().unwrap_or("failed"))
            });
        }
        if let Some(error) = cause.downcast_ref::<ExtractError>() {
            return match error {
                ExtractError::NotFound(_) | ExtractError::Path { .. } => {
                    Some(Self::new(Exit::NoContainer, "not_found"))
                }
                _ => None,
            };
        }
        if let Some(error) = cause.downcast_ref::<bench::Error>() {
            return match error {
                bench::Error::Save(error) => Self::of_cause(error),
                bench::Error::Cancelled(error) => Self::of_cause(error),
                bench::Error::Scratch { source, .. } | bench::Error::Runtime(source) => {
                    Self::of_cause(source)
                }
                bench::Error::Empty { .. } => None,
            }
            .or(Some(Self::new(Exit::Failed, "bench")));
        }
        if let Some(error) = cause.downcast_ref::<demo::Error>() {
            return match error {
                demo::Error::Commit(error) => Self::of_cause(error),
                demo::Error::Cancelled(error) => Self::of_cause(error),
                error => Some(Self::new(error.kind().into(), "demo")),
            };
        }
        #[cfg(feature = "service")]
        if let Some((exit, code)) = super::service::failure(cause) {
            return Some(Self::new(exit, code));
        }
        // Last, because modules wrap I/O errors in more specific ones.
        let error = cause.downcast_ref::<io::Error>()?;
        if let Some(error) = error.get_ref().and_then(|inner| inner.downcast_ref()) {
            return Self::of_registry(error);
        }
        match error.kind() {
            io::ErrorKind::PermissionDenied => {
                Some(Self::new(Exit::NotPermitted, "permission_denied"))
            }
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                Some(Self::new(Exit::Failed, "no_space"))
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use anyhow::anyhow;

    use super::*;
    use crate::image::manifest;

    #[test]
    fn codes_are_those_of_the_design() {
        let codes: Vec<u8> = Exit::TABLE.iter().map(|(exit, _)| exit.code()).collect();
        assert_eq!(codes, [0, 1, 2, 66, 69, 75, 77, 130]);
    }

    #[test]
    fn the_type_decides_not_the_text() {
        let denied = || io::Error::from(io::ErrorKind::PermissionDenied);
        for (error, exit, code) in [
            (anyhow!("usage: cancelled"), Exit::Failed, "failed"),
            (
                anyhow::Error::new(Cancelled).context("while saving"),
                Exit::Cancelled,
                "cancelled",
            ),
            (anyhow::Error::new(Usage("x".into())), Exit::Usage, "usage"),
            (
                anyhow::Error::new(save::Error::from(manifest::Error::Time(1)))
                    .context("assembling"),
                Exit::Usage,
                "usage",
            ),
            (
                anyhow::Error::new(save::Error::from(manifest::Error::ConfigType("x".into()))),
                Exit::Base,
                "base_unproven",
            ),
            (
                anyhow::Error::new(save::Error::from(manifest::Error::TooManyLayers(128))),
                Exit::Failed,
                "internal",
            ),
            (
                anyhow::Error::new(denied()).context("opening /x"),
                Exit::NotPermitted,
                "permission_denied",
            ),
        ] {
            let failure = Failure::of(&error);
            assert_eq!((failure.exit, failure.code), (exit, code), "{error:?}");
        }
    }
}
