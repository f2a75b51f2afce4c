//! Validates requests and answers against Harbor's published API description.

use std::path::PathBuf;

use boon::{Compiler, Draft, SchemaIndex, Schemas};
use serde_json::{Map, Value, json};

use crate::http::{Request, Response};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Returns the path of a file that is not part of the project, if it exists.
pub fn shared(name: &str) -> Option<PathBuf> {
    let here = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let path = here.join("../shared/harbor").join(name);
    path.is_file().then_some(path)
}

pub struct Description {
    document: Value,
    schemas: Schemas,
    compiler: Compiler,
    count: usize,
    /// Statuses that a running Harbor returns but the description omits: method, template, status.
    also: Vec<(String, String, u16)>,
}

impl Description {
    pub fn load() -> Result<Option<Self>> {
        let Some(path) = shared("swagger-v2.0.yaml") else {
            return Ok(None);
        };
        let document: Value = serde_yaml_ng::from_str(&std::fs::read_to_string(path)?)?;
        let mut definitions = document["definitions"].clone();
        for (name, definition) in definitions.as_object_mut().into_iter().flatten() {
            tighten(name, definition);
        }
        let mut compiler = Compiler::new();
        compiler.set_default_draft(Draft::V4);
        compiler.add_resource(
            "http://h/definitions.json",
            json!({"definitions": definitions}),
        )?;
        Ok(Some(Self {
            document,
            schemas: Schemas::new(),
            compiler,
            count: 0,
            also: Vec::new(),
        }))
    }

    /// Permits a status that was observed on a running Harbor.
    pub fn allow(&mut self, method: &str, path: &str, status: u16) {
        if let Some((template, _)) = self.operation(method, path) {
            self.also.push((method.to_owned(), template, status));
        }
    }

    fn operation(&self, method: &str, path: &str) -> Option<(String, Value)> {
        let parts: Vec<&str> = path.strip_prefix("/api/v2.0")?.split('/').collect();
        let paths = self.document["paths"].as_object()?;
        let fits = |template: &str| {
            let wanted: Vec<&str> = template.split('/').collect();
            wanted.len() == parts.len()
                && wanted
                    .iter()
                    .zip(&parts)
                    .all(|(w, p)| w == p || (w.starts_with('{') && !p.is_empty()))
        };
        // A literal segment takes precedence over a parameter.
        let found = paths
            .keys()
            .filter(|t| fits(t))
            .min_by_key(|t| t.matches('{').count())?;
        let operation = paths[found].get(method.to_ascii_lowercase())?;
        Some((found.clone(), operation.clone()))
    }

    fn resolve(&self, value: &Value) -> Value {
        match value["$ref"].as_str().and_then(|r| r.strip_prefix('#')) {
            Some(pointer) => self.document.pointer(pointer).cloned().unwrap_or_default(),
            None => value.clone(),
        }
    }

    /// Returns how an exchange deviates from the description; empty if it does not.
    pub fn judge(&mut self, request: &Request, response: &Response) -> Result<Vec<String>> {
        let mut wrong = Vec::new();
        let shown = format!("{} {}", request.method, request.path);
        let Some((template, operation)) = self.operation(&request.method, &request.path) else {
            return Ok(vec![format!("{shown}: no such operation")]);
        };
        let parameters: Vec<Value> = operation["parameters"]
            .as_array()
            .into_iter()
            .flatten()
            .map(|parameter| self.resolve(parameter))
            .collect();
        for pair in request.query.split('&').filter(|pair| !pair.is_empty()) {
            let name = pair.split('=').next().unwrap_or_default();
            let value = request.one(name).unwrap_or_default();
            let known = parameters
                .iter()
                .find(|p| p["in"] == "query" && p["name"] == name);
            let right = known.is_some_and(|p| match p["type"].as_str() {
                Some("integer") => value.parse::<i64>().is_ok_and(|n| {
                    // Too large a value is valid in the request if the answer refuses it.
                    p["maximum"]
                        .as_i64()
                        .is_none_or(|most| n <= most || response.status == 422)
                }),
                Some("boolean") => matches!(value.as_str(), "true" | "false"),
                _ => true,
            });
            if !right {
                wrong.push(format!("{shown}: parameter {pair}"));
            }
        }
        for parameter in parameters.iter().filter(|p| p["required"] == true) {
            let name = parameter["name"].as_str().unwrap_or_default();
            match parameter["in"].as_str() {
                Some("query") if request.one(name).is_none() => {
                    wrong.push(format!("{shown}: lacks {name}"));
                }
                Some("body") => {
                    let said = self.check(&parameter["schema"], &request.body)?;
                    wrong.extend(said.map(|said| format!("{shown}: the body: {said}")));
                }
                _ => {}
            }
        }
        let status = response.status.to_string();
        let described = self.resolve(&operation["responses"][&status]);
        let excused = self
            .also
            .iter()
            .any(|(m, t, s)| *m == request.method && *t == template && *s == response.status);
        if described.is_null() && !excused {
            wrong.push(format!("{shown}: status {status} is not described"));
        }
        let schema = match &described["schema"] {
            Value::Null if response.status >= 400 => json!({"$ref": "#/definitions/Errors"}),
            schema => schema.clone(),
        };
        if request.method != "HEAD" && !schema.is_null() {
            let said = self.check(&schema, &response.body)?;
            wrong.extend(said.map(|said| format!("{shown}: {status}: {said}")));
        }
        Ok(wrong)
    }

    fn check(&mut self, schema: &Value, body: &[u8]) -> Result<Option<String>> {
        let mut document: Value = serde_json::from_slice(body)?;
        without_nulls(&mut document);
        let text = schema
            .to_string()
            .replace("#/definitions", "http://h/definitions.json#/definitions");
        self.count += 1;
        let url = format!("http://h/{}.json", self.count);
        self.compiler
            .add_resource(&url, serde_json::from_str(&text)?)?;
        let index: SchemaIndex = self
            .compiler
            .compile(&url, &mut self.schemas)
            .map_err(|e| format!("{e:#}"))?;
        Ok(self
            .schemas
            .validate(&document, index)
            .err()
            .map(|e| format!("{e:#}")))
    }
}

/// Removes nulls: Go writes empty values as null, which the description does not mention.
fn without_nulls(value: &mut Value) {
    match value {
        Value::Object(members) => {
            members.retain(|_, v| !v.is_null());
            members.values_mut().for_each(without_nulls);
        }
        Value::Array(items) => items.iter_mut().for_each(without_nulls),
        _ => {}
    }
}

/// Forbids undocumented fields, which would be a mistake of ours; the description permits any.
fn tighten(name: &str, definition: &mut Value) {
    let Some(members) = definition.as_object_mut() else {
        return;
    };
    // Documented as objects, but in fact text, null and objects.
    if name == "ExtraAttrs" {
        *members = Map::from_iter([("type".to_owned(), json!("object"))]);
        return;
    }
    if members.contains_key("properties") && !members.contains_key("additionalProperties") {
        members.insert("additionalProperties".to_owned(), json!(false));
    }
}
