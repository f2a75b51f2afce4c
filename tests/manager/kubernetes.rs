//! Users and service accounts of a Kubernetes cluster: what its API server says of them decides what they may save. The API
//! server is a stand-in, which is held against recorded exchanges with a real one, or a real one
//! (`UPPERDECK_TEST_CLUSTER`, the directory of a cluster with `admin.conf` and `bin/kubectl`).

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;

use reqwest::Method;
use serde_json::{Value, json};
use upperdeck::service::job::Session;
use upperdeck::service::manager::Options;
use upperdeck::service::manager::auth::{Kubernetes, Permission};

use crate::kubernetes_api::{ApiServer, Cluster, Rule, Token};
use crate::site::{Agent, Manager, Outcomes, Site, Who, ask, http, id, session, until};
use crate::support;

type Fallible<T> = Result<T, Box<dyn std::error::Error>>;

const REVIEWS: &str = include_str!("../../fixtures/kubernetes/reviews.jsonl");

/// The namespace in which the users of the tests have permissions.
pub const LAB: &str = "lab";

fn exchanges() -> Fallible<Vec<Value>> {
    Ok(REVIEWS
        .lines()
        .map(serde_json::from_str)
        .collect::<Result<_, _>>()?)
}

/// The cluster of the recorded exchanges: `alice` may save in `lab`, pods of `lab` may save themselves, `bob` nothing.
pub fn recorded() -> Fallible<Cluster> {
    let mut cluster = Cluster::default();
    for exchange in exchanges()? {
        let name = exchange["request"]["spec"]["token"].as_str();
        let status = &exchange["response"]["status"];
        let Some(name) = name.filter(|_| status["authenticated"] == true) else {
            continue;
        };
        let token = Token {
            user: status["user"].clone(),
            audiences: vec!["upperdeck".to_owned()],
        };
        cluster.tokens.insert(name.to_owned(), token);
    }
    let of_another = Token {
        audiences: vec!["https://kubernetes.default.svc".to_owned()],
        ..cluster.tokens["TOKEN-alice"].clone()
    };
    cluster
        .tokens
        .insert("TOKEN-of-another-audience".to_owned(), of_another);
    cluster.rules = vec![
        rule("alice", "upperdeck.io/saves", LAB),
        rule("default", "upperdeck.io/saves/own", LAB),
    ];
    Ok(cluster)
}

fn rule(account: &str, resource: &str, namespace: &str) -> Rule {
    let user = format!("system:serviceaccount:{LAB}:{account}");
    (user, resource.to_owned(), namespace.to_owned())
}

#[tokio::test]
async fn the_stand_in_answers_as_a_real_api_server_did() -> Outcomes {
    let server = ApiServer::start(recorded()?).await?;
    let (mut tokens, mut accesses) = (0, 0);
    for exchange in exchanges()? {
        let path = exchange["path"].as_str().ok_or("no path")?;
        let url = format!("http://{}{path}", server.address);
        let answer = http()?.post(url).json(&exchange["request"]).send().await?;
        assert_eq!(json!(answer.status().as_u16()), exchange["status"]);
        let body: Value = answer.json().await?;
        let mut expected = exchange["response"].clone();
        // Why it is allowed is for people.
        expected["status"]
            .as_object_mut()
            .ok_or("no status")?
            .remove("reason");
        assert_eq!(
            body["status"], expected["status"],
            "{}",
            exchange["request"]
        );
        assert_eq!(
            [&body["kind"], &body["apiVersion"]],
            [&expected["kind"], &expected["apiVersion"]]
        );
        match body["kind"].as_str() {
            Some("TokenReview") => tokens += 1,
            _ => accesses += 1,
        }
    }
    assert!(tokens >= 5 && accesses >= 15, "{tokens} {accesses}");
    Ok(())
}

/// The tokens of the users.
struct Tokens {
    alice: String,
    bob: String,
    /// That of the pod `pod-1`.
    pod: String,
    other_audience: String,
}

