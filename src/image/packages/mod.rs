//! The packages that are installed in a file tree, by the files in which package managers record them. Nothing is run.
//!
//! Every file here is written by a tenant: sizes and numbers are bounded, what cannot be read or parsed is counted and
//! listed, and texts from the files are accepted only if they are plain.
//!
//! `files` recognises the files by their paths, `parse` reads their content, `installed` collects what they say,
//! `changes` compares two trees, `layers` reads the layers of an image.

mod changes;
mod files;
mod installed;
pub mod layers;
mod parse;
mod start;

use serde::{Deserialize, Serialize};

pub use changes::{ChangeKind, PackageChange, Packages, Unread};
pub use files::metadata_file;
pub(crate) use files::{MetadataFile, is_installed_at};
pub use installed::{Installed, TOTAL_BYTES};
pub use start::{Interpreter, Program, StartUser};

/// Maximum number of packages of one tree. A full Linux desktop has about 3,000.
pub(crate) const MAX_PACKAGES: usize = 50_000;
/// Maximum number of files that could not be read and are listed; further ones are counted.
pub(crate) const MAX_UNREAD: usize = 100;
/// Maximum length of a name, a version and a location, in bytes.
const MAX_NAME: usize = 256;
const MAX_LOCATION: usize = 4096;

/// The package manager that installed a package.
#[derive(
    Clone,
    Copy,
    Debug,
    PartialEq,
    Eq,
    PartialOrd,
    Ord,
    Hash,
    Serialize,
    Deserialize,
    clap::ValueEnum,
)]
#[cfg_attr(feature = "service", derive(utoipa::ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum Manager {
    /// conda, mamba, micromamba: `conda-meta/*.json`.
    Conda,
    /// pip, uv, Poetry and other installers of Python packages: `*.dist-info`, `*.egg-info`.
    Pip,
    /// R: `DESCRIPTION` of installed packages.
    R,
    /// npm, Yarn: `node_modules/*/package.json`.
    Npm,
    /// apt and dpkg: `/var/lib/dpkg/status`.
    Dpkg,
    /// apk of Alpine Linux: `/lib/apk/db/installed`.
    Apk,
}

impl Manager {
    /// All managers, in the order of lists: what a user installs comes before what a system brings.
    pub const ALL: [Self; 6] = [
        Self::Conda,
        Self::Pip,
        Self::R,
        Self::Npm,
        Self::Dpkg,
        Self::Apk,
    ];

    /// Returns the name as in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Conda => "conda",
            Self::Pip => "pip",
            Self::R => "r",
            Self::Npm => "npm",
            Self::Dpkg => "dpkg",
            Self::Apk => "apk",
        }
    }

    /// Returns the name under which packages are compared and searched: lower case, and for Python with every run of
    /// `-`, `_` and `.` as one hyphen (PEP 503).
    pub fn normal_name(self, name: &str) -> String {
        let lower = name.to_lowercase();
        if self == Self::Pip {
            let parts = lower.split(['-', '_', '.']);
            let parts: Vec<&str> = parts.filter(|part| !part.is_empty()).collect();
            return parts.join("-");
        }
        lower
    }
}

/// A package as its metadata describe it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Found {
    pub(crate) name: String,
    pub(crate) version: String,
}

impl Found {
    /// Checks the texts: a name and a version are short, and have neither white space nor anything that is not visible.
    fn new(name: &str, version: &str) -> Result<Self, &'static str> {
        let plain = |text: &str| {
            !text.is_empty()
                && text.len() <= MAX_NAME
                && !text.contains(char::is_whitespace)
                && crate::common::escape::limited(text, MAX_NAME) == text
        };
        if !plain(name) {
            return Err("its name is not one");
        }
        if !plain(version) {
            return Err("its version is not one");
        }
        Ok(Self {
            name: name.to_owned(),
            version: version.to_owned(),
        })
    }
}
