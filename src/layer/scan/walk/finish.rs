//! Turns the list of entries into the scan: leaves out entries that equal the base and those that only the runtime
//! created.

use std::collections::HashMap;
use std::sync::Arc;

use super::above;
use super::links::{check_indexed, split_links};
use crate::common::escape;
use crate::layer::scan::rows::Rows;
use crate::layer::scan::{Clock, Error, Extra, Flags, Kind, Report, Roots, Sample, Scan};
use crate::node::overlay::root::Root;

/// Removes the entries that are not needed and assembles the scan.
///
/// Fails if the scan cannot be represented in a layer.
pub(in crate::layer::scan) fn finish(
    mut rows: Rows,
    opened: Arc<Vec<Root>>,
    roots: &Roots,
    clock: Clock,
    mut report: Report,
) -> Result<Scan, Error> {
    check_indexed(&rows)?;
    report.split_links = split_links(&rows);
    report.privileged = paths_with(&rows, |extra| extra.privileged);
    report.empty_xattrs = paths_with(&rows, |extra| {
        extra.xattrs().iter().any(|(_, value)| value.is_empty())
    });
    prune(&mut rows);
    Ok(Scan {
        rows,
        roots: opened,
        lowers_known: roots.lowers_known,
        above: above(roots.volume.as_ref()),
        clock,
        report,
    })
}

/// Returns the paths of entries whose extra satisfies `holds`, including those taken over from an earlier scan.
fn paths_with(rows: &Rows, holds: impl Fn(&Extra) -> bool) -> Sample<String> {
    let mut found = Sample::default();
    if !rows.extras().any(&holds) {
        return found;
    }
    let mut path = Vec::new();
    for (index, entry) in (0..).zip(rows.iter()) {
        if rows.extra(&entry).is_some_and(&holds) {
            rows.path_into(index, &mut path);
            found.add(escape::path(&path));
        }
    }
    found
}

/// Removes the entries that equal the base or were created only by the runtime. The root stays.
fn prune(rows: &mut Rows) {
    let mut groups: HashMap<(u16, u64), Vec<u32>> = HashMap::new();
    for (index, entry) in (0..).zip(rows.iter()) {
        if entry.nlink > 1 && !matches!(entry.kind, Kind::Dir | Kind::Whiteout | Kind::Opaque) {
            groups
                .entry((entry.root, entry.ino))
                .or_default()
                .push(index);
        }
    }
    // A hard link group is left out as a whole or not at all: a part of it would be another file.
    for group in groups.values() {
        let base = |&index: &u32| {
            let entry = rows.entry(index);
            if entry.flags.has(Flags::UNCHANGED) {
                rows.extra(&entry).and_then(|e| e.base)
            } else {
                None
            }
        };
        let first = group.first().and_then(base);
        let whole = first.is_some()
            && group.iter().all(|index| base(index) == first)
            && group.len() as u32 == rows.entry(group[0]).nlink;
        if !whole {
            for &index in group {
                rows.flags_mut(index).clear(Flags::UNCHANGED);
            }
        }
    }
    let count = rows.len();
    let mut dropped = vec![false; count];
    let mut inside = vec![false; count];
    let mut keep = vec![false; count];
    let mut real = false;
    // Children follow their parents: backwards, each parent comes after all of its children.
    for index in (1..count).rev() {
        let flags = rows.flags(index as u32);
        let parent = rows.parent(index as u32);
        if flags.has(Flags::MOUNT_PARENT) && !inside[index] {
            rows.flags_mut(parent).set(Flags::STUBS);
            rows.flags_mut(parent).set(Flags::PARTIAL);
            dropped[index] = true;
            continue;
        }
        let stubs_only = flags.has(Flags::TIME_ONLY) && flags.has(Flags::STUBS);
        if inside[index] || !flags.has(Flags::UNCHANGED) {
            keep[index] = true;
            inside[parent as usize] = true;
            real |= !inside[index] && !stubs_only;
        }
    }
    real |= count > 0 && !rows.flags(0).has(Flags::OMITTED);
    for index in 1..count {
        // An entry equal to the base stays as a silent one: if it changes later, that must be distinguished from a new
        // entry.
        dropped[index] |= dropped[rows.parent(index as u32) as usize];
        if !(keep[index] && real) {
            rows.flags_mut(index as u32).set(Flags::OMITTED);
        }
    }
    rows.drop_rows(&dropped);
}
