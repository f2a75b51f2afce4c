//! Applies layer archives in order, in memory, and returns the tree that an unpacker of the image would create.
//!
//! Format: image-spec `layer.md` (whiteouts, opaque directories, hard links). Where it is unspecified, this follows
//! containerd's unpacker: symbolic links in parent paths are followed within the tree, and missing parents are created.
//!
//! Layers that old versions of Docker made on aufs contain that file system's own entries (`.wh..wh.aufs`,
//! `.wh..wh.orph`, `.wh..wh.plnk`). They are skipped, but a file below `.wh..wh.plnk/` may be the target of hard links,
//! which then become separate files (`pkg/archive/diff.go` of Docker, `archive/tar.go` of containerd).

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::io::Read;

use super::archive::{Archive, ArchiveError, ArchiveSummary, Entry, EntryKind, decompress};
use super::paths::{join, normalise, split};
use super::texts::Texts;
use super::tree::{Kind, Node, Tree};

/// Maximum total size of paths, targets and attributes in bytes: about ten million entries of an ordinary image.
const METADATA_BYTES: u64 = 2 * 1024 * 1024 * 1024;
/// Estimated memory of an entry in addition to its path: the map's node and its pointers.
const ENTRY_BYTES: u64 = 256;
/// Prefix of entries of aufs itself, at the root of a layer.
const AUFS: &[u8] = b".wh..wh.";
/// Directory in which aufs keeps files with several names.
const AUFS_LINKS: &[u8] = b".wh..wh.plnk/";
/// Maximum number of symbolic links in a path, as in the kernel.
const MAX_SYMLINKS: usize = 40;

/// A stack of layers that is built bottom first.
pub struct Layers {
    tree: Tree,
    /// The layer that last wrote each path. Whiteouts hide only the layers below their own.
    written: BTreeMap<Vec<u8>, u32>,
    /// Directories that a layer wrote into without having an entry for them.
    implicit_dirs: BTreeSet<Vec<u8>>,
    /// Files below `.wh..wh.plnk/` of the layer that is being applied, by the last component of their name.
    aufs_hardlinks: HashMap<Vec<u8>, Node>,
    /// Contents to keep, if any.
    texts: Option<Texts>,
    layer: u32,
    inode: u64,
    charged: u64,
}

impl Default for Layers {
    fn default() -> Self {
        Self::new()
    }
}

impl Layers {
    /// Creates a stack without layers: an empty root directory.
    pub fn new() -> Self {
        let mut layers = Self {
            tree: Tree::default(),
            written: BTreeMap::new(),
            implicit_dirs: BTreeSet::new(),
            aufs_hardlinks: HashMap::new(),
            texts: None,
            layer: 0,
            inode: 0,
            charged: 0,
        };
        let root = layers.directory();
        layers.tree.nodes.insert(Vec::new(), root);
        layers.written.insert(Vec::new(), 0);
        layers
    }

    /// Creates a stack on top of an existing tree.
    pub fn on_top_of(tree: Tree) -> Self {
        let mut layers = Self::new();
        let top = tree.nodes.values().map(|node| node.inode).max();
        layers.inode += top.unwrap_or(0);
        layers
            .written
            .extend(tree.nodes.keys().map(|path| (path.clone(), 0)));
        layers.tree.nodes.extend(tree.nodes);
        layers
    }

    /// Keeps small texts of the layers that are applied from now on.
    #[must_use]
    pub fn keeping(mut self, texts: Texts) -> Self {
        self.texts = Some(texts);
        self
    }

    /// Applies one more layer (plain, gzip or zstd) and returns the properties of its tar.
    ///
    /// After an error, the tree contains a part of the layer and must not be used.
    pub fn apply(&mut self, layer: impl Read) -> Result<ArchiveSummary, ArchiveError> {
        let (_, reader) =
            decompress(layer).map_err(|source| ArchiveError::Io { offset: 0, source })?;
        self.layer += 1;
        let mut archive = Archive::new(reader);
        let mut emptied = HashSet::new();
        self.aufs_hardlinks.clear();
        while let Some(entry) = archive.next_entry()? {
            self.entry(&entry, &mut archive, &mut emptied)?;
        }
        archive.finish()
    }

