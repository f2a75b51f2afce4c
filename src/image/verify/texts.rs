//! Small texts that are kept while archives are read, to write them into a specification or to show how they differ.

use std::collections::HashMap;
use std::io::Read;

use similar::TextDiff;

use super::archive::{Archive, ArchiveError, Entry};
use crate::common::digest::Digest;
use crate::common::escape;

/// Maximum size in bytes of a text that is shown as a difference.
pub(super) const SHOWN_BYTES: u64 = 16 * 1024;
/// Maximum number of lines of such a text: comparing takes time in proportion to its square.
const COMPARED_LINES: usize = 2000;
/// Maximum number of lines of a difference that is shown.
const SHOWN_LINES: usize = 40;
/// Maximum number of characters of such a line.
const LINE_CHARS: usize = 200;
/// Lines around a change.
const CONTEXT: usize = 3;

/// Which files are kept.
enum Wanted {
    All,
    /// Those at these paths, unless they have this digest.
    Other(HashMap<Vec<u8>, Digest>),
}

/// Texts by their digest. A text is UTF-8 without zero bytes.
pub struct Texts {
    wanted: Wanted,
    /// Maximum size of one, in bytes.
    limit: u64,
    /// Bytes that may still be kept.
    left: usize,
    kept: HashMap<Digest, String>,
}

impl Texts {
    /// Keeps every text of up to `limit` bytes, until they have `total` bytes together.
    pub(super) fn all(limit: u64, total: usize) -> Self {
        Self {
            wanted: Wanted::All,
            limit,
            left: total,
            kept: HashMap::new(),
        }
    }

    /// Keeps texts that can be shown as differences: those at paths of `expected` that have another digest than there.
    pub(super) fn unlike(expected: HashMap<Vec<u8>, Digest>) -> Self {
        Self {
            wanted: Wanted::Other(expected),
            ..Self::all(SHOWN_BYTES, 4 << 20)
        }
    }

    /// Returns a text. The empty one is always known.
    pub(super) fn get(&self, digest: &Digest) -> Option<&str> {
        match self.kept.get(digest) {
            Some(text) => Some(text),
            None => (*digest == Digest::of("")).then_some(""),
        }
    }

    /// Returns a text, and keeps it no longer.
    pub(super) fn take(&mut self, digest: &Digest) -> Option<String> {
        let text = self.kept.remove(digest)?;
        self.left += text.len();
        Some(text)
    }

    /// Reads the content of an entry that is a file at `path`, and returns its digest.
    pub(super) fn read<R: Read>(
        &mut self,
        path: &[u8],
        entry: &Entry,
        archive: &mut Archive<R>,
    ) -> Result<Digest, ArchiveError> {
        let other_than = match &self.wanted {
            Wanted::All => None,
            Wanted::Other(expected) => match expected.get(path) {
                Some(digest) => Some(*digest),
                None => return archive.content_digest(),
            },
        };
        if entry.size > self.limit || entry.size == 0 {
            return archive.content_digest();
        }
        let mut bytes = vec![0; entry.size as usize];
        let mut filled = 0;
        while filled < bytes.len() {
            filled += archive.read_content(&mut bytes[filled..])?;
        }
        let digest = Digest::of(&bytes);
        if other_than != Some(digest)
            && bytes.len() <= self.left
            && !self.kept.contains_key(&digest)
            && let Some(text) = text(bytes)
        {
            self.left -= text.len();
            self.kept.insert(digest, text);
        }
        Ok(digest)
    }
}

/// Returns `bytes` as a text, if they are one.
fn text(bytes: Vec<u8>) -> Option<String> {
    String::from_utf8(bytes)
        .ok()
        .filter(|text| !text.contains('\0'))
}

/// Returns the difference of two texts in the unified format, escaped, with at most 40 lines; `None` if they have too
/// many lines to be compared. Escaping keeps a line a line, so that no text can forge another difference.
pub(super) fn unified(expected: &str, found: &str) -> Option<String> {
    // Not by `str::lines` or the crate, for which a carriage return is a line end, too.
    let lines = |text| str::split_inclusive(text, '\n').collect::<Vec<&str>>();
    let (expected, found) = (lines(expected), lines(found));
    if expected.len().max(found.len()) > COMPARED_LINES {
        return None;
    }
    let diff = TextDiff::from_slices(&expected, &found);
    let mut shown = vec!["--- expected".to_owned(), "+++ found".to_owned()];
    let mut more = 0;
    let mut line = |text: String| {
        if shown.len() < SHOWN_LINES {
            shown.push(text);
        } else {
            more += 1;
        }
    };
    for hunk in diff.unified_diff().context_radius(CONTEXT).iter_hunks() {
        line(hunk.header().to_string());
        for change in hunk.iter_changes() {
            let value = change.value();
            let whole = value.strip_suffix('\n');
            let text = escape::limited(whole.unwrap_or(value), LINE_CHARS);
            line(format!("{}{text}", change.tag()));
            if whole.is_none() {
                line("\\ No newline at end of file".to_owned());
            }
        }
    }
    if more > 0 {
        shown.push(format!(
            "and {}",
            crate::common::message::count(more, "more line", "more lines")
        ));
    }
    Some(shown.join("\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_difference_is_escaped_and_bounded() {
        assert_eq!(
            unified("a\nb\nc\n", "a\nB\u{1b}[2J\u{202e}\nc").as_deref(),
            Some(
                "--- expected\n+++ found\n@@ -1,3 +1,3 @@\n a\n-b\n-c\n+B\\u{1b}[2J\\u{202e}\n+c\n\\ No newline at end of file"
            )
        );
        // A carriage return alone is a line end for some libraries, and a way to hide text in a terminal.
        let one = unified("x\n", "x\rforged\n").unwrap();
        assert_eq!(one, "--- expected\n+++ found\n@@ -1 +1 @@\n-x\n+x\\rforged");
        let many: String = (0..100).map(|n| format!("{n}\n")).collect();
        let shown = unified("", &many).unwrap();
        assert_eq!(shown.lines().count(), SHOWN_LINES + 1);
        assert!(shown.ends_with("+36\nand 63 more lines"), "{shown}");
        let long = unified("", &"y".repeat(10_000)).unwrap();
        assert!(long.chars().count() < 400, "{long}");
        assert_eq!(unified("", &"\n".repeat(COMPARED_LINES + 1)), None);
    }

    #[test]
    fn a_text_is_utf_8_without_zero_bytes() {
        assert_eq!(text(b"\xc3\xa9\n".to_vec()).as_deref(), Some("é\n"));
        assert_eq!(text(b"\xff".to_vec()), None);
        assert_eq!(text(b"a\0".to_vec()), None);
    }
}
