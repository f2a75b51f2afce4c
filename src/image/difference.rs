//! What differs between two images: of their trees, or only of the layers that they do not share.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io::Read;

use super::verify::archive::{Archive, ArchiveError, Entry, EntryKind, decompress};
use super::verify::paths::{join, normalise, split};
use super::verify::tree::{Kind, Node, Time, Tree};

/// Maximum memory for the paths of one image's own layers, in bytes: about ten million entries.
const METADATA: u64 = 2 << 30;
/// Estimated memory of a path in addition to its bytes.
const PATH: u64 = 256;

/// How a path differs; written as the letters of `diff`, and W.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub enum Change {
    /// It is only in the second image.
    #[serde(rename = "A")]
    Added,
    /// It is in both, and differs.
    #[serde(rename = "C")]
    Changed,
    /// It is only in the first image.
    #[serde(rename = "D")]
    Deleted,
    /// It is in the own layers of one image only. What the other has there is in the layers that were not read.
    #[serde(rename = "W")]
    Written,
}

/// A path that differs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Changed {
    /// The path, without a leading slash.
    pub path: Vec<u8>,
    /// How it differs.
    pub change: Change,
    /// What the first image has, if it is there and known.
    pub before: Option<Node>,
    /// What the second image has, if it is there and known.
    pub after: Option<Node>,
    /// Whether it is a hard link to another path than in the first image, of those that are in both.
    pub link: bool,
    /// Whether only one of the images hides what the layers that were not read have below this directory.
    pub opaque: bool,
}

/// Returns for each of `paths` with several hard links the first of them, of those that are in `paths`.
fn links<'a>(paths: impl Iterator<Item = (&'a [u8], &'a Node)>) -> HashMap<&'a [u8], &'a [u8]> {
    let mut first = HashMap::<u64, &[u8]>::new();
    let files = paths.filter(|(_, node)| node.kind != Kind::Directory);
    files
        .map(|(path, node)| (path, *first.entry(node.inode).or_insert(path)))
        .filter(|(path, leader)| path != leader)
        .collect()
}

/// Compares two whole trees. A directory of which only the time differs is left out.
pub fn of_trees(before: &Tree, after: &Tree) -> Vec<Changed> {
    let paths: BTreeSet<&[u8]> = before
        .iter()
        .chain(after.iter())
        .map(|(path, _)| path)
        .collect();
    let links_a = links(before.iter().filter(|(path, _)| after.get(path).is_some()));
    let links_b = links(after.iter().filter(|(path, _)| before.get(path).is_some()));
    let of = |path: &[u8]| {
        let (a, b) = (before.get(path), after.get(path));
        let link = links_a.get(path) != links_b.get(path);
        let change = match (a, b) {
            (Some(a), Some(b)) if is_equal(a, b) && !link => return None,
            (Some(_), Some(_)) => Change::Changed,
            (Some(_), None) => Change::Deleted,
            (None, _) => Change::Added,
        };
        Some(Changed {
            path: path.to_vec(),
            change,
            before: a.cloned(),
            after: b.cloned(),
            link,
            opaque: false,
        })
    };
    paths.into_iter().filter_map(of).collect()
}

/// Returns whether both are the same, but for hard links and times of directories.
fn is_equal(a: &Node, b: &Node) -> bool {
    let comparable = |node: &Node| Node {
        inode: 0,
        implicit: false,
        mtime: if node.kind == Kind::Directory {
            Time::default()
        } else {
            node.mtime
        },
        ..node.clone()
    };
    comparable(a) == comparable(b)
}

/// What the layers of one image above those that another shares say. Names are taken as they are.
#[derive(Debug, Default)]
pub struct OwnLayers {
    /// With the layer that said it last; `None`: removed.
    paths: BTreeMap<Vec<u8>, (u32, Option<Node>)>,
    /// Directories of which lower layers have nothing.
    opaque: BTreeSet<Vec<u8>>,
    layer: u32,
    inode: u64,
    charged: u64,
}

impl OwnLayers {
    /// Applies the next layer (plain, gzip or zstd), bottom first.
    pub fn apply(&mut self, layer: impl Read) -> Result<(), ArchiveError> {
        let (_, reader) =
            decompress(layer).map_err(|source| ArchiveError::Io { offset: 0, source })?;
        self.layer += 1;
        let mut archive = Archive::new(reader);
        while let Some(entry) = archive.next_entry()? {
            self.entry(&entry, &mut archive)?;
        }
        archive.finish()?;
        Ok(())
    }

