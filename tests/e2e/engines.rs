//! Docker and Podman containers are saved without contacting the engine, then pulled and run by it.

use anyhow::{Result, ensure};

use crate::host::docker::{Docker, Running};
use crate::host::image::Format;
use crate::host::podman::Podman;
use crate::host::registry::Registry;
use crate::host::{Freezer, Roots, Scratch};
use crate::lab::engine;
use crate::save::{
    LEFT_OUT, TOUCHED_BY_ENGINES, TOUCHED_BY_RUNTIMES, WORK, WORK_WITHOUT_SRV, config, digests,
    layers, manifest, meaningful, same_tree, save, set_attributes, unpack,
};

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
    // These engines do not keep the blobs of an unpacked base: the layers come unchanged from where they are known to
    // be.
    assert_eq!(
        digests(&manifest(&saved.reference)?)[..3],
        digests(&manifest(base)?)[..]
    );
    let (before, after) = (config(base)?, config(&saved.reference)?);
    assert_eq!(meaningful(&after["config"]), meaningful(&before["config"]));
    // The short ID works like the name.
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

#[test]
fn a_docker_container_is_saved_and_runs_again() -> Result<()> {
    let Some((scratch, registry, image)) = engine(&["dockerd", "docker", "runc"], Format::Docker)?
    else {
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
    let Some((scratch, registry, image)) = engine(&["podman", "conmon", "runc"], Format::Docker)?
    else {
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
        // Podman sets its own mode on a root that no layer of the base describes.
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

/// A named volume and a directory of the host are saved with their contents and nothing else, and then with what
/// changed.
#[test]
fn a_docker_container_is_saved_with_its_volumes() -> Result<()> {
    let Some((scratch, registry, image)) = engine(&["dockerd", "docker", "runc"], Format::Docker)?
    else {
        return Ok(());
    };
    let docker = Docker::start(&scratch)?;
    let bound = scratch.dir("bound")?;
    std::fs::write(bound.join("file"), vec![7; 70_000])?;
    std::fs::hard_link(bound.join("file"), bound.join("linked"))?;
    std::fs::create_dir_all(bound.join("deep/er"))?;
    std::os::unix::fs::symlink("../file", bound.join("deep/link"))?;
    let bind = format!("{}:/home/researcher", bound.display());
    let mounts = ["-v", "named:/srv", "-v", &bind];
    let container = docker.run("session", &image, &mounts, &[])?;
    let named = docker.docker(["volume", "inspect", "--format", "{{.Mountpoint}}", "named"])?;
    let named = std::path::Path::new(&named);
    // Docker copies the image's files at that path into an empty volume.
    ensure!(named.join("dash/a/x").exists());
    docker.shell(&container, WORK_WITHOUT_SRV)?;
    docker.shell(
        &container,
        "rm -r /srv/dash; echo own > /srv/own; echo volume > /data/of-another",
    )?;
    let both = [
        "--max-pause",
        "0",
        "--include-volume",
        "/srv",
        "--include-volume",
        "/home/researcher",
    ];
    let check = |tag: &str, expected: usize| -> Result<()> {
        let destination = registry.reference(&format!("users/volumes:{tag}"));
        let roots = docker.roots(&scratch);
        let saved = save(&scratch, &roots, "session", &destination, &both)?;
        ensure!(
            saved.metadata["saved_volumes"] == serde_json::json!(["/home/researcher", "/srv"]),
            "{}",
            saved.metadata["saved_volumes"]
        );
        let layers = saved.metadata["layers"].as_array().map(Vec::len);
        ensure!(
            layers == Some(expected),
            "{tag}: {}",
            saved.metadata["layers"]
        );
        ensure!(!saved.stderr.contains("saved anew"), "{}", saved.stderr);
        let rootfs = unpack(&scratch, &saved.reference)?;
        same_tree(named, &rootfs.join("srv"), &[], &[], 3)?;
        same_tree(&bound, &rootfs.join("home/researcher"), &[], &[], 5)?;
        let volumes = ["srv", "srv/*", "home/researcher", "home/researcher/*"];
        let except = [LEFT_OUT, &volumes].concat();
        same_tree(&container.rootfs, &rootfs, &except, TOUCHED_BY_RUNTIMES, 50)?;
        ensure!(
            !rootfs.join("data/of-another").exists(),
            "it was not asked for"
        );
        Ok(())
    };
    check("first", 3)?;
    docker.shell(
        &container,
        "echo more >> /srv/own; rm -r /srv/share; mkdir /srv/dash; echo x > /srv/dash/x; ln /srv/dash/x /srv/y",
    )?;
    check("named", 1)?;
    docker.shell(
        &container,
        "cd /home/researcher; rm file; mv deep deeper; rm -r work; echo x > linked; touch /opt/own; rm -r /srv/dash",
    )?;
    check("all", 3)?;
    check("nothing", 0)
}