impl Tokens {
    fn recorded() -> Self {
        Self {
            alice: "TOKEN-alice".to_owned(),
            bob: "TOKEN-bob".to_owned(),
            pod: "TOKEN-pod".to_owned(),
            other_audience: "TOKEN-of-another-audience".to_owned(),
        }
    }
}

pub fn options(site: &Site, kubeconfig: PathBuf, permission: Permission) -> Fallible<Options> {
    let mut options = site.options()?;
    options.kubernetes = Some(Kubernetes {
        kubeconfig: Some(kubeconfig),
        audiences: vec!["upperdeck".to_owned()],
        permission,
        ..Kubernetes::default()
    });
    Ok(options)
}

/// The pod of the recorded token, two others of its namespace, one of another namespace, and a container without a pod.
pub fn sessions(namespace: &str) -> Vec<Session> {
    let of_pod = |n, pod: &str, owner, namespace: &str| Session {
        namespace: Some(namespace.to_owned()),
        pod: Some(pod.to_owned()),
        ..session(n, owner)
    };
    let own = format!("system:serviceaccount:{namespace}:default");
    vec![
        of_pod(1, "nb", Some("alice"), namespace),
        of_pod(2, "nb2", None, namespace),
        of_pod(3, "nb3", Some(&own), namespace),
        of_pod(4, "nb", Some("alice"), "other"),
        Session {
            namespace: None,
            pod: None,
            ..session(5, Some("alice"))
        },
    ]
}

pub async fn at_work(
    site: &Site,
    options: Options,
    sessions: &[Session],
) -> Fallible<(Manager, Agent)> {
    let manager = site.manager_with(options).await?;
    let agent = Agent::new(&site.queue, "a");
    agent.heartbeat(sessions).await?;
    Ok((manager, agent))
}

async fn call(
    at: SocketAddr,
    token: &str,
    method: Method,
    path: &str,
    body: Option<Value>,
) -> Fallible<(u16, Value)> {
    let request = http()?
        .request(method, format!("http://{at}{path}"))
        .bearer_auth(token);
    let request = match &body {
        Some(body) => request.json(body),
        None => request,
    };
    let answer = request.send().await?;
    let status = answer.status().as_u16();
    Ok((
        status,
        serde_json::from_str(&answer.text().await?).unwrap_or(Value::Null),
    ))
}

/// The numbers of the sessions that a user sees.
async fn seen(at: SocketAddr, token: &str) -> Fallible<Vec<usize>> {
    let (status, body) = call(at, token, Method::GET, "/api/v1/sessions", None).await?;
    assert_eq!(status, 200, "{body}");
    let mut seen = Vec::new();
    for session in body["sessions"].as_array().ok_or("no list")? {
        let id = session["id"].as_str().unwrap_or_default();
        seen.push(usize::from_str_radix(id, 16)?);
    }
    seen.sort_unstable();
    Ok(seen)
}

async fn save(at: SocketAddr, token: &str, which: Value, tag: &str) -> Fallible<(u16, Value)> {
    let body = json!({"session": which, "image": {"name": "n", "tag": tag}});
    call(at, token, Method::POST, "/api/v1/saves", Some(body)).await
}

