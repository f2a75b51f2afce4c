//! Writes what was found in an image to a directory of this machine (`directory`), or as a tar stream (`archive`).

pub(crate) mod archive;
pub(crate) mod directory;

use std::collections::HashMap;
use std::io;

use crate::image::extract::{Extracted, Member};
use crate::image::verify::tree::Kind;
use crate::image::verify::vis;

/// Why what was found cannot be written.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// A path at the destination cannot be written.
    #[error("cannot write {path}: {source}")]
    Write {
        /// Path below the destination, escaped.
        path: String,
        /// Error of the operating system.
        #[source]
        source: io::Error,
    },
    /// The archive cannot be written.
    #[error("cannot write the archive: {0}")]
    Archive(#[source] io::Error),
    /// The operation was cancelled.
    #[error(transparent)]
    Cancelled(#[from] crate::common::cancel::Cancelled),
}

/// What was written.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub(crate) struct Written {
    /// Number of paths.
    pub(crate) paths: u64,
    /// Sum of the sizes of files in bytes, each file counted once.
    pub(crate) bytes: u64,
    /// Device nodes that were not created, escaped; the first of them.
    pub(crate) devices_left_out: Vec<String>,
    /// Number of device nodes that were not created.
    pub(crate) devices_left_out_count: u64,
    /// Number of paths whose owner could not be set; set-user-ID and set-group-ID were removed from their modes.
    pub(crate) owners_not_set: u64,
    /// Number of extended attributes that could not be set.
    pub(crate) xattrs_not_set: u64,
}

/// Maximum number of device nodes that are named.
const NAMED: usize = 20;

impl Written {
    fn leave_out_device(&mut self, path: &[u8]) {
        self.devices_left_out_count += 1;
        if self.devices_left_out.len() < NAMED {
            self.devices_left_out.push(vis::encode(path));
        }
    }
}

/// The first path of each file with several names, by inode.
#[derive(Default)]
struct FirstNames<'a>(HashMap<u64, &'a [u8]>);

impl<'a> FirstNames<'a> {
    /// Returns the first path of the member's file if it is another one.
    fn earlier(&mut self, path: &'a [u8], member: &Member) -> Option<&'a [u8]> {
        if member.node.kind == Kind::Directory {
            return None;
        }
        let first = *self.0.entry(member.node.inode).or_insert(path);
        (first != path).then_some(first)
    }
}

/// Returns the path at the destination of a path that was found: `name` stands for what was asked for.
fn placed(name: &[u8], relative: &[u8]) -> Vec<u8> {
    match (name, relative) {
        (b"", path) | (path, b"") => path.to_vec(),
        _ => [name, b"/", relative].concat(),
    }
}

/// Returns the name under which `found` is written if none is given: the last one of the path as it was asked for, or
/// else of the path in the image.
pub(crate) fn name_of<'a>(asked: &'a [u8], found: &'a Extracted) -> &'a [u8] {
    let last = |path: &'a [u8]| path.rsplit(|&b| b == b'/').find(|part| !part.is_empty());
    match last(asked) {
        Some(name) if name != b"." && name != b".." => name,
        _ => last(&found.path).unwrap_or_default(),
    }
}
