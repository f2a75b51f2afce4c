//! Writes specifications: the text by which [`super::validate`] recognises a layer or the tree of an image.
//!
//! What is written is valid for its source, and for nothing else: every property that [`super::validate`] compares is
//! in it.

use std::io::{self, Read, Write};

use super::archive::{Archive, ArchiveError, Codec, Entry, EntryKind, decompress};
use super::layers::Layers;
use super::text::{Content, Item, Type, default_mode, default_time};
use super::texts::Texts;
use super::tree::{Kind, Node, Time};
use super::validate::{End, HashingReader};
use super::vis;
use crate::common::digest::Digest;

/// Maximum size of all texts in the specification of a tree, in bytes. Further files are described by their digests.
const TREE_TEXTS: usize = 64 << 20;

/// Why no specification was written.
#[derive(Debug, thiserror::Error)]
pub enum SpecifyError {
    /// A layer cannot be read.
    #[error(transparent)]
    Archive(#[from] ArchiveError),
    /// The specification cannot be written.
    #[error("cannot write the specification: {0}")]
    Write(#[from] io::Error),
    /// An image without layers has no topmost one.
    #[error("the image has no layer")]
    NoLayer,
}

/// Writes the specification of one layer (plain, gzip or zstd). Files of up to `texts` bytes that are UTF-8 are written
/// as texts, others as size and digest.
pub fn layer(layer: impl Read, texts: u64, out: &mut dyn Write) -> Result<(), SpecifyError> {
    let failed = |source| ArchiveError::Io { offset: 0, source };
    let mut blob = HashingReader::new(layer);
    let (codec, reader) = decompress(&mut blob).map_err(failed)?;
    let mut archive = Archive::new(reader);
    let mut texts = Texts::all(texts, usize::MAX);
    while let Some(entry) = archive.next_entry()? {
        let content = if entry.kind == EntryKind::File && entry.size > 0 {
            let digest = texts.read(&entry.name, &entry, &mut archive)?;
            content(entry.size, digest, texts.take(&digest))
        } else {
            Content::of_bytes("")
        };
        line(&of_entry(entry, content), out)?;
    }
    let facts = archive.finish()?;
    io::copy(&mut blob, &mut io::sink()).map_err(failed)?;
    let end = End {
        terminated: facts.terminated,
        trailing: facts.trailing,
    };
    if !end.terminated {
        writeln!(out, "@end none")?;
    } else if end.trailing > 0 {
        writeln!(out, "@end {}", end.trailing)?;
    }
    writeln!(out, "@diff-id {}", facts.diff_id)?;
    let blob = blob.digest();
    match codec {
        Codec::None => {}
        Codec::Gzip => writeln!(out, "@gzip {blob}")?,
        Codec::Zstd => writeln!(out, "@zstd {blob}")?,
    }
    Ok(())
}

/// Writes the specification of the tree to which `layers`, bottom first, unpack. `texts` is as in [`layer`].
pub fn tree<R: Read>(
    layers: impl IntoIterator<Item = io::Result<R>>,
    texts: u64,
    out: &mut dyn Write,
) -> Result<(), SpecifyError> {
    let mut stack = Layers::new().keeping(Texts::all(texts, TREE_TEXTS));
    for layer in layers {
        stack.apply(layer.map_err(|source| ArchiveError::Io { offset: 0, source })?)?;
    }
    let (tree, texts) = stack.into_tree_and_texts();
    writeln!(out, "@tree")?;
    let links = tree.groups();
    let mut nodes = tree.iter().peekable();
    while let Some((path, node)) = nodes.next() {
        // Its metadata are not compared, and its children say that it exists.
        let below = |(next, _): &(&[u8], &Node)| next.starts_with(path) && next[path.len()] == b'/';
        if node.implicit && (path.is_empty() || nodes.peek().is_some_and(below)) {
            continue;
        }
        let text = node
            .content
            .and_then(|digest| texts.as_ref()?.get(&digest))
            .filter(|text| !text.is_empty());
        let leader = links.get(path).copied().filter(|leader| *leader != path);
        line(&of_node(path, node, leader, text), out)?;
    }
    Ok(())
}

fn content(size: u64, digest: Digest, text: Option<String>) -> Content {
    match text {
        Some(text) => Content::of_bytes(text),
        None => Content::stated(size, digest),
    }
}

fn of_entry(entry: Entry, content: Content) -> Item {
    let base = entry.name.rsplit(|&b| b == b'/').next();
    let whiteout = entry.kind == EntryKind::File
        && base.is_some_and(|base| base.starts_with(b".wh."))
        && (entry.mode, entry.uid, entry.gid, entry.mtime) == (0, 0, 0, Time::default())
        && content.len() == 0;
    Item {
        name: entry.name,
        kind: if whiteout {
            Type::Whiteout
        } else {
            Type::Entry(entry.kind)
        },
        mode: entry.mode,
        uid: entry.uid,
        gid: entry.gid,
        uname: entry.uname,
        gname: entry.gname,
        time: entry.mtime,
        link: entry.link,
        device: entry.rdev,
        content,
        xattrs: entry.xattrs,
        overlay: std::collections::BTreeMap::new(),
        pax: entry.records,
    }
}

fn of_node(path: &[u8], node: &Node, link_to: Option<&[u8]>, text: Option<&str>) -> Item {
    let mut name = if path.is_empty() { b"." } else { path }.to_vec();
    let kind = match node.kind {
        Kind::Directory => {
            name.push(b'/');
            EntryKind::Directory
        }
        _ if link_to.is_some() => EntryKind::Hardlink,
        Kind::File => EntryKind::File,
        Kind::Symlink => EntryKind::Symlink,
        Kind::Char => EntryKind::Char,
        Kind::Block => EntryKind::Block,
        // Layers have no sockets.
        Kind::Fifo | Kind::Socket => EntryKind::Fifo,
    };
    let mut item = Item {
        name,
        kind: Type::Entry(kind),
        mode: default_mode(Type::Entry(kind)),
        uid: 0,
        gid: 0,
        uname: Vec::new(),
        gname: Vec::new(),
        time: default_time(Type::Entry(kind)),
        link: link_to.map_or_else(Vec::new, <[u8]>::to_vec),
        device: node.rdev.unwrap_or_default(),
        content: Content::of_bytes(""),
        xattrs: std::collections::BTreeMap::new(),
        overlay: std::collections::BTreeMap::new(),
        pax: Vec::new(),
    };
    // The other names of a file have its metadata; those of an implicit directory are not compared.
    if link_to.is_some() || node.implicit {
        return item;
    }
    (item.mode, item.uid, item.gid, item.time) = (node.mode, node.uid, node.gid, node.mtime);
    item.xattrs.clone_from(&node.xattrs);
    if let Some(target) = &node.target {
        item.link.clone_from(target);
    }
    if let Some(digest) = node.content.filter(|_| node.size > 0) {
        item.content = content(node.size, digest, text.map(str::to_owned));
    }
    item
}

/// Writes an item as a line that [`super::text::parse`] reads as the same item.
fn line(item: &Item, out: &mut dyn Write) -> io::Result<()> {
    write!(out, "{}", name(&item.name))?;
    if item.kind == Type::Whiteout {
        write!(out, " type=whiteout")?;
        return rest(item, out);
    }
    let is_directory = item.name.ends_with(b"/");
    let word = match item.kind {
        Type::Entry(EntryKind::Directory) if is_directory => None,
        Type::Entry(EntryKind::File | EntryKind::Hardlink | EntryKind::Symlink)
            if !is_directory =>
        {
            None
        }
        Type::Entry(kind) => Some(kind.as_str()),
        Type::Whiteout => None,
        Type::Socket => Some("socket"),
    };
    if let Some(word) = word {
        write!(out, " type={word}")?;
    }
    match item.kind {
        Type::Entry(EntryKind::Hardlink) => write!(out, " hardlink={}", value(&item.link))?,
        Type::Entry(EntryKind::Symlink) => write!(out, " link={}", value(&item.link))?,
        _ => {}
    }
    if item.mode != default_mode(item.kind) {
        write!(out, " mode={:04o}", item.mode)?;
    }
    for (key, id) in [("uid", item.uid), ("gid", item.gid)] {
        if id != 0 {
            write!(out, " {key}={id}")?;
        }
    }
    if item.time != default_time(item.kind) {
        write!(out, " time={}", item.time)?;
    }
    if item.device != (0, 0) {
        write!(out, " device={},{}", item.device.0, item.device.1)?;
    }
    rest(item, out)
}

fn rest(item: &Item, out: &mut dyn Write) -> io::Result<()> {
    for (key, owner) in [("uname", &item.uname), ("gname", &item.gname)] {
        if !owner.is_empty() {
            write!(out, " {key}={}", value(owner))?;
        }
    }
    match (item.content.bytes(), item.content.digest()) {
        (Some([]), _) => {}
        (Some(bytes), _) => write!(out, " content={}", value(bytes))?,
        (None, Some(digest)) => {
            write!(out, " size={} sha256={}", item.content.len(), digest.hex())?;
        }
        (None, None) => write!(out, " size={}", item.content.len())?,
    }
    for (key, xattr) in &item.xattrs {
        write!(out, " xattr.{}={}", vis::encode(key), value(xattr))?;
    }
    if !item.pax.is_empty() {
        write!(out, " pax={}", item.pax.join(","))?;
    }
    writeln!(out)
}

/// Escapes a value: a brace would begin a repetition.
fn value(bytes: &[u8]) -> String {
    vis::encode(bytes).replace('{', "\\173")
}

/// Escapes a name so that it begins no directive and is not empty.
fn name(bytes: &[u8]) -> String {
    let text = value(bytes);
    match bytes.first() {
        None => "{x*0}".to_owned(),
        Some(first @ (b'/' | b'@')) => format!("\\{first:03o}{}", &text[1..]),
        Some(_) => text,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::image::verify::tree::Tree;
    use crate::image::verify::validate::{self, Expected};

    /// An entry as it is stored in a tar.
    #[derive(Clone, Debug, PartialEq)]
    struct Stored {
        name: Vec<u8>,
        kind: u8,
        mode: u32,
        owner: u32,
        time: u32,
        uname: &'static str,
        link: Vec<u8>,
        content: Vec<u8>,
        records: Vec<(&'static str, Vec<u8>)>,
    }

    fn record(key: &str, value: &[u8]) -> Vec<u8> {
        let rest = key.len() + value.len() + 3;
        let length = (1..1000).find(|length: &usize| rest + length.to_string().len() == *length);
        let mut record = format!("{} {key}=", length.unwrap()).into_bytes();
        record.extend_from_slice(value);
        record.push(b'\n');
        record
    }

    fn tar(entries: &[Stored], trailing: usize) -> Vec<u8> {
        let mut out = Vec::new();
        let mut put = |entry: &Stored, kind: u8, name: &[u8], content: &[u8]| {
            let mut header = tar::Header::new_ustar();
            header.as_old_mut().name[..name.len()].copy_from_slice(name);
            header.as_old_mut().linkname[..entry.link.len()].copy_from_slice(&entry.link);
            header.set_entry_type(tar::EntryType::new(kind));
            header.set_mode(entry.mode);
            header.set_uid(entry.owner.into());
            header.set_gid(entry.owner.into());
            header.set_mtime(entry.time.into());
            header.set_username(entry.uname).unwrap();
            if kind == b'3' {
                header.set_device_major(entry.owner).unwrap();
                header.set_device_minor(3).unwrap();
            }
            header.set_size(content.len() as u64);
            header.set_cksum();
            out.extend_from_slice(header.as_bytes());
            out.extend_from_slice(content);
            out.resize(out.len().next_multiple_of(512), 0);
        };
        for entry in entries {
            let records = entry.records.iter();
            let records: Vec<u8> = records
                .flat_map(|(key, value)| record(key, value))
                .collect();
            if !records.is_empty() {
                put(entry, b'x', b"pax", &records);
            }
            // A file whose name ends in a slash is a directory of an old archive.
            let content: &[u8] = if entry.kind == b'0' && !entry.name.ends_with(b"/") {
                &entry.content
            } else {
                b""
            };
            put(entry, entry.kind, &entry.name, content);
        }
        out.resize(out.len() + 1024 + trailing, 0);
        out
    }

    fn stored() -> impl Strategy<Value = Stored> {
        let names: Vec<&'static [u8]> = vec![
            b"a",
            b"b",
            b"d/",
            b"d/x",
            b"d/.wh.y",
            b"./",
            b"/abs",
            b"@at",
            b"#hash",
            b"{x*3}",
            b"sp ace",
            b"\xff\n=\\",
            b"",
        ];
        let contents: Vec<&'static [u8]> = vec![
            b"",
            b"text\n",
            b"t\xc3\xa9xt {} = # \\ \x1b\n",
            b"\xff",
            b"zero\0",
            &[b'y'; 700],
        ];
        let kinds = prop::sample::select(b"0123456".to_vec());
        let record = prop::sample::select(vec![
            ("SCHILY.xattr.user.k{", b"v{ =\0".to_vec()),
            ("SCHILY.xattr.user.empty", Vec::new()),
            ("mtime", b"-1.5".to_vec()),
            ("comment,x", b"y".to_vec()),
            ("uid", b"4000000000".to_vec()),
        ]);
        (
            prop::sample::select(names),
            kinds,
            prop::sample::select(vec![0u32, 0o644, 0o755, 0o777, 0o4755, 0o100_644]),
            0u32..3,
            prop::sample::select(vec![0u32, 1_000_000_000, 1_700_000_000]),
            prop::sample::select(vec!["", "root", "a b"]),
            prop::sample::select(vec![b"".as_slice(), b"a", b"d/x", b"{\n"]),
            prop::sample::select(contents),
            prop::collection::vec(record, 0..3),
        )
            .prop_map(
                |(name, kind, mode, owner, time, uname, link, content, records)| Stored {
                    name: name.to_vec(),
                    kind,
                    mode,
                    owner,
                    time,
                    uname,
                    link: link.to_vec(),
                    content: content.to_vec(),
                    records,
                },
            )
    }

    /// Returns the specification of a layer without the digests of the whole.
    fn entries_of(tar: &[u8], texts: u64) -> Result<Expected, Box<dyn std::error::Error>> {
        let mut text = Vec::new();
        layer(tar, texts, &mut text)?;
        let text = String::from_utf8(text)?;
        assert!(text.is_ascii() && text.contains("@diff-id"), "{text}");
        Ok(Expected {
            diff_id: None,
            ..Expected::parse(&text)?
        })
    }

    /// What an archive says, in the words of the reader.
    fn read(tar: &[u8]) -> Vec<(Entry, Option<Digest>)> {
        let mut archive = Archive::new(tar);
        let mut all = Vec::new();
        while let Some(mut entry) = archive.next_entry().unwrap() {
            let digest = (entry.kind == EntryKind::File).then(|| archive.content_digest().unwrap());
            entry.offset = 0;
            all.push((entry, digest));
        }
        all
    }

    /// Gives the metadata of a line without any to directories that no layer describes and that have no entries: they
    /// are written, as nothing else says that they exist.
    fn state_empty_directories(tree: &mut Tree) {
        let paths: Vec<Vec<u8>> = tree.iter().map(|(path, _)| path.to_vec()).collect();
        for (path, node) in &mut tree.nodes {
            let below = [path.as_slice(), b"/"].concat();
            let is_empty = !path.is_empty() && !paths.iter().any(|other| other.starts_with(&below));
            if node.implicit && is_empty {
                node.implicit = false;
                node.mtime = default_time(Type::Entry(EntryKind::Directory));
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn what_is_written_is_valid_for_its_source_and_nothing_else(
            a in prop::collection::vec(stored(), 0..6),
            b in prop::collection::vec(stored(), 0..6),
            change in any::<prop::sample::Index>(),
            texts in prop::sample::select(vec![0u64, 20, 4096]),
        ) {
            let tar_a = tar(&a, 0);
            let spec = entries_of(&tar_a, texts).unwrap();
            let report = validate::layer(tar_a.as_slice(), &spec, 20).unwrap();
            prop_assert!(report.is_valid(), "{report}");
            // Another archive, and this one with one entry of the other.
            let mut changed = a.clone();
            if !a.is_empty() && !b.is_empty() {
                changed[change.index(a.len())] = b[0].clone();
            }
            for other in [b, changed] {
                let other = tar(&other, 0);
                let same = read(&tar_a) == read(&other);
                let report = validate::layer(other.as_slice(), &spec, 20).unwrap();
                prop_assert_eq!(report.is_valid(), same, "{}", report);
            }
            let longer = tar(&a, 512);
            prop_assert!(!validate::layer(longer.as_slice(), &spec, 20).unwrap().is_valid());
            let spec = entries_of(&longer, texts).unwrap();
            prop_assert!(validate::layer(longer.as_slice(), &spec, 20).unwrap().is_valid());
        }

        #[test]
        fn the_tree_of_layers_is_valid_for_them_and_nothing_else(
            a in prop::collection::vec(prop::collection::vec(stored(), 0..6), 1..3),
            b in prop::collection::vec(stored(), 0..6),
            texts in prop::sample::select(vec![0u64, 4096]),
        ) {
            let tars: Vec<Vec<u8>> = a.iter().map(|entries| tar(entries, 0)).collect();
            let apply = |tars: &[Vec<u8>]| {
                let mut stack = Layers::new();
                for tar in tars {
                    stack.apply(tar.as_slice()).ok()?;
                }
                Some(stack.into_tree())
            };
            let readers = |tars: &[Vec<u8>]| -> Vec<io::Result<io::Cursor<Vec<u8>>>> {
                tars.iter().map(|tar| Ok(io::Cursor::new(tar.clone()))).collect()
            };
            // Some cannot be applied: a link to nothing, a file below a file.
            prop_assume!(apply(&tars).is_some());
            let mut text = Vec::new();
            tree(readers(&tars), texts, &mut text).unwrap();
            let spec = Expected::parse(std::str::from_utf8(&text).unwrap()).unwrap();
            let report = validate::image(readers(&tars), &spec, 20).unwrap();
            prop_assert!(report.is_valid(), "{report}\n{}", String::from_utf8_lossy(&text));
            let more = [tars.clone(), vec![tar(&b, 0)]].concat();
            if let (Some(mut one), Some(other)) = (apply(&tars), apply(&more)) {
                state_empty_directories(&mut one);
                let ignore = crate::image::verify::tree::Ignore { implicit: true, ..Default::default() };
                let same = crate::image::verify::tree::compare(&one, &other, &ignore).is_empty();
                let report = validate::image(readers(&more), &spec, 20).unwrap();
                prop_assert_eq!(report.is_valid(), same, "{}", report);
            }
        }
    }
}
