//! A stand-in for the API server of a Kubernetes cluster: tokens and who may do what. A test holds its answers against
//! those of a real one (`fixtures/kubernetes`).

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use axum::Json;
use axum::Router;
use axum::extract::{Path as UrlPath, Request, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse as _, Response};
use axum::routing::{any, delete, get, patch, post};
use serde_json::{Value, json};

/// A token's user, and what the token is for.
#[derive(Clone, Debug, Default)]
pub struct Token {
    pub user: Value,
    pub audiences: Vec<String>,
}

/// Resource with its group and subresource, such as `upperdeck.io/saves/own`, on which a user may `create` in a namespace.
pub type Rule = (String, String, String);

/// What the stand-in knows, and what it was asked.
#[derive(Debug, Default)]
pub struct Cluster {
    pub tokens: BTreeMap<String, Token>,
    pub rules: Vec<Rule>,
    /// Whether it knows audiences; a server that does not leaves them out.
    pub without_audiences: bool,
    /// Whether it denies all questions.
    pub denies: bool,
    /// Names of the users whose tokens the API server itself accepts.
    pub users: BTreeMap<String, String>,
    /// Where its proxy leads.
    pub manager: Option<SocketAddr>,
    /// Audiences of the tokens that were requested.
    pub requested: Vec<Vec<String>>,
    pub proxied: usize,
    pub saves: Resources,
    pub token_reviews: usize,
    pub access_reviews: usize,
}

/// The running stand-in. It ends when it is dropped.
pub struct ApiServer {
    pub address: SocketAddr,
    cluster: Arc<Mutex<Cluster>>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl ApiServer {
    pub async fn start(cluster: Cluster) -> std::io::Result<Self> {
        let cluster = Arc::new(Mutex::new(cluster));
        let router = Router::new()
            .route(
                "/apis/authentication.k8s.io/v1/tokenreviews",
                post(token_review),
            )
            .route(
                "/apis/authorization.k8s.io/v1/subjectaccessreviews",
                post(access_review),
            )
            .route(
                "/apis/authentication.k8s.io/v1/selfsubjectreviews",
                post(self_subject),
            )
            .route(
                "/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token",
                post(token_request),
            )
            .route(
                "/api/v1/namespaces/{namespace}/services/{service}/proxy/{*path}",
                any(proxy),
            )
            .route("/api/v1/namespaces", get(names))
            .route("/api/v1/namespaces/{namespace}/pods", get(names))
            .route("/apis/upperdeck.io/v1alpha1/saves", get(list_saves))
            .route(
                "/apis/upperdeck.io/v1alpha1/namespaces/{namespace}/saves/{name}",
                delete(delete_save),
            )
            .route(
                "/apis/upperdeck.io/v1alpha1/namespaces/{namespace}/saves/{name}/status",
                patch(patch_status),
            )
            .route(
                "/apis/coordination.k8s.io/v1/namespaces/default/leases",
                any(lease),
            )
            .route(
                "/apis/coordination.k8s.io/v1/namespaces/default/leases/upperdeck-saves",
                any(lease),
            )
            .with_state(cluster.clone());
        let listener = tokio::net::TcpListener::bind(("127.0.0.1", 0)).await?;
        let address = listener.local_addr()?;
        let task = tokio::spawn(async move {
            // Ends only with its task.
            let _ = axum::serve(listener, router).await;
        });
        Ok(Self {
            address,
            cluster,
            task,
        })
    }

    /// Looks at, or changes, what the stand-in knows.
    pub fn with<T>(&self, look: impl FnOnce(&mut Cluster) -> T) -> T {
        look(&mut self.cluster.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Writes a kubeconfig of the user with this token into a directory, and returns its path.
    pub fn kubeconfig(&self, dir: &Path, token: &str) -> std::io::Result<PathBuf> {
        let config = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "c", "cluster": {"server": format!("http://{}", self.address)}}],
            "users": [{"name": "u", "user": {"token": token}}],
            "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
            "current-context": "x",
        });
        let file = dir.join(token);
        std::fs::write(&file, config.to_string())?;
        Ok(file)
    }
}

type Answer = (StatusCode, Json<Value>);
type Shared = State<Arc<Mutex<Cluster>>>;

fn denied() -> Answer {
    let status = json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "reason": "Forbidden", "code": 403,
        "message": "it is forbidden: User \"x\" cannot create resource",
    });
    (StatusCode::FORBIDDEN, Json(status))
}

fn texts(value: &Value) -> Vec<&str> {
    value
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect()
}

