//! What the metadata files of one tree say, by path, so that upper layers can replace and delete them.

use std::collections::{BTreeMap, BTreeSet};

use super::files::{MetadataFile, is_installed_at};
use super::{Found, MAX_LOCATION, MAX_PACKAGES, Manager, parse};
use crate::common::escape;
use crate::node::overlay::lower::{basename, dirname};

/// Maximum number of bytes that are read of all metadata files of a tree.
pub const TOTAL_BYTES: u64 = 512 << 20;
/// Maximum memory for paths and names, in bytes.
const MEMORY: usize = 64 << 20;
/// Memory of a map's entry besides its texts, roughly.
const ENTRY: usize = 128;

/// What one file says.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Fact {
    One(Found),
    Many(Vec<Found>),
    /// The Python package was installed by this program.
    Installer(String),
    /// The packages of RPM are not read.
    Rpm,
    /// A symbolic link stands where the other tree has files that describe packages.
    Symlink,
    Unread(String),
}

/// Why a symbolic link is not read.
const SYMLINK: &str = "it is a symbolic link, which is not followed";

/// Identifies a package in a tree.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Key {
    pub(super) manager: Manager,
    /// See [`Manager::normal_name`].
    pub(super) name: String,
    /// Directory in which it is installed, escaped; empty for the packages of the system.
    pub(super) location: String,
}

/// A package with all its versions at one location.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Versions {
    pub(super) name: String,
    pub(super) versions: BTreeSet<String>,
}

/// The packages of one tree.
#[derive(Clone, Debug, Default)]
pub struct Installed {
    facts: BTreeMap<Vec<u8>, Fact>,
    packages: usize,
    read: u64,
    memory: usize,
    /// Files for which there was no room.
    left_out: u64,
}

impl Installed {
    /// Returns the number of bytes to read of a metadata file of `size` bytes, and whether that is only its beginning.
    /// Returns `None` if the file is not to be read, which is recorded.
    pub(crate) fn limit(
        &mut self,
        path: &[u8],
        file: MetadataFile,
        size: u64,
    ) -> Option<(u64, bool)> {
        let (limit, by_beginning) = file.limit();
        if size > limit && !by_beginning {
            self.unreadable(
                path,
                format!("it has {size} bytes, at most {limit} are read"),
            );
            return None;
        }
        let wanted = size.min(limit);
        if self.read + wanted > TOTAL_BYTES {
            self.unreadable(
                path,
                format!(
                    "the files before it have {TOTAL_BYTES} bytes together, and no more are read"
                ),
            );
            return None;
        }
        self.read += wanted;
        Some((wanted, size > limit))
    }

    /// Takes the content of a metadata file. `cut` says that it is only the beginning.
    pub fn add(&mut self, path: &[u8], file: MetadataFile, content: &[u8], cut: bool) {
        self.remove(path);
        let directory = basename(dirname(path));
        let fact = match file {
            MetadataFile::Python => parse::python(content, cut).map(|f| Some(Fact::One(f))),
            MetadataFile::PythonInstaller => {
                let by = String::from_utf8_lossy(content.trim_ascii());
                Ok(Some(Fact::Installer(escape::limited(&by, 64))))
            }
            MetadataFile::Conda => parse::conda(content).map(|f| Some(Fact::One(f))),
            MetadataFile::R => parse::r(content, directory).map(|f| f.map(Fact::One)),
            MetadataFile::Npm => parse::npm(content).map(|f| f.map(Fact::One)),
            MetadataFile::DpkgStatus | MetadataFile::DpkgPart => {
                parse::dpkg(content).map(|f| Some(Fact::Many(f)))
            }
            MetadataFile::Apk => parse::apk(content).map(|f| Some(Fact::Many(f))),
            MetadataFile::Rpm => Ok(Some(Fact::Rpm)),
        };
        match fact {
            Ok(Some(fact)) => self.insert(path, fact),
            Ok(None) => {}
            Err(reason) => self.unreadable(path, reason),
        }
    }

    /// Records that a metadata file cannot be read.
    pub(crate) fn unreadable(&mut self, path: &[u8], reason: impl Into<String>) {
        self.remove(path);
        self.insert(path, Fact::Unread(reason.into()));
    }

    /// Records that a symbolic link replaces a file that describes packages, or a directory with such files.
    pub(crate) fn symlink(&mut self, path: &[u8]) {
        self.insert(path, Fact::Symlink);
    }

    fn insert(&mut self, path: &[u8], fact: Fact) {
        let (packages, texts) = match &fact {
            Fact::One(found) => (1, found.name.len() + found.version.len()),
            Fact::Many(all) => {
                let texts = all.iter().map(|f| f.name.len() + f.version.len() + ENTRY);
                (all.len(), texts.sum())
            }
            Fact::Installer(by) => (0, by.len()),
            Fact::Unread(reason) => (0, reason.len()),
            Fact::Rpm | Fact::Symlink => (0, 0),
        };
        // Nothing is given back when an upper layer replaces a file, so that the sum bounds the work, too.
        let memory = ENTRY + path.len() + texts;
        if self.packages + packages > MAX_PACKAGES
            || self.memory + memory > MEMORY
            || path.len() > MAX_LOCATION
        {
            self.left_out += 1;
            return;
        }
        self.packages += packages;
        self.memory += memory;
        self.facts.insert(path.to_vec(), fact);
    }

