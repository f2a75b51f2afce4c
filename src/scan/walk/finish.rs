//! The scan out of the list: what equals the base and what only the runtime made needs no entry.

use std::collections::HashMap;
use std::sync::Arc;

use super::above;
use super::flat::Flat;
use super::links::{check_indexed, split_links};
use crate::overlay::root::Root;
use crate::scan::{Clock, Error, Flags, Kind, Report, Roots, Scan};

/// Takes out what needs no entry, and puts the scan together.
pub(in crate::scan) fn finish(
    mut flat: Flat,
    opened: Arc<Vec<Root>>,
    roots: &Roots,
    clock: Clock,
    mut report: Report,
) -> Result<Scan, Error> {
    check_indexed(&flat)?;
    report.split_links = split_links(&flat);
    prune(&mut flat);
    report.excluded.sort_by(|a, b| a.path.cmp(&b.path));
    report.sockets.sort();
    report.privileged.sort();
    report.vanished.sort();
    Ok(Scan {
        entries: flat.entries,
        names: flat.names,
        extras: flat.extras,
        roots: opened,
        lowers_known: roots.lowers_known,
        above: above(roots.volume.as_ref()),
        clock,
        report,
    })
}

/// Takes out what needs no entry: what equals the base, and what only the runtime made. The root stays.
fn prune(flat: &mut Flat) {
    let mut groups: HashMap<(u16, u64), Vec<u32>> = HashMap::new();
    for (index, entry) in flat.entries.iter().enumerate() {
        if entry.nlink > 1 && !matches!(entry.kind, Kind::Dir | Kind::Whiteout | Kind::Opaque) {
            groups
                .entry((entry.root, entry.ino))
                .or_default()
                .push(index as u32);
        }
    }
    // A group of hard links is left out as a whole or not at all: half of it would be another file.
    for group in groups.values() {
        let base = |&index: &u32| {
            let entry = &flat.entries[index as usize];
            let base = flat.extras.get(entry.extra as usize).and_then(|e| e.base);
            if entry.flags.has(Flags::UNCHANGED) {
                base
            } else {
                None
            }
        };
        let first = group.first().and_then(base);
        let whole = first.is_some()
            && group.iter().all(|index| base(index) == first)
            && group.len() as u32 == flat.entries[group[0] as usize].nlink;
        if !whole {
            for &index in group {
                flat.entries[index as usize].flags.clear(Flags::UNCHANGED);
            }
        }
    }
    let count = flat.entries.len();
    let mut dropped = vec![false; count];
    let mut inside = vec![false; count];
    let mut keep = vec![false; count];
    let mut real = false;
    // Children stand behind their parents: backwards, each parent is seen after all of its children.
    for index in (1..count).rev() {
        let entry = flat.entries[index];
        let parent = entry.parent as usize;
        if entry.flags.has(Flags::MOUNT_PARENT) && !inside[index] {
            flat.entries[parent].flags.set(Flags::STUBS);
            flat.entries[parent].flags.set(Flags::PARTIAL);
            dropped[index] = true;
            continue;
        }
        let stubs_only = entry.flags.has(Flags::TIME_ONLY) && entry.flags.has(Flags::STUBS);
        if inside[index] || !entry.flags.has(Flags::UNCHANGED) {
            keep[index] = true;
            inside[parent] = true;
            real |= !inside[index] && !stubs_only;
        }
    }
    real |= flat
        .entries
        .first()
        .is_some_and(|root| !root.flags.has(Flags::SILENT));
    let mut moved = vec![0u32; count];
    let mut to = 0;
    for from in 0..count {
        let mut entry = flat.entries[from];
        // What equals the base stays, silently: when it changes, that has to be told from what is new.
        dropped[from] |= from != 0 && dropped[entry.parent as usize];
        if dropped[from] {
            continue;
        }
        if from != 0 && !(keep[from] && real) {
            entry.flags.set(Flags::SILENT);
        }
        entry.parent = moved[entry.parent as usize];
        moved[from] = to as u32;
        flat.entries[to] = entry;
        to += 1;
    }
    flat.entries.truncate(to);
}