async fn token_review(State(cluster): Shared, Json(mut review): Json<Value>) -> Answer {
    let mut cluster = cluster.lock().unwrap_or_else(PoisonError::into_inner);
    cluster.token_reviews += 1;
    if cluster.denies {
        return denied();
    }
    let asked = texts(&review["spec"]["audiences"]);
    let token = review["spec"]["token"].as_str().unwrap_or_default();
    let status = match cluster.tokens.get(token) {
        None => json!({"user": {}, "error": "invalid bearer token"}),
        Some(token) => {
            let meant: Vec<_> = token
                .audiences
                .iter()
                .filter(|audience| asked.contains(&audience.as_str()))
                .collect();
            if cluster.without_audiences {
                json!({"authenticated": true, "user": token.user})
            } else if meant.is_empty() {
                let error = format!(
                    "[invalid bearer token, token audiences {:?} is invalid for the target audiences {asked:?}]",
                    token.audiences
                );
                json!({"user": {}, "error": error})
            } else {
                json!({"authenticated": true, "user": token.user, "audiences": meant})
            }
        }
    };
    review["status"] = status;
    (StatusCode::CREATED, Json(review))
}

async fn access_review(State(cluster): Shared, Json(mut review): Json<Value>) -> Answer {
    let mut cluster = cluster.lock().unwrap_or_else(PoisonError::into_inner);
    cluster.access_reviews += 1;
    if cluster.denies {
        return denied();
    }
    let (spec, attributes) = (&review["spec"], &review["spec"]["resourceAttributes"]);
    let text = |name: &str| attributes[name].as_str().unwrap_or_default();
    let resource = ["group", "resource", "subresource"].map(text).join("/");
    let resource = resource.trim_matches('/').to_owned();
    let user = spec["user"].as_str().unwrap_or_default();
    let allowed = text("verb") == "create"
        && cluster.rules.iter().any(|(who, what, namespace)| {
            who == user && *what == resource && (namespace == text("namespace") || namespace == "*")
        });
    review["status"] = json!({ "allowed": allowed });
    (StatusCode::CREATED, Json(review))
}

/// Rejects callers that the API server does not know, and removes what it keeps to itself.
fn own_user(headers: &HeaderMap) -> Option<String> {
    let token = headers.get("authorization")?.to_str().ok()?;
    Some(token.strip_prefix("Bearer ")?.to_owned())
}

fn failure(code: u16, message: &str) -> Response {
    let reason = match code {
        401 => "Unauthorized",
        404 => "NotFound",
        409 => "Conflict",
        503 => "ServiceUnavailable",
        _ => "InternalError",
    };
    let status = json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "code": code, "message": message, "reason": reason,
    });
    let code = StatusCode::from_u16(code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    (code, Json(status)).into_response()
}

async fn self_subject(State(cluster): Shared, headers: HeaderMap) -> Response {
    let cluster = cluster.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(user) = own_user(&headers).and_then(|token| cluster.users.get(&token).cloned()) else {
        return failure(401, "Unauthorized");
    };
    let review = json!({
        "kind": "SelfSubjectReview", "apiVersion": "authentication.k8s.io/v1", "metadata": {},
        "status": {"userInfo": {"username": user}},
    });
    (StatusCode::CREATED, Json(review)).into_response()
}

async fn token_request(
    State(cluster): Shared,
    UrlPath((namespace, account)): UrlPath<(String, String)>,
    Json(mut request): Json<Value>,
) -> Response {
    let mut cluster = cluster.lock().unwrap_or_else(PoisonError::into_inner);
    let name = format!("TOKEN-{account}");
    let user = format!("system:serviceaccount:{namespace}:{account}");
    if !cluster
        .tokens
        .get(&name)
        .is_some_and(|token| token.user["username"] == user.as_str())
    {
        return failure(404, "serviceaccounts not found");
    }
    let audiences = texts(&request["spec"]["audiences"])
        .into_iter()
        .map(str::to_owned)
        .collect();
    cluster.requested.push(audiences);
    request["status"] = json!({"token": name, "expirationTimestamp": "2036-11-30T14:00:00Z"});
    (StatusCode::CREATED, Json(request)).into_response()
}

