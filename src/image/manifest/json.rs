//! Checks the types of JSON fields. Unknown fields are kept as they are.

use serde_json::{Map, Value};

use super::Error;

pub(super) fn parse_object(what: &'static str, bytes: &[u8]) -> Result<Map<String, Value>, Error> {
    match serde_json::from_slice(bytes) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(other) => Err(unexpected_type(what, "it", "an object", &other)),
        Err(source) => Err(Error::Json { what, source }),
    }
}

pub(super) fn to_bytes(map: &Map<String, Value>) -> Vec<u8> {
    // The alternate form of `Display` would be indented; this one is compact and cannot fail.
    Value::Object(map.clone()).to_string().into_bytes()
}

pub(super) fn drop_nulls(map: &mut Map<String, Value>) {
    map.retain(|_, value| !value.is_null());
}

#[derive(Clone, Copy)]
pub(super) enum Kind {
    Text,
    Bool,
    Texts,
    TextMap,
    Object,
}

/// Fails if a field exists and is not of the given kind.
pub(super) fn expect(
    what: &'static str,
    at: &str,
    map: &Map<String, Value>,
    key: &str,
    kind: Kind,
) -> Result<(), Error> {
    let Some(value) = map.get(key) else {
        return Ok(());
    };
    let (right, expected) = match kind {
        Kind::Text => (value.is_string(), "a text"),
        Kind::Bool => (value.is_boolean(), "true or false"),
        Kind::Texts => (
            value
                .as_array()
                .is_some_and(|list| list.iter().all(Value::is_string)),
            "a list of texts",
        ),
        Kind::TextMap => (
            value
                .as_object()
                .is_some_and(|map| map.values().all(Value::is_string)),
            "a map of texts",
        ),
        Kind::Object => (value.is_object(), "an object"),
    };
    if right {
        Ok(())
    } else {
        Err(unexpected_type(what, format!("{at}{key}"), expected, value))
    }
}

pub(super) fn unexpected_type(
    what: &'static str,
    field: impl Into<String>,
    expected: &'static str,
    found: &Value,
) -> Error {
    let kind = match found {
        Value::Null => "nothing",
        Value::Bool(_) => "true or false",
        Value::Number(_) => "a number",
        Value::String(_) => "a text",
        Value::Array(list) if list.iter().all(Value::is_string) => "a list of texts",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    };
    Error::UnexpectedType {
        what,
        field: field.into(),
        expected,
        found: kind.to_owned(),
    }
}
