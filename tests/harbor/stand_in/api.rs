//! Harbor's own API: projects, quotas, labels, settings, and what a user may do there.

use std::collections::BTreeMap;

use percent_encoding::percent_decode_str;
use serde_json::{Value, json};

use super::pages::{page, refused};
use super::{ADMIN, EXTERNAL, State, errors, missing, stamp};
use crate::http::{Request, Response, unescape};

const REPOSITORY_KEYS: [&str; 4] = ["name", "creation_time", "update_time", "pull_count"];

fn body(request: &Request) -> Value {
    serde_json::from_slice(&request.body).unwrap_or_default()
}

/// Answers a user without a right: anonymous ones differently.
fn forbidden(who: Option<&str>) -> Response {
    match who {
        None => errors(401, "UNAUTHORIZED", "unauthorized"),
        Some(_) => errors(403, "FORBIDDEN", "forbidden"),
    }
}

/// Returns the right that a request to a project needs.
fn right(method: &str, rest: &[&str]) -> (&'static str, &'static str) {
    let deletes = method == "DELETE";
    match rest {
        ["summary"] => ("project", "read"),
        ["repositories"] => ("repository", "list"),
        ["repositories", _] => ("repository", if deletes { "delete" } else { "read" }),
        ["repositories", _, "artifacts"] => ("artifact", "list"),
        ["repositories", _, "artifacts", _] => {
            ("artifact", if deletes { "delete" } else { "read" })
        }
        ["repositories", _, "artifacts", _, "tags", ..] => match method {
            "GET" => ("tag", "list"),
            "POST" => ("tag", "create"),
            _ => ("tag", "delete"),
        },
        ["repositories", _, "artifacts", _, "accessories"] => ("accessory", "list"),
        ["repositories", _, "artifacts", _, "labels", ..] => {
            ("artifact-label", if deletes { "delete" } else { "create" })
        }
        ["repositories", _, "artifacts", _, ..] => ("artifact-addition", "read"),
        ["immutabletagrules", ..] => match method {
            "GET" => ("immutable-tag", "list"),
            "POST" => ("immutable-tag", "create"),
            _ => ("immutable-tag", "delete"),
        },
        [] if method == "GET" => ("project", "read"),
        [] if deletes => ("project", "delete"),
        _ => ("project", "update"),
    }
}

impl State {
    pub fn api(&mut self, request: &Request, path: &str) -> Response {
        let user = self.user(request);
        // A user with a wrong password is anonymous and may see what is public.
        let who = user.as_deref();
        let parts: Vec<String> = path
            .trim_start_matches('/')
            .split('/')
            .map(|part| percent_decode_str(part).decode_utf8_lossy().into_owned())
            .collect();
        let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
        if let Some(answer) = refused(request) {
            return answer;
        }
        match (request.method.as_str(), parts.as_slice()) {
            ("GET", ["ping"]) => Response::new(200).body("Pong"),
            ("GET", ["systeminfo"]) => self.system_info(who),
            ("GET", ["users", "current"]) => self.current_user(who),
            ("PUT", ["configurations"]) if who == Some(ADMIN.0) => {
                self.read_only = body(request)["read_only"] == true;
                Response::new(200)
            }
            ("HEAD", ["projects"]) if who.is_none() => forbidden(None),
            ("HEAD", ["projects"]) => {
                let name = request.one("project_name").unwrap_or_default();
                if self.projects.contains_key(&name) {
                    Response::new(200)
                } else {
                    missing("project")
                }
            }
            ("POST", ["projects"]) => self.make_project(request, who),
            ("GET", ["projects"]) => {
                let all = self.projects.iter();
                let seen = all.filter(|(name, _)| self.may(who, name, "project", "read"));
                let seen = seen.map(|(name, project)| project.document(name, who));
                page(request, seen.collect(), &["name", "creation_time"])
            }
            ("GET", ["repositories"]) => {
                let mut all = Vec::new();
                for (name, project) in &self.projects {
                    if self.may(who, name, "repository", "list") {
                        all.extend(project.repositories(name));
                    }
                }
                page(request, all, &REPOSITORY_KEYS)
            }
            (_, ["robots", rest @ ..]) => {
                let who = who.map(str::to_owned);
                self.robots(request, who.as_deref(), rest)
            }
            (_, ["quotas", rest @ ..]) => {
                let who = who.map(str::to_owned);
                self.quotas(request, who.as_deref(), rest)
            }
            (_, ["labels", rest @ ..]) => {
                let who = who.map(str::to_owned);
                self.labels(request, who.as_deref(), rest)
            }
            (_, ["projects", name, rest @ ..]) => {
                let (mut name, who) = ((*name).to_owned(), who.map(str::to_owned));
                // Repositories are in named projects always.
                if request.header("x-is-resource-name") != "true"
                    && rest.first() != Some(&"repositories")
                    && let Ok(id) = name.parse::<u64>()
                {
                    let mut projects = self.projects.iter();
                    let Some((found, _)) = projects.find(|(_, project)| project.id == id) else {
                        return missing(&format!("project {id}"));
                    };
                    name.clone_from(found);
                }
                self.in_project(request, who.as_deref(), &name, rest)
            }
            _ => missing("it"),
        }
    }