    fn entry<R: Read>(
        &mut self,
        entry: &Entry,
        archive: &mut Archive<R>,
    ) -> Result<(), ArchiveError> {
        let name =
            normalise(&entry.name).map_err(|reason| ArchiveError::entry(&entry.name, reason))?;
        self.charged += PATH + 2 * name.len() as u64 + entry.link.len() as u64;
        if self.charged > METADATA {
            return Err(ArchiveError::Limit {
                what: "bytes of file names",
                limit: METADATA,
            });
        }
        let (parent, base) = split(&name);
        if let Some(hidden) = base.strip_prefix(b".wh.") {
            match hidden {
                b".wh..opq" => {
                    self.forget(parent, false);
                    self.opaque.insert(parent.to_vec());
                }
                // Entries of aufs itself.
                _ if hidden.is_empty() || hidden.starts_with(b".wh.") => {}
                _ => {
                    let path = join(parent, hidden);
                    self.forget(&path, true);
                    // What this layer has written itself stays.
                    let layer = self.layer;
                    self.paths.entry(path).or_insert((layer, None));
                }
            }
            return Ok(());
        }
        let node = self.node(entry, archive)?;
        if node.kind != Kind::Directory {
            self.layer += 1;
            self.forget(&name, false);
            self.layer -= 1;
            self.opaque.remove(&name);
        }
        self.paths.insert(name, (self.layer, Some(node)));
        Ok(())
    }

    /// Removes what lower layers say below a path, and `itself`.
    fn forget(&mut self, path: &[u8], itself: bool) {
        let below = if path.is_empty() {
            Vec::new()
        } else {
            join(path, b"")
        };
        let layer = self.layer;
        let range = self.paths.range(below.clone()..);
        let old: Vec<Vec<u8>> = range
            .take_while(|(path, _)| path.starts_with(&below))
            .filter(|(path, (of, _))| *of < layer && !path.is_empty())
            .map(|(path, _)| path.clone())
            .collect();
        for path in old {
            self.paths.remove(&path);
        }
        if itself && self.paths.get(path).is_some_and(|(of, _)| *of < layer) {
            self.paths.remove(path);
        }
    }

    fn node<R: Read>(
        &mut self,
        entry: &Entry,
        archive: &mut Archive<R>,
    ) -> Result<Node, ArchiveError> {
        if entry.kind == EntryKind::Hardlink {
            let link = normalise(&entry.link)
                .map_err(|reason| ArchiveError::entry(&entry.name, reason))?;
            if let Some((_, Some(node))) = self.paths.get(&link) {
                return Ok(node.clone());
            }
        }
        self.inode += 1;
        let mut node = Node::of_entry(entry, self.inode);
        match entry.kind {
            EntryKind::File => node.content = Some(archive.content_digest()?),
            // To a file of the layers that are not read.
            EntryKind::Hardlink => node.target = Some(entry.link.clone()),
            _ => {}
        }
        Ok(node)
    }

    /// Returns the paths that are there.
    fn nodes(&self) -> impl Iterator<Item = (&[u8], &Node)> {
        let nodes = self.paths.iter();
        nodes.filter_map(|(path, (_, node))| Some((path.as_slice(), node.as_ref()?)))
    }

    /// Returns whether nothing of the common layers is seen below a path.
    fn hides_below(&self, path: &[u8]) -> bool {
        // No file is called so.
        matches!(self.state(&join(path, b"\0")), State::Gone)
    }

    /// Returns what is known of a path.
    fn state(&self, path: &[u8]) -> State<'_> {
        match self.paths.get(path) {
            Some((_, Some(node))) => return State::There(node),
            Some((_, None)) => return State::Gone,
            None => {}
        }
        let mut at = path;
        while !at.is_empty() {
            at = split(at).0;
            let hides = match self.paths.get(at) {
                Some((_, None)) => true,
                Some((_, Some(node))) => node.kind != Kind::Directory,
                None => false,
            };
            if hides || self.opaque.contains(at) {
                return State::Gone;
            }
        }
        State::Common
    }
}

enum State<'a> {
    There(&'a Node),
    Gone,
    /// As in the common layers.
    Common,
}

