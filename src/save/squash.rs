//! Rewrites the layers above an image's base into one: the difference of the tree of all layers and that of the base's,
//! with contents from the layers. The result is applied to the base's tree and compared before it is published.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::io::{self, BufWriter, Read, Seek as _, Write as _};
use std::os::unix::fs::FileExt as _;

use bytes::Bytes;
use tokio::runtime::Handle;

use super::source::{Image, SourceError, layer_digest};
use super::{Error, base, node_header};
use crate::common::digest::Digest;
use crate::common::message;
use crate::image::extract::ExtractError;
use crate::image::extract::spool::Spool;
use crate::image::verify::archive::ArchiveError;
use crate::image::verify::layers::Layers;
use crate::image::verify::paths::{join, split};
use crate::image::verify::tree::{Difference, Ignore, Kind, Node, Tree, compare};
use crate::layer::Compression;
use crate::layer::index;
use crate::layer::sequential::{SequentialDigests, SequentialLayer};
use crate::layer::tar::{END, Header, RECORD};
use crate::store::destination::{self, BlobWriter, Destination, Replaceable};

/// Bytes copied at once.
const PIECE: usize = 1 << 20;
/// Differences that are named.
const NAMED: usize = 5;

/// Why layers cannot be made one.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SquashError {
    /// A layer cannot be read.
    #[error(transparent)]
    Layer(#[from] ArchiveError),
    /// The contents cannot be taken from the layers.
    #[error(transparent)]
    Contents(#[from] ExtractError),
    /// The new layer cannot be written to a temporary file.
    #[error("cannot write the layer to a temporary file: {0}")]
    Write(#[source] io::Error),
    /// A content is in no layer under its own digest.
    #[error("the content of {0} is in no layer: this is a defect of upperdeck")]
    Content(String),
    /// The new layer does not give the same tree.
    #[error("the squashed image would not be the same, nothing was published: {number}, e.g. {}", .first.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    Differs {
        /// Their number, with the noun.
        number: String,
        /// The first of them.
        first: Vec<Difference>,
    },
}

/// Opens a layer; the bottom is 0.
pub(crate) type Open<'o> = &'o mut dyn FnMut(usize) -> io::Result<Box<dyn Read + Send>>;

/// A layer that stands for several.
#[derive(Debug)]
pub(crate) struct Squashed {
    /// The compressed bytes.
    pub(crate) file: File,
    /// Their digests.
    pub(crate) digests: SequentialDigests,
    /// Number of entries.
    pub(crate) paths: usize,
}

/// Makes one layer of those above the lowest `keep` of `count`, and proves it.
pub(crate) fn squash(
    count: usize,
    keep: usize,
    open: Open<'_>,
    compression: Compression,
) -> Result<Squashed, SquashError> {
    let unreadable = |source| ArchiveError::Io { offset: 0, source };
    let mut stack = Layers::new();
    for layer in 0..keep {
        stack.apply(open(layer).map_err(unreadable)?)?;
    }
    let below = stack.into_tree();
    let mut stack = Layers::on_top_of(below.clone());
    for layer in keep..count {
        stack.apply(open(layer).map_err(unreadable)?)?;
    }
    let all = stack.into_tree();
    let entries = entries(&below, &all);
    let wanted: HashMap<Digest, u64> = entries
        .iter()
        .filter_map(|(_, entry)| match entry {
            Entry::Node(node) if node.size > 0 => Some((node.content?, node.size)),
            _ => None,
        })
        .collect();
    let temporary = || tempfile::tempfile().map_err(SquashError::Write);
    let mut spool = Spool::new(temporary()?);
    let contents = spool.collect(&wanted, count, open, &mut 0)?;
    let mut file = temporary()?;
    let digests = write(&entries, &spool.file, &contents, &mut file, compression)?;
    let paths = entries.len();
    drop(entries);
    file.rewind().map_err(SquashError::Write)?;
    let mut stack = Layers::on_top_of(below);
    stack.apply(&file)?;
    let differences = compare(&all, &stack.into_tree(), &Ignore::default());
    if !differences.is_empty() {
        return Err(SquashError::Differs {
            number: message::count(differences.len(), "difference", "differences"),
            first: differences.into_iter().take(NAMED).collect(),
        });
    }
    file.rewind().map_err(SquashError::Write)?;
    Ok(Squashed {
        file,
        digests,
        paths,
    })
}

/// What a layer says of a path.
enum Entry<'a> {
    Node(&'a Node),
    /// A hard link to the path, of the same file. containers/storage sets mode, owner and time by its header, too.
    Link(&'a [u8], &'a Node),
    Whiteout,
}

/// Returns what has to be in a layer on `below` to get `all`, by path, parents first.
fn entries<'a>(below: &Tree, all: &'a Tree) -> Vec<(Vec<u8>, Entry<'a>)> {
    let mut names: HashMap<u64, Vec<&[u8]>> = HashMap::new();
    for (path, node) in all.iter().filter(|(_, node)| node.kind != Kind::Directory) {
        names.entry(node.inode).or_default().push(path);
    }
    let mut changed: BTreeSet<&[u8]> = BTreeSet::new();
    for (path, node) in all.iter() {
        if is_same(below.get(path), node) {
            continue;
        }
        changed.insert(path);
        // A file with several names is one file only if all of them are in one layer.
        if node.kind != Kind::Directory {
            changed.extend(names.get(&node.inode).into_iter().flatten());
        }
    }
    let mut out: BTreeMap<Vec<u8>, Entry<'a>> = BTreeMap::new();
    for (path, _) in below.iter().filter(|(path, _)| all.get(path).is_none()) {
        let (parent, base) = split(path);
        // Below what is gone or no directory any more, nothing is left to hide.
        if all
            .get(parent)
            .is_some_and(|node| node.kind == Kind::Directory)
        {
            out.insert(join(parent, &[b".wh.", base].concat()), Entry::Whiteout);
        }
    }
    for path in &changed {
        let Some(node) = all.get(path) else { continue };
        let first = names.get(&node.inode).and_then(|names| names.first());
        let entry = match first {
            Some(first) if node.kind != Kind::Directory && first != path => {
                Entry::Link(first, node)
            }
            _ => Entry::Node(node),
        };
        out.insert(path.to_vec(), entry);
    }
    // Every directory that is written into is described, so that unpackers agree on it.
    let paths: Vec<Vec<u8>> = out.keys().cloned().collect();
    for path in paths {
        let mut above = split(&path).0;
        while !above.is_empty() {
            if let (false, Some(node)) = (out.contains_key(above), all.get(above)) {
                out.insert(above.to_vec(), Entry::Node(node));
            }
            above = split(above).0;
        }
    }
    out.into_iter().collect()
}

