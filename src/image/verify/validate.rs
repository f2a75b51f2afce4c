//! `upperdeck validate`: checks whether a layer or an image is what a fixture specifies.
//!
//! An expectation is a text in the format of [`super::text`]: the entries of a layer in their order, with the digests
//! `@diff-id`, `@gzip` and `@zstd` if the bytes matter, too; or, with `@tree`, all paths of the tree that an image
//! unpacks to.

use std::collections::HashMap;
use std::fmt;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use super::archive::{Archive, ArchiveError, Codec, Entry, EntryKind, decompress};
use super::layers::Layers;
use super::text::{self, Item, Line, ParseError, Type};
use super::texts::{self, Texts};
use super::tree::{self, Difference, Ignore};
use super::vis;
use crate::common::digest::{Digest, HashingWriter};
use crate::common::regular_file;

/// Maximum size of an expectation in bytes.
const MAX_DOCUMENT: u64 = 256 << 20;
/// File name of the expectation in a fixture's directory.
pub(crate) const EXPECTED: &str = "expected";

/// The expected content of a layer or an image.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Expected {
    /// Entries in their order; for a tree in any order, parents first.
    pub items: Vec<Item>,
    /// Whether the items are a whole tree instead of the entries of one layer.
    pub tree: bool,
    /// How the layer's tar ends.
    pub end: End,
    /// Digest of the layer's tar.
    pub diff_id: Option<Digest>,
    /// Digest of the layer as this program compresses it with gzip at its default level.
    pub gzip: Option<Digest>,
    /// Digest of the layer as this program compresses it with zstd at its default level.
    pub zstd: Option<Digest>,
    /// Words in the error message with which creating the layer must fail; there must then be no layer.
    pub refusal: Option<Vec<String>>,
}

/// The end of a tar.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct End {
    /// Whether there are two zero blocks.
    pub terminated: bool,
    /// Number of bytes after them.
    pub trailing: u64,
}

impl Default for End {
    fn default() -> Self {
        Self {
            terminated: true,
            trailing: 0,
        }
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.terminated, self.trailing) {
            (true, 0) => write!(f, "two zero blocks"),
            (true, more) => write!(f, "two zero blocks and {more} bytes"),
            (false, _) => write!(f, "no two zero blocks"),
        }
    }
}

/// The reason why nothing could be compared.
#[derive(Debug, thiserror::Error)]
pub enum ValidateError {
    /// The expectation cannot be read.
    #[error("cannot read {path:?}: {source}", path = .path)]
    Io {
        /// Path of the file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The expectation cannot be parsed.
    #[error("{path:?}: {source}", path = .path)]
    Expectation {
        /// Path of the file.
        path: PathBuf,
        /// Line and cause.
        source: ParseError,
    },
    /// The expectation is not of the kind that is compared.
    #[error("{0}")]
    Mismatch(String),
    /// The layer cannot be read.
    #[error(transparent)]
    Archive(#[from] ArchiveError),
}

/// The result of a comparison.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Report {
    /// Number of entries (or paths) that were compared.
    pub entries: u64,
    /// The first differences.
    pub differences: Vec<Difference>,
    /// Number of further differences.
    pub more: u64,
}

impl Report {
    /// Returns whether there are no differences.
    pub fn is_valid(&self) -> bool {
        self.differences.is_empty() && self.more == 0
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_valid() {
            let entries = crate::common::message::count(self.entries, "entry", "entries");
            return write!(f, "as expected: {entries}");
        }
        for difference in &self.differences {
            writeln!(f, "{difference}")?;
        }
        if self.more > 0 {
            let more =
                crate::common::message::count(self.more, "more difference", "more differences");
            writeln!(f, "and {more}")?;
        }
        write!(
            f,
            "not as expected: {}",
            crate::common::message::count(
                self.differences.len() as u64 + self.more,
                "difference",
                "differences"
            )
        )
    }
}

impl Expected {
    /// Reads the expectation at `path`: a file, or the directory of a fixture with a file `expected`.
    pub fn load(path: &Path) -> Result<Self, ValidateError> {
        let path = if path.is_dir() {
            path.join(EXPECTED)
        } else {
            path.to_owned()
        };
        // Read up to a limit whatever it is; a pipe is as good as a file.
        let text = std::fs::File::open(&path)
            .and_then(|file| regular_file::read_open(file, MAX_DOCUMENT))
            .and_then(|bytes| String::from_utf8(bytes).map_err(std::io::Error::other))
            .map_err(|source| ValidateError::Io {
                path: path.clone(),
                source,
            })?;
        Self::parse(&text).map_err(|source| ValidateError::Expectation { path, source })
    }

