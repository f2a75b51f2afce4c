//! Text of messages for people: errors with their causes, and numbers with their nouns.

use std::error::Error;
use std::fmt::Display;

/// Maximum length of a message, in bytes. Text that describes an input can be as long as the input.
const MAX_BYTES: usize = 8 << 10;

/// Formats an error and its causes as one line, as everywhere in this program. A cause is left out if the text before
/// it contains it already, because many errors print their own cause. Text beyond 8 KiB is cut off.
pub fn of(error: &(dyn Error + 'static)) -> String {
    joined(chain(error).map(ToString::to_string))
}

/// Returns an iterator over an error, its cause, the cause of that, and so on.
pub(crate) fn chain<'a>(
    error: &'a (dyn Error + 'static),
) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    std::iter::successors(Some(error), |&error| error.source())
}

/// Formats a size in bytes with a decimal unit, such as `1.40 MB`.
pub(crate) fn size(bytes: u64) -> String {
    indicatif::DecimalBytes(bytes).to_string()
}

/// Joins the texts of a chain of causes to one.
pub(crate) fn joined(texts: impl IntoIterator<Item = String>) -> String {
    let mut message = String::new();
    for text in texts {
        if text.is_empty() || message.contains(&text) {
            continue;
        }
        if !message.is_empty() {
            message.push_str(": ");
        }
        message.push_str(&text);
    }
    if message.len() > MAX_BYTES {
        let fits = |end: &usize| message.is_char_boundary(*end);
        message.truncate((0..=MAX_BYTES).rev().find(fits).unwrap_or(0));
        message.push('…');
    }
    message
}

/// Formats a number with its noun: `1 path`, `2 paths`.
pub(crate) fn count<N: Copy + Display + PartialEq + From<u8>>(
    number: N,
    one: &str,
    many: &str,
) -> String {
    let noun = if number == N::from(1) { one } else { many };
    format!("{number} {noun}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    enum Told {
        #[error("the layer: {0}")]
        Twice(#[source] std::io::Error),
        #[error("the layer")]
        Once(#[source] std::io::Error),
        #[error(transparent)]
        Through(Box<Told>),
    }

    #[test]
    fn a_message_is_no_longer_than_people_read() {
        let text = "é".repeat(MAX_BYTES);
        let told = of(&Told::Once(std::io::Error::other(text)));
        assert!(told.len() <= MAX_BYTES + '…'.len_utf8());
        assert!(told.starts_with("the layer: éé") && told.ends_with("é…"));
    }

    #[test]
    fn each_cause_is_told_once() {
        let disk = || std::io::Error::other("disk full");
        for error in [Told::Twice(disk()), Told::Once(disk())] {
            assert_eq!(of(&error), "the layer: disk full");
            let wrapped = Told::Through(Box::new(error));
            assert_eq!(of(&wrapped), "the layer: disk full");
            let context = anyhow::Error::new(wrapped).context("saving");
            assert_eq!(of(context.as_ref()), "saving: the layer: disk full");
        }
    }

    #[test]
    fn one_is_not_many() {
        let counted = [0_u64, 1, 2].map(|n| count(n, "entry", "entries"));
        assert_eq!(counted, ["0 entries", "1 entry", "2 entries"]);
    }
}
