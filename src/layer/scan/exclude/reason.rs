//! Reasons for leaving out an entry.

/// Reason for leaving out an entry.
#[derive(
    Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize,
)]
#[serde(tag = "reason", content = "pattern", rename_all = "snake_case")]
pub enum Reason {
    /// At or below the destination of a mount.
    Mount,
    /// A stub that a runtime creates as a mount point.
    MountStub,
    /// A device that the runtime creates in every container.
    RuntimeDevice,
    /// A stub left by the GPU hook.
    Gpu,
    /// A credential, or a place where programs keep credentials, shell histories included.
    Credential,
    /// Data that can be downloaded again.
    Cache,
    /// The user's pattern that matched.
    Pattern(String),
    /// A path so long that unpacking it into a directory would exceed `PATH_MAX`.
    PathTooLong,
    /// A name that begins with `.wh.`, which means a deletion in a layer.
    ReservedName,
}

impl Reason {
    /// Returns the value of `reason` in JSON.
    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Self::Mount => "mount",
            Self::MountStub => "mount_stub",
            Self::RuntimeDevice => "runtime_device",
            Self::Gpu => "gpu",
            Self::Credential => "credential",
            Self::Cache => "cache",
            Self::Pattern(_) => "pattern",
            Self::PathTooLong => "path_too_long",
            Self::ReservedName => "reserved_name",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_are_written_in_snake_case() {
        let json =
            serde_json::to_string(&[Reason::MountStub, Reason::Pattern("*.o".to_owned())]).unwrap();
        assert_eq!(
            json,
            r#"[{"reason":"mount_stub"},{"reason":"pattern","pattern":"*.o"}]"#
        );
    }
}