    /// Parses an expectation.
    pub fn parse(text: &str) -> Result<Self, ParseError> {
        let mut expected = Self::default();
        for line in text::parse(text)? {
            let (name, words, line) = match line {
                Line::Item(item) => {
                    expected.items.push(*item);
                    continue;
                }
                Line::Directive { name, words, line } => (name, words, line),
            };
            let fail = |reason: String| ParseError { line, reason };
            let digest = || match words.as_slice() {
                [word] => word
                    .parse()
                    .map(Some)
                    .map_err(|error| fail(format!("{error}"))),
                _ => Err(fail(format!("@{name} wants one digest"))),
            };
            match name.as_str() {
                "tree" => expected.tree = true,
                "end" => {
                    expected.end = match words.as_slice() {
                        [word] if word == "none" => End {
                            terminated: false,
                            trailing: 0,
                        },
                        [word] => End {
                            terminated: true,
                            trailing: word.parse().map_err(|_| {
                                fail(format!("@end {word}: expected a number of bytes, or none"))
                            })?,
                        },
                        _ => return Err(fail("@end wants a number of bytes, or none".to_owned())),
                    }
                }
                "diff-id" => expected.diff_id = digest()?,
                "gzip" => expected.gzip = digest()?,
                "zstd" => expected.zstd = digest()?,
                "refuse" if !words.is_empty() => expected.refusal = Some(words),
                _ => {
                    let known = "@tree, @end, @diff-id, @gzip, @zstd or @refuse WORD...";
                    return Err(fail(format!("@{name}: expected {known}")));
                }
            }
        }
        Ok(expected)
    }
}

/// Compares one layer (plain, gzip or zstd) with its expected entries. At most `limit` differences are listed.
pub fn layer(
    mut layer: impl Read,
    expected: &Expected,
    limit: usize,
) -> Result<Report, ValidateError> {
    if expected.tree {
        return Err(ValidateError::Mismatch(
            "the expectation describes a whole tree; give the image, not one layer".to_owned(),
        ));
    }
    if expected.refusal.is_some() {
        return Err(ValidateError::Mismatch(
            "the expectation is that no layer can be made".to_owned(),
        ));
    }
    let failed = |source| ArchiveError::Io { offset: 0, source };
    let mut blob = HashingReader::new(&mut layer);
    let (codec, reader) = decompress(&mut blob).map_err(failed)?;
    let mut archive = Archive::new(reader);
    let mut found = Vec::new();
    let known = KnownTexts::of(&expected.items);
    let mut texts = Texts::unlike(known.by_name());
    while let Some(entry) = archive.next_entry()? {
        let digest = if entry.kind == EntryKind::File {
            Some(texts.read(&entry.name, &entry, &mut archive)?)
        } else {
            None
        };
        found.push((entry, digest));
    }
    let facts = archive.finish()?;
    io::copy(&mut blob, &mut io::sink()).map_err(failed)?;
    let blob = blob.digest();

    let mut differences = entries(&expected.items, &found);
    let mut whole = |field: &str, expected: String, found: String| {
        if expected != found {
            differences.push(Difference {
                path: "(layer)".to_owned(),
                field: field.to_owned(),
                expected,
                found,
                diff: None,
            });
        }
    };
    let end = End {
        terminated: facts.terminated,
        trailing: facts.trailing,
    };
    whole("end", expected.end.to_string(), end.to_string());
    if let Some(digest) = expected.diff_id {
        whole("diff ID", digest.to_string(), facts.diff_id.to_string());
    }
    let digest = match codec {
        Codec::None => None,
        Codec::Gzip => expected.gzip,
        Codec::Zstd => expected.zstd,
    };
    if let Some(digest) = digest {
        whole("digest", digest.to_string(), blob.to_string());
    }
    let report = limited(found.len() as u64, differences, limit);
    Ok(with_texts(report, &known, &texts))
}

/// Compares an image, given as its layers bottom first, with an expectation. A tree is compared with all layers applied
/// in order, a list of entries with the topmost layer.
pub(crate) fn image<R: Read>(
    layers: impl IntoIterator<Item = io::Result<R>>,
    expected: &Expected,
    limit: usize,
) -> Result<Report, ValidateError> {
    let failed = |source| ArchiveError::Io { offset: 0, source };
    if !expected.tree {
        let mut top = None;
        for layer in layers {
            top = Some(layer.map_err(failed)?);
        }
        let top =
            top.ok_or_else(|| ValidateError::Mismatch("the image has no layer".to_owned()))?;
        return layer(top, expected, limit);
    }
    let wanted = text::tree(&expected.items).map_err(ValidateError::Mismatch)?;
    let known = KnownTexts::of(&expected.items);
    let digests = wanted
        .iter()
        .filter_map(|(path, node)| Some((path.to_vec(), node.content?)));
    let digests = digests.filter(|(_, digest)| known.texts.contains_key(digest));
    let mut stack = Layers::new().keeping(Texts::unlike(digests.collect()));
    for layer in layers {
        stack.apply(layer.map_err(failed)?)?;
    }
    let (found, texts) = stack.into_tree_and_texts();
    let differences = tree::compare(
        &wanted,
        &found,
        &Ignore {
            implicit: true,
            ..Ignore::default()
        },
    );
    let report = limited(found.len() as u64, differences, limit);
    Ok(match texts {
        Some(texts) => with_texts(report, &known, &texts),
        None => report,
    })
}

/// The files of a specification whose content is a text that can be shown.
struct KnownTexts<'a> {
    files: Vec<(&'a Item, Digest)>,
    texts: HashMap<Digest, &'a str>,
}

impl<'a> KnownTexts<'a> {
    fn of(items: &'a [Item]) -> Self {
        let mut known = Self {
            files: Vec::new(),
            texts: HashMap::new(),
        };
        for item in items {
            let text = item.content.bytes().and_then(|bytes| {
                let short = bytes.len() as u64 <= texts::SHOWN_BYTES;
                std::str::from_utf8(bytes).ok().filter(|_| short)
            });
            if item.kind == Type::Entry(EntryKind::File)
                && let (Some(text), Some(digest)) = (text, item.content.digest())
            {
                known.files.push((item, digest));
                known.texts.insert(digest, text);
            }
        }
        known
    }

