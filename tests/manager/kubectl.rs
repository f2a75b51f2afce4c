//! `kubectl upperdeck`, started as kubectl starts it, through a stand-in for the API server.

use std::os::unix::fs::symlink;

use serde_json::{Value, json};
use tokio::process::Command;
use upperdeck::service::manager::auth::Permission;

use crate::kubernetes::{LAB, at_work, options, recorded, sessions};
use crate::kubernetes_api::ApiServer;
use crate::site::{Agent, Manager, Outcomes, Site, id, succeeded};
use crate::support;

type Fallible<T> = Result<T, Box<dyn std::error::Error>>;

/// A manager behind an API server, and a kubeconfig of one of its users.
struct Setup {
    site: Site,
    server: ApiServer,
    manager: Manager,
    agent: Agent,
}

/// What a run of the program said.
struct Said {
    exit: Option<i32>,
    out: String,
    err: String,
}

impl Setup {
    async fn new() -> Fallible<Self> {
        let server = ApiServer::start(recorded()?).await?;
        let site = Site::new()?;
        let kubeconfig = server.kubeconfig(site.dir.path(), "TOKEN-manager")?;
        let (manager, agent) = at_work(
            &site,
            options(&site, kubeconfig, Permission::Saves)?,
            &sessions(LAB),
        )
        .await?;
        server.with(|cluster| {
            cluster.manager = Some(manager.address);
            for (token, user) in [
                ("TOKEN-of-a-person", "kubernetes-admin"),
                ("TOKEN-alice", "system:serviceaccount:lab:alice"),
                ("TOKEN-bob", "system:serviceaccount:lab:bob"),
            ] {
                cluster.users.insert(token.to_owned(), user.to_owned());
            }
        });
        for plugin in ["kubectl-upperdeck", "kubectl_complete-upperdeck"] {
            symlink(support::program(), site.dir.path().join(plugin))?;
        }
        Ok(Self {
            site,
            server,
            manager,
            agent,
        })
    }

    /// Runs `kubectl upperdeck ARGS` of the user with this token.
    async fn run(&self, token: &str, args: &[&str]) -> Fallible<Said> {
        self.start("kubectl-upperdeck", token, args).await
    }