    /// Returns the tree of all layers.
    pub fn into_tree(self) -> Tree {
        self.tree
    }

    /// Returns the tree of all layers like [`Layers::into_tree`], and the texts that were kept.
    pub(super) fn into_tree_and_texts(self) -> (Tree, Option<Texts>) {
        (self.tree, self.texts)
    }

    /// Returns the tree of all layers like [`Layers::into_tree`], and marks directories as implicit whose topmost layer
    /// writes into them without an entry for them. Unpackers differ in the metadata of such directories.
    pub fn into_lenient_tree(mut self) -> Tree {
        for path in &self.implicit_dirs {
            if let Some(node) = self.tree.nodes.get_mut(path) {
                node.implicit = true;
            }
        }
        self.tree
    }

    fn entry<R: Read>(
        &mut self,
        entry: &Entry,
        archive: &mut Archive<R>,
        emptied: &mut HashSet<Vec<u8>>,
    ) -> Result<(), ArchiveError> {
        let name =
            normalise(&entry.name).map_err(|reason| ArchiveError::entry(&entry.name, reason))?;
        if name.starts_with(AUFS) && name != b".wh..wh..opq" {
            return self.aufs_entry(&name, entry, archive);
        }
        let (parent, base) = split(&name);
        if let Some(hidden) = base.strip_prefix(b".wh.") {
            // umoci lists what was in a directory that became a file, after the file. Nothing is left to hide there.
            if self.is_in_file(parent) {
                return Ok(());
            }
            // Unpackers create the parent directory of a whiteout.
            let parent = self.parent(parent, &entry.name)?;
            if hidden == b".wh..opq" {
                if emptied.insert(parent.clone()) {
                    self.remove_older(&parent, false);
                }
            } else if hidden.is_empty() || hidden == b"." || hidden == b".." {
                return Err(ArchiveError::entry(&entry.name, "a whiteout of nothing"));
            } else if !hidden.starts_with(b".wh.") {
                self.remove_older(&join(&parent, hidden), true);
            }
            return Ok(());
        }
        let path = if name.is_empty() {
            Vec::new()
        } else {
            join(&self.parent(parent, &entry.name)?, base)
        };
        if path.is_empty() && entry.kind != EntryKind::Directory {
            return Err(ArchiveError::entry(
                &entry.name,
                "the root must be a directory",
            ));
        }
        let node = match entry.kind {
            EntryKind::Hardlink => match self.linked(entry, &path)? {
                Some(node) => node,
                None => return Ok(()),
            },
            _ => self.described(&path, entry, archive)?,
        };
        let keep_children = node.kind == Kind::Directory
            && self
                .tree
                .nodes
                .get(&path)
                .is_some_and(|old| old.kind == Kind::Directory);
        if !keep_children {
            self.remove(&path);
        }
        self.insert(path, node)
    }

    /// Returns whether a path or one above it is neither a directory nor a symbolic link.
    fn is_in_file(&self, path: &[u8]) -> bool {
        std::iter::successors(Some(path), |path| (!path.is_empty()).then(|| split(path).0))
            .filter_map(|path| self.tree.nodes.get(path))
            .any(|node| !matches!(node.kind, Kind::Directory | Kind::Symlink))
    }

    /// Returns the target of the hard link `path`, or `None` if that is `path` itself.
    fn linked(&mut self, entry: &Entry, path: &[u8]) -> Result<Option<Node>, ArchiveError> {
        let failed = |reason: &str| ArchiveError::entry(&entry.name, reason);
        let missing = || {
            let target = super::vis::encode(&entry.link);
            failed(&format!("a hard link to {target}, which does not exist"))
        };
        let target = normalise(&entry.link).map_err(failed)?;
        let (parent, base) = split(&target);
        if target.starts_with(AUFS_LINKS) {
            let mut node = self.aufs_hardlinks.get(base).cloned().ok_or_else(missing)?;
            self.inode += 1;
            node.inode = self.inode;
            return Ok(Some(node));
        }
        let target = join(&self.parent(parent, &entry.name)?, base);
        if target == path {
            return Ok(None);
        }
        match self.tree.nodes.get(&target) {
            Some(node) if node.kind != Kind::Directory => Ok(Some(node.clone())),
            Some(_) => Err(failed("a hard link to a directory")),
            None => Err(missing()),
        }
    }

