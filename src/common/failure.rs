//! Kinds of failures: what a caller can do about an error. [`crate::cli`] gives each its exit code.

/// What an error is to a caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FailureKind {
    /// Permanent: a retry will not help unless something changes.
    Final,
    /// The request is invalid.
    Usage,
    /// The container does not exist or has ended.
    ContainerGone,
    /// The base image or the root could not be proven, or is not available.
    BaseUnproven,
    /// Transient: worth a retry.
    Retryable,
    /// Not permitted: credentials, quota, policy or a missing capability.
    NotPermitted,
    /// Cancelled by the user.
    Cancelled,
}