    fn system_info(&self, who: Option<&str>) -> Response {
        let mut info = json!({
            "auth_mode": "db_auth", "banner_message": "", "oidc_provider_name": "", "primary_auth_mode": false,
            "self_registration": false,
        });
        let host = EXTERNAL.trim_start_matches("http://");
        let more = json!({
            "current_time": stamp(self.next), "external_url": EXTERNAL, "harbor_version": "v2.15.2-test",
            "has_ca_root": false, "notification_enable": true, "project_creation_restriction": "everyone",
            "read_only": self.read_only, "registry_storage_provider_name": "filesystem", "registry_url": host,
        });
        if let (Some(info), Value::Object(more), Some(_)) = (info.as_object_mut(), more, who) {
            info.extend(more);
        }
        Response::json(200, &info)
    }

    fn make_project(&mut self, request: &Request, who: Option<&str>) -> Response {
        let Some(user) = who else {
            return forbidden(None);
        };
        let robot = self.robot(user).map(|robot| robot.system);
        if robot == Some(false) {
            let said = "Only system level robot can create project";
            return errors(403, "FORBIDDEN", said);
        }
        let body = body(request);
        let name = body["project_name"].as_str().unwrap_or_default().to_owned();
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "._-".contains(c);
        if name.is_empty() || !name.chars().all(plain) {
            let said = "project name is not in lower case or contains illegal characters";
            return errors(400, "BAD_REQUEST", said);
        }
        let limit = body["storage_limit"].as_i64();
        if let Some(limit) = limit.filter(|&l| l < -1) {
            let said =
                format!("bad request: invalid non-positive value for quota limit, value={limit}");
            return errors(400, "BAD_REQUEST", &said);
        }
        if self.projects.contains_key(&name) {
            let said = format!("The project named {name} already exists");
            return errors(409, "CONFLICT", &said);
        }
        let by_admin = user == ADMIN.0;
        // Only an administrator's limit counts; a user's is ignored without a word.
        let id = self.project(&name, false, limit.filter(|_| by_admin));
        let owner = self.users.get(user).map(|own| (own.id, user.to_owned()));
        if let Some(project) = self.projects.get_mut(&name) {
            let metadata = body["metadata"].as_object().into_iter().flatten();
            let metadata = metadata.filter_map(|(k, v)| Some((k.clone(), v.as_str()?.to_owned())));
            project.metadata = metadata.collect::<BTreeMap<_, _>>();
            project.owner = owner.unwrap_or((1, ADMIN.0.to_owned()));
        }
        Response::new(201).with("Location", format!("/api/v2.0/projects/{id}"))
    }

