//! Proves by content which image a container is based on, where no runtime has recorded it (`pid:N` with `--base`): the
//! image's layers, applied in order, must equal the merged content of the mounted lower directories.

use std::collections::BTreeSet;
use std::io::{self, Read};
use std::path::PathBuf;

use crate::image::verify::archive::ArchiveError;
use crate::image::verify::directory::LowersError;
use crate::image::verify::layers::Layers;
use crate::image::verify::tree::{Difference, Ignore, Tree, compare};
use crate::node::overlay::xattr::Namespace;

/// Maximum number of differences listed in an error.
const MAX_LISTED_DIFFERENCES: usize = 10;

/// The lower directories of a mount.
pub(crate) struct Lowers<'a, M> {
    /// Directories, topmost first.
    pub(crate) directories: &'a [PathBuf],
    /// Namespace of the overlay's extended attributes.
    pub(crate) namespace: Namespace,
    /// Maps owner and group on disk to those in the container; `None` for an ID outside its ID map.
    pub(crate) owner: M,
}

/// The reason why a base is not proven.
#[derive(Debug, thiserror::Error)]
pub enum ProveError {
    /// A layer of the base cannot be opened or read.
    #[error("layer {index} of the base (counted from 1, bottom first): {source}")]
    Layer {
        /// Number of the layer, counted from 1, bottom first.
        index: usize,
        /// The cause.
        source: ArchiveError,
    },
    /// The mounted lower directories cannot be read.
    #[error("the mounted lower directories: {0}")]
    Lowers(#[from] LowersError),
    /// A file on disk has an owner outside the container's ID map.
    #[error(
        "{path} in the mounted lowers belongs to {uid}:{gid}, which is outside the container's id map"
    )]
    Owner {
        /// Path, escaped.
        path: String,
        /// User ID on disk.
        uid: u32,
        /// Group ID on disk.
        gid: u32,
    },
    /// The base and the mounted directories differ.
    #[error("the base is not what is mounted: {} between its {} (expected) and the mounted lower directories (found){}", crate::common::message::count(*count, "difference", "differences"), crate::common::message::count(*layers, "layer", "layers"), list(.first))]
    Differs {
        /// Number of layers of the base.
        layers: usize,
        /// Total number of differences.
        count: usize,
        /// The first differences.
        first: Vec<Difference>,
    },
}

fn list(differences: &[Difference]) -> String {
    let mut list = String::new();
    for difference in differences {
        list.push_str("\n  ");
        list.push_str(&difference.to_string());
    }
    list
}

