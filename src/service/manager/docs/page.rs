//! Renders the OpenAPI document as HTML. All text is escaped where it is written.

use std::fmt::Write as _;

use serde_json::{Map, Value, json};

use crate::service::manager::problem::CODES;
use crate::service::record::SaveEvent;

/// Depth to which examples of bodies are made.
const DEPTH: u32 = 5;
const METHODS: [&str; 5] = ["get", "post", "put", "patch", "delete"];

/// Returns `text` as HTML text or an attribute's value.
fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c => out.push(c),
        }
    }
    out
}

/// Returns a description as HTML: what is between backquotes is code.
fn prose(text: &str) -> String {
    let mut out = String::new();
    for (at, part) in text.split('`').enumerate() {
        let part = escape(part);
        if at % 2 == 1 {
            let _ = write!(out, "<code>{part}</code>");
        } else {
            out.push_str(&part);
        }
    }
    out
}

fn frame(title: &str, style: &str, body: &str) -> String {
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width\">\n<title>{title}</title>\n\
         <link rel=\"stylesheet\" href=\"{style}\">\n</head>\n<body>\n<main>\n{body}</main>\n</body>\n</html>\n",
        title = escape(title)
    )
}

fn text<'a>(value: &'a Value, name: &str) -> &'a str {
    value[name].as_str().unwrap_or_default()
}