    /// Only administrators see quotas here, whatever rights a robot has.
    fn quotas(&mut self, request: &Request, who: Option<&str>, rest: &[&str]) -> Response {
        let Some(user) = who else {
            return forbidden(None);
        };
        if user != ADMIN.0 {
            return errors(403, "FORBIDDEN", user);
        }
        if rest.is_empty() {
            let wanted = request.one("reference_id").and_then(|id| id.parse().ok());
            let all = self.projects.iter();
            let all = all.filter(|(_, project)| wanted.is_none_or(|id: u64| project.id == id));
            let all = all.map(|(name, project)| project.quota_document(name));
            return page(request, all.collect(), &[]);
        }
        let id = rest[0].parse::<u64>().unwrap_or_default();
        let found = self.projects.iter_mut().find(|(_, p)| p.quota == id);
        let Some((name, project)) = found else {
            return missing(&format!("quota {}", rest[0]));
        };
        if request.method != "PUT" {
            return Response::json(200, &project.quota_document(name));
        }
        match body(request)["hard"]["storage"].as_i64() {
            Some(limit) if limit == 0 || limit < -1 => {
                let said = format!("invalid non-positive value for quota limit, value={limit}");
                errors(400, "BAD_REQUEST", &said)
            }
            limit => {
                project.limit = limit.and_then(|limit| u64::try_from(limit).ok());
                Response::new(200)
            }
        }
    }

    fn labels(&mut self, request: &Request, who: Option<&str>, rest: &[&str]) -> Response {
        let Some(user) = who else {
            return forbidden(None);
        };
        let body = body(request);
        let given = |name: &str| request.one(name).or(body[name].as_str().map(str::to_owned));
        let id = rest.first().and_then(|id| id.parse::<u64>().ok());
        let old = id.and_then(|id| self.labels.get(&id)).cloned();
        let scope = old
            .as_ref()
            .and_then(|l| l["scope"].as_str().map(str::to_owned));
        let scope = scope.or_else(|| given("scope")).unwrap_or_default();
        let asked = request.one("project_id").and_then(|id| id.parse().ok());
        let project = asked.or(body["project_id"].as_u64());
        let project = project.or(old.as_ref().and_then(|l| l["project_id"].as_u64()));
        let reads = request.method == "GET";
        if scope == "p" {
            let named = self.projects.iter().find(|(_, p)| Some(p.id) == project);
            let named = named.map(|(name, _)| name.clone()).unwrap_or_default();
            let action = if reads { "list" } else { "create" };
            if !self.may(who, &named, "label", action) {
                return forbidden(who);
            }
        } else if !reads && user != ADMIN.0 {
            return errors(403, "FORBIDDEN", user);
        }
        match (request.method.as_str(), id) {
            ("GET", None) => {
                let all = self.labels.values();
                let all = all.filter(|l| l["scope"] == *scope);
                let all = all.filter(|l| scope == "g" || l["project_id"].as_u64() == project);
                page(request, all.cloned().collect(), &["name"])
            }
            ("GET", Some(_)) => old.map_or_else(|| missing("label"), |l| Response::json(200, &l)),
            ("POST", _) => self.make_label(&body, &scope, project),
            (_, id) => {
                self.labels.remove(&id.unwrap_or_default());
                for project in self.projects.values_mut() {
                    let all = project.repositories.values_mut();
                    for artifact in all.flat_map(|r| &mut r.artifacts) {
                        artifact.labels.retain(|label| Some(*label) != id);
                    }
                }
                Response::new(200)
            }
        }
    }

