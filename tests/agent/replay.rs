//! Orders that a third party puts back into the queue: with a real manager and its record, over Redis with the node's
//! own key, and in one process. A save that was cancelled or has ended is not repeated.

use std::fs;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use redis::{Value, cmd};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use upperdeck::service::agent;
use upperdeck::service::job::{
    Code, JobId, Kind, NextStep, Order, Outcome, State, Update, Verdict, now_ms,
};
use upperdeck::service::manager::{self, Listen};
use upperdeck::service::queue::{Queue, Withdrawn};
use upperdeck::service::record::{Record, Save, Submitted, UserLimits};

use crate::node::{NODE, Node, Service, UPPERDECK, local, wait};
use crate::redis::Server;

/// A manager with a record, and the clients of the queue for both sides.
struct Site {
    record: Record,
    managers: Queue,
    agents: Queue,
    server: Option<Server>,
    cancel: CancellationToken,
    manager: JoinHandle<Result<(), manager::Error>>,
}

/// A running agent.
struct Agent {
    cancel: CancellationToken,
    task: JoinHandle<Result<(), agent::Error>>,
}

impl Agent {
    async fn end(self) -> Result<()> {
        self.cancel.cancel();
        Ok(self.task.await??)
    }
}

/// A copy of data from the queue.
enum Copy {
    Keys(Vec<(Vec<u8>, Vec<u8>)>),
    Order(Box<Order>),
}

impl Site {
    async fn new(node: &Node, over_redis: bool) -> Result<Option<Self>> {
        let server = if over_redis {
            let Some(server) = Server::start().await? else {
                return Ok(None);
            };
            Some(server)
        } else {
            None
        };
        let (managers, agents) = match &server {
            Some(server) => (server.queue().await?, server.node_queue().await?),
            None => {
                let queue = local();
                (queue.clone(), queue)
            }
        };
        let place = node.path("record.db").display().to_string();
        let record = Record::open(&place).await?;
        let target = format!(
            "oci:{}/{{user}}/{{name}}:{{tag}}",
            node.path("images").display()
        );
        let mut options =
            manager::Options::new(Listen::Unix(node.path("manager.sock")), target.parse()?);
        options.reconcile_every = Duration::from_millis(200);
        let cancel = CancellationToken::new();
        let manager = tokio::spawn(manager::run(
            options,
            managers.clone(),
            record.clone(),
            cancel.clone(),
        ));
        Ok(Some(Self {
            record,
            managers,
            agents,
            server,
            cancel,
            manager,
        }))
    }

    /// Submits a save.
    async fn submit(&self, node: &Node) -> Result<JobId> {
        let order = node.order();
        let now = now_ms();
        let save = Save {
            id: order.job,
            session: order.session,
            session_name: "web".into(),
            node: NODE.into(),
            user: "alice".into(),
            owner: order.owner,
            name: "x".into(),
            tag: "monday".into(),
            destination: order.destination,
            kind: Kind::Jupyter,
            attempt: 1,
            version: 1,
            caller: "token:test".into(),
            created_ms: now,
            queued_ms: now,
            not_before_ms: now,
            ..Save::default()
        };
        match self
            .record
            .submit(&save, None, UserLimits::default())
            .await?
        {
            Submitted::New(_) => Ok(order.job),
            other => bail!("{other:?}"),
        }
    }

    async fn cancel(&self, job: JobId) -> Result<()> {
        let wanted = self
            .record
            .change(job, "alice", |draft| draft.request_cancel("alice"))
            .await?;
        ensure!(wanted.context("no save")?.1);
        Ok(())
    }

    async fn state(&self, job: JobId) -> Result<State> {
        Ok(self.record.save(job).await?.context("no save")?.state)
    }