    /// Skips an entry of aufs itself, but records files that may be targets of hard links.
    fn aufs_entry<R: Read>(
        &mut self,
        name: &[u8],
        entry: &Entry,
        archive: &mut Archive<R>,
    ) -> Result<(), ArchiveError> {
        if name.starts_with(AUFS_LINKS) && entry.kind == EntryKind::File {
            let node = self.described(name, entry, archive)?;
            self.charge(name, &node)?;
            self.aufs_hardlinks.insert(split(name).1.to_vec(), node);
        }
        Ok(())
    }

    fn described<R: Read>(
        &mut self,
        path: &[u8],
        entry: &Entry,
        archive: &mut Archive<R>,
    ) -> Result<Node, ArchiveError> {
        self.inode += 1;
        let mut node = Node::of_entry(entry, self.inode);
        if node.kind == Kind::File {
            node.content = Some(match &mut self.texts {
                Some(texts) => texts.read(path, entry, archive)?,
                None => archive.content_digest()?,
            });
        }
        Ok(node)
    }

    /// Resolves a parent directory: symbolic links are followed within the tree and missing directories are created.
    fn parent(&mut self, parent: &[u8], entry: &[u8]) -> Result<Vec<u8>, ArchiveError> {
        let real = self.real_parent(parent, entry)?;
        let mut above = real.as_slice();
        while self.written.get(above) != Some(&self.layer)
            && self.implicit_dirs.insert(above.to_vec())
        {
            above = split(above).0;
        }
        Ok(real)
    }

    fn real_parent(&mut self, parent: &[u8], entry: &[u8]) -> Result<Vec<u8>, ArchiveError> {
        // A path that is in the map has no symbolic links above it.
        if self
            .tree
            .nodes
            .get(parent)
            .is_some_and(|node| node.kind == Kind::Directory)
        {
            return Ok(parent.to_vec());
        }
        let mut real: Vec<u8> = Vec::new();
        let mut left: Vec<Vec<u8>> = parent
            .split(|&b| b == b'/')
            .rev()
            .map(<[u8]>::to_vec)
            .collect();
        let mut links = 0;
        while let Some(component) = left.pop() {
            match component.as_slice() {
                b"" | b"." => continue,
                b".." => {
                    real.truncate(real.iter().rposition(|&b| b == b'/').unwrap_or(0));
                    continue;
                }
                _ => {}
            }
            let next = join(&real, &component);
            match self.tree.nodes.get(&next) {
                Some(node) if node.kind == Kind::Directory => real = next,
                Some(Node {
                    target: Some(target),
                    ..
                }) => {
                    links += 1;
                    if links > MAX_SYMLINKS {
                        return Err(ArchiveError::entry(
                            entry,
                            "too many symbolic links in the path",
                        ));
                    }
                    if target.starts_with(b"/") {
                        real.clear();
                    }
                    left.extend(target.split(|&b| b == b'/').rev().map(<[u8]>::to_vec));
                    if left.len() > super::archive::PATH_BYTES {
                        return Err(ArchiveError::entry(
                            entry,
                            "the path is too long after following symbolic links",
                        ));
                    }
                }
                Some(_) => {
                    let reason = format!("{} is no directory", super::vis::encode(&next));
                    return Err(ArchiveError::entry(entry, reason));
                }
                None => {
                    let node = self.directory();
                    self.insert(next.clone(), node)?;
                    real = next;
                }
            }
        }
        Ok(real)
    }