    fn make_label(&mut self, body: &Value, scope: &str, project: Option<u64>) -> Response {
        if body["name"].as_str().is_none_or(str::is_empty) {
            return errors(400, "BAD_REQUEST", "label name is empty");
        }
        let taken = self.labels.values().any(|label| {
            label["name"] == body["name"]
                && label["scope"] == *scope
                && (scope == "g" || label["project_id"].as_u64() == project)
        });
        if taken {
            let name = body["name"].as_str().unwrap_or_default();
            return errors(409, "CONFLICT", &format!("label {name} already exists"));
        }
        let id = self.id();
        let mut label = json!({
            "creation_time": stamp(id), "id": id, "name": body["name"], "scope": scope, "update_time": stamp(id),
        });
        for field in ["color", "description"] {
            if !body[field].is_null() {
                label[field] = body[field].clone();
            }
        }
        if scope == "p" {
            label["project_id"] = json!(project);
        }
        self.labels.insert(id, label);
        Response::new(201).with("Location", format!("/api/v2.0/labels/{id}"))
    }

    fn in_project(
        &mut self,
        request: &Request,
        who: Option<&str>,
        name: &str,
        rest: &[&str],
    ) -> Response {
        let method = request.method.as_str();
        // A deeper path than that of an artifact's parts: a slash in a name that was not escaped.
        if let ["repositories", _, third, ..] = rest
            && *third != "artifacts"
        {
            return missing(&format!("path {} was", request.path)).body(format!(
                "{}\n",
                json!({"errors": [{"code": "NOT_FOUND", "message": format!("path {} was not found", request.path)}]})
            ));
        }
        let (resource, action) = right(method, rest);
        if !self.may(who, name, resource, action) {
            return forbidden(who);
        }
        if !self.projects.contains_key(name) {
            // For a missing project, the list of artifacts is empty, while that of repositories is an error.
            return if method == "GET" && matches!(rest, ["repositories", _, "artifacts"]) {
                page(request, Vec::new(), &[])
            } else {
                missing(&format!("project {name}"))
            };
        }
        match (method, rest) {
            ("GET", []) => Response::json(200, &self.projects[name].document(name, who)),
            ("PUT", []) => Response::new(200),
            ("GET", ["summary"]) => {
                let project = &self.projects[name];
                let quota = self.may(who, name, "quota", "read");
                let people = who.is_some_and(|who| !who.starts_with("robot$"));
                Response::json(200, &project.summary(quota, people))
            }
            ("DELETE", []) if self.projects[name].repository_count() > 0 => {
                let said =
                    "precondition failed: the project contains repositories, can not be deleted";
                errors(412, "PRECONDITION", said)
            }
            ("DELETE", []) => {
                self.projects.remove(name);
                Response::new(200)
            }
            (_, ["immutabletagrules", rest @ ..]) => self.rules(request, name, rest),
            ("GET", ["repositories"]) => {
                let all = self.projects[name].repositories(name);
                page(request, all, &REPOSITORY_KEYS)
            }
            (_, ["repositories", repository, rest @ ..]) => {
                // The path is unescaped once already; the description requires a second time.
                let repository = unescape(repository);
                self.in_repository(request, name, &repository, rest)
            }
            _ => missing("it"),
        }
    }

    fn rules(&mut self, request: &Request, name: &str, rest: &[&str]) -> Response {
        let (id, body) = (self.id(), body(request));
        let Some(project) = self.projects.get_mut(name) else {
            return missing("project");
        };
        match request.method.as_str() {
            "GET" => {
                let all = project.immutable.iter().map(|(id, rule)| {
                    json!({
                        "id": id, "scope_selectors": rule["scope_selectors"], "tag_selectors": rule["tag_selectors"],
                    })
                });
                page(request, all.collect(), &[])
            }
            "POST" => {
                project.immutable.push((id, body));
                let location = format!("/api/v2.0/projects/{name}/immutabletagrules/{id}");
                Response::new(201).with("Location", location)
            }
            _ => {
                let id = rest.first().and_then(|id| id.parse::<u64>().ok());
                project.immutable.retain(|(rule, _)| Some(*rule) != id);
                Response::new(200)
            }
        }
    }
}
