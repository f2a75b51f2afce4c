//! Parses stream entries from Redis responses. Any client with write access may have created them, so malformed ones
//! are skipped.

use std::collections::HashMap;

use redis::Value;

/// An entry of a stream.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Entry {
    /// ID assigned by Redis.
    pub(super) id: String,
    /// Fields of the entry. If a field occurs twice, the last value counts.
    pub(super) fields: HashMap<Vec<u8>, Vec<u8>>,
}

/// Returns the entries in a response of `XREADGROUP` for one stream; none if the response is nil.
pub(super) fn of_one_stream(answer: Value) -> Vec<Entry> {
    let Value::Array(streams) = answer else {
        return Vec::new();
    };
    match streams.into_iter().next() {
        Some(Value::Array(mut stream)) if stream.len() == 2 => {
            stream.pop().map(entries).unwrap_or_default()
        }
        _ => Vec::new(),
    }
}

/// Returns the entries in a list. Other values are skipped: Redis 6.2 lists deleted entries as nil.
pub(super) fn entries(list: Value) -> Vec<Entry> {
    let Value::Array(list) = list else {
        return Vec::new();
    };
    list.into_iter().filter_map(entry).collect()
}

fn entry(value: Value) -> Option<Entry> {
    let Value::Array(parts) = value else {
        return None;
    };
    let mut parts = parts.into_iter();
    let id = String::from_utf8(bytes(parts.next()?)?).ok()?;
    if !is_entry_id(&id) {
        return None;
    }
    let mut fields = HashMap::new();
    if let Some(Value::Array(flat)) = parts.next() {
        let mut flat = flat.into_iter();
        while let (Some(name), Some(value)) = (flat.next(), flat.next()) {
            if let (Some(name), Some(value)) = (bytes(name), bytes(value)) {
                fields.insert(name, value);
            }
        }
    }
    Some(Entry { id, fields })
}

fn bytes(value: Value) -> Option<Vec<u8>> {
    match value {
        Value::BulkString(bytes) => Some(bytes),
        Value::SimpleString(text) => Some(text.into_bytes()),
        _ => None,
    }
}

/// Returns whether `text` has the form of an entry ID: two numbers separated by `-`.
pub(super) fn is_entry_id(text: &str) -> bool {
    let number = |part: &str| part.parse::<u64>().is_ok() && !part.starts_with('+');
    text.split_once('-')
        .is_some_and(|(ms, seq)| number(ms) && number(seq))
}

#[cfg(test)]
mod tests {
    use super::{Value, entries, is_entry_id, of_one_stream};

    fn text(text: &str) -> Value {
        Value::BulkString(text.as_bytes().to_vec())
    }

    #[test]
    fn what_is_no_entry_is_passed_over() {
        let good = Value::Array(vec![
            text("1-0"),
            Value::Array(vec![text("m"), text("x"), text("odd")]),
        ]);
        let list = Value::Array(vec![
            Value::Nil,
            text("1-0"),
            Value::Array(Vec::new()),
            Value::Array(vec![text("no id"), Value::Nil]),
            Value::Array(vec![Value::Int(3), Value::Nil]),
            good,
            Value::Array(vec![text("2-1"), Value::Nil]),
        ]);
        let found = entries(list.clone());
        assert_eq!(found.len(), 2);
        assert_eq!(found[0].fields.get(b"m".as_slice()), Some(&b"x".to_vec()));
        assert!(found[1].fields.is_empty());
        let answer = Value::Array(vec![Value::Array(vec![text("s"), list])]);
        assert_eq!(of_one_stream(answer), found);
        assert!(of_one_stream(Value::Nil).is_empty());
        assert!(of_one_stream(Value::Array(vec![Value::Array(vec![text("s")])])).is_empty());
    }

    #[test]
    fn names_of_entries_are_two_numbers() {
        assert!(is_entry_id("1763990000000-12"));
        for bad in [
            "",
            "1",
            "1-",
            "-1",
            "1-2-3",
            "+1-2",
            "1-x",
            "99999999999999999999-0",
            "1 -2",
        ] {
            assert!(!is_entry_id(bad), "{bad}");
        }
    }
}
