//! A stand-in for the API server of a Kubernetes cluster: tokens and who may do what. A test holds its answers against
//! those of a real one (`fixtures/kubernetes`).

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use axum::Json;
use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::post;
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

    /// Writes a kubeconfig for it.
    pub fn write_kubeconfig(&self, file: &Path) -> std::io::Result<()> {
        let config = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "c", "cluster": {"server": format!("http://{}", self.address)}}],
            "users": [{"name": "u", "user": {"token": "TOKEN-manager"}}],
            "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
            "current-context": "x",
        });
        std::fs::write(file, config.to_string())
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
