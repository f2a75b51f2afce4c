//! Which files describe packages, by their paths.

use super::Manager;
use crate::node::overlay::lower::{basename, dirname};

/// A file in which a package manager records one or all packages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MetadataFile {
    /// `METADATA` or `PKG-INFO` of one Python package.
    Python,
    /// `INSTALLER` of one Python package: the program that installed it.
    PythonInstaller,
    /// A JSON file of one conda package.
    Conda,
    /// The `DESCRIPTION` of one R package, installed or not.
    R,
    /// The `package.json` of one package below `node_modules`.
    Npm,
    /// dpkg's database of all packages.
    DpkgStatus,
    /// One package of an image without a package manager (distroless).
    DpkgPart,
    /// apk's database of all packages.
    Apk,
    /// A database of RPM, which is not read.
    Rpm,
}

impl MetadataFile {
    /// Returns the manager whose packages it describes; `None` if it describes none that are read.
    pub(crate) fn manager(self) -> Option<Manager> {
        Some(match self {
            Self::Python | Self::PythonInstaller => Manager::Pip,
            Self::Conda => Manager::Conda,
            Self::R => Manager::R,
            Self::Npm => Manager::Npm,
            Self::DpkgStatus | Self::DpkgPart => Manager::Dpkg,
            Self::Apk => Manager::Apk,
            Self::Rpm => return None,
        })
    }

    /// Returns the number of bytes that are read of such a file, and whether a longer file can be parsed by its
    /// beginning.
    pub(crate) fn limit(self) -> (u64, bool) {
        match self {
            // Name and version are among the first fields; a long description follows.
            Self::Python => (64 << 10, true),
            Self::PythonInstaller | Self::Rpm => (256, true),
            Self::R | Self::DpkgPart => (1 << 20, false),
            Self::Npm => (2 << 20, false),
            // It lists every file of the package, with digests.
            Self::Conda => (32 << 20, false),
            Self::DpkgStatus | Self::Apk => (64 << 20, false),
        }
    }
}

const RPM: [&[u8]; 6] = [
    b"var/lib/rpm/rpmdb.sqlite",
    b"var/lib/rpm/Packages",
    b"var/lib/rpm/Packages.db",
    b"usr/lib/sysimage/rpm/rpmdb.sqlite",
    b"usr/lib/sysimage/rpm/Packages",
    b"usr/lib/sysimage/rpm/Packages.db",
];

/// Returns what the file at `path` (without a leading slash) describes, if it describes packages.
pub fn metadata_file(path: &[u8]) -> Option<MetadataFile> {
    let (above, name) = (dirname(path), basename(path));
    let directory = basename(above);
    Some(match name {
        b"METADATA" if directory.ends_with(b".dist-info") => MetadataFile::Python,
        b"INSTALLER" if directory.ends_with(b".dist-info") => MetadataFile::PythonInstaller,
        b"PKG-INFO" if directory.ends_with(b".egg-info") || directory == b"EGG-INFO" => {
            MetadataFile::Python
        }
        _ if name.ends_with(b".egg-info") && is_site(directory) => MetadataFile::Python,
        b"DESCRIPTION" if !directory.is_empty() => MetadataFile::R,
        b"package.json" if npm_name(above).is_some() => MetadataFile::Npm,
        b"status" if above == b"var/lib/dpkg" => MetadataFile::DpkgStatus,
        b"installed" if above == b"lib/apk/db" || above == b"usr/lib/apk/db" => MetadataFile::Apk,
        _ if directory == b"conda-meta" && name.ends_with(b".json") => MetadataFile::Conda,
        _ if above == b"var/lib/dpkg/status.d" && !name.ends_with(b".md5sums") => {
            MetadataFile::DpkgPart
        }
        _ if RPM.contains(&path) => MetadataFile::Rpm,
        _ => return None,
    })
}

fn is_site(directory: &[u8]) -> bool {
    directory == b"site-packages" || directory == b"dist-packages"
}

/// Returns the part of the path of a package's directory behind its only `node_modules`: `NAME` or `@SCOPE/NAME`.
/// Packages in the `node_modules` of another package are parts of that one.
fn npm_name(directory: &[u8]) -> Option<&[u8]> {
    let above = dirname(directory);
    let name = if basename(above).starts_with(b"@") {
        &directory[dirname(above).len()..]
    } else {
        &directory[above.len()..]
    };
    let modules = &directory[..directory.len() - name.len()];
    let name = name.strip_prefix(b"/")?;
    let only = basename(modules) == b"node_modules"
        && !dirname(modules)
            .split(|&b| b == b'/')
            .any(|part| part == b"node_modules");
    // `.bin`, `.cache` and the stores of pnpm are no packages.
    (only && !name.starts_with(b".")).then_some(name)
}

