//! Volumes: which of them are saved, with which permissions they are read, and that a mount that a tenant controls
//! cannot block a save.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Output, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use upperdeck::node::container::Pattern;
use upperdeck::service::job::{Code, Order, Outcome, Update};

use crate::node::{Node, Service, UPPERDECK, local, wait};
use crate::support::ignore;

/// Flags for the first process of the container: a user without capabilities, with a supplementary group.
const AS_RESEARCHER: &str = "--userspec=1000:1000 --groups=2000";
/// Content of files that belong to another user.
const OTHERS: &str = "the password of another user\n";

/// Files in the volume: path, owner, group, mode, and the mode of the file's own directory, if there is one.
const FILES: [(&str, u32, u32, u32, Option<u32>); 7] = [
    ("own", 1000, 1000, 0o600, None),
    ("everybodys", 1001, 1001, 0o644, None),
    ("groups", 1001, 2000, 0o640, None),
    ("others", 1001, 1001, 0o600, None),
    ("other-group", 1001, 1001, 0o640, None),
    ("closed/inside", 1001, 1001, 0o600, Some(0o700)),
    ("closed-too/inside", 1001, 1001, 0o644, Some(0o700)),
];
const READABLE: [&str; 3] = ["everybodys", "groups", "own"];

fn fill(volume: &Path) -> Result<()> {
    fs::set_permissions(volume, fs::Permissions::from_mode(0o755))?;
    for (path, uid, gid, mode, directory) in FILES {
        let file = volume.join(path);
        if let (Some(mode), Some(parent)) = (directory, file.parent()) {
            fs::create_dir(parent)?;
            fs::set_permissions(parent, fs::Permissions::from_mode(mode))?;
            chown(parent, Some(uid), Some(gid))?;
        }
        fs::write(&file, OTHERS)?;
        fs::set_permissions(&file, fs::Permissions::from_mode(mode))?;
        chown(&file, Some(uid), Some(gid))?;
    }
    Ok(())
}

/// Returns the names of everything below the volume in the image's layers, sorted.
fn saved(layout: &Path) -> Result<Vec<String>> {
    let blob = |digest: &serde_json::Value| {
        let digest = digest.as_str().unwrap_or_default();
        layout
            .join("blobs/sha256")
            .join(digest.trim_start_matches("sha256:"))
    };
    let json = |path: PathBuf| -> Result<serde_json::Value> {
        Ok(serde_json::from_slice(&fs::read(path)?)?)
    };
    let index = json(layout.join("index.json"))?;
    let manifest = json(blob(&index["manifests"][0]["digest"]))?;
    let mut found = Vec::new();
    for layer in manifest["layers"]
        .as_array()
        .context("layers")?
        .iter()
        .skip(1)
    {
        let listed = Command::new("tar")
            .arg("-tzf")
            .arg(blob(&layer["digest"]))
            .output()?;
        let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
        let inside = listed
            .lines()
            .filter_map(|path| path.strip_prefix("srv/data/"));
        found.extend(inside.filter(|path| !path.is_empty()).map(str::to_owned));
    }
    found.sort();
    Ok(found)
}

