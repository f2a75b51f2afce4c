//! What differs between the packages of two trees.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::installed::{Installed, Key, Versions};
use super::start::{Program, StartUser};
use super::{MAX_LOCATION, MAX_NAME, MAX_UNREAD, Manager};
use crate::common::escape;

/// Maximum number of unread files and of notes in a list that is sent.
const MAX_TOLD: usize = 20;
/// Maximum number of programs in a list that came from elsewhere.
const MAX_PROGRAMS: usize = 4;

/// How a package differs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[cfg_attr(feature = "service", derive(utoipa::ToSchema))]
#[serde(rename_all = "lowercase")]
pub enum ChangeKind {
    /// It was not there before.
    Added,
    /// It is not there any more.
    Removed,
    /// It is there in another version.
    Changed,
}

/// A package that differs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "service", derive(utoipa::ToSchema))]
pub struct PackageChange {
    /// The manager that installed it.
    pub manager: Manager,
    /// Name, as the manager prints it.
    pub name: String,
    /// Kind of the difference.
    pub change: ChangeKind,
    /// Its version; absent if it was removed. Several versions at one location are separated by commas.
    pub version: Option<String>,
    /// The version before; absent if it was added.
    pub previous: Option<String>,
    /// Directory in which it is installed, without a leading slash: a `site-packages`, an environment of conda, a library
    /// of R, a `node_modules`. Empty for the packages of the system.
    pub location: String,
}

/// A file that describes packages and could not be read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "service", derive(utoipa::ToSchema))]
pub struct Unread {
    /// Path, escaped.
    pub path: String,
    /// Why it could not be read.
    pub reason: String,
}

/// A bounded list of packages that differ.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "service", derive(utoipa::ToSchema))]
pub struct Packages {
    /// The packages, by manager and name.
    pub packages: Vec<PackageChange>,
    /// Number of packages that are left out of `packages` because there are too many.
    pub more: u64,
    /// Files that describe packages and could not be read.
    pub unread: Vec<Unread>,
    /// Number of such files that are left out of `unread`.
    pub unread_more: u64,
    /// What else limits the list, as sentences.
    pub notes: Vec<String>,
    /// The programs by which the session was started: the first of its command, that of the image's own command if it is
    /// another, and `jupyterhub-singleuser` if a JupyterHub started it by that. Empty for an image, and where they could
    /// not be looked for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub programs: Vec<Program>,
    /// The user by which the image is started; absent for an image, and where the base's config names none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<StartUser>,
}

/// Name and versions of a package before and after.
type Pair = (String, Option<String>, Option<String>);

impl Packages {
    /// Compares two trees, of which only what may differ needs to be read.
    pub fn between(before: &Installed, after: &Installed) -> Self {
        let (was, is) = (before.packages(), after.packages());
        let keys: BTreeSet<&Key> = was.keys().chain(is.keys()).collect();
        let text = |versions: &Versions| {
            let all: Vec<&str> = versions.versions.iter().map(String::as_str).collect();
            all.join(", ")
        };
        let pairs = keys.into_iter().map(|key| {
            let (was, is) = (was.get(key), is.get(key));
            let name = is.or(was).map(|versions| versions.name.clone());
            (
                (key.manager, key.location.clone()),
                (name.unwrap_or_default(), was.map(text), is.map(text)),
            )
        });
        let mut found = Self {
            packages: pairs.filter_map(change).collect(),
            ..Self::default()
        };
        found.keep_certain(before, after);
        let unread: Vec<_> = before
            .unread()
            .map(|found| (found, true))
            .chain(after.unread().map(|found| (found, false)))
            .collect();
        found.unread_more = unread.len().saturating_sub(MAX_UNREAD) as u64;
        let listed = unread.into_iter().take(MAX_UNREAD);
        found.unread = listed
            .map(|((path, reason), of_base)| Unread {
                path: escape::limited(&escape::path(path), 1024),
                reason: if of_base {
                    format!("in the base: {}", escape::limited(reason, 512))
                } else {
                    escape::limited(reason, 512)
                },
            })
            .collect();
        found.notes(before, after);
        found
    }

    /// Drops changes that may only seem so, because what describes the packages of a tree could not be read.
    fn keep_certain(&mut self, before: &Installed, after: &Installed) {
        for (kind, tree, other, text) in [
            (ChangeKind::Removed, after, before, "are still installed"),
            (ChangeKind::Added, before, after, "were there before"),
        ] {
            let uncertain = tree.uncertain(other);
            let all = self.packages.len();
            self.packages.retain(|package| {
                let place = (package.manager, package.location.clone());
                let certain = |places: &BTreeSet<_>| !places.contains(&place);
                package.change != kind || uncertain.as_ref().is_some_and(certain)
            });
            let dropped = (all - self.packages.len()) as u64;
            if dropped > 0 {
                let packages = crate::common::message::count(dropped, "package", "packages");
                self.note(format!("it is not known whether {packages} {text}"));
            }
        }
    }

