//! The directories' entries, put into one list in the order of the layer.

use std::collections::{HashMap, HashSet};

use super::Task;
use super::entry::{CAPABILITY, NO_EXTRA, SET_ID};
use crate::escape;
use crate::scan::{Entry, Extra, Flags, Kind, Scan};

/// What walking one directory gave.
#[derive(Default)]
pub(in crate::scan) struct Output {
    pub(in crate::scan) id: u32,
    pub(in crate::scan) entries: Vec<Entry>,
    pub(super) names: Vec<u8>,
    pub(super) extras: Vec<Extra>,
    /// Entry index (in this output) of each subdirectory, and its output.
    pub(in crate::scan) children: HashMap<u32, u32>,
    /// Entry index of each subdirectory that was not walked, and the earlier scan's directory that it equals.
    pub(in crate::scan) kept: HashMap<u32, u32>,
    /// Something was left out here that the runtime had made.
    pub(in crate::scan) stubs: bool,
    /// The entries are not all that is here.
    pub(in crate::scan) partial: bool,
}

impl Output {
    /// Notes on a directory's entry what walking it told.
    pub(in crate::scan) fn mark(&self, directory: &mut Entry) {
        for (is, flag) in [(self.stubs, Flags::STUBS), (self.partial, Flags::PARTIAL)] {
            if is {
                directory.flags.set(flag);
            } else {
                directory.flags.clear(flag);
            }
        }
    }

    pub(super) fn name(&self, entry: &Entry) -> &[u8] {
        let at = entry.name_at as usize;
        &self.names[at..at + usize::from(entry.name_len)]
    }
}

/// Puts a directory's entries into the order of the layer.
pub(super) fn sorted(mut output: Output, tasks: Vec<(u32, Task)>) -> (Output, Vec<(u32, Task)>) {
    let mut order: Vec<u32> = (0..output.entries.len() as u32).collect();
    order.sort_unstable_by(|&a, &b| {
        let (a, b) = (&output.entries[a as usize], &output.entries[b as usize]);
        let rank = |entry: &Entry| match entry.kind {
            Kind::Opaque => 0,
            Kind::Whiteout => 1,
            _ => 2,
        };
        rank(a)
            .cmp(&rank(b))
            .then_with(|| output.name(a).cmp(output.name(b)))
    });
    let mut place = vec![0u32; order.len()];
    for (new, &old) in order.iter().enumerate() {
        place[old as usize] = new as u32;
    }
    output.entries = order
        .iter()
        .map(|&old| output.entries[old as usize])
        .collect();
    output.kept = std::mem::take(&mut output.kept)
        .into_iter()
        .map(|(old, earlier)| (place[old as usize], earlier))
        .collect();
    (
        output,
        tasks
            .into_iter()
            .map(|(old, task)| (place[old as usize], task))
            .collect(),
    )
}

/// All entries in one list.
#[derive(Default)]
pub(in crate::scan) struct Flat {
    pub(in crate::scan) entries: Vec<Entry>,
    pub(super) names: Vec<u8>,
    pub(super) extras: Vec<Extra>,
}

impl Flat {
    /// As [`Flat::append`], from an earlier scan.
    pub(in crate::scan) fn take_over(&mut self, scan: &Scan, index: u32, parent: u32) -> u32 {
        let mut entry = scan.entries()[index as usize];
        entry.flags.clear(Flags::SILENT);
        entry.flags.clear(Flags::STUBS);
        entry.parent = parent;
        entry.name_at = self.names.len() as u32;
        self.names
            .extend(scan.name(&scan.entries()[index as usize]));
        if let Some(extra) = scan.extra(&entry) {
            self.extras.push(extra.clone());
            entry.extra = self.extras.len() as u32 - 1;
        }
        self.entries.push(entry);
        self.entries.len() as u32 - 1
    }

    /// Printable paths of the files that may give whoever runs them somebody else's rights.
    pub(in crate::scan) fn set_ids(&self) -> HashSet<String> {
        let capable = |entry: &Entry| {
            let extra = self.extras.get(entry.extra as usize);
            extra.is_some_and(|extra| extra.xattrs.iter().any(|(name, _)| name == CAPABILITY))
        };
        let mut path = Vec::new();
        let entries = self.entries.iter().enumerate();
        entries
            .filter(|(_, e)| e.kind == Kind::File && (e.mode & SET_ID != 0 || capable(e)))
            .map(|(index, _)| {
                crate::scan::path_of(&self.entries, &self.names, index as u32, &mut path);
                escape::path(&path)
            })
            .collect()
    }

    /// Adds entries each of which is in the one before. The index of the last.
    pub(in crate::scan) fn append_chain(&mut self, chain: &mut Output) -> u32 {
        let mut parent = 0;
        for at in 0..chain.entries.len() {
            let entry = chain.entries[at];
            parent = self.append(entry, parent, chain);
        }
        parent
    }

    pub(in crate::scan) fn append(
        &mut self,
        mut entry: Entry,
        parent: u32,
        output: &mut Output,
    ) -> u32 {
        entry.parent = parent;
        let name_at = self.names.len() as u32;
        self.names.extend(output.name(&entry));
        entry.name_at = name_at;
        if entry.extra != NO_EXTRA {
            self.extras
                .push(std::mem::take(&mut output.extras[entry.extra as usize]));
            entry.extra = self.extras.len() as u32 - 1;
        }
        self.entries.push(entry);
        self.entries.len() as u32 - 1
    }
}

/// Parents first, each directory's content right after it.
pub(super) fn flatten(mut top: Output, outputs: Vec<Output>, count: u32) -> Flat {
    let mut by_id: Vec<Option<Output>> = Vec::new();
    by_id.resize_with(count as usize, || None);
    let mut flat = Flat::default();
    flat.entries
        .reserve_exact(1 + outputs.iter().map(|o| o.entries.len()).sum::<usize>());
    flat.names
        .reserve_exact(outputs.iter().map(|o| o.names.len()).sum());
    for output in outputs {
        let id = output.id as usize;
        by_id[id] = Some(output);
    }
    let begin = flat.append_chain(&mut top);
    let mut open: Vec<(Output, usize, u32)> = Vec::new();
    let mut enter = |flat: &mut Flat, open: &mut Vec<(Output, usize, u32)>, id: u32, index: u32| {
        if let Some(output) = by_id[id as usize].take() {
            output.mark(&mut flat.entries[index as usize]);
            open.push((output, 0, index));
        }
    };
    enter(&mut flat, &mut open, 0, begin);
    while let Some((output, next, parent)) = open.last_mut() {
        let Some(&entry) = output.entries.get(*next) else {
            open.pop();
            continue;
        };
        let child = output.children.get(&(*next as u32)).copied();
        *next += 1;
        let index = flat.append(entry, *parent, output);
        if let Some(id) = child {
            enter(&mut flat, &mut open, id, index);
        }
    }
    flat
}