/// Reads the merged content of the lower directories, with the owners as the container sees them.
pub(crate) fn mounted<M>(lowers: &Lowers<'_, M>) -> Result<Tree, ProveError>
where
    M: Fn(u32, u32) -> Option<(u32, u32)>,
{
    Tree::from_lowers(lowers.directories, lowers.namespace)?
        .map_owners(&lowers.owner)
        .map_err(|(path, uid, gid)| ProveError::Owner {
            path: crate::image::verify::vis::encode(&path),
            uid,
            gid,
        })
}

/// Compares the base's layers (plain, gzip or zstd; bottom first) with the [`mounted`] content. Returns a sentence on
/// what was proven.
///
/// Excluded are the metadata of the root directory (set by runtimes), times of directories and fractions of seconds
/// (which differ between unpackers), metadata of directories that a layer writes into without an entry for them, hard
/// links (an unpacker breaks those into another layer), and extended attributes that belong to the host.
pub(crate) fn compare_content<R: Read>(
    layers: impl IntoIterator<Item = io::Result<R>>,
    mounted: &Tree,
) -> Result<String, ProveError> {
    let mut stack = Layers::new();
    let mut count = 0;
    for layer in layers {
        count += 1;
        let failed = |source| ProveError::Layer {
            index: count,
            source,
        };
        let layer = layer.map_err(|source| failed(ArchiveError::Io { offset: 0, source }))?;
        stack.apply(layer).map_err(failed)?;
    }
    let base = stack.into_lenient_tree();
    let host = [
        "security.selinux",
        "security.ima",
        "security.evm",
        "system.nfs4_acl",
        "trusted.",
        "user.containers.",
    ];
    let ignore = Ignore {
        mtime_nanos: true,
        directory_mtimes: true,
        root: true,
        implicit: true,
        hardlinks: true,
        sockets: false,
        xattrs: host.iter().map(|name| name.as_bytes().to_vec()).collect(),
        paths: BTreeSet::new(),
    };
    let mut differences = compare(&base, mounted, &ignore);
    if differences.is_empty() {
        return Ok(format!(
            "by content: the base ({}), applied, is what the mounted lower directories hold ({})",
            crate::common::message::count(count, "layer", "layers"),
            crate::common::message::count(mounted.len(), "path", "paths")
        ));
    }
    let all = differences.len();
    differences.truncate(MAX_LISTED_DIFFERENCES);
    Err(ProveError::Differs {
        layers: count,
        count: all,
        first: differences,
    })
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    use super::*;

    fn layer(rows: &[(&str, &str)]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for (name, content) in rows {
            let mut header = tar::Header::new_ustar();
            header.set_mode(if name.ends_with('/') { 0o755 } else { 0o644 });
            header.set_mtime(7);
            header.set_size(content.len() as u64);
            let kind = if name.ends_with('/') {
                tar::EntryType::Directory
            } else {
                tar::EntryType::Regular
            };
            header.set_entry_type(kind);
            builder
                .append_data(&mut header, name, content.as_bytes())
                .unwrap();
        }
        builder.into_inner().unwrap()
    }

    fn write(path: &std::path::Path, content: &str) -> io::Result<()> {
        fs::write(path, content)?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o644))?;
        fs::File::options()
            .write(true)
            .open(path)?
            .set_modified(std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(7))
    }

    #[test]
    fn the_same_content_is_a_proof_and_another_is_not() -> Result<(), Box<dyn std::error::Error>> {
        let home = tempfile::tempdir()?;
        let (top, bottom) = (home.path().join("top"), home.path().join("bottom"));
        for directory in ["top/d", "bottom/d", "bottom/implicit"] {
            fs::create_dir_all(home.path().join(directory))?;
            fs::set_permissions(
                home.path().join(directory),
                fs::Permissions::from_mode(0o755),
            )?;
        }
        fs::set_permissions(bottom.join("implicit"), fs::Permissions::from_mode(0o700))?;
        write(&bottom.join("d/a"), "old")?;
        write(&bottom.join("d/b"), "b")?;
        write(&bottom.join("implicit/x"), "x")?;
        write(&top.join("d/a"), "new")?;
        let me = fs::metadata(&top)?;
        let (uid, gid) = (me.uid(), me.gid());
        let layers = [
            layer(&[
                ("d/", ""),
                ("d/a", "old"),
                ("d/b", "b"),
                ("implicit/x", "x"),
            ]),
            layer(&[("d/", ""), ("d/a", "new")]),
        ];
        let directories = [top.clone(), bottom.clone()];
        let lowers = Lowers {
            directories: &directories,
            namespace: Namespace::User,
            owner: |u, g| (u == uid && g == gid).then_some((0, 0)),
        };
        let tree = mounted(&lowers)?;
        let proof = compare_content(layers.iter().map(|l| Ok(l.as_slice())), &tree)?;
        assert!(
            proof.contains("2 layers") && proof.contains("6 paths"),
            "{proof}"
        );

        let error =
            compare_content(layers[..1].iter().map(|l| Ok(l.as_slice())), &tree).unwrap_err();
        assert!(matches!(error, ProveError::Differs { .. }), "{error}");
        let text = error.to_string();
        assert!(text.contains("d/a: content: expected sha256:"), "{text}");

        let broken = compare_content([Ok(&layers[0][..700])], &tree).unwrap_err();
        assert!(
            !matches!(broken, ProveError::Differs { .. }) && broken.to_string().contains("layer 1"),
            "{broken}"
        );
        Ok(())
    }
}