    /// Takes a hard link for the file that it names.
    pub(super) fn link(&mut self, path: &[u8], target: &[u8]) {
        self.remove(path);
        match self.facts.get(target).cloned() {
            Some(fact) => self.insert(path, fact),
            None => self.unreadable(path, "it is a link to a file that was not read"),
        }
    }

    /// Forgets what the file at `path` says.
    pub(crate) fn remove(&mut self, path: &[u8]) {
        self.facts.remove(path);
    }

    /// Returns the paths of all known files at and below `path`.
    pub(crate) fn at_and_below(&self, path: &[u8]) -> Vec<Vec<u8>> {
        let below = [path, b"/"].concat();
        let all = path.is_empty();
        let at = self.facts.contains_key(path).then(|| path.to_vec());
        let from = if all { Vec::new() } else { below.clone() };
        let rest = self.facts.range(from..);
        let rest = rest.take_while(|(known, _)| all || known.starts_with(&below));
        at.into_iter()
            .chain(rest.map(|(known, _)| known.clone()))
            .collect()
    }

    /// Returns the files that could not be read: paths and reasons, in the order of paths.
    pub(super) fn unread(&self) -> impl Iterator<Item = (&[u8], &str)> {
        self.facts.iter().filter_map(|(path, fact)| match fact {
            Fact::Unread(reason) => {
                let file = super::metadata_file(path)?;
                // A copy that is not installed would not be listed either.
                let counts = file == MetadataFile::Rpm || is_installed_at(file, path).is_some();
                counts.then_some((path.as_slice(), reason.as_str()))
            }
            Fact::Symlink => Some((path.as_slice(), SYMLINK)),
            _ => None,
        })
    }

    /// Returns the managers and locations, as in [`Key`], of which this tree may have more packages than are known, or
    /// `None` if that is so of all. `other` is the tree that it is compared with.
    pub(super) fn uncertain(&self, other: &Self) -> Option<BTreeSet<(Manager, String)>> {
        if self.left_out > 0 {
            return None;
        }
        let place = |path: &[u8]| {
            let file = super::metadata_file(path)?;
            Some((file.manager()?, escape::path(is_installed_at(file, path)?)))
        };
        let mut places = BTreeSet::new();
        for (path, fact) in &self.facts {
            match fact {
                Fact::Unread(_) => places.extend(place(path)),
                Fact::Symlink => {
                    let replaced = other.at_and_below(path);
                    places.extend(replaced.iter().filter_map(|path| place(path)));
                }
                _ => {}
            }
        }
        Some(places)
    }

    /// Returns the number of files for which there was no room.
    pub(super) fn left_out(&self) -> u64 {
        self.left_out
    }

    /// Returns whether there is a database of RPM.
    pub(super) fn has_rpm(&self) -> bool {
        self.facts.values().any(|fact| *fact == Fact::Rpm)
    }

    /// Returns all packages, each once: what conda or dpkg brought of Python and R is listed as theirs.
    pub(super) fn packages(&self) -> BTreeMap<Key, Versions> {
        let mut all: BTreeMap<Key, Versions> = BTreeMap::new();
        for (path, fact) in &self.facts {
            let Some(file) = super::metadata_file(path) else {
                continue;
            };
            let (Some(manager), Some(at)) = (file.manager(), is_installed_at(file, path)) else {
                continue;
            };
            let found = match fact {
                Fact::One(found) => std::slice::from_ref(found),
                Fact::Many(all) => all,
                _ => continue,
            };
            if manager == Manager::Pip && self.is_another_s(path, at) {
                continue;
            }
            let location = escape::path(at);
            for found in found {
                let key = Key {
                    manager,
                    name: manager.normal_name(&found.name),
                    location: location.clone(),
                };
                let entry = all.entry(key).or_default();
                entry.name.clone_from(&found.name);
                entry.versions.insert(found.version.clone());
            }
        }
        let is_another_s = |key: &&Key| key.manager == Manager::R && is_brought(key, &all);
        let brought: Vec<Key> = all.keys().filter(is_another_s).cloned().collect();
        for key in brought {
            all.remove(&key);
        }
        all
    }

    /// Returns whether another manager installed this Python package and lists it. Debian's packages own
    /// `/usr/lib/python3/dist-packages`, where pip does not install.
    fn is_another_s(&self, path: &[u8], at: &[u8]) -> bool {
        let installer = [dirname(path), b"/INSTALLER"].concat();
        let by_conda =
            matches!(self.facts.get(&installer), Some(Fact::Installer(by)) if by == "conda");
        by_conda || at == b"usr/lib/python3/dist-packages"
    }
}

/// Returns whether a package of R was brought by one of conda (`r-NAME`) or of Debian (`r-cran-NAME`, `r-bioc-NAME`,
/// `r-base-core` with those of R itself).
fn is_brought(key: &Key, all: &BTreeMap<Key, Versions>) -> bool {
    let is = |manager, name: String, location: &str| {
        let location = location.to_owned();
        all.contains_key(&Key {
            manager,
            name,
            location,
        })
    };
    if let Some(prefix) = key.location.strip_suffix("/lib/R/library") {
        let names = [format!("r-{}", key.name), "r-base".to_owned()];
        if names
            .into_iter()
            .any(|name| is(Manager::Conda, name, prefix))
        {
            return true;
        }
    }
    match key.location.as_str() {
        "usr/lib/R/site-library" => ["r-cran-", "r-bioc-"]
            .iter()
            .any(|of| is(Manager::Dpkg, format!("{of}{}", key.name), "")),
        "usr/lib/R/library" => is(Manager::Dpkg, "r-base-core".to_owned(), ""),
        _ => false,
    }
}