/// Returns whether the base has the same at a path. Of a file, it is the same one, not an equal one: which names are hard
/// links of each other counts.
fn is_same(below: Option<&Node>, node: &Node) -> bool {
    below.is_some_and(|below| {
        if node.kind != Kind::Directory {
            return below == node;
        }
        let comparable = |node: &Node| Node {
            inode: 0,
            implicit: false,
            ..node.clone()
        };
        comparable(below) == comparable(node)
    })
}

fn write(
    entries: &[(Vec<u8>, Entry<'_>)],
    spool: &File,
    contents: &HashMap<Digest, u64>,
    file: &mut File,
    compression: Compression,
) -> Result<SequentialDigests, SquashError> {
    let mut out =
        SequentialLayer::new(BufWriter::new(file), compression).map_err(SquashError::Write)?;
    let mut bytes = Vec::new();
    for (path, entry) in entries {
        bytes.clear();
        header(path, entry, &mut bytes);
        out.list(listed(path, entry, bytes.len() as u64));
        out.write_all(&bytes).map_err(SquashError::Write)?;
        let Entry::Node(node) = entry else { continue };
        let Some(digest) = node.content.filter(|_| node.size > 0) else {
            continue;
        };
        let named = || SquashError::Content(crate::image::verify::vis::encode(path));
        let at = *contents.get(&digest).ok_or_else(named)?;
        copy(spool, at, node.size, &mut out).map_err(SquashError::Write)?;
    }
    out.write_all(&[0; END as usize])
        .and_then(|()| out.finish())
        .map_err(SquashError::Write)
}

/// Returns an entry as the layer's index lists it; its headers have `header` bytes.
fn listed<'a>(path: &'a [u8], entry: &Entry<'a>, header: u64) -> index::Entry<'a> {
    let (kind, size, link) = match entry {
        Entry::Whiteout => (index::Kind::File, 0, &b""[..]),
        Entry::Link(first, _) => (index::Kind::Hardlink, 0, *first),
        Entry::Node(node) => match node.kind {
            Kind::File => (index::Kind::File, node.size, &b""[..]),
            Kind::Directory => (index::Kind::Directory, 0, &b""[..]),
            _ => (index::Kind::Other, 0, &b""[..]),
        },
    };
    index::Entry {
        path,
        kind,
        header,
        size,
        link,
    }
}

fn header(path: &[u8], entry: &Entry<'_>, out: &mut Vec<u8>) {
    let (node, first) = match entry {
        Entry::Whiteout => {
            let blank = Header {
                path,
                ..Header::EMPTY
            };
            return blank.write(out);
        }
        Entry::Link(first, node) => (node, Some(*first)),
        Entry::Node(node) => (node, None),
    };
    node_header::write(path, node, first, out);
}

/// Copies a content with its padding.
fn copy(spool: &File, mut at: u64, size: u64, out: &mut impl io::Write) -> io::Result<()> {
    let mut buffer = vec![0; PIECE.min(size as usize)];
    let end = at + size;
    while at < end {
        let piece = &mut buffer[..(end - at).min(PIECE as u64) as usize];
        spool.read_exact_at(piece, at)?;
        out.write_all(piece)?;
        at += piece.len() as u64;
    }
    let padding = size.next_multiple_of(RECORD) - size;
    out.write_all(&[0; RECORD as usize][..padding as usize])
}

/// Writes the image: the layers below from `image`, where the destination does not have them, the new layer, config and
/// manifest. Returns the digest of the manifest.
pub(crate) async fn publish(
    image: &Image,
    built: &crate::image::manifest::Image,
    squashed: Squashed,
    destination: &Destination,
    tag: &str,
    rule: &Replaceable,
) -> Result<Digest, Error> {
    destination.check().await?;
    destination.check_tag(tag).await?;
    destination.check_replaceable(tag, rule).await?;
    let given_up = destination.give_up_on_drop();
    let (own, below) = built.layers.split_last().ok_or(Error::Worker)?;
    let failed = |error: SourceError| error.of(&image.name());
    for descriptor in below {
        let digest = layer_digest(descriptor).map_err(failed)?;
        let size = Some(descriptor.size());
        if destination.has_blob(&digest, size).await?.is_some() {
            continue;
        }
        let mounted = match &image.reference {
            Some(from) => destination.mount_blob(&digest, &from.name()).await?,
            None => false,
        };
        if !mounted {
            let open = || {
                let reader = image.layer(descriptor).map_err(failed)?;
                reader.map_err(|error| failed(SourceError::Unusable(error.to_string())))
            };
            upload(destination, open, digest, descriptor.size()).await?;
        }
    }
    let unreadable = |error: io::Error| Error::ImageUnreadable {
        name: squashed.digests.digest.to_string(),
        reason: error.to_string(),
    };
    let open = || -> Result<Box<dyn Read + Send>, Error> {
        let mut file = squashed.file.try_clone().map_err(unreadable)?;
        file.rewind().map_err(unreadable)?;
        Ok(Box::new(file))
    };
    upload(destination, open, squashed.digests.digest, own.size()).await?;
    let config = Bytes::from(built.config.bytes.clone());
    destination.put_blob(config, &built.config.digest).await?;
    let manifest = Bytes::from(built.manifest.bytes.clone());
    let digest = destination
        .put_manifest_replacing(manifest, built.manifest.media_type, tag, rule)
        .await?;
    drop(given_up);
    Ok(digest)
}

/// Writes one blob, and again from its start after an error that may pass. `open` opens its content.
async fn upload(
    destination: &Destination,
    open: impl Fn() -> Result<Box<dyn Read + Send>, Error>,
    digest: Digest,
    size: u64,
) -> Result<(), Error> {
    let mut writer = destination.begin_blob(Handle::current())?;
    loop {
        let reader = open()?;
        let sending = tokio::task::spawn_blocking(move || {
            let sent = send(reader, &mut writer);
            (writer, sent)
        });
        let (mut sent_to, sent) = sending.await.map_err(|_| Error::Worker)?;
        let failed = match sent {
            Ok(()) => match sent_to.try_finish(&digest, size).await {
                Ok(()) => return Ok(()),
                Err(error) => error,
            },
            Err(SendError::Write(error)) => error,
            Err(SendError::Read(error)) => {
                return Err(Error::ImageUnreadable {
                    name: digest.to_string(),
                    reason: error.to_string(),
                });
            }
        };
        if !failed.retryable() {
            return Err(failed.into());
        }
        tracing::debug!(blob.digest = %digest, error = %failed, "a blob is sent again");
        writer = sent_to.retry(failed).await?;
    }
}

fn send(mut reader: impl Read, writer: &mut BlobWriter) -> Result<(), SendError> {
    loop {
        let mut piece = vec![0; PIECE];
        let n = reader.read(&mut piece).map_err(SendError::Read)?;
        if n == 0 {
            return Ok(());
        }
        piece.truncate(n);
        writer.write(piece.into()).map_err(SendError::Write)?;
    }
}

enum SendError {
    Read(io::Error),
    Write(destination::Error),
}

/// Returns the descriptor of the new layer.
pub(crate) fn descriptor(
    compression: Compression,
    digests: &SequentialDigests,
) -> oci_spec::image::Descriptor {
    let descriptor = base::descriptor(compression.media_type(), digests.digest, digests.size);
    base::indexed(descriptor, digests.index.as_ref())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::image::extract::tests::layers;

    proptest! {
        #![proptest_config(ProptestConfig { cases: 1000, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn a_layer_for_several_gives_the_same_tree(layers in layers(), keep in 0usize..3) {
            let keep = keep.min(layers.len() - 1);
            let mut open = |at: usize| -> io::Result<Box<dyn Read + Send>> {
                Ok(Box::new(io::Cursor::new(layers[at].clone())))
            };
            let one = squash(layers.len(), keep, &mut open, Compression::Gzip);
            let two = squash(layers.len(), keep, &mut open, Compression::Gzip);
            match (one, two) {
                (Ok(one), Ok(two)) => prop_assert_eq!(one.digests, two.digests),
                // Layers that no unpacker can apply.
                (Err(SquashError::Layer(_)), Err(SquashError::Layer(_))) => {}
                (one, two) => prop_assert!(false, "{:?} {:?}", one, two),
            }
        }
    }

    #[test]
    fn a_hard_link_says_mode_owner_and_time_of_its_file() {
        let mut builder = tar::Builder::new(Vec::new());
        for (name, kind, link) in [("f", b'0', ""), ("g", b'1', "f")] {
            let mut header = tar::Header::new_ustar();
            header.set_entry_type(tar::EntryType::new(kind));
            header.as_old_mut().linkname[..link.len()].copy_from_slice(link.as_bytes());
            header.set_mode(0o4755);
            header.set_uid(7);
            header.set_mtime(9);
            header.set_size(0);
            builder.append_data(&mut header, name, io::empty()).unwrap();
        }
        let layer = builder.into_inner().unwrap();
        let mut open = |_: usize| -> io::Result<Box<dyn Read + Send>> {
            Ok(Box::new(io::Cursor::new(layer.clone())))
        };
        let made = squash(1, 0, &mut open, Compression::None).unwrap();
        let mut archive = tar::Archive::new(made.file);
        let entries = archive.entries().unwrap().map(|entry| {
            let entry = entry.unwrap();
            let header = entry.header();
            let kind = header.entry_type().as_byte();
            (
                kind,
                header.mode().unwrap(),
                header.uid().unwrap(),
                header.mtime().unwrap(),
            )
        });
        let entries: Vec<_> = entries.collect();
        assert_eq!(entries, [(b'0', 0o4755, 7, 9), (b'1', 0o4755, 7, 9)]);
    }

    /// A program that reads gzip makes of it what was written, and both digests are those of the bytes.
    #[test]
    fn the_layer_is_one_gzip_member() -> io::Result<()> {
        let mut bytes = Vec::new();
        let mut layer = SequentialLayer::new(&mut bytes, Compression::Gzip)?;
        let tar: Vec<u8> = (0..3_000_000u32).map(|n| (n / 7) as u8).collect();
        layer.write_all(&tar)?;
        let digests = layer.finish()?;
        let mut read = Vec::new();
        flate2::read::GzDecoder::new(bytes.as_slice()).read_to_end(&mut read)?;
        assert!(read == tar);
        assert_eq!(
            (digests.digest, digests.size),
            (Digest::of(&bytes), bytes.len() as u64)
        );
        assert_eq!(digests.diff_id.0, Digest::of(&tar));
        Ok(())
    }
}