    async fn until(&self, job: JobId, state: State) -> Result<()> {
        for _ in 0..6000 {
            if self.state(job).await? == state {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        bail!("{state:?} does not come: {:?}", self.record.save(job).await)
    }

    async fn until_known(&self, job: JobId, known: bool) -> Result<()> {
        for _ in 0..6000 {
            if self.managers.places(&[job]).await?[0].is_some() == known {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        bail!("the queue does not change")
    }

    fn agent(&self, options: agent::Options) -> Agent {
        let cancel = CancellationToken::new();
        let (queue, until) = (self.agents.clone(), cancel.clone());
        let task = tokio::spawn(async move {
            loop {
                match agent::run(options.clone(), queue.clone(), until.clone()).await {
                    // A thread of its predecessor is on its way out.
                    Err(agent::Error::Locked { .. }) => {
                        tokio::time::sleep(Duration::from_millis(50)).await;
                    }
                    ended => return ended,
                }
            }
        });
        Agent { cancel, task }
    }

    /// Copies everything that belongs to a waiting order, as a client with access to Redis could. Without Redis,
    /// returns the order of the manager.
    async fn copy(&self, node: &Node, job: JobId) -> Result<Copy> {
        self.until_known(job, true).await?;
        let Some(server) = &self.server else {
            let mut order = node.order();
            order.job = job;
            order.expires_ms = now_ms() + 86_400_000;
            return Ok(Copy::Order(Box::new(order)));
        };
        let mut redis = server.connection().await?;
        let names: Vec<Vec<u8>> = cmd("KEYS").arg("*").query_async(&mut redis).await?;
        let mut keys = Vec::new();
        for name in names {
            let dump: Vec<u8> = cmd("DUMP").arg(&name).query_async(&mut redis).await?;
            keys.push((name, dump));
        }
        Ok(Copy::Keys(keys))
    }

    /// Puts the copy back, and waits until the order has been processed.
    async fn put_back(&self, job: JobId, copy: &Copy) -> Result<()> {
        match copy {
            Copy::Order(order) => drop(self.managers.offer(order).await?),
            Copy::Keys(keys) => {
                let server = self.server.as_ref().context("no Redis")?;
                let mut redis = server.connection().await?;
                for (name, dump) in keys {
                    let _: Value = cmd("RESTORE")
                        .arg(name)
                        .arg(0)
                        .arg(dump)
                        .arg("REPLACE")
                        .query_async(&mut redis)
                        .await?;
                }
            }
        }
        self.until_known(job, false).await
    }

    async fn end(self) -> Result<()> {
        self.cancel.cancel();
        Ok(self.manager.await??)
    }
}

/// Returns options with a program that records each start, and saves once a file permits it.
fn counting(node: &Node) -> Result<agent::Options> {
    let mut options = node.options();
    let (ran, go) = (node.path("ran"), node.path("go"));
    options.program = node.program(&format!(
        "case \" $* \" in *' commit '*) echo begun >> {};; *) exec {UPPERDECK} \"$@\";; esac\n\
         while [ ! -e {} ]; do sleep 0.05; done; exec {UPPERDECK} \"$@\"",
        ran.display(),
        go.display()
    ))?;
    Ok(options)
}

fn begun(node: &Node) -> usize {
    fs::read_to_string(node.path("ran")).map_or(0, |text| text.lines().count())
}

async fn cancelled_before_it_was_taken(over_redis: bool) -> Result<()> {
    let Some(node) = Node::new().await? else {
        return Ok(());
    };
    let Some(site) = Site::new(&node, over_redis).await? else {
        return Ok(());
    };
    let job = site.submit(&node).await?;
    let copy = site.copy(&node, job).await?;
    site.cancel(job).await?;
    site.until(job, State::Cancelled).await?;
    fs::write(node.path("go"), "")?;
    let agent = site.agent(counting(&node)?);
    site.put_back(job, &copy).await?;
    assert_eq!((begun(&node), node.tagged()), (0, false));
    assert_eq!(site.state(job).await?, State::Cancelled);
    agent.end().await?;
    site.end().await
}

#[tokio::test(flavor = "multi_thread")]
async fn cancelled_before_an_agent_had_it_it_is_not_begun_over_redis() -> Result<()> {
    cancelled_before_it_was_taken(true).await
}

#[tokio::test(flavor = "multi_thread")]
async fn cancelled_before_an_agent_had_it_it_is_not_begun_in_one_process() -> Result<()> {
    cancelled_before_it_was_taken(false).await
}

async fn cancelled_or_done(over_redis: bool, cancel: bool) -> Result<()> {
    let Some(node) = Node::new().await? else {
        return Ok(());
    };
    let Some(site) = Site::new(&node, over_redis).await? else {
        return Ok(());
    };
    let job = site.submit(&node).await?;
    let copy = site.copy(&node, job).await?;
    let agent = site.agent(counting(&node)?);
    wait("a child", || (begun(&node) == 1).then_some(())).await?;
    let end = if cancel {
        site.cancel(job).await?;
        State::Cancelled
    } else {
        fs::write(node.path("go"), "")?;
        State::Succeeded
    };
    site.until(job, end).await?;
    site.until_known(job, false).await?;
    assert_eq!(node.tagged(), !cancel);
    // A second image would be seen.
    fs::write(node.path("go"), "")?;
    let _ = fs::remove_dir_all(node.path("images"));
    site.put_back(job, &copy).await?;
    agent.end().await?;
    // By its successor, too, though no manager's word were to be had.
    let agent = site.agent(counting(&node)?);
    site.put_back(job, &copy).await?;
    assert_eq!((begun(&node), node.tagged()), (1, false));
    assert_eq!(site.state(job).await?, end);
    agent.end().await?;
    site.end().await
}

#[tokio::test(flavor = "multi_thread")]
async fn cancelled_while_it_ran_it_is_not_begun_again_over_redis() -> Result<()> {
    cancelled_or_done(true, true).await
}

#[tokio::test(flavor = "multi_thread")]
async fn cancelled_while_it_ran_it_is_not_begun_again_in_one_process() -> Result<()> {
    cancelled_or_done(false, true).await
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_done_is_not_done_again_over_redis() -> Result<()> {
    cancelled_or_done(true, false).await
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_done_is_not_done_again_in_one_process() -> Result<()> {
    cancelled_or_done(false, false).await
}

/// The node's own record of outcomes does not need a manager.
#[tokio::test(flavor = "multi_thread")]
async fn what_has_ended_is_remembered_by_the_node_alone() -> Result<()> {
    let Some(node) = Node::new().await? else {
        return Ok(());
    };
    let service = Service::start(counting(&node)?, local());
    let order = node.order();
    service.queue.offer(&order).await?;
    wait("a child", || (begun(&node) == 1).then_some(())).await?;
    assert_eq!(
        service.queue.withdraw(order.job).await?,
        Withdrawn::CancelRequested
    );
    assert_eq!(service.outcome(order.job).await?, Outcome::Cancelled);
    service.end().await?;
    // Whoever would answer now answers yes.
    let service = Service::start(counting(&node)?, local());
    service.queue.offer(&order).await?;
    assert_eq!(service.outcome(order.job).await?, Outcome::Cancelled);
    assert_eq!(begun(&node), 1);
    service.end().await?;
    Ok(())
}

/// If no manager confirms the tag after everything else has been delivered, no tag is set, and the container keeps
/// running.
#[tokio::test(flavor = "multi_thread")]
async fn without_a_managers_word_there_is_no_tag_and_nothing_is_lost() -> Result<()> {
    let Some(node) = Node::new().await? else {
        return Ok(());
    };
    let mut options = node.options();
    options.manager_wait = Duration::from_secs(1);
    let service = Service::start(options, local());
    service.set_answer(NextStep::Tag, None);
    let order = node.order();
    service.queue.offer(&order).await?;
    wait("all is delivered", || {
        let ready = Update::Event {
            event: upperdeck::service::job::Event::Ready { replaces: None },
        };
        let said = service.reports_of(order.job);
        said.iter().any(|r| r.update == ready).then_some(())
    })
    .await?;
    ensure!(!node.frozen(), "it stands still while the agent asks");
    let outcome = service.outcome(order.job).await?;
    let passing = matches!(
        outcome,
        Outcome::Failed {
            code: Code::TimedOut,
            retryable: true,
            ..
        }
    );
    ensure!(passing, "{outcome:?}");
    ensure!(!node.tagged() && !node.frozen());
    // The next attempt hears a word.
    service.set_answer(NextStep::Tag, Some(Verdict::Wanted));
    let again = Order {
        job: JobId::new(),
        ..order
    };
    service.queue.offer(&again).await?;
    let outcome = service.outcome(again.job).await?;
    ensure!(matches!(outcome, Outcome::Succeeded { .. }), "{outcome:?}");
    // One that is unwanted by then is not tagged either, and a later claim's is not spoken of.
    fs::remove_dir_all(node.path("images"))?;
    service.set_answer(NextStep::Tag, Some(Verdict::Unwanted));
    let third = Order {
        job: JobId::new(),
        ..again
    };
    service.queue.offer(&third).await?;
    assert_eq!(service.outcome(third.job).await?, Outcome::Cancelled);
    ensure!(!node.tagged());
    // One that would replace a pinned image fails, and another attempt would, too.
    service.set_answer(NextStep::Tag, Some(Verdict::Pinned));
    let fourth = Order {
        job: JobId::new(),
        ..third
    };
    service.queue.offer(&fourth).await?;
    let outcome = service.outcome(fourth.job).await?;
    let refused = matches!(
        outcome,
        Outcome::Failed {
            code: Code::ImagePinned,
            retryable: false,
            ..
        }
    );
    ensure!(refused && !node.tagged(), "{outcome:?}");
    service.end().await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_manager_a_save_does_not_begin_and_is_given_back() -> Result<()> {
    let Some(node) = Node::new().await? else {
        return Ok(());
    };
    let mut options = counting(&node)?;
    options.manager_wait = Duration::from_millis(100);
    let service = Service::start(options, local());
    service.set_answer(NextStep::Save, None);
    let order = node.order();
    service.queue.offer(&order).await?;
    let word = service.final_update(order.job).await?;
    ensure!(matches!(word, Update::GivenBack { .. }), "{word:?}");
    assert_eq!(begun(&node), 0);
    service.end().await?;
    Ok(())
}
