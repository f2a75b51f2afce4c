//! Tests of the harness itself: every host runs a container and leaves nothing behind. A failure here points to the
//! machine or the harness, not to the program.

use std::path::Path;

use anyhow::{Result, ensure};

use crate::host::containerd::{Containerd, PodOptions};
use crate::host::docker::Docker;
use crate::host::image::{Base, Format, base};
use crate::host::podman::Podman;
use crate::host::process::{Mount, Process};
use crate::host::registry::Registry;
use crate::host::{Freezer, Scratch, leftovers};
use crate::save::{TREE, same_tree_by, unpack_layout};
use crate::support::{Need, ignored};

#[test]
fn a_pod_runs_without_kubernetes_and_goes_without_a_trace() -> Result<()> {
    if ignored(&[
        Need::Root,
        Need::Program("containerd"),
        Need::Program("docker-registry"),
        Need::Program("buildah"),
    ]) {
        return Ok(());
    }
    let scratch = Scratch::new()?;
    let root = scratch.path().to_owned();
    let registry = Registry::start(&scratch)?;
    registry.push(&base(Base::Pause, Format::Oci)?, "pause:1")?;
    let image = registry.push(&base(Base::Small, Format::Oci)?, "small:1")?;
    let mut containerd = Containerd::start(&scratch, &registry)?;
    let pod = containerd.run_pod(&image, &PodOptions::default())?;
    assert_eq!(containerd.shell(&pod, "cat /usr/lib/app/main")?, "main\n");
    ensure!(pod.rootfs.join("bin/busybox").exists());
    ensure!(!Freezer::of(pod.pid)?.frozen());
    containerd.kill()?;
    ensure!(!leftovers(&root).is_empty());
    drop((containerd, registry, scratch));
    assert_eq!(leftovers(&root), Vec::<String>::new());
    Ok(())
}

#[test]
fn docker_runs_a_container_and_goes_without_a_trace() -> Result<()> {
    if ignored(&[
        Need::Root,
        Need::Program("dockerd"),
        Need::Program("docker-registry"),
        Need::Program("buildah"),
    ]) {
        return Ok(());
    }
    let scratch = Scratch::new()?;
    let root = scratch.path().to_owned();
    let registry = Registry::start(&scratch)?;
    let image = registry.push(&base(Base::Small, Format::Docker)?, "small:1")?;
    let docker = Docker::start(&scratch)?;
    let container = docker.run("session", &image, &[], &[])?;
    assert_eq!(docker.shell(&container, "cat /usr/lib/app/main")?, "main");
    ensure!(container.rootfs.join("bin/busybox").exists());
    drop((docker, registry, scratch));
    assert_eq!(leftovers(&root), Vec::<String>::new());
    Ok(())
}

#[test]
fn podman_runs_a_container_and_goes_without_a_trace() -> Result<()> {
    if ignored(&[
        Need::Root,
        Need::Program("podman"),
        Need::Program("docker-registry"),
        Need::Program("buildah"),
    ]) {
        return Ok(());
    }
    let scratch = Scratch::new()?;
    let root = scratch.path().to_owned();
    let registry = Registry::start(&scratch)?;
    let image = registry.push(&base(Base::Small, Format::Oci)?, "small:1")?;
    let podman = Podman::new(&scratch)?;
    let container = podman.run("session", &image, &[], &[])?;
    assert_eq!(podman.shell(&container, "cat /usr/lib/app/main")?, "main");
    ensure!(container.rootfs.join("bin/busybox").exists());
    drop((podman, registry, scratch));
    assert_eq!(leftovers(&root), Vec::<String>::new());
    Ok(())
}

#[test]
fn processes_run_on_overlays_of_every_kind() -> Result<()> {
    if ignored(&[
        Need::Root,
        Need::Program("buildah"),
        Need::Program("umoci"),
        Need::Program("unshare"),
    ]) {
        return Ok(());
    }
    for mount in [
        Mount::default(),
        Mount {
            options: "redirect_dir=on,metacopy=on",
            ..Mount::default()
        },
        Mount {
            options: "userxattr",
            prefix: "user",
            ..Mount::default()
        },
        Mount {
            relative: true,
            more_layers: 97,
            ..Mount::default()
        },
        Mount {
            options: "userxattr",
            prefix: "user",
            shift: 200_000,
            ..Mount::default()
        },
    ] {
        let scratch = Scratch::new()?;
        let root = scratch.path().to_owned();
        let process = Process::start(&scratch, &mount)?;
        assert_eq!(
            process.shell("cat /usr/lib/app/main; echo x > /srv/new; rm /srv/new")?,
            "main",
            "{mount:?}"
        );
        // Only times have changed: the merged view is the image.
        let layout = process
            .base
            .trim_start_matches("oci:")
            .trim_end_matches(":latest");
        let rootfs = unpack_layout(Path::new(layout), "latest")?;
        let mut compare = process.enter(false);
        compare.args(["python3", TREE, "--shift", &mount.shift.to_string()]);
        same_tree_by(
            compare,
            &process.merged,
            &rootfs,
            &["dev"],
            &["srv", "."],
            60,
        )?;
        drop((process, scratch));
        assert_eq!(leftovers(&root), Vec::<String>::new());
    }
    Ok(())
}
