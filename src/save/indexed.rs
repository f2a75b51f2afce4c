//! Reads from a layer with an index no more than what concerns a path.
//!
//! What is made is a tar with a part of the layer's entries: the path and all below it, in full; the files to which hard
//! links among these lead; and, made from the index alone, the directories above and the marks of what is removed. A search
//! for the path ([`crate::image::extract`]) finds in it what it finds in the whole layer.
//!
//! Every byte that is read has the digest that the manifest's annotation leads to, and every header says what the index
//! says of it. Where entries begin, and what is not read, is known from the index alone: whoever wrote the manifest can
//! leave entries out of it, and can have it lead to bytes that look like an entry and are another file's content.

use std::collections::{BTreeSet, VecDeque};
use std::io::{self, Read};
use std::sync::Arc;

use bytes::Bytes;
use oci_spec::image::Descriptor;

use crate::image::extract::ExtractError;
use crate::image::verify::archive::{Archive, ArchiveError, EntryKind};
use crate::image::verify::paths::{join, normalise, split};
use crate::image::verify::vis;
use crate::layer::codec::BLOCK;
use crate::layer::index::{ANNOTATION, Index, Kind, MAX_STORED, Place, Row, Unusable};
use crate::layer::tar::{END, Header, RECORD};

/// Blocks that are read at once.
const RUN: usize = 16;

/// Reads bytes of a stored layer, by offset and length. `None` if its place cannot deliver a part of it.
pub(crate) type Fetch = Box<dyn FnMut(u64, u64) -> io::Result<Option<Bytes>> + Send>;

