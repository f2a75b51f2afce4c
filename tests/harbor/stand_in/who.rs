//! Users, robots and their rights.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

use super::{ADMIN, State, errors, missing, stamp};
use crate::http::{Request, Response};

pub struct Robot {
    pub id: u64,
    pub secret: String,
    pub disabled: bool,
    pub expired: bool,
    pub system: bool,
    /// The permissions as they were given.
    permissions: Value,
    /// Project (or `*`), resource, action.
    access: BTreeSet<(String, String, String)>,
    made: u64,
}

pub struct Token {
    pub user: Option<String>,
    /// Granted actions by repository.
    grants: BTreeMap<String, BTreeSet<String>>,
}

impl State {
    /// Returns the authenticated user. `None` stands for anonymous, also if the password is wrong.
    pub fn user(&self, request: &Request) -> Option<String> {
        let (user, password) = request.basic()?;
        if self.locked_out.as_ref() == Some(&user) {
            return None;
        }
        let own = self.users.get(&user);
        let right = (user == ADMIN.0 && password == ADMIN.1)
            || own.is_some_and(|own| own.password == password)
            || self
                .robots
                .get(&user)
                .is_some_and(|robot| robot.secret == password && !robot.disabled && !robot.expired);
        right.then_some(user)
    }

    pub fn may(&self, user: Option<&str>, project: &str, resource: &str, action: &str) -> bool {
        if user == Some(ADMIN.0) {
            return true;
        }
        let found = self.projects.get(project);
        let reads = matches!(action, "pull" | "list" | "read");
        let public = reads && found.is_some_and(super::Project::is_public);
        let Some(user) = user else { return public };
        if let Some(robot) = self.robots.get(user) {
            let has = |space: &str| {
                let right = (space.to_owned(), resource.to_owned(), action.to_owned());
                robot.access.contains(&right)
            };
            return found.is_some() && (has(project) || (robot.system && has("*")) || public);
        }
        public || found.is_some_and(|found| found.owner.1 == user)
    }

    /// Issues a token to every client. Missing rights show only when it is used.
    pub fn token(&mut self, request: &Request) -> Response {
        let user = self.user(request);
        let mut grants = BTreeMap::<String, BTreeSet<String>>::new();
        for scope in request.all("scope") {
            let mut parts = scope.splitn(3, ':');
            if let (Some("repository"), Some(name), Some(actions)) =
                (parts.next(), parts.next(), parts.next())
            {
                let project = name.split('/').next().unwrap_or_default();
                let granted = actions
                    .split(',')
                    .filter(|action| self.may(user.as_deref(), project, "repository", action));
                let granted = granted.map(str::to_owned).collect::<Vec<_>>();
                grants.entry(name.to_owned()).or_default().extend(granted);
            }
        }
        let value = format!("t{}", self.id());
        self.tokens.insert(value.clone(), Token { user, grants });
        let body = json!({
            "token": value, "access_token": "", "expires_in": 1800, "issued_at": "2026-11-23T22:26:20Z",
        });
        Response::new(200)
            .with("Content-Type", "application/json; charset=utf-8")
            .body(body.to_string())
    }

    /// Returns whether the request's token or password permits `action` on `repository`. A token stays valid when its
    /// robot is disabled or deleted.
    pub fn granted(&self, request: &Request, repository: &str, action: &str) -> bool {
        let project = repository.split('/').next().unwrap_or_default();
        if let Some(token) = request.bearer() {
            let token = self.tokens.get(token);
            return token.is_some_and(|token| {
                let actions = token.grants.get(repository);
                actions.is_some_and(|actions| actions.contains(action))
            });
        }
        self.may(self.user(request).as_deref(), project, "repository", action)
    }

    pub fn current_user(&self, user: Option<&str>) -> Response {
        let Some(user) = user else {
            return errors(401, "UNAUTHORIZED", "unauthorized");
        };
        if self.robots.contains_key(user) {
            let said = "get current user not available for security context: robot";
            return errors(412, "PRECONDITION", said);
        }
        let id = self.users.get(user).map_or(1, |user| user.id);
        let document = json!({
            "admin_role_in_auth": false, "creation_time": stamp(id), "email": format!("{user}@example.org"),
            "realname": user, "sysadmin_flag": user == ADMIN.0, "update_time": stamp(id), "user_id": id,
            "username": user,
        });
        Response::json(200, &document)
    }

    pub fn robots(&mut self, request: &Request, who: Option<&str>, rest: &[&str]) -> Response {
        if who != Some(ADMIN.0) {
            return errors(403, "FORBIDDEN", "forbidden");
        }
        let id = rest.first().and_then(|id| id.parse::<u64>().ok());
        let found = self.robots.iter().find(|(_, robot)| Some(robot.id) == id);
        let name = found.map(|(name, _)| name.clone());
        match (request.method.as_str(), name) {
            ("POST", _) if rest.is_empty() => self.make_robot(request),
            ("GET", _) if rest.is_empty() => {
                let all = self.robots.iter().map(|(name, robot)| robot.document(name));
                super::pages::page(request, all.collect(), &[])
            }
            ("GET", Some(name)) => Response::json(200, &self.robots[&name].document(&name)),
            ("PUT", Some(name)) => {
                let body: Value = serde_json::from_slice(&request.body).unwrap_or_default();
                if let Some(robot) = self.robots.get_mut(&name) {
                    robot.disabled = body["disable"] == true;
                }
                Response::new(200)
            }
            ("DELETE", Some(name)) => {
                self.robots.remove(&name);
                Response::new(200)
            }
            _ => missing("robot"),
        }
    }

    pub fn robot(&mut self, name: &str) -> Option<&mut Robot> {
        self.robots.get_mut(name)
    }

    fn make_robot(&mut self, request: &Request) -> Response {
        let body: Value = serde_json::from_slice(&request.body).unwrap_or_default();
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let system = body["level"] == "system";
        let permissions = body["permissions"].clone();
        let mut access = BTreeSet::new();
        for part in permissions.as_array().into_iter().flatten() {
            for right in part["access"].as_array().into_iter().flatten() {
                let space = text(&part["namespace"]);
                access.insert((space, text(&right["resource"]), text(&right["action"])));
            }
        }
        let short = text(&body["name"]);
        let project = text(&permissions[0]["namespace"]);
        let name = if system {
            format!("robot${short}")
        } else {
            format!("robot${project}+{short}")
        };
        let (id, made) = (self.id(), self.id());
        let robot = Robot {
            id,
            secret: format!("Secret{id}"),
            disabled: false,
            expired: false,
            system,
            permissions,
            access,
            made,
        };
        let answer = json!({
            "creation_time": stamp(made), "expires_at": -1, "id": id, "name": name, "secret": robot.secret,
        });
        self.robots.insert(name, robot);
        Response::json(201, &answer).with("Location", format!("/api/v2.0/robots/{id}"))
    }
}

impl Robot {
    fn document(&self, name: &str) -> Value {
        json!({
            "creation_time": stamp(self.made), "creator_ref": 1, "creator_type": "local", "disable": self.disabled,
            "duration": -1, "editable": true, "expires_at": if self.expired { 1 } else { -1 }, "id": self.id,
            "level": if self.system { "system" } else { "project" }, "name": name,
            "permissions": self.permissions, "update_time": stamp(self.made),
        })
    }
}
