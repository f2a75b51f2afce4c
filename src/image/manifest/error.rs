//! Errors and warnings of building an image.

use super::{MAX_LAYERS, MAX_MANIFEST_BYTES, change};

/// A defect of the base that was repaired.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Warning {
    /// Stable code in snake case.
    pub code: &'static str,
    /// A sentence for users.
    pub message: String,
}

/// An error while building an image.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An input is not JSON.
    #[error("{what} is not JSON: {source}")]
    Json {
        /// The input.
        what: &'static str,
        /// The position of the error.
        source: serde_json::Error,
    },
    /// A field of an input has the wrong type.
    #[error("{what}: {field} should be {expected}, found {found}")]
    UnexpectedType {
        /// The input.
        what: &'static str,
        /// Path of the field.
        field: String,
        /// The type in the specification.
        expected: &'static str,
        /// The actual type.
        found: String,
    },
    /// The base manifest is a document that no image can be built on.
    #[error(
        "the base manifest is {found:?}; an image manifest (OCI, or Docker schema 2) is needed{hint}"
    )]
    ManifestType {
        /// Its media type.
        found: String,
        /// Advice for the user.
        hint: &'static str,
    },
    /// The config of the base manifest is not an image config.
    #[error("the base's config is {0:?}: this is another artifact, not a container image")]
    ConfigType(String),
    /// A layer has a Docker media type without an OCI counterpart.
    #[error("layer {index} of the base is {media_type:?}, which has no OCI counterpart")]
    LayerType {
        /// Index of the layer; the bottom is 0.
        index: usize,
        /// The media type.
        media_type: String,
    },
    /// The number of layers differs between the config and the input.
    #[error(
        "the base config lists {}, found were {given}: this is not the config of this base",
        crate::common::message::count(*config, "layer", "layers")
    )]
    LayerCount {
        /// `rootfs.diff_ids`.
        config: usize,
        /// `Input::base_layers`.
        given: usize,
    },
    /// The image would have more than [`MAX_LAYERS`] layers.
    #[error(
        "the image would have more layers than container engines support ({0} of at most {MAX_LAYERS}); rebuild the base with fewer layers and start from that"
    )]
    TooManyLayers(usize),
    /// The manifest would be larger than [`MAX_MANIFEST_BYTES`].
    #[error(
        "the manifest would have {0} bytes, registries take {MAX_MANIFEST_BYTES}; give fewer or shorter annotations"
    )]
    ManifestSize(usize),
    /// A `--change` is invalid.
    #[error(transparent)]
    Change(#[from] change::Error),
    /// A `--label` or `--annotation` is invalid.
    #[error("{flag} {key:?}: {reason}")]
    Pair {
        /// `--label` or `--annotation`.
        flag: &'static str,
        /// The key.
        key: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A time that cannot be written in RFC 3339.
    #[error(
        "{0} (seconds since 1970) is outside the range of an image's timestamp, the years 0 to 9999"
    )]
    Time(i64),
}

impl Error {
    /// Returns whether the options are invalid (`--change`, `--label`, `--annotation`, `--timestamp`; exit code 2).
    pub fn is_usage(&self) -> bool {
        matches!(self, Self::Change(_) | Self::Pair { .. } | Self::Time(_))
    }

    /// Returns whether the base cannot be used (exit code 69).
    pub fn is_base(&self) -> bool {
        !self.is_usage() && !matches!(self, Self::TooManyLayers(_) | Self::ManifestSize(_))
    }
}
