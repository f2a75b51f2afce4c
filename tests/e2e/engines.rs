//! Docker and Podman: saved without asking either, pulled and run by it again.

use anyhow::{Result, ensure};

use crate::host::docker::{Docker, Running};
use crate::host::image::{Base, Format, base};
use crate::host::podman::Podman;
use crate::host::registry::Registry;
use crate::host::{Freezer, Roots, Scratch};
use crate::save::{
    LEFT_OUT, TOUCHED_BY_ENGINES, TOUCHED_BY_RUNTIMES, WORK, config, layers, manifest, same_tree,
    save, set_attributes, unpack,
};
use crate::support::{Need, ignored};

fn check(
    scratch: &Scratch,
    registry: &Registry,
    roots: &Roots,
    container: &Running,
    base: &str,
    except: &[&str],
) -> Result<String> {
    let destination = registry.reference("users/ada:saved");
    let saved = save(scratch, roots, "session", &destination, &[])?;
    ensure!(!Freezer::of(container.pid)?.frozen());
    let rootfs = unpack(scratch, &saved.reference)?;
    let except = [LEFT_OUT, except].concat();
    same_tree(&container.rootfs, &rootfs, &except, TOUCHED_BY_RUNTIMES, 60)?;
    ensure!(!rootfs.join(".dockerenv").exists());
    ensure!(
        !rootfs.join("data/in-the-volume").exists(),
        "a volume's file is in the image"
    );
    // An unpacked base is gone from these engines' disks: its layers come from where they are known to be, as they were.
    // (Docker keeps no manifest: the media types are the program's choice.)
    let digests = |reference: &str| -> Result<Vec<String>> {
        Ok(layers(&manifest(reference)?)
            .into_iter()
            .map(|(_, digest)| digest)
            .collect())
    };
    assert_eq!(digests(&saved.reference)?[..3], digests(base)?[..]);
    let (before, after) = (config(base)?, config(&saved.reference)?);
    assert_eq!(after["config"], before["config"]);
    // The short ID works as the name does.
    let again = save(
        scratch,
        roots,
        &container.id[..12],
        &registry.reference("users/short:saved"),
        &[],
    )?;
    assert_eq!(
        layers(&manifest(&again.reference)?),
        layers(&manifest(&saved.reference)?)
    );
    Ok(destination)
}

fn lab(programs: &[&str]) -> Result<Option<(Scratch, Registry, String)>> {
    let mut needs: Vec<Need<'_>> = programs.iter().map(|name| Need::Program(name)).collect();
    needs.extend(
        [
            "docker-registry",
            "buildah",
            "skopeo",
            "umoci",
            "busybox",
            "python3",
        ]
        .map(Need::Program),
    );
    needs.push(Need::Root);
    if ignored(&needs) {
        return Ok(None);
    }
    let scratch = Scratch::new()?;
    let registry = Registry::start(&scratch)?;
    let image = registry.push(&base(Base::Small, Format::Docker)?, "bases/notebook:1")?;
    Ok(Some((scratch, registry, image)))
}

#[test]
fn a_docker_container_is_saved_and_runs_again() -> Result<()> {
    let Some((scratch, registry, image)) = lab(&["dockerd", "docker", "runc"])? else {
        return Ok(());
    };
    let docker = Docker::start(&scratch)?;
    let container = docker.run("session", &image, &["-e", "TOKEN=hunter2"], &[])?;
    docker.shell(&container, WORK)?;
    set_attributes(container.pid, true)?;
    docker.shell(&container, "echo volume > /data/in-the-volume")?;
    let destination = check(
        &scratch,
        &registry,
        &docker.roots(&scratch),
        &container,
        &image,
        &[],
    )?;
    let copy = docker.run("copy", &destination, &[], &[])?;
    same_tree(
        &container.rootfs,
        &copy.rootfs,
        LEFT_OUT,
        TOUCHED_BY_ENGINES,
        60,
    )?;
    assert_eq!(
        docker.shell(&copy, "cat /home/researcher/work/b.ipynb")?,
        "notebook"
    );
    Ok(())
}

#[test]
fn a_podman_container_is_saved_and_runs_again() -> Result<()> {
    let Some((scratch, registry, image)) = lab(&["podman", "conmon", "runc"])? else {
        return Ok(());
    };
    let podman = Podman::new(&scratch)?;
    let container = podman.run("session", &image, &["-e", "TOKEN=hunter2"], &[])?;
    podman.shell(&container, WORK)?;
    set_attributes(container.pid, true)?;
    podman.shell(&container, "echo volume > /data/in-the-volume")?;
    let destination = check(
        &scratch,
        &registry,
        &podman.roots(&scratch),
        &container,
        &image,
        // Podman gives its own mode to a root that no layer of the base describes.
        &["."],
    )?;
    let copy = podman.run("copy", &destination, &[], &[])?;
    same_tree(
        &container.rootfs,
        &copy.rootfs,
        LEFT_OUT,
        TOUCHED_BY_ENGINES,
        60,
    )?;
    assert_eq!(
        podman.shell(&copy, "cat /home/researcher/work/b.ipynb")?,
        "notebook"
    );
    Ok(())
}