fn order_with_volume(node: &Node) -> Order {
    let mut order = node.order();
    order.options.include_volumes = vec!["/srv/data".to_owned()];
    order
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_gives_what_its_container_may_read() -> Result<()> {
    let Some(node) = Node::with_volume(AS_RESEARCHER).await? else {
        return Ok(());
    };
    let volume = node.path("volume");
    fill(&volume)?;
    let mut options = node.options();
    options.volumes = vec![volume.display().to_string().parse::<Pattern>()?];
    let service = Service::start(options, local());
    let order = order_with_volume(&node);
    service.queue.offer(&order).await?;
    let outcome = service.outcome(order.job).await?;
    ensure!(matches!(outcome, Outcome::Succeeded { .. }), "{outcome:?}");
    assert_eq!(saved(&node.path("images/alice/x"))?, READABLE);
    let warned = service.reports_of(order.job).into_iter().any(|report| {
        let text = format!("{:?}", report.update);
        text.contains("unreadable") && text.contains("4 files or directories")
    });
    ensure!(warned, "{:#?}", service.reports_of(order.job));

    // Again, after another file came to be readable and one is so no more.
    let with =
        |path: &str, mode| fs::set_permissions(volume.join(path), fs::Permissions::from_mode(mode));
    with("others", 0o644)?;
    with("everybodys", 0o600)?;
    let mut order = order_with_volume(&node);
    order.options.full = true;
    service.queue.offer(&order).await?;
    let outcome = service.outcome(order.job).await?;
    ensure!(matches!(outcome, Outcome::Succeeded { .. }), "{outcome:?}");
    assert_eq!(
        saved(&node.path("images/alice/x"))?,
        ["groups", "others", "own"]
    );
    service.end().await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_that_nobody_listed_is_not_saved() -> Result<()> {
    let Some(node) = Node::with_volume(AS_RESEARCHER).await? else {
        return Ok(());
    };
    fill(&node.path("volume"))?;
    let parent = node.path("").display().to_string();
    let parent = parent.trim_end_matches('/');
    for (patterns, code) in [
        (vec![], Code::Policy),
        (vec![format!("{parent}/vol")], Code::NotPermitted),
        (vec![format!("{parent}/{{user}}")], Code::NotPermitted),
        (vec!["tmpfs:".to_owned()], Code::NotPermitted),
    ] {
        let mut options = node.options();
        // The agent before may still have a thread that looks at something.
        options.spool_dir = node.path(&format!("spool-{}", patterns.join("").len()));
        options.volumes = patterns
            .iter()
            .map(|pattern| pattern.parse::<Pattern>())
            .collect::<Result<_, _>>()?;
        let service = Service::start(options, local());
        let order = order_with_volume(&node);
        service.queue.offer(&order).await?;
        let outcome = service.outcome(order.job).await;
        let outcome = outcome.with_context(|| format!("{patterns:?}"))?;
        ensure!(
            matches!(&outcome, Outcome::Failed { code: found, message, .. }
                if *found == code && message.contains("--allow-volume")),
            "{patterns:?}: {outcome:?}"
        );
        ensure!(!node.tagged());
        service.end().await?;
    }
    Ok(())
}

/// A file system that does not respond. It is unmounted on drop.
struct Silent {
    server: Child,
    words: BufReader<ChildStdout>,
}

impl Silent {
    /// Returns `None` if this machine has no FUSE.
    fn mount(node: &Node, target: &str, file: &[&str]) -> Result<Option<Self>> {
        if !Path::new("/dev/fuse").exists() {
            ignore("needs /dev/fuse");
            return Ok(None);
        }
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/agent/fuse.py");
        let mut server = Command::new("nsenter")
            .args([
                "--target",
                &node.pid.to_string(),
                "--mount",
                "python3",
                script,
            ])
            .arg(node.merged().join(target))
            .args(file)
            .stdout(Stdio::piped())
            .spawn()?;
        let words = BufReader::new(server.stdout.take().context("stdout")?);
        let mut silent = Self { server, words };
        silent.wait_for("up")?;
        Ok(Some(silent))
    }

    fn wait_for(&mut self, word: &str) -> Result<()> {
        let mut line = String::new();
        while line.trim() != word {
            line.clear();
            ensure!(self.words.read_line(&mut line)? > 0, "it ended");
        }
        Ok(())
    }
}

impl Drop for Silent {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

/// Runs `commit` on the command line, with a time limit in case it hangs.
async fn commit(node: &Node, name: &str, options: &[&str]) -> Result<Output> {
    let mut command = tokio::process::Command::new(UPPERDECK);
    command
        .args(["commit", "--state-dir="])
        .args(options)
        .arg(format!("--base=oci:{}:base", node.path("base").display()))
        .arg(format!("pid:{}", node.pid))
        .arg(format!("oci:{}:monday", node.path(name).display()))
        .kill_on_drop(true);
    let ended = tokio::time::timeout(Duration::from_secs(120), command.output()).await;
    Ok(ended.context("the save hangs")??)
}

const VOLUME: [&str; 2] = ["--include-volume", "/srv/data"];

#[tokio::test(flavor = "multi_thread")]
async fn a_mount_over_the_way_to_a_volume_is_not_walked() -> Result<()> {
    let Some(node) = Node::with_volume("").await? else {
        return Ok(());
    };
    fs::write(node.path("volume/file"), "x")?;
    let Some(silent) = Silent::mount(&node, "srv", &[])? else {
        return Ok(());
    };
    let done = commit(&node, "over", &VOLUME).await?;
    let said = String::from_utf8_lossy(&done.stderr).into_owned();
    assert_eq!(done.status.code(), Some(2), "{said}");
    ensure!(said.contains("leads through fuse at /srv"), "{said}");
    drop(silent);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mount_in_a_volume_is_not_asked() -> Result<()> {
    let Some(node) = Node::with_volume("").await? else {
        return Ok(());
    };
    fs::write(node.path("volume/file"), "x")?;
    fs::create_dir(node.path("volume/sub"))?;
    let Some(silent) = Silent::mount(&node, "srv/data/sub", &[])? else {
        return Ok(());
    };
    for pause in ["live", "full", "none"] {
        let options = [&VOLUME[..], &["--pause", pause]].concat();
        let done = commit(&node, pause, &options).await?;
        let said = String::from_utf8_lossy(&done.stderr).into_owned();
        ensure!(done.status.success(), "{pause}: {said}");
        assert_eq!(saved(&node.path(pause))?, ["file"], "{pause}");
    }
    drop(silent);
    Ok(())
}

/// Python program that maps a file that is never readable, and reads the mapping.
const MAPPER: &str = "
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDWR)
print(mmap.mmap(fd, 4096)[0])
";

#[tokio::test(flavor = "multi_thread")]
async fn a_mapped_file_that_is_never_read_holds_up_nothing() -> Result<()> {
    let Some(node) = Node::with_volume("").await? else {
        return Ok(());
    };
    fs::write(node.path("volume/file"), "x")?;
    fs::create_dir(node.path("volume/sub"))?;
    let Some(mut silent) = Silent::mount(&node, "srv/data/sub", &["file"])? else {
        return Ok(());
    };
    let mut mapper = Command::new("nsenter")
        .args(["--target", &node.pid.to_string(), "--mount"])
        .args(["python3", "-c", MAPPER])
        .arg(node.merged().join("srv/data/sub/f"))
        .spawn()?;
    fs::write(node.cgroup.join("cgroup.procs"), mapper.id().to_string())?;
    silent.wait_for("asked")?;
    for pause in ["none", "live"] {
        let options = [&VOLUME[..], &["--pause", pause]].concat();
        let done = commit(&node, pause, &options).await?;
        let said = String::from_utf8_lossy(&done.stderr).into_owned();
        // Who waits in the kernel may not be frozen: then nothing is saved, and that is said.
        ensure!(
            done.status.success() || (pause == "live" && said.contains("may be frozen")),
            "{pause}: {said}"
        );
        ensure!(!node.frozen(), "{pause}");
    }
    drop(silent);
    mapper.kill()?;
    mapper.wait()?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_child_that_cannot_die_gives_its_slot_back() -> Result<()> {
    let Some(node) = Node::with_volume("").await? else {
        return Ok(());
    };
    let Some(mut silent) = Silent::mount(&node, "srv", &[])? else {
        return Ok(());
    };
    let hangs = format!(
        "exec nsenter --target {} --mount stat {}/srv/x",
        node.pid,
        node.merged().display()
    );
    let mut options = node.options();
    options.slots = 1;
    options.program = node.program(&hangs)?;
    options.max_time = Duration::from_secs(1);
    options.heartbeat_every = Duration::from_millis(200);
    let service = Service::start(options, local());
    let stuck = node.order();
    service.queue.offer(&stuck).await?;
    let pid = wait("the child", || node.child(stuck.job)).await?;
    silent.wait_for("asked")?;
    let outcome = service.outcome(stuck.job).await?;
    ensure!(
        matches!(&outcome, Outcome::Failed { code: Code::TimedOut, message, .. }
            if message.contains("hangs in the kernel")),
        "{outcome:?}"
    );
    ensure!(Path::new(&format!("/proc/{pid}")).exists(), "it ended");
    ensure!(!node.frozen());
    // The only slot is free: the next order is answered.
    let next = node.order();
    service.queue.offer(&next).await?;
    let outcome = service.outcome(next.job).await?;
    ensure!(
        matches!(&outcome, Outcome::Failed { code: Code::Policy, message, .. }
            if message.contains(&format!("process {pid}"))),
        "{outcome:?}"
    );
    let told = service.queue.nodes().await?;
    ensure!(
        told.iter()
            .any(|node| node.problems.iter().any(|p| p.contains(&pid.to_string()))),
        "{told:?}"
    );
    // When it can end at last, the session may be saved again.
    drop(silent);
    wait("it ends", || {
        (!Path::new(&format!("/proc/{pid}")).exists()).then_some(())
    })
    .await?;
    let last = node.order();
    service.queue.offer(&last).await?;
    let said = service.final_update(last.job).await?;
    let refused = matches!(
        &said,
        Update::Ended {
            outcome: Outcome::Failed {
                code: Code::Policy,
                ..
            }
        }
    );
    ensure!(!refused, "{said:?}");
    service.end().await?;
    Ok(())
}

/// A capability in a user namespace applies only to files with IDs that the namespace maps.
#[test]
fn rights_of_a_user_namespace_end_with_its_ids() -> Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    use upperdeck::node::overlay::id_map::IdMapping;
    use upperdeck::node::overlay::identity::{Identity, ReadCapability, enter};

    if crate::support::ignored(&[crate::support::Need::Root]) {
        return Ok(());
    }
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("file");
    std::fs::write(&path, "x")?;
    let map = vec![IdMapping {
        inside: 0,
        outside: 100_000,
        count: 65_536,
    }];
    let mapped = ReadCapability::Mapped {
        uids: map.clone(),
        gids: map,
    };
    for (read_capability, owner, group, mode, expected) in [
        (ReadCapability::Nothing, 100_000, 100_000, 0o600, true),
        (ReadCapability::Nothing, 100_999, 100_999, 0o600, false),
        (ReadCapability::Nothing, 1001, 100_050, 0o640, true),
        (ReadCapability::All, 1001, 1001, 0o000, true),
        (mapped.clone(), 100_999, 100_999, 0o600, true),
        (mapped.clone(), 100_999, 1001, 0o600, false),
        (mapped.clone(), 1001, 100_999, 0o600, false),
        (mapped.clone(), 0, 0, 0o600, false),
        (mapped, 0, 0, 0o644, true),
    ] {
        std::os::unix::fs::chown(&path, Some(owner), Some(group))?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode))?;
        let handle = rustix::fs::open(&path, rustix::fs::OFlags::PATH, rustix::fs::Mode::empty())?;
        let who = std::sync::Arc::new(Identity {
            uid: 100_000,
            gid: 100_000,
            groups: vec![100_050],
            read_capability,
        });
        let rights = enter(Some(&who))?;
        let may = who.may_read(&handle, false)?;
        drop(rights);
        assert_eq!(may, expected, "{who:?} {owner}:{group} {mode:o}");
        // This program's own rights are back.
        std::fs::read(&path)?;
    }
    Ok(())
}
