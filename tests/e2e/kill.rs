//! `kill -9` of the program at any moment: the container runs again within a second, and no tag refers to an incomplete
//! image.

use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::host::image::{Base, Format};
use crate::host::{Freezer, wait_at_most};
use crate::lab::Lab;
use crate::save::{LEFT_OUT, TOUCHED_BY_RUNTIMES, same_tree, save, unpack, upperdeck_itself};

#[test]
fn killed_at_any_moment_the_container_thaws_and_a_repeat_succeeds() -> Result<()> {
    let Some(lab) = Lab::new(Base::Small, Format::Oci)? else {
        return Ok(());
    };
    let pod = lab.session()?;
    // Enough data for a kill in the middle of the save.
    lab.containerd.shell(&pod, "for i in 1 2 3 4; do dd if=/dev/urandom of=/home/researcher/work/big$i bs=1048576 count=16; done")?;
    let freezer = Freezer::of(pod.pid)?;
    let start = Instant::now();
    save(
        &lab.scratch,
        &lab.roots,
        &pod.container,
        &lab.destination("kill/whole"),
        &["--pause", "full", "--full"],
    )?;
    let whole = start.elapsed();

    let (mut while_frozen, mut finished) = (0, 0);
    for round in 0..30_u32 {
        // The last ten rounds are live saves, whose pauses are too short to be hit often: the kills cover every other
        // phase.
        let how: &[&str] = if round < 20 {
            &["--pause", "full", "--full"]
        } else {
            &[]
        };
        // Spread over the whole run and slightly beyond its end, in steps that do not repeat.
        let moment = whole.mul_f64(f64::from(round * 7 % 20) / 19.0);
        let repository = format!("kill/round-{round}");
        let mut child = upperdeck_itself("commit", &lab.roots)
            .args(["--progress", "none"])
            .args(how)
            .args([&pod.container, &lab.destination(&repository)])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        if round < 4 {
            // Ensures that some kills hit the freeze, however busy the machine is.
            wait_at_most(Duration::from_secs(60), "the container is frozen", || {
                freezer.frozen()
            })?;
        } else {
            std::thread::sleep(moment);
        }
        let ended = child.try_wait()?.is_some();
        while_frozen += u32::from(freezer.frozen());
        child.kill()?;
        child.wait()?;
        wait_at_most(Duration::from_secs(1), "the container thaws", || {
            !freezer.frozen()
        })
        .with_context(|| format!("killed after {moment:?}"))?;
        if ended {
            finished += 1;
        } else if !lab.registry.tags(&repository).is_empty() {
            // Everything was done except for what is kept for the next save.
            let rootfs = unpack(&lab.scratch, &lab.destination(&repository))?;
            same_tree(&pod.rootfs, &rootfs, LEFT_OUT, TOUCHED_BY_RUNTIMES, 60)
                .with_context(|| format!("a tag after {moment:?}"))?;
        }
        assert_eq!(lab.containerd.shell(&pod, "echo alive")?, "alive\n");
    }
    ensure!(
        while_frozen >= 3,
        "only {while_frozen} of 30 kills came while the container was frozen ({finished} too late)"
    );

    let saved = save(
        &lab.scratch,
        &lab.roots,
        &pod.container,
        &lab.destination("kill/round-1"),
        &[],
    )?;
    let rootfs = unpack(&lab.scratch, &saved.reference)?;
    same_tree(&pod.rootfs, &rootfs, LEFT_OUT, TOUCHED_BY_RUNTIMES, 60)
}

#[test]
fn interrupted_it_says_so_and_thaws() -> Result<()> {
    use nix::sys::signal::{Signal, kill};
    let Some(lab) = Lab::new(Base::Small, Format::Oci)? else {
        return Ok(());
    };
    let pod = lab.session()?;
    lab.containerd.shell(
        &pod,
        "dd if=/dev/urandom of=/home/researcher/work/big bs=1048576 count=64",
    )?;
    let freezer = Freezer::of(pod.pid)?;
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let child = upperdeck_itself("commit", &lab.roots)
            .args(["--progress", "none", "--pause", "full", "--full"])
            .args([&pod.container, &lab.destination("kill/interrupted")])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        wait_at_most(Duration::from_secs(20), "the container is frozen", || {
            freezer.frozen()
        })?;
        kill(nix::unistd::Pid::from_raw(child.id() as i32), signal)?;
        let done = child.wait_with_output()?;
        crate::save::failed(&done, 130).with_context(|| signal.to_string())?;
        wait_at_most(Duration::from_secs(1), "the container thaws", || {
            !freezer.frozen()
        })?;
        ensure!(lab.registry.tags("kill/interrupted").is_empty());
    }
    Ok(())
}