    fn directory(&mut self) -> Node {
        self.inode += 1;
        Node::implicit_directory(self.inode)
    }

    fn insert(&mut self, path: Vec<u8>, node: Node) -> Result<(), ArchiveError> {
        self.charge(&path, &node)?;
        if path.len() > super::archive::PATH_BYTES {
            return Err(ArchiveError::entry(
                &path,
                "the path is too long after following symbolic links",
            ));
        }
        self.implicit_dirs.remove(&path);
        self.written.insert(path.clone(), self.layer);
        self.tree.nodes.insert(path, node);
        Ok(())
    }

    /// Charges an entry against the memory limit. Nothing is refunded if a path is replaced, so that the sum bounds the
    /// work, too.
    fn charge(&mut self, path: &[u8], node: &Node) -> Result<(), ArchiveError> {
        let attributes: usize = node
            .xattrs
            .iter()
            .map(|(name, value)| name.len() + value.len() + 64)
            .sum();
        let own = 2 * path.len() + node.target.as_ref().map_or(0, Vec::len) + attributes;
        self.charged += ENTRY_BYTES + own as u64;
        if self.charged > METADATA_BYTES {
            return Err(ArchiveError::Limit {
                what: "bytes of file names and metadata",
                limit: METADATA_BYTES,
            });
        }
        Ok(())
    }

    fn remove(&mut self, path: &[u8]) {
        if self.tree.nodes.contains_key(path) {
            for path in self.subtree(path, true) {
                self.tree.nodes.remove(&path);
                self.written.remove(&path);
            }
        }
    }

    /// Removes what lower layers have at and below `path`, but not what the current layer has written there.
    fn remove_older(&mut self, path: &[u8], itself: bool) {
        let subtree = self.subtree(path, itself);
        let (mut newer, mut older) = (HashSet::new(), Vec::new());
        for path in subtree {
            if self.written.get(&path) == Some(&self.layer) {
                let mut above = split(&path).0;
                while !above.is_empty() && newer.insert(above.to_vec()) {
                    above = split(above).0;
                }
            } else {
                older.push(path);
            }
        }
        for path in older.iter().filter(|path| !newer.contains(*path)) {
            self.tree.nodes.remove(path);
            self.written.remove(path);
        }
    }

