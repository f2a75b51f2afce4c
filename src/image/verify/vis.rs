//! Escapes names, which are bytes, as text that is safe in git, terminals and logs, and reads them back.
//!
//! Format: the octal form of `vis(3)` as used by `mtree(5)`. Printable ASCII is literal; all other bytes and `\`, `#`,
//! `=` become a backslash and three octal digits.

use std::fmt::Write as _;

/// A text that [`decode`] cannot parse.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{text:?} is not an escaped name: a backslash must be followed by three octal digits up to 377"
)]
pub struct DecodeError {
    /// The text as given.
    pub text: String,
}

/// Escapes `bytes` as printable ASCII without white space. The empty name stays empty.
pub fn encode(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    for &byte in bytes {
        match byte {
            b'\\' | b'#' | b'=' => escape(&mut text, byte),
            0x21..=0x7e => text.push(char::from(byte)),
            _ => escape(&mut text, byte),
        }
    }
    text
}

/// Reverses [`encode`]. Unescaped characters are taken literally, including UTF-8.
pub fn decode(text: &str) -> Result<Vec<u8>, DecodeError> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        if first != b'\\' {
            bytes.push(first);
            rest = tail;
            continue;
        }
        let value = match tail {
            [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', ..] => {
                (a - b'0') * 64 + (b - b'0') * 8 + (c - b'0')
            }
            _ => {
                return Err(DecodeError {
                    text: text.to_owned(),
                });
            }
        };
        bytes.push(value);
        rest = &tail[3..];
    }
    Ok(bytes)
}

fn escape(text: &mut String, byte: u8) {
    // Writing to a `String` cannot fail.
    let _ = write!(text, "\\{byte:03o}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_survives() -> Result<(), DecodeError> {
        let all: Vec<u8> = (0..=255).collect();
        let text = encode(&all);
        assert!(text.bytes().all(|b| (0x21..=0x7e).contains(&b)));
        assert_eq!(decode(&text)?, all);
        assert_eq!(encode(b"a b\n\x1b[2J\xff"), "a\\040b\\012\\033[2J\\377");
        Ok(())
    }

    #[test]
    fn malformed_escapes_are_refused() {
        for bad in ["\\", "\\1", "\\12", "\\400", "\\8aa", "a\\xff"] {
            assert!(decode(bad).is_err(), "{bad}");
        }
    }
}