/// What the users of the recorded cluster may see and save.
async fn check(at: SocketAddr, tokens: &Tokens, namespace: &str) -> Outcomes {
    assert_eq!(seen(at, &tokens.alice).await?, [1, 2, 3]);
    assert_eq!(seen(at, &tokens.bob).await?, [0; 0]);
    assert_eq!(seen(at, &tokens.pod).await?, [1, 3]);
    for token in [&tokens.other_audience, "TOKEN-unknown", "a.b.c"] {
        let (status, body) = call(at, token, Method::GET, "/api/v1/sessions", None).await?;
        assert_eq!((status, &body["code"]), (401, &json!("unauthenticated")));
    }
    let pod = |namespace: &str, pod: &str| json!({"namespace": namespace, "pod": pod});
    for (token, which, expected) in [
        (&tokens.alice, pod("other", "nb"), 404),
        (&tokens.alice, json!(id(4)), 404),
        (&tokens.alice, json!(id(5)), 404),
        (&tokens.bob, pod(namespace, "nb"), 404),
        (&tokens.bob, json!(&id(1)[..32]), 404),
        (&tokens.pod, pod(namespace, "nb2"), 404),
        (&tokens.pod, pod("other", "nb"), 404),
    ] {
        let (status, body) = save(at, token, which.clone(), "t").await?;
        assert_eq!(status, expected, "{which} {body}");
    }
    // The image is its owner's, and whoever asked for it can follow and cancel it.
    let (status, asked) = save(at, &tokens.alice, pod(namespace, "nb"), "v1").await?;
    assert_eq!((status, &asked["user"]), (202, &json!("alice")), "{asked}");
    let path = format!("/api/v1/saves/{}", asked["id"].as_str().ok_or("no id")?);
    for (token, expected) in [(&tokens.alice, 200), (&tokens.bob, 404), (&tokens.pod, 404)] {
        assert_eq!(call(at, token, Method::GET, &path, None).await?.0, expected);
    }
    assert_eq!(ask(at, Who::Alice, Method::GET, &path, None).await?.0, 200);
    assert_eq!(
        call(at, &tokens.bob, Method::DELETE, &path, None).await?.0,
        404
    );
    assert_eq!(
        call(at, &tokens.alice, Method::DELETE, &path, None)
            .await?
            .0,
        200
    );
    let (status, asked) = save(at, &tokens.pod, pod(namespace, "nb"), "v2").await?;
    assert_eq!((status, &asked["user"]), (202, &json!("alice")), "{asked}");
    // A session without an owner is saved for the caller.
    let (status, asked) = save(at, &tokens.alice, pod(namespace, "nb2"), "v1").await?;
    let user = format!("system:serviceaccount:{namespace}:alice");
    assert_eq!((status, &asked["user"]), (202, &json!(user)), "{asked}");
    let replacing =
        json!({"session": pod(namespace, "nb3"), "image": {"tag": "x"}, "replace": "any"});
    let (status, body) = call(
        at,
        &tokens.alice,
        Method::POST,
        "/api/v1/saves",
        Some(replacing),
    )
    .await?;
    assert_eq!((status, &body["code"]), (403, &json!("not_permitted")));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn permissions_of_the_cluster_decide_what_its_users_save() -> Outcomes {
    let server = ApiServer::start(recorded()?).await?;
    let site = Site::new()?;
    let kubeconfig = server.kubeconfig(site.dir.path(), "TOKEN-manager")?;
    let (manager, _agent) = at_work(
        &site,
        options(&site, kubeconfig, Permission::Saves)?,
        &sessions(LAB),
    )
    .await?;
    check(manager.address, &Tokens::recorded(), LAB).await?;
    manager.stop().await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_timeline_has_what_a_user_of_the_cluster_asked_for_or_owns() -> Outcomes {
    let server = ApiServer::start(recorded()?).await?;
    let site = Site::new()?;
    let kubeconfig = server.kubeconfig(site.dir.path(), "TOKEN-manager")?;
    let options = options(&site, kubeconfig, Permission::Saves)?;
    let (manager, agent) = at_work(&site, options, &sessions(LAB)).await?;
    let at = manager.address;
    // `alice` of the cluster is another user than the owner of the session.
    for (token, tag) in [("TOKEN-alice", "asked"), ("TOKEN-pod", "by-itself")] {
        let (status, body) = save(at, token, json!(id(1)), tag).await?;
        assert_eq!(status, 202, "{body}");
        let claim = agent.claim().await?;
        agent.work(&claim).await?;
        let path = format!("/api/v1/saves/{}", claim.order.job);
        until(at, Who::Alice, &path, |save| save["state"] == "succeeded").await?;
    }
    let path = format!("/api/v1/sessions/{}/timeline", id(1));
    let tags = async |token: &str| -> Fallible<(u16, Vec<String>)> {
        let (status, body) = call(at, token, Method::GET, &path, None).await?;
        let entries = body["entries"].as_array().cloned().unwrap_or_default();
        let tag = |entry: &Value| entry["tag"].as_str().unwrap_or_default().to_owned();
        Ok((status, entries.iter().map(tag).collect()))
    };
    let one = |tag: &str| (200, vec![tag.to_owned()]);
    let check = async || -> Outcomes {
        assert_eq!(tags("TOKEN-alice").await?, one("asked"));
        assert_eq!(tags("TOKEN-pod").await?, one("by-itself"));
        assert_eq!(tags("TOKEN-bob").await?, (404, Vec::new()));
        let (_, owned) = ask(at, Who::Alice, Method::GET, &path, None).await?;
        assert_eq!(owned["entries"].as_array().map(Vec::len), Some(2));
        Ok(())
    };
    check().await?;
    // The same after the session is removed.
    agent.heartbeat(&sessions(LAB)[1..]).await?;
    until(at, Who::Administrator, "/api/v1/sessions", |shown| {
        !shown["sessions"].to_string().contains(&id(1))
    })
    .await?;
    check().await?;
    manager.stop().await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_right_to_exec_can_be_the_right_to_save() -> Outcomes {
    let server = ApiServer::start(recorded()?).await?;
    server.with(|cluster| cluster.rules.push(rule("bob", "pods/exec", "other")));
    server.with(|cluster| cluster.rules.push(rule("default", "pods/exec", "*")));
    let site = Site::new()?;
    let kubeconfig = server.kubeconfig(site.dir.path(), "TOKEN-manager")?;
    let (manager, _agent) = at_work(
        &site,
        options(&site, kubeconfig, Permission::Exec)?,
        &sessions(LAB),
    )
    .await?;
    let at = manager.address;
    assert_eq!(seen(at, "TOKEN-alice").await?, [0; 0]);
    assert_eq!(seen(at, "TOKEN-bob").await?, [4]);
    assert_eq!(seen(at, "TOKEN-pod").await?, [1, 2, 3, 4]);
    let path = format!("/api/v1/sessions?namespace={LAB}");
    let (_, body) = call(at, "TOKEN-pod", Method::GET, &path, None).await?;
    assert_eq!(body["sessions"].as_array().map(Vec::len), Some(3));
    manager.stop().await
}

#[tokio::test(flavor = "multi_thread")]
async fn without_an_answer_nothing_is_allowed() -> Outcomes {
    let server = ApiServer::start(recorded()?).await?;
    let site = Site::new()?;
    let kubeconfig = server.kubeconfig(site.dir.path(), "TOKEN-manager")?;
    let (manager, _agent) = at_work(
        &site,
        options(&site, kubeconfig.clone(), Permission::Saves)?,
        &sessions(LAB),
    )
    .await?;
    let at = manager.address;
    // A server that knows no audiences accepts tokens that are meant for others.
    server.with(|cluster| cluster.without_audiences = true);
    let (status, _) = call(
        at,
        "TOKEN-of-another-audience",
        Method::GET,
        "/api/v1/me",
        None,
    )
    .await?;
    assert_eq!(status, 401);
    server.with(|cluster| cluster.without_audiences = false);
    // An answer is used again.
    assert_eq!(seen(at, "TOKEN-alice").await?, [1, 2, 3]);
    let asked = server.with(|cluster| (cluster.token_reviews, cluster.access_reviews));
    for _ in 0..3 {
        seen(at, "TOKEN-alice").await?;
    }
    assert_eq!(
        server.with(|cluster| (cluster.token_reviews, cluster.access_reviews)),
        asked
    );
    // The identity is still known, a permission is not.
    server.with(|cluster| cluster.denies = true);
    assert_eq!(
        call(at, "TOKEN-alice", Method::GET, "/api/v1/me", None)
            .await?
            .0,
        200
    );
    let away = |answer: (u16, Value)| {
        assert_eq!((answer.0, &answer.1["code"]), (503, &json!("unavailable")));
    };
    away(call(at, "TOKEN-bob", Method::GET, "/api/v1/sessions", None).await?);
    drop(server);
    for token in ["TOKEN-bob", "TOKEN-pod"] {
        away(call(at, token, Method::GET, "/api/v1/me", None).await?);
        away(save(at, token, json!(id(1)), "t").await?);
    }
    // Other callers do not need the cluster.
    assert_eq!(
        ask(at, Who::Alice, Method::GET, "/api/v1/sessions", None)
            .await?
            .0,
        200
    );
    manager.stop().await?;
    // Nor does the start of a manager.
    let manager = site
        .manager_with(options(&site, kubeconfig, Permission::Saves)?)
        .await?;
    manager.stop().await
}

#[tokio::test]
async fn a_manager_that_may_not_ask_does_not_start() -> Outcomes {
    let server = ApiServer::start(Cluster {
        denies: true,
        ..Cluster::default()
    })
    .await?;
    let site = Site::new()?;
    let kubeconfig = server.kubeconfig(site.dir.path(), "TOKEN-manager")?;
    let refused = site
        .manager_with(options(&site, kubeconfig, Permission::Saves)?)
        .await;
    let refused = refused.err().ok_or("it started")?.to_string();
    assert!(
        refused.contains("system:auth-delegator") && refused.contains("forbidden"),
        "{refused}"
    );
    let refused = site
        .manager_with(options(&site, "/nonexistent".into(), Permission::Saves)?)
        .await;
    let refused = refused.err().ok_or("it started")?.to_string();
    assert!(refused.contains("/nonexistent"), "{refused}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_of_the_cluster_comes_in_one_header_and_signs_no_browser_in() -> Outcomes {
    let server = ApiServer::start(recorded()?).await?;
    let site = Site::new()?;
    let kubeconfig = server.kubeconfig(site.dir.path(), "TOKEN-manager")?;
    let (manager, _agent) =
        at_work(&site, options(&site, kubeconfig, Permission::Saves)?, &[]).await?;
    let url = |path: &str| format!("http://{}/api/v1/{path}", manager.address);
    let proxied = || {
        Ok::<_, Box<dyn std::error::Error>>(
            http()?
                .get(url("me"))
                .header("Upperdeck-Authorization", "Bearer TOKEN-alice"),
        )
    };
    let me: Value = proxied()?.send().await?.json().await?;
    assert_eq!(me["user"], format!("system:serviceaccount:{LAB}:alice"));
    let groups = me["groups"].as_array().ok_or("no groups")?;
    assert!(groups.contains(&json!(format!("system:serviceaccounts:{LAB}"))));
    for request in [
        proxied()?.bearer_auth("token-alice"),
        proxied()?.header("Upperdeck-Authorization", "Bearer TOKEN-bob"),
        http()?
            .get(url("me"))
            .header("Upperdeck-Authorization", "TOKEN-alice"),
    ] {
        assert_eq!(request.send().await?.status(), 401);
    }
    let for_another = proxied()?.header("Upperdeck-User", "bob");
    assert_eq!(for_another.send().await?.status(), 403);
    let sign_in = http()?
        .post(url("signin"))
        .bearer_auth("TOKEN-alice")
        .json(&json!({}));
    assert_eq!(sign_in.send().await?.status(), 403);
    manager.stop().await
}

/// The same with the API server of a cluster.
#[tokio::test(flavor = "multi_thread")]
async fn a_real_cluster_decides_in_the_same_way() -> Outcomes {
    let Some(dir) = std::env::var_os("UPPERDECK_TEST_CLUSTER").map(PathBuf::from) else {
        support::ignore("UPPERDECK_TEST_CLUSTER does not name the directory of a cluster");
        return Ok(());
    };
    let namespace = format!("upperdeck-test-{:08x}", rand::random::<u32>());
    let real = RealCluster::new(&dir, &namespace)?;
    let site = Site::new()?;
    let options = options(&site, dir.join("admin.conf"), Permission::Saves)?;
    let (manager, _agent) = at_work(&site, options, &sessions(&namespace)).await?;
    check(manager.address, &real.tokens()?, &namespace).await?;
    manager.stop().await
}

/// A namespace with the users of the recorded cluster. It is deleted when it is dropped.
struct RealCluster {
    kubectl: PathBuf,
    kubeconfig: PathBuf,
    namespace: String,
}

impl Drop for RealCluster {
    fn drop(&mut self) {
        // The namespace stays if the cluster has gone.
        let _ = self.run(&["delete", "namespace", &self.namespace, "--wait=false"]);
    }
}

impl RealCluster {
    fn new(dir: &Path, namespace: &str) -> Fallible<Self> {
        let real = Self {
            kubectl: dir.join("bin/kubectl"),
            kubeconfig: dir.join("admin.conf"),
            namespace: namespace.to_owned(),
        };
        real.run(&["create", "namespace", namespace])?;
        for account in ["alice", "bob"] {
            real.run(&["-n", namespace, "create", "serviceaccount", account])?;
        }
        for (role, resource, account) in
            [("all", "saves", "alice"), ("own", "saves/own", "default")]
        {
            let role_of = json!({
                "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role",
                "metadata": {"name": role, "namespace": namespace},
                "rules": [{"apiGroups": ["upperdeck.io"], "resources": [resource], "verbs": ["create"]}],
            });
            let file = tempfile::NamedTempFile::new()?;
            std::fs::write(file.path(), role_of.to_string())?;
            real.run(&["create", "-f", file.path().to_str().ok_or("a path")?])?;
            let account = format!("--serviceaccount={namespace}:{account}");
            let role = format!("--role={role}");
            real.run(&[
                "-n",
                namespace,
                "create",
                "rolebinding",
                &role[7..],
                &role,
                &account,
            ])?;
        }
        let pod = json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "nb", "namespace": namespace},
            // No scheduler looks at it, so that it never runs.
            "spec": {"schedulerName": "none", "containers": [{"name": "main", "image": "none.invalid/none"}]},
        });
        let file = tempfile::NamedTempFile::new()?;
        std::fs::write(file.path(), pod.to_string())?;
        // The service account comes a moment after its namespace.
        for _ in 0..100 {
            if real
                .run(&["-n", namespace, "get", "serviceaccount", "default"])
                .is_ok()
            {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
        real.run(&["create", "-f", file.path().to_str().ok_or("a path")?])?;
        Ok(real)
    }

    fn tokens(&self) -> Fallible<Tokens> {
        let token = |account: &str, more: &[&str]| -> Fallible<String> {
            let mut args = vec!["-n", &self.namespace, "create", "token", account];
            args.extend(more);
            Ok(self.run(&args)?.trim().to_owned())
        };
        let own = "--audience=upperdeck";
        Ok(Tokens {
            alice: token("alice", &[own])?,
            bob: token("bob", &[own])?,
            pod: token(
                "default",
                &[own, "--bound-object-kind=Pod", "--bound-object-name=nb"],
            )?,
            other_audience: token("alice", &[])?,
        })
    }

    fn run(&self, args: &[&str]) -> Fallible<String> {
        let output = Command::new(&self.kubectl)
            .arg("--kubeconfig")
            .arg(&self.kubeconfig)
            .args(args)
            .output()?;
        if !output.status.success() {
            return Err(format!(
                "kubectl {args:?}: {}",
                String::from_utf8_lossy(&output.stderr)
            )
            .into());
        }
        Ok(String::from_utf8(output.stdout)?)
    }
}
