//! Strangers' names and texts, made fit for terminals, logs and messages.

use std::fmt::Write;

/// `text` without anything that a terminal would obey or hide: control characters, and those that turn the direction
/// of writing or have no width (names can be made to look like others with them).
pub fn text(text: &str) -> String {
    limited(text, usize::MAX)
}

/// The same of the first `limit` characters.
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

/// A message of this program's, whose lines after the first are indented: line ends before an indented line stay, all
/// else that a terminal would obey is escaped. A stranger's text in it can begin no line of its own.
pub fn message(message: &str) -> String {
    let mut lines = message.split("\n  ");
    let mut out = text(lines.next().unwrap_or_default());
    for line in lines {
        out.push_str("\n  ");
        out.push_str(&text(line));
    }
    out
}

/// A path as text: bytes that are not UTF-8 as `\xNN`, a backslash as `\\`, so that each text stands for one path.
pub fn path(path: &[u8]) -> String {
    let mut out = String::with_capacity(path.len());
    for chunk in path.utf8_chunks() {
        out.push_str(&text(&chunk.valid().replace('\\', "\\\\")));
        for byte in chunk.invalid() {
            // Writing to a String cannot fail.
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
