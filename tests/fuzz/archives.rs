//! Fuzzes the readers of layers and image archives, which the maker of a base image controls.

use std::io::Read;

use upperdeck::common::digest::Digest;
use upperdeck::image::manifest::Platform;
use upperdeck::image::verify::archive::{Archive, ArchiveError, Entry, EntryKind, decompress};
use upperdeck::image::verify::layers::Layers;
use upperdeck::layer::index::{Index, Place};
use upperdeck::store::layout::Reader;

use crate::errors;
use crate::files::{self, selected};

const BLOCK: usize = 512;
/// Maximum of uncompressed bytes read of an input: more would not reach any other code.
const UNPACKED: u64 = 4 << 20;

pub fn run(input: &[u8]) {
    let (selector, rest) = selected(input);
    match selector % 5 {
        0 => plain(rest),
        1 => compressed(rest),
        2 => image(rest),
        3 => layers(rest),
        _ => index(rest),
    }
}

/// Parses the index of a layer, and what an annotation says of it.
fn index(bytes: &[u8]) {
    if let Ok(place) = String::from_utf8_lossy(bytes).parse::<Place>() {
        assert_eq!(place.to_string().parse(), Ok(place));
    }
    let place = Place {
        offset: 1 << 20,
        length: bytes.len() as u64,
        digest: Digest::of(bytes),
    };
    let _ = Index::parse(bytes, &place);
    let other = Place { offset: 0, ..place };
    assert!(
        Index::parse(bytes, &other).is_err(),
        "blocks before the start"
    );
}

/// Returns the archive with valid checksums in everything that looks like a header: a fuzzer does not find them.
pub fn sealed(tar: &[u8]) -> Vec<u8> {
    let mut tar = tar.to_vec();
    for block in tar.chunks_exact_mut(BLOCK) {
        if &block[257..262] != b"ustar" {
            continue;
        }
        block[148..156].fill(b' ');
        let sum: u32 = block.iter().map(|&byte| u32::from(byte)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    }
    tar
}

fn plain(tar: &[u8]) {
    let tar = sealed(tar);
    let read = errors::checked(entries(&tar[..]));
    let Some(entries) = read else {
        return;
    };
    let facts = errors::checked(Archive::new(&tar[..]).finish()).expect("it was read before");
    assert_eq!(facts.tar_size, tar.len() as u64);
    assert_eq!(facts.diff_id, Digest::of(&tar));
    if let Some(others) = of_the_tar_crate(&tar) {
        let ours: Vec<_> = entries
            .iter()
            .map(|(entry, digest)| (entry.name.clone(), entry.size, *digest))
            .collect();
        assert_eq!(ours, others, "the tar crate reads other entries");
    }
}

fn entries(tar: impl Read) -> Result<Vec<(Entry, Digest)>, ArchiveError> {
    let mut archive = Archive::new(tar);
    let mut found = Vec::new();
    while let Some(entry) = archive.next_entry()? {
        found.push((entry, archive.content_digest()?));
    }
    Ok(found)
}

/// Returns names, lengths and digests of the contents as read by the `tar` crate; `None` if the crate refuses the
/// archive or is known to read it differently from the format.
fn of_the_tar_crate(tar: &[u8]) -> Option<Vec<(Vec<u8>, u64, Digest)>> {
    let mut archive = tar::Archive::new(tar);
    let mut found = Vec::new();
    for entry in archive.entries().ok()? {
        let mut entry = entry.ok()?;
        let kind = entry.header().entry_type();
        // The crate reads content after entries that have none, prefers a GNU long name to a pax header, and keeps zero
        // bytes.
        let odd = !kind.is_file() && entry.size() > 0;
        let name = entry.path_bytes().into_owned();
        let ustar = entry.header().as_ustar().is_some() || entry.header().as_gnu().is_some();
        let extended = entry.pax_extensions().ok()?.is_some();
        if odd || name.contains(&0) || !ustar || extended || kind.is_pax_global_extensions() {
            return None;
        }
        let mut content = Vec::new();
        entry.read_to_end(&mut content).ok()?;
        found.push((name, entry.size(), Digest::of(&content)));
    }
    Some(found)
}

fn compressed(blob: &[u8]) {
    let Some((_, reader)) = errors::checked(decompress(blob)) else {
        return;
    };
    errors::checked(entries(reader.take(UNPACKED)));
}

/// Reads an image in an archive as `--base oci-archive:` does.
fn image(tar: &[u8]) {
    let (_file, path) = files::file(&sealed(tar));
    let Some(reader) = errors::checked(Reader::archive(path)) else {
        return;
    };
    for listed in errors::checked(reader.list()).into_iter().flatten() {
        errors::checked(reader.manifest_of(&listed.digest, &listed.media_type));
        for tag in &listed.tags {
            errors::checked(reader.manifest(Some(tag), &Platform::host()));
        }
    }
    let manifest = errors::checked(reader.manifest(None, &Platform::host()));
    if let Some(manifest) = manifest {
        assert_eq!(manifest.digest, Digest::of(&manifest.bytes));
    }
}

/// Applies two layers, one on top of the other.
fn layers(input: &[u8]) {
    let (blocks, rest) = selected(input);
    let (lower, upper) = rest.split_at((usize::from(blocks) * BLOCK).min(rest.len()));
    let mut layers = Layers::new();
    for tar in [lower, upper] {
        let tar = sealed(tar);
        if errors::checked(layers.apply(&tar[..])).is_none() {
            return;
        }
        // No reader of a layer may take one path of it for another.
        for (entry, _) in errors::checked(entries(&tar[..])).into_iter().flatten() {
            assert!(!entry.name.contains(&0) && !entry.link.contains(&0));
            assert!(entry.kind == EntryKind::File || entry.size == 0);
        }
    }
    let tree = layers.into_tree();
    for (path, _) in tree.iter() {
        let mut parts = path.split(|&byte| byte == b'/');
        let proper = |part: &[u8]| !part.is_empty() && part != b"." && part != b"..";
        assert!(path.is_empty() || parts.all(proper), "{path:?}");
        if let Some(slash) = path.iter().rposition(|&byte| byte == b'/') {
            assert!(tree.get(&path[..slash]).is_some(), "{path:?} is nowhere");
        }
    }
}
