//! A file tree in memory, with contents as digests, and the list of differences between two trees.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;

use sha2::{Digest as _, Sha256};

use super::vis;
use crate::common::digest::Digest;

/// Type of a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Regular file.
    File,
    /// Directory.
    Directory,
    /// Symbolic link.
    Symlink,
    /// Character device.
    Char,
    /// Block device.
    Block,
    /// Named pipe.
    Fifo,
    /// Socket, which archives cannot contain.
    Socket,
}

impl Kind {
    /// Returns the word of `mtree(5)` for it.
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::File => "file",
            Self::Directory => "dir",
            Self::Symlink => "link",
            Self::Char => "char",
            Self::Block => "block",
            Self::Fifo => "fifo",
            Self::Socket => "socket",
        }
    }
}

/// Seconds and nanoseconds since the epoch. Before it, `seconds` is negative and `nanos` counts up from there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Time {
    /// Whole seconds, rounded down.
    pub seconds: i64,
    /// 0 to 999,999,999.
    pub nanos: u32,
}

impl fmt::Display for Time {
    /// Formats as `SECONDS` or `SECONDS.NANOS`, where the nanoseconds count up from the seconds (-1.500000000 is half a
    /// second before the epoch).
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.nanos == 0 {
            write!(f, "{}", self.seconds)
        } else {
            write!(f, "{}.{:09}", self.seconds, self.nanos)
        }
    }
}

/// One path of a [`Tree`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    /// Type of the path.
    pub kind: Kind,
    /// Permission bits with setuid, setgid and sticky: the low 12 bits.
    pub mode: u32,
    /// User ID.
    pub uid: u32,
    /// Group ID.
    pub gid: u32,
    /// Size of the content in bytes; 0 for everything but regular files.
    pub size: u64,
    /// Time of last modification.
    pub mtime: Time,
    /// Digest of the content; regular files only.
    pub content: Option<Digest>,
    /// Target of a symbolic link.
    pub target: Option<Vec<u8>>,
    /// Major and minor number; devices only.
    pub rdev: Option<(u32, u32)>,
    /// Extended attributes: full names and raw values.
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// Paths of one tree with the same number are hard links to one file.
    pub inode: u64,
    /// Whether this is a directory that no archive entry describes and that exists only because of its content.
    pub implicit: bool,
}

/// A sorted map from path to [`Node`]. Paths have no leading or trailing slash; the root is the empty path.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tree {
    pub(super) nodes: BTreeMap<Vec<u8>, Node>,
}

impl Tree {
    /// Returns the node at `path`.
    pub fn get(&self, path: &[u8]) -> Option<&Node> {
        self.nodes.get(path)
    }

    /// Iterates over all paths and their nodes, in byte order.
    pub fn iter(&self) -> impl Iterator<Item = (&[u8], &Node)> {
        self.nodes
            .iter()
            .map(|(path, node)| (path.as_slice(), node))
    }

    /// Returns the number of paths, including the root.
    pub(crate) fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Maps the owners of all nodes. Fails with the path and its owners if `owner` returns `None`.
    pub fn map_owners(
        mut self,
        owner: impl Fn(u32, u32) -> Option<(u32, u32)>,
    ) -> Result<Self, (Vec<u8>, u32, u32)> {
        for (path, node) in &mut self.nodes {
            (node.uid, node.gid) =
                owner(node.uid, node.gid).ok_or_else(|| (path.clone(), node.uid, node.gid))?;
        }
        Ok(self)
    }

