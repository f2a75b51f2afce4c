//! Combines the entries of all directories into one list in the order of the layer.

use super::Task;
use crate::layer::scan::rows::{FactBuffer, Rows};
use crate::layer::scan::{Entry, Extra, Flags, Kind};

/// Result of walking one directory, while the walk of it lasts.
#[derive(Default)]
pub(in crate::layer::scan) struct Output {
    pub(super) id: u32,
    pub(in crate::layer::scan) entries: Vec<Entry>,
    pub(super) names: Vec<u8>,
    pub(super) extras: Vec<Extra>,
    /// Index (in this output) of each unchanged entry, and its index in the earlier scan.
    pub(super) kept: Vec<(u32, u32)>,
    /// Whether an entry made by the runtime was left out here.
    pub(super) stubs: bool,
    /// Whether the directory contains more than these entries.
    pub(super) partial: bool,
    /// Whether the directory was read in more than one piece, so that a name may occur twice.
    pub(super) in_pieces: bool,
}

/// Result of walking one directory, in compact form: its new entries are in a buffer, in the same representation as in
/// the scan.
pub(in crate::layer::scan) struct WalkedDirectory {
    pub(in crate::layer::scan) id: u32,
    /// Number of the buffer, and index of the first new entry there.
    buffer: u32,
    first: u32,
    /// By entry.
    flags: Box<[Flags]>,
    /// Like [`Output::kept`], sorted.
    kept: Box<[(u32, u32)]>,
    /// Index of each walked subdirectory and the number of its output, sorted.
    children: Box<[(u32, u32)]>,
    stubs: bool,
    partial: bool,
}

impl Output {
    fn name(&self, entry: &Entry) -> &[u8] {
        let at = entry.name_at as usize;
        &self.names[at..at + usize::from(entry.name_len)]
    }

    /// Moves the new entries to a buffer. Returns the index of the first.
    fn move_to_buffer(&mut self, buffer: &mut FactBuffer) -> u32 {
        let first = buffer.len();
        let mut kept = self.kept.iter().map(|&(at, _)| at).peekable();
        for (at, entry) in (0..).zip(&self.entries) {
            if kept.next_if_eq(&at).is_some() {
                continue;
            }
            let extra = self.extras.get_mut(entry.extra as usize);
            let extra = extra.map(std::mem::take);
            let begin = entry.name_at as usize;
            let name = &self.names[begin..begin + usize::from(entry.name_len)];
            buffer.push(entry, name, extra);
        }
        first
    }

    /// Converts to the compact form; the numbers of the subdirectories' outputs have yet to be filled in. `number` is
    /// that of the buffer.
    pub(super) fn finish(
        mut self,
        number: u32,
        buffer: &mut FactBuffer,
        tasks: &[(u32, Task)],
    ) -> WalkedDirectory {
        WalkedDirectory {
            id: self.id,
            buffer: number,
            first: self.move_to_buffer(buffer),
            flags: self.entries.iter().map(|entry| entry.flags).collect(),
            kept: self.kept.into_boxed_slice(),
            children: tasks.iter().map(|&(entry, _)| (entry, 0)).collect(),
            stubs: self.stubs,
            partial: self.partial,
        }
    }
}

impl WalkedDirectory {
    /// Sets the numbers of the subdirectories' outputs, in their order.
    pub(super) fn number(&mut self, ids: impl Iterator<Item = u32>) {
        for (child, id) in self.children.iter_mut().zip(ids) {
            child.1 = id;
        }
    }

    /// Sets the flags of a directory's entry that result from walking it.
    pub(in crate::layer::scan) fn mark(&self, directory: &mut Flags) {
        for (is, flag) in [(self.stubs, Flags::STUBS), (self.partial, Flags::PARTIAL)] {
            if is {
                directory.set(flag);
            } else {
                directory.clear(flag);
            }
        }
    }

    /// Returns the number of entries.
    pub(in crate::layer::scan) fn len(&self) -> usize {
        self.flags.len()
    }
}

/// An entry of a walked directory.
pub(in crate::layer::scan) struct WalkedEntry {
    pub(in crate::layer::scan) flags: Flags,
    pub(in crate::layer::scan) from: EntrySource,
    /// The output of the subdirectory, if it was walked.
    pub(in crate::layer::scan) child: Option<u32>,
}

/// Where an entry is stored.
pub(in crate::layer::scan) enum EntrySource {
    /// Number of its buffer, and its index there.
    Buffer(u32, u32),
    /// Its index in the earlier scan.
    Earlier(u32),
}

/// Iterates over the entries of a walked directory.
pub(in crate::layer::scan) struct Cursor {
    walked: WalkedDirectory,
    at: u32,
    /// Number of kept entries and of children that were passed.
    kept: usize,
    children: usize,
}

impl Cursor {
    pub(in crate::layer::scan) fn new(walked: WalkedDirectory) -> Self {
        Self {
            walked,
            at: 0,
            kept: 0,
            children: 0,
        }
    }
}

impl Iterator for Cursor {
    type Item = WalkedEntry;

    fn next(&mut self) -> Option<WalkedEntry> {
        let WalkedDirectory {
            buffer,
            first,
            flags,
            kept,
            children,
            ..
        } = &self.walked;
        let flags = *flags.get(self.at as usize)?;
        let from = match kept.get(self.kept) {
            Some(&(at, index)) if at == self.at => {
                self.kept += 1;
                EntrySource::Earlier(index)
            }
            _ => EntrySource::Buffer(*buffer, first + self.at - self.kept as u32),
        };
        let child = match children.get(self.children) {
            Some(&(at, id)) if at == self.at => {
                self.children += 1;
                Some(id)
            }
            _ => None,
        };
        self.at += 1;
        Some(WalkedEntry { flags, from, child })
    }
}

