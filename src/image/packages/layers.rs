//! Reads the packages of an image from its layers, bottom first, without unpacking them.
//!
//! Whiteouts, opaque directories and hard links count as in `image::verify::layers`; symbolic links in the paths of
//! entries are not followed, since no package manager installs through them within one layer's archive.

use std::collections::HashSet;
use std::io::Read;

use super::files::metadata_file;
use super::installed::Installed;
use crate::image::verify::archive::{Archive, ArchiveError, Entry, EntryKind, decompress};
use crate::node::overlay::lower::{basename, dirname, join};

/// Applies one more layer (plain, gzip or zstd) to what the layers below say.
///
/// After an error, `installed` contains a part of the layer and must not be used.
pub fn apply(installed: &mut Installed, layer: impl Read) -> Result<(), ArchiveError> {
    let (_, reader) = decompress(layer).map_err(|source| ArchiveError::Io { offset: 0, source })?;
    let mut archive = Archive::new(reader);
    // Paths that this layer wrote: whiteouts hide only what is below it.
    let mut own: HashSet<Vec<u8>> = HashSet::new();
    while let Some(entry) = archive.next_entry()? {
        let path = normal(&entry.name);
        let (above, name) = (dirname(&path), basename(&path));
        if let Some(hidden) = name.strip_prefix(b".wh.") {
            let of = match hidden {
                b".wh..opq" => above.to_vec(),
                // Entries of aufs itself.
                _ if hidden.starts_with(b".wh.") => continue,
                _ => join(above, hidden),
            };
            hide(installed, &of, &own);
            continue;
        }
        if entry.kind == EntryKind::Directory {
            continue;
        }
        // Whatever it replaces: a file, or a directory with everything in it.
        let hidden = hide(installed, &path, &HashSet::new());
        if hidden && entry.kind == EntryKind::Symlink {
            installed.symlink(&path);
            own.insert(path);
        } else if read(installed, &entry, &path, &mut archive)? {
            own.insert(path);
        }
    }
    archive.finish()?;
    Ok(())
}

/// Reads an entry if it describes packages.
fn read<R: Read>(
    installed: &mut Installed,
    entry: &Entry,
    path: &[u8],
    archive: &mut Archive<R>,
) -> Result<bool, ArchiveError> {
    let Some(file) = metadata_file(path) else {
        return Ok(false);
    };
    match entry.kind {
        EntryKind::File => {
            let Some((length, cut)) = installed.limit(path, file, entry.size) else {
                return Ok(true);
            };
            // At most 64 MiB, and no more than the archive has.
            let mut content = Vec::new();
            let mut buffer = vec![0; 64 << 10];
            while (content.len() as u64) < length {
                let want = (length - content.len() as u64).min(buffer.len() as u64) as usize;
                let n = archive.read_content(&mut buffer[..want])?;
                content.extend_from_slice(&buffer[..n]);
            }
            installed.add(path, file, &content, cut);
        }
        EntryKind::Hardlink => installed.link(path, &normal(&entry.link)),
        _ => installed.unreadable(path, format!("it is no file but a {}", entry.kind.as_str())),
    }
    Ok(true)
}

/// Forgets what is known at and below `path`, and returns whether that was anything.
fn hide(installed: &mut Installed, path: &[u8], but: &HashSet<Vec<u8>>) -> bool {
    let mut hidden = installed.at_and_below(path);
    hidden.retain(|known| !but.contains(known));
    for known in &hidden {
        installed.remove(known);
    }
    !hidden.is_empty()
}

/// Returns a name of an archive as a path without empty and dot components.
fn normal(name: &[u8]) -> Vec<u8> {
    let parts = name.split(|&b| b == b'/');
    let parts: Vec<&[u8]> = parts
        .filter(|part| !part.is_empty() && *part != b".")
        .collect();
    parts.join(b"/".as_slice())
}
