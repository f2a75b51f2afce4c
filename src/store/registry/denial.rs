//! What a registry's refusal means. Harbor answers an exceeded quota, its read-only mode and a proxy cache with the
//! same status and code (403 `DENIED`), and four different rules with status 412, so code and text are read together.

use super::error::{Error, Reply, Step};

/// A refusal that has a cause other than a missing right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Denial {
    /// The project's quota would be exceeded. The sizes are those of the reply, if it states them.
    Quota(Option<Exceeded>),
    /// The registry is in read-only mode: nothing can be written or deleted.
    ReadOnly,
    /// The project is a proxy cache, which cannot be pushed to.
    ProxyCache,
    /// A rule of the project forbids moving or deleting the tag.
    Immutable,
    /// The project hands out only signed images (content trust).
    NotSigned,
    /// Another rule of the project forbids pulling the image, for example its vulnerabilities.
    Policy,
    /// An index refers to the image, which therefore cannot be deleted.
    Needed,
}

/// Sizes in a refusal over a quota, in bytes. The registry rounds them to one decimal of their unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exceeded {
    /// Bytes that were to be added.
    pub adding: u64,
    /// Bytes in use.
    pub used: u64,
    /// The quota.
    pub limit: u64,
}

impl Denial {
    /// Returns the cause that the error's reply states, if it is one of these.
    pub fn of(error: &Error) -> Option<Self> {
        match error {
            Error::Reply(reply) => Self::of_reply(reply),
            _ => None,
        }
    }

    fn of_reply(reply: &Reply) -> Option<Self> {
        let code = reply.code.as_deref().unwrap_or_default();
        let text = reply.message.as_deref().unwrap_or_default();
        match (reply.status, code) {
            (403, "DENIED") if text.contains("of storage resource") => {
                Some(Self::Quota(Exceeded::read(text)))
            }
            (403, "DENIED") if text.contains("read only mode") => Some(Self::ReadOnly),
            (403, "DENIED") if text.contains("to a proxy") => Some(Self::ProxyCache),
            (412, "PROJECTPOLICYVIOLATION") if text.contains("not signed") => Some(Self::NotSigned),
            (412, "PROJECTPOLICYVIOLATION") => Some(Self::Policy),
            (412, "VIOLATE_FOREIGN_KEY_CONSTRAINT") => Some(Self::Needed),
            // The answer to a HEAD request has no body.
            (412, "") if reply.step == Step::ReadManifest => Some(Self::Policy),
            (412, _) if text.contains("immutable") => Some(Self::Immutable),
            (412, _) if reply.step == Step::WriteManifest => Some(Self::Immutable),
            _ => None,
        }
    }

    /// Returns a stable name in snake case, for `--progress json` and the service.
    pub fn code(self) -> &'static str {
        match self {
            Self::Quota(_) => "quota_exceeded",
            Self::ReadOnly => "registry_read_only",
            Self::ProxyCache => "not_permitted",
            Self::Immutable => "tag_immutable",
            Self::NotSigned => "image_not_signed",
            Self::Policy => "policy",
            Self::Needed => "image_in_use",
        }
    }
}

impl Exceeded {
    /// Reads the sizes from "adding 2.0 MiB of storage resource, which when updated to current usage of 0 B will exceed
    /// the configured upper limit of 1.0 MiB.".
    fn read(text: &str) -> Option<Self> {
        let after = |mark: &str| {
            let rest = &text[text.find(mark)? + mark.len()..];
            let (number, rest) = rest.split_once(' ')?;
            let unit = rest.split([' ', '.', ',']).next()?;
            bytes(number, unit)
        };
        Some(Self {
            adding: after("adding ").or_else(|| after("subtracting "))?,
            used: after("current usage of ")?,
            limit: after("upper limit of ")?,
        })
    }
}

