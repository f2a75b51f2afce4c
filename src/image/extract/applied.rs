//! Finds a path after all layers were applied in memory, as an unpacker does.

use std::collections::{BTreeMap, HashMap};

use super::spool::Spool;
use super::{ExtractError, Extracted, LayerRead, MAX_SYMLINKS, Member, bad, is_below, relative};
use crate::common::digest::Digest;
use crate::image::verify::archive::ArchiveError;
use crate::image::verify::layers::Layers;
use crate::image::verify::paths::{join, split};
use crate::image::verify::tree::{Kind, Node, Tree};

/// Finds `path` in the tree of all layers.
pub(super) fn find(
    path: &[u8],
    count: usize,
    open: &mut dyn FnMut(usize) -> LayerRead,
    mut spool: Spool,
    mut layers_read: usize,
) -> Result<Extracted, ExtractError> {
    let failed = |source| ArchiveError::Io { offset: 0, source };
    let mut stack = Layers::new();
    for layer in 0..count {
        layers_read += 1;
        stack.apply(open(layer).map_err(failed)?)?;
    }
    let tree = stack.into_tree();
    let target = follow(&tree, path)?;
    let below: Vec<(&[u8], &Node)> = tree
        .iter()
        .filter(|(path, _)| is_below(path, &target))
        .collect();
    let wanted: HashMap<Digest, u64> = below
        .iter()
        .filter_map(|(_, node)| Some((node.content.filter(|_| node.size > 0)?, node.size)))
        .collect();
    let found = spool.collect(&wanted, count, open, &mut layers_read)?;
    let mut members = BTreeMap::new();
    for (path, node) in below {
        let at = match node.content.filter(|_| node.size > 0) {
            Some(digest) => *found
                .get(&digest)
                .ok_or_else(|| ExtractError::NotFound(path.to_vec()))?,
            None => 0,
        };
        let node = node.clone();
        members.insert(relative(path, &target), Member { node, at });
    }
    Ok(Extracted {
        path: target,
        members,
        spool: spool.file,
        layers_read,
    })
}

/// Follows symbolic links in `path` within the tree, but for one at its end.
fn follow(tree: &Tree, path: &[u8]) -> Result<Vec<u8>, ExtractError> {
    let mut left: Vec<Vec<u8>> = path
        .split(|&b| b == b'/')
        .rev()
        .map(<[u8]>::to_vec)
        .collect();
    let (mut real, mut links) = (Vec::new(), 0);
    while let Some(part) = left.pop() {
        match part.as_slice() {
            b"" | b"." => continue,
            b".." => {
                real = split(&real).0.to_vec();
                continue;
            }
            _ => {}
        }
        let next = join(&real, &part);
        let node = tree
            .get(&next)
            .ok_or_else(|| ExtractError::NotFound(path.to_vec()))?;
        match &node.target {
            // The last name as given, not one that a link leads to.
            _ if left.is_empty() => return Ok(next),
            Some(to) => {
                links += 1;
                if links > MAX_SYMLINKS {
                    return Err(bad(path, "too many symbolic links in the path"));
                }
                if to.starts_with(b"/") {
                    real.clear();
                }
                left.extend(to.split(|&b| b == b'/').rev().map(<[u8]>::to_vec));
            }
            None if node.kind == Kind::Directory => real = next,
            None => return Err(bad(path, "a part of the path is no directory")),
        }
    }
    Ok(real)
}