/// The proxy to the manager: the credentials for the API server stay here.
async fn proxy(State(cluster): Shared, request: Request) -> Response {
    let to = {
        let mut cluster = cluster.lock().unwrap_or_else(PoisonError::into_inner);
        if own_user(request.headers()).is_none_or(|token| !cluster.users.contains_key(&token)) {
            return failure(401, "Unauthorized");
        }
        cluster.proxied += 1;
        match cluster.manager {
            Some(to) => to,
            None => return failure(503, "no endpoints available for service \"http:upperdeck\""),
        }
    };
    let (parts, body) = request.into_parts();
    let target = parts.uri.to_string();
    let Some((_, target)) = target.split_once("/proxy/") else {
        return failure(404, "not found");
    };
    let Ok(body) = axum::body::to_bytes(body, 1 << 20).await else {
        return failure(400, "the body cannot be read");
    };
    let client = upperdeck::store::registry::http_client("127.0.0.1").build();
    let Ok(client) = client else {
        return failure(500, "no client");
    };
    let mut forwarded = client
        .request(parts.method, format!("http://{to}/{target}"))
        .body(body);
    for (name, value) in &parts.headers {
        if !matches!(name.as_str(), "authorization" | "host" | "content-length") {
            forwarded = forwarded.header(name, value);
        }
    }
    match forwarded.send().await {
        Ok(answer) => {
            let mut response = Response::builder().status(answer.status());
            if let Some(kind) = answer.headers().get("content-type") {
                response = response.header("content-type", kind);
            }
            let body = axum::body::Body::from_stream(answer.bytes_stream());
            response
                .body(body)
                .unwrap_or_else(|_| failure(500, "no response"))
        }
        Err(_) => failure(503, "error trying to reach service"),
    }
}

/// Lists of names, as they were recorded: pods that run, and namespaces.
async fn names(uri: axum::http::Uri, headers: HeaderMap) -> Response {
    let wanted = headers.get("accept").and_then(|kind| kind.to_str().ok());
    if !wanted.is_some_and(|kind| kind.contains("as=PartialObjectMetadataList")) {
        return failure(406, "only metadata were recorded");
    }
    let recorded = include_str!("../../fixtures/kubernetes/names.jsonl").lines();
    let found = recorded
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .find(|exchange| exchange["path"] == uri.to_string());
    match found {
        Some(exchange) => Json(exchange["response"].clone()).into_response(),
        None => failure(404, "not recorded"),
    }
}

/// `Save` resources by namespace and name, and those who watch them.
#[derive(Debug, Default)]
pub struct Resources {
    objects: BTreeMap<(String, String), Value>,
    version: u64,
    /// What happened, each with its version: a watch begins where its list was taken.
    events: Vec<(u64, String)>,
    watchers: Vec<tokio::sync::mpsc::UnboundedSender<String>>,
    lease: Option<Value>,
}

impl Resources {
    fn tell(&mut self, kind: &str, object: &Value) {
        let line = format!("{}\n", json!({"type": kind, "object": object}));
        self.watchers
            .retain(|watcher| watcher.send(line.clone()).is_ok());
        self.events.push((self.version, line));
    }

    /// Sends the events after a version, and all that follow.
    fn watch(&mut self, since: u64) -> tokio::sync::mpsc::UnboundedReceiver<String> {
        let (watcher, lines) = tokio::sync::mpsc::unbounded_channel();
        let missed = self.events.iter().filter(|(version, _)| *version > since);
        for (_, line) in missed {
            let _ = watcher.send(line.clone());
        }
        self.watchers.push(watcher);
        lines
    }

    fn next_version(&mut self) -> String {
        self.version += 1;
        self.version.to_string()
    }

    /// Creates a resource, as a user does.
    pub fn create(&mut self, namespace: &str, name: &str, spec: &Value, status: Option<Value>) {
        let mut object = json!({
            "apiVersion": "upperdeck.io/v1alpha1", "kind": "Save", "spec": spec,
            "metadata": {
                "name": name, "namespace": namespace, "uid": format!("uid-of-{name}"),
                "creationTimestamp": "2026-11-30T12:00:00Z", "resourceVersion": self.next_version(),
            },
        });
        if let Some(status) = status {
            object["status"] = status;
        }
        self.tell("ADDED", &object);
        self.objects
            .insert((namespace.to_owned(), name.to_owned()), object);
    }

    /// Changes a resource.
    pub fn change(&mut self, namespace: &str, name: &str, change: impl FnOnce(&mut Value)) {
        let version = self.next_version();
        let key = (namespace.to_owned(), name.to_owned());
        if let Some(mut object) = self.objects.remove(&key) {
            change(&mut object);
            object["metadata"]["resourceVersion"] = json!(version);
            self.tell("MODIFIED", &object);
            self.objects.insert(key, object);
        }
    }

    pub fn status(&self, namespace: &str, name: &str) -> Value {
        let object = self.objects.get(&(namespace.to_owned(), name.to_owned()));
        object.map_or(Value::Null, |object| object["status"].clone())
    }

