//! Lists of the API: filtered, sorted and cut into pages as Harbor does it.

use serde_json::Value;

use super::errors;
use crate::http::{Request, Response};

fn number(request: &Request, name: &str, usual: i64) -> i64 {
    let given = request.one(name).and_then(|n| n.parse().ok());
    given.unwrap_or(usual)
}

/// Returns what is wrong with the parameters of a list.
pub fn refused(request: &Request) -> Option<Response> {
    let no = |said: &str| {
        let said = format!("validation failure list:\n{said}");
        Some(errors(422, "UNPROCESSABLE_ENTITY", &said))
    };
    for name in ["page", "page_size"] {
        let Some(text) = request.one(name) else {
            continue;
        };
        match text.parse::<i64>() {
            Err(_) => {
                return no(&format!("{name} in query must be of type int64: {text:?}"));
            }
            Ok(n) if n > 100 && name == "page_size" => {
                return no("page_size in query should be less than or equal to 100");
            }
            Ok(_) => {}
        }
    }
    None
}

fn bad_query(message: &str) -> Response {
    errors(400, "BAD_REQUEST", message)
}

fn is_between(value: u64, range: &str) -> bool {
    let (low, high) = range.split_once('~').unwrap_or_default();
    let number = |text: &str| text.parse::<u64>();
    number(low).is_ok_and(|low| value >= low) && number(high).is_ok_and(|high| value <= high)
}

/// Keeps the items that fit one condition. Unknown fields are ignored.
fn keep(all: &mut Vec<Value>, field: &str, value: &str) -> Result<(), Response> {
    let names = |item: &Value| -> Vec<String> {
        let tags = item["tags"].as_array().into_iter().flatten();
        let tags = tags.filter_map(|tag| tag["name"].as_str());
        tags.map(str::to_owned).collect()
    };
    let text = |item: &Value| item[field].as_str().unwrap_or_default().to_owned();
    match (field, value) {
        (_, "~") => return Err(bad_query("invalid query string value: ~")),
        ("tags", value) if value.starts_with(['{', '(', '[']) => {
            let said =
                "the value of \"tags\" query can only be fuzzy match value or exact match value";
            return Err(bad_query(said));
        }
        ("tags", "*") => all.retain(|item| !names(item).is_empty()),
        ("tags", "nil") => all.retain(|item| names(item).is_empty()),
        ("tags", value) => match value.strip_prefix('~') {
            Some(part) => all.retain(|item| names(item).iter().any(|n| n.contains(part))),
            None => all.retain(|item| names(item).iter().any(|n| n == value)),
        },
        ("labels", value) => {
            let ids: Vec<u64> = value
                .trim_matches(['(', ')'])
                .split(' ')
                .filter_map(|id| id.parse().ok())
                .collect();
            all.retain(|item| {
                let has = item["labels"].as_array().into_iter().flatten();
                let has: Vec<u64> = has.filter_map(|label| label["id"].as_u64()).collect();
                ids.iter().all(|id| has.contains(id))
            });
        }
        ("update_time" | "creation_time", _) => all.clear(),
        ("name" | "digest", value) => {
            if let Some(part) = value.strip_prefix('~') {
                let part = part.to_lowercase();
                all.retain(|item| text(item).to_lowercase().contains(&part));
            } else if let Some(list) = value.strip_prefix('{') {
                let list: Vec<_> = list.trim_end_matches('}').split(' ').collect();
                all.retain(|item| list.contains(&text(item).as_str()));
            } else {
                all.retain(|item| text(item) == value);
            }
        }
        ("size" | "pull_count", value) => {
            let exact = value.parse::<u64>().ok();
            let range = value.trim_matches(['[', ']']);
            all.retain(|item| {
                let own = item[field].as_u64().unwrap_or_default();
                exact.map_or_else(|| is_between(own, range), |exact| own == exact)
            });
        }
        _ => {}
    }
    Ok(())
}

/// Sorts by the first known key; otherwise the newest is first.
fn order(all: &mut [Value], sort: Option<&str>, keys: &[&str]) {
    all.sort_by_key(|item| item["id"].as_u64().or(item["project_id"].as_u64()));
    let wanted = sort.into_iter().flat_map(|sort| sort.split(','));
    let mut known = wanted.filter(|key| keys.contains(&key.trim_start_matches('-')));
    let Some(key) = known.next() else {
        all.reverse();
        return;
    };
    let field = key.trim_start_matches('-');
    all.sort_by(|a, b| {
        let order = match (a[field].as_u64(), b[field].as_u64()) {
            (Some(a), Some(b)) => a.cmp(&b),
            _ => a[field].as_str().cmp(&b[field].as_str()),
        };
        if key.starts_with('-') {
            order.reverse()
        } else {
            order
        }
    });
}

/// Returns a page of a list. `keys` are the fields that it can be sorted by.
pub fn page(request: &Request, mut all: Vec<Value>, keys: &[&str]) -> Response {
    if let Some(query) = request.one("q") {
        for condition in query.split(',') {
            let Some((field, value)) = condition.split_once('=').filter(|(_, v)| !v.is_empty())
            else {
                let said = "the query string must contain \"=\" and the key/value cannot be empty";
                return bad_query(said);
            };
            if let Err(answer) = keep(&mut all, field, value) {
                return answer;
            }
        }
    }
    if let Some(name) = request.one("name") {
        all.retain(|item| item["name"].as_str().is_some_and(|n| n.contains(&name)));
    }
    order(&mut all, request.one("sort").as_deref(), keys);
    let (page, size) = (number(request, "page", 1), number(request, "page_size", 10));
    let total = all.len() as i64;
    let skipped = usize::try_from((page - 1) * size.max(0)).unwrap_or(0);
    let taken = if size > 0 { size as usize } else { all.len() };
    let items: Vec<Value> = all.into_iter().skip(skipped).take(taken).collect();
    let mut answer =
        Response::json(200, &Value::Array(items)).with("X-Total-Count", total.to_string());
    let mut links = Vec::new();
    if page > 1 && (page - 1) * size < total {
        links.push(link(request, page - 1, size, "prev"));
    }
    if size != 0 && page * size < total {
        links.push(link(request, page + 1, size, "next"));
    }
    if !links.is_empty() {
        answer = answer.with("Link", links.join(" , "));
    }
    answer.body.push(b'\n');
    answer
}

fn link(request: &Request, page: i64, size: i64, which: &str) -> String {
    let mut parameters = vec![format!("page={page}"), format!("page_size={size}")];
    for pair in request.query.split('&') {
        let name = pair.split('=').next().unwrap_or_default();
        if !name.is_empty() && !name.starts_with("page") {
            parameters.push(crate::http::unescape(pair));
        }
    }
    parameters.sort();
    let path = &request.path;
    format!("<{path}?{}>; rel=\"{which}\"", parameters.join("&"))
}
