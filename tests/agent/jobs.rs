//! Jobs from the order to the final report.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use upperdeck::service::agent::OwnerRule;
use upperdeck::service::job::{
    Category, Code, Event, Kind, NextStep, Order, Outcome, Phase, Update, Verdict,
};
use upperdeck::service::queue::{Clock, Limits, Local, Queue, Settings, Withdrawn};

use crate::node::{Node, Service, alive, local, wait};

/// Starts an agent with an order and waits until the container is frozen.
async fn stand_still(node: &Node) -> Result<(Service, Order)> {
    node.work_a_lot()?;
    let mut options = node.options();
    options.flags.push("--pause=full".to_owned());
    options.threads = (1, Some(1));
    let service = Service::start(options, local());
    let order = node.order();
    service.queue.offer(&order).await?;
    wait("the container stands still", || node.frozen().then_some(()))
        .await
        .with_context(|| format!("{:?}", service.reports_of(order.job)))?;
    Ok((service, order))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_is_saved_and_everything_about_it_is_told() -> Result<()> {
    let Some(node) = Node::new().await? else {
        return Ok(());
    };
    let mut options = node.options();
    options.background = Some(2.0);
    let service = Service::start(options, local());
    let mut order = node.order();
    order.options.labels = [("--creds".to_owned(), "a:b".to_owned())].into();
    service.queue.offer(&order).await?;
    let Outcome::Succeeded { saved } = service.outcome(order.job).await? else {
        bail!("{:#?}", service.reports_of(order.job));
    };
    ensure!(node.tagged() && !node.frozen());
    assert!(saved.reference.ends_with(&saved.digest), "{saved:?}");
    assert!(
        saved.layer_bytes > 0 && saved.image_bytes > saved.layer_bytes,
        "{saved:?}"
    );
    assert!(saved.entries > 0 && saved.pause_ms.is_some(), "{saved:?}");
    let said = service.reports_of(order.job);
    let seqs: Vec<u64> = said.iter().map(|report| report.seq).collect();
    assert!(seqs.windows(2).all(|pair| pair[0] < pair[1]), "{seqs:?}");
    let said: Vec<Update> = said.into_iter().map(|report| report.update).collect();
    assert_eq!(said[..2], [Update::Assigned, Update::Started]);
    let told = |wanted: &dyn Fn(&Event) -> bool| {
        said.iter()
            .any(|said| matches!(said, Update::Event { event } if wanted(event)))
    };
    assert!(told(&|event| *event
        == Event::Phase {
            phase: Phase::Finishing
        }));
    assert!(told(&|event| *event == Event::Ready { replaces: None }));
    assert!(told(&|event| matches!(event, Event::Paused { .. })));
    assert!(told(&|event| matches!(event, Event::Saved { .. })));
    // What the user wrote is data.
    let index = fs::read_to_string(node.path("images/alice/x/index.json"))?;
    let digest = saved.digest.trim_start_matches("sha256:");
    ensure!(index.contains(digest), "{index}");
    let blob =
        |digest: &str| fs::read_to_string(node.path("images/alice/x/blobs/sha256").join(digest));
    let manifest: serde_json::Value = serde_json::from_str(&blob(digest)?)?;
    let config = manifest["config"]["digest"].as_str().context("config")?;
    let config: serde_json::Value =
        serde_json::from_str(&blob(config.trim_start_matches("sha256:"))?)?;
    assert_eq!(config["config"]["Labels"]["--creds"], "a:b");
    let history = config["history"].as_array().context("history")?;
    assert_eq!(history.last().context("entry")?["comment"], "--with pandas");
    // Nothing is left of it in the spool but how it ended.
    wait("the spool is tidy", || {
        fs::read_dir(node.path("spool/running"))
            .ok()?
            .next()
            .is_none()
            .then_some(())
    })
    .await?;
    service.end().await?;
    Ok(())
}

/// A child that is stopped while it writes the tag, or after that, has saved if it says so.
#[tokio::test(flavor = "multi_thread")]
async fn a_time_limit_after_the_tag_is_no_failure() -> Result<()> {
    let Some(node) = Node::new().await? else {
        return Ok(());
    };
    let digest = upperdeck::common::digest::Digest::of("x");
    let saved =
        format!(r#"echo '{{"event":"saved","reference":"r/x@{digest}","digest":"{digest}"}}'"#);
    let warning =
        r#"echo '{"event":"warning","code":"replaced_kept","message":"the old one stays"}'"#;
    let failed = r#"echo '{"event":"failed","exit":130,"code":"cancelled","message":"m","retryable":false}'"#;
    let ready = r#"echo '{"event":"ready"}'; head -c 1 <&1 >/dev/null"#;
    let stopped = "trap stopped TERM; while :; do sleep 0.1; done";
    let last = format!("stopped() {{ {saved}; {warning}; exit 0; }}; {ready}; {stopped}");
    let unknown = format!("stopped() {{ {failed}; exit 130; }}; {ready}; {stopped}");
    let follows = format!("{ready}; {saved}; sleep 5; {warning}");
    for (case, script, succeeds) in [
        ("while", last, true),
        ("after", follows, true),
        ("unknown", unknown, false),
    ] {
        let mut options = node.options();
        options.program = node.program(&script)?;
        let service = Service::start(options, local());
        let mut order = node.order();
        order.timeout_s = 2;
        service.queue.offer(&order).await?;
        match service.outcome(order.job).await? {
            Outcome::Succeeded { saved } if succeeds => {
                assert_eq!(saved.digest, digest.to_string(), "{case}");
                let warned = service.reports_of(order.job).into_iter().any(|report| {
                    matches!(report.update, Update::Event { event: Event::Warning { code, .. } } if code == "replaced_kept")
                });
                ensure!(warned, "{case}");
            }
            Outcome::Failed {
                code: Code::TimedOut,
                message,
                ..
            } if !succeeds => {
                ensure!(message.contains("whether the tag is written"), "{message}");
            }
            other => bail!("{case}: {other:?}"),
        }
        service.end().await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn credentials_are_nowhere_but_on_the_descriptor() -> Result<()> {
    let Some(node) = Node::new().await? else {
        return Ok(());
    };
    let mut options = node.options();
    fs::write(node.path("creds"), "robot:s3cret-of-the-robot\n")?;
    options.registry.creds_file = Some(node.path("creds"));
    let seen = node.path("seen");
    let dump = seen.display();
    options.program = node.program(&format!(
        "cat /proc/$$/cmdline /proc/$$/environ > {dump}; cat > {dump}.creds; ls -l /proc/$$/fd > {dump}.fds; exit 69"
    ))?;
    let service = Service::start(options, local());
    let order = node.order();
    service.queue.offer(&order).await?;
    let outcome = service.outcome(order.job).await?;
    assert!(
        matches!(
            outcome,
            Outcome::Failed {
                code: Code::BaseUnproven,
                retryable: false,
                ..
            }
        ),
        "{outcome:?}"
    );
    let (shown, given) = (
        fs::read(&seen)?,
        fs::read_to_string(node.path("seen.creds"))?,
    );
    assert_eq!(given, "robot:s3cret-of-the-robot\n");
    let shown = String::from_utf8_lossy(&shown);
    assert!(
        shown.contains("--creds-fd=0") && !shown.contains("s3cret"),
        "{shown}"
    );
    // Nothing but its own three, and what this test was itself started with.
    let own: Vec<String> = fs::read_dir("/proc/self/fd")?
        .filter_map(|fd| Some(fs::read_link(fd.ok()?.path()).ok()?.display().to_string()))
        .collect();
    let open = fs::read_to_string(node.path("seen.fds"))?;
    let inherited = open
        .lines()
        .filter_map(|line| line.split(" -> ").nth(1))
        .filter(|to| to.starts_with("socket:") || to.starts_with("pipe:"))
        .filter(|to| !own.iter().any(|own| own == to))
        .count();
    // The other end of its stderr has the same name, and may be read here still.
    assert!((2..=3).contains(&inherited), "{open}");
    let reports = format!("{:?}", service.end().await?);
    assert!(!reports.contains("s3cret"));
    Ok(())
}

async fn refused(node: &Node, service: &Service, change: impl FnOnce(&mut Order)) -> Result<Code> {
    let mut order = node.order();
    change(&mut order);
    service.queue.offer(&order).await?;
    match service.outcome(order.job).await? {
        Outcome::Failed {
            code, retryable, ..
        } => {
            ensure!(!retryable);
            Ok(code)
        }
        other => bail!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_node_does_not_see_itself_is_not_done() -> Result<()> {
    let Some(node) = Node::new().await? else {
        return Ok(());
    };
    let mut options = node.options();
    let ran = node.path("ran");
    options.program = node.program(&began(&ran))?;
    let service = Service::start(options, local());
    let code = refused(&node, &service, |order| order.owner = "mallory".to_owned()).await?;
    assert_eq!(code, Code::NotPermitted, "the session of another user");
    for elsewhere in [
        "oci:/srv/elsewhere:x",
        "evil.example.org/alice/x:1",
        "oci-archive:/tmp/x.tar",
    ] {
        let code = refused(&node, &service, |order| {
            order.destination = elsewhere.to_owned();
        })
        .await?;
        assert_eq!(code, Code::Policy, "{elsewhere}");
    }
    let up = format!("oci:{}/../other:x", node.path("images").display());
    assert_eq!(
        refused(&node, &service, |order| order.destination = up).await?,
        Code::Policy
    );
    // A name, a prefix, a process and nothing at all are no IDs.
    let process = format!("pid:{}", node.pid);
    for session in [
        "web",
        &node.id[..12],
        &process,
        "--help",
        "0123456789abcdef",
    ] {
        let code = refused(&node, &service, |order| order.session = session.to_owned()).await?;
        assert_eq!(code, Code::ContainerGone, "{session}");
    }
    assert!(!ran.exists());
    service.end().await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_that_nobody_owns_is_saved_in_nobodys_name_only() -> Result<()> {
    let Some(node) = Node::new().await? else {
        return Ok(());
    };
    let mut options = node.options();
    let ran = node.path("ran");
    options.owner = OwnerRule::Env("NOBODY_SETS_THIS".to_owned());
    options.program = node.program(&began(&ran))?;
    let service = Service::start(options, local());
    assert_eq!(refused(&node, &service, |_| ()).await?, Code::NotPermitted);
    assert!(!ran.exists());
    let mut order = node.order();
    order.owner.clear();
    service.queue.offer(&order).await?;
    service.outcome(order.job).await?;
    assert!(ran.exists(), "it was begun");
    service.end().await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn cancelled_while_the_container_stands_still_it_thaws_and_nothing_is_tagged() -> Result<()> {
    let Some(node) = Node::new().await? else {
        return Ok(());
    };
    let (service, order) = stand_still(&node).await?;
    assert_eq!(
        service.queue.withdraw(order.job).await?,
        Withdrawn::CancelRequested
    );
    assert_eq!(service.outcome(order.job).await?, Outcome::Cancelled);
    ensure!(!node.frozen() && !node.tagged());
    service.end().await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_child_that_is_killed_leaves_a_container_that_runs_and_a_failure_that_may_pass()
-> Result<()> {
    let Some(node) = Node::new().await? else {
        return Ok(());
    };
    let (service, order) = stand_still(&node).await?;
    let child = wait("the agent's note", || node.child(order.job)).await?;
    kill(Pid::from_raw(child as i32), Signal::SIGKILL)?;
    let outcome = service.outcome(order.job).await?;
    assert!(
        matches!(
            outcome,
            Outcome::Failed {
                code: Code::Internal,
                retryable: true,
                ..
            }
        ),
        "{outcome:?}"
    );
    ensure!(!node.frozen() && !node.tagged());
    // Another attempt succeeds.
    let again = Order {
        attempt: 2,
        ..order
    };
    service.queue.offer(&again).await?;
    wait("the second attempt's end", || {
        let said = service.reports_of(again.job);
        said.iter()
            .any(|r| {
                r.attempt == 2
                    && matches!(
                        &r.update,
                        Update::Ended {
                            outcome: Outcome::Succeeded { .. }
                        }
                    )
            })
            .then_some(())
    })
    .await?;
    ensure!(node.tagged());
    service.end().await?;
    Ok(())
}

/// Returns shell code that creates the file `ran` when the program is started for a job. The agent also uses the
/// program for inspections, at any time.
fn began(ran: &Path) -> String {
    format!(
        "case \" $* \" in *\" commit \"*) touch {} ;; esac",
        ran.display()
    )
}

/// Shell code of a program that reports a phase and ignores SIGTERM.
const STUBBORN: &str =
    "trap '' TERM; echo '{\"event\":\"phase\",\"phase\":\"scanning\"}'; while :; do sleep 1; done";

#[tokio::test(flavor = "multi_thread")]
async fn one_that_takes_too_long_is_ended_with_all_that_it_started() -> Result<()> {
    let Some(node) = Node::new().await? else {
        return Ok(());
    };
    let mut options = node.options();
    options.program = node.program(STUBBORN)?;
    let service = Service::start(options, local());
    let order = Order {
        timeout_s: 1,
        ..node.order()
    };
    service.queue.offer(&order).await?;
    let child = wait("a child", || node.child(order.job)).await?;
    let outcome = service.outcome(order.job).await?;
    assert!(
        matches!(
            outcome,
            Outcome::Failed {
                code: Code::TimedOut,
                retryable: false,
                ..
            }
        ),
        "{outcome:?}"
    );
    ensure!(!alive(child));
    service.end().await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_claim_ends_the_child_without_a_word() -> Result<()> {
    let Some(node) = Node::new().await? else {
        return Ok(());
    };
    let mut options = node.options();
    options.program = node.program("exec sleep 100000")?;
    let clock = Clock::default();
    let settings = Settings {
        clock: clock.clone(),
        ..Settings::default()
    };
    let limits = Limits {
        user: 0,
        node: 0,
        registry: 0,
    };
    // One slot, so that the agent itself does not take the job over.
    options.slots = 1;
    let service = Service::start(options, Queue::Local(Local::with(limits, settings)));
    let order = node.order();
    service.queue.offer(&order).await?;
    let child = wait("a child", || node.child(order.job)).await?;
    let wait_for = Duration::from_secs(1);
    let mut taken = Vec::new();
    while taken.is_empty() {
        clock.advance(Duration::from_secs(31));
        taken = service
            .queue
            .claim("node-1", "another", 1, wait_for)
            .await?;
    }
    wait("the child's end", || (!alive(child)).then_some(())).await?;
    let fence = taken[0].fence;
    let reports = service.end().await?;
    let old = reports
        .iter()
        .filter(|report| report.job == order.job && report.fence < fence);
    for report in old {
        assert!(
            !matches!(
                report.update,
                Update::Ended { .. } | Update::GivenBack { .. }
            ),
            "{report:?}"
        );
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_ends_gives_back_what_does_not_end_in_time_and_takes_nothing_more()
-> Result<()> {
    let Some(node) = Node::new().await? else {
        return Ok(());
    };
    let mut options = node.options();
    options.program = node.program("exec sleep 100000")?;
    options.drain = Duration::from_millis(300);
    let service = Service::start(options, local());
    let order = node.order();
    service.queue.offer(&order).await?;
    let child = wait("a child", || node.child(order.job)).await?;
    let queue = service.queue.clone();
    let reports = service.end().await?;
    ensure!(!alive(child) && !node.frozen());
    let last = reports
        .iter()
        .rfind(|report| report.job == order.job)
        .context("nothing said")?;
    assert!(matches!(last.update, Update::GivenBack { .. }), "{last:?}");
    let nodes = queue.nodes().await?;
    assert!(
        nodes[0].draining && nodes[0].running.is_empty(),
        "{nodes:?}"
    );
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_queue_that_forgot_a_success_is_told_of_it_again() -> Result<()> {
    let Some(node) = Node::new().await? else {
        return Ok(());
    };
    let service = Service::start(node.options(), local());
    let order = node.order();
    service.queue.offer(&order).await?;
    let first = service.outcome(order.job).await?;
    assert!(matches!(first, Outcome::Succeeded { .. }), "{first:?}");
    service.end().await?;
    // Another queue, which knows nothing, and a program that could not save.
    let mut options = node.options();
    options.program = node.program("exit 1")?;
    let service = Service::start(options, local());
    let again = Order {
        attempt: 2,
        ..order.clone()
    };
    service.queue.offer(&again).await?;
    assert_eq!(service.outcome(order.job).await?, first);
    let said: Vec<Update> = service
        .reports_of(order.job)
        .into_iter()
        .map(|report| report.update)
        .collect();
    assert!(matches!(said[..], [Update::Ended { .. }]), "{said:?}");
    // Another job is another matter.
    let other = node.order();
    service.queue.offer(&other).await?;
    assert!(matches!(
        service.outcome(other.job).await?,
        Outcome::Failed { .. }
    ));
    service.end().await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn heartbeats_tell_what_runs_there() -> Result<()> {
    let Some(node) = Node::new().await? else {
        return Ok(());
    };
    let mut options = node.options();
    options.heartbeat_every = Duration::from_millis(100);
    options.inventory_every = Duration::from_millis(100);
    let service = Service::start(options, local());
    let mut session = None;
    while session
        .as_ref()
        .is_none_or(|s: &upperdeck::service::job::Session| s.upper_bytes.is_none())
    {
        tokio::time::sleep(Duration::from_millis(50)).await;
        session = service
            .queue
            .sessions()
            .await?
            .into_iter()
            .find(|s| s.id == node.id);
    }
    let session = session.context("no session")?;
    assert_eq!(
        (session.owner.as_deref(), session.node.as_str()),
        (Some("alice"), "node-1")
    );
    assert_eq!(
        (session.kind, session.category),
        (Kind::Jupyter, Category::Cpu)
    );
    assert_eq!(session.image.as_deref(), Some("jupyter/base:1"));
    assert!(
        session.started_ms > 1_600_000_000_000 && session.upper_entries.is_some_and(|n| n >= 2),
        "{session:?}"
    );
    let nodes = service.queue.nodes().await?;
    assert!(
        nodes[0].load.cores >= 1 && nodes[0].load.slots >= 1 && !nodes[0].draining,
        "{nodes:?}"
    );
    service.end().await?;
    Ok(())
}

/// Shell code of a program that keeps what its agent writes to it, which is nothing until it is hurried.
fn hears(heard: &Path) -> String {
    format!(
        "case \" $* \" in *\" commit \"*) echo '{{\"event\":\"phase\",\"phase\":\"scanning\"}}'
         head -c 1 <&1 > {heard}.new && mv {heard}.new {heard}; sleep 600 ;; esac",
        heard = heard.display()
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn a_save_is_hurried_where_that_is_allowed_and_a_manager_confirms_it() -> Result<()> {
    for (allowed, background, confirmed, told) in [
        (true, true, Verdict::Wanted, true),
        // Who can write to the queue alone hurries nothing.
        (true, true, Verdict::Unwanted, false),
        (false, true, Verdict::Wanted, false),
        (true, false, Verdict::Wanted, false),
    ] {
        let case = format!("{allowed} {background} {confirmed:?}");
        let Some(node) = Node::new().await? else {
            return Ok(());
        };
        let heard = node.path("heard");
        let mut options = node.options();
        options.background = background.then_some(2.0);
        options.allow_hurry = allowed;
        options.program = node.program(&hears(&heard))?;
        let service = Service::start(options, local());
        service.set_answer(NextStep::Hurry, Some(confirmed));
        let order = node.order();
        service.queue.offer(&order).await?;
        wait("the save", || {
            let reports = service.reports_of(order.job);
            let scans = |update: &Update| matches!(update, Update::Event { .. });
            reports
                .iter()
                .any(|report| scans(&report.update))
                .then_some(())
        })
        .await?;
        assert!(service.queue.hurry(order.job).await?);
        if told {
            wait("its agent's word", || heard.exists().then_some(())).await?;
            assert_eq!(std::fs::read(&heard)?, b"h", "{case}");
        } else {
            // Longer than the interval at which a claim is renewed.
            tokio::time::sleep(Duration::from_secs(12)).await;
            ensure!(!heard.exists(), "{case}");
        }
        service.queue.withdraw(order.job).await?;
        service.outcome(order.job).await?;
        service.end().await?;
    }
    Ok(())
}
