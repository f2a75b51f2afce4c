//! The text format in which fixtures describe trees and layers. It can be stored in git and written by hand.
//!
//! The lines follow `mtree(5)`: a path, then `keyword=value` words, with names escaped by [`super::vis`].
//!
//! ```text
//! # a comment
//! /set uid=1000 gid=1000                 defaults for the lines below; /unset removes them
//! etc/                                   a directory: the name ends in a slash
//! etc/motd content=hello\012 mode=0600   a file
//! etc/link link=motd                     a symbolic link
//! etc/again hardlink=etc/motd            another name of a file above
//! dev/null type=char device=1,3
//! etc/.wh.passwd type=whiteout           regular, empty, mode, owner and time 0 (layers only)
//! /for 0..300 many/f{} random=7,100      300 files, the number padded with zeros
//! /deep 1000 deep/d/                     1000 nested directories d
//! {x*255} hole=1048576 at.4096=data      a name of 255 x; a sparse file
//! ```
//!
//! Keywords: `type mode uid gid uname gname time link hardlink device pax`, contents (`content`, `base64`, `random=SEED,LENGTH`,
//! `zeros=LENGTH`, `hole=LENGTH`, any of them overwritten in part by `at.OFFSET=TEXT`, or only `size` with `sha256`),
//! `xattr.NAME`, and `overlay.MARK` for the extended attributes of an overlay directory. The default mode is 0644 for a
//! file, 0755 for a directory and 0777 for a symbolic link; the default owner is 0:0 and the default time is
//! [`DEFAULT_TIME`].

mod content;

use std::collections::BTreeMap;

use super::archive::EntryKind;
use super::tree::{Kind, Node, Time, Tree};
use super::vis;
pub use content::Content;
use content::{Base, content, decode, expand};

/// Default time in seconds since the epoch (2001-09-09).
pub(crate) const DEFAULT_TIME: i64 = 1_000_000_000;
/// Most items that one `/for` or `/deep` line makes.
const MAX_REPEAT: u64 = 100_000;
/// Maximum memory of all items of a document together, in bytes, in addition to that of one item for each line and of
/// its own length: a line of a few words can create very many.
const MAX_BYTES: usize = 64 << 20;

/// A line that cannot be parsed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {reason}")]
pub struct ParseError {
    /// Number of the line, counted from 1.
    pub line: usize,
    /// What was expected and found.
    pub reason: String,
}

/// Type of an item.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Type {
    /// A type that archives have.
    Entry(EntryKind),
    /// A whiteout as in a layer, with a name that begins with `.wh.`.
    Whiteout,
    /// A socket, which exists only on disk.
    Socket,
}

/// One path with its properties.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item {
    /// Name as written: that of a directory ends in a slash, the root is `./`.
    pub name: Vec<u8>,
    /// Type.
    pub kind: Type,
    /// The low 12 bits of the mode.
    pub mode: u32,
    /// User ID.
    pub uid: u32,
    /// Group ID.
    pub gid: u32,
    /// Name of the user as stored in a layer.
    pub uname: Vec<u8>,
    /// Name of the group as stored in a layer.
    pub gname: Vec<u8>,
    /// Time of last modification.
    pub time: Time,
    /// Target of a symbolic or hard link.
    pub link: Vec<u8>,
    /// Major and minor number of a device, else 0:0.
    pub device: (u32, u32),
    /// Content of a regular file, else empty.
    pub content: Content,
    /// Extended attributes by their full names.
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// Extended attributes of an overlay directory, without the prefix, which depends on the mount.
    pub overlay: BTreeMap<Vec<u8>, Vec<u8>>,
    /// Keywords of the extended header records that the entry needs in addition to its attributes, in order.
    pub pax: Vec<String>,
}

/// One line of a document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Line {
    /// `@NAME WORD...`, whose meaning depends on the purpose of the document.
    Directive {
        /// Name without the `@`.
        name: String,
        /// The words after it, still escaped.
        words: Vec<String>,
        /// Number of the line, counted from 1.
        line: usize,
    },
    /// One path.
    Item(Box<Item>),
}

