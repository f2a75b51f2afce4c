//! The mount tables that a container cannot write, and what they say of its root.
//!
//! A container's first process is its tenant's, and everything in its mountinfo but the numbers is its tenant's text: in a
//! user namespace of its own it can mount an overlay of whatever names it likes and make that its root. The device number
//! of the root is the kernel's word, and belongs to one mounted file system only. So the line that counts is the one that
//! a table of the node's has for that device: the table of the node's first process, or of the process that started the
//! container and waits for it (containerd's shim, conmon), which stands in the mount namespace in which the runtime
//! mounted the root.

use std::cell::OnceCell;
use std::ffi::OsString;
use std::fs;
use std::path::PathBuf;

use super::error::Error;
use super::placed::{Own, Proof};
use super::process::{self, Process};
use super::roots::Roots;
use super::table::{RootMount, Table, Witness};
use crate::node::overlay::mount::{MountInfo, OverlayMount};

/// The node's tables, read when first needed.
#[derive(Debug, Default)]
pub(super) struct Tables {
    node: OnceCell<Option<Table>>,
    /// This program's own.
    own: OnceCell<Own>,
}

impl Tables {
    fn node(&self, roots: &Roots) -> Option<&Table> {
        self.node.get_or_init(|| node(roots)).as_ref()
    }

    /// The table that has the overlay that is the root of `process`, and hands it to `found` with its line; none if no
    /// table but that of the process has it.
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

    fn own(&self) -> Result<&Own, Error> {
        if let Some(own) = self.own.get() {
            return Ok(own);
        }
        let own = Own::read()?;
        Ok(self.own.get_or_init(|| own))
    }

    /// Fails with [`Error::LayerUnproven`] unless the directories of an overlay are those that `table` has.
    pub(super) fn prove_layers(
        &self,
        roots: &Roots,
        container: &str,
        process: &Process,
        table: &Table,
        overlay: &OverlayMount,
    ) -> Result<(), Error> {
        // A recording of a /proc: its mounts are another machine's.
        if process.root.is_none() {
            return Ok(());
        }
        let own = self.own()?;
        let proof = Proof {
            roots,
            container,
            table,
            own,
        };
        proof.prove(overlay)
    }

    /// The same for the overlay that is the root of `process`, by the table that has it; where that is the process' own
    /// alone, which need not show what lies outside of its root, by the node's.
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
            // A user's own process, where the node's table is not for users to read.
            (None, None) => Ok(()),
        }
    }

    /// Whether the witness of `root` still says the same.
    pub(super) fn still(
        &self,
        roots: &Roots,
        process: &Process,
        root: &RootMount,
    ) -> Result<bool, Error> {
        if root.witness == Witness::Itself {
            return Ok(process
                .root()
                .is_some_and(|m| m.super_options == root.options));
        }
        let same = self.find(roots, process, root.device, |table, line| {
            table.witness == root.witness && line.super_options == root.options
        });
        Ok(same?.unwrap_or(false))
    }
}

/// The table of the node's first process, which no container can change.
fn node(roots: &Roots) -> Option<Table> {
    let mounts = process::mounts_of(roots, 1).ok().flatten()?;
    Some(Table::new(Witness::Node, true, mounts))
}

/// The table of the process that started the container's first one: its parent, which a container cannot choose. None if
/// that is in the same mount namespace, where the container's own words would stand.
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
    // Neither process may have passed its number on meanwhile.
    if process::start_of(roots, pid)? != Some(start)
        || process::start_of(roots, process.pid)? != Some(process.start)
    {
        return Ok(None);
    }
    let witness = Witness::Monitor { pid, start };
    Ok(Some(Table::new(witness, privileged, mounts)))
}

fn namespace(roots: &Roots, pid: &str, kind: &str) -> Option<OsString> {
    fs::read_link(roots.proc(&format!("{pid}/ns/{kind}")))
        .ok()
        .map(PathBuf::into_os_string)
}
