//! The merged view of an overlay's lower directories: looks up what the image has at a path and in which lower it is.
//!
//! Follows `ovl_lookup` of the kernel (`fs/overlayfs/namei.c`): whiteouts end a search, opaque directories end a stack,
//! redirects change the name that is looked up in the layers below.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::AsFd;

use rustix::fs::{FileType, Stat};

use super::root::{Root, names};
use super::xattr::Namespace;

/// A directory or file in one root: an index into [`Lowers::roots`] and a path below it without a leading slash.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    /// Index of the root, 0 the topmost.
    pub(crate) root: u16,
    /// Path below the root; empty for the root itself.
    pub(crate) path: Vec<u8>,
}

/// The directories that are merged at one path, topmost first. Empty if the lowers have no directory there.
pub(crate) type Stack = Vec<Place>;

/// The result of a lookup in the merged lowers.
#[derive(Clone, Debug)]
pub(crate) enum Found {
    /// Nothing, or a whiteout.
    Absent,
    /// A merged directory.
    Dir {
        /// The directories that are merged.
        stack: Stack,
        /// Status of the topmost.
        stat: Stat,
    },
    /// Any other file type.
    Other {
        /// The topmost entry.
        place: Place,
        /// Its status.
        stat: Stat,
    },
}

/// The name of a search; a redirect changes it on the way down.
#[derive(Clone)]
enum Name {
    /// One component below each directory of the parent's stack.
    Child(Vec<u8>),
    /// A path from each layer's root.
    Absolute(Vec<u8>),
}

/// The lowers of an overlay.
#[derive(Debug)]
pub(crate) struct Lowers {
    /// The merged lowers, topmost first, followed by the data-only ones.
    pub(crate) roots: Vec<Root>,
    /// Number of `roots` that are merged.
    pub(crate) merged: usize,
    /// The namespace of the overlay's marks.
    pub(crate) namespace: Namespace,
}

impl Lowers {
    /// Returns the stack of the root directory.
    pub(crate) fn root_stack(&self) -> Stack {
        (0..self.merged)
            .map(|root| Place {
                root: root as u16,
                path: Vec::new(),
            })
            .collect()
    }

    /// Looks up `name` in the merged directory `parent`.
    pub(crate) fn lookup(&self, parent: &Stack, name: &[u8]) -> io::Result<Found> {
        if parent.is_empty() {
            return Ok(Found::Absent);
        }
        self.search(parent, Name::Child(name.to_vec()))
    }

    /// Looks up the target of a redirect found in a directory with the stack `parent`: the name of a sibling, or an
    /// absolute path.
    pub(crate) fn lookup_redirect(&self, parent: &Stack, redirect: &[u8]) -> io::Result<Found> {
        match redirect.strip_prefix(b"/") {
            Some(path) => self.search(&self.root_stack(), Name::Absolute(path.to_vec())),
            None => self.lookup(parent, redirect),
        }
    }

    /// Returns the place of the data of a metacopy file with the redirect `redirect`, or without one the data found as
    /// `name` in `parent`.
    ///
    /// Absolute redirects may lead into the data-only lowers.
    pub(crate) fn data(
        &self,
        parent: &Stack,
        name: &[u8],
        redirect: Option<&[u8]>,
    ) -> io::Result<Option<(Place, Stat)>> {
        let found = match redirect {
            Some(redirect) => self.lookup_redirect(parent, redirect)?,
            None => self.lookup(parent, name)?,
        };
        if let Found::Other { place, stat } = found
            && FileType::from_raw_mode(stat.st_mode).is_file()
        {
            return self.data_of(place, stat, parent, name);
        }
        match redirect.and_then(|r| r.strip_prefix(b"/")) {
            Some(path) => self.data_only(path),
            None => Ok(None),
        }
    }

    /// Returns the place that holds the data of the lower file at `place`, which was found as `name` in `parent` and
    /// may be a metacopy itself.
    pub(crate) fn data_of(
        &self,
        place: Place,
        stat: Stat,
        parent: &Stack,
        name: &[u8],
    ) -> io::Result<Option<(Place, Stat)>> {
        if !self.has_mark(&place, "metacopy")? {
            return Ok(Some((place, stat)));
        }
        let redirect = self.mark(&place, "redirect")?;
        let below = place.root + 1;
        if let Some(path) = redirect.as_deref().and_then(|r| r.strip_prefix(b"/")) {
            let stack: Stack = (below..self.merged as u16)
                .map(|root| Place {
                    root,
                    path: Vec::new(),
                })
                .collect();
            if let Found::Other { place, stat } =
                self.search(&stack, Name::Absolute(path.to_vec()))?
            {
                return self.data_of(place, stat, &stack, path);
            }
            return self.data_only(path);
        }
        let stack: Stack = parent.iter().filter(|p| p.root >= below).cloned().collect();
        match self.lookup(&stack, redirect.as_deref().unwrap_or(name))? {
            Found::Other { place, stat } => self.data_of(place, stat, &stack, name),
            _ => Ok(None),
        }
    }

    fn data_only(&self, path: &[u8]) -> io::Result<Option<(Place, Stat)>> {
        for root in self.merged..self.roots.len() {
            if let Some(stat) = self.roots[root].stat(path)?
                && FileType::from_raw_mode(stat.st_mode).is_file()
            {
                return Ok(Some((
                    Place {
                        root: root as u16,
                        path: path.to_vec(),
                    },
                    stat,
                )));
            }
        }
        Ok(None)
    }