/// Returns the directory in which the package described at `path` is installed, or `None` if the file lies elsewhere: in
/// a cache, or in a copy that another package brings for itself.
pub(crate) fn is_installed_at(file: MetadataFile, path: &[u8]) -> Option<&[u8]> {
    let directory = dirname(path);
    match file {
        MetadataFile::Python | MetadataFile::PythonInstaller => {
            // NAME.egg-info, NAME.dist-info/METADATA or NAME.egg/EGG-INFO/PKG-INFO
            let site = if is_site(basename(directory)) {
                directory
            } else if basename(directory) == b"EGG-INFO" {
                dirname(dirname(directory))
            } else {
                dirname(directory)
            };
            is_site(basename(site)).then_some(site)
        }
        MetadataFile::Conda | MetadataFile::R => Some(dirname(directory)),
        MetadataFile::Npm => {
            let name = npm_name(directory)?;
            Some(&directory[..directory.len() - name.len() - 1])
        }
        MetadataFile::DpkgStatus | MetadataFile::DpkgPart | MetadataFile::Apk => Some(b""),
        MetadataFile::Rpm => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_known_by_their_paths() {
        use MetadataFile as F;
        let cases: [(&str, Option<F>, Option<&str>); 24] = [
            (
                "usr/lib/python3.11/site-packages/numpy-2.1.dist-info/METADATA",
                Some(F::Python),
                Some("usr/lib/python3.11/site-packages"),
            ),
            (
                "v/lib/python3/site-packages/x.dist-info/INSTALLER",
                Some(F::PythonInstaller),
                Some("v/lib/python3/site-packages"),
            ),
            (
                "usr/lib/python3/dist-packages/six.egg-info",
                Some(F::Python),
                Some("usr/lib/python3/dist-packages"),
            ),
            (
                "usr/lib/python3/dist-packages/six.egg-info/PKG-INFO",
                Some(F::Python),
                Some("usr/lib/python3/dist-packages"),
            ),
            (
                "p/site-packages/six-1.egg/EGG-INFO/PKG-INFO",
                Some(F::Python),
                Some("p/site-packages"),
            ),
            (
                "p/site-packages/setuptools/_vendor/wheel-0.43.dist-info/METADATA",
                Some(F::Python),
                None,
            ),
            (
                "root/.cache/uv/archive-v0/x/numpy-2.1.dist-info/METADATA",
                Some(F::Python),
                None,
            ),
            ("p/site-packages/numpy/METADATA", None, None),
            (
                "opt/conda/conda-meta/numpy-1.26-py311_0.json",
                Some(F::Conda),
                Some("opt/conda"),
            ),
            ("opt/conda/conda-meta/history", None, None),
            (
                "usr/local/lib/R/site-library/dplyr/DESCRIPTION",
                Some(F::R),
                Some("usr/local/lib/R/site-library"),
            ),
            ("DESCRIPTION", None, None),
            (
                "usr/lib/node_modules/npm/package.json",
                Some(F::Npm),
                Some("usr/lib/node_modules"),
            ),
            (
                "srv/app/node_modules/@types/node/package.json",
                Some(F::Npm),
                Some("srv/app/node_modules"),
            ),
            (
                "usr/lib/node_modules/npm/node_modules/abbrev/package.json",
                None,
                None,
            ),
            (
                "srv/node_modules/@a/node_modules/b/package.json",
                None,
                None,
            ),
            ("srv/node_modules/npm/lib/package.json", None, None),
            ("srv/node_modules/.store/package.json", None, None),
            ("package.json", None, None),
            (
                "node_modules/x/package.json",
                Some(F::Npm),
                Some("node_modules"),
            ),
            ("var/lib/dpkg/status", Some(F::DpkgStatus), Some("")),
            ("var/lib/dpkg/status.d/base", Some(F::DpkgPart), Some("")),
            ("lib/apk/db/installed", Some(F::Apk), Some("")),
            ("var/lib/rpm/rpmdb.sqlite", Some(F::Rpm), None),
        ];
        for (path, file, location) in cases {
            let found = metadata_file(path.as_bytes());
            assert_eq!(found, file, "{path}");
            let at = found.and_then(|file| is_installed_at(file, path.as_bytes()));
            assert_eq!(at, location.map(str::as_bytes), "{path}");
        }
    }
}
