//! The layers from the top down to one, as far as they concern a path.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::io::{self, Read};

use super::spool::Spool;
use super::{ExtractError, LayerRead, Member, is_below, relative};
use crate::image::verify::archive::{Archive, ArchiveError, Entry, EntryKind, decompress};
use crate::image::verify::paths::{join, normalise, split};
use crate::image::verify::tree::{Kind, Node};

/// Maximum memory for the names of one search, in bytes: ten million entries of an ordinary image.
const NAMES: u64 = 2 << 30;
/// Estimated memory of a name in addition to its bytes.
const NAME: u64 = 128;

/// What a layer decides.
pub(super) enum Step {
    /// Everything: no lower layer has more.
    Done,
    /// Lower layers may have more.
    Below,
    /// A part of the path is a symbolic link.
    Through {
        /// Path of the link.
        link: Vec<u8>,
        /// Its target.
        leads_to: Vec<u8>,
    },
    /// A part of the path is a file.
    NoDirectory,
    /// Entries may be elsewhere than their names say.
    Unclear,
}

/// Opens the layer that is searched.
type Open<'o> = &'o mut dyn FnMut() -> LayerRead;

pub(super) struct Search<'a> {
    target: &'a [u8],
    /// With the number of its layer, counted from 1 at the top.
    found: BTreeMap<Vec<u8>, (usize, Member)>,
    /// Directories above the target.
    above: BTreeSet<Vec<u8>>,
    /// Paths that lower layers no longer have, with everything below.
    closed: BTreeSet<Vec<u8>>,
    /// Directories of which lower layers have nothing.
    opaque: BTreeSet<Vec<u8>>,
    layer: usize,
    inode: u64,
    charged: u64,
}

/// What a layer has had so far.
#[derive(Default)]
struct Seen {
    dirs: HashSet<Vec<u8>>,
    /// Symbolic links, and other paths that are no directories above the target.
    others: BTreeSet<Vec<u8>>,
    closed: BTreeSet<Vec<u8>>,
    opaque: BTreeSet<Vec<u8>>,
    /// Hard links to what is not looked for: their names by that of their file, and the number of the first.
    links: HashMap<Vec<u8>, (u64, Vec<Vec<u8>>)>,
    entries: u64,
    through: Option<Step>,
}

impl<'a> Search<'a> {
    pub(super) fn new(target: &'a [u8]) -> Self {
        Self {
            target,
            found: BTreeMap::new(),
            above: BTreeSet::new(),
            closed: BTreeSet::new(),
            opaque: BTreeSet::new(),
            layer: 0,
            inode: 0,
            charged: 0,
        }
    }

    /// Reads the next lower layer; twice, if it has hard links to files elsewhere in it.
    pub(super) fn layer(
        &mut self,
        open: Open<'_>,
        bottom: bool,
        spool: &mut Spool,
        layers_read: &mut usize,
    ) -> Result<Step, ExtractError> {
        self.layer += 1;
        let mut seen = Seen::default();
        *layers_read += 1;
        let certain = each(open, |entry, archive| {
            seen.entries += 1;
            self.entry(entry, bottom, archive, &mut seen, spool)
        })?;
        if !certain {
            return Ok(Step::Unclear);
        }
        if !seen.links.is_empty() {
            *layers_read += 1;
            if !self.links(open, &seen, spool)? {
                return Ok(Step::Unclear);
            }
        }
        self.closed.append(&mut seen.closed);
        self.opaque.append(&mut seen.opaque);
        if let Some(step) = seen.through {
            return Ok(step);
        }
        let is_whole = self.found.get(self.target).is_some_and(|(_, member)| {
            member.node.kind != Kind::Directory || self.opaque.contains(self.target)
        });
        Ok(if is_whole || self.is_hidden(self.target) {
            Step::Done
        } else {
            Step::Below
        })
    }