/// Sorts a directory's entries into the order of the layer.
pub(super) fn sorted(mut output: Output, tasks: Vec<(u32, Task)>) -> (Output, Vec<(u32, Task)>) {
    let mut order: Vec<u32> = (0..output.entries.len() as u32).collect();
    if output.in_pieces {
        keep_last_occurrence(&output, &mut order);
    }
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
    let mut place = vec![DROPPED; output.entries.len()];
    for (new, &old) in order.iter().enumerate() {
        place[old as usize] = new as u32;
    }
    output.entries = order
        .iter()
        .map(|&old| output.entries[old as usize])
        .collect();
    for (entry, _) in &mut output.kept {
        *entry = place[*entry as usize];
    }
    output.kept.retain(|&(entry, _)| entry != DROPPED);
    output.kept.sort_unstable();
    let tasks = tasks.into_iter();
    let mut tasks: Vec<_> = tasks
        .map(|(old, task)| (place[old as usize], task))
        .filter(|&(entry, _)| entry != DROPPED)
        .collect();
    tasks.sort_unstable_by_key(|(entry, _)| *entry);
    (output, tasks)
}

/// Index of an entry that is dropped.
const DROPPED: u32 = u32::MAX;

/// Keeps, of names that occur twice, the one read last; `order` holds the entries in the order of reading.
fn keep_last_occurrence(output: &Output, order: &mut Vec<u32>) {
    let name = |at: u32| output.name(&output.entries[at as usize]);
    // The marker of an opaque directory has no name.
    order.sort_unstable_by(|&a, &b| name(a).cmp(name(b)).then(b.cmp(&a)));
    order.dedup_by(|later, kept| name(*later) == name(*kept));
}

/// Adds a chain of entries, each the parent of the next. Returns the index of the last.
pub(in crate::layer::scan) fn append_chain(rows: &mut Rows, mut chain: Output) -> u32 {
    let mut buffer = FactBuffer::default();
    chain.move_to_buffer(&mut buffer);
    let first = rows.add(buffer);
    let mut parent = 0;
    for (at, entry) in (0..).zip(&chain.entries) {
        parent = rows.push(parent, entry.flags, first + at);
    }
    parent
}

/// Returns the outputs indexed by their numbers.
pub(in crate::layer::scan) fn by_id(
    outputs: Vec<WalkedDirectory>,
    count: u32,
) -> Vec<Option<WalkedDirectory>> {
    let mut by_id = Vec::new();
    by_id.resize_with(count as usize, || None);
    for output in outputs {
        let id = output.id as usize;
        by_id[id] = Some(output);
    }
    by_id
}

/// Combines all outputs into rows: parents first, each directory's content immediately after it.
pub(super) fn flatten(top: Output, walk: super::Walk) -> Rows {
    let mut rows = Rows::default();
    rows.reserve(top.entries.len() + walk.outputs.iter().map(WalkedDirectory::len).sum::<usize>());
    let begin = append_chain(&mut rows, top);
    let buffers: Vec<u32> = walk.buffers.into_iter().map(|s| rows.add(s)).collect();
    let mut by_id = by_id(walk.outputs, walk.count);
    let mut open: Vec<(Cursor, u32)> = Vec::new();
    let mut enter = |rows: &mut Rows, id: u32, index: u32| {
        let walked = by_id[id as usize].take()?;
        walked.mark(rows.flags_mut(index));
        Some((Cursor::new(walked), index))
    };
    open.extend(enter(&mut rows, 0, begin));
    while let Some((cursor, parent)) = open.last_mut() {
        let Some(WalkedEntry { flags, from, child }) = cursor.next() else {
            open.pop();
            continue;
        };
        // Without an earlier scan there are no kept entries.
        let EntrySource::Buffer(buffer, number) = from else {
            continue;
        };
        let index = rows.push(*parent, flags, buffers[buffer as usize] + number);
        if let Some(id) = child {
            open.extend(enter(&mut rows, id, index));
        }
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_came_twice_is_there_once_as_it_was_looked_at_last() {
        let mut output = Output {
            in_pieces: true,
            ..Output::default()
        };
        for (ino, name, kind) in [
            (1, "b", Kind::Dir),
            (2, "a", Kind::File),
            (3, "b", Kind::Dir),
            (4, "c", Kind::File),
            (0, "a", Kind::Whiteout),
        ] {
            output.entries.push(Entry {
                kind,
                ino,
                name_at: output.names.len() as u32,
                name_len: 1,
                ..Entry::default()
            });
            output.names.extend(name.as_bytes());
        }
        output.kept = vec![(1, 7), (3, 9)];
        let task = || Task {
            id: 0,
            depth: 0,
            path: Vec::new(),
            earlier: None,
            upper: true,
            merge: Vec::new(),
            base: Vec::new(),
            full: false,
            hidden: false,
            opaque: false,
        };
        let (output, tasks) = sorted(output, vec![(0, task()), (2, task())]);
        let left: Vec<(&[u8], u64)> = output
            .entries
            .iter()
            .map(|entry| (output.name(entry), entry.ino))
            .collect();
        assert_eq!(left, [(&b"a"[..], 0), (b"b", 3), (b"c", 4)]);
        assert_eq!(output.kept, [(2, 9)]);
        let tasks: Vec<u32> = tasks.iter().map(|(entry, _)| *entry).collect();
        assert_eq!(tasks, [1]);
    }
}