/// Parses a document.
pub fn parse(text: &str) -> Result<Vec<Line>, ParseError> {
    let written = text.len() + text.lines().count() * size_of::<Item>();
    let mut lines = Lines {
        found: Vec::new(),
        left: MAX_BYTES.saturating_add(written),
    };
    let mut defaults: Vec<&str> = Vec::new();
    for (index, whole) in text.lines().enumerate() {
        let line = index + 1;
        let mut words = whole
            .split_ascii_whitespace()
            .take_while(|word| !word.starts_with('#'));
        let Some(first) = words.next() else { continue };
        let fail = |reason: String| ParseError { line, reason };
        if let Some(name) = first.strip_prefix('@') {
            let words = words.map(str::to_owned).collect();
            lines.found.push(Line::Directive {
                name: name.to_owned(),
                words,
                line,
            });
            continue;
        }
        match first {
            "/set" => defaults = words.collect(),
            "/unset" => defaults.clear(),
            "/for" => {
                let range = words.next().unwrap_or_default();
                let name = words
                    .next()
                    .ok_or_else(|| fail("/for wants FROM..TO and a name".to_owned()))?;
                let words: Vec<&str> = words.collect();
                for number in numbers(range).map_err(fail)? {
                    let put = |text: &str| text.replace("{}", &number);
                    let own: Vec<String> = words.iter().map(|word| put(word)).collect();
                    let own = own.iter().map(String::as_str);
                    let item =
                        item(&put(name), defaults.iter().copied().chain(own)).map_err(fail)?;
                    lines.item(item).map_err(fail)?;
                }
            }
            "/deep" => {
                let count = words
                    .next()
                    .and_then(|n| n.parse().ok())
                    .filter(|n| *n <= MAX_REPEAT);
                let (Some(count), Some(name)) = (count, words.next()) else {
                    return Err(fail(format!(
                        "/deep wants a number up to {MAX_REPEAT} and a name"
                    )));
                };
                let words: Vec<&str> = defaults.iter().copied().chain(words).collect();
                let directory = name
                    .strip_suffix('/')
                    .ok_or_else(|| fail("/deep makes directories: NAME/".to_owned()))?;
                let last = directory
                    .rsplit(['/', '}'])
                    .next()
                    .unwrap_or(directory)
                    .to_owned();
                let mut nested = directory.to_owned();
                for _ in 0..count {
                    let item = item(&format!("{nested}/"), words.iter().copied()).map_err(fail)?;
                    lines.item(item).map_err(fail)?;
                    nested = format!("{nested}/{last}");
                }
            }
            _ if first.starts_with('/') => {
                return Err(fail(format!(
                    "{first}: expected /set, /unset, /for or /deep; names have no leading slash"
                )));
            }
            _ => {
                let item = item(first, defaults.iter().copied().chain(words)).map_err(fail)?;
                lines.item(item).map_err(fail)?;
            }
        }
    }
    Ok(lines.found)
}

/// The items read from a document.
struct Lines {
    found: Vec<Line>,
    /// Memory that further items may use, in bytes.
    left: usize,
}

impl Lines {
    fn item(&mut self, item: Item) -> Result<(), String> {
        let Some(left) = self.left.checked_sub(item.bytes()) else {
            return Err(format!(
                "what is repeated up to here takes more than {MAX_BYTES} bytes of memory"
            ));
        };
        self.left = left;
        self.found.push(Line::Item(Box::new(item)));
        Ok(())
    }
}

impl Item {
    /// Returns the memory that the item uses, in bytes.
    fn bytes(&self) -> usize {
        let pairs = self.xattrs.iter().chain(&self.overlay);
        let pairs: usize = pairs.map(|(name, value)| name.len() + value.len()).sum();
        let content = match &self.content.base {
            Base::Bytes(bytes) => bytes.len(),
            _ => 0,
        };
        let over: usize = self.content.over.iter().map(|(_, bytes)| bytes.len()).sum();
        let names = self.name.len() + self.link.len() + self.uname.len() + self.gname.len();
        size_of::<Self>() + names + pairs + content + over
    }
}

/// Returns the numbers of `FROM..TO` (without `TO`), padded with zeros to the same width.
pub fn numbers(range: &str) -> Result<impl Iterator<Item = String> + use<>, String> {
    let bad = || format!("{range:?} is no range FROM..TO of at most {MAX_REPEAT} numbers");
    let (from, to) = range.split_once("..").ok_or_else(bad)?;
    let (from, to): (u64, u64) = (
        from.parse().map_err(|_| bad())?,
        to.parse().map_err(|_| bad())?,
    );
    if from >= to || to - from > MAX_REPEAT {
        return Err(bad());
    }
    let width = (to - 1).to_string().len();
    Ok((from..to).map(move |number| format!("{number:0width$}")))
}