    /// Feeds everything but the numbers of inodes and the times of directories to `hash`: paths, types, modes, owners, times,
    /// contents, targets, devices and extended attributes, each with its length.
    pub(crate) fn hash(&self, hash: &mut Sha256) {
        let mut field = |bytes: &[u8]| {
            hash.update((bytes.len() as u64).to_le_bytes());
            hash.update(bytes);
        };
        for (path, node) in &self.nodes {
            field(path);
            field(node.kind.as_str().as_bytes());
            for number in [node.mode, node.uid, node.gid] {
                field(&number.to_le_bytes());
            }
            if node.kind != Kind::Directory {
                field(&node.mtime.seconds.to_le_bytes());
                field(&node.mtime.nanos.to_le_bytes());
            }
            field(&node.size.to_le_bytes());
            field(
                node.content
                    .as_ref()
                    .map_or(&[], |content| content.as_bytes()),
            );
            field(node.target.as_deref().unwrap_or_default());
            let (major, minor) = node.rdev.unwrap_or_default();
            field(&major.to_le_bytes());
            field(&minor.to_le_bytes());
            field(&(node.xattrs.len() as u64).to_le_bytes());
            for (name, value) in &node.xattrs {
                field(name);
                field(value);
            }
        }
    }

    /// Maps every path that has other hard links to the first of them.
    pub(super) fn groups(&self) -> HashMap<&[u8], &[u8]> {
        let mut first: HashMap<u64, &[u8]> = HashMap::new();
        let mut groups = HashMap::new();
        for (path, node) in self.iter().filter(|(_, node)| node.kind != Kind::Directory) {
            let leader = *first.entry(node.inode).or_insert(path);
            if leader != path {
                groups.insert(leader, leader);
                groups.insert(path, leader);
            }
        }
        groups
    }
}

/// What [`compare`] excludes. The default excludes nothing.
#[derive(Clone, Debug, Default)]
pub struct Ignore {
    /// Compare times by whole seconds only, as layers carry them.
    pub mtime_nanos: bool,
    /// Do not compare the times of directories (unpackers change them while they fill them).
    pub directory_mtimes: bool,
    /// Do not compare the root directory's metadata.
    pub root: bool,
    /// Do not compare the metadata of directories that are implicit on either side.
    pub implicit: bool,
    /// Do not compare which paths are hard links to the same file.
    pub hardlinks: bool,
    /// Treat sockets on either side as absent, because archives cannot contain them.
    pub sockets: bool,
    /// Names of extended attributes to exclude. A name that ends in `.` is a prefix.
    pub xattrs: Vec<Vec<u8>>,
    /// Paths to exclude with everything below them.
    pub paths: BTreeSet<Vec<u8>>,
}

impl Ignore {
    fn path(&self, path: &[u8]) -> bool {
        let below = |at: usize| self.paths.contains(&path[..at]);
        !self.paths.is_empty()
            && (self.paths.contains(path)
                || path
                    .iter()
                    .enumerate()
                    .any(|(at, &byte)| byte == b'/' && below(at)))
    }

    fn xattr(&self, name: &[u8]) -> bool {
        self.xattrs.iter().any(|ignored| {
            if ignored.ends_with(b".") {
                name.starts_with(ignored)
            } else {
                name == ignored.as_slice()
            }
        })
    }
}

/// A difference between two trees.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Difference {
    /// The path, escaped as [`vis::encode`] does; the root is `/`.
    pub path: String,
    /// `presence`, `type`, `mode`, `uid`, `gid`, `size`, `mtime`, `content`, `target`, `device`, `hardlink`, or
    /// `xattr NAME`.
    pub field: String,
    /// Value in the first tree, escaped.
    pub expected: String,
    /// Value in the second tree, escaped.
    pub found: String,
    /// The difference of two small texts in the unified format, escaped.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub diff: Option<String>,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(diff) = &self.diff {
            return write!(f, "{}: {}:\n{diff}", self.path, self.field);
        }
        write!(
            f,
            "{}: {}: expected {}, found {}",
            self.path, self.field, self.expected, self.found
        )
    }
}