/// Compares the own layers of two images whose other layers are the same. Below a directory that is opaque or replaced in
/// one image, what the common layers have there is not listed; an opaque directory says so itself.
pub fn of_own_layers(before: &OwnLayers, after: &OwnLayers) -> Vec<Changed> {
    let all = |of: &'_ OwnLayers| {
        of.paths
            .keys()
            .chain(&of.opaque)
            .cloned()
            .collect::<BTreeSet<_>>()
    };
    let paths: BTreeSet<Vec<u8>> = all(before).into_iter().chain(all(after)).collect();
    let there = |of: &'_ OwnLayers, path: &[u8]| matches!(of.state(path), State::There(_));
    let links_a = links(before.nodes().filter(|(path, _)| there(after, path)));
    let links_b = links(after.nodes().filter(|(path, _)| there(before, path)));
    let of = |path: &Vec<u8>| {
        let link = links_a.get(path.as_slice()) != links_b.get(path.as_slice());
        let is_opaque = before.opaque.contains(path) || after.opaque.contains(path);
        let opaque = is_opaque && before.hides_below(path) != after.hides_below(path);
        let (change, a, b) = match (before.state(path), after.state(path)) {
            (State::There(a), State::There(b)) if is_equal(a, b) && !link && !opaque => {
                return None;
            }
            (State::There(a), State::There(b)) => (Change::Changed, Some(a), Some(b)),
            (State::There(a), State::Gone) => (Change::Deleted, Some(a), None),
            (State::Gone, State::There(b)) => (Change::Added, None, Some(b)),
            (State::Gone, State::Common) => (Change::Added, None, None),
            (State::Common, State::Gone) => (Change::Deleted, None, None),
            (State::There(a), State::Common) => (Change::Written, Some(a), None),
            (State::Common, State::There(b)) => (Change::Written, None, Some(b)),
            (State::Common, State::Common) if opaque => (Change::Written, None, None),
            (State::Gone, State::Gone) | (State::Common, State::Common) => return None,
        };
        // A directory has an entry for what is in it; the root is always there.
        let is_directory = |node: Option<&Node>| node.is_none_or(|n| n.kind == Kind::Directory);
        if change == Change::Written
            && is_directory(a)
            && is_directory(b)
            && path.is_empty()
            && !opaque
        {
            return None;
        }
        Some(Changed {
            path: path.clone(),
            change,
            before: a.cloned(),
            after: b.cloned(),
            link,
            opaque,
        })
    };
    paths.iter().filter_map(of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::verify::layers::Layers;

    fn layer(rows: &[(&str, u8, &str)]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for (name, kind, text) in rows {
            let mut header = tar::Header::new_ustar();
            header.set_entry_type(tar::EntryType::new(*kind));
            header.set_mode(0o644);
            header.set_mtime(1);
            if *kind == b'1' {
                header.set_size(0);
                builder.append_link(&mut header, name, text).unwrap();
                continue;
            }
            header.set_size(text.len() as u64);
            builder
                .append_data(&mut header, name, text.as_bytes())
                .unwrap();
        }
        builder.into_inner().unwrap()
    }

    fn shown(changes: &[Changed]) -> Vec<String> {
        let line = |c: &Changed| {
            let size = |node: &Option<Node>| node.as_ref().map(|node| node.size);
            let path = String::from_utf8_lossy(&c.path).into_owned();
            format!(
                "{:?} {path} {:?} {:?}",
                c.change,
                size(&c.before),
                size(&c.after)
            )
        };
        changes.iter().map(line).collect()
    }

    #[test]
    fn whole_trees_and_own_layers_say_the_same_as_far_as_both_know() -> Result<(), ArchiveError> {
        let common = layer(&[
            ("d/", b'5', ""),
            ("d/kept", b'0', "kept"),
            ("d/gone", b'0', "gone"),
            ("d/new", b'0', "old text"),
            ("o/", b'5', ""),
            ("o/hidden", b'0', "hidden"),
        ]);
        let a = layer(&[("a", b'0', "a"), ("both", b'0', "one"), ("same", b'0', "s")]);
        let b = [
            layer(&[
                ("both", b'0', "other"),
                ("same", b'0', "s"),
                ("tmp", b'0', "t"),
            ]),
            layer(&[
                ("d/", b'5', ""),
                ("d/.wh.gone", b'0', ""),
                ("d/new", b'0', "new"),
                ("o/", b'5', ""),
                ("o/.wh..wh..opq", b'0', ""),
                ("o/x", b'0', "x"),
                (".wh.tmp", b'0', ""),
            ]),
        ];
        let mut tree = Layers::new();
        tree.apply(common.as_slice())?;
        let common = tree.into_tree();
        let (mut all_a, mut all_b) = (Layers::on_top_of(common.clone()), Layers::on_top_of(common));
        let (mut own_a, mut own_b) = (OwnLayers::default(), OwnLayers::default());
        all_a.apply(a.as_slice())?;
        own_a.apply(a.as_slice())?;
        for layer in &b {
            all_b.apply(layer.as_slice())?;
            own_b.apply(layer.as_slice())?;
        }
        assert_eq!(
            shown(&of_trees(&all_a.into_tree(), &all_b.into_tree())),
            [
                "Deleted a Some(1) None",
                "Changed both Some(3) Some(5)",
                "Deleted d/gone Some(4) None",
                "Changed d/new Some(8) Some(3)",
                "Deleted o/hidden Some(6) None",
                "Added o/x None Some(1)",
            ]
        );
        assert_eq!(
            shown(&of_own_layers(&own_a, &own_b)),
            [
                "Written a Some(1) None",
                "Changed both Some(3) Some(5)",
                "Written d None Some(0)",
                "Deleted d/gone None None",
                "Written d/new None Some(3)",
                "Written o None Some(0)",
                "Written o/x None Some(1)",
                "Deleted tmp None None",
            ]
        );
        Ok(())
    }

    fn own(layers: &[&[(&str, u8, &str)]]) -> Result<OwnLayers, ArchiveError> {
        let mut own = OwnLayers::default();
        for rows in layers {
            own.apply(layer(rows).as_slice())?;
        }
        Ok(own)
    }

    /// Paths with `link` or `opaque`, and how they differ.
    fn flagged(changes: &[Changed]) -> Vec<String> {
        let flags = |c: &Changed| {
            let path = String::from_utf8_lossy(&c.path).into_owned();
            format!("{:?} {path} {} {}", c.change, c.link, c.opaque)
        };
        changes.iter().map(flags).collect()
    }

    #[test]
    fn hard_links_that_lead_elsewhere_differ() -> Result<(), ArchiveError> {
        let linked = [("a", b'0', "text"), ("b", b'1', "a"), ("c", b'0', "text")];
        let other = [("a", b'0', "text"), ("b", b'0', "text"), ("c", b'1', "b")];
        let expected = ["Changed b true false", "Changed c true false"];
        let changes = of_own_layers(&own(&[&linked])?, &own(&[&other])?);
        assert_eq!(flagged(&changes), expected);
        let tree = |rows: &[(&str, u8, &str)]| -> Result<Tree, ArchiveError> {
            let mut stack = Layers::new();
            stack.apply(layer(rows).as_slice())?;
            Ok(stack.into_tree())
        };
        assert_eq!(
            flagged(&of_trees(&tree(&linked)?, &tree(&other)?)),
            expected
        );
        assert!(of_trees(&tree(&linked)?, &tree(&linked)?).is_empty());
        // A link that is only in one of them makes no difference for the others.
        let more = [linked[0], linked[1], linked[2], ("0", b'1', "a")];
        let changes = of_trees(&tree(&linked)?, &tree(&more)?);
        assert_eq!(flagged(&changes), ["Added 0 false false"]);
        // Links to files of the common layers.
        let (x, y) = ([("l", b'1', "x")], [("l", b'1', "y")]);
        let changes = of_own_layers(&own(&[&x])?, &own(&[&y])?);
        assert_eq!(flagged(&changes), ["Changed l false false"]);
        assert!(of_own_layers(&own(&[&x])?, &own(&[&x])?).is_empty());
        Ok(())
    }

    #[test]
    fn a_directory_that_is_opaque_in_one_image_is_named() -> Result<(), ArchiveError> {
        let plain = [("d/", b'5', ""), ("d/x", b'0', "x")];
        let opaque = [
            ("d/", b'5', ""),
            ("d/.wh..wh..opq", b'0', ""),
            ("d/x", b'0', "x"),
        ];
        let changes = of_own_layers(&own(&[&plain])?, &own(&[&opaque])?);
        assert_eq!(flagged(&changes), ["Changed d false true"]);
        assert!(of_own_layers(&own(&[&opaque])?, &own(&[&opaque])?).is_empty());
        // Without an entry for the directory.
        let changes = of_own_layers(&own(&[&opaque[1..]])?, &own(&[&plain[1..]])?);
        assert_eq!(flagged(&changes), ["Written d false true"]);
        let changes = of_own_layers(&own(&[&opaque])?, &own(&[])?);
        assert_eq!(
            flagged(&changes),
            ["Written d false true", "Written d/x false false"]
        );
        // What the other image does not have at all it hides as well.
        let removed = [(".wh.d", b'0', "")];
        let changes = of_own_layers(&own(&[&removed])?, &own(&[&removed, &opaque])?);
        assert_eq!(
            flagged(&changes),
            ["Added d false false", "Added d/x false false"]
        );
        Ok(())
    }
}
