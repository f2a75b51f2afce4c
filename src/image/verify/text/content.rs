//! Contents of files as a document states them.

use std::collections::BTreeMap;
use std::io::{self, Write};

use base64::Engine as _;

use crate::common::digest::{Digest, HashingWriter};
use crate::image::verify::vis;

/// Longest name after `{TEXT*N}` is expanded, in bytes.
const MAX_NAME: usize = crate::image::verify::archive::PATH_BYTES;
/// Maximum length of a content that is made from a few words, in bytes: all of it is hashed.
const MAX_GENERATED: u64 = 16 << 30;

/// Content of a regular file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Content {
    pub(super) base: Base,
    pub(super) over: Vec<(u64, Vec<u8>)>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Base {
    Bytes(Vec<u8>),
    Random { seed: u64, length: u64 },
    Zeros { length: u64 },
    Hole { length: u64 },
    Stated { size: u64, digest: Option<Digest> },
}

#[allow(clippy::len_without_is_empty)] // a file is no collection
impl Content {
    /// Creates a content that is written as it is.
    pub(crate) fn of_bytes(bytes: impl Into<Vec<u8>>) -> Self {
        Self {
            base: Base::Bytes(bytes.into()),
            over: Vec::new(),
        }
    }

    /// Creates a content of which only size and digest are known.
    pub(crate) fn stated(size: u64, digest: Digest) -> Self {
        Self {
            base: Base::Stated {
                size,
                digest: Some(digest),
            },
            over: Vec::new(),
        }
    }

    /// Returns the bytes if they are written as they are.
    pub(crate) fn bytes(&self) -> Option<&[u8]> {
        match &self.base {
            Base::Bytes(bytes) if self.over.is_empty() => Some(bytes),
            _ => None,
        }
    }

    /// Returns the length in bytes.
    pub fn len(&self) -> u64 {
        match &self.base {
            Base::Bytes(bytes) => bytes.len() as u64,
            Base::Random { length, .. } | Base::Zeros { length } | Base::Hole { length } => *length,
            Base::Stated { size, .. } => *size,
        }
    }

    /// Returns whether the file has a hole wherever nothing is written over it.
    pub fn is_hole(&self) -> bool {
        matches!(self.base, Base::Hole { .. })
    }

    /// Returns what is written over the base: offsets and bytes.
    pub fn over(&self) -> &[(u64, Vec<u8>)] {
        &self.over
    }

    /// Returns the digest, or `None` if only a size is given.
    pub(crate) fn digest(&self) -> Option<Digest> {
        if let Base::Stated { digest, .. } = self.base {
            return digest;
        }
        let mut hash = HashingWriter::new(io::sink());
        self.write(&mut hash).ok()?;
        Some(hash.complete().1)
    }

    /// Writes the whole content. Fails with [`io::ErrorKind::Unsupported`] if only size or digest are given.
    pub fn write(&self, sink: &mut dyn Write) -> io::Result<()> {
        let mut at = 0;
        // A multiple of 8 if there is more than one iteration, because random content is generated in words.
        let mut buffer = vec![0; self.len().min(64 * 1024) as usize];
        while at < self.len() {
            let length = usize::try_from(self.len() - at)
                .unwrap_or(usize::MAX)
                .min(buffer.len());
            let chunk = &mut buffer[..length];
            match &self.base {
                Base::Bytes(bytes) => {
                    chunk.copy_from_slice(&bytes[at as usize..at as usize + length]);
                }
                Base::Random { seed, .. } => {
                    // `at` is a multiple of the buffer's length and thus of 8.
                    for (word, bytes) in chunk.chunks_mut(8).enumerate() {
                        let value = random(*seed, at / 8 + word as u64).to_le_bytes();
                        bytes.copy_from_slice(&value[..bytes.len()]);
                    }
                }
                Base::Zeros { .. } | Base::Hole { .. } => chunk.fill(0),
                Base::Stated { .. } => return Err(io::ErrorKind::Unsupported.into()),
            }
            for (offset, bytes) in &self.over {
                let from = at.max(*offset);
                let to = (at + length as u64).min(offset + bytes.len() as u64);
                if from < to {
                    let source = &bytes[(from - offset) as usize..(to - offset) as usize];
                    chunk[(from - at) as usize..(to - at) as usize].copy_from_slice(source);
                }
            }
            sink.write_all(chunk)?;
            at += length as u64;
        }
        Ok(())
    }
}