/// Returns all differences between two trees, in path order.
///
/// Below a path that is missing or of another type on one side, only the paths themselves are reported.
pub fn compare(expected: &Tree, found: &Tree, ignore: &Ignore) -> Vec<Difference> {
    let visible = |path: &[u8], node: &Node| {
        !(ignore.path(path) || ignore.sockets && node.kind == Kind::Socket)
    };
    let mut differences = Vec::new();
    let (groups_a, groups_b) = (expected.groups(), found.groups());
    let mut left = expected
        .iter()
        .filter(|(path, node)| visible(path, node))
        .peekable();
    let mut right = found
        .iter()
        .filter(|(path, node)| visible(path, node))
        .peekable();
    loop {
        let order = match (left.peek(), right.peek()) {
            (Some((a, _)), Some((b, _))) => a.cmp(b),
            (Some(_), None) => std::cmp::Ordering::Less,
            (None, Some(_)) => std::cmp::Ordering::Greater,
            (None, None) => break,
        };
        let a = if order.is_le() { left.next() } else { None };
        let b = if order.is_ge() { right.next() } else { None };
        match (a, b) {
            (Some((path, a)), Some((_, b))) => {
                let mut report = Report {
                    path,
                    differences: &mut differences,
                };
                nodes(path, a, b, ignore, &mut report);
                if !ignore.hardlinks && a.kind == b.kind {
                    let (a, b) = (groups_a.get(path), groups_b.get(path));
                    report.field(
                        "hardlink",
                        &a.map_or("none".into(), |p| name(p)),
                        &b.map_or("none".into(), |p| name(p)),
                    );
                }
            }
            (Some((path, a)), None) => presence(path, a.kind.as_str(), "nothing", &mut differences),
            (None, Some((path, b))) => presence(path, "nothing", b.kind.as_str(), &mut differences),
            (None, None) => {}
        }
    }
    differences
}

fn presence(path: &[u8], expected: &str, found: &str, differences: &mut Vec<Difference>) {
    Report { path, differences }.field("presence", expected, found);
}

fn nodes(path: &[u8], a: &Node, b: &Node, ignore: &Ignore, report: &mut Report<'_>) {
    if a.kind != b.kind {
        report.field("type", a.kind.as_str(), b.kind.as_str());
        return;
    }
    if path.is_empty() && ignore.root || ignore.implicit && (a.implicit || b.implicit) {
        return;
    }
    let directory = a.kind == Kind::Directory;
    if a.kind != Kind::Symlink {
        // Linux gives all symbolic links the mode 0777, while their mode in archives is arbitrary.
        report.field(
            "mode",
            &format!("{:04o}", a.mode),
            &format!("{:04o}", b.mode),
        );
    }
    report.field("uid", &a.uid.to_string(), &b.uid.to_string());
    report.field("gid", &a.gid.to_string(), &b.gid.to_string());
    report.field("size", &a.size.to_string(), &b.size.to_string());
    if !(directory && ignore.directory_mtimes) {
        let time = |mut time: Time| {
            if ignore.mtime_nanos {
                time.nanos = 0;
            }
            time.to_string()
        };
        report.field("mtime", &time(a.mtime), &time(b.mtime));
    }
    let digest = |node: &Node| {
        node.content
            .map_or("none".to_owned(), |digest| digest.to_string())
    };
    report.field("content", &digest(a), &digest(b));
    let target = |node: &Node| node.target.as_deref().map_or("none".to_owned(), name);
    report.field("target", &target(a), &target(b));
    let device = |node: &Node| {
        node.rdev.map_or("none".to_owned(), |(major, minor)| {
            format!("{major}:{minor}")
        })
    };
    report.field("device", &device(a), &device(b));
    let names: BTreeSet<&Vec<u8>> = a.xattrs.keys().chain(b.xattrs.keys()).collect();
    for key in names.into_iter().filter(|key| !ignore.xattr(key)) {
        let value = |node: &Node| {
            node.xattrs.get(key).map_or("none".to_owned(), |value| {
                // A value may have 64 KiB, and its digest is enough to show a difference.
                if value.len() > 64 {
                    Digest::of(value).to_string()
                } else {
                    format!("{:?}", vis::encode(value))
                }
            })
        };
        report.field(&format!("xattr {}", vis::encode(key)), &value(a), &value(b));
    }
}

fn name(path: &[u8]) -> String {
    if path.is_empty() {
        "/".to_owned()
    } else {
        vis::encode(path)
    }
}

