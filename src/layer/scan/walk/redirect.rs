//! Resolves content that is elsewhere: directories that were moved here (redirect), and files of which only the
//! metadata were copied up (metacopy).

use rustix::fs::{FileType, Stat};

use super::directory::Directory;
use super::entry::kind_of;
use super::{Task, read_error};
use crate::common::escape;
use crate::layer::scan::{ContentLocation, Entry, Error, Extra, Flags, Kind};
use crate::node::overlay::lower::{Found, Place, Stack, join};

impl Directory<'_> {
    /// Adds the entries that a moved directory merges in from its old path.
    pub(super) fn merged_entries(&mut self) -> Result<(), Error> {
        let walker = self.walker;
        for name in self.base_names(&self.task.merge)? {
            if self.decided.contains(&name) || self.deleted.contains(&name) {
                continue;
            }
            let path = join(&self.task.path, &name);
            let found = walker.lowers.lookup(&self.task.merge, &name);
            let found = found.map_err(|e| walker.read_error(&self.task.path, e))?;
            let (place, merge) = match &found {
                Found::Absent => continue,
                Found::Dir { stack, .. } => (stack.first().cloned(), stack.clone()),
                Found::Other { place, .. } => (Some(place.clone()), Stack::new()),
            };
            let Some(place) = place else { continue };
            let (stat, kept) = walker.base_facts(&place)?;
            let file_type = FileType::from_raw_mode(stat.st_mode);
            let base = self.base(&name, &path)?;
            let root = &walker.lowers.roots[usize::from(place.root)];
            let link = if file_type == FileType::Symlink {
                Some(
                    root.read_link(&place.path)
                        .map_err(|e| read_error(root.path(), &place.path, e))?,
                )
            } else {
                None
            };
            let in_base = !matches!(base, Found::Absent);
            if self.exclude(&path, Some(file_type), &stat, link.as_deref(), in_base) {
                self.mark_resolved(&name)?;
                continue;
            }
            let Some(kind) = kind_of(file_type) else {
                self.report.sockets.add(escape::path(&path));
                continue;
            };
            let mut entry = walker.entry(&stat, place.root + 1, kind, &path)?;
            if in_base {
                entry.flags.set(Flags::IN_BASE);
            }
            let content = if kind == Kind::File {
                let data = walker.lowers.data_of(place, stat, &self.task.merge, &name);
                let data = data.map_err(|e| walker.read_error(&path, e))?;
                Some(content_location(data, &path, &mut entry)?)
            } else {
                None
            };
            self.mark_resolved(&name)?;
            let xattrs = self.reservation.intern_xattrs(kept)?;
            let index = self.push(
                entry,
                &name,
                Extra {
                    link,
                    xattrs,
                    content,
                    ..Extra::default()
                },
            )?;
            if kind == Kind::Dir {
                let base = match base {
                    Found::Dir { stack, .. } => stack,
                    _ => Stack::new(),
                };
                let task = Task {
                    id: 0,
                    depth: self.depth_below()?,
                    path,
                    earlier: None,
                    upper: false,
                    merge,
                    hidden: !base.is_empty(),
                    base,
                    full: true,
                    opaque: false,
                };
                self.queue_subdirectory(index, task)?;
            }
        }
        Ok(())
    }

    /// Returns the directories that the overlay merges below the upper's directory `name`.
    pub(super) fn merged_with(
        &self,
        name: &[u8],
        path: &[u8],
        redirect: Option<&[u8]>,
    ) -> Result<Stack, Error> {
        let lowers = self.walker.lowers;
        let found = match redirect {
            Some(redirect) => lowers.lookup_redirect(&self.task.merge, redirect),
            None => lowers.lookup(&self.task.merge, name),
        };
        match found.map_err(|e| self.walker.read_error(path, e))? {
            Found::Dir { stack, .. } => Ok(stack),
            // The kernel shows an empty directory for a redirect that leads nowhere; here it is an error.
            _ if redirect.is_some() => Err(Error::Dangling {
                path: escape::path(path),
                mark: "redirect",
            }),
            _ => Ok(Stack::new()),
        }
    }

    pub(super) fn metacopy(
        &self,
        name: &[u8],
        path: &[u8],
        redirect: Option<&[u8]>,
        entry: &mut Entry,
    ) -> Result<ContentLocation, Error> {
        let data = self.walker.lowers.data(&self.task.merge, name, redirect);
        content_location(
            data.map_err(|e| self.walker.read_error(path, e))?,
            path,
            entry,
        )
    }
}

/// Returns the location of a file's content that is not with its metadata. Fails if it does not exist.
pub(super) fn content_location(
    data: Option<(Place, Stat)>,
    path: &[u8],
    entry: &mut Entry,
) -> Result<ContentLocation, Error> {
    let Some((place, stat)) = data else {
        return Err(Error::Dangling {
            path: escape::path(path),
            mark: "metacopy",
        });
    };
    entry.size = stat.st_size as u64;
    entry.allocated = stat.st_blocks as u64 * 512;
    Ok(ContentLocation {
        root: place.root + 1,
        path: place.path,
        ino: stat.st_ino,
    })
}
