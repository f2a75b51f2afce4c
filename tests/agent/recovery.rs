//! How an agent cleans up after a predecessor that died.

use std::fs;
use std::os::unix::process::CommandExt as _;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Result, ensure};
use upperdeck::node::container::process_start;
use upperdeck::node::freeze::{self, ThawOutcome};
use upperdeck::service::job::{JobId, Outcome};

use crate::node::{Node, Service, UPPERDECK, alive, local, wait};

#[tokio::test(flavor = "multi_thread")]
async fn a_container_that_a_predecessor_left_frozen_runs_again_and_its_child_is_ended() -> Result<()>
{
    let Some(node) = Node::new().await? else {
        return Ok(());
    };
    let job = JobId::new();
    let running = node.path("spool/running");
    fs::create_dir_all(&running)?;
    let mark = running.join(format!("{job}.frozen"));
    let how = freeze::Options {
        program: UPPERDECK.into(),
        mark: Some(mark.clone()),
        ..freeze::Options::default()
    };
    let frozen = freeze::freeze(node.pid, None, &how)?;
    // As for a process that is dead together with its watchdog: no other process thaws.
    std::mem::forget(frozen);
    ensure!(node.frozen() && mark.exists());
    let mut child = Command::new("sleep")
        .arg("100000")
        .process_group(0)
        .stdout(Stdio::null())
        .spawn()?;
    let pid = child.id();
    let start = process_start(pid).unwrap_or(0);
    let note = serde_json::json!({"session": node.id, "pid": pid, "pid_start": start});
    fs::write(running.join(format!("{job}.note")), note.to_string())?;
    // Its number went to the process of another since.
    let stranger = JobId::new();
    let mut other = Command::new("sleep")
        .arg("100000")
        .process_group(0)
        .stdout(Stdio::null())
        .spawn()?;
    let note = serde_json::json!({"session": node.id, "pid": other.id(), "pid_start": 1});
    fs::write(running.join(format!("{stranger}.note")), note.to_string())?;

    let service = Service::start(node.options(), local());
    wait("the container runs again", || {
        (!node.frozen()).then_some(())
    })
    .await?;
    wait("the child's end", || (!alive(pid)).then_some(())).await?;
    wait("the spool is tidy", || {
        fs::read_dir(&running).ok()?.next().is_none().then_some(())
    })
    .await?;
    ensure!(alive(other.id()));
    service.end().await?;
    let _ = (child.kill(), child.wait(), other.kill(), other.wait());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_somebody_else_paused_stays_paused() -> Result<()> {
    let Some(node) = Node::new().await? else {
        return Ok(());
    };
    node.pause(true)?;
    wait("the pause", || node.frozen().then_some(())).await?;
    let mut options = node.options();
    options.inventory_every = Duration::from_millis(50);
    let service = Service::start(options, local());
    let order = node.order();
    service.queue.offer(&order).await?;
    let outcome = service.outcome(order.job).await?;
    assert!(matches!(outcome, Outcome::Succeeded { .. }), "{outcome:?}");
    ensure!(
        node.frozen(),
        "a save of a paused container, and looks at the node, leave it paused"
    );
    service.end().await?;
    ensure!(node.frozen());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mark_speaks_of_one_cgroup_and_one_boot() -> Result<()> {
    let Some(node) = Node::new().await? else {
        return Ok(());
    };
    let mark = node.path("mark");
    assert_eq!(freeze::thaw_leftover(&mark)?, ThawOutcome::Nothing);
    let how = freeze::Options {
        program: UPPERDECK.into(),
        mark: Some(mark.clone()),
        ..freeze::Options::default()
    };
    let frozen = freeze::freeze(node.pid, None, &how)?;
    let text = fs::read_to_string(&mark)?;
    frozen.thaw()?;
    ensure!(!mark.exists(), "whoever thaws takes the mark away");
    // The same words, and by now another program's pause of another cgroup or boot.
    node.pause(true)?;
    wait("the pause", || node.frozen().then_some(())).await?;
    let value: serde_json::Value = serde_json::from_str(&text)?;
    for (field, other) in [
        ("inode", serde_json::json!(1)),
        ("boot", serde_json::json!("another")),
    ] {
        let mut value = value.clone();
        value[field] = other;
        fs::write(&mark, value.to_string())?;
        assert_eq!(freeze::thaw_leftover(&mark)?, ThawOutcome::Gone, "{field}");
        ensure!(node.frozen() && !mark.exists());
    }
    fs::write(&mark, &text[..text.len() / 2])?;
    assert_eq!(freeze::thaw_leftover(&mark)?, ThawOutcome::Nothing);
    fs::write(&mark, &text)?;
    assert_eq!(freeze::thaw_leftover(&mark)?, ThawOutcome::Thawed);
    ensure!(!node.frozen());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watchdog_that_thaws_takes_the_mark_away() -> Result<()> {
    let Some(node) = Node::new().await? else {
        return Ok(());
    };
    node.work_a_lot()?;
    let mark = node.path("mark");
    let mut child = Command::new(UPPERDECK)
        .args([
            "commit",
            "--progress=none",
            "--pause=full",
            "--jobs=1",
            "--state-dir=",
        ])
        .arg(format!("--freeze-mark={}", mark.display()))
        .arg(format!("--base=oci:{}:base", node.path("base").display()))
        .arg(format!("pid:{}", node.pid))
        .arg(format!("oci:{}:x", node.path("out").display()))
        .spawn()?;
    wait("the container stands still", || node.frozen().then_some(())).await?;
    ensure!(mark.exists());
    child.kill()?;
    child.wait()?;
    wait("the container runs again", || {
        (!node.frozen()).then_some(())
    })
    .await?;
    wait("the mark is gone", || (!mark.exists()).then_some(())).await?;
    Ok(())
}