struct Report<'a> {
    path: &'a [u8],
    differences: &'a mut Vec<Difference>,
}

impl Report<'_> {
    fn field(&mut self, field: &str, expected: &str, found: &str) {
        if expected != found {
            self.differences.push(Difference {
                path: name(self.path),
                field: field.to_owned(),
                expected: expected.to_owned(),
                found: found.to_owned(),
                diff: None,
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(content: &str, inode: u64) -> Node {
        Node {
            kind: Kind::File,
            mode: 0o644,
            uid: 0,
            gid: 0,
            size: content.len() as u64,
            mtime: Time {
                seconds: 10,
                nanos: 5,
            },
            content: Some(Digest::of(content)),
            target: None,
            rdev: None,
            xattrs: BTreeMap::new(),
            inode,
            implicit: false,
        }
    }

    fn tree(nodes: &[(&str, Node)]) -> Tree {
        Tree {
            nodes: nodes
                .iter()
                .map(|(path, node)| (path.as_bytes().to_vec(), node.clone()))
                .collect(),
        }
    }

    fn lines(a: &Tree, b: &Tree, ignore: &Ignore) -> Vec<String> {
        compare(a, b, ignore)
            .iter()
            .map(ToString::to_string)
            .collect()
    }

    #[test]
    fn every_field_is_named_with_both_values() {
        let a = tree(&[("f", file("x", 1)), ("gone\x1b", file("x", 2))]);
        let mut changed = file("yy", 1);
        changed.mode = 0o4755;
        changed.uid = 7;
        changed.mtime = Time {
            seconds: 11,
            nanos: 0,
        };
        changed.xattrs.insert(b"user.k".to_vec(), b"v\n".to_vec());
        let b = tree(&[("f", changed), ("new", file("x", 2))]);
        let found = lines(&a, &b, &Ignore::default());
        let fields: Vec<&str> = found
            .iter()
            .map(|line| line.split(": ").nth(1).unwrap())
            .collect();
        assert_eq!(
            fields,
            [
                "mode",
                "uid",
                "size",
                "mtime",
                "content",
                "xattr user.k",
                "presence",
                "presence"
            ]
        );
        assert_eq!(found[0], "f: mode: expected 0644, found 4755");
        assert_eq!(found[3], "f: mtime: expected 10.000000005, found 11");
        assert_eq!(
            found[5],
            "f: xattr user.k: expected none, found \"v\\\\012\""
        );
        assert_eq!(
            found[6],
            "gone\\033: presence: expected file, found nothing"
        );
    }

    #[test]
    fn hardlink_groups_differ_by_membership_not_by_number() {
        let a = tree(&[
            ("a", file("x", 1)),
            ("b", file("x", 1)),
            ("c", file("x", 2)),
        ]);
        let same = tree(&[
            ("a", file("x", 9)),
            ("b", file("x", 9)),
            ("c", file("x", 8)),
        ]);
        assert!(compare(&a, &same, &Ignore::default()).is_empty());
        let other = tree(&[
            ("a", file("x", 1)),
            ("b", file("x", 2)),
            ("c", file("x", 2)),
        ]);
        let found = lines(&a, &other, &Ignore::default());
        assert_eq!(found[0], "a: hardlink: expected a, found none");
        assert_eq!(found.len(), 3);
        assert!(
            compare(
                &a,
                &other,
                &Ignore {
                    hardlinks: true,
                    ..Ignore::default()
                }
            )
            .is_empty()
        );
    }

    #[test]
    fn ignored_paths_cover_what_is_below_and_no_namesakes() {
        let a = tree(&[
            ("dir", file("x", 1)),
            ("dir/f", file("x", 2)),
            ("dir-2", file("x", 3)),
        ]);
        let ignore = Ignore {
            paths: [b"dir".to_vec()].into(),
            ..Ignore::default()
        };
        let found = lines(&a, &Tree::default(), &ignore);
        assert_eq!(found, ["dir-2: presence: expected file, found nothing"]);
    }
}
