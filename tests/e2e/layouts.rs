//! Saves to layout directories that others prune, and that are killed.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Stdio;

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::{Signal, kill};
use serde_json::Value;

use crate::host::image::{Base, Format};
use crate::host::{Freezer, command, run, wait_at_most};
use crate::lab::Lab;
use crate::save::{
    LEFT_OUT, TOUCHED_BY_RUNTIMES, same_tree, save, unpack_layout, upperdeck_itself,
};

fn upperdeck(arguments: &[&str]) -> Result<Value> {
    let mut command = command(crate::support::program(), ["image"]);
    let told = run(command.args(arguments).args(["--format", "json"]))?;
    Ok(serde_json::from_str(&told)?)
}

fn blobs(layout: &Path) -> Result<BTreeSet<String>> {
    let at = layout.join("blobs/sha256");
    let names = std::fs::read_dir(at)?;
    names
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect()
}

/// The manifest says where the index of a layer is, also of one that an earlier save made.
#[test]
fn one_file_of_a_save_is_read_without_the_rest() -> Result<()> {
    let Some(lab) = Lab::new(Base::Small, Format::Oci)? else {
        return Ok(());
    };
    let pod = lab.session()?;
    let layout = lab.scratch.path().join("layout");
    let shell = |script: &str| lab.containerd.shell(&pod, script);
    shell(
        "cd /home/researcher/work; for n in 1 2 3 4; do echo $n >$n-small; \
         head -c 3000000 /dev/urandom >$n; done",
    )?;
    for (tag, layers) in [("one", 1), ("two", 2)] {
        let image = format!("oci:{}:{tag}", layout.display());
        let saved = save(&lab.scratch, &lab.roots, &pod.container, &image, &[])?;
        ensure!(
            saved.metadata["layers_above_base"] == layers,
            "{}",
            saved.metadata
        );
        let to = lab.scratch.path().join(tag).display().to_string();
        let source = format!("{image}:/home/researcher/work/3-small");
        let said = upperdeck(&["cp", &source, &to])?;
        ensure!(std::fs::read(&to)? == b"3\n", "{said}");
        let read = said["bytes_read"].as_u64().context("no bytes_read")?;
        ensure!(read > 0 && read < 3_000_000, "{said}");
        shell("echo 5 >/home/researcher/work/5-small")?;
    }
    Ok(())
}

#[test]
fn what_a_deletion_took_is_saved_again() -> Result<()> {
    let Some(lab) = Lab::new(Base::Small, Format::Oci)? else {
        return Ok(());
    };
    let pod = lab.session()?;
    let layout = lab.scratch.path().join("layout");
    let at = |tag: &str| format!("oci:{}:{tag}", layout.display());
    let save_as = |tag: &str| save(&lab.scratch, &lab.roots, &pod.container, &at(tag), &[]);
    let change = |n: u32| {
        lab.containerd
            .shell(&pod, &format!("echo {n} >/home/researcher/work/n"))
    };
    let first = save_as("one")?;
    ensure!(
        first.metadata["changes"]["since"] == "base",
        "{}",
        first.metadata
    );
    change(2)?;
    let second = save_as("two")?;
    let changes = &second.metadata["changes"];
    ensure!(
        changes["since"] == "previous"
            && changes["files"] == 1
            && changes["removed"] == 0
            && changes["largest"]
                == serde_json::json!([{"path": "/home/researcher/work/n", "bytes": 2}]),
        "{changes}"
    );
    ensure!(
        second.metadata["layers_above_base"] == 2,
        "{}",
        second.metadata
    );
    // The first image is part of the second.
    let removed = upperdeck(&["rm", &at("one")])?;
    change(3)?;
    let third = save_as("three")?;
    ensure!(
        third.metadata["layers_above_base"] == 3,
        "{removed}: {}",
        third.stderr
    );
    for tag in ["two", "three"] {
        upperdeck(&["rm", &at(tag)])?;
    }
    ensure!(blobs(&layout)?.is_empty(), "{:?}", blobs(&layout)?);
    // What is kept of the container says that three layers are there.
    change(4)?;
    let fourth = save_as("four")?;
    ensure!(
        fourth.metadata["layers_above_base"] == 1,
        "{}",
        fourth.metadata
    );
    ensure!(fourth.stderr.contains("saved anew"), "{}", fourth.stderr);
    same_tree(
        &pod.rootfs,
        &unpack_layout(&layout, "four")?,
        LEFT_OUT,
        TOUCHED_BY_RUNTIMES,
        60,
    )?;
    // The same for another layout, to which the layers would have been copied.
    upperdeck(&["rm", &at("four")])?;
    let other = lab.scratch.path().join("other");
    let destination = format!("oci:{}:five", other.display());
    let fifth = save(&lab.scratch, &lab.roots, &pod.container, &destination, &[])?;
    ensure!(
        fifth.metadata["layers_above_base"] == 1,
        "{}",
        fifth.metadata
    );
    same_tree(
        &pod.rootfs,
        &unpack_layout(&other, "five")?,
        LEFT_OUT,
        TOUCHED_BY_RUNTIMES,
        60,
    )
}