    fn subtree(&self, path: &[u8], itself: bool) -> Vec<Vec<u8>> {
        let mut paths = Vec::new();
        if itself && self.tree.nodes.contains_key(path) {
            paths.push(path.to_vec());
        }
        let below = if path.is_empty() {
            Vec::new()
        } else {
            join(path, b"")
        };
        let from = (
            std::ops::Bound::Excluded(below.clone()),
            std::ops::Bound::Unbounded,
        );
        let range = self.tree.nodes.range::<Vec<u8>, _>(from);
        paths.extend(
            range
                .map(|(path, _)| path)
                .take_while(|path| path.starts_with(&below))
                .cloned(),
        );
        paths
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    /// `(name, type, link or content)`
    type Row<'a> = (&'a str, u8, &'a str);

    fn tar(rows: &[Row<'_>]) -> Vec<u8> {
        let mut out = Vec::new();
        for &(name, kind, text) in rows {
            let mut header = tar::Header::new_ustar();
            header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
            header.set_entry_type(tar::EntryType::new(kind));
            header.set_mode(0o644);
            header.set_uid(0);
            header.set_gid(0);
            header.set_mtime(1);
            let content = if kind == b'0' || kind == b'x' {
                text.as_bytes()
            } else {
                b""
            };
            if content.is_empty() {
                header.as_old_mut().linkname[..text.len()].copy_from_slice(text.as_bytes());
            }
            header.set_size(content.len() as u64);
            header.set_cksum();
            out.extend_from_slice(header.as_bytes());
            out.extend_from_slice(content);
            out.resize(out.len().next_multiple_of(512), 0);
        }
        out.extend_from_slice(&[0; 1024]);
        out
    }

    fn apply(layers: &[&[Row<'_>]]) -> Result<Vec<String>, ArchiveError> {
        let mut stack = Layers::new();
        for rows in layers {
            stack.apply(tar(rows).as_slice())?;
        }
        Ok(stack
            .into_tree()
            .iter()
            .skip(1)
            .map(|(path, _)| String::from_utf8_lossy(path).into_owned())
            .collect())
    }

    #[test]
    fn entries_of_aufs_are_skipped_and_its_links_become_files() -> Result<(), ArchiveError> {
        let layer: &[Row<'_>] = &[
            (".wh..wh.aufs", b'0', ""),
            (".wh..wh.orph/", b'5', ""),
            (".wh..wh.plnk/", b'5', ""),
            (".wh..wh.plnk/1.2", b'0', "hard"),
            ("etc/", b'5', ""),
            ("etc/h", b'1', ".wh..wh.plnk/1.2"),
            ("etc/h2", b'1', ".wh..wh.plnk/1.2"),
        ];
        assert_eq!(apply(&[layer])?, ["etc", "etc/h", "etc/h2"]);
        let mut stack = Layers::new();
        stack.apply(tar(layer).as_slice())?;
        let tree = stack.into_tree();
        let sizes: Vec<u64> = tree.iter().skip(2).map(|(_, node)| node.size).collect();
        assert_eq!(sizes, [4, 4]);

        // Neither a file of another layer nor a directory is a valid target.
        for wrong in [".wh..wh.plnk/1.2", ".wh..wh.plnk"] {
            let links: &[Row<'_>] = &[("x", b'1', wrong)];
            assert!(apply(&[layer, links]).is_err(), "{wrong}");
        }
        Ok(())
    }

    #[test]
    fn whiteouts_hide_lower_layers_only() -> Result<(), ArchiveError> {
        let base: &[Row<'_>] = &[
            ("d/", b'5', ""),
            ("d/a", b'0', "x"),
            ("d/b", b'0', "x"),
            ("e", b'0', "x"),
            ("e-", b'0', ""),
        ];
        let cases: &[(&[Row<'_>], &[&str])] = &[
            (&[("d/.wh.a", b'0', "")], &["d", "d/b", "e", "e-"]),
            (&[(".wh.d", b'0', "")], &["e", "e-"]),
            (
                &[
                    ("d/", b'5', ""),
                    ("d/.wh..wh..opq", b'0', ""),
                    ("d/n", b'0', ""),
                ],
                &["d", "d/n", "e", "e-"],
            ),
            // The opaque whiteout follows entries of its own layer.
            (
                &[("d/n", b'0', ""), ("d/.wh..wh..opq", b'0', "")],
                &["d", "d/n", "e", "e-"],
            ),
            (
                &[("d/", b'5', ""), ("d/n/m", b'0', ""), (".wh.d", b'0', "")],
                &["d", "d/n", "d/n/m", "e", "e-"],
            ),
            (
                &[(".wh.e", b'0', ""), ("e", b'5', ""), ("e/f", b'0', "")],
                &["d", "d/a", "d/b", "e", "e-", "e/f"],
            ),
            // A file that replaces a directory removes everything below it.
            (&[("d", b'0', "y")], &["d", "e", "e-"]),
            (
                &[("d", b'0', "y"), ("d/.wh.a", b'0', "")],
                &["d", "e", "e-"],
            ),
            (&[("e", b'5', "")], &["d", "d/a", "d/b", "e", "e-"]),
            // Entries of aufs are not part of the tree.
            (
                &[(".wh..wh.plnk", b'0', "")],
                &["d", "d/a", "d/b", "e", "e-"],
            ),
        ];
        for (rows, expected) in cases {
            assert_eq!(apply(&[base, rows])?, *expected, "{rows:?}");
        }
        Ok(())
    }

    #[test]
    fn hardlinks_share_a_file_until_one_is_replaced() -> Result<(), ArchiveError> {
        let mut stack = Layers::new();
        stack.apply(tar(&[("a", b'0', "x"), ("b", b'1', "a"), ("c", b'1', "./b")]).as_slice())?;
        stack.apply(tar(&[("b", b'0', "y")]).as_slice())?;
        let tree = stack.into_tree();
        let inode = |path: &str| tree.get(path.as_bytes()).map(|node| node.inode);
        assert_eq!(inode("a"), inode("c"));
        assert_ne!(inode("a"), inode("b"));
        Ok(())
    }

    #[test]
    fn links_in_the_path_stay_inside_the_tree() -> Result<(), ArchiveError> {
        let rows: &[Row<'_>] = &[
            ("usr/bin/", b'5', ""),
            ("bin", b'2', "../../usr/bin"),
            ("bin/x", b'0', ""),
            ("abs", b'2', "/usr"),
            ("abs/y", b'0', ""),
        ];
        assert_eq!(
            apply(&[rows])?,
            ["abs", "bin", "usr", "usr/bin", "usr/bin/x", "usr/y"]
        );
        Ok(())
    }

    #[test]
    fn what_cannot_be_applied_is_refused() {
        let cases: &[&[Row<'_>]] = &[
            &[("../x", b'0', "")],
            &[("a/../../x", b'0', "")],
            &[("l", b'1', "nowhere")],
            &[("d/", b'5', ""), ("l", b'1', "d")],
            &[("f", b'0', ""), ("f/x", b'0', "")],
            &[("s", b'2', "s"), ("s/x", b'0', "")],
            &[(".wh.", b'0', "")],
            &[("./", b'2', "x")],
            &[("x", b'S', "")],
            &[("x", b'x', "20 GNU.sparse.map=1\n"), ("f", b'0', "")],
            &[("x", b'x', "12 path=abc\n")],
        ];
        for rows in cases {
            assert!(apply(&[rows]).is_err(), "{rows:?}");
        }
    }

    #[test]
    fn every_codec_and_several_members_are_one_tar() -> Result<(), Box<dyn std::error::Error>> {
        let plain = tar(&[("a", b'0', "hello"), ("b", b'5', "")]);
        let (first, second) = plain.split_at(600);
        let mut gzip = Vec::new();
        let mut zstd = Vec::new();
        for part in [first, second] {
            let mut encoder = flate2::write::GzEncoder::new(&mut gzip, flate2::Compression::fast());
            encoder.write_all(part)?;
            encoder.finish()?;
            let level = structured_zstd::encoding::CompressionLevel::Fastest;
            zstd.extend(structured_zstd::encoding::compress_to_vec(part, level));
        }
        let expected = crate::common::digest::Digest::of(&plain);
        for bytes in [plain.clone(), gzip.clone(), zstd] {
            let facts = Layers::new().apply(bytes.as_slice())?;
            assert_eq!(
                (facts.diff_id, facts.tar_size, facts.trailing),
                (expected, plain.len() as u64, 0)
            );
            assert!(facts.terminated);
        }
        assert!(Layers::new().apply(&gzip[..gzip.len() - 9]).is_err());
        Ok(())
    }

    #[test]
    fn damage_is_an_error_and_never_a_panic() {
        let good = tar(&[
            ("a", b'0', "hello"),
            ("x", b'x', "12 path=abc\n"),
            ("b", b'5', ""),
        ]);
        for cut in 0..good.len() - 1024 {
            let _ = Layers::new().apply(&good[..cut]);
        }
        for at in 0..good.len() - 1024 {
            for flip in [0x01, 0x80, 0xff] {
                let mut bad = good.clone();
                bad[at] ^= flip;
                let _ = Layers::new().apply(bad.as_slice());
            }
        }
        // A size far beyond the end of the archive must not cost memory.
        let mut header = tar::Header::new_gnu();
        header.set_size(1 << 60);
        header.set_entry_type(tar::EntryType::new(b'x'));
        header.set_cksum();
        assert!(matches!(
            Layers::new().apply(header.as_bytes().as_slice()),
            Err(ArchiveError::Limit { .. })
        ));
    }
}