    fn notes(&mut self, before: &Installed, after: &Installed) {
        let left_out = before.left_out() + after.left_out();
        if left_out > 0 {
            let files = crate::common::message::count(left_out, "file", "files");
            self.notes.push(format!(
                "there are more packages than are read: {files} left out"
            ));
        }
        if after.has_rpm() {
            let text = "the packages of RPM are not read";
            self.notes.push(text.to_owned());
        }
    }

    /// Adds a limitation of the list, unless it is said already.
    pub(crate) fn note(&mut self, text: impl Into<String>) {
        let text = text.into();
        if !self.notes.contains(&text) {
            self.notes.push(text);
        }
    }

    /// Returns what changed since `earlier`, if both lists are compared with the same base. Exact if neither list is
    /// shortened.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        type Changes<'a> = BTreeMap<(Manager, String, &'a str), &'a PackageChange>;
        fn by_key(list: &[PackageChange]) -> Changes<'_> {
            list.iter()
                .map(|package| (package.key(), package))
                .collect()
        }
        let (then, now) = (by_key(&earlier.packages), by_key(&self.packages));
        let keys: BTreeSet<_> = then.keys().chain(now.keys()).collect();
        let pairs = keys.into_iter().filter_map(|key| {
            let (then, now) = (then.get(key), now.get(key));
            let name = now.or(then)?.name.clone();
            // What is in one list alone is in the other tree as it is in the base.
            let was = match (then, now) {
                (Some(then), _) => then.version.clone(),
                (None, now) => now?.previous.clone(),
            };
            let is = match (now, then) {
                (Some(now), _) => now.version.clone(),
                (None, then) => then?.previous.clone(),
            };
            Some(((key.0, key.2.to_owned()), (name, was, is)))
        });
        let mut found = Self {
            packages: pairs.filter_map(change).collect(),
            ..Self::default()
        };
        for (which, list) in [("earlier", earlier), ("later", self)] {
            if list.more > 0 || list.unread_more > 0 || !list.unread.is_empty() {
                found.note(format!("the {which} list is incomplete"));
            }
            for note in &list.notes {
                found.note(note.clone());
            }
        }
        found
    }

    /// Returns a list that came from elsewhere, with its texts escaped and shortened, and at most `most` packages with at
    /// most `bytes` of text.
    #[must_use]
    pub fn sanitised(self, most: usize, bytes: usize) -> Self {
        let short = |text: &String| escape::limited(text, MAX_NAME);
        let mut list = self.limited(most, bytes);
        for package in &mut list.packages {
            package.name = short(&package.name);
            package.version = package.version.as_ref().map(short);
            package.previous = package.previous.as_ref().map(short);
            package.location = escape::limited(&package.location, MAX_LOCATION);
        }
        list.unread_more += list.unread.len().saturating_sub(MAX_TOLD) as u64;
        list.unread.truncate(MAX_TOLD);
        for unread in &mut list.unread {
            unread.path = short(&unread.path);
            unread.reason = short(&unread.reason);
        }
        list.notes.truncate(MAX_TOLD);
        list.notes = list.notes.iter().map(short).collect();
        list.programs.truncate(MAX_PROGRAMS);
        list.programs.iter_mut().for_each(Program::shorten);
        list.user.iter_mut().for_each(StartUser::shorten);
        list
    }

    /// Shortens the list to `most` packages with at most `bytes` of text.
    #[must_use]
    pub fn limited(mut self, most: usize, bytes: usize) -> Self {
        let mut used = 0;
        let fits = self.packages.iter().take(most).take_while(|package| {
            used += package.bytes();
            used <= bytes
        });
        let fits = fits.count();
        self.more += (self.packages.len() - fits) as u64;
        self.packages.truncate(fits);
        self
    }
}

impl PackageChange {
    /// Returns the size of its texts in bytes.
    fn bytes(&self) -> usize {
        let versions = self.version.iter().chain(&self.previous);
        self.name.len() + self.location.len() + versions.map(String::len).sum::<usize>()
    }

    /// Returns what identifies the package in a tree.
    fn key(&self) -> (Manager, String, &str) {
        let name = self.manager.normal_name(&self.name);
        (self.manager, name, &self.location)
    }
}

fn change(
    ((manager, location), (name, previous, version)): ((Manager, String), Pair),
) -> Option<PackageChange> {
    let change = match (&previous, &version) {
        (None, Some(_)) => ChangeKind::Added,
        (Some(_), None) => ChangeKind::Removed,
        (Some(was), Some(is)) if was != is => ChangeKind::Changed,
        _ => return None,
    };
    Some(PackageChange {
        manager,
        name,
        change,
        version,
        previous,
        location,
    })
}