    pub fn has(&self, namespace: &str, name: &str) -> bool {
        self.objects
            .contains_key(&(namespace.to_owned(), name.to_owned()))
    }

    /// Deletes a resource, as a user does.
    pub fn delete(&mut self, namespace: &str, name: &str) {
        if let Some(object) = self
            .objects
            .remove(&(namespace.to_owned(), name.to_owned()))
        {
            self.next_version();
            self.tell("DELETED", &object);
        }
    }

    /// The manager that holds the lease.
    pub fn holder(&self) -> Option<String> {
        let lease = self.lease.as_ref()?;
        lease["spec"]["holderIdentity"].as_str().map(str::to_owned)
    }
}

async fn list_saves(State(cluster): Shared, uri: axum::http::Uri) -> Response {
    let mut cluster = cluster.lock().unwrap_or_else(PoisonError::into_inner);
    let saves = &mut cluster.saves;
    let query = uri.query().unwrap_or_default();
    let parameter = |name: &str| {
        let mut pairs = query.split('&').filter_map(|pair| pair.split_once('='));
        pairs.find(|pair| pair.0 == name).map(|pair| pair.1)
    };
    if parameter("watch") == Some("true") {
        let since = parameter("resourceVersion").and_then(|version| version.parse().ok());
        let lines = saves.watch(since.unwrap_or(saves.version));
        let lines = futures_util::stream::unfold(lines, |mut lines| async move {
            let line = lines.recv().await?;
            Some((Ok::<_, std::convert::Infallible>(line), lines))
        });
        let body = axum::body::Body::from_stream(lines);
        return ([("content-type", "application/json")], body).into_response();
    }
    let list = json!({
        "apiVersion": "upperdeck.io/v1alpha1", "kind": "SaveList",
        "metadata": {"resourceVersion": saves.version.to_string()},
        "items": saves.objects.values().collect::<Vec<_>>(),
    });
    Json(list).into_response()
}

async fn patch_status(
    State(cluster): Shared,
    UrlPath((namespace, name)): UrlPath<(String, String)>,
    Json(patch): Json<Value>,
) -> Response {
    let mut cluster = cluster.lock().unwrap_or_else(PoisonError::into_inner);
    let saves = &mut cluster.saves;
    let version = saves.next_version();
    let Some(object) = saves.objects.get_mut(&(namespace, name)) else {
        return failure(404, "saves not found");
    };
    merge(&mut object["status"], &patch["status"]);
    object["metadata"]["resourceVersion"] = json!(version);
    let object = object.clone();
    saves.tell("MODIFIED", &object);
    Json(object).into_response()
}

/// A merge patch (RFC 7386).
fn merge(target: &mut Value, patch: &Value) {
    let Some(patch) = patch.as_object() else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = json!({});
    }
    for (key, value) in patch {
        if value.is_null() {
            target.as_object_mut().and_then(|target| target.remove(key));
        } else {
            merge(&mut target[key], value);
        }
    }
}

async fn delete_save(
    State(cluster): Shared,
    UrlPath((namespace, name)): UrlPath<(String, String)>,
) -> Response {
    let mut cluster = cluster.lock().unwrap_or_else(PoisonError::into_inner);
    if !cluster.saves.has(&namespace, &name) {
        return failure(404, "saves not found");
    }
    cluster.saves.delete(&namespace, &name);
    Json(json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success"}))
        .into_response()
}

async fn lease(
    State(cluster): Shared,
    method: axum::http::Method,
    body: axum::body::Bytes,
) -> Response {
    let mut cluster = cluster.lock().unwrap_or_else(PoisonError::into_inner);
    let saves = &mut cluster.saves;
    let before = saves
        .lease
        .as_ref()
        .map(|lease| lease["metadata"]["resourceVersion"].clone());
    if method == axum::http::Method::GET {
        return match &saves.lease {
            Some(lease) => Json(lease.clone()).into_response(),
            None => failure(404, "leases not found"),
        };
    }
    let Ok(mut lease) = serde_json::from_slice::<Value>(&body) else {
        return failure(400, "the body cannot be read");
    };
    let given = lease["metadata"].get("resourceVersion").cloned();
    if given != before {
        return failure(409, "the object has been modified");
    }
    lease["metadata"]["resourceVersion"] = json!(saves.next_version());
    saves.lease = Some(lease.clone());
    let code = match given {
        Some(_) => StatusCode::OK,
        None => StatusCode::CREATED,
    };
    (code, Json(lease)).into_response()
}