fn item<'a>(name: &str, words: impl Iterator<Item = &'a str>) -> Result<Item, String> {
    let name = expand(name)?;
    let mut words_by_key: BTreeMap<&str, &str> = BTreeMap::new();
    for word in words {
        let (key, value) = word
            .split_once('=')
            .ok_or_else(|| format!("{word:?}: expected KEYWORD=VALUE"))?;
        words_by_key.insert(key, value);
    }
    let mut take = |key: &str| words_by_key.remove(key);
    let (link, hardlink) = (take("link"), take("hardlink"));
    let kind = match take("type") {
        Some(word) => kind(word)?,
        None if name.ends_with(b"/") => Type::Entry(EntryKind::Directory),
        None if hardlink.is_some() => Type::Entry(EntryKind::Hardlink),
        None if link.is_some() => Type::Entry(EntryKind::Symlink),
        None => Type::Entry(EntryKind::File),
    };
    let number = |key: &str, text: Option<&str>, radix| -> Result<Option<u32>, String> {
        text.map(|text| {
            u32::from_str_radix(text, radix).map_err(|_| format!("{key}={text}: expected a number"))
        })
        .transpose()
    };
    let whiteout = kind == Type::Whiteout;
    let mode = number("mode", take("mode"), 8)?
        .filter(|_| !whiteout)
        .unwrap_or_else(|| default_mode(kind));
    let uid = number("uid", take("uid"), 10)?
        .filter(|_| !whiteout)
        .unwrap_or(0);
    let gid = number("gid", take("gid"), 10)?
        .filter(|_| !whiteout)
        .unwrap_or(0);
    let owner = |text: Option<&str>| text.map_or(Ok(Vec::new()), expand);
    let (uname, gname) = (owner(take("uname"))?, owner(take("gname"))?);
    let time = take("time").filter(|_| !whiteout);
    let time = time.map_or_else(|| Ok(default_time(kind)), parse_time)?;
    let device = match take("device") {
        None => (0, 0),
        Some(text) => {
            let numbers = text
                .split_once(',')
                .and_then(|(a, b)| Some((a.parse().ok()?, b.parse().ok()?)));
            numbers.ok_or_else(|| format!("device={text}: expected MAJOR,MINOR"))?
        }
    };
    let pax = take("pax")
        .map(|words| words.split(',').map(str::to_owned).collect())
        .unwrap_or_default();
    let content = content(&mut words_by_key)?;
    let (mut xattrs, mut overlay) = (BTreeMap::new(), BTreeMap::new());
    for (key, value) in words_by_key {
        let value = expand(value)?;
        if let Some(name) = key.strip_prefix("xattr.") {
            xattrs.insert(decode(name)?, value);
        } else if let Some(mark) = key.strip_prefix("overlay.") {
            overlay.insert(decode(mark)?, value);
        } else {
            return Err(format!("unknown keyword {key:?}"));
        }
    }
    let link = link
        .or(hardlink)
        .map(expand)
        .transpose()?
        .unwrap_or_default();
    Ok(Item {
        name,
        kind,
        mode,
        uid,
        gid,
        uname,
        gname,
        time,
        link,
        device,
        content,
        xattrs,
        overlay,
        pax,
    })
}

/// Returns the mode of an item without `mode`.
pub(super) fn default_mode(kind: Type) -> u32 {
    match kind {
        Type::Entry(EntryKind::Directory) => 0o755,
        Type::Entry(EntryKind::Symlink) => 0o777,
        Type::Whiteout => 0,
        _ => 0o644,
    }
}

/// Returns the time of an item without `time`.
pub(super) fn default_time(kind: Type) -> Time {
    Time {
        seconds: if kind == Type::Whiteout {
            0
        } else {
            DEFAULT_TIME
        },
        nanos: 0,
    }
}

fn kind(word: &str) -> Result<Type, String> {
    Ok(Type::Entry(match word {
        "file" => EntryKind::File,
        "dir" => EntryKind::Directory,
        "link" => EntryKind::Symlink,
        "hardlink" => EntryKind::Hardlink,
        "char" => EntryKind::Char,
        "block" => EntryKind::Block,
        "fifo" => EntryKind::Fifo,
        "whiteout" => return Ok(Type::Whiteout),
        "socket" => return Ok(Type::Socket),
        _ => {
            return Err(format!(
                "type={word}: expected file, dir, link, hardlink, char, block, fifo, socket or whiteout"
            ));
        }
    }))
}

