//! `--background`: the save runs with idle priority, but at full speed while the container is frozen.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result, ensure};

use crate::node::{Node, UPPERDECK, wait};

fn commit(node: &Node, flags: &[&str]) -> Result<Child> {
    Ok(Command::new(UPPERDECK)
        .args([
            "commit",
            "--background",
            "--progress=json",
            "--jobs=1",
            "--state-dir=",
        ])
        .args(flags)
        .arg(format!("--base=oci:{}:base", node.path("base").display()))
        .arg(format!("pid:{}", node.pid))
        .arg(format!("oci:{}:x", node.path("out").display()))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?)
}

/// Returns the niceness of the first thread (field 19 of `proc_pid_stat(5)`), and whether the process is in the idle
/// cgroup.
fn place(pid: u32) -> Result<(i32, bool)> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let after = stat.rsplit_once(')').context("stat")?.1;
    let nice = after.split_ascii_whitespace().nth(16).context("nice")?;
    let groups = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    let idle = groups
        .lines()
        .any(|line| line.ends_with(":/upperdeck-idle"));
    Ok((nice.parse()?, idle))
}

/// Returns whether this machine has a cgroup with idle priority.
fn can_be_idle() -> bool {
    let places = [
        "/sys/fs/cgroup/cpu",
        "/sys/fs/cgroup/cpu,cpuacct",
        "/sys/fs/cgroup",
    ];
    places.iter().any(|place| {
        let dir = Path::new(place).join("upperdeck-idle");
        ["cpu.idle", "cpu.shares", "cpu.weight"]
            .iter()
            .any(|file| dir.join(file).exists())
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_save_is_idle_but_while_the_container_stands_still() -> Result<()> {
    let Some(node) = Node::new().await? else {
        return Ok(());
    };
    let usual = place(std::process::id())?.0;
    // It waits when all is delivered.
    let mut child = commit(&node, &["--pause=none", "--gate-fd=0"])?;
    let lines = BufReader::new(child.stdout.take().context("stdout")?).lines();
    let ready = lines
        .map_while(Result::ok)
        .any(|line| line.contains("\"ready\""));
    ensure!(ready, "it ended before it was ready");
    let (nice, idle) = place(child.id())?;
    assert_eq!((nice, idle), (19, can_be_idle()));
    child.kill()?;
    child.wait()?;

    node.work_a_lot()?;
    let mut child = commit(&node, &["--pause=full"])?;
    wait("the container stands still", || node.frozen().then_some(())).await?;
    let (nice, idle) = place(child.id())?;
    ensure!(node.frozen(), "too late to tell");
    assert_eq!((nice, idle), (usual, false));
    wait("the container runs again", || {
        (!node.frozen()).then_some(())
    })
    .await?;
    child.kill()?;
    child.wait()?;
    Ok(())
}
