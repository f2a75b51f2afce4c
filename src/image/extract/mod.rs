//! Finds a file or a directory in the layers of an image, topmost layer first, and reads no layer below the one that
//! decides.
//!
//! Names in the layers are taken as they are, which is right if every layer has an entry for each directory that it
//! writes into, as container engines and this program make them. Where a layer does not, symbolic links of lower layers
//! could redirect its entries: then all layers are applied in memory first, as an unpacker does, and read once more for
//! the contents.

pub(crate) mod applied;
mod search;
pub(crate) mod spool;
#[cfg(test)]
pub(crate) mod tests;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};

use crate::image::verify::archive::ArchiveError;
use crate::image::verify::paths::{join, split};
use crate::image::verify::tree::Node;
use crate::image::verify::vis;
use search::{Search, Step};
use spool::Spool;

/// Maximum number of symbolic links that are followed in a path, as in the kernel.
const MAX_SYMLINKS: usize = 40;

/// Why nothing can be copied.
#[derive(Debug, thiserror::Error)]
pub enum ExtractError {
    /// A layer cannot be read.
    #[error(transparent)]
    Archive(#[from] ArchiveError),
    /// The path is not in the image.
    #[error("/{} is not in the image", vis::encode(.0))]
    NotFound(Vec<u8>),
    /// A part of the path is no directory, or leads in circles.
    #[error("/{}: {reason}", vis::encode(path))]
    Path {
        /// The path, without leading slashes.
        path: Vec<u8>,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The contents cannot be held on disk.
    #[error("cannot hold the contents in a temporary file: {0}")]
    Spool(#[source] io::Error),
    /// The names take too much memory.
    #[error("the names in a layer exceed the limit of {0} bytes")]
    TooMany(u64),
}

/// A path of the image that is to be copied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Its metadata; equal numbers of inodes are hard links.
    pub node: Node,
    /// Offset of the content in the spool; regular files only.
    pub at: u64,
}

/// What was found.
#[derive(Debug)]
pub struct Extracted {
    /// The path in the image after symbolic links; empty for the root.
    pub path: Vec<u8>,
    /// By path relative to what was asked for, which is the empty path; parents first.
    pub members: BTreeMap<Vec<u8>, Member>,
    /// The contents.
    pub spool: File,
    /// Number of layers that were read, each counted as often as it was read.
    pub layers_read: usize,
}

/// A stored layer as it is read.
pub type LayerRead = io::Result<Box<dyn Read + Send>>;

/// Opens a layer, 0 being the bottom. With a path, what concerns that path is enough: it, all below it, the directories above
/// it, the files that hard links lead to, and the marks of what is removed there.
pub type OpenLayer<'o> = &'o mut dyn FnMut(usize, Option<&[u8]>) -> LayerRead;

/// Finds `path` in an image of `count` layers. Contents go into `spool`, an empty file. Symbolic links in the path are followed within the image; one at its end is followed only before a
/// slash.
///
/// A layer that is read is read to its end, where its digest is verified by its reader.
pub fn find(
    path: &[u8],
    count: usize,
    open: OpenLayer<'_>,
    spool: File,
) -> Result<Extracted, ExtractError> {
    let named = path.iter().position(|&b| b != b'/').unwrap_or(path.len());
    let path = &path[named..];
    let mut spool = Spool::new(spool);
    let mut layers_read = 0;
    let whole = |open: OpenLayer<'_>, mut spool: Spool, read| {
        spool.cut(0)?;
        applied::find(path, count, &mut |layer| open(layer, None), spool, read)
    };
    // A directory is meant, and a link at the end followed: the tree knows what is at the end.
    let ends_in_name =
        !matches!(path.rsplit(|&b| b == b'/').next(), Some(b"" | b"." | b"..")) || path.is_empty();
    let follow_last = !ends_in_name;
    let Some(mut target) = resolved(Vec::new(), path) else {
        return whole(open, spool, layers_read);
    };
    for _ in 0..=MAX_SYMLINKS {
        let mut search = Search::new(&target);
        let mut step = Step::Below;
        for layer in (0..count).rev() {
            step = search.layer(
                &mut || open(layer, Some(&target)),
                layer == 0,
                &mut spool,
                &mut layers_read,
            )?;
            if !matches!(step, Step::Below) {
                break;
            }
        }
        let (link, leads_to) = match step {
            Step::Through { link, leads_to } => (link, leads_to),
            Step::NoDirectory => {
                return Err(bad(path, "a part of the path is no directory"));
            }
            Step::Unclear => return whole(open, spool, layers_read),
            Step::Done | Step::Below => {
                let Some(members) = search.members() else {
                    return Err(ExtractError::NotFound(path.to_vec()));
                };
                match members.get(b"".as_slice()).map(|top| &top.node) {
                    Some(Node {
                        target: Some(to), ..
                    }) if follow_last => (target.clone(), to.clone()),
                    Some(node)
                        if follow_last && node.kind != super::verify::tree::Kind::Directory =>
                    {
                        return Err(bad(path, "it is no directory"));
                    }
                    _ => {
                        return Ok(Extracted {
                            path: target,
                            members,
                            spool: spool.file,
                            layers_read,
                        });
                    }
                }
            }
        };
        let rest = &target[link.len()..];
        let from = if leads_to.starts_with(b"/") {
            Vec::new()
        } else {
            split(&link).0.to_vec()
        };
        spool.cut(0)?;
        match resolved(from, &[&leads_to, rest].concat()) {
            Some(other) => target = other,
            None => return whole(open, spool, layers_read),
        }
    }
    Err(bad(path, "too many symbolic links in the path"))
}

fn bad(path: &[u8], reason: &'static str) -> ExtractError {
    ExtractError::Path {
        path: path.to_vec(),
        reason,
    }
}

/// Resolves `.` and `..` in a path that begins in the directory `from`. Returns `None` if a `..` follows a name, which
/// may be a symbolic link.
fn resolved(mut from: Vec<u8>, path: &[u8]) -> Option<Vec<u8>> {
    let mut named = false;
    for part in path.split(|&b| b == b'/') {
        match part {
            b"" | b"." => {}
            b".." if named => return None,
            b".." => from = split(&from).0.to_vec(),
            _ => {
                named = true;
                from = join(&from, part);
            }
        }
    }
    Some(from)
}

/// Returns whether `path` is `above` or below it.
fn is_below(path: &[u8], above: &[u8]) -> bool {
    above.is_empty()
        || path
            .strip_prefix(above)
            .is_some_and(|rest| rest.is_empty() || rest[0] == b'/')
}

/// Returns `path`, which is `above` or below it, relative to it.
fn relative(path: &[u8], above: &[u8]) -> Vec<u8> {
    let rest = &path[above.len()..];
    rest.strip_prefix(b"/").unwrap_or(rest).to_vec()
}