fn parse_time(text: &str) -> Result<Time, String> {
    let bad = || {
        format!("time={text}: expected SECONDS or SECONDS.NANOSECONDS (nine digits, counting up)")
    };
    let (seconds, nanos) = text.split_once('.').unwrap_or((text, "000000000"));
    if nanos.len() != 9 {
        return Err(bad());
    }
    Ok(Time {
        seconds: seconds.parse().map_err(|_| bad())?,
        nanos: nanos.parse().map_err(|_| bad())?,
    })
}

/// Builds a tree from the items. The root and missing parents are added as implicit directories.
pub(crate) fn tree<'a>(items: impl IntoIterator<Item = &'a Item>) -> Result<Tree, String> {
    let mut tree = Tree::default();
    let mut inode = 0;
    let mut number = || {
        inode += 1;
        inode
    };
    for item in items {
        let path = item.name.strip_suffix(b"/").unwrap_or(&item.name);
        let path = if path == b"." { b"".as_slice() } else { path };
        let mut above = path;
        while !above.is_empty() {
            above = super::paths::split(above).0;
            if tree.nodes.contains_key(above) {
                break;
            }
            tree.nodes.insert(
                above.to_vec(),
                Node {
                    implicit: true,
                    ..node(None, number())
                },
            );
        }
        let node = match item.kind {
            Type::Entry(EntryKind::Hardlink) => {
                let target = tree.nodes.get(&item.link);
                let missing = || {
                    format!(
                        "{}: hard link to a name that does not stand above it",
                        vis::encode(path)
                    )
                };
                target.ok_or_else(missing)?.clone()
            }
            _ => node(Some(item), number()),
        };
        tree.nodes.insert(path.to_vec(), node);
    }
    tree.nodes.entry(Vec::new()).or_insert_with(|| Node {
        implicit: true,
        ..node(None, number())
    });
    Ok(tree)
}