    /// Takes an entry. Returns whether it is certain where it is.
    fn entry<R: Read>(
        &mut self,
        entry: &Entry,
        bottom: bool,
        archive: &mut Archive<R>,
        seen: &mut Seen,
        spool: &mut Spool,
    ) -> Result<bool, ExtractError> {
        let name =
            normalise(&entry.name).map_err(|reason| ArchiveError::entry(&entry.name, reason))?;
        self.charged += NAME + name.len() as u64 + entry.link.len() as u64;
        if self.charged > NAMES {
            return Err(ExtractError::TooMany(NAMES));
        }
        if name.starts_with(b".wh..wh.") && name != b".wh..wh..opq" {
            // An entry of aufs itself. A hard link to it is to something that is not found, and thus unclear.
            return Ok(true);
        }
        let (parent, base) = split(&name);
        if !parent.is_empty() && !seen.dirs.contains(parent) {
            let redirected = seen.others.iter().any(|other| is_below(&name, other));
            if !bottom || redirected || is_below(&name, self.target) {
                return Ok(false);
            }
            let mut at = parent;
            while !at.is_empty() && seen.dirs.insert(at.to_vec()) {
                at = split(at).0;
            }
        }
        if let Some(hidden) = base.strip_prefix(b".wh.") {
            match hidden {
                b".wh..opq" => drop(seen.opaque.insert(parent.to_vec())),
                b"" | b"." | b".." => {
                    return Err(ArchiveError::entry(&entry.name, "a whiteout of nothing").into());
                }
                _ if hidden.starts_with(b".wh.") => {}
                _ => drop(seen.closed.insert(join(parent, hidden))),
            }
            return Ok(true);
        }
        let is_dir = entry.kind == EntryKind::Directory;
        if name.is_empty() && !is_dir {
            return Err(ArchiveError::entry(&entry.name, "the root must be a directory").into());
        }
        let again = if is_dir {
            seen.dirs.insert(name.clone());
            seen.others.contains(&name)
        } else {
            if entry.kind == EntryKind::Symlink || is_below(self.target, &name) {
                seen.others.insert(name.clone());
            }
            seen.dirs.contains(&name)
        };
        // A path that changes its type within one layer.
        if again {
            return Ok(false);
        }
        if name != self.target && is_below(self.target, &name) {
            // A link to its own name changes nothing, whatever is there.
            if entry.kind == EntryKind::Hardlink {
                return Ok(false);
            }
            self.parent_of_target(name, entry, seen);
            return Ok(true);
        }
        if !is_below(&name, self.target) || self.is_hidden(&name) {
            return Ok(true);
        }
        self.take(name, entry, archive, seen, spool)
    }

    /// Takes an entry above the target.
    fn parent_of_target(&mut self, name: Vec<u8>, entry: &Entry, seen: &mut Seen) {
        if self.is_hidden(&name) {
            return;
        }
        if entry.kind == EntryKind::Directory {
            self.above.insert(name);
            return;
        }
        seen.closed.insert(name.clone());
        if !self.above.contains(&name) {
            seen.through = Some(if entry.kind == EntryKind::Symlink {
                Step::Through {
                    link: name,
                    leads_to: entry.link.clone(),
                }
            } else {
                Step::NoDirectory
            });
        }
    }

    /// Takes an entry that is the target or below it.
    fn take<R: Read>(
        &mut self,
        name: Vec<u8>,
        entry: &Entry,
        archive: &mut Archive<R>,
        seen: &mut Seen,
        spool: &mut Spool,
    ) -> Result<bool, ExtractError> {
        let is_dir = entry.kind == EntryKind::Directory;
        if !is_dir {
            // Whatever lower layers have below it.
            seen.closed.insert(name.clone());
        }
        if let Some((layer, old)) = self.found.get(&name) {
            if *layer < self.layer {
                return Ok(true);
            }
            if !is_dir || old.node.kind != Kind::Directory {
                return Ok(false);
            }
        }
        if entry.kind != EntryKind::Hardlink {
            self.inode += 1;
            let mut member = Member {
                node: Node::of_entry(entry, self.inode),
                at: spool.end,
            };
            if entry.kind == EntryKind::File {
                member.node.content = Some(spool.take(entry.size, archive)?);
            }
            self.found.insert(name, (self.layer, member));
            return Ok(true);
        }
        let link =
            normalise(&entry.link).map_err(|reason| ArchiveError::entry(&entry.name, reason))?;
        match self.found.get(&link) {
            Some((layer, member)) if *layer == self.layer && link != name => {
                let member = member.clone();
                self.found.insert(name, (self.layer, member));
                Ok(true)
            }
            None if !is_below(&link, self.target) => {
                // Its place is taken, so that a second entry of this name is noticed.
                self.inode += 1;
                let node = Node::of_entry(entry, self.inode);
                self.found
                    .insert(name.clone(), (self.layer, Member { node, at: 0 }));
                let first = (seen.entries, Vec::new());
                seen.links.entry(link).or_insert(first).1.push(name);
                Ok(true)
            }
            _ => Ok(false),
        }
    }

