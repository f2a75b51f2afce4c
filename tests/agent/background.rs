//! `--background`: the save runs with idle priority, but at full speed while the container is frozen.

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use crate::node::{Node, UPPERDECK, wait};
use crate::support::ignore;

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

/// The top of the hierarchy in which this machine has a cgroup that counts as idle.
fn idle_below() -> Option<&'static Path> {
    let places = [
        "/sys/fs/cgroup/cpu",
        "/sys/fs/cgroup/cpu,cpuacct",
        "/sys/fs/cgroup",
    ];
    let shares_out = |place: &&Path| {
        let dir = place.join("upperdeck-idle");
        ["cpu.idle", "cpu.shares", "cpu.weight"]
            .iter()
            .any(|file| dir.join(file).exists())
    };
    places.map(Path::new).into_iter().find(shares_out)
}

/// Programs that want every core, in a cgroup of their own as a pod has.
struct Busy {
    group: PathBuf,
    programs: Vec<Child>,
}

impl Busy {
    fn new(top: &Path) -> Result<Self> {
        let group = top.join(format!("upperdeck-test-busy-{}", std::process::id()));
        fs::create_dir(&group)?;
        let script = "echo $$ > \"$1/cgroup.procs\" && while :; do :; done";
        let start = |_| {
            let mut program = Command::new("sh");
            program.args(["-c", script, "sh"]).arg(&group).spawn()
        };
        let cores = std::thread::available_parallelism()?.get();
        let programs = (0..2 * cores).map(start).collect::<Result<_, _>>()?;
        Ok(Self { group, programs })
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        for program in &mut self.programs {
            let _ = program.kill();
            let _ = program.wait();
        }
        // The kernel takes a moment to let go of the processes.
        for _ in 0..100 {
            if fs::remove_dir(&self.group).is_ok() {
                break;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
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
    assert_eq!((nice, idle), (19, idle_below().is_some()));
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

#[tokio::test(flavor = "multi_thread")]
async fn a_save_that_others_leave_nothing_has_a_weight_in_the_end() -> Result<()> {
    let Some(node) = Node::new().await? else {
        return Ok(());
    };
    // More than is done before the floor comes.
    let mut bytes = vec![0; 48 << 20];
    fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    for byte in &mut bytes {
        *byte = b'a' + *byte % 16;
    }
    node.work("home/big", &bytes)?;
    let mut child = commit(
        &node,
        &["--pause=none", "--gate-fd=0", "--compression-level=9"],
    )?;
    let pid = child.id();
    wait("the save is in the background", || {
        place(pid).is_ok_and(|(nice, _)| nice == 19).then_some(())
    })
    .await?;
    let weight = match idle_below() {
        None => None,
        Some(top) => {
            let busy = Busy::new(top)?;
            let group = top.join("upperdeck-idle");
            let read = |file: &str| fs::read_to_string(group.join(file)).unwrap_or_default();
            let least = read("cpu.weight") + &read("cpu.shares");
            let weight = wait("the group weighs more than nothing", || {
                let idle = read("cpu.idle").trim() == "1";
                let weight = read("cpu.weight") + &read("cpu.shares");
                (!idle && weight != least).then_some(weight)
            })
            .await;
            drop(busy);
            Some(weight)
        }
    };
    child.kill()?;
    child.wait()?;
    match weight {
        None => ignore("needs a cpu cgroup that can be written to"),
        Some(weight) => ensure!(weight?.trim().parse::<u32>()? <= 1024),
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_save_that_is_hurried_leaves_the_background_and_ends_well() -> Result<()> {
    let Some(node) = Node::new().await? else {
        return Ok(());
    };
    let usual = place(std::process::id())?.0;
    let group = "upperdeck-test-hurry";
    let mut child = commit(
        &node,
        &[
            "--pause=none",
            "--gate-fd=0",
            "--memory-limit=1G",
            &format!("--memory-group={group}"),
        ],
    )?;
    let mut lines = BufReader::new(child.stdout.take().context("stdout")?).lines();
    let mut next = |wanted: &str| {
        lines
            .by_ref()
            .map_while(Result::ok)
            .any(|line| line.contains(wanted))
    };
    ensure!(next("\"ready\""), "it ended before it was ready");
    assert_eq!(place(child.id())?.0, 19);
    let mut gate = child.stdin.take().context("stdin")?;
    gate.write_all(b"h")?;
    let pid = child.id();
    wait("it leaves the background", || {
        place(pid)
            .is_ok_and(|place| place == (usual, false))
            .then_some(())
    })
    .await?;
    let groups = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    ensure!(!groups.contains("upperdeck-idle"), "{groups}");
    // Where a cgroup limits its memory, one outside the idle group does now.
    ensure!(
        !groups.contains(group) || groups.contains(&format!("/upperdeck-saves/{group}")),
        "{groups}"
    );
    gate.write_all(b"y")?;
    ensure!(next("\"saved\""), "it was not saved");
    ensure!(child.wait()?.success());
    for top in [
        "/sys/fs/cgroup",
        "/sys/fs/cgroup/memory",
        "/sys/fs/cgroup/unified",
    ] {
        for parent in ["upperdeck-idle", "upperdeck-saves"] {
            drop(fs::remove_dir(Path::new(top).join(parent).join(group)));
        }
    }
    Ok(())
}