/// Why a layer is read whole although it should have an index.
#[derive(Debug, thiserror::Error)]
pub(crate) enum NoIndex {
    /// The index cannot be used.
    #[error(transparent)]
    Unusable(#[from] Unusable),
    /// The registry does not deliver parts of a blob.
    #[error("the registry delivers blobs only as a whole")]
    WholeOnly,
    /// The index cannot be read.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Returns whether a search failed because the registry, which delivered an index, now delivers blobs only as a whole.
pub(crate) fn needs_whole(error: &ExtractError) -> bool {
    let ExtractError::Archive(ArchiveError::Io { source, .. }) = error else {
        return false;
    };
    let cause = source.get_ref().and_then(|error| error.downcast_ref());
    matches!(cause, Some(NoIndex::WholeOnly))
}

/// Reads the index of a layer, if its descriptor says where one is.
pub(crate) fn load(
    descriptor: &Descriptor,
    fetch: &mut Fetch,
) -> Result<Option<Arc<Index>>, NoIndex> {
    let annotations = descriptor.annotations().as_ref();
    let Some(text) = annotations.and_then(|all| all.get(ANNOTATION)) else {
        return Ok(None);
    };
    let place: Place = text.parse()?;
    let end = place.offset.checked_add(place.length);
    if !(1..=MAX_STORED).contains(&place.length) || end.is_none_or(|end| end > descriptor.size()) {
        return Err(Unusable("its annotation exceeds a limit").into());
    }
    let bytes = fetch(place.offset, place.length)?.ok_or(NoIndex::WholeOnly)?;
    Ok(Some(Arc::new(Index::parse(&bytes, &place)?)))
}

/// Opens the part of a layer that concerns `path`, as an uncompressed tar.
pub(crate) fn open(index: Arc<Index>, path: &[u8], fetch: Fetch) -> Box<dyn Read + Send> {
    let parts = select(&index, path);
    let mut wanted: Vec<usize> = Vec::new();
    for part in &parts {
        if let Part::Stored { from, to, .. } = part {
            let last = (to.saturating_sub(1) / BLOCK) as usize;
            let first = (from / BLOCK) as usize;
            let next = wanted.last().map_or(first, |last| first.max(last + 1));
            wanted.extend(next..=last);
        }
    }
    Box::new(PartialTar {
        index,
        fetch,
        parts: parts.into(),
        wanted: wanted.into(),
        blocks: VecDeque::new(),
        out: Vec::new(),
        taken: 0,
    })
}

/// A part of the tar that is made.
#[derive(Debug, PartialEq, Eq)]
enum Part {
    /// Bytes that are not in the layer.
    Made(Vec<u8>),
    /// Bytes `from..to` of the layer's tar.
    Stored {
        from: u64,
        to: u64,
        /// What the headers, which these bytes begin with, have to say.
        says: Option<Says>,
    },
}

/// What an index says of an entry.
#[derive(Debug, PartialEq, Eq)]
struct Says {
    path: Vec<u8>,
    kind: Kind,
    header: u64,
    size: u64,
    link: Vec<u8>,
}

/// Returns what concerns `path`.
fn select(index: &Index, path: &[u8]) -> Vec<Part> {
    let linked: BTreeSet<&[u8]> = index
        .rows()
        .filter(|row| row.entry.kind == Kind::Hardlink && is_below(row.entry.path, path))
        .map(|row| row.entry.link)
        .filter(|link| !is_below(link, path))
        .collect();
    let mut above: BTreeSet<&[u8]> = BTreeSet::new();
    for link in &linked {
        let mut at = *link;
        while !at.is_empty() {
            at = split(at).0;
            above.insert(at);
        }
    }
    let mut parts = Vec::new();
    for row in index.rows() {
        let entry = row.entry;
        if let Some(marked) = marked(entry.path) {
            if is_below(&marked, path) || is_below(path, &marked) {
                parts.push(made(entry.path, b'0'));
            }
        } else if is_below(entry.path, path) || linked.contains(entry.path) {
            parts.push(stored(&row));
        } else if is_below(path, entry.path) || above.contains(entry.path) {
            parts.push(match entry.kind {
                Kind::Directory => made(entry.path, b'5'),
                Kind::File => made(entry.path, b'0'),
                Kind::Hardlink | Kind::Other => stored(&row),
            });
        }
    }
    parts.push(Part::Made(vec![0; END as usize]));
    parts
}

/// Returns the path that a mark is about.
fn marked(path: &[u8]) -> Option<Vec<u8>> {
    let (parent, base) = split(path);
    let hidden = base.strip_prefix(b".wh.")?;
    Some(if hidden.starts_with(b".wh.") {
        parent.to_vec()
    } else {
        join(parent, hidden)
    })
}

/// Returns a header without attributes and content.
fn made(path: &[u8], typeflag: u8) -> Part {
    let mut name = path.to_vec();
    if typeflag == b'5' {
        name.extend(if path.is_empty() { &b"./"[..] } else { b"/" });
    }
    let header = Header {
        path: &name,
        typeflag,
        ..Header::EMPTY
    };
    let mut bytes = Vec::new();
    header.write(&mut bytes);
    Part::Made(bytes)
}

fn stored(row: &Row<'_>) -> Part {
    let entry = &row.entry;
    Part::Stored {
        from: row.offset,
        to: row.offset + entry.header + entry.size.next_multiple_of(RECORD),
        says: Some(Says {
            path: entry.path.to_vec(),
            kind: entry.kind,
            header: entry.header,
            size: entry.size,
            link: entry.link.to_vec(),
        }),
    }
}

/// Returns whether `path` is `above` or below it.
fn is_below(path: &[u8], above: &[u8]) -> bool {
    above.is_empty()
        || path
            .strip_prefix(above)
            .is_some_and(|rest| matches!(rest.first(), None | Some(b'/')))
}

impl Says {
    /// Checks the headers of an entry.
    fn check(&self, headers: &[u8]) -> io::Result<()> {
        let mut rest = headers;
        let mut archive = Archive::new(&mut rest);
        let entry = archive.next_entry().map_err(io::Error::other)?;
        let said = entry.is_some_and(|entry| {
            let kind = match entry.kind {
                EntryKind::File => Kind::File,
                EntryKind::Hardlink => Kind::Hardlink,
                EntryKind::Directory => Kind::Directory,
                _ => Kind::Other,
            };
            let link = match kind {
                Kind::Hardlink => normalise(&entry.link).unwrap_or_default(),
                _ => Vec::new(),
            };
            normalise(&entry.name).is_ok_and(|name| name == self.path)
                && (kind, entry.size, &link) == (self.kind, self.size, &self.link)
        });
        // What is left would be read as content, or as entries that the index does not name.
        if said && rest.is_empty() {
            return Ok(());
        }
        Err(io::Error::other(format!(
            "the layer's index is wrong about /{}",
            vis::encode(&self.path)
        )))
    }
}

/// A tar with a part of a layer's entries.
struct PartialTar {
    index: Arc<Index>,
    fetch: Fetch,
    parts: VecDeque<Part>,
    /// Numbers of the blocks that are still to be read, ascending.
    wanted: VecDeque<usize>,
    /// Blocks that were read, by number, ascending.
    blocks: VecDeque<(usize, Vec<u8>)>,
    out: Vec<u8>,
    /// Bytes of `out` that were delivered.
    taken: usize,
}

impl PartialTar {
    /// Makes the next bytes. Returns whether there were any.
    fn advance(&mut self) -> io::Result<bool> {
        self.out.clear();
        self.taken = 0;
        match self.parts.pop_front() {
            None => return Ok(false),
            Some(Part::Made(bytes)) => self.out = bytes,
            Some(Part::Stored { from, to, says }) => {
                // The headers as a whole, else up to the end of the block.
                let end = match &says {
                    Some(says) => from + says.header,
                    None => to.min((from / BLOCK + 1) * BLOCK),
                };
                self.copy(from, end)?;
                if let Some(says) = says {
                    says.check(&self.out)?;
                }
                if end < to {
                    self.parts.push_front(Part::Stored {
                        from: end,
                        to,
                        says: None,
                    });
                }
            }
        }
        Ok(true)
    }

    /// Appends bytes of the layer's tar to `out`.
    fn copy(&mut self, mut from: u64, to: u64) -> io::Result<()> {
        while from < to {
            let number = (from / BLOCK) as usize;
            let (begin, end) = (from % BLOCK, to - number as u64 * BLOCK);
            self.read_to(number)?;
            let block = self.blocks.front().filter(|(found, _)| *found == number);
            let bytes = block.and_then(|(_, bytes)| {
                let end = (bytes.len() as u64).min(end) as usize;
                bytes.get(begin as usize..end)
            });
            let Some(bytes) = bytes.filter(|bytes| !bytes.is_empty()) else {
                return Err(io::ErrorKind::UnexpectedEof.into());
            };
            self.out.extend_from_slice(bytes);
            from += bytes.len() as u64;
        }
        Ok(())
    }

    /// Reads on until the block `number` is the first of those that are held.
    fn read_to(&mut self, number: usize) -> io::Result<()> {
        loop {
            match self.blocks.front() {
                Some((first, _)) if *first >= number => return Ok(()),
                Some(_) => drop(self.blocks.pop_front()),
                None => self.read_run()?,
            }
        }
    }

    /// Reads the next blocks that follow each other in the layer.
    fn read_run(&mut self) -> io::Result<()> {
        let Some(first) = self.wanted.pop_front() else {
            return Err(io::ErrorKind::UnexpectedEof.into());
        };
        let mut end = first + 1;
        while end - first < RUN && self.wanted.front() == Some(&end) {
            self.wanted.pop_front();
            end += 1;
        }
        let place = self.index.stored(first..end);
        let (offset, length) = place.ok_or(io::ErrorKind::UnexpectedEof)?;
        let bytes = (self.fetch)(offset, length)?;
        let bytes = bytes.ok_or_else(|| io::Error::other(NoIndex::WholeOnly))?;
        let mut left = &bytes[..];
        for number in first..end {
            let block = self.index.unpack(number, &mut left);
            let block = block.map_err(|error| {
                io::Error::new(
                    io::ErrorKind::InvalidData,
                    format!("the copy of a layer is damaged: {error}"),
                )
            })?;
            self.blocks.push_back((number, block));
        }
        Ok(())
    }
}

impl Read for PartialTar {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.taken == self.out.len() {
            if !self.advance()? {
                return Ok(0);
            }
        }
        let left = self.out.get(self.taken..).unwrap_or_default();
        let n = left.len().min(buffer.len());
        buffer[..n].copy_from_slice(&left[..n]);
        self.taken += n;
        Ok(n)
    }
}

#[cfg(test)]
mod tests;
