//! Checks hard links: names that are not in the upper but belong to a file that is.

use std::collections::HashMap;

use rustix::fs::Stat;

use crate::common::escape;
use crate::layer::scan::rows::Rows;
use crate::layer::scan::{Entry, Error, Kind, Sample};
use crate::node::overlay::lower::Found;

/// Returns the hard link count of an indexed file as seen in the container (`ovl_get_nlink` in the kernel's `util.c`).
pub(super) fn indexed_nlink(mark: &[u8], stat: &Stat, base: &Found) -> Option<u32> {
    let (of, difference) = mark.split_first()?;
    let difference: i64 = std::str::from_utf8(difference).ok()?.parse().ok()?;
    let on_disk = match (of, base) {
        (b'U', _) => stat.st_nlink as i64,
        (b'L', Found::Other { stat, .. }) => stat.st_nlink as i64,
        _ => return None,
    };
    u32::try_from(on_disk + difference).ok()
}

/// Fails if names of a hard link group are missing: with `index=on`, a write through one name of a base file changes
/// the others as well, although they are not in the upper.
pub(super) fn check_indexed(rows: &Rows) -> Result<(), Error> {
    if rows.extras().all(|extra| extra.indexed_nlink.is_none()) {
        return Ok(());
    }
    let mut names: HashMap<u64, u32> = HashMap::new();
    for entry in rows
        .iter()
        .filter(|e| e.root == 0 && e.kind != Kind::Dir && e.nlink > 1)
    {
        *names.entry(entry.ino).or_default() += 1;
    }
    for (index, entry) in (0..).zip(rows.iter()) {
        let expected = rows.extra(&entry).and_then(|e| e.indexed_nlink);
        if let Some(expected) = expected
            && names.get(&entry.ino).copied().unwrap_or(1) < expected
        {
            let mut path = Vec::new();
            rows.path_into(index, &mut path);
            return Err(Error::IndexedLink {
                path: escape::path(&path),
            });
        }
    }
    Ok(())
}

/// Returns the files taken from a lower (by a renamed directory) that have more names in the lower than were taken.
pub(super) fn split_links(rows: &Rows) -> Sample<String> {
    let linked = |e: &Entry| e.root != 0 && e.kind != Kind::Dir && e.nlink > 1;
    let mut names: HashMap<(u16, u64), u32> = HashMap::new();
    for entry in rows.iter().filter(linked) {
        *names.entry((entry.root, entry.ino)).or_default() += 1;
    }
    let mut split = Sample::default();
    if names.is_empty() {
        return split;
    }
    for (index, entry) in (0..).zip(rows.iter()) {
        if linked(&entry)
            && names
                .get(&(entry.root, entry.ino))
                .is_some_and(|&n| n < entry.nlink)
        {
            let mut path = Vec::new();
            rows.path_into(index, &mut path);
            split.add(escape::path(&path));
        }
    }
    split
}