fn node(item: Option<&Item>, inode: u64) -> Node {
    let mut node = Node {
        kind: Kind::Directory,
        mode: 0o755,
        uid: 0,
        gid: 0,
        size: 0,
        mtime: Time {
            seconds: DEFAULT_TIME,
            nanos: 0,
        },
        content: None,
        target: None,
        rdev: None,
        xattrs: BTreeMap::new(),
        inode,
        implicit: false,
    };
    let Some(item) = item else { return node };
    node.kind = match item.kind {
        Type::Entry(EntryKind::File | EntryKind::Hardlink) | Type::Whiteout => Kind::File,
        Type::Entry(EntryKind::Symlink) => Kind::Symlink,
        Type::Entry(EntryKind::Char) => Kind::Char,
        Type::Entry(EntryKind::Block) => Kind::Block,
        Type::Entry(EntryKind::Directory) => Kind::Directory,
        Type::Entry(EntryKind::Fifo) => Kind::Fifo,
        Type::Socket => Kind::Socket,
    };
    (node.mode, node.uid, node.gid, node.mtime) = (item.mode, item.uid, item.gid, item.time);
    node.xattrs.clone_from(&item.xattrs);
    match node.kind {
        Kind::File => (node.size, node.content) = (item.content.len(), item.content.digest()),
        Kind::Symlink => node.target = Some(item.link.clone()),
        Kind::Char | Kind::Block => node.rdev = Some(item.device),
        _ => {}
    }
    node
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::common::digest::Digest;

    fn text_of(text: &str) -> Content {
        Content {
            base: Base::Bytes(text.into()),
            over: Vec::new(),
        }
    }

    fn items(text: &str) -> Result<Vec<Item>, ParseError> {
        let lines = parse(text)?;
        Ok(lines
            .into_iter()
            .filter_map(|line| {
                if let Line::Item(item) = line {
                    Some(*item)
                } else {
                    None
                }
            })
            .collect())
    }

    #[test]
    fn a_short_document_that_describes_very_much_is_refused() {
        for text in [
            "/for 0..100000 {x*60000}",
            "/deep 100000 d/",
            "/for 0..100000 f{} xattr.user.a={x*60000}",
            &"/for 0..100000 f{}\n".repeat(10),
            "f random=1,99999999999999999",
            "f zeros=18446744073709551615",
            "/for 0..100000 f{} uname={x*600}\n",
        ] {
            let error = parse(text).expect_err(text);
            assert!(error.reason.contains("bytes"), "{text}: {error}");
        }
        assert!(parse("/for 0..65000 f{}").is_ok());
        // What is written in full is bounded by its own length.
        assert!(parse(&"a\n".repeat(500_000)).is_ok());
    }

    #[test]
    fn a_line_says_everything_about_a_path() -> Result<(), ParseError> {
        let text = "\
            # why\n@upper a b # c\n/set uid=5 mode=0600\n\
            a\\040b content=x\\012 xattr.user.k=v\\000 overlay.metacopy= gid=6 time=-1.500000000 pax=path,mtime\n\
            /unset\nd/ overlay.opaque=y\nl link=../x\nh hardlink=d/f\nc type=char device=1,3\nd/.wh.x type=whiteout\n";
        let lines = parse(text)?;
        assert_eq!(
            lines[0],
            Line::Directive {
                name: "upper".into(),
                words: vec!["a".into(), "b".into()],
                line: 2
            }
        );
        let items = items(text)?;
        let first = &items[0];
        assert_eq!(
            (first.name.as_slice(), first.mode, first.uid, first.gid),
            (b"a b".as_slice(), 0o600, 5, 6)
        );
        assert_eq!(
            first.time,
            Time {
                seconds: -1,
                nanos: 500_000_000
            }
        );
        assert_eq!(first.content, text_of("x\n"));
        assert_eq!(first.xattrs[b"user.k".as_slice()], b"v\0");
        assert!(first.overlay[b"metacopy".as_slice()].is_empty());
        assert_eq!(first.pax, ["path", "mtime"]);
        let kinds: Vec<Type> = items.iter().skip(1).map(|item| item.kind).collect();
        assert_eq!(
            kinds,
            [
                Type::Entry(EntryKind::Directory),
                Type::Entry(EntryKind::Symlink),
                Type::Entry(EntryKind::Hardlink),
                Type::Entry(EntryKind::Char),
                Type::Whiteout
            ]
        );
        assert_eq!(
            (items[1].mode, items[2].mode, items[5].mode),
            (0o755, 0o777, 0)
        );
        assert_eq!((items[4].device, items[5].time.seconds), ((1, 3), 0));
        Ok(())
    }

    #[test]
    fn generators_count_repeat_and_nest() -> Result<(), ParseError> {
        let items = items("/for 8..11 d/f{} content={}\n/deep 3 a/d/\n{x*255} zeros=3\n")?;
        let names: Vec<String> = items.iter().map(|item| vis::encode(&item.name)).collect();
        assert_eq!(
            names[..6],
            ["d/f08", "d/f09", "d/f10", "a/d/", "a/d/d/", "a/d/d/d/"]
        );
        assert_eq!(items[0].content, text_of("08"));
        assert_eq!(names[6].len(), 255);
        Ok(())
    }

    #[test]
    fn contents_are_what_they_say() -> Result<(), ParseError> {
        let items =
            items("a hole=100000 at.65535=xy\nb random=1,20\nc random=1,10\nd base64=AP8=\n")?;
        let written = |content: &Content| {
            let mut bytes = Vec::new();
            content.write(&mut bytes).unwrap();
            assert_eq!(content.len(), bytes.len() as u64);
            assert_eq!(content.digest(), Some(Digest::of(&bytes)));
            bytes
        };
        let a = written(&items[0].content);
        assert_eq!((&a[65534..65538], a.len()), (b"\0xy\0".as_slice(), 100_000));
        let (b, c) = (written(&items[1].content), written(&items[2].content));
        assert_eq!(b[..10], c);
        assert_ne!(b[..8], b[8..16]);
        assert_eq!(written(&items[3].content), [0, 0xff]);
        Ok(())
    }

    #[test]
    fn mistakes_name_their_line() {
        for bad in [
            "a b",
            "a colour=red",
            "a mode=9",
            "a time=1.5",
            "a \\9",
            "/nope x",
            "/for 1..1 x",
            "/for 0..9999999999 x",
            "/deep 5 x",
            "{x*99999999999}",
            "{x*3",
            "a hole=3 at.2=xy",
            "a base64=!",
            "a device=1",
            "a type=door",
            "a random=3",
            "a size=3 sha256=zz",
        ] {
            let error = parse(&format!("ok\n{bad}\n")).unwrap_err();
            assert_eq!(error.line, 2, "{bad}: {error}");
        }
    }
}