    fn by_name(&self) -> HashMap<Vec<u8>, Digest> {
        let files = self.files.iter();
        files
            .map(|(item, digest)| (item.name.clone(), *digest))
            .collect()
    }
}

/// Adds the differences of texts where both are known.
fn with_texts(mut report: Report, known: &KnownTexts<'_>, texts: &Texts) -> Report {
    for difference in &mut report.differences {
        if difference.field != "content" {
            continue;
        }
        let digest = |text: &str| text.parse::<Digest>().ok();
        let expected = digest(&difference.expected);
        let expected = expected.and_then(|digest| known.texts.get(&digest));
        let found = digest(&difference.found);
        let found = found.as_ref().and_then(|digest| texts.get(digest));
        if let (Some(expected), Some(found)) = (expected, found) {
            difference.diff = texts::unified(expected, found);
        }
    }
    report
}

fn limited(entries: u64, mut differences: Vec<Difference>, limit: usize) -> Report {
    let more = differences.len().saturating_sub(limit) as u64;
    differences.truncate(limit);
    Report {
        entries,
        differences,
        more,
    }
}

fn entries(expected: &[Item], found: &[(Entry, Option<Digest>)]) -> Vec<Difference> {
    let mut differences = Vec::new();
    let mut report = |name: &[u8], field: &str, expected: String, found: String| {
        if expected != found {
            let path = if name == b"./" {
                "/".to_owned()
            } else {
                vis::encode(name)
            };
            differences.push(Difference {
                path,
                field: field.to_owned(),
                expected,
                found,
                diff: None,
            });
        }
    };
    // A name is seldom there more than once.
    let mut by_name: HashMap<&[u8], Vec<&Item>> = HashMap::new();
    for item in expected {
        by_name.entry(&item.name).or_default().push(item);
    }
    let mut seen: HashMap<&[u8], usize> = HashMap::new();
    for (entry, digest) in found {
        let number = seen.entry(&entry.name).or_default();
        *number += 1;
        let items = by_name.get(entry.name.as_slice());
        match items.and_then(|items| items.get(*number - 1)) {
            Some(item) => fields(item, entry, *digest, &mut |field, a, b| {
                report(&entry.name, field, a, b);
            }),
            None => report(
                &entry.name,
                "presence",
                match items.map_or(0, Vec::len) {
                    0 => "nothing".to_owned(),
                    n => crate::common::message::count(n as u64, "entry", "entries"),
                },
                if *number == 1 {
                    entry.kind.as_str().to_owned()
                } else {
                    "another of that name".to_owned()
                },
            ),
        }
    }
    let mut numbers: HashMap<&[u8], usize> = HashMap::new();
    for item in expected {
        let number = numbers.entry(&item.name).or_default();
        *number += 1;
        if *number > seen.get(item.name.as_slice()).copied().unwrap_or(0) {
            report(
                &item.name,
                "presence",
                type_name(item.kind).to_owned(),
                "nothing".to_owned(),
            );
        }
    }
    // Compares the order of common entries. Only the first difference is reported, because further ones follow from it.
    let theirs = found
        .iter()
        .map(|(entry, _)| entry.name.as_slice())
        .filter(|name| by_name.contains_key(name));
    let ours = expected
        .iter()
        .map(|item| item.name.as_slice())
        .filter(|name| seen.contains_key(name));
    if let Some((a, b)) = ours.zip(theirs).find(|(a, b)| a != b) {
        report(
            b,
            "order",
            format!("{} here", vis::encode(a)),
            vis::encode(b),
        );
    }
    differences
}

fn type_name(kind: Type) -> &'static str {
    match kind {
        Type::Entry(kind) => kind.as_str(),
        Type::Whiteout => EntryKind::File.as_str(),
        Type::Socket => "socket",
    }
}

