//! Contents, one after the other, in a temporary file.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};

use super::{ExtractError, LayerRead};
use crate::common::digest::{Digest, HashingWriter};
use crate::image::verify::archive::{Archive, ArchiveError, EntryKind, decompress};

/// A file of contents that grows.
pub(crate) struct Spool {
    pub(crate) file: File,
    pub(super) end: u64,
}

impl Spool {
    /// Takes an empty file.
    pub(crate) fn new(file: File) -> Self {
        Self { file, end: 0 }
    }

    /// Removes everything from `end` on.
    pub(super) fn cut(&mut self, end: u64) -> Result<(), ExtractError> {
        self.end = end;
        self.file.set_len(end).map_err(ExtractError::Spool)?;
        self.file
            .seek(SeekFrom::Start(end))
            .map_err(ExtractError::Spool)?;
        Ok(())
    }

    /// Takes the content of the current entry, of `size` bytes, and returns its digest.
    pub(super) fn take<R: Read>(
        &mut self,
        size: u64,
        archive: &mut Archive<R>,
    ) -> Result<Digest, ExtractError> {
        let mut hash = HashingWriter::new(&mut self.file);
        // Sized by the content, because most files are small and there may be millions of them.
        let mut buffer = vec![0; size.clamp(1, 64 * 1024) as usize];
        loop {
            match archive.read_content(&mut buffer)? {
                0 => break,
                n => hash.write_all(&buffer[..n]).map_err(ExtractError::Spool)?,
            }
        }
        let (_, digest, written) = hash.complete();
        self.end += written;
        Ok(digest)
    }

    /// Takes the contents with these digests from the layers, topmost first, and reads no layer below the one with the
    /// last of them. `wanted` has the size of each. Returns the offset of each that was found.
    pub(crate) fn collect(
        &mut self,
        wanted: &HashMap<Digest, u64>,
        count: usize,
        open: &mut dyn FnMut(usize) -> LayerRead,
        layers_read: &mut usize,
    ) -> Result<HashMap<Digest, u64>, ExtractError> {
        let mut found = HashMap::new();
        let sizes: std::collections::HashSet<u64> = wanted.values().copied().collect();
        for layer in (0..count).rev() {
            if found.len() == wanted.len() {
                break;
            }
            *layers_read += 1;
            let failed = |source| ArchiveError::Io { offset: 0, source };
            let mut layer = open(layer).map_err(failed)?;
            let (_, reader) = decompress(&mut layer).map_err(failed)?;
            let mut archive = Archive::new(reader);
            while let Some(entry) = archive.next_entry()? {
                if entry.kind != EntryKind::File || !sizes.contains(&entry.size) {
                    continue;
                }
                let begin = self.end;
                let digest = self.take(entry.size, &mut archive)?;
                if wanted.contains_key(&digest) && !found.contains_key(&digest) {
                    found.insert(digest, begin);
                } else {
                    self.cut(begin)?;
                }
            }
            archive.finish()?;
            io::copy(&mut layer, &mut io::sink()).map_err(failed)?;
        }
        Ok(found)
    }
}
