//! Deletes all blobs of a layout that no image needs, whichever tool wrote them.

use std::collections::HashSet;
use std::path::Path;
use std::time::{Duration, SystemTime};

use rustix::fs::Stat;

use super::blobs::{BlobName, Blobs, Entry, Found, freed_bytes};
use super::lease::{Before, Others, is_lease};
use super::sweep::{self, Freed, LOCK_LIMIT, Lock};
use super::{Error, io_error, references, staged};

/// Maximum number of files that are listed as left alone.
const MAX_SHOWN: usize = 100;

/// What to delete.
#[derive(Clone, Copy, Debug)]
pub struct PruneOptions {
    /// Minimum age of a blob. Other tools do not say what they are about to name in `index.json`, so that their new blobs
    /// can be told by their age only. Blobs of a killed save of this program are deleted whatever their age.
    pub older_than: Duration,
    /// Whether nothing is to be deleted.
    pub dry_run: bool,
}

/// A blob to delete.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Unneeded {
    /// Its name.
    pub digest: BlobName,
    /// Size in bytes.
    pub size: u64,
}

/// The result of a pruning.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct Pruned {
    /// Blobs that were deleted, or would be.
    pub deleted: Vec<Unneeded>,
    /// Bytes that this frees. A blob that has another hard link, in another layout, frees none.
    pub freed: u64,
    /// Number of files of dead writers that had no name of a blob yet and were deleted, or would be.
    pub temporary: u64,
    /// Blobs that images need.
    pub needed: Freed,
    /// Blobs that no image needs yet, and running saves do.
    pub in_use: Freed,
    /// Blobs that no image needs and are younger than the minimum age.
    pub young: Freed,
    /// Files that are no blobs and were left alone; 100 at most.
    pub left: Vec<String>,
    /// Number of such files.
    pub left_count: u64,
}

/// The stages of a pruning, for a progress display.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PruneProgress {
    /// Manifests are being read.
    Reading,
    /// This many of that many blobs are deleted.
    Deleting(u64, u64),
}

/// Deletes the blobs of the layout at `root` that no image needs. `seen` is called now and then; if it returns false,
/// the pruning ends early, with what was deleted until then.
///
/// Fails without having deleted anything if what images need cannot be determined.
pub(super) fn prune(
    root: &Path,
    options: PruneOptions,
    seen: &mut dyn FnMut(PruneProgress) -> bool,
) -> Result<Pruned, Error> {
    let mut pruned = Pruned::default();
    let mut go_on = || seen(PruneProgress::Reading);
    let _lock = match sweep::lock(root, Lock::Exclusive, LOCK_LIMIT, &mut go_on) {
        Err(Error::GivenUp { .. }) => return Ok(pruned),
        lock => lock?,
    };
    if !seen(PruneProgress::Reading) {
        return Ok(pruned);
    }
    let writers = Others::read(root, None)?;
    let blobs = Blobs::open(root)?;
    // A first save that was killed leaves a layout without an index.
    let before = writers.before_abandoned();
    let mut needed = sweep::needed(root, &blobs, before != Before::Layout)?;
    let (entries, others) = blobs.list()?;
    let left_by_dead: HashSet<_> = writers
        .abandoned
        .iter()
        .flat_map(|dead| &dead.names)
        .collect();
    let old = |stat: &Stat| age(stat) >= options.older_than;
    let mut unneeded: Vec<(BlobName, Stat)> = Vec::new();
    let mut temporary = Vec::new();
    let mut left = others;
    for Entry { found, path, stat } in entries {
        match found {
            Found::Blob(name) => unneeded.push((name, stat)),
            Found::Temporary => temporary.push(path),
            Found::UnlockedTemporary if old(&stat) => temporary.push(path),
            Found::UnlockedTemporary => pruned.young.add(stat.st_size as u64),
            Found::Other => left.push(path),
        }
    }
    keep_referrers(&blobs, &mut needed, &unneeded)?;
    unneeded.retain(|(name, stat)| {
        let kept = if needed.contains(name) {
            &mut pruned.needed
        } else if writers.in_use.contains(name) {
            &mut pruned.in_use
        } else if !left_by_dead.contains(name) && !old(stat) {
            &mut pruned.young
        } else {
            return true;
        };
        kept.add(stat.st_size as u64);
        false
    });
    left.extend(unknown_names(root)?);
    left.sort();
    pruned.left_count = left.len() as u64;
    left.truncate(MAX_SHOWN);
    pruned.left = left;
    let total = unneeded.len() as u64;
    for (at, (name, stat)) in unneeded.into_iter().enumerate() {
        if !seen(PruneProgress::Deleting(at as u64, total)) {
            return Ok(pruned);
        }
        let bytes = if options.dry_run {
            Some(freed_bytes(&stat))
        } else {
            blobs.delete(&name)?
        };
        if let Some(bytes) = bytes {
            pruned.freed += bytes;
            pruned.deleted.push(Unneeded {
                digest: name,
                size: stat.st_size as u64,
            });
        }
    }
    for path in temporary {
        pruned.temporary += u64::from(options.dry_run || blobs.delete_temporary(&path)?);
    }
    if !options.dry_run {
        pruned.temporary += staged::delete_all_abandoned(root).map_err(io_error(root, "read"))?;
        for dead in &writers.abandoned {
            dead.remove()?;
        }
        if writers.writers == 0 {
            sweep::remove_empty_layout(root, before);
        }
    }
    Ok(pruned)
}

/// Adds documents about needed blobs (signatures, lists of contents) that are listed nowhere, and what they need.
fn keep_referrers(
    blobs: &Blobs,
    needed: &mut HashSet<BlobName>,
    all: &[(BlobName, Stat)],
) -> Result<(), Error> {
    loop {
        let mut found = Vec::new();
        for (name, _) in all.iter().filter(|(name, _)| !needed.contains(name)) {
            if references::is_about(blobs, name, needed)? {
                found.push(references::Reference::to_document(name.clone()));
            }
        }
        if found.is_empty() {
            return Ok(());
        }
        needed.extend(references::reachable(blobs, found)?);
    }
}

/// Returns what lies in the layout's directory and belongs to no layout.
fn unknown_names(root: &Path) -> Result<Vec<String>, Error> {
    let failed = || io_error(root, "read");
    let mut found = Vec::new();
    for entry in std::fs::read_dir(root).map_err(failed())? {
        let name = entry.map_err(failed())?.file_name();
        let name = name.to_string_lossy().into_owned();
        let known = ["oci-layout", "index.json", "blobs"].contains(&name.as_str());
        if !known && !is_lease(&name) && !staged::is_temporary(&name) {
            found.push(name);
        }
    }
    Ok(found)
}

/// Returns how long ago a file was last written or got a name. The change time is that of this system, where the
/// modification time may be copied from another file.
fn age(stat: &Stat) -> Duration {
    let seconds = stat.st_mtime.max(stat.st_ctime);
    let time = SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(seconds).unwrap_or(0));
    SystemTime::now().duration_since(time).unwrap_or_default()
}