fn fields(
    item: &Item,
    entry: &Entry,
    digest: Option<Digest>,
    report: &mut dyn FnMut(&str, String, String),
) {
    report(
        "type",
        type_name(item.kind).to_owned(),
        entry.kind.as_str().to_owned(),
    );
    report(
        "mode",
        format!("{:04o}", item.mode),
        format!("{:04o}", entry.mode),
    );
    report("uid", item.uid.to_string(), entry.uid.to_string());
    report("gid", item.gid.to_string(), entry.gid.to_string());
    let owners =
        |user: &[u8], group: &[u8]| format!("{:?} {:?}", vis::encode(user), vis::encode(group));
    report(
        "owner names",
        owners(&item.uname, &item.gname),
        owners(&entry.uname, &entry.gname),
    );
    report(
        "size",
        item.content.len().to_string(),
        entry.size.to_string(),
    );
    report("mtime", item.time.to_string(), entry.mtime.to_string());
    report("link", vis::encode(&item.link), vis::encode(&entry.link));
    report(
        "device",
        format!("{:?}", item.device),
        format!("{:?}", entry.rdev),
    );
    if let (Some(a), Some(b)) = (item.content.digest(), digest) {
        report("content", a.to_string(), b.to_string());
    }
    report(
        "extended header",
        item.pax.join(","),
        entry.records.join(","),
    );
    let names: std::collections::BTreeSet<_> =
        item.xattrs.keys().chain(entry.xattrs.keys()).collect();
    for name in names {
        let value = |value: Option<&Vec<u8>>| {
            value.map_or("none".to_owned(), |v| format!("{:?}", vis::encode(v)))
        };
        let field = format!("xattr {}", vis::encode(name));
        report(
            &field,
            value(item.xattrs.get(name)),
            value(entry.xattrs.get(name)),
        );
    }
}

/// A reader that hashes what is read through it.
pub(super) struct HashingReader<R> {
    reader: R,
    hash: HashingWriter<io::Sink>,
}

impl<R: Read> HashingReader<R> {
    pub(super) fn new(reader: R) -> Self {
        Self {
            reader,
            hash: HashingWriter::new(io::sink()),
        }
    }

    /// Returns the digest of what was read.
    pub(super) fn digest(self) -> Digest {
        self.hash.complete().1
    }
}