/// Returns word `index` of the stream for `seed`: the finaliser of SplitMix64 over a counter.
pub(super) fn random(seed: u64, index: u64) -> u64 {
    let mut z = seed.wrapping_add(index.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

pub(super) fn content(words: &mut BTreeMap<&str, &str>) -> Result<Content, String> {
    let length = |key: &str, text: &str| {
        text.parse::<u64>()
            .map_err(|_| format!("{key}={text}: expected a length"))
    };
    let generated = |key: &str, text: &str| {
        let length = length(key, text)?;
        if length > MAX_GENERATED {
            return Err(format!("{key}={text}: longer than {MAX_GENERATED} bytes"));
        }
        Ok(length)
    };
    let mut base = Base::Bytes(Vec::new());
    if let Some(text) = words.remove("content") {
        base = Base::Bytes(expand(text)?);
    }
    if let Some(text) = words.remove("base64") {
        let bytes = base64::engine::general_purpose::STANDARD.decode(text);
        base = Base::Bytes(bytes.map_err(|error| format!("base64={text}: {error}"))?);
    }
    if let Some(text) = words.remove("random") {
        let (seed, size) = text
            .split_once(',')
            .ok_or_else(|| format!("random={text}: expected SEED,LENGTH"))?;
        base = Base::Random {
            seed: length("random", seed)?,
            length: generated("random", size)?,
        };
    }
    if let Some(text) = words.remove("zeros") {
        base = Base::Zeros {
            length: generated("zeros", text)?,
        };
    }
    if let Some(text) = words.remove("hole") {
        base = Base::Hole {
            length: length("hole", text)?,
        };
    }
    if let Some(text) = words.remove("size") {
        let digest = words
            .remove("sha256")
            .map(Digest::from_hex)
            .transpose()
            .map_err(|error| error.to_string())?;
        base = Base::Stated {
            size: length("size", text)?,
            digest,
        };
    }
    let mut content = Content {
        base,
        over: Vec::new(),
    };
    let keys: Vec<&str> = words
        .keys()
        .copied()
        .filter(|key| key.starts_with("at."))
        .collect();
    for key in keys {
        let offset = length("at", &key[3..])?;
        let bytes = words
            .remove(key)
            .map(expand)
            .transpose()?
            .unwrap_or_default();
        if offset
            .checked_add(bytes.len() as u64)
            .is_none_or(|end| end > content.len())
        {
            return Err(format!("{key}: beyond the end of the file"));
        }
        content.over.push((offset, bytes));
    }
    Ok(content)
}

pub(super) fn decode(text: &str) -> Result<Vec<u8>, String> {
    vis::decode(text).map_err(|error| error.to_string())
}

/// Expands `{TEXT*N}` and unescapes.
pub(super) fn expand(text: &str) -> Result<Vec<u8>, String> {
    let bad = || format!("{text:?}: expected {{TEXT*N}} (a brace in a name is \\173)");
    let mut bytes = Vec::new();
    let mut rest = text;
    while let Some((before, tail)) = rest.split_once('{') {
        let (inside, after) = tail.split_once('}').ok_or_else(bad)?;
        let (unit, count) = inside.rsplit_once('*').ok_or_else(bad)?;
        let count: usize = count.parse().map_err(|_| bad())?;
        bytes.extend(decode(before)?);
        let unit = decode(unit)?;
        if unit
            .len()
            .checked_mul(count)
            .is_none_or(|length| length > MAX_NAME)
        {
            return Err(bad());
        }
        bytes.extend(unit.repeat(count));
        rest = after;
    }
    bytes.extend(decode(rest)?);
    Ok(bytes)
}
