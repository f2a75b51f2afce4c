//! A container's tree, in which paths are followed as its processes see them, without what is mounted over it.
//!
//! Paths and links are a tenant's: they are followed within the tree, by lookups that are bounded in number.

use std::collections::{BTreeSet, VecDeque};
use std::fs::File as OpenFile;
use std::io;

use rustix::fs::{FileType, Stat};

use super::read;
use crate::node::container::Container;
use crate::node::overlay::lower::{self, Found, Lowers, Stack, join};
use crate::node::overlay::mount::OverlayMount;
use crate::node::overlay::root::Root;

/// Maximum number of names that are looked up for one program, over all directories and links.
const MAX_LOOKUPS: usize = 4096;

/// Where a file is.
#[derive(Debug)]
pub(super) enum Place {
    /// A regular file of the image.
    File(File),
    /// Perhaps below a mount, of which nothing is known.
    Mounted,
    Nowhere,
}

/// A regular file of a tree.
#[derive(Debug)]
pub(super) struct File {
    /// Its path, without a leading slash.
    pub(super) path: Vec<u8>,
    /// Where its content is; `None` if that is missing.
    content: Option<Box<(lower::Place, Stat)>>,
    executable: bool,
}

/// A container's tree, or that of its base alone.
pub(super) struct Tree {
    layers: Lowers,
    /// Paths at which something is mounted, without leading slashes.
    mounts: BTreeSet<Vec<u8>>,
}

impl Tree {
    pub(super) fn open(container: &Container, with_upper: bool) -> io::Result<Self> {
        let mounts = container.mounts.iter();
        let mounts = mounts.map(|mount| plain(mount.destination.as_os_str().as_encoded_bytes()));
        Self::new(&container.overlay, with_upper, mounts.collect())
    }

    pub(super) fn new(
        overlay: &OverlayMount,
        with_upper: bool,
        mounts: BTreeSet<Vec<u8>>,
    ) -> io::Result<Self> {
        let upper = with_upper.then_some(&overlay.upper);
        let merged = upper.into_iter().chain(&overlay.lowers);
        let roots = merged.clone().chain(&overlay.data_only);
        let roots: io::Result<Vec<Root>> = roots.map(|path| Root::open(path)).collect();
        let layers = Lowers {
            merged: merged.count(),
            roots: roots?,
            namespace: overlay.namespace,
        };
        Ok(Self { layers, mounts })
    }

    /// Looks for a program as a shell does: by its path, or by its name in directories. A file that cannot be executed
    /// is none.
    pub(super) fn program(&self, name: &[u8], search: &[String]) -> io::Result<Place> {
        let mut left = MAX_LOOKUPS;
        let mut find = |path: &[u8]| {
            let found = self.resolve(path, &mut left)?;
            Ok::<_, io::Error>(match found {
                Place::File(file) if !file.executable => Place::Nowhere,
                found => found,
            })
        };
        if name.contains(&b'/') {
            return find(name);
        }
        let mut mounted = false;
        for directory in search {
            match find(&join(directory.as_bytes(), name))? {
                Place::Nowhere => {}
                Place::Mounted => mounted = true,
                found @ Place::File(_) => return Ok(found),
            }
        }
        Ok(if mounted {
            Place::Mounted
        } else {
            Place::Nowhere
        })
    }

    /// Looks for a file by its path.
    pub(super) fn file(&self, path: &[u8]) -> io::Result<Place> {
        let mut left = MAX_LOOKUPS;
        self.resolve(path, &mut left)
    }

    /// Returns the beginning of a file, at most `length` bytes, or `None` if its content is gone.
    pub(super) fn read(&self, file: &File, length: u64) -> io::Result<Option<Vec<u8>>> {
        let Some(content) = &file.content else {
            return Ok(None);
        };
        let (place, stat) = &**content;
        let root = &self.layers.roots[usize::from(place.root)];
        let opened = root.open_file(&place.path, stat.st_ino)?;
        opened
            .map(|opened| read(&OpenFile::from(opened), length))
            .transpose()
    }

    /// Follows a path and its links within the tree, by at most `left` lookups.
    fn resolve(&self, path: &[u8], left: &mut usize) -> io::Result<Place> {
        let mut rest: VecDeque<Vec<u8>> = components(path).collect();
        let mut at: Vec<(Vec<u8>, Stack)> = Vec::new();
        while let Some(name) = rest.pop_front() {
            *left = left
                .checked_sub(1)
                .ok_or_else(|| io::Error::other("too many lookups"))?;
            if name == b".." {
                at.pop();
                continue;
            }
            let (above, parent) = at.last().map_or_else(
                || (Vec::new(), self.layers.root_stack()),
                |(path, stack)| (path.clone(), stack.clone()),
            );
            let here = join(&above, &name);
            if self.mounts.contains(&here) {
                return Ok(Place::Mounted);
            }
            match self.layers.lookup(&parent, &name)? {
                Found::Absent => return Ok(Place::Nowhere),
                Found::Dir { stack, .. } => at.push((here, stack)),
                Found::Other { place, stat } => match FileType::from_raw_mode(stat.st_mode) {
                    FileType::Symlink => {
                        let root = &self.layers.roots[usize::from(place.root)];
                        let target = root.read_link(&place.path)?;
                        if target.starts_with(b"/") {
                            at.clear();
                        }
                        for name in components(&target).rev() {
                            rest.push_front(name);
                        }
                    }
                    FileType::RegularFile if rest.is_empty() => {
                        return Ok(Place::File(File {
                            path: here,
                            executable: stat.st_mode & 0o111 != 0,
                            content: self
                                .layers
                                .data_of(place, stat, &parent, &name)?
                                .map(Box::new),
                        }));
                    }
                    _ => return Ok(Place::Nowhere),
                },
            }
        }
        Ok(Place::Nowhere)
    }
}

/// Returns the components of a path that lead somewhere else.
fn components(path: &[u8]) -> impl DoubleEndedIterator<Item = Vec<u8>> {
    let names = path.split(|&byte| byte == b'/');
    names
        .filter(|name| !name.is_empty() && *name != b".")
        .map(<[u8]>::to_vec)
}

fn plain(path: &[u8]) -> Vec<u8> {
    components(path).collect::<Vec<_>>().join(&b'/')
}