fn entries(value: &Value) -> impl Iterator<Item = (&String, &Value)> {
    value.as_object().into_iter().flatten()
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

/// Returns the name of the schema that `schema` refers to.
fn reference(schema: &Value) -> Option<&str> {
    schema["$ref"].as_str()?.rsplit('/').next()
}

/// Returns the type of a value as HTML, with links to schemas.
fn kind(schema: &Value) -> String {
    if let Some(name) = reference(schema) {
        let name = escape(name);
        return format!("<a href=\"#schema-{name}\">{name}</a>");
    }
    for any in ["oneOf", "anyOf", "allOf"] {
        if schema[any].is_array() {
            let all: Vec<String> = list(&schema[any]).map(kind).collect();
            return all.join(" or ");
        }
    }
    if let Some(values) = schema["enum"].as_array() {
        let all: Vec<String> = values
            .iter()
            .map(|value| format!("<code>{}</code>", escape(&value.to_string())))
            .collect();
        return all.join(" or ");
    }
    let named: Vec<&str> = match &schema["type"] {
        Value::String(one) => vec![one],
        all => list(all).filter_map(Value::as_str).collect(),
    };
    let of = |name: &str| match name {
        "array" => format!("array of {}", kind(&schema["items"])),
        name => {
            let format = text(schema, "format");
            if format.is_empty() || name == "null" {
                escape(name)
            } else {
                format!("{} ({})", escape(name), escape(format))
            }
        }
    };
    let all: Vec<String> = named.into_iter().map(of).collect();
    if all.is_empty() {
        "any".to_owned()
    } else {
        all.join(" or ")
    }
}

/// Returns an example of a value: what it has to have, or everything if nothing is said to be needed.
fn example(document: &Value, schema: &Value, depth: u32) -> Value {
    if depth == 0 {
        return Value::Null;
    }
    if let Some(name) = reference(schema) {
        return example(
            document,
            &document["components"]["schemas"][name],
            depth - 1,
        );
    }
    for any in ["example", "default", "const"] {
        if !schema[any].is_null() {
            return schema[any].clone();
        }
    }
    for any in ["oneOf", "anyOf", "allOf"] {
        let mut found = list(&schema[any]).filter(|one| one["type"] != "null");
        if let Some(one) = found.next() {
            return example(document, one, depth);
        }
    }
    if let Some(first) = list(&schema["enum"]).next() {
        return first.clone();
    }
    let name = match &schema["type"] {
        Value::String(one) => one.as_str(),
        all => list(all)
            .filter_map(Value::as_str)
            .find(|one| *one != "null")
            .unwrap_or_default(),
    };
    match (name, text(schema, "format")) {
        ("object", _) => {
            let made = entries(&schema["properties"])
                .map(|(name, of)| (name.clone(), example(document, of, depth - 1)));
            Value::Object(made.collect::<Map<_, _>>())
        }
        ("array", _) => json!([example(document, &schema["items"], depth - 1)]),
        ("integer" | "number", _) => json!(1),
        ("boolean", _) => json!(false),
        ("string", "date-time") => json!("2026-11-30T09:00:00.000Z"),
        ("string", "uuid") => json!("019ad3c0-0000-7000-8000-000000000000"),
        ("string", _) => json!("text"),
        _ => Value::Null,
    }
}

fn parameters(out: &mut String, operation: &Value) {
    let mut all = list(&operation["parameters"]).peekable();
    if all.peek().is_none() {
        return;
    }
    out.push_str("<table>\n<tr><th>Parameter<th>In<th>Type<th>What\n");
    for one in all {
        let needed = if one["required"] == true && one["in"] != "path" {
            ", required"
        } else {
            ""
        };
        let _ = writeln!(
            out,
            "<tr><td><code>{}</code><td>{}{needed}<td>{}<td>{}",
            escape(text(one, "name")),
            escape(text(one, "in")),
            kind(&one["schema"]),
            prose(text(one, "description"))
        );
    }
    out.push_str("</table>\n");
}

fn responses(out: &mut String, operation: &Value) {
    out.push_str("<table>\n<tr><th>Status<th>Body<th>What\n");
    for (status, response) in entries(&operation["responses"]) {
        let bodies: Vec<String> = entries(&response["content"])
            .map(|(media, content)| match kind(&content["schema"]) {
                kind if media == "application/json" => kind,
                kind => format!("{kind} ({})", escape(media)),
            })
            .collect();
        let headers: Vec<String> = entries(&response["headers"])
            .map(|(name, _)| format!("<code>{}</code>", escape(name)))
            .collect();
        let headers = if headers.is_empty() {
            String::new()
        } else {
            format!(". Headers: {}", headers.join(", "))
        };
        let _ = writeln!(
            out,
            "<tr><td>{}<td>{}<td>{}{headers}",
            escape(status),
            bodies.join(", "),
            prose(text(response, "description"))
        );
    }
    out.push_str("</table>\n");
}

/// Writes the call as a command line.
fn curl(out: &mut String, document: &Value, path: &str, method: &str, operation: &Value) {
    let mut line = "curl".to_owned();
    if method != "get" {
        let _ = write!(line, " -X {}", method.to_uppercase());
    }
    let open = list(&operation["security"]).any(|one| one.as_object().is_some_and(Map::is_empty));
    if !open {
        line.push_str(" -H \"Authorization: Bearer $TOKEN\"");
    }
    if path.ends_with("/events") {
        line.push_str(" -N");
    }
    let _ = write!(line, " \"$UPPERDECK{path}\"");
    let schema = &operation["requestBody"]["content"]["application/json"]["schema"];
    if !schema.is_null() {
        let body = example(document, schema, DEPTH);
        let body = serde_json::to_string_pretty(&body).unwrap_or_default();
        // A single quote ends a quoted word of the shell.
        let body = body.replace('\'', "'\\''");
        let _ = write!(
            line,
            " \\\n  -H 'Content-Type: application/json' -d '{body}'"
        );
    }
    let _ = writeln!(
        out,
        "<pre tabindex=\"0\"><code>{}</code></pre>",
        escape(&line)
    );
}

fn operation(out: &mut String, document: &Value, path: &str, method: &str, of: &Value) {
    let id = escape(text(of, "operationId"));
    let _ = writeln!(
        out,
        "<h3 id=\"{id}\"><code>{} {}</code></h3>\n<p>{}</p>",
        method.to_uppercase(),
        escape(path),
        prose(text(of, "summary"))
    );
    let more = text(of, "description");
    if !more.is_empty() && more != text(of, "summary") {
        let _ = writeln!(out, "<p>{}</p>", prose(more));
    }
    curl(out, document, path, method, of);
    parameters(out, of);
    let schema = &of["requestBody"]["content"]["application/json"]["schema"];
    if !schema.is_null() {
        let _ = writeln!(out, "<p>Body: {}</p>", kind(schema));
    }
    responses(out, of);
}

fn schema(out: &mut String, document: &Value, name: &str, of: &Value) {
    let name = escape(name);
    let _ = writeln!(
        out,
        "<h3 id=\"schema-{name}\">{name}</h3>\n<p>{}</p>",
        prose(text(of, "description"))
    );
    let mut properties = entries(&of["properties"]).peekable();
    if properties.peek().is_none() {
        let _ = writeln!(out, "<p>{}</p>", kind(of));
        return;
    }
    let needed = |name: &str| list(&of["required"]).any(|one| one == name);
    out.push_str("<table>\n<tr><th>Member<th>Type<th>What\n");
    for (name, property) in properties {
        // A reference says what it is by itself.
        let own = text(property, "description");
        let said = match reference(property) {
            Some(other) if own.is_empty() => {
                text(&document["components"]["schemas"][other], "description")
            }
            _ => own,
        };
        let _ = writeln!(
            out,
            "<tr><td><code>{}</code>{}<td>{}<td>{}",
            escape(name),
            if needed(name) { "" } else { " (optional)" },
            kind(property),
            prose(said)
        );
    }
    out.push_str("</table>\n");
}

/// What holds for all calls.
const COMMON: &str = "<h2 id=\"common\">What holds for all calls</h2>\n<ul>\n\
<li>Errors are problems (RFC 9457, <code>application/problem+json</code>) with a stable <code>code</code>: \
<a href=\"docs/errors\">all codes</a>.</li>\n\
<li>Lists come in pages: <code>limit</code> and <code>cursor</code>; the cursor of the next page is <code>next</code> in the \
body, and the header <code>Link</code> with <code>rel=\"next\"</code> leads to it.</li>\n\
<li>GET has an <code>ETag</code>; sent back in <code>If-None-Match</code>, the response is 304 while nothing has changed.</li>\n\
<li>What is done later is answered with 202 and <code>Location</code>, where its state is.</li>\n</ul>\n\
<pre tabindex=\"0\"><code>export UPPERDECK=https://save.example.org TOKEN=...</code></pre>\n";

/// Returns the page about the API that `document`, an OpenAPI document, describes.
pub(super) fn api(document: &Value) -> String {
    let info = &document["info"];
    let title = format!("{} API {}", text(info, "title"), text(info, "version"));
    let (mut index, mut body) = (String::new(), String::new());
    let mut tags: Vec<&str> = Vec::new();
    let mut all = Vec::new();
    for (path, item) in entries(&document["paths"]) {
        for method in METHODS {
            let of = &item[method];
            if of.is_object() {
                let tag = of["tags"][0].as_str().unwrap_or("other");
                if !tags.contains(&tag) {
                    tags.push(tag);
                }
                all.push((tag, path, method, of));
            }
        }
    }
    for tag in tags {
        let tag_text = escape(tag);
        let _ = writeln!(body, "<h2 id=\"tag-{tag_text}\">{tag_text}</h2>");
        for (_, path, method, of) in all.iter().filter(|(of, ..)| *of == tag) {
            let _ = writeln!(
                index,
                "<li><a href=\"#{}\"><code>{} {}</code></a></li>",
                escape(text(of, "operationId")),
                method.to_uppercase(),
                escape(path)
            );
            operation(&mut body, document, path, method, of);
        }
    }
    webhooks(&mut body);
    body.push_str("<h2 id=\"schemas\">Schemas</h2>\n");
    for (name, of) in entries(&document["components"]["schemas"]) {
        schema(&mut body, document, name, of);
    }
    let body = format!(
        "<h1>{}</h1>\n<p>{}</p>\n<p>For programs: <a href=\"openapi.json\">openapi.json</a> (OpenAPI 3.1).</p>\n\
         <nav aria-label=\"Calls\"><ul>\n{index}<li><a href=\"#webhooks\">Webhooks</a></li>\n\
         <li><a href=\"#schemas\">Schemas</a></li>\n</ul></nav>\n{COMMON}{body}",
        escape(&title),
        prose(text(info, "description"))
    );
    frame(&title, "docs/style.css", &body)
}

fn webhooks(out: &mut String) {
    out.push_str(
        "<h2 id=\"webhooks\">Webhooks</h2>\n<p>Requests that the manager sends when something happens to a save: POST with \
         a <a href=\"#schema-SaveNotice\">SaveNotice</a>, signed according to Standard Webhooks \
         (<code>webhook-id</code>, <code>webhook-timestamp</code>, <code>webhook-signature</code>), at least once. The \
         events:</p>\n<ul>\n",
    );
    for event in SaveEvent::ALL {
        let _ = writeln!(out, "<li><code>{}</code></li>", escape(event.name()));
    }
    out.push_str("</ul>\n");
}

/// Returns the page about the codes of problems.
pub(super) fn errors() -> String {
    let mut body = "<h1>Errors</h1>\n<p>Every error is a problem according to RFC 9457. Its <code>type</code> leads to one of \
        these codes, which do not change; <code>detail</code> says what happened, <code>retryable</code> whether the same \
        request may succeed later. <a href=\"../docs\">The API</a></p>\n"
        .to_owned();
    for explained in CODES {
        let statuses: Vec<String> = explained.statuses.iter().map(u16::to_string).collect();
        let _ = writeln!(
            body,
            "<h2 id=\"{code}\"><code>{code}</code></h2>\n<p>{title} ({statuses}). {text}</p>",
            code = explained.code,
            title = escape(explained.title),
            statuses = statuses.join(", "),
            text = escape(explained.text)
        );
    }
    frame("Errors of the upperdeck API", "style.css", &body)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn markup_in_descriptions_stays_text() {
        let hostile = "<script>alert(1)</script>\"'&`<b>`";
        let document = json!({
            "info": {"title": hostile, "version": hostile, "description": hostile},
            "paths": {"/x<y>": {"get": {
                "operationId": hostile, "summary": hostile, "tags": [hostile],
                "parameters": [{"name": hostile, "in": hostile, "description": hostile, "schema": {"type": hostile}}],
                "requestBody": {"content": {"application/json": {"schema": {"default": hostile}}}},
                "responses": {"200": {"description": hostile, "headers": {"<i>": {}}, "content": {"<u>": {}}}}
            }}},
            "components": {"schemas": {hostile: {"description": hostile, "properties": {hostile: {"enum": [hostile]}}}}}
        });
        let page = api(&document);
        for tag in ["<script", "<b>", "<i>", "<u>", "<y>"] {
            assert!(!page.contains(tag), "{tag}: {page}");
        }
        assert!(page.contains("<code>&lt;b&gt;</code>"));
    }

    #[test]
    fn schemas_that_contain_themselves_have_an_example() {
        let document = json!({"components": {"schemas": {"A": {
            "type": "object", "properties": {"a": {"$ref": "#/components/schemas/A"}, "n": {"type": ["integer", "null"]}}
        }}}});
        let made = example(&document, &json!({"$ref": "#/components/schemas/A"}), DEPTH);
        assert_eq!(made["n"], 1);
        assert_eq!(made["a"]["n"], 1);
    }
}
