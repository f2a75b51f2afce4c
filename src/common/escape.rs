//! Escapes untrusted names and texts for terminals, logs and messages.

use std::fmt::Write;

/// Escapes everything in `text` that a terminal would interpret or hide: control characters, bidirectional controls and
/// zero-width characters. With the latter two, a name can be made to look like another.
pub(crate) fn text(text: &str) -> String {
    limited(text, usize::MAX)
}

/// Like [`text()`], but shortened to the first `limit` characters of `text`, with `…` for the rest.
pub fn limited(text: &str, limit: usize) -> String {
    let mut out = String::new();
    for (n, c) in text.chars().enumerate() {
        if n == limit {
            out.push('…');
            break;
        }
        let hidden = matches!(c, '\u{ad}' | '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}');
        if c.is_control() || hidden {
            out.extend(c.escape_default());
        } else {
            out.push(c);
        }
    }
    out
}

/// Escapes a message of this program that may contain untrusted text. Line ends followed by an indentation of two
/// spaces are kept, everything else is escaped as in [`text()`], so untrusted text cannot start an unindented line.
pub fn message(message: &str) -> String {
    let mut lines = message.split("\n  ");
    let mut out = text(lines.next().unwrap_or_default());
    for line in lines {
        out.push_str("\n  ");
        out.push_str(&text(line));
    }
    out
}

/// Formats a path as text. Bytes that are not UTF-8 become `\xNN` and a backslash becomes `\\`, so that each text
/// stands for exactly one path.
pub fn path(path: &[u8]) -> String {
    let mut out = String::with_capacity(path.len());
    for chunk in path.utf8_chunks() {
        out.push_str(&text(&chunk.valid().replace('\\', "\\\\")));
        for byte in chunk.invalid() {
            // Writing to a `String` cannot fail.
            let _ = write!(out, "\\x{byte:02x}");
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_a_terminal_obeys_or_hides() {
        for (given, shown) in [
            ("plain é 한", "plain é 한"),
            ("a\u{1b}[31m", "a\\u{1b}[31m"),
            ("line\nnext", "line\\nnext"),
            ("gpj\u{202e}exe", "gpj\\u{202e}exe"),
            ("\u{feff}x", "\\u{feff}x"),
        ] {
            assert_eq!(text(given), shown);
        }
        assert_eq!(
            message("list:\n  a\u{1b}\n  b\nupperdeck: forged\n"),
            "list:\n  a\\u{1b}\n  b\\nupperdeck: forged\\n"
        );
        assert_eq!(limited("abcdef", 3), "abc…");
        assert_eq!(path(b"a\\\xff\n"), "a\\\\\\xff\\n");
    }
}