    /// Returns the names in the merged directory, each once and sorted, including names that the topmost directory has
    /// whiteouts for. `room` is called with the length of each name before it is kept.
    pub(crate) fn names<E: From<io::Error>>(
        &self,
        stack: &Stack,
        mut room: impl FnMut(usize) -> Result<(), E>,
    ) -> Result<BTreeSet<Vec<u8>>, E> {
        let mut all = BTreeSet::new();
        for place in stack {
            let fd = self.roots[usize::from(place.root)].open_dir(&place.path)?;
            for name in names(fd.as_fd()) {
                let name = name?;
                if !all.contains(&name) {
                    room(name.len())?;
                    all.insert(name);
                }
            }
        }
        Ok(all)
    }

    fn search(&self, parent: &Stack, name: Name) -> io::Result<Found> {
        let mut name = name;
        let mut parents = parent.clone();
        let mut stack = Stack::new();
        let mut top: Option<Stat> = None;
        let mut at = 0;
        while at < parents.len() {
            let parent = &parents[at];
            at += 1;
            let root = parent.root;
            let (path, mut ends) = match &name {
                Name::Child(name) => (join(&parent.path, name), false),
                Name::Absolute(path) => {
                    let (blocked, ends) = self.walk_parents(root, path)?;
                    if blocked {
                        break;
                    }
                    (path.clone(), ends)
                }
            };
            let place = Place { root, path };
            let Some(stat) = self.roots[usize::from(root)].stat(&place.path)? else {
                if ends {
                    break;
                }
                continue;
            };
            if self.is_whiteout(&place, &stat)? {
                break;
            }
            if !FileType::from_raw_mode(stat.st_mode).is_dir() {
                if top.is_none() {
                    return Ok(Found::Other { place, stat });
                }
                break;
            }
            top.get_or_insert(stat);
            let last = usize::from(root) + 1 == self.merged;
            if !last {
                ends |= self.mark(&place, "opaque")?.as_deref() == Some(b"y");
                if !ends && let Some(redirect) = self.mark(&place, "redirect")? {
                    if let Some(absolute) = redirect.strip_prefix(b"/") {
                        name = Name::Absolute(absolute.to_vec());
                        parents = (root + 1..self.merged as u16)
                            .map(|root| Place {
                                root,
                                path: Vec::new(),
                            })
                            .collect();
                        at = 0;
                    } else {
                        name = match &name {
                            Name::Child(_) => Name::Child(redirect),
                            Name::Absolute(path) => Name::Absolute(join(dirname(path), &redirect)),
                        };
                    }
                }
            }
            stack.push(place);
            if ends {
                break;
            }
        }
        Ok(match top {
            Some(stat) => Found::Dir { stack, stat },
            None => Found::Absent,
        })
    }

    /// For an absolute search, returns whether a parent of `path` is whited out in this root (nothing below it counts
    /// then), and whether one is opaque (this root is then the last one searched).
    fn walk_parents(&self, root: u16, path: &[u8]) -> io::Result<(bool, bool)> {
        let mut ends = false;
        for cut in path
            .iter()
            .enumerate()
            .filter(|(_, b)| **b == b'/')
            .map(|(i, _)| i)
        {
            let place = Place {
                root,
                path: path[..cut].to_vec(),
            };
            let Some(stat) = self.roots[usize::from(root)].stat(&place.path)? else {
                return Ok((false, ends));
            };
            if self.is_whiteout(&place, &stat)? {
                return Ok((true, true));
            }
            ends |= self.mark(&place, "opaque")?.as_deref() == Some(b"y");
        }
        Ok((false, ends))
    }

    fn is_whiteout(&self, place: &Place, stat: &Stat) -> io::Result<bool> {
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::CharacterDevice => Ok(stat.st_rdev == 0),
            FileType::RegularFile if stat.st_size == 0 => Ok(self.has_mark(place, "whiteout")?
                && {
                    let parent = Place {
                        root: place.root,
                        path: dirname(&place.path).to_vec(),
                    };
                    self.mark(&parent, "opaque")?.as_deref() == Some(b"x")
                }),
            _ => Ok(false),
        }
    }

    fn mark(&self, place: &Place, mark: &str) -> io::Result<Option<Vec<u8>>> {
        self.roots[usize::from(place.root)].xattr(&place.path, &self.namespace.name(mark))
    }

    fn has_mark(&self, place: &Place, mark: &str) -> io::Result<bool> {
        Ok(self.mark(place, mark)?.is_some())
    }
}

/// Returns `dir/name`, or `name` if `dir` is the root.
pub(crate) fn join(dir: &[u8], name: &[u8]) -> Vec<u8> {
    if dir.is_empty() {
        name.to_vec()
    } else {
        [dir, b"/", name].concat()
    }
}

/// Returns the part before the last slash; empty for a name in the root.
pub(crate) fn dirname(path: &[u8]) -> &[u8] {
    path.iter()
        .rposition(|&b| b == b'/')
        .map_or(b"".as_slice(), |cut| &path[..cut])
}

/// Returns the part after the last slash.
pub(crate) fn basename(path: &[u8]) -> &[u8] {
    path.iter()
        .rposition(|&b| b == b'/')
        .map_or(path, |cut| &path[cut + 1..])
}