impl<R: Read> Read for HashingReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.reader.read(buffer)?;
        io::Write::write_all(&mut self.hash, &buffer[..n])?;
        Ok(n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(name: &str, kind: u8, size: u64) -> tar::Header {
        let mut header = tar::Header::new_ustar();
        header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
        header.set_entry_type(tar::EntryType::new(kind));
        header.set_mode(if kind == b'5' { 0o755 } else { 0o644 });
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(text::DEFAULT_TIME as u64);
        header.set_size(size);
        header.set_cksum();
        header
    }

    fn archive() -> Vec<u8> {
        let mut tar = header("d/", b'5', 0).as_bytes().to_vec();
        tar.extend_from_slice(header("d/a", b'0', 2).as_bytes());
        tar.extend_from_slice(b"hi");
        tar.resize(1536, 0);
        tar.extend_from_slice(header("d/b", b'0', 0).as_bytes());
        tar.extend_from_slice(&[0; 1024]);
        tar
    }

    fn lines(expected: &str) -> Result<Vec<String>, Box<dyn std::error::Error>> {
        let report = layer(archive().as_slice(), &Expected::parse(expected)?, 10)?;
        Ok(report.differences.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn a_layer_is_compared_entry_by_entry() -> Result<(), Box<dyn std::error::Error>> {
        let none: [&str; 0] = [];
        assert_eq!(lines("d/\nd/a content=hi\nd/b\n")?, none);
        assert_eq!(lines("d/\nd/a size=2\nd/b\n")?, none);
        let digest = format!(
            "@diff-id {}\nd/\nd/a content=hi\nd/b\n",
            Digest::of(archive())
        );
        assert_eq!(lines(&digest)?, none);
        assert_eq!(
            lines("d/ mode=0700\nd/a content=ho xattr.user.k=v\nd/c\n")?,
            [
                "d/: mode: expected 0700, found 0755",
                "d/a: content:\n--- expected\n+++ found\n@@ -1 +1 @@\n-ho\n\\ No newline at end of file\n+hi\n\\ No newline at end of file",
                "d/a: xattr user.k: expected \"v\", found none",
                "d/b: presence: expected nothing, found file",
                "d/c: presence: expected file, found nothing",
            ]
        );
        assert_eq!(
            lines("d/\nd/b\nd/a content=hi\n")?,
            ["d/a: order: expected d/b here, found d/a"]
        );
        // What is no text, or is not known, is shown by its digest.
        for (content, digest) in [
            ("base64=/wA=", Digest::of(b"\xff\0")),
            (
                &format!("size=2 sha256={}", Digest::of("ho").hex()),
                Digest::of("ho"),
            ),
        ] {
            assert_eq!(
                lines(&format!("d/\nd/a {content}\nd/b"))?,
                [format!(
                    "d/a: content: expected {digest}, found {}",
                    Digest::of("hi")
                )]
            );
        }
        assert_eq!(
            lines("d/\nd/a\nd/b\nd/b\n")?[2..],
            ["d/b: presence: expected file, found nothing",]
        );
        Ok(())
    }

    #[test]
    fn the_examples_of_the_documentation_are_valid() -> Result<(), Box<dyn std::error::Error>> {
        let text = include_str!("../../../docs/validate.md");
        let blocks = text.split("```").skip(1).step_by(2);
        let examples: Vec<&str> = blocks.filter(|block| block.starts_with('\n')).collect();
        assert_eq!(examples.len(), 3);
        for example in examples {
            let expected = Expected::parse(example)?;
            assert!(!expected.items.is_empty(), "{example}");
            assert_eq!(expected.tree, example.contains("@tree"));
            if expected.tree {
                text::tree(&expected.items)?;
            }
        }
        Ok(())
    }

    #[test]
    fn the_end_of_the_tar_counts_and_the_list_is_bounded() -> Result<(), Box<dyn std::error::Error>>
    {
        let mut tar = archive();
        tar.extend_from_slice(&[0; 512]);
        let report = layer(tar.as_slice(), &Expected::default(), 2)?;
        assert_eq!(
            (report.differences.len(), report.more, report.is_valid()),
            (2, 2, false)
        );
        let report = layer(
            tar.as_slice(),
            &Expected::parse("d/\nd/a content=hi\nd/b")?,
            2,
        )?;
        assert_eq!(report.differences[0].found, "two zero blocks and 512 bytes");
        Ok(())
    }

    #[test]
    fn an_image_is_compared_with_a_tree_or_by_its_top_layer()
    -> Result<(), Box<dyn std::error::Error>> {
        let tar = archive();
        let layers = || [Ok(tar.as_slice()), Ok(tar.as_slice())];
        let tree = Expected::parse("@tree\nd/\nd/a content=hi\nd/b\n")?;
        assert!(image(layers(), &tree, 5)?.is_valid());
        let less = Expected::parse("@tree\nd/\nd/a content=hi\n")?;
        assert_eq!(image(layers(), &less, 5)?.differences[0].path, "d/b");
        assert!(image(layers(), &Expected::parse("d/\nd/a content=hi\nd/b\n")?, 5)?.is_valid());
        assert!(
            layer(tar.as_slice(), &tree, 5)
                .is_err_and(|error| matches!(error, ValidateError::Mismatch(_)))
        );
        Ok(())
    }
}
