//! Mount tables that a container cannot influence, and what they contain on its root.
//!
//! A container's first process belongs to its tenant, and everything in its mountinfo except the numbers is the
//! tenant's text: in a user namespace of its own, it can mount an overlay with arbitrary options and make that its
//! root. But the device number of the root comes from the kernel and is unique to one mounted file system. So the entry
//! that counts is the one for that device in a table of the node: that of the node's first process, or that of the
//! process that started the container and waits for it (containerd's shim, conmon), which is in the mount namespace in
//! which the runtime mounted the root.

use std::cell::OnceCell;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use super::error::Error;
use super::layer_check::{LayerCheck, OwnMounts};
use super::process::{self, Process};
use super::roots::Roots;
use super::table::{RootMount, Table, TableSource};
use crate::node::overlay::mount::{OverlayMount, OverlayOptions};
use crate::node::procfs::MountInfo;

/// The node's tables, read on first use.
#[derive(Debug, Default)]
pub(super) struct Tables {
    node: OnceCell<Option<Table>>,
    /// This program's own table.
    own: OnceCell<OwnMounts>,
}

impl Tables {
    fn node(&self, roots: &Roots) -> Option<&Table> {
        self.node.get_or_init(|| node(roots)).as_ref()
    }

    /// Calls `found` with the table that has the overlay that is the root of `process`, and its entry. Returns `None`
    /// if no table has it except that of the process itself.
    pub(super) fn find<T>(
        &self,
        roots: &Roots,
        process: &Process,
        device: (u32, u32),
        found: impl FnOnce(&Table, &MountInfo) -> T,
    ) -> Result<Option<T>, Error> {
        if let Some(table) = self.node(roots)
            && let Some(line) = table.overlay(device)
        {
            return Ok(Some(found(table, line)));
        }
        let monitor = monitor(roots, process)?;
        Ok(monitor.and_then(|table| table.overlay(device).map(|line| found(&table, line))))
    }

    fn own(&self) -> Result<&OwnMounts, Error> {
        if let Some(own) = self.own.get() {
            return Ok(own);
        }
        let own = OwnMounts::read()?;
        Ok(self.own.get_or_init(|| own))
    }

    /// Fails with [`Error::LayerUnproven`] unless the directories of an overlay are those in `table`.
    pub(super) fn prove_layers(
        &self,
        roots: &Roots,
        container: &str,
        process: &Process,
        table: &Table,
        overlay: &OverlayMount,
    ) -> Result<(), Error> {
        // A recording of /proc has the mounts of another machine.
        if process.root.is_none() {
            return Ok(());
        }
        let own = self.own()?;
        let proof = LayerCheck {
            roots,
            container,
            table,
            own,
        };
        proof.prove(overlay)
    }

    /// Like [`Tables::prove_layers`], for the overlay that is the root of `process` and by the table that has it. If
    /// only the process's own table has it, which may not show mounts outside its root, the node's table is used.
    pub(super) fn prove_layers_of(
        &self,
        roots: &Roots,
        container: &str,
        process: &Process,
        device: (u32, u32),
        overlay: &OverlayMount,
    ) -> Result<(), Error> {
        let prove = |table: &Table| self.prove_layers(roots, container, process, table, overlay);
        let proven = self.find(roots, process, device, |table, _| prove(table))?;
        match (proven, self.node(roots)) {
            (Some(proven), _) => proven,
            (None, Some(node)) => prove(node),
            // A process of the user, when the node's table is not readable for users.
            (None, None) => Ok(()),
        }
    }

    /// Like [`Tables::prove_layers`], for directories that are not mounted: this program has to see them as the node's
    /// first process does.
    pub(super) fn prove_layers_on_node(
        &self,
        roots: &Roots,
        container: &str,
        overlay: &OverlayMount,
    ) -> Result<(), Error> {
        // A recording of /proc has the mounts of another machine, and a user may not read the table.
        let (Some(table), Ok(Some(_))) = (self.node(roots), process::root_id(roots, 1)) else {
            return Ok(());
        };
        let proof = LayerCheck {
            roots,
            container,
            table,
            own: self.own()?,
        };
        proof.prove(overlay)
    }

    /// Returns a process whose root is a mount of the overlay with the upper directory `upper`.
    pub(super) fn user_of(&self, roots: &Roots, upper: &Path) -> Result<Option<u32>, Error> {
        // Where there are many layers, Podman mounts with paths relative to its store.
        let store = upper.parent().and_then(Path::parent).map(Path::to_path_buf);
        let own = process::mounts_of(roots, std::process::id())?;
        let node = self.node(roots).map(|table| table.mounts.as_slice());
        let overlays = node.unwrap_or_default().iter().chain(own.iter().flatten());
        for mount in overlays.filter(|mount| mount.fs_type == "overlay") {
            let locate = |path: &Path| roots.locate(path);
            let options = OverlayOptions::parse(&mount.super_options);
            let mounted = options
                .ok()
                .and_then(|o| o.locate_upper(store.as_slice(), &locate).ok());
            if mounted.as_deref() == Some(upper)
                && let Some(pid) = process::user_of_device(roots, mount.device)?
            {
                return Ok(Some(pid));
            }
        }
        Ok(None)
    }

    /// Returns whether the trusted table's entry for `root` is unchanged.
    pub(super) fn is_unchanged(
        &self,
        roots: &Roots,
        process: &Process,
        root: &RootMount,
    ) -> Result<bool, Error> {
        if root.source == TableSource::Own {
            return Ok(process
                .root()
                .is_some_and(|m| m.super_options == root.options));
        }
        let same = self.find(roots, process, root.device, |table, line| {
            table.source == root.source && line.super_options == root.options
        });
        Ok(same?.unwrap_or(false))
    }
}

/// Returns the mount table of the node's first process, which no container can change.
fn node(roots: &Roots) -> Option<Table> {
    let mounts = process::mounts_of(roots, 1).ok().flatten()?;
    Some(Table::new(TableSource::Node, true, mounts))
}

/// Returns the mount table of the process that started the container's first process: its parent, which a container
/// cannot choose. Returns `None` if that is in the same mount namespace, where the container controls the table.
fn monitor(roots: &Roots, process: &Process) -> Result<Option<Table>, Error> {
    let pid = process.parent;
    if pid == 0 || pid == 1 {
        return Ok(None);
    }
    let Some(start) = process::start_of(roots, pid)? else {
        return Ok(None);
    };
    let namespace = |pid: &str, kind: &str| namespace(roots, pid, kind);
    let (own, parent) = (process.pid.to_string(), pid.to_string());
    let (Some(theirs), Some(containers)) = (namespace(&parent, "mnt"), namespace(&own, "mnt"))
    else {
        return Ok(None);
    };
    if theirs == containers {
        return Ok(None);
    }
    let users = namespace(&parent, "user");
    let privileged = users.is_some() && users == namespace("self", "user");
    let Some(mounts) = process::mounts_of(roots, pid)? else {
        return Ok(None);
    };
    // Neither PID may have been reused meanwhile.
    if process::start_of(roots, pid)? != Some(start)
        || process::start_of(roots, process.pid)? != Some(process.start)
    {
        return Ok(None);
    }
    let source = TableSource::Monitor { pid, start };
    Ok(Some(Table::new(source, privileged, mounts)))
}

fn namespace(roots: &Roots, pid: &str, kind: &str) -> Option<OsString> {
    fs::read_link(roots.proc(&format!("{pid}/ns/{kind}")))
        .ok()
        .map(PathBuf::into_os_string)
}