#[test]
fn a_save_that_is_killed_or_interrupted_leaves_nothing_in_a_layout() -> Result<()> {
    let Some(lab) = Lab::new(Base::Small, Format::Oci)? else {
        return Ok(());
    };
    let pod = lab.session()?;
    let big = "dd if=/dev/urandom of=/home/researcher/work/big bs=1048576 count=32";
    lab.containerd.shell(&pod, big)?;
    let freezer = Freezer::of(pod.pid)?;
    let layout = lab.scratch.path().join("layout");
    let at = |tag: &str| format!("oci:{}:{tag}", layout.display());
    let start = std::time::Instant::now();
    save(
        &lab.scratch,
        &lab.roots,
        &pod.container,
        &at("first"),
        &["--full"],
    )?;
    let whole = start.elapsed();
    let kept = blobs(&layout)?;
    let mut unfinished = 0;
    for round in 0..24_u32 {
        // Another change each time, so that no layer is there already.
        lab.containerd
            .shell(&pod, &format!("echo {round} >/home/researcher/work/round"))?;
        let mut child = upperdeck_itself("commit", &lab.roots)
            .args(["--progress", "none", "--full"])
            .args([&pod.container, &at("killed")])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        std::thread::sleep(whole.mul_f64(f64::from(round * 7 % 24) / 23.0));
        let ended = child.try_wait()?.is_some();
        if !ended && round % 2 == 0 {
            child.kill()?;
        } else if !ended {
            kill(
                nix::unistd::Pid::from_raw(child.id() as i32),
                Signal::SIGTERM,
            )?;
        }
        child.wait()?;
        wait_at_most(
            std::time::Duration::from_secs(5),
            "the container thaws",
            || !freezer.frozen(),
        )?;
        if round % 2 == 0 {
            // The next command, whatever it is, finds out that the process is dead: nothing here is old.
            upperdeck(&["prune", at("").trim_end_matches(':')])?;
        }
        let tags = upperdeck(&["ls", at("").trim_end_matches(':')])?;
        let saved = tags["total"] == 2;
        unfinished += u32::from(!saved);
        if saved {
            upperdeck(&["rm", &at("killed")])?;
        }
        let names = std::fs::read_dir(&layout)?.count();
        ensure!(
            blobs(&layout)? == kept && names == 3,
            "round {round}, saved: {saved}"
        );
    }
    ensure!(
        unfinished >= 5,
        "{unfinished} of 24 saves were stopped before their end"
    );
    let saved = save(&lab.scratch, &lab.roots, &pod.container, &at("killed"), &[])?;
    same_tree(
        &pod.rootfs,
        &unpack_layout(&layout, "killed")?,
        LEFT_OUT,
        TOUCHED_BY_RUNTIMES,
        60,
    )
    .context(saved.stderr)
}
