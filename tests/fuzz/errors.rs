//! Checks the guarantees that hold for every error message.

use std::error::Error;

use upperdeck::{common::escape, common::message};

/// Maximum length of an error message in bytes.
const LONGEST: usize = 16 << 10;

/// Checks the message of an error as printed.
pub fn check(error: &(dyn Error + 'static)) {
    let text = message::of(error);
    assert!(!text.is_empty(), "an error without a word");
    assert!(text.len() <= LONGEST, "a message of {} bytes", text.len());
    let printed = escape::message(&text);
    let obeyed = |c: char| c.is_control() && c != '\n';
    assert!(!printed.contains(obeyed), "{printed:?}");
}

/// Returns the parsed value; an error is checked.
pub fn checked<T, E: Error + 'static>(result: Result<T, E>) -> Option<T> {
    result.inspect_err(|error| check(error)).ok()
}