fn bytes(number: &str, unit: &str) -> Option<u64> {
    let units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let power = units.iter().position(|known| *known == unit)?;
    let (whole, tenths) = number.split_once('.').unwrap_or((number, "0"));
    let (whole, tenths) = (whole.parse::<u64>().ok()?, tenths.parse::<u64>().ok()?);
    let tens = whole.checked_mul(10)?.checked_add(tenths.min(9))?;
    Some(tens.checked_mul(1 << (10 * power))? / 10)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::registry::error::Request;

    fn reply(status: u16, code: &str, message: &str, step: Step) -> Error {
        let url = "http://r.example/v2/a/manifests/1".parse().unwrap();
        Error::Reply(Box::new(Reply {
            request: Request::new(&http::Method::PUT, &url),
            step,
            status,
            code: Some(code.to_owned()),
            message: Some(message.to_owned()),
            retry_after: None,
            tag: None,
            credentials: None,
            mid_upload: false,
        }))
    }

    #[test]
    fn the_text_tells_what_the_code_does_not() {
        let full = "adding 683.6 KiB of storage resource, which when updated to current usage of 1023.5 KiB will exceed \
                    the configured upper limit of 1.0 MiB.";
        let sizes = Exceeded {
            adding: 700_006,
            used: 1_048_064,
            limit: 1 << 20,
        };
        let lowered = "subtracting 0 B of storage resource, which when updated to current usage of 1023.5 KiB will \
                       exceed the configured upper limit of 683.6 KiB.";
        let zero = Exceeded {
            adding: 0,
            used: 1_048_064,
            limit: 700_006,
        };
        for (status, code, text, step, expected) in [
            (
                403,
                "DENIED",
                full,
                Step::FinishBlob,
                Some(Denial::Quota(Some(sizes))),
            ),
            (
                403,
                "DENIED",
                lowered,
                Step::BeginUpload,
                Some(Denial::Quota(Some(zero))),
            ),
            (
                403,
                "DENIED",
                "adding much of storage resource",
                Step::FinishBlob,
                Some(Denial::Quota(None)),
            ),
            (
                403,
                "DENIED",
                "The system is in read only mode. Any modification is prohibited.",
                Step::BeginUpload,
                Some(Denial::ReadOnly),
            ),
            (
                403,
                "DENIED",
                "can not push artifact to a proxy project: cache",
                Step::BeginUpload,
                Some(Denial::ProxyCache),
            ),
            (403, "DENIED", "no", Step::BeginUpload, None),
            (403, "FORBIDDEN", "forbidden", Step::Api, None),
            (
                412,
                "PRECONDITION",
                "Failed to process request due to 'x:a' configured as immutable.",
                Step::WriteManifest,
                Some(Denial::Immutable),
            ),
            (
                412,
                "PRECONDITION",
                "the tag fixed configured as immutable, cannot be deleted",
                Step::Api,
                Some(Denial::Immutable),
            ),
            (412, "X", "", Step::WriteManifest, Some(Denial::Immutable)),
            (
                412,
                "PROJECTPOLICYVIOLATION",
                "The image is not signed by cosign.",
                Step::ReadManifest,
                Some(Denial::NotSigned),
            ),
            (
                412,
                "PROJECTPOLICYVIOLATION",
                "current image with 3 vulnerabilities cannot be pulled",
                Step::ReadManifest,
                Some(Denial::Policy),
            ),
            (
                412,
                "VIOLATE_FOREIGN_KEY_CONSTRAINT",
                "the deleting artifact is referenced by others",
                Step::Api,
                Some(Denial::Needed),
            ),
            (
                412,
                "PRECONDITION",
                "get current user not available for security context: robot",
                Step::Api,
                None,
            ),
        ] {
            let error = reply(status, code, text, step);
            assert_eq!(Denial::of(&error), expected, "{status} {code} {text}");
        }
    }

    #[test]
    fn sizes_that_make_no_sense_are_no_sizes() {
        for text in [
            "adding x MiB of storage resource",
            "adding 1.0 XiB of storage resource, current usage of 1 B, upper limit of 1 B",
            "adding 99999999999999 PiB of storage resource current usage of 0 B upper limit of 0 B",
            "current usage of 1 B upper limit of 1 B",
        ] {
            assert_eq!(Exceeded::read(text), None, "{text}");
        }
    }
}