    /// Reads the layer again for the files that hard links lead to. Returns whether each was found once, before its
    /// links.
    fn links(
        &mut self,
        open: Open<'_>,
        seen: &Seen,
        spool: &mut Spool,
    ) -> Result<bool, ExtractError> {
        let (mut number, mut done) = (0, HashSet::new());
        let certain = each(open, |entry, archive| {
            number += 1;
            let Ok(name) = normalise(&entry.name) else {
                return Ok(false);
            };
            let Some((first, names)) = seen.links.get(&name) else {
                return Ok(true);
            };
            let parent = split(&name).0;
            let is_clear = entry.kind == EntryKind::File
                && number < *first
                && (parent.is_empty() || seen.dirs.contains(parent))
                && !seen.others.contains(parent);
            if !is_clear || !done.insert(name) {
                return Ok(false);
            }
            self.inode += 1;
            let at = spool.end;
            let mut node = Node::of_entry(entry, self.inode);
            node.content = Some(spool.take(entry.size, archive)?);
            for name in names {
                let node = node.clone();
                self.found
                    .insert(name.clone(), (self.layer, Member { node, at }));
            }
            Ok(true)
        })?;
        Ok(certain && done.len() == seen.links.len())
    }

    /// Returns whether upper layers hide what lower layers have at a path.
    fn is_hidden(&self, path: &[u8]) -> bool {
        if self.closed.contains(path) {
            return true;
        }
        let mut at = path;
        while !at.is_empty() {
            at = split(at).0;
            if self.closed.contains(at) || self.opaque.contains(at) {
                return true;
            }
        }
        false
    }

    /// Returns what was found, by paths relative to the target. The root is there in any case.
    pub(super) fn members(self) -> Option<BTreeMap<Vec<u8>, Member>> {
        let target = self.target;
        let members = self.found.into_iter();
        let mut members: BTreeMap<Vec<u8>, Member> = members
            .map(|(path, (_, member))| (relative(&path, target), member))
            .collect();
        if target.is_empty() {
            members.entry(Vec::new()).or_insert_with(root);
        }
        members.contains_key(b"".as_slice()).then_some(members)
    }
}

/// Passes the entries of a layer to `take` until that is not certain of one, and reads the layer to its end if it is of
/// all. Returns whether it was.
fn each(
    open: Open<'_>,
    mut take: impl FnMut(&Entry, &mut Archive<Box<dyn Read + '_>>) -> Result<bool, ExtractError>,
) -> Result<bool, ExtractError> {
    let failed = |source| ArchiveError::Io { offset: 0, source };
    let mut layer = open().map_err(failed)?;
    let (_, reader) = decompress(&mut layer).map_err(failed)?;
    let mut archive = Archive::new(reader);
    while let Some(entry) = archive.next_entry()? {
        if !take(&entry, &mut archive)? {
            return Ok(false);
        }
    }
    archive.finish()?;
    // What follows the compressed data counts for the digest.
    io::copy(&mut layer, &mut io::sink()).map_err(failed)?;
    Ok(true)
}

/// The root directory of an image that has no entry for it.
fn root() -> Member {
    Member {
        node: Node::implicit_directory(0),
        at: 0,
    }
}
