//! Shares blobs between layouts on one file system by hard links, so that a base that many images have is kept once. Each
//! layout stays complete by itself for every tool, and the file system counts how many layouts need a blob.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use rustix::fs::Stat;
use sha2::{Digest as _, Sha256};
use tempfile::TempPath;

use super::blobs::{BlobName, Blobs, Found, freed_bytes};
use super::staged::{self, sync_directory};
use super::sweep::{self, Lock};
use super::{Error, blob_path, io_error};
use crate::common::digest::Digest;
use crate::common::private_files::FileMode;
use crate::common::regular_file;

/// Maximum depth at which layouts are looked for.
const MAX_DEPTH: usize = 8;
/// Maximum number of layouts that are looked at.
const MAX_LAYOUTS: usize = 100_000;
/// Bytes read at a time.
const READ_SIZE: usize = 1 << 20;

/// Returns the layouts in a directory and below it, sorted. Symbolic links are not followed.
pub fn layouts_below(dir: &Path) -> Result<Vec<PathBuf>, Error> {
    layouts_to_depth(dir, MAX_DEPTH)
}

fn layouts_to_depth(dir: &Path, depth: usize) -> Result<Vec<PathBuf>, Error> {
    let mut found = Vec::new();
    let mut walk = walkdir::WalkDir::new(dir)
        .max_depth(depth)
        .sort_by_file_name()
        .into_iter();
    while let Some(entry) = walk.next() {
        let entry = entry.map_err(|error| {
            let path = error.path().unwrap_or(dir).to_path_buf();
            io_error(&path, "read")(error.into())
        })?;
        if !entry.file_type().is_dir() {
            continue;
        }
        let path = entry.path();
        let is_layout = |path: &Path| {
            let marker = fs::symlink_metadata(path.join("oci-layout"));
            marker.is_ok_and(|marker| marker.is_file())
        };
        if is_layout(path) {
            if found.len() == MAX_LAYOUTS {
                return Err(io_error(dir, "read")(io::Error::other(format!(
                    "more than {MAX_LAYOUTS} layouts"
                ))));
            }
            found.push(path.to_path_buf());
        }
        if entry.file_name() == "blobs" && path.parent().is_some_and(is_layout) {
            walk.skip_current_dir();
        }
    }
    Ok(found)
}

/// The layouts whose blobs may be linked.
#[derive(Debug)]
pub(super) struct Neighbours {
    below: PathBuf,
    layouts: OnceLock<Vec<PathBuf>>,
}

/// A blob of another layout.
pub(super) struct Neighbour {
    path: PathBuf,
    inode: (u64, u64),
    size: u64,
}

impl Neighbours {
    /// Selects the layouts below a directory.
    pub(super) fn below(below: PathBuf) -> Self {
        Self {
            below,
            layouts: OnceLock::new(),
        }
    }

    /// Finds a blob in another layout than `own`, and verifies its content. It has to belong to this user and to have the
    /// mode of the files of this layout, as a link has both in common.
    pub(super) fn find(
        &self,
        own: &Path,
        digest: &Digest,
        size: Option<u64>,
        mode: FileMode,
    ) -> Option<Neighbour> {
        let layouts = self.layouts.get_or_init(|| {
            // Layouts of one service are at one depth, so that unrelated trees below are not walked.
            let inside = own.strip_prefix(&self.below);
            let depth = inside.map_or(MAX_DEPTH, |inside| inside.components().count());
            layouts_to_depth(&self.below, depth.min(MAX_DEPTH)).unwrap_or_else(|error| {
                tracing::warn!(%error, "blobs of other layouts are not shared");
                Vec::new()
            })
        });
        let user = rustix::process::geteuid().as_raw();
        let mut others = layouts.iter().filter(|layout| *layout != own);
        others.find_map(|layout| {
            let path = layout.join(blob_path(digest));
            let file = regular_file::open_no_follow(&path).ok()?;
            let meta = file.metadata().ok()?;
            let fits = size.is_none_or(|size| size == meta.len())
                && meta.uid() == user
                && mode.is_of(&meta);
            // One damaged blob would otherwise damage each image that shares it.
            let sound = fits && content_has_digest(file, digest, &mut |_| true);
            if fits && !sound {
                tracing::warn!(blob = %path.display(), "a blob of another layout is damaged, and is not shared");
            }
            sound.then(|| Neighbour {
                path,
                inode: (meta.dev(), meta.ino()),
                size: meta.len(),
            })
        })
    }
}

impl Neighbour {
    /// Gives the blob a name in another layout. Returns its size in bytes.
    pub(super) fn link_to(&self, target: &Path) -> io::Result<u64> {
        let dir = target.parent().ok_or(io::ErrorKind::InvalidInput)?;
        let linked = link_temporarily(&self.path, dir, self.inode)?;
        linked.persist(target).map_err(|error| error.error)?;
        Ok(self.size)
    }
}

/// Links a file to a temporary name in `dir`, and checks that it is the file that was looked at.
fn link_temporarily(file: &Path, dir: &Path, inode: (u64, u64)) -> io::Result<TempPath> {
    let link = tempfile::Builder::new()
        .prefix(staged::PREFIX)
        .make_in(dir, |path| fs::hard_link(file, path))?
        .into_temp_path();
    let meta = fs::symlink_metadata(&link)?;
    if !meta.is_file() || (meta.dev(), meta.ino()) != inode {
        return Err(io::Error::other("the file was replaced meanwhile"));
    }
    Ok(link)
}

