//! Creates the entries above the walked tree: the root, which is in the layer only if it changed, and the directories
//! that lead to a volume.

use std::io;
use std::os::fd::AsFd;

use super::Walker;
use super::entry::mode_of;
use super::flatten::Output;
use crate::layer::scan::rows::NO_EXTRA;
use crate::layer::scan::{Entry, Error, Extra, Flags, Kind};
use crate::node::overlay::root::Follow;
use crate::node::overlay::volume::Volume;
use crate::node::overlay::xattr::proc_path;

impl Walker<'_> {
    /// Returns the entry of the root directory; for a volume, the entries from the root down to it.
    pub(in crate::layer::scan) fn top(&self) -> Result<Output, Error> {
        match self.volume {
            None => self.root_entry(),
            Some(volume) => self.entries_down_to(volume),
        }
    }

    /// Returns the chain of directories down to a volume. Those above it are as seen in the container, the mounted one
    /// as it is itself. The root itself belongs to another layer.
    fn entries_down_to(&self, volume: &Volume) -> Result<Output, Error> {
        let mut output = Output::default();
        output.entries.push(Entry {
            kind: Kind::Dir,
            extra: NO_EXTRA,
            flags: Flags::OMITTED,
            ..Entry::default()
        });
        let handle = self.upper.open_dir(volume.at());
        let handle = handle.map_err(|source| self.read_error(volume.at(), source))?;
        let mounted = (volume.name(), handle.as_fd());
        for (name, fd) in volume.above().chain([mounted]) {
            let failed = |source| self.read_error(volume.at(), source);
            let stat = rustix::fs::fstat(fd).map_err(|e| failed(e.into()))?;
            let attributes =
                self.attributes_of(proc_path(fd), Follow::Yes, volume.at(), &mut Vec::new())?;
            let mut entry = self.entry(&stat, 0, Kind::Dir, volume.at())?;
            entry.name_at = output.names.len() as u32;
            entry.name_len = name.len() as u16;
            output.names.extend(name);
            let xattrs = self.memory.reservation().intern_xattrs(attributes.kept)?;
            if xattrs.is_some() {
                entry.extra = output.extras.len() as u32;
                output.extras.push(Extra {
                    xattrs,
                    ..Extra::default()
                });
            }
            output.entries.push(entry);
        }
        Ok(output)
    }

    /// Returns the root's entry, which is in the layer only if its mode, owner or attributes changed.
    fn root_entry(&self) -> Result<Output, Error> {
        let stat = self
            .upper
            .stat(b"")
            .and_then(|s| s.ok_or(io::ErrorKind::NotFound.into()));
        let stat = stat.map_err(|source| self.read_error(b"", source))?;
        let handle = self
            .upper
            .open_dir(b"")
            .map_err(|source| self.read_error(b"", source))?;
        let mut output = Output::default();
        let attributes =
            self.attributes_of(proc_path(handle.as_fd()), Follow::Yes, b"", &mut Vec::new())?;
        let mut entry = self.entry(&stat, 0, Kind::Dir, b"")?;
        let mut silent = !self.lowers_known || self.lowers.merged == 0;
        if let (false, Some(place)) = (silent, self.lowers.root_stack().first()) {
            let (base, kept) = self.base_facts(place)?;
            let by_runtime = self.options.runtime_root_mode == Some(u32::from(entry.mode));
            silent = (by_runtime || mode_of(&base) == entry.mode)
                && self.owner_of(&base, place.root + 1, b"")? == (entry.uid, entry.gid)
                && kept == attributes.kept;
        }
        if silent {
            entry.flags.set(Flags::OMITTED);
        }
        let xattrs = self.memory.reservation().intern_xattrs(attributes.kept)?;
        if xattrs.is_some() {
            output.extras.push(Extra {
                xattrs,
                ..Extra::default()
            });
            entry.extra = 0;
        }
        output.entries.push(entry);
        Ok(output)
    }
}