    async fn start(&self, plugin: &str, token: &str, args: &[&str]) -> Fallible<Said> {
        let kubeconfig = self.server.kubeconfig(self.site.dir.path(), token)?;
        let output = Command::new(self.site.dir.path().join(plugin))
            .args(args)
            .env_clear()
            .env("KUBECONFIG", kubeconfig)
            .output()
            .await?;
        Ok(Said {
            exit: output.status.code(),
            out: String::from_utf8(output.stdout)?,
            err: String::from_utf8(output.stderr)?,
        })
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_is_saved_for_a_service_account() -> Outcomes {
    let setup = Setup::new().await?;
    let asked = ["-n", LAB, "save", "pod/nb2", "lab:v1", "--no-wait"];
    let said = setup.run("TOKEN-alice", &asked).await?;
    assert_eq!(said.exit, Some(0), "{}", said.err);
    let save = said.out.trim();
    // The API server's own credentials do not come to the manager, and the token that does is for it alone.
    let audiences = setup.server.with(|cluster| cluster.requested.clone());
    assert_eq!(audiences, [["upperdeck"]]);
    let said = setup
        .run("TOKEN-alice", &["-n", LAB, "ls", "-o", "json"])
        .await?;
    let listed: Value = serde_json::from_str(&said.out)?;
    assert_eq!(listed["saves"][0]["id"], json!(save), "{listed}");
    let said = setup
        .run("TOKEN-alice", &["-n", LAB, "cancel", save])
        .await?;
    assert_eq!((said.exit, said.out.as_str()), (Some(0), "cancelled\n"));
    let said = setup
        .run("TOKEN-alice", &["-n", LAB, "watch", save])
        .await?;
    assert_eq!(said.exit, Some(130), "{}", said.err);
    // Whoever asked for it finds it, although the image is its owner's.
    let of_owner = ["-n", LAB, "save", "nb", "--no-wait"];
    let of_owner = setup.run("TOKEN-alice", &of_owner).await?.out;
    let said = setup
        .run("TOKEN-alice", &["-n", LAB, "ls", "-o", "json"])
        .await?;
    let listed: Value = serde_json::from_str(&said.out)?;
    assert_eq!(listed["saves"][0]["id"], json!(of_owner.trim()), "{listed}");
    let said = setup
        .run("TOKEN-alice", &["-n", LAB, "sessions", "-o", "json"])
        .await?;
    let listed: Value = serde_json::from_str(&said.out)?;
    assert_eq!(listed.as_array().map(Vec::len), Some(3));
    // Who may not: the answer is that of the manager, and so is the exit code.
    let said = setup.run("TOKEN-bob", &["-n", LAB, "save", "nb2"]).await?;
    assert_eq!(said.exit, Some(1));
    assert!(said.err.contains("no such session"), "{}", said.err);
    setup.manager.stop().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_save_is_followed_to_its_end() -> Outcomes {
    let setup = Setup::new().await?;
    let asked = ["-n", LAB, "save", "nb", "lab:v2", "--progress", "none"];
    let work = async {
        let claim = setup.agent.claim().await?;
        setup.agent.begin(&claim).await?;
        setup.agent.end(&claim, 2, succeeded()).await?;
        Ok::<_, Box<dyn std::error::Error>>(())
    };
    let (said, worked) = tokio::join!(setup.run("TOKEN-alice", &asked), work);
    worked?;
    let said = said?;
    assert_eq!(said.exit, Some(0), "{}", said.err);
    assert!(said.out.contains("@sha256:"), "{}", said.out);
    setup.manager.stop().await
}

#[tokio::test(flavor = "multi_thread")]
async fn who_asks_is_said_or_asked_for() -> Outcomes {
    let setup = Setup::new().await?;
    // A person has no token for the manager alone.
    let said = setup
        .run("TOKEN-of-a-person", &["-n", LAB, "sessions"])
        .await?;
    assert_eq!(said.exit, Some(2));
    for named in ["kubernetes-admin", "--service-account", "--send-token"] {
        assert!(said.err.contains(named), "{}", said.err);
    }
    assert_eq!(setup.server.with(|cluster| cluster.proxied), 0);
    let as_alice = [
        "-n",
        LAB,
        "--service-account",
        "alice",
        "sessions",
        "-o",
        "json",
    ];
    let said = setup.run("TOKEN-of-a-person", &as_alice).await?;
    assert!(said.out.contains(&id(1)), "{} {}", said.out, said.err);
    let as_none = ["-n", LAB, "--service-account", "none", "sessions"];
    let said = setup.run("TOKEN-of-a-person", &as_none).await?;
    assert_eq!(said.exit, Some(1));
    assert!(
        said.err
            .contains("the API server: serviceaccounts not found"),
        "{}",
        said.err
    );
    // Its own token is sent only if that is asked for; the manager does not know this one.
    let said = setup
        .run(
            "TOKEN-of-a-person",
            &["-n", LAB, "--send-token", "sessions"],
        )
        .await?;
    assert_eq!(said.exit, Some(77), "{}", said.err);
    let said = setup
        .run("TOKEN-alice", &["-n", LAB, "--send-token", "sessions"])
        .await?;
    assert_eq!(said.exit, Some(0), "{}", said.err);
    setup.server.with(|cluster| cluster.manager = None);
    let said = setup.run("TOKEN-alice", &["-n", LAB, "sessions"]).await?;
    assert_eq!(said.exit, Some(75));
    assert!(said.err.contains("no endpoints"), "{}", said.err);
    setup.manager.stop().await
}

#[tokio::test(flavor = "multi_thread")]
async fn kubectl_completes_the_words() -> Outcomes {
    let setup = Setup::new().await?;
    let complete = async |words: &[&str]| {
        setup
            .start("kubectl_complete-upperdeck", "TOKEN-alice", words)
            .await
    };
    // What was recorded of a cluster: two pods of the namespace run, and none of the kubeconfig's own one.
    for (words, candidates) in [
        (["s"].as_slice(), "save\nsessions\nstatus\n:4\n"),
        (&["ls", "-o", ""], "table\njson\n:4\n"),
        (&["save", ""], ":4\n"),
        (&["save", "-n", LAB, ""], "nb\nnb2\n:4\n"),
        (&["-n", LAB, "save", "nb2"], "nb2\n:4\n"),
        (&["--namespace", LAB, "save", "n"], "nb\nnb2\n:4\n"),
        (&["--namespace", "l"], "lab\n:4\n"),
        (&["--kubeconfig", ""], ":0\n"),
    ] {
        let said = complete(words).await?;
        assert_eq!(said.out, candidates, "{words:?}: {}", said.err);
    }
    let asked = ["-n", LAB, "save", "nb2", "--no-wait"];
    let save = setup.run("TOKEN-alice", &asked).await?.out;
    let said = complete(&["cancel", ""]).await?;
    assert_eq!(said.out, format!("{}\n:4\n", save.trim()));
    setup.manager.stop().await
}
