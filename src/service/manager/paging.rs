//! The one way in which lists are cut into pages: `limit` and `cursor` in the query; `next` in the body, and the same as a
//! link in the header.

use axum::Json;
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use utoipa::IntoParams;

use super::refusal::Refusal;

/// Maximum number of entries per page.
pub(super) const MAX_LIMIT: u32 = 500;
/// Default number of entries per page of lists that grow with time.
pub(super) const LIMIT: u32 = 50;
/// Length of the part of a cursor that recognizes an entry.
const MARK: usize = 16;

/// Selects a page.
#[derive(Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct PageQuery {
    /// Maximum number of entries, 1 to 500.
    #[param(minimum = 1, maximum = 500)]
    pub(super) limit: Option<u32>,
    /// The value of `next` in the previous page.
    pub(super) cursor: Option<String>,
}

/// Checks the number of entries that are asked for.
pub(super) fn limit(asked: Option<u32>, default: u32) -> Result<u32, Refusal> {
    let limit = asked.unwrap_or(default);
    if (1..=MAX_LIMIT).contains(&limit) {
        return Ok(limit);
    }
    let message = format!("limit is 1 to {MAX_LIMIT}");
    Err(Refusal::invalid("limit", message))
}

/// Returns the error response for a cursor that is not from an earlier page.
pub(super) fn invalid_cursor() -> Refusal {
    Refusal::invalid("cursor", "it is no `next` of an earlier page")
}

fn mark(id: &str) -> String {
    hex::encode(Sha256::digest(id))[..MARK].to_owned()
}

/// Cuts the page after `cursor` out of a sorted list whose entries have unique IDs. Returns it with the cursor of the next
/// one, if there is one. If the entry that a cursor names has gone, the page begins at its place.
pub(super) fn cut<T>(
    items: Vec<T>,
    cursor: Option<&str>,
    limit: u32,
    id: impl Fn(&T) -> String,
) -> Result<(Vec<T>, Option<String>), Refusal> {
    let first = match cursor.filter(|text| !text.is_empty()) {
        None => 0,
        Some(text) => {
            let (place, last) = text.split_once('.').ok_or_else(invalid_cursor)?;
            let place: u32 = place.parse().map_err(|_| invalid_cursor())?;
            if last.len() != MARK || !last.bytes().all(|b| b.is_ascii_hexdigit()) {
                return Err(invalid_cursor());
            }
            let found = items.iter().position(|item| mark(&id(item)) == last);
            found.map_or(place as usize, |found| found + 1)
        }
    };
    let all = items.len();
    let page: Vec<T> = items.into_iter().skip(first).take(limit as usize).collect();
    let end = first.saturating_add(page.len());
    let next = page
        .last()
        .filter(|_| end < all)
        .map(|last| format!("{}.{}", end - 1, mark(&id(last))));
    Ok((page, next))
}

/// A page of a list, and the cursor of the next one.
pub(super) struct Listed<T>(pub(super) T, pub(super) Option<String>);

/// The cursor of the next page, for the link in the header of a response.
#[derive(Clone)]
pub(super) struct Next(String);

impl<T: Serialize> IntoResponse for Listed<T> {
    fn into_response(self) -> Response {
        let mut response = Json(self.0).into_response();
        if let Some(next) = self.1 {
            response.extensions_mut().insert(Next(next));
        }
        response
    }
}

/// Adds the link to the next page: relative, so that it is right behind a proxy, too.
pub(super) fn add_link(query: Option<&str>, response: &mut Response) {
    let Some(Next(next)) = response.extensions_mut().remove() else {
        return;
    };
    let others = query.unwrap_or_default().split('&');
    let mut all: Vec<&str> = others
        .filter(|part| !part.is_empty() && part.split('=').next() != Some("cursor"))
        .collect();
    let cursor = format!("cursor={next}");
    all.push(&cursor);
    if let Ok(link) = HeaderValue::from_str(&format!("<?{}>; rel=\"next\"", all.join("&"))) {
        response.headers_mut().insert(header::LINK, link);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_follow_each_other_though_entries_come_and_go() {
        let list = |names: &str| names.chars().map(String::from).collect::<Vec<_>>();
        let read = |names: &str, cursor: Option<&str>| {
            let (page, next) = cut(list(names), cursor, 2, String::clone).ok()?;
            Some((page.concat(), next))
        };
        let (page, next) = read("abcde", None).unwrap();
        assert_eq!(page, "ab");
        for (now, expected) in [("abcde", "cd"), ("xabcde", "cd"), ("acde", "cd"), ("b", "")] {
            assert_eq!(read(now, next.as_deref()).unwrap().0, expected, "{now}");
        }
        let (_, next) = read("abcde", next.as_deref()).unwrap();
        assert_eq!(read("abcde", next.as_deref()), Some(("e".to_owned(), None)));
        for wrong in [
            "x",
            "1",
            "1.",
            "1.zz",
            "99999999999.0123456789abcdef",
            "-1.0123456789abcdef",
        ] {
            assert!(read("abc", Some(wrong)).is_none(), "{wrong}");
        }
        assert_eq!(
            read("abc", Some("4294967295.0123456789abcdef")),
            Some((String::new(), None))
        );
    }

    #[test]
    fn the_link_keeps_the_other_parameters() {
        let mut response = Listed((), Some("7.ab".into())).into_response();
        add_link(Some("limit=2&cursor=old&search=a%20b"), &mut response);
        assert_eq!(
            response.headers()[header::LINK],
            "<?limit=2&search=a%20b&cursor=7.ab>; rel=\"next\""
        );
    }
}