/// The result of merging.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Merged {
    /// Number of files that became links.
    pub links: u64,
    /// Bytes that this frees.
    pub freed: u64,
}

/// A file with the name of a blob.
struct Copy {
    layout: usize,
    inode: (u64, u64),
    /// Bytes that are free when it becomes a link.
    frees: u64,
}

/// Files can be one only if all of this is the same: name, device, owner, mode, size.
type Key = (BlobName, u64, u32, u32, i64);

/// Replaces equal blobs of several layouts by hard links to one file. The content of that is verified before. Blobs that
/// cannot be linked stay as they are.
///
/// `seen` gets the numbers of bytes that were and will be verified; if it returns false, the work ends early. Nothing is
/// changed with `dry_run`.
pub fn merge(
    layouts: &[PathBuf],
    dry_run: bool,
    seen: &mut dyn FnMut(u64, u64) -> bool,
) -> Result<Merged, Error> {
    let mut copies: HashMap<Key, Vec<Copy>> = HashMap::new();
    for (layout, root) in layouts.iter().enumerate() {
        for entry in Blobs::open(root)?.list()?.0 {
            if let Found::Blob(name) = entry.found {
                let (key, copy) = describe(layout, name, &entry.stat);
                copies.entry(key).or_default().push(copy);
            }
        }
    }
    copies.retain(|_, copies| copies.iter().any(|copy| copy.inode != copies[0].inode));
    let total = copies.keys().map(|key| key.4 as u64).sum();
    let (mut done, mut merged) = (0, Merged::default());
    let mut all: Vec<_> = copies.into_iter().collect();
    all.sort_by_key(|(key, _)| std::cmp::Reverse(key.4));
    for ((name, .., size), copies) in all {
        let begun = done;
        done += size as u64;
        let Ok(digest) = name.to_string().parse::<Digest>() else {
            continue;
        };
        let path = |copy: &Copy| layouts[copy.layout].join(blob_path(&digest));
        let mut go_on = true;
        let mut read = |bytes: u64| {
            go_on = go_on && seen((begun + bytes).min(done), total);
            go_on
        };
        let sound = copies
            .iter()
            .find(|copy| dry_run || has_digest(&path(copy), &digest, &mut read));
        if !go_on {
            break;
        }
        let Some(sound) = sound else { continue };
        for copy in copies.iter().filter(|copy| copy.inode != sound.inode) {
            let root = &layouts[copy.layout];
            if dry_run || replace(root, &path(sound), &path(copy), (sound.inode, copy.inode)) {
                merged.links += 1;
                merged.freed += copy.frees;
            }
        }
    }
    Ok(merged)
}

fn describe(layout: usize, name: BlobName, stat: &Stat) -> (Key, Copy) {
    let key = (name, stat.st_dev, stat.st_uid, stat.st_mode, stat.st_size);
    let copy = Copy {
        layout,
        inode: (stat.st_dev, stat.st_ino),
        frees: freed_bytes(stat),
    };
    (key, copy)
}

/// Returns whether a file can be read and has the digest. `seen` gets the number of bytes read; if it returns false, the
/// answer is no.
fn has_digest(path: &Path, digest: &Digest, seen: &mut dyn FnMut(u64) -> bool) -> bool {
    regular_file::open(path).is_ok_and(|file| content_has_digest(file, digest, seen))
}

/// Like [`has_digest`], of an open file.
fn content_has_digest(mut file: File, digest: &Digest, seen: &mut dyn FnMut(u64) -> bool) -> bool {
    let mut hasher = Sha256::new();
    let mut piece = vec![0; READ_SIZE];
    let mut read = 0;
    loop {
        match file.read(&mut piece) {
            Ok(0) => return Digest::finish(hasher) == *digest,
            Ok(n) if seen(read) => {
                hasher.update(&piece[..n]);
                read += n as u64;
            }
            _ => return false,
        }
    }
}

/// Replaces a file by a link to another one. Returns false if that is not possible, or the file is not the same any more.
fn replace(root: &Path, sound: &Path, copy: &Path, (from, old): ((u64, u64), (u64, u64))) -> bool {
    let replaced = || {
        // Nothing deletes the file until it is replaced.
        let _lock = sweep::lock(root, Lock::Exclusive, sweep::LOCK_LIMIT, &mut || true)?;
        let failed = || io_error(copy, "replace");
        let meta = fs::symlink_metadata(copy).map_err(failed())?;
        let dir = copy.parent().unwrap_or(root);
        if (meta.dev(), meta.ino()) != old {
            return Ok(false);
        }
        let link = link_temporarily(sound, dir, from).map_err(failed())?;
        link.persist(copy).map_err(|e| failed()(e.error))?;
        sync_directory(dir).map_err(failed())?;
        Ok::<_, Error>(true)
    };
    replaced().unwrap_or_else(|error| {
        tracing::debug!(%error, "a blob is not shared");
        false
    })
}
